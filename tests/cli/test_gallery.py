"""The gallery's page: what is in it, and what its script does, in node and in a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recipe import fill, wave
from support.tiny_encoder import make_encoder
from torch import Tensor

from anyup import AnyUp, cli, encoders
from anyup.gallery.page import make_section, write_page
from anyup.images import normalize_imagenet, resize, save_picture

ROOT = Path(__file__).resolve().parents[2]
SIZE, GRID = (40, 48), (10, 12)
NAMES = ["photograph", "features", "bilinear", "AnyUp"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def small() -> AnyUp:
    return fill(AnyUp(qk_dim=16, num_heads=2, lfu_dim=8, kernel_size_lfu=3, window_ratio=0.2), 0).eval()


def photograph() -> Tensor:
    return wave((1, 3, 41, 49), 3, 0.2, 0.5).clamp(0, 1)


class Page(HTMLParser):
    """The pictures, the data and the scripts of a page, and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside = f"{tag} {given['type']}" if "type" in given else tag
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value is not None]
        if tag == "img" and "src" in given:
            self.pictures.append((str(given["alt"]), str(given["src"])))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self._inside, []).append(data.strip())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gallery") / "gallery.html"
    section = make_section(
        photograph(), small(), make_encoder(), name="a <b> & 'c'", credit="by <someone>", longer_side=48, untrained=True
    )
    write_page(path, [section, section], "About {these} & those.")
    return path


def test_the_page_holds_everything_that_it_shows(path: Path) -> None:
    from PIL import Image

    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.texts["h2"] == 2 * ["a <b> & 'c'"] and "by <someone>" in page.texts["p"]
    assert "About {these} & those." in page.texts["p"]
    assert sum("UNTRAINED" in said for said in page.texts["p"]) == 2
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "http" not in text and "url(" not in text
    assert [name for name, _ in page.pictures] == 2 * NAMES
    for name, source in page.pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert picture.size == (GRID if name == "features" else SIZE)[::-1]
    assert len(text) < 40_000


@torch.no_grad()
def attention() -> Tensor:
    """The weights of every pixel, (H, W, h, w), by carrying maps of one key each."""
    view = resize(photograph(), SIZE)
    encoder = make_encoder()
    keys = torch.eye(GRID[0] * GRID[1]).unflatten(1, GRID)[None]
    weights = small()(normalize_imagenet(view), encoder(encoder.normalize(view)), values=keys)
    return weights[0].permute(1, 2, 0).unflatten(2, GRID)


