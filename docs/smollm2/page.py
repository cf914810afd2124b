"""Write what docs/smollm2/README.md has from the stored runs: its pictures, and the tables between its marks.

python -m tpo_data.smollm2 runs/smollm2-135m && python docs/smollm2/page.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tpo_course import two_models
from tpo_data import smollm2
from tpo_lib.files import store
from tpo_lib.runs import plots, report

HERE = Path(__file__).parent
SHOWN = ("reward", "judge", "second_judge", "kl", "entropy", "rare", "distinct_2", "accuracy_logratio")  # where stored


def table(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def settings(stored: Mapping) -> str:
    """What the two runs were made with."""
    rows = [["updates", *(model["curves"]["dpo"][-1]["step"] for model in stored.values())]]
    for part, names in (("stage", smollm2.STAGE), ("train", ("lr", "batch_size")), ("sft", smollm2.SFT)):
        for name in names:
            words = f"{'SFT: ' if part == 'sft' else ''}{name.replace('_', ' ')}"
            rows.append([words, *((model[part] or {}).get(name, "-") for model in stored.values())])
    rows.append(["minutes", *(round(model["wall_time_s"] / 60) for model in stored.values())])
    peaks = [max(cost.get("peak_gb", 0) for cost in model["costs"].values()) for model in stored.values()]
    return table(["", *stored], [*rows, ["peak memory, GB", *(f"{peak:.1f}" for peak in peaks)]])


def results(model: Mapping) -> str:
    """Every objective's last evaluation, with 95% intervals over prompts."""
    last = two_models.summary(model)
    points = {"start": last["start"]} | last["objectives"]
    shown = {name: report.COLUMNS[name] for name in SHOWN if name in last["start"]}
    rows = []
    for name, metrics in points.items():
        cells = [
            "{mean:z.{d}f} [{low:z.{d}f}, {high:z.{d}f}]".format(**metrics[m], d=digits)
            for m, (_, digits) in shown.items()
        ]
        rows.append([plots.style_of(name).label, *cells, f"{two_models.kl_per_token(metrics):.3f}"])
    return table(["", *(heading for heading, _ in shown.values()), "nats/token"], rows)


def findings(stored: Mapping) -> str:
    """What both models say of the findings."""
    said = [two_models.answers(model) for model in stored.values()]
    return table(["", *stored], [[finding, *(each[finding] for each in said)] for finding in two_models.FINDINGS])


def main() -> None:
    stored = smollm2.load()
    stored = {name: stored[name] for name in ("pocket", "smollm2-135m")}
    for name, metric in (("frontier", "reward"), ("judge", "judge")):
        two_models.frontiers(stored, metric=metric).savefig(HERE / f"{name}.png", dpi=110)
    parts = {"settings": settings(stored), "results": results(stored["smollm2-135m"]), "findings": findings(stored)}
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for name, content in parts.items():
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), name
        text = mark.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    store.write_file(HERE / "README.md", text)


if __name__ == "__main__":
    main()
