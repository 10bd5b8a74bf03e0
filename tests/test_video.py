"""Videos: their frames as a viewer sees them, and what `anyup upsample` makes of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_video import SIZE, write_video
from support.tiny_encoder import make_encoder
from torch import Tensor

import anyup
from anyup.cli import command as cli
from anyup.cli import upsample_many
from anyup.images import normalize_imagenet, resize
from anyup.training.distributed import Engine
from anyup.video import Video

av = pytest.importorskip("av")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with weights.pth."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(anyup.encoders, "load_encoder", lambda name, device: make_encoder().to(device))
    torch.manual_seed(0)
    anyup.save(anyup.AnyUp(qk_dim=16, num_heads=2), "weights.pth")


def upsample(*arguments: str, video: str = "video.mp4") -> int:
    fixed = ("--encoder", "tiny", "--encoder-size", "16", "--weights", "weights.pth")
    return cli.main(["upsample", video, *fixed, *arguments])


def test_frames_come_as_they_were_written() -> None:
    for name in ("video.mp4", "video.mkv"):  # the second tells only how long it is
        written = write_video(name)
        with Video(name) as video:
            assert (video.count, video.size) == (3, SIZE)
            for frame, pixels in zip(video, written, strict=True):
                assert frame.shape == (1, 3, *SIZE) and frame.dtype == torch.uint8
                assert np.abs(frame[0].permute(1, 2, 0).numpy().astype(int) - pixels).mean() < 4


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot rotate a video")
def test_a_frame_is_turned_as_the_video_says() -> None:
    for degrees in (90, -90, 180):
        write_video("video.mp4", frames=1, rotation=degrees)
        with av.open("video.mp4") as container:
            (stored,) = container.decode(video=0)
        with Video("video.mp4") as video:
            (frame,) = video
        # Counterclockwise.
        corner = {90: (-1, 0), -90: (0, -1), 180: (-1, -1)}[
            stored.rotation % 360 if degrees == 180 else stored.rotation
        ]
        assert frame[0, 0][corner] > 80 > frame[0, 0].float().median()
        assert frame.shape[2:] == (SIZE if degrees == 180 else SIZE[::-1])


def test_each_frame_is_upsampled(capsys: pytest.CaptureFixture[str]) -> None:
    write_video("video.mp4")
    assert upsample("-o", "out", "--size", "16", "--picture", "pictures") == 0
    assert {path.name for path in Path("out").iterdir()} == {*(f"00000{n}.npy" for n in range(3)), "manifest.jsonl"}
    encoder, model = make_encoder(), anyup.load("weights.pth")

    def expected(frame: Tensor) -> Tensor:
        image = normalize_imagenet(resize(frame.float() / 255, (8, 16)))
        with torch.inference_mode():
            features = encoder(encoder.normalize(resize(frame.float() / 255, (8, 16))))
            result: Tensor = model(image, features)
        return result

    with Video("video.mp4") as video:
        for number, frame in enumerate(video):
            torch.testing.assert_close(torch.from_numpy(np.load(f"out/00000{number}.npy"))[None], expected(frame))
    assert "3 of 3\n" in capsys.readouterr().err
    assert upsample("-o", "out", "--size", "16", "--picture", "pictures", "--resume") == 0
    Path("video.mp4").rename("other.mp4")
    assert upsample("-o", "out", "--size", "16", "--picture", "pictures", "--resume", video="other.mp4") == 1
    assert "begun with video video.mp4, now other.mp4" in capsys.readouterr().err


def test_processes_share_the_frames() -> None:
    write_video("video.mp4", frames=5)
    shares = []
    for rank in range(2):
        with Video("video.mp4") as video:
            frames = upsample_many.Frames(video)
            assert len(frames.sizes()) == 5
            engine = Engine(torch.device("cpu"))
            engine.rank, engine.world = rank, 2
            frames.share(engine, str)
            shares.append([photograph.name for photograph in frames.read(lambda name, sha256: False)])
            assert frames.count == len(shares[-1])
    assert shares == [["000000", "000002", "000004"], ["000001", "000003"]]


def test_what_comes_before_a_broken_place_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    write_video("video.mp4", frames=20)
    content = bytearray(Path("video.mp4").read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov") - 4  # of what is encoded
    content[(start + end) // 2 : end] = bytes(end - (start + end) // 2)
    Path("video.mp4").write_bytes(content)
    assert upsample("-o", "out", "--size", "16") == 1
    *kept, last = Path("out/manifest.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    assert 0 < len(kept) < 20 and not any("error" in json.loads(line) for line in kept)
    assert "the video cannot be decoded" in json.loads(last)["error"]
    assert f"left out: {len(kept):06d}: video.mp4: the video cannot be decoded" in capsys.readouterr().err


def test_what_is_no_video_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("video.mp4").write_text("no video", encoding="utf-8")
    assert upsample("-o", "out") == 1
    assert "video.mp4: not a video that PyAV" in capsys.readouterr().err
    assert upsample("-o", "out", video="none.mp4") == 1
    assert "none.mp4: No such file" in capsys.readouterr().err
    with av.open("sound.avi", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    assert upsample("-o", "out", video="sound.avi") == 1
    assert "there is no picture in it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert upsample("-o", "out") == 1
    assert "videos need PyAV: pip install av" in capsys.readouterr().err
    assert not Path("out").exists()
