"""Pictures in words, for who does not see them: what `alt.toml` says of a cell's picture, or what a widget says itself."""

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

REPR = re.compile(r"<.*>$|(?:VBox|HBox|Box|Tab|Output|interactive)\(", re.S)  # what says nothing to a reader


@cache
def descriptions() -> dict[str, dict[str, str]]:
    """{chapter: {cell id: its picture in words}}, from `alt.toml` beside this file."""
    return tomllib.loads(Path(__file__).with_name("alt.toml").read_text(encoding="utf-8"))


def words(chapter: str, cell: str, output: Mapping) -> str:
    """The picture of an output in words; "" if there is no picture, or nobody has put it in words.

    Args:
        chapter: the notebook's name without ".ipynb".
        cell: the id of its cell.
        output: as nbformat reads it.

    Example:
        >>> picture = {"image/png": "iVBO", "text/plain": "beta = 0.5: KL 0.7 nats"}
        >>> words("02_dpo", "dpo-18", {"data": picture})
        'beta = 0.5: KL 0.7 nats'
        >>> words("02_dpo", "no-such-cell", {"data": picture | {"text/plain": "<Figure size 600x400 with 1 Axes>"}})
        ''
    """
    data = output.get("data", {})
    if "image/png" not in data:
        return ""
    plain = data.get("text/plain", "")
    return descriptions().get(chapter, {}).get(cell) or ("" if REPR.match(plain) else plain)
