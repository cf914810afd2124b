"""Part 4 of `make gpu`: README.md, results.json, steps.png and frontier.png from what the other parts wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import gpu_figures
from benchmarks.report import table, yes
from tpo_lib.files.store import write_file
from tpo_lib.runs.plots import style_of

LABELS = {name: label for name, (label, _, _) in gpu_figures.BARS.items() if name != "bodies"}
NOTES = "notes.md"  # what people make of the figures; kept, and put into the page
METRICS = ("reward", "judge", "kl", "entropy", "distinct_2", "seqkl_chosen", "seqkl_rejected", "accuracy_logratio")
SHOWN = 2  # samples a run


def write(parts: Path, out: Path) -> None:
    """Write the page of whatever parts there are.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {path.stem: json.loads(path.read_text()) for path in sorted(parts.glob("*.json"))}
    found = {name: part for name, part in found.items() if name in ("numerics", "bench")}
    runs = [json.loads(path.read_text()) for path in sorted(parts.rglob("experiment.json"))]
    every = [*found.values(), *runs]
    if not every:
        raise FileNotFoundError(f"{parts} holds no part's results; run python -m benchmarks.gpu first")
    experiment = [row for run in runs for row in run["rows"]]
    bench, ceilings = (found.get("bench", {}).get(key, ()) for key in ("rows", "ceilings"))
    notes = out / NOTES
    text = [INTRODUCTION, about(every[0]["about"]), *([notes.read_text().strip()] if notes.is_file() else [])]
    text += ["## Goals", table(["goal", "limit", "measured", "holds"], goals(found, bench, experiment))]
    if "numerics" in found:
        text += ["## Numerics", NUMERICS, *numerics(found["numerics"])]
    if bench:
        write_file(out / "steps.png", partial(gpu_figures.steps(bench, ceilings).savefig, dpi=110))
        text += ["## A training step", STEPS, "![Time of a step, by contestant](steps.png)", *steps(bench, ceilings)]
    if any(row["kind"] == "run" for row in experiment):
        write_file(out / "frontier.png", partial(gpu_figures.frontier(experiment).savefig, dpi=110))
        text += ["## The experiment", *replications(experiment)]
        text += ["![Reward, judge and entropy against KL](frontier.png)", *results(experiment), *samples(experiment)]
    write_file(out / "results.json", json.dumps([plain(part) for part in every]) + "\n")
    write_file(out / "README.md", "\n\n".join(text) + "\n")
    print(f"written: {out / 'README.md'}", flush=True)


def plain(part: dict) -> dict:
    """A part without what describes the machine beyond the card."""
    return part | {"about": {k: v for k, v in part["about"].items() if k not in ("system", "commit")}}


def about(a: Mapping) -> str:
    """Card, versions, date."""
    card = f"One {a['gpu']}, CUDA {a['cuda']}" if a.get("gpu") else "No GPU (cpu): the small form"
    packages = ", ".join(f"{name} {version}" for name, version in a["versions"].items() if version)
    return f"{card}; {a['cores']} CPU cores. {packages}. {a['date'][:10]}. float32 is float32 (TF32 off)."


# ---- goals


def goals(found: Mapping, bench: Sequence[Mapping], experiment: Sequence[Mapping]) -> Iterator[list[str]]:
    """[goal, limit, measured, holds] of each goal that was set for one H100."""
    real = [check for row in experiment if row["kind"] == "agreement" for check in row["rows"]]
    for checks, what in (
        (found.get("numerics", {"rows": []})["rows"], "numerics"),
        (real, "ours against all logits at once on the trained weights"),
    ):
        if checks:
            bad = sum(not check["holds"] for check in checks)
            yield [f"{what}: checks that do not hold, of {len(checks)}", "0", str(bad), yes(bad == 0)]
    for r in bench:
        if r["kind"] == "largest" and r["objective"] == "tdpo2":
            beside, alone, times = r["beside"], r["alone"], r["beside"]["median_s"]
            for label in ("fused", "cached"):
                ratio = times[label] / times["textbook"]
                what = f"TDPO2, Llama-1B, {beside['pairs']} pairs: {LABELS[label]} over the textbook, time"
                yield [what, "0.45", f"{ratio:.2f}", yes(ratio <= 0.45)]
            share = mfu(alone, "fused")
            if share is not None:
                what = f"TDPO2, Llama-1B, T = 512, {alone['pairs']} pairs: share of the datasheet's peak"
                yield [what, "at least 0.45", f"{share:.2f}", yes(share >= 0.45)]
            if found["bench"]["about"].get("gpu"):
                used = None if r["gib_of_32"] is None else r["gib_of_32"] + r["loaded_gib"]
                said = "does not fit the card" if used is None else f"{used:.0f} GiB"
                fits = used is not None and used <= 40
                yield ["TDPO2, Llama-1B, T = 512, 32 pairs: memory in all", "40 GiB", said, yes(fits)]
        if r["kind"] == "steps" and r["objective"] == "dpo" and "trl" in r["median_s"]:
            ratio = r["median_s"]["fused"] / r["median_s"]["trl"]
            yield [f"DPO, {r['name']}: ours over TRL, time", "0.80", f"{ratio:.2f}", yes(ratio <= 0.8)]


