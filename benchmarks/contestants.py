"""The contestants: each computes one objective's mean loss over the pairs of a case, in its own way.

`CONTESTANTS[objective]` is {name: function(case) -> scalar loss}; `available` gives those that are installed.

textbook    what the authors' repositories compute: all (N, T, V) logits, log_softmax over all of them, then gather
trl         TRL's chunked kernels, fed as TRL feeds them (on a CPU: every position, prompt and padding too)
trl-packed  the same kernels fed response positions only, which is kinder than TRL's own trainer on a CPU
liger       Liger's fused linear DPO loss
fused       ours, as training uses it: ResponseReader and fused.pair_loss
logged      ours, at an update whose statistics are logged (where that costs more: TDPO1)
statistics  ours, the statistics tile by tile (ladder.token_stats) and any loss of them
cached      ours, with what the frozen models say known already, as from the second epoch on
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata, util

import torch
from torch import Tensor

from benchmarks.cases import Case
from tpo_course import ladder
from tpo_lib import losses, stats
from tpo_lib.fast import fused
from tpo_lib.types import LossOutput, Reading, TokenStats

HYPERPARAMETERS = {"beta": 0.1, "guide_beta": 0.1, "gamma": 0.2}  # the others are the defaults of the records
TRL_CHUNK = 32768  # vocabulary entries of a tile, as TRL's trainers pass it


def objective(name: str) -> partial[LossOutput]:
    """An objective with its hyperparameters filled in."""
    entry = losses.OBJECTIVES[name]
    return partial(entry.fn, **entry.settings(HYPERPARAMETERS))


def pair_losses(name: str, tokens: TokenStats) -> Tensor:
    """The objective of statistics: (B,)."""
    return objective(name)(*stats.split(tokens)).loss


# --- textbook ---------------------------------------------------------------------------------------------------------


def textbook(name: str, case: Case) -> Tensor:
    """All logits of all positions in float32; for TDPO the reference's log is taken of its softmax, as published."""
    needs = losses.OBJECTIVES[name].needs
    policy = case.policy(**case.inputs).logits[:, :-1].float()  # (N, T-1, V)
    with torch.no_grad():
        ref = case.models["ref"](**case.inputs).logits[:, :-1].float()
        guide = case.models["guide"](**case.inputs).logits[:, :-1].float() if "guide_logps" in needs else None
    targets = case.batch.labels[:, 1:].clamp(min=0)[..., None]  # (N, T-1, 1)

    def at_targets(log_probs: Tensor) -> Tensor:
        return torch.where(case.mask, log_probs.gather(-1, targets)[..., 0], 0.0)  # (N, T-1)

    log_p = policy.log_softmax(-1)
    if "kl" not in needs:
        known = {"ref_logps": at_targets(ref.log_softmax(-1))}
        if guide is not None:
            known["guide_logps"] = at_targets(guide.log_softmax(-1))
        return pair_losses(name, TokenStats(at_targets(log_p), mask=case.mask, **known)).mean()
    q = ref.softmax(-1)
    log_q = q.log()  # -inf where q underflows: this is what goal 6 is about
    kl = torch.where(case.mask, (q * (log_q - log_p)).sum(-1), 0.0)
    return pair_losses(name, TokenStats(at_targets(log_p), at_targets(log_q), case.mask, kl)).mean()


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(name: str, case: Case, *, cached: bool = False, **how: bool) -> Tensor:
    """Hidden states at response positions and `of_readings`, which takes `how`."""
    needs = losses.OBJECTIVES[name].needs
    policy = case.read("policy")
    if cached:
        ref, guide = case.known_states if "kl" in needs else case.known_logps["ref"], case.known_logps.get("guide")
    else:
        ref, guide = case.read("ref"), case.read("guide") if "guide_logps" in needs else None
    return of_readings(name, policy, case.batch.labels, ref, guide, **how).mean()


def of_readings(
    name: str,
    policy: Reading,
    labels: Tensor,
    ref,
    guide,
    *,
    statistics: bool = False,
    logged: bool = False,
    tile_bytes=None,
) -> Tensor:
    """(B,) losses by fused.pair_loss, or by ladder.token_stats."""
    how = {"guide": guide, "with_kl": "kl" in losses.OBJECTIVES[name].needs, "tile_bytes": tile_bytes}
    if statistics:
        return pair_losses(name, ladder.token_stats(policy, labels, ref, **how))
    return fused.pair_loss(objective(name), policy, labels, ref, logged=logged, **how)[0].loss


# --- peers ------------------------------------------------------------------------------------------------------------


