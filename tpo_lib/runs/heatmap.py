"""Held-out pairs token by token: what a policy has done to every token of both responses, as data, HTML and a picture.

`maps` is {label: what `token_map` returned}, a row a setting; the start itself is 0 everywhere, since it is the reference.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from tpo_lib.runs.plots import FONT, style_of

if TYPE_CHECKING:
    from tpo_lib.runs.stage import Stage

PAIRS = 3
IN_PICTURE, IN_PAGE = 48, 200  # tokens of a response that are drawn; the data has them all
SIDES = ("chosen", "rejected")
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermilion
QUANTITIES = {  # name: what it is, as a legend and as the label of a scale
    "logratio": "log π_θ − log π_ref of the token, nats",
    "kl": "KL(π_ref ‖ π_θ) at the token, nats",
}
CREDIT = "true credit"


def token_map(policy, stage: Stage, pairs: int = PAIRS) -> list[dict]:
    """The first held-out pairs of a stage under a policy (in eval mode, as `fit` leaves it), as JSON has them.

    Returns:
        {"prompt", "chosen", "rejected"} a pair; a side is {"pieces": texts of its T tokens, "logratio": T numbers, "kl": T
        numbers} in nats, and "credit" where the reward knows what each token is worth, in nats of log-odds.
    """
    from tpo_lib.evaluation import pair_stats  # brings datasets, which a stage has loaded
    from tpo_lib.fast.fused import pair_loss
    from tpo_lib.files.tokens import token_method

    shown, decode = stage.held_out_pairs[:pairs], stage.tokenizer.decode
    if not shown:
        return []
    tokens = pair_stats(policy, stage.start, shown, stage.tokenizer.pad_token_id, pair_loss=pair_loss)
    ratio, credit = tokens.logps - tokens.ref_logps, token_method(stage.reward, "token_credit", stage.tokenizer)
    found = [{"prompt": decode(pair.prompt_ids, skip_special_tokens=True)} for pair in shown]
    for i, mask in enumerate(tokens.mask):  # all chosen first
        number, side = i % len(shown), SIDES[i // len(shown)]
        ids = getattr(shown[number], f"{side}_ids")
        values = {"logratio": ratio[i][mask], "kl": tokens.kl[i][mask]}
        if credit:
            values["credit"] = credit(torch.tensor(ids))
        pieces = {"pieces": [decode([token]) for token in ids]}
        found[number][side] = pieces | {name: [round(v, 5) for v in row.tolist()] for name, row in values.items()}
    return found


def span(piece: str, value: float, largest: float, title: str, *, framed: bool = False) -> str:
    """A token as HTML: blue over a solid line where the value is positive, orange over a dashed one where it is negative.

    Args:
        piece: text, escaped here.
        largest: where the colour is full.
        title: shown under the mouse; HTML already.
    """
    share = min(1.0, abs(value) / largest) if largest else 0.0
    red, green, blue = POSITIVE if value >= 0 else NEGATIVE
    line = "solid" if value >= 0 else "dashed"
    frame = "outline:2px solid black;" if framed else ""
    return (
        f'<span title="{title}" style="background:rgba({red},{green},{blue},{0.55 * share:.2f});'
        f"border-bottom:2px {line} rgba({red},{green},{blue},{share:.2f});"
        f'{frame}white-space:pre-wrap">{html.escape(piece).replace(chr(10), "⏎")}</span>'
    )


def full_colour(maps: Mapping[str, Sequence[Mapping]], quantity: str) -> float:
    """Where the colour of a quantity is full: 98 of 100 tokens lie within, so that a single one does not bleach the others."""
    found = [
        abs(v) for pairs in maps.values() for pair in pairs for side in SIDES for v in pair[side].get(quantity, ())
    ]
    return float(np.quantile(found, 0.98)) if found else 0.0


def page(maps: Mapping[str, Sequence[Mapping]]) -> Markup:
    """All pairs as coloured text: log-ratios of every setting, and folded away the KL; nothing in it is interpreted."""
    scales = {quantity: full_colour(maps, quantity) for quantity in (*QUANTITIES, "credit")}
    parts = [f'<p class="dim">{_legend(scales["logratio"], QUANTITIES["logratio"])}</p>']
    for number, pair in enumerate(next(iter(maps.values()))):
        parts.append(f'<div class="sample"><span class="prompt">prompt:</span> {html.escape(pair["prompt"])}')
        for side in SIDES:
            parts.append(f"<p><b>{side}</b></p>")
            if "credit" in pair[side]:
                parts.append(_line(CREDIT, pair[side], "credit", scales["credit"]))
            parts += [_line(name, pairs[number][side], "logratio", scales["logratio"]) for name, pairs in maps.items()]
        parts.append(f"<details><summary>{QUANTITIES['kl']}</summary>")
        for side in SIDES:
            parts.append(f"<p><b>{side}</b></p>")
            parts += [_line(name, pairs[number][side], "kl", scales["kl"]) for name, pairs in maps.items()]
        parts.append(f'<p class="dim">full colour from {scales["kl"]:.3g} nats on</p></details></div>')
    if scales["credit"]:
        parts.append(
            f'<p class="dim">{CREDIT} of the reward: full colour from {scales["credit"]:.3g} nats of log-odds on</p>'
        )
    return Markup("\n".join(parts))


def _legend(largest: float, words: str) -> str:
    steps = [share * largest for share in (-1, -0.5, 0, 0.5, 1)]
    marks = ["≤ ", "", "", "", "≥ "]
    texts = [f" {mark}{step:+.2g} " if step else " 0 " for mark, step in zip(marks, steps, strict=True)]
    return f"{words}: " + " ".join(span(text, step, largest, "") for text, step in zip(texts, steps, strict=True))


def _line(name: str, side: Mapping, quantity: str, largest: float) -> str:
    """One row of the page: a setting's tokens."""
    spans = [
        span(piece, value, largest, html.escape(f"{piece!r} {value:+.3g} nats"))
        for piece, value in zip(side["pieces"][:IN_PAGE], side[quantity], strict=False)
    ]
    rest = len(side["pieces"]) - IN_PAGE
    more = f" … {rest} more" if rest > 0 else ""
    return f'<div class="tokens"><span class="score">{html.escape(_label(name))}</span> {"".join(spans)}{more}</div>'


