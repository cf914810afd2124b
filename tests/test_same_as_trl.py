"""docs/same_as_trl.md, checked: equal settings make equal runs; what the page says is read otherwise is, and how."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from same_run import BATCH, LONGEST, METRICS, THEIRS, by_fit, by_trl, check_equal, encode, sentences
from transformers import get_constant_schedule_with_warmup

from tpo_lib import TrainConfig, train
from tpo_lib.data import BadRowsError, collate, encode_pairs

PAGE = (Path(__file__).parents[1] / "docs" / "same_as_trl.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("family", "schedule"), [("llama", "linear"), ("gpt2", "cosine")])
def test_dpo_is_the_same_run(family, schedule, tmp_path):
    """GPT-2 has dropout configured, which both leave off."""
    trl = pytest.importorskip("trl", minversion="1.16")
    tokenizer = tiny.tokenizer_of("byte")
    ours, rows, policy = by_fit(family, sentences(), tokenizer, loss_type="dpo", beta=0.1, schedule=schedule)
    config = trl.DPOConfig(output_dir=str(tmp_path), beta=0.1, lr_scheduler_type=schedule, **THEIRS)
    theirs, other = by_trl(trl.DPOTrainer, config, family, rows, tokenizer, with_reference=True)
    check_equal(ours, theirs, (policy, other))


def test_simpo_is_the_same_run(tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    tokenizer = tiny.tokenizer_of("byte")
    settings = {"loss_type": "simpo", "beta": 2.0, "gamma": 0.5, "schedule": "linear"}
    ours, rows, policy = by_fit("llama", sentences(), tokenizer, **settings)
    like = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0, "lr_scheduler_type": "linear"}
    config = CPOConfig(output_dir=str(tmp_path), remove_unused_columns=False, **like, **THEIRS)
    theirs, other = by_trl(CPOTrainer, config, "llama", rows, tokenizer, with_reference=False)
    sums = ("logps/chosen", "logps/rejected")  # theirs are means over the tokens here
    check_equal(ours, theirs, (policy, other), metrics=sorted({*METRICS} - {*sums}))


def first_losses(tmp_path, rows: list[dict], ours: dict, theirs: dict) -> tuple[dict, float, list]:
    """One update of ours and of theirs: our metrics, their loss, and its pairs."""
    trl, tokenizer = pytest.importorskip("trl", minversion="1.16"), tiny.tokenizer_of("byte")
    rows = rows[:BATCH]
    found, _, _ = by_fit("llama", rows, tokenizer, **ours)
    config = trl.DPOConfig(output_dir=str(tmp_path), **theirs, **THEIRS)
    other, _ = by_trl(trl.DPOTrainer, config, "llama", rows, tokenizer, with_reference=True)
    return found[0], other[0]["loss"], encode(rows, tokenizer)


def test_ipo_takes_means_there_and_sums_here(tmp_path):
    """With n tokens in every response theirs at beta is ours at beta / n, over n squared."""
    rows = [row | {"chosen": " good fun", "rejected": " bad plot"} for row in sentences()]
    n = len(encode(rows, tiny.tokenizer_of("byte"))[0].chosen_ids)
    ours, theirs, pairs = first_losses(
        tmp_path, rows, {"loss_type": "ipo", "beta": 0.1 / n}, {"loss_type": "ipo", "beta": 0.1}
    )
    assert {len(side) for pair in pairs for side in (pair.chosen_ids, pair.rejected_ids)} == {n}
    assert ours["loss"] / n**2 == pytest.approx(theirs, rel=1e-5)


def test_sft_is_a_mean_over_tokens_there_and_over_responses_here(tmp_path):
    ours, theirs, pairs = first_losses(tmp_path, sentences(), {"loss_type": "sft"}, {"loss_type": "sft"})
    tokens = sum(len(pair.chosen_ids) for pair in pairs)
    assert -ours["logps/chosen"] * BATCH / tokens == pytest.approx(theirs, rel=1e-5)
    assert abs(ours["loss"] - theirs) > 1e-3


def prepared(rows: list[dict], tokenizer, longest: int = LONGEST) -> list[tuple]:
    """Prompt, chosen and rejected ids of rows as TRL's DPOTrainer makes them."""
    trl = pytest.importorskip("trl", minversion="1.16")
    settings = SimpleNamespace(max_length=longest, truncation_mode="keep_start", dataset_num_proc=None)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    found = trl.DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, settings, "train")
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in found]


