"""fused.py against the textbook path it replaces, in value and in every gradient, and what it must never do."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpo_course.ladder import token_stats
from tpo_lib import losses, stats
from tpo_lib.fast import FastPath, fused, tiles
from tpo_lib.types import IGNORE, Head, Reading

HYPERPARAMETERS = {"beta": 0.3, "alpha": 0.5, "gamma": 0.2, "guide_beta": 0.4, "shaping": "linear", "floor": 0.01}
# relative to the largest entry; float16 and bfloat16 round logits and their gradients as the textbook's products do
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def objective(name: str):
    entry = losses.OBJECTIVES[name]
    return partial(entry.fn, **{key: HYPERPARAMETERS[key] for key in entry.hyperparameters})


@dataclass
class Case:
    """Ragged labels of 2B sequences, a policy with gradients, a reference and a guide of another hidden size."""

    labels: Tensor
    policy: Reading
    ref: Reading
    guide: Reading

    def inputs(self) -> list[Tensor]:
        head = self.policy.head
        return [x for x in (self.policy.states, head.weight, head.bias) if x is not None]


def make_case(
    pairs=3, longest=6, vocab=23, bias=True, scale=1.0, softcap=None, dtype=torch.float64, seed=0, spread=1.0
):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (spread * torch.randn(*shape, generator=draw)).to(dtype)

    labels = torch.full((2 * pairs, longest + 3), IGNORE)
    for row in labels:
        start = int(torch.randint(1, 3, (1,), generator=draw))
        length = int(torch.randint(1, longest + 1, (1,), generator=draw))
        row[start : start + length] = torch.randint(0, vocab, (length,), generator=draw)
    count = int((labels[:, 1:] != IGNORE).sum())
    head = Head(normal(vocab, 5), normal(vocab) if bias else None, scale, softcap)
    policy = Reading(normal(count, 5), head)
    frozen = [Reading(normal(count, d), Head(normal(vocab, d), scale=0.5, softcap=3.0)) for d in (3, 7)]
    case = Case(labels, policy, *frozen)
    for x in case.inputs():
        x.requires_grad_()
    return case


def textbook(case: Case, name: str):
    tokens = stats.token_stats(
        case.policy.logits(), case.labels, case.ref.logits(), guide_logits=case.guide.logits(), with_kl=True
    )
    return objective(name)(*stats.split(tokens)), tokens


def by_statistics(case: Case, name: str, tile_bytes: int):
    tokens = token_stats(case.policy, case.labels, case.ref, guide=case.guide, with_kl=True, tile_bytes=tile_bytes)
    return objective(name)(*stats.split(tokens)), tokens


def by_pairs(case: Case, name: str, tile_bytes: int):
    return fused.pair_loss(
        objective(name), case.policy, case.labels, case.ref, guide=case.guide, with_kl=True, tile_bytes=tile_bytes
    )


def by_merged_pairs(case: Case, name: str, tile_bytes: int):
    """log pi(y) + KL without the policy's logits."""
    return fused.pair_loss(
        objective(name), case.policy, case.labels, case.ref, with_kl=True, logged=False, tile_bytes=tile_bytes
    )


def everything(case: Case, output, tokens) -> dict[str, Tensor]:
    """All numbers of a path: loss, rewards, statistics (where they were made), gradients."""
    gradients = torch.autograd.grad(output.loss.mean(), case.inputs())
    fields = {f"output.{k}": getattr(output, k) for k in output.__dataclass_fields__}
    if tokens is not None:
        fields |= {f"stats.{k}": getattr(tokens, k) for k in tokens.__dataclass_fields__}
    return {k: v.detach() for k, v in fields.items() if v is not None} | dict(
        zip(("gradient of states", "gradient of weight", "gradient of bias"), gradients, strict=False)
    )


