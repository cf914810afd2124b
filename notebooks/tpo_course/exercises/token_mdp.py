"""Exercises of chapter 3, the token MDP: returns, advantages, the soft backup, the credit of a token, and what PPO clips."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case, marks, normal
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld

chapter = Chapter(__file__)


def _zero(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _moved(values: Tensor) -> Tensor:
    """(N, T): in column t what stood in column t + 1, 0 in the last one."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


# ---- return_to_go


def _to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """From the last token to the first; 0 outside the response."""
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in _zero(mask, rewards).flip(1).unbind(1):
        total = reward + gamma * total
        columns.append(total)
    return _zero(mask, torch.stack(columns[::-1], dim=1))


def _from_the_start(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _to_go(rewards * gamma ** (mask.long().cumsum(1) - 1), mask, 1.0)


def _first(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) everywhere what stands at the first response token."""
    return values.gather(1, mask.long().argmax(1, keepdim=True)).expand_as(values)


def _so_far(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """What was earned up to each token, later rewards counting more."""
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in _zero(mask, rewards).unbind(1):
        total = reward + gamma * total
        columns.append(total)
    return torch.stack(columns, dim=1)


def _discounted_so_far(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return (_zero(mask, rewards) * gamma ** (mask.long().cumsum(1) - 1)).cumsum(1)


def _ways(answer: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """An answer as it is, and with zeros outside the response."""
    return answer, lambda mask, **given: _zero(mask, answer(mask=mask, **given))


def _return_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[9.0, 1.0, -0.5, 2.0, 0.25, 9.0], [9.0, 9.0, 0.75, -3.0, 9.0, 9.0]])
    mask = marks(".xxxx.", "..xx..")
    single = {"rewards": torch.tensor([[-2.0, 0.5, 4.0]]), "mask": marks("xxx")}
    return (
        Case("responses of 4 and 2 tokens, gamma = 0.9", rewards=rewards, mask=mask, gamma=0.9),
        Case("the same without discount", rewards=rewards, mask=mask, gamma=1.0),
        Case("no prompt and no padding, gamma = 0.5", **single, gamma=0.5),
    )


return_to_go = chapter.exercise(
    "return_to_go",
    _to_go,
    _return_cases,
    discount_off_by_one=lambda rewards, mask, gamma: gamma * _to_go(rewards, mask, gamma),
    no_discount=lambda rewards, mask, gamma: _to_go(rewards, mask, 1.0),
    discounted_from_start=_from_the_start,
    past=(
        *_ways(_so_far),
        *_ways(lambda rewards, mask, gamma: _so_far(rewards, mask, 1.0)),
        *_ways(_discounted_so_far),
    ),
    without_own_reward=tuple(
        lambda rewards, mask, gamma, power=power: _zero(mask, gamma**power * _moved(_to_go(rewards, mask, gamma)))
        for power in (0, 1)
    ),
    whole_return=(
        *_ways(lambda rewards, mask, gamma: _first(_to_go(rewards, mask, gamma), mask)),
        *_ways(lambda rewards, mask, gamma: _first(_to_go(rewards, mask, 1.0), mask)),
    ),
    mean=lambda rewards, mask, gamma: (
        _to_go(rewards, mask, gamma) / _to_go(torch.ones_like(rewards), mask, 1.0).clamp_min(1)  # tokens to the end
    ),
    no_mask=lambda rewards, mask, gamma: _zero(mask, _to_go(rewards, torch.ones_like(mask), gamma)),
    prompt_not_zero=lambda rewards, mask, gamma: _to_go(_zero(mask, rewards), torch.ones_like(mask), gamma),
)


# ---- advantages


def _of_values(formula: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The formula of reward, value of the state, value of the next one (0 after the response) and gamma, 0 off the response."""
    return lambda rewards, values, mask, gamma: _zero(
        mask, formula(rewards, values, _moved(_zero(mask, values)), gamma)
    )


_advantage = _of_values(lambda reward, now, then, gamma: reward + gamma * then - now)


def _looking_back(masked: bool, name: str = "values") -> Callable[..., Tensor]:
    """With the value (of the argument `name`) one column to the left, as `roll(1)` brings it."""

    def wrong(rewards: Tensor, mask: Tensor, gamma: float, **given: Tensor) -> Tensor:
        values = given[name]
        before = (_zero(mask, values) if masked else values).roll(1, dims=1)
        return _zero(mask, rewards + gamma * before - values)

    return wrong


def _advantage_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[7.0, 1.0, -0.5, 2.0, 0.25, 7.0], [7.0, 7.0, 0.75, -3.0, 7.0, 7.0]])
    values = torch.tensor([[5.0, 0.3, 1.2, -0.8, 0.6, 5.0], [5.0, 5.0, -1.1, 0.4, 5.0, 5.0]])
    mask = marks(".xxxx.", "..xx..")
    single = {"rewards": torch.tensor([[2.0, 7.0]]), "values": torch.tensor([[0.5, 5.0]]), "mask": marks("x.")}
    return (
        Case("responses of 4 and 2 tokens, no discount", rewards=rewards, values=values, mask=mask, gamma=1.0),
        Case("the same with gamma = 0.9", rewards=rewards, values=values, mask=mask, gamma=0.9),
        Case("a response of one token", **single, gamma=0.9),
    )


