"""The enumerable token world: a few tokens, a short horizon, and every expectation a finite sum.

A state is a prompt and the tokens written so far, s_t = [x, y^{<t}]. Writing a token leads to exactly one next state; the
response ends (value 0) with the EOS token or at the horizon. Reference policy, token rewards and prompt distribution are
random, float64 and fixed by the seed. Nothing is sampled afterwards: returns, values, optima and losses are exact.

Layout: the S states that still write a token lie depth by depth; within a depth by prompt, then by prefix. With W tokens
that do not end the response, token a leads from row j of a depth to row j * W + a of the next, so one reshape is the
transition. EOS is the last token, V - 1. Shapes below: S states, V tokens, T horizon, P prompts, R responses, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tpo_lib.losses import OBJECTIVES
from tpo_lib.stats import token_stats
from tpo_lib.types import IGNORE, TokenStats

MAX_ENTRIES = 20_000_000  # of the largest table, 160 MB in float64
MAX_PAIRS = 50_000_000  # visited one by one in chunks: some tens of seconds
CHUNK_PAIRS = 1 << 19


@dataclass(frozen=True)
class Values:
    """State values v (S,), action values q (S, V) and advantages a = q - v (S, V) of a policy."""

    v: Tensor
    q: Tensor

    @property
    def a(self) -> Tensor:
        return self.q - self.v[:, None]


@dataclass(frozen=True)
class Responses:
    """Every response of the world, all those of prompt 0 first."""

    prompt: Tensor  # (R,) the prompt's number
    tokens: Tensor  # (R, T) token ids, -100 after the end
    states: Tensor  # (R, T) number of the state each token is written in, 0 after the end
    mask: Tensor  # (R, T) True up to the end

    @property
    def labels(self) -> Tensor:
        """(R, T + 1) labels as a language model's batch has them: one prompt column, then the response."""
        return torch.cat([torch.full_like(self.tokens[:, :1], IGNORE), self.tokens], dim=1)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)  # (R,)


@dataclass(frozen=True)
class Pairs:
    """Ordered pairs of different responses to one prompt."""

    chosen: Tensor  # (B,) rows of `Responses`
    rejected: Tensor
    prob: Tensor  # (B,) Bradley-Terry probability that chosen beats rejected, sigma(r_w - r_l)
    weight: Tensor  # (B,) probability that exactly this ordered pair enters the data; all of them sum to 1


def lookup(table: Tensor, states: Tensor) -> Tensor:
    """(S, V) logits and (N, T) states -> (N, T + 1, V), as a language model gives them.

    Column t predicts label t + 1; the last column predicts nothing and is 0.
    """
    rows = table[states]  # (N, T, V)
    return torch.cat([rows, torch.zeros_like(rows[:, :1])], dim=1)


