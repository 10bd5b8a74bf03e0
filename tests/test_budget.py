"""Memory: what is free, and what is refused because it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import anyup
from anyup import budget
from anyup.limited_memory.call import _limit
from anyup.limited_memory.task import make_task

CPU = torch.device("cpu")
OUT_OF_REACH = (10**9, 10**9)


@pytest.fixture(scope="module")
def upsampler() -> anyup.AnyUp:
    return anyup.AnyUp(qk_dim=16, num_heads=2, lfu_dim=8).eval()


@pytest.fixture
def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        yield torch.randn(1, 3, 12, 10), torch.randn(1, 5, 3, 2)


class _Endless:
    """An array that could take any of the output."""

    shape, dtype = (1, 5, *OUT_OF_REACH), "float32"

    def __setitem__(self, where: Any, values: Any) -> None:
        raise AssertionError("nothing was to be computed")


ENTRIES: dict[str, Callable[[anyup.AnyUp, Tensor, Tensor], Any]] = {
    "call": lambda model, image, features: model(image, features, OUT_OF_REACH),
    "call with gradients": lambda model, image, features: torch.enable_grad()(model)(image, features, OUT_OF_REACH),
    "call within a budget": lambda model, image, features: model(image, features, OUT_OF_REACH, max_memory="1GB"),
    "call with out": lambda model, image, features: model(image, features, OUT_OF_REACH, out=_Endless()),
    "encode_image": lambda model, image, features: model.encode_image(image, OUT_OF_REACH),
    "stream": lambda model, image, features: model.stream(image, features, OUT_OF_REACH),
    "stream of tiles": lambda model, image, features: model.stream(image, features, OUT_OF_REACH, tile=(8, 10**8)),
    "stream with out": lambda model, image, features: model.stream(image, features, OUT_OF_REACH, out=_Endless()),
    "with_head": lambda model, image, features: anyup.with_head(model, torch.nn.Conv2d(5, 2, 1))(
        image, features, OUT_OF_REACH
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_size_out_of_reach_is_refused_before_any_work(
    entry: str, upsampler: anyup.AnyUp, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 2 * 10**9)
    with pytest.raises(ValueError, match=r"(output_size|tile): .* [TEZ]?G?B, and 2.00 GB of memory are free on cpu; "):
        ENTRIES[entry](upsampler, *inputs)


def test_a_plan_longer_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda device: 2 * 10**9)
    with pytest.raises(ValueError, match="output_size: a table of the windows of 1000000000 rows and 1000000000"):
        anyup.plan((8, 8), (2, 2), 5, output_size=OUT_OF_REACH)


def test_a_stream_counts_more_pieces_than_memory_could_hold(
    upsampler: anyup.AnyUp, inputs: tuple[Tensor, Tensor]
) -> None:
    pieces = upsampler.stream(*inputs, (10**5, 10**5 + 1), tile=(2, 2))
    assert len(pieces) == len(pieces.parts) == 50_000 * 50_001
    assert pieces.parts[50_001] == (slice(2, 4), slice(0, 2))
    assert pieces.parts[-1] == (slice(99_998, 10**5), slice(10**5, 10**5 + 1))
    with pytest.raises(IndexError):
        pieces.parts[len(pieces)]


@pytest.mark.parametrize("max_memory", [None, "1GB"])
def test_what_has_room_is_not_refused(
    max_memory: str | None, upsampler: anyup.AnyUp, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = 30 * 20
    needed = pixels * 5 * 4 + (pixels * 16 * 4 if max_memory is None else 0)  # the result, and the queries
    monkeypatch.setattr(budget, "_ALWAYS_FREE", 0)
    monkeypatch.setattr(budget, "free_memory", lambda device: needed)
    assert upsampler(*inputs, (30, 20), max_memory=max_memory).shape == (1, 5, 30, 20)
    monkeypatch.setattr(budget, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match="output_size: the result, 1 x 5 x 30 x 20"):
        upsampler(*inputs, (30, 20), max_memory=max_memory)


def test_what_out_holds_already_is_not_counted(
    upsampler: anyup.AnyUp, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = torch.empty(1, 5, 300, 20)
    monkeypatch.setattr(budget, "_ALWAYS_FREE", 0)
    monkeypatch.setattr(budget, "free_memory", lambda device: out.nbytes // 2)
    assert upsampler(*inputs, (300, 20), out=out, max_memory="1GB") is out


def test_what_takes_no_memory_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_ALWAYS_FREE", 0)
    model = anyup.AnyUp(qk_dim=16, num_heads=2, lfu_dim=8).to("meta")
    image, features = torch.empty(1, 3, 12, 10, device="meta"), torch.empty(1, 5, 3, 2, device="meta")
    with torch.no_grad():
        assert model(image, features, (30_000, 40_000)).shape == (1, 5, 30_000, 40_000)
    with FakeTensorMode() as mode:
        assert not budget.is_plain(mode.from_tensor(torch.randn(1, 3, 12, 10)))


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not tell what is free")
def test_the_memory_that_is_free_is_told() -> None:
    free = budget.free_memory(CPU)
    assert free is not None and 2**20 < free < 2**50


GROUPS = {
    "version 2": ("0::/a/b", "", ("memory.max", "memory.current", "file")),
    "version 1": (
        "4:memory:/a/b\n2:cpu:/a",
        "memory",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ),
}


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("folder", ["a/b", "a", ""])
def test_a_control_group_s_limit_counts_wherever_it_is_set(version: str, folder: str, tmp_path: Path) -> None:
    line, root, (limit, used, cache) = GROUPS[version]
    (tmp_path / "cgroup").write_text(line + "\n")
    group = tmp_path / root / folder
    group.mkdir(parents=True, exist_ok=True)
    (group / limit).write_text("1000\n")
    (group / used).write_text("900\n")
    (group / "memory.stat").write_text(f"anon 600\n{cache} 300\n")
    assert list(budget._control_groups(tmp_path / "cgroup", tmp_path)) == [400]
    (group / limit).write_text("max\n")
    assert not list(budget._control_groups(tmp_path / "cgroup", tmp_path))


def test_a_card_is_not_asked_for_its_free_memory_where_little_of_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    card = torch.device("cuda", 0)
    monkeypatch.setattr(budget, "free_memory", lambda device: asked.append(device) or 2**33)
    monkeypatch.setattr(budget, "total_memory", lambda device: 2**34 if device.type == "cuda" else None)
    task = make_task(
        anyup.AnyUp(qk_dim=16, num_heads=2, lfu_dim=8).config,
        image=(448, 448), output=(448, 448), grid=(32, 32), batch=1, channels=384, value_channels=384,
        dtype=torch.bfloat16, value_dtype=torch.bfloat16, out_dtype=torch.bfloat16, device_type="cuda", returned=True,
        region=(0, 0, 448, 448),
    )  # fmt: skip
    assert _limit(task, card, None) is None
    task.check_room(card, whole=True)
    assert budget.has_room(2**30, card) and not asked
    assert _limit(task, card, "1GB") == 10**9
    assert _limit(replace(task, batch=64), card, None) == int(budget.SHARE * 2**33)
    assert budget.has_room(2**32, card) and not budget.has_room(2**33, card) and len(asked) == 3
