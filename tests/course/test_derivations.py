"""Every step of every derivation holds in 50 random worlds, and every step can fail."""

from __future__ import annotations

import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tpo_course import derivations
from tpo_course.derivations import DERIVATIONS, TOLERANCE, Hyper, Step, derive_table, equation_map, tgdpo, tools, verify
from tpo_course.derivations.breaks import BREAKS, Holds, break_it, broken, changed
from tpo_course.derivations.steps import read
from tpo_course.derivations.tgdpo import slack_and_loss
from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld

STEPS = {f"{name}.{step.key}": step for name, derivation in DERIVATIONS.items() for step in derivation.steps}
SYMBOLIC = {name: step for name, step in STEPS.items() if step.symbolic is not None}


def random_world(number: int) -> tuple[TokenWorld, dict[str, float]]:
    """World `number` of 50, every shape, discount and hyperparameter in turn."""
    vocab, horizon = [(2, 1), (3, 2), (4, 2), (3, 3), (2, 4), (4, 3), (5, 2)][number % 7]
    world = TokenWorld(
        vocab,
        horizon,
        seed=100 + number,
        gamma=[1.0, 0.9, 1.0, 0.5][number % 4],
        eos=number % 3 != 0,
        num_prompts=1 + number % 3,
        temperature=[1.0, 0.5, 2.0][number % 3],
        reward_scale=[1.0, 0.3, 2.0][number // 3 % 3],
    )
    hyper = {
        "beta": [0.1, 0.5, 1.0, 3.0][number // 4 % 4],
        "alpha": [0.5, 0.1, 1.0, 0.0][number // 2 % 4],
        "guide_beta": [1.0, 0.3][number % 2],
        "margin": [0.5, 0.0, 1.5][number % 3],
    }
    return world, hyper


@pytest.mark.parametrize("number", range(50))
def test_every_step_holds(number):
    world, hyper = random_world(number)
    undiscounted = world.with_gamma(1.0)
    for name, step in STEPS.items():
        residual = step.residual(undiscounted if step.gamma_one else world, **hyper)
        assert residual <= TOLERANCE, f"{name}: {residual:.1e} at {hyper}"


# One wrong sign or term per symbolic check: (text in its source, what stands there instead).
SYMBOLIC_BREAKS = {
    "preferences.bradley_terry": ("-(a - b)", "(a - b)"),
    "preferences.shift": ("b: b + f", "b: b - f"),
    "dpo.z_cancels": ("beta * sp.log(z)", "beta * sp.log(z * pi)"),
    "dpo.gradient": ("sigma(-beta * m)", "sigma(beta * m)"),
    "token_mdp.soft_bellman": ("q1 / beta) /", "-q1 / beta) /"),
    "tdpo.margin_is_linear": ("- entropy)", "+ entropy)"),
    "tdpo.rewards_kl_of_chosen": ("+ beta / (1", "- beta / (1"),
    "one_form.simpo_is_dpo": ("beta / n * ((w", "beta * ((w"),
}


HARMLESS = {  # what an equation does not notice, and why that is worth asking
    "preferences.shift": {"a shift of another size, 30 for 3"},
    "dpo.z_cancels": {"7 added to the reward of both", "beta log Z added to both rewards"},
}


def test_every_step_has_a_break():
    assert list(BREAKS) == list(STEPS)
    assert set(SYMBOLIC_BREAKS) == set(SYMBOLIC)


@pytest.mark.parametrize("name", STEPS)
def test_step_fails_when_broken(name):
    step = STEPS[name]
    world = TokenWorld(4, 3, seed=3, num_prompts=2, gamma=1.0 if step.gamma_one else 0.9)
    assert step.residual(world) <= TOLERANCE
    for wrong, (old, new) in BREAKS[name].items():
        noticed = changed(step, old, new).residual(world) > 1e-3
        assert noticed is (wrong not in HARMLESS.get(name, ())), wrong


def test_a_chapter_shows_the_residual_with_and_without_a_break(capsys):
    holds = Holds("dpo", TokenWorld(3, 2, seed=0), beta=0.5)
    holds("z_cancels", "beta left out")
    said = capsys.readouterr().out
    jump = break_it("dpo.z_cancels", "beta left out", holds.world, beta=0.5)
    assert said == f"Z cancels: residual {jump.residual:.0e}; with beta left out: {jump.broken:.2g}\n"
    asked = holds.ask("z_cancels")
    assert f"{jump.broken:.2g}" not in asked._repr_html_().split("<details")[0]
    assert asked._repr_html_().count("<details") == len(BREAKS["dpo.z_cancels"])
    with pytest.raises(KeyError, match="has no break 'nothing'; it has 'a plus for the minus', 'beta left out'"):
        holds("z_cancels", "nothing")
    with pytest.raises(KeyError, match="no derivation 'dpp'"):
        break_it("dpp.z_cancels", None, holds.world)
    with pytest.raises(ValueError, match="occurs 0 times, not once; its source"):
        changed(STEPS["dpo.loss"], "nowhere", "")


def test_what_does_not_hold_raises(monkeypatch):
    wrong = changed(STEPS["dpo.z_cancels"], *BREAKS["dpo.z_cancels"]["beta left out"])
    monkeypatch.setattr("tpo_course.derivations.breaks.find", lambda key: wrong)
    monkeypatch.setattr("tpo_course.derivations.breaks.changed", lambda step, old, new: step)
    with pytest.raises(AssertionError, match=r"Z cancels: residual .* is above 1e-09"):
        Holds("dpo", TokenWorld(3, 2, seed=0), beta=0.5)("z_cancels")


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_checks(name):
    assert STEPS[name].symbolic() == 0
    assert broken(STEPS[name].symbolic, *SYMBOLIC_BREAKS[name])() != 0


def test_steps_that_need_no_discount_say_so():
    world = TokenWorld(3, 2, seed=0, gamma=0.9)
    with pytest.raises(ValueError, match=r"preference holds at gamma = 1 only, this world has 0.9"):
        STEPS["tdpo.preference"].residual(world)
    with pytest.raises(ValueError, match="with_gamma"):
        STEPS["tdpo.preference"].measure(world)


def test_gamma_one_is_claimed_only_where_it_is_needed():
    """Where a step says that it needs gamma = 1, its sides really differ in a world that discounts (or the bound is unproven)."""
    world, hyper = TokenWorld(4, 3, seed=1, num_prompts=2, gamma=0.5), Hyper()
    for name, step in STEPS.items():
        if step.gamma_one and name not in {"tgdpo.upper_bound"}:
            left, right = step.sides(world, hyper)
            assert (left - right).abs().max() > 1e-3, name


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"guide_beta": -1.0}, {"alpha": -0.1}, {"margin": -1.0}])
def test_hyperparameters_are_checked(bad):
    with pytest.raises(ValueError, match="must be above 0"):
        STEPS["dpo.loss"].residual(TokenWorld(3, 2, seed=0), **bad)


