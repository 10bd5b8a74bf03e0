"""`anyup evaluate depth` and `normals`: data sets on disk, and the commands from files to results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_training import Told
from support.tiny_encoder import make_encoder
from torch import Tensor

import anyup.encoders
from anyup import checkpoints
from anyup.cli import command as cli
from anyup.evaluation import regression
from anyup.evaluation.cache import TensorCache
from anyup.evaluation.datasets import load_split
from anyup.evaluation.depth_datasets import LAYOUTS, NYUV2, FileFrame, Frame
from anyup.evaluation.normals import Camera, normals_of_depth
from anyup.evaluation.probe import Recipe, View, drawn_view
from anyup.evaluation.regression import Depth, Normals, check_frames
from anyup.images import save_picture
from anyup.model import AnyUp
from anyup.options import UsageError

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("one_thread")


def write_image(path: Path, height: int = 24, width: int = 30, seed: int = 0, **options: object) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_depth(path: Path, millimetres: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(millimetres.astype(np.uint16)).save(path)


def load(root: Path, layout: str, split: str) -> list[Frame]:
    return load_split(root, LAYOUTS[layout], split, "images with depth or normals")


# Data sets


def test_a_plain_folder_holds_millimetres_and_normals(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "images/train/a/x.png")
    millimetres = np.arange(24 * 30).reshape(24, 30) * 90
    write_depth(tmp_path / "depth/train/a/x.png", millimetres)
    write_image(tmp_path / "images/train/y.jpg")
    (tmp_path / "normals/train").mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(size=(24, 30, 3)).astype(np.float32)
    expected = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors[0, 0], vectors[0, 1] = 0, np.nan
    np.save(tmp_path / "normals/train/y.npy", vectors)
    write_image(tmp_path / "images/train/without.png")

    with pytest.warns(UserWarning, match="left out, images without depth or normals: without$"):
        x, y = load(tmp_path, "folders", "train")
    assert (x.name, y.name) == ("a/x", "y")
    assert torch.equal(x.photo()[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert torch.equal(x.depth(), torch.from_numpy(millimetres).float() / 1000) and x.stored_normals() is None
    normals = y.stored_normals()
    assert normals is not None and not normals[:, 0, :2].any()
    assert np.allclose(normals[:, 1:].permute(1, 2, 0), expected[1:], atol=1e-6)
    with pytest.raises(ValueError, match="expected a depth map"):
        y.depth()


def test_normals_of_a_picture_are_levels_from_minus_one_to_one(tmp_path: Path) -> None:
    write_image(tmp_path / "images/val/x.png", 1, 3)
    (tmp_path / "normals/val").mkdir(parents=True)
    Image.fromarray(np.array([[[255, 128, 128], [128, 128, 0], [0, 0, 0]]], np.uint8)).save(
        tmp_path / "normals/val/x.png"
    )
    (frame,) = load(tmp_path, "folders", "val")
    normals = frame.stored_normals()
    assert normals is not None
    assert torch.allclose(normals[:, 0].T, torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 0, 0]]), atol=6e-3)


def test_names_may_end_in_upper_case(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/x.JPG")
    write_depth(tmp_path / "depth/train/x.PNG", np.ones((24, 30)))
    assert [frame.name for frame in load(tmp_path, "folders", "train")] == ["x"]


def test_a_depth_map_of_8_bits_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/x.png")
    (tmp_path / "depth/train").mkdir(parents=True)
    Image.new("L", (30, 24)).save(tmp_path / "depth/train/x.png")
    (frame,) = load(tmp_path, "folders", "train")
    with pytest.raises(ValueError, match="expected a picture of one channel of 16 bits, got Pillow's mode L"):
        frame.depth()


@pytest.mark.parametrize(
    ("shape", "orientation", "as_stored"),
    [((24, 30), 6, True), ((30, 24), 6, False), ((24, 30), 3, True), ((24, 30), 1, False)],
)
def test_an_image_is_turned_only_where_its_depth_is(
    tmp_path: Path, shape: tuple[int, int], orientation: int, as_stored: bool
) -> None:
    """A half turn leaves the size: the image is taken as stored then, as beside a mask without a tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = write_image(tmp_path / "images/train/x.png", exif=exif)
    write_depth(tmp_path / "depth/train/x.png", np.ones(shape) * 1000)
    (frame,) = load(tmp_path, "folders", "train")
    seen = pixels if as_stored or orientation == 1 else np.rot90(pixels, -1)
    assert torch.equal(frame.photo()[0], torch.from_numpy(seen.copy()).permute(2, 0, 1) / 255)
    assert frame.variant() == ({"as_stored": True} if as_stored else {})  # features of the one are not the other's


