"""Tokens of held-out pairs: the numbers of the core, text that is never interpreted, pictures that say what they show."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from matplotlib.text import Text

from tpo_lib.data import EncodedPair, collate
from tpo_lib.runs import heatmap
from tpo_lib.stats import token_stats

PAIRS = [EncodedPair(0, [5, 6], [7, 8, 9, 0], [10, 0]), EncodedPair(4, [5], [11, 0], [12, 13, 14, 15, 0])]


class Tokenizer:
    pad_token_id = 0

    def __init__(self, *words: str) -> None:
        self.get_vocab = lambda: {word: i for i, word in enumerate(words)}

    def decode(self, ids, **_) -> str:
        return "".join(f"<b{i}>&" for i in ids)


def stage(pairs=PAIRS, reward=None):
    return SimpleNamespace(start=tiny.llama(1), tokenizer=Tokenizer(), held_out_pairs=pairs, reward=reward)


def test_a_map_has_the_cores_numbers_of_every_token():
    place, policy = stage(), tiny.llama(0)
    found = heatmap.token_map(policy, place)
    batch = collate(PAIRS, 0)
    with torch.no_grad():
        logits = [
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for m in (policy, place.start)
        ]
    stats = token_stats(logits[0], batch.labels, logits[1], with_kl=True)
    ratio = stats.logps - stats.ref_logps
    for i, (number, side) in enumerate([(0, "chosen"), (1, "chosen"), (0, "rejected"), (1, "rejected")]):
        shown, mask = found[number][side], stats.mask[i]
        assert shown["logratio"] == pytest.approx(ratio[i][mask].tolist(), abs=1e-4)
        assert shown["kl"] == pytest.approx(stats.kl[i][mask].tolist(), abs=1e-4)
        ids = getattr(PAIRS[number], f"{side}_ids")
        assert shown["pieces"] == [f"<b{token}>&" for token in ids]
        assert "credit" not in shown
    assert max(map(abs, found[1]["rejected"]["logratio"])) > 0.01
    assert found[0]["prompt"] == "<b5>&<b6>&"
    assert heatmap.token_map(policy, place, pairs=1) == [found[0]]


def test_the_start_is_zero_everywhere_and_without_pairs_there_is_nothing():
    place = stage()
    for pair in heatmap.token_map(place.start, place):
        for side in heatmap.SIDES:
            assert set(pair[side]["logratio"]) <= {0.0}
            assert pair[side]["kl"] == pytest.approx([0] * len(pair[side]["kl"]), abs=1e-5)
    assert heatmap.token_map(place.start, stage([])) == []


def test_what_a_reward_knows_of_tokens_is_there():
    reward = SimpleNamespace(token_credit=lambda ids: ids / 10, tokenizer=Tokenizer("of another model"))
    assert "credit" not in heatmap.token_map(tiny.llama(0), stage(reward=reward))[0]["chosen"]
    reward.tokenizer = Tokenizer()
    found = heatmap.token_map(tiny.llama(0), stage(reward=reward))
    assert found[0]["chosen"]["credit"] == pytest.approx([0.7, 0.8, 0.9, 0.0])
    page = str(heatmap.page({"dpo": found}))
    assert page.count(f"{heatmap.CREDIT}</span>") == 4  # once a response
    assert f"from {heatmap.full_colour({'dpo': found}, 'credit'):.3g} nats of log-odds on" in page


@pytest.fixture(scope="module")
def maps() -> dict:
    found = heatmap.token_map(tiny.llama(0), stage())
    evil = {"prompt": '<script>"$x$', "chosen": dict(found[0]["chosen"]), "rejected": dict(found[0]["rejected"])}
    evil["chosen"]["pieces"] = ["<i>", '"&', "\n", "$\\frac$中"]
    return {name: [evil, found[1]] for name in ("dpo β.1", "tdpo2 β.1 α.5", "dpo β.5")}


def test_the_page_interprets_nothing_and_shows_every_token_of_every_setting(maps):
    page = str(heatmap.page(maps))
    assert not re.search(r"<(script|i|b\d+)>", page)
    assert "&lt;i&gt;" in page
    assert page.count("⏎") == 2 * len(maps)
    tokens = sum(len(pair[side]["pieces"]) for pair in maps["dpo β.1"] for side in heatmap.SIDES)
    legend = 5
    assert page.count("<span title=") == legend + 2 * len(maps) * tokens  # log-ratios, and KL folded away
    assert "TDPO2 β.1 α.5" in page
    assert page.count("<details>") == 2
    first = maps["dpo β.1"][0]["chosen"]["logratio"]
    assert f"{first[0]:+.3g} nats" in page
    lines = re.findall(r"border-bottom:2px (solid|dashed)", page)
    assert {"solid", "dashed"} == set(lines)  # the sign without colour


def test_a_long_response_is_cut_in_the_page_and_it_says_so(maps, monkeypatch):
    monkeypatch.setattr(heatmap, "IN_PAGE", 2)
    assert " … 2 more" in str(heatmap.page(maps))


def test_full_colour_is_not_decided_by_one_token():
    side = {"pieces": ["a"] * 100, "logratio": [0.1] * 99 + [50.0], "kl": [0.0] * 100}
    maps = {"dpo": [{"prompt": "", "chosen": side, "rejected": side}]}
    assert heatmap.full_colour(maps, "logratio") == pytest.approx(0.1)
    assert heatmap.full_colour(maps, "credit") == 0


@pytest.mark.filterwarnings("error")  # of glyphs that are missing
@pytest.mark.parametrize("quantity", list(heatmap.QUANTITIES))
def test_the_picture_has_a_row_a_setting_and_marks_the_sign(maps, quantity):
    figure = heatmap.picture(maps, quantity)
    figure.draw_without_rendering()
    *grids, scale = figure.axes
    assert len(grids) == 4
    assert "nats" in scale.get_xlabel()
    assert [text.get_text() for text in grids[0].get_yticklabels()] == ["DPO β.1", "TDPO2 β.1 α.5", "DPO β.5"]
    assert [text.get_text() for text in grids[0].get_xticklabels()] == ["<i>", '"&', "⏎", "$\\frac$\ufffd"]
    values = grids[2].collections[0].get_array()
    assert values.shape == (3, 2)
    largest = heatmap.full_colour(maps, quantity)
    marked = sum(v < -0.15 * largest for name in maps for v in maps[name][0]["chosen"][quantity])
    assert len(grids[0].texts) == (marked if quantity == "logratio" else 0)
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text().strip()) >= 10
