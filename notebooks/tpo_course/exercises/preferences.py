"""Exercises of 01_preferences.ipynb: from scores to probabilities, to a loss, to its gradient, and to pairs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Uses
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld

chapter = Chapter(__file__)


def _leaf(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ---- 1. two rewards -> a probability


win_probability = chapter.exercise(
    "win_probability",
    lambda reward_w, reward_l: torch.sigmoid(reward_w - reward_l),
    lambda: (
        Case(reward_w=_leaf([1.2, -0.4, 0.7, -2.5, 0.3]), reward_l=_leaf([0.5, 0.9, 0.7, -3.0, -1.1])),
        Case("a single pair", reward_w=_leaf([-0.8]), reward_l=_leaf([1.7])),
        Case("rewards near 1,000", reward_w=_leaf([1001.0, 900.0]), reward_l=_leaf([1000.0, 902.0])),
    ),
    gap_reversed=lambda reward_w, reward_l: torch.sigmoid(reward_l - reward_w),
    overflows=lambda reward_w, reward_l: reward_w.exp() / (reward_w.exp() + reward_l.exp()),
    ratio_of_rewards=lambda reward_w, reward_l: reward_w / (reward_w + reward_l),
    squashed_apart=lambda reward_w, reward_l: reward_w.sigmoid() / (reward_w.sigmoid() + reward_l.sigmoid()),
    judged_alone=lambda reward_w, reward_l: reward_w.sigmoid() * (-reward_l).sigmoid(),
    softmax_over_batch=(
        lambda reward_w, reward_l: (reward_w - reward_l).softmax(0),
        lambda reward_w, reward_l: torch.stack([reward_w, reward_l]).softmax(-1)[0],
        lambda reward_w, reward_l: torch.cat([reward_w, reward_l]).softmax(0)[: len(reward_w)],
    ),
    logarithm=lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l),
    no_noise=lambda reward_w, reward_l: (reward_w > reward_l).double(),
)


# ---- 2. a batch of pairs -> a loss


def _batches() -> tuple[Case, ...]:
    far_w, far_l = (_leaf(values, torch.float32) for values in ([0.5, -90.0, 80.0], [1.0, 60.0, -70.0]))
    return (
        Case(reward_w=_leaf([0.9, -1.3, 2.0, 0.1, -0.6]), reward_l=_leaf([0.2, 0.4, -1.5, 0.1, -0.9])),
        Case("a single pair", reward_w=_leaf([-0.3]), reward_l=_leaf([1.1])),
        Case("gaps of 150 nats in float32", reward_w=far_w, reward_l=far_l),
    )


SMALL = (*(10.0**-power for power in range(4, 13)), torch.finfo(torch.float32).eps)  # what people add, or clamp at


def _kept_off_zero(size: float, clamp: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def wrong(reward_w: Tensor, reward_l: Tensor) -> Tensor:
        p = (reward_w - reward_l).sigmoid()
        return -(p.clamp_min(size) if clamp else p + size).log().mean()

    return wrong


preference_nll = chapter.exercise(
    "preference_nll",
    lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).mean(),
    _batches,
    log_of_sigmoid=lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().log().mean(),
    small_constant=(
        *(_kept_off_zero(size, clamp) for size in SMALL for clamp in (False, True)),
        lambda reward_w, reward_l: F.binary_cross_entropy((reward_w - reward_l).sigmoid(), torch.ones_like(reward_w)),
    ),
    no_minus=lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l).mean(),
    swapped=lambda reward_w, reward_l: -F.logsigmoid(reward_l - reward_w).mean(),
    summed=lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).sum(),
    no_logarithm=lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().mean(),
    averaged_first=lambda reward_w, reward_l: -F.logsigmoid((reward_w - reward_l).mean()),
)


# ---- 3. its gradient, for a reward that is linear in token counts


def _linear() -> tuple[Case, ...]:
    draw = torch.Generator().manual_seed(3)

    def case(rows: int, weights: list[float], words: str = "") -> Case:
        differences = torch.randint(-2, 3, (rows, len(weights)), generator=draw).double()
        return Case(words, weights=torch.tensor(weights, dtype=torch.float64), differences=differences)

    return case(5, [0.4, -0.7, 0.2]), case(3, [1.5, 0.0, -0.3, 0.8]), case(7, [0.0, 0.0], "weights that are still 0")


def _push(weight: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """(d,) gradient of the mean loss, every pair's difference weighed by -weight(margin)."""
    return lambda weights, differences: -(weight(differences @ weights)[:, None] * differences).mean(0)


def _by_autograd(weights: Tensor, differences: Tensor) -> Tensor:
    at = weights.clone().requires_grad_()
    return torch.autograd.grad(-F.logsigmoid(differences @ at).mean(), at)[0]


