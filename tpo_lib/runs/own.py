"""Objectives and rewards from files of your own, tried before anything is loaded or trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tpo_lib import losses, rewards
from tpo_lib.config import TrainConfig
from tpo_lib.files.own_code import guarded, is_own, load, title
from tpo_lib.files.store import content_key
from tpo_lib.losses import Hyperparameter, Objective
from tpo_lib.rewards import Reward, probe
from tpo_lib.types import LossOutput, TokenStats

OPTIONAL = ("ref_logps", "kl", "guide_logps")  # statistics that not every objective asks for
FILES: dict[str, str] = {}  # title of an objective of one's own -> where it was loaded from, FOLDER/FILE.py:NAME


def register(objective: Objective, name: str | None = None) -> str:
    """Add an objective of your own; returns its name, which is that of its function unless one is given.

    Raises:
        ValueError: there is another objective of that name, its hyperparameters are not its function's keywords, or it
            needs what there is not.
    """
    name = name or objective.fn.__name__
    if losses.OBJECTIVES.get(name, objective) != objective:
        raise ValueError(f"there is an objective {name!r} already; give yours another name")
    _check_record(name, objective)
    losses.OBJECTIVES[name] = objective
    return name


def load_objective(spec: str) -> str:
    """Execute the file and register its objective, a function (chosen, rejected, *, ...) or a record; returns its `title`.

    A function's record is made from it: `needs` is what it reads in a trial, hyperparameters are its keywords.

    Raises:
        OSError, ValueError: there is no such file or name, or what stands there is no objective; the trial says why.
    """
    found, digest = load(spec)
    record = found if isinstance(found, Objective) else _record(spec, found)
    record = replace(record, fn=guarded(spec, record.fn), label=record.label or title(spec), source=digest)
    try:
        _check_record(title(spec), record)
        defaults = {name: 1.0 if h.default is None else h.default for name, h in record.hyperparameters.items()}
        read = _try(spec, record.fn, defaults, OPTIONAL)
    except TypeError as error:
        raise ValueError(f"{spec} cannot be called as (chosen, rejected, *, ...): {error}") from error
    if record.needs == () and not isinstance(found, Objective):
        record = replace(record, needs=tuple(name for name in OPTIONAL if name in read))
    losses.OBJECTIVES[title(spec)] = record  # a second time where the file has changed since
    FILES[title(spec)] = str(Path(spec).resolve())
    return title(spec)


def load_reward(spec: str) -> Reward:
    """Execute the file and take its function texts -> scores as a reward; it may have a `name`, a `scope` and a `fingerprint`.

    The fingerprint is the file's otherwise: give it one of its own where scores depend on more than the file.

    Raises:
        OSError, ValueError: there is no such file or name, or what stands there does not score two texts.
    """
    found, digest = load(spec)
    if not callable(found):
        raise ValueError(f"{spec} is a {type(found).__name__}, not a function texts -> scores")
    reward = guarded(spec, found)
    reward.name = getattr(found, "name", title(spec))
    reward.scope = getattr(found, "scope", "response")
    reward.fingerprint = getattr(found, "fingerprint", content_key({"file": digest, "name": title(spec)}))
    probe(reward)
    return reward


def scorer(name: str, device) -> Reward:
    """A reward by folder or hub name, or one of your own by FILE.py:NAME."""
    return load_reward(name) if is_own(name) else rewards.load_reward(name, device=device)


def check_loss(loss: Callable, config: TrainConfig) -> None:
    """Raise ValueError, or what the loss itself raises, where it is none, or reads what the config's objective does not bring."""
    needs, given = losses.OBJECTIVES[config.loss_type].needs, config.hyperparameters()
    try:
        inspect.signature(loss, follow_wrapped=False).bind(None, None, **given)
    except TypeError as error:
        called = ", ".join(("chosen", "rejected", *(f"{name}={value}" for name, value in given.items())))
        fix = f"it is given the hyperparameters of {config.loss_type}, and needs a value of its own for every other"
        raise ValueError(f"{_name(loss)} cannot be called as ({called}), {error}: {fix}") from error
    _try(_name(loss), loss, given, needs, f"{config.loss_type} has {', '.join(('logps', *needs))}")


