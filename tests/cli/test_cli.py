"""The command `anyup`, run in this process: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from support.patience import PATIENCE, wait_until
from torch import Tensor, nn

from anyup import assets, budget, checkpoints, panels
from anyup.cli import command as cli
from anyup.cli import demo
from anyup.evaluation import upsamplers
from anyup.images import normalize_imagenet, read_features, read_photo, resize, save_array, save_picture
from anyup.limited_memory import executor
from anyup.model import AnyUp
from anyup.ops import refusals
from anyup.progress import Progress, human_bytes

pytest.importorskip("PIL")

PHOTO_SIZE = (24, 32)
CHANNELS, GRID = 5, (6, 8)

Run = Callable[..., int]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    checkpoints.save(AnyUp(qk_dim=16, num_heads=2), path)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photo.png and features.npy, and an empty cache of weights."""
    generator = torch.Generator().manual_seed(1)
    save_picture(tmp_path / "photo.png", torch.rand(3, *PHOTO_SIZE, generator=generator))
    save_array(tmp_path / "features.npy", torch.randn(CHANNELS, *GRID, generator=generator))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network in this test")

    monkeypatch.setattr("anyup.stored_weights.urlopen", refuse)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are loaded or a model is run: the mistake should have been met before."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work began before the mistake was met")

    for module in (checkpoints, demo, upsamplers):  # imported here, not first while this lasts
        monkeypatch.setattr(module, "load", work)
    monkeypatch.setattr(demo, "untrained_model", work)
    monkeypatch.setattr("anyup.limited_memory.stream.stream", work)


