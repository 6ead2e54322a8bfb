"""Small pieces of SVG: escaped elements, round axis ticks, a plot with its axes. Colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_ROUNDING = 1e-9  # relative: values that differ by less count as equal
_NOTHING = 1e-12  # rounding error of zero, in points, mm or ml


def element(tag: str, content: str = "", **attributes: object) -> str:
    """Return an element; `content` is markup, attributes are escaped, a trailing underscore is dropped and others become hyphens."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(short(value) if isinstance(value, float) else str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def short(value: float) -> str:
    """Return a coordinate with a precision of a tenth of a unit, in as few characters as possible."""
    text = f"{value:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about the requested number of round numbers between two numbers."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Return a tick's number with the digits that its neighbors need."""
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else abs(ticks[0]) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if len(ticks) > 1 and abs(round(step, decimals) - step) > 1e-9 * step:
        decimals += 1  # steps of 2.5
    text = f"{value:.{decimals}f}"
    return (text.lstrip("-") if float(text) == 0 else text).replace("-", "\u2212")


@dataclass
class Scale:
    """A straight line from values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def scale_over(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale that shows all values with a margin; for a single value, its surroundings."""
    low, high = min(values), max(values)
    if high - low <= max(_ROUNDING * max(abs(low), abs(high)), _NOTHING):  # one value, up to rounding
        room = abs(high) * 0.05 if abs(high) > _NOTHING else 1.0
    else:
        room = (high - low) * 0.05
    return Scale(low - room, high + room, start, end)


@dataclass
class Plot:
    """A plot under construction: a frame of 360 × 300 units, which is 1:1 on a phone."""

    name: str  # Unique in the page; prefix of the ids of elements that others refer to.
    title: str  # Read first by a screen reader.
    description: str  # Read next by a screen reader.
    width: int = 360
    height: int = 300
    left: int = 54
    right: int = 14
    top: int = 14
    bottom: int = 48
    _parts: list[str] = field(default_factory=list)

    @property
    def inner(self) -> tuple[float, float, float, float]:
        """Left, right, top and bottom of the data area."""
        return float(self.left), float(self.width - self.right), float(self.top), float(self.height - self.bottom)

    def add(self, *markup: str) -> None:
        """Add elements on top of the existing ones."""
        self._parts.extend(markup)

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None, turned: bool = False) -> None:
        """Add a line of text, horizontal or reading upward."""
        turn = f"rotate(-90 {short(x)} {short(y)})" if turned else None
        self.add(element("text", escape(text), x=x, y=y, text_anchor=anchor, class_=class_, transform=turn))

    def x_axis(self, scale: Scale, title: str) -> None:
        """Draw ticks, their numbers and the axis title below the values."""
        left, right, _, bottom = self.inner
        self.add(element("path", d=f"M{short(left)} {short(bottom)}H{short(right)}", class_="axis"))
        ticks = round_ticks(scale.low, scale.high, 4)
        for tick in ticks:
            self.add(element("path", d=f"M{short(scale(tick))} {short(bottom)}v4", class_="axis"))
            self.text(scale(tick), bottom + 17, tick_text(tick, ticks), anchor="middle", class_="tick")
        self.text((left + right) / 2, self.height - 8, title, anchor="middle")

    def y_axis(self, scale: Scale, title: str) -> None:
        """Draw ticks, grid lines, their numbers and the axis title left of the values."""
        left, right, top, bottom = self.inner
        ticks = round_ticks(scale.low, scale.high)
        for tick in ticks:
            self.add(element("path", d=f"M{short(left)} {short(scale(tick))}H{short(right)}", class_="grid"))
            self.text(left - 6, scale(tick) + 4, tick_text(tick, ticks), anchor="end", class_="tick")
        middle = (top + bottom) / 2
        self.text(13, middle, title, anchor="middle", turned=True)

    def markup(self) -> str:
        """Return the finished drawing."""
        head = element("title", escape(self.title), id=f"{self.name}-title") + element(
            "desc", escape(self.description), id=f"{self.name}-desc"
        )
        return element(
            "svg",
            head + "".join(self._parts),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_labelledby=f"{self.name}-title {self.name}-desc",
            class_="chart",
        )
