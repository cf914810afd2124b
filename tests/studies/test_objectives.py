"""The studies' objectives: loaded as anyone's own, tied to the library's by identities, worked by hand, and what they pull at."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_losses import CHOSEN, REJECTED, close, random_batch, stats_from

from tpo_lib import stats
from tpo_lib.config import TrainConfig
from tpo_lib.fast import pair_loss
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import own
from tpo_lib.studies import reverse_kl
from tpo_lib.train import fit
from tpo_lib.types import IGNORE, Reading

FILE = Path(__file__).parents[2] / "studies" / "objectives.py"
KL, GUIDE = ("ref_logps", "kl"), ("ref_logps", "guide_logps")
NEEDS = {  # name -> what it reads
    "tdpo1_alpha": KL,
    "tdpo2_both_stopped": KL,
    "tdpo2_rejected_stopped": KL,
    "tdpo2_ramp": KL,
    "tdpo2_guided": ("ref_logps", "kl", "guide_logps"),
    "tgdpo_one_f": GUIDE,
    "tgdpo_softmax": GUIDE,
    "dpo_weighted": GUIDE,
}
HYPER = {"beta": 0.3, "alpha": 0.7, "guide_beta": 0.9}


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    before = dict(OBJECTIVES)
    for name in NEEDS:
        own.load_objective(f"{FILE}:{name}")
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def title(name: str) -> str:
    return name if name in OBJECTIVES else f"objectives.py:{name}"


def run(name: str, chosen=CHOSEN, rejected=REJECTED, **hyper):
    entry = OBJECTIVES[title(name)]
    return entry.fn(chosen, rejected, **{k: v for k, v in (HYPER | hyper).items() if k in entry.hyperparameters})


def sides(seed: int = 0):
    batch = random_batch(seed)
    read = stats.token_stats(batch["policy"], batch["labels"], batch["ref"], guide_logits=batch["guide"], with_kl=True)
    return stats.split(read)


def slopes(name: str, field: str, seed: int = 0, **hyper):
    """d sum(loss) / d field of the chosen and the rejected side, 0 where nothing flows, and beta sigma(-margin) (B, 1)."""
    leaf = {name: lambda side, name=name: getattr(side, name).detach().requires_grad_() for name in ("logps", "kl")}
    both = [replace(side, **{name: made(side) for name, made in leaf.items()}) for side in sides(seed)]
    output = run(name, *both, **hyper)
    leaves = [getattr(side, field) for side in both]
    found = torch.autograd.grad(output.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    margin = output.chosen_reward - output.rejected_reward
    return *found, (hyper.get("beta", HYPER["beta"]) * torch.sigmoid(-margin))[:, None], both


def same(one, other):
    for name in ("loss", "chosen_reward", "rejected_reward"):
        close(getattr(one, name), getattr(other, name))


def test_they_read_what_they_need_and_the_file_has_no_other():
    assert {name: OBJECTIVES[title(name)].needs for name in NEEDS} == NEEDS
    module = {line.split()[1].split("(")[0] for line in FILE.read_text().splitlines() if line.startswith("def ")}
    assert {name for name in module if not name.startswith("_")} == set(NEEDS)
    imports = {
        line.split()[1].split(".")[0] for line in FILE.read_text().splitlines() if line.startswith(("from", "im"))
    }
    assert imports == {"__future__", "torch", "tpo_lib"}


IDENTITIES = [
    ("tdpo1_alpha", {"alpha": 0.0}, "dpo", {}),
    ("tdpo1_alpha", {"alpha": 1.0}, "tdpo1", {}),
    ("tdpo1_alpha", {}, "tdpo2", {}),  # in value
    ("tdpo2_both_stopped", {}, "tdpo2", {}),
    ("tdpo2_rejected_stopped", {}, "tdpo2", {}),
    ("tdpo2_ramp", {"slope": 0.0}, "tdpo2", {}),
    ("tdpo2_ramp", {"alpha": 0.0, "slope": 1.0}, "dpo", {}),
    ("tdpo2_guided", {"guidance": 0.0}, "tdpo2", {}),
    ("tdpo2_guided", {"guidance": 0.7, "alpha": 0.0}, "tgdpo", {}),
    ("tgdpo_one_f", {"alpha": 0.0}, "dpo", {}),
    ("tgdpo_softmax", {"alpha": 0.0}, "dpo", {}),
    ("dpo_weighted", {"mix": 0.0}, "dpo", {}),
]


@pytest.mark.parametrize(("name", "hyper", "known", "its"), IDENTITIES)
def test_it_is_the_library_s_where_what_was_changed_is_off(name, hyper, known, its):
    for seed in range(3):
        same(run(name, *sides(seed), **hyper), run(known, *sides(seed), **its))


def test_a_response_that_the_guide_says_nothing_about_has_the_weights_of_dpo():
    chosen, rejected = (replace(side, guide_logps=side.ref_logps) for side in sides())
    for name in ("tgdpo_one_f", "tgdpo_softmax", "dpo_weighted"):
        same(run(name, chosen, rejected), run("dpo", chosen, rejected))


# Chosen: lr (.5, 0), KL (.3, .1), guide ratios (.5, -.5). Rejected: lr -1, KL .6, guide ratio -2.
# beta .2, alpha .5, guide_beta 2.
E = math.e
BY_HAND = {
    "tdpo1_alpha": (0.14, -0.14),  # .2 (.5 + .5 * .4); .2 (-1 + .5 * .6)
    "tdpo2_both_stopped": (0.14, -0.14),
    "tdpo2_rejected_stopped": (0.14, -0.14),
    "tdpo2_ramp": (0.12, -0.14),  # slope 1: weights (0, 2) on two tokens, 1 on one: .2 (.5 + .5 * 2 * .1) = .12
    # r = (1, -1) and -4, guidance .5: f = (1.5, .5) and 3: .2 (1.5 (.5 + .15) + .5 (0 + .05)) = .2; .2 * 3 (-1 + .3) = -.42
    "tdpo2_guided": (0.2, -0.42),
    "tgdpo_one_f": (0.15, -0.002),  # f = (1.5, .5) and max(1 - 2, .01): .2 * 1.5 * .5; .2 * .01 * -1
    # softmax of (.5, -.5) twice: (e, 1) 2 / (e + 1): .2 * .5 * 2 e / (e + 1); one token: 1
    "tgdpo_softmax": (0.2 * E / (E + 1), -0.2),
    "dpo_weighted": (0.1, -0.2),  # |r| the same on both tokens: f = 1, as DPO
}


@pytest.mark.parametrize("name", NEEDS)
def test_worked_by_hand(name):
    output = run(name, beta=0.2, alpha=0.5, guide_beta=2.0, slope=1.0, guidance=0.5)
    chosen, rejected = BY_HAND[name]
    assert output.chosen_reward.item() == pytest.approx(chosen, abs=1e-12)
    assert output.rejected_reward.item() == pytest.approx(rejected, abs=1e-12)
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(rejected - chosen)), abs=1e-12)


def test_weights_by_size_worked_by_hand():
    chosen = stats_from([0.0] * 4, guide=[3.0, -1.0, 0.0, -4.0], padding=1)  # |r| / mean |r| = 3/2, 1/2, 0, 2
    for mix, expected in ((1.0, [1.5, 0.5, 0.0, 2.0, 0.0]), (0.5, [1.25, 0.75, 0.5, 1.5, 0.0])):
        assert run("dpo_weighted", chosen, chosen, mix=mix).token_weights[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["tgdpo_softmax", "dpo_weighted"])
@pytest.mark.parametrize("alpha", [0.5, 50.0])
def test_weights_keep_a_mean_of_one_and_are_never_negative(name, alpha):
    chosen, rejected = sides(2)
    weights, mask = run(name, chosen, rejected, alpha=alpha).token_weights, torch.cat([chosen.mask, rejected.mask])
    close(weights.sum(-1) / mask.sum(-1), 1.0)
    assert weights.min() >= 0
    assert not weights[~mask].any()
    assert weights[mask].std() > 0.1


def test_the_softmax_raises_in_a_chosen_response_what_it_lowers_in_a_rejected_one():
    side = stats_from([0.0, 0.0], guide=[2.0, -2.0])
    up, down = run("tgdpo_softmax", side, side).token_weights.tolist()
    assert up[0] > 1 > up[1]
    assert down == pytest.approx(up[::-1])


def test_one_f_does_not_know_which_response_is_called_chosen():
    here, there = run("tgdpo_one_f"), run("tgdpo_one_f", REJECTED, CHOSEN)
    close(there.chosen_reward, here.rejected_reward)
    close(there.rejected_reward, here.chosen_reward)


STOPPED = {"tdpo1_alpha": (1, 1), "tdpo2": (0, 1), "tdpo2_rejected_stopped": (1, 0), "tdpo2_both_stopped": (0, 0)}


@pytest.mark.parametrize("name", STOPPED)
def test_the_kl_is_followed_on_the_sides_that_are_not_stopped(name):
    """Up on the chosen side (the loss falls as its KL grows), down on the rejected one; 0 where it is held constant."""
    chosen, rejected, c, both = slopes(name, "kl")
    flows = STOPPED[name]
    close(chosen[both[0].mask], (-flows[0] * HYPER["alpha"] * c).expand_as(chosen)[both[0].mask])
    close(rejected[both[1].mask], (flows[1] * HYPER["alpha"] * c).expand_as(rejected)[both[1].mask])


def test_a_ramp_holds_the_end_or_the_beginning():
    mask = torch.tensor([[False, True, True, True, False], [False, True, False, False, False]])
    side = replace(stats_from([0.0] * 5), mask=mask, **{name: torch.zeros(2, 5) for name in ("logps", "ref_logps")})
    side = replace(side, kl=torch.ones(2, 5, requires_grad=True))
    for slope, expected in ((1.0, [0, 1, 2]), (-1.0, [2, 1, 0]), (0.5, [0.5, 1, 1.5])):
        output = run("tdpo2_ramp", replace(side, kl=torch.zeros(2, 5)), side, slope=slope, beta=1.0, alpha=1.0)
        grad = torch.autograd.grad(output.loss.sum(), side.kl)[0]
        assert (grad[0] / grad[0, 1:4].mean()).tolist() == pytest.approx([0, *expected, 0])
        assert grad[1, 2:].tolist() == [0, 0, 0], "a single token has weight 1, padding none"
        assert grad[1, 1] > 0
    with pytest.raises(ValueError, match=r"slope=1\.5 must lie in \[-1, 1\]"):
        run("tdpo2_ramp", slope=1.5)


@pytest.mark.parametrize("name", NEEDS)
def test_the_margin_grows_with_the_chosen_and_falls_with_the_rejected_log_ratio(name):
    chosen, rejected, c, both = slopes(name, "logps", seed=3)
    weights = run(name, *sides(3)).token_weights
    f_w, f_l = (torch.ones_like(chosen), torch.ones_like(chosen)) if weights is None else weights.chunk(2)
    close(chosen[both[0].mask], (-c * f_w)[both[0].mask])
    close(rejected[both[1].mask], (c * f_l)[both[1].mask])


@pytest.mark.parametrize("name", NEEDS)
def test_the_fast_step_gives_what_the_textbook_gives(name):
    batch = random_batch(5)
    labels, mask = batch["labels"], batch["labels"][:, 1:] != IGNORE
    head = type(tiny.llama().lm_head)(5, 5, bias=False).double()
    found = []
    for step in (stats.pair_loss, pair_loss):
        leaf = batch["policy"][:, :-1][mask].clone().requires_grad_()
        said = [Reading(x, tiny_head(head)) for x in (leaf, *(batch[k][:, :-1][mask] for k in ("ref", "guide")))]
        needs = NEEDS[name]
        guide = said[2] if "guide_logps" in needs else None
        output, _ = step(lambda *both: run(name, *both), said[0], labels, said[1], guide=guide, with_kl="kl" in needs)
        output.loss.sum().backward()
        found.append((output.loss.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-10)


def tiny_head(layer):
    from tpo_lib.types import Head

    return Head(layer.weight.detach())


# the KL the other way round


def reading(batch, name):
    return Reading(batch[name][:, :-1][batch["labels"][:, 1:] != IGNORE], None)


def test_the_reverse_kl_is_that_of_two_rows_written_out():
    """Policy 1/4 3/4 against reference 1/2 1/2: 1/4 log 1/2 + 3/4 log 3/2 = .1308; forward it is .1438."""
    labels = torch.tensor([[IGNORE, 0], [IGNORE, 1]])
    policy = torch.tensor([[0.0, math.log(3.0)]] * 2, dtype=torch.float64)
    said = [Reading(x, None) for x in (policy, torch.zeros_like(policy))]
    output, tokens = reverse_kl.pair_loss(lambda *both: run("tdpo2", *both), said[0], labels, said[1], with_kl=True)
    assert tokens.kl.flatten().tolist() == pytest.approx([0.130812] * 2, abs=1e-6)
    _, forward = stats.pair_loss(lambda *both: run("tdpo2", *both), said[0], labels, said[1], with_kl=True)
    assert forward.kl.flatten().tolist() == pytest.approx([0.143841] * 2, abs=1e-6)
    same(output, run("tdpo2", *stats.split(replace(forward, kl=tokens.kl))))


def test_its_gradient_is_that_of_the_kl_on_the_rejected_side_alone():
    """d KL(p || q) / dz = p (log p/q - KL), added with alpha beta sigma(-margin) to what DPO pulls at."""
    batch = random_batch(3)
    leaf = batch["policy"].clone().requires_grad_()
    given = batch | {"policy": leaf}
    output, _ = reverse_kl.pair_loss(
        lambda *both: run("tdpo2", *both),
        reading(given, "policy"),
        batch["labels"],
        reading(given, "ref"),
        with_kl=True,
    )
    output.loss.sum().backward()
    log_p, log_q = (batch[name].log_softmax(-1)[:, :-1] for name in ("policy", "ref"))
    mask, p = (batch["labels"][:, 1:] != IGNORE)[..., None], log_p.exp()
    one_hot = torch.nn.functional.one_hot(batch["labels"][:, 1:].clamp_min(0), 5).double()
    kl = (p * (log_p - log_q)).sum(-1, keepdim=True)
    c = HYPER["beta"] * torch.sigmoid(output.rejected_reward - output.chosen_reward)[:, None, None]
    expected = torch.cat([-c * (one_hot - p)[:2], c * (one_hot - p + HYPER["alpha"] * p * (log_p - log_q - kl))[2:]])
    close(leaf.grad[:, :-1], torch.where(mask, expected, 0.0))


def test_without_a_kl_it_is_the_textbook_step_and_it_trains():
    batch = random_batch(4)
    steps = (stats.pair_loss, reverse_kl.pair_loss)
    read = reading(batch, "policy"), batch["labels"], reading(batch, "ref")
    same(*(step(lambda *both: run("dpo", *both), *read)[0] for step in steps))
    with pytest.raises(ValueError, match="needs ref as a Reading"):
        reverse_kl.pair_loss(lambda *both: run("tdpo2", *both), read[0], read[1], None, with_kl=True)
    config = TrainConfig(loss_type="tdpo2", alpha=2.0, batch_size=4, epochs=3, lr=1e-2, device="cpu", log_every=1)
    after = [
        fit(config, tiny.llama(), tiny.llama(), tiny.pairs(8), pair_loss=step, progress=False).metrics[-1]
        for step in steps
    ]
    assert after[1]["loss"] < math.log(2)
    assert after[0]["loss"] != pytest.approx(after[1]["loss"], rel=1e-4), "both directions train alike"
