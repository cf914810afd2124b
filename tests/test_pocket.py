"""The pocket model: how it is built (on made-up reviews), and what is bundled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from tpo_data import pocket, report, sentiment
from tpo_lib import models
from tpo_lib.files import store
from tpo_lib.files.imdb import clean_review
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.words import HashedWords
from tpo_lib.rewards import AdditiveReward, ClassifierReward, load_reward
from tpo_lib.runs.stage import SECOND_JUDGE

CONFIG = pocket.PocketConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    intermediate_size=64,
    context=16,
    batch_size=4,
    cycles=(6, 6),
    warmup_steps=2,
)
SENTIMENT = sentiment.SentimentConfig(
    window=6, words=4, bigrams=512, reward_epochs=4, judge_steps=4, judge_batch=4, judge_tokens=(3, 6)
)


@pytest.fixture(scope="module")
def imdb(tmp_path_factory) -> Path:
    """A folder in the layout of IMDb's parquet files, with made-up reviews."""
    folder, draw = tmp_path_factory.mktemp("imdb"), np.random.default_rng(0)
    words = {1: ["good", "fine", "great", "fun"], 0: ["bad", "poor", "dull", "weak"]}
    for split, count in (("train", 60), ("test", 20), ("unsupervised", 30)):
        labels = [i % 2 for i in range(count)]
        texts = [
            " ".join(draw.choice([*words[label], "film", "the", "plot"], 24)) + "<br /><br />end" for label in labels
        ]
        if split == "train":
            texts[0] = "in both splits"
        if split == "test":
            texts[0] = "in both splits"
        Dataset.from_dict({"text": texts, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return folder


def test_other_widths_keep_the_shape():
    config = pocket.PocketConfig()
    assert config.of_width(224) == config
    narrow = config.of_width(128)
    assert (narrow.hidden_size, narrow.num_heads, narrow.intermediate_size) == (128, 4, 352)
    assert sum(p.numel() for p in pocket.build_model(narrow).parameters()) == 1_328_256
    with pytest.raises(ValueError, match="--width 100 must be a multiple of 32"):
        config.of_width(100)


def test_clean_review_turns_breaks_into_newlines():
    assert clean_review(" A film.<br /><br />Fine. <br/>\nYes ") == "A film.\nFine.\nYes"


def test_language_model_never_sees_a_test_review(imdb):
    data = pocket.load_imdb(str(imdb))
    reviews = pocket.language_model_reviews(data)
    assert "in both splits" in data["train"]["text"]
    assert not set(reviews) & set(data["test"]["text"])
    assert len(reviews) == len(set(reviews))


def test_missing_parquet_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.parquet"):
        pocket.load_imdb(str(tmp_path))


def test_windows_are_a_pure_function_of_the_step():
    stream = np.arange(1000, dtype=np.uint16)
    every = list(pocket.windows(stream, replace(CONFIG, cycles=(40,)), 0))
    late = list(pocket.windows(stream, replace(CONFIG, cycles=(40,)), 25))
    assert all(torch.equal(a, b) for a, b in zip(every[25:], late, strict=True))
    assert every[0].shape == (4, 17)
    per_epoch = (1000 - 1 - 16) // 16
    starts = torch.cat(every)[:per_epoch, 0]
    assert len(starts.unique()) == per_epoch  # an epoch meets every window once
    assert all((row.diff() == 1).all() for row in torch.cat(every))


def test_learning_rate_is_a_trapezoid():
    config = replace(CONFIG, cycles=(100, 50), warmup_steps=10, cooldown=0.4)
    factors = [pocket.learning_rate_factor(step, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:60] == [1.0] * 51
    assert factors[80] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.025)
    assert [pocket.learning_rate_factor(step, config) for step in (100, 109, 129, 140)] == pytest.approx(
        [0.1, 1, 1, 0.5]
    )


def test_nats_per_token_of_a_uniform_model():
    model = pocket.build_model(CONFIG)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    nats, count = pocket.nats_per_token(model, np.arange(300, dtype=np.uint16), context=16, count=5)
    assert nats == pytest.approx(np.log(300), abs=1e-5)
    assert count == 40


def test_build_survives_interruptions_and_reports_what_it_made(imdb, tmp_path, monkeypatch):
    arguments = (str(imdb), tmp_path / "out", tmp_path / "work", CONFIG, SENTIMENT)
    real = pocket.nats_per_token
    monkeypatch.setattr(pocket, "nats_per_token", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pocket.pretrain(
            np.arange(2000, dtype=np.uint16) % 300,
            np.zeros(99, np.uint16),
            CONFIG,
            tmp_path / "cut",
            compile=False,
            every=5,
        )
    monkeypatch.setattr(pocket, "nats_per_token", real)
    stream, valid = np.arange(2000, dtype=np.uint16) % 300, np.arange(99, dtype=np.uint16)
    resumed, _ = pocket.pretrain(stream, valid, CONFIG, tmp_path / "cut", compile=False, every=5)
    whole, log = pocket.pretrain(stream, valid, CONFIG, tmp_path / "whole", compile=False, every=5)
    assert models.fingerprint(resumed) == models.fingerprint(whole)
    assert log[-1]["valid_loss"] > 0
    halved, other = pocket.pretrain(stream, valid, CONFIG, tmp_path / "halved", compile=False, bf16=True, every=5)
    assert {p.dtype for p in halved.parameters()} == {torch.float32}
    assert models.fingerprint(halved) != models.fingerprint(whole)
    assert other[-1]["valid_loss"] == pytest.approx(log[-1]["valid_loss"], rel=0.02)

    pocket.build(*arguments, compile=False)
    store.prove(tmp_path / "out")
    store.verify(tmp_path / "out" / "judge")
    for changed in ((replace(CONFIG, lr=1e-3), SENTIMENT), (CONFIG, replace(SENTIMENT, judge_lr=1e-2))):
        what = "config" if changed[0] != CONFIG else "sentiment"
        with pytest.raises(RuntimeError, match=rf"work was begun with another {what}; .*--work-dir"):
            pocket.build(*arguments[:3], *changed, compile=False)
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in load_model(tmp_path / "out").parameters())
    assert 0 < facts["nats_per_token"] < np.log(300)
    readme = (tmp_path / "out" / "README.md").read_text()
    for needed in (
        "python -m tpo_lib pocket",
        f"{facts['nats_per_token']:.3f} nats a token",
        facts["data"]["test"],
        "MIT",
        "loss.png",
    ):
        assert needed in readme
    assert AdditiveReward.load(tmp_path / "out")(["good fun"]).shape == (1,)
    assert ClassifierReward(tmp_path / "out" / "judge")(["good fun"]).shape == (1,)
    second = load_reward(tmp_path / "out" / "second_judge")
    assert isinstance(second.tokenizer, HashedWords)
    good, bad = second(["GOOD great fun", "bad dull weak"])
    assert good > bad
    (tmp_path / "again").mkdir()
    half = sentiment.halves(pocket.load_imdb(str(imdb))["train"], SENTIMENT.seed)[1]
    pocket.write_second_judge(tmp_path / "again" / "second", half, SENTIMENT)  # the judge's half, and nothing else
    assert load_reward(tmp_path / "again" / "second").fingerprint == second.fingerprint
    assert set(facts["agreement"]["windows"]) == {"reward, judge", "reward, second_judge", "judge, second_judge"}
    assert facts["cut"] == {"16": 0.5, "32": 0.0}  # of every tenth review: one of 27 tokens or so, one of three words


def test_a_build_goes_on_with_its_own_data_alone(imdb, tmp_path, monkeypatch):
    arguments = (tmp_path / "out", tmp_path / "work", CONFIG, SENTIMENT)
    monkeypatch.setattr(pocket, "pretrain", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pocket.build(str(imdb), *arguments, compile=False)
    real = pocket.load_imdb
    for name, column, value in (("texts", "text", "another review"), ("labels", "label", 1)):
        data = real(str(imdb))
        data["train"][column][2] = value
        monkeypatch.setattr(pocket, "load_imdb", lambda source, data=data: data)
        with pytest.raises(RuntimeError, match=f"was begun with another {name}; remove the folder"):
            pocket.build(str(imdb), *arguments, compile=False)
    monkeypatch.setattr(pocket, "load_imdb", real)
    corpus = tmp_path / "work" / "corpus" / "train.npy"
    corpus.write_bytes(corpus.read_bytes()[:-2] + b"xx")
    with pytest.raises(store.CheckpointError, match=r"corpus: train\.npy was truncated or altered"):
        pocket.build(str(imdb), *arguments, compile=False)


def test_a_build_replaces_no_folder_of_the_users(imdb, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{tmp_path.name} would be replaced"):
        pocket.build(str(imdb), tmp_path, tmp_path / "work", CONFIG, SENTIMENT, compile=False)
    (tmp_path / "empty").mkdir()
    store.prove(tmp_path / "empty")
    with pytest.raises(FileExistsError, match=r"README\.md was there before"):
        pocket.build(str(imdb), tmp_path / "empty", tmp_path, CONFIG, SENTIMENT, compile=False)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_halves_share_no_review():
    labelled = {"text": [str(i) for i in range(11)], "label": list(range(11))}
    first, second = sentiment.halves(labelled, seed=0)
    assert sorted(first["text"] + second["text"]) == sorted(labelled["text"])
    assert [int(text) for text in first["text"]] == first["label"]


def test_additive_reward_learns_the_words(imdb, tmp_path):
    data = pocket.load_imdb(str(imdb))
    tokenizer = pocket.train_tokenizer(data["train"]["text"], 300, tmp_path)
    reward = sentiment.train_additive(tokenizer, data["train"], replace(SENTIMENT, reward_epochs=20, window=4))
    good, bad = reward([" good great fun", " bad dull weak"])
    assert good > 0.7
    assert bad < 0.3


def test_quality_by_hand():
    facts = sentiment.quality(torch.tensor([0.9, 0.8, 0.3, 0.6]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert facts["accuracy"] == 0.75
    assert facts["brier"] == pytest.approx((0.01 + 0.04 + 0.09 + 0.36) / 4)
    assert facts["ece"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 4)


def test_agreement_by_hand():
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    scores = {"a": torch.tensor([0.1, 0.2, 0.8, 0.9]), "b": torch.tensor([0.2, 0.1, 0.9, 1.0])}
    assert sentiment.agreement(scores)["a, b"] > 0.9  # what the labels make them share
    within = sentiment.agreement(scores, labels)["a, b"]  # opposite in one label, alike in the other
    assert within == pytest.approx(0, abs=1e-6)
    assert scores["a"].tolist() == pytest.approx([0.1, 0.2, 0.8, 0.9])
    with pytest.raises(ValueError, match="one of a, b scores all texts alike"):
        sentiment.agreement(scores | {"b": labels}, labels)


def test_cut_windows():
    rows, labels = sentiment.cut_windows([[1, 2, 3, 4, 5], [6, 7]], [1, 0], width=2, offset=1)
    assert rows.tolist() == [[2, 3], [4, 5]]
    assert labels.tolist() == [1, 1]


def test_what_is_bundled():
    facts = json.loads((POCKET / "provenance.json").read_text())
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) <= 20e6
    assert facts["parameters"] <= 6_000_000
    assert facts["nats_per_token"] <= 3.75
    assert facts["start"]["reward"]["std"] >= 0.2
    assert facts["config"] == json.loads(json.dumps(vars(pocket.PocketConfig())))  # the defaults rebuild it
    assert facts["sentiment"] == json.loads(json.dumps(vars(sentiment.SentimentConfig())))
    model = load_model(POCKET)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    assert len(load_tokenizer(POCKET)) == model.config.vocab_size == 4096


def test_the_bundled_readme_is_what_its_facts_give():
    facts = json.loads((POCKET / "provenance.json").read_text())
    assert report.readme(facts) == (POCKET / "README.md").read_text()


def test_bundled_judge_and_reward_tell_good_from_bad():
    texts = [" is a wonderful film, one of the best I have seen.", " is awful, boring and a complete waste of time."]
    for scorer in (AdditiveReward.load(POCKET), ClassifierReward(POCKET / "judge"), load_reward(SECOND_JUDGE)):
        good, bad = scorer(texts)
        assert good > 0.7
        assert bad < 0.3


def test_tiny_helper_has_the_pocket_layout(tmp_path):
    assert tiny.tokenizer(tmp_path)("good")["input_ids"][0] == 0