def _installed(package: str, least: str) -> str:
    """ "" if the package can be used, else why not."""
    if util.find_spec(package.replace("-", "_")) is None:
        return f"{package} is not installed"
    found = metadata.version(package)
    new = tuple(map(int, found.split(".")[:2])) >= tuple(map(int, least.split(".")))
    return "" if new else f"{package} {found} is older than {least}, which brought these kernels"


MISSING = {"trl": _installed("trl", "1.16"), "liger": _installed("liger_kernel", "0.5")}


def trl_dpo(case: Case) -> Tensor:
    """TRL's fused head: a patched forward that returns log-probabilities instead of logits."""
    from trl.trainer.utils import add_fused_lm_head

    for model in case.models.values():
        if not hasattr(model, "_fused_for_benchmark"):
            add_fused_lm_head(model)
            model._fused_for_benchmark = True
    call = case.inputs | {"labels": case.batch.labels, "fused_lm_head": True}
    with torch.no_grad():
        ref = case.models["ref"](**call).log_probs  # (N, T-1)
    return pair_losses("dpo", TokenStats(case.policy(**call).log_probs, ref, case.mask)).mean()


def trl_composed(name: str, case: Case, *, packed: bool) -> Tensor:
    """Log-probabilities from TRL's one kernel, forward KL from its other one.

    Args:
        packed: only response positions go in; else every position, as TRL's trainers do without Triton.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = case.mask if packed or case.shape.device == "cuda" else torch.ones_like(case.mask)
    targets = case.batch.labels[:, 1:].clamp(min=0)[rows]  # (rows,)

    def hidden(model) -> Tensor:
        return model.base_model(**case.inputs).last_hidden_state[:, :-1][rows]  # (rows, d)

    def logps(states: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(states, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    def spread(values: Tensor) -> Tensor:
        full = values.new_zeros(rows.shape).masked_scatter(rows, values)
        return torch.where(case.mask, full, 0.0)  # (N, T-1)

    states, weight = hidden(case.policy), case.policy.get_output_embeddings().weight
    with torch.no_grad():
        ref, ref_weight = hidden(case.models["ref"]), case.models["ref"].get_output_embeddings().weight
        ref_logps = spread(logps(ref, ref_weight))
    kl = None
    if "kl" in losses.OBJECTIVES[name].needs:
        kl = spread(ChunkedDivergenceFunction.apply(states, weight, None, ref, ref_weight, None, 0.0)[0])
    return pair_losses(name, TokenStats(spread(logps(states, weight)), ref_logps, case.mask, kl)).mean()


def liger_dpo(case: Case) -> Tensor:
    """Liger's fused linear DPO loss; compiled on CUDA, eager on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=HYPERPARAMETERS["beta"], compiled=case.shape.device == "cuda")
    states = case.policy.base_model(**case.inputs).last_hidden_state[:, :-1]  # (N, T-1, d)
    with torch.no_grad():
        ref = case.models["ref"].base_model(**case.inputs).last_hidden_state[:, :-1]
    weight, ref_weight = (m.get_output_embeddings().weight for m in (case.policy, case.models["ref"]))
    return loss(weight, states, case.batch.labels[:, 1:], ref_input=ref, ref_weight=ref_weight)[0]


PEERS = {
    "tdpo2": {
        "trl": partial(trl_composed, "tdpo2", packed=False),
        "trl-packed": partial(trl_composed, "tdpo2", packed=True),
    },
    "dpo": {"trl": trl_dpo, "trl-packed": partial(trl_composed, "dpo", packed=True), "liger": liger_dpo},
}
OURS = {"fused": {}, "statistics": {"statistics": True}, "cached": {"cached": True}}
CONTESTANTS = {
    name: {"textbook": partial(textbook, name)}
    | PEERS.get(name, {})
    | {label: partial(ours, name, **how) for label, how in OURS.items()}
    for name in ("tdpo2", "tdpo1", "dpo", "tgdpo")
}
CONTESTANTS["tdpo1"]["logged"] = partial(ours, "tdpo1", logged=True)


def missing(name: str) -> dict[str, str]:
    """{contestant: why it cannot run here}."""
    return {label: why for label in CONTESTANTS[name] if (why := MISSING.get(label.split("-")[0]))}


def available(name: str) -> dict[str, Callable[[Case], Tensor]]:
    """The contestants of an objective that can run here."""
    return {label: fn for label, fn in CONTESTANTS[name].items() if label not in missing(name)}


def bodies(case: Case) -> Tensor:
    """The transformer bodies alone, read as ours are, forward and backward: what no treatment of the head can save."""
    for name in case.frozen:
        case.read(name)
    return case.read("policy").states.float().mean()
