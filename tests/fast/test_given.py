"""Rewards and weights of tokens as data: what they come to by hand, on the textbook path and the fast one alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_fused import HYPERPARAMETERS, make_case, objective

from tpo_lib import losses, stats
from tpo_lib.fast import fused
from tpo_lib.types import TokenStats

NAMES = list(losses.OBJECTIVES)


def given_for(case, *names: str, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(case.policy.states), generator=draw).double() * 2 for name in names}


def loss_of(path, case, name: str, *, guide=True, **more):
    """Loss of every pair, and the gradients of the policy's states and head."""
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs()]
    policy = replace(case.policy, states=leaves[0], head=replace(case.policy.head, weight=leaves[1], bias=leaves[2]))
    needs = losses.OBJECTIVES[name].needs
    how = {"guide": case.guide if guide and "guide_logps" in needs else None, "with_kl": "kl" in needs}
    output, tokens = path(objective(name), policy, case.labels, case.ref if needs else None, **how, **more)
    return [output.loss.detach(), *torch.autograd.grad(output.loss.sum(), leaves)], output, tokens


def same(one, other) -> bool:
    return all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_both_paths_weigh_alike_and_weights_of_one_are_none(name, logged):
    case = make_case()
    given = given_for(case, "weights")
    fast, slow = (loss_of(path, case, name, given=given, logged=logged) for path in (fused.pair_loss, stats.pair_loss))
    assert same(fast[0], slow[0])
    tiles = loss_of(fused.pair_loss, case, name, given=given, logged=logged, tile_bytes=1)
    assert same(tiles[0], slow[0])
    plain = loss_of(fused.pair_loss, case, name, logged=logged)
    ones = {"weights": torch.ones_like(given["weights"])}
    assert same(loss_of(fused.pair_loss, case, name, given=ones, logged=logged)[0], plain[0])
    assert not same(fast[0], plain[0])
    if logged:  # what is logged of the tokens is what the models said
        assert torch.equal(fast[2].logps, plain[2].logps)


def test_a_weight_multiplies_log_ratio_and_kl_of_its_token():
    case = make_case()
    given = given_for(case, "weights")
    _, output, tokens = loss_of(stats.pair_loss, case, "tdpo2", given=given)
    w, beta, alpha = stats.unpack(given["weights"], tokens.mask), HYPERPARAMETERS["beta"], HYPERPARAMETERS["alpha"]
    reward = (beta * w * (tokens.logps - tokens.ref_logps + alpha * tokens.kl)).sum(-1)  # (N,)
    chosen, rejected = reward.chunk(2)
    assert torch.allclose(output.loss, -torch.nn.functional.logsigmoid(chosen - rejected))


@pytest.mark.parametrize("path", [stats.pair_loss, fused.pair_loss])
def test_rewards_take_the_place_of_a_guide(path):
    case = make_case()
    _, _, tokens = loss_of(path, case, "tgdpo")
    rewards = (tokens.guide_logps - tokens.ref_logps)[tokens.mask]
    guided, told = loss_of(path, case, "tgdpo"), loss_of(path, case, "tgdpo", guide=False, given={"rewards": rewards})
    assert same(guided[0], told[0])
    assert torch.allclose(guided[1].token_weights, told[1].token_weights)


def test_weights_leave_the_guidance_as_it_is():
    case = make_case()
    given = given_for(case, "weights")
    plain, weighted = loss_of(stats.pair_loss, case, "tgdpo"), loss_of(stats.pair_loss, case, "tgdpo", given=given)
    assert torch.allclose(plain[1].token_weights, weighted[1].token_weights)


def test_without_data_nothing_changes():
    mask = torch.ones(2, 1, dtype=torch.bool)
    tokens = TokenStats(torch.ones(2, 1), torch.zeros(2, 1), mask, guide_logps=torch.ones(2, 1))
    for name, value in vars(stats.as_asked(tokens)).items():
        assert value is getattr(tokens, name)
