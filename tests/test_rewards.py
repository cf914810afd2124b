"""Rewards: one interface, the additive one taken apart token by token, and any classifier in the hub's format."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tpo_lib.rewards import AdditiveReward, ClassifierReward, hash_bigrams, load_reward


@pytest.fixture
def additive(tmp_path) -> AdditiveReward:
    tokenizer = tiny.tokenizer(tmp_path)
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(size, generator=generator).half() for size in (len(tokenizer), 512)]
    reward = AdditiveReward(tokenizer, *tables, bias=0.25)
    reward.save(tmp_path)
    return reward


def test_additive_score_by_hand(additive):
    ids = additive.tokenizer("good film", add_special_tokens=False)["input_ids"]
    logit, previous = 0.25, 0
    for token in ids:
        mixed = (previous * 2_654_435_761 + token * 739_982_445) % 2**32
        mixed = ((mixed ^ (mixed >> 15)) * 739_982_445) % 2**32
        cell = (mixed ^ (mixed >> 13)) % 512
        logit += additive.unigram[token].item() + additive.bigram[cell].item()
        previous = token
    expected = 1 / (1 + math.exp(-logit))
    assert additive(["good film"]).item() == pytest.approx(expected, abs=1e-6)
    assert additive.score_ids([ids]).item() == pytest.approx(expected, abs=1e-6)


def test_credit_sums_to_the_score(additive):
    ids = torch.tensor(additive.tokenizer("a bad film", add_special_tokens=False)["input_ids"])
    credit = additive.token_credit(ids)
    assert credit.shape == ids.shape
    assert torch.sigmoid(0.25 + credit.sum()).item() == pytest.approx(additive(["a bad film"]).item(), abs=1e-6)
    assert torch.equal(additive.token_credit(ids.expand(3, -1)), credit.expand(3, -1))


def test_empty_text_scores_the_bias(additive):
    assert additive([""]).item() == pytest.approx(1 / (1 + math.exp(-0.25)))
    assert additive([]).shape == (0,)


def test_additive_round_trip(additive, tmp_path):
    loaded = load_reward(tmp_path)
    assert isinstance(loaded, AdditiveReward)
    assert loaded.fingerprint == additive.fingerprint
    assert torch.equal(loaded(tiny.TEXT), additive(tiny.TEXT))
    tables = load_file(tmp_path / "reward.safetensors")
    tables["unigram"][3] += 1
    save_file(tables, tmp_path / "reward.safetensors")
    assert load_reward(tmp_path).fingerprint != additive.fingerprint


def test_hash_spreads_and_orders():
    a, b = torch.arange(4096).repeat(16), torch.arange(16).repeat_interleave(4096)
    cells = hash_bigrams(a, b, 2**17)
    assert cells.min() >= 0
    assert cells.max() < 2**17
    assert len(cells.unique()) > 0.75 * len(cells)  # a random function would reach 0.79
    assert hash_bigrams(torch.tensor(3), torch.tensor(5), 2**17) != hash_bigrams(
        torch.tensor(5), torch.tensor(3), 2**17
    )


def test_missing_additive_reward_is_explained(tmp_path):
    with pytest.raises(OSError, match=r"reward\.safetensors not found.*python -m tpo_lib pocket"):
        AdditiveReward.load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [(("NEGATIVE", "POSITIVE"), 1), (("pos", "neg"), 0), (("LABEL_0", "LABEL_1"), 1), (("positive",), 0)],
)
def test_classifier_finds_its_positive_class(labels, positive, tmp_path):
    reward = ClassifierReward(tiny.classifier(tmp_path, labels))
    batch = reward.tokenizer(["good fun"], return_tensors="pt")
    logits = reward.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    expected = logits.sigmoid()[0] if len(labels) == 1 else logits.softmax(-1)[positive]
    assert reward(["good fun"]).item() == pytest.approx(expected.item(), abs=1e-6)


def test_classifier_without_a_positive_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none says which class is positive"):
        ClassifierReward(tiny.classifier(tmp_path, ("LABEL_0", "LABEL_1", "LABEL_2")))


def test_classifier_batches_do_not_change_scores(tmp_path):
    folder = tiny.classifier(tmp_path)
    one, many = ClassifierReward(folder, batch_size=1), load_reward(folder)
    torch.testing.assert_close(one(tiny.TEXT[:5]), many(tiny.TEXT[:5]))
    assert one.fingerprint == many.fingerprint
    assert one(["word " * 500]).shape == (1,)  # cut to what the model reads


def test_missing_classifier_names_the_way_out():
    with pytest.raises(OSError, match="classifier 'nobody/nothing' could not be loaded"):
        load_reward("nobody/nothing")
