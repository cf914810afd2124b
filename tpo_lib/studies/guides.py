"""Guides by a spec: what TGDPO takes its token rewards r_hat from, good, bad, false, true, or its own average.

    known = {"reference": stage.start, "tokenizer": stage.tokenizer, "reward": stage.reward}
    guide = make({"kind": "oracle"}, stage.pairs, beta=0.1, model=dpo, **known)
    train.fit(config, policy, stage.start, stage.pairs, guide=guide.reader, callbacks=guide.callbacks)

A guide says log pi_hat = log pi_ref + r_hat / beta at every response token: an objective with guide_beta = beta reads r_hat. Its
rows stand as in `stats`: (2P, T-1), all chosen responses first, column t for token t+1, 0 off the response.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy.stats import spearmanr
from torch import Tensor

from tpo_lib import stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.evaluation import pair_stats
from tpo_lib.fast import pair_loss
from tpo_lib.fast.frozen import FrozenCache, FrozenReader
from tpo_lib.files.store import content_key
from tpo_lib.files.tokens import token_method
from tpo_lib.losses import OBJECTIVES, check_number, floor_share
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.sampling import stop_ids
from tpo_lib.types import PAD, TokenStats

TAKES = {  # kind -> what its spec may say beside it
    "none": (),  # no guide
    "model": (),  # r_hat of a DPO policy, as TGDPO has it
    "shuffled": ("seed",),  # the same values, permuted among the tokens of each response: where they stand is lost
    "random": ("seed", "std"),  # normal, mean 0, of the standard deviation std, by default that of the model's r_hat
    "oracle": ("std", "centred"),  # the true credit, scaled to std; centred: minus its mean over all tokens
    "ema": ("decay",),  # the policy's own average, see `Average`
}


@dataclass(frozen=True)
class Guide:
    """What a run is guided by."""

    reader: Callable | None  # for `train.fit(guide=)`
    note: dict = field(default_factory=dict)  # what is known of its r_hat on the training pairs, see `described`
    callbacks: tuple[Callable, ...] = ()  # for `train.fit(callbacks=)`


def make(
    spec: Mapping,
    pairs: Sequence[EncodedPair],
    *,
    reference,
    tokenizer,
    beta: float,
    model=None,
    reward=None,
) -> Guide:
    """The guide that a spec {"kind": one of TAKES, ...} names, its r_hat computed once for all pairs.

    Args:
        pairs: of training; found by their rows, each its own.
        beta: guide_beta of the objective; of a model what it was trained with.
        model: a DPO policy, for "model" and "shuffled", and wherever no std is given.
        reward: with `token_credit` over the tokenizer's ids, for "oracle"; where there is one, others are compared with it.

    Raises:
        ValueError: the kind or a key is unknown, a value out of range, or something that the kind needs is missing.
    """
    kind = _checked(spec)
    if kind == "none":
        return Guide(None)
    if kind == "ema":
        average = Average(reference, spec.get("decay", 0.9))
        return Guide(average, {"decay": average.decay}, (average.update,))
    needs_model = spec.get("std") is None
    if needs_model and model is None:
        raise ValueError(f"a guide of kind {kind!r} needs model=, a DPO policy" + ", or std" * ("std" in TAKES[kind]))
    table = Table.read(pairs, reference, beta, model if needs_model else None)
    std = spec.get("std") or table.r_hat[table.mask].std(correction=0).item()
    if kind == "oracle":
        credit = _credit(reward, tokenizer, reference, table)
        on = credit[table.mask]
        middle, scale = on.mean() if spec.get("centred") else 0.0, std / on.std(correction=0)
        table = table.said(scale * (credit - middle))
    elif kind != "model":
        table = table.said(_drawn(table, kind, std, spec.get("seed", 0)))
    return Guide(FrozenReader(table.cache(beta).read, None), described(table, reward, tokenizer, reference))


def _checked(spec: Mapping) -> str:
    """The kind of a spec that says nothing its kind does not take."""
    kind = spec.get("kind")
    if kind not in TAKES:
        raise ValueError(f"kind={kind!r} is no guide; choose one of {', '.join(TAKES)}")
    if unknown := spec.keys() - {"kind", *TAKES[kind]}:
        takes = ", ".join(TAKES[kind]) or "nothing else"
        raise ValueError(f"a guide of kind {kind!r} does not take {', '.join(sorted(unknown))}; it takes {takes}")
    if spec.get("std") is not None:
        check_number("std", spec["std"], above=0)
    return kind


@dataclass(frozen=True)
class Table:
    """Pairs, what the reference says of their tokens, and r_hat: (2P, T-1) each."""

    pairs: Sequence[EncodedPair]
    ref_logps: Tensor
    mask: Tensor
    r_hat: Tensor

    @classmethod
    def read(cls, pairs: Sequence[EncodedPair], reference, beta: float, model=None) -> Table:
        """r_hat = beta (log pi_hat - log pi_ref) of a model; 0 without one."""
        if model is None:
            tokens = pair_stats(reference, None, pairs, PAD, with_kl=False, pair_loss=pair_loss)
            return cls(pairs, tokens.logps, tokens.mask, torch.zeros_like(tokens.logps))
        tokens = pair_stats(model, reference, pairs, PAD, with_kl=False, pair_loss=pair_loss)
        return cls(pairs, tokens.ref_logps, tokens.mask, beta * (tokens.logps - tokens.ref_logps))

    def said(self, r_hat: Tensor) -> Table:
        """The same pairs with another r_hat."""
        return Table(self.pairs, self.ref_logps, self.mask, torch.where(self.mask, r_hat, 0.0))

    def cache(self, beta: float) -> FrozenCache:
        """log pi_ref + r_hat / beta at the response tokens, found by a pair's row."""
        values = (self.ref_logps + self.r_hat / beta)[self.mask]  # (tokens,), sequence by sequence
        ends = [0, *self.mask.sum(-1).cumsum(0).tolist()]
        count = len(self.pairs)
        spans = {p.row: [*ends[i : i + 2], *ends[count + i : count + i + 2]] for i, p in enumerate(self.pairs)}
        if len(spans) < count:
            raise ValueError(
                f"{count} pairs have {len(spans)} rows: a guide finds a pair by its row, which must be its own"
            )
        return FrozenCache(values, spans, None)