def test_residual_refuses_sides_of_two_shapes():
    step = Step(lambda w, h: (torch.zeros(2), torch.zeros(1)))
    with pytest.raises(ValueError, match="shape"):
        step.residual(TokenWorld(2, 1, seed=0))


# The numbers that tell where a claim ends.


@pytest.fixture(scope="module")
def world():
    return TokenWorld(4, 3, seed=0, num_prompts=2)


def test_beta_acts_both_ways(world):
    at_the_end = list(STEPS["dpo.beta_at_the_optimum"].measure(world).values())
    assert at_the_end == sorted(at_the_end, reverse=True)
    at_the_start = list(STEPS["dpo.beta_in_the_first_step"].measure(world).values())
    assert at_the_start == sorted(at_the_start)


def test_discount_breaks_the_loss_forms(world):
    for name in ("token_mdp.dpo_agrees", "tdpo.preference"):
        one, some, much = STEPS[name].measure(world).values()
        assert abs(one) < 1e-9
        assert 1e-4 < some < much


def test_one_step_policy_lies_between(world):
    found = STEPS["tdpo.one_step_is_not_optimal"].measure(world)
    for beta in ("0.1", "0.5", "1"):
        one, best = found[f"J(one-step pi*) at beta={beta}"], found[f"J(optimum) at beta={beta}"]
        assert found["J(pi_ref)"] < one < best - 1e-3


def test_tdpo2_does_not_rest_at_the_one_step_policy(world):
    first, half, full = STEPS["tdpo.tdpo1_minimum"].measure(world).values()
    assert first < 1e-12
    assert min(half, full) > 1e-3


def test_tdpo2_holds_the_chosen_kl_below_tdpo1(world):
    found = STEPS["tdpo.rewards_kl_of_chosen"].measure(world)
    assert (
        found["SeqKL of the chosen after 100 steps of tdpo2"]
        < found["SeqKL of the chosen after 100 steps of tdpo1"] / 2
    )


def test_relaxation_and_slack_are_real(world):
    slack = STEPS["tgdpo.upper_bound"].measure(world)
    assert all(value > 0.1 for name, value in slack.items() if name.startswith("slack"))
    cost = STEPS["tgdpo.relaxation_error"].measure(world)
    lost = [value for name, value in cost.items() if name.startswith("lost")]
    assert all(value > 0 for value in lost)
    moved = [value for name, value in cost.items() if name.startswith("largest distance")]
    assert moved == sorted(moved, reverse=True)  # in beta


