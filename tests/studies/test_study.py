"""From records to verdicts: what is kept of a run, how claims are judged, and that pages say no more than the result does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tpo_lib.studies import analysis, conditions, execute, figures, page, study
from tpo_lib.studies.spec import Study

ROOT = Path(__file__).parents[2]
PROMPTS, SEEDS = 40, (1, 2, 3, 4, 5)
PLAN = """
number = 1
title = "Toy"
question = "Which is higher?"
primary = "area reward"
[train]
max_steps = 4
[report]
seeds = [1, 2, 3, 4, 5]
at = [2, 4]
samples = 1
[[method]]
name = "dpo"
loss_type = "dpo"
[[method]]
name = "tdpo2"
loss_type = "tdpo2"
[[endpoint]]
kind = "area"
between = [1, 4]
metrics = ["reward", "judge"]
[[endpoint]]
kind = "at_level"
levels = [4, 90]
metrics = ["reward"]
[[endpoint]]
kind = "steps_to"
levels = [0.6]
[[hypothesis]]
claim = "TDPO2 above DPO"
source = "TDPO"
paper = ".98 against .94"
pairs = [["tdpo2", "dpo"]]
"""


def record(seed: int, gain: float, judge: float | None = None) -> dict:
    """A run whose reward rises from .5 by `gain` in sqrt(KL), with the noise of its prompts; its judge by `judge`."""
    draw, points = np.random.default_rng(seed), []
    noise = draw.normal(0, 0.02, PROMPTS)
    for step, kl in ((0, 0.0), (2, 1.0), (4, 9.0)):
        metrics = {"kl": np.full(PROMPTS, kl)}
        for name, slope in (("reward", gain), ("judge", gain if judge is None else judge)):
            metrics[name] = 0.5 + slope * kl**0.5 + noise + draw.normal(0, 0.005, PROMPTS)
        means = {name: {"mean": float(values.mean())} for name, values in metrics.items()}
        points.append({"step": step, "metrics": means, "by_prompt": {k: v.tolist() for k, v in metrics.items()}})
    return {"points": points, "training": [{"step": 2, "loss": 0.6}, {"step": 4, "loss": 0.5}]}


@pytest.fixture
def plan(tmp_path) -> Study:
    path = tmp_path / "toy.toml"
    path.write_text(PLAN)
    return Study.read(path)


def result(plan: Study, **gains: tuple) -> dict:
    """A result as `study.run` writes it, of methods with such gains."""
    runs = {
        label: [{"seed": s} | study.summarised(plan, record(s + 100 * i, *gain)) for s in SEEDS]
        for i, (label, gain) in enumerate(gains.items())
    }
    chosen = {label: [label, {"loss_type": label}] for label in gains}
    return json.loads(
        json.dumps(
            {
                "runs": runs,
                "chosen": chosen,
                "best": {label: label for label in gains},
                "grid": [],
                "core_seconds": 7200,
            }
        )
    )


def test_what_is_kept_of_a_run_is_what_its_endpoints_say(plan):
    found = study.summarised(plan, record(1, 0.1))
    assert list(found["endpoints"]) == [
        "area reward", "area judge", "reward at 4 nats", "reward at 90 nats", "updates to reward 0.6",
    ]  # fmt: skip
    assert np.mean(found["endpoints"]["reward at 4 nats"]) == pytest.approx(0.7, abs=0.01)  # 0.5 + 0.1 sqrt(4)
    assert np.mean(found["endpoints"]["area reward"]) == pytest.approx(0.65, abs=0.01)  # mean of sqrt from 1 to 2
    assert found["endpoints"]["reward at 90 nats"] is None
    assert np.mean(found["endpoints"]["updates to reward 0.6"]) == pytest.approx(2.0, abs=0.2)
    assert found["training"]["loss"] == [0.6, 0.5]
    assert [point["step"] for point in found["points"]] == [0, 2, 4]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.15,), (0.1,), analysis.HOLDS),
        ((0.1,), (0.15,), analysis.REVERSED),
        ((0.1,), (0.1001,), analysis.SMALL),  # too close to matter, whatever the sign
        ((0.105,), (0.1,), analysis.SMALL),  # told from 0, and too close to matter
        ((0.1, 0.15), (0.15, 0.1), analysis.SMALL),  # the reward says the reverse, no judge does
        ((0.15, 0.1), (0.1, 0.1), analysis.PARTLY),  # the reward says so, no judge does
    ],
)
def test_verdicts(plan, a, b, verdict):
    found = result(plan, tdpo2=a, dpo=b)
    (claim,) = plan.hypotheses
    said, rows = analysis.verdict(plan, found, claim, analysis.comparisons(plan, found))
    assert said == verdict
    assert [(row["a"], row["b"]) for row in rows] == [("tdpo2", "dpo")]


def test_a_claim_of_several_pairs_needs_all_of_them(plan):
    gains = {"a": (0.15,), "b": (0.1,), "c": (0.1001,), "d": (0.2,)}
    found = result(plan, **gains, e=(0.1,), f=(0.1,))
    for run, shift in zip(found["runs"]["f"], (-0.1, 0.1, 0.05, -0.05, 0.04), strict=True):  # seeds apart: not decided
        run["endpoints"] = {key: values and [v + shift for v in values] for key, values in run["endpoints"].items()}
    for pairs, verdict in (
        ([["a", "b"], ["d", "a"]], analysis.HOLDS),
        ([["a", "b"], ["b", "a"]], analysis.PARTLY),
        ([["a", "b"], ["f", "e"]], analysis.PARTLY),
        ([["b", "a"], ["c", "b"]], analysis.NOT),  # reversed, too small
        ([["b", "a"], ["f", "e"]], analysis.OPEN),
    ):
        claim = {"claim": "c", "pairs": pairs}
        one = type(plan)(**vars(plan) | {"hypotheses": (claim,)})
        assert analysis.verdict(one, found, claim, analysis.comparisons(one, found))[0] == verdict, pairs


def test_a_claim_has_beside_it_what_equal_kl_says(plan):
    more = {"kind": "equal_area", "between": [1, 3], "metrics": ["reward"]}
    claim = {**plan.hypotheses[0], "beside": [["tdpo2", "dpo"], ["dpo", "tdpo2"]]}
    one = type(plan)(**vars(plan) | {"hypotheses": (claim,), "endpoints": (*plan.endpoints, more)})
    found = result(one, tdpo2=(0.15,), dpo=(0.1,))
    ((*_, here, words),) = page.claim_rows(one, found)
    area, beside = here.split(". At equal KL (reward over 1 to 3 nats): ")
    assert area.startswith("TDPO2 - DPO")
    assert re.findall(r"[A-Z]\w+ - [A-Z]\w+ [+-]", beside) == ["TDPO2 - DPO +", "DPO - TDPO2 -"]
    assert words == analysis.HOLDS
    others = analysis.secondary(one, found)["area reward"]
    assert [row["a"] for row in others] == ["dpo"]  # the other pair is in the claim's family


def test_settings_are_compared_across_the_grid(plan):
    found = result(plan, tdpo2=(0.1,), dpo=(0.1,))
    areas = {"tdpo2": [0.5, 0.7, 0.7, 0.9], "dpo": [0.6, 0.6, 0.8, 0.8]}
    found["grid"] = [[name, {"lr": i}, area] for name, several in areas.items() for i, area in enumerate(several)]
    dpo, tdpo2 = (line.split(" | ") for line in page.grid_table(plan, found).splitlines()[2:])
    assert (dpo[1:3], tdpo2[1:3]) == (["0.600", "0.800"], ["0.500", "0.900"])  # worst and best
    assert (dpo[3][:7], tdpo2[3][:7]) == ("0.700 [", "0.700 [")  # of the middle two of four
    assert tdpo2[4].startswith("0.50 [")  # .5 is above none of DPO's, .7 above two, .9 above four
    assert dpo[4].startswith("-")


def test_a_noisy_difference_is_not_decided(plan):
    found = result(plan, tdpo2=(0.1,), dpo=(0.1,))
    for run, shift in zip(found["runs"]["tdpo2"], (-0.1, 0.1, 0.05, -0.05, 0.04), strict=True):  # seeds apart
        run["endpoints"]["area reward"] = [value + shift for value in run["endpoints"]["area reward"]]
    (claim,) = plan.hypotheses
    said, (row,) = analysis.verdict(plan, found, claim, analysis.comparisons(plan, found))
    assert said == analysis.OPEN
    assert row["detectable"] > 0.05
    assert "detectable" in page.difference(row, "area reward")


def test_a_claim_of_equality_holds_within_what_matters_alone(plan):
    claim = {"claim": "the same", "pairs": [["tdpo2", "dpo"]], "equal": True}
    for gain, verdict in ((0.1, analysis.HOLDS), (0.12, analysis.NOT)):
        found = result(plan, tdpo2=(gain,), dpo=(0.1,))
        assert analysis.verdict(plan, found, claim, analysis.comparisons(plan, found))[0] == verdict


@pytest.mark.parametrize(
    ("gain", "below", "endpoint", "verdict"),
    [
        (0.107, False, "area reward", analysis.NO_WORSE),  # .01 and more above, and not surely
        (0.093, False, "area reward", analysis.OPEN),
        (0.107, True, "area reward", analysis.OPEN),  # where less is better
        (0.093, True, "area reward", analysis.NO_WORSE),
        (0.107, False, "updates to reward 0.6", analysis.OPEN),  # no score
    ],
)
def test_a_claim_of_equality_may_be_no_worse(plan, gain, below, endpoint, verdict):
    claim = {"claim": "the same", "pairs": [["tdpo2", "dpo"]], "equal": True, "below": below, "endpoint": endpoint}
    found = result(plan, tdpo2=(gain,), dpo=(0.1,))
    for run, shift in zip(found["runs"]["tdpo2"], (-0.004, 0.004, 0.002, -0.002, 0), strict=True):
        run["endpoints"][endpoint] = [value + shift for value in run["endpoints"][endpoint]]
    one = type(plan)(**vars(plan) | {"hypotheses": (claim,)})
    said, (row,) = analysis.verdict(one, found, claim, analysis.comparisons(one, found))
    assert said == verdict, (row["low"], row["high"])


def test_what_was_said_afterwards_is_on_the_page(plan):
    found = result(plan, tdpo2=(0.15,), dpo=(0.1,), simpo=(0.12,))
    plan = type(plan)(**vars(plan) | {"methods": (*plan.methods, type(plan.methods[0])("simpo", "simpo"))})
    row = {"words": "Twice", "source": "ours", "paper": ".9", "beside": [["tdpo2", "simpo"]], "caveat": "by a hair"}
    for written_for, printed in ((analysis.HOLDS, True), (analysis.SMALL, False)):
        row["verdict"] = written_for
        after = {"by_the_clock": True, "caption": "Dashed: a bound.", "claims": {"TDPO2 above DPO": row}}
        later = type(plan)(**vars(plan) | {"after": after})
        ((*said, here, words),) = page.claim_rows(later, found)
        assert said == ["Twice", "ours", ".9"]
        assert words == (f"{analysis.HOLDS} (by a hair)" if printed else analysis.HOLDS)
        (beside,) = analysis.secondary(later, found)["area reward"]
        assert here.endswith(f". Beside it: {page.difference(beside, 'area reward')}")
    assert "2.0 hours by the clocks of the runs" in page.page(later, found)
    assert "*A curve.*\n\nDashed: a bound.\n\n![B" in page.page(
        later, found, [("a.png", "A curve. Up"), ("b.png", "B")]
    )


def test_a_claim_about_one_method_is_compared_with_a_number(plan):
    found = result(plan, tdpo2=(0.1,), dpo=(0.1,))
    for number, below, verdict in (
        ("0.6", False, analysis.HOLDS),
        ("0.7", True, analysis.HOLDS),
        ("0.7", False, analysis.REVERSED),
    ):
        claim = {"claim": "c", "pairs": [["tdpo2", number]], "below": below}
        one = type(plan)(**vars(plan) | {"hypotheses": (claim,)})
        assert analysis.verdict(one, found, claim, analysis.comparisons(one, found))[0] == verdict


def test_a_page_says_what_the_result_says(plan):
    found = result(plan, tdpo2=(0.15,), dpo=(0.1,))
    said = page.page(plan, found)
    (row,) = analysis.comparisons(plan, found)["area reward"]
    assert f"TDPO2 - DPO {row['mean']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" in said
    assert "| TDPO2 above DPO | TDPO | .98 against .94 |" in said
    assert "| holds |" in said
    assert "10 runs of 2 methods over 5 seeds; 2.0 hours of a core" in said
    assert page.page(plan, found) == said
    _, elsewhere = said.split("## Elsewhere")
    (row,) = analysis.secondary(plan, found)["reward at 4 nats"]
    assert (
        f"| reward at 4 nats | TDPO2 - DPO | {row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] |" in elsewhere
    )
    assert "at 90 nats" not in elsewhere  # where neither comes
    assert "area" not in elsewhere


def test_methods_with_other_data_are_compared_where_a_claim_says_so_alone(plan):
    longer = type(plan.methods[1])(name="tdpo2", loss_type="tdpo2", data={"max_new_tokens": 64})
    other = type(plan)(**vars(plan) | {"methods": (plan.methods[0], longer)})
    found = result(plan, tdpo2=(0.15,), dpo=(0.1,))
    assert set(analysis.secondary(plan, found)) == {"reward at 4 nats", "updates to reward 0.6"}
    assert analysis.secondary(other, found) == {}
    assert analysis.comparisons(other, found) == analysis.comparisons(plan, found)


def test_a_page_with_costs_says_what_they_hold(plan):
    costs = tuple({"kind": kind, "levels": [0.6]} for kind in ("tokens_to", "seconds_to"))
    costly = type(plan)(**vars(plan) | {"endpoints": (*plan.endpoints, *costs)})
    run = record(1, 0.1) | {"spec": {"data": {"seed": 1}, "train": {}}, "seconds": {"training": 8.0}}
    for point in run["points"]:
        point["by_prompt"]["length"] = [30.0] * PROMPTS
    kept = study.summarised(costly, run)
    assert np.mean(kept["endpoints"]["sampled tokens to reward 0.6"]) == 900 * 4 * 30
    assert np.mean(kept["endpoints"]["seconds to reward 0.6"]) == pytest.approx(4.0, abs=0.4)  # of update 2
    found = result(plan, dpo=(0.1,), tdpo2=(0.1,))
    found["runs"]["dpo"] = found["runs"]["tdpo2"] = [{"seed": s} | kept for s in SEEDS]
    said = page.page(costly, found)
    assert page.COST in said
    assert "108000 [108000, 108000] |" in said
    assert page.COST not in page.page(plan, found)


def test_a_result_is_written_a_line_a_run_and_read_back(plan, tmp_path):
    found = result(plan, tdpo2=(0.15,), dpo=(0.1,))
    study.write(tmp_path / "results" / "toy.json", found)
    assert study.read(tmp_path, "toy") == found
    lines = (tmp_path / "results" / "toy.json").read_text().splitlines()
    assert sum('"seed"' in line for line in lines) == 10
    with pytest.raises(FileNotFoundError, match="run `python -m tpo_lib study other` first"):
        study.read(tmp_path, "other")


RESULTS = sorted((ROOT / "studies" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_every_stored_number_comes_from_the_stored_result(path, monkeypatch, tmp_path):
    """The pages are written anew from the results and compared, the words of their pictures too, which are not drawn."""
    monkeypatch.chdir(ROOT)
    undrawn = SimpleNamespace(savefig=lambda path, dpi: path.touch())
    for name in ("frontier", "seqkl", "growth", "over_training", "differences"):
        monkeypatch.setattr(figures, name, lambda *_, **__: undrawn)
    monkeypatch.setattr(conditions, "figure", lambda *_: undrawn)
    plan, found = Study.read(ROOT / "studies" / f"{path.stem}.toml"), study.read(ROOT / "studies", path.stem)
    assert found["digest"] == plan.digest, "the study's file has changed since its runs"
    there = path.with_suffix(".md").read_text(encoding="utf-8")
    compared = analysis.comparisons(plan, found)
    monkeypatch.setattr(analysis, "comparisons", lambda *_: compared)  # once for words, claims and tables
    pictures = page.pictures(plan, found, tmp_path)
    assert page.page(plan, found, pictures) == there
    assert all((path.parent / file).is_file() for file, _ in pictures)


def test_a_spec_is_the_name_of_its_run(tmp_path):
    spec = {"data": {"seed": 1}, "train": {"loss_type": "dpo"}, "evaluate": {"at": [1]}}
    assert execute.key(spec) == execute.key(json.loads(json.dumps(spec)))
    assert execute.key(spec) != execute.key(spec | {"data": {"seed": 2}})
    own = tmp_path / "mine.py"
    own.write_text("x = 1")
    mine = spec | {"train": {"loss_type": f"{own}:f"}}
    before = execute.key(mine)
    own.write_text("x = 2")
    assert execute.key(mine) != before  # the objective has changed
