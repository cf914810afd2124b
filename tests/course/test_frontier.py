"""The frontier lab's bench: losses are the library's, optima those of the world."""

from __future__ import annotations

import pytest
import torch

from tpo_course.frontier import NAMES, UPDATES, WORLD, Bench, Setting, Stale, needed
from tpo_course.world import TokenWorld
from tpo_course.world_plots import kl_and_return


@pytest.fixture(scope="module")
def bench():
    return Bench(TokenWorld(**WORLD))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_library_s(bench, name):
    setting = Setting(beta=0.3, alpha=0.7, guide_beta=0.4)
    logps = bench.world.random_policy(1)
    chosen, rejected, weight = bench.data(None, 0.0)
    found = (weight * bench._loss(name, setting, chosen, rejected)(logps).loss).sum()
    hyper = {"beta": 0.3} | ({"alpha": 0.7} if name in ("tdpo2", "tgdpo") else {})
    if name == "tgdpo":
        hyper |= {"guide_beta": 0.4, "guide": bench.world.soft_optimum(0.4)[1]}
    assert float(found) == pytest.approx(float(bench.world.expected_loss(name, logps, **hyper)), abs=1e-12)


def test_r_hat_may_have_the_run_s_beta(bench):
    wrong, same = (bench.train("tgdpo", Setting(beta=0.5, guide_beta=b, run_beta=True)).end for b in (0.1, 0.5))
    assert same == bench.train("tgdpo", Setting(beta=0.5, guide_beta=0.5)).end
    assert wrong != bench.train("tgdpo", Setting(beta=0.5, guide_beta=0.1)).end


@pytest.mark.parametrize(("name", "setting"), [
    ("dpo", Setting()), ("tdpo1", Setting()), ("ipo", Setting()), ("ipo", Setting(noise=0.3)), ("ipo", Setting(pairs=10_000)),
    ("tdpo2", Setting(alpha=0)), ("tgdpo", Setting(guide_beta=None)),
])  # fmt: skip
def test_training_ends_at_the_optimum_in_closed_form(bench, name, setting):
    assert bench.train(name, setting).end == pytest.approx(bench.optimum(name, setting), abs=1e-3)


@pytest.mark.parametrize(("name", "setting"), [
    ("dpo", Setting(noise=0.1)), ("dpo", Setting(pairs=100)), ("tdpo1", Setting(noise=1)), ("tdpo2", Setting()),
    ("tgdpo", Setting()), ("ipo", Setting(pairs=10)),
])  # fmt: skip
def test_elsewhere_no_closed_form_is_claimed(bench, name, setting):
    assert bench.optimum(name, setting) is None


@pytest.mark.parametrize(("name", "setting"), [
    ("dpo", Setting(beta=0.2)), ("tdpo1", Setting()), ("ipo", Setting(noise=0.3)),
])  # fmt: skip
def test_going_on_comes_to_rest_at_the_optimum_in_closed_form(bench, name, setting):
    assert bench.rest(name, setting) == pytest.approx(bench.optimum(name, setting), abs=1e-3)


@pytest.mark.parametrize("name", ["tdpo2", "tgdpo"])
def test_where_tdpo2_and_tgdpo_rest_no_gradient_is_left(bench, name, monkeypatch):
    chosen, rejected, weight = bench.data(None, 0.0)
    seen = []

    def watched(world, logps):
        seen.append(logps)
        return kl_and_return(world, logps)

    monkeypatch.setattr("tpo_course.frontier.kl_and_return", watched)
    rest = bench.rest(name, Setting())
    logits = seen[-1].clone().requires_grad_()
    (weight * bench._loss(name, Setting(), chosen, rejected)(logits.log_softmax(-1)).loss).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-5
    assert rest == pytest.approx(bench.train(name, Setting()).end, abs=0.02)


def test_drawn_pairs_have_no_optimum(bench):
    assert bench.rest("dpo", Setting(pairs=30)) is None


def test_a_path_begins_at_the_reference_and_ends_at_its_policy(bench):
    run = bench.train("tdpo2", Setting())
    assert len(run.kl) == len(run.returns) == len(UPDATES)
    start = kl_and_return(bench.world, bench.world.ref_logps)
    assert (run.kl[0], run.returns[0]) == pytest.approx(start, abs=1e-12)
    assert run.end == pytest.approx(kl_and_return(bench.world, bench.world.ref_logps + run.logratio), abs=1e-12)


