"""The frontier lab's pictures as SVG: made in a few milliseconds, so that they follow a slider that is being dragged."""

from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from tpo_course.frontier import Run
from tpo_course.world import TokenWorld
from tpo_course.world_plots import MAX_LEAVES, kind_of, row_of, token_names, tree_rows
from tpo_lib.runs.plots import dark, style_of

Point = tuple[float, float]
FONT = "font-family:sans-serif;font-size:13px"
PINNED = "#8A8A8A"
CORNERS = {  # of the markers of `plots.style_of`, radius 1
    "^": [(0, -1.1), (1, 0.8), (-1, 0.8)],
    "v": [(0, 1.1), (1, -0.8), (-1, -0.8)],
    ">": [(1.1, 0), (-0.8, 1), (-0.8, -1)],
    "s": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "D": [(0, -1.15), (1.15, 0), (0, 1.15), (-1.15, 0)],
    "*": [(0, -1.4), (0.35, -0.45), (1.3, -0.4), (0.55, 0.2), (0.8, 1.15), (0, 0.6), (-0.8, 1.15), (-0.55, 0.2), (-1.3, -0.4),
          (-0.35, -0.45)],
}  # fmt: skip


class Axes:
    """A panel: data to pixels, ticks and labels.

    Args:
        box: left, top, right, bottom in pixels.
        x, y: the range of either axis.
        labels: what the axes say.
    """

    def __init__(self, box: Sequence[float], x: Point, y: Point, labels: tuple[str, str]) -> None:
        self.box, self.x, self.y = box, x, y
        left, top, right, bottom = box
        parts = []
        for value in ticks(*x):
            at = self.at((value, y[0]))[0]
            parts += [
                _line([(at, top), (at, bottom)], "#DDDDDD", 0.8),
                _text((at, bottom + 16), f"{value:g}", "middle"),
            ]
        for value in ticks(*y):
            at = self.at((x[0], value))[1]
            parts += [_line([(left, at), (right, at)], "#DDDDDD", 0.8), _text((left - 6, at + 4), f"{value:g}", "end")]
        frame = _line([(left, top), (left, bottom), (right, bottom)], "black", 1)
        middle = (top + bottom) / 2
        turned = (
            f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(labels[1])}</text>'
        )
        self.parts = [*parts, frame, _text(((left + right) / 2, bottom + 36), labels[0], "middle"), turned]

    def at(self, point: Point) -> Point:
        """Pixels of a point; what lies outside is put on the edge."""
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + min(max(across, 0.0), 1.0) * (right - left), bottom - min(max(up, 0.0), 1.0) * (bottom - top)


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers in a range.

    Example:
        >>> ticks(0, 4.2), ticks(-0.3, 0.4)
        ([0.0, 1.0, 2.0, 3.0, 4.0], [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4])
    """
    step = next(s for p in range(-6, 7) for s in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if (high - low) / s <= 8)
    first = -int(-low / step + 1e-9) if low < 0 else int(low / step + 1 - 1e-9)
    found = [round(step * i, 9) for i in range(first, first + 12)]
    return [value for value in found if low - 1e-9 <= value <= high + 1e-9]


def marker(name: str, at: Point, radius: float, *, fill: str, edge: str, width: float = 1.0) -> str:
    """A marker of `plots.style_of` around a pixel; a circle for those that have no corners here."""
    look = f'fill="{fill}" stroke="{edge}" stroke-width="{width}"'
    if name not in CORNERS:
        return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}" {look}/>'
    corners = " ".join(f"{at[0] + radius * x:.1f},{at[1] + radius * y:.1f}" for x, y in CORNERS[name])
    return f'<polygon points="{corners}" {look}/>'


def frontier(
    front: Sequence[tuple],
    beta: float,
    runs: Mapping[str, Run],
    optima: Mapping[str, Point],
    pinned: Mapping[str, Run],
    alt: str,
) -> str:
    """Reward against KL: the front, where its optimum for this beta is, every run's way, end and optimum; pinned ones grey.

    Args:
        front: (beta, KL, return), the KL rising.
        runs, optima, pinned: by objective.
        alt: the picture in words.
    """
    curve = [(kl, earned) for _, kl, earned in front]
    every = [point for run in (*runs.values(), *pinned.values()) for point in zip(run.kl, run.returns, strict=True)]
    every += [*optima.values(), *curve]
    low, high = min(point[1] for point in every), max(point[1] for point in every)
    room = 0.06 * (high - low)
    right = max(1.05 * max(point[0] for point in every), 1.12 * curve[-1][0])
    axes = Axes(
        (56, 10, 500, 372),
        (0, right),
        (low - room, high + 2 * room),
        ("KL(policy ‖ reference), nats", "expected reward"),
    )
    border = [*curve, (right, curve[-1][1])]
    above = [(0, high + 2 * room), *((0, low - room), curve[0]), *border, (right, high + 2 * room)]
    parts = [_area(map(axes.at, above), "#EEEEEE"), *axes.parts, _line(map(axes.at, border), "black", 2)]
    parts.append(_text((64, 26), "out of every policy's reach", "start", "#555555"))
    best = min(front, key=lambda row: abs(row[0] - beta))
    for name, run in pinned.items():
        parts += _way(axes, name, run, PINNED)
    for name, run in runs.items():
        parts += _way(axes, name, run, style_of(name).colour)
    for name, point in optima.items():
        style = style_of(name)
        parts.append(marker(style.marker, axes.at(point), 10, fill="none", edge=style.colour, width=2))
    spot = axes.at(best[1:])
    parts += [
        marker("o", spot, 4, fill="black", edge="white"),
        _halo((spot[0] - 8, spot[1] - 9), f"π* at β = {beta:.3g}", "end" if spot[0] > 180 else "start"),
    ]
    parts.append(marker("*", axes.at(curve[0]), 7, fill="black", edge="white"))
    return _svg(512, 440, [*parts, *_legend(list(dict.fromkeys([*runs, *optima])), bool(pinned))], alt)


def _way(axes: Axes, name: str, run: Run, colour: str) -> list[str]:
    style, points = style_of(name), list(map(axes.at, zip(run.kl, run.returns, strict=True)))
    dashes = "" if isinstance(style.linestyle, str) else " ".join(f"{2 * length:g}" for length in style.linestyle[1])
    return [_line(points, colour, 2, dashes), marker(style.marker, points[-1], 6, fill=colour, edge="white")]


def _legend(names: Sequence[str], pinned: bool) -> list[str]:
    parts, x = [], 20
    for name in names:
        style = style_of(name)
        parts += [
            marker(style.marker, (x, 422), 6, fill=style.colour, edge="white"),
            _text((x + 11, 427), style.label, "start", dark(style.colour)),
        ]
        x += 34 + 9 * len(style.label)
    words = "ring: optimum" + ("; grey: pinned" if pinned else "")
    return [*parts, _halo((494, 364), words, "end")]


def tree(
    world: TokenWorld, logps: Tensor, *, prompt: int, colour: str, pinned: Tensor | None, title: str, alt: str
) -> str:
    """The states below one prompt: an edge is as thick as its token is probable; behind it, in grey, the pinned policy's.

    Args:
        logps, pinned: (S, V) log-probabilities.
    """
    depth = next(d for d in range(world.horizon, 0, -1) if d == 1 or len(_leaves(world, d)) <= MAX_LEAVES)
    rows, names = tree_rows(world, depth), token_names(world)
    count = len(_leaves(world, depth))
    wide, high = 250 / depth, 25

    def place(node: tuple[int, ...]) -> Point:
        return 20 + wide * len(node), 44 + high * rows[node]

    edges, numbers, boxes = [], [], []
    for node in rows:
        if node:
            start, end = place(node[:-1]), place(node)
            entry = row_of(world, prompt, node[:-1]), node[-1]
            chance = float(logps[entry].exp())
            said = "<.01" if chance < 0.005 else f"{chance:.2f}"
            if pinned is not None:
                before = float(pinned[entry].exp())
                edges.append(_line([start, end], "#BBBBBB", 1 + 16 * before))
                said += f" ({chance - before:+.2f})" if abs(chance - before) >= 0.005 else ""
            edges.append(_line([start, end], colour, 0.5 + 8 * chance))
            inner = 0.55  # the number of an edge stands on it, that of a leaf behind the leaf
            at = start[0] + inner * (end[0] - start[0]), start[1] + inner * (end[1] - start[1]) + 4
            leaf = len(node) == depth or kind_of(world, node) != "goes on"
            numbers += [_halo((end[0] + 24, end[1] + 4), said, "start")] if leaf else _stacked(at, said)
        boxes.append(
            _node(place(node), " ".join(names[token] for token in node[-1:]) or f"x{prompt}", kind_of(world, node))
        )
    key = "square: the response ends there" + ("; grey, (±): pinned" if pinned is not None else "")
    bottom = 44 + high * count
    parts = [
        _text((4, 16), title, "start", dark(colour), bold=True),
        *edges,
        *numbers,
        *boxes,
        _text((4, bottom + 6), key, "start", "#333333"),
    ]
    return _svg(384, bottom + 16, parts, alt)


def _leaves(world: TokenWorld, depth: int) -> list:
    rows = tree_rows(world, depth)
    return [node for node in rows if len(node) == depth or kind_of(world, node) != "goes on"]


def _node(at: Point, text: str, kind: str) -> str:
    half = 6 + 4 * len(text)
    if kind == "goes on":
        box = f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="10" fill="white" stroke="black"/>'
        return box + _text((at[0], at[1] + 4), text, "middle")
    fill, ink = ("black", "white") if kind == "ended by EOS" else ("white", "black")
    box = f'<rect x="{at[0] - half:.1f}" y="{at[1] - 10:.1f}" width="{2 * half}" height="20" fill="{fill}" stroke="black"/>'
    return box + _text((at[0], at[1] + 4), text, "middle", ink)


def credit(
    truth: Tensor,
    found: Tensor,
    *,
    name: str,
    tokens: Sequence[str],
    pinned: Tensor | None,
    words: tuple[str, str],
    alt: str,
) -> str:
    """Every token of every state: what the policy's implicit reward says against the truth, the diagonal where they agree.

    Args:
        truth, found, pinned: (S, V).
        words: what the axes say.
    """
    colour = style_of(name).colour
    shown = [found] if pinned is None else [found, pinned]
    x = _reach(truth)
    y = (min(x[0], *(_reach(each)[0] for each in shown)), max(x[1], *(_reach(each)[1] for each in shown)))
    axes = Axes((56, 10, 372, 232), x, y, words)
    ends = max(x[0], y[0]), min(x[1], y[1])
    parts = [*axes.parts, _line([axes.at((end, end)) for end in ends], "black", 1, "5 4")]
    layers = [(pinned, "none", PINNED)] if pinned is not None else []
    for table, fill, edge in [*layers, (found, colour, "white")]:
        for token in range(len(tokens)):
            for point in zip(truth[:, token].tolist(), table[:, token].tolist(), strict=True):
                parts.append(marker("os^vD>"[token % 6], axes.at(point), 5, fill=fill, edge=edge))
    places = zip(tokens, "os^vD>" * len(tokens), range(0, 60 * len(tokens), 60), strict=False)
    for token, shape, shift in places:
        parts += [
            marker(shape, (66 + shift, 288), 5, fill=colour, edge="white"),
            _text((75 + shift, 293), token, "start"),
        ]
    return _svg(384, 300, [*parts, _text((380, 293), "dashed: they agree", "end", "#333333")], alt)


def _reach(table: Tensor) -> Point:
    low, high = float(table.min()), float(table.max())
    room = 0.06 * max(high - low, 1e-3)
    return low - room, high + room


def agreement(truth: Tensor, found: Tensor) -> float | None:
    """Pearson's correlation over all tokens of all states, None where one of the two does not vary."""
    pair = torch.stack([truth.flatten(), found.flatten()])
    return float(torch.corrcoef(pair)[0, 1]) if float(pair.std(-1).min()) > 1e-9 else None


def _svg(width: float, height: float, parts: Sequence[str], alt: str) -> str:
    look = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    style = f"background:white;{FONT}"
    return f'<svg role="img" aria-label="{escape(alt, quote=True)}" {look} style="{style}">{"".join(parts)}</svg>'


def _line(points, colour: str, width: float, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:.1f}"{dashed}/>'


def _area(points, colour: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="{colour}"/>'


def _text(at: Point, words: str, anchor: str, colour: str = "black", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'
    )


def _stacked(at: Point, said: str) -> list[str]:
    """A number on an edge, its change in brackets below it: side by side they would run into the nodes."""
    lines = said.split(" ")
    top = at[1] - 7 * (len(lines) - 1)
    return [_halo((at[0], top + 14 * i), line, "middle") for i, line in enumerate(lines)]


def _halo(at: Point, words: str, anchor: str) -> str:
    """Text that a line does not run through."""
    return _text(at, words, anchor).replace("<text ", '<text stroke="white" stroke-width="4" paint-order="stroke" ')
