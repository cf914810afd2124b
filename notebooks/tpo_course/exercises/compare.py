"""Exercises of 06_compare.ipynb: an interval, a paired difference, reward at equal KL, and how many winners chance makes."""

from __future__ import annotations

import torch
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz

NOTEBOOK = "06_compare.ipynb"


def _numbers(n: int, seed: int, *, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draws(n: int, seed: int, resamples: int = 400) -> Tensor:
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


# ---- 1. an interval

_SHARES = torch.tensor([0.025, 0.975], dtype=torch.float64)


def _interval_of(resampled: Tensor, mean: Tensor) -> Tensor:
    return torch.stack([mean, *resampled.quantile(_SHARES)])


def _bootstrap(values: Tensor, draws: Tensor) -> Tensor:
    return _interval_of(values[draws].mean(-1), values.mean())


bootstrap_interval = Exercise(
    name="bootstrap_interval",
    title="An interval without a formula",
    what="<code>values</code> (n,) holds one number a prompt, <code>draws</code> (R, n) the indices of R resamples. Return a "
    "tensor of three: the mean, and the 2.5% and 97.5% quantiles of the resampled means.",
    why="Every interval of the course is made like this. It needs no normal distribution, only that prompts are "
    "independent.",
    difficulty=2,
    minutes=6,
    hints=(
        "<code>values[draws]</code> has the shape of <code>draws</code>: R data sets that might have been drawn.",
        "Take the mean of each of them first; then ask where the middle 95% of these R means lie.",
        "<code>means.quantile(torch.tensor([.025, .975], dtype=means.dtype))</code>; put <code>values.mean()</code> in front.",
    ),
    right=_bootstrap,
    cases=lambda: (
        Case({"values": _numbers(37, 0), "draws": _draws(37, 1)}),
        Case({"values": _numbers(5, 2, scale=9.0), "draws": _draws(5, 3)}, "five prompts"),
    ),
    mistakes=(
        Mistake(
            "These are the quantiles of the <i>values</i>: where single prompts lie. An interval of the mean asks where "
            "the mean would lie with other prompts, and is narrower by about the square root of n.",
            lambda values, draws: _interval_of(values, values.mean()),
        ),
        Mistake(
            "You took the mean over the resamples (dimension 0) instead of over the prompts of each resample (the last).",
            lambda values, draws: _interval_of(values[draws].mean(0), values.mean()),
        ),
        Mistake(
            "Quantiles .05 and .95 leave out a tenth: that is a 90% interval. For 95%, cut 2.5% on each side.",
            lambda values, draws: torch.stack(
                [values.mean(), *values[draws].mean(-1).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))]
            ),
        ),
        Mistake(
            "You returned smallest and largest resampled mean: the more you resample, the wider that gets.",
            lambda values, draws: torch.stack(
                [values.mean(), values[draws].mean(-1).min(), values[draws].mean(-1).max()]
            ),
        ),
        Mistake(
            "The first number is the mean of the resampled means. It only wobbles around the mean of the data: report the latter.",
            lambda values, draws: _interval_of(values[draws].mean(-1), values[draws].mean()),
        ),
    ),
    solution="compare",
)


# ---- 2. the difference of two policies


