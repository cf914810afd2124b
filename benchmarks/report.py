"""results.json -> tables, scaling.png and README.md: no number in them comes from anywhere else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import measure
from benchmarks.sections import FLOOR
from tpo_lib.files import store
from tpo_lib.runs.plots import FONT, GRID, style_of

NAMES = {
    "textbook": "textbook (all logits)",
    "trl": "TRL",
    "trl-packed": "TRL's kernels, response positions only",
    "liger": "Liger",
    "fused": "**ours**",
    "logged": "ours, at an update that is logged",
    "statistics": "ours, any loss of the statistics",
    "cached": "ours, frozen models cached",
    "bodies": "bodies alone (no head)",
}
AXIS = {"vocab": "vocabulary V (entries)", "length": "sequence length T (tokens)", "pairs": "pairs in a batch B"}


def write(results: Mapping, folder: Path) -> None:
    """Write results.json, README.md and (where the curves were measured) scaling.png into a folder."""
    store.write_json(folder / "results.json", dict(results), indent=1)
    curves = [s for s in results["sections"].values() if s["kind"] == "scaling"]
    if curves:
        store.write_file(folder / "scaling.png", scaling_figure(curves).savefig)
    store.write_file(folder / "README.md", readme(results))


def section_text(section: Mapping) -> str:
    """One section as Markdown."""
    of = {"step": _step, "scaling": _scaling, "pocket": _pocket, "finite": _finite, "loop": _loop}
    return of[section["kind"]](section)


def goals_table(rows: Sequence[Mapping]) -> str:
    """Goal, limit, measured, and whether it holds."""

    def verdict(row: Mapping) -> str:
        over = "" if row["holds"] or not row["limit"] else f", {row['measured'] / row['limit'] - 1:.0%} over"
        return yes(row["holds"]) + over

    cells = [
        (str(r["number"]), r["text"], f"{r['limit']:g}")
        + (("", "not measured") if r["holds"] is None else (f"{r['measured']:.2f}", verdict(r)))
        for r in rows
    ]
    return table(("goal", "what", "at most", "measured", "holds"), cells)


def yes(holds: bool) -> str:
    """For a table."""
    return "yes" if holds else "**no**"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.2f} ({values['q1']:.2f} to {values['q3']:.2f})"


def _busy(times: Mapping) -> str:
    # what the clocks say: the threads of a section were not recorded, those of the last run stand under "Machine"
    shares = [cpu / wall for t in times.values() for cpu, wall in zip(t["cpu_s"], t["wall_s"], strict=True)]
    return f"{statistics.median(shares):.1f} cores busy"


def _step(section: Mapping) -> str:
    times, memory = section["times"], section["memory_mib"]
    rows = []
    for label in [*times, *(x for x in memory if x not in times)]:
        if label not in NAMES:
            continue  # the units of the floor
        cells = ["", "", ""]
        if label in times:
            cells = [_spread(measure.summary(times[label][c])) for c in ("cpu_s", "wall_s")]
            cells.append(_spread(measure.ratio(times, label, "textbook")) if "textbook" in times else "")
        used = memory.get(label)
        share = f"{used / memory['textbook']:.2f}" if used and memory.get("textbook") else ""
        rows.append((NAMES[label], *cells, f"{used:.0f}" if used else "", share))
    head = ("contestant", "CPU s", "wall s", "time / textbook", "peak MiB", "memory / textbook")
    about = f"{section['shape']['text']}, {section['response_positions']} response positions, {_busy(times)}"
    lines = [about, "", table(head, rows)]
    lines += ["", *_floor_lines(section)]
    lines += [f"{NAMES.get(label, label)}: {why}." for label, why in section["missing"].items()]
    worst = max((d["gradient"] for d in section["agreement"].values()), default=0)
    lines.append(f"Before timing, losses and gradients agreed with the textbook's to {worst:.0e} at worst.")
    return "\n".join(lines)


LOOPS = {
    "authors": "the authors' loop", "authors-cached": "the authors' loop, reference's hidden states kept",
    "trl": "TRL's DPOTrainer", "trl-cached": "TRL's DPOTrainer, reference precomputed",
    "fit": "**`fit`**", "fit-cached": "**`fit`**, reference cached",
}  # fmt: skip


def _loop(section: Mapping) -> str:
    times, memory, rows = section["times"], section["memory_mib"], []
    for label, clocks in times.items():
        objective, name = label.split("/")
        cells = [_spread(measure.summary(clocks[clock])) for clock in ("wall_s", "cpu_s", "ready_s")]
        for against in ("authors", "trl"):
            there = f"{objective}/{against}" in times
            cells.append(_spread(measure.ratio(times, label, f"{objective}/{against}", "wall_s")) if there else "")
        used = memory[label]
        shares = [
            f"{used / memory[other]:.2f}" if used and memory.get(other := f"{objective}/{against}") else ""
            for against in ("authors", "trl")
        ]
        rows.append((style_of(objective).label, LOOPS[name], *cells, f"{used:.0f}" if used else "", *shares))
    head = (
        "objective",
        "loop",
        "wall s a pair",
        "CPU s a pair",
        "beforehand, s a pair",
        "time / authors'",
        "time / TRL's",
    )
    lines = [f"{section['loop']['text']}; {section['threads']} threads", ""]
    lines.append(table((*head, "peak MiB", "memory / authors'", "memory / TRL's"), rows))
    lines += ["", *(f"{label}: {why}." for label, why in section["missing"].items())]
    lines.append(f"Losses of all updates agreed to {max(section['gaps'].values()):.0e} at worst.")
    return "\n".join(lines)


def _seconds(times: Mapping, label: str) -> float:
    return measure.summary(times[label]["cpu_s"])["median"]


def floor(times: Mapping, objective: str, *, cached: bool = False) -> list[float]:
    """CPU seconds of the computed floor in every round: body forwards and head GEMMs that cannot be left out."""
    bodies, heads = FLOOR[objective][cached]
    return [bodies * b + heads * u for b, u in zip(times["b"]["cpu_s"], times["u"]["cpu_s"], strict=True)]


def _floor_lines(section: Mapping) -> Iterator[str]:
    times, objective = section["times"], section["objective"]
    b, u = (_seconds(times, unit) for unit in "bu")
    yield f"One body forward b = {b:.3f} s, one head GEMM over the response positions u = {u:.3f} s."
    for label, name in (("fused", "ours"), ("cached", "ours, cached,")):
        if label in times:
            seconds = floor(times, objective, cached=label == "cached")
            far = _spread(measure.summary([x / f for x, f in zip(times[label]["cpu_s"], seconds, strict=True)]))
            bodies, heads = FLOOR[objective][label == "cached"]
            median = measure.summary(seconds)["median"]
            yield f"Floor {bodies}b + {heads}u = {median:.2f} s; {name} takes {far} times as long."


def _scaling(section: Mapping) -> str:
    rows = []
    for point in section["points"]:
        found = [_point(section["objective"], point, label) for label in ("textbook", "fused", "floor")]
        seconds, used = [f"{s:.2f}" for s, _ in found], [f"{mib:.0f}" if mib else "" for _, mib in found]
        rows.append((str(point["value"]), *seconds, *used))
    heads = [f"{who} {what}" for what in ("CPU s", "MiB") for who in ("textbook", "ours", "floor")]
    return table((AXIS[section["axis"]], *heads), rows)


def _pocket(section: Mapping) -> str:
    times, rows = section["times"], []
    for name in section["gaps"]:
        cells = [_spread(measure.summary(times[f"{name}/{path}"]["cpu_s"])) for path in ("textbook", "default")]
        ratio = _spread(measure.ratio(times, f"{name}/default", f"{name}/textbook"))
        price = _spread(measure.ratio(times, f"{name}/default", "dpo/default")) if "dpo/default" in times else ""
        rows.append((style_of(name).label, *cells, ratio, price, f"{section['gaps'][name]:.0e}"))
    head = ("objective", "textbook CPU s", "default CPU s", "default / textbook", "default / DPO's default")
    head = (*head, "weights apart, of the way gone")
    about = f"{section['updates']} updates of {section['batch_size']} pairs, prompts of 2 to 8 tokens"
    return f"{about}, responses of up to 40, fp32, {_busy(times)}\n\n" + table(head, rows)


def _finite(section: Mapping) -> str:
    rows = [(NAMES[label], "yes" if fine else "no") for label, fine in section["finite"].items()]
    return table(("contestant", "loss and gradient finite"), rows)


def scaling_figure(curves: list[Mapping]) -> Figure:
    """Time (above) and peak memory (below) of a TDPO2 step over V, T and B, with the floor."""
    fig = Figure(figsize=(4.0 * len(curves), 6.4), dpi=110, layout="constrained", facecolor="white")
    axes = fig.subplots(2, len(curves), squeeze=False, sharey="row")
    ours = style_of("tdpo2")
    looks = {  # colour, marker, dashes
        "textbook": ("textbook (all logits)", {"color": "#000000", "marker": "o", "linestyle": "--"}),
        "fused": ("ours, TDPO2", {"color": ours.colour, "marker": ours.marker, "linestyle": "-"}),
        "floor": ("computed floor", {"color": "#8A8A8A", "marker": "v", "linestyle": ":"}),
    }
    for column, section in enumerate(curves):
        xs = [point["value"] for point in section["points"]]
        for label, (name, look) in looks.items():
            seconds, mib = zip(*(_point(section["objective"], p, label) for p in section["points"]), strict=True)
            for row, ys in enumerate((seconds, mib)):
                if None not in ys:
                    axes[row][column].plot(xs, ys, label=name, linewidth=2, markersize=7, **look)
        for row, unit in enumerate(("time of a step, CPU s", "peak memory over the models, MiB")):
            ax = axes[row][column]
            ax.set(xscale="log", yscale="log", xlabel=AXIS[section["axis"]], ylabel=unit if column == 0 else "")
            ax.set_xticks(xs, [str(x) for x in xs])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.grid(**GRID)
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=FONT - 1)
    handles, names = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT, handlelength=3.5)
    return fig


def _point(objective: str, point: Mapping, label: str) -> tuple[float, float | None]:
    """Seconds and MiB of one curve at one point; the floor's memory is that of the bodies alone."""
    if label == "floor":
        return measure.summary(floor(point["times"], objective))["median"], point["memory_mib"].get("bodies")
    return _seconds(point["times"], label), point["memory_mib"].get(label)


