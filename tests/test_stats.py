"""stats.py against naive float64 loops, and at the edges: padding, holes, -inf, half precision, wrong shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpo_lib.stats import kl_entropy_surprisal, response_mask, split, token_stats
from tpo_lib.types import IGNORE

INF = math.inf
FIELDS = ("logps", "ref_logps", "kl", "guide_logps")
TOLERANCE = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-5, torch.float64: 1e-12}


@dataclass(frozen=True)
class Case:
    """One random batch: labels (N, T), three (N, T, V) logits in the dtype under test."""

    labels: Tensor
    policy: Tensor
    ref: Tensor
    guide: Tensor


def make_case(n: int, t: int, v: int, scale: float, dtype: torch.dtype, seed: int, holes: float) -> Case:
    """Draw a batch; every sequence keeps at least one scored token, at a random place."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, v, (n, t), generator=g)
    start = torch.randint(0, t, (n, 1), generator=g)
    end = torch.randint(1, t + 1, (n, 1), generator=g)
    column = torch.arange(t)
    hidden = (column < start) | (column >= end) | (torch.rand(n, t, generator=g) < holes)
    hidden.scatter_(1, torch.randint(1, t, (n, 1), generator=g), False)
    logits = [(scale * torch.randn(n, t, v, generator=g)).to(dtype) for _ in range(3)]
    return Case(labels.masked_fill(hidden, IGNORE), *logits)


@st.composite
def cases(draw, dtypes=tuple(TOLERANCE)) -> Case:
    return make_case(
        n=draw(st.integers(1, 5)),
        t=draw(st.integers(2, 9)),
        v=draw(st.integers(2, 11)),
        scale=draw(st.sampled_from([0.0, 0.3, 1.0, 5.0])),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**20)),
        holes=draw(st.sampled_from([0.0, 0.3, 0.9])),
    )


def stats_of(case: Case):
    return token_stats(case.policy, case.labels, case.ref, guide_logits=case.guide, with_kl=True)


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# Values -------------------------------------------------------------------------------------------------------------


def test_worked_by_hand():
    # V = 2. Column 0 of the logits predicts token 1 = entry 1: policy odds 1:3, so log(3/4); reference odds 1:1.
    # KL(ref || policy) = 1/2 log((1/2)/(1/4)) + 1/2 log((1/2)/(3/4)) = 1/2 log(4/3). (The other direction: 0.1308.)
    # Column 1 of the logits predicts token 2 = entry 0: policy odds 4:1, so log(4/5). The last column predicts nothing.
    policy = torch.tensor([[[1.0, 3.0], [4.0, 1.0], [9.0, 1.0]]], dtype=torch.float64).log()
    ref = torch.ones_like(policy).log()
    stats = token_stats(policy, torch.tensor([[IGNORE, 1, 0]]), ref, with_kl=True)
    close = {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(stats.logps[0].tolist(), [math.log(3 / 4), math.log(4 / 5)], **close)
    torch.testing.assert_close(stats.ref_logps[0].tolist(), [math.log(1 / 2)] * 2, **close)
    assert stats.kl[0, 0].item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)


@given(cases())
@settings(max_examples=120)
@example(make_case(1, 2, 2, 1.0, torch.bfloat16, 0, 0.0))
@example(make_case(3, 2, 11, 5.0, torch.float16, 1, 0.0))
@example(make_case(5, 9, 2, 5.0, torch.float64, 2, 0.9))
def test_agrees_with_the_loops(case):
    """Odd shapes, ragged masks and masks with holes; half precision is scored in float32, not in its own."""
    stats, atol = stats_of(case), TOLERANCE[case.policy.dtype]
    double = [logits.double() for logits in (case.policy, case.ref, case.guide)]
    expected = {
        "logps": reference.logps(double[0], case.labels),
        "ref_logps": reference.logps(double[1], case.labels),
        "guide_logps": reference.logps(double[2], case.labels),
        "kl": reference.kl(double[1], double[0], case.labels),
    }
    for name in FIELDS:
        value = getattr(stats, name)
        assert value.dtype == (torch.float64 if case.policy.dtype == torch.float64 else torch.float32), name
        wanted = torch.tensor(expected[name], dtype=value.dtype)
        torch.testing.assert_close(value, wanted, rtol=1e-5 if atol > 1e-6 else 1e-12, atol=atol, msg=name)
        assert (value[~stats.mask] == 0).all(), name
    assert stats.mask.tolist() == [
        [t in reference.scored(row) for t in range(1, len(row))] for row in case.labels.tolist()
    ]
    assert (stats.kl >= -atol).all()


