"""A learner's notebook as something to judge: the answer to every task, and the statements that it needs, without the rest.

An answer is what the last `check.NAME(...)` is called with, or else the last thing that is called NAME. What it needs is found
by names: of the statements at the top of cells those that bind a name which the answer uses, and what these use in turn. So a
chapter's training runs are left out, and its imports, helpers and worlds are not.
"""

import ast
import dis
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

ANSWER = "__answer__"  # what `Answer.call` binds: (positional, named) arguments


class Unreadable(ValueError):
    """A file that cannot be judged at all; the message says why, and what to do."""


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a code cell, and the names by which others find it."""

    tree: ast.stmt
    cell: int  # counted from 1, code cells alone
    binds: frozenset[str]
    now: frozenset[str]  # names that it uses when it runs,
    later: frozenset[str]  # and in functions, which run when they are called


@dataclass(frozen=True)
class Answer:
    """How one task was answered: a call of its checker, or a name; neither, if there is nothing."""

    call: ast.Call | None = None
    place: int = 0  # of the call, or of the name: an index of the statements
    cell: int = 0
    broken: str = ""  # what is wrong with the cell, if Python cannot read it


@dataclass
class HandedIn:
    """A notebook that was read. `cells` are the sources of its code cells, as Python reads them."""

    cells: list[str]
    checkers: dict[
        str, str
    ]  # the name in the notebook: the chapter's module, of every `from tpo_course.exercises import`
    statements: list[Statement] = field(default_factory=list)
    broken: dict[int, SyntaxError] = field(default_factory=dict)  # by cell

    def answer(self, name: str, chapter: str) -> Answer:
        """How the task `name` of a chapter is answered."""
        bound, called = Answer(), Answer()
        for place, statement in enumerate(self.statements):
            if name in statement.binds:
                bound = Answer(None, place, statement.cell)
            for call in ast.walk(statement.tree):
                if isinstance(call, ast.Call) and self._asks(call, name, chapter):
                    called = Answer(call, place, statement.cell)
        own = bound if not called.call or name in uses(call_of(called)) else called
        writes = re.compile(rf"^\s*(def {name}\b|{name}\s*=)|\.{name}\(", re.MULTILINE)
        for cell, error in self.broken.items():
            if cell > own.cell and writes.search(self.cells[cell - 1]):
                return Answer(broken=f"Python cannot read cell {cell}, line {error.lineno}: {error.msg}")
        return called if called.call else bound

    def _asks(self, call: ast.Call, name: str, chapter: str) -> bool:
        of = call.func.value if isinstance(call.func, ast.Attribute) else None
        return isinstance(of, ast.Name) and self.checkers.get(of.id) == chapter and call.func.attr == name

    def needed(self, names: Iterable[str], before: int) -> list[Statement]:
        """The statements that bind these names, and what they need, in the order of the notebook."""
        taken: set[int] = set()
        waiting = [(name, before) for name in names]
        while waiting:
            name, limit = waiting.pop()
            places = [place for place, statement in enumerate(self.statements) if name in statement.binds]
            place = max((p for p in places if p < limit), default=places[0] if places else None)
            if place is None or place in taken:
                continue
            taken.add(place)
            statement = self.statements[place]
            waiting += [(each, place) for each in statement.now] + [(each, before) for each in statement.later]
        return [self.statements[place] for place in sorted(taken)]


def read(path: Path) -> HandedIn:
    """Read a notebook file.

    Raises:
        Unreadable: it is no notebook of Python, or asks for no checker of the course.
    """
    try:
        book = json.loads(path.read_text(encoding="utf-8-sig"))
        cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
        sources = [cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"]) for cell in cells]
        language = book.get("metadata", {}).get("kernelspec", {}).get("language", "python")
    except OSError as error:
        raise Unreadable(f"cannot be opened: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unreadable(f"is no notebook ({type(error).__name__}: {str(error)[:80]}): save it once more") from None
    if str(language).lower() != "python":
        raise Unreadable(f"runs in {language}, not in Python: choose the Python kernel and save it")
    found = HandedIn([_as_python(source) for source in sources], {})
    for number, source in enumerate(found.cells, 1):
        try:
            found.statements += [_statement(tree, number) for tree in ast.parse(source).body]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            found.broken[number] = error if isinstance(error, SyntaxError) else SyntaxError(str(error))
    for statement in found.statements:
        if isinstance(statement.tree, ast.ImportFrom) and statement.tree.module == "tpo_course.exercises":
            found.checkers |= {each.asname or each.name: each.name for each in statement.tree.names}
    if not found.checkers:
        raise Unreadable(
            "imports no checker (from tpo_course.exercises import ... as check): is it a chapter of the course?"
        )
    return found


def call_of(answer: Answer) -> ast.stmt:
    """A statement that binds the arguments of a checker's call to `ANSWER`."""
    named = ast.Dict(
        [ast.Constant(k.arg) if k.arg else None for k in answer.call.keywords], [k.value for k in answer.call.keywords]
    )
    value = ast.Tuple([ast.Tuple(answer.call.args, ast.Load()), named], ast.Load())
    made = ast.Assign([ast.Name(ANSWER, ast.Store())], value)
    return ast.fix_missing_locations(ast.copy_location(made, answer.call))


def uses(tree: ast.stmt) -> frozenset[str]:
    """All global names that a statement uses."""
    made = _statement(tree, 0)
    return made.now | made.later


def _as_python(source: str) -> str:
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return TransformerManager().transform_cell(source)
    except SyntaxError:  # told with its line when the cell is parsed
        return source


def _statement(tree: ast.stmt, cell: int) -> Statement:
    code = compile(ast.Module([tree], []), "<cell>", "exec")
    binds, now, later = set(), set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            binds.add(step.argval)
        elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
            now.add(step.argval)
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    while inner:
        code = inner.pop()
        inner += [each for each in code.co_consts if isinstance(each, CodeType)]
        names = {s.argval for s in dis.get_instructions(code) if s.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
        (now if code.co_name.startswith("<") or not isinstance(tree, ast.FunctionDef) else later).update(names)
    for node in ast.walk(tree):  # x[0] = 1 and x.y = 1 change what x is
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            while isinstance(node, ast.Subscript | ast.Attribute):
                node = node.value
            if isinstance(node, ast.Name) and node.id in now:
                binds.add(node.id)
    return Statement(tree, cell, frozenset(binds), frozenset(now), frozenset(later))
