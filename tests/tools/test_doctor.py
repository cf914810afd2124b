"""The command, and what it checks directly: pairs, their masks, models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from test_doctor_rules import healthy

from tpo_course import bugs
from tpo_lib import losses, stats, train
from tpo_lib.cli import main
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate, encode_pairs
from tpo_lib.files.load import load_tokenizer
from tpo_lib.files.pairs import load_pairs
from tpo_lib.models import frozen_copy
from tpo_lib.tools.doctor import direct
from tpo_lib.tools.doctor.logs import log_of

PAIRS = [
    {"prompt": f"the film {i} is", "chosen": f" good and fine {i}", "rejected": f" bad and poor {i}"} for i in range(12)
]


def write(path, **changes):
    rows, _ = healthy(**changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def status(*arguments) -> int:
    try:
        main(["doctor", *arguments])
    except SystemExit as left:
        return left.code
    return 0


def test_healthy_is_0_wrong_is_1_unreadable_is_2(tmp_path, capsys):
    assert status(write(tmp_path / "good.jsonl"), "--beta", "0.1") == 0
    said = capsys.readouterr().out
    assert "objective dpo, guessed from the numbers" in said
    assert "NORMAL: Both rewards fall, and the margin grows\n  eval_rewards -0.36 (chosen)" in said
    assert "read: notebooks/07_break_it.ipynb: 5. A symptom that is no bug" in said
    assert "0 wrong, 0 to look at" in said
    assert "“Responses grow longer” needs the mean length" in " ".join(said.split())
    assert status(write(tmp_path / "bad.jsonl", grad_norm=0), "--loss-type", "sigmoid") == 1
    said = capsys.readouterr().out
    assert said.index("WRONG: No gradient reaches what is trained") < said.index("NORMAL")
    assert "objective dpo\n" in said
    assert "grad_norm is exactly 0 at 30 of 30 steps" in said
    assert status(str(tmp_path)) == 2
    assert "holds no run's numbers" in capsys.readouterr().err


def test_for_machines(tmp_path, capsys):
    assert status(write(tmp_path / "bad.jsonl", grad_norm=0), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["loss_type"], found["guessed"], found["last_step"]) == ("dpo", True, 30)
    first = found["findings"][0]
    assert (first["rule"], first["severity"]) == ("no-gradient", "wrong")
    assert first.keys() == {"rule", "severity", "title", "evidence", "why", "chapter", "advice"}
    assert "Responses grow longer" in found["not_checked"]


def test_an_objective_of_another_library_is_asked_what_is_true_of_any(tmp_path, capsys):
    assert status(write(tmp_path / "good.jsonl", loss=0.1), "--loss-type", "apo_zero") == 0
    assert "apo_zero is no objective of ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "M"], "--model checks a model on pairs: add --pairs"),
        (["--ref", "M"], "--ref, --pairs and --max-length are for the direct checks: add --model"),
        (["--beta", "0"], "argument --beta: 0 must be at least 1e-09"),
    ],
)
def test_flags_that_lack_others_are_refused(tmp_path, capsys, flags, said):
    assert status(write(tmp_path / "good.jsonl"), *flags) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """A run of ours on a tiny model, with the pairs its eval_* are of."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    other = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    (folder / "swapped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    given = {"model": str(tiny.checkpoint_folder(folder / "start")), "pairs": str(folder / "pairs.jsonl")}
    given |= {"eval-pairs": given["pairs"], "output-dir": str(folder / "run")}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    more = "--batch-size 4 --epochs 12 --lr 1e-2 --warmup-steps 1 --log-every 1 --eval-every 4 --device cpu"
    main(["train", *flags, *more.split()])
    return given | {"run": str(folder / "run"), "swapped": str(folder / "swapped.jsonl")}


def checked(trained, capsys, *flags) -> tuple[int, dict[str, tuple[str, str]]]:
    """Status and {check: (severity, evidence)} of the command with --model."""
    capsys.readouterr()
    code = status(trained["run"], "--model", f"{trained['run']}/final", *flags, "--json")
    found = json.loads(capsys.readouterr().out)["findings"]
    return code, {each["rule"]: (each["severity"], each["evidence"]) for each in found}


def test_a_run_with_its_own_model_reference_and_pairs(trained, capsys):
    code, found = checked(trained, capsys, "--ref", trained["model"], "--pairs", trained["pairs"])
    wrong = {name for name, (severity, _) in found.items() if severity == "wrong"}
    assert (code, wrong) == (0, set())
    assert found["mask"] == ("normal", "24 of 24 whole responses are scored word by word, and 0 tokens of prompts")
    assert (
        found["log-logps"][0] == found["log-rewards"][0] == found["run-reference"][0] == found["labels"][0] == "normal"
    )
    assert "its log-ratio to the reference is the larger one in 100%" in found["labels"][1]
    assert "100% of the chosen and 100% of the rejected end with EOS" in found["eos"][1]
    assert "tensors differ" in found["reference"][1]