advantages = chapter.exercise(
    "advantages",
    _advantage,
    _advantage_cases,
    value_after_the_end=lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * _moved(values) - values),
    own_value_ahead=_of_values(lambda reward, now, then, gamma: reward + gamma * now - now),
    values_swapped=_of_values(lambda reward, now, then, gamma: reward + now - gamma * then),
    sign_reversed=_of_values(lambda reward, now, then, gamma: now - reward - gamma * then),
    rolled_backwards=tuple(_looking_back(masked) for masked in (True, False)),
    no_next_value=_of_values(lambda reward, now, then, gamma: reward - now),
    q_function=_of_values(lambda reward, now, then, gamma: reward + gamma * then),
    discount_off_by_one=_of_values(lambda reward, now, then, gamma: gamma * (reward + then) - now),
    no_discount=_of_values(lambda reward, now, then, gamma: reward + then - now),
    one_sample=lambda rewards, values, mask, gamma: _zero(mask, _to_go(rewards, mask, gamma) - values),
    value_of_the_start=lambda values, mask, **given: (
        _advantage(values=values, mask=mask, **given) + _zero(mask, values - _first(values, mask))
    ),
    not_zero_outside=lambda rewards, values, mask, gamma: rewards + gamma * _moved(_zero(mask, values)) - values,
)


# ---- soft_backup


def _soft_backup(ref_logps: Tensor, q: Tensor, beta: float) -> Tensor:
    return beta * torch.logsumexp(ref_logps + q / beta, dim=-1)


def _soft_cases() -> tuple[Case, ...]:
    def case(logits: list, q: list, beta: float, words: str) -> Case:
        ref_logps, q = torch.tensor(logits).log_softmax(-1), torch.tensor(q, requires_grad=True)
        return Case(words, ref_logps=ref_logps, q=q, beta=beta)

    two = [[0.0, 1.5, -0.5], [2.0, 0.0, -1.0]], [[1.0, -0.5, 0.3], [-0.2, 0.9, 1.4]]  # two states, three tokens
    steep = [[[0.3, -1.0]], [[0.0, 1.0]]], [[[40.0, 39.8]], [[-40.0, 10.0]]]
    return (
        case(*two, 0.5, "beta = 0.5"),
        case(*two, 2.0, "beta = 2"),
        case(*steep, 0.1, "q / beta = 400, beyond exp"),
    )


