"""What the command line refuses, in one sentence and with status 2; and what it says of every flag."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny

import benchmarks.__main__
import tpo_lib
from tpo_course import notebooks
from tpo_lib import cli, flags
from tpo_lib.config import TrainConfig
from tpo_lib.losses import OBJECTIVES, Hyperparameter, Objective
from tpo_lib.runs import named


def refused(capsys, *arguments) -> str:
    """The sentence that a command leaves with."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert len(said.strip().splitlines()) == 1, said
    assert "raceback" not in said
    return said


@pytest.fixture
def nothing_loads(monkeypatch):
    """Arguments are judged before anything is imported that is slow, or loaded."""

    def load():
        raise AssertionError("it began to load")

    monkeypatch.setattr(cli, "_one_bar_only", load)


def train(*more) -> list[str]:
    return ["train", "--output-dir", "out", *more]


def pairs(*more) -> list[str]:
    return ["pairs", "--output", "pairs.jsonl", *more]


JUDGED = [
    ([], "required: command"),
    (["trian"], "invalid choice: 'trian'"),
    (["train", "--learning-rate", "1"], "--learning-rate"),
    (["train"], "--output-dir is missing"),
    (train("--seed", "-1"), "seed=-1 must be at least 0"),
    (train("--seed", "99999999999"), "seed=99999999999 must be at most 4294967295"),
    (train("--max-tokens", "1"), "max_tokens=1 must be greater than 3"),
    (train("--batch-size", "2.5"), "--batch-size: '2.5' is no whole number"),
    (train("--batch-size", "0"), "batch_size=0 must be greater than 0"),
    (train("--epochs", "9" * 5000), "is no whole number"),
    (train("--epochs", "9" * 400), "must be at most 2147483647"),
    (pairs("--num-prompts", "9" * 400), "must be at most 10000000"),
    (train("--lr", "nan"), "--lr: nan is not finite"),
    (train("--lr", "inf"), "--lr: inf is not finite"),
    (train("--lr", "-0.0"), "lr=-0.0 must be greater than 0"),
    (train("--lr", "fast"), "--lr: 'fast' is no number"),
    (train("--beta", "-1"), "beta=-1.0 must be greater than 0"),
    (train("--device", "banana"), "device 'banana' is not here; choose cpu"),
    (train("--precision", "fp16", "--device", "cpu"), "fp16 needs a CUDA device"),
    (train("--alpha", "0.3"), "--alpha has no effect with dpo, which takes --beta"),
    (train("--loss-type", "sft", "--beta", "1"), "--beta has no effect with sft, which takes none of these"),
    (train("--guide", "x"), "--guide has no effect with dpo"),
    (train("--num-prompts", "0"), "--num-prompts: 0 must be at least 1"),
    (train("--optimizer", "rmsprop", "--weight-decay", "1"), "weight_decay=1.0 has no effect with rmsprop"),
    (["train", "--output-dir", "file/run"], "--output-dir file/run cannot be made: "),
    (["train", "--output-dir", "file"], "--output-dir file cannot be made: "),
    (["train", "--output-dir", "used"], "used holds a run already; continue it with --resume"),
    (["train", "--output-dir", "foreign"], "foreign/final was there before, and foreign/.tpo_lib.run.lock is not"),
    (train("--cache-dir", "file"), "--cache-dir file cannot be made: "),
    (["pairs"], "required: --output"),
    (["pairs", "--output", "pairs.csv"], "--output pairs.csv must end in .jsonl or .parquet"),
    (["pairs", "--output", "folder.jsonl"], "--output folder.jsonl is a folder; name a file in it"),
    (["pairs", "--output", "file/pairs.jsonl"], "--output file/pairs.jsonl cannot be made: "),
    (pairs("--seed", "-1"), "--seed: -1 must be at least 0"),
    (pairs("--num-prompts", "0"), "--num-prompts: 0 must be at least 1"),
    (pairs("--num-prompts", "1e3"), "--num-prompts: '1e3' is no whole number"),
    (pairs("--num-prompts", "10000000000"), "--num-prompts: 10000000000 must be at most 10000000"),
    (pairs("--samples-per-prompt", "1"), "--samples-per-prompt: 1 must be at least 2"),
    (pairs("--max-new-tokens", "0"), "--max-new-tokens: 0 must be at least 1"),
    (pairs("--temperature", "nan"), "--temperature: nan is not finite"),
    (pairs("--temperature", "0"), "--temperature: 0 must be at least 0.01"),
    (pairs("--min-gap", "nan"), "--min-gap: nan is not finite"),
    (pairs("--min-gap", "-0.1"), "--min-gap: -0.1 must be at least 0"),
    (pairs("--device", "cuda:99"), "device 'cuda:99' is not here"),
    (pairs("--rule", "worst"), "invalid choice: 'worst'"),
    (["generate", "--top-p", "0"], "--top-p: 0 must be at least 1e-09"),
    (["generate", "--seed", "-1"], "--seed: -1 must be at least 0"),
    (["evaluate"], "required: policy"),
    (["evaluate", "x", "--seed", "-1"], "--seed: -1 must be at least 0"),
    (["evaluate", "x", "--num-prompts", "-5"], "--num-prompts: -5 must be at least 1"),
    (["evaluate", "x", "--device", "banana"], "device 'banana' is not here"),
    (["evaluate", "x", "--output", "folder.jsonl"], "--output folder.jsonl is a folder"),
    (["evaluate", "x", "--output", "file/e.json"], "--output file/e.json cannot be made: "),
    (["run", "--seed", "-1"], "--seed: -1 must be at least 0"),
    (["run", "--runs", "file"], "--runs file cannot be made: "),
    (["pocket", "--steps", "0"], "--steps: 0 must be at least 1"),
    (["pocket", "--work-dir", "file"], "--work-dir file cannot be made: "),
    (["sweep", "--output", "folder.jsonl"], "--output folder.jsonl is a folder"),
    (
        train("--pairs", "p.jsonl", "--temperature", "0.5"),
        "--temperature has no effect with pairs that are there (p.jsonl)",
    ),
    (train("--pairs", "p.jsonl", "--reward", "r"), "--reward has no effect with pairs that are there (p.jsonl)"),
    (train("--judge", "j"), "unrecognized arguments: --judge j"),
    (train("--split", "test"), "--split has no effect without --pairs"),
    (train("--pairs", "p.jsonl", "--eval-config", "c"), "--eval-config has no effect without --eval-pairs"),
    (train("--imdb", "folder.jsonl"), "--imdb has no effect without --prompts imdb"),
    (pairs("--imdb", "folder.jsonl"), "--imdb has no effect without --prompts imdb"),
    (pairs("--judge", "j"), "unrecognized arguments: --judge j"),
    (["evaluate", "x", "--imdb", "folder.jsonl"], "--imdb has no effect without --prompts imdb"),
    (["evaluate", "x", "--config", "c"], "--config has no effect without --pairs"),
    (train("--model", ""), "--model '' names nothing"),
    (train("--pairs", "a\0b"), "--pairs 'a\\x00b' names nothing"),
    (["train", "--output-dir", " "], "--output-dir ' ' names nothing"),
    (["derive", ""], "--name '' names nothing"),
]


