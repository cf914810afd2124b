"""The frontier lab's stored runs: they say what they are, and can be made again."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from tpo_course import frontier_grid
from tpo_course.frontier import NAMES, UPDATES, WORLD, Bench, Setting, needed
from tpo_course.frontier_grid import AXES, GRID
from tpo_course.frontier_presets import PRESETS
from tpo_course.world import TokenWorld
from tpo_course.world_plots import below_front, kl_and_return

KEPT = json.loads(GRID.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bench():
    return Bench(TokenWorld(**WORLD))


def test_the_grid_is_small_and_says_what_it_is():
    assert GRID.stat().st_size < 300_000
    assert KEPT["version"] == 1
    assert KEPT["world"] == WORLD
    assert KEPT["updates"] == list(UPDATES)
    assert KEPT["axes"]["beta"] == AXES["beta"]
    assert KEPT["axes"]["guide"][2] == {"beta": 1.0, "updates": 20}
    assert KEPT["axes"]["data"][0] == {"pairs": None, "noise": 0.0}
    for name, axes in KEPT["reads"].items():
        assert len(KEPT["runs"][name]) == math.prod(len(KEPT["axes"][axis]) for axis in axes)


def test_its_tables_are_the_world_s(bench):
    world = bench.world
    assert KEPT["tokens"] == ["a", "b", "EOS"]
    assert KEPT["states"] == frontier_grid.state_names(world)
    assert KEPT["states"][:5] == ["x0", "x1", "x0 a", "x0 b", "x1 a"]
    assert torch.allclose(
        torch.tensor(KEPT["ref"], dtype=torch.float64).view(-1, 3) / 1e5, world.ref_logps.exp(), atol=6e-6
    )
    assert torch.allclose(torch.tensor(KEPT["reward"], dtype=torch.float64).view(-1, 3) / 1e3, world.reward, atol=6e-4)
    front = KEPT["front"]
    assert front["kl"] == sorted(front["kl"])
    for beta, kl, earned in list(zip(front["beta"], front["kl"], front["return"], strict=True))[::9]:
        assert kl_and_return(world, world.soft_optimum(beta)[1]) == pytest.approx((kl / 1e3, earned / 1e3), abs=1e-3)


def test_nothing_in_it_lies_above_the_front(bench):
    drawn = random.Random(0).sample(list(frontier_grid.places()), 60)
    runs = [frontier_grid.restored(KEPT["runs"][name][key]) for name, key, _ in drawn]
    assert all(below_front(bench.world, (bench.world.ref_logps + run.logratio).log_softmax(-1)) > -1e-3 for run in runs)


@pytest.mark.parametrize(
    "place", random.Random(1).sample(list(frontier_grid.places()), 12), ids=lambda place: f"{place[0]} {place[1]}"
)
def test_points_of_the_grid_are_made_again(bench, place):
    name, key, setting = place
    kept = KEPT["runs"][name][key]
    made_again(bench, name, setting, kept, KEPT["optima"].get(name, {}).get(key))


def test_every_objective_has_an_optimum_where_the_data_are_exact():
    for name, key, setting in frontier_grid.places():
        best = KEPT["optima"][name].get(key)
        assert best or setting.pairs is not None
        assert frontier_grid.optima().get(needed(name, setting)) == (best and (best[0] / 1e3, best[1] / 1e3))


def made_again(bench, name, setting, kept, optimum):
    run, best = bench.train(name, setting), bench.optimum(name, setting) or bench.rest(name, setting)
    assert [x / 1e3 for x in kept["kl"]] == pytest.approx(run.kl, abs=2e-3)
    assert [x / 1e3 for x in kept["return"]] == pytest.approx(run.returns, abs=2e-3)
    assert [x / 1e2 for x in kept["logratio"]] == pytest.approx(run.logratio.flatten().tolist(), abs=0.02)
    assert kept["loss"] == pytest.approx(run.loss, abs=2e-3)
    assert kept.get("floor") == (None if run.floor is None else pytest.approx(run.floor, abs=1e-3))
    assert optimum == (None if best is None else [pytest.approx(1e3 * value, abs=1) for value in best])
    assert frontier_grid.grid()[needed(name, setting)].end == (kept["kl"][-1] / 1e3, kept["return"][-1] / 1e3)


@pytest.mark.parametrize("kept", KEPT["presets"], ids=lambda kept: f"{kept['objective']} {kept['setting']}")
def test_runs_of_the_presets_are_made_again(bench, kept):
    made_again(bench, kept["objective"], Setting(**kept["setting"]), kept, kept.get("optimum"))


def test_every_preset_is_stored_and_nothing_twice():
    kept = [needed(run["objective"], Setting(**run["setting"])) for run in KEPT["presets"]]
    on = {needed(name, setting) for name, _, setting in frontier_grid.places()}
    assert kept == frontier_grid.off_grid()
    assert len(frontier_grid.grid()) == len(on) + len(kept)
    assert all(needed(name, preset.setting) in frontier_grid.grid() for name in NAMES for preset in PRESETS.values())


def test_the_builder_writes_the_same_for_a_smaller_grid(bench, tmp_path, monkeypatch, capsys):
    for axis, values in {"beta": [0.5], "alpha": [0.5], "guide": [(1.0, None)], "data": [(None, 0.0)]}.items():
        monkeypatch.setitem(AXES, axis, values)
    few = {name: PRESETS[name] for name in ("tiny β, the one-step policy", "the guide's β taken for the run's")}
    monkeypatch.setattr(frontier_grid, "PRESETS", few)
    monkeypatch.setattr("sys.argv", ["frontier_grid", "--out", str(tmp_path / "small.json")])
    frontier_grid.main()
    small = json.loads((tmp_path / "small.json").read_text())
    assert "small.json: " in capsys.readouterr().out
    beta, alpha, guide = (KEPT["axes"][axis].index(value) for axis, value in (
        ("beta", 0.5), ("alpha", 0.5), ("guide", {"beta": 1.0, "updates": None})))  # fmt: skip
    whole = KEPT["runs"]
    assert small["runs"]["dpo"]["0,0"] == whole["dpo"][f"{beta},0"]
    assert small["runs"]["tgdpo"]["0,0,0,0"] == whole["tgdpo"][f"{beta},0,{alpha},{guide}"]
    assert small["optima"]["tdpo1"] == {"0,0": KEPT["optima"]["tdpo1"][f"{beta},0"]}
    assert [run for run in small["presets"] if run in KEPT["presets"]] == [
        run for run in KEPT["presets"] if "beta" in run["setting"]
    ]
    assert len(small["presets"]) == 5 + 5  # beta = 2 is not on the smaller grid
    assert {key: small[key] for key in ("world", "tokens", "states", "ref", "front")} == {
        key: KEPT[key] for key in ("world", "tokens", "states", "ref", "front")
    }
