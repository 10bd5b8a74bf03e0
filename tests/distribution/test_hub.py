"""``torch.hub.load`` from a source tree."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.checkouts import CHECK_BRIDGE, ROOT, copy_checkout, other_kernels_package, run_python

from anyup import AnyUp
from anyup.checkpoints import DownloadError, load

FILES = {"anyup": "anyup_paper.pth", "anyup_multi_backbone": "anyup_multi_backbone.pth"}
NAMES = (*FILES, "anyup_mini")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub; the folder where its checkpoints go."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_bare_source_tree_loads_and_runs_in_a_process_without_anyup(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", kernels=True)
    other = other_kernels_package(tmp_path / "other")
    code = f"""
import importlib.util, sys, torch
assert importlib.util.find_spec("anyup") is None
model = torch.hub.load({str(checkout)!r}, "anyup", source="local", pretrained=False)
assert {str(checkout)!r} not in sys.path
out = model(torch.rand(1, 3, 28, 28), torch.rand(1, 5, 2, 2))
assert out.shape == (1, 5, 28, 28), out.shape
import anyup
anyup.encoders, anyup.visualization
print(anyup.__file__)
"""
    out = run_python(code + CHECK_BRIDGE, cwd=tmp_path, path=(other,))
    assert Path(out.strip()) == checkout / "anyup" / "__init__.py"


@pytest.fixture(scope="module")
def hubconf() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hubconf_under_test", ROOT / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hub_would_list_the_entry_points_and_nothing_else(hubconf: ModuleType) -> None:
    # The rule of torch.hub.list, which has no source="local".
    listed = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert sorted(listed) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_entry_point_has_help_and_the_published_arguments_in_order(hubconf: ModuleType, name: str) -> None:
    entry = getattr(hubconf, name)
    assert entry.__doc__
    defaults = {key: parameter.default for key, parameter in inspect.signature(entry).parameters.items()}
    assert list(defaults.items()) == [
        ("use_natten", False),
        ("pretrained", True),
        ("device", "cpu"),
        ("backend", None),
    ]


@pytest.mark.parametrize("name", FILES)
def test_pretrained_weights_come_from_the_cache(hub: Path, name: str) -> None:
    published = AnyUp()
    torch.save(published.state_dict(), hub / FILES[name])
    model = torch.hub.load(str(ROOT), name, source="local", device="cpu", backend=None)
    for key, tensor in published.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert model.config["window"] == "ratio"
    assert not model.training
    assert torch.hub.load(str(ROOT), name, source="local", use_natten=True).config["window"] == "cell"


def test_the_packaged_weights_need_no_cache(hub: Path) -> None:
    model, expected = torch.hub.load(str(ROOT), "anyup_mini", source="local"), load("anyup_mini")
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert not model.training


def test_pretrained_weights_that_cannot_be_had_say_where_to_put_them(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("anyup.stored_weights.urlopen", refused)
    with pytest.raises(DownloadError, match="no network") as caught:
        torch.hub.load(str(ROOT), "anyup", source="local")
    assert str(hub / "anyup_paper.pth") in str(caught.value)


def test_untrained_model_takes_window_device_and_backend() -> None:
    model = torch.hub.load(
        str(ROOT), "anyup", source="local", use_natten=True, pretrained=False, device="meta", backend="torch"
    )
    assert model.config["window"] == "cell"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(ValueError, match="backend"):
        torch.hub.load(str(ROOT), "anyup", source="local", pretrained=False, backend="abacus")
