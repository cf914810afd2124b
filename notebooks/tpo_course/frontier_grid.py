"""The runs of the frontier lab that are stored: a grid of settings and its presets, trained on `tpo_course.frontier`'s bench.

    python -m tpo_course.frontier_grid       # makes the grid again, some minutes: frontier.json beside this file

The grid is one JSON object, small enough to be read by a web page, whole numbers where many are stored:

    version     1; another number is another format
    world       the arguments of `TokenWorld`: vocab_size, horizon, seed, num_prompts
    tokens      V names: ["a", "b", "EOS"]
    states      S names, "x0", "x1", "x0 a", ...: prompt and prefix of every state, in the order of all (S, V) tables below
    ref         S * V probabilities pi_ref(a|s) in 1e-5, row by row (state by state)
    reward      S * V token rewards R(s, a) in 1e-3
    updates     at which updates of training a path has a point; the first is 0, pi_ref, the last is its end
    front       {"beta": [...], "kl": [...], "return": [...]}: the exact Pareto front, KL(pi || pi_ref) in 1e-3 nats and expected
                return in 1e-3 units of reward of pi*_beta, beta falling; no policy lies above it
    axes        {"beta": [...], "alpha": [...], "guide": [{"beta", "updates"}, ...], "data": [{"pairs", "noise"}, ...]}
                updates null: the guide is pi*_beta itself; pairs null: all pairs, exactly; noise: share of labels swapped
    reads       {objective: the axes it has, in the order of its keys}: {"dpo": ["beta", "data"], ...}
    runs        {objective: {key: run}}, key = the places on those axes, counted from 0, with commas: "2,0"
    optima      {objective: {key: [kl, return]}}, in the units of the front: in closed form where there is one, else where
                training comes to rest (`Bench.rest`), if it does
    presets     [{"objective", "setting", "optimum", and what a run has}, ...]: the runs of `frontier_presets` that are not on the
                grid, each once; setting: the fields in which it differs from `Setting()`; optimum: left out where there is none

A run is
    kl, return  its path, in the units of the front, one number per entry of `updates`
    logratio    S * V numbers log(pi/pi_ref) of its end in 1e-2 nats: pi = ref exp(logratio); beta times it is the implicit reward
    loss        at its end, in nats (IPO's is a square)
    floor       TGDPO alone: share of the tokens in the data whose weight f stands on the floor

TGDPO without a guide, and alpha = 0, is DPO: neither is stored twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path

import torch

from tpo_course.frontier import FIELDS, NAMES, READS, UPDATES, WORLD, Bench, Run, Setting, needed
from tpo_course.frontier_presets import PRESETS
from tpo_course.world import TokenWorld
from tpo_course.world_plots import token_names

GRID = Path(__file__).with_name("frontier.json")
AXES = {
    "beta": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    "alpha": [0.1, 0.25, 0.5, 1.0, 2.0],
    "guide": [(0.2, None), (1.0, None), (1.0, 20)],
    "data": [(None, 0.0), (300, 0.0), (30, 0.0), (None, 0.2), (None, 1.0)],
}


def places() -> Iterator[tuple[str, str, Setting]]:
    """(objective, key, setting) of every run of the grid."""
    for name, axes in READS.items():
        for at in product(*(range(len(AXES[axis])) for axis in axes)):
            values: dict = {}
            for axis, place in zip(axes, at, strict=True):
                given = AXES[axis][place]
                values |= dict(zip(FIELDS[axis], given if isinstance(given, tuple) else (given,), strict=True))
            yield name, ",".join(map(str, at)), Setting(**values)


def on_axes(setting: Setting) -> dict[str, float | dict]:
    """{axis: its value as the grid names it} of a setting, on the grid or off it; the guide's says `run_beta` where it is true.

    Example:
        >>> on_axes(Setting(beta=0.05))["beta"], on_axes(Setting(pairs=10))["data"]
        (0.05, {'pairs': 10, 'noise': 0.0})
    """
    given = {axis: tuple(getattr(setting, name) for name in FIELDS[axis]) for axis in AXES}
    values = {axis: _named(axis, value if len(value) > 1 else value[0]) for axis, value in given.items()}
    return values | {"guide": values["guide"] | {"run_beta": True}} if setting.run_beta else values


def off_grid() -> list[tuple[str, Setting]]:
    """(objective, `needed` setting) of every run of the presets that the grid does not have, each once."""
    there = {needed(name, setting) for name, _, setting in places()}
    wanted = dict.fromkeys(needed(name, preset.setting) for preset in PRESETS.values() for name in NAMES)
    return [each for each in wanted if each not in there]


def stored(run: Run) -> dict:
    """A run as the grid has it."""
    kept = {
        "kl": _whole(run.kl, 3),
        "return": _whole(run.returns, 3),
        "logratio": _whole(run.logratio.flatten().tolist(), 2),
    }
    kept["loss"] = round(run.loss, 4)
    return kept if run.floor is None else kept | {"floor": round(run.floor, 3)}


def restored(kept: dict) -> Run:
    """The run that `stored` has rounded: within .0005 nats and units of reward, log-ratios within .005 nats."""
    logratio = torch.tensor(kept["logratio"], dtype=torch.float64).view(-1, WORLD["vocab_size"]) / 100
    ways = ([value / 1000 for value in kept[name]] for name in ("kl", "return"))
    return Run(*ways, logratio, kept["loss"], kept.get("floor"))


def _whole(values: list[float], digits: int) -> list[int]:
    return [round(value * 10**digits) for value in values]


def preset_runs(bench: Bench) -> list[dict]:
    """The part "presets", trained anew."""
    kept = []
    for name, setting in off_grid():
        changed = {field: value for field, value in asdict(setting).items() if value != getattr(Setting(), field)}
        best = bench.optimum(name, setting) or bench.rest(name, setting)
        kept.append({"objective": name, "setting": changed} | ({"optimum": _whole(list(best), 3)} if best else {}))
        kept[-1] |= stored(bench.train(name, setting))
    return kept


def build(progress: Callable[[str], None] = lambda words: None) -> dict:
    """The grid, trained anew: see the top of this module."""
    world = TokenWorld(**WORLD)
    bench = Bench(world)
    runs: dict[str, dict] = {name: {} for name in NAMES}
    optima: dict[str, dict] = {name: {} for name in NAMES}
    for count, (name, key, setting) in enumerate(places()):
        runs[name][key] = stored(bench.train(name, setting))
        if best := bench.optimum(name, setting) or bench.rest(name, setting):
            optima[name][key] = _whole(list(best), 3)
        if count % 100 == 99:
            progress(f"{count + 1} runs")
    betas, kls, returns = zip(*bench.front, strict=True)
    axes = {axis: [_named(axis, value) for value in values] for axis, values in AXES.items()}
    return {
        "version": 1,
        "world": WORLD,
        "tokens": token_names(world),
        "states": state_names(world),
        "ref": _whole(world.ref_logps.exp().flatten().tolist(), 5),
        "reward": _whole(world.reward.flatten().tolist(), 3),
        "updates": list(UPDATES),
        "front": {"beta": [float(f"{b:.4g}") for b in betas], "kl": _whole(kls, 3), "return": _whole(returns, 3)},
        "axes": axes,
        "reads": READS,
        "runs": runs,
        "optima": {name: found for name, found in optima.items() if found},
        "presets": preset_runs(bench),
    }


def _named(axis: str, value) -> float | dict:
    names = [field.removeprefix("guide_") for field in FIELDS[axis]]
    return dict(zip(names, value, strict=True)) if isinstance(value, tuple) else value


def state_names(world: TokenWorld) -> list[str]:
    """The prefix of every state, in the order of the tables; of several prompts with the prompt's number before it.

    Example:
        >>> state_names(TokenWorld(3, 2, seed=0, num_prompts=1))
        ['', 'a', 'b']
    """
    names, tokens = [], token_names(world)[: world.width]
    for depth in range(world.horizon):
        for prompt in range(world.num_prompts):
            before = [f"x{prompt}"] if world.num_prompts > 1 else []
            names += [" ".join([*before, *prefix]) for prefix in product(tokens, repeat=depth)]
    return names


@cache
def grid() -> dict[tuple[str, Setting], Run]:
    """What is stored: {needed(objective, setting): run}."""
    kept = json.loads(GRID.read_text(encoding="utf-8"))
    runs = {needed(name, setting): restored(kept["runs"][name][key]) for name, key, setting in places()}
    return runs | {needed(run["objective"], Setting(**run["setting"])): restored(run) for run in kept["presets"]}


@cache
def optima() -> dict[tuple[str, Setting], tuple[float, float]]:
    """What is stored: {needed(objective, setting): KL in nats and return of its optimum}."""
    kept = json.loads(GRID.read_text(encoding="utf-8"))
    found = {
        needed(name, s): kept["optima"][name][key] for name, key, s in places() if key in kept["optima"].get(name, ())
    }
    off = {
        needed(run["objective"], Setting(**run["setting"])): run["optimum"]
        for run in kept["presets"]
        if "optimum" in run
    }
    return {key: (kl / 1000, earned / 1000) for key, (kl, earned) in (found | off).items()}


def main() -> None:
    """Make the grid and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m tpo_course.frontier_grid", description="make the frontier lab's grid again"
    )
    parser.add_argument("--out", type=Path, default=GRID, help="where to write it (default: where the lab reads it)")
    out = parser.parse_args().out
    out.write_text(json.dumps(build(print), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