@pytest.mark.parametrize(("arguments", "sentence"), JUDGED)
def test_arguments_are_judged_before_anything_loads(nothing_loads, capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.jsonl").mkdir()
    for made in ("used/checkpoints/step-00000001", "foreign/final"):
        (tmp_path / made).mkdir(parents=True)
    (tmp_path / "used/.tpo_lib.run.lock").touch()
    assert sentence in refused(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.jsonl", "foreign", "used"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A model, a reward, pairs, and spoilt neighbours of all of them."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny.checkpoint_folder(folder / "model")
    tiny.classifier(folder / "reward")
    row = {"prompt": "the film is", "chosen": " good and fine", "rejected": " bad and poor"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row | {"chosen": f" good {i}"}) + "\n" for i in range(8)))
    (folder / "nothing").mkdir()
    spoilt = {"empty.jsonl": b"", "cut.jsonl": b'{"prompt": ', "latin.jsonl": '{"prompt": "\xe9"}'.encode("latin-1")}
    spoilt |= {"list.json": b"[1, 2]", "word.jsonl": b'"a"', "zeros.jsonl": bytes(64), "deep.json": b"[" * 100_000}
    spoilt |= {"cut.parquet": b"PAR1", "columns.csv": b"a,b\n1,2", "binary.bin": bytes(range(256))}
    spoilt |= {
        "types.jsonl": b'{"prompt": 1, "chosen": [2], "rejected": {"a": 3}}',
        "utf16.jsonl": '{"a": 1}'.encode("utf-16"),
    }
    for name, content in spoilt.items():
        (folder / name).write_bytes(content)
    damages = {"config.json": (None, b"", b"[]", b"{}", b"\xe9", b'{"model_type": "nobody"}')}
    damages |= {"model.safetensors": (None, b"", b"x" * 99), "tokenizer.json": (None, b"", b"{}", b"[]")}
    for name, contents in damages.items():
        for number, content in enumerate(contents):
            there = shutil.copytree(folder / "model", folder / f"{name}-{number}")
            (there / name).unlink() if content is None else (there / name).write_bytes(content)
    (folder / "guide").mkdir()
    (folder / "guide" / "training.json").write_bytes(b"{")
    return folder


