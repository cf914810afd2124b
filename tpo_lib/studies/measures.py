"""What studies measure beside `evaluate`: true credit against implied reward, where log-probability goes, variety in a prompt.

    seen = Seen(stage, policy, evaluation, config)
    measure(["credit", "moved", "growth", "self_bleu"], seen)  # {metric: [one number a prompt]}

Measures of held-out pairs give one number for each of their G prompts, in the order in which these appear in
`stage.held_out_pairs`, as `evaluate` does; those of samples one for each of the P held-out prompts. Either may be subtracted
between runs on one stage (`intervals.linearised`). What no token or response of the stage can tell is left out: but for the
policy's own samples, names depend on the stage and its pairs alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.evaluation import Evaluation, pair_stats
from tpo_lib.fast import pair_loss
from tpo_lib.files.tokens import prompt_token_ids, token_method
from tpo_lib.intervals import linearised
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.stage import Stage
from tpo_lib.studies.guides import true_credit
from tpo_lib.studies.relaxation import relaxation
from tpo_lib.types import TokenStats

RARE = 1e-3  # probability under the reference below which a token of a held-out pair counts as rare
PARTS = ("early", "mid", "late")  # thirds of a response
LENGTHS = (8, 16, 32, 64, 128)  # tokens after which sums over a response are looked at
FEWEST = 3  # tokens that a response needs for a rank correlation of its own
ZERO_COUNT = 0.1  # taken for a count of 0 n-grams in common, Chen and Cherry's (2014) first smoothing


@dataclass(frozen=True)
class Seen:
    """A policy at an evaluation; what measures have in common is computed once."""

    stage: Stage
    policy: torch.nn.Module
    evaluation: Evaluation
    config: TrainConfig

    @cached_property
    def tokens(self) -> TokenStats:
        """Of the held-out pairs: (2P, T-1), with the KL."""
        return self.read(self.stage.held_out_pairs, self.stage.reference_cache)

    def read(self, pairs: Sequence[EncodedPair], cache: dict | None = None) -> TokenStats:
        pad = self.stage.tokenizer.pad_token_id
        return pair_stats(self.policy, self.stage.start, pairs, pad, pair_loss=pair_loss, cache=cache)

    @cached_property
    def sample_ids(self) -> list[list[int]]:
        """Token ids of every sample's text, the first of each prompt first."""
        texts = [sample.text for sample in self.evaluation.samples]
        return self.stage.tokenizer(texts, add_special_tokens=False)["input_ids"]

    @cached_property
    def prompts(self) -> np.ndarray:
        """(2P,) the number of the prompt of every held-out response."""
        numbers: dict[tuple, int] = {}
        found = [numbers.setdefault(tuple(pair.prompt_ids), len(numbers)) for pair in self.stage.held_out_pairs]
        return np.array(found * 2)

    @property
    def knows_credit(self) -> bool:
        """Whether the reward says what each of the model's own tokens is worth."""
        return token_method(self.stage.reward, "token_credit", self.stage.tokenizer) is not None

    def credit(self, pairs: Sequence[EncodedPair], mask: Tensor) -> Tensor:
        """(2P, T-1) true credit; ValueError where the reward knows none."""
        if not self.knows_credit:
            raise ValueError(
                "the stage's reward gives no credit to the model's own tokens; leave the measure of it out"
            )
        return true_credit(self.stage.reward, self.stage.tokenizer, self.stage.start, pairs, mask)

    @property
    def beta(self) -> float:
        """What an implied token reward beta log(pi / pi_ref) is taken with: the objective's; 1 where it has no reference."""
        known = self.config.hyperparameters()
        return known.get("beta", 1.0) if "ref_logps" in OBJECTIVES[self.config.loss_type].needs else 1.0


def credit(seen: Seen) -> dict[str, np.ndarray]:
    """How the implied token reward beta log(pi / pi_ref) follows the true credit w, on held-out pairs.

    Returns:
        credit_rho, the rank correlation over all tokens, and credit_slope, the least-squares slope of the implied reward over w
        (1: nat for nat; 0 at the start), with _early, _mid, _late (thirds of the response) and _rare (probability under the
        reference below RARE) for those tokens alone, ranked among themselves; credit_rho_within, the mean of the responses' own
        rank correlations (those of FEWEST tokens or more with any difference in w). A policy that says the same of all has 0.
    """
    return _credit(seen, seen.stage.held_out_pairs, seen.tokens, seen.prompts)


