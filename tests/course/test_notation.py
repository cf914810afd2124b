"""Every symbol of the derivations, chapters and tasks stands once in the table of notation; every chapter leads there."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

import tpo_lib
from tpo_course import derivations, glossary, world
from tpo_course.derivations import DERIVATIONS
from tpo_course.derivations.steps import Hyper
from tpo_lib import losses, ppo
from tpo_lib.rewards import AdditiveReward
from tpo_lib.types import LossOutput, TokenStats

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TABLE = NOTEBOOKS / "notation.md"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
TASKS = sorted((NOTEBOOKS / "tpo_course" / "exercises").glob("*.md"))
STEPS = {f"{name}.{step.key}": step for name, derivation in DERIVATIONS.items() for step in derivation.steps}

GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "theta",
    "eta",
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
    "nu",
    "tau",
    "mu",
    "zeta",
    "Delta",
]
LETTER = rf"\\(?:{'|'.join(GREEK)})(?![a-zA-Z])|[A-Za-z]"
SYMBOL = re.compile(
    rf"(\\hat\s*(?:{LETTER})|{LETTER})((?:\^\*)?(?:_(?:\{{\\mathrm\{{\w+\}}\}}|\\theta|[mDfZ2](?![a-zA-Z])))?)"
)
# What a star or an index only specifies; where it makes another thing of the letter the table has a row of its own.
SPECIFIES = re.compile(r"[VQ]\^\*|(?:[VQADLJ]|\\ell)(?:\^\*)?_.*")


@cache
def symbols(latex: str) -> set[str]:
    """The letters of a formula with the star or index that belongs to their name."""
    plain = latex.replace(r"\mathbb{E}", "E").replace(r"\hat\beta", r"\hat \beta").replace(r"\hat\pi", r"\hat \pi")
    plain = re.sub(r"\\(?:operatorname|text)\{[^}]*\}|(?<!_\{)\\mathrm\{\w+\}|\\frac\{d\}\{d", " ", plain)
    plain = re.sub(rf"\\(?!hat\b|mathrm\b|(?:{'|'.join(GREEK)})(?![a-zA-Z]))[A-Za-z]+", " ", plain)
    found = {re.sub(r"\s+", "", base) + rest for base, rest in SYMBOL.findall(plain)}
    return {re.match(LETTER, symbol)[0] if SPECIFIES.fullmatch(symbol) else symbol for symbol in found}


def cells(column: int) -> list[str]:
    """A column of the tables of symbols."""
    tables = TABLE.read_text(encoding="utf-8").partition("| letter |")[0]
    lines = [line for line in tables.splitlines() if line.startswith("|")]
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
    for line in TABLE.read_text(encoding="utf-8").partition("| letter |")[0].splitlines():
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


# --- the formulas of chapters and of their tasks ---------------------------------------------------------------------

FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)


def letters() -> dict[str, set[str]]:
    """{chapter: the letters of one passage that the second table lets it have}."""
    found: dict[str, set[str]] = {}
    for line in TABLE.read_text(encoding="utf-8").partition("| letter |")[2].splitlines():
        if line.startswith("| $"):
            letter, _, chapters = (cell.strip() for cell in line.strip("|").split("|"))
            for chapter in chapters.split(", "):
                found.setdefault(chapter, set()).update(symbols(letter.replace("$", "")))
    return found


def texts(path: Path) -> list[tuple[str, str]]:
    """(id of the cell, or name of the task, its words) of a chapter, or of the Markdown of its tasks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [section.split("\n", 1) for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]]
    return [(c["id"], "".join(c["source"])) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]


def formulas(path: Path) -> list[tuple[str, str]]:
    """(where, formula) of all formulas in these words, code left out."""
    plain = [(where, re.sub(r"```.*?```|`[^`]*`", " ", words, flags=re.DOTALL)) for where, words in texts(path)]
    return [(where, display or inline) for where, words in plain for display, inline in FORMULA.findall(words)]


def of_chapter(path: Path) -> str:
    """The number of the chapter that these words belong to."""
    return glossary.number(next(NOTEBOOKS.glob(f"*_{path.stem}.ipynb"), path).name)


def unknown(formula: str, allowed: set[str]) -> set[str]:
    """Symbols that neither table has, shapes aside; a known letter may have a number or a name as index, or none."""
    if re.fullmatch(r"\([A-Z0-9, -]+\)", formula):
        return set()
    bases = {re.match(LETTER, symbol)[0] for symbol in allowed if re.match(LETTER, symbol)}
    return {
        s
        for s in symbols(formula) - allowed
        if re.sub(r"_\{\\mathrm\{\w+\}\}$|_\d$|\^\*$", "", s) not in allowed | bases
    }


