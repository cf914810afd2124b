"""How long a chapter takes, by one rule; and the lines of a chapter that say so and lead through the course.

    python -m tpo_course.pace      # times, map and marks into all openings, times into README's table

The rule counts what a learner does who does all of it: reads, runs, looks, plays, answers. Its constants are set so that they
give about what was found when chapters 0 to 8 (without 6b, and before chapter 3 had PPO in it) were worked through once: 15
hours where 10 had been stated, and 150 minutes for chapter 5 where 75 had. Of that text they make 15.1 hours and 168 minutes.
One reader is one reader: take a time as good to a quarter. Seconds that cells run for are not in it; one reads meanwhile.

A cell with the tag "optional" in its metadata is no part of the core. A run of such cells begins with a heading, and under that
heading the command writes that it is optional, and how long it takes.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tpo_lib.files import store

WORDS = 150  # of prose, a minute: adults read non-fiction at 238 (Brysbaert 2019), and this is to be learned
FORMULA = 5  # words that a formula within a line counts for
EQUATION = 0.5  # minutes for one that stands alone, with its check
LINE = 3 / 60  # of code, or of what code prints
FIGURE = 0.75  # to look at: axes, then what they say
WIDGET = 3.0  # to play with
QUESTION = 1.0  # of a quiz, with the reasons of the wrong answers
CARD = 3.0  # of a function to write, over its own minutes: task, hints, a first answer that is wrong
VERDICT = 0.5  # of what is answered with letters, a number or words, over its own minutes: what the checker says

FOLDER = Path(__file__).parents[1]
README = FOLDER.parent / "README.md"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
TIME = re.compile(r"\*\*Time\*\* about [^;]*;")
STOP = r"(?:\[[^\]]+\]\(\w+\.ipynb\)|\*\*[^*]+\(you are here\)\*\*)"
MAP = re.compile(rf"\*\*The course\*\*: {STOP}(?:\s*[→·]\s*{STOP})*")
WORDS_OF = re.compile(
    r"What each symbol means: \[notation\]\(notation\.md\)\.(?: What each word means: \[glossary\]\(glossary\.md\)\.)?"
)
MARK = re.compile(r"\A(#+ [^\n]*)\n(?:\n\*Optional, about [^*\n]*\*\n)?")
ROW = re.compile(r"^\| \[([^\]]+)\]\(notebooks/(\w+\.ipynb)\) \|(?: [^|]* \| [^|]* \|)?(?= [^|]*\|$)", re.MULTILINE)
TOTAL = re.compile(r"^Together about [^\n]*\n", re.MULTILINE)


@dataclass(frozen=True)
class Pace:
    """Minutes of a chapter: of its core, and of everything."""

    core: float
    everything: float


def exercises(notebook) -> dict[str, float]:
    """Minutes of each exercise in the words of a chapter's `exercises/NAME.md`, and of its quiz; {} where there are none."""
    code = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    found = re.search(r"from tpo_course\.exercises import (\w+) as check", code)
    path = FOLDER / "tpo_course" / "exercises" / f"{found[1]}.md" if found else None
    if path is None or not path.is_file():
        return {}
    minutes = {}
    for section in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, words = section.partition("\n")
        if name.strip() == "quiz":
            minutes["quiz"] = QUESTION * words.count("### question")
        elif own := re.search(r"about (\d+) minutes?\)", words):
            written = not re.search(r"^### (choice:|truth|rubric)", words, flags=re.MULTILINE)
            minutes[name.strip()] = (CARD if written else VERDICT) + float(own[1])
    return minutes


def prose(words: str) -> float:
    """Minutes of a text cell."""
    words, equations = re.subn(r"\$\$.*?\$\$", " ", words, flags=re.DOTALL)
    words, formulas = re.subn(r"\$[^$]+\$", " ", words)
    words = re.sub(r"<[^>]+>|\]\([^)]*\)", " ", words)
    return (len(words.split()) + FORMULA * formulas) / WORDS + EQUATION * equations


def code(cell) -> float:
    """Minutes of a code cell and its output, without an exercise that it shows."""
    if "setup" in cell["metadata"].get("tags", []):
        return 0.0
    lines = sum(1 for line in cell["source"].splitlines() if line.strip() and not line.strip().startswith("#"))
    looks = 0.0
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        lines += len(output.get("text", "").splitlines()) if output["output_type"] == "stream" else 0
        looks += WIDGET if WIDGET_VIEW in data else FIGURE if "image/png" in data else 0.0
    return LINE * lines + looks


def of_cells(notebook) -> list[float]:
    """Minutes of every cell; an exercise counts where it is first named, and its card is no widget to play with."""
    left, minutes = exercises(notebook), []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            minutes.append(prose(cell["source"]))
            continue
        named = [name for name in left if re.search(rf"\bcheck\.{name}\b", cell["source"])]
        card = re.fullmatch(r"check\.\w+", cell["source"].strip())
        minutes.append((LINE if card else code(cell)) + sum(left.pop(name) for name in named))
    return minutes


def optional(cell) -> bool:
    """Whether a cell is no part of the core."""
    return "optional" in cell["metadata"].get("tags", [])


