"""A training run: that it learns, what it keeps, and that it goes on as if nothing had happened."""

from __future__ import annotations

import fnmatch
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")

from support import small_training
from support.captured import Graph
from support.checkouts import ROOT
from support.patience import PATIENCE, wait_until
from support.small_training import Told, make_photographs, records, settings

import anyup
from anyup.training import loop, pass_graphs, preparation, state
from anyup.training.config import ConfigError, Optimizer, RunFolder
from anyup.training.distributed import AccelerateEngine, Engine
from anyup.training.preparation import prepare
from anyup.training.shared_passes import upsampled
from anyup.training.trainer import Trainer, learning_rate, make_upsampler


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(preparation, "load_encoder", small_training.load_encoder)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_photographs(tmp_path / "photographs")
    return tmp_path


def train(folder: Path, *overrides: str, **arguments: Any) -> list[str]:
    told = Told()
    loop.train(settings(folder, *overrides), reporter=told, **arguments)
    return told.lines


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(folder) if "loss" in record]


def trainer(folder: Path, *overrides: str, engine: Engine | None = None) -> Trainer:
    chosen = settings(folder, *overrides)
    engine = engine or Engine(torch.device("cpu"))
    found = loop.find_photographs(chosen.data.photographs)
    prepared = prepare(chosen, found, engine, Told())
    return Trainer(chosen, make_upsampler(chosen), prepared.source, prepared.paths, engine)


# What a run does.


@pytest.mark.slow
def test_a_run_learns(folder: Path) -> None:
    train(
        folder, "optimizer.steps=40", "run.validate_every=0", "guidance.schedule=[[0, 16]]", "loss.self_consistency=0"
    )
    found = [loss for _, loss in losses(folder / "run")]
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_a_run_leaves_weights_that_load_reads_and_a_log(folder: Path) -> None:
    lines = train(folder)
    final = anyup.load(folder / "run" / "final.pth")
    latest = anyup.load(folder / "run" / "latest.pth")
    for name, tensor in final.state_dict().items():
        assert torch.equal(tensor, latest.state_dict()[name]), name
    assert [step for step, _ in losses(folder / "run")] == [1, 2, 3, 4]
    held_out = [record["held_out"]["tiny:8"] for record in records(folder / "run") if "held_out" in record]
    assert len(held_out) == 2 and all(0 < score["distance"] < 2 for score in held_out)
    assert any("6 photographs, step 0 of 4" in line for line in lines)
    assert any("step 2 of 4: loss" in line and "samples/s" in line and "left" in line for line in lines)
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["final.pth", "latest.pth", "log.jsonl"]


@pytest.mark.slow
def test_shipped_weights_are_the_average_and_not_the_last(folder: Path) -> None:
    train(folder)
    stored, shipped = state.load(folder / "run" / "latest.pth")
    assert any(not torch.equal(stored.weights[name], tensor) for name, tensor in shipped.items())
    train(folder, "optimizer.average=0", "output=" + (folder / "plain").as_posix())
    stored, shipped = state.load(folder / "plain" / "latest.pth")
    assert all(torch.equal(stored.weights[name], tensor) for name, tensor in shipped.items())


@pytest.mark.slow
def test_tensorboard_gets_the_terms_and_the_scores(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(folder, "run.tensorboard=true")
    shown = EventAccumulator(str(folder / "run" / "tensorboard"))
    shown.Reload()
    expected = {"loss", "cosine", "mse", "input", "self", "learning_rate", "loss/tiny:8", "samples_per_second"}
    assert expected | {"held_out/tiny:8/distance", "held_out/tiny:8/error"} == set(shown.Tags()["scalars"])
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4]


def test_without_tensorboard_a_run_says_so_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    lines = train(folder, "run.tensorboard=true", "optimizer.steps=1")
    assert any("need the package tensorboard" in line for line in lines)
    assert len(losses(folder / "run")) == 1


@pytest.mark.slow
def test_checkpoints_to_keep_stay(folder: Path) -> None:
    train(folder, "run.keep_every=2")
    for step in (2, 4):
        assert state.load(folder / "run" / f"step-{step:07}.pth")[0].step == step