@pytest.fixture
def labelled(tmp_path: Path) -> dict[str, np.ndarray]:
    """NYU Depth V2's labelled file, of four frames, made as MATLAB stores it: its axes reversed."""
    h5py = pytest.importorskip("h5py")
    savemat = pytest.importorskip("scipy.io").savemat
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 8, 3, 4), np.uint8)
    depths = generator.uniform(0.5, 9, (6, 8, 4)).astype(np.float32)
    depths[0, 0] = 0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["rawDepths"] = images.T, depths.T
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2]])})
    return {"images": images, "depths": depths}


def test_nyu_s_labelled_file_gives_the_frames_of_its_splits(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    frames = load(tmp_path, "nyuv2", "train")
    assert [frame.name for frame in frames] == ["0001", "0004"] and frames[0].camera == NYUV2
    assert [frame.name for frame in load(tmp_path, "nyuv2", "test")] == ["0002"]
    for frame, index in zip(frames, (0, 3), strict=True):
        pixels = labelled["images"][..., index]
        assert torch.equal(frame.photo()[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        assert torch.equal(frame.depth(), torch.from_numpy(labelled["depths"][..., index]))
    assert frames[0].fingerprint() != frames[1].fingerprint()
    with pytest.raises(ValueError, match="expected the split train or test"):
        load(tmp_path, "nyuv2", "val")


def test_geonet_s_files_train_and_nyu_s_labelled_frames_test(tmp_path: Path, labelled: dict[str, np.ndarray]) -> None:
    from scipy.io import savemat

    pixels = np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.float32)
    depth = np.full((6, 8), 2.0, np.float32)
    vectors = np.tile(np.array([0.0, 0.0, -2.0], np.float32), (6, 8, 1))
    (tmp_path / "nyu_geonet").mkdir()
    subtracted = pixels - 2 * np.array([122.175, 116.169, 103.508])
    # A thousandth more, as rounding in single precision may take a whole number below itself.
    savemat(tmp_path / "nyu_geonet/room-1.mat", {"img": subtracted + 1e-3, "depth": depth, "norm": vectors})
    (frame,) = load(tmp_path, "nyuv2-geonet", "train")
    assert torch.equal(frame.photo()[0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert torch.equal(frame.depth(), torch.from_numpy(depth))
    normals = frame.stored_normals()
    assert normals is not None and torch.equal(normals, torch.tensor([0.0, 0, -1])[:, None, None].expand(3, 6, 8))
    assert [frame.name for frame in load(tmp_path, "nyuv2-geonet", "test")] == ["0002"]


def test_navi_s_photographs_are_cut_around_the_object(tmp_path: Path) -> None:
    for scene in ("toy/multiview_00", "toy/wild_set"):
        pixels = write_image(tmp_path / scene / "images/007.jpg", 40, 60)
        stored = np.zeros((40, 60), np.uint16)
        stored[10:20, 30:44] = 1311  # about half a metre
        write_depth(tmp_path / scene / "depth/007.png", stored)
        annotation = {"filename": "007.jpg", "image_size": [80, 120], "camera": {"focal_length": 100.0}}
        (tmp_path / scene / "annotations.json").write_text(json.dumps([annotation]))
    assert pixels.shape == (40, 60, 3)
    (frame,) = load(tmp_path, "navi", "multiview")
    assert len(load(tmp_path, "navi", "wild")) == 1
    assert frame.camera == Camera(50.0, 50.0, 29.5, 19.5)
    assert frame.photo().shape == (1, 3, 14, 14) and frame.depth().shape == (14, 14)
    known = frame.depth() > 0
    assert int(known.sum()) == 10 * 14 and torch.allclose(frame.depth()[known], torch.tensor(655.35 / 1311))
    whole = torch.from_numpy(np.where(stored > 0, 655.35 / np.maximum(stored, 1), 0))
    expected = normals_of_depth(whole, frame.camera, 3)[:, 8:22, 30:44]
    assert torch.allclose(frame.fitted_normals(frame.camera, 3), expected) and bool(expected.any())


@pytest.mark.parametrize("text", ["[{", '[{"filename": "007.jpg"}]', "[1]"])
def test_annotations_of_another_form_are_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "toy/wild_set/annotations.json"
    write_image(path.parent / "images/007.jpg")
    path.write_text(text)
    with pytest.raises(
        ValueError, match="annotations.json: expected filename, image_size and camera, focal_length of each"
    ):
        load(tmp_path, "navi", "wild")


@pytest.mark.parametrize(("layout", "words"), [("folders", "one is missing"), ("nyuv2", "nyu_depth"), ("navi", "no ")])
def test_a_folder_of_another_layout_is_told(tmp_path: Path, layout: str, words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        load(tmp_path, layout, LAYOUTS[layout].train)


# Targets


def test_depth_beyond_the_largest_is_unknown_and_maps_are_cut_like_images(tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/x.png")
    millimetres = np.tile(np.arange(30) * 500, (24, 1))
    write_depth(tmp_path / "depth/train/x.png", millimetres)
    (frame,) = load(tmp_path, "folders", "train")
    target = Depth(largest=8).target(frame, 24)
    expected = torch.arange(3, 27) * 0.5
    assert target.shape == (1, 24, 24) and torch.equal(target[0, 0], torch.where(expected > 8, 0, expected))
    assert Depth().known(target) == 24 * int(((expected > 0) & (expected <= 8)).sum())


def test_fitted_normals_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "images/train/x.png")
    write_depth(tmp_path / "depth/train/x.png", np.full((24, 30), 2000))
    (frame,) = load(tmp_path, "folders", "train")
    with pytest.raises(UsageError, match="--intrinsics: expected, because the layout has neither normals of x nor its"):
        Normals().read(frame)
    camera = Camera(20, 20, 15, 12)
    task = Normals(3, camera, TensorCache(tmp_path / "cache"))
    found = task.read(frame)
    assert torch.allclose(found, torch.tensor([0.0, 0, -1])[:, None, None].expand(3, 24, 30))
    monkeypatch.setattr(Frame, "fitted_normals", lambda *_: pytest.fail("fitted again"))
    assert torch.equal(task.read(frame), found)


def test_frames_that_cannot_be_used_are_told_of_and_left_out(tmp_path: Path) -> None:
    for name, value in (("good", 2000), ("empty", 0), ("cut", 1000)):
        write_image(tmp_path / f"images/train/{name}.png")
        write_depth(tmp_path / f"depth/train/{name}.png", np.full((24, 30), value))
    path = tmp_path / "images/train/cut.png"
    path.write_bytes(path.read_bytes()[:90])
    told = Told()
    frames = load(tmp_path, "folders", "train")
    assert [frame.name for frame in check_frames(frames, Depth(), 24, "train", told)] == ["good"]
    assert "left out: empty: no pixel is known" in told.lines
    assert any("left out" in line and "cut.png" in line for line in told.lines)
    assert told.lines[-1] == "'train': 1 frames, 100.0% of the pixels are known, at most 2.00 m away"
    write_depth(tmp_path / "depth/train/good.png", np.full((24, 31), 1000))
    with pytest.raises(ValueError, match="good: expected an image of the size of its map, 24 x 31, got 24 x 30"):
        check_frames(frames[-1:], Depth(), 24, "train", told)
    with pytest.raises(ValueError, match="none of 1 frames in the split 'train' can be used"):
        check_frames(frames[1:2], Depth(), 24, "train", told)


# Augmentation


def test_a_view_is_drawn_by_its_key_with_the_published_probabilities() -> None:
    views = [drawn_view("probe", 0, 0, image) for image in range(400)]
    assert views[:20] == [drawn_view("probe", 0, 0, image) for image in range(20)]
    jittered, cropped = sum(v.jitter >= 0 for v in views), [v.crop for v in views if v.crop]
    assert 290 < jittered < 350 and 170 < len(cropped) < 230
    assert all(
        0.5 <= side**2 <= 1 and 0 <= min(top, left) and max(top, left) + side <= 1 for top, left, side in cropped
    )
    batches = [Recipe(augment=True, batch=4).batches(4, epoch) for epoch in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]


def test_a_crop_shows_image_and_map_alike_and_colours_change_the_image_alone() -> None:
    values = torch.arange(64.0).view(8, 8)
    image = (values / 63).expand(1, 3, 8, 8)
    view = View(crop=(0.25, 0.5, 0.5))
    assert not view.is_seen_again and View(mirrored=True).is_seen_again
    assert torch.equal(view.target(values)[::2, ::2], values[2:6, 4:8])
    assert torch.equal(view.target(values)[1::2, 1::2], values[2:6, 4:8])
    assert float((view.image(image)[0, 0] * 63 - view.target(values)).abs().max()) < 3
    jitter = View(jitter=5)
    assert torch.equal(jitter.target(values), values) and torch.equal(jitter.image(image), jitter.image(image))
    assert not torch.equal(jitter.image(image), image)


# The commands


CAMERA = "24,24,14.5,11.5"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Walls whose brightness says how far they are, two of them to a frame: 6 to train, 3 to test."""
    root = tmp_path / "data"
    for split, count in (("train", 6), ("val", 3)):
        for index in range(count):
            generator = np.random.default_rng(index if split == "train" else 50 + index)
            far = np.full((24, 30), generator.uniform(1, 4))
            far[:, generator.integers(8, 22) :] = generator.uniform(5, 9)
            pixels = torch.from_numpy(far / 10 + 0.02 * generator.random((3, 24, 30))).float()
            (root / "images" / split).mkdir(parents=True, exist_ok=True)
            save_picture(root / "images" / split / f"{index}.png", pixels)
            far[:2] = 0
            write_depth(root / "depth" / split / f"{index}.png", far * 1000)
    monkeypatch.setattr(anyup.encoders, "load_encoder", lambda name, device="cpu", **_: make_encoder(4, name=name))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checkpoints.save(AnyUp(qk_dim=16, num_heads=2).eval(), "ours.pth")
    return root


def words(what: str, data: Path, *more: str) -> list[str]:
    typed = ["evaluate", what, "--data", str(data), "--encoder", "tiny", "--size", "24", "--seeds", "2"]
    typed += ["--weights", "ours.pth", "--learning-rate", "0.05", "--batch", "2", "--epochs", "12", "-o", "out.json"]
    return [*typed, *(["--intrinsics", CAMERA, "--window", "3"] if what == "normals" else []), *more]


@pytest.mark.parametrize(
    "more", [[], ["--bins", "1"], ["--published-gradient"], ["--augment"], ["--relative-depth", "--bins", "1"]]
)
def test_depth_is_learned_and_written(data: Path, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("depth", data, "--cache", "cache", *more)) == 0
    shown = capsys.readouterr()
    assert "'train': 6 frames, 91.7% of the pixels are known" in shown.err and "RMSE" in shown.out
    relative = "--relative-depth" in more
    assert ("m away" in shown.err) == ("RMSE, m" in shown.out) != relative
    results = json.loads(Path("out.json").read_text())
    assert results["evaluation"] == "depth" and results["splits"] == {"train": 6, "val": 3}
    assert results["task"]["depth"]["bins"] == (1 if "--bins" in more else 256)
    assert results["recipe"]["augment"] == ("--augment" in more) and results["recipe"]["schedule"] == "warm-up"
    assert list(results["results"]) == ["nearest", "bilinear", "ours"]
    for result in results["results"].values():
        assert len(result["seeds"]) == 2 and 0 <= result["delta1"]["mean"] <= result["delta3"]["mean"] <= 1
        # By the mean depth everywhere about 2.7, and 0.5 of relative depth.
        assert result["rmse"]["mean"] < (0.45 if relative else 2.5)
        assert result["scaled_rmse"]["mean"] <= result["rmse"]["mean"] + 1e-9
    assert not Path("cache/attention").exists() or "--augment" not in more
    # Nothing but the test is left, and it finds the same.
    assert cli.main(words("depth", data, "--cache", "cache", "--resume", *more)) == 0
    assert json.loads(Path("out.json").read_text())["results"] == results["results"]


def test_normals_are_learned_and_written(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("normals", data, "--cache", "cache")) == 0
    shown = capsys.readouterr()
    assert "mean, °" in shown.out and "fitted to the depth anew" not in shown.err
    results = json.loads(Path("out.json").read_text())
    assert results["task"]["normals"]["window"] == 3
    for result in results["results"].values():  # every wall faces the camera
        assert result["mean"]["mean"] < 30 and result["median"]["mean"] < 30  # about 90 before
    assert list(Path("cache/normals").iterdir())


def test_without_a_cache_the_command_says_that_normals_are_fitted_in_each_epoch(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words("normals", data)) == 0
    assert capsys.readouterr().err.count("normals are fitted to the depth anew in each epoch: --cache FOLDER") == 1


def test_a_training_that_was_stopped_goes_on_with_the_same_bits(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(words("depth", data, "--augment")) == 0
    whole = json.loads(Path("out.json").read_text())
    Path("out.json").unlink()
    Path("out.probes.pt").unlink()

    from anyup.evaluation import probing

    step, steps = probing.train_step, []

    def stopping(*arguments: object) -> Tensor | None:
        steps.append(0)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(probing, "train_step", stopping)
    assert cli.main(words("depth", data, "--augment")) != 0
    assert not Path("out.json").exists() and Path("out.probes.pt").exists()
    monkeypatch.setattr(probing, "train_step", step)
    assert cli.main(words("depth", data, "--augment", "--resume")) == 0
    assert json.loads(Path("out.json").read_text())["results"] == whole["results"]


def test_a_test_that_was_stopped_goes_on_after_the_frames_it_measured(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    metrics = Depth.metrics

    def counting(task: Depth, prediction: Tensor, target: Tensor) -> dict[str, float]:
        measured.append(0)
        if len(measured) == 9:
            raise KeyboardInterrupt
        return metrics(task, prediction, target)

    monkeypatch.setattr(Depth, "metrics", counting)
    assert cli.main(words("depth", data, "--bins", "1", "--cache", "cache")) != 0 and not Path("out.json").exists()
    assert cli.main(words("depth", data, "--bins", "1", "--cache", "cache", "--resume")) == 0
    # Of 3 frames, each of 3 methods and 2 seeds, the first was done.
    assert len(measured) == 9 + 2 * 6
    results = json.loads(Path("out.json").read_text())["results"]
    assert cli.main(words("depth", data, "--bins", "1", "--resume")) == 0
    assert json.loads(Path("out.json").read_text())["results"] == results


@pytest.mark.parametrize("what", ["depth", "normals", "segmentation"])
def test_a_dpt_head_over_four_blocks_is_learned_and_goes_on_after_a_stop(data: Path, what: str) -> None:
    typed = [*words(what, data, "--head", "dpt", "--width", "6", "--cache", "cache", "--class-token")]
    typed += [word for block in "abc" for word in ("--encoder", block)]
    typed[typed.index("--learning-rate") + 1] = "0.01"
    if what == "segmentation":  # near or far
        for split in ("train", "val"):
            for path in (data / "depth" / split).iterdir():
                near = np.array(Image.open(path)) < 4500
                (data / "masks" / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(near.astype(np.uint8)).save(data / "masks" / split / path.name)
        typed += ["--classes", "2"]
    assert cli.main(typed) == 0
    found = json.loads(Path("out.json").read_text())
    assert found["encoder"] == "tiny, a, b, c" and found["class_token"]
    assert (found["recipe"]["head"], found["recipe"]["width"]) == ("dpt", 6)
    assert list(found["results"]) == ["nearest", "bilinear", "ours"]
    name, bound = {"depth": ("rmse", 2.5), "normals": ("mean", 30), "segmentation": ("accuracy", 1)}[what]
    for result in found["results"].values():
        assert result[name]["mean"] < bound and (what != "segmentation" or result[name]["mean"] > 0.8)
    assert cli.main([*typed, "--resume"]) == 0
    assert json.loads(Path("out.json").read_text())["results"] == found["results"]
    assert cli.main([*typed[: typed.index("--width") + 1], "7", *typed[typed.index("--width") + 2 :], "--resume"]) == 1


def test_a_missing_camera_is_met_before_any_image_is_read(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileFrame, "photo", lambda _: pytest.fail("work began before the mistake was met"))
    typed = words("normals", data)
    where = typed.index("--intrinsics")
    assert cli.main(typed[:where] + typed[where + 2 :]) == 2
    assert "error: --intrinsics: expected" in capsys.readouterr().err


def test_every_layout_is_offered_by_the_commands_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("depth", "normals"):
        assert cli.main(["evaluate", what, "--help"]) == 0
        assert "{" + ",".join(LAYOUTS) + "}" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("what", "more", "text"),
    [
        ("depth", ["--bins", "0"], "--bins"),
        ("depth", ["--max-depth", "0.001"], "--max-depth"),
        ("depth", ["--max-depth", "2", "--relative-depth"], "not allowed with argument"),
        ("depth", ["--epochs", "1"], "epochs: expected more than the 1.5 of the warm-up, got 1"),
        ("depth", ["--layout", "camvid"], "--layout"),
        ("depth", ["--attention", "keep"], "goes with --cache"),
        ("depth", ["--attention", "keep", "--cache", "cache", "--augment"], "goes without --augment"),
        ("depth", ["--size", "22"], "--size: expected a multiple of tiny's stride of 4"),
        ("depth", ["--head", "dpt"], "--encoder: expected 4 with --head dpt, the blocks it sees, got 1"),
        ("normals", ["--width", "8"], "--width: goes with --head dpt"),
        ("depth", ["--test-split", "nowhere"], "one is missing"),
        ("normals", ["--intrinsics", "1,2,3"], "expected four numbers FX,FY,CX,CY, got '1,2,3'"),
        ("normals", ["--intrinsics", "1,2,x,4"], "--intrinsics"),
        ("normals", ["--window", "4"], "expected an odd number, got 4"),
        ("normals", ["--window", "1"], "--window"),
    ],
)
def test_mistakes_are_met_before_any_image_is_read(
    data: Path,
    what: str,
    more: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regression, "check_frames", lambda *_: pytest.fail("work began before the mistake was met"))
    assert cli.main(words(what, data, *more)) in (1, 2)
    assert text in capsys.readouterr().err and not Path("out.json").exists()