def responses(pairs: Sequence[EncodedPair]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, response ids) of every sequence, all chosen first."""
    return [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]


def true_credit(reward, tokenizer, model, pairs: Sequence[EncodedPair], mask: Tensor) -> Tensor:
    """(2P, T-1) credit of every response token in nats of log-odds, its previous token being the response's; 0 off `mask`.

    With the reward's bias, a response's credits sum to the log-odds of its score: the token that ends it has none.
    """
    ends, parts = set(stop_ids(model, tokenizer)), []
    for _, ids in responses(pairs):
        credit = reward.token_credit(torch.tensor(ids))  # (n,)
        parts.append(torch.where(torch.arange(len(ids)) == len(ids) - 1, 0.0, credit) if ids[-1] in ends else credit)
    return stats.unpack(torch.cat(parts), mask)


def _credit(reward, tokenizer, model, table: Table) -> Tensor:
    """`true_credit` of a table; ValueError where the reward knows none."""
    if token_method(reward, "token_credit", tokenizer) is None:
        raise ValueError("a guide of kind 'oracle' needs a reward whose token_credit reads the model's own token ids")
    return true_credit(reward, tokenizer, model, table.pairs, table.mask)


def _drawn(table: Table, kind: str, std: float, seed: int) -> Tensor:
    """r_hat permuted within every response, or drawn anew: fixed by seed, prompt and response, wherever the row stands."""
    found = torch.zeros_like(table.r_hat)
    for i, ids in enumerate(responses(table.pairs)):
        draw = torch.Generator().manual_seed(int(content_key([seed, *ids])[:15], 16))
        own = table.r_hat[i, table.mask[i]]  # (n,)
        drawn = (
            own[torch.randperm(len(own), generator=draw)]
            if kind == "shuffled"
            else std * torch.randn(len(own), generator=draw)
        )
        found[i, table.mask[i]] = drawn.to(found.dtype)
    return found


def described(table: Table, reward, tokenizer, model) -> dict:
    """Of r_hat: its standard deviation over tokens, its mean on each side, its rank correlation with the true credit if known."""
    chosen, rejected = stats.halves(len(table.mask))
    means = [table.r_hat[side][table.mask[side]].mean().item() for side in (chosen, rejected)]
    note = {"std": table.r_hat[table.mask].std(correction=0).item(), "mean_chosen": means[0], "mean_rejected": means[1]}
    if note["std"] and token_method(reward, "token_credit", tokenizer):
        credit = true_credit(reward, tokenizer, model, table.pairs, table.mask)
        note["credit_rho"] = float(spearmanr(table.r_hat[table.mask], credit[table.mask]).statistic)
    return note


class Average(ResponseReader):
    """A guide that follows the policy it guides: one stage instead of two. Its weights are a moving average of the policy's.

    pi_hat <- decay^k pi_hat + (1 - decay^k) pi_theta after k updates, from the start; `update` is a callback of `train.fit`,
    called every `eval_every` updates: 1 makes it exact at each, a larger one a guide that is refreshed from time to time. With
    guide_beta = beta, r_hat is the implied reward of the policy a while ago; at the start it is 0, and TGDPO is DPO.

    `tpo_lib.fit` refuses it: it may keep what a guide says of a pair, and would go on after a kill with a guide at its start.
    """

    def __init__(self, start, decay: float) -> None:
        check_number("decay", decay, least=0)
        if decay >= 1:
            raise ValueError(f"decay={decay!r} must be less than 1, or the average would stay at the start")
        super().__init__(frozen_copy(start))
        self.decay, self.step = decay, None

    @torch.no_grad()
    def update(self, step: int, policy) -> None:
        """Move towards the policy; RuntimeError where the run did not begin with it."""
        if self.step is None and step:
            raise RuntimeError(f"the run goes on at update {step}, but its averaged guide was not kept; train it anew")
        mine, theirs = (dict(model.named_parameters()) for model in (self.model, policy))
        if mine.keys() != theirs.keys():
            raise ValueError("the averaged guide needs a policy with the start's own weights; train without lora_rank")
        keep = self.decay ** (step - (self.step or 0))
        for name, weights in mine.items():
            weights.lerp_(theirs[name].to(weights), 1 - keep)
        self.step = step


def matched_beta(guide: Guide, pairs: Sequence[EncodedPair], *, reference, loss_type: str = "tgdpo", **hyper) -> dict:
    """What a guided objective's weights do to the scale of a step: DPO at the returned "beta" is the control without guidance.

    At the start every pair has the same sigma(-margin), so a token's pull is beta f (e_y - pi): f is averaged with the length of
    that pull on the token's own logit, 1 - pi_ref(y).

    Args:
        guide: a frozen one, made for these pairs.
        hyper: of the objective, which must give token weights.

    Returns:
        {"beta": beta f, "f", "f_chosen", "f_rejected": means so weighted, "f_plain": over tokens alike, "floor_share"}.
    """
    table = Table.read(pairs, reference, 1.0)
    said = stats.unpack(guide.reader(collate(list(pairs))).to(table.ref_logps), table.mask)  # (2P, T-1)
    tokens = TokenStats(table.ref_logps, table.ref_logps, table.mask, guide_logps=said)
    settings = OBJECTIVES[loss_type].settings(hyper)
    output = OBJECTIVES[loss_type].fn(*stats.split(tokens), **settings)
    if output.token_weights is None:
        raise ValueError(f"{loss_type} has no token weights, so there is nothing to match")
    f, pull = output.token_weights, torch.where(table.mask, 1 - table.ref_logps.exp(), 0.0)

    def mean(rows: slice = slice(None)) -> float:
        return ((f * pull)[rows].sum() / pull[rows].sum()).item()

    chosen, rejected = map(mean, stats.halves(len(f)))
    floored, count = floor_share(output, table.mask, settings.get("floor", 0.0))
    found = {"beta": settings["beta"] * mean(), "f": mean(), "f_chosen": chosen, "f_rejected": rejected}
    return found | {"f_plain": f[table.mask].mean().item(), "floor_share": (floored / count).item()}
