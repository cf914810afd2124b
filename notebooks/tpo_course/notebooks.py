"""Keep the course's notebooks as they are committed: executed, timed, clean, and with one address in all of them.

python -m tpo_course.notebooks [NAME ...]      # = make notebooks
"""

import base64
import io
import json
import os
import re
import time
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path

import tpo_lib
from tpo_course import pace
from tpo_course.site import alt
from tpo_course.tiers import TIERS
from tpo_lib.cli import call
from tpo_lib.files import store
from tpo_lib.parser import Parser

FOLDER = Path(__file__).parents[1]
ROOT = FOLDER.parent
REPO_SLUG = "tpo-lib/tpo-lib"  # on GitHub; `python -m tpo_course.notebooks --no-execute` writes it everywhere
PAGES = ("README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "docs/trl.md")  # the other files that name it
SET_UP = """\
# Colab and Kaggle: this fetches the course, once a session.{says}
{tier}KEEP_ON_DRIVE = False  #@param {{type: "boolean"}}
import os, sys
{device}home = "/content" if "google.colab" in sys.modules else "/kaggle/working" if os.path.isdir("/kaggle/working") else ""
if home and not os.path.isdir(f"{{home}}/course"):
    repository, version = "https://github.com/{slug}", "v{version}"  # while there is no such tag, the newest
    !git clone -q --depth 1 -b $version $repository $home/course || git clone -q --depth 1 $repository $home/course
    assert os.path.isdir(f"{{home}}/course"), "No network? On Kaggle switch Internet on in the notebook's settings."
if home:
    sys.path[:0] = [f"{{home}}/course", f"{{home}}/course/notebooks"]
    from tpo_course import hosted
    hosted.prepare(home, keep_on_drive=KEEP_ON_DRIVE){choose}"""
TIER = {  # what the cell has besides, where a cell below it reads PRESET
    "says": " TIER is what cells with PRESET run on, if the machine can carry it.",
    "tier": f'TIER = "pocket (CPU)"  #@param {json.dumps(list(TIERS))}\n',
    "device": "",
    "choose": "\nfrom tpo_course import tiers\nPRESET = tiers.choose(TIER)",
}
PLAIN = dict.fromkeys(TIER, "") | {
    "device": 'os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the cells below are written for a CPU\n'
}


def course() -> list[Path]:
    """The notebooks of the course, in order."""
    return sorted(path for path in FOLDER.glob("*.ipynb") if not path.name.startswith("."))


def set_up(*, tier: bool) -> str:
    """The cell that on Colab and Kaggle fetches the version that the notebook was executed with.

    Args:
        tier: it takes a tier, too, and sets PRESET: for chapters with a cell that reads it.
    """
    return SET_UP.format(slug=REPO_SLUG, version=tpo_lib.__version__, **(TIER if tier else PLAIN))


def badge(name: str) -> str:
    """The line that opens a notebook on Colab."""
    target = f"https://colab.research.google.com/github/{REPO_SLUG}/blob/main/notebooks/{name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def refresh(path: Path, *, execute: bool = True) -> float | None:
    """Set badge and set-up cell, execute, strip what changes from run to run, set times and map (`pace`), write it back.

    Every picture that is stored gets its words (`describe`).

    Returns:
        Seconds that the cells took (also kept in the notebook's metadata, `tpo.seconds`), None if not executed.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file is left as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    _set_address(notebook, path.name)
    seconds = None
    if execute:
        began = time.time()
        where = {"metadata": {"path": str(path.parent)}}
        alone = os.environ | {"TPO_PROGRESS": "off"}  # what somebody predicted here is no output of the course
        NotebookClient(notebook, timeout=600, resources=where, coalesce_streams=True).execute(env=alone)
        seconds = round(time.time() - began, 1)
        notebook.metadata["tpo"] = {"seconds": seconds}
    _clean(notebook)
    describe(notebook, path.stem)
    if pace.README.is_file():
        pace.write_opening(notebook, path.name, pace.README.read_text(encoding="utf-8"))
    store.write_file(path, lambda to: nbformat.write(notebook, to))
    return seconds


def describe(notebook, chapter: str) -> None:
    """Write every stored picture's words (`site.alt`) beside it: `metadata["image/png"]["alt"]` of its output.

    The site and nbconvert's classic template read them there (its template "lab" reads none); nbval compares no metadata.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            words = alt.words(chapter, cell.id, output)
            if words:
                output.metadata.setdefault("image/png", {})["alt"] = words


def set_address(page: Path) -> None:
    """Let every address of a repository on GitHub in a page be ours."""
    text = re.sub(r"github\.com/[\w-]+/[\w-]+", f"github.com/{REPO_SLUG}", page.read_text(encoding="utf-8"))
    store.write_file(page, text)


def _set_address(notebook, name: str) -> None:
    import nbformat

    cells = notebook.cells
    lines = cells[0].source.split("\n")
    if lines[0].startswith("[![Open in Colab]"):
        lines = lines[2:]
    cells[0].source = "\n".join([badge(name), "", *lines])
    found = next((cell for cell in cells if "setup" in cell.metadata.get("tags", [])), None)
    if found is None:
        found = nbformat.v4.new_code_cell(
            id="setup", metadata={"tags": ["setup"]}
        )  # fixed: writing it again changes nothing
        cells.insert(next(i for i, cell in enumerate(cells) if cell.cell_type == "code"), found)
    code = [cell.source for cell in cells if cell.cell_type == "code" and cell is not found]
    found.source = set_up(tier=any(re.search(r"\bPRESET\b", source) for source in code))


def _clean(notebook) -> None:
    """Strip widget state, timestamps, progress bars and what else a cell writes to stderr (warnings of the machine).

    Pictures keep 256 colours: a third of their size, and nobody sees a difference.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr" and not _is_bar(each)]
            for data in (output.get("data", {}) for output in cell.outputs):
                if "image/png" in data:
                    data["image/png"] = _in_256_colours(data["image/png"])


def _in_256_colours(picture: str) -> str:
    """A PNG in base64 with a palette; one that has a palette stays as it is."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    if image.mode == "P":
        return picture
    small = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def _is_bar(output) -> bool:
    """Whether an output is a progress bar, which is a widget where ipywidgets is installed."""
    return re.search(r"\d%\|", output.get("data", {}).get("text/plain", "")) is not None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_course.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="file names, or beginnings of them (default: all)")
    parser.add_argument("--execute", action=BooleanOptionalAction, default=True, help="or only tidy them")
    parser.set_defaults(function=_refresh_all)
    call(parser, arguments)


def _refresh_all(options) -> None:
    there = [path.name for path in course()]
    unknown = [name for name in options.names if not any(each.startswith(name) for each in there)]
    if unknown or not there:
        what = " or ".join(unknown) or "anything, outside a checkout of the repository"
        raise ValueError(f"no notebook is called {what}; there are {', '.join(there) or 'none'}")
    for path in course():
        if path.name.startswith(tuple(options.names or [""])):
            seconds = refresh(path, execute=options.execute)
            print(f"{path.name}: {'tidied' if seconds is None else f'{seconds:.0f} s'}", flush=True)
    for page in PAGES:
        set_address(ROOT / page)
    pace.write_readme()


if __name__ == "__main__":
    main()
