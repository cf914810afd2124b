"""Small exact quantities that several derivations need."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.coefficients import PairCoefficients, coefficients
from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld, Values


def logratio(world: TokenWorld, logps: Tensor) -> Tensor:
    """(R,) sum_t log pi(y^t|s_t) - log pi_ref(y^t|s_t) of every response."""
    return world.sequence_logps(logps) - world.sequence_logps(world.ref_logps)


def gap(world: TokenWorld, per_response: Tensor) -> Tensor:
    """(R,) numbers -> (B,) chosen minus rejected."""
    return per_response[world.pairs.chosen] - per_response[world.pairs.rejected]


def mean_over_pairs(world: TokenWorld, per_pair: Tensor) -> Tensor:
    """Expectation of (B,) numbers over the preference data."""
    return (world.pairs.weight * per_pair).sum()


def onto_responses(world: TokenWorld, chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B, ...) coefficients of chosen and rejected responses, summed per response: (R, ...)."""
    total = torch.zeros(len(world.responses.prompt), *chosen.shape[1:], dtype=chosen.dtype)
    return total.index_add(0, world.pairs.chosen, chosen).index_add(0, world.pairs.rejected, rejected)


def score(world: TokenWorld, logps: Tensor, coefficients: Tensor) -> Tensor:
    """(S, V) gradient of sum_y sum_t c(y, t) log pi(y^t|s_t) with respect to the logits, by hand.

    The gradient of log softmax(z)_y is e_y - pi. Coefficients are (R,) or (R, T).
    """
    rows = world.responses
    per_token = coefficients[:, None].expand_as(rows.mask) if coefficients.ndim == 1 else coefficients  # (R, T)
    per_token = torch.where(rows.mask, per_token, 0.0)
    counts = torch.zeros_like(logps).index_put((rows.states, rows.tokens.clamp_min(0)), per_token, accumulate=True)
    return counts - counts.sum(-1, keepdim=True) * logps.exp()


def kl_score(world: TokenWorld, logps: Tensor, coefficients: Tensor) -> Tensor:
    """(S, V) gradient of sum_y c(y) SeqKL(y; pi_ref || pi) with respect to the logits, by hand: pi - pi_ref at each state."""
    rows = world.responses
    per_token = torch.where(rows.mask, coefficients[:, None], 0.0)  # (R, T)
    times = torch.zeros(world.num_states, dtype=logps.dtype).index_put((rows.states,), per_token, accumulate=True)
    return times[:, None] * (logps.exp() - world.ref_logps.exp())


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Autograd's gradient of a scalar function, in the shape of `at`."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def loss_gradient(world: TokenWorld, objective: str, at: Tensor, **options) -> Tensor:
    """Autograd's gradient of an objective's expected loss in the (S, V) logits."""
    return gradient(lambda z: world.expected_loss(objective, z, **options), at)


def pushes(
    world: TokenWorld, objective: str, logps: Tensor, *, guide: Tensor | None = None, **hyper
) -> PairCoefficients:
    """The derivatives of every pair's own loss, token by token."""
    return coefficients(objective, *world.pair_stats(world.stats(logps, guide=guide), world.pairs), **hyper)


def at_rest(world: TokenWorld, loss: Callable[[Tensor], Tensor], star: Tensor) -> tuple[Tensor, Tensor]:
    """The two sides of: at star the loss is the annotators' own entropy, which no model can beat, and its slope is 0."""
    left = torch.stack([loss(star), gradient(loss, star).abs().max()])
    return left, torch.stack([preference_entropy(world), torch.zeros_like(left[1])])


def preference_entropy(world: TokenWorld) -> Tensor:
    """Mean entropy of the annotator's answers: no model of the preferences has a smaller expected loss."""
    p, q = world.pairs.prob, torch.sigmoid(-gap(world, world.returns))  # q = 1 - p without cancellation
    drawn = world.pairs.weight / p  # both orders of a pair carry this weight, so halve it
    return -(drawn / 2 * (p * p.log() + q * q.log())).sum()


