"""The linear probe for segmentation: what a mask asks of a probe, and mIoU and accuracy of every method and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyup.evaluation.attention_weights import FixedWeights
from anyup.evaluation.datasets import VOID, Labels, Sample, check_split, read_mask
from anyup.evaluation.probe import Probes, Scores, losses
from anyup.evaluation.probing import Source
from anyup.evaluation.report import spread, table
from anyup.images import normalize_imagenet
from anyup.training.reporting import Rate, Reporter


@dataclass(frozen=True)
class Segmentation:
    """A class for each pixel, by the cross-entropy over the pixels that are not void."""

    labels: Labels

    @property
    def outputs(self) -> int:
        return self.labels.classes

    def target(self, sample: Sample, size: int) -> Tensor:
        """(size, size) uint8 with VOID."""
        return read_mask(sample, self.labels, size)

    def known(self, target: Tensor) -> int:
        return int((target != VOID).sum())

    def settings(self) -> dict[str, Any]:
        return {"classes": list(self.labels.names), "values": self.labels.describe()}

    def backward(
        self, weights: Sequence[FixedWeights], logits: Sequence[Tensor], targets: Sequence[Tensor], seeds: int
    ) -> Tensor:
        valid = sum(map(self.known, targets))
        total = torch.zeros(seeds)
        # The carried logits of one image alive at a time.
        for of_image, low, labels in zip(weights, logits, targets, strict=True):
            each = losses(of_image, low, labels, seeds)
            (each.sum() / valid).backward()
            total += each.detach().cpu() / valid
        return total


class Evaluation:
    """See `probing.Evaluation`; ImportError where torchmetrics is missing, now and not after hours."""

    def __init__(self, labels: Labels) -> None:
        self.task = Segmentation(labels)
        Scores([], [], labels.classes)

    def check(self, samples: Sequence[Sample], size: int, split: str, reporter: Reporter) -> list[Sample]:
        """See `datasets.check_split`."""
        return check_split(samples, self.task.labels, size, split, reporter)

    def test(self, source: Source, samples: Sequence[Sample], probes: Probes, reporter: Reporter) -> dict[str, Any]:
        """Of each method: mean and spread over the seeds, and the seeds themselves.

        The upsamplers run as a user would run them.
        """
        scores = Scores(source.methods, probes.seeds, self.task.outputs)
        size = (source.size, source.size)
        rate = Rate()
        with torch.inference_mode():
            for count, sample in enumerate(samples, 1):
                encoded = source.encoded(sample)
                features = encoded.features.to(source.device)
                image = normalize_imagenet(source.image(sample)).to(source.device)
                mask = source.target(sample)
                low = probes(encoded.probed.to(source.device))
                for index, upsampler in enumerate(source.upsamplers):
                    logits = upsampler(image, features, size, values=low[index][None])
                    scores.update(upsampler.name, logits[0].unflatten(0, (len(probes.seeds), -1)), mask)
                left = rate.count_of(count, len(samples))
                reporter.tick(f"testing: {count} of {len(samples)} images{left}", last=count == len(samples))
        return {
            method: {
                "miou": spread([s["miou"] for s in of_seeds]),
                "accuracy": spread([s["accuracy"] for s in of_seeds]),
                "seeds": list(of_seeds),
            }
            for method, of_seeds in scores.compute().items()
        }

    def table(self, results: Mapping[str, Any], history: Sequence[Mapping[str, Sequence[float]]]) -> str:
        """The results, with the losses of the last epoch; percent."""
        rows = []
        for method, result in results.items():
            cells = [
                f"{100 * result[name]['mean']:.2f} ± {100 * result[name]['std']:.2f}" for name in ("miou", "accuracy")
            ]
            last = spread(history[-1][method])
            rows.append([method, *cells, f"{last['mean']:.4f}"])
        return table(["method", "mIoU, %", "pixel accuracy, %", "training loss"], rows)