@given(cases())
@settings(max_examples=40)
def test_logits_at_the_response_positions_alone_give_the_same(case):
    mask = response_mask(case.labels)
    packed = Case(case.labels, *(logits[:, :-1][mask] for logits in (case.policy, case.ref, case.guide)))  # (R, V)
    full, short = stats_of(case), stats_of(packed)
    for name in (*FIELDS, "mask"):
        equal(getattr(full, name), getattr(short, name))


def test_response_from_the_first_column_on_is_scored_from_the_second():
    """Nothing predicts token 0, so a label there is neither scored nor an error, and column 0 scores token 1."""
    case = make_case(2, 4, 5, 1.0, torch.float64, 3, 0.0)
    labels = torch.tensor([[0, 1, 2, 3], [4, 3, IGNORE, IGNORE]])
    stats = token_stats(case.policy, labels, None)
    assert stats.mask.tolist() == [[True, True, True], [True, False, False]]
    equal(stats.logps[1, 0], torch.log_softmax(case.policy[1, 0], -1)[3])


def test_what_was_not_asked_for_is_none():
    case = make_case(2, 4, 5, 1.0, torch.float32, 3, 0.0)
    stats = token_stats(case.policy, case.labels, None)
    assert (stats.ref_logps, stats.kl, stats.guide_logps) == (None, None, None)
    assert token_stats(case.policy, case.labels, case.ref).kl is None


# Gradients and padding ----------------------------------------------------------------------------------------------


def gradient(case: Case, weights: Tensor | None = None) -> Tensor:
    """d sum(w . (logps + kl)) / d policy_logits, with random w by default so that no term can cancel."""
    policy = case.policy.detach().clone().requires_grad_()
    stats = token_stats(policy, case.labels, case.ref, guide_logits=case.guide, with_kl=True)
    if weights is None:
        weights = torch.rand(stats.mask.shape, generator=torch.Generator().manual_seed(9)).to(stats.logps) + 0.5
    (weights * (stats.logps + stats.kl)).sum().backward()
    return policy.grad


@given(cases())
@settings(max_examples=40)
def test_gradient_is_exactly_zero_off_mask(case):
    grad, mask = gradient(case), response_mask(case.labels)
    assert (grad[:, :-1][~mask] == 0).all()
    assert (grad[:, -1] == 0).all()
    assert torch.isfinite(grad).all()


def test_gradcheck():
    case = make_case(3, 5, 4, 1.0, torch.float64, 5, 0.3)

    def values(policy):
        stats = token_stats(policy, case.labels, case.ref, with_kl=True)
        return stats.logps, stats.kl

    assert torch.autograd.gradcheck(values, (case.policy.requires_grad_(),))


def test_no_gradient_flows_into_reference_or_guide():
    case = make_case(2, 5, 4, 1.0, torch.float64, 5, 0.0)
    policy, ref, guide = (x.requires_grad_() for x in (case.policy, case.ref, case.guide))
    stats = token_stats(policy, case.labels, ref, guide_logits=guide, with_kl=True)
    assert stats.logps.requires_grad
    assert stats.kl.requires_grad
    assert not stats.ref_logps.requires_grad
    assert not stats.guide_logps.requires_grad
    stats.kl.sum().backward()
    assert ref.grad is None


@given(cases(), st.sampled_from([0.0, 1e4, INF, -INF, math.nan]), st.integers(1, 3))
@settings(max_examples=60)
def test_padding_changes_nothing(case, garbage, extra):
    """Extra columns and everything off-mask may hold any value: statistics and gradients stay the same."""
    n, t, v = case.policy.shape
    stats, mask = stats_of(case), response_mask(case.labels)
    off = torch.cat([~mask, torch.ones(n, 1, dtype=torch.bool)], dim=1)[:, :, None]  # (N, T, 1)

    def pad(logits):  # (N, T, V) -> (N, T+extra, V)
        return torch.cat([logits.masked_fill(off, garbage), logits.new_full((n, extra, v), garbage)], dim=1)

    labels = torch.cat([case.labels, torch.full((n, extra), IGNORE)], dim=1)  # (N, T+extra)
    padded = Case(labels, pad(case.policy), pad(case.ref), pad(case.guide))
    longer = stats_of(padded)
    for name in (*FIELDS, "mask"):
        equal(getattr(longer, name)[:, : t - 1], getattr(stats, name))
        assert not getattr(longer, name)[:, t - 1 :].any(), name
    weights = torch.linspace(0.5, 1.5, n * (t - 1)).view(n, t - 1).to(stats.logps)
    grad = gradient(padded, torch.nn.functional.pad(weights, (0, extra)))
    equal(grad[:, :t], gradient(case, weights))
    assert not grad[:, t:].any()


