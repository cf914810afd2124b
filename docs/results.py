"""Write what docs/results.md has from a finished run: its picture, and what stands between its marks.

python -m tpo_lib run && python docs/results.py runs/pocket
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.runs import plots, report

HERE = Path(__file__).parent
COLUMNS = (
    "reward",
    "judge",
    "second_judge",
    "kl",
    "entropy",
    "rare",
    "distinct_2",
    "distinct_2_within",
    "accuracy_logratio",
)
SECTIONS = {"pairs": "Prompts and pairs", "equal": "Reward at equal KL"}  # mark -> heading in the report


def table(summary: dict) -> str:
    """The start and every objective's last evaluation, with 95% intervals."""
    rows = [["", *(report.COLUMNS[name][0] for name in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    for name, metrics in ({"start": summary["start"]} | summary["objectives"]).items():
        said = ((metrics[metric], report.COLUMNS[metric][1]) for metric in COLUMNS)
        cells = [f"{m['mean']:z.{d}f} [{m['low']:z.{d}f}, {m['high']:z.{d}f}]" for m, d in said]
        rows.append([plots.style_of(name).label, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def section(text: str, heading: str) -> str:
    """What the report says below a heading, without its pictures."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if not found:
        raise ValueError(f"the report has no section {heading!r}; is it by this version?")
    blocks = (block.strip() for block in re.split(r"\n{2,}", found[1]))
    return "\n\n".join(block for block in blocks if block and not block.startswith(("![", "*")))


def main(folder: Path) -> None:
    said = (folder / "report.md").read_text(encoding="utf-8")
    parts = {name: section(said, heading) for name, heading in SECTIONS.items()}
    parts["results"] = table(json.loads((folder / "summary.json").read_text()))
    text = (HERE / "results.md").read_text(encoding="utf-8")
    for name, content in parts.items():
        mark = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), name
        text = mark.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    store.write_file(HERE / "results.md", text)
    shutil.copy(folder / "frontier.png", HERE / "frontier.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
