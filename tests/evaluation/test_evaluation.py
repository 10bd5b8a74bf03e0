"""`anyup evaluate features` and `pictures`: what is compared with what, what is measured, and what is written."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_encoder import TinyEncoder, make_encoder
from torch import Tensor
from torch.nn import functional as F

import anyup.encoders
from anyup import checkpoints
from anyup.cli import command as cli
from anyup.evaluation import pictures, reconstruction
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.reconstruction import CROPS, WHOLE, Measured, Task, Truth, View, measure, plan, summarise
from anyup.evaluation.report import spread, table, write_json
from anyup.evaluation.upsamplers import Interpolation, Learned, make_upsamplers
from anyup.fingerprint import file_fingerprint, module_fingerprint
from anyup.images import normalize_imagenet, resize, save_picture
from anyup.model import AnyUp
from anyup.reporting import Reporter
from anyup.training.photographs import square_crop

pytest.importorskip("PIL")

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(seed: int = 0) -> AnyUp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AnyUp(qk_dim=16, num_heads=2).eval()


def random_photo(height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, height, width, generator=generator)


def make_view(encoder: TinyEncoder, cache: TensorCache | None = None, seed: int = 0) -> View:
    return View(random_photo(seed=seed), f"photo {seed}", encoder, "tiny", cache or TensorCache(None))


# What is compared with what


def test_sides_that_the_stride_does_not_divide_become_the_nearest_multiple() -> None:
    by_stride = {s: [(t.truth, t.side, t.view) for t in plan(make_encoder(s))] for s in (8, 14, 16, 32)}
    assert by_stride[8] == by_stride[14] == by_stride[16] == [(CROPS, 224, 448), (WHOLE, 112, 448)]
    assert by_stride[32] == [(CROPS, 224, 448), (WHOLE, 128, 448)]
    assert [t.side for t in plan(make_encoder(4), 64, 32, [17, 18, 26])[1:]] == [16, 20, 28]


def test_tasks_are_named_by_their_ratio() -> None:
    assert [task.name for task in plan(make_encoder(32))] == ["2x, 224 to crops of 448", "3.5x, 128 to 448"]


@pytest.mark.parametrize(("crop", "sides"), [(64, [16]), (32, [64]), (32, [63]), (0, [16]), (32, [0])])
def test_sides_outside_the_view_are_refused(crop: int, sides: list[int]) -> None:
    with pytest.raises(ValueError, match="less than the view of 64"):
        plan(make_encoder(4), 64, crop, sides)


@pytest.mark.parametrize("side", [16, 24])
def test_truth_of_crops_is_the_encoders_map_of_each_corner_at_its_place(side: int) -> None:
    encoder = make_encoder(4)
    view, task = make_view(encoder), Task(CROPS, side, 32, 4)
    pixels = square_crop(random_photo(), 32)
    truths = view.truths(task)
    assert len(truths) == 4
    assert {(t.top, t.left) for t in truths} == {(y, x) for y in (0, (32 - side) // 4) for x in (0, (32 - side) // 4)}
    for truth in truths:
        y, x = 4 * truth.top, 4 * truth.left
        expected = encoder(encoder.normalize(pixels[:, :, y : y + side, x : x + side]))[0]
        assert torch.equal(truth.features, expected)


def test_truth_of_the_whole_is_the_encoders_map_of_the_view() -> None:
    encoder = make_encoder(4)
    (truth,) = make_view(encoder).truths(Task(WHOLE, 8, 32, 4))
    assert (truth.top, truth.left) == (0, 0)
    assert torch.equal(truth.features, encoder(encoder.normalize(square_crop(random_photo(), 32)))[0])


def test_features_to_upsample_are_those_of_the_shrunk_view() -> None:
    encoder = make_encoder(4)
    expected = encoder(encoder.normalize(resize(square_crop(random_photo(), 32), (16, 16))))
    assert torch.equal(make_view(encoder).features(32, 16), expected)


def test_guidance_has_the_side_asked_for_and_every_method_the_same_inputs() -> None:
    encoder, model = make_encoder(4), small_model()
    upsamplers = [Interpolation("nearest"), Interpolation("bilinear"), Learned("ours", model)]
    view, tasks = make_view(encoder), [Task(CROPS, 16, 32, 4), Task(WHOLE, 8, 32, 4)]
    with torch.inference_mode():
        compared = reconstruction.compare(view, tasks, upsamplers, 24, CPU)
        image = normalize_imagenet(resize(square_crop(random_photo(), 32), (24, 24)))
        for task in tasks:
            got, low = compared[task.name], view.features(32, task.side)
            assert got["ours"] == measure(model(image, low, (8, 8)), view.truths(task))
            assert got["bilinear"] == measure(F.interpolate(low, (8, 8), mode="bilinear"), view.truths(task))
            assert list(got) == ["nearest", "bilinear", "ours"]


# What is measured


def test_an_exact_map_has_cosine_one_and_error_zero() -> None:
    true = torch.randn(5, 4, 4)
    got = measure(true[None], [Truth(0, 0, true)])
    assert got.cosine == pytest.approx(1, abs=1e-12) and got.error == 0


def test_the_error_is_a_ratio_of_sums_and_the_cosine_a_mean_over_cells() -> None:
    true = torch.zeros(2, 1, 2)
    true[:, 0, 0] = torch.tensor([3.0, 4.0])  # length 5
    true[:, 0, 1] = torch.tensor([1.0, 0.0])
    upsampled = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # the first exact, the second at a right angle, length 2
    got = measure(upsampled, [Truth(0, 0, true)])
    assert got.cosine == pytest.approx(0.5) and got.error == pytest.approx((1 + 4) / (25 + 1))


def test_each_part_is_compared_at_its_place() -> None:
    whole = torch.randn(3, 6, 6)
    parts = [Truth(top, left, whole[:, top : top + 2, left : left + 3]) for top, left in ((0, 0), (4, 3), (1, 2))]
    assert measure(whole[None], parts).error == 0
    moved = [Truth(parts[2].top + 1, parts[2].left, parts[2].features)]
    assert measure(whole[None], moved).error > 0.1


def test_a_part_outside_the_map_is_refused() -> None:
    with pytest.raises(ValueError, match="row 3, column 0"):
        measure(torch.ones(1, 2, 4, 4), [Truth(3, 0, torch.ones(2, 2, 2))])


def test_the_summary_is_relative_to_bilinear_photograph_by_photograph() -> None:
    summary = summarise(
        {
            "bilinear": [Measured(0.5, 1.0), Measured(0.8, 0.5)],
            "ours": [Measured(0.75, 0.5), Measured(0.7, 0.5)],
        }
    )
    relative = summary["ours"]["relative"]
    assert relative["ratio"] == pytest.approx((0.25 + 0.3) / (0.5 + 0.2))
    assert relative["mean"] == pytest.approx((0.5 + 1.5) / 2) and relative["std"] == pytest.approx(0.5**0.5)
    assert relative["better"] == 0.5
    assert summary["bilinear"]["relative"]["ratio"] == 1 and summary["bilinear"]["relative"]["better"] == 0
    assert summary["ours"]["error"] == {"mean": 0.5, "std": 0.0}


def test_a_photograph_on_which_bilinear_is_exact_does_not_divide_by_zero() -> None:
    summary = summarise({"bilinear": [Measured(1.0, 0.0)], "ours": [Measured(0.9, 0.1)]})
    assert "relative" not in summary["ours"]


def test_the_spread_of_one_value_is_zero() -> None:
    assert spread([2.0]) == {"mean": 2.0, "std": 0.0}
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5)}


# The cache


def test_features_are_computed_once_for_a_photograph_and_an_encoder(tmp_path: Path) -> None:
    encoder, cache = make_encoder(4), TensorCache(tmp_path)
    task = Task(CROPS, 16, 32, 4)
    first = (make_view(encoder, cache).features(32, 16), make_view(encoder, cache).truths(task))
    assert encoder.calls == 5
    again = (make_view(encoder, cache).features(32, 16), make_view(encoder, cache).truths(task))
    assert encoder.calls == 5
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a.features, b.features) for a, b in zip(first[1], again[1], strict=True))


def test_another_photograph_view_or_side_is_another_entry(tmp_path: Path) -> None:
    encoder, cache = make_encoder(4), TensorCache(tmp_path)
    maps = [make_view(encoder, cache).features(32, 16), make_view(encoder, cache).features(24, 16)]
    maps += [make_view(encoder, cache, seed=1).features(32, 16), make_view(encoder, cache).features(32, 12)]
    assert len(list(tmp_path.rglob("*.npy"))) == 4
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(maps) for b in maps[:i])


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"nothing of the kind"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, content: bytes) -> None:
    cache = TensorCache(tmp_path)
    made = cache.get("features", {"a": 1}, lambda: torch.ones(2))
    cache.path("features", {"a": 1}).write_bytes(content)
    assert torch.equal(cache.get("features", {"a": 1}, lambda: torch.ones(2)), made)
    assert np.array_equal(np.load(cache.path("features", {"a": 1})), [1, 1])


def test_a_failure_while_making_leaves_no_entry(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        TensorCache(tmp_path).get("features", {"a": 1}, fail)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_fingerprint_of_a_module_sees_one_changed_weight() -> None:
    model = small_model()
    before = module_fingerprint(model)
    assert module_fingerprint(small_model()) == before
    with torch.no_grad():
        model.rope.freqs[1, 3] += 1e-6
    assert module_fingerprint(model) != before


# The methods


def test_methods_are_named_by_file_and_apart(tmp_path: Path) -> None:
    files = [tmp_path / "a.pth", tmp_path / "one" / "b.pth", tmp_path / "two" / "b.pth", tmp_path / "bilinear.pth"]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        checkpoints.save(small_model(), file)
    upsamplers = make_upsamplers([str(file) for file in files], untrained=True, device=CPU)
    assert [u.name for u in upsamplers] == ["nearest", "bilinear", "a", *map(str, files[1:]), "untrained"]
    assert [u.trained for u in upsamplers if isinstance(u, Learned)] == [True] * 4 + [False]


def test_nearest_takes_the_cell_that_a_pixels_centre_lies_in() -> None:
    cells = torch.arange(5.0).view(1, 1, 1, 5)
    assert Interpolation("nearest")(torch.empty(0), cells, (1, 3)).flatten().tolist() == [0, 2, 4]
    assert Interpolation("nearest")(torch.empty(0), cells, (1, 7)).flatten().tolist() == [0, 1, 1, 2, 3, 3, 4]


def test_the_same_weights_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="weights: expected each once, got a.pth"):
        make_upsamplers(["a.pth", "a.pth"], device=CPU)


def test_other_windows_are_measured_beside_the_weights_own_which_is_there_once(tmp_path: Path) -> None:
    own, file = small_model().window_ratio, tmp_path / "a.pth"
    checkpoints.save(small_model(), file)
    upsamplers = make_upsamplers([str(file)], window_ratios=[own, 2 * own], device=CPU)
    assert [u.name for u in upsamplers[2:]] == ["a", f"a (window {2 * own:g})"]
    assert [u.model.window_ratio for u in upsamplers if isinstance(u, Learned)] == [own, 2 * own]
    with pytest.raises(ValueError, match="window_ratio: expected more than 0, got -1"):
        make_upsamplers([str(file)], window_ratios=[-1], device=CPU)


# Results


def test_results_that_are_not_finite_leave_the_older_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_columns_of_a_table_are_aligned() -> None:
    lines = table(["a", "method"], [["1", "x"], ["22222", "y"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4


# The commands


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four photographs of 450 x 460, one too small, one broken, and a pipe; tiny encoders are loaded."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(4):
        smooth = F.interpolate(random_photo(30, 30, seed=index), (450, 460), mode="bicubic").clamp(0, 1)
        save_picture(folder / f"{index}.png", smooth[0])
    save_picture(folder / "small.png", random_photo()[0])
    (folder / "broken.png").write_bytes(b"nothing of the kind")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")  # no one writes to it
    monkeypatch.setattr(
        anyup.encoders, "load_encoder", lambda name, device="cpu", **_: make_encoder(int(name[4:]), name=name)
    )
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_command_writes_results_and_a_table(photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.save(small_model(), "ours.pth")
    arguments = ["evaluate", "features", "--photographs", str(photographs), "--every", "0", "-o", "out.json"]
    arguments += [
        "--encoder",
        "tiny56",
        "--encoder",
        "tiny28",
        "--weights",
        "ours.pth",
        "--from",
        "224",
        "--from",
        "112",
    ]
    assert cli.main([*arguments, "--cache", "cache", "--guidance", "32"]) == 0
    shown = capsys.readouterr()
    # Once, although two encoders meet them.
    assert shown.err.count("broken.png") == 1 and shown.err.count("small.png") == 1
    assert shown.err.count("pipe.png") == hasattr(os, "mkfifo")
    results = json.loads(Path("out.json").read_text())
    assert list(results["encoders"]) == ["tiny56", "tiny28"]
    tasks = results["encoders"]["tiny28"]
    assert list(tasks) == ["2x, 224 to crops of 448", "2x, 224 to 448", "4x, 112 to 448"]
    for task in tasks.values():
        assert list(task["photographs"]) == [f"{index}.png" for index in range(4)]
        assert list(task["methods"]) == ["nearest", "bilinear", "ours"]
        assert task["methods"]["bilinear"]["relative"]["ratio"] == 1
    assert results["methods"]["ours"]["sha256"] == module_fingerprint(checkpoints.load("ours.pth"))
    assert shown.out.count("ours") == 6 and "tiny56" in shown.out

    first = Path("out.json").read_bytes()
    cached = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.npy")}
    assert cli.main([*arguments, "--cache", "cache", "--guidance", "32"]) == 0
    assert Path("out.json").read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*.npy")} == cached


def test_by_default_the_photographs_that_training_held_out_are_measured(photographs: Path) -> None:
    arguments = ["evaluate", "features", "--photographs", str(photographs), "--encoder", "tiny56", "-o", "out.json"]
    assert cli.main([*arguments, "--every", "2", "--guidance", "32"]) == 0
    expected = ["1.png", "3.png", "pipe.png" if hasattr(os, "mkfifo") else "small.png"]
    assert json.loads(Path("out.json").read_text())["photographs"] == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--every", "10"], "--every"),
        (["--every", "0", "--encoder", "tiny28", "--encoder", "tiny28"], "--encoder"),
        (["--every", "0", "--guidance", "0"], "--guidance"),
        (["--every", "0", "--from", "448"], "sides"),
        (["--every", "0", "--weights", "missing.pth"], "missing.pth"),
        (["--every", "0", "-o", "out.txt"], "out.txt"),
    ],
)
def test_mistakes_are_met_before_any_photograph_is_read(
    photographs: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> Tensor:
        raise AssertionError("work began before the mistake was met")

    monkeypatch.setattr(reconstruction, "read_photo", read)
    arguments = ["evaluate", "features", "--photographs", str(photographs), "--encoder", "tiny56", "-o", "out.json"]
    assert cli.main([*arguments, *more]) in (1, 2)
    assert words in capsys.readouterr().err
    assert not Path("out.json").exists()


def test_a_photograph_that_cannot_be_measured_is_told_of_and_left_out(
    photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = reconstruction.measure
    calls = []

    def measure(upsampled: Tensor, truths: list[Truth]) -> Measured:
        calls.append(truths)
        if len(calls) == 6:  # the second photograph's second task
            raise ValueError("truths: expected features other than zero")
        return plain(upsampled, truths)

    monkeypatch.setattr(reconstruction, "measure", measure)
    arguments = ["evaluate", "features", "--photographs", str(photographs), "--encoder", "tiny56", "-o", "out.json"]
    assert cli.main([*arguments, "--every", "0", "--guidance", "32"]) == 0
    assert "1.png, tiny56: truths: expected features other than zero" in capsys.readouterr().err
    tasks = json.loads(Path("out.json").read_text())["encoders"]["tiny56"]
    assert all(list(task["photographs"]) == ["0.png", "2.png", "3.png"] for task in tasks.values())


def test_no_photograph_that_can_be_used_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    save_picture(tmp_path / "small.png", random_photo()[0])
    upsamplers = make_upsamplers([], device=CPU)
    with pytest.raises(ValueError, match="none could be used"):
        reconstruction.run(
            {"small": tmp_path / "small.png"},
            make_encoder(4),
            upsamplers,
            tasks=plan(make_encoder(4), 64, 32, [16]),
            guidance=32,
            cache=TensorCache(None),
            device=CPU,
            reporter=Reporter(io.StringIO()),
        )


def test_pictures_are_written_for_each_photograph_and_encoder(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "pictures", "--photographs", str(photographs), "--every", "0", "-o", "drawn"]
    arguments += ["--encoder", "tiny8", "--encoder", "tiny16", "--side", "64", "--count", "2", "--untrained"]
    assert cli.main(arguments) == 0
    index = json.loads(Path("drawn/index.json").read_text())
    expected = [f"{index}--tiny{stride}.png" for index in (0, 1) for stride in (8, 16)]
    assert [entry["picture"] for entry in index["pictures"]] == expected
    assert sorted(path.name for path in Path("drawn").iterdir()) == sorted([*expected, "index.json"])
    assert list(index["methods"]) == ["bilinear", "untrained"]
    assert capsys.readouterr().out.split() == [str(Path("drawn") / name) for name in expected]


def test_a_broken_photograph_is_told_of_once_by_pictures_and_none_at_all_is_an_error(
    photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "pictures", "--photographs", str(photographs), "--every", "0", "-o", "some"]
    assert cli.main([*arguments, "--encoder", "tiny8", "--side", "64", "--untrained"]) == 1
    told = capsys.readouterr()
    index = json.loads(Path("some/index.json").read_text())
    assert index["left_out"] == ["broken.png", "pipe.png"] and len(told.out.split()) == len(index["pictures"]) > 1
    total = len(index["pictures"]) + 2
    assert told.err.splitlines()[-1] == f"anyup: error: photographs: 2 of {total} left out: broken.png, pipe.png"
    for path in photographs.glob("?.png"):
        path.write_bytes(b"broken too")
    (photographs / "small.png").unlink()
    arguments = ["evaluate", "pictures", "--photographs", str(photographs), "--every", "0", "-o", "drawn"]
    assert cli.main([*arguments, "--encoder", "tiny8", "--encoder", "tiny16", "--untrained"]) == 1
    told = capsys.readouterr().err
    assert told.count("broken.png") == 1 and "none could be used" in told


def test_the_fingerprint_of_a_file_is_its_content_s(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (file_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_photographs_of_one_stem_have_a_picture_each() -> None:
    taken: set[str] = set()
    names = [pictures._file_name(name, "e", taken) for name in ("a.jpg", "a.png", "sub/a.png", "sub_a.png", "a.png")]
    assert names == ["a--e.png", "a.png--e.png", "sub_a--e.png", "sub_a.png--e.png", "a.png-2--e.png"]