# Extreme logits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("who", ["ref", "policy", "both"])
def test_finite_where_a_logit_lies_200_below_the_rest(who, dtype):
    """log(softmax) would be -inf and the KL NaN from a gap of about 104 on."""
    case = make_case(2, 4, 5, 1.0, dtype, 7, 0.0)
    labels = torch.tensor([[IGNORE, 2, 2, 3], [IGNORE, 0, 2, 2]])
    for logits in {"ref": [case.ref], "policy": [case.policy], "both": [case.ref, case.policy]}[who]:
        logits[..., 2] -= 200.0
    case = Case(labels, case.policy, case.ref, case.guide)
    stats = stats_of(case)
    low = stats.logps if who == "policy" else stats.ref_logps
    assert (low[labels[:, 1:] == 2] < -150).all()
    for name in FIELDS:
        assert torch.isfinite(getattr(stats, name)).all(), name
    wanted = torch.tensor(reference.kl(case.ref.double(), case.policy.double(), labels))
    torch.testing.assert_close(stats.kl, wanted.to(stats.kl), rtol=1e-5, atol=2e-5)
    assert torch.isfinite(gradient(case)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("both", [False, True])
def test_a_token_the_reference_excludes_adds_nothing_to_the_kl(both, dtype):
    # Reference: (0, 1/2, 1/2). Policy (1/2, 1/4, 1/4): KL = log 2. Policy that excludes it as well (0, 1/2, 1/2): 0.
    ref = torch.tensor([-INF, 0.0, 0.0], dtype=dtype).expand(1, 2, 3)
    policy = torch.tensor([-INF if both else math.log(2.0), 0.0, 0.0], dtype=dtype).repeat(1, 2, 1).requires_grad_()
    stats = token_stats(policy, torch.tensor([[IGNORE, 1]]), ref, with_kl=True)
    assert stats.kl.item() == pytest.approx(0.0 if both else math.log(2.0), abs=1e-6)
    stats.kl.sum().backward()  # p - p_ref on the column that predicts token 1
    wanted = [0.0, 0.0, 0.0] if both else [0.5, -0.25, -0.25]
    assert policy.grad[0, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert policy.grad[0, 1].tolist() == [0.0] * 3


def test_kl_is_infinite_where_the_policy_excludes_what_the_reference_allows():
    policy = torch.tensor([[[-INF, 0.0, 0.0]] * 3], requires_grad=True)
    stats = token_stats(policy, torch.tensor([[IGNORE, 1, 0]]), torch.zeros(1, 3, 3), with_kl=True)
    assert stats.kl.tolist() == [[INF, INF]]
    assert stats.logps[0, 1] == -INF  # the excluded token itself
    assert stats.logps[0, 0].item() == pytest.approx(math.log(1 / 2))
    stats.logps[0, 0].backward()  # finite, so its gradient must be: e_y - p
    assert policy.grad[0].tolist() == [[0.0, 0.5, -0.5], [0.0] * 3, [0.0] * 3]


def test_no_nan_in_the_gradient_of_finite_results_beside_infinite_ones():
    """One row has an infinite KL; the other rows' gradients are untouched by it."""
    case = make_case(3, 3, 4, 1.0, torch.float64, 4, 0.0)
    case.policy[1, :, 0] = -INF
    case.ref[2, :, 0] = -INF
    policy = case.policy.requires_grad_()
    labels = torch.tensor([[IGNORE, 1, 2]] * 3)
    stats = token_stats(policy, labels, case.ref, with_kl=True)
    assert torch.isinf(stats.kl).any(dim=1).tolist() == [False, True, False]
    stats.kl[torch.isfinite(stats.kl)].sum().backward()
    assert torch.isfinite(policy.grad).all()
    p, q = torch.softmax(case.policy, -1).detach(), torch.softmax(case.ref, -1)
    torch.testing.assert_close(policy.grad[[0, 2], :-1], (p - q)[[0, 2], :-1], rtol=0, atol=1e-12)
    assert not policy.grad[1].any()


# Refusals -----------------------------------------------------------------------------------------------------------


def test_rows_without_a_response_are_refused_and_named():
    labels = torch.tensor([[IGNORE, 1, 2], [IGNORE] * 3, [0, 1, IGNORE], [2, IGNORE, IGNORE]])
    with pytest.raises(ValueError, match=r"row 1, 3 of 4 has no response token.*max_length"):
        token_stats(torch.zeros(4, 3, 5), labels, None)
    with pytest.raises(ValueError, match="row 0 of 1"):
        response_mask(torch.tensor([[5]]))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(6).long(), torch.ones(2, 3).bool()])
def test_labels_of_another_kind_are_refused(bad):
    with pytest.raises(ValueError, match=r"\(N, T\) integer tensor, got \(.*\) torch\."):
        response_mask(bad)


