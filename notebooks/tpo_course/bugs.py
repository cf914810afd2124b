"""The bugs of 07_break_it.ipynb, the loop they are trained in, and the checks that name them.

A bug replaces one seam of a training run (`Recipe`): the token statistics, the loss, or the reference. `train_broken` runs a
recipe on one batch; a check takes one seam alone, so it can be pointed at any other code too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tpo_lib import losses, stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.models import fingerprint, frozen_copy
from tpo_lib.runs.plots import FONT, GRID, style_of
from tpo_lib.types import IGNORE, LossOutput, PairBatch, TokenStats

BUGS = {
    1: "mean for sum",
    2: "mask off by one",
    3: "padding counted",
    4: "prompt counted",
    5: "reference not frozen",
    6: "dropout on in the reference",
    7: "missing stop-gradient (TDPO2)",
    8: "beta on the wrong side",
    9: "softmax().log()",
    10: "chosen and rejected swapped",
    11: "wrong guide beta (TGDPO)",
}
BETA, ALPHA, GUIDE_BETA = 0.1, 0.5, 1.0  # of every run here; the guide alone is trained with GUIDE_BETA
LOG2 = math.log(2.0)

Statistics = Callable[..., TokenStats]  # (logits, batch, ref_logits, guide_logits=None) -> TokenStats
Loss = Callable[[TokenStats, TokenStats], LossOutput]


# ---- 1. the wrong pieces


def library_stats(
    logits: Tensor, batch: PairBatch, ref_logits: Tensor, guide_logits: Tensor | None = None
) -> TokenStats:
    """The right statistics: `stats.token_stats` with the KL."""
    return stats.token_stats(logits, batch.labels, ref_logits, guide_logits=guide_logits, with_kl=True)


def response_mask(batch: PairBatch) -> Tensor:
    """(N, T-1) the right mask: column t belongs to token t+1."""
    return stats.response_mask(batch.labels)


def unshifted_mask(batch: PairBatch) -> Tensor:
    """(N, T-1) bug 2: the labels' own mask, so every response loses its first token and gains one after its last."""
    return batch.labels[:, :-1] != IGNORE


def masked_stats(mask: Callable[[PairBatch], Tensor]) -> Statistics:
    """The right statistics of the wrong tokens: those that `mask` keeps."""

    def statistics(logits: Tensor, batch: PairBatch, ref_logits: Tensor, guide_logits: Tensor | None = None):
        kept = F.pad(mask(batch), (1, 0))  # (N, T): nothing predicts the first token
        return stats.token_stats(logits, torch.where(kept, batch.input_ids, IGNORE), ref_logits)

    return statistics


def underflowing_stats(
    logits: Tensor, batch: PairBatch, ref_logits: Tensor, guide_logits: Tensor | None = None
) -> TokenStats:
    """Bug 9: the logarithm of a softmax, -inf as soon as one logit lies about 104 below the largest."""
    keep, ids = response_mask(batch), batch.input_ids[:, 1:, None]  # (N, T-1), (N, T-1, 1)
    scored = (z[:, :-1].softmax(-1).log().gather(-1, ids)[..., 0] for z in (logits, ref_logits))  # (N, T-1) each
    return TokenStats(*(torch.where(keep, s, 0.0) for s in scored), mask=keep)


def _logratio(s: TokenStats) -> Tensor:
    return s.logps - s.ref_logps


def _pairwise(chosen_reward: Tensor, rejected_reward: Tensor) -> LossOutput:
    loss = -F.logsigmoid(chosen_reward - rejected_reward)
    return LossOutput(loss, chosen_reward.detach(), rejected_reward.detach())


def mean_dpo(chosen: TokenStats, rejected: TokenStats) -> LossOutput:
    """Bug 1: DPO on the mean log-ratio of a token."""
    return _pairwise(*(BETA * _logratio(s).sum(-1) / s.mask.sum(-1) for s in (chosen, rejected)))