def _paired(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    return _bootstrap(first - second, draws)


def _pair_cases() -> tuple[Case, ...]:
    shared = _numbers(41, 5, scale=3.0)  # what a hard prompt does to both
    return (
        Case({"first": shared + _numbers(41, 6), "second": shared, "draws": _draws(41, 7)}),
        Case({"first": _numbers(6, 8), "second": _numbers(6, 9), "draws": _draws(6, 10)}, "unrelated policies"),
    )


def _two_draws(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    apart = first[draws].mean(-1) - second[draws.flip(0)].mean(-1)
    return _interval_of(apart, (first - second).mean())


def _gap_of_intervals(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    a, b = _bootstrap(first, draws), _bootstrap(second, draws)
    return torch.stack([a[0] - b[0], a[1] - b[2], a[2] - b[1]])


paired_difference = Exercise(
    name="paired_difference",
    title="Is A better than B?",
    what="<code>first</code> and <code>second</code> (n,) hold the rewards of two policies on the <i>same</i> n prompts, "
    "<code>draws</code> (R, n) resamples of the prompts. Return mean, 2.5% and 97.5% quantile of the difference first - second.",
    why="A hard prompt is hard for both. Compare prompt by prompt and that cancels; compare two intervals and it stays in.",
    difficulty=2,
    minutes=6,
    hints=(
        "A resample draws <i>prompts</i>. Both policies have to be seen on the prompts that were drawn.",
        "Subtract first. What is left is one number a prompt: the problem of the exercise before.",
    ),
    right=_paired,
    cases=_pair_cases,
    mistakes=(
        Mistake("The sign: first minus second, so that a positive number speaks for the first.", lambda first, second, draws: _paired(second, first, draws)),
        Mistake(
            "You resampled the two policies apart. What both owe to the prompt then no longer cancels, and the interval is too wide.",
            _two_draws,
        ),
        Mistake(
            "You subtracted the ends of two intervals. That is the widest gap the two allow, far wider than 95%: two intervals "
            "may well overlap although the difference is clear.",
            _gap_of_intervals,
        ),
        Mistake(
            "You took the size of every prompt's difference. Wins and losses must cancel: no absolute value.",
            lambda first, second, draws: _bootstrap((first - second).abs(), draws),
        ),
        Mistake(
            "This counts on how many prompts the first one wins. A fair question, but a different one: here the mean difference is asked for.",
            lambda first, second, draws: _bootstrap((first > second).double(), draws),
        ),
    ),
    solution="compare",
)  # fmt: skip


# ---- 3. reward at equal KL


def _reward_at(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    order = kl.argsort()
    kl, reward = kl[order], reward[order]
    if not kl[0] <= at <= kl[-1]:
        return torch.tensor(float("nan"), dtype=kl.dtype)
    right = int(torch.searchsorted(kl, torch.tensor(at, dtype=kl.dtype)).clamp(1, len(kl) - 1))
    share = (at - kl[right - 1]) / (kl[right] - kl[right - 1])
    return reward[right - 1] + share * (reward[right] - reward[right - 1])


def _extrapolated(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    order = kl.argsort()
    kl, reward = kl[order], reward[order]
    right = int(torch.searchsorted(kl, torch.tensor(at, dtype=kl.dtype)).clamp(1, len(kl) - 1))
    share = (at - kl[right - 1]) / (kl[right] - kl[right - 1])
    return reward[right - 1] + share * (reward[right] - reward[right - 1])


def _held(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    return _extrapolated(kl, reward, min(max(at, float(kl.min())), float(kl.max())))


def _unsorted(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    if not kl.min() <= at <= kl.max():
        return torch.tensor(float("nan"), dtype=kl.dtype)
    for i in range(len(kl) - 1):
        if kl[i] <= at <= kl[i + 1]:
            return reward[i] + (at - kl[i]) / (kl[i + 1] - kl[i]) * (reward[i + 1] - reward[i])
    return reward[-1]


def _nearest(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    if not kl.min() <= at <= kl.max():
        return torch.tensor(float("nan"), dtype=kl.dtype)
    return reward[(kl - at).abs().argmin()]


def _curves() -> tuple[Case, ...]:
    kl, reward = torch.tensor([0.0, 3.0, 8.0, 21.0]).double(), torch.tensor([0.5, 0.71, 0.8, 0.93]).double()
    mixed = torch.tensor([2, 0, 3, 1])
    return (
        Case({"kl": kl, "reward": reward, "at": 5.0}),
        Case({"kl": kl[mixed], "reward": reward[mixed], "at": 9.0}, "points that are not sorted by KL"),
        Case({"kl": kl, "reward": reward, "at": 30.0}, "a KL that the run never reached (answer nan)"),
    )


reward_at_kl = Exercise(
    name="reward_at_kl",
    title="Reward at equal KL",
    what="A run is a curve of points: <code>kl</code> (n,), nats, and <code>reward</code> (n,). Return the reward at KL = "
    "<code>at</code> by linear interpolation between the two neighbouring points, a scalar tensor; nan where the run never was. "
    "The points need not be sorted.",
    why="The end of a run says how far it went. What a nat of KL buys is what the papers' frontiers compare.",
    difficulty=3,
    minutes=8,
    hints=(
        "Sort by KL first. KL need not grow from one evaluation to the next.",
        "<code>torch.searchsorted(kl, at)</code> finds the right neighbour.",
        "share = (at - kl[i-1]) / (kl[i] - kl[i-1]); and before anything: is <code>at</code> between the smallest and the largest KL?",
    ),
    right=_reward_at,
    cases=_curves,
    mistakes=(
        Mistake("You took the nearest point. Where evaluations are far apart that compares runs at different KL again.", _nearest),
        Mistake(
            "You extended the last segment beyond the run's end. Nobody measured there: a frontier that is extrapolated is invented.",
            _extrapolated,
        ),
        Mistake("Beyond its end you hold the run's last reward. It was not measured there either: the answer is nan.", _held),
        Mistake("You interpolate between neighbours in <i>time</i>. Sort by KL first.", _unsorted),
        Mistake(
            "You interpolated between the run's two ends, past every point in between.",
            lambda kl, reward, at: torch.where(
                torch.tensor(bool(kl.min() <= at <= kl.max())),
                reward[kl.argmin()]
                + (at - kl.min()) / (kl.max() - kl.min()) * (reward[kl.argmax()] - reward[kl.argmin()]),
                float("nan"),
            ),
        ),
    ),
    solution="compare",
)  # fmt: skip


quiz = Quiz(
    (
        Question(
            "TDPO2 reaches reward .86 [.83, .88], DPO .90 [.88, .92]. Which objective is better?",
            (
                Option("DPO: its reward is higher and the intervals hardly touch.", False,
                       "Higher, yes; but at which KL? A run that may drift further can always buy more reward. Compare at equal KL."),
                Option("One cannot say from this: the KL of both is missing.", True,
                       "Reward alone rewards drifting. The frontier, reward against KL, is the comparison the papers make."),
                Option("Neither: the intervals touch.", False,
                       "Touching intervals prove nothing: the paired difference may well be clear. And the question is at which KL."),
            ),
        ),
        Question(
            "You evaluate on 160 prompts and get a 95% interval of ±.03. You train once more with another seed and land .05 away. What went wrong?",
            (
                Option("Nothing: the interval covers other prompts, not other training runs.", True,
                       "Seed spread is another error. Report both, or say which one you have."),
                Option("The bootstrap is broken.", False, "It answers its own question: which mean would other prompts give to this very policy?"),
                Option("160 prompts are too few.", False, "More prompts narrow the interval, and the two seeds stay .05 apart."),
            ),
        ),
        Question(
            "The independent judge rises as the reward rises, but by less. What is the best reading?",
            (
                Option("The policy learnt sentiment, and some of what it learnt pleases this reward alone.", True,
                       "The gap between the two is over-optimisation: the part of the gain that does not carry over."),
                Option("The judge is the worse classifier, so its figure can be ignored.", False,
                       "It was trained on other reviews and labelled no pair: that is what makes its word worth hearing."),
                Option("The reward is broken.", False, "It scores what it was trained to score; an optimiser finds where that is not what you meant."),
            ),
        ),
        Question(
            "Five objectives make ten comparisons. At 95% each, and all objectives equal in truth, how often is at least one 'significant'?",
            (
                Option("5% of the time.", False, "That is one comparison's rate. Ten chances to be fooled are more than one."),
                Option("More often: up to about 40% if they were independent.", True,
                       "1 - .95^10 = .40. They share runs, so it is somewhat less; but one star among ten is weak evidence."),
                Option("Never: equal objectives cannot differ.", False, "Samples differ even where the truth does not."),
            ),
        ),
    )
)  # fmt: skip