def test_a_run_puts_nothing_into_its_folder_that_is_not_declared(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    train(folder, "run.keep_every=2", "run.tensorboard=true", "optimizer.steps=2")
    names = {path.name for path in (folder / "run").iterdir()}
    assert {pattern for pattern in RunFolder.holds if fnmatch.filter(names, pattern)} == set(RunFolder.holds)
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in RunFolder.holds) for name in names)


def test_a_run_starts_from_given_weights(folder: Path) -> None:
    train(folder)
    weights = (folder / "run" / "final.pth").as_posix()
    made = make_upsampler(settings(folder, f"model.weights={weights}"))
    for name, tensor in anyup.load(weights).state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)


def test_frozen_modules_stay_as_they_are_and_the_others_learn(folder: Path) -> None:
    frozen = ("image_encoder", "key_encoder", "query_encoder.1", "rope")
    chosen = settings(folder, f"model.frozen={list(frozen)}")
    before = make_upsampler(chosen).state_dict()
    train(folder, f"model.frozen={list(frozen)}")
    still = ("cross_decode.cross_attn.attention.out_proj", *frozen)
    for name, tensor in state.load(folder / "run" / "latest.pth")[0].weights.items():
        assert torch.equal(tensor, before[name]) == name.startswith(still), name


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["image"], "expected modules of the upsampler .image_encoder, .* got 'image'"),
        ([""], "got ''"),
        ([name for name, _ in anyup.AnyUp().named_children()], "expected a module to be left that learns"),
    ],
)
def test_what_cannot_be_frozen_is_told(folder: Path, frozen: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_upsampler(settings(folder, f"model.frozen={frozen}"))


def test_a_run_without_a_cache_encodes_as_it_goes(folder: Path) -> None:
    lines = train(folder, "data.cache=", "optimizer.steps=2")
    assert [step for step, _ in losses(folder / "run")] == [1, 2]
    assert not any("features of" in line for line in lines)
    assert not (folder / "cache").exists()


def test_cache_only_fills_the_cache_and_trains_nothing(folder: Path) -> None:
    lines = train(folder, cache_only=True)
    assert any("features of tiny:8: 6 of 6 photographs" in line for line in lines)
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links of POSIX")
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        *((kind, "data.cache='{folder}/cache'") for kind in ("other bytes", "a pipe", "a link to nothing")),
        ("other bytes", "data.cache=''"),
    ],
)
def test_a_broken_photograph_is_told_once_and_left_out(folder: Path, kind: str, cache: str) -> None:
    path = folder / "photographs" / "photo_01.png"
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("nothing.png")
    else:
        path.write_bytes(b"no picture")
    lines = train(folder, "encoders=['tiny:8', 'tiny:4']", cache.format(folder=folder))
    assert sum("left out" in line and "photo_01.png" in line for line in lines) == 1
    assert any("5 photographs" in line for line in lines) or cache == "data.cache=''"  # then found while training
    assert len(losses(folder / "run")) == 4


def test_photographs_that_are_all_broken_stop_a_run(folder: Path) -> None:
    for path in (folder / "photographs").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="data.photographs: none of 6 .* can be used"):
        train(folder)


def test_a_run_does_not_write_over_another(folder: Path) -> None:
    train(folder)
    with pytest.raises(ValueError, match="--resume goes on from it"):
        train(folder)


