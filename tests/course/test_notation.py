"""Every symbol of the derivations stands once in the table of notation, and every chapter leads there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import tpo_lib
from tpo_course import derivations, world
from tpo_course.derivations import DERIVATIONS
from tpo_course.derivations.steps import Hyper
from tpo_lib import losses, ppo
from tpo_lib.rewards import AdditiveReward
from tpo_lib.types import LossOutput, TokenStats

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TABLE = NOTEBOOKS / "notation.md"
CHAPTERS = sorted(NOTEBOOKS.glob("0*.ipynb"))
STEPS = {f"{name}.{step.key}": step for name, derivation in DERIVATIONS.items() for step in derivation.steps}

GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "theta",
    "kappa",
    "lambda",
    "varphi",
    "phi",
    "Phi",
    "psi",
    "pi",
    "rho",
    "sigma",
    "ell",
]
LETTER = rf"\\(?:{'|'.join(GREEK)})(?![a-zA-Z])|[A-Za-z]"
SYMBOL = re.compile(
    rf"(\\hat\s*(?:{LETTER})|{LETTER})((?:\^\*)?(?:_(?:\{{\\mathrm\{{\w+\}}\}}|\\theta|[mDfZ2](?![a-zA-Z])))?)"
)
# What a star or an index only specifies; where it makes another thing of the letter the table has a row of its own.
SPECIFIES = re.compile(r"[VQ]\^\*|(?:[VQADLJ]|\\ell)(?:\^\*)?_.*")


def symbols(latex: str) -> set[str]:
    """The letters of a formula with the star or index that belongs to their name."""
    plain = latex.replace(r"\mathbb{E}", "E").replace(r"\hat\beta", r"\hat \beta").replace(r"\hat\pi", r"\hat \pi")
    plain = re.sub(r"\\(?:operatorname|text)\{[^}]*\}|(?<!_\{)\\mathrm\{\w+\}|\\frac\{d\}\{d", " ", plain)
    plain = re.sub(rf"\\(?!hat\b|mathrm\b|(?:{'|'.join(GREEK)})(?![a-zA-Z]))[A-Za-z]+", " ", plain)
    found = {re.sub(r"\s+", "", base) + rest for base, rest in SYMBOL.findall(plain)}
    return {re.match(LETTER, symbol)[0] if SPECIFIES.fullmatch(symbol) else symbol for symbol in found}


def cells(column: int) -> list[str]:
    """A column of the tables of symbols."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    bodies = [line for line in lines if not line.startswith(("| symbol", "|---"))]
    return [re.split(r"(?<!\\)\|", line)[1 + column].strip() for line in bodies]


def rows() -> list[str]:
    return cells(0)


# What a name in the code column begins with, where it is no name of tpo_lib's own.
PLACES = {"torch": torch, "Tensor": torch.Tensor, "losses": losses, "Hyper": Hyper, "AdditiveReward": AdditiveReward}
PLACES |= {"TokenStats": TokenStats, "LossOutput": LossOutput, "TokenWorld": world.TokenWorld, "Values": world.Values}
PLACES |= {"pairs": world.Pairs} | {module: getattr(derivations, module) for module in ("dpo", "tdpo", "tgdpo")}
PLACES |= {module: getattr(derivations, module) for module in ("one_form", "preferences", "tools")}
PLACES |= {"ppo": ppo}  # the library's, not the derivation
OTHERS = {"logps", "logits", "alpha", "beta", "guide_beta", "rewards/margins"}  # arguments of many functions, a metric


def resolves(name: str) -> bool:
    """Whether an attribute, a field or an instance's attribute of that name exists."""
    first, *rest = re.sub(r"\(.*", "", name).split(".")
    found = PLACES.get(first) if first in PLACES else getattr(tpo_lib, first, None)
    if found is world.TokenWorld:
        found = world.TokenWorld(2, 1, seed=0)
    for part in rest:
        if part in getattr(found, "__dataclass_fields__", {}):
            return True
        found = getattr(found, part, None)
    return found is not None


def test_the_code_column_names_what_exists():
    names = {name for cell in cells(2) for name in re.findall(r"`([^`]+)`", cell)} - OTHERS
    assert len(names) > 40
    missing = sorted(name for name in names if not resolves(name))
    assert not missing
    assert not resolves("tgdpo.guided")


def known() -> set[str]:
    return set().union(*(symbols(cell.strip("$")) for cell in rows() if cell.startswith("$")))


@pytest.mark.parametrize(
    ("latex", "found"),
    [
        (r"\pi^*_{\mathrm{one}}(a|s)", {r"\pi^*_{\mathrm{one}}", "a", "s"}),
        (
            r"\hat r = \hat\beta \log \frac{\hat\pi}{\pi_{\mathrm{ref}}}",
            {r"\hatr", r"\hat\beta", r"\hat\pi", r"\pi_{\mathrm{ref}}"},
        ),
        (r"L_{\mathrm{DPO}} = \mathbb{E}[r_\theta(x,y) - \gamma_m]", {"L", "E", r"r_\theta", "x", "y", r"\gamma_m"}),
        (r"\operatorname{KL}(P \,\|\, P_\theta)", {"P", r"P_\theta"}),
        (r"V^*(s) = \mathrm{sg}\bigl[V_\pi(s')\bigr]", {"V", "s", r"\pi"}),
    ],
)
def test_symbols_are_found(latex, found):
    assert symbols(latex) == found


@pytest.mark.parametrize("name", STEPS)
def test_every_symbol_stands_in_the_table(name):
    step = STEPS[name]
    missing = symbols(step.latex) - known()
    assert not missing, (
        f"{sorted(missing)}: say in notebooks/notation.md what they mean, or use the symbols that are there"
    )


def test_no_symbol_has_two_rows():
    cells = rows()
    assert len(cells) == len(set(cells)) > 50


def test_every_row_is_full_and_names_its_chapter():
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| $"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 4, line
            assert cells[1], line
            assert cells[3].isdigit(), line


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_links_the_table_in_its_head(path):
    head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    course = next(part for part in head.split("\n\n") if part.startswith("**The course**"))
    assert "[notation](notation.md)" in course


def test_the_equation_map_links_the_table():
    assert "[notation](notation.md)" in (NOTEBOOKS / "equation_map.md").read_text(encoding="utf-8")
    assert TABLE.is_file()