def ids(pair) -> tuple:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


@pytest.mark.parametrize("form", ["byte", "llama2", "always", "unigram"])
def test_tokens_are_the_same(form):
    """BOS, EOS, and tokens that straddle the end of a prompt, in the second half of the rows."""
    tokenizer, rows = tiny.tokenizer_of(form), sentences(12)
    rows += [{"prompt": "a go", "chosen": "od film", "rejected": f"{'o' * i}d fun"} for i in range(2, 14)]
    assert [ids(pair) for pair in encode(rows, tokenizer)] == prepared(rows, tokenizer)


def test_a_row_that_is_too_long_is_cut_alike():
    trl = pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = tiny.tokenizer_of("byte")
    whole, cut = encode(sentences(8), tokenizer), encode(sentences(8), tokenizer, longest=12)
    assert [ids(pair) for pair in whole] != [ids(pair) for pair in cut]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = DataCollatorForPreference(0, max_length=12)([dict(zip(names, ids(pair), strict=True)) for pair in whole])
    ours = collate(cut, 0)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    assert torch.equal(ours.labels != -100, theirs["completion_mask"].bool())
    assert trl.DPOConfig.truncation_mode == "keep_start"  # which this is


def test_a_prompt_that_fills_the_row_is_dropped_there_and_refused_here():
    tokenizer, rows = tiny.tokenizer_of("byte"), sentences(8)
    longest = max(len(pair.prompt_ids) for pair in encode(rows, tokenizer))
    kept = prepared(rows, tokenizer, longest)
    with pytest.raises(BadRowsError, match="leaves a response no room"):
        encode(rows, tokenizer, longest)
    pairs, report = encode_pairs(Dataset.from_list(rows), tokenizer, max_length=longest, on_bad_rows="skip")
    assert 0 < len(kept) == len(pairs) == len(rows) - len(report.skipped) < len(rows)


def test_what_the_template_puts_after_the_end_of_turn_is_trained_there_and_not_here():
    tokenizer = tiny.tokenizer_of("byte")
    turn = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>\n{% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}assistant:{% endif %}"
    row = sentences(1)[0]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    row = {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}
    ((prompt, *theirs),), (ours,) = prepared([row], tokenizer), encode([row], tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert (prompt, theirs) == (ours.prompt_ids, [side + newline for side in (ours.chosen_ids, ours.rejected_ids)])


def as_authors(tokenizer, row: dict) -> tuple:
    """The ids that the DPO and TDPO authors' code makes: no BOS, prompt and responses each by itself, EOS."""
    prompt, *sides = (
        tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "chosen", "rejected")
    )
    return prompt, *([*side, tokenizer.eos_token_id] for side in sides)


@pytest.mark.parametrize(("form", "equal", "equal_but_for_bos"), [("byte", 0, 12), ("llama2", 0, 0)])
def test_the_authors_tokens_lack_bos_and_the_boundary(form, equal, equal_but_for_bos):
    tokenizer, rows = tiny.tokenizer_of(form), sentences(12)
    pairs = [(ids(pair), as_authors(tokenizer, row)) for pair, row in zip(encode(rows, tokenizer), rows, strict=True)]
    assert sum(a == b for a, b in pairs) == equal
    assert sum((a[0][1:], *a[1:]) == b for a, b in pairs) == equal_but_for_bos


def test_warm_up_is_one_update_ahead_of_transformers():
    config = TrainConfig(lr=1.0, schedule="constant", warmup_steps=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_constant_schedule_with_warmup(optimizer, 4).lr_lambdas[0]
    assert [train.learning_rate(config, step, 9) for step in range(9)] == [theirs(step + 1) for step in range(9)]
    assert theirs(0) == 0


def test_the_page_names_the_settings_of_these_runs():
    for name, value in (THEIRS | {"cpo_alpha": 0.0, "simpo_gamma": 0.5}).items():
        if name not in {"use_cpu", "logging_steps", "save_strategy", "report_to", "disable_tqdm", "num_train_epochs"}:
            assert re.search(rf"`{name}\b", PAGE), f"{name}={value!r} is not on the page"