@pytest.mark.parametrize("bad", [5, 9, -1, -99])
def test_labels_outside_the_vocabulary_are_named(bad):
    with pytest.raises(ValueError, match=rf"label {bad} in row 0, column 2 lies outside the vocabulary of 5"):
        token_stats(torch.zeros(1, 3, 5), torch.tensor([[IGNORE, 4, bad]]), None)


def test_the_last_label_of_the_vocabulary_is_allowed():
    stats = token_stats(torch.zeros(1, 3, 5), torch.tensor([[IGNORE, 4, 0]]), None)
    assert stats.logps[0].tolist() == pytest.approx([-math.log(5)] * 2)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 5), (3, 5), (1, 5), (5,), (1, 2, 1, 5)])
@pytest.mark.parametrize("name", ["policy_logits", "ref_logits", "guide_logits"])
def test_shapes_that_disagree_are_named(name, shape):
    given = {key: torch.zeros(1, 3, 5) for key in ("policy_logits", "ref_logits", "guide_logits")}
    given[name] = torch.zeros(shape)
    needed = r"\(1, 3\) with 2 response tokens need \(1, 3, V\) or \(2, V\)"
    with pytest.raises(ValueError, match=rf"{name} has shape .*{needed}"):
        token_stats(labels=torch.tensor([[IGNORE, 1, 2]]), **given)


@pytest.mark.parametrize("name", ["ref_logits", "guide_logits"])
def test_another_vocabulary_is_named(name):
    given = {"ref_logits": torch.zeros(1, 3, 5), "guide_logits": None} | {name: torch.zeros(1, 3, 7)}
    with pytest.raises(ValueError, match=rf"{name} has 7 vocabulary entries, the policy 5"):
        token_stats(torch.zeros(1, 3, 5), torch.tensor([[IGNORE, 1, 2]]), **given)


def test_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="with_kl=True needs ref_logits"):
        token_stats(torch.zeros(1, 3, 5), torch.tensor([[IGNORE, 1, 2]]), None, with_kl=True)


# Split --------------------------------------------------------------------------------------------------------------


def test_split_gives_the_first_half_to_chosen():
    stats = stats_of(make_case(4, 5, 3, 1.0, torch.float32, 11, 0.0))
    chosen, rejected = split(stats)
    for name in (*FIELDS, "mask"):
        equal(torch.cat([getattr(chosen, name), getattr(rejected, name)]), getattr(stats, name))
        assert len(getattr(chosen, name)) == 2
    bare = split(token_stats(torch.zeros(2, 3, 5), torch.tensor([[IGNORE, 1, 2]] * 2), None))
    assert [part.kl for part in bare] == [None, None]


def test_an_odd_number_of_sequences_is_refused():
    with pytest.raises(ValueError, match=r"3 sequences cannot be split.*chosen first"):
        split(token_stats(torch.zeros(3, 3, 5), torch.tensor([[IGNORE, 1, 2]] * 3), None))


def test_kl_entropy_and_surprisal_of_excluded_tokens_and_short_types():
    policy = torch.tensor([[0.0, 0.0, -INF], [0.0, -300.0, 0.0]])
    ref = torch.tensor([[0.0, math.log(3.0), 0.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([[IGNORE, 1, IGNORE], [IGNORE, IGNORE, 0]])  # one step a row, in columns 0 and 1
    kl, entropy, surprisal = kl_entropy_surprisal(policy, ref, labels)
    first, second = math.log(0.5) - (math.log(0.2) + math.log(0.6)) / 2, math.log(1.5)
    assert kl.flatten().tolist() == pytest.approx([first, 0, 0, second], abs=1e-6)
    assert entropy.flatten().tolist() == pytest.approx([math.log(2), 0, 0, math.log(2)], abs=1e-6)
    assert surprisal.flatten().tolist() == pytest.approx([-math.log(0.6), 0, 0, math.log(3)], abs=1e-6)
    assert kl_entropy_surprisal(ref, policy, labels)[0][0, 0] == INF  # the policy can write what the reference cannot
    never = torch.tensor([[IGNORE, 2, IGNORE], [IGNORE, IGNORE, 0]])
    assert kl_entropy_surprisal(policy, policy, never)[2][0, 0] == INF
    assert kl_entropy_surprisal(policy.bfloat16(), ref.bfloat16(), labels)[0].dtype == torch.float32
    rows, targets = torch.randn(150, 7), torch.randint(7, (1, 150))  # more rows than one slice holds
    kl, _, surprisal = kl_entropy_surprisal(rows, rows + 3, torch.cat([torch.tensor([[IGNORE]]), targets], 1))
    torch.testing.assert_close(kl, torch.zeros(1, 150), atol=1e-6, rtol=0)
    torch.testing.assert_close(surprisal, torch.nn.functional.cross_entropy(rows, targets[0], reduction="none")[None])
