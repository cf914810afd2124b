"""Pictures of the world: what is drawn equals the exact numbers, nothing beats the front, names do not collide."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.text import Text
from torch.distributions import Categorical, kl_divergence

from tpo_course import world_plots
from tpo_course.tabular import fit_tabular
from tpo_course.world import TokenWorld
from tpo_lib.losses import OBJECTIVES, Objective
from tpo_lib.runs.plots import style_of

BETAS = [0.2, 0.5, 1.0, 3.0]


def make(gamma: float = 1.0, **more) -> TokenWorld:
    return TokenWorld(**{"vocab_size": 3, "horizon": 3, "seed": 5, "num_prompts": 2, "gamma": gamma, **more})


@pytest.fixture(scope="module")
def trained() -> tuple[TokenWorld, dict[str, torch.Tensor]]:
    w = make(horizon=2)
    dpo = fit_tabular(w, "dpo", beta=1.0).policy.logps()
    tdpo2 = fit_tabular(w, "tdpo2", optimizer="adam", steps=300, beta=1.0, alpha=0.5).policy.logps()
    tgdpo = fit_tabular(w, "tgdpo", guide=dpo, guide_beta=1.0, beta=1.0, alpha=0.2).policy.logps()
    return w, {"dpo": dpo, "tdpo2": tdpo2, "tgdpo": tgdpo}


def line(ax, label: str):
    (found,) = [each for each in ax.get_lines() if each.get_label() == label]
    return found


def by_enumeration(w: TokenWorld, logps: torch.Tensor) -> tuple[float, float]:
    """KL and return from the distribution over whole responses: no recursion, no state visits."""
    prompt, log_p, log_q = w.responses.prompt, w.sequence_logps(logps), w.sequence_logps(w.ref_logps)
    weight = w.prompt_probs[prompt] * log_p.exp()
    return float((weight * (log_p - log_q)).sum()), float((weight * w.returns).sum())


def text_box(text: Text):
    return Text.get_window_extent(text)  # an annotation's own extent would include its line


# The front.


def test_kl_and_return_equal_the_sums_over_whole_responses():
    w = make()
    for seed in range(5):
        policy = w.random_policy(seed, scale=2)
        assert world_plots.kl_and_return(w, policy) == pytest.approx(by_enumeration(w, policy), abs=1e-12)
    assert world_plots.kl_and_return(w, w.ref_logps)[0] == 0


def test_kl_is_discounted_like_the_objective():
    w, beta = make(gamma=0.7), 0.8
    soft, optimum = w.soft_optimum(beta)
    kl, value = world_plots.kl_and_return(w, optimum)
    assert value - beta * kl == pytest.approx(float(w.expected(soft.v)), abs=1e-12)
    assert "discounted by γ = 0.7" in world_plots.pareto(w, BETAS, {}).axes[0].get_xlabel()


def test_a_policy_that_excludes_tokens_has_finite_numbers():
    w = make()
    greedy = torch.full_like(w.reward, -torch.inf).scatter(1, w.values(w.ref_logps).q.argmax(-1, keepdim=True), 0.0)
    kl, value = world_plots.kl_and_return(w, greedy)
    assert kl == pytest.approx(-float((w.visits(greedy) * (greedy.exp() * w.ref_logps).sum(-1)).sum()))
    assert value > world_plots.kl_and_return(w, w.ref_logps)[1]


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_front_line_is_exact(gamma):
    w = make(gamma)
    ax = world_plots.pareto(w, BETAS, {"dpo": w.random_policy(0, scale=0.3)}).axes[0]
    drawn = line(ax, "exact front").get_xydata()
    assert tuple(drawn[0]) == world_plots.kl_and_return(w, w.ref_logps)
    for beta in BETAS:
        at = world_plots.kl_and_return(w, w.soft_optimum(beta)[1])
        assert np.abs(drawn - at).max(1).min() == 0
    assert (np.diff(drawn[:, 0]) > 0).all()
    assert (np.diff(drawn[:, 1]) >= -1e-12).all()
    for beta in (0.1, *BETAS, 10):  # every drawn point is attainable or below: no line of slope beta lies beneath one
        best = float(w.expected(w.soft_optimum(beta)[0].v))
        assert (drawn[:, 1] - beta * drawn[:, 0]).max() <= best + 1e-12


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_no_policy_lies_above_the_front(gamma):
    w = make(gamma)
    policies = {f"r{i}": w.random_policy(i, scale=0.2 + i / 10) for i in range(30)}
    policies |= {f"one step {beta}": w.one_step_optimum(beta) for beta in (0.05, *BETAS)}
    policies |= {"soft": w.soft_optimum(0.7)[1], "worst": w.gibbs(-w.reward)[0]}
    front = line(world_plots.pareto(w, BETAS, policies).axes[0], "exact front").get_xydata()
    highest = -np.inf
    for policy in policies.values():
        x, y = world_plots.kl_and_return(w, policy)
        assert x <= front[-1, 0]  # the line goes on until it passes the last policy
        highest = max(highest, y - np.interp(x, *front.T))
    assert highest <= 2e-3  # between its points the line is a chord, a little below the front
    assert highest > -2e-3  # "soft" lies on it


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_below_front_is_what_the_best_policy_of_that_kl_earns_more(gamma):
    w = make(gamma)
    for beta in (0.05, 0.5, 3.0):
        star = w.soft_optimum(beta)[1]
        assert world_plots.below_front(w, star) == pytest.approx(0, abs=1e-9)
        kl, earned = by_enumeration(w, star) if gamma == 1 else world_plots.kl_and_return(w, star)
        worse = (0.9 * star.exp() + 0.1 * w.ref_logps.exp()).log()
        short = world_plots.below_front(w, worse)
        less_kl, less = world_plots.kl_and_return(w, worse)
        # the front lies below its tangent at the star, whose slope is beta
        assert 0 < short <= earned + beta * (less_kl - kl) - less + 1e-9
    beyond = torch.full_like(star, -1e3).scatter(1, w.ref_logps.argmin(-1, keepdim=True), 0.0).log_softmax(-1)
    best = w.soft_optimum(1e-3)[1]
    assert world_plots.kl_and_return(w, beyond)[0] > world_plots.kl_and_return(w, best)[0]
    gap = world_plots.kl_and_return(w, best)[1] - world_plots.kl_and_return(w, beyond)[1]
    assert world_plots.below_front(w, beyond) == pytest.approx(gap, abs=1e-6)


def test_beta_marks_are_soft_optima_and_each_is_named():
    w = make()
    ax = world_plots.pareto(w, [*BETAS, 1.01, 1.02], {}).axes[0]
    marks = line(ax, "betas").get_xydata()
    named = [float(match[1]) for text in ax.texts if (match := re.match(r"β = (.*)", text.get_text()))]
    assert len(named) == len(marks) >= 3
    assert len({1.0, 1.01, 1.02} & set(named)) <= 1  # too close to be read
    for beta, mark in zip(named, marks, strict=True):
        assert tuple(mark) == pytest.approx(world_plots.kl_and_return(w, w.soft_optimum(beta)[1]), rel=0.02)


def test_trained_policies_stand_where_they_should_in_the_colours_of_their_objectives(trained):
    w, policies = trained
    ax = world_plots.pareto(w, BETAS, {**policies, "one step": w.one_step_optimum(1.0)}).axes[0]
    for name in ("dpo", "tdpo2", "tgdpo"):
        style, marker = style_of(name), line(ax, style_of(name).label)
        assert (marker.get_color(), marker.get_marker()) == (style.colour, style.marker)
        assert tuple(marker.get_xydata()[0]) == pytest.approx(by_enumeration(w, policies[name]), abs=1e-12)
    optimum = by_enumeration(w, w.soft_optimum(1.0)[1])
    assert tuple(line(ax, "DPO").get_xydata()[0]) == pytest.approx(optimum, abs=1e-5)  # exact DPO ends on the front
    other = line(ax, "one step")
    assert other.get_markerfacecolor() == "none"
    assert other.get_color() not in {style_of(name).colour for name in OBJECTIVES}
    (star,) = line(ax, "reference").get_xydata()
    assert tuple(star) == world_plots.kl_and_return(w, w.ref_logps)


def test_a_name_may_say_more_than_the_objective():
    w = make()
    ax = world_plots.pareto(w, BETAS, {"tdpo2 β=0.3": w.random_policy(0), "tdpo2 β=3": w.random_policy(1)}).axes[0]
    assert [line(ax, f"TDPO2 β={beta}").get_color() for beta in ("0.3", "3")] == [style_of("tdpo2").colour] * 2
    assert {"TDPO2 β=0.3", "TDPO2 β=3"} < {text.get_text() for text in ax.texts}


def test_labels_cover_neither_each_other_nor_the_front():
    w = make()
    same = w.soft_optimum(0.9)[1]  # all on one spot, on the front
    names = ["dpo", "tdpo1", "tdpo2", "tgdpo", "simpo", "a policy with a long name", "ref again"]
    figure = world_plots.pareto(w, BETAS, dict.fromkeys(names, same))
    figure.draw_without_rendering()
    ax = figure.axes[0]
    front = ax.transData.transform(line(ax, "exact front").get_xydata())
    boxes = {text.get_text(): text_box(text) for text in ax.texts}
    assert {"DPO", "TGDPO", "a policy with a long name", "reference", "β = 1"} < set(boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert not boxes[a].overlaps(boxes[b]), (a, b)
    for name, box in boxes.items():
        assert not box.count_contains(front), name
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, name


def test_axes_carry_units():
    ax = world_plots.pareto(make(), BETAS, {}).axes[0]
    assert ax.get_xlabel() == "sequence KL(policy ‖ reference), nats"
    assert ax.get_ylabel() == "expected return, units of reward"


@pytest.mark.parametrize("betas", [[], [1.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("inf")]])
def test_odd_betas_are_refused(betas):
    with pytest.raises(ValueError, match="different positive numbers"):
        world_plots.pareto(make(), betas, {})


@pytest.mark.parametrize("draw", [lambda w, p: world_plots.pareto(w, BETAS, p), world_plots.policy_tree])
def test_wrong_tables_are_refused(draw):
    w = make()
    with pytest.raises(ValueError, match=r"policy 'dpo' has shape \(4, 3\); this world's tables are \(14, 3\)"):
        draw(w, {"dpo": torch.zeros(4, 3)})
    with pytest.raises(ValueError, match=r"'dpo' is not normalised.*misses 1 by 1;.*log_softmax"):
        draw(w, {"dpo": w.ref_logps + torch.tensor(2.0).log()})
    with pytest.raises(ValueError, match=r"'dpo' is not normalised"):
        draw(w, {"dpo": torch.full_like(w.ref_logps, torch.nan)})


# The tree.


def edges(ax) -> dict[str, object]:
    return {each.get_label(): each for each in ax.get_lines()}


def nodes(ax) -> dict[str, Text]:
    return {text.get_text(): text for text in ax.texts if text.get_zorder() == 3}


def numbers(ax) -> list[Text]:
    return [text for text in ax.texts if text.get_zorder() == 2]


def chances(w: TokenWorld, logps: torch.Tensor, prompt: int, depth: int) -> dict[str, float]:
    """P(child) / P(parent) of every node, marginalised from whole responses."""
    letters = world_plots.token_names(w)
    mass: dict[tuple, float] = {}
    mine = w.responses.prompt == prompt
    for tokens, logp in zip(w.responses.tokens[mine].tolist(), w.sequence_logps(logps)[mine].tolist(), strict=True):
        written = [token for token in tokens if token >= 0]
        for end in range(min(depth, len(written)) + 1):
            node = tuple(written[:end])
            mass[node] = mass.get(node, 0.0) + float(np.exp(logp))
    return {" ".join(letters[t] for t in node): mass[node] / mass[node[:-1]] for node in mass if node}


@pytest.mark.parametrize(
    ("world", "prompt", "depth"),
    [
        (make(), 1, 2),
        (make(), 0, 3),
        (make(vocab_size=4, num_prompts=3), 2, 2),
        (make(eos=False), 1, 2),
        (make(horizon=1), 0, 1),
    ],
)
def test_every_edge_is_as_thick_as_its_token_is_probable(world, prompt, depth):
    policies = {"ref": world.ref_logps, "dpo": world.random_policy(3, scale=2)}
    figure = world_plots.policy_tree(world, policies, prompt=prompt, depth=depth)
    for ax, policy, name in zip(figure.axes, policies.values(), policies, strict=True):
        expected = chances(world, policy, prompt, depth)
        drawn = edges(ax)
        assert set(drawn) == set(expected)
        assert set(nodes(ax)) == {"x", *expected}
        for node, chance in expected.items():
            assert drawn[node].get_linewidth() == pytest.approx(0.4 + 7 * chance)
            assert drawn[node].get_color() == style_of(name).colour
        printed = sorted(text.get_text() for text in numbers(ax))
        assert printed == sorted("<0.01" if chance < 0.005 else f"{chance:.2f}" for chance in expected.values())


def test_an_edge_joins_its_states_and_carries_its_own_number():
    w = make()
    (ax,) = world_plots.policy_tree(w, {"dpo": w.random_policy(0, scale=2)}).axes
    expected = chances(w, w.random_policy(0, scale=2), 0, 2)
    where = {name: text.get_position() for name, text in nodes(ax).items()}
    for child, edge in edges(ax).items():
        parent = child.rpartition(" ")[0] or "x"
        assert [tuple(point) for point in edge.get_xydata()] == [where[parent], where[child]]
        (x0, y0), (x1, y1) = where[parent], where[child]
        (number,) = [
            text
            for text in numbers(ax)
            if x0 < text.get_position()[0] < x1
            and text.get_position()[1] == pytest.approx(y0 + (y1 - y0) * (text.get_position()[0] - x0) / (x1 - x0))
            and min(y0, y1) - 1e-9 <= text.get_position()[1] <= max(y0, y1) + 1e-9
        ]
        assert number.get_text() == f"{expected[child]:.2f}"


def test_eos_the_horizon_and_open_states_look_different_without_colour():
    w = make(horizon=2)
    figure = world_plots.policy_tree(w, {"ref": w.ref_logps})
    drawn = nodes(figure.axes[0])
    look = {name: text.get_bbox_patch() for name, text in drawn.items()}
    assert {name for name in look if to_hex(look[name].get_facecolor()) == "#000000"} == {"EOS", "a EOS", "b EOS"}
    assert {name for name in look if look[name].get_linewidth() > 2} == {"a a", "a b", "b a", "b b"}
    assert to_hex(drawn["EOS"].get_color()) == "#ffffff"
    (legend,) = figure.legends
    entries = ["goes on", "ended by EOS", "ended by the horizon", "edge: π(token | state)"]
    assert [text.get_text() for text in legend.get_texts()] == entries
    (legend,) = world_plots.policy_tree(make(eos=False), {"ref": w.ref_logps.new_zeros(26, 3).log_softmax(-1)}).legends
    assert [text.get_text() for text in legend.get_texts()] == ["goes on", "edge: π(token | state)"]


@pytest.mark.parametrize(
    ("world", "depth", "panels"),
    [(make(vocab_size=4), 2, 3), (make(), 3, 1), (make(vocab_size=5), 2, 2), (make(), 1, 1)],
)
def test_nothing_in_a_tree_overlaps_and_all_of_it_is_inside(world, depth, panels):
    policy = world.random_policy(1)
    policies = {"ref": world.ref_logps, "dpo": policy, "tdpo2": policy}
    figure = world_plots.policy_tree(world, dict(list(policies.items())[:panels]), depth=depth)
    figure.draw_without_rendering()
    for ax in figure.axes:
        boxes = [text.get_bbox_patch().get_window_extent() for text in nodes(ax).values()]
        boxes += [text.get_window_extent() for text in numbers(ax)]
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    (legend,) = figure.legends
    assert figure.bbox.x0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.x1


def test_what_does_not_fit_a_tree_is_refused():
    w = make()
    one = w.ref_logps
    with pytest.raises(ValueError, match="0 policies given"):
        world_plots.policy_tree(w, {})
    with pytest.raises(ValueError, match="4 policies given"):
        world_plots.policy_tree(w, dict.fromkeys("abcd", one))
    for bad in ({"prompt": 2}, {"prompt": -1}, {"depth": 0}, {"depth": 4}):
        with pytest.raises(ValueError, match=r"prompt=.*0 to 1, depth=.*1 to 3"):
            world_plots.policy_tree(w, {"ref": one}, **bad)
    big = make(vocab_size=6)
    with pytest.raises(ValueError, match=r"depth=3 gives 156 leaves \(at most 40"):  # 125 + 25 + 5 + 1
        world_plots.policy_tree(big, {"ref": big.ref_logps}, depth=3)


# Two distributions.


def test_kl_directions_draws_both_distributions_and_both_sums():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    left, forward, backward = world_plots.kl_directions(p.log(), q.log(), ("π_ref", "π")).axes
    heights = [[bar.get_height() for bar in bars] for bars in left.containers]
    assert heights == [pytest.approx(p.tolist()), pytest.approx(q.tolist())]
    for ax, a, b, title in ((forward, p, q, "KL(π_ref ‖ π)"), (backward, q, p, "KL(π ‖ π_ref)")):
        terms = [bar.get_height() for bar in ax.containers[0]]
        assert terms == pytest.approx((a * (a / b).log()).tolist())
        total = float(kl_divergence(Categorical(a), Categorical(b)))
        assert sum(terms) == pytest.approx(total)
        assert ax.get_title() == f"{title} = {total:.3f} nats"
        assert "nats" in ax.get_ylabel()
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]
    assert forward.get_ylim() == backward.get_ylim()


def test_kl_directions_refuses_odd_input():
    p = torch.zeros(3).log_softmax(-1)
    with pytest.raises(ValueError, match=r"p \(3,\) and q \(2,\)"):
        world_plots.kl_directions(p, p[:2])
    with pytest.raises(ValueError, match="'q' is not normalised"):
        world_plots.kl_directions(p, torch.zeros(3))


def test_text_is_legible_and_no_pyplot_state_is_used():
    w = make()
    row = w.ref_logps[0]
    figures = [
        world_plots.pareto(w, BETAS, {"dpo": w.random_policy(0)}),
        world_plots.policy_tree(w, {"dpo": w.random_policy(0)}, depth=3),
        world_plots.kl_directions(row, w.random_policy(0)[0]),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        assert figure.canvas.manager is None
        shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        assert shown
        assert min(text.get_fontsize() for text in shown) >= 10


def test_the_front_goes_on_where_a_beta_is_met_twice_but_for_rounding():
    world = TokenWorld(3, 2, seed=0, num_prompts=2)
    betas = [5.0, 2.0, 0.4]
    (ax,) = world_plots.pareto(world, betas, {"far": world.soft_optimum(0.05)[1]}).axes
    front = max(ax.lines, key=lambda line: len(line.get_xdata()))
    kl, value = front.get_xdata(), front.get_ydata()
    there = [
        (k, v)
        for k, v in zip(kl, value, strict=True)
        if k > world_plots.kl_and_return(world, world.soft_optimum(0.4)[1])[0] + 1e-3
    ]
    assert len({round(v, 6) for _, v in there}) > 3  # it rises, it is not one flat line


def test_an_objective_of_ones_own_has_its_style_here_too(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(OBJECTIVES["dpo"].fn))
    mine, other = world_plots._styles(["mine β=0.3", "somebody"])
    assert (mine.colour, mine.marker, mine.label) == (*style_of("mine")[1:3], "mine β=0.3")
    assert other.colour == world_plots.GREY