soft_backup = chapter.exercise(
    "soft_backup",
    _soft_backup,
    _soft_cases,
    maximum=lambda ref_logps, q, beta: q.max(dim=-1).values,
    mean_of_q=lambda ref_logps, q, beta: (ref_logps.exp() * q).sum(-1),
    no_reference=lambda ref_logps, q, beta: beta * torch.logsumexp(q / beta, dim=-1),
    beta_on_wrong_side=lambda ref_logps, q, beta: torch.logsumexp(ref_logps + beta * q, dim=-1) / beta,
    no_beta_in_front=lambda ref_logps, q, beta: torch.logsumexp(ref_logps + q / beta, dim=-1),
    no_beta_inside=lambda ref_logps, q, beta: beta * torch.logsumexp(ref_logps + q, dim=-1),
    reference_tempered=(
        lambda ref_logps, q, beta: beta * torch.logsumexp((ref_logps + q) / beta, dim=-1),
        lambda ref_logps, q, beta: torch.logsumexp((ref_logps + q) / beta, dim=-1),
    ),
    beta_outside=(
        lambda ref_logps, q, beta: torch.logsumexp(ref_logps + q, dim=-1) / beta,
        lambda ref_logps, q, beta: torch.logsumexp(ref_logps + q, dim=-1),
    ),
    kl_not_paid=lambda ref_logps, q, beta: ((ref_logps + q / beta).softmax(-1) * q).sum(-1),
    overflows=lambda ref_logps, q, beta: beta * (ref_logps.exp() * (q / beta).exp()).sum(-1).log(),
    probability_in_exponent=lambda ref_logps, q, beta: beta * torch.logsumexp(ref_logps.exp() + q / beta, dim=-1),
)


# ---- token_credit


