"""Coefficients by autograd: hand-worked numbers, the chain rule on a language model's statistics, the identities."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch

from tpo_course.coefficients import coefficients, least_kl, loss_at, margin_terms, spread
from tpo_lib.losses import OBJECTIVES, Hyperparameter, Objective
from tpo_lib.stats import split, token_stats
from tpo_lib.types import LossOutput, TokenStats

GIVEN = {"beta": 0.5, "alpha": 0.4, "guide_beta": 0.3, "gamma": 0.3}
HYPER = {name: {k: v for k, v in GIVEN.items() if k in entry.hyperparameters} for name, entry in OBJECTIVES.items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def row(logratios, kl=None, rewards=None, guide_beta=1.0) -> TokenStats:
    """One response, log pi_ref = -1 for every token."""
    ref = torch.full((1, len(logratios)), -1.0, dtype=torch.float64)
    more = {} if kl is None else {"kl": torch.tensor([kl], dtype=torch.float64)}
    if rewards is not None:
        more["guide_logps"] = ref + torch.tensor([rewards], dtype=torch.float64) / guide_beta
    return TokenStats(ref + torch.tensor([logratios]).double(), ref, torch.ones_like(ref, dtype=torch.bool), **more)


def model_like(dtype=torch.float64):
    """B = 3 pairs, T = 7, V = 11, prompts and lengths of several sizes: (policy logits, labels, ref, guide)."""
    draw = torch.Generator().manual_seed(0)
    policy, ref, guide = (torch.randn(6, 7, 11, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    labels = torch.randint(0, 11, (6, 7), generator=draw)
    for i, (start, end) in enumerate([(1, 7), (2, 5), (3, 7), (1, 3), (4, 7), (2, 6)]):
        labels[i, :start] = labels[i, end:] = -100
    return policy.requires_grad_(), labels, ref, guide


def model_stats(dtype=torch.float64):
    policy, labels, ref, guide = model_like(dtype)
    return policy, token_stats(policy, labels, ref, guide_logits=guide, with_kl=True)


# Numbers worked by hand.


def test_dpo_gives_every_token_minus_beta_sigmoid_of_minus_the_margin():
    found = coefficients("dpo", row([1.5, 0.5, 0.0]), row([-2.0, 1.0]), beta=0.5)
    margin = 0.5 * (2.0 - -1.0)  # 1.5
    push = 0.5 * sigmoid(-margin)  # 0.0912
    assert found.margin.item() == pytest.approx(margin)
    assert found.output.loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
    assert found.chosen.logps[0].tolist() == pytest.approx([-push] * 3)
    assert found.rejected.logps[0].tolist() == pytest.approx([push] * 2)
    assert push == pytest.approx(0.0912, abs=1e-4)
    assert (found.chosen.kl, found.chosen.weights, found.rejected.kl, found.rejected.weights) == (None,) * 4


def test_tdpo1_pushes_both_kls_like_the_log_probabilities():
    found = coefficients("tdpo1", row([1.0, 1.0], kl=[0.5, 0.3]), row([-1.0], kl=[0.2]), beta=0.5)
    margin = 0.5 * (2.0 + 0.8) - 0.5 * (-1.0 + 0.2)  # 1.8
    push = 0.5 * sigmoid(-margin)
    for side, sign in ((found.chosen, -1), (found.rejected, 1)):
        for values in (side.logps, side.kl):
            assert values[0].tolist() == pytest.approx([sign * push] * values.shape[1])


def test_tdpo2_holds_the_chosen_kl_and_scales_the_rejected_one_by_alpha():
    found = coefficients("tdpo2", row([1.0, 1.0], kl=[0.5, 0.3]), row([-1.0], kl=[0.2]), beta=0.5, alpha=0.4)
    margin = 0.5 * (2.0 + 0.4 * 0.8) - 0.5 * (-1.0 + 0.4 * 0.2)  # the chosen KL counts ...
    push = 0.5 * sigmoid(-margin)
    assert found.margin.item() == pytest.approx(margin)
    assert found.chosen.kl[0].tolist() == [0.0, 0.0]  # ... but carries no gradient
    assert found.rejected.kl[0].tolist() == pytest.approx([0.4 * push])
    assert found.chosen.logps[0].tolist() == pytest.approx([-push] * 2)


def test_tgdpo_weighs_every_token_by_f_and_reports_it():
    chosen, rejected = (
        row([1.0, 1.0], rewards=[1.0, -3.0], guide_beta=0.3),
        row([-1.0, 0.0], rewards=[2.0, -0.5], guide_beta=0.3),
    )
    found = coefficients("tgdpo", chosen, rejected, beta=0.5, alpha=0.4, guide_beta=0.3)
    f_w, f_l = [1.4, 0.01], [0.2, 1.2]  # 1 - 0.4 * 3 = -0.2 hits the floor
    assert found.chosen.weights[0].tolist() == pytest.approx(f_w)
    assert found.rejected.weights[0].tolist() == pytest.approx(f_l)
    push = 0.5 * sigmoid(-0.5 * (1.41 + 0.2))
    assert found.chosen.logps[0].tolist() == pytest.approx([-push * f for f in f_w])
    assert found.rejected.logps[0].tolist() == pytest.approx([push * f for f in f_l])


def test_simpo_divides_by_the_length_and_reads_gamma():
    found = coefficients("simpo", row([0.0, 1.0, 0.5]), row([-1.0]), beta=2.0, gamma=0.3)
    margin = 2.0 * (-1.5 / 3 - -2.0)  # mean log pi: (-1 + 0 - 0.5) / 3 and -2
    assert found.margin.item() == pytest.approx(margin)
    push = 2.0 * sigmoid(0.3 - margin)
    assert found.chosen.logps[0].tolist() == pytest.approx([-push / 3] * 3)
    assert found.rejected.logps[0].tolist() == pytest.approx([push])


def test_sft_pushes_the_chosen_response_only():
    found = coefficients("sft", row([0.0, 1.0]), row([-1.0]))
    assert found.chosen.logps[0].tolist() == [-0.5, -0.5]
    assert found.rejected.logps[0].tolist() == [0.0]


# A language model's statistics.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_chain_rule_gives_the_gradient_of_the_loss_in_the_logits(objective):
    policy, stats = model_stats()
    entry, pair = OBJECTIVES[objective], split(stats)
    (direct,) = torch.autograd.grad(entry.fn(*pair, **HYPER[objective]).loss.sum(), policy, retain_graph=True)
    found = coefficients(objective, *pair, **HYPER[objective])
    total = sum((c.logps * s.logps).sum() for c, s in zip((found.chosen, found.rejected), pair, strict=True))
    if "kl" in entry.needs:
        total = total + sum((c.kl * s.kl).sum() for c, s in zip((found.chosen, found.rejected), pair, strict=True))
    (by_parts,) = torch.autograd.grad(total, policy)
    torch.testing.assert_close(by_parts, direct, atol=1e-14, rtol=1e-10)
    assert direct.abs().max() > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_off_mask_coefficients_are_exactly_zero_and_nothing_is_left_on_the_graph(objective):
    _, stats = model_stats()
    chosen, rejected = split(stats)
    found = coefficients(objective, chosen, rejected, **HYPER[objective])
    for side, given in ((found.chosen, chosen), (found.rejected, rejected)):
        for values in (side.logps, side.kl, side.weights):
            if values is not None:
                assert values.shape == given.mask.shape
                assert not values[~given.mask].any()
                assert not values.requires_grad
    assert found.chosen.logps[chosen.mask].all()
    assert (found.chosen.kl is not None) == ("kl" in OBJECTIVES[objective].needs)  # though the statistics hold one
    assert (found.rejected.weights is not None) == (objective == "tgdpo")
    assert found.output.loss.shape == (3,)
    assert not found.output.loss.requires_grad


def test_every_pair_stands_alone():
    _, stats = model_stats()
    chosen, rejected = split(stats)

    def only(side: TokenStats, i: int) -> TokenStats:
        return side.map(lambda field: field[i : i + 1])

    together = coefficients("tdpo2", chosen, rejected, **HYPER["tdpo2"])
    for i in range(3):
        alone = coefficients("tdpo2", only(chosen, i), only(rejected, i), **HYPER["tdpo2"])
        torch.testing.assert_close(alone.chosen.logps[0], together.chosen.logps[i])
        torch.testing.assert_close(alone.rejected.kl[0], together.rejected.kl[i])


def test_it_works_under_no_grad_in_float32_and_leaves_the_statistics_alone():
    policy, stats = model_stats(torch.float32)
    chosen, rejected = split(stats)
    before = chosen.logps.clone()
    with torch.no_grad():
        found = coefficients("tdpo1", chosen, rejected, beta=0.1)
    assert found.chosen.logps.dtype == torch.float32
    assert found.chosen.logps.any()
    assert torch.equal(chosen.logps, before)
    assert chosen.logps.grad_fn is not None  # still on the policy's graph
    assert policy.grad is None


# Identities.


def test_alpha_zero_is_dpo_for_tdpo2_and_tgdpo():
    pair = split(model_stats()[1])
    dpo = coefficients("dpo", *pair, beta=0.5)
    for name, more in (("tdpo2", {}), ("tgdpo", {"guide_beta": 0.3})):
        found = coefficients(name, *pair, beta=0.5, alpha=0.0, **more)
        torch.testing.assert_close(found.chosen.logps, dpo.chosen.logps)
        torch.testing.assert_close(found.rejected.logps, dpo.rejected.logps)
        torch.testing.assert_close(found.output.loss, dpo.output.loss)
    assert not coefficients("tdpo2", *pair, beta=0.5, alpha=0.0).rejected.kl.any()


def test_tdpo1_is_tdpo2_at_alpha_one_but_for_the_chosen_kl():
    pair = split(model_stats()[1])
    one, two = coefficients("tdpo1", *pair, beta=0.5), coefficients("tdpo2", *pair, beta=0.5, alpha=1.0)
    torch.testing.assert_close(one.output.loss, two.output.loss)
    torch.testing.assert_close(one.chosen.logps, two.chosen.logps)
    torch.testing.assert_close(one.rejected.kl, two.rejected.kl)
    assert (one.chosen.kl[pair[0].mask] < 0).all()  # it rewards a growing KL on the chosen side
    assert not two.chosen.kl.any()


@pytest.mark.parametrize("objective", ["dpo", "tdpo1", "tdpo2", "tgdpo"])
def test_at_the_reference_the_loss_is_log_two_and_half_of_beta_pushes(objective):
    start = row([0.0, 0.0], kl=[0.0, 0.0], rewards=[0.0, 0.0])
    found = coefficients(objective, start, start, **HYPER[objective])
    assert found.output.loss.item() == pytest.approx(math.log(2))
    assert found.chosen.logps[0].tolist() == pytest.approx([-0.25, -0.25])


# The margin and the loss as a function of it.


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sft"])
def test_margin_terms_sum_to_the_margin(objective):
    pair = split(model_stats()[1])
    found = coefficients(objective, *pair, **HYPER[objective])
    terms = margin_terms(objective, *pair, **HYPER[objective])
    torch.testing.assert_close(sum(terms.values()), found.margin)
    assert bool(terms["chosen kl"].any()) == ("kl" in OBJECTIVES[objective].needs)


def test_margin_terms_by_hand():
    pair = row([1.0, 1.0], kl=[0.5, 0.3]), row([-1.0], kl=[0.2])
    terms = margin_terms("tdpo2", *pair, beta=0.5, alpha=0.4)
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"chosen logps": 1.0, "rejected logps": 0.5, "chosen kl": 0.16, "rejected kl": -0.04}
    )
    assert margin_terms("dpo", row([1.0]), row([0.0]), beta=0.5)["chosen kl"].item() == 0


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "sft"])
def test_loss_at_is_the_loss_of_a_pair_with_that_margin(objective):
    pair = split(model_stats()[1])
    found = coefficients(objective, *pair, **HYPER[objective])
    loss, slope = loss_at(objective, found.margin, **HYPER[objective])
    torch.testing.assert_close(loss, found.output.loss)
    above, below = (loss_at(objective, found.margin + step, **HYPER[objective])[0] for step in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (above - below) / 2e-5, rtol=1e-6, atol=1e-8)
    if objective != "ipo":  # -log sigma(margin - gamma)
        torch.testing.assert_close(slope, -torch.sigmoid(HYPER[objective].get("gamma", 0.0) - found.margin))


def test_sft_has_no_curve():
    with pytest.raises(ValueError, match="'sft' has no margin"):
        loss_at("sft", torch.zeros(1))


def test_spread_has_the_totals_asked_for():
    rewards = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    stats = spread(-6.0, 1.5, rewards, guide_beta=0.2)
    assert stats.logps.shape == (1, 3)
    assert (stats.logps - stats.ref_logps)[0].tolist() == pytest.approx([-2.0] * 3)
    assert stats.kl[0].tolist() == pytest.approx([0.5] * 3)
    torch.testing.assert_close(0.2 * (stats.guide_logps - stats.ref_logps)[0], rewards)
    assert stats.ref_logps.unique().tolist() == [-2.0]
    assert stats.mask.all()


# What a log-ratio leaves possible for the KL.


def _policies(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """A reference over 5 tokens, and many policies: log-probabilities, (V,) and (count, V)."""
    ref = torch.log_softmax(torch.tensor([0.5, -1.0, 0.0, 1.0, -2.0], dtype=torch.float64), -1)
    size = torch.rand(count, 1, dtype=torch.float64) * 4
    return ref, torch.log_softmax(ref + size * torch.randn(count, 5, dtype=torch.float64), -1)


def test_no_policy_has_a_kl_below_the_least_and_none_goes_beyond_probability_one():
    ref, policies = _policies()
    kl = (ref.exp() * (ref - policies)).sum(-1)
    for token in range(5):
        least = least_kl(policies[:, token] - ref[token], 1, ref_logp=ref[token].item())
        assert least.isfinite().all()
        assert (kl >= least - 1e-12).all()
        assert (kl - least).min() < 0.02  # not a bound that is far from all of them
        assert least_kl(-ref[token].item(), 1, ref_logp=ref[token].item()) == math.inf


def test_the_least_kl_is_had_by_scaling_the_other_tokens_and_any_larger_one_by_moving_them():
    ref, _ = _policies(1)
    p = ref.exp()
    for x in (-6.0, -0.5, 0.3, 0.9):
        policy = p * (1 - p[1] * math.exp(x)) / (1 - p[1])
        policy[1] = p[1] * math.exp(x)
        least = least_kl(x, 1, ref_logp=ref[1].item()).item()
        assert (p * (p / policy).log()).sum().item() == pytest.approx(least, abs=1e-12)

        def moved(share, policy=policy):  # from one of the others to another; the token keeps its log-ratio
            other = policy.clone()
            other[0], other[2] = policy[0] * (1 - share), policy[2] + policy[0] * share
            return (p * (p / other).log()).sum().item()

        share = scipy.optimize.brentq(lambda share, least=least: moved(share) - least - 2.5, 0.3, 1 - 1e-12, xtol=1e-15)
        assert moved(share) == pytest.approx(least + 2.5)


def test_over_a_response_an_even_spread_needs_least():
    generator = torch.Generator().manual_seed(0)
    for total in (-20.0, -3.0, 4.0, 11.0):
        shares = torch.randn(500, 6, generator=generator, dtype=torch.float64)
        uneven = total / 6 + shares - shares.mean(-1, keepdim=True)  # (500, T), each of the same sum
        uneven = uneven[(uneven < 3.0).all(-1)]  # log-ratios that a token of e^-3 can have
        sums = least_kl(uneven, 1, ref_logp=-3.0).sum(-1)
        assert len(sums) > 20
        assert (sums >= least_kl(total, 6, ref_logp=-3.0) - 1e-12).all()
    assert least_kl(12.0, 6, ref_logp=-3.0) == pytest.approx(6 * least_kl(2.0, 1, ref_logp=-3.0).item())


def test_the_bound_by_hand():
    """p = 1/2, x = log(3/2): the policy gives 3/4, so b = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3)."""
    found = least_kl(math.log(1.5), 1, ref_logp=-math.log(2)).item()
    assert found == pytest.approx(0.5 * math.log(4 / 3))
    for tokens, ref_logp in ((0, -1.0), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ValueError, match=f"tokens={tokens}, ref_logp={ref_logp}: at least one token"):
            least_kl(0.0, tokens, ref_logp=ref_logp)


# Refusals.


def test_an_unknown_objective_is_named():
    for call in (
        lambda: coefficients("tpo", row([0.0]), row([0.0])),
        lambda: margin_terms("tpo", row([0.0]), row([0.0])),
    ):
        with pytest.raises(ValueError, match="'tpo' is unknown; choose one of sft, dpo"):
            call()


def test_a_missing_statistic_is_named():
    with pytest.raises(ValueError, match=r"TokenStats\.kl, which is None: pass with_kl=True"):
        coefficients("tdpo1", row([0.0]), row([0.0]), beta=0.1)
    with pytest.raises(ValueError, match=r"TokenStats\.guide_logps"):
        coefficients("tgdpo", row([0.0]), row([0.0]), beta=0.1, alpha=0.5, guide_beta=0.1)


def test_an_objective_of_ones_own_draws_its_own_curve(monkeypatch):
    """IPO with a tau instead of beta: (m - 1 / (2 tau))^2 at tau = 0.1 is (m - 5)^2, its slope 2 (m - 5)."""

    def mine(chosen, rejected, *, tau):
        rewards = [(side.logps - side.ref_logps).sum(-1) for side in (chosen, rejected)]
        return LossOutput((rewards[0] - rewards[1] - 1 / (2 * tau)) ** 2, *(reward.detach() for reward in rewards))

    record = Objective(mine, ("ref_logps",), {"tau": Hyperparameter(0.1, "τ", "pull towards the reference", above=0)})
    monkeypatch.setitem(OBJECTIVES, "mine", record)
    loss, slope = loss_at("mine", torch.tensor([0.0, 7.0]))
    assert loss.tolist() == pytest.approx([25.0, 4.0])
    assert slope.tolist() == pytest.approx([-10.0, 4.0])
