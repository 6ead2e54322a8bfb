"""Text, voxels and outlines of a plane, drawn with Pillow.

A pixel has one byte: a gray level or a label's color.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crfrefine.base.array_types import Array, Bool, Integers
from crfrefine.base.colors import LABEL_COLORS
from crfrefine.errors import BackendUnavailableError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

Pixels = tuple[int, int]  # a place or a size, to the right and down
Levels = NDArray[np.uint8]  # (rows, columns), gray levels and colors
Colors = Mapping[int, str]  # of labels, `#rrggbb`

# Labels with a solid line; as many follow with each of two kinds of dashes, until it begins again.
_NUM_SOLID = 8
# Pixels of an outline, inside of its label, so that the outlines of neighbors lie side by side.
LINE_WIDTH = 2
# Brightest gray level; the levels above it are the colors of labels.
WHITE = 255 - len(LABEL_COLORS) - 1
# Gray levels of the background, of letters, and of frames.
PAPER = round(0.065 * WHITE)
INK = round(0.95 * WHITE)
FAINT_INK = round(0.68 * WHITE)
_FRAME = round(0.8 * WHITE)
# Heights of letters, in pixels.
TITLE = 21
TEXT = 15
SMALL = 13
# The letters of the sides of a plane and its name have room in a square so large, above and below
# a plane of a few slices.
MIN_HEIGHT = 100
GAP = 8  # between parts of a picture
_SAMPLE = 26  # width of the line or bar that shows a label's color
_SPELLED = {"→": "to", "\u2212": "-"}  # for signs in our texts that a font lacks


def label_levels(labels: Array, colors: Colors) -> Levels:
    """Return the level of the color of each label, one of `LABEL_COLORS`; background is white."""
    levels = np.full(max(colors, default=0) + 1, WHITE, np.uint8)
    for label, color in colors.items():
        levels[label] = WHITE + 1 + LABEL_COLORS.index(color)
    return levels[labels]


def enlarge(plane: Array, size: Pixels) -> Array:
    """Return a plane, (rows, columns), at another size, (across, down).

    Each pixel has the value of the voxel that its middle is in.
    """
    for axis, num_pixels in enumerate(reversed(size)):
        middles = np.arange(num_pixels) + 0.5
        voxels = (middles * plane.shape[axis] / num_pixels).astype(np.intp)
        plane = plane.take(voxels, axis=axis)
    return plane


def resize_gray(plane: Levels, size: Pixels, share: float = 1.0) -> Levels:
    """Return gray values from 0 to 255, darkened to a share, as levels at another size.

    Enlarged voxels keep their edges, others are averaged.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(plane))
    gray = np.asarray(picture.resize(size, Image.Resampling.BOX))
    return (gray * (share * WHITE / 255)).astype(np.uint8)


def outline(labels: Array) -> Bool:
    """Return the pixels of the outlines of labels above 0, (rows, columns) as the labels.

    They lie along the edges of the voxels. The edge of the picture is no border of a label.
    """
    rows, columns = labels.shape
    padded = np.pad(labels, LINE_WIDTH, mode="edge")
    border = np.zeros(labels.shape, bool)
    for down, right in np.ndindex(2 * LINE_WIDTH + 1, 2 * LINE_WIDTH + 1):
        border |= padded[down : down + rows, right : right + columns] != labels
    border &= labels > 0
    border[border] = is_dashed_on(labels[border], *np.nonzero(border))
    return border


def is_dashed_on(labels: Array, rows: Integers, columns: Integers) -> Bool:
    """Return whether the dashes of each pixel's label are drawn at its row and column.

    Lines of the labels 1 to 8 have no gaps; one half of those of 9 to 16 is drawn, and one third of
    those of 17 to 24.
    """
    period = 1 + np.maximum(labels.astype(np.int64) - 1, 0) // _NUM_SOLID % 3
    return (rows + columns) // 4 % period == 0


