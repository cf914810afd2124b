"""Token microscope, preference explorer and before/after, moved without a browser: what they say must be what is true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tpo_course.widgets.before_after import before_after
from tpo_course.widgets.microscope import token_microscope
from tpo_course.widgets.preference_explorer import preference_explorer
from tpo_course.widgets.training_lab import training_lab
from tpo_lib import losses
from tpo_lib.evaluation import pair_stats
from tpo_lib.runs.lab import Laboratory
from tpo_lib.stats import split


@pytest.fixture(scope="module")
def lab(small_stage) -> Laboratory:
    lab = Laboratory(small_stage)
    for name, loss_type in (("plain", "dpo"), ("with KL", "tdpo2")):
        lab.train(lab.config(loss_type, beta=0.1, alpha=0.5, lr=1e-3, updates=2, batch_size=8), name)
    return lab


@pytest.fixture
def microscope(lab):
    dpo, tdpo2 = (run.policy for run in lab.runs.values())
    return token_microscope(lab.stage, {"dpo": dpo, "tdpo2": tdpo2, "tgdpo": dpo}, guide=dpo)


def test_widgets_load_without_what_trains():
    code = "import sys; from tpo_course import widgets; print({'datasets', 'transformers', 'accelerate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def _line(text: str, label: str) -> str:
    return next(line for line in re.split(r"<br>", text) if line.startswith(label))


def test_microscope_tells_the_numbers_of_a_token(lab, microscope):
    stage = lab.stage
    microscope.pair.value, microscope.token.value = 3, 2
    pair = stage.held_out_pairs[3]
    stats = pair_stats(lab.runs["plain"].policy, stage.start, [pair], stage.tokenizer.pad_token_id)
    chosen, rejected = split(stats)
    ratio = (chosen.logps - chosen.ref_logps)[chosen.mask][2].item()
    output = losses.dpo(chosen, rejected, beta=microscope.beta.value)
    push = -0.1 * torch.sigmoid(output.rejected_reward - output.chosen_reward).item()
    line = _line(microscope.numbers.value, "DPO:")
    assert f"log-ratio {ratio:+.3g}" in line
    assert f"coefficient {push:+.3g}" in line
    assert "weight f" not in line
    assert "weight f +" in _line(microscope.numbers.value, "TGDPO:")
    credit = stage.reward.token_credit(torch.tensor(pair.chosen_ids))[2].item()
    assert f"true credit {credit:+.3f}" in microscope.numbers.value
    microscope.token.value = microscope.token.max
    assert f"rejected token {len(pair.rejected_ids) - 1}" in microscope.numbers.value


def test_microscope_shows_every_token_of_every_row(lab, microscope):
    pair = lab.stage.held_out_pairs[0]
    tokens = len(pair.chosen_ids) + len(pair.rejected_ids)
    assert microscope.page.value.count("<span title=") == tokens * (1 + 3)  # true credit and three objectives
    microscope.quantity.value = "weight f"
    assert microscope.page.value.count("<span title=") == tokens * (1 + 1)
    assert microscope.page.value.count("this objective has none") == 2 * 2  # two objectives, two sides
    microscope.quantity.value = "KL coefficient"
    assert microscope.page.value.count("this objective has none") == 2 * 2


def test_microscope_follows_alpha_and_beta(microscope):
    page, facts = microscope.page.value, microscope.facts.value
    microscope.quantity.value = "coefficient"
    coloured = microscope.page.value
    assert coloured != page
    microscope.beta.value = 1.0
    assert "beta = 1, alpha = 0.5" in microscope.facts.value
    assert microscope.facts.value != facts
    before = microscope.facts.value
    microscope.alpha.value = 1.5

    def margin(text, label):
        return re.search(rf"{label}: margin (\S+),", text)[1]

    assert margin(before, " DPO") == margin(microscope.facts.value, " DPO")
    assert margin(before, " TDPO2") != margin(microscope.facts.value, " TDPO2")


def test_microscope_signs_survive_greyscale(microscope):
    assert "2px dashed rgba(213,94,0" in microscope.page.value
    assert "2px solid rgba(0,114,178" in microscope.page.value


def test_the_weights_are_coloured_from_1_and_all_else_from_0_with_the_numbers_printed(microscope):
    token = re.compile(r"border-bottom:2px (solid|dashed)[^>]*>[^<]*</span><sub>([^<]*)</sub>")
    for quantity, centre in (("weight f", 1.0), ("log-ratio", 0.0)):
        microscope.quantity.value = quantity
        found = [(line, float(number)) for line, number in token.findall(microscope.page.value)]
        values = [v for row in microscope._found.values() if (v := row[quantity]) is not None]
        assert len(found) == sum(map(len, values)) + (microscope._credit is not None) * len(microscope._ids)
        credit = len(found) - sum(map(len, values))
        assert {"solid", "dashed"} == {line for line, _ in found}  # of the weights alone all would be above 0
        shown = sorted(number for _, number in found)
        expected = [float(f"{float(v):.2g}") for v in (*torch.cat(values), *(microscope._credit if credit else ()))]
        assert shown == sorted(expected)
        if quantity == "weight f":
            weights = [(line, number) for line, number in found if 0.9 < number < 1.1 and number != 1]
            assert weights
            assert all((line == "solid") == (number > centre) for line, number in weights)
            assert "from 1;" in microscope.page.value
    microscope.printed.value = False
    assert "<sub>" not in microscope.page.value


def test_microscope_refuses(lab):
    with pytest.raises(ValueError, match="guide="):
        token_microscope(lab.stage, {"tgdpo": lab.stage.start})
    with pytest.raises(ValueError, match="mine"):
        token_microscope(lab.stage, {"mine": lab.stage.start})


def test_explorer_filters_by_gap_and_word(small_stage):
    ui = preference_explorer(small_stage)
    gaps = np.array(small_stage.table["chosen_score"]) - np.array(small_stage.table["rejected_score"])
    picture = bytes(ui.histogram.value)
    ui.smallest.value = 0.3
    assert ui.count.value.startswith(f"{(gaps >= 0.3).sum()} of {len(gaps)} pairs")
    assert bytes(ui.histogram.value) != picture
    shown = float(re.search(r"gap ([\d.]+)", ui.page.value)[1])
    assert shown >= 0.3
    page = ui.page.value
    ui.number.value = 1
    assert ui.page.value != page
    ui.search.value = "no such <word>"
    assert ui.count.value.startswith("0 of")
    assert "&lt;word&gt;" in ui.count.value
    assert "No pair is left" in ui.page.value


def test_explorer_trains_on_both_sides_of_the_gap(small_stage):
    ui = preference_explorer(small_stage)
    ui.smallest.value = 0.9
    ui.train_button.click()
    assert "are needed on either side" in ui.result.value
    ui.smallest.value = round(float(np.median(ui._gaps)) / 0.05) * 0.05
    ui.train_button.click()
    rows = re.findall(r"<tr><td>(below|at or above) [\d.]+</td><td>(\d+)</td>", ui.result.value)
    assert [name for name, _ in rows] == ["below", "at or above"]
    assert rows[0][1] == rows[1][1]
    assert int(rows[0][1]) >= 32


def test_before_after(lab):
    ui = before_after(lab)
    assert ui.left.options == ("start", "plain", "with KL")
    assert (ui.left.value, ui.right.value) == ("start", "with KL")
    assert ui.page.value.count("reward 0.") + ui.page.value.count("reward 1.") == 2 * 5  # four samples and their mean
    page = ui.page.value
    ui.seed.value = 5
    ui.sample_button.click()
    assert ui.page.value != page
    ui.right.value = "start"
    ui.sample_button.click()
    left, right = ui.page.value.split('<div style="flex:1">')[1:]
    assert left.split("</div>")[0] == right.split("</div>")[0]  # the same random numbers
    ui.prompt.value = "  "
    ui.sample_button.click()
    assert "prompt is empty" in ui.page.value


@pytest.fixture(scope="module")
def bare(small_stage):
    """A stage without a judge, whose reward is a plain function on a scale of its own."""

    def words(texts):
        return [10.0 * len(text.split()) for text in texts]

    def scaled(row):
        return {key: 10 * row[key] for key in ("chosen_score", "rejected_score")}

    stage = replace(small_stage, judge=None, reward=words, table=small_stage.table.map(scaled), reference_cache={})
    lab = Laboratory(stage)
    lab.train(lab.config("dpo", beta=0.1, alpha=0.5, lr=3e-4, updates=2, batch_size=8), "mine")
    return lab


def test_the_laboratory_needs_no_judge_and_takes_any_scale(bare, tmp_path):
    ui = training_lab(bare, folder=tmp_path)
    assert "judge" not in ui.table.value
    assert "<th>reward</th>" in ui.table.value
    reward = bare.points()["mine"][1]["reward"]
    assert reward["mean"] > 1
    assert f"<td>{reward['mean']:.2f} [{reward['low']:.2f}, {reward['high']:.2f}]</td>" in ui.table.value
    ui.export_button.click()
    saved = json.loads((tmp_path / "training_lab.json").read_text())
    assert {sample["judge"] for sample in saved["runs"]["mine"]["samples"]} == {None}
    assert "judge" not in before_after(bare).page.value


def test_the_explorer_covers_gaps_beyond_one(bare):
    ui = preference_explorer(bare.stage)
    gaps = np.array(bare.stage.table["chosen_score"]) - np.array(bare.stage.table["rejected_score"])
    assert ui.smallest.max == pytest.approx(0.9 * gaps.max())
    ui.smallest.value = 5.0
    assert ui.count.value.startswith(f"{(gaps >= ui.smallest.value).sum()} of {len(gaps)} pairs")


def test_the_microscope_shows_all_but_the_credit_that_a_reward_does_not_tell(bare):
    ui = token_microscope(bare.stage, {"dpo": bare.runs["mine"].policy})
    pair = bare.stage.held_out_pairs[0]
    assert ui.page.value.count("<span title=") == len(pair.chosen_ids) + len(pair.rejected_ids)
    assert "this reward does not tell what each token is worth" in ui.page.value
    assert "true credit" not in ui.page.value + ui.numbers.value
    assert "log-ratio" in ui.numbers.value
