"""What DPO replaced: PPO on the policy's own samples, token by token, and RLOO, the same without a critic. Read `fit` first.

    prompts --sample--> responses and scores --appraise--> advantages --improve--> a better policy

Both maximise E[score(y) - kl_coef sum_t log(pi(y^t|s_t) / pi_ref(y^t|s_t))], from whose optimum DPO is derived (beta = kl_coef).
Details are those of arXiv 1909.08593 as its reproductions (arXiv 2403.17031) list them; departures are named at their lines.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tpo_lib import stats
from tpo_lib.config import check_setting, setting
from tpo_lib.data import EncodedPair, collate
from tpo_lib.files.tokens import prompt_token_ids
from tpo_lib.models import ResponseReader, autocast, check_pairs
from tpo_lib.pairing import score_samples
from tpo_lib.rewards import probe
from tpo_lib.sampling import generate
from tpo_lib.train import Callback, NonFiniteLoss, OnLog, Sums, set_learning_rate
from tpo_lib.types import PairBatch

OF_A_CRITIC = ("gamma", "lam", "value_coef", "value_clip", "whiten_rewards")  # RLOO rates whole responses without one


@dataclass(frozen=True)
class PPOConfig:
    """One online run.

    Raises:
        ValueError: a value is out of range, or nobody would read it; it is named.
    """

    # Defaults are of the bundled model and reward: with three times this lr, 25,000 sampled tokens give the same score (.64, from
    # .49) at 10 nats of KL instead of 4.5.
    estimator: str = setting("ppo", "advantages by a critic, or by other samples", choices=("ppo", "rloo"))
    lr: float = setting(1e-4, "learning rate of the first update; it falls linearly to 0", above=0)
    updates: int = setting(40, "times that responses are sampled and learned from", above=0)
    prompts_per_update: int = setting(32, "different prompts", above=0)
    samples_per_prompt: int = setting(2, "responses to each; rloo compares them: 2 or more", above=0)
    epochs: int = setting(4, "passes over an update's responses", above=0)
    minibatches: int = setting(4, "parts of a pass, an optimizer step each", above=0)
    kl_coef: float = setting(0.01, "score that a nat of KL from the reference costs; beta of DPO")
    kl_target: float | None = setting(None, "nats a response that kl_coef adapts to; None: it stays", above=0)
    kl_horizon: int = setting(10_000, "responses in which a KL far over its target adds a fifth to kl_coef", above=0)
    clip: float = setting(0.2, "how far a token's probability ratio may move from 1", above=0)
    value_clip: float = setting(0.2, "how far a value may move, in units of the score", above=0)
    value_coef: float = setting(0.1, "weight of the critic's loss, which trains the policy's layers, too")
    gamma: float = setting(1.0, "discount a token", above=0, most=1)
    lam: float = setting(0.95, "lambda of GAE: 1 trusts returns alone, 0 the critic", most=1)
    whiten_rewards: bool = setting(False, "give token rewards variance 1, keep the mean")  # departs: the original does
    missing_eos_penalty: float = setting(0.0, "taken from the score of a response that was cut")
    max_new_tokens: int = setting(40, "longest response", above=0)
    temperature: float = setting(1.0, "of sampling, and of all models wherever they are read", above=0)
    max_grad_norm: float = setting(1.0, "largest gradient norm", above=0)
    precision: str = setting("no", "no: the type of the weights; or bf16 autocast", choices=("no", "bf16"))
    seed: int = setting(0, "draws prompts, responses and minibatches", most=2**32 - 1)

    def __post_init__(self) -> None:
        for each in fields(self):
            check_setting(each, getattr(self, each.name))
        responses = self.prompts_per_update * self.samples_per_prompt
        if self.minibatches > responses:
            raise ValueError(f"minibatches={self.minibatches} are more than the {responses} responses of an update")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target has no effect on kl_coef=0, which it multiplies; start above 0")
        if self.estimator == "rloo" and self.samples_per_prompt == 1:
            raise ValueError("samples_per_prompt=1 leaves rloo nothing to compare a response with; raise it")
        for each in fields(self) if self.estimator == "rloo" else ():
            if each.name in OF_A_CRITIC and getattr(self, each.name) != each.default:
                raise ValueError(f"{each.name}={getattr(self, each.name)!r} has no effect with rloo; leave it out")


@dataclass(frozen=True)
class PPOResult:
    """What a run leaves: the trained policy, the critic (None with rloo), updates made, one metrics row for each."""

    policy: nn.Module
    critic: nn.Linear | None  # (..., d) last hidden states of the policy -> (..., 1) values
    steps: int
    metrics: list[dict]


@dataclass(frozen=True)
class Experience:
    """What an update learns from N responses: (N, T-1) each, 0 off-mask."""

    mask: Tensor  # bool, True on response tokens
    logps: Tensor  # log pi_old(y^t|s_t) of the policy that sampled them
    values: Tensor  # V_old(s_t); 0 without a critic
    advantages: Tensor  # whitened
    returns: Tensor  # what the values should have been


def fit(
    config: PPOConfig,
    policy,
    reference,
    tokenizer,
    reward,
    prompts: Sequence[str],
    *,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | None = None,
    progress: bool = True,
) -> PPOResult:
    """Train `policy` in place on its own samples: to a higher score, at a price for every nat away from the reference.

    A row of metrics an update, under TRL's names. Of the responses it sampled, so that row 1 describes the start:
    objective/scores; objective/kl, KL(policy || reference) in nats a response, exact over the vocabulary at every step;
    objective/rlhf_reward, the score less the price of the KL; policy/entropy_avg in nats a token; val/length in tokens. Of its
    minibatches: policy/approxkl_avg, half the mean squared log-ratio; policy/clipfrac_avg; val/ratio; loss/policy_avg; grad_norm;
    with a critic loss/value_avg, val/clipfrac_avg, and val/explained, the share of the returns' variance that it foresaw.
    Up to now: tokens sampled, seconds without callbacks, seconds/sampling of them.

    Args:
        policy: causal language model; reference: a frozen one of the same vocabulary.
        reward: texts -> one finite score each; it reads sampled tokens where `pairing.score_samples` can hand it some.
        prompts: each update draws `config.prompts_per_update` of them.
        callbacks: called as callback(step, policy) before the first update and after each.
        on_log: called with every row; returns True to end the run.

    Raises:
        ValueError: too few prompts, models that do not go together, a reward that cannot score, no hidden states for a critic.
        NonFiniteLoss: names the update, and what was not finite.
    """
    check(config, policy, reference, reward, prompts)
    actor, frozen = Actor(config, policy, critic=config.estimator == "ppo"), Actor(config, reference, critic=False)
    # eps as in the original: at Adam's 1e-8, weights with next to no gradient (rare tokens') take steps of full size
    optimizer = torch.optim.Adam([p for p in actor.parameters() if p.requires_grad], eps=1e-5)
    kl_coef, rows, spent = config.kl_coef, [], {"tokens": 0, "seconds": 0.0, "seconds/sampling": 0.0}
    for callback in callbacks:
        callback(0, policy)
    bar = tqdm(range(1, config.updates + 1), desc=config.estimator, unit="update", disable=not progress)
    for step in bar:
        began, random = time.perf_counter(), np.random.default_rng([config.seed, step])
        batch, scores = sample(config, policy, tokenizer, reward, prompts, random)
        spent["seconds/sampling"] += time.perf_counter() - began
        rate = config.lr * (1 - (step - 1) / config.updates)
        set_learning_rate(optimizer, rate)
        try:
            experience, row = appraise(config, actor, frozen, batch, scores, kl_coef)
            row |= improve(config, actor, optimizer, batch, experience, random)
        except FloatingPointError as error:
            raise NonFiniteLoss(f"update {step}: {error}") from error
        spent["tokens"] += int(experience.mask.sum())
        spent["seconds"] += time.perf_counter() - began
        rows.append({"step": step, "lr": rate, "kl_coef": kl_coef} | row | spent)
        kl_coef = adapted(config, kl_coef, row["objective/kl"])
        bar.set_postfix(score=f"{row['objective/scores']:.3f}", kl=f"{row['objective/kl']:.2f}")
        for callback in callbacks:
            callback(step, policy)
        if on_log and on_log(rows[-1]):
            break
    return PPOResult(policy, actor.critic, len(rows), rows)


def check(config: PPOConfig, policy, reference, reward, prompts: Sequence[str]) -> None:
    """Raise ValueError where the run could not begin."""
    if len(prompts) < config.prompts_per_update:
        few = f"{len(prompts)} prompts are fewer than the {config.prompts_per_update} of one update"
        raise ValueError(f"{few}; lower prompts_per_update, or bring more")
    check_pairs(reference, (), name="reference", policy=policy)
    probe(reward)


class Actor(nn.Module):
    """A language model at response positions, with a critic on its last hidden states if wanted.

    The critic shares the policy's layers: with layers of its own it would double the time of an update.
    """

    def __init__(self, config: PPOConfig, model, *, critic: bool) -> None:
        super().__init__()
        self.config, self.reader, self.critic = config, ResponseReader(model.eval()), None
        if critic and not self.reader.understood:
            raise ValueError(
                f"{type(model).__name__} makes its logits in a way of its own, so there are no hidden states for a critic; "
                'set estimator="rloo", which has none'
            )
        if critic:
            self.critic = nn.Linear(self.reader.head.weight.shape[1], 1, device=model.device)
            for weight in self.critic.parameters():  # from zeros: the first advantages are the returns themselves
                nn.init.zeros_(weight)

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """(R, V) logits at the sampling temperature, and (N, T-1) values of the states that a token is written in."""
        with autocast(batch.labels.device, self.config.precision):
            said = self.reader(batch)
            logits = said.logits() if self.config.temperature == 1 else said.logits() / self.config.temperature
            values = self.critic(said.states).squeeze(1).float() if self.critic else None  # (R, 1) -> (R,)
        return logits, None if values is None else stats.unpack(values, stats.response_mask(batch.labels))


def sample(
    config: PPOConfig, policy, tokenizer, reward, prompts: Sequence[str], random: np.random.Generator
) -> tuple[PairBatch, Tensor]:
    """Responses to some prompts, those of a prompt side by side, and their (N,) scores."""
    some = [prompts[i] for i in random.choice(len(prompts), config.prompts_per_update, replace=False)]
    names = ("samples_per_prompt", "max_new_tokens", "temperature", "precision")
    settings = {name: getattr(config, name) for name in names}
    drawn = generate(policy, tokenizer, some, seed=int(random.integers(2**62)), **settings)
    scores = score_samples(reward, tokenizer, some, drawn).float().flatten()  # (P, K) -> (N,)
    flat = [completion for several in drawn for completion in several]
    scores = scores - config.missing_eos_penalty * torch.tensor([not completion.complete for completion in flat])
    heads = [ids for ids in prompt_token_ids(tokenizer, some) for _ in range(config.samples_per_prompt)]
    # up to and with EOS: what a model writes behind it is no part of the response
    batch = collate([EncodedPair(i, head, said.steps) for i, (head, said) in enumerate(zip(heads, flat, strict=True))])
    return batch.to(policy.device), scores.to(policy.device)


def some_of(record, rows: Tensor):
    """Some sequences of an Experience, or of a batch without rejected sides."""
    return type(record)(*(getattr(record, each.name)[rows] for each in fields(record)))


@torch.no_grad()
def appraise(
    config: PPOConfig, actor, frozen, batch: PairBatch, scores: Tensor, kl_coef: float
) -> tuple[Experience, dict[str, float]]:
    """What policy, critic and reference say of the responses and, from that and their scores, the advantages; metrics."""
    found = []
    for rows in torch.arange(len(scores)).tensor_split(config.minibatches):  # as an update reads them: no more memory
        part = some_of(batch, rows)
        (logits, values), (ref_logits, _) = actor(part), frozen(part)
        tokens = stats.token_stats(logits, part.labels, ref_logits)
        stats.check_finite(tokens)
        kl, entropy, _ = stats.kl_entropy_surprisal(logits, ref_logits, part.labels)
        values = torch.zeros_like(tokens.logps) if values is None else values
        found.append((tokens.mask, tokens.logps, tokens.ref_logps, values, kl, entropy))
    mask, logps, ref_logps, values, kl, entropy = (torch.cat(each) for each in zip(*found, strict=True))  # (N, T-1)
    rewards = token_rewards(scores, logps, ref_logps, mask, kl_coef)
    row = {"objective/scores": scores, "objective/kl": kl.sum(-1), "objective/rlhf_reward": rewards.sum(-1)}
    row |= {"policy/entropy_avg": entropy[mask], "val/length": mask.sum(-1).float()}
    if config.estimator == "rloo":
        advantages = leave_one_out(rewards, mask, samples=config.samples_per_prompt)
    else:
        rewards = whiten(rewards, mask, keep_mean=True) if config.whiten_rewards else rewards
        advantages = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    experience = Experience(mask, logps, values, whiten(advantages, mask), advantages + values)
    return experience, {name: each.mean().item() for name, each in row.items()}


def improve(
    config: PPOConfig, actor, optimizer, batch: PairBatch, old: Experience, random: np.random.Generator
) -> dict[str, float]:
    """The optimizer's steps of an update; the mean metrics of its minibatches."""
    sums, mask = Sums(), old.mask
    for _ in range(config.epochs):
        for rows in map(torch.from_numpy, np.array_split(random.permutation(len(mask)), config.minibatches)):
            part = some_of(batch, rows)
            logits, values = actor(part)
            tokens = stats.token_stats(logits, part.labels, None)
            loss, metrics = objective(config, tokens.logps, values, some_of(old, rows))
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(actor.parameters(), config.max_grad_norm)
            if not norm.isfinite():
                raise NonFiniteLoss(f"the loss is {loss.item()}, its gradient's norm {norm.item()}; lower lr")
            optimizer.step()
            sums.add({name: (value.detach(), 1) for name, value in {**metrics, "grad_norm": norm}.items()})
    missed = (old.returns - old.values)[mask].var() / old.returns[mask].var().clamp_min(
        1e-12
    )  # returns may be all alike
    explained = {"val/explained": 1 - missed.item()} if config.estimator == "ppo" else {}
    return sums.means(None) | explained


