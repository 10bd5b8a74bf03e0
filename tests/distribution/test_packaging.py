"""The package as built and installed, and the bridge to the top-level ``kernels/`` in each case."""

from __future__ import annotations

import email
import importlib.util
import shutil
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from types import ModuleType

import pytest
from support.checkouts import CHECK_BRIDGE, ROOT, copy_checkout, other_kernels_package, run_python

import anyup

# Building must not need torch: pip builds in an environment of its own, where there is none.
_BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
{call}
"""


def build(checkout: Path, call: str) -> Path:
    """Run one hook of the build backend, ``build_wheel`` say, in a checkout; return the file it made."""
    before = set(checkout.glob("dist/*"))
    (checkout / "dist").mkdir(exist_ok=True)
    run_python(_BUILD.format(call=f"build_meta.{call}"), cwd=checkout)
    (made,) = set(checkout.glob("dist/*")) - before
    return made


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a wheel, which is how one without compiled code is installed."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(target)
    return target


def process_pth(site: Path) -> str:
    """Return the code that does what an interpreter does with the ``.pth`` files of its site-packages."""
    return f"import site; site.addsitedir({str(site)!r})\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("with_kernels") / "checkout", kernels=True)


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return build(checkout, "build_wheel('dist')")


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    return build(checkout, "build_sdist('dist')")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return other_kernels_package(tmp_path / "other")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(file.read(name).decode())


def test_kernels_folder_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_ships_kernels_inside_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} == {"anyup", f"anyup-{anyup.__version__}.dist-info"}
    assert {"anyup/_kernels/probe.py", "anyup/_kernels/configs/probe_device.json"} <= names
    assert "anyup/_kernels/__init__.py" not in names


def test_wheel_holds_the_types_marker_the_licence_and_the_command(wheel: Path) -> None:
    names = names_in(wheel)
    info = f"anyup-{anyup.__version__}.dist-info"
    assert {"anyup/py.typed", f"{info}/licenses/LICENSE"} <= names
    with zipfile.ZipFile(wheel) as file:
        assert "anyup = anyup.cli:main" in file.read(f"{info}/entry_points.txt").decode()


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "anyup").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= names_in(wheel)


def test_metadata_names_version_licence_requirements_and_extras(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == anyup.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = metadata.get_all("Requires-Dist") or []
    (triton,) = [line for line in requirements if line.startswith("triton")]
    assert triton.replace('"', "'").split(";")[0].strip() == "triton"
    assert "platform_system == 'Linux'" in triton.replace('"', "'")
    (torch,) = [line for line in requirements if line.startswith("torch") and "extra" not in line]
    assert "<" not in torch
    assert {"demo", "test", "bench", "dev"} <= set(metadata.get_all("Provides-Extra") or [])


def test_wheel_without_a_kernels_folder_builds_and_has_no_kernels(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", kernels=False)
    names = names_in(build(checkout, "build_wheel('dist')"))
    assert not [name for name in names if "kernels/" in name]
    assert "anyup/kernels.py" in names


def test_wheel_imports_its_kernels_and_hides_no_other_package(wheel: Path, tmp_path: Path, other: Path) -> None:
    site = unpack(wheel, tmp_path / "site")
    out = run_python(CHECK_BRIDGE + "print(probe.__file__)", cwd=tmp_path, path=(site, other))
    assert Path(out.strip()) == site / "anyup" / "_kernels" / "probe.py"


def test_sdist_holds_what_a_build_a_hub_and_a_test_run_need(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    assert {
        "setup.py",
        "pyproject.toml",
        "hubconf.py",
        "README.md",
        "LICENSE",
        "anyup/py.typed",
        "anyup/kernels.py",
        "kernels/probe.py",
        "kernels/configs/probe_device.json",
    } <= names
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_built_from_the_sdist_holds_what_the_wheel_of_the_checkout_holds(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(sdist) as file:
        if sys.version_info >= (3, 12):
            file.extractall(tmp_path, filter="data")
        else:
            file.extractall(tmp_path)
    (source,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert names_in(build(source, "build_wheel('dist')")) == names_in(wheel)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "strict", "compat"])
def test_editable_install_imports_its_kernels_and_hides_no_other_package(
    tmp_path: Path, other: Path, mode: str
) -> None:
    checkout = copy_checkout(tmp_path / "checkout", kernels=True)
    settings = "" if mode == "default" else f", config_settings={{'editable_mode': {mode!r}}}"
    site = unpack(build(checkout, f"build_editable('dist'{settings})"), tmp_path / "site")
    show = "import anyup; print(anyup.__file__); print(probe.__file__)"
    out = run_python(process_pth(site) + CHECK_BRIDGE + show, cwd=tmp_path, path=(site, other))
    for line in out.split():
        assert checkout in Path(line).parents


@pytest.mark.slow
def test_editable_install_sees_a_kernels_folder_that_came_later(tmp_path: Path, other: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout", kernels=False)
    site = unpack(build(checkout, "build_editable('dist')"), tmp_path / "site")
    later = copy_checkout(tmp_path / "later", kernels=True)
    shutil.move(later / "kernels", checkout / "kernels")
    run_python(process_pth(site) + CHECK_BRIDGE, cwd=tmp_path, path=(site, other))


def test_source_tree_on_the_path_hides_no_other_package_of_that_name(
    checkout: Path, tmp_path: Path, other: Path
) -> None:
    run_python(CHECK_BRIDGE, cwd=tmp_path, path=(checkout, other))


def load_bridge(package: Path) -> ModuleType:
    """Run a copy of the bridge as ``anyup.kernels`` of a package folder, without importing that package."""
    package.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "anyup" / "kernels.py", package / "kernels.py")
    spec = importlib.util.spec_from_file_location("bridge_under_test", package / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bridge_without_any_folder_is_an_empty_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = load_bridge(tmp_path / "anyup")
    assert bridge.__path__ == []
    monkeypatch.setitem(sys.modules, "bridge_under_test", bridge)
    with pytest.raises(ModuleNotFoundError, match="bridge_under_test.window_attention"):
        importlib.import_module("bridge_under_test.window_attention")


def test_bridge_of_an_installed_package_never_takes_the_kernels_package_beside_it(tmp_path: Path) -> None:
    other_kernels_package(tmp_path)
    assert load_bridge(tmp_path / "anyup").__path__ == []


def test_bridge_prefers_the_shipped_kernels(tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()
    (tmp_path / "kernels").mkdir()
    assert load_bridge(tmp_path / "anyup").__path__ == [str(tmp_path / "kernels")]
    (tmp_path / "anyup" / "_kernels").mkdir()
    assert load_bridge(tmp_path / "anyup").__path__ == [str(tmp_path / "anyup" / "_kernels")]
