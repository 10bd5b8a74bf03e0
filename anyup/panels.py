"""Pictures side by side, with titles and text, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anyup.images import to_pil

if TYPE_CHECKING:
    from PIL import Image

_MARGIN = 16
_TITLE_POINTS = 26
_FOOTER_POINTS = 22
_INK, _PALE, _ALARM = (20, 20, 20), (90, 90, 90), (190, 20, 20)


def _font(points: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=points)
    except (ImportError, TypeError):  # without FreeType, or before Pillow 10.1, only one small font exists
        return ImageFont.load_default()


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words; one word may be longer."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def draw_panels(
    panels: Sequence[Tensor], titles: Sequence[str], footer: Sequence[str], alarms: Sequence[str] = ()
) -> Image.Image:
    """Pictures (3, H, W) of one size side by side, a title over each and paragraphs below.

    Titles in `alarms` are red. Text is wrapped, never cut; characters the built-in font lacks become "?".
    """
    from PIL import Image, ImageDraw

    height, width = panels[0].shape[-2:]
    total = len(panels) * (width + _MARGIN) + _MARGIN
    title_font, footer_font = _font(_TITLE_POINTS), _font(_FOOTER_POINTS)

    def ascii_only(text: str) -> str:
        return text.encode("ascii", "replace").decode("ascii")

    title_lines = [_wrap(ascii_only(title), title_font, width) for title in titles]
    footer_lines = [line for text in footer for line in _wrap(ascii_only(text), footer_font, total - 2 * _MARGIN)]
    title_step, footer_step = round(_TITLE_POINTS * 1.3), round(_FOOTER_POINTS * 1.4)
    top = _MARGIN + max(map(len, title_lines)) * title_step + _MARGIN // 2
    bottom = top + height + _MARGIN

    picture = Image.new("RGB", (total, bottom + len(footer_lines) * footer_step + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for index, (panel, title, lines) in enumerate(zip(panels, titles, title_lines, strict=True)):
        left = _MARGIN + index * (width + _MARGIN)
        picture.paste(to_pil(panel), (left, top))
        for number, line in enumerate(lines):
            color = _ALARM if title in alarms else _INK
            draw.text((left, _MARGIN + number * title_step), line, font=title_font, fill=color)
    for number, line in enumerate(footer_lines):
        draw.text((_MARGIN, bottom + number * footer_step), line, font=footer_font, fill=_PALE)
    return picture