def test_rewards_of_a_run_that_weighs_its_tokens_are_not_held_against_its_logps(trained, capsys, tmp_path):
    weights = {"chosen_token_weights": [{"start": 0, "end": 5, "value": 6.0}]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | weights) + "\n" for row in PAIRS))
    mine = {"model": trained["model"], "run": str(tmp_path / "run"), "pairs": str(tmp_path / "pairs.jsonl")}
    flags = ["--model", mine["model"], "--pairs", mine["pairs"], "--eval-pairs", mine["pairs"]]
    more = "--batch-size 4 --epochs 12 --lr 1e-2 --warmup-steps 1 --log-every 1 --eval-every 4 --device cpu"
    main(["train", *flags, "--output-dir", mine["run"], *more.split()])
    code, found = checked(mine, capsys, "--ref", mine["model"], "--pairs", mine["pairs"])
    assert (code, found["log-logps"][0]) == (0, "normal")
    assert not {"other-beta", "swapped-sides", "log-rewards"} & found.keys()
    assert status(mine["run"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("needs rewards without weights of tokens") == 2


def test_labels_of_the_opposite_kind_and_another_reference(trained, capsys):
    code, found = checked(trained, capsys, "--ref", trained["model"], "--pairs", trained["swapped"])
    assert code == 1
    assert found["labels"][0] == found["log-logps"][0] == "wrong"
    assert "larger one in 0%" in found["labels"][1]
    assert "nearest is that chosen and rejected are swapped" in found["log-logps"][1]
    code, found = checked(trained, capsys, "--ref", f"{trained['run']}/final", "--pairs", trained["pairs"])
    assert code == 1
    assert found["reference"] == ("normal", "the same weights")
    assert found["run-reference"][0] == found["log-rewards"][0] == "wrong"


def test_what_is_cut_and_what_cannot_be_used_is_counted(trained, capsys, tmp_path):
    rows = [*PAIRS, {"prompt": "a", "chosen": "same", "rejected": "same"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = checked(trained, capsys, "--pairs", str(tmp_path / "some.jsonl"), "--max-length", "9")
    assert found["rows"][0] == "look", found["rows"]
    assert "1 rows skipped" in found["rows"][1] or "1 rows could not be read" in found["rows"][1]
    assert found["eos"][0] == "look"


def test_of_a_folder_with_configurations_one_is_named(trained, capsys, tmp_path):
    for name, text in (("first", "good"), ("second", "fine")):
        rows = [row | {"chosen": f" {text} {i}"} for i, row in enumerate(PAIRS[: 3 if name == "first" else 5])]
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = checked(trained, capsys, "--pairs", str(tmp_path / "all"), "--config", "second")
    assert "5 pairs kept" in found["rows"][1]


# ---- the bugs of chapter 7, by what a model says of the log's own pairs

NAMED = {  # case -> check that is not good, and its words
    "C": ("log-rewards", "beta times the log-ratio is"),
    "D": ("log-rewards", "beta times the log-ratio is"),
    "E": ("log-logps", "padding is counted"),
    "H": ("log-rewards", "beta times the log-ratio is"),
    "I": ("log-logps", "nearest is that the prompt is counted"),
    "J": (
        "log-rewards",
        "beta times the log-ratio is",
    ),  # of random tokens the first is as likely as the padding, see below
}


def logged_by(case: str, pairs, policy, start):
    """The held-out row that a recipe's own code would log."""
    recipe, batch = bugs.RECIPES[case], collate(pairs)
    torch.manual_seed(0)
    logits = (bugs.forward(model, batch) for model in (policy, recipe.reference(policy, start)))
    with torch.no_grad():
        policy_logits, ref_logits = logits
        tokens = recipe.statistics(policy_logits, batch, ref_logits)
        output = recipe.loss(*stats.split(tokens))
    sums = train.Sums()
    sums.add(train.batch_metrics(TrainConfig(), output, tokens))
    return log_of(
        [{"step": 9} | {f"eval_{k}": v for k, v in sums.means(None).items()}], loss_type="dpo", beta=bugs.BETA
    )


@pytest.mark.parametrize("case", ["dpo", *NAMED])
def test_bugs_that_no_log_can_show_are_found_with_model_and_pairs(case):
    start, pairs = frozen_copy(tiny.llama()), tiny.pairs(32)
    policy = frozen_copy(start)
    for weight in policy.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    if case == "D":
        start = frozen_copy(tiny.llama(0))
    found = list(direct.against_log(logged_by(case, pairs, policy, start), pairs, policy, start))
    bad = {name: said for name, good, said in found if not good}
    if case == "dpo":
        assert [name for name, good, _ in found if good] == ["log-logps", "log-rewards"]
        assert not bad
    else:
        name, words = NAMED[case]
        assert list(bad) == [name]
        assert words in bad[name]


def test_a_mask_that_is_off_by_one_is_named_where_first_tokens_differ_from_padding():
    """Without padding in the longest rows the log's number is not ours to the digit, but near."""
    policy = frozen_copy(tiny.llama())
    rows = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in tiny.pairs(64)]
    said = policy(input_ids=torch.tensor([prompt[-1:] for prompt, *_ in rows])).logits[:, 0]
    first = said.log_softmax(-1).mean(0).argmin().item()  # as unlikely as a first token often is
    pairs = [EncodedPair(i, p, [first, first, *w], [first, first, *l_]) for i, (p, w, l_) in enumerate(rows)]
    log = logged_by("J", pairs, policy, frozen_copy(tiny.llama()))
    (_, good, said), *_ = direct.against_log(log, pairs, policy, None)
    assert not good
    assert "nearest is that the mask is off by one" in said


# ---- pairs


def encoded(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    table, _ = load_pairs(tmp_path / "pairs.jsonl")
    tokenizer = tiny.tokenizer_of("byte")
    return table, encode_pairs(table, tokenizer, max_length=64)[0], tokenizer


def test_responses_that_are_not_scored_as_they_are(tmp_path):
    table, pairs, tokenizer = encoded(tmp_path)
    assert direct.mask(table, pairs, tokenizer) == (
        "mask",
        True,
        "24 of 24 whole responses are scored word by word, and 0 tokens of prompts",
    )
    pairs[3] = replace(pairs[3], chosen_ids=pairs[3].chosen_ids[1:])  # its first token is lost
    name, good, said = direct.mask(table, pairs, tokenizer)
    assert (name, good) == ("mask", False)
    assert said.startswith("23 of 24")


def test_bos_twice_and_eos_on_one_side(tmp_path):
    _, pairs, tokenizer = encoded(tmp_path)
    found = {name: (good, said) for name, good, said in direct.ends(pairs, tokenizer)}
    assert found["bos"][0]
    assert found["eos"][0]
    assert "tokenized again as text 12 would" in found["bos"][1]
    bos = tokenizer.bos_token_id
    pairs = [replace(p, prompt_ids=[bos, *p.prompt_ids], rejected_ids=p.rejected_ids[:-1]) for p in pairs]
    found = {name: (good, said) for name, good, said in direct.ends(pairs, tokenizer)}
    assert not found["bos"][0]
    assert not found["eos"][0]
    assert "12 of 12 prompts begin with it twice" in found["bos"][1]
    assert "100% of the chosen and 0% of the rejected" in found["eos"][1]
    assert "pad and EOS are one token" in found["pad"][1]


def test_labels_that_contradict_and_lengths_that_tell():
    pairs = tiny.pairs(8)
    found = {name: (good, said) for name, good, said in direct.labels(pairs)}
    assert found["contradictions"] == (True, "0 pairs stand there the other way round too, 0 more than once")
    pairs = [EncodedPair(i, p.prompt_ids, [*p.chosen_ids, *[5] * 20], p.rejected_ids) for i, p in enumerate(pairs)]
    pairs += [EncodedPair(9, pairs[0].prompt_ids, pairs[0].rejected_ids, pairs[0].chosen_ids), pairs[1]]
    found = {name: (good, said) for name, good, said in direct.labels(pairs)}
    assert found["contradictions"] == (False, "1 pairs stand there the other way round too, 1 more than once")
    assert not found["lengths"][0]
    assert "the longer one in 90%" in found["lengths"][1]
    few = {name: (good, said) for name, good, said in direct.labels(pairs[:3])}
    assert few["lengths"][0], "three pairs may fall so by chance"
    assert "the longer one in 100%" in few["lengths"][1]


def test_another_tokenizers_ids_surprise_a_model(trained):
    from tpo_lib.files.load import load_model

    tokenizer = load_tokenizer(trained["model"])
    table, _ = load_pairs(trained["pairs"])
    pairs = encode_pairs(table, tokenizer, max_length=64)[0]
    policy, start = load_model(trained["model"]).requires_grad_(True), load_model(trained["model"])
    config = TrainConfig(loss_type="sft", lr=1e-2, batch_size=4, epochs=12, warmup_steps=1, device="cpu")
    train.fit(config, policy, start, pairs, progress=False)
    good = next(each for each in direct.likes(pairs, policy, None) if each[0] == "nats")
    moved = [
        replace(
            p, chosen_ids=[(t + 7) % 300 for t in p.chosen_ids], rejected_ids=[(t + 7) % 300 for t in p.rejected_ids]
        )
        for p in pairs
    ]
    bad = next(each for each in direct.likes(moved, policy, None) if each[0] == "nats")
    assert good[1]
    assert not bad[1]
    assert losses.OBJECTIVES["sft"].paired is False
