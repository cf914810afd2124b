"""Token rewards and weights as data in a run: written by `guide`, taken by `train`, the same as the model that wrote them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch

from tpo_lib import cli
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate, encode_pairs
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.pairs import load_pairs, table_of
from tpo_lib.losses import OBJECTIVES, Objective
from tpo_lib.models import frozen_copy
from tpo_lib.runs import given, run
from tpo_lib.runs.run import read_run
from tpo_lib.tools.guide import with_rewards

ROWS = [
    {"prompt": f"film {i}", "chosen": f" was{' very' * (i % 3)} good {i}", "rejected": f" was bad {i}{' oh' * (i % 2)}"}
    for i in range(8)
]
CONFIG = TrainConfig(
    loss_type="tgdpo",
    guide_beta=0.4,
    alpha=2.0,
    lr=1e-2,
    batch_size=4,
    warmup_steps=1,
    log_every=1,
    epochs=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer, the pairs as a file, and start and guide as folders."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer(folder)
    for name, seed in (("start", 0), ("dpo", 3)):
        tiny.llama(seed, vocab=len(tokenizer)).save_pretrained(str(folder / name))
        tokenizer.save_pretrained(str(folder / name))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder, tokenizer


@contextmanager
def own_objective(needs):
    OBJECTIVES["mine"] = Objective(lambda chosen, rejected: None, needs)
    yield "mine"
    del OBJECTIVES["mine"]


def losses(result) -> list[float]:
    return [row["loss"] for row in result.metrics]


def trained(table, tokenizer, config=CONFIG, **more):
    pairs, _ = encode_pairs(table, tokenizer, max_length=48)
    policy = tiny.llama(0, vocab=len(tokenizer))
    return run.fit(config, policy, frozen_copy(policy), pairs, progress=False, **more)


def test_rewards_as_data_train_as_the_guide_that_wrote_them(made):
    _, tokenizer = made
    table = table_of(ROWS, "rows")
    start, guide = (tiny.llama(seed, vocab=len(tokenizer)) for seed in (0, 3))
    pairs, _ = encode_pairs(table, tokenizer, max_length=48)
    told = with_rewards(table, pairs, tokenizer, guide, start, beta=CONFIG.guide_beta)
    values = given.token_values(told, pairs, tokenizer, max_length=48)
    data = trained(told, tokenizer, replace(CONFIG, guide_beta=1.0), given=values)
    model = trained(table, tokenizer, guide=guide)
    assert losses(data) == pytest.approx(losses(model), rel=1e-5)
    assert data.metrics[-1]["guidance/floor_share"] == model.metrics[-1]["guidance/floor_share"] > 0
    for one, other in zip(data.policy.parameters(), model.policy.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    none = trained(table, tokenizer, replace(CONFIG, alpha=0.0), guide=guide)
    assert losses(none)[-1] != pytest.approx(losses(model)[-1], rel=1e-3)  # what is told from nothing


def test_weights_train_any_objective_and_a_weight_of_0_silences_a_token(made):
    _, tokenizer = made
    spans = [[{"start": 0, "end": len(row["chosen"]), "value": 0.0}] for row in ROWS]
    table = table_of([row | {"chosen_token_weights": each} for row, each in zip(ROWS, spans, strict=True)], "rows")
    pairs, _ = encode_pairs(table, tokenizer, max_length=48)
    values = given.token_values(table, pairs, tokenizer, max_length=48)
    batch = collate(pairs)
    weights = values(batch)["weights"]
    assert weights.numel() == (batch.labels != -100).sum()
    assert (weights == 0).sum() == sum(len(pair.chosen_ids) - 1 for pair in pairs)  # all but what ends a response
    for name in ("dpo", "tdpo2", "simpo"):
        config = replace(CONFIG, loss_type=name, hyper={})
        assert losses(trained(table, tokenizer, config, given=values)) != losses(trained(table, tokenizer, config))


def test_empty_columns_are_none_and_responses_of_zeros_are_counted(made):
    _, tokenizer = made
    empty = table_of([row | {"chosen_token_rewards": None, "rejected_token_weights": []} for row in ROWS], "rows")
    pairs, _ = encode_pairs(empty, tokenizer, max_length=48)
    assert given.token_values(empty, pairs, tokenizer, max_length=48) is None
    whole = [{"start": 0, "end": len(ROWS[0]["chosen"]), "value": 0.0}]
    whole += [{"start": len(ROWS[0]["chosen"]), "end": len(ROWS[0]["chosen"]), "value": 0.0}]
    table = table_of([row | {"chosen_token_weights": whole if row is ROWS[0] else None} for row in ROWS], "rows")
    said = given.summary(given.token_values(table, pairs, tokenizer, max_length=48))
    assert said.endswith("1 responses have none but 0")
    table = table_of([row | {"chosen_token_rewards": [{"start": 0, "end": 1, "value": 1.0}]} for row in ROWS], "rows")
    said = given.summary(given.token_values(table, pairs, tokenizer, max_length=48))
    assert said.endswith("8 responses have none but 0")  # the rejected ones


def test_held_out_pairs_have_their_own(made):
    _, tokenizer = made
    rows = [row | {"chosen_token_weights": [{"start": 0, "end": 4, "value": 3.0}]} for row in ROWS]
    table, bare = table_of(rows, "rows"), table_of(ROWS[:3], "rows")
    pairs, others = (encode_pairs(each, tokenizer, max_length=48)[0] for each in (table, bare))
    values = given.token_values(table, pairs, tokenizer, max_length=48, held_out=(bare, others))
    assert values(collate(pairs))["weights"].max() == 3.0
    assert set(values.held_out(collate(others))["weights"].tolist()) == {1.0}
    assert given.token_values(bare, others, tokenizer, max_length=48) is None
    bad = table_of([row | {"chosen_token_weights": [{"start": 0, "end": 99, "value": 3.0}]} for row in ROWS], "rows")
    with pytest.raises(BadRowsError, match="8 of the rows of the held-out pairs cannot be used"):
        given.token_values(table, pairs, tokenizer, max_length=48, held_out=(bad, pairs))


def test_an_objective_without_a_guide_beta_reads_rewards_as_they_are(made):
    rows = [row | {"chosen_token_rewards": [{"start": 0, "end": 4, "value": 3.0}]} for row in ROWS]
    with own_objective(needs=("ref_logps", "guide_logps")) as name:
        config, kinds, words = given.taken(TrainConfig(loss_type=name), table_of(rows, "rows"), None)
    assert (dict(config.hyper), kinds, words) == ({}, ["rewards"], "token rewards guide")


def test_the_command_writes_what_train_takes(made, tmp_path, capsys):
    folder, _ = made
    out = tmp_path / "told.jsonl"
    where = ["--pairs", str(folder / "pairs.jsonl"), "--device", "cpu", "--max-length", "48"]
    cli.main(
        [
            "guide",
            "--model",
            str(folder / "dpo"),
            "--ref",
            str(folder / "start"),
            "--guide-beta",
            "0.4",
            *where,
            "--output",
            str(out),
        ]
    )
    assert "8 pairs; reward of a token = 0.4" in capsys.readouterr().out
    told, _ = load_pairs(out)
    assert told[0]["chosen_token_rewards"][0]["start"] == 0
    train = [
        "train",
        "--loss-type",
        "tgdpo",
        "--model",
        str(folder / "start"),
        "--pairs",
        str(out),
        "--batch-size",
        "4",
    ]
    train += ["--device", "cpu", "--warmup-steps", "1", "--max-length", "48", "--output-dir"]
    cli.main([*train, str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "token rewards guide, times guide_beta 1" in said
    assert not (tmp_path / "run" / "guide").exists()  # none was trained
    record = read_run(tmp_path / "run")
    assert record.config.hyperparameters()["guide_beta"] == 1.0
    assert set(record.start["token values"]) == {"rewards"}
    with pytest.raises(SystemExit):
        cli.main([*train, str(tmp_path / "two"), "--guide", str(folder / "dpo"), "--guide-beta", "0.4"])
    assert "the pairs have token rewards, and --guide" in capsys.readouterr().err
    line = ["inspect", "--model", str(tmp_path / "run"), "--device", "cpu", "--output", str(tmp_path / "page.html")]
    cli.main([*line, "--pairs", str(out)])
    assert "Token rewards guide, times guide_beta 1." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*line, "--pairs", str(folder / "pairs.jsonl")])
    said = "tgdpo needs a guide: pass --loss-type dpo, or --guide DIR: the run was guided by token rewards"
    assert said in capsys.readouterr().err
    cli.main([*line, "--pairs", str(out), "--loss-type", "dpo"])
    assert "Token rewards are not used: dpo reads no guide." in capsys.readouterr().err
    changed = out.read_text().replace('"value": ', '"value": 1', 1)
    out.write_text(changed)
    with pytest.raises(SystemExit):
        cli.main([*train, str(tmp_path / "run"), "--resume"])
    assert "token values" in capsys.readouterr().err


def test_a_model_that_says_not_what_it_was_trained_from(made, tmp_path, capsys):
    """Neither with which beta; and no flag is named that was not given."""
    folder, _ = made
    line = ["guide", "--model", str(folder / "dpo"), "--pairs", str(folder / "pairs.jsonl")]
    line += ["--output", str(tmp_path / "x.jsonl")]
    for more, words in (
        (["--guide-beta", "0.4"], "does not say what it was trained from: name it with --ref"),
        ([], f"the guide {folder / 'dpo'} does not say which beta it was trained with; pass it as --guide-beta"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*line, *more])
        said = capsys.readouterr().err
        assert words in said
        assert "--guide " not in said


def test_a_guide_that_is_its_own_reference_is_refused(made, tmp_path, capsys):
    folder, _ = made
    line = [
        "guide",
        "--model",
        str(folder / "dpo"),
        "--ref",
        str(folder / "dpo"),
        "--guide-beta",
        "1",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit):
        cli.main([*line, "--pairs", str(folder / "pairs.jsonl"), "--output", str(tmp_path / "x.jsonl")])
    assert "have the same weights, so that every reward would be 0" in capsys.readouterr().err


def test_turns_that_keep_no_rewards_are_counted(made, tmp_path, capsys):
    folder, tokenizer = made
    tokenizer = type(tokenizer).from_pretrained(str(folder / "dpo"))
    said = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template = said + "{% if add_generation_prompt %}<assistant>{% endif %}"
    for name, seed in (("a", 0), ("b", 3)):
        tiny.llama(seed, vocab=len(tokenizer)).save_pretrained(str(tmp_path / name))
        tokenizer.save_pretrained(str(tmp_path / name))
    turns = [{"role": role, "content": "film"} for role in ("assistant", "user", "assistant")]
    row = {
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": turns,
        "rejected": [*turns[:2], turns[0] | {"content": "bad"}],
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    line = ["guide", "--model", str(tmp_path / "a"), "--ref", str(tmp_path / "b"), "--guide-beta", "1"]
    line += ["--device", "cpu", "--max-length", "120", "--pairs", str(tmp_path / "pairs.jsonl")]
    cli.main([*line, "--output", str(tmp_path / "x.jsonl")])
    assert "2 responses have several turns; rewards of all but the last are left out" in capsys.readouterr().err
    told, _ = load_pairs(tmp_path / "x.jsonl")
    assert max(span["end"] for span in told[0]["chosen_token_rewards"]) == len("film")
    line[line.index("--pairs") + 1] = str(tmp_path / "x.jsonl")
    cli.main([*line, "--output", str(tmp_path / "y.jsonl")])
    said = (
        f"x.jsonl has chosen_token_rewards and rejected_token_rewards: in {tmp_path / 'y.jsonl'} are those of the model"
    )
    assert said in capsys.readouterr().err


def test_pairs_of_which_none_is_left_are_named(made, tmp_path, capsys):
    folder, _ = made
    line = [
        "guide",
        "--model",
        str(folder / "dpo"),
        "--ref",
        str(folder / "start"),
        "--guide-beta",
        "1",
        "--device",
        "cpu",
    ]
    line += ["--pairs", str(folder / "pairs.jsonl"), "--output", str(tmp_path / "x.jsonl"), "--max-length", "2"]
    with pytest.raises(SystemExit):
        cli.main([*line, "--on-bad-rows", "skip"])
    assert "8 of the rows of" in capsys.readouterr().err.splitlines()[-1]
