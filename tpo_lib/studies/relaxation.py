"""What TGDPO's relaxation costs on text: its token problems are solved on the data's states, the policy lives on its own.

Theorem 4.1 bounds PPO's objective by a sum of token problems in the states D_t that the policy itself comes to; the paper then
puts a D that does not depend on the policy, the data's, in the place of D_t, and does not say what that costs. A state is worth

    g(s) = E_{z ~ pi(.|s)} w(s, z) - beta KL(pi(.|s) || pi_ref(.|s)),

w the true credit of the additive reward: exact over the vocabulary at every state, and averaged over states of either kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.files.tokens import prompt_token_ids
from tpo_lib.intervals import linearised
from tpo_lib.models import ResponseReader
from tpo_lib.rewards import AdditiveReward, hash_bigrams
from tpo_lib.sampling import stop_ids

if TYPE_CHECKING:
    from tpo_lib.studies.measures import Seen

ROWS = 64  # of (rows, V) tables that are alive together
TOGETHER = 32  # sequences that are read at a time


@torch.no_grad()
def relaxation(seen: Seen) -> dict[str, np.ndarray]:
    """g a token, in nats of log-odds, on the data's states and on the policy's own.

    Returns:
        step_data: over the tokens of the held-out pairs, one number for each of their prompts; step_own: over those of the
        first sample of each held-out prompt, tokenized anew from its text. The difference is D's error: step_gain, own minus
        data prompt by prompt, where all pairs are of held-out prompts; one number for each prompt that has pairs.

    Raises:
        ValueError: the reward is not additive over the model's own tokens.
    """
    if not (seen.knows_credit and isinstance(seen.stage.reward, AdditiveReward)):
        raise ValueError("relaxation takes an additive reward over the model's own tokens; leave the measure out")
    pairs, prompts = seen.stage.held_out_pairs, seen.stage.held_out_prompts
    data = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    encoded = prompt_token_ids(seen.stage.tokenizer, prompts)
    own = list(zip(encoded, seen.sample_ids[: len(prompts)], strict=True))
    groups = np.repeat(seen.prompts[: len(pairs)], 2)  # both sides of a pair side by side
    by_pair, by_sample = _sums(seen, data, groups), _sums(seen, own, np.arange(len(own)))
    found = {"step_data": linearised(*by_pair), "step_own": linearised(*by_sample)}
    places = {tuple(ids): i for i, ids in enumerate(encoded)}
    of_pairs = dict.fromkeys(tuple(pair.prompt_ids) for pair in pairs)  # in the order of step_data
    if of_pairs.keys() <= places.keys():
        mine = by_sample[:, [places[prompt] for prompt in of_pairs]]
        found["step_gain"] = linearised(*mine) - found["step_data"]
    return found


def _sums(seen: Seen, sequences: Sequence[tuple[list[int], list[int]]], groups: np.ndarray) -> np.ndarray:
    """(2, G): sum of g over the tokens of a group's (prompt, response) sequences, and their number."""
    count, sums = groups.max() + 1, np.zeros((2, len(sequences)))
    rows = [EncodedPair(i, prompt, ids) for i, (prompt, ids) in enumerate(sequences) if ids]
    readers = [ResponseReader(model) for model in (seen.policy, seen.stage.start)]
    for start in range(0, len(rows), TOGETHER):
        batch = collate(rows[start : start + TOGETHER]).to(seen.policy.device)
        policy, ref = (reader(batch).logits().float() for reader in readers)  # (R, V)
        mask = stats.response_mask(batch.labels)  # (n, T-1)
        kl, _, _ = stats.kl_entropy_surprisal(policy, ref, batch.labels)
        value = stats.unpack(_expected(seen, policy, _previous(batch.labels, mask)), mask) - seen.beta * kl
        sums[:, batch.rows.cpu()] = np.stack([value.double().sum(-1).cpu().numpy(), mask.sum(-1).cpu().numpy()])
    return np.array([np.bincount(groups, each, count) for each in sums])


def _previous(labels: Tensor, mask: Tensor) -> Tensor:
    """(R,) the response's token before each of its tokens, 0 before the first."""
    before = labels[:, :-1]  # (n, T-1), column t: label t, the token before the one that it predicts
    return torch.where(before < 0, 0, before)[mask]


def _expected(seen: Seen, logits: Tensor, previous: Tensor) -> Tensor:
    """(R,) E_{z ~ pi} w(previous, z); the tokens that end a text have no credit."""
    reward, found = seen.stage.reward, []
    unigram = reward.unigram.clone()
    unigram[(ends := stop_ids(seen.stage.start, seen.stage.tokenizer))] = 0.0
    every = torch.arange(len(unigram))
    for z, last in zip(logits.cpu().split(ROWS), previous.cpu().split(ROWS), strict=True):
        bigram = reward.bigram[hash_bigrams(last[:, None], every[None], len(reward.bigram))]  # (rows, V)
        bigram[:, ends] = 0.0
        found.append((z.softmax(-1)[:, : len(every)] * (unigram + bigram)).sum(-1))
    return torch.cat(found).to(logits.device)