def size_of_terms(case: Case, output, tokens) -> dict[str, float]:
    """How large the numbers are that are added up: where they cancel, rounding is relative to them, not to what is left."""
    read = [x for x in (tokens.logps, tokens.kl) if x is not None]
    asked = torch.autograd.grad(output.loss.mean(), read, retain_graph=True, allow_unused=True)
    pull = sum(x.abs().max().item() for x in asked if x is not None)
    return {"output": 1.0, "stats": 1.0, "gradient": pull * max(1.0, *(x.abs().max().item() for x in case.inputs()))}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, *, least: dict[str, float] | None = None
) -> None:
    """Relative to the largest entry, or to the size of the terms (`least`) where that is larger."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert found[name].dtype == right.dtype, name
        size = (least or {}).get(re.split("[. ]", name)[0], 1e-30)
        gap = (found[name].double() - right.double()).abs().max() / right.double().abs().max().clamp_min(size)
        assert gap <= tolerance, f"{name}: {gap:.1e}"


PATHS = [by_statistics, by_pairs]


def draw_case(data, dtype: torch.dtype, softcaps=(None,)) -> tuple[Case, int]:
    """An odd shape and head, and the size of a tile: one row or pair, a few, all."""
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    case = make_case(
        pairs=pick(1, 2, 5),
        longest=pick(1, 4, 9),
        vocab=pick(2, 23, 41),
        bias=pick(True, False),
        scale=pick(1.0, 0.3),
        softcap=pick(*softcaps),
        dtype=dtype,
        seed=data.draw(st.integers(0, 999)),
    )
    return case, pick(1, 4 * 23 * 7, 1 << 20)


@given(
    st.data(),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(list(losses.OBJECTIVES)),
    st.sampled_from(PATHS),
)
def test_both_paths_equal_the_textbook(data, dtype, name, path):
    case, tile = draw_case(data, dtype, softcaps=(None, 2.0))
    expected = textbook(case, name)
    least = size_of_terms(case, *expected)
    assert_same(everything(case, *path(case, name, tile)), everything(case, *expected), TOLERANCE[dtype], least=least)


def assert_merged_equals_the_textbook(case: Case, tile: int, tolerance: float) -> None:
    output, tokens = by_merged_pairs(case, "tdpo1", tile)
    assert tokens is None
    expected = textbook(case, "tdpo1")
    logits = case.policy.logits().abs().max().item()  # what a merged value is made of, not log-probabilities
    least = size_of_terms(case, *expected) | {"output": logits}
    assert_same(everything(case, output, None), everything(case, expected[0], None), tolerance, least=least)


@given(st.data(), st.sampled_from([torch.float64, torch.float32]))
def test_the_merged_path_equals_the_textbook(data, dtype):
    assert_merged_equals_the_textbook(*draw_case(data, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_merged_path_in_half_precision(dtype):
    case = make_case(dtype=dtype, bias=False)
    assert_merged_equals_the_textbook(case, 1 << 20, TOLERANCE[dtype])


def test_the_merged_path_reads_soft_capped_logits_in_full():
    case = make_case(softcap=2.0)
    output, tokens = by_merged_pairs(case, "tdpo1", 400)
    case.guide = None
    assert_same(everything(case, output, tokens), everything(case, *by_pairs(case, "tdpo1", 400)), 1e-12)


@pytest.mark.parametrize("name", [name for name in losses.OBJECTIVES if name != "tdpo1"])
def test_no_other_objective_reads_the_two_as_their_sum(name):
    case = make_case()
    found = fused.pair_loss(
        objective(name),
        case.policy,
        case.labels,
        case.ref,
        guide=case.guide,
        with_kl=True,
        logged=False,
        tile_bytes=400,
    )
    assert_same(everything(case, *found), everything(case, *by_pairs(case, name, 400)), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_scores_in_float32(path, dtype):
    case = make_case(dtype=dtype, bias=False)
    found = everything(case, *path(case, "tdpo2", 1 << 20))
    assert found["stats.kl"].dtype == found["stats.logps"].dtype == torch.float32
    assert_same(found, everything(case, *textbook(case, "tdpo2")), TOLERANCE[dtype])


@pytest.mark.parametrize("states", [torch.float32, torch.float16])
@pytest.mark.parametrize("path", [by_statistics, by_pairs])
def test_float16_keeps_small_gradients_though_the_loss_scale_comes_after_them(path, states):
    """A pair that is decided has weights of 1e-4 or less, times a probability: below what float16 can hold."""
    case = make_case(vocab=4096, dtype=torch.float32, spread=0.3, bias=False)
    fn = partial(losses.dpo, beta=1e-4)
    exact = pair_loss_of(case, fn, path, torch.float64)
    with torch.autocast("cpu", torch.float16):
        found = pair_loss_of(case, fn, path, states)
    for ours, truth in zip(found, exact, strict=True):
        assert ((ours - truth).norm() / truth.norm()).item() < 2e-3


def pair_loss_of(case: Case, fn, path, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of states and weight, in float64, after a loss scale of 2^16."""
    leaves = [case.policy.states.detach().to(dtype), case.policy.head.weight.detach()]
    leaves[1] = leaves[1].double() if dtype == torch.float64 else leaves[1]
    for leaf in leaves:
        leaf.requires_grad_()
    policy = Reading(leaves[0], replace(case.policy.head, weight=leaves[1]))
    if path is by_pairs:
        loss = fused.pair_loss(fn, policy, case.labels, case.ref)[0].loss
    else:
        loss = fn(*stats.split(token_stats(policy, case.labels, case.ref))).loss
    (loss.sum() * 2.0**16).backward()
    return [leaf.grad.double() / 2.0**16 for leaf in leaves]


