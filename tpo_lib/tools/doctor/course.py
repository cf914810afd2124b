"""What the rules look for in the course of a run; checks.py has the numbers that contradict each other."""

from __future__ import annotations

import re

import numpy as np

from tpo_lib.tools.doctor.checks import LOG2, Look, Unseen, reference_moves, sides, thirds
from tpo_lib.tools.doctor.logs import Log, needs_reference


def loss_grows(log: Log) -> str | None:
    steps, loss = log.rows("loss")
    if len(steps) < 6:
        return None
    first, last, error = thirds(loss)
    logistic = needs_reference(log.loss_type) and log.loss_type != "ipo"
    if logistic and last > 1.15 * LOG2 and last - LOG2 > 2 * error:
        return f"the loss is {last:.3g} in the last third: above log 2 = 0.693, what knowing nothing gives"
    if last > 1.1 * first and last - first > 4 * error:
        return f"the loss went from {first:.3g} (first third) to {last:.3g} (last third, ± {error:.2g})"
    return None


def distance(log: Log, prefix: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    """What it is called, steps, and how far the policy is: kl/*, else -(mean reward), which beta KL is near to on its samples."""
    for metric, words, sign in (("kl", "KL", 0.5), ("rewards", "-(mean reward)", -0.5)):
        steps, *both = log.rows(*sides(prefix, metric))
        if len(steps) and (metric == "kl" or needs_reference(log.loss_type)):
            return prefix + words, steps, sign * sum(both)
    return None


def rate_too_high(log: Log) -> str | None:
    steps, loss = log.rows("loss")
    if len(steps) < 6:
        return None
    usual = np.median(loss)
    if loss.max() > (10 if log.loss_type == "ipo" else 3) * usual + 1:  # squares have the heavier tail
        return f"the loss is {loss.max():.3g} at step {steps[loss.argmax()]}, its median {usual:.3g}"
    for prefix, least in (("eval_", 4), ("", 9)):
        if log.loss_type != "sft" and (found := distance(log, prefix)) and len(found[1]) >= least:
            (words, _, far), k = found, len(found[1]) // 3
            most, last, error = far.max(), far[-1], 0.0
            if not prefix:  # batches differ
                middle, end = far[k:-k], far[-k:]
                most, last, error = middle.mean(), end.mean(), np.hypot(middle.std(), end.std()) / k**0.5
            if most > max(1.25 * last, 1.0 if "KL" in words else 0.1) and most - last > 4 * error:
                return f"{words} went up to {most:.3g} and back to {last:.3g}: overshot, then repaired"
            break
    return None


def gradients(log: Log) -> str | None:
    _, norm, loss = log.rows("grad_norm", "loss")
    k = len(norm) // 3
    if k < 2:
        return None
    first, last = np.median(norm[:k]), np.median(norm[-k:])
    said = f"from {first:.3g} (median of the first third) to {last:.3g} (of the last)"
    if last > 10 * first > 0:
        return f"grad_norm grew {said}"
    return (
        f"grad_norm vanished, {said}, at a loss of {loss[-1]:.3g}" if last < 0.01 * first and loss[-1] > 0.1 else None
    )


def stuck(log: Log) -> str | None:
    there = [name for name in sides("", "rewards") if name in log]
    steps, loss, *rewards = log.rows("loss", *there)
    if len(steps) < 3 or (there and reference_moves(log)):
        return None
    largest = max((abs(side).max() for side in rewards), default=None)  # None: the loss alone was logged
    late, rate = thirds(loss)[1], log.rows("learning_rate")[1]
    if abs(late - LOG2) < 0.01 and (largest is None or 0 < largest < 0.03):
        said = f"loss {late:.4f} in the last third" + (f", no reward beyond {largest:.2g}" if there else "")
        return said + (f", learning rate up to {rate.max():.2g}" if len(rate) else "")
    return None


def kl_drift(log: Log) -> str | None:
    steps, chosen, rejected = log.rows(*sides("eval_", "rewards"))
    at, *kl = log.rows(*sides("", "kl"))
    if len(at) and (late := max(thirds(side)[1] for side in kl)) > 50:
        return f"kl is {late:.3g} nats a response in the last third"
    if len(steps) < 5 or (found := distance(log, "eval_")) is None:
        return Unseen("five evaluations on held-out pairs or more (--eval-every; eval_steps)")
    (words, _, far), margin, half = found, chosen - rejected, len(steps) // 2
    if far[-1] > max(1.2 * far[half], 0.02) and margin[-1] < margin[half]:
        said = f"since step {steps[half]} the held-out margin went from {margin[half]:.3g} to {margin[-1]:.3g}"
        return f"{said}, {words} from {far[half]:.3g} to {far[-1]:.3g}"
    return None


def margins_alone(log: Log) -> str | None:
    steps, accuracy, chosen, rejected = log.rows("rewards/accuracies", *sides("", "rewards"))
    (_, late, error), (_, margin, spread) = thirds(accuracy), thirds(chosen - rejected)
    if len(steps) > 8 and abs(late - 0.5) < 0.05 and error < 0.05 and margin > max(0.1, 4 * spread):
        return f"margin {margin:.3g} in the last third, but accuracy {late:.2f}"
    return None


def not_held_out(log: Log) -> str | None:
    steps, loss = log.rows("eval_loss")
    if not len(steps):
        return Unseen("held-out pairs (--eval-pairs, --eval-every; eval_dataset)")
    (_, accuracy), (at, ahead) = log.rows("rewards/accuracies"), log.rows("eval_rewards/accuracies")
    if len(accuracy) and len(ahead) and (late := thirds(accuracy)[1]) > 0.75 and ahead[-1] < 0.6:
        return f"accuracy {late:.2f} in training, {ahead[-1]:.2f} on held-out pairs at step {at[-1]}"
    if loss[-1] > max(1.02 * loss.min(), loss[0]):
        low = f"eval_loss was lowest at step {steps[loss.argmin()]} ({loss.min():.3g})"
        return f"{low} and ends at {loss[-1]:.3g}, above where it began"
    return None


def too_good(log: Log) -> str | None:
    steps, loss, accuracy = log.rows("loss", "rewards/accuracies")
    late, sure = thirds(loss)[1], thirds(accuracy)[1]
    good = len(steps) > 5 and late < 0.05 and sure > 0.98
    return f"loss {late:.2g} and accuracy {sure:.2f} in the last third" if good else None


def lengths_grow(log: Log) -> str | None:
    names = [
        name for name in log.values if re.search(r"(mean|response|completion|chosen|eval)s?[_/]?(mean_)?len", name)
    ]
    for name in names:
        _, length = log.rows(name)
        first, last, _ = thirds(length)
        if last > 1.3 * first > 0:
            return f"{name} went from {first:.4g} to {last:.4g}"
    return None if names else Unseen("the mean length of what the policy writes (`evaluate` measures it)")


def floor_hit(log: Log) -> str | None:
    late = thirds(log.rows("guidance/floor_share")[1])[1]
    said = f"{late:.1%} of the tokens' weights sit on the floor in the last third"
    return said if late > 0.1 else Look(said) if late > 0.01 else None


def chosen_kl(log: Log) -> str | None:
    steps, chosen, rejected = log.rows(*sides("", "kl"))
    _, more, error = thirds(chosen - rejected)
    if len(steps) < 6 or more < max(0.1 * thirds(rejected)[1], 3 * error):
        return None
    return f"kl/chosen is larger than kl/rejected, by {more:.3g} ± {error:.2g} nats in the last third"


def guides_beta(log: Log) -> str | None:
    if "trained_beta" not in log.settings:
        return Unseen("the folder of a run of ours, whose guide was trained by `train` too and lies where it was")
    used, trained = log.settings["guide_beta"], log.settings["trained_beta"]
    return None if used == trained else f"guide_beta is {used:g}, the guide was trained with beta {trained}"


def both_fall(log: Log) -> str | None:
    for prefix in ("eval_", ""):
        steps, chosen, rejected = log.rows(*sides(prefix, "rewards"))
        if len(steps) > 2:
            c, r = thirds(chosen)[1], thirds(rejected)[1]
            return f"{prefix}rewards {c:.3g} (chosen) and {r:.3g} (rejected), margin {c - r:.3g}" if r < c < 0 else None
    return None


def no_reference(log: Log) -> str | None:
    steps, chosen = log.rows("rewards/chosen")
    return f"rewards/chosen is {chosen[0]:.3g} at step {steps[0]}"