BAD_PAIRS = (
    "empty.jsonl",
    "cut.jsonl",
    "latin.jsonl",
    "list.json",
    "word.jsonl",
    "zeros.jsonl",
    "deep.json",
    "cut.parquet",
)
BAD_PAIRS += ("columns.csv", "binary.bin", "types.jsonl", "utf16.jsonl", "nothing", "model", "missing.jsonl")
BAD_MODELS = (*(f"config.json-{i}" for i in range(6)), *(f"model.safetensors-{i}" for i in range(3)))
BAD_MODELS += (*(f"tokenizer.json-{i}" for i in range(4)), "nothing", "missing", "pairs.jsonl")
_TRAIN = "train --output-dir out --batch-size 4 --warmup-steps 1 --device cpu --model {} --pairs {}"
_PAIRS = "pairs --output made.jsonl --num-prompts 2 --max-new-tokens 2 --device cpu --model {} --reward {}"
_JUDGE = "evaluate {} --num-prompts 2 --max-new-tokens 2 --device cpu --model model --reward reward --judge {}"
FILES = [
    *(_TRAIN.format("model", name) for name in BAD_PAIRS),
    *(_TRAIN.format("model", "pairs.jsonl") + f" --eval-every 1 --eval-pairs {name}" for name in BAD_PAIRS[:2]),
    *(_TRAIN.format(name, "pairs.jsonl") for name in BAD_MODELS),
    *(_PAIRS.format("model", name) for name in (*BAD_MODELS[:9], "model", "nothing", "missing", "pairs.jsonl")),
    *(_JUDGE.format("model", name) for name in ("model", "nothing", "missing", "pairs.jsonl")),
    *(_JUDGE.format(name, "reward") for name in BAD_MODELS if not name.startswith("tokenizer")),
    *(
        _TRAIN.format("model", "pairs.jsonl") + f" --loss-type tgdpo --guide {name}"
        for name in ("guide", "missing", "model")
    ),
    _TRAIN.format("model", "pairs.jsonl") + " --lora-rank 999",
    _TRAIN.format("model", "pairs.jsonl") + " --batch-size 9",
    _TRAIN.format("model", "pairs.jsonl") + " --max-tokens 4",
    *(f"sweep --output {name}" for name in ("empty.jsonl", "list.json", "latin.jsonl", "guide/training.json")),
    *(f"pocket --output-dir out --work-dir out --imdb {name}" for name in ("missing", "pairs.jsonl", "nothing")),
    _PAIRS.format("model", "reward") + " --prompts imdb --imdb nothing",
    "derive nobody",
    "run --name ../elsewhere",
]


@pytest.mark.parametrize("line", FILES)
def test_spoilt_and_missing_files_end_in_one_sentence(shelf, monkeypatch, capsys, tmp_path, line):
    """Every one is foreseen: no traceback is kept, and nothing is left behind."""
    monkeypatch.chdir(shelf)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*") if path.is_file() and "out" not in path.parts}
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    said = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    assert re.match(r"[A-Za-z]+(Error|Loss): .{10}", said[-1]), said
    assert "traceback: " not in said[-1]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    ("main", "line", "sentence"),
    [
        (benchmarks.__main__.main, "--repetitions 0", "--repetitions: 0 must be at least 1"),
        (benchmarks.__main__.main, "--output file", "--output file cannot be made: "),
        (benchmarks.__main__.main, "--only nobody", "ValueError: no section is called nobody; there are "),
        (benchmarks.__main__.main, "--contestants nobody", "ValueError: no contestant is called nobody; there are "),
        (notebooks.main, "00 99", "ValueError: no notebook is called 99; there are 00_start_here.ipynb, "),
    ],
)
def test_commands_of_their_own_refuse_alike(capsys, tmp_path, monkeypatch, main, line, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "main", main)
    assert sentence in refused(capsys, *line.split())