@pytest.mark.parametrize("path", PATHS)
def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(path):
    case = make_case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = textbook(case, "tdpo2")
        found = path(case, "tdpo2", 300)
    found, expected = everything(case, *found), everything(case, *expected)
    exact = everything(case, *textbook(case, "tdpo2"))
    assert_same(found, expected, 3e-2)
    assert not torch.equal(found["stats.logps"], exact["stats.logps"])  # it did round the products


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "simpo"])  # tdpo2's gradient is not its value's: the stop-gradient
def test_gradients_against_finite_differences(name):
    case = make_case(pairs=2, longest=3, vocab=7, scale=0.7, softcap=2.0)

    def loss(path, states, weight, bias):
        policy = Reading(states, replace(case.policy.head, weight=weight, bias=bias))
        return path(replace(case, policy=policy), name, 100)[0].loss.sum()

    assert torch.autograd.gradcheck(partial(loss, by_statistics), case.inputs())
    slope = torch.autograd.grad(loss(by_pairs, *case.inputs()), case.inputs())  # made once, so not for gradcheck
    towards = [torch.randn_like(x) for x in case.inputs()]
    ahead, behind = (
        loss(by_pairs, *(x.detach() + sign * 1e-6 * d for x, d in zip(case.inputs(), towards, strict=True)))
        for sign in (1, -1)
    )
    expected = sum((g * d).sum() for g, d in zip(slope, towards, strict=True))
    torch.testing.assert_close((ahead - behind) / 2e-6, expected, rtol=1e-7, atol=1e-8)


def test_the_chosen_kl_of_tdpo2_is_held_constant():
    case = make_case()
    with_kl = everything(case, *by_pairs(case, "tdpo1", 1 << 20))["gradient of states"]
    without = everything(case, *by_pairs(case, "tdpo2", 1 << 20))["gradient of states"]
    assert not torch.allclose(with_kl, without)


