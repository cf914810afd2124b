"""How an answer is run and compared: its arguments, its values and gradients, and where it went wrong."""

import dataclasses
import dis
import html
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

RTOL, ATOL = 1e-5, 1e-8


@dataclass(frozen=True)
class Observation:
    """What an answer did with a case: its tensors, and the gradients of their sum at the case's leaves."""

    values: list[Tensor]
    gradients: list[Tensor]
    raw: Any


class Unlike(Exception):
    """An answer that cannot be called with a case's arguments; the message says why."""


def observe(answer: Any, arguments: Mapping[str, Any]) -> Observation:
    """Values that the answer gives, and the gradients of their sum at the tensors of the arguments that require one."""
    leaves = [t for t in tensors(arguments) if t.requires_grad]
    result = call(answer, arguments) if callable(answer) else answer
    values = tensors(result)
    total = sum((v.sum() for v in values if v.is_floating_point() and v.requires_grad), torch.zeros(()))
    gradients = [torch.zeros_like(t) for t in leaves]
    if leaves and total.requires_grad:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return Observation([v.detach() for v in values], list(gradients), result)


def tensors(value: Any) -> list[Tensor]:
    """Tensors and numbers in a value: a number, a tensor, an array, or a nest of dataclasses, mappings and sequences of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, bool | int | float | np.ndarray | np.generic):
        return [torch.as_tensor(value)]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


# ---- calling


def call(answer: Callable, arguments: Mapping[str, Any]) -> Any:
    """Call with the arguments by name; by position where the learner's names are others.

    Raises:
        Unlike: neither is possible, or would mix arguments up.
    """
    try:
        signature = inspect.signature(answer)
    except (ValueError, TypeError):  # of a built-in function, which tells no names
        return answer(*arguments.values())
    try:
        signature.bind(**arguments)
    except TypeError:
        own = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        asked = list(arguments)
        moved = any(name in own and own.index(name) != place for place, name in enumerate(asked))
        try:
            signature.bind(*arguments.values())
        except TypeError:
            moved = True
        if moved:
            takes, given = (", ".join(names) for names in (own, asked))
            raise Unlike(f"It takes ({takes}), and is called with ({given}): write its first line so") from None
        return answer(*arguments.values())
    return answer(**arguments)


# ---- looking at the learner's code


def _code(answer: Any) -> CodeType | None:
    answer = inspect.unwrap(answer) if callable(answer) else answer
    return getattr(getattr(answer, "func", answer), "__code__", None)


def is_stub(answer: Any) -> bool:
    """Whether nothing was written yet: no answer, or a function of `...`, `pass`, a docstring or NotImplementedError alone."""
    if answer is None or answer is Ellipsis:
        return True
    code = _code(answer)
    if code is None or set(code.co_names) - {"NotImplementedError"}:
        return False
    steps = [step for step in dis.get_instructions(code) if not step.opname.startswith(("RESUME", "NOP", "CACHE"))]
    constants = {step.argval for step in steps if step.opname in ("LOAD_CONST", "RETURN_CONST")}
    quiet = ("LOAD_CONST", "RETURN_", "POP_TOP", "LOAD_GLOBAL", "LOAD_COMMON", "PUSH_NULL", "PRECALL", "CALL", "RAISE_")
    return all(step.opname.startswith(quiet) for step in steps) and all(
        constant is None or constant is Ellipsis or (code.co_names and isinstance(constant, str))
        for constant in constants
    )


def names_in(answer: Any) -> set[str]:
    """The names that a function's code mentions, with those of the functions inside it and of the helpers beside it."""
    found: set[str] = set()
    for code, _ in _codes(answer):
        found.update(code.co_names)
    return found


def open_helpers(answer: Any) -> list[str]:
    """Names of the functions that an answer calls, written beside it in the notebook, that are still stubs."""
    found = []
    for code, space in _codes(answer):
        for name in code.co_names:
            helper = space.get(name)
            if isinstance(helper, FunctionType) and is_stub(helper) and name not in found:
                found.append(name)
    return found


