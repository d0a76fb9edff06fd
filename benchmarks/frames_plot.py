"""A plot with two logarithmic axes as plain SVG: what frames.py draws. Imports nothing but the standard library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 48
GREY = "#888888"


@dataclass(frozen=True)
class Line:
    """Points (x, y), joined; `points` marks each."""

    name: str
    colour: str
    values: Sequence[tuple[float, float]]
    dashed: bool = False
    points: bool = False


def draw(lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """The SVG document. x ticks are at every point's x, y ticks at powers of ten; y begins at 1 or below."""
    xs = sorted({x for line in lines for x, _ in line.values})
    ys = [y for line in lines for _, y in line.values]
    scale = _Scale(xs[0], xs[-1], min(1.0, *ys), 10 ** math.ceil(math.log10(max(ys))))
    body = [*_axes(scale, xs, x_name, y_name)]
    for line in lines:
        body += _line(scale, line)
    body += _legend(lines)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    head += 'font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    x_least: float
    x_most: float
    y_least: float
    y_most: float

    def x(self, value: float) -> float:
        share = math.log(value / self.x_least) / math.log(self.x_most / self.x_least)
        return round(LEFT + 12 + share * (WIDTH - LEFT - RIGHT - 24), 1)

    def y(self, value: float) -> float:
        share = math.log(value / self.y_least) / math.log(self.y_most / self.y_least)
        return round(HEIGHT - BOTTOM - 12 - share * (HEIGHT - TOP - BOTTOM - 24), 1)


def _axes(scale: _Scale, xs: Sequence[float], x_name: str, y_name: str) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for power in range(math.ceil(math.log10(scale.y_least)), round(math.log10(scale.y_most)) + 1):
        y = scale.y(10**power)
        yield f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#dddddd"/>'
        yield _text(LEFT - 8, y + 4, f"{10**power:g}x", "end")
    for x in xs:
        yield f'<line x1="{scale.x(x)}" x2="{scale.x(x)}" y1="{bottom}" y2="{bottom + 5}" stroke="{GREY}"/>'
        yield _text(scale.x(x), bottom + 18, f"{x:,.0f}", "middle")
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="{GREY}"/>'
    yield _text((LEFT + right) / 2, HEIGHT - 8, x_name, "middle")
    middle = (TOP + bottom) / 2
    yield _text(16, middle, y_name, "middle", f' transform="rotate(-90 16 {middle})"')


def _line(scale: _Scale, line: Line) -> Iterator[str]:
    at = [(scale.x(x), scale.y(y)) for x, y in line.values]
    path = " ".join(f"{x},{y}" for x, y in at)
    yield f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{_dashes(line)}/>'
    if line.points:
        for x, y in at:
            yield f'<circle cx="{x}" cy="{y}" r="4" fill="{line.colour}"/>'


def _dashes(line: Line) -> str:
    return ' stroke-dasharray="5 4"' if line.dashed else ""


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    for i, line in enumerate(lines):
        y = TOP + 30 + 18 * i
        ends = f'x1="{LEFT + 16}" x2="{LEFT + 46}" y1="{y}" y2="{y}"'
        yield f'<line {ends} stroke="{line.colour}" stroke-width="2"{_dashes(line)}/>'
        if line.points:
            yield f'<circle cx="{LEFT + 31}" cy="{y}" r="4" fill="{line.colour}"/>'
        yield _text(LEFT + 54, y + 4, line.name, "start")


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