def test_searches_come_close_and_no_further(world):
    """Where a step says "every policy", what was tried reaches the bound and does not cross it."""
    random, climbed = STEPS["dpo.no_policy_is_better"].measure(world).values()
    assert 0 < climbed < 1e-3 < random
    random, climbed = STEPS["tdpo.policy_improvement"].measure(world).values()
    assert abs(climbed) < 1e-9 < random


def test_a_bound_from_the_kl_lies_above_the_error_and_shrinks_with_beta(world):
    found, bounds = STEPS["tgdpo.relaxation_bound"].measure(world), ("bound by total variation", "bound by KL")
    for beta in ("0.1", "0.5", "1", "5"):
        error, distance, kl = (found[f"{name} at beta={beta}"] for name in ("error", *bounds))
        assert 0 < error <= distance <= kl
    for name in bounds:
        values = [value for key, value in found.items() if key.startswith(name)]
        assert values == sorted(values, reverse=True)


def test_slack_and_loss_belong_to_the_split(world):
    """The same preferences: nothing lost with one split, several units of reward with others."""
    best, _ = world.soft_optimum(0.1)
    assert slack_and_loss(world, 0.1, 0 * best.v) == pytest.approx((0.878, 0.729), abs=5e-4)
    assert slack_and_loss(world, 0.1, best.v) == pytest.approx((0, 0), abs=1e-12)
    found = STEPS["tgdpo.other_splits"].measure(world)
    assert found["smallest loss of 50 random splits at beta=0.1"] < 0.3
    assert found["largest loss of 50 random splits at beta=0.1"] > 3
    assert all(value > 0.02 for value in found.values())


def test_one_pair_labelled_both_ways(world):
    without, with_delta, mean, largest = STEPS["tgdpo.both_labels"].measure(world).values()
    assert (without, with_delta) == pytest.approx((0.693, -1.307), abs=5e-4)
    assert 0.1 < mean < largest


def test_two_pairs_counterexample(world):
    without, with_delta = STEPS["tgdpo.two_pairs"].measure(world).values()
    assert without == pytest.approx(0.693, abs=5e-4)
    assert with_delta == pytest.approx(-0.941, abs=5e-4)


def test_dropping_delta_moves_the_optimum(world):
    found = STEPS["tgdpo.delta_keeps_the_optimum"].measure(world)
    assert found["slope left by the fit"] < 1e-6
    assert found["KL(pi with delta_Z || pi without), nats per response"] > 0.01
    assert found["f = 1: J(optimum without delta_Z), which is DPO's"] == pytest.approx(found["J(best policy)"])
    assert found["f = 1: J(optimum with delta_Z)"] < found["J(best policy)"] - 1e-3
    assert found["KL(pi trained without delta_Z || its closed form), nats"] < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_bisection_finds_what_training_finds(seed):
    """The closed form of TGDPO without delta_Z against a policy trained to rest, with a strongly varying f."""
    other, h = TokenWorld(3, 3, seed=seed), Hyper(alpha=2.0)
    f = tgdpo.shaping(other, h)
    assert f.max() / f.min() > 5

    def loss(logits: torch.Tensor) -> torch.Tensor:
        margin = tools.gap(other, other.along(h.beta * f * (logits.log_softmax(-1) - other.ref_logps)))
        return -tools.mean_over_pairs(other, torch.nn.functional.logsigmoid(margin))

    _, pi = tgdpo.optimum_without_delta(other, h.beta * f)
    fit = minimise(loss, other.random_policy(9), steps=60)
    assert other.kl(fit.policy.logps(), pi).max() < 1e-6


def test_token_shares_and_floor(world):
    shares = list(STEPS["tgdpo.four_behaviours"].measure(world).values())
    assert shares[0] + shares[1] == pytest.approx(1)
    assert shares[0] > shares[2]  # good tokens are more frequent among the chosen
    floored = list(STEPS["tgdpo.floor"].measure(world).values())
    assert floored[0] == 0 < floored[-1] <= 1
    assert STEPS["tgdpo.loss"].measure(world).popitem()[1] > 1e-2


def test_alpha_one_gradients_differ(world):
    assert STEPS["one_form.alpha_one"].measure(world).popitem()[1] > 1e-3


# Form.

COMMANDS = """
    alpha approx arg beta Big big Bigl bigl Bigr bigr cdot delta ell epsilon forall frac gamma ge hat kappa lambda le left log
    mathbb mathrm max mid min nabla ne operatorname partial Phi phi pi quad rho Rightarrow right sigma sim succ sum text tfrac
    theta varphi
"""  # all known to MathJax and KaTeX


