"""What the stored studies say, for the chapters; nothing trains here."""

import io

from IPython.display import Markdown
from matplotlib.figure import Figure
from PIL import Image

from tpo_course.widgets.parts import png
from tpo_course.widgets.study_browser import STUDIES
from tpo_lib.studies import page, study
from tpo_lib.studies.spec import Study

COLUMNS = ("claim", "of", "the paper has", "here: difference [95%]", "verdict")


def load(name: str) -> tuple[Study, dict]:
    """A study and its result, see `tpo_lib.studies.study`.

    Raises:
        FileNotFoundError: there is no such study, or no result of it; the message says how to make it.
    """
    return Study.read(STUDIES / f"{name}.toml"), study.read(STUDIES, name)


def verdicts(name: str, *words: str) -> Markdown:
    """What became of a study's claims, a table; of those alone that have one of the words, where some are given.

    Raises:
        ValueError: a word is in no claim.
    """
    rows = page.claim_rows(*load(name))
    if missing := [each for each in words if not any(each in row[0] for row in rows)]:
        raise ValueError(
            f"no claim of study {name!r} says {missing[0]!r}; they are: {'; '.join(row[0] for row in rows)}"
        )
    wanted = [row for row in rows if not words or any(each in row[0] for each in words)]
    return Markdown(page.table(COLUMNS, wanted))


def picture(figure: Figure, dpi: int = 80) -> Image.Image:
    """A figure in few colours, so that a notebook that shows it stays small."""
    return Image.open(io.BytesIO(png(figure, dpi))).quantize(64)