def mfu(timed: Mapping, label: str, peak: float = 989e12) -> float | None:
    """Share of an H100's dense bf16 peak, by the operations that cannot be left out."""
    if label not in timed["median_s"] or timed["memory_gib"].get(label) in (None, 0.0):
        return None
    return timed["flops"]["cached" if label == "cached" else "uncached"] / timed["median_s"][label] / peak


# ---- numerics and steps


def numerics(part: Mapping) -> Iterator[str]:
    """The worst error of every kind of check."""
    groups: dict[tuple, list[dict]] = {}
    for check in part["rows"]:
        _, _, way = check["case"].partition(" (pairs")
        what = check["what"].split(": ")[-1]
        case = f"losses of {way.rsplit(', ', 1)[-1]}" if way else check["case"]
        key = (case, "gradients" if way and what != "loss" else what, check["precision"])
        groups.setdefault(key, []).append(check)
    worst = {
        key: max(checks, key=lambda c: (not c["holds"], c["error"])) for key, checks in groups.items()
    }  # NaN first
    rows = [
        [*key, str(len(groups[key])), f"{c['error']:.1e}", f"{c['textbook']:.1e}" if "textbook" in c else "",
         f"{c['tolerance']:.1e}", yes(c["holds"])]
        for key, c in worst.items()
    ]  # fmt: skip
    yield table(["case", "what", "type", "checks", "largest error", "textbook's there", "tolerance", "holds"], rows)
    if part.get("cut"):
        yield "The part's time was over before every check was made; what is missing above was not checked."


def steps(bench: Sequence[Mapping], ceilings: Mapping) -> Iterator[str]:
    """Times, memory and what fits."""
    rows, memory, other = [], [], []
    for r in bench:
        if r["kind"] != "steps":
            other.append(OTHERS[r["kind"]](r))
            continue
        m, gib = r["median_s"], r["memory_gib"]
        floor = r["flops"]["uncached"] / ceilings["product_flops"]
        cells = [f"{m[label] * 1e3:.0f}" if label in m else "" for label in (*LABELS, "bodies")]
        ratios = [f"{m['fused'] / m[peer]:.2f}" if peer in m and "fused" in m else "" for peer in ("textbook", "trl")]
        first = [r["name"], style_of(r["objective"]).label]
        rows.append([*first, *cells, f"{floor * 1e3:.1f}", *ratios])
        shares = [f"{share:.2f}" if (share := mfu(r, label)) is not None else "" for label in LABELS]
        used = [f"{gib[label]:.1f}" if gib.get(label) else "" for label in LABELS]
        memory.append([*first, *map(" / ".join, zip(used, shares, strict=True))])
    head = ["shape", "objective", *LABELS.values()]
    yield "Milliseconds of a step (medians), all contestants in rotating order:"
    yield table([*head, "bodies alone", "floor", "ours / textbook", "ours / TRL"], rows)
    yield "GiB above the loaded models, gradients included / share of the datasheet's 989 TFLOP/s:"
    yield table(head, memory)
    yield from other


def largest(r: Mapping) -> str:
    """What fits, and who is faster where the textbook is full."""
    most = ", ".join(f"{LABELS[label]} {found['pairs']}" for label, found in r["most"].items())
    each = ", ".join(f"{LABELS[k]} {found['gib_a_pair']:.2f}" for k, found in r["most"].items() if found["gib_a_pair"])
    b, alone, seconds = r["beside"], r["alone"], r["alone"]["median_s"]
    times = ", ".join(
        f"{LABELS[label]} {s * 1e3:.0f} ms ({b['tokens'] / s:,.0f} tokens/s, {b['memory_gib'][label]:.1f} GiB)"
        for label, s in b["median_s"].items()
        if label in LABELS
    )
    return (
        f"**{style_of(r['objective']).label}, Llama-1B, T = 512, as many pairs as fit**: {most} (GiB a pair: {each}). "
        f"At {b['pairs']} pairs: {times}. Ours at {alone['pairs']} pairs: {seconds['fused'] * 1e3:.0f} ms, "
        f"{alone['tokens'] / seconds['fused']:,.0f} tokens/s, {mfu(alone, 'fused') or 0.0:.2f} of the peak; the bodies alone "
        f"take {seconds['bodies'] * 1e3:.0f} ms of it."
    )


def precisions(r: Mapping) -> str:
    """Time and loss of one step in two types."""
    m = r["median_s"]
    return (
        f"float32 against bf16 (DPO, ours, {r['name']}): {m['float32'] * 1e3:.0f} ms and {m['bf16'] * 1e3:.0f} ms; "
        f"the losses are {r['losses']['float32']:.4f} and {r['losses']['bf16']:.4f}."
    )