AUTOGRAD = ("autograd", "backward", "gradient", "jacobian", "jacrev", "jacfwd", "vjp", "grad", "value_and_grad")
_gradient = _push(lambda margin: torch.sigmoid(-margin))
nll_gradient = chapter.exercise(
    "nll_gradient",
    _gradient,
    _linear,
    by_autograd=Uses(AUTOGRAD, _by_autograd),
    sign_reversed=lambda **given: -_gradient(**given),
    weighted_by_confidence=_push(torch.sigmoid),
    no_factor=_push(torch.ones_like),
    slope_of_sigmoid=_push(lambda margin: torch.sigmoid(margin) * torch.sigmoid(-margin)),
    summed=lambda weights, differences: _gradient(weights, differences) * len(differences),
    averaged_apart=_push(lambda margin: torch.sigmoid(-margin).mean().expand_as(margin)),
)


# ---- 4. scores -> pairs


def _scores() -> tuple[Case, ...]:
    exact = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.125, 0.125, 1.0, 0.0]])  # gaps that floats hold exactly
    return (
        Case("gaps that equal min_gap exactly", scores=exact, min_gap=0.25),
        Case("min_gap = 0 and equal scores", scores=exact, min_gap=0.0),
        Case("three completions of one prompt", scores=torch.tensor([[0.9, 0.1, 0.4]]), min_gap=0.45),
        Case("scores that differ by a thousandth", scores=torch.tensor([[0.501, 0.5, 0.101]]), min_gap=0.0),
        Case("a gap of a thousandth, min_gap = 0.2", scores=torch.tensor([[0.501, 0.5, 0.2505]]), min_gap=0.2),
        Case("scores that differ by less than a millionth", scores=torch.tensor([[0.0100004, 0.0100001]]), min_gap=0.0),
        Case("a gap just below min_gap", scores=torch.tensor([[0.75, 0.500004]]), min_gap=0.25),
    )


def _gaps(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _right_pairs(scores: Tensor, min_gap: float) -> Tensor:
    return (_gaps(scores) > 0) & (_gaps(scores) >= min_gap)


def _on_logits(scores: Tensor, min_gap: float) -> Tensor:
    return _right_pairs(scores.logit(), min_gap)


def _scores_rounded(digits: int) -> Callable[[Tensor, float], Tensor]:
    return lambda scores, min_gap: _right_pairs(scores.round(decimals=digits), min_gap)


def _gaps_rounded(digits: int) -> Callable[[Tensor, float], Tensor]:
    def wrong(scores: Tensor, min_gap: float) -> Tensor:
        gaps = _gaps(scores).round(decimals=digits)
        return (gaps > 0) & (gaps >= min_gap)

    return wrong


def _best_worst(scores: Tensor, min_gap: float) -> Tensor:
    best, worst = (F.one_hot(i, scores.shape[-1]).bool() for i in (scores.argmax(-1), scores.argmin(-1)))  # (P, K)
    return best[:, :, None] & worst[:, None, :] & _right_pairs(scores, min_gap)


preferred_pairs = chapter.exercise(
    "preferred_pairs",
    _right_pairs,
    _scores,
    swapped=lambda scores, min_gap: _right_pairs(scores, min_gap).mT,
    absolute_gap=lambda scores, min_gap: (_gaps(scores).abs() > 0) & (_gaps(scores).abs() >= min_gap),
    ties=lambda scores, min_gap: _gaps(scores) >= min_gap,
    gap_equal_to_min_gap=lambda scores, min_gap: _gaps(scores) > min_gap,
    gaps_in_logits=_on_logits,
    rounded=tuple(way(digits) for digits in range(1, 7) for way in (_scores_rounded, _gaps_rounded)),
    no_min_gap=lambda scores, min_gap: _gaps(scores) > 0,
    order_of_sampling=lambda scores, min_gap: _right_pairs(scores, min_gap).triu(),
    best_against_worst=_best_worst,
)


# ---- 5. probabilities -> gaps


def _through() -> tuple[Case, ...]:
    def case(words: str, p: list[float], q: list[float]) -> Case:
        return Case(words, p_ab=torch.tensor(p, dtype=torch.float64), p_bc=torch.tensor(q, dtype=torch.float64))

    return (
        case("five triples", [0.7, 0.5, 0.9, 0.2, 0.35], [0.6, 0.8, 0.9, 0.8, 0.1]),
        case("nearly certain preferences", [0.999999, 1e-9], [0.9999, 0.3]),
    )


def _odds(p: Tensor) -> Tensor:
    return p / (1 - p)


through_a_third = chapter.exercise(
    "through_a_third",
    lambda p_ab, p_bc: torch.sigmoid(torch.logit(p_ab) + torch.logit(p_bc)),
    _through,
    product=lambda p_ab, p_bc: p_ab * p_bc,
    either=lambda p_ab, p_bc: p_ab * p_bc + (1 - p_ab) * (1 - p_bc),
    averaged=lambda p_ab, p_bc: (p_ab + p_bc) / 2,
    clearer_one=lambda p_ab, p_bc: torch.maximum(p_ab, p_bc),
    averaged_gaps=lambda p_ab, p_bc: torch.sigmoid((torch.logit(p_ab) + torch.logit(p_bc)) / 2),
    odds=lambda p_ab, p_bc: _odds(p_ab) * _odds(p_bc),
    gap=lambda p_ab, p_bc: torch.logit(p_ab) + torch.logit(p_bc),
    gaps_subtracted=lambda p_ab, p_bc: torch.sigmoid(torch.logit(p_ab) - torch.logit(p_bc)),
    logs_of_probabilities=lambda p_ab, p_bc: torch.sigmoid(p_ab.log() + p_bc.log()),
)


# ---- 6. comparisons -> rewards


def _fitted(wins: Tensor, rounds: int = 20_000) -> Tensor:
    """Zermelo's iteration: strength = wins / sum over the others of games / (sum of the two strengths)."""
    games, strength = wins + wins.T, torch.ones(len(wins), dtype=wins.dtype)
    for _ in range(rounds):
        new = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        new = new / new.log().mean().exp()
        if torch.allclose(new, strength, rtol=1e-13, atol=0.0):
            break
        strength = new
    return strength.log() - strength.log().mean()


def _tables() -> tuple[Case, ...]:
    few = torch.tensor([[0.0, 8, 5, 9], [2, 0, 6, 3], [5, 4, 0, 7], [1, 7, 3, 0]], dtype=torch.float64)
    gaps = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    exact = 100 * torch.sigmoid(gaps[:, None] - gaps) * (1 - torch.eye(3, dtype=torch.float64))
    never = torch.tensor([[0.0, 3, 0], [0, 0, 4], [1, 2, 0]], dtype=torch.float64)
    return (
        Case("four responses, ten comparisons of each two", wins=few),
        Case("shares that are exactly Bradley-Terry's", wins=exact),
        Case("pairs of which one side never won", wins=never),
    )


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def _mean_log_odds(wins: Tensor) -> Tensor:
    odds = (wins / wins.T).log().fill_diagonal_(0.0)
    return _centred(odds.nan_to_num(0.0, 0.0, 0.0).mean(1))


def _share(wins: Tensor) -> Tensor:
    return wins.sum(1) / (wins + wins.T).sum(1)


fit_rewards = chapter.exercise(
    "fit_rewards",
    _fitted,
    _tables,
    first_at_zero=lambda wins: _fitted(wins) - _fitted(wins)[0],
    strengths=(lambda wins: _fitted(wins).exp(), lambda wins: _fitted(wins).softmax(0)),
    sign_reversed=(lambda wins: -_fitted(wins), lambda wins: _fitted(wins.T)),
    share_of_wins=(
        lambda wins: _centred(_share(wins).logit()),
        lambda wins: _share(wins).logit(),
        lambda wins: _centred(_share(wins).log()),
        lambda wins: _share(wins),
    ),
    mean_log_odds=_mean_log_odds,
    too_few_rounds=tuple(lambda wins, rounds=rounds: _fitted(wins, rounds) for rounds in (2, 5, 10, 20)),
)


# ---- 7. predictions, derivations, explanations


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=3, horizon=2, seed=5, num_prompts=2, temperature=2)