def described(loss: Callable) -> dict:
    """What a run records of a loss: its name; a digest of its source and of what it names: functions beside it, numbers, words.

    Raises:
        ValueError: it has no source.
    """
    sources, todo = {}, [loss]
    while todo:
        each = todo.pop()
        try:
            found = inspect.getclosurevars(each)
            text = inspect.getsource(each)
        except (OSError, TypeError) as error:
            fix = "write it with def in a file or a cell, or leave output_dir out"
            raise ValueError(
                f"a run's folder records its loss by its source, and {_name(each)} has none: {fix}"
            ) from error
        named = found.globals | found.nonlocals
        plain = {name: value for name, value in named.items() if isinstance(value, int | float | str)}
        sources[each] = [text, repr(sorted(plain.items()))]
        near = (value for value in named.values() if inspect.isfunction(value) and value.__module__ == loss.__module__)
        todo += [value for value in near if value not in sources]
    return {"name": _name(loss), "sha256": content_key(sorted(sources.values()))}


def check_unchanged(objective: str, recorded: dict | None) -> None:
    """Refuse an objective whose file has changed since a run was trained with it, or that it had another loss than."""
    now = losses.OBJECTIVES[objective].source
    if recorded and now is None:
        loss = f"{recorded['name']} (sha256 {recorded['sha256'][:12]})"
        raise ValueError(
            f"the run was trained with a loss given in Python, {loss}, and not with {objective}'s: evaluate it there"
        )
    if recorded and recorded["sha256"] != now:
        digests = f"sha256 {recorded['sha256'][:12]}, now {now[:12]}"
        raise ValueError(f"{objective} has changed since the run was trained with it ({digests}): bring that file back")


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _check_record(name: str, objective: Objective) -> None:
    """Raise ValueError where hyperparameters and keywords of the function differ, or a need is none."""
    keywords = [p.name for p in inspect.signature(objective.fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if keywords != list(objective.hyperparameters):
        raise ValueError(
            f"objective {name!r} takes {', '.join(keywords) or 'nothing'} beside the statistics, its record says "
            f"{', '.join(objective.hyperparameters) or 'nothing'}; they must be the same, after a * in the signature"
        )
    if unknown := set(objective.needs) - losses.HOW_TO_GET.keys():
        raise ValueError(
            f"objective {name!r} needs {', '.join(sorted(unknown))}; there is {', '.join(losses.HOW_TO_GET)}"
        )


def _record(spec: str, fn: object) -> Objective:
    if not inspect.isfunction(fn):
        kind = type(fn).__name__
        raise ValueError(f"{spec} is a {kind}, neither a function (chosen, rejected, *, ...) nor an Objective")
    hyper = {}
    for name, keyword in inspect.signature(fn).parameters.items():
        if keyword.kind is keyword.KEYWORD_ONLY:
            default = None if keyword.default is keyword.empty else keyword.default
            hyper[name] = Hyperparameter(default, name, f"of {title(spec)}")
            if default is not None:
                hyper[name].check(f"{spec}: the default of {name}", default)
    return Objective(fn, hyperparameters=hyper)


def _try(spec: str, fn: Callable, hyperparameters: dict, has: Sequence[str], there: str = "") -> set[str]:
    """Call it on two pairs of three tokens whose statistics have those of OPTIONAL; returns the fields it read."""
    read: set[str] = set()

    class Watched(TokenStats):
        def __getattribute__(self, name: str):
            read.add(name)
            return super().__getattribute__(name)

    mask = torch.tensor([[True] * 3, [True, True, False]])

    def side(seed: int) -> TokenStats:
        draws = -torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(seed)) * mask
        known = dict(zip(OPTIONAL, (draws[1], -draws[2], draws[3]), strict=True))
        return Watched(
            draws[0].requires_grad_(), mask=mask, **{name: known[name] if name in has else None for name in OPTIONAL}
        )

    try:
        output = fn(side(0), side(1), **hyperparameters)
    except Exception as error:
        if absent := sorted(read & set(OPTIONAL) - set(has)):
            raise ValueError(
                f"{spec} reads {', '.join(absent)}, which is None here: {there}; choose another loss_type"
            ) from error
        raise
    if not isinstance(output, LossOutput):
        kind = type(output).__name__
        raise ValueError(f"{spec} returned a {kind}, not a LossOutput(loss, chosen_reward, rejected_reward)")
    for name in ("loss", "chosen_reward", "rejected_reward"):
        value = getattr(output, name)
        if not isinstance(value, torch.Tensor) or value.shape != (2,):
            found = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            fix = "it must be one number a pair, (2,), without a mean"
            raise ValueError(f"{spec} gave {name} as {found} for 2 pairs; {fix}")
    if not output.loss.requires_grad:
        raise ValueError(f"{spec}: no gradient reaches logps from its loss")
    if output.chosen_reward.requires_grad or output.rejected_reward.requires_grad:
        raise ValueError(f"{spec}: detach the rewards, which are logged alone")
    return read