# ---- the mathematics: (N, T-1) tensors, 0 off-mask


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef [log pi(y^t|s_t) - log pi_ref(y^t|s_t)], plus the (N,) score at the last token (arXiv 1909.08593, eq. 2)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1, keepdim=True)  # (N, 1)
    return (-kl_coef * (logps - ref_logps)).scatter_add(1, last, scores[:, None].to(logps))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), V = 0 after the end (1506.02438, eq. 16).

    Example:
        >>> r, v = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])
        >>> gae(r, v, r == r, gamma=1.0, lam=0.5)  # delta -.25 and .75
        tensor([[0.1250, 0.7500]])
    """
    values, found = torch.where(mask, values, 0.0), []
    later = next_value = torch.zeros_like(values[:, 0])  # (N,)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        next_value = values[:, t]
        found.append(later)
    return torch.stack(found[::-1], dim=1)  # (N, T-1)


def leave_one_out(rewards: Tensor, mask: Tensor, *, samples: int) -> Tensor:
    """A_t = R(y) - mean of R over the prompt's other samples, R = sum_t r_t, the same at every token (arXiv 2402.14740, eq. 8).

    Example:
        >>> r = torch.tensor([[1.0], [2.0], [6.0]])
        >>> leave_one_out(r, r == r, samples=3).squeeze().tolist()  # 1 - 4, 2 - 3.5, 6 - 1.5
        [-3.0, -1.5, 4.5]
    """
    whole = rewards.sum(-1).view(-1, samples)  # (P, K)
    others = (whole.sum(1, keepdim=True) - whole) / (samples - 1)
    return torch.where(mask, (whole - others).view(-1, 1), 0.0)  # (P K, 1) -> (N, T-1)


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Divide by the standard deviation over response tokens; subtract their mean as well, or keep it as it was."""
    mean, var = values[mask].mean(), values[mask].var(correction=0)
    scaled = (values - mean) * (var + 1e-8).rsqrt()
    return torch.where(mask, scaled + mean if keep_mean else scaled, 0.0)


