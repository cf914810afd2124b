"""The notebooks as they are committed: executed in order, clean, small, on time, every reference resolved."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tpo_course import notebooks
from tpo_course.site import alt

ROOT = notebooks.FOLDER.parent
COURSE = [pytest.param(path, id=path.stem) for path in notebooks.course()]
VIEW = "application/vnd.jupyter.widget-view+json"
# What ipywidgets says of a widget that has nothing to say: its class and its traits.
REPR = re.compile(r"(interactive|[A-Z]\w*)\((children=|value=|description=|options=|layout=|min=|\))|Output\(")
TIME = re.compile(r"cells run in about (\d+) (seconds?|minutes?)")


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def _prose(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in _read(path)["cells"] if cell["cell_type"] == "markdown")


def _code(path: Path) -> list[dict]:
    return [cell for cell in _read(path)["cells"] if cell["cell_type"] == "code"]


def test_the_course_is_there():
    assert len(COURSE) >= 6


@pytest.mark.parametrize("path", COURSE)
def test_executed_in_order_and_clean(path):
    cells = _code(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
        assert "execution" not in cell["metadata"]
        assert len("".join(cell["source"]).splitlines()) <= 20, "".join(cell["source"])[:200]
    assert "widgets" not in _read(path)["metadata"]
    assert path.stat().st_size <= 1e6


def bare_widgets(path: Path) -> list[str]:
    """What a reader without a kernel would see of widgets: reprs, and cells with neither picture nor table nor text beside."""
    found = []
    for cell in _code(path):
        shown = [output["data"] for output in cell["outputs"] if "data" in output]
        said = ["".join(data.get("text/plain", "")) for data in shown]
        found += [f"{cell['id']}: {text[:60]}" for text in said if REPR.match(text)]
        if any(VIEW in data for data in shown) and not any(
            {"image/png", "text/html", "text/markdown"} & data.keys() for data in shown
        ):
            found.append(f"{cell['id']}: neither a picture nor a table beside the widget")
    return found


@pytest.mark.parametrize("path", COURSE)
def test_a_reader_without_a_kernel_sees_something_of_every_widget(path):
    assert not bare_widgets(path)


def test_a_bare_widget_is_noticed(tmp_path):
    def cell(text, **more):
        return {"id": "a", "cell_type": "code", "outputs": [{"data": {"text/plain": text, VIEW: {}, **more}}]}

    for text, more, wrong in (
        ("VBox(children=(FloatLogSlider(value=0.5", {"image/png": "x"}, 1),
        (["Dropdown(description='run')"], {"text/html": "x"}, 1),
        ("interactive(children=(", {}, 2),
        ("beta = 0.5", {}, 1),
        ("beta = 0.5 (Figure(size))", {"image/png": "x"}, 0),
    ):
        (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [cell(text, **more)]}))
        assert len(bare_widgets(tmp_path / "x.ipynb")) == wrong, text


@pytest.mark.parametrize("path", COURSE)
def test_the_time_it_states_is_the_time_it_took(path):
    stated = TIME.search(_prose(path))
    assert stated, "say: the cells run in about N seconds"
    seconds = int(stated[1]) * (60 if stated[2].startswith("minute") else 1)
    measured = _read(path)["metadata"]["tpo"]["seconds"]
    assert measured / 2 <= seconds <= measured * 2, f"says {seconds} s, took {measured} s"
    assert measured <= 120


@pytest.mark.parametrize("path", COURSE)
def test_opening(path):
    first = _prose(path)[:4000]
    for needed in (
        "You will be able to",
        "Time",
        "Needs",
        "00_start_here.ipynb" if "00" not in path.name else "course",
    ):
        assert needed in first, needed


@pytest.mark.parametrize("path", COURSE)
def test_one_address(path):
    first, setup = "".join(_read(path)["cells"][0]["source"]), "".join(_code(path)[0]["source"])
    assert first.startswith(notebooks.badge(path.name) + "\n")
    assert setup == notebooks.set_up(tier="PRESET = " in setup)  # `test_forms` says which have one
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/[\w-]+)", first + setup)) == {notebooks.REPO_SLUG}


@pytest.mark.parametrize("path", COURSE)
def test_what_no_tier_was_chosen_for_stays_on_the_cpu(path):
    """Its cells mix tensors of their own with the models': on a machine with a GPU they would meet on two devices."""
    setup, *cells = ("".join(cell["source"]) for cell in _code(path))
    hidden = 'os.environ["CUDA_VISIBLE_DEVICES"] = ""' in setup
    assert hidden != any(re.search(r"\bPRESET\b", source) for source in cells)
    assert setup.index("import os") < setup.find("CUDA_VISIBLE_DEVICES") < setup.index("home =") or not hidden


