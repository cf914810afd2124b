"""What the rules look for: a check takes a Log and returns its evidence, or None where all is well.

`Look` is evidence that is not enough for the rule's severity, `Unseen` what the log would have to hold for the check to be made.
Here are numbers that contradict each other, by identities: a loss of margins, rewards of log-probabilities. What a run does over
time is in course.py; there a difference has to be several times its standard error.
"""

from __future__ import annotations

import math

import numpy as np

from tpo_lib.tools.doctor.logs import KNOWN, SIDES, Log

LOG2 = math.log(2.0)
FIRST = "the first update by itself (--log-every 1; transformers: logging_first_step) or an evaluation before it (eval_on_start)"
USUAL = (0.008, 1.25)  # betas in use; SimPO's are of another scale
HELD_OUT = (
    "at least three evaluations on held-out pairs with rewards/* and logps/* (they are of the same pairs every time)"
)

WEIGHTED = "rewards without weights of tokens: this run's have them, and its logps/* do not"


class Look(str):
    """Evidence for a severity of "look" alone."""


class Unseen(str):
    """What to log, so that the check can be made."""


def sides(prefix: str, *metrics: str) -> list[str]:
    """Names of a metric's two sides."""
    return [f"{prefix}{metric}/{side}" for metric in metrics for side in SIDES]


