"""Fine-tuning on reviews: what becomes a row, that perplexity is what it says, and that a run goes on where it was."""

import math

import pytest
import tiny
import torch

from tpo_lib.runs import sft
from tpo_lib.runs.sft import SftConfig

CONFIG = SftConfig(reviews=16, tokens=12, epochs=2, lr=1e-2, batch_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def reviews(count):
    return {"text": [" ".join(["a fine film", "dull and slow", "we liked it"][i % 3 :] * 2) for i in range(count)]}


REVIEWS = {"train": reviews(40), "test": reviews(sft.HELD_OUT)}


def test_a_review_is_cut_and_one_that_is_not_ends(tokenizer):
    long, short, nothing = "word " * 50, "a b c", ""
    rows = sft.review_rows([long, nothing, short], tokenizer, 10)
    assert [row.row for row in rows] == [0, 2]
    assert rows[0].length == 10
    assert rows[0].chosen_ids[-1] != tokenizer.eos_token_id
    assert rows[1].chosen_ids[-1] == tokenizer.eos_token_id
    assert rows[1].prompt_ids + rows[1].chosen_ids[:-1] == tokenizer("a b c", add_special_tokens=False)["input_ids"]
    assert not any(row.rejected_ids for row in rows)


def test_perplexity_is_that_of_a_loop_over_tokens(tokenizer):
    model, rows = tiny.llama(vocab=300), sft.review_rows(reviews(5)["text"], tokenizer, 9)
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.chosen_ids])
        logps = model(ids).logits.double().log_softmax(-1)[0]
        for t in range(1, ids.shape[1]):
            total, count = total + logps[t - 1, ids[0, t]].item(), count + 1
    assert sft.perplexity(model, rows, batch_size=2) == pytest.approx(math.exp(-total / count), rel=1e-5)


def test_it_learns_and_goes_on_where_it_was(tokenizer, tmp_path):
    straight, kept, again = (tiny.llama(vocab=300) for _ in range(3))
    said = sft.fine_tune(straight, tokenizer, CONFIG, REVIEWS, seed=0, folder=None)
    assert said["perplexity_after"] < 0.5 * said["perplexity_before"]
    assert said["updates"] == 4
    assert not any(weight.requires_grad for weight in straight.parameters())
    assert sft.fine_tune(kept, tokenizer, CONFIG, REVIEWS, seed=0, folder=tmp_path / "sft") == said
    assert (
        sft.fine_tune(again, tokenizer, CONFIG, REVIEWS, seed=0, folder=tmp_path / "sft") == said
    )  # nothing left to do
    for a, b, c in zip(*(model.parameters() for model in (straight, kept, again)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="epochs=3 must be 1 or 2"):
        SftConfig(reviews=100, epochs=3)
    with pytest.raises(ValueError, match="one batch of 32 reviews"):
        SftConfig(reviews=10)