@pytest.mark.parametrize("path", CHAPTERS + TASKS, ids=lambda path: path.name)
def test_every_symbol_of_a_chapter_and_of_its_tasks_stands_in_a_table(path):
    allowed = known() | letters().get(of_chapter(path), set())
    found = [
        (cell, sorted(missing), formula) for cell, formula in formulas(path) if (missing := unknown(formula, allowed))
    ]
    assert not found, (
        "say in notebooks/notation.md what they mean (of one passage: its second table), or use what is there"
    )


# A symbol in a place where it cannot have its meaning: (where, what it means, what to write).
COLLISIONS = {
    "the loss for a log-ratio": (r"\\ell(?:_\w)?\^|\\hat\s*\\ell", r"\ell is the loss of a pair", r"\eta^t"),
    "logits for a token": (r"\(s(?:_t)?, ?z\)|\\sim\s*\\pi[^=]{0,4}z\b", "z are logits", "a"),
    "the token reward for a run's": (r"(?<![\w\\])R\((?!s[,_'])", "R(s, a) is the reward of a token", r"\bar r(k)"),
    "the advantage for an area": (r"(?<![\w\\])A\s*=\s*\\frac\{1\}", "A is the advantage", r"\mathcal A"),
    "TDPO's delta for a difference": (r"\\delta\s*=\s*\(t_", r"\delta is TDPO's", "say it in words"),
    "a state for a variable of integration": (r"ds\b", "s is a state", "dv"),
    "a probability for a number": (r"\\frac\s*1\s*P|\^P(?![\w'])", "P is a probability", "n"),
    "the coefficient for a constant": (
        r"(?<![\w\\{])c\s*=\s*\\beta\s*\\?,?\s*\\sigma",
        "c is a token's coefficient",
        "write it out",
    ),
    "J without its KL": (r"J\(\\pi'?\)\s*=\s*\\mathbb\{E\}_x\[V_\\pi", "J has a KL in it", r"\mathbb{E}_x[V_\pi(s_0)]"),
    "a place as an index of the token reward": (
        r"\\hat r_t",
        "places of what is read off tokens stand above",
        r"\hat r^t",
    ),
    "the target margin as a discount": (r"-\s*\\gamma\s*\\bigr?\)", r"\gamma is the discount", r"\gamma_m"),
    "DPO's f(x)": (r"(?<![\w\\])f\(x", "f is TGDPO's weight", "b(x)"),
    "the optimum for the one-step policy": (
        r"\A(?=.*[QVA]_\{\\mathrm\{ref\}\}).*\\pi\^\*(?!_)",
        r"\pi^* is the optimum of J",
        r"\pi^*_{\mathrm{one}}",
    ),
    "a token for a share": (r"1\s*-\s*a\b", "a is a token", "the number itself"),
    "the margin for a number": (r"\)\^m\b", "m is the margin", "n"),
}


def collisions(formula: str) -> set[str]:
    return {name for name, (where, _, _) in COLLISIONS.items() if re.search(where, formula)}


@pytest.mark.parametrize("path", CHAPTERS + TASKS, ids=lambda path: path.name)
def test_no_symbol_has_a_second_meaning_in_a_chapter_or_its_tasks(path):
    found = {(path.name, name): (cell, formula) for cell, formula in formulas(path) for name in collisions(formula)}
    said = {key: (*place, *COLLISIONS[key[1]][1:]) for key, place in found.items()}
    assert not said, "a symbol means what the table says, everywhere"


@pytest.mark.parametrize("name", STEPS)
def test_no_symbol_has_a_second_meaning_in_a_step(name):
    assert not collisions(STEPS[name].latex)


@pytest.mark.parametrize(
    ("formula", "name"),
    [
        (r"\ell_w^t + \alpha", "the loss for a log-ratio"),
        (r"Q_\pi(s, z)", "logits for a token"),
        (r"R(k)", "the token reward for a run's"),
        (r"\int_1^{2} r(s^2)\, ds", "a state for a variable of integration"),
        (r"A = \frac{1}{3}", "the advantage for an area"),
        (r"\delta = (t_{.975,\nu} + 1)", "TDPO's delta for a difference"),
        (r"\frac1P \sum_{p=1}^P", "a probability for a number"),
        (r"c = \beta\,\sigma(-m) / n", "the coefficient for a constant"),
        (r"J(\pi) = \mathbb{E}_x[V_\pi(s_0)]", "J without its KL"),
        (r"\hat r_t", "a place as an index of the token reward"),
        (r"f(x) + 1", "DPO's f(x)"),
        (r"(m - \gamma\bigr)", "the target margin as a discount"),
        (r"Q_{\mathrm{ref}} = \beta \log \pi^* / \pi_{\mathrm{ref}}", "the optimum for the one-step policy"),
        (r"1 - a", "a token for a share"),
        (r"1 - (1 - p)^m", "the margin for a number"),
    ],
)
def test_a_second_meaning_is_found(formula, name):
    assert collisions(formula) == {name}