@pytest.mark.parametrize("name", STEPS)
def test_latex_is_plain(name):
    latex, changed = STEPS[name].latex, STEPS[name].changed
    for text in (latex, changed):
        depth = 0
        for character in re.sub(r"\\[{}]", "", text):
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0
    assert latex.count(r"\left") == latex.count(r"\right")
    for size in ("big", "Big"):
        opened, closed = (re.findall(rf"\\{size}{side}(.)", latex) for side in "lr")
        assert len(opened) == len(closed)
        assert set(opened) <= set("([")
        assert set(closed) <= set(")]")
        assert not re.search(rf"\\{size}[()\[\]]", latex), f"write {size}l and {size}r: gaps otherwise"
    assert "$" not in latex
    assert set(re.findall(r"\\([A-Za-z]+)", latex)) <= set(COMMANDS.split())
    assert changed
    assert changed in latex


@pytest.mark.parametrize("name", STEPS)
def test_text_is_complete(name):
    step = STEPS[name]
    assert step.title
    assert 40 <= len(step.words) <= 400
    assert step.source
    assert step.relation in {"=", "<="}
    if step.implements:
        assert pkgutil.resolve_name(step.implements) is not None


def test_names_are_unique():
    for derivation in DERIVATIONS.values():
        keys = [step.key for step in derivation.steps]
        assert len(keys) == len(set(keys))
        assert derivation.question.endswith("?")
    with pytest.raises(KeyError, match=r"dpo has no step 'lose'; it has chain_rule"):
        DERIVATIONS["dpo"].step("lose")


def test_code_and_words_name_the_same_steps():
    """In the same order; every module beside which Markdown lies is a derivation."""
    folder = Path(derivations.__file__).parent
    assert {path.stem for path in folder.glob("*.md")} == set(DERIVATIONS)
    for name, derivation in DERIVATIONS.items():
        about, texts = read(folder / f"{name}.md")
        assert list(texts) == [step.key for step in derivation.steps]
        assert all(about.values())


def test_verify_counts_worlds_and_reports():
    worlds = [TokenWorld(3, 2, seed=0), TokenWorld(3, 2, seed=1, gamma=0.9)]
    checks = {check.step.key: check for check in verify(DERIVATIONS["token_mdp"], worlds)}
    assert (checks["bellman"].worlds, checks["same_optimum"].worlds) == (2, 1)
    assert all(check.holds for check in checks.values())
    assert checks["soft_bellman"].symbolic is True
    assert checks["bellman"].symbolic is None
    assert checks["dpo_agrees"].measured
    only_discounted = verify(DERIVATIONS["token_mdp"], worlds[1:])
    assert not next(check for check in only_discounted if check.step.key == "same_optimum").holds


def test_derive_table():
    text = derive_table("dpo", numbers=False)
    assert text.count("ok  ") == len(DERIVATIONS["dpo"].steps)
    assert "FAIL" not in text
    assert "gradient steps at beta" not in text
    assert derivations.objective_map() in derive_table("one_form")
    with pytest.raises(ValueError, match=r"no derivation 'trpo'; choose one of preferences, dpo"):
        derive_table("trpo")


def test_the_table_says_by_definition():
    step = replace(STEPS["dpo.loss"], by_definition=True)
    one = replace(DERIVATIONS["dpo"], steps=(step, STEPS["dpo.z_cancels"]))
    *_, first, second = derivations.table(one, verify(one, [TokenWorld(3, 2, seed=0)])).splitlines()
    assert first.endswith("in 1 worlds, by definition")
    assert "by definition" not in second


def test_equation_map_is_complete():
    text = equation_map()
    for step in STEPS.values():
        assert step.title in text
        assert not step.implements or f"`{step.implements}`" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") == 5, line


def test_equation_map_on_disk_is_current_and_its_links_lead_somewhere():
    notebooks = Path(__file__).parents[2] / "notebooks"
    text = (notebooks / "equation_map.md").read_text()
    assert text == equation_map(), "write it anew: python -m tpo_lib derive --map > notebooks/equation_map.md"
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert "../tpo_lib/losses.py" in links
    assert all((notebooks / link).is_file() for link in links)


def test_a_correlation_counts_a_token_as_often_as_the_reference_writes_it():
    world = TokenWorld(3, 3, seed=1, num_prompts=2)
    x, y = world.reward, world.soft_optimum(0.5)[0].a
    rows = world.responses
    written = world.prompt_probs[rows.prompt] * world.sequence_logps(world.ref_logps).exp()  # (R,)
    often = written[:, None].expand_as(rows.mask)
    told = [world.tokenwise(table)[rows.mask] for table in (x, y)]  # token by token of every response
    weight = often[rows.mask] / often[rows.mask].sum()
    a, b = (each - (weight * each).sum() for each in told)
    by_hand = (weight * a * b).sum() / ((weight * a * a).sum() * (weight * b * b).sum()).sqrt()
    assert tools.correlation(world, x, y) == pytest.approx(float(by_hand), abs=1e-12)
    assert tools.correlation(world, x, 1 - 2 * x) == pytest.approx(-1)