def of(notebook) -> Pace:
    """The minutes of a notebook (as nbformat reads it)."""
    minutes = of_cells(notebook)
    beside = sum(each for each, cell in zip(minutes, notebook["cells"], strict=True) if optional(cell))
    return Pace(sum(minutes) - beside, sum(minutes))


def said(minutes: float) -> str:
    """Minutes in words, to five.

    >>> said(43), said(121), said(98.2)
    ('45 min', '2 h', '1 h 40 min')
    """
    hours, rest = divmod(5 * max(1, round(minutes / 5)), 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{rest} min"] * bool(rest))


def in_words(pace: Pace) -> str:
    """The sentence of a chapter's opening, up to its semicolon."""
    if said(pace.core) == said(pace.everything):
        return f"**Time** about {said(pace.everything)}, exercises included;"
    return (
        f"**Time** about {said(pace.core)} for the core, {said(pace.everything)} with everything, exercises included;"
    )


def chapters(readme: str) -> dict[str, str]:
    """README's table: {file name of a notebook: what the map calls it}, in order."""
    return {name: label.removeprefix("0") for label, name in ROW.findall(readme)}


def course_map(names: dict[str, str], here: str) -> str:
    """The line of an opening that leads through the course.

    Raises:
        ValueError: the notebook has no row in README's table.
    """
    if here not in names:
        raise ValueError(
            f"notebooks/{here} has no row in README's table of chapters: add one, | [NN name](notebooks/{here}) | what is done |"
        )
    stops = (f"**{label} (you are here)**" if name == here else f"[{label}]({name})" for name, label in names.items())
    return "**The course**: " + " → ".join(stops)


def mark(notebook) -> None:
    """Write under the heading of every run of optional cells that it is one, and take it away where there is none.

    Raises:
        ValueError: a run does not begin with a heading.
    """
    cells, minutes = notebook["cells"], of_cells(notebook)
    for i, cell in enumerate(cells):
        begins = optional(cell) and not (i and optional(cells[i - 1]) and not cell["source"].startswith("#"))
        if begins and not cell["source"].startswith("#"):
            raise ValueError(
                f"cell {cell['id']!r} is the first of several optional ones and begins with no heading: split it there"
            )
        if cell["cell_type"] != "markdown" or not cell["source"].startswith("#"):
            continue
        words = ""
        if begins:
            after = next(
                (j for j in range(i + 1, len(cells)) if not optional(cells[j]) or cells[j]["source"].startswith("#")),
                len(cells),
            )
            words = f"\n*Optional, about {said(sum(minutes[i:after]))}.*\n"
        cell["source"] = MARK.sub(lambda found, words=words: f"{found[1]}\n{words}", cell["source"] + "\n").rstrip("\n")


def write_opening(notebook, name: str, readme: str) -> None:
    """Set times, map and marks of a notebook that has an opening; leave any other alone."""
    first = notebook["cells"][0]
    if not TIME.search(first["source"]):
        return
    mark(notebook)
    words = course_map(chapters(readme), name)
    first["source"] = MAP.sub(lambda _: words, TIME.sub(lambda _: in_words(of(notebook)), first["source"]))
    both = "What each symbol means: [notation](notation.md). What each word means: [glossary](glossary.md)."
    first["source"] = WORDS_OF.sub(lambda _: both, first["source"])


def with_times(readme: str, paces: dict[str, Pace]) -> str:
    """README with the times in its table of chapters, and their sums below it."""
    readme = readme.replace(
        "| chapter | what you do there |\n|---|---|\n",
        "| chapter | core | everything | what you do there |\n|---|---|---|---|\n",
    )

    def row(found: re.Match) -> str:
        return f"| [{found[1]}](notebooks/{found[2]}) | {said(paces[found[2]].core)} | {said(paces[found[2]].everything)} |"

    readme = ROW.sub(row, readme)
    core, everything = (sum(getattr(pace, part) for pace in paces.values()) / 60 for part in ("core", "everything"))
    return TOTAL.sub(
        f"Together about {core:.0f} hours for the core and {everything:.0f} with everything, exercises included; "
        "[`pace.py`](notebooks/tpo_course/pace.py) has the rule, and what it was measured on.\n",
        readme,
    )


def write_readme() -> dict[str, Pace]:
    """Write the times of all chapters into README; the same by file name."""
    import nbformat

    readme = README.read_text(encoding="utf-8")
    paces = {name: of(nbformat.read(FOLDER / name, as_version=4)) for name in chapters(readme)}
    store.write_file(README, with_times(readme, paces))
    return paces


def write() -> dict[str, Pace]:
    """Write times, map and marks into all chapters of the checkout, and the times into README."""
    import nbformat

    readme = README.read_text(encoding="utf-8")
    for name in chapters(readme):
        notebook = nbformat.read(FOLDER / name, as_version=4)
        before = nbformat.writes(notebook)
        write_opening(notebook, name, readme)
        if nbformat.writes(notebook) != before:
            store.write_file(FOLDER / name, lambda to, notebook=notebook: nbformat.write(notebook, to))
    return write_readme()


if __name__ == "__main__":
    for name, pace in write().items():
        print(f"{name}: {said(pace.core)} for the core, {said(pace.everything)} with everything")
