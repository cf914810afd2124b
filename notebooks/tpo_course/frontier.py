"""Where every objective ends in one exact world, and on which way: the numbers of the frontier lab.

    python -m tpo_course.frontier            # makes the grid again, some minutes: frontier.json beside this file

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
    optima      {objective: {key: [kl, return]}}, in the units of the front, where there is one in closed form

A run is
    kl, return  its path, in the units of the front, one number per entry of `updates`
    logratio    S * V numbers log(pi/pi_ref) of its end in 1e-2 nats: pi = ref exp(logratio); beta times it is the implicit reward
    loss        at its end, in nats (IPO's is a square)
    floor       TGDPO alone: share of the tokens in the data whose weight f stands on the floor

TGDPO without a guide, and alpha = 0, is DPO: neither is stored twice. All runs start from pi_ref and take 200 updates of Adam
with a learning rate of .1 on the whole data; that is the end of training for most, and where it is not the loss still falls.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld
from tpo_course.world_plots import kl_and_return, token_names
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.types import LossOutput, TokenStats

GRID = Path(__file__).with_name("frontier.json")
WORLD = {"vocab_size": 3, "horizon": 3, "seed": 0, "num_prompts": 2}  # where `widgets.step_through` starts
NAMES = ("dpo", "tdpo1", "tdpo2", "tgdpo", "ipo")  # SimPO's beta is of another scale, and it has no reference
UPDATES = (0, 1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100, 140, 200)
LR = 0.1
MOST_PAIRS = 10_000
FRONT = [100 * 0.9**i for i in range(90)]  # betas, from nearly pi_ref to nearly the best return there is
AXES = {
    "beta": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    "alpha": [0.1, 0.25, 0.5, 1.0, 2.0],
    "guide": [(0.2, None), (1.0, None), (1.0, 20)],
    "data": [(None, 0.0), (300, 0.0), (30, 0.0), (None, 0.2), (None, 1.0)],
}
FIELDS = {"beta": ("beta",), "alpha": ("alpha",), "guide": ("guide_beta", "guide_updates"), "data": ("pairs", "noise")}
READS = {name: ["beta", "data"] for name in NAMES}
READS["tdpo2"], READS["tgdpo"] = ["beta", "data", "alpha"], ["beta", "data", "alpha", "guide"]


@dataclass(frozen=True)
class Setting:
    """What a run is trained with.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    beta: float = 0.5  # > 0, in units of reward per nat
    alpha: float = 0.5  # >= 0, of TDPO2 and TGDPO
    guide_beta: float | None = 1.0  # what the guide was trained with; None: no guide
    guide_updates: int | None = None  # how long; None: it is the optimum itself
    run_beta: bool = False  # r_hat of the run's beta instead of the guide's
    pairs: int | None = None  # drawn with replacement; None: all, with their exact weights
    noise: float = 0.0  # share of the labels that is swapped, 0 to 1

    def __post_init__(self) -> None:
        for name, good, asked in (
            ("beta", self.beta > 0, "be above 0"),
            ("alpha", self.alpha >= 0, "be at least 0"),
            ("guide_beta", self.guide_beta is None or self.guide_beta > 0, "be above 0, or None for no guide"),
            (
                "guide_updates",
                self.guide_updates is None or self.guide_updates > 0,
                "be above 0, or None for its optimum",
            ),
            ("pairs", self.pairs is None or 0 < self.pairs <= MOST_PAIRS, f"be 1 to {MOST_PAIRS:,}, or None for all"),
            ("noise", 0 <= self.noise <= 1, "lie in 0 to 1"),
        ):
            if not good:
                raise ValueError(f"{name}={getattr(self, name)} must {asked}")


def needed(objective: str, setting: Setting) -> tuple[str, Setting]:
    """The same run with all that it does not read put back: what is equal here ends at the same place.

    Example:
        >>> needed("tgdpo", Setting(alpha=0)) == needed("dpo", Setting(alpha=2.0))
        True
    """
    if objective == "tgdpo" and (setting.guide_beta is None or setting.alpha == 0):
        objective = "dpo"
    if objective == "tdpo2" and setting.alpha == 0:
        objective = "dpo"
    read = {field for axis in READS[objective] for field in FIELDS[axis]}
    read |= {"run_beta"} if objective == "tgdpo" else set()
    return objective, replace(Setting(), **{field: getattr(setting, field) for field in read})


@dataclass(frozen=True)
class Run:
    """A way and its end."""

    kl: list[float]  # nats, at UPDATES
    returns: list[float]  # units of reward
    logratio: Tensor  # (S, V) log(pi/pi_ref) of the end
    loss: float
    floor: float | None  # share of tokens whose f stands on TGDPO's floor

    @property
    def end(self) -> tuple[float, float]:
        """KL and return of the last update."""
        return self.kl[-1], self.returns[-1]