@pytest.mark.parametrize("path", COURSE)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", _prose(path)):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).resolve().exists(), target


@pytest.mark.parametrize("path", COURSE)
def test_code_named_in_the_prose_exists(path):
    import pkgutil

    for name in set(re.findall(r"`(tpo_(?:lib|course|data)(?:\.\w+)+)", _prose(path))):
        pkgutil.resolve_name(name)  # raises where it does not


@pytest.mark.parametrize("path", COURSE)
def test_every_stored_picture_has_its_words_beside_it(path):
    import nbformat

    book, described = nbformat.read(path, as_version=4), set(alt.descriptions().get(path.stem, {}))
    nbformat.validate(book)
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                words = output.metadata.get("image/png", {}).get("alt", "")
                assert len(words) >= 10, f"{cell.id}: python -m tpo_course.notebooks --no-execute {path.name}"
                assert words == alt.words(path.stem, cell.id, output), cell.id
                described.discard(cell.id)
    assert not described, "alt.toml describes cells without a picture"


def test_words_are_written_once_where_nbconvert_reads_them():
    import nbformat

    html = pytest.importorskip("nbconvert").HTMLExporter(template_name="classic")
    figure = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 540x720 with 2 Axes>"}
    shown = [figure, {"image/png": "iVBORw0KGgo=", "text/plain": "β < 1"}, figure, {"text/plain": "2"}]
    cells = [
        nbformat.v4.new_code_cell("x", id=name, outputs=[nbformat.v4.new_output("display_data", data=data)])
        for name, data in zip(("dpo-15", "own", "nobody", "text"), shown, strict=True)
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# T"), *cells])
    notebooks.describe(book, "02_dpo")
    nbformat.validate(book)
    written = [cell.outputs[0].metadata for cell in book.cells[1:]]
    tree = alt.descriptions()["02_dpo"]["dpo-15"]
    assert written == [{"image/png": {"alt": tree}}, {"image/png": {"alt": "β < 1"}}, {}, {}]
    page = html.from_notebook_node(book)[0]
    assert f'alt="{tree}"' in page
    assert 'alt="β &lt; 1"' in page
    once = nbformat.writes(book)
    notebooks.describe(book, "02_dpo")
    assert nbformat.writes(book) == once


def test_refresh_is_idempotent_and_leaves_a_failing_notebook_alone(tmp_path):
    import nbformat
    from nbclient.exceptions import CellExecutionError

    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# T", id="a"),
            nbformat.v4.new_code_cell(
                "import sys; print(1, file=sys.stderr); from tqdm.notebook import tqdm; [*tqdm([1])]; 2", id="b"
            ),
        ]
    )
    path = tmp_path / "x.ipynb"
    nbformat.write(book, path)
    seconds = notebooks.refresh(path)
    assert seconds == _read(path)["metadata"]["tpo"]["seconds"] > 0
    cells = _read(path)["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code"]
    assert [o["output_type"] for o in cells[2]["outputs"]] == ["execute_result"]  # stderr is gone
    once = path.read_text()
    assert notebooks.refresh(path, execute=False) is None
    assert path.read_text() == once
    broken = _read(path)
    broken["cells"][2]["source"] = "1 / 0"
    path.write_text(json.dumps(broken))
    with pytest.raises(CellExecutionError):
        notebooks.refresh(path)
    assert _read(path) == broken


def test_a_picture_gets_small_once_and_looks_the_same():
    image = Image.new("RGBA", (200, 100), "white")
    for x in range(200):
        image.putpixel((x, x // 2), (x, 114, 178, 255))  # 200 colours
    before = io.BytesIO()
    image.save(before, "png")
    small = notebooks._in_256_colours(base64.b64encode(before.getvalue()).decode())
    shown = Image.open(io.BytesIO(base64.b64decode(small)))
    assert shown.mode == "P"
    assert ImageChops.difference(shown.convert("RGB"), image.convert("RGB")).getbbox() is None
    assert notebooks._in_256_colours(small) == small


def test_what_somebody_predicted_is_no_output_of_the_course(tmp_path):
    import nbformat

    cells = [
        "from tpo_course.exercises import dpo as check",
        'check.first_loss(0.7); check.gibbs(lambda **given: given["reward"])',
        "check.first_loss.reveal()",
    ]
    path = tmp_path / "x.ipynb"
    head = nbformat.v4.new_markdown_cell("# T")
    nbformat.write(nbformat.v4.new_notebook(cells=[head, *map(nbformat.v4.new_code_cell, cells)]), path)
    (tmp_path / ".progress.json").write_text("left as it is")
    notebooks.refresh(path)
    assert (tmp_path / ".progress.json").read_text() == "left as it is"
