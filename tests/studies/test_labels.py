"""Labels by a spec: what is swapped, by which probability, which pairs are left, and that what is said was done."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from datasets import Dataset

from tpo_lib.runs.stage import stage_prompts
from tpo_lib.studies import bench, labels
from tpo_lib.studies.labels import labelled


def stage(count: int = 400, chosen: float = 0.8, rejected: float = 0.5):
    """Pairs of so many rows in another order than the table's; the table's scores, its rejected ones falling with the row."""
    pairs = [replace(p, row=i) for i, p in enumerate(tiny.pairs(count, longest=8))][::-1]
    low = [rejected * (1 - i / (2 * count)) for i in range(count)]
    return SimpleNamespace(
        table=Dataset.from_dict({"chosen_score": [chosen] * count, "rejected_score": low}), pairs=pairs
    )


def swapped(before, after) -> set[int]:
    """Rows whose responses changed places; every other one is untouched."""
    rows = set()
    for pair in after:
        (old,) = (p for p in before if p.row == pair.row)
        if pair != old:
            assert pair == replace(old, chosen_ids=old.rejected_ids, rejected_ids=old.chosen_ids)
            rows.add(pair.row)
    return rows


def test_nothing_asked_nothing_done():
    given = stage(5)
    assert labelled({}, given, seed=0).pairs == given.pairs


def test_noise_swaps_its_share_and_a_larger_one_swaps_more_of_the_same():
    given, found = stage(), {}
    for share in (0.0, 0.1, 0.4, 1.0):
        made = labelled({"noise": share}, given, seed=3)
        found[share] = swapped(given.pairs, made.pairs)
        assert made.note["noise"] == {"swapped": len(found[share]), "of": 400}
        assert abs(len(found[share]) - 400 * share) <= 3 * math.sqrt(400 * share * (1 - share))
    assert found[0.1] < found[0.4] < found[1.0]
    assert swapped(given.pairs, labelled({"noise": 0.4}, given, seed=4).pairs) != found[0.4]


def test_a_pair_keeps_its_label_in_every_subset():
    given = stage()
    whole = swapped(given.pairs, labelled({"noise": 0.3}, given, seed=1).pairs)
    part = labelled({"noise": 0.3, "count": 50}, given, seed=1)
    assert swapped(given.pairs, part.pairs) == whole & {p.row for p in part.pairs}


def test_bradley_terry_agrees_as_often_as_the_log_odds_say():
    """logit .8 = log 4, logit .5 = 0: 4/5 at temperature 1, 1/(1 + 1/2) = 2/3 at 2, 16/17 at 1/2."""
    given = stage(4000)
    given.table = Dataset.from_dict({"chosen_score": [0.8] * 4000, "rejected_score": [0.5] * 4000})
    for temperature, expected in ((1.0, 4 / 5), (2.0, 2 / 3), (0.5, 16 / 17)):
        made = labelled({"temperature": temperature}, given, seed=0)
        assert made.note["temperature"]["expected_agreement"] == pytest.approx(expected)
        kept = 1 - made.note["temperature"]["swapped"] / 4000
        assert kept == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 4000))
        assert len([p for p, q in zip(made.pairs, given.pairs, strict=True) if p == q]) == round(4000 * kept)


def test_each_pair_is_drawn_by_its_own_scores():
    """Rows in another order than the table's: the certain ones stay, the even ones are a coin's."""
    given = stage(400)
    given.table = Dataset.from_dict(
        {"chosen_score": [1.0] * 200 + [0.5] * 200, "rejected_score": [0.0] * 200 + [0.5] * 200}
    )
    out = swapped(given.pairs, labelled({"temperature": 1.0}, given, seed=0).pairs)
    assert min(out) >= 200
    assert 70 < len(out) < 130


def test_a_larger_count_holds_a_smaller_one_and_every_seed_another():
    given = stage()
    few, more = (labelled({"count": n}, given, seed=2) for n in (50, 200))
    assert [p.row for p in more.pairs[:50]] == [p.row for p in few.pairs]
    assert few.note["count"] == {"kept": 50, "of": 400}
    assert few.note["pairs"] == len({p.row for p in few.pairs}) == 50
    assert {p.row for p in few.pairs} != {p.row for p in labelled({"count": 50}, given, seed=3).pairs}


def test_gaps_are_those_of_the_table_s_rows():
    given = stage()  # gap of row i: .3 + .5 i / 800
    made = labelled({"gap": [0.4, 0.5]}, given, seed=0)
    assert sorted(p.row for p in made.pairs) == list(range(160, 320))
    assert made.note["gap"] == {"kept": 160, "of": 400, "mean": pytest.approx(0.3 + 0.5 * 239.5 / 800)}
    assert labelled({"gap": [0.0, 1.0]}, given, seed=0).pairs == given.pairs


def test_the_count_is_of_the_gap_and_the_noise_of_the_count():
    made = labelled({"noise": 1.0, "count": 20, "gap": [0.4, 0.5]}, stage(), seed=0)
    assert (made.note["gap"]["kept"], made.note["count"]["of"], made.note["noise"]["of"]) == (160, 160, 20)
    assert all(160 <= p.row < 320 for p in made.pairs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"nois": 0.1}, r"nois is no step of labels; they are gap, count, noise, temperature"),
        ({"noise": 1.1}, r"noise=1\.1 must be at most 1"),
        ({"noise": 0.1, "temperature": 1.0}, r"both draw the labels"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be greater than 0"),
        ({"count": 401}, r"count=401 must be a whole number from 1 to the 400 pairs"),
        ({"count": 2.0}, r"count=2\.0 must be a whole number"),
        ({"gap": 0.4}, r"gap=0\.4 must be two numbers"),
        ({"gap": [0.9, 1.0]}, r"no pair has a gap in \[0\.9, 1\): they lie in \[0\.3, 0\.549\]"),
    ],
)
def test_what_cannot_be_done_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        labelled(spec, stage(), seed=0)


def test_scores_that_are_missing_or_no_probability_and_bare_rows_are_named():
    given = stage(4)
    for scores, message in (
        (7.0, r"row 3 has the scores \[7\.0, 0\.3"),
        (None, r"has no chosen_score, rejected_score"),
    ):
        given.table = Dataset.from_dict({"x": [0] * 4}) if scores is None else stage(4, chosen=scores).table
        with pytest.raises(ValueError, match=message):
            labelled({"temperature": 1.0}, given, seed=0)
    given.pairs[1] = replace(given.pairs[1], rejected_ids=[])
    with pytest.raises(ValueError, match="row 2 has no rejected side"):
        labelled({"noise": 0.5}, given, seed=0)


def test_a_response_that_does_not_fit_behind_its_prompt_is_no_pair_s(small_stage):
    table, config = small_stage.table, small_stage.config
    whole = labels.encoded(table, small_stage.tokenizer, config)
    assert whole == small_stage.pairs
    longest = max(pair.length for pair in whole)
    assert labels.encoded(table, small_stage.tokenizer, replace(config, max_length=longest)) == whole
    with pytest.raises(ValueError, match=f"responses do not fit in max_length={longest - 1} behind their prompts"):
        labels.encoded(table, small_stage.tokenizer, replace(config, max_length=longest - 1))
    for tokens in (16, 40, 128):
        config = bench.Data(seed=1, max_new_tokens=tokens).config()
        assert (config.max_new_tokens, config.max_length) == (tokens, max(128, tokens + bench.PROMPT))


def test_pairs_of_another_sampler(small_stage):
    prompts, _ = stage_prompts(small_stage.config, small_stage.start, small_stage.tokenizer, None)
    table, pairs, note = labels.off_policy(small_stage, small_stage.start, prompts, seed=small_stage.config.seed + 2)
    assert pairs == small_stage.pairs, "the start itself, with the stage's seed, samples the stage's pairs"
    assert (note["pairs"], note["score_mean"]) == (len(pairs), small_stage.report.score_mean)
    assert note["mean_gap"] == pytest.approx(np.mean(np.subtract(table["chosen_score"], table["rejected_score"])))
    assert labels.off_policy(small_stage, small_stage.start, prompts, seed=99)[1] != pairs