@pytest.mark.parametrize(
    "formula",
    [
        r"\frac{\partial \ell}{\partial z}",
        r"R(s,a) + R(s_t, y^t) + R'(s,a)",
        r"\delta = \beta \operatorname{SeqKL}",
        r"f(\hat r(s,a))",
        r"A_t = \sum_j",
        r"A_{\mathrm{ref}}(s,a) = \beta \log(\pi^*_{\mathrm{one}} / \pi_{\mathrm{ref}})",
    ],
)
def test_a_first_meaning_passes(formula):
    assert not collisions(formula)
    assert not unknown(formula, known())


def test_an_unknown_symbol_is_found():
    assert unknown(r"\zeta + \pi_\theta + m_{\mathrm{DPO}}", known()) == {r"\zeta"}


# --- where a symbol first stands -------------------------------------------------------------------------------------


def groups() -> list[tuple[str, list[str], str]]:
    """(anchor of its group, the symbols of its first cell, its chapter) of every row of the tables of symbols."""
    found = []
    for part in re.split(r"^## ", TABLE.read_text(encoding="utf-8").partition("| letter |")[0], flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for line in re.findall(r"^\| (?!symbol).*", body, re.MULTILINE):
            symbol, _, _, chapter = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found.append((anchor, symbol.strip("$").split(", "), chapter))
    return found


def stands(symbol: str, formula: str) -> bool:
    """Whether a formula has it: a letter by itself or, where the table writes more than `symbols` can tell, all of it."""
    if re.fullmatch(r"\([A-Z0-9, -]+\)", formula):
        return False
    if symbols(symbol) == {symbol.replace(" ", "")}:
        return symbol.replace(" ", "") in symbols(formula.replace(r"\pi_{\text{", r"\pi_{\mathrm{"))
    return bool(re.search(rf"(?<![A-Za-z\\]){re.escape(symbol)}(?![A-Za-z])", formula))


@cache
def sections(path: Path) -> list[tuple[str, str, list[str]]]:
    """(heading, words, formulas) of a chapter's sections; the first is its opening."""
    words = re.sub(r"```.*?```|`[^`]*`", " ", "\n\n".join(words for _, words in texts(path)), flags=re.DOTALL)
    parts = re.split(r"^## ", words, flags=re.MULTILINE)
    return [(part.partition("\n")[0], part, [a or b for a, b in FORMULA.findall(part)]) for part in parts]


@cache
def first(symbol: str, path: Path) -> int | None:
    """The number of the section in which a symbol first stands in a formula of a chapter."""
    parts = enumerate(sections(path))
    return next((place for place, (*_, found) in parts if any(stands(symbol, formula) for formula in found)), None)


@pytest.mark.parametrize(("names", "chapter"), [pytest.param(*row[1:], id=", ".join(row[1])) for row in groups()])
def test_a_row_names_the_chapter_in_which_its_symbol_first_stands(names, chapter):
    having = (of_chapter(path) for path in CHAPTERS if any(first(name, path) is not None for name in names))
    assert chapter == next(having, None)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_table_is_linked_where_a_symbol_first_stands(path):
    """In the section, once; a chapter's opening has the link of its head."""
    parts = sections(path)
    lacking = [
        (name, parts[place][0], f"notation.md#{anchor}")
        for anchor, names, chapter in groups()
        for name in names
        if chapter == of_chapter(path)
        and (place := first(name, path))
        and f"](notation.md#{anchor})" not in parts[place][1]
    ]
    assert not lacking


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_section_links_a_group_of_symbols_twice(path):
    for heading, words, _ in sections(path):
        links = re.findall(r"\]\((notation\.md#[^)]*)\)", words)
        assert len(links) == len(set(links)), heading


@pytest.mark.parametrize(
    ("symbol", "formula", "there"),
    [
        ("r'", "r'(x,y) = r(x,y) + b(x)", True),
        ("r'", "r(x,y')", False),
        (r"\pi_{\mathrm{old}}", r"\rho_t = \pi(y^t|s_t) / \pi_{\text{old}}(y^t|s_t)", True),
        (r"\pi", r"\pi_{\text{old}} + \pi^*", False),
        ("KL", r"\operatorname{SeqKL}(x, y)", False),
        ("sg", r"\mathrm{sg}[\beta]", True),
        (r"\hat r", r"\alpha\hat r(s,a)", True),
        ("T", "(R, T)", False),
    ],
)
def test_a_symbol_is_told_from_what_looks_like_it(symbol, formula, there):
    assert stands(symbol, formula) is there


def test_where_a_symbol_first_stands_is_found():
    tdpo = NOTEBOOKS / "04_tdpo.ipynb"
    assert sections(tdpo)[first(r"\delta_2", tdpo)][0] == "7. TDPO2"
    assert first(r"\delta_2", NOTEBOOKS / "02_dpo.ipynb") is None
