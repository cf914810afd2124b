"""Exercises of 01_preferences.ipynb: from scores to probabilities, to a loss, to its gradient, and to pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz

NOTEBOOK = "01_preferences.ipynb"


def _leaf(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ---- 1. two rewards -> a probability


def _rewards() -> tuple[Case, ...]:
    return (
        Case({"reward_w": _leaf([1.2, -0.4, 0.7, -2.5, 0.3]), "reward_l": _leaf([0.5, 0.9, 0.7, -3.0, -1.1])}),
        Case({"reward_w": _leaf([-0.8]), "reward_l": _leaf([1.7])}, "a single pair"),
        Case({"reward_w": _leaf([1001.0, 900.0]), "reward_l": _leaf([1000.0, 902.0])}, "rewards near 1,000"),
    )


win_probability = Exercise(
    name="win_probability",
    title="From two rewards to a probability",
    what="Return the Bradley-Terry probability that the first response beats the second, elementwise: two (B,) tensors "
    "of rewards in, one (B,) tensor of probabilities out. It must also work for rewards near 1,000.",
    why="Everything in this course passes through this function: annotators draw their answers from it, and every "
    "preference loss is its negative logarithm at some reward.",
    difficulty=1,
    minutes=4,
    hints=(
        "The probability depends on the gap of the two rewards alone. Which function of one number is a softmax over "
        "two?",
        "$\\frac{e^{r_w}}{e^{r_w}+e^{r_l}}$: divide numerator and denominator by $e^{r_w}$.",
        "<code>torch.sigmoid</code> of the gap, winner minus loser.",
    ),
    right=lambda reward_w, reward_l: torch.sigmoid(reward_w - reward_l),
    cases=_rewards,
    mistakes=(
        Mistake(
            "You took the gap the wrong way round: this is the probability that the <i>second</i> response wins. The "
            "gap is reward_w minus reward_l.",
            lambda reward_w, reward_l: torch.sigmoid(reward_l - reward_w),
        ),
        Mistake(
            "The formula is right, but it overflows: exp(1,000) is infinite in floating point and inf/inf is nan. "
            "Divide by the larger exponential first; what is left is a sigmoid of the gap.",
            lambda reward_w, reward_l: reward_w.exp() / (reward_w.exp() + reward_l.exp()),
        ),
        Mistake(
            "You divided the rewards themselves. Rewards may be negative and have no zero point; the strengths that "
            "are compared are their exponentials.",
            lambda reward_w, reward_l: reward_w / (reward_w + reward_l),
        ),
        Mistake(
            "You squashed each reward with a sigmoid before comparing. Then adding a constant to both would change "
            "the answer; a preference sees the gap alone, so subtract first.",
            lambda reward_w, reward_l: reward_w.sigmoid() / (reward_w.sigmoid() + reward_l.sigmoid()),
        ),
        Mistake(
            "You multiplied P(first is good) by P(second is bad), as if each response were judged alone. One "
            "comparison gives one answer: it is a softmax over two, not a product.",
            lambda reward_w, reward_l: reward_w.sigmoid() * (-reward_l).sigmoid(),
        ),
        Mistake(
            "You returned the logarithm of the probability. The loss needs that later; here probabilities are asked "
            "for.",
            lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l),
        ),
        Mistake(
            "You returned who has the larger reward. Bradley-Terry's annotator is noisy: a gap of 0.7 wins two times "
            "in three, not always, and without the noise a label says nothing about the size of the gap.",
            lambda reward_w, reward_l: (reward_w > reward_l).double(),
        ),
    ),
    solution="preferences",
)


# ---- 2. a batch of pairs -> a loss


def _batches() -> tuple[Case, ...]:
    narrow = torch.float32
    return (
        Case({"reward_w": _leaf([0.9, -1.3, 2.0, 0.1, -0.6]), "reward_l": _leaf([0.2, 0.4, -1.5, 0.1, -0.9])}),
        Case({"reward_w": _leaf([-0.3]), "reward_l": _leaf([1.1])}, "a single pair"),
        Case(
            {"reward_w": _leaf([0.5, -90.0, 80.0], narrow), "reward_l": _leaf([1.0, 60.0, -70.0], narrow)},
            "gaps of 150 nats in float32",
        ),
    )


preference_nll = Exercise(
    name="preference_nll",
    title="The negative log-likelihood of a batch of pairs",
    what="Return the mean over the batch of $-\\log \\sigma(r_w - r_l)$: two (B,) tensors in, a scalar out. Value and "
    "gradient must stay finite at gaps of 150 nats in float32.",
    why="This is the loss of a reward model, and with the right rewards put in it is the loss of every preference "
    "objective in this course. The naive way to write it gives <code>inf</code>, then <code>nan</code>, on the first "
    "pair that the model gets badly wrong.",
    difficulty=2,
    minutes=6,
    hints=(
        "What is sigmoid(-150) in float32, and what is its logarithm?",
        "$\\log \\sigma(m) = -\\log(1 + e^{-m})$. PyTorch has a function that computes it without ever forming "
        "$\\sigma(m)$.",
        "<code>torch.nn.functional.logsigmoid</code>; then the sign, then the mean.",
    ),
    right=lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).mean(),
    cases=_batches,
    mistakes=(
        Mistake(
            "Right on paper, infinite in float32: sigmoid(-150) rounds to 0, its logarithm is -inf and the gradient "
            "nan. Take the logarithm of the sigmoid in one step (logsigmoid, or softplus of the negative gap).",
            lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().log().mean(),
        ),
        Mistake(
            "A small constant inside the logarithm (or a clamp) hides the infinity, but it also stops the gradient "
            "exactly where the model is most wrong: at a gap of -150 the slope should be -1 and is 0. Use logsigmoid.",
            lambda reward_w, reward_l: -((reward_w - reward_l).sigmoid() + 1e-8).log().mean(),
        ),
        Mistake(
            "The sign is missing: this is the log-likelihood. Minimising it would make the chosen responses lose.",
            lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l).mean(),
        ),
        Mistake(
            "Chosen and rejected are swapped: this teaches the model that the rejected response won.",
            lambda reward_w, reward_l: -F.logsigmoid(reward_l - reward_w).mean(),
        ),
        Mistake(
            "You summed over the batch. The mean is asked for, so that the size of a step does not grow with the "
            "batch.",
            lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).sum(),
        ),
        Mistake(
            "The logarithm is missing: you maximise the mean probability. That loss goes flat on pairs that are badly "
            "wrong, so they stop teaching; it is no likelihood.",
            lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().mean(),
        ),
        Mistake(
            "You averaged the gaps, then took one logarithm. Every pair is an observation of its own: take the "
            "logarithm pair by pair and average last.",
            lambda reward_w, reward_l: -F.logsigmoid((reward_w - reward_l).mean()),
        ),
    ),
    solution="preferences",
)


# ---- 3. its gradient, for a reward that is linear in token counts


def _linear() -> tuple[Case, ...]:
    draw = torch.Generator().manual_seed(3)

    def counts(rows: int, columns: int) -> Tensor:
        return torch.randint(-2, 3, (rows, columns), generator=draw).double()

    return (
        Case({"weights": torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64), "differences": counts(5, 3)}),
        Case({"weights": torch.tensor([1.5, 0.0, -0.3, 0.8], dtype=torch.float64), "differences": counts(3, 4)}),
        Case({"weights": torch.zeros(2, dtype=torch.float64), "differences": counts(7, 2)}, "weights that are still 0"),
    )


def _right_gradient(weights: Tensor, differences: Tensor) -> Tensor:
    return -(torch.sigmoid(-(differences @ weights))[:, None] * differences).mean(0)


def _by_confidence(weights: Tensor, differences: Tensor) -> Tensor:
    return -(torch.sigmoid(differences @ weights)[:, None] * differences).mean(0)


def _without_surprise(weights: Tensor, differences: Tensor) -> Tensor:
    return -differences.mean(0)


def _of_probability(weights: Tensor, differences: Tensor) -> Tensor:
    p = torch.sigmoid(differences @ weights)
    return -((p * (1 - p))[:, None] * differences).mean(0)


def _mean_first(weights: Tensor, differences: Tensor) -> Tensor:
    return -torch.sigmoid(-(differences @ weights)).mean() * differences.mean(0)


nll_gradient = Exercise(
    name="nll_gradient",
    title="Whom does the loss push, and how hard?",
    what="The reward is linear, $\\hat r(y) = \\theta \\cdot n(y)$, where $n(y)$ counts the tokens of $y$. Given the "
    "weights $\\theta$ (d,) and the differences $n(y_w) - n(y_l)$ of B pairs as a (B, d) tensor, return by hand, "
    "without autograd, the (d,) gradient of the mean of $-\\log \\sigma(\\hat r(y_w) - \\hat r(y_l))$.",
    why="The factor in front of each pair is what training is made of: it is the probability that the model gave to "
    "the wrong answer. DPO's gradient has the same factor.",
    difficulty=3,
    minutes=8,
    hints=(
        "Chain rule: the derivative of $-\\log \\sigma(m)$ with respect to the margin $m$, times that of $m$ with "
        "respect to $\\theta$.",
        "$\\frac{d}{dm}\\bigl[-\\log \\sigma(m)\\bigr] = -\\sigma(-m)$, and $m = (n_w - n_l) \\cdot \\theta$.",
        "<code>-(torch.sigmoid(-margins)[:, None] * differences)</code>, then the mean over the pairs.",
    ),
    right=_right_gradient,
    cases=_linear,
    mistakes=(
        Mistake(
            "The sign is reversed: this is the direction in which the likelihood rises. The gradient of the loss is "
            "its negative, and the optimizer subtracts it.",
            lambda weights, differences: -_right_gradient(weights, differences),
        ),
        Mistake(
            "You weighted each pair by $\\sigma(m)$, the probability of the right answer. So pairs the model already "
            "has right would push hardest; the factor is $\\sigma(-m)$, the probability of the wrong one.",
            _by_confidence,
        ),
        Mistake(
            "You dropped the factor $\\sigma(-m)$: every pair pushes alike, for ever. That is the gradient of minus "
            "the mean margin, which has no minimum.",
            _without_surprise,
        ),
        Mistake(
            "You differentiated the sigmoid, not its logarithm: $\\sigma(m)\\sigma(-m)$ vanishes on pairs that are "
            "badly wrong. The logarithm divides it by $\\sigma(m)$.",
            _of_probability,
        ),
        Mistake(
            "You summed over the pairs; the loss is their mean.",
            lambda weights, differences: _right_gradient(weights, differences) * len(differences),
        ),
        Mistake(
            "You averaged surprise and differences separately and multiplied the averages. Each pair's difference "
            "must carry its own surprise: multiply first, average last.",
            _mean_first,
        ),
    ),
    solution="preferences",
)


# ---- 4. scores -> pairs


def _scores() -> tuple[Case, ...]:
    exact = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.125, 0.125, 1.0, 0.0]])  # gaps that floats hold exactly
    return (
        Case({"scores": exact, "min_gap": 0.25}, "gaps that equal min_gap exactly"),
        Case({"scores": exact, "min_gap": 0.0}, "min_gap = 0 and equal scores"),
        Case({"scores": torch.tensor([[0.9, 0.1, 0.4]]), "min_gap": 0.45}, "three completions of one prompt"),
    )


def _gaps(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _right_pairs(scores: Tensor, min_gap: float) -> Tensor:
    return (_gaps(scores) > 0) & (_gaps(scores) >= min_gap)


def _best_worst(scores: Tensor, min_gap: float) -> Tensor:
    best, worst = scores.argmax(-1), scores.argmin(-1)
    picked = torch.zeros_like(_gaps(scores), dtype=torch.bool)
    picked[torch.arange(len(scores)), best, worst] = True
    return picked & _right_pairs(scores, min_gap)


preferred_pairs = Exercise(
    name="preferred_pairs",
    title="From scores to pairs",
    what="Given the scores (P, K) of K completions of each of P prompts, return a (P, K, K) boolean tensor: entry [p, "
    "i, j] is True if completion i is chosen over completion j, that is if its score is higher and by at least "
    "<code>min_gap</code> (&ge; 0). Equal scores are no preference, whatever <code>min_gap</code> is.",
    why="This is the whole recipe behind the preference data of controlled sentiment; a mistake here is inherited by "
    "every model trained on it, and no loss curve will show it.",
    difficulty=2,
    minutes=6,
    hints=(
        "Two new axes turn (P, K) into all gaps at once: (P, K, 1) minus (P, 1, K).",
        "What does <code>gap &gt;= min_gap</code> say about a completion and itself when <code>min_gap</code> is 0?",
        "<code>(gap &gt; 0) &amp; (gap &gt;= min_gap)</code>.",
    ),
    right=_right_pairs,
    cases=_scores,
    mistakes=(
        Mistake(
            "Chosen and rejected are swapped: [p, i, j] must be True where i, the first index after the prompt, has "
            "the higher score.",
            lambda scores, min_gap: _right_pairs(scores, min_gap).mT,
        ),
        Mistake(
            "You compared the absolute gap: every pair then stands in the data twice, once with each winner, and the "
            "two cancel.",
            lambda scores, min_gap: (_gaps(scores).abs() > 0) & (_gaps(scores).abs() >= min_gap),
        ),
        Mistake(
            "At min_gap = 0 you let ties through, and even a completion against itself: a gap of 0 is at least 0, but "
            "it is no preference.",
            lambda scores, min_gap: _gaps(scores) >= min_gap,
        ),
        Mistake(
            "A pair whose gap equals min_gap exactly counts: the gap must be <i>at least</i> min_gap, so >=, not >.",
            lambda scores, min_gap: _gaps(scores) > min_gap,
        ),
        Mistake(
            "You ignored min_gap: every two different scores became a pair.",
            lambda scores, min_gap: _gaps(scores) > 0,
        ),
        Mistake(
            "You kept only pairs where the winner was sampled first. The order of sampling means nothing: look at all "
            "i and j, and the winner takes the chosen place.",
            lambda scores, min_gap: _right_pairs(scores, min_gap).triu(),
        ),
        Mistake(
            "You kept the best against the worst of each prompt only. That is another rule; here every two "
            "completions may make a pair, 6 of 4.",
            _best_worst,
        ),
    ),
    solution="preferences",
)


quiz = Quiz(
    (
        Question(
            "You train two reward models to the end on the same pairs. On every response to one prompt, the second "
            "gives exactly 7 more than the first. Which one is better?",
            (
                Option(
                    "Neither: on these data they are the same.",
                    True,
                    "A number that depends on the prompt alone leaves every gap, every probability and the loss where "
                    "it was.",
                ),
                Option(
                    "The first: smaller rewards are better calibrated.",
                    False,
                    "Calibration is about probabilities, and those depend on gaps, which are equal.",
                ),
                Option(
                    "The second: it found more reward.",
                    False,
                    "A reward has no zero point. Only gaps between responses to the same prompt mean anything.",
                ),
            ),
        ),
        Question(
            "A fitted reward gives 4 to an answer to question A and 1 to an answer to question B. What follows?",
            (
                Option(
                    "The first answer beats the second with probability σ(3).",
                    False,
                    "No annotator ever compared answers to different questions, so the shift between A and B is "
                    "arbitrary.",
                ),
                Option(
                    "Nothing about which of the two is the better answer.",
                    True,
                    "f(A) and f(B) are not identified. Compare within a prompt, or subtract a baseline per prompt "
                    "first.",
                ),
                Option(
                    "Question A is easier.",
                    False,
                    "Each question's zero point is free: preferences do not fix it.",
                ),
            ),
        ),
        Question(
            "Labels come from the order of two scores, without noise, and the reward can order all training pairs. "
            "You fit by maximum likelihood with no penalty. What happens?",
            (
                Option(
                    "It converges to the scores.",
                    False,
                    "Only their order was ever shown; many rewards have that order.",
                ),
                Option(
                    "It converges to the scores up to a shift per prompt.",
                    False,
                    "That is what noisy labels give. Without noise doubling all rewards always lowers the loss, so "
                    "nothing stops the scale.",
                ),
                Option(
                    "The rewards grow without bound while the loss falls towards 0.",
                    True,
                    "Early stopping or a penalty then picks the scale. In DPO the reference and the number of updates "
                    "play that part.",
                ),
            ),
        ),
        Question(
            "The annotators' own noise is 0.58 nats per pair and your reward model's loss on fresh pairs is 0.60. How "
            "good is it?",
            (
                Option(
                    "Poor: 0.60 is close to log 2 = 0.69, a coin flip.",
                    False,
                    "Compare with the noise, not with 0: the loss is entropy plus KL, and nothing gets below the "
                    "entropy.",
                ),
                Option(
                    "Very good: only 0.02 nats separate its probabilities from the annotators'.",
                    True,
                    "The rest is noise in the labels, which no model removes.",
                ),
                Option(
                    "It cannot be said without its accuracy.",
                    False,
                    "Accuracy says less: the KL of 0.02 nats is about the probabilities themselves.",
                ),
            ),
        ),
        Question(
            "You raise min_gap from 0 to 0.4 on pairs labelled by score. What do you gain and what do you lose?",
            (
                Option(
                    "You gain clearer pairs; you lose most of the pairs, and some prompts altogether.",
                    True,
                    "Wide gaps are what a noisy annotator would agree on; but the data shrink, and prompts drop out "
                    "altogether.",
                ),
                Option(
                    "You gain correct labels: those below 0.4 were wrong.",
                    False,
                    "Labels made from the score's order are all right by that score. Small gaps are where another "
                    "judge may disagree.",
                ),
                Option(
                    "Nothing changes: the loss sees only which response won.",
                    False,
                    "Each label says the same, but which pairs are in the data changes what the model learns from.",
                ),
            ),
        ),
    )
)
