"""Derivations that can be run: every displayed equation of DPO, TDPO and TGDPO with the number that shows it holds.

>>> from tpo_course.world import TokenWorld
>>> step = DERIVATIONS["dpo"].step("reparametrisation")
>>> step.residual(TokenWorld(vocab_size=3, horizon=2, seed=0), beta=0.5) < 1e-9
True
"""

import pkgutil

from tpo_course import source_path
from tpo_course.derivations import dpo, one_form, ppo, preferences, tdpo, tgdpo, token_mdp
from tpo_course.derivations.one_form import objective_map
from tpo_course.derivations.steps import TOLERANCE, Derivation, Hyper, Step, join, table, verify
from tpo_course.world import TokenWorld

__all__ = [
    "DERIVATIONS",
    "TOLERANCE",
    "Derivation",
    "Hyper",
    "Step",
    "default_worlds",
    "derive_table",
    "equation_map",
    "objective_map",
    "table",
    "verify",
]

DERIVATIONS: dict[str, Derivation] = {
    derivation.name: derivation for derivation in map(join, (preferences, dpo, token_mdp, tdpo, tgdpo, one_form, ppo))
}


def default_worlds() -> list[TokenWorld]:
    """The worlds `derive_table` uses: the steps' numbers come from the first; the last one discounts."""
    return [
        TokenWorld(vocab_size=4, horizon=3, seed=0, num_prompts=2),
        TokenWorld(vocab_size=3, horizon=3, seed=1, num_prompts=3, eos=False),
        TokenWorld(vocab_size=3, horizon=4, seed=2, num_prompts=2, gamma=0.9),
    ]


def derive_table(name: str | None = None, *, numbers: bool = True, **hyper: float) -> str:
    """Run one derivation, or all of them, and return the result as text (what `python -m tpo_lib derive` prints).

    Args:
        name: a key of DERIVATIONS; None is all, with the map of objectives at the end.
        numbers: also take the steps' measurements.
        hyper: fields of Hyper, for instance beta=0.1.

    Raises:
        ValueError: there is no derivation of that name; the message lists those there are.
    """
    if name is not None and name not in DERIVATIONS:
        raise ValueError(f"there is no derivation {name!r}; choose one of {', '.join(DERIVATIONS)}")
    chosen = DERIVATIONS.values() if name is None else (DERIVATIONS[name],)
    worlds = default_worlds()
    parts = [table(derivation, verify(derivation, worlds, numbers=numbers, **hyper)) for derivation in chosen]
    if name in (None, "one_form"):
        parts.append(objective_map())
    return "\n\n".join(parts)


def equation_map() -> str:
    """Markdown: every equation with its assumption, its source, and the line of tpo_lib that implements it."""
    lines = ["# Equation map", "", "Written by `python -m tpo_lib derive --map > notebooks/equation_map.md`."]
    lines += ["", "What each symbol means: [notation](notation.md)."]
    for derivation in DERIVATIONS.values():
        lines += ["", f"## {derivation.title}", "", derivation.question, ""]
        lines += ["| step | equation | source | implemented by |", "|---|---|---|---|"]
        for number, step in enumerate(derivation.steps, 1):
            code = _link(step.implements) if step.implements else ""
            latex = step.latex.replace(r"\|", r"\Vert ").replace("|", r"\vert ")  # a bare | would end the table cell
            lines.append(f"| {number}. {step.title} | ${latex}$ | {step.source} | {code} |")
    return "\n".join(lines) + "\n"


def _link(name: str) -> str:
    """A Markdown link from `notebooks/` to the file that defines a dotted name."""
    module = getattr(pkgutil.resolve_name(name), "__module__", None) or name.rpartition(".")[0]  # a table has none
    path = source_path(module)
    return f"[`{name}`]({path.removeprefix('notebooks/') if path.startswith('notebooks/') else '../' + path})"