OTHERS = {
    "largest": largest,
    "precisions": precisions,
    "failed": lambda r: f"{r['name']} was not measured: {r['problem']}",
}


# ---- experiment


def replications(rows: Sequence[Mapping]) -> Iterator[str]:
    """What each replication was made of."""
    for seed in sorted({row["seed"] for row in rows}):
        own = {row["kind"]: row for row in rows if row["seed"] == seed}
        said = [f"Replication {seed}:"]
        if "sft" in own:
            s = own["sft"]
            said.append(
                f"SFT on {s['reviews']:,} reviews ({s['tokens']:,} tokens, {s['updates']} updates, {s['seconds']:.0f} s), "
                f"perplexity of held-out reviews {s['perplexity_before']:.1f} before, {s['perplexity_after']:.1f} after;"
            )
        p, size, updates = own["pairs"], own["pairs"]["size"], own.get("plan", {"updates": 0})["updates"]
        said.append(
            f"{p['pairs']:,} pairs from {size['prompts']:,} prompts x 4 completions (score {p['score_mean']:.2f} +- "
            f"{p['score_std']:.2f}), {size['held_out']} held-out prompts, {p['held_out_pairs']} held-out pairs; "
            f"{p['seen_prompts']} of the held-out prompts begin or continue a training prompt;  "
            f"{updates} updates of {size['batch']} pairs, AdamW, peak rate {size['lr']:g}."
        )
        yield " ".join(said)


def ends(rows: Sequence[Mapping]) -> Iterator[tuple[int, str, Mapping]]:
    """(seed, label, point) of the start and of the end of every run, replication by replication."""
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["kind"] == "start":
            yield row["seed"], "start", row
        if row["kind"] == "run":
            yield row["seed"], style_of(row["objective"]).label, row["points"][-1]


def results(rows: Sequence[Mapping]) -> Iterator[str]:
    """The last point of every run, with 95% intervals over the held-out prompts."""
    yield "At the end of every run; in brackets 95% intervals over held-out prompts, which say nothing of seeds:"
    head = ["replication", "objective", "updates", "reward", "judge", "KL, nats", "entropy, nats a token", "distinct-2",
            "SeqKL chosen", "SeqKL rejected", "pair accuracy"]  # fmt: skip
    lines = [
        [str(seed), name, str(point["step"])]
        + [f"{m['mean']:.2f} ({m['low']:.2f} to {m['high']:.2f})" for m in map(point.get, METRICS)]
        for seed, name, point in ends(rows)
    ]
    yield table(head, lines)
    speeds = [row["pairs_a_second"] for row in rows if row["kind"] == "run"]
    yield f"Training took {min(speeds):.0f} to {max(speeds):.0f} pairs a second, evaluations not counted."


def samples(rows: Sequence[Mapping]) -> Iterator[str]:
    """The same held-out prompts, continued by the start and by every run; the prompts themselves are not shown."""
    first, lines = min(row["seed"] for row in rows), []
    for seed, name, point in ends(rows):
        for s in point["samples"][:SHOWN] if seed == first else ():
            text = " ".join(s["text"].split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            lines.append([name, f"{s['reward']:.2f}", f"{s['judge']:.2f}", text])
    yield (
        f"The first {SHOWN} held-out prompts, continued (prompts are beginnings of reviews and are not shown; cut at the "
        "longest length):"
    )
    yield table(["model", "reward", "judge", "continuation"], lines)


INTRODUCTION = """# One GPU

This page is written by `make gpu` (`python -m benchmarks.gpu`) from `results.json`; `make gpu SMALL=1` runs everything in a
small form on a CPU. What people made of the figures is in `notes.md` and stands first."""

NUMERICS = """Errors are ||found - exact|| / ||exact||. Losses and gradients (of hidden states, head weight and bias, with a mean
over the pairs) are set beside the textbook path in float64 on the same card; the textbook's own error in the same type stands
beside ours. Every objective is tried on three shapes: odd (3 pairs, V = 23, d = 5), ragged (5 pairs, V = 1,031, d = 33) and
large (8 pairs, V = 49,152, d = 576). Types are float32, and float32 weights under bf16 or fp16 autocast. A row is the worst of
so many checks. A check holds where the error is at most the tolerance, or twice the textbook's own error if that is more."""

STEPS = """Forward and backward of the mean loss, every frozen model's pass included unless it is cached, bf16 autocast over
float32 weights, no optimizer; IMDb-like is 64 pairs of up to 56 tokens, Llama-1B 4 unpadded pairs of 512. The floor was
computed, not fitted: operations that cannot be left out (no padding, the head at response positions) over the rate of a large
bf16 product measured on this card. `bodies alone` are the transformers by themselves, forward, and backward through the policy:
nothing that is done to the head can make an uncached step shorter. Thin lines in the figure are the fastest and the slowest."""