class Stale(Exception):
    """Training was left since `stale()` said so."""


class Bench:
    """A world, and all that can be trained in it.

    Example:
        >>> bench = Bench(TokenWorld(**WORLD))
        >>> trained = bench.train("tdpo1", Setting(beta=0.5)).end  # in .1 s
        >>> [round(x, 2) for x in trained], [round(x, 2) for x in bench.optimum("tdpo1", Setting(beta=0.5))]
        ([0.87, 1.04], [0.87, 1.04])
    """

    def __init__(self, world: TokenWorld) -> None:
        self.world = world
        rows = world.responses
        self._index = rows.states, rows.tokens.clamp_min(0)
        self._ref = world.tokenwise(world.ref_logps)  # (R, T)
        self.guide, self.data = cache(self._guide), cache(self._data)

    @cached_property
    def front(self) -> list[tuple[float, float, float]]:
        """(beta, KL, return) of pi*_beta, beta falling."""
        return [(beta, *kl_and_return(self.world, self.world.soft_optimum(beta)[1])) for beta in FRONT]

    def train(self, objective: str, setting: Setting) -> Run:
        """200 updates of Adam from pi_ref; one objective of `train_all`."""
        return self.train_all([objective], setting)[objective]

    def train_all(
        self, objectives: Sequence[str], setting: Setting, stale: Callable[[], bool] = lambda: False
    ) -> dict[str, Run]:
        """Every objective's run. Adam moves each number by itself, so together they go where they go alone, in less time.

        Args:
            objectives: some of NAMES.
            stale: asked before every update.

        Raises:
            Stale: `stale()` was true.
        """
        data, paths = self.data(setting.pairs, setting.noise), []
        losses = [self._loss(*needed(name, setting), *data[:2]) for name in objectives]

        def note(step: int, logps: Tensor) -> None:
            if stale():
                raise Stale
            if step in UPDATES:
                paths.append([kl_and_return(self.world, table) for table in logps])

        ends = self._descend(losses, data[2], UPDATES[-1], note)
        paths.append([kl_and_return(self.world, table) for table in ends])
        return {
            name: self._run(list(path), table, loss(table), *data)
            for name, path, table, loss in zip(objectives, zip(*paths, strict=True), ends, losses, strict=True)
        }

    def _run(
        self, path: list, logps: Tensor, output: LossOutput, chosen: Tensor, rejected: Tensor, weight: Tensor
    ) -> Run:
        floor = None
        if output.token_weights is not None:
            drawn = self.world.responses.mask[torch.cat([chosen, rejected])] * weight.repeat(2)[:, None]
            floor = float(drawn[output.token_weights <= F_FLOOR].sum() / drawn.sum())
        kls, returns = map(list, zip(*path, strict=True))
        return Run(kls, returns, logps - self.world.ref_logps, float((weight * output.loss).sum()), floor)

    def optimum(self, objective: str, setting: Setting) -> tuple[float, float] | None:
        """KL and return of the minimum of the loss where it has a closed form, else None.

        DPO's is pi*_beta and TDPO1's pi*_one, both for all pairs, rightly labelled; IPO's is that of a least-squares problem.
        """
        objective, setting = needed(objective, setting)
        exact = setting.pairs is None and setting.noise == 0
        if objective == "dpo" and exact:
            return kl_and_return(self.world, self.world.soft_optimum(setting.beta)[1])
        if objective == "tdpo1" and exact:
            return kl_and_return(self.world, self.world.one_step_optimum(setting.beta))
        return self._ipo_optimum(setting) if objective == "ipo" else None

    def _ipo_optimum(self, setting: Setting) -> tuple[float, float] | None:
        """Of sum_pairs weight (h_w - h_l - 1/(2 beta))^2, h = log(pi/pi_ref) of a response; None if pairs leave h open."""
        chosen, rejected, weight = self.data(setting.pairs, setting.noise)
        count = len(self._ref)
        signs = torch.zeros(len(chosen), count, dtype=torch.float64)
        signs[torch.arange(len(chosen)), chosen] = 1.0
        signs[torch.arange(len(chosen)), rejected] = -1.0
        laplacian = signs.T @ (weight[:, None] * signs)  # (R, R); of every prompt one h is free
        if torch.linalg.matrix_rank(laplacian) < count - self.world.num_prompts:
            return None
        h = torch.linalg.pinv(laplacian, hermitian=True) @ (signs.T @ weight) / (2 * setting.beta)
        tilted = self.world.by_prompt(self.world.sequence_logps(self.world.ref_logps) + h).log_softmax(-1)
        return kl_and_return(self.world, self.world.factorise(tilted.flatten()))

    def _data(self, pairs: int | None, noise: float) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) chosen, rejected: rows of `responses`; (B,) weights, their sum 1. More pairs begin with those of fewer."""
        known = self.world.pairs
        table = torch.zeros(len(self._ref), len(self._ref), dtype=torch.float64)  # (R, R): chosen, rejected
        if pairs is None:
            table[known.chosen, known.rejected] = known.weight
            table = (1 - noise) * table + noise * table.T
        else:
            draw = torch.Generator().manual_seed(self.world.seed)
            at, flip = torch.rand((2, MOST_PAIRS), generator=draw, dtype=torch.float64)[:, :pairs]
            rows = torch.searchsorted(known.weight.cumsum(0), at).clamp_max(len(known.weight) - 1)
            first, second = known.chosen[rows], known.rejected[rows]
            swapped = flip < noise
            pair = torch.where(swapped, second, first), torch.where(swapped, first, second)
            table.index_put_(pair, torch.full_like(at, 1 / pairs), accumulate=True)
        chosen, rejected = table.nonzero(as_tuple=True)
        return chosen, rejected, table[chosen, rejected]

    def _guide(self, beta: float, updates: int | None, pairs: int | None, noise: float) -> Tensor:
        """(S, V) log-probabilities of a DPO model: the optimum, or trained on the same data for so long."""
        if updates is None:
            return self.world.soft_optimum(beta)[1]
        chosen, rejected, weight = self.data(pairs, noise)
        return self._descend([self._loss("dpo", Setting(beta=beta), chosen, rejected)], weight, updates)[0]

    def _descend(self, losses: Sequence[Callable], weight: Tensor, updates: int, note=None) -> Tensor:
        """(K, S, V) log-probabilities of K losses' policies after so many updates from pi_ref."""

        def mean(logits: Tensor) -> Tensor:
            tables = logits.log_softmax(-1).unbind()  # K of (S, V)
            return sum((weight * loss(logps).loss).sum() for loss, logps in zip(losses, tables, strict=True))

        start = self.world.ref_logps.expand(len(losses), -1, -1)
        return minimise(mean, start, optimizer="adam", lr=LR, steps=updates, callback=note).policy.logps()

    def _loss(
        self, objective: str, setting: Setting, chosen: Tensor, rejected: Tensor
    ) -> Callable[[Tensor], LossOutput]:
        """(S, V) log-probabilities -> the loss of every pair, as `TokenWorld.expected_loss` has it: a third of its time."""
        world, mask, hyper, guide = self.world, self.world.responses.mask, {"beta": setting.beta}, None
        if "alpha" in OBJECTIVES[objective].hyperparameters:
            hyper["alpha"] = setting.alpha
        if objective == "tgdpo":
            hyper["guide_beta"] = setting.beta if setting.run_beta else setting.guide_beta
            guide = world.tokenwise(self.guide(setting.guide_beta, setting.guide_updates, setting.pairs, setting.noise))
        with_kl = "kl" in OBJECTIVES[objective].needs
        zero = torch.zeros((), dtype=torch.float64)
        sides = [
            (rows, self._ref[rows], mask[rows], None if guide is None else guide[rows]) for rows in (chosen, rejected)
        ]

        def output(logps: Tensor) -> LossOutput:
            tokens = torch.where(mask, logps[self._index], zero)  # (R, T)
            kl = torch.where(mask, world.kl(world.ref_logps, logps)[self._index[0]], zero) if with_kl else None
            stats = [
                TokenStats(tokens[rows], ref, some, kl=None if kl is None else kl[rows], guide_logps=guided)
                for rows, ref, some, guided in sides
            ]
            return OBJECTIVES[objective].fn(*stats, **hyper)

        return output