@pytest.fixture
def small_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demonstration on the small photograph: the bundled one takes seconds."""
    monkeypatch.setattr(assets, "demo_photo_path", lambda: folder / "photo.png")
    monkeypatch.setattr(assets, "demo_features", lambda: read_features(folder / "features.npy"))
    return folder


def upsample(*arguments: object, photo: str = "photo.png") -> int:
    return cli.main(["upsample", photo, *map(str, arguments)])


def expected(weights: Path, size: tuple[int, int] | None = None, values: Tensor | None = None) -> Tensor:
    model = checkpoints.load(weights)
    with torch.inference_mode():
        return model(normalize_imagenet(read_photo("photo.png")), read_features("features.npy"), size, values=values)


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_upsample_writes_what_the_model_returns(
    folder: Path, weights: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    assert upsample("--features", "features.npy", "--weights", weights, "-o", f"out{suffix}") == 0
    result = read_features(f"out{suffix}")
    torch.testing.assert_close(result, expected(weights))
    assert result.shape == (1, CHANNELS, *PHOTO_SIZE)
    assert capsys.readouterr().out.split() == [f"out{suffix}"]


def test_upsample_writes_a_picture_beside_or_instead_of_the_features(folder: Path, weights: Path) -> None:
    both = ("--features", "features.npy", "--weights", weights, "--picture", "out.png")
    assert upsample(*both, "-o", "out.npy") == 0
    assert read_photo("out.png").shape == (1, 3, *PHOTO_SIZE)
    before = (folder / "out.png").read_bytes()
    (folder / "out.npy").unlink()
    assert upsample(*both) == 0
    assert (folder / "out.png").read_bytes() == before
    assert not (folder / "out.npy").exists()


@pytest.mark.parametrize(("option", "size"), [("40x52", (40, 52)), ("16", (12, 16)), ("64", (48, 64)), ("7x5", (7, 5))])
def test_size_is_the_longer_side_or_height_by_width(
    folder: Path, weights: Path, option: str, size: tuple[int, int]
) -> None:
    assert upsample("--features", "features.npy", "--weights", weights, "-o", "o.npy", "--size", option) == 0
    assert read_features("o.npy").shape == (1, CHANNELS, *size)


def test_a_photograph_larger_than_the_result_is_reduced_first(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample("--features", "features.npy", "--weights", weights, "-o", "o.npy", "--size", "12x16") == 0
    assert "24 x 32 reduced to 12 x 16" in capsys.readouterr().err
    photo = resize(read_photo("photo.png"), (12, 16))
    with torch.inference_mode():
        wanted = checkpoints.load(weights)(normalize_imagenet(photo), read_features("features.npy"))
    torch.testing.assert_close(read_features("o.npy"), wanted)


def test_values_are_carried_by_the_attention_of_the_features(folder: Path, weights: Path) -> None:
    values = torch.randn(2, *GRID)
    save_array("values.npy", values)
    options = ("--features", "features.npy", "--values", "values.npy", "--weights", weights)
    assert upsample(*options, "-o", "o.npy", "--picture", "o.png") == 0
    torch.testing.assert_close(read_features("o.npy"), expected(weights, values=values[None]))


class _Encoder(nn.Module):
    """Stands in for a real encoder: patches of 14 pixels, its own normalisation; it remembers its input."""

    patch_size = 14
    seen: Tensor

    def normalize(self, rgb01: Tensor) -> Tensor:
        return rgb01 * 2 - 1

    def forward(self, image: Tensor) -> Tensor:
        self.seen = image
        return nn.functional.avg_pool2d(image, 14)


def test_an_encoder_sees_the_photograph_at_a_multiple_of_its_patch_in_its_own_normalisation(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = _Encoder()
    monkeypatch.setattr("anyup.encoders.load_encoder", lambda name, device: encoder)
    options = ("--encoder", "some", "--encoder-size", "60", "--weights", weights, "-o", "o.npy")
    assert upsample(*options) == 0
    assert encoder.seen.shape == (1, 3, 42, 56)  # 45 x 60 to the nearest multiples of 14
    assert encoder.seen.min() < -0.5
    assert read_features("o.npy").shape == (1, 3, *PHOTO_SIZE)
    assert "24 x 32 is resized to 42 x 56, a multiple of its patch of 14 pixels" in capsys.readouterr().err


def _errors(captured: str) -> list[str]:
    assert "Traceback" not in captured
    return [line for line in captured.splitlines() if line.startswith("anyup: error: ")]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "COMMAND"),
        (["dmeo"], 2, "dmeo"),
        (["upsample"], 2, "PHOTO"),
        (["upsample", "photo.png", "-o", "o.npy"], 2, "--encoder --features"),
        (["upsample", "photo.png", "--features", "features.npy", "--encoder", "x"], 2, "not allowed with"),
        (["upsample", "photo.png", "--features", "features.npy"], 2, "nothing to write"),
        (
            ["upsample", "photo.png", "--features", "features.npy", "-o", "o.tif"],
            2,
            "a name that ends in .npy, .zarr, .pt",
        ),
        (
            ["upsample", "photo.png", "--features", "features.npy", "--picture", "o.npy"],
            2,
            "a name that ends in .png",
        ),
        (
            ["upsample", "photo.png", "--features", "features.npy", "-o", "o.npy", "--size", "0x4"],
            2,
            "480x640",
        ),
        (
            ["upsample", "photo.png", "--features", "features.npy", "-o", "o.npy", "--encoder-size", "9"],
            2,
            "goes with --encoder",
        ),
        (
            ["upsample", "photo.png", "--features", "features.npy", "-o", "o.npy", "--encoder-weights", "x"],
            2,
            "--encoder-weights goes with --encoder",
        ),
        (
            [
                "upsample",
                "photo.png",
                "--features",
                "features.npy",
                "-o",
                "o.npy",
                "--weights",
                "a",
                "--untrained",
            ],
            2,
            "not allowed with",
        ),
        (["upsample", "photo.png", "--features", "features.npy", "-o", "none/o.npy"], 1, "no directory"),
        (["upsample", "none.png", "--features", "features.npy", "-o", "o.npy"], 1, "none.png: No such file"),
        (["upsample", "features.npy", "--features", "features.npy", "-o", "o.npy"], 1, "not a picture"),
        (["upsample", "photo.png", "--features", "none.npy", "-o", "o.npy"], 1, "none.npy: No such file"),
        (["upsample", "photo.png", "--features", "photo.png", "-o", "o.npy"], 1, "a name that ends in .npy, .npz"),
        (
            ["upsample", "photo.png", "--features", "features.npy", "-o", "o.npy", "--device", "cuda:77"],
            1,
            "got 'cuda:77'",
        ),
        (["demo", "-o", "demo.npy"], 2, "a name that ends in .png"),
        (["demo", "-o", "none/demo.png"], 1, "no directory"),
        (["demo", "--backend", "magic"], 2, "magic"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    folder: Path,
    no_work: None,
    arguments: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(folder.iterdir())
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert len(_errors(error)) == 1 and error.count("\n") == 1
    assert message in error
    assert sorted(folder.iterdir()) == before


def test_a_nan_in_a_file_is_named_before_any_work(
    folder: Path, no_work: None, capsys: pytest.CaptureFixture[str]
) -> None:
    features = read_features("features.npy")[0]
    features[3, 1, 2] = float("nan")
    save_array("bad.npy", features)
    assert upsample("--features", "bad.npy", "-o", "o.npy") == 1
    error = capsys.readouterr().err
    assert "bad.npy: holds a NaN: image 0 of the batch, channel 3, row 1, column 2 (1 of" in error
    assert upsample("--features", "features.npy", "--values", "bad.npy", "-o", "o.npy") == 1
    assert "bad.npy: holds a NaN" in capsys.readouterr().err


def test_values_on_another_grid_are_refused(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_array("values.npy", torch.zeros(2, 3, 3))
    options = ("--features", "features.npy", "--values", "values.npy", "--weights", weights)
    assert upsample(*options, "-o", "o.npy") == 1
    assert "expected values on the grid of the features, 6 x 8, got 3 x 3" in capsys.readouterr().err


@pytest.mark.parametrize("scarce", ["memory", "disk"])
def test_a_result_that_does_not_fit_is_refused_before_any_work(
    folder: Path,
    no_work: None,
    scarce: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if scarce == "memory":
        monkeypatch.setattr(budget, "_ALWAYS_FREE", 0)
        monkeypatch.setattr(budget, "free_memory", lambda device: 1000)
    else:
        usage = type("usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert upsample("--features", "features.npy", "-o", "o.pt") == 1
    error = capsys.readouterr().err
    assert "takes 15 kB" in error and "1 kB" in error and "--size" in error


@pytest.mark.parametrize("during", ["model", "writing"])
def test_an_interrupted_run_leaves_no_file_and_says_130(
    folder: Path,
    weights: Path,
    during: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*arguments: object, **_: object) -> None:
        if during == "writing":
            Path(str(arguments[1])).write_bytes(b"half")
        raise KeyboardInterrupt

    before = sorted(folder.iterdir())
    monkeypatch.setattr(*((executor.Executor, "piece") if during == "model" else (torch, "save")), interrupt)
    output = "o.npy" if during == "model" else "o.pt"
    assert upsample("--features", "features.npy", "--weights", weights, "-o", output) == 130
    assert sorted(folder.iterdir()) == before
    assert "interrupted" in capsys.readouterr().err


def test_where_weights_cannot_be_downloaded_the_error_names_the_address_and_the_alternatives(
    folder: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert upsample("--features", "features.npy", "-o", "o.npy", "--weights", "anyup_multi_backbone") == 1
    error = capsys.readouterr().err
    assert len(_errors(error)) == 1
    assert checkpoints.NAMED["anyup_multi_backbone"].url in error
    assert str(folder / "hub") in error
    assert "--weights FILE" in error and "--weights anyup_mini" in error
    assert not (folder / "o.npy").exists()


def test_untrained_weights_are_asked_for_said_and_the_same_every_time(
    folder: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.get_rng_state()
    for name in ("a.npy", "b.npy"):
        assert upsample("--features", "features.npy", "--untrained", "-o", name) == 0
        assert "UNTRAINED" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(read_features("a.npy"), read_features("b.npy"))


def test_an_unforeseen_error_is_one_line_and_with_debug_a_traceback(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr("anyup.limited_memory.stream.stream", fail)
    options = ("--features", "features.npy", "--weights", weights, "-o", "o.npy")
    assert upsample(*options) == 1
    assert _errors(capsys.readouterr().err) == ["anyup: error: RuntimeError: out of luck (--debug shows more)"]
    with pytest.raises(RuntimeError, match="out of luck"):
        upsample(*options, "--debug")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "there is not enough memory"),
        (
            RuntimeError("can't allocate memory: tried to allocate 9 bytes."),
            "there is not enough memory for 9 bytes more",
        ),
        (torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 0"), "there is not enough memory for 20.00 GiB more"),
    ],
)
def test_memory_that_is_not_there_is_said_in_words(error: Exception, words: str) -> None:
    assert cli._in_words(error) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "-o", "r.txt"], "a name that ends in .json"),
        (["features", "-o", "r.json", "--every", "99"], "--every: expected at least one of each 99"),
        (["features", "-o", "r.json", "--threads", "9999999"], "--threads: expected a whole number of at most 1024"),
        (["features", "-o", "r.json", "--threads", "\N{ARABIC-INDIC DIGIT THREE}"], "--threads: expected a whole"),
        (["features", "-o", "r.json", "--encoder", "mobilenet_v2"], "--encoder: expected each once"),
    ],
)
def test_a_mistake_after_evaluate_is_one_of_usage(
    folder: Path, no_work: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photographs").mkdir()
    for number in range(3):
        save_picture(folder / "photographs" / f"{number}.png", torch.zeros(3, 8, 8))
    words = [arguments[0], "--photographs", "photographs", "--encoder", "mobilenet_v2", "--every", "2", *arguments[1:]]
    assert cli.main(["evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(_errors(error)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "upsample a.png --encoder e --sise 64 -o b.npy",
            "--sise; did you mean '--size'? (see `anyup upsample --help`)",
        ),
        ("evaluate features --photographs p --encoder e --resume -o r.json", "--resume (see `anyup evaluate features"),
        ("train --config mini --resum2 output=runs", "--resum2; did you mean '--resume'? (see `anyup train --help`)"),
        ("--degub info", "--degub (see `anyup --help`)"),
        ("info more", "more (see `anyup --help`)"),
    ],
)
def test_an_unknown_option_names_its_nearest_and_the_help_of_its_command(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    assert f"unrecognized arguments: {message}" in capsys.readouterr().err


def _reddish(path: Path) -> int:
    """Pixels of the alarm's colour above the panels."""
    title = (read_photo(path)[0, :, : panels._MARGIN + panels._TITLE_POINTS] * 255).round()
    alarm = torch.tensor(panels._ALARM)[:, None, None]
    return int(((title - alarm).abs().amax(dim=0) < 8).sum())


