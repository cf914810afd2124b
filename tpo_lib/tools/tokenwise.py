"""What a policy makes of every token of preference pairs, and what an objective would do to it: numbers, as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tpo_lib import stats
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate, token_budget
from tpo_lib.evaluation import pair_stats, pair_values
from tpo_lib.fast.fused import pair_loss
from tpo_lib.intervals import bootstrap
from tpo_lib.losses import OBJECTIVES, floor_share
from tpo_lib.runs.given import Given
from tpo_lib.tools.pieces import Pieces
from tpo_lib.types import LossOutput, TokenStats

SIDES = ("chosen", "rejected")


def read_pairs(
    policy,
    pairs: Sequence[EncodedPair],
    tokenizer,
    config: TrainConfig,
    *,
    reference=None,
    guide=None,
    given: Given | None = None,
    max_tokens: int = 8192,
    progress: bool = False,
) -> list[dict]:
    """What the page shows of every pair, in their order; no (N, T, V) tensor is made.

    Args:
        config: objective and hyperparameters.
        reference, guide: as far as the objective needs them; without a reference there is neither log-ratio nor KL.
        given: rewards and weights of the tokens where they are data, as `fit` takes them.
        max_tokens: of a forward pass, padding included; a pair that is longer is read alone.

    Returns:
        A dict a pair: row, prompt, length in tokens of both responses, loss and margin of the objective, and what
        `evaluation.pair_values` has; floored, tokens on the floor, where weights have one; chosen and rejected, {"reward",
        "pieces": texts of T tokens, and T numbers each as far as there are: "logratio", "kl", "logp", "guided" (r_hat),
        "weight", "slope" (d loss / d log pi) and "kl_slope"}.

    Raises:
        ValueError: a number is not finite; the row is named.
    """
    found, cut, total = {}, Pieces(tokenizer), sum(pair.size for pair in pairs)
    with tqdm(total=total, desc="reading", unit="token", unit_scale=True, disable=not progress) as bar:
        for batch in token_budget(pairs, max(max_tokens, *(pair.size for pair in pairs))):
            how = {"batch_size": len(batch), "guide": guide, "with_kl": reference is not None, "pair_loss": pair_loss}
            tokens = pair_stats(policy, reference, batch, tokenizer.pad_token_id, **how)
            if given is not None:
                said = given(collate(batch, tokenizer.pad_token_id))  # (R,) each
                tokens = replace(tokens, **{name: stats.unpack(x, tokens.mask) for name, x in said.items()})
            for pair, record in zip(batch, _records(batch, tokens, config), strict=True):
                for side in SIDES:
                    record[side]["pieces"] = cut(pair.prompt_ids, getattr(pair, f"{side}_ids"))
                prompt = tokenizer.decode(pair.prompt_ids, clean_up_tokenization_spaces=False)
                found[pair.row] = {"prompt": prompt, **record}
            bar.update(sum(pair.size for pair in batch))
    return [found[pair.row] for pair in pairs]


def _records(pairs: Sequence[EncodedPair], tokens: TokenStats, config: TrainConfig) -> list[dict]:
    """The numbers of a batch's pairs."""
    entry, hyper = OBJECTIVES[config.loss_type], config.hyperparameters()
    output, slopes = derivatives(config.loss_type, tokens, hyper)
    plain = stats.as_asked(replace(tokens, weights=None))  # what is said of a token is said without its weight
    values = pair_values(plain, config.loss_type, hyper)
    values["own_margin"] = (output.chosen_reward - output.rejected_reward).double()  # (P,)
    values["own_accuracy"] = torch.heaviside(values["own_margin"], torch.tensor(0.5, dtype=torch.float64))
    guided = None if plain.guide_logps is None else hyper.get("guide_beta", 1.0) * (plain.guide_logps - plain.ref_logps)
    fields = {
        "logratio": None if tokens.ref_logps is None else tokens.logps - tokens.ref_logps,
        "kl": tokens.kl,
        "guided": guided,
        "weight": output.token_weights,
        "slope": slopes["logps"],
        "kl_slope": slopes["kl"] if "kl" in entry.needs else None,
        "logp": tokens.logps,
    }
    found, count = [], len(pairs)
    for i, pair in enumerate(pairs):
        one = {"row": pair.row, "margin": values["own_margin"][i].item(), "loss": output.loss[i].item()}
        one |= {name: values[name][i].item() for name in values if name != "own_margin"}
        one["length"] = len(pair.chosen_ids) + len(pair.rejected_ids)
        for k, side in enumerate(SIDES):
            mask = tokens.mask[i + k * count]
            one[side] = {"reward": getattr(output, f"{side}_reward")[i].item()}
            one[side] |= {name: v[i + k * count][mask].tolist() for name, v in fields.items() if v is not None}
        if output.token_weights is not None and "floor" in hyper:
            weights = output.token_weights[i::count]
            one["floored"] = floor_share(replace(output, token_weights=weights), tokens.mask[i::count], hyper["floor"])[
                0
            ].item()
        if not np.isfinite([one["loss"], *one["chosen"]["slope"], *one["rejected"]["slope"]]).all():
            given = ", ".join(f"{name} {value}" for name, value in hyper.items())
            raise ValueError(f"row {pair.row}: the loss of {config.loss_type} ({given}) is {one['loss']}; lower them")
        found.append(one)
    return found


def derivatives(objective: str, tokens: TokenStats, hyper: Mapping) -> tuple[LossOutput, dict[str, Tensor]]:
    """d loss / d log pi(y) and d loss / d KL at every token of P pairs, by autograd over the objective alone: (2P, T-1) each.

    A step of gradient descent raises what has a negative one. Off-mask nothing is meant by them.
    """
    known = {name: value for name in ("logps", "kl") if (value := getattr(tokens, name)) is not None}
    leaves = {name: value.detach().requires_grad_() for name, value in known.items()}
    with torch.enable_grad():
        output = OBJECTIVES[objective].fn(*stats.split(stats.as_asked(replace(tokens, **leaves))), **hyper)
        # a pair's loss depends on its own tokens alone, so one sum gives every pair's slopes
        asked = torch.autograd.grad(output.loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return replace(output, loss=output.loss.detach()), dict(zip(leaves, asked, strict=True))


def summarise(rows: Sequence[Mapping], prompts: Sequence[tuple]) -> dict[str, dict | float]:
    """Means over the pairs with 95% intervals, pairs of one prompt drawn together; and the share of tokens on the floor.

    Of pairs that all have one prompt there are means alone: nothing says how others would differ.
    """
    names = {"accuracy": "own_accuracy", "accuracy_logratio": "accuracy_logratio", "margin": "margin", "loss": "loss"}
    names |= {"seqkl_chosen": "seqkl_chosen", "seqkl_rejected": "seqkl_rejected"}
    known = {name: [row[field] for row in rows] for name, field in names.items() if field in rows[0]}
    if len(set(prompts)) > 1:
        found = {name: bootstrap(values, seed=0, groups=prompts).as_dict() for name, values in known.items()}
    else:
        found = {name: float(np.mean(values)) for name, values in known.items()}
    if "floored" in rows[0]:
        found["floor_share"] = sum(row["floored"] for row in rows) / sum(row["length"] for row in rows)
    return found