def nll(world: TokenWorld, rewards: Tensor) -> Tensor:
    """Mean of -log sigma(r(w) - r(l)) over the preference data, for (R,) rewards."""
    return -mean_over_pairs(world, F.logsigmoid(gap(world, rewards)))


def continuations(world: TokenWorld, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(R, T) probability of the rest of a response given the state, and its reward from there on."""
    return _to_go(world.tokenwise(logps), 1.0).exp(), _to_go(world.tokenwise(world.reward), world.gamma)


def _to_go(table: Tensor, gamma: float) -> Tensor:
    """(R, T) entries of every token -> (R, T) discounted sums from that token to the end."""
    sums, total = [], torch.zeros_like(table[:, 0])
    for column in reversed(table.unbind(1)):
        total = column + gamma * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def state_sums(world: TokenWorld, per_token: Tensor) -> Tensor:
    """(R, T) -> (S,): add up what every response contributes to the states it passes through."""
    mask = world.responses.mask
    return torch.zeros(world.num_states, dtype=per_token.dtype).index_add(
        0, world.responses.states[mask], per_token[mask]
    )


def enumerated(world: TokenWorld, logps: Tensor) -> Values:
    """V and Q of a policy from every way to finish every response: no recursion, so it checks `world.values`."""
    chance, reward = continuations(world, logps)
    after = chance / world.tokenwise(logps).exp()  # once the token is written
    index = (world.responses.states, world.responses.tokens.clamp_min(0))
    follow = torch.where(world.responses.mask, after * reward, 0.0)
    q = torch.zeros_like(world.reward).index_put(index, follow, accumulate=True)
    return Values(state_sums(world, chance * reward), q)


def arrival(world: TokenWorld, v: Tensor) -> Tensor:
    """(S,) state values -> (S, V) the value of the state that each token leads to, 0 where the response ends."""
    rows = []
    for t, level in enumerate(world.levels):
        following = torch.zeros(level.stop - level.start, world.vocab_size, dtype=v.dtype)
        if t + 1 < world.horizon:
            following[:, : world.width] = v[world.levels[t + 1]].view(-1, world.width)
        rows.append(following)
    return torch.cat(rows)


def per_prompt(world: TokenWorld, per_state: Tensor) -> Tensor:
    """(S,) -> (P,): sums over all states of each prompt."""
    return torch.stack([per_state[level].view(world.num_prompts, -1).sum(-1) for level in world.levels]).sum(0)


SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)  # nats: from close to pi_ref to nearly deterministic


def rivals(world: TokenWorld, count: int = 8) -> list[Tensor]:
    """Random policies of several distances from pi_ref, to search for a counterexample."""
    return [world.random_policy(seed, scale) for scale in SCALES for seed in range(count)]


def ascend(score: Callable[[Tensor], Tensor], starts: list[Tensor]) -> list[Tensor]:
    """Policies that climb a differentiable score as far as 60 steps of L-BFGS take them from each start."""
    return [minimise(lambda z: -score(z.log_softmax(-1)), start, steps=3).policy.logps() for start in starts]


def objective(world: TokenWorld, logps: Tensor, beta: float) -> Tensor:
    """J(pi) = E[sum_t gamma^t (R - beta log(pi/pi_ref))], a scalar, by Bellman recursion."""
    return world.expected(world.regularised_values(logps, beta).v)


def mean_seq_kl(world: TokenWorld, p: Tensor, q: Tensor) -> Tensor:
    """E_{y~p} SeqKL(y; p || q) = KL between the two distributions of whole responses, in nats."""
    return (world.visits(p) * world.kl(p, q)).sum()


def correlation(world: TokenWorld, x: Tensor, y: Tensor) -> float:
    """Of two (S, V) tables, over the tokens that pi_ref writes: each counts as often as it does."""
    written = world.visits(world.ref_logps)[:, None] * world.ref_logps.exp()
    covariance = torch.stack([x.flatten(), y.flatten()]).cov(aweights=written.flatten(), correction=0)
    return float(covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt())