class Canvas:
    """A picture to draw on, in dark gray; a `level` is a gray level, or the color of a label."""

    def __init__(self, size: Pixels) -> None:
        from PIL import Image, ImageDraw

        self._picture: Image.Image = Image.new("L", size, PAPER)
        self._draw = ImageDraw.Draw(self._picture)

    def paste(self, pixels: Levels, corner: Pixels) -> None:
        """Put (rows, columns) levels at the left upper corner."""
        from PIL import Image

        self._picture.paste(Image.fromarray(np.ascontiguousarray(pixels)), corner)

    def text(
        self,
        place: tuple[float, float],
        text: str,
        size: int,
        *,
        level: int = INK,
        anchor: str = "la",
        width: float = math.inf,
        is_bold: bool = False,
        has_edge: bool = False,
    ) -> None:
        """Write a line.

        Args:
            place: x and y, in pixels.
            text: characters that the font lacks are replaced.
            size: of the letters, in pixels.
            level: their gray level.
            anchor: that of Pillow, the point of the line at the place.
            width: pixels that the line may take; what does not fit is cut off.
            is_bold: whether the letters are bold.
            has_edge: whether they have a thin edge, so that they can be read on an image.
        """
        self._draw.text(
            place,
            drawable(cut_off(text, size, width, is_bold=is_bold)),
            fill=level,
            font=_font(size, is_bold),
            anchor=anchor,
            stroke_width=int(has_edge),
            stroke_fill=PAPER,
        )

    def sides(self, letters: str, corner: Pixels, extent: Pixels) -> None:
        """Write letters at the left, right, bottom and top of a plane; an empty text writes none.

        They are beside a plane that is too narrow for them.
        """
        width, height = (max(size, MIN_HEIGHT) for size in extent)
        left = corner[0] - (width - extent[0]) // 2
        top = corner[1] - (height - extent[1]) // 2
        places = (
            (left + 5, top + height / 2, "lm"),
            (left + width - 5, top + height / 2, "rm"),
            (left + width / 2, top + height - 4, "md"),
            (left + width / 2, top + 4, "ma"),
        )
        for letter, (x, y, anchor) in zip(letters, places, strict=False):
            self.text((x, y), letter, SMALL, anchor=anchor, has_edge=True)

    def frame(self, box: tuple[int, int, int, int]) -> None:
        """Draw a rectangle of one pixel: left, top, right, bottom."""
        self._draw.rectangle(box, outline=_FRAME)

    def entry(
        self,
        label: int | None,
        text: str,
        place: Pixels,
        width: int,
        colors: Colors,
    ) -> None:
        """Draw an entry of a legend, whose left end in the middle is at the place.

        Its sample is the line of a label, a bar for label 0, or nothing for None.
        """
        left, middle = place
        if label is not None:
            height = 12 if label == 0 else 3
            sample = np.full((height, _SAMPLE), label)
            is_drawn = is_dashed_on(sample, *np.indices(sample.shape))
            pixels = np.where(is_drawn, label_levels(sample, colors), np.uint8(PAPER))
            self.paste(pixels, (left, middle - height // 2))
        place = (left + _SAMPLE + GAP, middle)
        self.text(place, text, SMALL, anchor="lm", width=width - _SAMPLE - 2 * GAP)

    def png(self) -> bytes:
        """Return the picture as PNG; the same picture gives the same bytes."""
        palette: list[int] = []
        for level in range(WHITE + 1):
            gray = round(level * 255 / WHITE)
            palette += (gray, gray, gray)
        for color in LABEL_COLORS:
            palette += bytes.fromhex(color[1:])
        self._picture.putpalette(palette)
        buffer = io.BytesIO()
        # Higher levels of compression take twice the time for a tenth less.
        self._picture.save(buffer, format="PNG", compress_level=4)
        return buffer.getvalue()


def wrap(text: str, width: float) -> list[str]:
    """Break a text into lines of letters of the usual size, of at most a width in pixels.

    It is broken at spaces. Longer words are cut off, with an ellipsis.
    """
    lines: list[str] = []
    if not text:
        return lines
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and cut_off(longer, TEXT, width) == longer:
            lines[-1] = longer
        else:
            lines.append(cut_off(word, TEXT, width))
    return lines


def cut_off(text: str, size: int, width: float, *, is_bold: bool = False) -> str:
    """Return as much of a line as fits in a width in pixels, with an ellipsis for the rest."""

    def fits(line: str) -> bool:
        return float(_font(size, is_bold).getlength(drawable(line))) <= width

    if fits(text):
        return text
    while text and not fits(f"{text}…"):
        text = text[:-1]
    return f"{text}…"


def drawable(text: str) -> str:
    """Replace characters that the font lacks with a word or a question mark.

    They would be drawn as boxes.
    """
    letters = []
    for letter in text.replace("\u00a0", " "):
        if _is_in_font(letter):
            letters.append(letter)
        else:
            letters.append(_SPELLED.get(letter, "?"))
    return "".join(letters)


@lru_cache(maxsize=4096)
def _is_in_font(letter: str) -> bool:
    """Return whether the font has a character."""
    if letter == " ":
        return True
    font = _font(12, False)
    box = font.getmask("\uffff")  # drawn for characters that the font lacks
    return letter.isprintable() and bytes(font.getmask(letter)) != bytes(box)


def require_pillow() -> None:
    """Raise BackendUnavailableError if Pillow, which draws all pictures, cannot be imported."""
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            f"a preview needs Pillow: pip install pillow ({error})"
        ) from error


@lru_cache(maxsize=32)
def _font(size: int, is_bold: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return matplotlib's DejaVu Sans, of many alphabets, else Pillow's own font, of Latin."""
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    # This locates the package without importing it, which takes half a second.
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
