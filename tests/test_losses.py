"""losses.py: the authors' figures, float64 loops, identities, hand-worked numbers, gradcheck, signs, refusals."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tpo_lib
from tpo_lib import losses
from tpo_lib.losses import F_FLOOR, OBJECTIVES, dpo, floor_share, ipo, sft, simpo, tdpo1, tdpo2, tgdpo
from tpo_lib.stats import split, token_stats
from tpo_lib.types import IGNORE, LossOutput, TokenStats

GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "golden_losses.json").read_text())
GIVEN = {"beta": 0.3, "alpha": 0.7, "gamma": 0.4, "guide_beta": 0.9, "shaping": "linear", "floor": F_FLOOR}
REFERENCE_BASED = ("dpo", "tdpo1", "tdpo2", "tgdpo")
NAMES = tuple(OBJECTIVES)


def hyper(name: str, **changes) -> dict:
    """The hyperparameters of one objective out of GIVEN."""
    return {key: value for key, value in (GIVEN | changes).items() if key in OBJECTIVES[name].hyperparameters}


def random_batch(seed: int, pairs: int = 2, t: int = 6, v: int = 5, scale: float = 1.0) -> dict[str, Tensor]:
    """Ragged float64 batch: labels (2B, T), policy, ref, guide (2B, T, V)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (2 * pairs, t), generator=g)
    start, end = (
        torch.randint(low, high, (2 * pairs, 1), generator=g) for low, high in ((0, t // 2), (t // 2 + 1, t + 1))
    )
    labels = labels.masked_fill((torch.arange(t) < start) | (torch.arange(t) >= end), IGNORE)
    logits = (scale * torch.randn(2 * pairs, t, v, generator=g, dtype=torch.float64) for _ in range(3))
    return {"labels": labels, **dict(zip(("policy", "ref", "guide"), logits, strict=True))}


def run(name: str, batch: dict[str, Tensor], **changes) -> LossOutput:
    """Logits and labels through token_stats, split and one objective."""
    stats = token_stats(batch["policy"], batch["labels"], batch["ref"], guide_logits=batch["guide"], with_kl=True)
    return OBJECTIVES[name].fn(*split(stats), **hyper(name, **changes))


def gradient(name: str, batch: dict[str, Tensor], **changes) -> Tensor:
    """d sum(loss) / d policy logits, (N, T, V)."""
    policy = batch["policy"].detach().clone().requires_grad_()
    run(name, batch | {"policy": policy}, **changes).loss.sum().backward()
    return policy.grad


def close(actual: Tensor, expected, atol: float = 1e-12) -> None:
    """Compare with a tensor, a list or one number for all entries."""
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(
        actual, expected.expand_as(actual) if expected.ndim == 0 else expected, rtol=0, atol=atol
    )


def stats_from(logps, ref=None, kl=None, guide=None, padding: int = 0) -> TokenStats:
    """One response from plain lists of numbers, followed by `padding` unscored columns."""

    def row(values):
        return None if values is None else torch.tensor([[*values, *[0.0] * padding]], dtype=torch.float64)

    mask = torch.tensor([[True] * len(logps) + [False] * padding])
    return TokenStats(row(logps), row([0.0] * len(logps) if ref is None else ref), mask, row(kl), row(guide))


# The authors' figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2", "tgdpo", "simpo"])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"B{case['B']}T{case['T']}V{case['V']}")
def test_loss_and_gradient_equal_the_published_code(case, name):
    """To 1e-10 in float64; SimPO's figures are its paper's formula. Their TGDPO has no floor, and the run's beta in r_hat."""
    batch = {key: torch.tensor(case[f"{key}_logits"], dtype=torch.float64) for key in ("policy", "ref", "guide")}
    batch["labels"] = torch.tensor(case["labels"])
    values = {key: case[key] for key in ("beta", "alpha", "gamma")} | {"guide_beta": case["beta"], "floor": -math.inf}
    output = run(name, batch, **values)
    close(output.loss, case[name]["loss"], 1e-10)
    grad = gradient(name, batch, **values) / case["B"]  # theirs is of the mean over pairs
    close(grad, case[name]["grad"], 1e-10)
    theirs = run({"tdpo2": "tdpo1", "tgdpo": "dpo"}.get(name, name), batch, **values)  # what their code logs
    close(theirs.chosen_reward, case[name]["chosen_reward"], 1e-10)
    close(theirs.rejected_reward, case[name]["rejected_reward"], 1e-10)
    if name in ("tdpo2", "tgdpo"):
        assert (output.chosen_reward - theirs.chosen_reward).abs().min() > 1e-4


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"B{case['B']}T{case['T']}V{case['V']}")
def test_sequence_sums_equal_the_published_code(case):
    policy, ref = (torch.tensor(case[f"{key}_logits"], dtype=torch.float64) for key in ("policy", "ref"))
    stats = token_stats(policy, torch.tensor(case["labels"]), ref, with_kl=True)
    close((stats.logps - stats.ref_logps).sum(-1), case["seq_logratio"], 1e-10)
    close(stats.kl.sum(-1), case["seq_kl_ref_policy"], 1e-10)


# Naive loops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 2**20), pairs=st.integers(1, 3), v=st.integers(2, 7), exp=st.booleans(), alpha=st.floats(0, 3)
)
@settings(max_examples=25)
def test_agrees_with_the_loops(name, seed, pairs, v, exp, alpha):
    """Value, both rewards and every entry of the logit gradient: chosen c(p - e_y), rejected c[(e_y - p) + ...]."""
    batch = random_batch(seed, pairs=pairs, v=v)
    h = hyper(name, alpha=alpha, shaping="exp" if exp else "linear")
    inputs = (batch["policy"], batch["ref"], batch["guide"], batch["labels"], h)
    wanted, output = reference.loss(name, *inputs), run(name, batch, **h)
    for field, ours in (("loss", output.loss), ("chosen", output.chosen_reward), ("rejected", output.rejected_reward)):
        close(ours, torch.tensor([row[field] for row in wanted], dtype=torch.float64), 1e-11)
    close(gradient(name, batch, **h), torch.tensor(reference.logit_gradient(name, *inputs), dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("shaping", ["linear", "exp"])
def test_token_weights_agree_with_the_loops(shaping):
    batch, h = random_batch(3, scale=2.0), GIVEN | {"shaping": shaping, "alpha": 0.5}
    output = run("tgdpo", batch, shaping=shaping, alpha=0.5)
    log_ref, log_guide = (reference.logps(batch[key], batch["labels"]) for key in ("ref", "guide"))
    for n, row in enumerate(batch["labels"].tolist()):
        for t in range(1, len(row)):
            scored = t in reference.scored(row)
            f = reference.guidance(log_guide[n][t - 1], log_ref[n][t - 1], n < 2, h) if scored else 0.0
            assert output.token_weights[n, t - 1].item() == pytest.approx(f, abs=1e-12)


# Hand-worked numbers ------------------------------------------------------------------------------------------------

# Chosen: log pi = (-1, -2), log ref = (-1.5, -2), KL = (.3, .1), guide = (-1, -2.5): log-ratios (.5, 0), sum .5.
# Rejected: log pi = (-3), log ref = (-2), KL = (.6), guide = (-4): log-ratio -1. beta = .2, alpha = .5, guide_beta = 2.
CHOSEN = stats_from([-1.0, -2.0], [-1.5, -2.0], [0.3, 0.1], [-1.0, -2.5])
REJECTED = stats_from([-3.0], [-2.0], [0.6], [-4.0], padding=1)
BY_HAND = {
    # chosen (-1 - 2)/2 = -1.5; rejected -3; loss 1.5
    "sft": (-1.5, -3.0, 1.5),
    # .2 * .5 = .1; .2 * -1 = -.2; margin .3, log(1 + e^-.3) = .554355
    "dpo": (0.1, -0.2, 0.554355),
    # .2 * (.5 + .4) = .18; .2 * (-1 + .6) = -.08; margin .26, log(1 + e^-.26) = .571573
    "tdpo1": (0.18, -0.08, 0.571573),
    # .2 * (.5 + .5 * .4) = .14; .2 * (-1 + .5 * .6) = -.14; margin .28, log(1 + e^-.28) = .562915
    "tdpo2": (0.14, -0.14, 0.562915),
    # r_hat = 2 (.5, -.5) = (1, -1): f_w = (1.5, .5), .2 * (1.5 * .5 + .5 * 0) = .15;
    # r_hat = 2 (-2) = -4: f_l = 1 + 2 = 3, .2 * 3 * -1 = -.6; margin .75, log(1 + e^-.75) = .386871
    "tgdpo": (0.15, -0.6, 0.386871),
    # .2 * -1.5 = -.3; .2 * -3 = -.6; margin .3 - gamma .1 = .2, log(1 + e^-.2) = .598139
    "simpo": (-0.3, -0.6, 0.598139),
    # rewards as dpo; log-ratios .5 - -1 = 1.5, 1 / (2 * .2) = 2.5: (1.5 - 2.5)^2 = 1
    "ipo": (0.1, -0.2, 1.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_worked_by_hand(name):
    output = OBJECTIVES[name].fn(CHOSEN, REJECTED, **hyper(name, beta=0.2, alpha=0.5, guide_beta=2.0, gamma=0.1))
    chosen, rejected, loss = BY_HAND[name]
    assert output.chosen_reward.item() == pytest.approx(chosen, abs=1e-12)
    assert output.rejected_reward.item() == pytest.approx(rejected, abs=1e-12)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)


# Identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["tdpo2", "tgdpo"])
def test_alpha_zero_is_dpo(name, seed):
    batch = random_batch(seed)
    for field in ("loss", "chosen_reward", "rejected_reward"):
        close(getattr(run(name, batch, alpha=0.0), field), getattr(run("dpo", batch), field))
    close(gradient(name, batch, alpha=0.0), gradient("dpo", batch))


@pytest.mark.parametrize("seed", range(5))
def test_tdpo1_is_tdpo2_at_alpha_one_in_value_not_in_gradient(seed):
    batch = random_batch(seed)
    for field in ("loss", "chosen_reward", "rejected_reward"):
        close(getattr(run("tdpo2", batch, alpha=1.0), field), getattr(run("tdpo1", batch), field))
    first, second = gradient("tdpo1", batch), gradient("tdpo2", batch, alpha=1.0)
    close(first[2:], second[2:])  # rejected: the same
    assert (first[:2] - second[:2]).abs().amax(dim=(1, 2)).min() > 1e-3  # chosen: every row differs


@pytest.mark.parametrize("name", REFERENCE_BASED)
def test_policy_equal_to_reference_gives_log_two(name):
    batch = random_batch(1)
    output = run(name, batch | {"policy": batch["ref"]})
    close(output.loss, math.log(2.0))
    close(output.chosen_reward, 0.0)
    close(output.rejected_reward, 0.0)


def test_ipo_begins_at_its_target_squared_and_rests_where_the_rewards_differ_by_one_half():
    batch = random_batch(1)
    close(run("ipo", batch | {"policy": batch["ref"]}).loss, 1 / (2 * GIVEN["beta"]) ** 2)
    leaf = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    at_rest = replace(stats_from([0.0, 0.0]), logps=leaf)  # log-ratios 3 - 1 = 2 = 1 / (2 * .25)
    output = ipo(at_rest, stats_from([1.0]), beta=0.25)
    close(output.loss, 0.0)
    close(output.chosen_reward - output.rejected_reward, 0.5)
    close(torch.autograd.grad(output.loss.sum(), leaf)[0], 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_swapping_chosen_and_rejected_flips_the_margin(name):
    """For TGDPO the two weights swap roles as well, which is what alpha -> -alpha does to them."""
    here = OBJECTIVES[name].fn(CHOSEN, REJECTED, **hyper(name))
    there = OBJECTIVES[name].fn(REJECTED, CHOSEN, **hyper(name, alpha=GIVEN["alpha"] * (-1 if name == "tgdpo" else 1)))
    margin, flipped = (out.chosen_reward - out.rejected_reward for out in (here, there))
    assert margin.abs() > 0.05
    close(flipped, -margin)


def token_gradient(name: str, field: str, batch: dict[str, Tensor], **changes) -> tuple[Tensor, LossOutput, Tensor]:
    """d sum(loss) / d stats.<field>, (N, T-1), with the output and the mask."""
    stats = token_stats(batch["policy"], batch["labels"], batch["ref"], guide_logits=batch["guide"], with_kl=True)
    leaf = getattr(stats, field).detach().requires_grad_()
    output = OBJECTIVES[name].fn(*split(replace(stats, **{field: leaf})), **hyper(name, **changes))
    return torch.autograd.grad(output.loss.sum(), leaf, allow_unused=True)[0], output, stats.mask


def coefficient(output: LossOutput, beta: float = GIVEN["beta"]) -> Tensor:
    """beta sigma(-margin) of every pair, negative for its chosen sequence: (N, 1)."""
    c = beta * torch.sigmoid(output.rejected_reward - output.chosen_reward)  # (B,)
    return torch.cat([-c, c])[:, None]


def test_dpo_gives_every_token_of_a_response_the_same_coefficient():
    grad, output, mask = token_gradient("dpo", "logps", random_batch(2))
    expected = coefficient(output).expand_as(grad)
    close(grad[mask], expected[mask])


def test_tgdpo_multiplies_that_coefficient_by_f():
    grad, output, mask = token_gradient("tgdpo", "logps", random_batch(2))
    close(grad, coefficient(output) * output.token_weights)
    assert output.token_weights[mask].std() > 0.1


def test_simpo_and_sft_share_the_coefficient_out_over_the_length():
    batch = random_batch(2)
    grad, output, mask = token_gradient("simpo", "logps", batch)
    margin = output.chosen_reward - output.rejected_reward - GIVEN["gamma"]
    c = GIVEN["beta"] * torch.sigmoid(-margin)
    close(grad[mask], (torch.cat([-c, c])[:, None] / mask.sum(-1, keepdim=True)).expand_as(grad)[mask])
    grad, _, mask = token_gradient("sft", "logps", batch)
    assert grad[2:].abs().sum() == 0, "SFT does not train on the rejected response"
    close(grad[:2][mask[:2]], (-1 / mask[:2].sum(-1, keepdim=True).double()).expand_as(grad[:2])[mask[:2]])


def test_the_kl_reaches_the_loss_as_written():
    """tdpo1: the coefficient of a log-ratio on both sides; tdpo2: alpha times it on the rejected side, none on the chosen."""
    grad, output, _ = token_gradient("tdpo1", "kl", random_batch(4))
    close(grad, coefficient(output).expand_as(grad))
    grad, output, _ = token_gradient("tdpo2", "kl", random_batch(4))
    assert (grad[:2] == 0).all()
    close(grad[2:], (GIVEN["alpha"] * coefficient(output)).expand_as(grad)[2:])


def test_tdpo1_pushes_along_the_target_minus_the_reference():
    """Chosen -c (e_y - p_ref), rejected +c (e_y - p_ref): the policy's own probabilities cancel."""
    batch = random_batch(6)
    mask = batch["labels"][:, 1:] != IGNORE
    one_hot = torch.nn.functional.one_hot(batch["labels"][:, 1:].clamp_min(0), 5).double()  # (N, T-1, V)
    direction = one_hot - torch.softmax(batch["ref"], -1)[:, :-1]
    expected = coefficient(run("tdpo1", batch))[:, :, None] * direction
    grad = gradient("tdpo1", batch)
    close(grad[:, :-1][mask], expected[mask])
    assert not grad[:, -1].any()


@pytest.mark.parametrize("name", ["tdpo1", "dpo"])
def test_only_tdpo1_has_a_margin_linear_in_the_logits(name):
    batch, other = random_batch(7), random_batch(8)

    def margin(share: float) -> Tensor:
        output = run(name, batch | {"policy": (1 - share) * batch["policy"] + share * other["policy"]})
        return output.chosen_reward - output.rejected_reward

    gap = (margin(0.3) - 0.7 * margin(0.0) - 0.3 * margin(1.0)).abs().min()
    assert gap < 1e-12 if name == "tdpo1" else gap > 1e-3


@pytest.mark.parametrize("name", ["sft", "simpo"])
def test_averaging_makes_the_length_irrelevant(name):
    """A response said twice scores as it did; under a sum (dpo) its reward doubles."""
    twice = CHOSEN.map(lambda x: torch.cat([x, x], dim=1))
    once, doubled = (OBJECTIVES[name].fn(chosen, REJECTED, **hyper(name)) for chosen in (CHOSEN, twice))
    close(doubled.loss, once.loss)
    close(dpo(twice, REJECTED, beta=1.0).chosen_reward, 2 * dpo(CHOSEN, REJECTED, beta=1.0).chosen_reward)


def test_masked_columns_do_not_count_in_the_average():
    padded = CHOSEN.map(lambda x: torch.nn.functional.pad(x, (0, 3)))
    close(simpo(padded, REJECTED, beta=1.0, gamma=0.0).loss, simpo(CHOSEN, REJECTED, beta=1.0, gamma=0.0).loss)
    close(sft(padded, REJECTED).loss, sft(CHOSEN, REJECTED).loss)


# TGDPO's guidance ---------------------------------------------------------------------------------------------------


def weights_of(chosen_gap: list[float], rejected_gap: list[float], **h) -> tuple[list[float], list[float]]:
    """f of tokens whose guide log-ratio is given, for alpha = .5 and guide_beta = .2 unless told otherwise."""
    h = {"beta": 1.0, "alpha": 0.5, "guide_beta": 0.2} | h
    parts = [stats_from([0.0] * len(gap), guide=gap) for gap in (chosen_gap, rejected_gap)]
    output = tgdpo(*parts, **h)
    return output.token_weights[0].tolist(), output.token_weights[1].tolist()


@pytest.mark.parametrize("shaping", ["linear", "exp"])
def test_the_four_token_behaviours(shaping):
    """A token the guide favours counts more in a chosen and less in a rejected response; one it rejects, the reverse."""
    chosen, rejected = weights_of([3.0, -3.0], [3.0, -3.0], shaping=shaping)
    up, down = (1.3, 0.7) if shaping == "linear" else (math.exp(0.3), math.exp(-0.3))  # .5 * .2 * 3 = .3
    assert chosen == pytest.approx([up, down])
    assert rejected == pytest.approx([down, up])


def test_the_guides_own_beta_scales_the_guidance():
    """r_hat takes the beta of the guide's training, not of this run."""
    base = weights_of([1.0], [1.0])
    assert weights_of([1.0], [1.0], beta=7.0) == base
    assert weights_of([1.0], [1.0], guide_beta=0.4) == (pytest.approx([1.2]), pytest.approx([0.8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", [F_FLOOR, 0.25])
def test_the_floor(floor, dtype):
    """1 +- alpha r_hat = 1 +- .1 gap: below the floor it is exactly the floor, above it is untouched, and it is counted."""
    chosen = stats_from([-1.0] * 4, guide=[-20.0, -10.0, -9.0, -7.0])  # 1 + .1 gap: -1, 0, .1, .3
    rejected = stats_from([-1.0] * 4, guide=[20.0, 7.0, 0.0, -20.0])  # 1 - .1 gap: -1, .3, 1, 3
    parts = [part.map(lambda x: x if x.dtype == torch.bool else x.to(dtype)) for part in (chosen, rejected)]
    output = tgdpo(*parts, beta=1.0, alpha=0.5, guide_beta=0.2, floor=floor)
    least = torch.tensor(floor, dtype=dtype).item()
    kept = 0.1 if floor < 0.1 else least
    assert output.token_weights[0, :2].tolist() == [least, least]
    assert output.token_weights[0].tolist() == pytest.approx([least, least, kept, 0.3])
    assert output.token_weights[1].tolist() == pytest.approx([least, 0.3, 1.0, 3.0])
    mask = torch.ones(2, 4, dtype=torch.bool)
    hits, total = floor_share(output, mask, floor)
    assert (hits.item(), total.item()) == (3 if floor < 0.1 else 4, 8)
    mask[0, 0] = False  # padding holds weight 0, which must not be counted as a hit
    assert [x.item() for x in floor_share(output, mask, floor)] == [2 if floor < 0.1 else 3, 7]


def test_the_default_floor_is_the_documented_one():
    assert F_FLOOR == 0.01
    assert inspect.signature(tgdpo).parameters["floor"].default == F_FLOOR
    assert inspect.signature(floor_share).parameters["floor"].default == F_FLOOR
    assert weights_of([-100.0], [100.0]) == ([0.01], [0.01])


def test_exp_shaping_is_positive_and_linear_to_first_order():
    assert min(weights_of([-300.0], [300.0], shaping="exp", floor=1e-30)[0]) > 0
    for gap in (1e-3, -1e-3):
        bent, straight = (weights_of([gap], [gap], shaping=kind) for kind in ("exp", "linear"))
        for one, two in zip(bent, straight, strict=True):
            assert one == pytest.approx(two, abs=1e-8)  # (1e-4)^2 / 2
            assert one != two


@pytest.mark.parametrize("shaping", ["linear", "exp"])
@pytest.mark.parametrize("gap", [0.5, -50.0])
def test_the_guidance_is_a_constant(gap, shaping):
    """No gradient to guide or reference through f, on the floor or above it, and none in the logged weights."""
    leaves = [torch.tensor([[value]], dtype=torch.float64, requires_grad=True) for value in (-1.0, 0.0, gap)]
    mask = torch.ones(1, 1, dtype=torch.bool)
    chosen = TokenStats(leaves[0], leaves[1], mask, guide_logps=leaves[2])
    rejected = stats_from([-3.0], guide=[1.0])
    output = tgdpo(chosen, rejected, beta=1.0, alpha=0.5, guide_beta=0.2, shaping=shaping)
    assert not output.token_weights.requires_grad
    policy, ref, guide = torch.autograd.grad(output.loss.sum(), leaves, allow_unused=True)
    assert guide is None
    close(ref, -policy)  # the reference's own place in the log-ratio, nothing through f
    assert policy.abs() > 0


def test_token_weights_are_zero_off_mask_and_only_tgdpo_has_them():
    batch = random_batch(9)
    output = run("tgdpo", batch)
    mask = batch["labels"][:, 1:] != IGNORE
    assert (output.token_weights[~mask] == 0).all()
    assert (output.token_weights[mask] > 0).all()
    assert all(run(name, batch).token_weights is None for name in NAMES if name != "tgdpo")


# Gradcheck, signs, shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    """Of the per-token statistics; tdpo2's chosen KL is held fixed, as its stop-gradient says."""
    batch = random_batch(10)
    stats = token_stats(batch["policy"], batch["labels"], batch["ref"], guide_logits=batch["guide"], with_kl=True)
    constant = split(stats)[0].kl.clone()

    def loss(logps, kl):
        chosen, rejected = split(replace(stats, logps=logps, kl=kl))
        chosen = replace(chosen, kl=constant) if name == "tdpo2" else chosen
        return OBJECTIVES[name].fn(chosen, rejected, **hyper(name)).loss

    assert torch.autograd.gradcheck(loss, (stats.logps.requires_grad_(), stats.kl.requires_grad_()))


@pytest.mark.parametrize("name", NAMES)
def test_raising_a_token_of_the_chosen_response_lowers_the_loss(name):
    """And raising one of the rejected response raises it (SFT does not see it); the rewards move with their own side."""
    base = OBJECTIVES[name].fn(CHOSEN, REJECTED, **hyper(name))
    bump = torch.tensor([[0.01, 0.0]], dtype=torch.float64)
    better = OBJECTIVES[name].fn(replace(CHOSEN, logps=CHOSEN.logps + bump), REJECTED, **hyper(name))
    worse = OBJECTIVES[name].fn(CHOSEN, replace(REJECTED, logps=REJECTED.logps + 0.01), **hyper(name))
    assert better.loss < base.loss
    assert better.chosen_reward > base.chosen_reward
    assert better.rejected_reward == base.rejected_reward
    assert worse.loss > base.loss if name != "sft" else worse.loss == base.loss
    assert worse.rejected_reward > base.rejected_reward


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_a_growing_kl_raises_the_reward_of_its_side(name):
    """So it lowers the loss on the chosen and raises it on the rejected side: the reason for tdpo2's stop-gradient."""
    base = OBJECTIVES[name].fn(CHOSEN, REJECTED, **hyper(name))
    assert OBJECTIVES[name].fn(replace(CHOSEN, kl=CHOSEN.kl + 0.1), REJECTED, **hyper(name)).loss < base.loss
    assert OBJECTIVES[name].fn(CHOSEN, replace(REJECTED, kl=REJECTED.kl + 0.1), **hyper(name)).loss > base.loss


@pytest.mark.parametrize("name", NAMES)
def test_one_loss_a_pair_differentiable_with_detached_rewards(name):
    batch = random_batch(11, pairs=3)
    batch["policy"].requires_grad_()
    output = run(name, batch)
    assert output.loss.shape == output.chosen_reward.shape == output.rejected_reward.shape == (3,)
    assert output.loss.requires_grad
    assert not output.chosen_reward.requires_grad
    assert not output.rejected_reward.requires_grad


@pytest.mark.parametrize("name", [*REFERENCE_BASED, "simpo"])
def test_a_huge_margin_stays_finite(name):
    """log sigma(x) must not be computed as log(sigmoid(x)), which is -inf at x = -800."""
    far = stats_from([-2000.0], [0.0], [0.1], [0.0])
    near = stats_from([0.0], [0.0], [0.1], [0.0])
    h = hyper(name, beta=1.0)
    lost = OBJECTIVES[name].fn(far, near, **h)  # log(1 + e^m) = m for so large an m
    assert lost.loss.item() == pytest.approx((lost.rejected_reward - lost.chosen_reward).item() + h.get("gamma", 0.0))
    assert 1000 < lost.loss.item() < math.inf
    assert OBJECTIVES[name].fn(near, far, **h).loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_finite_where_a_reference_logit_lies_200_below_the_rest(name):
    """In value and gradient, in float32, with the very token among those that are scored."""
    batch = random_batch(12, v=3)
    assert (batch["labels"][:, 1:] == 2).any()
    batch["ref"][..., 2] -= 200.0
    batch |= {key: batch[key].float() for key in ("policy", "ref", "guide")}
    assert torch.isfinite(run(name, batch).loss).all()
    assert torch.isfinite(gradient(name, batch)).all()


# Needs and refusals -------------------------------------------------------------------------------------------------

HOW = {"ref_logps": "ref_logits", "kl": "with_kl=True", "guide_logps": "guide_logits"}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NAMES for field in HOW])
def test_exactly_the_declared_needs_are_read(name, field):
    """A missing need is refused with the way to get it, on either side; any other field may be missing."""
    for parts in ((replace(CHOSEN, **{field: None}), REJECTED), (CHOSEN, replace(REJECTED, **{field: None}))):
        if field in OBJECTIVES[name].needs:
            wanted = rf"needs TokenStats\.{field}, which is None: pass .*{re.escape(HOW[field])}.* to token_stats"
            with pytest.raises(ValueError, match=wanted):
                OBJECTIVES[name].fn(*parts, **hyper(name))
        else:
            close(
                OBJECTIVES[name].fn(*parts, **hyper(name)).loss,
                OBJECTIVES[name].fn(CHOSEN, REJECTED, **hyper(name)).loss,
            )


@pytest.mark.parametrize("name", NAMES)
def test_declared_hyperparameters_are_the_signature_and_matter(name):
    """Keyword-only, named as in the function, and each of them changes the value."""
    objective = OBJECTIVES[name]
    assert objective.fn.__name__ == name
    parameters = list(inspect.signature(objective.fn).parameters.values())[2:]
    assert [p.name for p in parameters] == list(objective.hyperparameters)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    changed = {"beta": 0.31, "alpha": 0.71, "gamma": 0.41, "guide_beta": 0.91, "shaping": "exp", "floor": 1.5}
    base = objective.fn(CHOSEN, REJECTED, **hyper(name)).loss
    for key in objective.hyperparameters:
        assert objective.fn(CHOSEN, REJECTED, **hyper(name, **{key: changed[key]})).loss != base, key


def test_the_objectives_are_these():
    assert {name: o.needs for name, o in OBJECTIVES.items()} == {
        "sft": (),
        "dpo": ("ref_logps",),
        "tdpo1": ("ref_logps", "kl"),
        "tdpo2": ("ref_logps", "kl"),
        "tgdpo": ("ref_logps", "guide_logps"),
        "simpo": (),
        "ipo": ("ref_logps",),
    }
    assert OBJECTIVES["tdpo1"].fn is tdpo1
    assert OBJECTIVES["tdpo2"].fn is tdpo2


WORDS = {"ref_logps": "reference", "kl": "full-vocabulary KL", "guide_logps": "guide"}


@pytest.mark.parametrize("name", NAMES)
def test_readmes_table_says_what_the_record_says(name):
    """Paper and formula from the function's docstring, needs from the record; the last column was measured."""
    entry, text = OBJECTIVES[name], inspect.getdoc(OBJECTIVES[name].fn)
    paper = re.search(r"arXiv (\d+\.\d+)", text)
    link = f" ([{paper[1]}](https://arxiv.org/abs/{paper[1]}))" if paper else ""
    formula = re.search(r"^loss = (.+)$", text, re.MULTILINE)[1]
    needs = ", ".join(WORDS[field] for field in entry.needs) or "-"
    table = (Path(__file__).parents[1] / "README.md").read_text().partition("<!-- objectives")[2]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
    assert row.replace("`", "").startswith(f"| {name}{link} | {formula} | {needs} |")


def test_unknown_shaping_is_named():
    with pytest.raises(ValueError, match=r"shaping='cubic' is unknown; choose 'linear' .* or 'exp'"):
        tgdpo(CHOSEN, REJECTED, beta=1.0, alpha=0.5, guide_beta=1.0, shaping="cubic")


def test_the_objective_of_the_page_on_your_own_data_is_what_it_says(monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "your_model_your_data.md").read_text()
    monkeypatch.setattr(losses, "OBJECTIVES", dict(losses.OBJECTIVES))
    space: dict = {}
    exec(page.partition("## Objectives of your own")[2].partition("```python\n")[2].partition("```")[0], space)
    exec(re.search(r"    (tpo_lib\.register\(.+\))\n", page)[1], space | {"losses": losses, "tpo_lib": tpo_lib})
    mask = torch.ones(1, 2, dtype=torch.bool)
    chosen, rejected = (TokenStats(torch.full((1, 2), v), torch.zeros(1, 2), mask) for v in (-1.0, -2.0))
    entry = losses.OBJECTIVES["hinge"]
    output = entry.fn(chosen, rejected, **entry.settings({}))
    assert output.loss.tolist() == pytest.approx([0.8])  # 1 - 0.1 ((-2) - (-4))
    assert (output.chosen_reward - output.rejected_reward).tolist() == pytest.approx([0.2])