def credit_own(seen: Seen) -> dict[str, np.ndarray]:
    """`credit` on the policy's own first two samples of each held-out prompt, tokenized anew from their text; names own_*."""
    prompts = seen.stage.held_out_prompts
    texts = [sample.text for sample in seen.evaluation.samples]
    if len(texts) < 2 * len(prompts):
        raise ValueError("credit_own takes two samples a prompt; set the stage's evaluation_samples to 2")
    encoded, ids = prompt_token_ids(seen.stage.tokenizer, prompts), seen.sample_ids
    sides = zip(ids[: len(prompts)], ids[len(prompts) : 2 * len(prompts)], strict=True)
    pairs = [EncodedPair(i, encoded[i], *both) for i, both in enumerate(sides) if all(both)]
    if not pairs:
        raise ValueError("no held-out prompt has two samples that hold a token")
    found = _credit(seen, pairs, seen.read(pairs), np.array([pair.row for pair in pairs] * 2), len(prompts))
    return {f"own_{name}": values for name, values in found.items()}


def _credit(seen: Seen, pairs, tokens: TokenStats, prompts: np.ndarray, count: int | None = None) -> dict:
    mask, count = tokens.mask, count or prompts.max() + 1
    implied = (seen.beta * (tokens.logps - tokens.ref_logps))[mask].double().numpy()  # (R,)
    true, of = seen.credit(pairs, mask)[mask].double().numpy(), prompts[mask.nonzero()[:, 0].numpy()]
    place = (mask.cumsum(-1) - 1)[mask] * 3 // mask.sum(-1, keepdim=True).expand_as(mask)[mask]  # (R,) 0, 1, 2
    subsets = {"": np.ones(len(of), bool)} | {f"_{name}": (place == i).numpy() for i, name in enumerate(PARTS)}
    subsets["_rare"] = (tokens.ref_logps[mask] < math.log(RARE)).numpy()
    found = {}
    for name, on in subsets.items():
        if on.any() and np.ptp(true[on]) > 0:
            x, y, group = true[on], implied[on], of[on]
            found[f"credit_rho{name}"] = _mean(_scores(x) * _scores(y), group, count)
            x = x - x.mean()
            found[f"credit_slope{name}"] = linearised(*(np.bincount(group, v, count) for v in (x * y, x * x)))
    ends = np.cumsum(mask.sum(-1).numpy())
    own = [(x, y, g) for x, y, g in zip(*(np.split(v, ends[:-1]) for v in (true, implied)), prompts, strict=True)]
    own = [(_scores(x) @ _scores(y) / len(x), g) for x, y, g in own if len(x) >= FEWEST and np.ptp(x) > 0]
    if own:
        found["credit_rho_within"] = _mean(*map(np.array, zip(*own, strict=True)), count)
    return found