def test_resuming_needs_a_checkpoint(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--resume: there is no checkpoint"):
        train(folder, resume=True)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("output={folder}/file", NotADirectoryError, "file: expected a folder"),
        ("output={folder}/file/run", OSError, "file"),
        ("data.cache={folder}/file", OSError, "file"),
        ("data.cache={folder}/file/cache", OSError, "file"),
        ("run.backend=flex", NotImplementedError, "no backend can run this"),
        ("run.device=cuda:77", ValueError, "cuda:77"),
        ("model.weights=nothing", FileNotFoundError, "nothing"),
        ("run.graphs=true", ConfigError, "run.graphs: expected one process on a GPU, got a run on cpu"),
    ],
)
def test_a_run_that_cannot_be_stops_before_any_features_are_made(
    folder: Path, setting: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("kept", encoding="utf-8")
    monkeypatch.setattr(loop, "prepare", lambda *_: pytest.fail("features are made"))
    with pytest.raises(error, match=message):
        train(folder, setting.format(folder=folder.as_posix()))
    assert {path.name for path in folder.iterdir()} == {"config.toml", "file", "photographs"}
    assert (folder / "file").read_text(encoding="utf-8") == "kept"


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        train(folder, "optimizer.learning_rate=1e30", "optimizer.steps=20", "run.validate_every=0")


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(folder: Path) -> None:
    running = trainer(folder)
    latest = folder / "run" / state.LATEST
    latest.parent.mkdir()
    running.save(latest)
    before = latest.read_bytes()
    with torch.no_grad():
        running.upsampler.key_encoder[0].weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0: weights are not finite: key_encoder\.0\.weight"):
        running.save(latest)
    assert latest.read_bytes() == before


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(folder: Path) -> None:
    train(folder)
    latest = folder / "run" / state.LATEST
    content = torch.load(latest)
    content["training"]["weights"]["rope.freqs"][0, 0] = torch.inf
    torch.save(content, latest)
    with pytest.raises(ValueError, match=r"latest\.pth: weights are not finite, .*: rope\.freqs \(1 of"):
        train(folder, "optimizer.steps=6", resume=True)


def test_learning_rate_warms_up_and_decays() -> None:
    optimizer = Optimizer(steps=12, warmup=2, learning_rate=1.0, decay="cosine", final_fraction=0.1)
    rates = [learning_rate(optimizer, step) for step in range(13)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert learning_rate(Optimizer(warmup=2, learning_rate=1.0), 1000) == 1.0


# The loss of a step.


def terms_of(one: Trainer) -> dict[str, float]:
    """The terms of the next step's loss; its gradients are in the parameters then."""
    return {name: value.item() for name, value in one.backward()[1].items()}


def test_a_step_waits_for_no_device(folder: Path) -> None:
    extra = ("optimizer.clip=1.0", "loss.self_consistency_size=24", "loss.place=0.5")
    # Its tensors have no numbers, and asking for one is an error.
    ready = trainer(folder, *extra)
    engine = Engine(torch.device("meta"))
    asked = Trainer(ready.settings, make_upsampler(ready.settings), ready.source, ready.paths, engine)
    record = asked.advance()
    assert asked.step == 1
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        record.read()


@pytest.mark.parametrize("unread", [0, 1])
def test_a_record_has_the_numbers_of_its_step(folder: Path, unread: int) -> None:
    one, other = trainer(folder, "optimizer.clip=1.0"), trainer(folder, "optimizer.clip=1.0")
    records = [one.advance() for _ in range(1 + unread)]
    expected = terms_of(other)
    read = records[0].read()
    assert {name: read[name] for name in expected} == expected
    assert read["step"] == 1 and read["norm"] > 0 and read["encoder"] == "tiny:8"


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_micro_batches_give_the_gradients_of_the_whole(folder: Path, backend: str) -> None:
    whole, parts = (
        trainer(folder, f"optimizer.micro_batch={size}", f"run.backend={backend}", "loss.self_consistency_share=0.5")
        for size in (0, 3)
    )
    terms = [terms_of(one) for one in (whole, parts)]
    assert terms[0]["loss"] == pytest.approx(terms[1]["loss"], rel=1e-5)
    assert terms[0]["self"] == pytest.approx(terms[1]["self"], rel=1e-4)
    for (name, one), other in zip(whole.upsampler.named_parameters(), parts.upsampler.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_synthetic_micro_batches_give_the_gradients_of_the_whole(folder: Path) -> None:
    extra = ("variation.synthetic=1.0", "loss.place=0.5", "loss.self_consistency_share=0.5")
    whole, parts = (trainer(folder, f"optimizer.micro_batch={size}", *extra) for size in (0, 2))
    terms = [terms_of(one) for one in (whole, parts)]
    for name in ("loss", "place", "self"):
        assert terms[0][name] == pytest.approx(terms[1][name], rel=1e-4)
    for (name, one), other in zip(whole.upsampler.named_parameters(), parts.upsampler.parameters(), strict=True):
        if one.grad is not None:
            assert other.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_known_maps_take_the_weights_of_the_features_and_leave_these_alone(folder: Path) -> None:
    plain, carried = (trainer(folder, f"loss.place={weight}") for weight in (0, 0.5))
    terms = terms_of(plain), terms_of(carried)
    for name in ("cosine", "mse", "input", "self"):
        assert terms[1][name] == pytest.approx(terms[0][name], rel=1e-5)
    assert "place" not in terms[0]
    _, (batch,) = carried._take()
    upsampler, size = carried.upsampler, (batch.side, batch.side)
    cells = torch.nn.functional.adaptive_avg_pool2d(batch.known, batch.low.shape[2:])
    alone = upsampler(batch.guidance, batch.low, size, values=cells)
    expected = 0.5 * (alone - batch.known).square().mean()
    assert terms[1]["place"] == pytest.approx(expected.item(), rel=1e-4)


def test_terms_sum_to_the_loss_and_weights_scale_them(folder: Path) -> None:
    terms = terms_of(trainer(folder))
    names = ("cosine", "mse", "input", "self")
    assert terms["loss"] == pytest.approx(sum(terms[name] for name in names))
    heavier = terms_of(trainer(folder, "loss.input_consistency=0.4", "loss.self_consistency=0.3", "loss.mse=2.0"))
    assert heavier["input"] == pytest.approx(4 * (terms["input"] + 0), rel=0.5)
    assert heavier["cosine"] == pytest.approx(terms["cosine"])
    assert heavier["mse"] == pytest.approx(2 * terms["mse"])
    without = terms_of(trainer(folder, "loss.input_consistency=0", "loss.self_consistency=0"))
    assert without["loss"] == pytest.approx(terms["cosine"] + terms["mse"])


@pytest.mark.parametrize("size", [0, 12, 24])
def test_what_the_self_consistency_shares_is_what_calls_of_their_own_give(size: int, folder: Path) -> None:
    one = trainer(folder, f"loss.self_consistency_size={size}", "loss.self_consistency_share=0.5", "run.backend=torch")
    _, (batch,) = one._take()
    count, side, upsampler = len(batch.augmented), size or batch.side, one.upsampler
    assert 0 < count < len(batch.guidance)
    found = upsampled(upsampler, batch, batch.low, side)
    expected = (
        upsampler(batch.guidance, batch.low, (batch.side, batch.side)),
        upsampler(batch.guidance[:count], batch.low[:count], (side, side)),
        upsampler(batch.augmented, batch.low[:count], (side, side)),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # No gradient flows through the clean half.
    assert [each.requires_grad for each in found] == [True, False, True]
    weights = [parameter for parameter in upsampler.parameters() if parameter.requires_grad]
    one_by_one, shared = (
        torch.autograd.grad((out.square().sum(), changed.cos().sum()), weights) for out, _, changed in (expected, found)
    )
    torch.testing.assert_close(shared, one_by_one, rtol=1e-3, atol=1e-4)


def test_the_losses_run_on_the_backend_of_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyup.ops.feature_distance.operator import OPERATION

    asked: list[Any] = []
    run = OPERATION.run

    def recorded(name: str, problem: Any, backend: Any, *tensors: Any, **settings: Any) -> Any:
        asked.append(backend)
        return run(name, problem, backend, *tensors, **settings)

    monkeypatch.setattr(OPERATION, "run", recorded)
    for backend in ("reference", "torch", ""):
        asked.clear()
        terms_of(trainer(folder, f"run.backend={backend}"))
        assert [each[0] if each else "" for each in asked] == 6 * [backend]  # three distances, both ways


# Going on.


# Steps as CUDA graphs, made up here: a replay makes the passes again, of the tensors that it has taken.


def test_steps_as_graphs_have_the_losses_and_weights_of_steps_without(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Graph] = []
    monkeypatch.setattr(pass_graphs, "graph_of", lambda *arguments: made.append(Graph(*arguments)) or made[-1])
    # Two shapes of guidance: two graphs, from the third time on.
    extra = ("guidance.schedule=[[0, 16], [5, 12]]", "optimizer.clip=0.5", "loss.place=0.5", "optimizer.batch=2")
    plain, graphs = trainer(folder, *extra), trainer(folder, *extra, "run.graphs=true")
    for _ in range(10):
        assert graphs.advance().read() == plain.advance().read()
    assert len(made) == 2
    weights = graphs.upsampler.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.upsampler.state_dict().items())


def test_micro_batches_are_no_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_graphs, "graph_of", lambda *_: pytest.fail("is captured"))
    extra = ("optimizer.batch=2", "optimizer.micro_batch=1", "guidance.schedule=[[0, 16]]")
    plain, graphs = trainer(folder, *extra), trainer(folder, *extra, "run.graphs=true")
    for _ in range(3):
        assert graphs.advance().read() == plain.advance().read()


@pytest.mark.parametrize("error", [NotImplementedError("no graph can hold it"), torch.OutOfMemoryError("too large")])
def test_what_cannot_be_captured_runs_as_it_is_and_is_told_once(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pass_graphs, "graph_of", fail)
    extra = ("guidance.schedule=[[0, 16]]", "optimizer.batch=1")
    plain, graphs = (trainer(folder, *extra, f"run.graphs={on}") for on in ("false", "true"))
    expected = [plain.advance().read() for _ in range(5)]
    with pytest.warns(UserWarning, match=f"run.graphs: {error}") as told:
        found = [graphs.advance().read() for _ in range(5)]
    assert found == expected and len(told) == 1


# Gradients in float16.


def test_scaled_gradients_move_the_weights_as_others_do(folder: Path) -> None:
    extra = ("guidance.schedule=[[0, 16]]", "optimizer.clip=0.5")
    half, plain = (trainer(folder, *extra, f"run.precision={precision}") for precision in ("float16", "float32"))
    for _ in range(2):
        ours, expected = half.advance().read(), plain.advance().read()
        assert ours["scale"] == 2.0**16
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert ours["norm"] == pytest.approx(expected["norm"], rel=5e-2)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_is_halved(clip: float, folder: Path) -> None:
    running = trainer(folder, "run.precision=float16", f"optimizer.clip={clip}", "optimizer.average=0")
    running.advance()
    before = {name: tensor.clone() for name, tensor in running.upsampler.state_dict().items()}
    running._scaler.load_state_dict({**running._scaler.state_dict(), "scale": 2.0**127})
    record = running.advance().read()
    assert record["scale"] == 2.0**127 and record.get("norm") is None
    assert all(torch.equal(before[name], tensor) for name, tensor in running.upsampler.state_dict().items())
    assert running.step == 2 and running._scaler.get_scale() == 2.0**126
    running._scaler.load_state_dict({**running._scaler.state_dict(), "scale": 2.0**10})
    running.advance()
    assert any(not torch.equal(before[name], tensor) for name, tensor in running.upsampler.state_dict().items())


def test_a_resumed_run_has_the_scale_of_its_checkpoint(folder: Path) -> None:
    first = trainer(folder, "run.precision=float16")
    first._scaler.load_state_dict({**first._scaler.state_dict(), "scale": 2.0**127})
    for _ in range(2):
        first.advance()
    (folder / "run").mkdir()
    first.save(folder / "run" / state.LATEST)
    second = trainer(folder, "run.precision=float16")
    second.resume(folder / "run" / state.LATEST)
    assert second._scaler.state_dict() == first._scaler.state_dict()
    assert second._scaler.get_scale() < 2.0**127
    assert second.advance().read() == first.advance().read()
    # Another precision takes the weights alone.
    third = trainer(folder, "run.precision=bfloat16")
    third.resume(folder / "run" / state.LATEST)
    assert "scale" not in third.advance().read()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_losses_and_weights_bit_by_bit(folder: Path) -> None:
    extra = ("optimizer.steps=7", "encoders=['tiny:8', 'tiny:4']", "loss.self_consistency_share=0.5")
    train(folder, *extra)
    straight = losses(folder / "run")
    output = "output=" + (folder / "parts").as_posix()
    stopped = trainer(folder, *extra, output)
    for _ in range(3):
        stopped.advance()
    (folder / "parts").mkdir()
    stopped.save(folder / "parts" / "latest.pth")
    train(folder, *extra, output, resume=True)
    assert losses(folder / "parts") == straight[3:]
    one, other = (torch.load(folder / name / "latest.pth", weights_only=True) for name in ("run", "parts"))
    for key in ("anyup",):
        assert all(torch.equal(one[key][name], tensor) for name, tensor in other[key].items())
    moments, others = (content["training"]["optimizer"]["state"] for content in (one, other))
    assert all(torch.equal(moments[p]["exp_avg_sq"], others[p]["exp_avg_sq"]) for p in moments)


def test_the_log_of_a_resumed_run_has_each_step_once(folder: Path) -> None:
    train(folder, "optimizer.steps=2")
    with (folder / "run" / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')  # a killed run's
    train(folder, "optimizer.steps=4", resume=True)
    assert [step for step, _ in losses(folder / "run")] == [1, 2, 3, 4]
    assert losses(folder / "run")[2][1] != 9.0


def test_changed_settings_are_told_when_a_run_goes_on(folder: Path) -> None:
    train(folder, "optimizer.steps=2")
    lines = train(folder, "optimizer.steps=3", "optimizer.batch=2", resume=True)
    (told,) = [line for line in lines if line.startswith("going on after step 2")]
    assert "optimizer.batch: 4 before, 2 now" in told and "optimizer.steps: 2 before, 3 now" in told


def test_another_model_cannot_go_on(folder: Path) -> None:
    train(folder)
    with pytest.raises(ValueError, match="holds another model"):
        train(folder, "model.qk_dim=32", resume=True)


_RUN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from support import small_training
from anyup.training import loop, preparation
preparation.load_encoder = small_training.load_encoder
from pathlib import Path
"""


_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.communicate()


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """Another Python that has the tiny encoders."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN.format(root=str(ROOT), tests=str(ROOT / "tests")) + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


_LONG = "loop.train(small_training.settings(Path({folder!r}), 'optimizer.steps=100000', 'run.validate_every=0'))"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_leaves_whole_files_and_goes_on(folder: Path, kind: signal.Signals) -> None:
    process = start(_LONG.format(folder=str(folder)))
    latest = folder / "run" / "latest.pth"
    wait_until(latest.is_file, lambda: process.poll() is None)
    process.send_signal(kind)
    _, err = process.communicate(timeout=PATIENCE)
    stored, _ = state.load(latest)
    assert anyup.load(latest).config["qk_dim"] == 16
    if kind == signal.SIGTERM:
        assert process.returncode == 0
        assert f"stopped after step {stored.step}; --resume goes on" in err
        assert losses(folder / "run")[-1][0] == stored.step
    train(folder, f"optimizer.steps={stored.step + 2}", "run.validate_every=0", resume=True)
    assert [step for step, _ in losses(folder / "run")] == list(range(1, stored.step + 3))


# Several processes.


_GRADIENTS = """
from anyup.training.distributed import start
from anyup.training.preparation import prepare
from anyup.training.shared_passes import upsampled
from anyup.training.trainer import Trainer, make_upsampler
folder = Path({folder!r})
settings = small_training.settings(folder, *{overrides!r})
engine = start(torch.device("cpu"))
prepared = prepare(settings, loop.find_photographs(settings.data.photographs), engine, small_training.Told())
trainer = Trainer(settings, make_upsampler(settings), prepared.source, prepared.paths, engine)
terms = trainer.backward()
grads = {{name: p.grad for name, p in trainer.upsampler.named_parameters() if p.grad is not None}}
unused = trainer._objective.find_unused_parameters
torch.save({{"world": engine.world, "grads": grads, "looks for unused": unused}}, folder / f"grads-{{engine.rank}}.pt")
engine.close()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_with_the_same_batch(folder: Path) -> None:
    """In micro-batches; the losses of whole batches are compared below, after steps by their gradients."""
    pytest.importorskip("accelerate")
    # An odd number of samples, and of augmented ones: the processes' shares differ, and their number of micro-batches.
    overrides = ["optimizer.batch=5", "loss.self_consistency_share=0.6", "optimizer.micro_batch=1"]
    one = trainer(folder, *overrides)
    one.backward()
    code = _GRADIENTS.format(folder=str(folder), overrides=overrides)
    for process in _torchrun(code):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
    expected = {name: p.grad for name, p in one.upsampler.named_parameters() if p.grad is not None}
    for rank in (0, 1):
        stored = torch.load(folder / f"grads-{rank}.pt", weights_only=True)
        assert stored["world"] == 2 and not stored["looks for unused"]
        assert stored["grads"].keys() == expected.keys()
        for name, grad in expected.items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(stored["grads"][name], grad, rtol=0, atol=1e-5 * scale + 1e-9, msg=name)


def test_processes_leave_a_group_together_unless_one_has_failed() -> None:
    told: list[str] = []
    engine = object.__new__(AccelerateEngine)
    engine._accelerator = SimpleNamespace(
        wait_for_everyone=lambda: told.append("waited"), end_training=lambda: told.append("left")
    )
    with engine:
        assert not told
    assert told == ["waited", "left"]
    told.clear()
    with pytest.raises(ValueError, match="broken"), engine:
        raise ValueError("broken")
    assert told == ["left"]


def test_each_process_has_its_own_device() -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="device: each of several processes has its own: expected cuda, got cuda:1"):
        AccelerateEngine(torch.device("cuda:1"))


def _torchrun(code: str) -> list[subprocess.Popen[str]]:
    """Two processes of a group, as torchrun starts them."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [start(code, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_train_report_stop_and_go_on_as_one(folder: Path) -> None:
    pytest.importorskip("accelerate")
    overrides = ["optimizer.steps=3", "loss.self_consistency_share=0.25", "optimizer.clip=1.0"]
    train(folder, *overrides)
    (folder / "cache").rename(folder / "first_cache")
    alone = losses(folder / "run")
    together = [*overrides, "output=" + (folder / "together").as_posix()]
    run = f"loop.train(small_training.settings(Path({str(folder)!r}), *{together!r})"
    for process in _torchrun(run + ")"):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
    assert [step for step, _ in alone] == [step for step, _ in losses(folder / "together")]
    for (_, one), (_, other) in zip(alone, losses(folder / "together"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    together.append("optimizer.steps=100000")
    run = f"loop.train(small_training.settings(Path({str(folder)!r}), *{together!r}), resume=True)"
    processes = _torchrun(run)
    log = folder / "together" / "log.jsonl"
    wait_until(lambda: len(log.read_text(encoding="utf-8").splitlines()) > 8, lambda: processes[0].poll() is None)
    processes[1].send_signal(signal.SIGTERM)  # the other one must hear of it
    errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert state.load(folder / "together" / "latest.pth")[0].step == losses(folder / "together")[-1][0]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_samples(folder: Path) -> None:
    pytest.importorskip("accelerate")
    overrides = ["optimizer.decay=constant", "loss.self_consistency_share=0.25", "variation.turns=true"]
    train(folder, *overrides, "optimizer.steps=3")
    alone = records(folder / "run")
    overrides.append("output=" + (folder / "changing").as_posix())
    train(folder, *overrides, "optimizer.steps=1")
    second = [*overrides, "optimizer.steps=2"]
    run = f"loop.train(small_training.settings(Path({str(folder)!r}), *{second!r}), resume=True)"
    processes = _torchrun(run)
    for process in processes:
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert ("processes: 1 before, 2 now; the samples stay" in err) == (process is processes[0])
    told = train(folder, *overrides, "optimizer.steps=3", resume=True)
    assert "processes: 2 before, 1 now; the samples stay" in "\n".join(told)
    changing = [record for record in records(folder / "changing") if "loss" in record]
    expected = [record for record in alone if "loss" in record]
    assert len(changing) == len(expected) == 3
    for one, other in zip(expected, changing, strict=True):
        assert other == {
            name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in one.items()
        }


@pytest.mark.parametrize(
    "overrides", [[], ["loss.place=0.5", "loss.self_consistency=0"], ["variation.synthetic=1.0", "loss.cosine=0.0"]]
)
def test_every_parameter_that_learns_gets_a_gradient_in_every_micro_batch(folder: Path, overrides: list[str]) -> None:
    one = trainer(folder, "optimizer.batch=1", *overrides)  # so several processes need not look for unused ones
    one.backward()
    learning = {name: p.grad for name, p in one.upsampler.named_parameters() if p.requires_grad}
    assert [name for name, grad in learning.items() if grad is None] == []
    everything = dict(anyup.AnyUp(**one.upsampler.config).named_parameters())
    assert all(parameter.requires_grad for parameter in everything.values())
    assert everything.keys() - learning.keys() == {
        f"cross_decode.cross_attn.attention.out_proj.{name}" for name in ("weight", "bias")
    }


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