def objective(
    config: PPOConfig, logps: Tensor, values: Tensor | None, old: Experience
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, means over its response tokens, and its metrics (arXiv 1707.06347, eq. 7).

    policy: -min(rho A, clip(rho, 1 - clip, 1 + clip) A),  rho_t = pi(y^t|s_t) / pi_old(y^t|s_t)
    value:  max((V - G)^2, (V_old + clip(V - V_old, +-value_clip) - G)^2) / 2

    RLOO takes the same ratios, token by token, so that it differs from PPO in its advantages alone (arXiv 2402.14740 takes none,
    making one step per sample).
    """
    mask, log_ratio = old.mask, logps - old.logps
    ratio = log_ratio.exp()
    free, clipped = -old.advantages * ratio, -old.advantages * ratio.clamp(1 - config.clip, 1 + config.clip)
    loss = torch.maximum(free, clipped)[mask].mean()
    metrics = {"loss/policy_avg": loss, "policy/clipfrac_avg": (clipped > free)[mask].float().mean()}
    metrics |= {"policy/approxkl_avg": log_ratio[mask].square().mean() / 2, "val/ratio": ratio[mask].mean()}
    if values is not None:
        near = old.values + (values - old.values).clamp(-config.value_clip, config.value_clip)
        free, clipped = (values - old.returns).square(), (near - old.returns).square()
        value_loss = torch.maximum(free, clipped)[mask].mean() / 2
        loss = loss + config.value_coef * value_loss
        metrics |= {"loss/value_avg": value_loss, "val/clipfrac_avg": (clipped > free)[mask].float().mean()}
    return loss, metrics


def adapted(config: PPOConfig, kl_coef: float, kl: float) -> float:
    """kl_coef after an update whose responses were `kl` nats from the reference: it follows the error (1909.08593, 2.2)."""
    if config.kl_target is None:
        return kl_coef
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.prompts_per_update * config.samples_per_prompt / config.kl_horizon)
