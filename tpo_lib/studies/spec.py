"""A study as its file has it, and the runs that it asks for.

title, question, primary
[data]     fields of `bench.Data`
[train]    settings of every run
[tune]     seed, at, samples: every setting of a method's grid once, on validation prompts
[report]   seeds, at, samples, measures: what was chosen, on test prompts
[[method]] name, loss_type and settings; with grid = {setting: [values]} it is tuned, with each = "alpha" also for every
           value of alpha by itself; ratio = {gamma = [0.25, "beta"]} ties one setting to another; like = "NAME" takes what
           was chosen for another method, tuned = "STUDY: LABEL" what another study chose for it;
           guide = {settings} are those in which its guide's run differs; data = {fields} those of its own pairs
[[endpoint]], [[hypothesis]]  see `analysis`

What was said of a study after its results had been read stands in claims/after.toml beside it. It decides nothing, and no digest
has it, so that a result stays the answer to the file that asked for it.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from tpo_lib.config import run_settings
from tpo_lib.files import store
from tpo_lib.files.own_code import is_own
from tpo_lib.losses import OBJECTIVES
from tpo_lib.studies.bench import Data

FOLDER = Path("studies")
AS_IT_IS = ("guide_data", "guided_by", "match", "kl")  # of a run's spec
ONLINE = ("ppo", "rloo")  # their settings are those of PPOConfig, and none of [train]
SAID_AFTER = {"words", "paper", "source", "caveat", "verdict", "beside"}  # of a claim, in claims/after.toml
OF_METHOD = {"name", "loss_type", "grid", "each", "ratio", "like", "tuned", "guide", "data", "also"}


@dataclass(frozen=True)
class Method:
    """A row of a study: an objective with settings, or a grid of them."""

    name: str
    loss_type: str | None = None
    grid: dict = field(default_factory=dict)
    each: str | None = None
    ratio: dict = field(default_factory=dict)
    like: str | None = None
    tuned: str | None = None
    guide: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    also: dict = field(default_factory=dict)  # what its runs' specs have beside that: those of AS_IT_IS
    fixed: dict = field(default_factory=dict)  # all other settings

    @classmethod
    def read(cls, row: Mapping) -> Method:
        """From a table of the file; what is no field is a setting of its runs."""
        also = {name: value for name, value in row.items() if name in AS_IT_IS}
        fixed = {name: value for name, value in row.items() if name not in OF_METHOD | also.keys()}
        return cls(**{name: value for name, value in row.items() if name in OF_METHOD}, also=also, fixed=fixed)

    def settings(self) -> list[dict]:
        """Every setting of the grid, of a method without one the only one."""
        made = []
        for values in itertools.product(*self.grid.values()):
            found = {"loss_type": self.loss_type} | self.fixed | dict(zip(self.grid, values, strict=True))
            made.append(found | {name: share * found[other] for name, (share, other) in self.ratio.items()})
        return made


@dataclass(frozen=True)
class Study:
    """A study: its file, read."""

    name: str
    title: str
    question: str
    primary: str
    number: int  # in the plan
    data: dict
    train: dict
    tune: dict
    report: dict
    methods: tuple[Method, ...]
    endpoints: tuple[dict, ...]
    hypotheses: tuple[dict, ...]
    after: dict = field(default_factory=dict)  # "by_the_clock", "caption", "claims" {claim: {of SAID_AFTER}}

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study's file.

        Raises:
            FileNotFoundError, ValueError: it is not there, is no TOML, or names something that there is not.
        """
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in path.parent.glob("*.toml"))) or "none"
            raise FileNotFoundError(f"{path}: there is no such study; there are {known}")
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            methods = tuple(map(Method.read, found.pop("method")))
            more = {
                f"{plural}": tuple(found.pop(one, ()))
                for one, plural in (("endpoint", "endpoints"), ("hypothesis", "hypotheses"))
            }
            more["after"] = _after(path)
            study = cls(path.stem, methods=methods, **more, **{"data": {}, "train": {}, "tune": {}} | found)
        except (tomllib.TOMLDecodeError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no study: {error}; studies/PLAN.md and tpo_lib/studies/spec.py say what one has"
            ) from error
        study.check(path)
        return study

    def check(self, path: Path) -> None:
        """Raise ValueError, naming the file, where the runs cannot be made as they are described."""
        names = [method.name for method in self.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{path}: there are two methods {name!r}; give one another name")
        for method in self.methods:
            others = [method.like] if method.like else []
            if others and others[0] not in names:
                raise ValueError(
                    f"{path}: {method.name!r} is like {others[0]!r}, which is no method here; there are {', '.join(names)}"
                )
            if method.grid and not self.tune and [*method.grid] != [method.each]:
                raise ValueError(
                    f"{path}: {method.name!r} has a grid and there is no [tune]; add it, or settle the settings"
                )
            if not (method.loss_type or method.like or method.tuned):
                raise ValueError(f"{path}: {method.name!r} has no loss_type")
            known = [*OBJECTIVES, *ONLINE]
            if method.loss_type and method.loss_type not in known and not is_own(method.loss_type):
                what = f"{method.name!r} has loss_type {method.loss_type!r}"
                raise ValueError(f"{path}: {what}; choose one of {', '.join(known)}, or FILE.py:NAME")
        for claim, row in self.after.get("claims", {}).items():
            if claim not in {each["claim"] for each in self.hypotheses} or not {*row} <= SAID_AFTER:
                what = f"claims/after.toml has {', '.join(row)} of {claim!r}"
                raise ValueError(f"{path}: {what}; name one of its claims, and of it {', '.join(sorted(SAID_AFTER))}")
        steps = self.train.get("max_steps")
        for part in ("tune", "report"):
            at = getattr(self, part).get("at", [steps])
            if sorted(set(at)) != at or at[-1] != steps:
                raise ValueError(
                    f"{path}: [{part}] at = {at} must rise to max_steps = {steps}, so that the end is evaluated"
                )

    @cached_property
    def digest(self) -> str:
        """Of all that the file asks: the runs, what is read off them, what is claimed."""
        return store.content_key({name: value for name, value in asdict(self).items() if name != "after"})

    @property
    def claims(self) -> tuple[dict, ...]:
        """The hypotheses as tables show them: with what was said of them after their results had been read."""
        later = self.after.get("claims", {})
        found = [claim | later.get(claim["claim"], {}) for claim in self.hypotheses]
        return tuple(claim | {"claim": claim.get("words", claim["claim"])} for claim in found)

    def tuning(self) -> list[tuple[Method, dict, dict]]:
        """(method, setting, spec) of every run of the grids."""
        seed, how = self.tune.get("seed", 0), {"on": "validation"} | self.tune
        return [
            (method, setting, self.spec(method, setting, seed, how))
            for method in self.methods
            if method.grid and self.tune
            for setting in method.settings()
        ]

    def reporting(self, chosen: Mapping[str, tuple[str, dict]]) -> list[tuple[str, int, dict]]:
        """(label, seed, spec) of every run that is reported; `chosen` holds {label: (method, setting)}."""
        by_name = {method.name: method for method in self.methods}
        how = {"on": "test"} | self.report
        return [
            (label, seed, self.spec(by_name[name], setting, seed, how))
            for label, (name, setting) in chosen.items()
            for seed in self.report["seeds"]
        ]

    def best_of(self) -> dict | None:
        """The spec of the best-of-n reference, where [report] has best_of = the largest n."""
        if "best_of" not in self.report:
            return None
        evaluate = {"on": "test", "at": [0], "samples": 2 * self.report["best_of"], "seed": self.report["seeds"][0]}
        return {
            "data": {"seed": self.report["seeds"][0]} | self.data,
            "best_of": self.report["best_of"],
            "evaluate": evaluate,
        }

    def spec(self, method: Method, setting: Mapping, seed: int, how: Mapping) -> dict:
        """The spec of one run, as `execute` takes it."""
        train, online = self.train | setting | {"seed": seed, "epochs": 1000}, None  # as many passes as max_steps takes
        if setting["loss_type"] in ONLINE:
            online = {name: value for name, value in setting.items() if name != "loss_type"}
            online |= {"estimator": setting["loss_type"], "seed": seed}
        steps = online["updates"] if online else train["max_steps"]
        at = [step for step in how["at"] if step < steps] + [steps]
        evaluate = {"on": how["on"], "at": at, "samples": how["samples"], "seed": seed}
        data = {"seed": seed} | self.data | method.data
        Data(**data)
        made = {"data": data, "evaluate": evaluate} | ({"online": online} if online else {"train": train})
        if how.get("measures"):
            made["measures"] = list(how["measures"])
        if online:
            return made
        if method.guide or "guide_beta" in train or "match" in method.also:
            # an objective of its own says what it takes; a guide takes what every run does
            shared = {name: value for name, value in train.items() if name in run_settings()}
            beta = train.get("guide_beta") or method.also.get("match", {}).get("guide_beta")
            made["guide"] = shared | {"loss_type": "dpo", "beta": beta} | method.guide
        return made | method.also


def _after(path: Path) -> dict:
    place = path.parent / "claims" / "after.toml"
    if not place.is_file():
        return {}
    found = tomllib.loads(place.read_text(encoding="utf-8"))
    rows = [dict(row) for row in found.get("claim", ())]
    claims = {row.pop("claim"): row for row in rows if row.pop("study") == path.stem}
    caption = found.get("caption", {}).get(path.stem, "")
    return {"by_the_clock": path.stem in found.get("by_the_clock", ()), "caption": caption, "claims": claims}