def moved(seen: Seen) -> dict[str, np.ndarray]:
    """Mean of log pi - log pi_ref over tokens of held-out pairs, nats: where the probability went, and whether it should have.

    Tokens are desirable by their true credit, and not by a guide's r_hat, which TGDPO tells them by. The credit splits the tokens
    of all objectives alike; r_hat is what one DPO run did: split by it, that run and its like would be chosen for their moves.

    Returns:
        moved_{chosen,rejected}_{good,bad}: tokens of positive and of negative true credit.
    """
    tokens, mask = seen.tokens, seen.tokens.mask
    ratio, chosen = (tokens.logps - tokens.ref_logps).double(), torch.zeros_like(mask)
    chosen[: len(mask) // 2] = True
    true, found = seen.credit(seen.stage.held_out_pairs, mask), {}
    for name, kind in (("good", true > 0), ("bad", true < 0)):
        for side, on in (("chosen", chosen & kind & mask), ("rejected", ~chosen & kind & mask)):
            if on.any():
                of = seen.prompts[on.nonzero()[:, 0].numpy()]
                found[f"moved_{side}_{name}"] = _mean(ratio[on].numpy(), of, seen.prompts.max() + 1)
    return found


def growth(seen: Seen) -> dict[str, np.ndarray]:
    """How sums over a response grow with its length: up to token t, over the held-out responses that are so long, t in LENGTHS.

    Returns:
        {logratio,seqkl}_{mean,var}_at_t: mean over responses of sum log(pi / pi_ref) and of SeqKL(pi_ref || pi), nats, and their
        variances, about the mean of their side, nats squared.
    """
    tokens, mask, found = seen.tokens, seen.tokens.mask, {}
    place = mask.cumsum(-1)
    values = {"logratio": (tokens.logps - tokens.ref_logps).double(), "seqkl": tokens.kl.double()}
    for t in LENGTHS:
        long = (mask.sum(-1) >= t).numpy()  # (2P,)
        sides = [
            long & side for side in (np.arange(len(long)) < len(long) // 2, np.arange(len(long)) >= len(long) // 2)
        ]
        if not all(side.any() for side in sides):
            break
        for name, value in values.items():
            total = torch.where(place <= t, value, 0.0).sum(-1).numpy()  # (2P,)
            middle = sum(side * total[side].mean() for side in sides)
            for moment, each in (("mean", total), ("var", (total - middle) ** 2)):
                found[f"{name}_{moment}_at_{t}"] = _mean(each[long], seen.prompts[long], seen.prompts.max() + 1)
    return found


def self_bleu(seen: Seen) -> dict[str, np.ndarray]:
    """How alike the samples of a prompt are: mean BLEU of each against the others (Zhu et al. 2018, here within a prompt).

    Returns:
        self_bleu and self_bleu_2, of n-grams of up to four tokens and of two; tokens are those of the samples' text.
    """
    count = len(seen.stage.held_out_prompts)
    ids = seen.sample_ids
    groups = [ids[i::count] for i in range(count)]
    if len(groups[0]) < 2:
        raise ValueError("self_bleu takes two samples a prompt or more; raise the stage's evaluation_samples")

    def of(group: list[list[int]], most: int) -> float:
        return float(np.mean([bleu(each, group[:i] + group[i + 1 :], most) for i, each in enumerate(group)]))

    return {name: np.array([of(g, most) for g in groups]) for name, most in (("self_bleu", 4), ("self_bleu_2", 2))}


def bleu(candidate: Sequence[int], references: Sequence[Sequence[int]], most: int = 4) -> float:
    """BLEU of token ids (Papineni et al. 2002): geometric mean of the clipped n-gram precisions, n = 1, ..., most, times brevity.

    n stops at the candidate's length; no n-gram in common counts as ZERO_COUNT of one.

    Example:
        >>> round(bleu([1, 2, 3], [[1, 2, 4]], most=2), 4)  # 2/3 and 1/2, both of length 3: sqrt(1/3)
        0.5774
        >>> round(bleu([1, 2], [[1, 2, 3]], most=2), 4)  # all in common, one token short: exp(1 - 3/2)
        0.6065
    """
    if not candidate:
        return 0.0
    logs = []
    for n in range(1, min(most, len(candidate)) + 1):
        own, *others = (
            Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)) for ids in (candidate, *references)
        )
        common = sum(min(times, max(other[gram] for other in others)) for gram, times in own.items())
        logs.append(math.log(max(common, ZERO_COUNT) / own.total()))
    nearest = min((abs(len(ids) - len(candidate)), len(ids)) for ids in references)[1]
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / len(candidate)))


def _mean(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(n,) values of groups 0, ..., count - 1 -> (count,) `linearised`."""
    return linearised(np.bincount(groups, values, count), np.bincount(groups, minlength=count))


def _scores(values: np.ndarray) -> np.ndarray:
    """Ranks, ties sharing theirs, with mean 0 and variance 1; 0 where all are alike."""
    ranks = rankdata(values) - (len(values) + 1) / 2
    return ranks / ranks.std() if ranks.any() else ranks


MEASURES: dict[str, Callable[[Seen], dict[str, np.ndarray]]] = {
    "credit": credit,
    "credit_own": credit_own,
    "moved": moved,
    "growth": growth,
    "self_bleu": self_bleu,
    "relaxation": relaxation,
}


def measure(names: Sequence[str], seen: Seen) -> dict[str, list[float]]:
    """The metrics of the named measures, one number a prompt each; their mean is the metric.

    Raises:
        ValueError: a name is unknown, or the stage lacks what a measure needs.
    """
    if unknown := [name for name in names if name not in MEASURES]:
        raise ValueError(f"{', '.join(unknown)} is no measure; there is {', '.join(MEASURES)}")
    return {metric: values.tolist() for name in names for metric, values in MEASURES[name](seen).items()}