def leaky_tdpo2(chosen: TokenStats, rejected: TokenStats) -> LossOutput:
    """Bug 7: TDPO2 whose gradient flows through the KL of the chosen response too."""
    return _pairwise(*(BETA * (_logratio(s) + ALPHA * s.kl).sum(-1) for s in (chosen, rejected)))


def dropping_reference(policy, start, rate: float = 0.1):
    """Bug 6: a copy in training mode, with dropout at GPT-2's default rate (the bundled model's own is 0)."""
    reference = frozen_copy(start).train()
    for module in reference.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = rate
    return reference


class _ForgetfulReference:
    """The unknown run of an exercise: a reference that is overwritten with the policy every `every` updates."""

    def __init__(self, policy, start, every: int = 4):
        self.policy, self.model, self.every, self.calls = policy, frozen_copy(start), every, 0

    def __call__(self, **inputs):
        if self.calls and self.calls % self.every == 0:
            self.model.load_state_dict(self.policy.state_dict())
        self.calls += 1
        return self.model(**inputs)


_DPO = partial(losses.dpo, beta=BETA)
_TGDPO = partial(losses.tgdpo, beta=BETA, alpha=ALPHA)


@dataclass(frozen=True)
class Recipe:
    """The seams of a training run that bugs get into; a default is right."""

    bug: int = 0  # its number in BUGS, 0 for a healthy run
    objective: str = "dpo"  # the healthy run to compare with
    statistics: Statistics = library_stats
    loss: Loss = _DPO
    reference: Callable = lambda policy, start: start  # the model that is used as the reference


RECIPES = {
    "dpo": Recipe(),
    "tdpo2": Recipe(objective="tdpo2", loss=partial(losses.tdpo2, beta=BETA, alpha=ALPHA)),
    "tgdpo": Recipe(objective="tgdpo", loss=partial(_TGDPO, guide_beta=GUIDE_BETA)),
    "guide": Recipe(loss=partial(losses.dpo, beta=GUIDE_BETA)),
    "A": Recipe(5, reference=lambda policy, start: policy),  # a second name for the policy is not a copy of it
    "B": Recipe(8, loss=partial(losses.dpo, beta=1 / BETA)),
    "C": Recipe(1, loss=mean_dpo),
    "D": Recipe(6, reference=dropping_reference),
    "E": Recipe(3, statistics=masked_stats(lambda batch: response_mask(batch).cumsum(dim=1) > 0)),  # from its start on
    "F": Recipe(7, "tdpo2", loss=leaky_tdpo2),
    "G": Recipe(11, "tgdpo", loss=partial(_TGDPO, guide_beta=BETA)),  # the current run's beta, not the guide's
    "H": Recipe(10, loss=lambda chosen, rejected: losses.dpo(rejected, chosen, beta=BETA)),
    "I": Recipe(4, statistics=masked_stats(lambda batch: batch.attention_mask[:, 1:].bool())),  # whatever is no padding
    "J": Recipe(2, statistics=masked_stats(unshifted_mask)),
    "K": Recipe(9, statistics=underflowing_stats),
    "unknown": Recipe(5, reference=_ForgetfulReference),
}
CASES = "ABCDEFGHIJK"


# ---- 2. one batch, and the loop


def one_batch(stage, *, pairs: int = 16, shortest: int = 6, longest: int = 24, seed: int = 0) -> PairBatch:
    """A batch of a stage's training pairs, cut so that lengths differ as they do in real data.

    A response keeps `shortest` to `longest` tokens, drawn uniformly. Whichever of the two cut responses has the larger summed
    token credit is the chosen one.
    """
    draw = torch.Generator().manual_seed(seed)

    def cut(ids: list[int]) -> list[int]:
        return ids[: int(torch.randint(shortest, longest + 1, (1,), generator=draw))]

    def credit(ids: list[int]) -> float:
        return float(stage.reward.token_credit(torch.tensor(ids)).sum())

    rows = []
    for pair in stage.pairs[:pairs]:
        rejected, chosen = sorted((cut(pair.chosen_ids), cut(pair.rejected_ids)), key=credit)
        rows.append(EncodedPair(pair.row, pair.prompt_ids, chosen, rejected))
    return collate(rows, stage.tokenizer.pad_token_id)