@pytest.mark.parametrize("path", [*PATHS, by_merged_pairs])
def test_finite_where_logits_lie_200_apart(path):
    case = make_case(dtype=torch.float32, bias=False)
    with torch.no_grad():
        case.policy.states.zero_()[:, 0] = 1.0
        case.policy.head.weight.zero_()[::2, 0] = 200.0
        case.ref.states.zero_()[:, 0] = 1.0
        case.ref.head.weight.zero_()[1::2, 0] = 200.0
    case.ref = Reading(case.ref.states, Head(case.ref.head.weight))
    found = everything(case, *path(case, "tdpo1", 1 << 20))
    assert all(value.isfinite().all() for value in found.values())
    expected = everything(case, *textbook(case, "tdpo1"))
    assert expected["stats.kl"].max() > 199
    assert_same(found, {name: value for name, value in expected.items() if name in found}, 1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave back."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize(("path", "name"), [*((path, "tdpo2") for path in PATHS), (by_merged_pairs, "tdpo1")])
def test_no_tensor_over_all_positions_and_the_vocabulary(path, name):
    case = make_case(pairs=20, longest=30, vocab=199)
    rows = 70  # the longest pair has at most 60 tokens
    everything_at_once = len(case.policy.states) * 199
    assert everything_at_once > 5 * rows * 199
    with Largest() as seen:
        everything(case, *path(case, name, rows * 199 * 8))
    assert seen.numel <= rows * 199
    with Largest() as seen:
        everything(case, *textbook(case, "tdpo2"))
    assert seen.numel == everything_at_once  # the textbook does make one: the watch sees it


class Products(TorchDispatchMode):
    """Counts matrix products with a vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.count = vocab, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        sizes = [n for x in args if isinstance(x, Tensor) for n in x.shape]
        self.count += "mm" in str(function) and self.vocab in sizes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("path", "name", "products"),
    [(by_pairs, "tdpo2", 4), (by_pairs, "tdpo1", 4), (by_merged_pairs, "tdpo1", 3), (by_statistics, "tdpo2", 6)],
)
def test_number_of_products_with_the_vocabulary(path, name, products):
    case = make_case(bias=False, vocab=31)
    case.guide = None
    with Products(31) as seen:
        path(case, name, 1 << 20)[0].loss.mean().backward()
    assert seen.count == products


@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_head_skips_its_gradient(path):
    case = make_case(bias=False, vocab=31)
    expected = everything(case, *textbook(case, "tdpo2"))["gradient of states"]
    case.policy.head.weight.requires_grad_(False)
    with Products(31) as all_of_it:
        output, _ = path(case, "tdpo2", 1 << 20)
        output.loss.mean().backward()
    torch.testing.assert_close(case.policy.states.grad, expected)
    assert case.policy.head.weight.grad is None
    case.policy.head.weight.requires_grad_(True)
    with Products(31) as more:
        output, _ = path(case, "tdpo2", 1 << 20)
        output.loss.mean().backward()
    assert more.count == all_of_it.count + 1


@pytest.mark.parametrize("path", PATHS)
def test_known_log_probabilities_stand_for_a_model(path):
    case = make_case()
    _, tokens = textbook(case, "tgdpo")
    expected = everything(case, *textbook(case, "tgdpo"))
    known = replace(case, ref=tokens.ref_logps[tokens.mask], guide=tokens.guide_logps[tokens.mask])
    if path is by_pairs:
        output, found = fused.pair_loss(objective("tgdpo"), known.policy, known.labels, known.ref, guide=known.guide)
    else:
        found = token_stats(known.policy, known.labels, known.ref, guide=known.guide)
        output = objective("tgdpo")(*stats.split(found))
    expected.pop("stats.kl")
    assert_same(everything(known, output, found), expected, 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_a_head_that_is_not_understood_takes_the_textbook_path(path):
    case = make_case()
    logits = case.policy.logits().detach().requires_grad_()
    plain = replace(case, policy=Reading(logits, None))
    output, _ = path(plain, "tdpo2", 1 << 20)
    (found,) = torch.autograd.grad(output.loss.mean(), logits)
    again = case.policy.logits().detach().requires_grad_()
    tokens = stats.token_stats(again, case.labels, case.ref.logits(), with_kl=True)
    (expected,) = torch.autograd.grad(objective("tdpo2")(*stats.split(tokens)).loss.mean(), again)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("path", PATHS)
def test_a_reference_may_give_logits_and_exclude_tokens(path):
    case = make_case(dtype=torch.float32)
    logits = case.ref.logits().detach()
    logits[:, 3] = -torch.inf
    case.labels[case.labels == 3] = 4
    case.ref = Reading(logits, None)
    assert_same(everything(case, *path(case, "tdpo2", 1 << 20)), everything(case, *textbook(case, "tdpo2")), 1e-6)


# ---- forbidden tokens: logits of -inf, and worse


def by_all_logits(case: Case, name: str, tile_bytes: int):
    """The textbook, as training takes it where a head is not understood."""
    case = replace(case, policy=Reading(case.policy.logits(), None))
    return by_pairs(case, name, tile_bytes)


def make_biased_case(**settings: dict[int, float]) -> Case:
    """Tokens 20 to 22 stand in no response, token 5 in the last one; settings: model -> {token: its bias in the head}."""
    case = make_case(seed=1)
    case.labels[case.labels >= 20] -= 20
    case.labels[tuple((case.labels != IGNORE).nonzero()[-1])] = IN_A_RESPONSE
    for name in ("policy", "ref", "guide"):
        reading = getattr(case, name)
        bias = torch.linspace(-1, 1, 23, dtype=torch.float64)
        for token, value in settings.get(name, {}).items():
            bias[token] = value
        bias.requires_grad_(name == "policy")
        setattr(case, name, Reading(reading.states, Head(reading.head.weight, bias, reading.head.scale)))
    return case


NO = -float("inf")
IN_A_RESPONSE = 5
ALLOWED = {
    "reference": {"ref": {20: NO, 22: NO}},
    "guide": {"guide": {20: NO}},
    "all alike": {"policy": {20: NO, 21: NO}, "ref": {20: NO, 21: NO}, "guide": {20: NO, 21: NO}},
    "reference more than policy": {"policy": {20: NO}, "ref": {20: NO, 21: NO}},
}


@pytest.mark.parametrize("layout", ALLOWED)
@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2", "tgdpo"])
@pytest.mark.parametrize("tile", [200, 1 << 20])
def test_forbidden_tokens_are_equal_on_every_path(name, layout, tile):
    case = make_biased_case(**ALLOWED[layout])
    expected = everything(case, *textbook(case, name))
    assert all(value.isfinite().all() for value in expected.values())
    for path in (*PATHS, by_all_logits):
        assert_same(everything(case, *path(case, name, tile)), expected, 1e-12)
    if name == "tdpo1":
        found = everything(case, *by_merged_pairs(case, name, tile))
        assert_same(found, {key: expected[key] for key in found}, 1e-11)


FORBIDS = "log-probability of the token is -inf: it forbids this token"
BROKEN = "log-probability of the token is nan: its logits there hold NaN or inf, or forbid every token"
WHO = {"policy": "policy", "ref": "reference", "guide": "guide"}
REFUSED = [
    ({"policy": {IN_A_RESPONSE: NO}, "ref": {IN_A_RESPONSE: NO}}, f"the policy's {FORBIDS}"),
    ({"policy": {IN_A_RESPONSE: NO}}, f"the policy's {FORBIDS}"),
    ({"ref": {IN_A_RESPONSE: NO}}, f"the reference's {FORBIDS}"),
    ({"guide": {IN_A_RESPONSE: NO}}, f"the guide's {FORBIDS}"),
    ({"policy": {20: NO}}, "KL(reference || policy) is inf: the policy forbids a token that the reference allows"),
    ({"policy": {20: NO, 21: NO}, "ref": {20: NO}}, "KL(reference || policy) is inf"),
    *(({who: {20: bad}}, f"the {called}'s {BROKEN}") for bad in (-NO, float("nan")) for who, called in WHO.items()),
    *(({who: dict.fromkeys(range(23), NO)}, f"the {called}'s {BROKEN}") for who, called in WHO.items()),
]


def make_repeated_case(seed: int, bias: bool) -> tuple[Case, Case]:
    """Seven pairs among four sequences: read once each, and as fourteen, with the same leaves for gradients."""
    few, draw = make_case(pairs=2, bias=bias, seed=seed), torch.Generator().manual_seed(seed)
    twins = torch.randint(0, 4, (14,), generator=draw)
    twins[7:] = torch.where(twins[7:] == twins[:7], (twins[7:] + 1) % 4, twins[7:])
    mask = few.labels[:, 1:] != IGNORE
    number = torch.zeros_like(mask, dtype=torch.long)
    number[mask] = torch.arange(int(mask.sum()))
    rows = number[twins][mask[twins]]  # (R,)
    once = {name: replace(getattr(few, name), rows=rows) for name in ("policy", "ref", "guide")}
    each = {name: Reading(reading.states[rows], reading.head) for name, reading in once.items()}
    return Case(few.labels[twins], **once), Case(few.labels[twins], **each)


@pytest.mark.parametrize("tile", [1, 900, 1 << 20])  # a pair each, some pairs, all
@pytest.mark.parametrize("name", [*losses.OBJECTIVES, "merged"])
def test_sequences_of_several_pairs_are_scored_once_and_count_for_all(name, tile):
    for seed in range(4):
        once, each = make_repeated_case(seed, bias=seed % 2 == 0)
        inputs = once.inputs()
        each.inputs = lambda inputs=inputs: inputs
        path, name_ = (by_merged_pairs, "tdpo1") if name == "merged" else (by_pairs, name)
        expected = everything(each, *(path(each, name_, 1 << 20) if name == "merged" else textbook(each, name_)))
        assert_same(everything(once, *path(once, name_, tile)), expected, 1e-11)
        once.ref, once.guide = each.ref, each.guide  # a cache gives every position its own
        assert_same(everything(once, *path(once, name_, tile)), expected, 1e-11)
        if name != "merged":
            assert_same(everything(once, *by_all_logits(once, name_, tile)), expected, 1e-11)


def test_a_tile_has_a_row_for_every_different_position(monkeypatch):
    once, _ = make_repeated_case(0, bias=True)
    read, take = [], tiles.Tiles.read
    monkeypatch.setattr(tiles.Tiles, "read", lambda self, index: read.append(len(index)) or take(self, index))
    by_pairs(once, "tdpo2", 1 << 20)
    assert read == [len(once.policy.rows.unique())]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
@pytest.mark.parametrize("path", [by_pairs, by_all_logits, by_merged_pairs])
def test_what_cannot_be_learned_from_is_refused_with_its_place(path, settings, message):
    if path is by_merged_pairs and "guide" in settings:
        pytest.skip("TDPO1 has no guide")
    case = make_biased_case(**settings)
    tokens = textbook(case, "tdpo1")[1]
    fields = [getattr(tokens, name) for name in ("logps", "ref_logps", "guide_logps", "kl")]
    row, column = next(place for x in fields for place in (~x.isfinite()).nonzero().tolist())
    with pytest.raises(stats.NotFinite, match=re.escape(f"column {column + 1}: {message}")) as caught:
        path(case, "tdpo1", 200)
    assert caught.value.sequence == row


def test_an_objective_of_ones_own():
    def hinge(chosen, rejected):
        margin = (chosen.logps - chosen.ref_logps).sum(-1) - (rejected.logps + 0.1 * rejected.kl).sum(-1)
        return losses.LossOutput(torch.relu(1 - margin), margin.detach(), -margin.detach())

    case = make_case()
    tokens = stats.token_stats(case.policy.logits(), case.labels, case.ref.logits(), with_kl=True)
    expected = everything(case, hinge(*stats.split(tokens)), tokens)
    found = fused.pair_loss(hinge, case.policy, case.labels, case.ref, with_kl=True, tile_bytes=500)
    assert_same(everything(case, *found), expected, 1e-12)


def test_evaluation_makes_no_gradient():
    case = make_case(bias=False, vocab=31)
    with torch.no_grad(), Products(31) as seen:
        output, _ = fused.pair_loss(objective("tdpo2"), case.policy, case.labels, case.ref, with_kl=True)
    assert not output.loss.requires_grad
    assert seen.count == 2


def test_scaled_and_summed_losses():
    case = make_case()
    inputs = case.inputs()
    mean = torch.autograd.grad(by_pairs(case, "dpo", 400)[0].loss.mean(), inputs)
    total = torch.autograd.grad(by_pairs(case, "dpo", 400)[0].loss.sum() * 0.5, inputs)
    for a, b in zip(mean, total, strict=True):
        torch.testing.assert_close(a * 1.5, b)  # three pairs: 0.5 of the sum is 1.5 means


def test_unequal_weights_and_a_second_backward_are_refused():
    case = make_case()
    loss = by_pairs(case, "dpo", 400)[0].loss
    with pytest.raises(ValueError, match="different weights"):
        (loss * torch.tensor([1.0, 2.0, 1.0])).sum().backward()
    loss = by_pairs(case, "dpo", 400)[0].loss.mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="made once"):
        loss.backward()


def test_bad_input_is_named():
    case = make_case()
    count = len(case.policy.states)
    with pytest.raises(ValueError, match=f"ref was read at {count - 1} positions, but labels have {count}"):
        token_stats(case.policy, case.labels, Reading(case.ref.states[1:], case.ref.head))
    with pytest.raises(ValueError, match="guide has 5 vocabulary entries, the policy 23"):
        token_stats(case.policy, case.labels, None, guide=Reading(torch.zeros(count, 5), None))
    with pytest.raises(ValueError, match="needs ref as a Reading"):
        token_stats(case.policy, case.labels, torch.zeros(count), with_kl=True)
    with pytest.raises(ValueError, match="5 sequences cannot be split into pairs"):
        fused.pair_loss(objective("sft"), case.policy, case.labels[:5])
    bad = case.labels.clone()
    bad[bad != IGNORE] = 23
    with pytest.raises(ValueError, match="outside the vocabulary of 23"):
        token_stats(case.policy, bad, None)


def test_a_tile_is_chosen_from_the_device(monkeypatch):
    assert tiles.choose_tile_bytes(torch.device("cpu")) == tiles.TILE_BYTES
    for free, chosen in ((1 << 20, tiles.TILE_BYTES), (8 << 30, 1 << 29), (140 << 30, 1 << 30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert tiles.choose_tile_bytes(torch.device("cuda")) == chosen


def test_how_models_are_read_is_checked_as_settings_are():
    assert FastPath().pair_loss is fused.pair_loss
    assert FastPath(fused=False).pair_loss is stats.pair_loss
    with pytest.raises(ValueError, match="fused=1 must be True or False"):
        FastPath(fused=1)