def _codes(answer: Any) -> Iterator[tuple[CodeType, dict]]:
    """The code of an answer, of what is nested in it, and of the functions of its own module that it calls."""
    function = inspect.unwrap(answer) if callable(answer) else answer
    function = getattr(function, "func", function)
    waiting, seen = [function], set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            yield code, function.__globals__
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
            beside = (function.__globals__.get(name) for name in code.co_names)
            waiting += [h for h in beside if getattr(h, "__module__", None) == function.__module__]


def where(error: BaseException, answer: Any) -> str:
    """ ", in line 3 (forward_kl): the line" for the innermost line of the learner's own code, as HTML; "" if there is none."""
    code = _code(answer)
    file = code.co_filename if code else ""
    steps = [(frame, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    own = [(f, n) for f, n in steps if f.f_code.co_filename == file or f.f_globals.get("__name__") == "__main__"]
    if not own:
        return ""
    frame, number = own[-1]
    text = linecache.getline(frame.f_code.co_filename, number).strip()
    shown = f": <code>{html.escape(text, quote=False)}</code>" if text else ""
    return f", in line {number} ({html.escape(frame.f_code.co_name)}){shown}"


# ---- comparing


def unlike(got: Observation, want: Observation) -> str | None:
    """A sentence (HTML) if the answer's results cannot be compared with the right ones."""
    tensor = isinstance(want.raw, Tensor)
    single = "True or False" if isinstance(want.raw, bool) else "a single number"
    if not got.values or (tensor and isinstance(got.raw, list | tuple) and len(got.values) != 1):
        many = single if len(want.values) == 1 else f"{len(want.values)} numbers or tensors"
        asked = "a torch tensor" if tensor else many
        return f"Your answer is a {type(got.raw).__name__}; {asked} is asked for"
    if len(got.values) != len(want.values):
        return f"Your answer holds {len(got.values)} numbers or tensors; {len(want.values)} are asked for"
    for g, w in zip(got.values, want.values, strict=True):
        if g.shape != w.shape:
            asked = tuple(w.shape) if tensor or w.dim() else single
            return f"Your answer has shape {tuple(g.shape)}; {asked} is asked for"
        if w.dtype == torch.bool and g.dtype != torch.bool:
            kind = str(g.dtype).removeprefix("torch.")
            return f"Your answer holds {kind} numbers; True and False are asked for (a boolean)"
    return None


def as_asked(got: Observation, want: Observation) -> Observation:
    """An answer as the list of numbers that is asked for, where it is a tensor (or array) of them."""
    many = isinstance(want.raw, list | tuple) and all(value.dim() == 0 for value in want.values)
    if many and len(got.values) == 1 and got.values[0].shape == (len(want.values),):
        return dataclasses.replace(got, values=list(got.values[0]))
    return got


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors agree within rounding, nan with nan."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x.double(), y.double(), rtol=RTOL, atol=ATOL, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def agree(got: Observation, want: Observation) -> bool:
    """Whether values and gradients agree."""
    return same(got.values, want.values) and same(got.gradients, want.gradients)


def difference(got: Observation, want: Observation) -> str:
    """The first number that differs, in a sentence."""
    if same(got.values, want.values):
        if any(
            isinstance(v, np.ndarray | np.generic)
            for v in (got.raw if isinstance(got.raw, list | tuple) else [got.raw])
        ):
            return "Your values are right, but NumPy carries no gradient: compute and return torch tensors"
        return "Your values are right, but not their gradient: look at what is detached and what is not"
    pairs = list(zip(got.values, want.values, strict=True))
    number, (g, w) = next((i, (g, w)) for i, (g, w) in enumerate(pairs) if not same([g], [w]))
    place = int((g.double() - w.double()).abs().nan_to_num(torch.inf).argmax())
    asked, found = (
        str(t.flatten()[place].item()) if t.dtype == torch.bool else f"{t.flatten()[place]:.6g}" for t in (w, g)
    )
    said = f"Expected {asked}, got {found}"
    if len(pairs) == g.numel() == 1:
        return said
    which = (
        f"entry {number} of {len(pairs)}" if all(w.dim() == 0 for _, w in pairs) else f"entry {place} of {g.numel()}"
    )
    which += f", of tensor {number} of {len(pairs)}" if len(pairs) > 1 and w.dim() else ""
    return f"{said} ({which})"