def readme(results: Mapping) -> str:
    """The whole README.md."""
    about, sections = results["about"], results["sections"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in about["versions"].items())
    loads = [load for section in sections.values() for load in section["load"]]
    commits = ", ".join(sorted({str(section["commit"]) for section in sections.values()}))
    parts = [INTRODUCTION, "## Goals", goals_table(results["goals"]), "## Machine"]
    parts.append(
        f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {about['gpu'] or 'no GPU'}; "
        f"{about['threads']} {'thread' if about['threads'] == 1 else 'threads'}; {about['system']}. {versions}. "
        f"Commit {commits}; {about['date']}. "
        f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}."
    )
    parts.append("Steps of a Llama-1B's shape are measured on one GPU, by `make gpu` (`benchmarks/gpu/README.md`).")
    curves = [section for section in sections.values() if section["kind"] == "scaling"]
    if curves:
        parts += ["## TDPO2 over V, T and B", CURVES]
    for section in curves:
        parts += [f"### {AXIS[section['axis']]}", section_text(section)]
    for name, section in sections.items():
        if section["kind"] != "scaling":
            kind, _, rest = name.partition("-")
            words = [HEADINGS.get(kind) or style_of(kind).label, f"V = {rest}" if rest.isdigit() else rest]
            parts += [f"## {', '.join(filter(None, words))}", section_text(section)]
    return "\n\n".join(parts) + "\n"