def _credit(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    return _zero(mask, beta * (logps - ref_logps))


def _spread(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    credit = _credit(logps, ref_logps, mask, beta)
    return _zero(mask, (credit.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(credit))


def _credit_cases() -> tuple[Case, ...]:
    given = {
        "logps": torch.tensor([[-9.0, -1.0, -0.5, -2.0, -9.0], [-9.0, -9.0, -0.7, -3.0, -1.5]]),
        "ref_logps": torch.tensor([[-4.0, -1.5, -0.2, -2.6, -4.0], [-4.0, -4.0, -1.9, -2.2, -1.6]]),
    }
    mask = marks(".xxx.", "..xxx")
    hidden = {name: torch.where(mask, value, -torch.inf) for name, value in given.items()}
    return (
        Case("beta = 0.1", **given, mask=mask, beta=0.1),
        Case("log-probabilities of -inf on the padding", **hidden, mask=mask, beta=0.1),
    )


token_credit = chapter.exercise(
    "token_credit",
    _credit,
    _credit_cases,
    no_reference=lambda logps, ref_logps, mask, beta: _zero(mask, beta * logps),
    swapped=lambda logps, ref_logps, mask, beta: _credit(ref_logps, logps, mask, beta),
    divided_by_beta=lambda logps, ref_logps, mask, beta: _zero(mask, (logps - ref_logps) / beta),
    no_beta=lambda logps, ref_logps, mask, beta: _credit(logps, ref_logps, mask, 1.0),
    ratio=lambda logps, ref_logps, mask, beta: _zero(mask, beta * (logps - ref_logps).exp()),
    divided_by_length=lambda mask, **given: _credit(mask=mask, **given) / mask.sum(1, keepdim=True),
    spread_evenly=_spread,
    times_mask=lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps) * mask,
    not_zero_outside=lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps),
)


# ---- clipped_gain


def _gain(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    ratio = (logps - old_logps.detach()).exp()
    return _zero(mask, torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages))


def _of_ratio(formula: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The formula of ratio, advantage and clip, 0 off the response."""
    return lambda logps, old_logps, advantages, mask, clip: _zero(
        mask, formula((logps - old_logps.detach()).exp(), advantages, clip)
    )


def _gain_cases() -> tuple[Case, ...]:
    ratios = torch.tensor([[3.0, 1.0, 1.1, 1.5, 1.5, 3.0], [3.0, 0.5, 0.5, 0.9, 3.0, 3.0]])
    old = torch.tensor([[-1.0, -2.0, -0.5, -3.0, -1.5, -1.0], [-1.0, -0.7, -2.5, -1.2, -1.0, -1.0]])
    advantages = torch.tensor([[9.0, 2.0, -1.0, 0.5, -2.0, 9.0], [9.0, 1.5, -0.5, 3.0, 9.0, 9.0]])

    def case(words: str, clip: float) -> Case:
        both = {"logps": (old + ratios.log()).requires_grad_(), "old_logps": old.clone().requires_grad_()}
        return Case(words, **both, advantages=advantages, mask=marks(".xxxx.", ".xxx.."), clip=clip)

    return (case("clip = 0.2", 0.2), case("clip = 0.6, which nothing reaches", 0.6))


clipped_gain = chapter.exercise(
    "clipped_gain",
    _gain,
    _gain_cases,
    always_clipped=_of_ratio(lambda ratio, a, clip: ratio.clamp(1 - clip, 1 + clip) * a),
    maximum=_of_ratio(lambda ratio, a, clip: torch.maximum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)),
    never_clipped=_of_ratio(lambda ratio, a, clip: ratio * a),
    log_ratio=_of_ratio(lambda ratio, a, clip: torch.minimum(ratio.log() * a, ratio.log().clamp(-clip, clip) * a)),
    inverse=_of_ratio(lambda ratio, a, clip: torch.minimum(a / ratio, (1 / ratio).clamp(1 - clip, 1 + clip) * a)),
    clip_of_the_log=_of_ratio(
        lambda ratio, a, clip: torch.minimum(ratio * a, ratio.log().clamp(-clip, clip).exp() * a)
    ),
    gain_clipped=_of_ratio(lambda ratio, a, clip: torch.minimum(ratio * a, (ratio * a).clamp(1 - clip, 1 + clip))),
    sign=lambda **given: -_gain(**given),
    through_the_old=lambda logps, old_logps, **given: _gain(logps - old_logps, torch.zeros_like(old_logps), **given),
    no_mask=lambda mask, **given: _gain(mask=torch.ones_like(mask), **given),
)


# ---- shaped_rewards


def _shaped(rewards: Tensor, potential: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _zero(mask, rewards + gamma * _moved(_zero(mask, potential)) - potential)


def _shaping_cases() -> tuple[Case, ...]:
    given = {
        "rewards": torch.tensor([[7.0, 1.0, -0.5, 2.0, 0.25, 7.0], [7.0, 7.0, 0.75, -3.0, 7.0, 7.0]]),
        "potential": torch.tensor([[5.0, 0.3, 1.2, -0.8, 0.6, 5.0], [5.0, 5.0, -1.1, 0.4, 5.0, 5.0]]),
        "mask": marks(".xxxx.", "..xx.."),
    }
    single = {"rewards": torch.tensor([[2.0, 7.0]]), "potential": torch.tensor([[0.5, 5.0]]), "mask": marks("x.")}
    return (
        Case("responses of 4 and 2 tokens, no discount", **given, gamma=1.0),
        Case("the same with gamma = 0.9", **given, gamma=0.9),
        Case("a response of one token", **single, gamma=0.5),
    )


def _of_potential(formula: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The formula of reward, potential here, potential there (0 after the response) and gamma, 0 off the response."""
    return lambda rewards, potential, mask, gamma: _zero(
        mask, formula(rewards, potential, _moved(_zero(mask, potential)), gamma)
    )


shaped_rewards = chapter.exercise(
    "shaped_rewards",
    _shaped,
    _shaping_cases,
    signs_swapped=_of_potential(lambda reward, here, there, gamma: reward + here - gamma * there),
    potential_added=_of_potential(lambda reward, here, there, gamma: reward + here),
    not_paid_back=_of_potential(lambda reward, here, there, gamma: reward + gamma * there),
    no_discount=_of_potential(lambda reward, here, there, gamma: reward + there - here),
    after_the_end=lambda rewards, potential, mask, gamma: _zero(mask, rewards + gamma * _moved(potential) - potential),
    backwards=tuple(_looking_back(masked, "potential") for masked in (True, False)),
    shaping_alone=_of_potential(lambda reward, here, there, gamma: gamma * there - here),
    own_potential_ahead=_of_potential(lambda reward, here, there, gamma: reward + gamma * here - here),
    both_subtracted=_of_potential(lambda reward, here, there, gamma: reward - gamma * there - here),
    discount_misplaced=(
        _of_potential(lambda reward, here, there, gamma: gamma * (reward + there) - here),
        _of_potential(lambda reward, here, there, gamma: reward + there - gamma * here),
        _of_potential(lambda reward, here, there, gamma: reward + gamma * (there - here)),
    ),
    start_kept=lambda rewards, potential, mask, gamma: (
        _shaped(rewards, potential, mask, gamma) + _zero(mask & (mask.long().cumsum(1) == 1), potential)
    ),
    added_up=lambda mask, **given: _zero(mask, _shaped(mask=mask, **given).cumsum(1)),
    not_zero_outside=lambda rewards, potential, mask, gamma: (
        rewards + gamma * _moved(_zero(mask, potential)) - potential
    ),
)


# ---- first_token


def _of_pairs(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    """(V,) from the Gibbs optimum over whole responses."""
    return (ref_logps + reward / beta).logsumexp(-1).log_softmax(-1)


def _whole(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    """(V, V) log-probabilities of the optimum over whole responses."""
    return (ref_logps + reward / beta).flatten().log_softmax(-1).view_as(reward)


def _two_token_cases() -> tuple[Case, ...]:
    def case(words: str, vocab: int, beta: float, seed: int, scale: float = 1.0) -> Case:
        draw = normal(seed)
        ref = draw(vocab, vocab).flatten().log_softmax(-1).view(vocab, vocab)
        return Case(words, ref_logps=ref, reward=scale * draw(vocab, vocab), beta=beta)

    return (
        case("three tokens, beta = 0.5", 3, 0.5, 0),
        case("beta = 4", 4, 4.0, 1),
        case("beta = 0.01", 3, 0.01, 2, 9.0),
    )


def _by_value(value: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """The first token as a bandit, whose arms are worth `value` of (log pi(second), reward, beta)."""

    def answer(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
        first = ref_logps.logsumexp(-1)
        return (first + value(ref_logps - first[:, None], reward, beta) / beta).log_softmax(-1)

    return answer


first_token = chapter.exercise(
    "first_token",
    _of_pairs,
    _two_token_cases,
    best_ending=_by_value(lambda second, reward, beta: reward.amax(-1)),
    average_ending=_by_value(lambda second, reward, beta: (second.exp() * reward).sum(-1)),
    first_reward_alone=_by_value(lambda second, reward, beta: reward.mean(-1)),
    times_beta=lambda ref_logps, reward, beta: _of_pairs(ref_logps, reward, 1 / beta),
    no_reference=lambda ref_logps, reward, beta: _of_pairs(torch.zeros_like(ref_logps), reward, beta),
    not_normalised=lambda ref_logps, reward, beta: (ref_logps + reward / beta).logsumexp(-1),
    second_token=lambda ref_logps, reward, beta: _of_pairs(ref_logps.T, reward.T, beta),
    probabilities=(
        lambda **given: _of_pairs(**given).exp(),
        lambda ref_logps, reward, beta: (
            (ref_logps.exp() * (reward / beta).exp()).sum(-1) / (ref_logps.exp() * (reward / beta).exp()).sum()
        ),
    ),
    overflows=lambda ref_logps, reward, beta: (
        (ref_logps.exp() * (reward / beta).exp()).sum(-1) / (ref_logps.exp() * (reward / beta).exp()).sum()
    ).log(),
    no_beta=lambda ref_logps, reward, beta: _of_pairs(ref_logps, reward, 1.0),
    reference_tempered=lambda ref_logps, reward, beta: _of_pairs(ref_logps / beta, reward, beta),
    probability_in_exponent=lambda ref_logps, reward, beta: _of_pairs(ref_logps.exp(), reward, beta),
    reference_alone=lambda ref_logps, reward, beta: ref_logps.logsumexp(-1),
    logarithms_added=tuple(
        lambda ref_logps, reward, beta, over=over: over(_whole(ref_logps, reward, beta), -1)
        for over in (torch.sum, torch.mean)
    ),
    best_response=lambda ref_logps, reward, beta: _whole(ref_logps, reward, beta).amax(-1),
    each_row_by_itself=lambda ref_logps, reward, beta: (ref_logps + reward / beta).log_softmax(-1).logsumexp(-1),
    endings_alike=lambda ref_logps, reward, beta: (ref_logps.logsumexp(-1) + (reward / beta).logsumexp(-1)).log_softmax(
        -1
    ),
    first_not_weighed=(
        lambda ref_logps, reward, beta: _of_pairs(ref_logps.log_softmax(-1), reward, beta),
        lambda ref_logps, reward, beta: (ref_logps.log_softmax(-1) + reward / beta).logsumexp(-1),
    ),
    soft_value_alone=lambda ref_logps, reward, beta: beta * (ref_logps.log_softmax(-1) + reward / beta).logsumexp(-1),
)


# ---- predictions, derivations, explanations


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=3, horizon=2, seed=5, num_prompts=2)


predict = chapter.answer
punished_token = chapter.predict("punished_token", "either")
potential_moves = chapter.choose("potential_moves", "credit", "myopic")
telescoping = chapter.order(
    "telescoping",
    "advantage",
    "soft",
    "sum",
    "cancel",
    "prompt",
    cancel_before_sum=("cancel", "sum"),
    prompt_before_cancel=("prompt", "cancel"),
)
soft_value = chapter.complete(
    "soft_value",
    "beta",
    "sum",
    "ref",
    "q_over_beta",
    no_reference=(None, "sum", "one", None),
    hard=(None, "max", None, None),
    wrong_side=(None, None, None, "beta_q"),
)
credit_notices = chapter.break_it(
    "credit_notices",
    "token_mdp.reward_from_tokens",
    _world,
    {
        "no_start": ("soft.v[w.responses.prompt] + ", ""),
        "no_beta": ("h.beta * w.along", "w.along"),
        "shaped": ("star - w.ref_logps, gamma", "soft.a / h.beta, gamma"),
    },
    beta=0.5,
)
credit_trusted = chapter.open_ended("credit_trusted")
responses_of_world = chapter.predict(
    "responses_of_world", 80, within=0.02, after_eos=128, one_prompt=40, full_length=72, no_eos=54
)
best_start = chapter.predict("best_start", "a_first")
value_of_a = chapter.predict("value_of_a", -0.598, plain_mean=-0.276, with_own_reward=-1.001, best_token=1.101)
advantage_of_a = chapter.predict("advantage_of_a", "-")
eos_between = chapter.predict("eos_between", "rises")
written_more_often = chapter.choose("written_more_often", "EOS", "a_b", "b_EOS")
against_the_reward = chapter.predict("against_the_reward", 0.627, perfect=1.0, nothing=0.0)
mean_credit = chapter.predict("mean_credit", "-")
worth_under_credits = chapter.predict("worth_under_credits", "zero")
credit_on_reviews = chapter.predict("credit_on_reviews", "half")


quiz = chapter.quiz()