def thirds(values: np.ndarray) -> tuple[float, float, float]:
    """Means of the first and the last third, and the standard error of their difference (infinite for fewer than six)."""
    if not len(values):
        return math.nan, math.nan, math.inf
    k = max(1, len(values) // 3)
    first, last = values[:k], values[-k:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / k) if k > 1 else math.inf
    return float(first.mean()), float(last.mean()), error


def start(log: Log) -> tuple[str, int, float, float, float] | None:
    """Prefix, step, loss and both rewards where nothing is learned yet, if such a row is logged."""
    for prefix, latest in (("", 1), ("eval_", 0)):
        rows = log.rows(f"{prefix}loss", *sides(prefix, "rewards"))
        if len(rows[0]) and rows[0][0] <= latest:
            return prefix, *(column[0].item() for column in rows)
    return None


# ---- numbers that cannot be


def not_finite(log: Log) -> str | None:
    bad = {}
    for name, values in log.values.items():
        if name.removeprefix("eval_") in KNOWN:
            bad |= {name: steps} if (steps := [step for step, value in values if not math.isfinite(value)]) else {}
    if not bad:
        return None
    first = min(bad, key=lambda name: bad[name][0])
    rest = f"; also {', '.join(sorted(bad.keys() - {first}))}" if len(bad) > 1 else ""
    count, of = len(bad[first]), len(log.values[first])
    said = f"{first} is not finite at {count} of {of} steps, first at {bad[first][0]}{rest}"
    return Look(said) if set(bad) == {"grad_norm"} and count < 0.1 * of else said  # fp16 skips such an update


def nothing_scored(log: Log) -> str | None:
    steps, *logps = log.rows(*sides("", "logps"))
    return f"logps/* are exactly 0 at all {len(steps)} steps" if len(steps) and not np.any(logps) else None


def no_gradient(log: Log) -> str | None:
    steps, norm, loss = log.rows("grad_norm", "loss")
    zero = norm == 0
    if len(steps) and zero.mean() > 0.5 and loss[-1] > 0.05:
        return f"grad_norm is exactly 0 at {zero.sum()} of {len(steps)} steps while the loss is {loss[-1]:.4g}"
    return None


def start_not_zero(log: Log) -> str | None:
    if (row := start(log)) is None:
        return Unseen(FIRST)
    prefix, step, _, chosen, rejected = row
    nats = max(abs(chosen), abs(rejected)) / (log.settings.get("beta") or 0.1)
    said = (
        f"{prefix}rewards are {chosen:+.3g} (chosen) and {rejected:+.3g} (rejected) at step {step}, before any update"
    )
    return None if nats < 0.1 else said if nats > 0.3 else Look(said)  # a response's rounding in bf16 is below 0.1 nats


def first_loss(log: Log) -> str | None:
    if (row := start(log)) is None:
        return Unseen(FIRST)
    prefix, step, loss, *_ = row
    expected, words = LOG2, "log 2"
    if log.loss_type == "ipo":
        if log.settings.get("beta") is None:
            return Unseen("beta: add --beta")
        expected, words = 1 / (2 * log.settings["beta"]) ** 2, "1/(2 beta)^2"
    if abs(loss / expected - 1) < 0.03 or start_not_zero(log):
        return None
    said = f"{prefix}loss is {loss:.4g} at step {step}, where the margin is 0: {loss / expected:.3g} times {words}"
    return Look(f"{said} (another loss? name it: --loss-type)") if log.guessed else said


def loss_not_of_margins(log: Log) -> str | None:
    gamma, worst = (log.settings.get("gamma") or 0.0) if log.loss_type == "simpo" else 0.0, (0.0, "")
    for prefix in ("", "eval_"):
        steps, loss, chosen, rejected = log.rows(f"{prefix}loss", *sides(prefix, "rewards"))
        least = np.logaddexp(
            0.0, gamma - (chosen - rejected)
        )  # Jensen: the mean loss is no less than that of the mean margin
        for i in np.flatnonzero(loss < 0.97 * least - 0.01):
            said = f"{prefix}loss {loss[i]:.4g} at step {steps[i]}, but a margin of {chosen[i] - rejected[i]:.4g} gives at least "
            worst = max(worst, (least[i] - loss[i], f"{said}{least[i]:.4g}"))
    return (Look(worst[1]) if log.guessed else worst[1]) if worst[1] else None


# ---- rewards and log-probabilities


def reference_moves(log: Log) -> str | None:
    steps, chosen, rejected, loss = log.rows(*sides("", "rewards"), "loss")
    ahead, held_chosen, held_rejected, *logps = log.rows(*sides("eval_", "rewards", "logps"))
    moved = max(np.ptp(column) for column in logps) if len(ahead) > 1 else None
    if no_gradient(log) or nothing_scored(log):
        return None
    if (steps > 1).sum() > 1 and not np.any(chosen) and not np.any(rejected):
        norm = log.rows("grad_norm")[1]
        said = f"both rewards are exactly 0 at all {len(steps)} steps (loss {loss[-1]:.4f})"
        said += f" while gradients are not (norm {np.median(norm):.3g})" if len(norm) else ""
        return said + (f"; held-out logps moved by {moved:.3g} nats" if moved is not None else "")
    back = ahead[1:][(held_chosen == 0)[1:] & (held_rejected == 0)[1:]]
    if len(back) and moved:
        return (
            f"held-out rewards are back at exactly 0 at step {back[0]}, though held-out logps moved by {moved:.3g} nats"
        )
    return None


def gap_followed(log: Log) -> tuple[float, float, float, float] | None:
    """Of held-out rows: slope and R^2 of the margin over the gap of lr (from logps/*), and how far both went."""
    prefix = "eval_"
    steps, rc, rl, lc, ll = log.rows(*sides(prefix, "rewards", "logps"))
    if len(steps) < 3 or "weighted" in log.settings:
        return None
    gaps, margin = [lc - ll], rc - rl - (rc - rl).mean()
    kl_steps, kc, kl = log.rows(*sides(prefix, "kl"))
    if "tdpo" in log.loss_type and len(kl_steps) == len(steps):  # the authors' code logs with 1 whatever alpha is
        gaps += [gaps[0] + alpha * (kc - kl) for alpha in {1.0, log.settings.get("alpha", 1.0)}]
    fits = []
    for gap in gaps:
        x = gap - gap.mean()
        slope = float(x @ margin / max(x @ x, 1e-12))
        left = ((margin - slope * x) ** 2).sum() / max((margin**2).sum(), 1e-12)
        fits.append((1 - float(left), slope, float(np.ptp(x))))
    r2, slope, moved = max(fits)
    return slope, r2, moved, float(np.ptp(margin))


def swapped_sides(log: Log) -> str | None:
    if (held := gap_followed(log)) is None:
        return Unseen(WEIGHTED if "weighted" in log.settings else HELD_OUT)
    slope, r2, moved, margin = held
    if slope < 0 and r2 > 0.7 and moved > 0.3 and margin > 0.01:
        return (
            f"held-out margins go one way and logps/chosen - logps/rejected the other (slope {slope:.3g}, R^2 {r2:.2f})"
        )
    return None


def other_beta(log: Log) -> str | None:
    if (held := gap_followed(log)) is None:
        return Unseen(WEIGHTED if "weighted" in log.settings else HELD_OUT)
    (slope, r2, moved, _), beta = held, log.settings.get("beta")
    exact = log.loss_type in ("dpo", "ipo") or ("tdpo" in log.loss_type and "eval_kl/chosen" in log)
    if moved < 0.3:
        return None
    if exact and r2 < 0.9:
        said = f"held-out rewards do not follow held-out logps: R^2 {r2:.2f} over {moved:.3g} nats, 1 with a fixed reference"
        return Look(said) if log.guessed else said
    if slope < 0:  # `swapped_sides` says so
        return None
    if beta is None:
        usual = not exact or USUAL[0] < slope < USUAL[1]
        said = f"held-out margins moved by {slope:.3g} a nat of logps: is that your beta?"
        return Unseen(f"beta: add --beta (by these numbers it is {slope:.3g})") if usual else Look(said)
    if 1 / (most := 1.3 if exact else 3) < slope / beta < most:
        return None
    said = f"held-out margins moved by {slope:.3g} a nat of logps"
    return f"{said}, {slope / beta:.3g} times beta = {beta:g} (over {moved:.3g} nats)"


def below_half(log: Log) -> str | None:
    _, own, *both = log.rows("rewards/accuracies", *sides("", "rewards"))
    trained = thirds(both[0] - both[1])[1]
    for prefix in ("", "eval_"):
        steps, accuracy, chosen, rejected = log.rows(f"{prefix}rewards/accuracies", *sides(prefix, "rewards"))
        if len(steps) < 3 or not np.any(chosen - rejected):
            continue
        (_, late, _), (before, after, error) = thirds(accuracy), thirds(chosen - rejected)
        said = f"{prefix}rewards/accuracies {late:.2f} and {prefix}margin {after:.3g} in the last third"
        fell = before - after if prefix == "" or log.loss_type == "simpo" else -after  # a reference puts the start at 0
        if late > 0.45 or after > 0 or fell < 0:
            continue
        if not prefix and (fell > 2 * error or late < 0.35):
            return said
        if prefix and not fell < 0.15 * abs(trained):  # without training rows it is nan
            return said + (f", while training's are {thirds(own)[1]:.2f} and {trained:.3g}" if len(own) else "")
    return None