def test_labels_are_swapped_and_pairs_drawn_as_asked(bench):
    def table(pairs, noise):
        made = torch.zeros(30, 30, dtype=torch.float64)
        chosen, rejected, weight = bench.data(pairs, noise)
        made[chosen, rejected] = weight
        return made

    exact = table(None, 0.0)
    assert float(exact.sum()) == pytest.approx(1)
    assert torch.allclose(table(None, 1.0), exact.T)
    assert torch.allclose(table(None, 0.25), 0.75 * exact + 0.25 * exact.T)
    few, more = 10 * table(10, 0.0), 300 * table(300, 0.0)
    assert (few.sum(), more.sum()) == (pytest.approx(10), pytest.approx(300))
    assert (more >= few - 1e-9).all()  # the first ten are among them
    assert torch.allclose(table(300, 1.0), table(300, 0.0).T)
    apart = (table(10_000, 0.2) - table(None, 0.2)).abs().sum()
    assert apart < 0.25
    assert apart > 0.01


def test_a_guide_trained_for_long_is_its_optimum_and_a_short_one_is_not(bench):
    away = [
        float(bench.world.kl(bench.guide(1.0, n, None, 0.0), bench.guide(1.0, None, None, 0.0)).max()) for n in (200, 5)
    ]
    assert away[0] < 1e-3 < 0.01 < away[1]


def test_floor_is_a_share_of_the_tokens_in_the_data(bench):
    assert bench.train("dpo", Setting()).floor is None
    setting = Setting(alpha=2.0)
    chosen, rejected, weight = bench.data(None, 0.0)
    r_hat = bench.world.tokenwise(bench.world.soft_optimum(1.0)[1] - bench.world.ref_logps)
    on = tokens = 0.0
    for better, worse, p in zip(chosen.tolist(), rejected.tolist(), weight.tolist(), strict=True):
        for row, sign in ((better, 1), (worse, -1)):
            for t in range(int(bench.world.responses.lengths[row])):
                tokens += p
                on += p * (1 + sign * 2.0 * float(r_hat[row, t]) <= 0.01)
    assert bench.train("tgdpo", setting).floor == pytest.approx(on / tokens)
    assert on / tokens > 0.05


def test_training_is_left_at_once_when_nobody_waits(bench):
    asked = []

    def stale():
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Stale):
        bench.train_all(NAMES, Setting(), stale)
    assert len(asked) == 4


def test_together_they_go_where_they_go_alone(bench):
    setting = Setting(alpha=1.0, pairs=100, noise=0.1)
    together = bench.train_all(NAMES, setting)
    assert list(together) == list(NAMES)
    for name, run in together.items():
        alone = bench.train(name, setting)
        assert run.kl == pytest.approx(alone.kl, abs=1e-9)
        assert torch.allclose(run.logratio, alone.logratio, atol=1e-9)
        assert (run.loss, run.floor) == pytest.approx((alone.loss, alone.floor))


def test_what_an_objective_does_not_read_makes_no_other_run():
    assert needed("dpo", Setting(alpha=3, guide_beta=0.1, run_beta=True)) == needed("dpo", Setting())
    assert needed("tdpo2", Setting(guide_beta=0.1)) == needed("tdpo2", Setting())
    assert needed("tgdpo", Setting(guide_beta=0.1)) != needed("tgdpo", Setting())
    assert needed("tgdpo", Setting(guide_beta=None, alpha=2)) == needed("tdpo2", Setting(alpha=0)) == ("dpo", Setting())


@pytest.mark.parametrize(("values", "said"), [
    ({"beta": 0}, r"beta=0 must be above 0"), ({"alpha": -1}, "alpha=-1 must be at least 0"), ({"pairs": 0}, "pairs=0 must be 1"),
    ({"noise": 1.5}, r"noise=1\.5 must lie in 0 to 1"), ({"guide_beta": -1}, "None for no guide"),
    ({"guide_updates": 0}, "None for its optimum"), ({"pairs": 10_001}, "10,000"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(values, said):
    with pytest.raises(ValueError, match=said):
        Setting(**values)