def test_demo_draws_four_panels_side_by_side(
    small_demo: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Panels large enough that each title is one line, as in the bundled photograph.
    save_picture("photo.png", resize(read_photo("photo.png"), (120, 400))[0])
    assert cli.main(["demo", "-o", "demo.png", "--weights", str(weights)]) == 0
    picture = read_photo("demo.png")[0]
    margin, width = panels._MARGIN, 400
    assert picture.shape[2] == 4 * (width + margin) + margin
    top = margin + round(panels._TITLE_POINTS * 1.3) + margin // 2
    first = picture[:, top : top + 120, margin : margin + width]
    torch.testing.assert_close(first, read_photo("photo.png")[0], atol=1e-6, rtol=0)
    second = picture[:, top : top + 120, 2 * margin + width : 2 * margin + 2 * width]
    assert len(second.flatten(1).unique(dim=1).T) <= GRID[0] * GRID[1]  # nearest: no colours in between
    for panel in range(4):  # white stands between panels, and nothing is drawn over an edge
        left = panel * (width + margin)
        assert bool((picture[:, top : top + 120, left : left + margin] == 1).all())
    assert bool((picture[:, -margin // 2 :] == 1).all())
    assert _reddish(small_demo / "demo.png") == 0
    told = capsys.readouterr().out
    for word in ("time", "memory", "backend", "window_attention", "CC0", "demo.png", "small.pth"):
        assert word in told
    assert "UNTRAINED" not in told


def test_demo_needs_no_network_and_uses_the_packaged_weights(
    small_demo: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "-o", "demo.png"]) == 0
    captured = capsys.readouterr()
    assert "UNTRAINED" not in captured.out + captured.err
    assert "anyup_mini (Apache-2.0)" in captured.out
    assert _reddish(small_demo / "demo.png") == 0


def test_demo_says_in_the_terminal_and_on_the_picture_that_weights_are_untrained(
    small_demo: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_picture("photo.png", resize(read_photo("photo.png"), (60, 400))[0])
    assert cli.main(["demo", "-o", "demo.png", "--untrained"]) == 0
    assert "UNTRAINED" in capsys.readouterr().out
    assert _reddish(small_demo / "demo.png") > 100


def test_demo_weights_asked_for_by_name_are_never_replaced(
    small_demo: Path, offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "-o", "demo.png", "--weights", "anyup"]) == 1
    assert checkpoints.NAMED["anyup"].url in capsys.readouterr().err
    assert not (small_demo / "demo.png").exists()


def test_the_bundled_photograph_and_features_belong_together() -> None:
    photo, features = read_photo(assets.demo_photo_path()), assets.demo_features()
    assert photo.shape[2] * features.shape[3] == photo.shape[3] * features.shape[2]
    assert bool(torch.isfinite(features).all())


def test_text_on_a_picture_is_wrapped_and_never_config() -> None:
    pictures = [torch.zeros(3, 40, 150)] * 2
    short = panels.draw_panels(pictures, ["a", "b"], ["c"])
    long = panels.draw_panels(pictures, ["a title of many words that is longer than its panel", "b"], ["c " * 100])
    assert long.width == short.width and long.height > short.height + 100
    font = panels._font(20)
    lines = panels._wrap("some words " * 9, font, 120)
    assert " ".join(lines).split() == ("some words " * 9).split()
    assert all(font.getlength(line) <= 120 for line in lines)


def test_info_tells_versions_devices_and_the_backend_of_each_operation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "_remembered", {"kernel blur, config 8: no": None})
    assert cli.main(["info", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    for word in (torch.__version__, "threads", "pillow", "squeezenet1_1", "anyup_multi_backbone", str(folder / "hub")):
        assert word in told
    for operation in ("window_attention", "pixel_encoder", "feature_unification"):
        assert operation in told
    assert "refused by a device in this process\n  kernel blur, config 8: no\n" in told


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["upsample", "--help"], ["info", "-h"]])
def test_help_is_no_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "usage: anyup" in capsys.readouterr().out


def _python(*arguments: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        timeout=PATIENCE,
        **{"capture_output": True, **keywords},
    )


@pytest.mark.parametrize(
    "command",
    [
        "upsample photo.png --features features.npy -o o.npy",
        "demo",
        "evaluate features --photographs . --encoder mobilenet_v2 --every 0 -o o.json",
    ],
)
@pytest.mark.parametrize(
    ("named", "said"), [("anyup_mni", "did you mean 'anyup_mini'?"), ("photo.png", "expected a file name that ends in")]
)
def test_errors_of_weights_name_the_option(
    command: str, named: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--weights", named]) == 1
    err = capsys.readouterr().err
    assert "anyup: error: --weights: " in err and said in err, err


@pytest.mark.parametrize(
    "command", ["upsample photo.png -o o.npy", "evaluate features --photographs . --every 0 -o o.json"]
)
@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("mobilnet_v2", "got 'mobilnet_v2'"),
        ("mobilenet_v2:99", "a layer 0 to 18"),
        ("efficientnet_lite0:99", "one of the blocks"),
    ],
)
def test_errors_of_encoders_name_the_option(
    command: str, named: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--encoder", named]) == 1
    err = capsys.readouterr().err
    assert "anyup: error: --encoder: " in err and said in err, err


def test_an_error_of_windows_names_the_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "evaluate features --photographs . --encoder mobilenet_v2 --every 0 -o o.json"
    assert cli.main([*command.split(), *("--window-ratio", "0.1") * 2]) == 1
    assert "anyup: error: --window-ratio: expected each once, got 0.1 more than once" in capsys.readouterr().err


@pytest.mark.parametrize("started_as", ["/usr/bin/anyup", "anyup.exe"])
def test_help_of_the_command_does_not_wait_for_torch(started_as: str) -> None:
    program = "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; from anyup.cli import main; main()"
    done = _python("-c", program, started_as, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: anyup"), done.stderr


def test_python_m_anyup_is_the_command() -> None:
    from anyup._version import __version__

    done = _python("-X", "importtime", "-m", "anyup", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"anyup {__version__}")
    assert " anyup.cli\n" in done.stderr and " torch\n" not in done.stderr
    done = _python("-m", "anyup", "upsample")
    assert done.returncode == 2 and done.stderr.startswith("anyup: error: ")


@pytest.mark.skipif(os.name != "posix", reason="a shell pipe of POSIX")
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = _python("-m", "anyup", "info", "--device", "cpu", capture_output=False, stdout=write, stderr=-1)
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_stage_shows_the_seconds_on_a_terminal_and_one_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anyup.progress._TICK", 0.01)
    terminal, log = _Terminal(), io.StringIO()
    with Progress(terminal).stage("working"):
        wait_until(lambda: terminal.getvalue().count("\rworking ... ") > 2)
    with Progress(log).stage("working"):
        pass
    assert terminal.getvalue().endswith(" s\n")
    assert log.getvalue().count("\n") == 1 and "\r" not in log.getvalue()
    failing = io.StringIO()
    with pytest.raises(ValueError, match="x"), Progress(failing).stage("working"):
        raise ValueError("x")
    assert failing.getvalue() == "working ... stopped\n"


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (15360, "15 kB"), (999_900, "1 MB"), (18.7e9, "18.70 GB"), (1.5e21, "1.50 ZB")],
)
def test_bytes_are_told_in_decimal_units(count: float, words: str) -> None:
    assert human_bytes(count) == words
