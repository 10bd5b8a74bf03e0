"""Copies of the source tree with a kernel in it, and Python processes in which anyup is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

# A kernel module that needs a sibling and a data file, as the real ones do.
_PROBE = """
import json
from pathlib import Path
from . import probe_sibling
from anyup.kernels import probe_sibling as same_sibling
assert same_sibling is probe_sibling
SIBLING = probe_sibling.VALUE
DEVICE = json.loads((Path(__file__).parent / "configs" / "probe_device.json").read_text())["device"]
"""

# What has to hold wherever anyup comes from: the probe is importable through the bridge, with its sibling and
# its data, and a package of another project that is called ``kernels`` is not hidden.
CHECK_BRIDGE = """
import anyup.kernels.probe as probe
assert (probe.SIBLING, probe.DEVICE) == (7, "abacus")
import kernels
assert kernels.OWNER == "somebody else", kernels
"""


def our_conftest(folder: str = "tests") -> str:
    """The text of a conftest.py elsewhere that has all that ours in a folder has."""
    return (
        f"import runpy\nours = runpy.run_path({str(ROOT / folder / 'conftest.py')!r})\n"
        "globals().update((name, value) for name, value in ours.items() if not name.startswith('__'))\n"
    )


def copy_checkout(target: Path, *, kernels: bool) -> Path:
    """Copy what is needed to build and to run the package; with ``kernels``, add kernel modules."""
    target.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("anyup", "kernels"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "hubconf.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    if kernels:
        configs = target / "kernels" / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        (target / "kernels" / "probe.py").write_text(_PROBE)
        (target / "kernels" / "probe_sibling.py").write_text("VALUE = 7\n")
        (configs / "probe_device.json").write_text('{"device": "abacus"}')
    else:
        shutil.rmtree(target / "kernels", ignore_errors=True)
    return target


def other_kernels_package(target: Path) -> Path:
    """Make a folder that, on the path, provides another project's package called ``kernels``."""
    (target / "kernels").mkdir(parents=True)
    (target / "kernels" / "__init__.py").write_text('OWNER = "somebody else"\n')
    return target


def run_python(code: str, *, cwd: Path, path: tuple[Path, ...] = (), **environment: str) -> str:
    """Run code in a new interpreter and return what it printed; AssertionError with its output if it fails.

    The third-party packages of this interpreter are importable, ``.pth`` files are not processed: so an
    editable installation of anyup in this environment is not visible there.
    """
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), *packages]),
            # Otherwise ``-c`` puts the current folder on the path.
            "PYTHONSAFEPATH": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