HEADINGS = {
    "loop": "Whole training loops",
    "finite": "Far-apart logits: who stays finite",
    "pocket": "The pocket model, a whole run",
}

INTRODUCTION = """# What a training step costs

This file is written by `python -m benchmarks` (or `make bench`) from `results.json`, in about two hours; `--quick`
takes three minutes, `--only NAME` repeats a section. The peers come with `pip install -e ".[bench]" -c constraints.txt`.

A step is forward and backward of the mean loss over the pairs, with every frozen model's forward pass unless it is
cached. Contestants run in one process, one after the other, in rounds whose order rotates; times are medians with
quartiles, ratios are medians of the ratios within a round. Peak memory is what a step needs above the loaded models,
measured in a process of its own whose allocator gives back what is freed. Nothing is timed before losses and gradients agree.

- **textbook**: what the authors' repositories compute: logits of all positions, a log-softmax over all of them.
- **TRL**: its fused head (DPO), or its log-probability and divergence kernels together (TDPO2), fed as TRL feeds them;
  on a CPU that is every position, so "response positions only" is listed too.
- **Liger**: its fused linear DPO loss, eager on a CPU.
- **ours**: `ResponseReader` and `fused.pair_loss`, which training uses by default; **cached**: what the frozen models say
  is known, as from the second epoch on.
- **Whole training loops** of real bodies, each in a process of its own: `fit` beside TRL's `DPOTrainer` (its own defaults,
  gradient checkpointing among them, but float32) and a loop around the authors' step; same pairs, updates and optimizer, and
  the same losses. "Beforehand" is what caching the reference takes. Peak memory is what is above weights, gradients and
  AdamW's two moments. "Together" means that the six pairs of a prompt stand in one update (`--group-prompts`): `fit` reads
  their four responses once, the others read twelve sequences.
- Steps of four layers of d = 256 are mostly head: they show what the head costs, not what a user of a real body saves.
- The **floor** counts what no implementation can leave out: b, a body's forward pass without most of the padding (its
  backward is two), and u, one matrix product with the head over response positions."""

CURVES = """![Time and memory of a TDPO2 step over vocabulary, length and pairs](scaling.png)

Both axes are logarithmic; the other two sizes are V = 50257, T = 128, 4 pairs; the body is GPT-2's, 4 layers of d = 256,
fp32, 1.0 cores busy. The floor's memory is that of the
transformer bodies alone; its b and u are timed in the same rounds and as noisy as the rest: a point of ours below it says so."""
