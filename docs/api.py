"""Write docs/api.md from the docstrings of what `tpo_lib` names: python docs/api.py"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import tpo_lib

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# What `tpo_lib` gives

Everything in `tpo_lib.__all__`, in the order in which data flows, with its docstring. Written by `python docs/api.py`.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts, room = [HEAD], ""
    for name in tpo_lib.__all__:
        if tpo_lib.home(name) != room:
            room = tpo_lib.home(name)
            path = room.replace(".", "/") + ".py"
            parts.append(f"## [{path}](../{path})\n")
        parts.append(entry(name, getattr(tpo_lib, name)))
    return "\n".join(parts)


def entry(name: str, thing) -> str:
    """One name: its signature, the first sentence, and the rest as it stands in the code."""
    if isinstance(thing, dict):
        return f"### `{name}`\n\nA dict of: {', '.join(f'`{key}`' for key in thing)}.\n"
    first, _, rest = inspect.getdoc(thing).partition("\n\n")
    if is_dataclass(thing) and "Attributes:" not in rest:
        rest += f"\n\n{fields_of(thing)}"
    body = f"\n```text\n{rest.strip()}\n```\n" if rest.strip() else ""
    return f"### `{name}{signature(thing)}`\n\n{' '.join(first.split())}\n{body}"


def fields_of(record: type) -> str:
    """The fields of a record as they stand in the code, with their comments."""
    _, _, behind = inspect.getsource(record).split('"""', 2)
    return textwrap.dedent(re.split(r"\n    (?:@|def )", behind)[0].strip("\n"))


def signature(thing) -> str:
    """Parameters and defaults; what they are and their shapes stand in the docstring."""
    found = inspect.signature(thing)
    bare = []
    for parameter in found.parameters.values():
        default = parameter.default
        if callable(default) and default is not inspect.Parameter.empty:  # a function has an address, which changes
            default = _Named(getattr(default, "__name__", "..."))
        bare.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


class _Named(str):
    __repr__ = str.__str__


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