def _label(name: str) -> str:
    return name if name == CREDIT else style_of(name).label


def picture(maps: Mapping[str, Sequence[Mapping]], quantity: str) -> Figure:
    """A grid a response: settings down, tokens across; where the quantity is negative a minus stands in the cell."""
    pairs, largest = next(iter(maps.values())), full_colour(maps, quantity) or 1.0
    longest = min(IN_PICTURE, max(len(pair[side]["pieces"]) for pair in pairs for side in SIDES))
    height = 0.8 + 2 * len(pairs) * (1.3 + 0.26 * len(maps))
    fig = Figure(figsize=(3.0 + 0.24 * longest, height), dpi=110, layout="constrained", facecolor="white")
    panels = fig.subplots(2 * len(pairs), 1, squeeze=False)[:, 0]
    low, high = (np.array(colour) / 255 for colour in (NEGATIVE, POSITIVE))
    colours = LinearSegmentedColormap.from_list("nats", [low, (1, 1, 1), high])
    norm = Normalize(-largest if quantity == "logratio" else 0, largest)
    if quantity != "logratio":
        colours = LinearSegmentedColormap.from_list("nats", [(1, 1, 1), high])
    for i, ax in enumerate(panels):
        number, side = divmod(i, 2)
        image = _grid(ax, [pairs[number][SIDES[side]] for pairs in maps.values()], quantity, longest, colours, norm)
        ax.set_yticks(np.arange(len(maps)) + 0.5, map(_label, maps), fontsize=FONT - 1)
        prompt = " ".join(pairs[number]["prompt"].split())
        title = f"{SIDES[side]}, behind: {_drawable(prompt[:80])}"
        ax.set_title(title, fontsize=FONT, loc="left", parse_math=False)
    bar = fig.colorbar(image, ax=panels, location="top", aspect=60, extend="both" if norm.vmin else "max")
    bar.set_label(QUANTITIES[quantity] + (" (− in a cell: it fell)" if norm.vmin else ""), fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)
    return fig


def _grid(ax: Axes, rows: Sequence[Mapping], quantity: str, width: int, colours, norm: Normalize):
    """One response: a row of cells a setting, its tokens below."""
    pieces = rows[0]["pieces"][:width]
    values = np.array([row[quantity][:width] for row in rows])  # (settings, T)
    image = ax.pcolormesh(values, cmap=colours, norm=norm, edgecolors="#DDDDDD", linewidth=0.5)
    for y, x in np.argwhere(values < -0.15 * norm.vmax):
        ax.text(x + 0.5, y + 0.5, "−", ha="center", va="center", fontsize=FONT - 1)
    ax.set(xlim=(0, width), ylim=(len(rows), 0))  # equal cells in all panels, the first setting on top
    named = [_drawable(piece.replace("\n", "⏎").strip()) or "␣" for piece in pieces]
    ax.set_xticks(np.arange(len(pieces)) + 0.5, named, rotation=90, fontsize=FONT - 1, parse_math=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return image


def _drawable(text: str) -> str:
    """Text without the characters that the font of the pictures lacks."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    return "".join(letter if ord(letter) in known else "\ufffd" for letter in text)