class TokenWorld:
    """A token MDP small enough to enumerate.

    Args:
        vocab_size: V, EOS included, >= 2.
        horizon: T, the longest response, >= 1.
        seed: fixes pi_ref, R(s, a) and the prompt distribution.
        gamma: discount in (0, 1].
        eos: whether the last token ends the response early.
        num_prompts: P >= 1.
        temperature: of pi_ref's standard normal logits, > 0; small is peaked.
        reward_scale: standard deviation of the token rewards.

    Attributes:
        prompt_probs (P,), ref_logps (S, V) = log pi_ref(a|s), reward (S, V) = R(s, a).

    Raises:
        ValueError: a value is out of range, or the world would not fit; the message says how many states it needs.

    Example:
        >>> world = TokenWorld(vocab_size=3, horizon=2, seed=0, num_prompts=1)
        >>> world.num_states, len(world.responses.tokens)  # prefixes: "", a, b; responses: E, aE, aa, ab, bE, ba, bb
        (3, 7)
    """

    def __init__(
        self,
        vocab_size: int = 4,
        horizon: int = 4,
        *,
        seed: int,
        gamma: float = 1.0,
        eos: bool = True,
        num_prompts: int = 8,
        temperature: float = 1.0,
        reward_scale: float = 1.0,
    ) -> None:
        if vocab_size < 2 or horizon < 1 or num_prompts < 1:
            raise ValueError(f"{vocab_size=} must be at least 2, {horizon=} and {num_prompts=} at least 1")
        if not 0 < gamma <= 1 or temperature <= 0:
            raise ValueError(f"gamma={gamma} must lie in (0, 1] and temperature={temperature} above 0")
        self.vocab_size, self.horizon, self.num_prompts = vocab_size, horizon, num_prompts
        self.gamma, self.eos, self.seed = gamma, eos, seed
        self.temperature, self.reward_scale = temperature, reward_scale
        self.width = vocab_size - eos  # W, tokens after which the response goes on
        sizes = [num_prompts * self.width**t for t in range(horizon)]
        self.num_states = sum(sizes)
        self._refuse_if_too_large()
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.levels = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        draw = torch.Generator().manual_seed(seed)
        shape = (self.num_states, vocab_size)
        self.ref_logps = (torch.randn(shape, generator=draw, dtype=torch.float64) / temperature).log_softmax(-1)
        self.reward = reward_scale * torch.randn(shape, generator=draw, dtype=torch.float64)
        self.prompt_probs = (torch.randn(num_prompts, generator=draw, dtype=torch.float64) / 2).softmax(-1)

    def _refuse_if_too_large(self) -> None:
        responses = self.num_prompts * self.width**self.horizon
        if max(self.num_states * self.vocab_size, responses * self.horizon) > MAX_ENTRIES:
            raise ValueError(
                f"a world of vocab_size={self.vocab_size}, horizon={self.horizon}, num_prompts={self.num_prompts} needs "
                f"{self.num_states:,} states and over {responses:,} responses; its tables may hold {MAX_ENTRIES:,} entries. "
                "Lower horizon or vocab_size"
            )

    def with_gamma(self, gamma: float) -> TokenWorld:
        """The same world with another discount."""
        return self.changed(gamma=gamma)

    def changed(self, **settings) -> TokenWorld:
        """A world with some of its arguments different."""
        names = ("vocab_size", "horizon", "seed", "gamma", "eos", "num_prompts", "temperature", "reward_scale")
        return TokenWorld(**{**{name: getattr(self, name) for name in names}, **settings})

    def random_policy(self, seed: int, scale: float = 1.0) -> Tensor:
        """(S, V) log-probabilities of a policy near pi_ref: its logits are moved by scale * N(0, 1)."""
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.ref_logps.shape, generator=draw, dtype=torch.float64)
        return (self.ref_logps + scale * noise).log_softmax(-1)

    # One policy is an (S, V) tensor of log-probabilities below.

    def backup(self, reward: Tensor, state_value: Callable[[Tensor, slice], Tensor], *, gamma: float) -> Values:
        """From the last depth to the first: q = reward + gamma v(next), v = state_value(q of a depth, its rows)."""
        following, v, q = None, [], []  # values one depth further, none beyond the horizon
        for level in reversed(self.levels):
            here = reward[level]  # (n, V)
            if following is not None:
                onward = following.view(-1, self.width)  # (n W,) -> (n, W), the transition
                if self.eos:
                    onward = torch.cat([onward, torch.zeros_like(onward[:, :1])], dim=-1)  # (n, V), terminal value 0
                here = here + gamma * onward
            following = state_value(here, level)  # (n,)
            q.append(here)
            v.append(following)
        return Values(torch.cat(v[::-1]), torch.cat(q[::-1]))

    def values(self, logps: Tensor, reward: Tensor | None = None) -> Values:
        """Bellman: Q = R + gamma V(s'), V = sum_a pi(a|s) Q. `reward` (S, V) stands in for R if given."""
        probs = logps.exp()
        reward = self.reward if reward is None else reward
        return self.backup(reward, lambda q, rows: (probs[rows] * q).sum(-1), gamma=self.gamma)

    def regularised_values(self, logps: Tensor, beta: float) -> Values:
        """The same for the reward R - beta log(pi/pi_ref), which pays the KL token by token."""
        return self.values(logps, self.reward - beta * (logps - self.ref_logps))

    def soft_optimum(self, beta: float) -> tuple[Values, Tensor]:
        """V*, Q* and log pi* (S, V) of max E[sum_t gamma^t (R - beta log(pi/pi_ref))], by backward recursion.

        V*(s) = beta log sum_a pi_ref(a|s) exp(Q*(s,a)/beta), pi* = pi_ref exp((Q* - V*)/beta).
        """
        ref = self.ref_logps
        soft = self.backup(self.reward, lambda q, rows: beta * (ref[rows] + q / beta).logsumexp(-1), gamma=self.gamma)
        return soft, ref + soft.a / beta

    def gibbs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """log(pi_ref exp(scores)/Z) (S, V) and log Z (S,), state by state.

        Scores Q_{pi_ref}/beta give TDPO's pi*_one, R/(beta f(r_hat)) TGDPO's pi*_f.
        """
        log_z = (self.ref_logps + scores).logsumexp(-1)  # (S,)
        return self.ref_logps + scores - log_z[:, None], log_z

    def one_step_optimum(self, beta: float) -> Tensor:
        """(S, V) log-probabilities of TDPO's pi*_one = pi_ref exp(Q_{pi_ref}/beta)/Z."""
        return self.gibbs(self.values(self.ref_logps).q / beta)[0]

    def factorise(self, sequence_logps: Tensor) -> Tensor:
        """(R,) log-probabilities of whole responses -> (S, V) of their tokens, the inverse of `sequence_logps`."""
        mass = torch.zeros_like(self.reward)
        last = self.responses.lengths[:, None] - 1  # (R, 1)
        ends = self.responses.states.gather(1, last)[:, 0], self.responses.tokens.gather(1, last)[:, 0]
        sums = self.backup(mass.index_put(ends, sequence_logps), lambda q, rows: q.logsumexp(-1), gamma=1.0)
        return sums.a

    def visits(self, logps: Tensor) -> Tensor:
        """(S,) D_t(s): probability that state s is reached at its depth and still writes a token, prompts drawn too."""
        reached = [self.prompt_probs]
        for level in self.levels[:-1]:
            reached.append((reached[-1][:, None] * logps[level, : self.width].exp()).flatten())  # (n, W) -> (n W,)
        return torch.cat(reached)

    @staticmethod
    def kl(p: Tensor, q: Tensor) -> Tensor:
        """(S,) KL(p(.|s) || q(.|s)) in nats, from log-probabilities."""
        return (p.exp() * (p - q)).sum(-1)

    def expected(self, per_prompt: Tensor) -> Tensor:
        """Mean over prompts of (P,) numbers, or of the first P of (S,) state values: the start states come first."""
        return (self.prompt_probs * per_prompt[: self.num_prompts]).sum()

    @cached_property
    def depth(self) -> Tensor:
        """(S,) the t of s_t, int64."""
        return torch.cat([torch.full((level.stop - level.start,), t) for t, level in enumerate(self.levels)])

    @cached_property
    def discount(self) -> Tensor:
        """(S,) gamma^t."""
        return self.gamma ** self.depth.double()

    # Whole responses.

    @cached_property
    def responses(self) -> Responses:
        """All R responses: EOS can end one at any depth, any token ends it at depth T - 1."""
        width, horizon, prompts, parts = self.width, self.horizon, self.num_prompts, []
        for t in range(horizon):
            choices = torch.arange(0 if t == horizon - 1 else width, self.vocab_size)  # the tokens that end it here
            prefix = torch.arange(width**t).repeat_interleave(len(choices))
            parts.append(torch.stack([torch.full_like(prefix, t), prefix, choices.repeat(width**t)]))
        depth, prefix, action = torch.cat(parts, dim=1).repeat(1, prompts)  # (R,) each
        prompt = torch.arange(prompts).repeat_interleave(len(depth) // prompts)
        states, tokens = [], []
        for t in range(horizon):
            before = prefix // width ** (depth - t).clamp_min(0)  # the first t tokens, read as a number in base W
            states.append(torch.where(t <= depth, self.levels[t].start + prompt * width**t + before, 0))
            written = prefix // width ** (depth - t - 1).clamp_min(0) % width
            tokens.append(torch.where(t < depth, written, torch.where(t == depth, action, IGNORE)))
        tokens = torch.stack(tokens, dim=1)  # (R, T)
        return Responses(prompt, tokens, torch.stack(states, dim=1), tokens != IGNORE)

    def tokenwise(self, table: Tensor) -> Tensor:
        """(S, V) or (S,) table -> (R, T): its entry at every token of every response, 0 after the end."""
        rows = self.responses
        index = rows.states if table.ndim == 1 else (rows.states, rows.tokens.clamp_min(0))
        return torch.where(rows.mask, table[index], 0.0)

    def along(self, table: Tensor, *, gamma: float = 1.0) -> Tensor:
        """(R,) sum_t gamma^t table(s_t, y^t) along every response."""
        return (self.tokenwise(table) * gamma ** torch.arange(self.horizon, dtype=torch.float64)).sum(-1)

    def sequence_logps(self, logps: Tensor) -> Tensor:
        """(R,) log pi(y|x) = sum_t log pi(y^t|s_t)."""
        return self.along(logps)

    def seq_kl(self, p: Tensor, q: Tensor) -> Tensor:
        """(R,) SeqKL(x, y; p || q) = sum_t KL(p(.|s_t) || q(.|s_t)) along every response."""
        return self.along(self.kl(p, q))

    @cached_property
    def returns(self) -> Tensor:
        """(R,) r(x, y) = sum_t gamma^t R(s_t, y^t), the reward the Bradley-Terry annotator sees."""
        return self.along(self.reward, gamma=self.gamma)

    def by_prompt(self, per_response: Tensor) -> Tensor:
        """(R,) -> (P, R/P)."""
        return per_response.view(self.num_prompts, -1)

    # Pairs and losses.

    @property
    def num_pairs(self) -> int:
        per_prompt = len(self.responses.prompt) // self.num_prompts
        return self.num_prompts * per_prompt * (per_prompt - 1)

    def pair_chunks(self, size: int | None = None) -> Iterator[Pairs]:
        """All ordered pairs, about `size` at a time (CHUNK_PAIRS if None).

        A prompt is drawn, then two responses from pi_ref until they differ; Bradley-Terry names the winner. The ordered
        pair (w, l) therefore has weight 2 p(x) pi_ref(w) pi_ref(l) P(w beats l) / P(two draws differ).
        """
        ref = self.by_prompt(self.sequence_logps(self.ref_logps).exp())  # (P, n)
        count = ref.shape[1]
        differ = 1 - ref.square().sum(-1)  # (P,)
        rows = torch.arange(ref.numel()).view_as(ref)
        step = max(1, (size or CHUNK_PAIRS) // ref.numel())
        for start in range(0, count, step):
            some = slice(start, start + step)
            chosen = rows[:, some, None].expand(-1, -1, count)  # (P, b, n)
            rejected = rows[:, None, :].expand_as(chosen)
            keep = chosen != rejected
            chosen, rejected = chosen[keep], rejected[keep]  # (B,)
            prob = torch.sigmoid(self.returns[chosen] - self.returns[rejected])
            share = 2 * self.prompt_probs / differ
            drawn = share[self.responses.prompt[chosen]] * ref.flatten()[chosen] * ref.flatten()[rejected]
            yield Pairs(chosen, rejected, prob, drawn * prob)

    @cached_property
    def pairs(self) -> Pairs:
        """All B ordered pairs at once.

        Raises:
            ValueError: they would not fit; the message says how many there are.
        """
        if self.num_pairs * self.horizon > MAX_ENTRIES:
            raise ValueError(
                f"{self.num_pairs:,} pairs of up to {self.horizon} tokens do not fit (at most {MAX_ENTRIES:,} tokens do); "
                "use expected_loss, which visits them in chunks, or lower horizon, vocab_size or num_prompts"
            )
        chunks = list(self.pair_chunks())
        return Pairs(*(torch.cat([getattr(c, name) for c in chunks]) for name in Pairs.__dataclass_fields__))

    def stats(self, logits: Tensor, *, guide: Tensor | None = None, with_kl: bool = True) -> TokenStats:
        """`stats.token_stats` of all R responses under (S, V) policy logits, pi_ref and an optional (S, V) guide."""

        rows = self.responses
        policy, ref = lookup(logits, rows.states), lookup(self.ref_logps, rows.states)
        guide = None if guide is None else lookup(guide, rows.states)
        return token_stats(policy, rows.labels, ref, guide_logits=guide, with_kl=with_kl)

    def pair_stats(self, stats: TokenStats, pairs: Pairs) -> tuple[TokenStats, TokenStats]:
        """The statistics of the chosen and of the rejected responses of some pairs, ready for a loss."""
        return stats.map(lambda field: field[pairs.chosen]), stats.map(lambda field: field[pairs.rejected])

    def expected_loss(
        self, objective: str | Callable, logits: Tensor, *, guide: Tensor | None = None, **hyper
    ) -> Tensor:
        """The exact mean of a loss over all pairs, differentiable in the (S, V) logits.

        Args:
            objective: a key of `losses.OBJECTIVES`, or a function (chosen, rejected, **hyper) -> LossOutput.
            logits: (S, V) of the policy; log-probabilities are logits too.
            guide: (S, V) of TGDPO's guide.
            hyper: what the objective takes.

        Raises:
            ValueError: there are more than MAX_PAIRS pairs; the message says how many.
        """
        if self.num_pairs > MAX_PAIRS:
            needs = f"the exact loss needs {self.num_pairs:,} pairs (at most {MAX_PAIRS:,})"
            raise ValueError(f"{needs}: lower horizon, vocab_size or num_prompts")
        loss = OBJECTIVES[objective].fn if isinstance(objective, str) else objective
        stats = self.stats(logits, guide=guide)

        def part(pairs: Pairs) -> Tensor:
            return (pairs.weight * loss(*self.pair_stats(stats, pairs), **hyper).loss).sum()

        if self.num_pairs <= CHUNK_PAIRS:
            return part(self.pairs)
        # Recomputing a chunk in the backward pass bounds memory by one chunk.
        return sum(checkpoint(part, pairs, use_reentrant=False) for pairs in self.pair_chunks())
