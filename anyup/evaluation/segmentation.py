"""The linear probe for segmentation: what a mask asks of a probe, and mIoU and accuracy of every method and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyup.evaluation.attention_weights import Carrier
from anyup.evaluation.datasets import VOID, Labels, Sample, check_split, read_mask
from anyup.evaluation.probe import Probes, confusion, losses, scores
from anyup.evaluation.probing import Source, sum_over
from anyup.evaluation.report import probes_table, spread, table
from anyup.images import normalize_imagenet
from anyup.reporting import Reporter


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
        self, weights: Sequence[Carrier], logits: Sequence[Tensor], targets: Sequence[Tensor], seeds: int
    ) -> Tensor:
        valid = sum(map(self.known, targets))
        total = torch.zeros(seeds)
        # The carried logits of one image alive at a time.
        for of_image, low, labels in zip(weights, logits, targets, strict=True):
            each = losses(of_image, low, labels, seeds, self.outputs)
            (each.sum() / valid).backward()
            total += each.detach().cpu() / valid
        return total


class Evaluation:
    """See `probing.Evaluation`."""

    def __init__(self, labels: Labels) -> None:
        self.task = Segmentation(labels)

    def check(self, samples: Sequence[Sample], size: int, split: str, reporter: Reporter) -> list[Sample]:
        """See `datasets.check_split`."""
        return check_split(samples, self.task.labels, size, split, reporter)

    def test(self, source: Source, samples: Sequence[Sample], probes: Probes, reporter: Reporter) -> dict[str, Any]:
        """Of each method: mean and spread over the seeds, and the seeds themselves.

        The upsamplers run as a user would run them. See `probing.sum_over` for a test that was interrupted.
        """
        with torch.inference_mode():
            counts = sum_over(
                source, samples, probes, "confusion", lambda sample: self._confusion(source, sample, probes), reporter
            )
        results: dict[str, dict[str, Any]] = {}
        for method, of_method in zip(source.methods, counts, strict=True):
            seeds = [scores(of_seed) for of_seed in of_method]
            results[method] = {name: spread([seed[name] for seed in seeds]) for name in ("miou", "accuracy")}
            results[method]["seeds"] = seeds
        return results

    def table(self, results: Mapping[str, Any], history: Sequence[Mapping[str, Sequence[float]]]) -> str:
        """The results, with the losses of the last epoch."""
        return table(*probes_table("segmentation", results, history))

    def _confusion(self, source: Source, sample: Sample, probes: Probes) -> Tensor:
        """(methods, seeds, classes, classes) of an image."""
        encoded, size = source.encoded(sample), (source.size, source.size)
        features = encoded.features.to(source.device)
        image = normalize_imagenet(source.image(sample)).to(source.device)
        low, mask = probes(encoded.probed.to(source.device)), source.target(sample)
        # The carried logits of one method alive at a time.
        counts = []
        for index, upsampler in enumerate(source.upsamplers):
            logits = probes.finish(index, upsampler(image, features, size, values=low[index][None])[0])
            counts.append(confusion(logits.unflatten(0, (len(probes.seeds), -1)), mask))
        return torch.stack(counts)
