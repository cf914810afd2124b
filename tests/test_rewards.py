"""Rewards: one interface, the additive one taken apart token by token, and any classifier in the hub's format."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from tpo_data.sentiment import quality
from tpo_lib.files.tokens import token_method
from tpo_lib.files.words import HashedWords
from tpo_lib.rewards import AdditiveReward, ClassifierReward, hash_bigrams, load_reward, scores_of


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


def test_a_reward_of_words_reads_what_no_case_and_no_punctuation_changes(additive, tmp_path):
    (folder := tmp_path / "words").mkdir()
    words = HashedWords()
    words.save_pretrained(folder)
    unigram = torch.zeros(len(words))
    (ids,) = words(["Isn't it good"])["input_ids"]
    assert (len(ids), len(set(ids)), 0 in ids) == (3, 3, False)
    unigram[ids[2]] = 2.0
    AdditiveReward(words, unigram, torch.zeros(512), bias=-0.5).save(folder)
    loaded = load_reward(folder)
    scores = loaded(["GOOD, really", "good", "goodness", ""])
    assert scores.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (1.5, 1.5, -0.5, -0.5)])
    # its ids are nobody else's: a model's tokens are scored by their text
    for other in (additive.tokenizer, words):
        assert (token_method(loaded, "score_ids", other) is None) == (other is not words)
    assert token_method(additive, "token_credit", additive.tokenizer) == additive.token_credit
    assert token_method(additive, "no_such", additive.tokenizer) is None
    foreign = SimpleNamespace(tokenizer=str.split)  # of a reward that reads texts: nobody asks for its vocabulary
    assert token_method(foreign, "score_ids", additive.tokenizer) is None
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "HashedWord"}')
    with pytest.raises(OSError, match=r"tokenizer .* could not be loaded"):
        load_reward(folder)


def test_missing_additive_reward_is_explained(tmp_path):
    tiny.tokenizer(tmp_path)
    with pytest.raises(OSError, match=r"reward\.safetensors is no file.*python -m tpo_lib pocket"):
        AdditiveReward.load(tmp_path)


def logits_of(reward: ClassifierReward, text: str) -> torch.Tensor:
    batch = reward.tokenizer([text], return_tensors="pt", truncation=True, max_length=reward.max_length)
    return reward.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]


@pytest.mark.parametrize(
    ("labels", "problem", "expected"),
    [
        (("NEGATIVE", "POSITIVE"), None, lambda z: z.softmax(-1)[1]),
        (("pos", "neg"), None, lambda z: z.softmax(-1)[0]),
        (("not positive", "positive"), None, lambda z: z.softmax(-1)[1]),
        (("positive", "not positive"), None, lambda z: z.softmax(-1)[0]),
        (("LABEL_0", "LABEL_1"), None, lambda z: z.softmax(-1)[1]),
        (("0", "1"), "single_label_classification", lambda z: z.softmax(-1)[1]),
        (("Negative", "Neutral", "Positive"), None, lambda z: z.softmax(-1)[2]),
        (("negative", "neutral", "positive"), "multi_label_classification", lambda z: z[2].sigmoid()),
        (("positive",), None, lambda z: z[0].sigmoid()),
        (("LABEL_0",), None, lambda z: z[0]),  # a reward model: its score is not a probability
        (("quality",), "regression", lambda z: z[0]),
    ],
)
def test_classifier_reads_its_outputs_as_its_labels_say(labels, problem, expected, tmp_path):
    reward = ClassifierReward(tiny.classifier(tmp_path, labels, problem_type=problem, initializer_range=3.0))
    assert reward(["good fun"]).item() == pytest.approx(expected(logits_of(reward, "good fun")).item(), abs=1e-5)


@pytest.mark.parametrize(
    "labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("1", "2", "3", "4", "5"), ("toxic",), ("not positive", "other")]
)
def test_classifier_without_a_positive_class_is_refused(tmp_path, labels):
    with pytest.raises(ValueError, match="none says which class is positive"):
        ClassifierReward(tiny.classifier(tmp_path, labels))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(tiny.CLASSIFIERS))
def test_every_kind_of_classifier_scores_a_text_as_if_it_were_alone(kind, side, tmp_path):
    tiny.classifier(tmp_path, kind=kind)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": side}))
    reward = ClassifierReward(tmp_path)
    texts = ["good", "a bad film with a poor plot", "word " * 200]  # the last one longer than the positions
    alone = [logits_of(reward, text).softmax(-1)[1].item() for text in texts]
    assert reward(texts).tolist() == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) == 3
    assert (reward.max_length, reward.batch_size) == ((512, 1) if kind == "XLNet" else (64, 64))


def test_a_pad_id_that_disagrees_with_the_tokenizer_is_put_right(tmp_path):
    reward = ClassifierReward(tiny.classifier(tmp_path, kind="GPT2", pad_token_id=7))
    assert reward.model.config.pad_token_id == reward.tokenizer.pad_token_id == 0
    assert reward(tiny.TEXT[:3]).tolist() == pytest.approx([reward([text]).item() for text in tiny.TEXT[:3]], abs=1e-5)


def test_a_language_model_is_no_classifier(tmp_path):
    with pytest.raises(OSError, match=r"lack 1 weights that LlamaForSequenceClassification needs.*: score\.weight"):
        load_reward(tiny.checkpoint_folder(tmp_path))


def test_an_additive_reward_needs_a_weight_for_every_token(additive, tmp_path):
    tables = load_file(tmp_path / "reward.safetensors")
    save_file(tables | {"unigram": tables["unigram"][:200].clone()}, tmp_path / "reward.safetensors")
    with pytest.raises(ValueError, match="has weights for 200 tokens, the tokenizer beside it 300"):
        load_reward(tmp_path)


def test_a_classifier_that_cannot_score_says_so_when_it_is_loaded(tmp_path):
    tiny.classifier(tmp_path, kind="Llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"][0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot score a text: ValueError: .*gave text 0 of 2 the score nan"):
        load_reward(tmp_path)


def test_the_fingerprint_changes_with_the_labels(tmp_path):
    first = load_reward(tiny.classifier(tmp_path)).fingerprint
    assert load_reward(tiny.classifier(tmp_path)).fingerprint == first
    assert load_reward(tiny.classifier(tmp_path, ("POSITIVE", "NEGATIVE"))).fingerprint != first


@pytest.mark.parametrize(
    "convert", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16), np.float32]
)
def test_any_list_of_numbers_is_scores(convert):
    scores = scores_of(lambda texts: convert([4.0, -2.0]), ["a", "b"])
    assert scores.tolist() == [4.0, -2.0]
    assert scores.dtype == (torch.float64 if convert in (list, tuple, np.array) else scores.dtype)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"shape \(1,\) for 2 texts; it must give one number a text"),
        (torch.zeros(2, 1), r"shape \(2, 1\) for 2 texts"),
        (0.5, r"shape \(\) for 2 texts"),
        ([[1.0], [1.0, 2.0]], "returned list that is no list of numbers"),
        ([{"label": "POSITIVE"}] * 2, "returned list that is no list of numbers"),
        ({"a": 1}, "returned dict that is no list of numbers"),
        ([0.0, math.inf], "gave text 1 of 2 the score inf: 'b'"),
        ([None, 1.0], "gave text 0 of 2 the score nan: 'a'"),
    ],
)
def test_what_is_no_score_is_refused(returned, message):
    def mine(texts):
        return returned

    with pytest.raises(ValueError, match="reward 'mine' .*" + message):
        scores_of(mine, ["a", "b"])


def test_classifier_batches_do_not_change_scores(tmp_path):
    folder = tiny.classifier(tmp_path)
    one, many = ClassifierReward(folder, batch_size=1), load_reward(folder)
    torch.testing.assert_close(one(tiny.TEXT[:5]), many(tiny.TEXT[:5]))
    assert one.fingerprint == many.fingerprint
    assert one(["word " * 500]).shape == (1,)  # cut to what the model reads


def test_calibration_insists_on_probabilities():
    with pytest.raises(ValueError, match=r"scores from -1\.0 to 0\.5 are no probabilities"):
        quality(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0]))


def test_missing_classifier_names_the_way_out():
    with pytest.raises(OSError, match="classifier 'nobody/nothing' could not be loaded"):
        load_reward("nobody/nothing")