def test_the_script_finds_the_weights_of_a_pixel(path: Path, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    page = Page(path.read_text(encoding="utf-8"))
    data: Any = json.loads(page.texts["script application/json"][0])
    places = [(0, 0), (3, 5), (len(data["rows"]) - 1, len(data["columns"]) - 1)]
    (tmp_path / "run.js").write_text(
        "globalThis.document = { querySelectorAll: () => [] };\n"
        + page.texts["script"][0]
        + f"\nconst data = {json.dumps(data)};\n"
        + "inflate(data.weights).then((bytes) => console.log(JSON.stringify("
        + f"{json.dumps(places)}.map(([i, j]) => windowOf(data, bytes, i, j)))));\n"
        + "console.log(JSON.stringify([nearest([2, 6, 10], 3.9), nearest([2, 6, 10], 99), holdingHalf([1, 5, 1, 2])]));"
    )
    run = subprocess.run([node, tmp_path / "run.js"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    helpers, found = (json.loads(line) for line in run.stdout.splitlines())
    assert helpers == [0, 2, 1]
    every = attention()
    for (i, j), seen in zip(places, found, strict=True):
        weights = every[data["rows"][i], data["columns"][j]]
        inside = weights[seen["top"] : seen["bottom"], seen["left"] : seen["right"]]
        assert inside.sum() > 1 - 1e-5, "a key outside of the window has a weight"
        assert (weights > 0).sum() == inside.numel() == len(seen["weights"])
        expected = inside.flatten() / inside.max() * 255
        assert (torch.tensor(seen["weights"]) - expected).abs().max() <= 0.51


def test_the_page_works_in_a_browser(path: Path) -> None:
    sync_playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").sync_playwright
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        section = page.locator("section").first
        told = section.locator("output")
        page.wait_for_function("document.querySelector('output').value !== ''")

        def shown() -> dict[str, str]:
            return {
                picture.get_attribute("alt"): picture.evaluate("each => each.style.clipPath")
                for picture in section.locator(".wipe img:visible").all()
            }

        assert shown() == {"bilinear": "", "AnyUp": "inset(0px 0px 0px 50%)"}
        section.locator("input").fill("25")
        section.locator(".left").select_option("photograph")
        assert shown() == {"photograph": "", "AnyUp": "inset(0px 0px 0px 25%)"}
        section.locator(".left").select_option("AnyUp")
        assert shown() == {"AnyUp": ""}

        before = told.inner_text()
        panel = section.locator(".look")
        drawn = "each => each.toDataURL()"
        first = section.locator("canvas").evaluate(drawn)
        box = panel.bounding_box()
        assert box is not None
        panel.click(position={"x": box["width"] * 0.99, "y": box["height"] * 0.01})
        assert "row 2, column 46 sees" in told.inner_text() != before
        assert section.locator("canvas").evaluate(drawn) != first
        panel.press("ArrowLeft")
        panel.press("ArrowUp")
        assert "row 2, column 42 sees" in told.inner_text()
        section.locator(".wipe").click(position={"x": 1, "y": 1})
        assert "row 2, column 2 sees" in told.inner_text()
        chromium.close()
    assert not errors


def test_the_command_shows_what_can_be_read_with_its_credit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders, "load_encoder", lambda name, device: make_encoder())
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    save_picture(folder / "one.png", photograph())
    (folder / "one.txt").write_text("by me, CC0\n", encoding="utf-8")
    save_picture(folder / "more" / "two.png", photograph())
    (folder / "broken.jpg").write_bytes(b"no picture")
    output = tmp_path / "gallery.html"
    command = ["gallery", str(folder), "--size", "32", "--untrained", "-o", str(output)]
    assert cli.main(command) == 1
    told = capsys.readouterr()
    assert told.out.strip() == str(output) and f"left out: {folder / 'broken.jpg'}: " in told.err
    assert told.err.splitlines()[-1] == f"anyup: error: folder {folder}: 1 of 3 left out: broken.jpg"
    page = Page(output.read_text(encoding="utf-8"))
    assert page.texts["h2"] == ["two", "one"] and "by me, CC0" in page.texts["p"]
    assert "Features of tiny, upsampled by anyup with untrained weights." in page.texts["p"]

    (folder / "broken.jpg").unlink()
    assert cli.main(command) == 0
    for name in ("one.png", "more/two.png"):
        (folder / name).write_bytes(b"no picture")
    before = output.read_bytes()
    assert cli.main(command) == 1
    assert "none of its photographs could be shown" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_the_stored_gallery_is_today_s_page_with_the_credits_of_its_licence_page() -> None:
    text = (ROOT / "docs" / "gallery.html").read_text(encoding="utf-8")
    licences = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    for name in ("page.css", "page.js"):
        assert (ROOT / "anyup" / "gallery" / name).read_text(encoding="utf-8") in text, f"another {name}: make it again"
    rows = [line.split("|")[1:4] for line in licences.splitlines() if "`skimage.data" in line]
    credits = {name.strip(): (source.strip(" `"), person.strip()) for name, source, person in rows}
    page = Page(text)
    assert page.texts["h2"] == list(credits)
    for source, person in credits.values():
        assert any(source in said and person in said and "CC0 1.0" in said for said in page.texts["p"])