predict = chapter.answer
four_times_the_labels = chapter.predict(
    "four_times_the_labels", 0.5, quarter=0.25, no_gain=1.0, sixteenth=0.0625, upside_down=2
)
unseen = chapter.choose("unseen", "prompt_shift", "other_split")
loss_in_steps = chapter.order(
    "loss_in_steps",
    "model",
    "divided",
    "likelihood",
    "logarithm",
    "average",
    averaged_first=("average", "logarithm"),
    data_before_model=("likelihood", "model"),
)
shift_notices = chapter.break_it(
    "shift_notices",
    "preferences.shift",
    _world,
    {
        "larger": ("3 * _noise", "30 * _noise"),
        "per_response": ("b[w.responses.prompt]", "b[w.responses.tokens[:, 0] % len(b)]"),
        "scaled": ("w.returns + b", "2 * w.returns + b"),
        "none": ("3 * _noise", "0 * _noise"),
    },
)
line_of_the_loss = chapter.name_the_bug("line_of_the_loss", "mean_inside")
what_is_lost = chapter.open_ended("what_is_lost")
how_many = chapter.predict("how_many", 7, within=0.01, nine=9, twelve=12, six=6)
one_nat = chapter.predict("one_nat", 0.73, within=0.1, always=1.0, never_sure=0.5, one_minus=0.63, percent=73)
cycle = chapter.predict("cycle", 0.5, within=0.1, compromise=0.7, as_told=0.9)
guess_or_coin = chapter.predict("guess_or_coin", "+")
badly_wrong = chapter.predict("badly_wrong", 2, within=0.1, by_the_loss=14.4, linear=10, vanishes=0, by_the_odds=22_026)
no_noise = chapter.predict("no_noise", "none")
paid_most = chapter.predict("paid_most", "awful")
close_pairs = chapter.predict("close_pairs", 0.38, most=0.8, few=0.1, percent=38)
felt_as_scores = chapter.predict("felt_as_scores", 0.57, within=0.08, as_before=0.79, coin=0.5, surer=0.9)
fresh_correlation = chapter.predict("fresh_correlation", 0.34, within=0.4, as_in_training=1.0, nothing=0.0)
close_or_clear = chapter.predict("close_or_clear", "+")


quiz = chapter.quiz()