def test_of_several_processes_train_alone_makes_use(nothing_loads, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as accelerate launch and torchrun set it
    sentence = "ValueError: 2 processes were launched, and run is the work of one; train alone takes several"
    assert sentence in refused(capsys, "run", "--quick")
    with pytest.raises(AssertionError, match="it began to load"):
        cli.main(["--traceback", *train("--pairs", "p.jsonl", "--device", "cpu")])


def test_help_and_version_do_not_wait_for_torch():
    code = "import sys; from tpo_lib import cli\ntry: cli.main([{!r}])\nfinally: assert 'torch' not in sys.modules"
    for flag, words in (("--version", tpo_lib.__version__), ("--help", "evaluate")):
        assert words in subprocess.check_output([sys.executable, "-c", code.format(flag)], text=True)


def _flags(command: str) -> list[argparse.Action]:
    return [action for action in cli.build_parser(command).commands[command]._actions if action.dest != "help"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_of_every_command_has_words(command):
    for action in _flags(command):
        assert action.help, action.option_strings or action.dest
    assert cli.build_parser(command).commands[command].format_help()


def test_the_words_of_a_flag_are_the_records_and_the_presets_defaults():
    said = {action.dest: action.help for action in _flags("train")}
    assert said["lr"] == "peak learning rate (default: 0.0002; other presets: others)"
    assert said["beta"].endswith("reference, default 0.1; simpo: scale of the mean log-probability, default 2.0")


def _config(*arguments) -> TrainConfig:
    return flags.read_config(cli.build_parser("train").parse_args(["train", *arguments]))


def test_a_flag_takes_the_objectives_own_default():
    assert _config().hyperparameters() == {"beta": 0.1}
    assert _config("--loss-type", "simpo").hyperparameters() == {"beta": 2.0, "gamma": 0.5}
    assert _config("--loss-type", "simpo", "--beta", "0.1").hyperparameters()["beta"] == 0.1
    assert _config("--preset", "gpt2-imdb", "--loss-type", "tdpo2").hyperparameters() == {"beta": 0.1, "alpha": 0.5}


def test_an_objective_of_ones_own_has_flags(monkeypatch):
    tau = Hyperparameter(0.7, "τ", "temperature", above=0)
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(OBJECTIVES["dpo"].fn, ("ref_logps",), {"tau": tau}))
    assert _config("--loss-type", "mine").hyperparameters() == {"tau": 0.7}
    assert _config("--loss-type", "mine", "--tau", "2").hyper == {"tau": 2.0}
    with pytest.raises(ValueError, match=r"--tau has no effect with dpo"):
        _config("--tau", "2")


def _raises(monkeypatch, error: Exception) -> None:
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "_derive", fail)


def test_what_nobody_foresaw_keeps_its_traceback_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _raises(monkeypatch, IndexError("list\nindex"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["derive"])
    said = capsys.readouterr().err
    (kept,) = tmp_path.iterdir()
    assert f": list index (traceback: {kept})" in said
    assert said.startswith("IndexError in cli.py, line ")
    assert "raise error" in kept.read_text()
    with pytest.raises(IndexError):
        cli.main(["--traceback", "derive"])


def test_long_words_of_libraries_are_cut_and_a_full_memory_names_what_to_lower(monkeypatch, capsys):
    _raises(monkeypatch, MemoryError("a\n" * 5000))
    said = refused(capsys, "derive")
    assert said.startswith("out of memory: a a a")
    assert "...; lower --batch-size" in said
    assert len(said) < 1300


def test_a_guide_is_a_run_that_read_a_reference(tmp_path):
    record = tmp_path / "training.json"
    config = TrainConfig(loss_type="tgdpo")
    for content, beta in (({"loss_type": "dpo", "beta": 0.3}, 0.3), ({"loss_type": "tdpo2"}, 0.1)):
        record.write_text(json.dumps(content))
        assert named.guided(config, str(tmp_path)).guide_beta == beta
    for content, words in (
        ({"loss_type": "sft"}, "is a run of sft, which reads no reference"),
        ({"loss_type": "simpo", "beta": 2.0}, "is a run of simpo, which reads no reference"),
        ({"loss_type": "unknown", "beta": 2.0}, "training.json .*loss_type='unknown' is unknown.*: pass --guide-beta"),
        ([], "training.json cannot be read .*: pass --guide-beta"),
    ):
        record.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words):
            named.guided(config, str(tmp_path))
        assert named.guided(replace(config, guide_beta=0.2), str(tmp_path)).guide_beta == 0.2  # it was said


def test_a_folder_without_permission_is_named_before_anything_loads(nothing_loads, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for arguments in (["train", "--output-dir", tmp_path / "a/b"], ["evaluate", "x", "--output", tmp_path / "a.json"]):
        assert f"cannot be written: no permission in {tmp_path}" in refused(capsys, *arguments)