@dataclass(frozen=True)
class Run:
    """What `train_broken` leaves: the case's name, the trained policy, the reference it used, one row an update.

    A row is measured before its step: row 0 belongs to policy = start. `loss`, `rewards/*`, `grad_norm` are what the run's
    own code reports; `logratio/*` and `kl/*` are what the library says about the policy, in nats a response.
    """

    case: str
    policy: torch.nn.Module
    reference: Callable
    rows: list[dict[str, float]]

    def __getitem__(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def train_broken(start, batch: PairBatch, case: str, *, updates: int = 10, lr: float = 3e-4, guide=None) -> Run:
    """Train a copy of the frozen `start` by RECIPES[case], on the same batch at every update; tgdpo needs a frozen `guide`."""
    recipe = RECIPES[case]
    torch.manual_seed(0)  # dropout draws
    policy = frozen_copy(start).requires_grad_(True)
    reference = recipe.reference(policy, start)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    with torch.no_grad():
        start_logits = forward(start, batch)  # (N, T, V)
        guide_logits = forward(guide, batch) if recipe.objective == "tgdpo" else None
    rows = []
    for _ in range(updates):
        logits = forward(policy, batch)
        with torch.no_grad():
            ref_logits = forward(reference, batch)
        tokens = recipe.statistics(logits, batch, ref_logits, guide_logits)
        output = recipe.loss(*stats.split(tokens))
        optimizer.zero_grad()
        output.loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        truth = library_stats(logits.detach(), batch, start_logits)
        rows.append(_reported(output, norm) | _truth(*stats.split(truth)))
        optimizer.step()
    return Run(case, policy.requires_grad_(False), reference, rows)


def forward(model, batch: PairBatch) -> Tensor:
    """(N, T, V) logits."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def _reported(output: LossOutput, norm: Tensor) -> dict[str, float]:
    margin = output.chosen_reward - output.rejected_reward
    values = {"loss": output.loss, "rewards/chosen": output.chosen_reward, "rewards/rejected": output.rejected_reward}
    values |= {"rewards/margins": margin, "rewards/accuracies": (margin > 0).float(), "grad_norm": norm}
    return {name: value.mean().item() for name, value in values.items()}


def _truth(chosen: TokenStats, rejected: TokenStats) -> dict[str, float]:
    row = {}
    for side, s in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"logratio/{side}": _logratio(s).sum(-1).mean().item(), f"kl/{side}": s.kl.sum(-1).mean().item()}
    return row


DIALS = {
    "loss": "loss, nats",
    "rewards/chosen": "reward of the chosen, nats",
    "rewards/rejected": "reward of the rejected, nats",
    "grad_norm": "gradient norm",
    "kl/chosen": "SeqKL(ref ‖ policy), chosen, nats",
    "kl/rejected": "SeqKL(ref ‖ policy), rejected, nats",
}


def dials(
    runs: Sequence[Run], names: Sequence[str] = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")
) -> Figure:
    """What a dashboard shows: reported values (keys of DIALS, a panel each) over the updates.

    Healthy runs look as everywhere; a case is black and dashed, and comes last in `runs`, so that it lies on top.
    """
    rows = 1 + (len(names) > 3)  # four in a row cannot be read on a phone
    beside = -(-len(names) // rows)
    figure = Figure(
        figsize=(max(4.2, 2.7 * beside), 2.8 + 2.2 * (rows - 1)), dpi=85, layout="constrained", facecolor="white"
    )
    panels = figure.subplots(rows, beside, squeeze=False).flat
    for axes, name in zip(panels, names, strict=True):
        for run in runs:
            look = {"color": "black", "marker": "x", "linestyle": "--", "linewidth": 1.5, "label": f"run {run.case}"}
            if run.case in losses.OBJECTIVES:
                style = style_of(run.case)
                look = {"color": style.colour, "marker": style.marker, "linestyle": style.linestyle, "linewidth": 3.5}
                look |= {"label": f"{style.label}, healthy", "markersize": 7}
            axes.plot(run[name], **look)
        axes.set(xlabel="update", yscale="log" if name == "grad_norm" else "linear")
        axes.set_title(DIALS[name], fontsize=FONT - 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
    where = {"loc": "outside lower center", "ncols": len(runs), "frameon": False, "fontsize": FONT, "handlelength": 3.5}
    figure.legend(*axes.get_legend_handles_labels(), **where)
    return figure


# ---- 3. the checks


@dataclass(frozen=True)
class Finding:
    """What a check found. `bug` is a number of BUGS; None where all is well, or where the fault has no number."""

    ok: bool
    message: str
    bug: int | None = None

    def __repr__(self) -> str:
        name = f"bug {self.bug}, {BUGS[self.bug]}: " if self.bug else ""
        return f"{'✓' if self.ok else '✗'} {name}{self.message}"


def log_two(run: Run) -> Finding:
    """The loss of DPO, TDPO, TGDPO is log 2 where policy = reference: at the first update, and (in training) never again."""
    first, later = run.rows[0], run.rows[1:]
    chosen, rejected = first["rewards/chosen"], first["rewards/rejected"]
    if max(abs(chosen), abs(rejected)) > 1e-4:
        said = f"before the first update the rewards are {chosen:.3f} and {rejected:.3f}, not 0: policy and reference differ. "
        return Finding(False, said + "Look for dropout, another checkpoint, another precision.", 6)
    if abs(first["loss"] - LOG2) > 1e-4:
        share = first["loss"] / LOG2
        return Finding(False, f"the first loss is {share:.3g} times log 2: a factor stands outside log sigma.", 8)
    rests = [abs(row["loss"] - LOG2) < 1e-6 and row["rewards/chosen"] == row["rewards/rejected"] == 0 for row in later]
    if any(rests):
        said = "never leaves log 2" if all(rests) else f"is log 2 again at update {1 + rests.index(True)}"
        return Finding(False, f"the loss {said}: the reference moves with the policy.", 5)
    return Finding(True, f"the first loss is {first['loss']:.4f} = log 2, both rewards are 0")


def touched(statistics: Statistics, batch: PairBatch, *, seed: int = 0) -> Tensor:
    """(N, T) bool: the positions whose logits the summed log-probabilities depend on, from a gradient."""
    shape = (*batch.input_ids.shape, int(batch.input_ids.max()) + 2)  # (N, T, V)
    draw = torch.Generator().manual_seed(seed)
    logits, ref_logits = (torch.randn(shape, generator=draw) for _ in range(2))
    logits.requires_grad_()
    statistics(logits, batch, ref_logits, None).logps.sum().backward()
    return logits.grad.abs().sum(-1) > 0


def footprint(statistics: Statistics, batch: PairBatch) -> Finding:
    """Position t may be touched if and only if token t+1 belongs to the response; names bugs 2, 3 and 4.

    Raises:
        ValueError: every sequence fills the batch's width, so that padding could not be noticed.
    """
    if bool(batch.attention_mask.all()):
        said = "the batch has no padding, so counted padding would go unnoticed"
        raise ValueError(f"{said}; take responses of other lengths")
    got, want = touched(statistics, batch), F.pad(response_mask(batch), (0, 1))  # (N, T); nothing follows the last
    if torch.equal(got, want):
        return Finding(True, f"exactly the {int(want.sum())} positions before a response token are touched")
    if torch.equal(got, F.pad(unshifted_mask(batch), (0, 1))):
        return Finding(False, "each response loses its first token and gains one after its last.", 2)
    if torch.equal(got, want.roll(1, dims=1)):
        return Finding(False, "the shift is missing: a token is scored where the model has already read it.")
    extra, lost = got & ~want, int((want & ~got).sum())
    after = extra & (want.cumsum(1) == want.sum(1, keepdim=True))  # the response lies behind
    padding, prompt = int(after.sum()), int((extra & ~after).sum())
    if lost:
        return Finding(False, f"{lost} response tokens are not scored.")
    where = "after the responses' ends" if padding else "before the responses"
    said = f"{padding or prompt} positions {where} are scored."
    if padding and prompt:
        said = f"{padding} positions after the responses and {prompt} before them are scored: bugs 3 and 4."
    return Finding(False, said, 3 if padding else 4)


def hand_worked(chosen: int = 4, rejected: int = 2) -> tuple[TokenStats, TokenStats]:
    """One pair at policy = reference = guide, all log-probabilities -1, KL 0, in float64; `logps` and `kl` take a gradient."""
    width = max(chosen, rejected)  # both are padded to it

    def half(length: int) -> TokenStats:
        mask = torch.arange(width)[None] < length  # (1, width)
        logps, kl = -mask.double(), torch.zeros(1, width, dtype=torch.float64)
        return TokenStats(logps.clone().requires_grad_(), logps, mask, kl=kl.requires_grad_(), guide_logps=logps)

    return half(chosen), half(rejected)


def start_slopes(loss: Loss, chosen: int = 4, rejected: int = 2) -> tuple[Tensor, Tensor]:
    """d loss / d log pi(y^t|s_t) of every token of the hand-worked pair: (chosen,), (rejected,).

    Example:
        >>> [slopes.tolist() for slopes in start_slopes(partial(losses.dpo, beta=0.5), 2, 1)]  # -/+ beta / 2
        [[-0.25, -0.25], [0.25]]
    """
    sides = hand_worked(chosen, rejected)
    loss(*sides).loss.sum().backward()
    return tuple(s.logps.grad[s.mask] for s in sides)


def slopes(loss: Loss, beta: float) -> Finding:
    """At policy = reference the loss is log 2 and its slope -beta/2 in every chosen token, +beta/2 in every rejected one.

    Names bugs 1, 8 and 10.
    """
    output = loss(*hand_worked())
    if max(output.chosen_reward.abs().item(), output.rejected_reward.abs().item()) > 1e-9:
        return Finding(False, "the rewards are not 0 where policy = reference: is the reference in them?")
    if not math.isclose(output.loss.item(), LOG2, rel_tol=1e-6):
        return Finding(False, f"where the margin is 0 the loss is {output.loss.item() / LOG2:.3g} times log 2.", 8)
    chosen, rejected = start_slopes(loss)
    unit = torch.cat([-chosen, rejected]) / (beta / 2)  # ones, if all is well
    one, lengths = torch.ones_like(unit), torch.tensor([4.0] * 4 + [2.0] * 2, dtype=unit.dtype)
    if torch.allclose(unit, one):
        return Finding(True, f"log 2, and -/+ beta/2 = {beta / 2:g} on every token")
    if torch.allclose(unit, -one):
        return Finding(False, "the right sizes with the wrong sign.", 10)
    if torch.allclose(unit * lengths, one):
        return Finding(False, "beta/2 divided by the length of the response.", 1)
    if torch.allclose(unit, unit[:1]):
        return Finding(False, f"every slope is {unit[0]:.4g} times beta/2.", 8)
    return Finding(False, f"slopes {chosen.tolist()} and {rejected.tolist()}, expected -/+ {beta / 2:g}.")


def reference_rests(reference, policy, start, batch: PairBatch) -> Finding:
    """The reference is another object than the policy, still has the start's weights, and repeats itself: bugs 5 and 6."""
    if reference is policy:
        return Finding(False, "the reference is the policy: one object, two names.", 5)
    if fingerprint(reference) != fingerprint(start):
        return Finding(False, "its weights are no longer those of the start.", 5)
    with torch.no_grad():
        change = (forward(reference, batch) - forward(reference, batch)).abs().max().item()
    if change > 0:
        return Finding(False, f"two passes over one batch differ by up to {change:.2f} in a logit.", 6)
    return Finding(True, "same weights as the start, two passes agree to the last bit")


def stop_gradient(loss: Loss) -> Finding:
    """TDPO2: no gradient through the KL of the chosen response, one through that of the rejected response; names bug 7."""
    sides = hand_worked()
    loss(*sides).loss.sum().backward()
    leak, kept = (0.0 if s.kl.grad is None else s.kl.grad.abs().max().item() for s in sides)
    if leak:
        return Finding(False, f"the loss has the slope {leak:.3g} in the KL of every chosen token; it must be 0.", 7)
    if not kept:
        return Finding(False, "the KL of the rejected response gets no gradient either.")
    return Finding(True, f"slope 0 in the chosen KL, {kept:.3g} in the rejected KL")


def steep_logits(statistics: Statistics, gap: float = 150.0) -> Finding:
    """Values and gradients stay finite in float32 when a token's logit lies `gap` below the largest; names bug 9."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    batch = PairBatch(ids, torch.ones_like(ids), torch.where(ids > 1, ids, IGNORE), torch.tensor([0]))
    logits = torch.zeros(2, 3, 5)
    logits[..., [2, 4]] = -gap  # a token that is scored, and one that only the KL sees
    policy, ref = logits.clone().requires_grad_(), logits.clone()
    tokens = statistics(policy, batch, ref, None)
    value = tokens.logps.sum() + tokens.ref_logps.sum() + (0.0 if tokens.kl is None else tokens.kl.sum())
    value.backward()
    if torch.isfinite(value) and bool(torch.isfinite(policy.grad).all()):
        return Finding(True, f"a gap of {gap:g} between two logits gives finite values and gradients")
    broken = "value" if not torch.isfinite(value) else "gradient"
    return Finding(False, f"a gap of {gap:g} between two logits: the {broken} is not finite.", 9)


def guide_weights(loss: Loss, logratios: Sequence[float]) -> list[float]:
    """TGDPO's f of chosen tokens whose log(pi_hat/pi_ref) is given: their slopes over that of a token with log-ratio 0."""
    chosen, rejected = hand_worked(len(logratios) + 1)
    shift = torch.tensor([[0.0, *logratios]], dtype=torch.float64)
    loss(dataclasses.replace(chosen, guide_logps=chosen.ref_logps + shift), rejected).loss.sum().backward()
    return (chosen.logps.grad[0, 1:] / chosen.logps.grad[0, 0]).tolist()


def guide_scale(loss: Loss, *, beta: float, alpha: float, guide_beta: float) -> Finding:
    """TGDPO: f of a chosen token is 1 + alpha * guide_beta * logratio, with the guide's own beta, and positive; names bug 11."""
    up, far_down = guide_weights(loss, [0.5, -100.0])
    if far_down <= 0:
        return Finding(False, f"a token far below the reference has the weight {far_down:.3g}; f must stay positive.")
    if math.isclose(up, 1 + alpha * guide_beta * 0.5, rel_tol=1e-6):
        return Finding(True, f"f = {up:.4g} where the guide's log-ratio is 0.5, and positive far below")
    own = " It is the current run's." if math.isclose(up, 1 + alpha * beta * 0.5, rel_tol=1e-6) else ""
    said = f"r_hat uses {(up - 1) / (0.5 * alpha):.3g} as the guide's beta; the guide was trained with {guide_beta:g}.{own}"
    return Finding(False, said, 11)


def examine(run: Run, start, batch: PairBatch) -> dict[str, Finding]:
    """Every check that applies to a run's recipe, by name."""
    recipe = RECIPES[run.case]
    found = {
        "log_two": log_two(run),
        "footprint": footprint(recipe.statistics, batch),
        "slopes": slopes(recipe.loss, BETA),
        "reference_rests": reference_rests(run.reference, run.policy, start, batch),
        "steep_logits": steep_logits(recipe.statistics),
    }
    if recipe.objective == "tdpo2":
        found["stop_gradient"] = stop_gradient(recipe.loss)
    if recipe.objective == "tgdpo":
        found["guide_scale"] = guide_scale(recipe.loss, beta=BETA, alpha=ALPHA, guide_beta=GUIDE_BETA)
    return found
