"""Where every objective ends in one exact world, and on which way: the bench of the frontier lab.

All runs start from pi_ref and take 200 updates of Adam with a learning rate of .1 on the whole data; that is the end of training
for most, and where it is not the loss still falls. TGDPO without a guide, and alpha = 0, is DPO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld
from tpo_course.world_plots import kl_and_return
from tpo_lib.losses import F_FLOOR, OBJECTIVES
from tpo_lib.types import LossOutput, TokenStats

WORLD = {"vocab_size": 3, "horizon": 3, "seed": 0, "num_prompts": 2}  # where `widgets.step_through` starts
NAMES = ("dpo", "tdpo1", "tdpo2", "tgdpo", "ipo")  # SimPO's beta is of another scale, and it has no reference
UPDATES = (0, 1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 70, 100, 140, 200)
LR = 0.1
SETTLING = (0.1, 0.03, 0.01, 0.003)  # learning rates of `rest`, 400 updates each
RESTS = 1e-3  # nats and units of reward: what the last of them may still move
MOST_PAIRS = 10_000
FRONT = [100 * 0.9**i for i in range(90)]  # betas, from nearly pi_ref to nearly the best return there is
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

    def rest(self, objective: str, setting: Setting) -> tuple[float, float] | None:
        """KL and return of where training comes to rest, going on from its end in ever smaller steps: a second or two.

        None where that still moves, and of pairs that are drawn: where a policy can tell them apart they have no optimum.
        """
        if setting.pairs is not None:
            return None
        chosen, rejected, weight = self.data(setting.pairs, setting.noise)
        losses = [self._loss(*needed(objective, setting), chosen, rejected)]
        logps, ends = self._descend(losses, weight, UPDATES[-1]), []
        for lr in SETTLING:
            logps = self._descend(losses, weight, 400, start=logps, lr=lr)
            ends.append(kl_and_return(self.world, logps[0]))
        moved = max(abs(now - before) for now, before in zip(*ends[-2:], strict=True))
        return ends[-1] if moved < RESTS else None

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

    def _descend(
        self, losses: Sequence[Callable], weight: Tensor, updates: int, note=None, *, start=None, lr: float = LR
    ) -> Tensor:
        """(K, S, V) log-probabilities of K losses' policies after so many updates from pi_ref, or from `start`."""

        def mean(logits: Tensor) -> Tensor:
            tables = logits.log_softmax(-1).unbind()  # K of (S, V)
            return sum((weight * loss(logps).loss).sum() for loss, logps in zip(losses, tables, strict=True))

        start = self.world.ref_logps.expand(len(losses), -1, -1) if start is None else start
        return minimise(mean, start, optimizer="adam", lr=lr, steps=updates, callback=note).policy.logps()

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
