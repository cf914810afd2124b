"""The README of data/pocket: what was built, how, and every figure that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import StrictUndefined, Template
from matplotlib.figure import Figure


def write(folder: Path, facts: dict) -> None:
    """Write README.md, loss.png and provenance.json below `folder` from the facts that `pocket.build` measured."""
    (folder / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
    loss_figure(facts["log"], facts["nats_per_token"]).savefig(folder / "loss.png", dpi=110)
    (folder / "README.md").write_text(readme(facts))


def loss_figure(log: list[dict], nats: float) -> Figure:
    """Training and validation loss over steps, in nats a token."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    looks = {
        "loss": {"color": "#0072B2", "lw": 1, "label": "training"},
        "valid_loss": {"color": "#D55E00", "ls": "none", "marker": "o", "label": "IMDb test, 256 windows"},
    }
    for name, look in looks.items():
        axes.plot(*zip(*((row["step"], row[name]) for row in log if name in row), strict=True), **look)
    axes.axhline(nats, color="black", lw=1, ls="--", label=f"IMDb test, 4,096 windows: {nats:.3f}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats a token)", ylim=(nats - 0.2, nats + 2.5))
    axes.legend(frameon=False)
    return figure


def readme(facts: dict) -> str:
    """The README as Markdown."""
    text = (Path(__file__).parent / "pocket.md.j2").read_text(encoding="utf-8")
    return Template(text, undefined=StrictUndefined, keep_trailing_newline=True).render(facts)
