"""Pictures of the enumerable token world: exact numbers in, matplotlib Figure out.

A policy is an (S, V) tensor of log-probabilities, as everywhere in `world`. Its name picks its look: where the first word is
an objective ("dpo", "tdpo2 β=0.3") it has the colour and marker of `plots.style_of`, otherwise grey and a hollow marker.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from string import ascii_lowercase

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import Tensor

from tpo_course.world import TokenWorld
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.plots import AXIS, FONT, OTHERS, Style, dark, panels, style_of

MAX_LEAVES = 40  # more rows do not fit a page at a legible size
FRONT_POINTS = 100
GREY = "#555555"
OTHER_MARKERS = "ph<>dH8"
NODES = {  # how a state looks: shape of its box, colour of the box, width of its edge
    "goes on": ("round,pad=0.35", "white", 1.0),
    "ended by EOS": ("square,pad=0.3", "black", 1.0),
    "ended by the horizon": ("square,pad=0.3", "white", 2.4),
}


def token_names(world: TokenWorld) -> list[str]:
    """a, b, c, ...; the last one is EOS where the world has it."""
    names = _letters(world.vocab_size)
    return [*names[:-1], "EOS"] if world.eos else names


def _letters(count: int) -> list[str]:
    return [*ascii_lowercase, *(f"t{i}" for i in range(26, count))][:count]


def kl_and_return(world: TokenWorld, logps: Tensor) -> tuple[float, float]:
    """KL(pi || pi_ref) in nats and the expected return in units of reward, both exact, of one (S, V) policy.

    KL = sum_s gamma^t D_t(s) KL(pi(.|s) || pi_ref(.|s)): at gamma = 1 the KL between the distributions of whole responses.
    Below 1 it is discounted as `soft_optimum` discounts it, so that its optima stay the best trade between the two.
    """
    probs = logps.exp()
    kl = torch.where(probs > 0, probs * (logps - world.ref_logps), 0.0).sum(-1)  # (S,); a policy may exclude tokens
    return float((world.visits(logps) * world.discount * kl).sum()), float(world.expected(world.values(logps).v))


def pareto(world: TokenWorld, betas: Sequence[float], policies: Mapping[str, Tensor]) -> Figure:
    """What a nat can buy at most: the exact front of expected return against KL(pi || pi_ref), and where policies lie.

    The front is `world.soft_optimum` over beta, from pi_ref (beta = infinity) on: no policy lies above it. It is traced
    finely between the betas given, and on beyond the smallest until it passes every policy.

    Args:
        betas: > 0, at least two, in units of reward per nat; those that stand apart are marked on the front.
        policies: {name: (S, V) log-probabilities}.

    Raises:
        ValueError: betas are not at least two different positive numbers, or a policy is of another shape or not normalised.

    Example:
        >>> world = TokenWorld(vocab_size=3, horizon=2, seed=0)
        >>> figure = pareto(world, [0.3, 1, 3], {"dpo": world.soft_optimum(1.0)[1], "one step": world.one_step_optimum(1.0)})
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['exact front', 'betas', 'reference', 'DPO', 'one step']
    """
    betas = sorted({float(beta) for beta in betas}, reverse=True)
    if len(betas) < 2 or not all(0 < beta < float("inf") for beta in betas):
        raise ValueError(f"betas={betas} must be at least two different positive numbers")
    places = [kl_and_return(world, _checked(world, name, logps)) for name, logps in policies.items()]
    front = _front(world, betas, furthest=max([x for x, _ in places], default=0.0))
    marks = _apart(world, betas, front)

    fig, (ax,) = panels(1, width=8.0, height=5.2)
    ax.plot(*zip(*front, strict=True), color="black", linewidth=2, zorder=3, label="exact front")
    dots = {"color": "black", "marker": "o", "markersize": 5, "linestyle": "none", "label": "betas"}
    ax.plot(*zip(*marks.values(), strict=True), zorder=4, **dots)
    points = [(front[0], OTHERS["ref"]), *zip(places, _styles(policies), strict=True)]
    for at, style in points:
        hollow = {"markerfacecolor": "none", "markeredgewidth": 1.8, "markersize": 16}  # what lies below stays visible
        filled = {"markeredgecolor": "white", "markeredgewidth": 0.8, "markersize": 14 if style.marker == "*" else 11}
        look = hollow if style.marker in OTHER_MARKERS else filled
        ax.plot(*at, marker=style.marker, color=style.colour, linestyle="none", label=style.label, zorder=5, **look)
    discounted = "" if world.gamma == 1 else f", discounted by γ = {world.gamma:g}"
    ax.set(xlabel=AXIS["kl"] + discounted, ylabel=f"expected return, units of reward{discounted}")
    _shade_above(ax, front)
    labels = [(f"β = {beta:.3g}", at, "black", (-1, 1)) for beta, at in marks.items()]
    _label_points(fig, ax, labels + [(style.label, at, dark(style.colour), (1, -1)) for at, style in points])
    return fig


def below_front(world: TokenWorld, logps: Tensor) -> float:
    """How much less one (S, V) policy earns than the best policy of the same KL, in units of reward: 0 on the front.

    Example:
        >>> world = TokenWorld(vocab_size=3, horizon=2, seed=0)
        >>> round(below_front(world, world.soft_optimum(1.0)[1]), 6), round(below_front(world, world.one_step_optimum(1.0)), 6)
        (0.0, 0.008293)
    """
    kl, earned = kl_and_return(world, logps)
    low, high = 1e-3, 1e6  # of beta; where the KL is larger than any optimum's, the front is flat
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kl_and_return(world, world.soft_optimum(middle)[1])[0] > kl else (low, middle)
    return kl_and_return(world, world.soft_optimum(high)[1])[1] - earned


def policy_tree(world: TokenWorld, policies: Mapping[str, Tensor], *, prompt: int = 0, depth: int = 2) -> Figure:
    """The states below one prompt, a panel a policy: an edge is as thick as its token is probable, the number beside it.

    Args:
        policies: {name: (S, V) log-probabilities}, one to three.
        prompt: which prompt, 0 to P - 1; x in the picture.
        depth: how many tokens deep, 1 to T.

    Raises:
        ValueError: a number is out of range, a policy has the wrong shape or is not normalised, or the tree has too many
            leaves to be read.

    Example:
        >>> world = TokenWorld(vocab_size=3, horizon=2, seed=0)
        >>> [ax.get_title() for ax in policy_tree(world, {"ref": world.ref_logps}).axes]
        ['reference']
    """
    if not 1 <= len(policies) <= 3:
        raise ValueError(f"{len(policies)} policies given; a tree shows one to three side by side")
    if not 0 <= prompt < world.num_prompts or not 1 <= depth <= world.horizon:
        raise ValueError(f"{prompt=} must lie in 0 to {world.num_prompts - 1}, {depth=} in 1 to {world.horizon}")
    count = world.width**depth + world.eos * sum(world.width**t for t in range(depth))
    if count > MAX_LEAVES:
        raise ValueError(f"depth={depth} gives {count} leaves (at most {MAX_LEAVES} can be read); lower it")
    tables = [_checked(world, name, logps) for name, logps in policies.items()]
    heights = tree_rows(world, depth)
    fig, axes = panels(len(policies), width=len(policies) * (1.0 + 1.4 * depth), height=0.34 * count + 1.2)
    for ax, table, style in zip(axes, tables, _styles(policies), strict=True):
        ax.set_title(style.label, fontsize=FONT + 1, color=dark(style.colour), fontweight="bold", pad=10)
        ax.set_axis_off()
        ax.set(xlim=(-0.15, depth + 0.3), ylim=(count - 0.4, -0.6))
        _draw_tree(ax, world, table, heights, prompt, style.colour)
    _tree_legend(fig, {kind_of(world, node) for node in heights})
    return fig


def kl_directions(p: Tensor, q: Tensor, names: Sequence[str] = ("p", "q")) -> Figure:
    """Two distributions over the same tokens, and what every token adds to the KL one way and the other way.

    Args:
        p, q: (V,) log-probabilities.
        names: what to call them, for instance ("π_ref", "π").

    Raises:
        ValueError: the shapes differ, or one is not normalised.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
        >>> [ax.get_title() for ax in kl_directions(p, q).axes[1:]]
        ['KL(p ‖ q) = 0.511 nats', 'KL(q ‖ p) = 0.368 nats']
    """
    if p.ndim != 1 or p.shape != q.shape:
        raise ValueError(f"p {tuple(p.shape)} and q {tuple(q.shape)} must be two (V,) tensors of log-probabilities")
    p, q, tokens = _normalised(names[0], p), _normalised(names[1], q), range(len(p))
    fig, axes = panels(3, width=12.5, height=3.8)
    looks = {"color": GREY}, {"color": "white", "edgecolor": "black", "hatch": "///"}
    for shift, name, logps, look in zip((-0.2, 0.2), names, (p, q), looks, strict=True):
        axes[0].bar([token + shift for token in tokens], logps.exp().tolist(), 0.38, label=name, **look)
    axes[0].legend(frameon=False, fontsize=FONT - 1)
    axes[0].set(ylabel="probability", title="the distributions")
    for ax, a, b, (x, y), look in ((axes[1], p, q, names, looks[0]), (axes[2], q, p, names[::-1], looks[1])):
        terms = torch.where(a.exp() > 0, a.exp() * (a - b), 0.0)  # (V,)
        ax.bar(tokens, terms.tolist(), 0.6, **look)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=f"KL({x} ‖ {y}) = {float(terms.sum()):.3f} nats", ylabel=f"{x} log({x} / {y}), nats")
    limits = [bound for ax in axes[1:] for bound in ax.get_ylim()]
    for ax in axes:
        ax.set_xticks(tokens, _letters(len(p)))
        ax.set_xlabel("token")
    for ax in axes[1:]:
        ax.set_ylim(min(limits), max(limits))  # one scale for both directions
    return fig


def _front(world: TokenWorld, betas: Sequence[float], furthest: float) -> list[tuple[float, float]]:
    """(KL, return) with falling beta, finely, from pi_ref (KL = 0) to a little beyond the smallest beta and `furthest`."""

    def optimum(beta: float) -> tuple[float, float]:
        return kl_and_return(world, world.soft_optimum(beta)[1])

    steps = torch.linspace(0, 1, FRONT_POINTS, dtype=torch.float64)
    fine = 30 * betas[0] * (betas[-1] / (30 * betas[0])) ** steps  # the front is steep near pi_ref
    front = [kl_and_return(world, world.ref_logps)]
    front += [optimum(beta) for beta in sorted({*betas, *fine.tolist()}, reverse=True)]
    beta, end, gain = betas[-1], 1.08 * max(furthest, front[-1][0]), torch.inf
    while front[-1][0] < end and gain > 1e-6:  # of this loop's steps: two betas above may be equal but for rounding
        beta /= 1.1
        front.append(optimum(beta))
        gain = front[-1][0] - front[-2][0]
    if front[-1][0] < end:  # the best return there is: more KL buys nothing
        front.append((end, front[-1][1]))
    return front


def _apart(world: TokenWorld, betas: Sequence[float], front: Sequence[tuple[float, float]]) -> dict[float, tuple]:
    """{beta: (KL, return)} of those at least an eighth of the picture away from the one before."""
    wide, high = front[-1][0] - front[0][0], front[-1][1] - front[0][1]
    marks: dict[float, tuple] = {}
    for beta in betas:
        at, last = kl_and_return(world, world.soft_optimum(beta)[1]), next(reversed(marks.values()), None)
        if last is None or max((at[0] - last[0]) / wide, (at[1] - last[1]) / high) > 0.125:
            marks[beta] = at
    return marks


def _shade_above(ax: Axes, front: Sequence[tuple[float, float]]) -> None:
    """Grey where no policy can be: above the front. The picture ends where the front does."""
    ax.margins(x=0.08, y=0.12)
    left, (low, high) = ax.get_xlim()[0], ax.get_ylim()
    border = [(left, low), (front[0][0], low), *front]
    ax.fill_between(*zip(*border, strict=True), high, color="#EEEEEE", linewidth=0, zorder=0)
    ax.set(xlim=(left, front[-1][0]), ylim=(low, high))
    ax.text(0.02, 0.97, "out of every policy's reach", transform=ax.transAxes, va="top", fontsize=FONT - 1, color=GREY)


def _label_points(fig: Figure, ax: Axes, labels: Sequence[tuple]) -> None:
    """Write every (text, point, colour, preferred direction) near its point, clear of the front, markers and other labels."""
    fig.draw_without_rendering()  # fixes the axes, so that data become pixels
    pixel, inside = fig.dpi / 72, ax.get_window_extent()
    line = ax.transData.transform_path(ax.lines[0].get_path()).interpolated(8).vertices
    taken = [Bbox.from_bounds(x - 12, y - 12, 24, 24) for x, y in ax.transData.transform([at for _, at, *_ in labels])]
    taken += [text.get_window_extent() for text in ax.texts]
    steps = product((1, 0.6, 0, -0.6, -1), (1, 0.4, 0, -0.4, -1))
    steps = sorted(steps, key=lambda step: abs(step[0] - 1) + abs(step[1] - 1))
    for text, at, colour, (right, up) in labels:
        note = ax.annotate(
            text, at, xytext=(0, 0), textcoords="offset points", va="bottom", zorder=7, in_layout=False,
            fontsize=FONT - 1, color=colour, fontweight="normal" if colour == "black" else "bold",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 7},
        )  # fmt: skip
        size, (x, y) = Text.get_window_extent(note), ax.transData.transform(at)
        places = [
            Bbox.from_bounds(
                x + dx * right * radius * pixel - (1 - dx * right) / 2 * size.width,
                y + dy * up * radius * pixel - (1 - dy * up) / 2 * size.height,
                *size.size,
            )
            for radius, (dx, dy) in product((11, 20, 34, 50, 70, 95, 125, 160), steps)
        ]

        def cost(box: Bbox) -> int:
            outside = not (inside.containsx(box.x0) and inside.containsx(box.x1) and inside.containsy(box.y0))
            return box.count_overlaps(taken) + int(box.count_contains(line) > 0) + 9 * outside

        best = min(places, key=cost)  # the first, hence nearest, of the cheapest
        taken.append(best)
        note.set_position(((best.x0 - x) / pixel, (best.y0 - y) / pixel))


def tree_rows(world: TokenWorld, depth: int) -> dict[tuple[int, ...], float]:
    """Every node down to `depth` as token ids -> its row: leaves below each other, a parent amid its children."""
    heights: dict[tuple[int, ...], float] = {}
    leaves = 0

    def place(node: tuple[int, ...]) -> float:
        nonlocal leaves
        if len(node) == depth or kind_of(world, node) != "goes on":
            heights[node], leaves = float(leaves), leaves + 1
        else:
            children = [place((*node, token)) for token in range(world.vocab_size)]
            heights[node] = (children[0] + children[-1]) / 2
        return heights[node]

    place(())
    return heights


def kind_of(world: TokenWorld, node: tuple[int, ...]) -> str:
    """A key of NODES."""
    if world.eos and node[-1:] == (world.vocab_size - 1,):
        return "ended by EOS"
    return "ended by the horizon" if len(node) == world.horizon else "goes on"


def row_of(world: TokenWorld, prompt: int, prefix: tuple[int, ...]) -> int:
    """The row of state [x, prefix] in an (S, V) table."""
    row = prompt
    for token in prefix:
        row = row * world.width + token
    return world.levels[len(prefix)].start + row


def _draw_tree(ax: Axes, world: TokenWorld, logps: Tensor, heights: Mapping, prompt: int, colour: str) -> None:
    names, centred = token_names(world), {"fontsize": FONT - 1, "ha": "center", "va": "center"}
    blank = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for node, y in heights.items():
        text = " ".join(names[token] for token in node) or "x"
        if node:
            chance = float(logps[row_of(world, prompt, node[:-1]), node[-1]].exp())
            x, start = len(node) - 1, heights[node[:-1]]
            ax.plot([x, x + 1], [start, y], color=colour, linewidth=0.4 + 7 * chance, zorder=1, label=text)
            number = "<0.01" if chance < 0.005 else f"{chance:.2f}"
            ax.text(x + 0.62, start + 0.62 * (y - start), number, zorder=2, bbox=blank, **centred)
        shape, face, edge = NODES[kind_of(world, node)]
        box = {"boxstyle": shape, "facecolor": face, "edgecolor": "black", "linewidth": edge}
        ax.text(len(node), y, text, zorder=3, color="white" if face == "black" else "black", bbox=box, **centred)


def _tree_legend(fig: Figure, kinds: set[str]) -> None:
    handles = []
    for kind, (shape, face, edge) in NODES.items():
        look = {"markerfacecolor": face, "markeredgecolor": "black", "markeredgewidth": edge, "markersize": 9}
        look |= {"linestyle": "none", "marker": "o" if "round" in shape else "s"}
        handles += [Line2D([], [], label=kind, **look)] if kind in kinds else []
    handles.append(Line2D([], [], color=GREY, linewidth=4, label="edge: π(token | state)"))
    columns = min(len(handles), max(1, int(fig.get_figwidth() / 2)))
    fig.legend(handles=handles, ncols=columns, loc="outside lower center", frameon=False, fontsize=FONT - 1)


def _styles(names: Sequence[str]) -> list[Style]:
    """An objective's style, labelled with the rest of the name; other names in grey, a hollow marker each."""
    styles, others = [], 0
    for name in names:
        first, _, rest = name.partition(" ")
        if first in OTHERS or first in OBJECTIVES:
            style = style_of(first)
            styles.append(style._replace(label=f"{style.label} {rest}".strip()))
        else:
            styles.append(Style(name, GREY, OTHER_MARKERS[others % len(OTHER_MARKERS)], "-"))
            others += 1
    return styles


def _checked(world: TokenWorld, name: str, logps: Tensor) -> Tensor:
    """The (S, V) policy in float64, detached, after a look at its shape and its sums."""
    given, asked = tuple(logps.shape), tuple(world.ref_logps.shape)
    if given != asked:
        raise ValueError(f"policy {name!r} has shape {given}; this world's tables are {asked}")
    return _normalised(name, logps)


def _normalised(name: str, logps: Tensor) -> Tensor:
    logps = logps.detach().double()
    worst = float((logps.exp().sum(-1) - 1).abs().max())
    if not worst < 1e-5:  # NaN is refused too
        said = f"{name!r} is not normalised: a row of probabilities misses 1 by {worst:.3g}"
        raise ValueError(f"{said}; pass logits.log_softmax(-1)")
    return logps
