"""Keep the course's notebooks as they are committed: executed, timed, clean, and with one address in all of them.

python -m tpo_lib notebooks [NAME ...]      # = make notebooks
"""

from __future__ import annotations

import time
from pathlib import Path

from tpo_lib.files import store

FOLDER = Path(__file__).parents[1]
REPO_SLUG = "tpo-lib/tpo-lib"  # owner/name on GitHub; `python -m tpo_lib notebooks --no-execute` writes it everywhere
TAG = "setup"
SET_UP = """\
# On Colab this fetches the course; anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    import importlib.metadata

    torch_before = importlib.metadata.version("torch")
    !git clone -q --depth 1 https://github.com/{slug} /content/course
    %pip install -q -e /content/course
    sys.path[:0] = ["/content/course", "/content/course/notebooks"]
    assert importlib.metadata.version("torch") == torch_before, "Colab's torch was replaced: restart the runtime\""""


def course() -> list[Path]:
    """The notebooks of the course, in order."""
    return sorted(path for path in FOLDER.glob("*.ipynb") if not path.name.startswith("."))


def badge(name: str) -> str:
    """The line that opens a notebook on Colab."""
    target = f"https://colab.research.google.com/github/{REPO_SLUG}/blob/main/notebooks/{name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target})"


def refresh(path: Path, *, execute: bool = True) -> float | None:
    """Set badge and set-up cell, execute from top to bottom, strip what changes from run to run, write the file back.

    Args:
        path: a notebook.
        execute: False leaves outputs as they are.

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
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
        seconds = round(time.time() - began, 1)
        notebook.metadata["tpo"] = {"seconds": seconds}
    _clean(notebook)
    store.write_file(path, lambda to: nbformat.write(notebook, to))
    return seconds


def _set_address(notebook, name: str) -> None:
    import nbformat

    cells = notebook.cells
    lines = cells[0].source.split("\n")
    if lines[0].startswith("[![Open in Colab]"):
        lines = lines[2:]
    cells[0].source = "\n".join([badge(name), "", *lines])
    source = SET_UP.format(slug=REPO_SLUG)
    found = [cell for cell in cells if TAG in cell.metadata.get("tags", [])]
    if not found:
        first = next(i for i, cell in enumerate(cells) if cell.cell_type == "code")
        # a fixed id, so that writing it again changes nothing
        cells.insert(first, nbformat.v4.new_code_cell(source, id="setup", metadata={"tags": [TAG]}))
    else:
        found[0].source = source


def _clean(notebook) -> None:
    """Strip widget state, timestamps and what a cell writes to stderr (progress bars, warnings of the machine)."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