# The grid.


def places() -> Iterator[tuple[str, str, Setting]]:
    """(objective, key, setting) of every run of the grid."""
    for name, axes in READS.items():
        for at in product(*(range(len(AXES[axis])) for axis in axes)):
            values: dict = {}
            for axis, place in zip(axes, at, strict=True):
                given = AXES[axis][place]
                values |= dict(zip(FIELDS[axis], given if isinstance(given, tuple) else (given,), strict=True))
            yield name, ",".join(map(str, at)), Setting(**values)


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


def build(progress: Callable[[str], None] = lambda words: None) -> dict:
    """The grid, trained anew: see the top of this module."""
    world = TokenWorld(**WORLD)
    bench = Bench(world)
    runs: dict[str, dict] = {name: {} for name in NAMES}
    optima: dict[str, dict] = {name: {} for name in NAMES}
    for count, (name, key, setting) in enumerate(places()):
        runs[name][key] = stored(bench.train(name, setting))
        if best := bench.optimum(name, setting):
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
    return {needed(name, setting): restored(kept["runs"][name][key]) for name, key, setting in places()}


def main() -> None:
    """Make the grid and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m tpo_course.frontier", description="make the frontier lab's grid again"
    )
    parser.add_argument("--out", type=Path, default=GRID, help="where to write it (default: where the lab reads it)")
    out = parser.parse_args().out
    out.write_text(json.dumps(build(print), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
