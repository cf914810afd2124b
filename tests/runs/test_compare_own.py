"""`compare`: objectives of one's choice on one's own model and pairs, over values and seeds, from flags and from a file."""

from __future__ import annotations

import io
import itertools
import json
import re
import tomllib
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset

from tpo_lib import flags
from tpo_lib.cli import build_parser, main
from tpo_lib.config import TrainConfig
from tpo_lib.fast import FastPath, path
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import compare, configs, report, stage, work
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.run import Run
from tpo_lib.runs.settings import CompareConfig, labels, schedule

PAIRS = [
    {"prompt": f"the film {i} is", "chosen": f" good and fine {i}", "rejected": f" bad and poor {i}"} for i in range(30)
]
CODE = """
from tpo_lib.losses import LossOutput

def hinge(chosen, rejected, *, delta=1.0):
    w, l = ((side.logps - side.ref_logps).sum(-1) for side in (chosen, rejected))
    return LossOutput((delta - (w - l)).clamp_min(0), w.detach(), l.detach())

def score(texts):
    return [len(set(text)) / 99 for text in texts]
"""
SMALL = ["--batch-size", "8", "--max-new-tokens", "6", "--held-out-prompts", "3", "--warmup-steps", "1", "--lr", "0.01"]
SMALL += ["--device", "cpu", "--evaluations", "12", "--log-every", "1"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A saved model, pairs, and a file with an objective and a reward."""
    root = tmp_path_factory.mktemp("own")
    tiny.checkpoint_folder(root / "model")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (root / "my.py").write_text(CODE)
    yield root
    OBJECTIVES.pop("my.py:hinge", None)


def given(shelf, *more) -> list[str]:
    where = ["--model", shelf / "model", "--pairs", shelf / "pairs.jsonl", "--reward", f"{shelf / 'my.py'}:score"]
    return list(map(str, [*where, *SMALL, *more]))


def small_run(shelf, folder, *more) -> dict:
    main(["compare", *given(shelf, "--output-dir", folder, *more)])
    return json.loads((folder / "summary.json").read_text())


def config_of(*arguments) -> CompareConfig:
    options = build_parser("compare").parse_args(["compare", "--output-dir", "out", *map(str, arguments)])
    return flags.read_comparison(options)


@pytest.fixture(scope="module")
def finished(shelf):
    """Four settings and two seeds, killed within a run of the second seed, then continued; what the report got."""
    folder, handed, patch = shelf / "D", [], pytest.MonkeyPatch()
    real, calls, draw = stage.evaluate, [], report.write_report

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # after the start and two of dpo with seed 0: the first with seed 1
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(stage, "evaluate", interrupted)
    patch.setattr(report, "write_report", lambda *args, **more: handed.append((args, more)) or draw(*args, **more))
    own = ["--objectives", "dpo", "tdpo2", f"{shelf / 'my.py'}:hinge", "--seeds", "0", "1"]
    own += ["--alpha", "0.2", "0.5", "--delta", "2"]
    with pytest.raises(SystemExit, match="130"):
        small_run(shelf, folder, *own)
    kept = (folder / "dpo/seed-0/metrics.jsonl").stat().st_mtime_ns, (folder / "dpo/seed-1/checkpoints").exists()
    summary = small_run(shelf, folder, *own)
    assert kept[1], "the run of seed 1 was under way"
    assert len(calls) == 1 + 8 * 2 + 1, "what was evaluated before the kill is not evaluated again"
    patch.undo()
    return folder, summary, handed


def test_a_kill_between_two_evaluations_costs_nothing_but_time(shelf, monkeypatch):
    """Nine updates, evaluated after 2, 3 and 9, saved after 2, 4, 6 and 8: what was evaluated stays, and the end is the same."""
    config = config_of(*given(shelf, "--objectives", "dpo", "--epochs", "3", "--evaluations", "3"))
    config = compare.replace(config, stage=compare.replace(config.stage, evaluation_samples=2))
    whole = compare.run(config, shelf / "K1", progress=False, latest=False)
    real, calls, steps = stage.evaluate, [], []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # after the start and update 2: at update 3, before a checkpoint
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(stage, "evaluate", killed)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_rescue", lambda *_: None)  # as by kill -9
        with pytest.raises(KeyboardInterrupt):
            compare.run(config, shelf / "K2", progress=False, latest=False)
    kept = {path.name: path.stat().st_mtime_ns for path in (shelf / "K2/dpo/evaluations").iterdir()}
    assert list(kept) == ["00000002.json"]
    assert [path.name for path in (shelf / "K2/dpo/checkpoints").glob("step-*")] == ["step-00000002"]
    begin = Run.begin
    monkeypatch.setattr(Run, "begin", lambda run, *a, **k: begin(run, *a, **k) or steps.append(run.step))
    again = compare.run(config, shelf / "K2", progress=False, latest=False)
    assert steps == [2]
    assert len(calls) == 5
    assert (shelf / "K2/dpo/evaluations/00000002.json").stat().st_mtime_ns == kept["00000002.json"]
    assert sorted(int(path.stem) for path in (shelf / "K2/dpo/evaluations").iterdir()) == [2, 3, 9]
    assert again["objectives"] == whole["objectives"]
    made = [*(shelf / "K2/start/evaluations").iterdir(), *sorted((shelf / "K2/dpo/evaluations").iterdir())]
    counts = [len(json.loads(path.read_text())["samples"]) for path in made]
    assert counts == [6, 6, 6, 6], "two of every prompt"
    shown = (shelf / "K2/report.md").read_text().partition("Samples before and after")[2]
    assert len(re.findall(r"^\| the film \d+ is \|", shown, re.MULTILINE)) == 3, "one of every prompt"


@pytest.mark.parametrize("updates", [1, 2, 3, 10, 40, 375, 10_000])
@pytest.mark.parametrize("evaluations", [1, 2, 5, 10])
def test_evaluations_are_dense_at_first_and_the_last_is_the_end(updates, evaluations):
    steps = schedule(updates, evaluations)
    assert steps == sorted(set(steps))
    assert steps[-1] == updates
    assert len(steps) <= evaluations
    if evaluations > 1:
        assert max(min(2, updates), updates / 20) <= steps[0] < max(3, updates / 20 + 1)
        assert len(steps) == evaluations or updates < 10 * evaluations  # then some fall together
    factor = 20 ** (1 / max(1, evaluations - 1))
    for a, b in itertools.pairwise(steps):
        assert b < (a + 1) * factor + 1 or b == a + 1
        assert b > (a - 1) * factor - 1 or a == steps[0] == min(2, updates)


def test_every_run_logs_rows_enough_for_its_picture(shelf):
    rows = "--objectives", "dpo", "--evaluations", "1", "--log-every"
    small_run(shelf, shelf / "R", *rows, "5", "--epochs", "14")
    logged = [json.loads(line)["step"] for line in (shelf / "R/dpo/metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(2, 43, 2))


def test_an_older_folder_is_refused(shelf, tmp_path, capsys):
    same = ["--objectives", "dpo", "--evaluations", "1"]
    small_run(shelf, tmp_path / "O", *same)
    path = tmp_path / "O" / "identity.json"
    known = json.loads(path.read_text())
    del known["format"], known["sha256"]
    path.write_text(json.dumps(known))
    with pytest.raises(SystemExit, match="2"):
        small_run(shelf, tmp_path / "O", *same)
    assert "is by an older version, which evaluated after other updates and on other prompts; pass --fresh" in (
        capsys.readouterr().err
    )
    small_run(shelf, tmp_path / "O", *same, "--fresh")


def test_settings_are_named_and_lie_in_folders_by_their_seed(finished):
    folder, summary, _ = finished
    assert list(summary["objectives"]) == ["dpo", "tdpo2 β0.1 α0.2", "tdpo2 β0.1 α0.5", "my.py:hinge"]
    for name in ("dpo", "tdpo2-beta0.1-alpha0.2", "tdpo2-beta0.1-alpha0.5", "my.py:hinge"):
        assert sorted(path.name for path in (folder / name).iterdir()) == ["seed-0", "seed-1"]
    for seed in (0, 1):
        record = json.loads((folder / f"dpo/seed-{seed}/final/training.json").read_text())
        assert record["seed"] == seed
    assert not (folder.parent / "latest").exists(), "no link in a folder that is not ours"


def test_seeds_differ_in_the_order_of_the_data_alone_and_are_handed_on_whole(finished):
    _, summary, [(args, more)] = finished
    _, _, curves, samples = args
    for label, points in curves.items():
        assert [point["step"] for point in points] == [0, 2, 3]
        end = points[-1]
        assert set(end["by_seed"]) == set(end["by_prompt"]) >= {"reward", "kl"}
        assert [len(values) for values in end["by_seed"]["kl"]] == [3, 3]
        kl = summary["objectives"][label]["kl"]
        assert kl["seeds"] == [pytest.approx(sum(values) / 3) for values in end["by_seed"]["kl"]]
        assert kl["mean"] == pytest.approx(sum(kl["seeds"]) / 2)
        assert kl["seed_sd"] > 0, "two orders of the data are two runs"
        assert points[0]["kl"]["seed_sd"] == 0, "one start"
        assert [rows[-1]["step"] for rows in more["training"][label]] == [3, 3]
        assert len(samples[label]) == 3
    assert summary["config"]["seeds"] == [0, 1]


def test_all_that_was_logged_says_its_seed_and_every_run_its_cost(finished):
    folder, summary, _ = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(row["objective"], row["seed"]) for row in rows} == {(n, s) for n in summary["objectives"] for s in (0, 1)}
    assert {f"{name} seed {seed}" for name in summary["objectives"] for seed in (0, 1)} < set(summary["costs"])


def test_the_file_that_is_written_repeats_it_and_flags_count_before_it(finished, shelf):
    folder, summary, _ = finished
    file, more = folder / "config.yaml", ["--seeds", "1", "--objectives", "tdpo2", "my.py:hinge", "--alpha", "0.2"]
    main(["compare", "--config", str(file), "--output-dir", str(shelf / "D2")])
    again = json.loads((shelf / "D2" / "summary.json").read_text())
    assert {k: again[k] for k in ("objectives", "start", "config")} == {
        k: summary[k] for k in ("objectives", "start", "config")
    }
    assert (shelf / "D2" / "config.yaml").read_text() == file.read_text()
    main(["compare", "--config", str(file), "--output-dir", str(shelf / "D3"), *more])
    one = json.loads((shelf / "D3" / "summary.json").read_text())["objectives"]
    for name, label in (("tdpo2", "tdpo2 β0.1 α0.2"), ("my.py:hinge", "my.py:hinge")):
        assert one[name]["kl"]["mean"] == summary["objectives"][label]["kl"]["seeds"][1]
        assert "seeds" not in one[name]["kl"]
    assert (shelf / "D3" / "tdpo2" / "final").is_dir()


def test_a_finished_one_is_repeated_by_its_own_file_and_no_other_is_mixed_in(finished, capsys):
    folder, summary, _ = finished
    path = folder / "identity.json"
    known = json.loads(path.read_text())
    del known["config"]["stage"]["split"], known["sha256"]  # a field that is newer than the folder
    path.write_text(json.dumps(known))
    main(["compare", "--config", str(folder / "config.yaml"), "--output-dir", str(folder)])
    assert json.loads((folder / "summary.json").read_text())["objectives"] == summary["objectives"]
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--config", str(folder / "config.yaml"), "--output-dir", str(folder), "--lr", "0.1"])
    assert "was begun with another config; pass --fresh" in capsys.readouterr().err


def test_how_models_are_read_is_no_part_of_a_comparison(shelf, monkeypatch):
    same, used, real = ["--objectives", "tgdpo", "--evaluations", "1"], [], path.recomputing
    plain = small_run(shelf, shelf / "F", *same)
    monkeypatch.setattr(path, "recomputing", lambda model: used.append(model) or real(model))
    frugal = small_run(shelf, shelf / "F2", *same, "--checkpointing", "--share-prefix", "--no-fused")
    assert len(used) == 2, "guide and policy"
    metrics = frugal["objectives"]["tgdpo"]
    assert {name: value["mean"] for name, value in metrics.items()} == pytest.approx(
        {name: value["mean"] for name, value in plain["objectives"]["tgdpo"].items()}, rel=1e-3, abs=1e-5
    )
    assert frugal["config"] == plain["config"]
    assert (shelf / "F2" / "config.yaml").read_text() == (shelf / "F" / "config.yaml").read_text()
    assert small_run(shelf, shelf / "F2", *same)["objectives"] == frugal["objectives"]  # goes on without it


@pytest.mark.parametrize("more", [[], ["--checkpointing"], ["--no-fused", "--share-prefix"]])
def test_run_takes_the_same_flags(monkeypatch, more, tmp_path):
    handed = []
    monkeypatch.setattr(compare, "run", lambda *_, fast, **__: handed.append(fast) or {"wall_time_s": 0})
    monkeypatch.setattr(report, "summary_table", lambda summary: "")
    main(["run", "--quick", "--runs", str(tmp_path), *more])
    expected = FastPath(
        checkpointing="--checkpointing" in more, fused="--no-fused" not in more, share_prefix="--share-prefix" in more
    )
    assert handed == [expected]


def test_a_guide_is_of_the_same_seed_and_beta_and_costs_what_it_costs(shelf):
    config = config_of(
        *given(shelf, "--objectives", "dpo", "tgdpo", "--beta", "0.1", "0.5", "--guide-beta", "0.1", "0.3")
    )
    folders = {(run.beta, run.guide_beta): None for run in config.objectives if run.loss_type == "tgdpo"}
    assert list(folders) == [(0.1, 0.1), (0.1, 0.3), (0.5, 0.1), (0.5, 0.3)]
    assert [run.folder for run in config.guides().values()] == ["dpo-beta0.1", "guide"] * 2
    plain = config_of(*given(shelf, "--objectives", "tgdpo", "--beta", "0.5", "--seeds", 0, 1))
    assert [run.guide_beta for run in plain.objectives] == [0.5]
    assert [(run.folder, run.config.seed) for run in plain.guides().values()] == [
        ("guide/seed-0", 0),
        ("guide/seed-1", 1),
    ]
    summary = small_run(shelf, shelf / "G", "--objectives", "tgdpo", "--beta", "0.5", "--evaluations", "1")
    assert {"guide", "tgdpo"} < set(summary["costs"])
    assert summary["costs"]["guide"]["tokens"] == summary["costs"]["tgdpo"]["tokens"] > 0
    guide = json.loads((shelf / "G" / "guide" / "final" / "training.json").read_text())
    assert (guide["loss_type"], guide["beta"], guide["seed"]) == ("dpo", 0.5, 0)


def test_pairs_are_sampled_where_there_are_none_and_prompts_may_be_ones_own(shelf, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"the film {i}\n" for i in range(9)))
    where = [
        "--model",
        shelf / "model",
        "--reward",
        f"{shelf / 'my.py'}:score",
        "--prompts",
        prompts,
        "--num-prompts",
        6,
    ]
    main(
        [
            "compare",
            *map(str, [*where, *SMALL, "--objectives", "dpo", "--evaluations", 1, "--output-dir", tmp_path / "S"]),
        ]
    )
    summary = json.loads((tmp_path / "S" / "summary.json").read_text())
    assert 20 < summary["config"]["pairs"] <= 6 * 6
    assert summary["config"]["held_out_prompts"] == 3
    assert (tmp_path / "S" / "gaps.png").exists()


def test_without_a_reward_held_out_pairs_and_kl_are_compared_on_prompts_of_a_file(shelf, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("fun\nbad\ngood\nfine\n")
    where = ["--model", shelf / "model", "--pairs", shelf / "pairs.jsonl", "--prompts", tmp_path / "p.txt"]
    more = [
        "--objectives",
        "ipo",
        "--eval-pairs",
        shelf / "pairs.jsonl",
        "--evaluations",
        1,
        "--output-dir",
        tmp_path / "N",
    ]
    main(["compare", *map(str, [*where, *SMALL, *more, "--dry-run"])])
    said = capsys.readouterr().out
    assert "at most 30 of" in said
    assert "3 updates of 8 pairs, 1 evaluations" in said
    assert not (tmp_path / "N").exists()
    main(["compare", *map(str, [*where, *SMALL, *more])])
    summary = json.loads((tmp_path / "N" / "summary.json").read_text())
    assert {"kl", "accuracy_logratio"} < set(summary["objectives"]["ipo"])
    assert "reward" not in summary["objectives"]["ipo"]
    row = json.loads(next((tmp_path / "N" / "start" / "evaluations").glob("*.json")).read_text())
    assert [sample["prompt"] for sample in row["samples"]] == ["fun", "bad", "good"]


def test_a_file_says_what_flags_say(shelf, tmp_path):
    over = ["--beta", "0.5", "2", "--alpha", "0.3", "--seeds", 3, 4]
    judges = ["--judge", f"{shelf / 'my.py'}:score", "--second-judge", f"{shelf / 'my.py'}:score"]
    config = config_of(*given(shelf, "--objectives", "dpo", "tdpo2", "simpo", *over, *judges))
    stage_ = {"model": str(shelf / "model"), "pairs": str(shelf / "pairs.jsonl"), "reward": f"{shelf / 'my.py'}:score"}
    stage_ |= {
        "max_new_tokens": 6,
        "held_out_prompts": 3,
        "device": "cpu",
        "judge": judges[1],
        "second_judge": judges[3],
    }
    train = 'lr = 1e-2\nbatch_size = 8\nwarmup_steps = 1\nlog_every = 1\ndevice = "cpu"\nbeta = [0.5, 2]'
    text = "seeds = [3, 4]\nevaluations = 12\nobjectives = ['dpo', {loss_type = 'tdpo2', alpha = 0.3}, 'simpo']\n"
    text += (
        "[stage]\n"
        + "".join(f"{name} = {json.dumps(value)}\n" for name, value in stage_.items())
        + f"[train]\n{train}\n"
    )
    (tmp_path / "c.toml").write_text(text)
    assert tomllib.loads(text)["train"]["lr"] == 0.01
    assert config_of("--config", tmp_path / "c.toml") == config
    (tmp_path / "c.yaml").write_text(configs.written(config).replace("lr: 0.01", "lr: 1e-2"))  # a text, in YAML
    assert config_of("--config", tmp_path / "c.yaml") == config
    assert len(config.objectives) == 6
    assert [run.name for run in config.runs()][:3] == ["dpo β0.5 seed 3", "dpo β0.5 seed 4", "dpo β2 seed 3"]


def test_every_preset_is_written_and_read_back():
    from tpo_lib.runs.presets import comparison

    for name in PRESETS:
        config = comparison(name)
        content = configs.yaml.safe_load(configs.written(config))
        assert configs.written(configs.built(content, "file", TrainConfig())) == configs.written(config), name


REFUSED = [
    (["--beta", "0.1", "-1"], "beta=-1.0 must be greater than 0"),
    (["--beta", "0.1", "0.1"], "beta=[0.1, 0.1] names a value twice"),
    (["--alpha", "0.5"], "alpha=[0.5] has no effect, none of dpo takes it"),
    (["--seeds", "1", "1"], "seeds 1 1 name one twice"),
    (["--seeds", "-1"], "--seeds: -1 must be at least 0"),
    (["--objectives", "dpo", "dpo"], "dpo β0.1 is there twice"),
    (["--objectives", "sft"], "objectives names 'sft'; choose from dpo, "),
    (["--objectives", "nosuch.py:f"], "there is no file nosuch.py"),
    (["--num-prompts", "4"], "--num-prompts has no effect with pairs that are there"),
    (["--prompts", "model"], "--prompts has no effect with pairs that are there"),
    (["--imdb", "x"], "imdb='x' has no effect without prompts imdb"),
    (["--lr", "0"], "lr=0.0 must be greater than 0"),
    (["--config", "c.json"], "--config c.json must end in .yaml or .toml"),
    (["--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
    (["--device", "banana"], "device 'banana' is not here"),
]


@pytest.mark.parametrize(("more", "sentence"), REFUSED)
def test_flags_are_judged_before_anything_loads(more, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tpo_lib.cli._one_bar_only", lambda: pytest.fail("it began to load"))
    more = more if "--objectives" in more else ["--objectives", "dpo", *more]
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "--model", "m", "--pairs", "p.jsonl", "--output-dir", "out", *more])
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(capsys):
    for line, sentence in (
        ("--objectives dpo --pairs p", "stage has no model; name one (--model)"),
        ("--model m --pairs p", "objectives are missing; name some of dpo, "),
        ("--model m --objectives dpo", "reward is missing: without pairs they are sampled from the model"),
        ("--model m --objectives dpo --reward r --split x", "split='x' has no effect without pairs"),
        ("--model nowhere/m --pairs p.jsonl --objectives dpo", "nowhere/m"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["compare", "--output-dir", "out", *line.split()])
        assert sentence in capsys.readouterr().err


SPOILT = [
    ("stage: {model: m, modle: x}", "stage has 'modle' ('x'), which is not known; it takes model, reward, "),
    ("stage: {model: m, pairs: null, reward: r, train_prompts: 0}", "train_prompts=0 must be at least 1, where pairs"),
    ("stages: {}", "has 'stages' ({}), which is not known; it takes stage, train, "),
    ("stage: [m]", "stage=['m'] must be names with values"),
    ("seeds: 3", "seeds=3 must be a list"),
    ("seeds: [x]", "seeds.seed='x' must be a whole number"),
    ("evaluations: yes", "evaluations=True must be a whole number"),
    ("evaluations: 0", "evaluations=0 must be at least 1"),
    ("train: {lr: fast}", "train.lr='fast' must be a number"),
    ("train: {batch_size: 2.5}", "train.batch_size=2.5 must be a whole number"),
    ("train: {output_dir: x}", "train has 'output_dir' ('x'), which is not known; it takes optimizer, "),
    ("objectives: [{loss_type: dpo, alpha: 1}]", "dpo has 'alpha' (1), which is not known; it takes "),
    ("objectives: [{beta: 1}]", "objectives has {'beta': 1}; write a name"),
    ("stage: {max_new_tokens: 0}", "stage.max_new_tokens=0 must be at least 1"),
    ("stage: {model: 3}", "stage.model=3 must be a text"),
    ("stage: {sft: {reviews: many}}", "stage.sft.reviews='many' must be a whole number"),
    ("stage: {sft: {reviews: 10}}", "stage.sft: sft needs one batch of 32 reviews"),
    ("stage: {", "cannot be read as yaml: while parsing"),
    ("- a", "holds no settings; it has stage, train, "),
]


@pytest.mark.parametrize(("text", "sentence"), SPOILT)
def test_a_file_is_refused_with_place_key_value_and_what_is_known(text, sentence, tmp_path):
    whole = {"stage": {"model": "m", "pairs": "p"}, "objectives": ["dpo"]}
    (tmp_path / "c.yaml").write_text(text)

    def read():
        content = configs.read(tmp_path / "c.yaml")
        content["stage"] = whole["stage"] | content.get("stage", {})
        return configs.built(whole | content, str(tmp_path / "c.yaml"), TrainConfig())

    with pytest.raises(ValueError, match=r"c\.yaml") as refused:
        read()
    assert sentence in str(refused.value)


def test_labels_say_as_much_as_tells_settings_apart():
    same = {"loss_type": "tdpo2", "alpha": 0.5}
    assert list(labels([TrainConfig(**same)])) == ["tdpo2"]
    assert list(labels([TrainConfig(**same, lr=lr) for lr in (1e-4, 1e-5)])) == [
        "tdpo2 β0.1 α0.5 lr=0.0001",
        "tdpo2 β0.1 α0.5 lr=1e-05",
    ]
    assert list(labels([TrainConfig(beta=beta) for beta in (0.1234, 0.12341)])) == ["dpo β0.1234", "dpo β0.12341"]


def test_a_stage_of_ones_own_serves_the_laboratory(shelf):
    def letters(texts):
        return [float(len(set(text))) for text in texts]

    settings = {"reward": letters, "held_out_prompts": 2, "max_new_tokens": 4, "device": "cpu"}
    made = stage.own_stage(shelf / "model", PAIRS, second_judge=f"{shelf / 'my.py'}:score", **settings)
    assert (len(made.pairs), len(made.held_out_pairs), len(made.held_out_prompts)) == (27, 3, 2)
    lab = Laboratory(made)
    run = lab.train(lab.config("tdpo2", lr=1e-2, updates=2, batch_size=8))
    assert run.evaluation.metrics["reward"].n == run.evaluation.metrics["second_judge"].n == 2
    assert list(lab.runs) == ["tdpo2 β0.1 α0.5"]
    named = stage.own_stage(
        shelf / "model", shelf / "pairs.jsonl", prompts=["fun", "bad"], eval_pairs=PAIRS[:4], **settings
    )
    assert (len(named.pairs), len(named.held_out_pairs), named.held_out_prompts) == (30, 4, ["fun", "bad"])
    with pytest.raises(ValueError, match="without pairs, completions are sampled"):
        stage.own_stage(shelf / "model")
    with pytest.raises(ValueError, match="pairs, row 1"):
        stage.own_stage(shelf / "model", [PAIRS[0], PAIRS[1] | {"chosen": None}])


def test_the_bar_counts_what_was_done_before_and_judges_the_speed_by_this_process(monkeypatch):
    parts = [work.Part("pairs", "", 0, 100), work.Part("dpo", "", 0, 300)]
    bar = work.Bar(parts, shown=True)
    shown = bar.shown
    shown.fp, shown.start_t = io.StringIO(), shown._time() - 10
    bar.at("pairs", 1.0, before=True)
    bar.at("pairs", 1.0)
    bar.at("dpo", 1 / 3, before=True)
    assert (shown.n, shown.initial) == (200, 200)
    bar.at("dpo", 2 / 3)
    bar.at("dpo", 0.5)  # it never goes back
    bar.at("nothing of ours", 1.0)
    assert (shown.n, shown.total) == (300, 400)
    rate = (shown.n - shown.initial) / shown.format_dict["elapsed"]
    assert rate == pytest.approx(10, rel=0.1)
    assert ": 75%|" in str(shown).replace("  ", " ")
    assert "00:10 to go" in str(shown) or "00:09 to go" in str(shown)
    bar.weigh([work.Part("pairs", "", 0, 7), parts[1], work.Part("ipo", "", 0, 100)])
    assert shown.total == 100 + 200 + 100
    bar.close()


def test_the_fine_tuning_reads_its_model_as_the_runs_do(shelf, monkeypatch):
    used, real = [], path.recomputing
    monkeypatch.setattr(path, "recomputing", lambda model: used.append(model) or real(model))
    reviews = {split: {"text": tiny.TEXT * 4} for split in ("train", "test")}
    monkeypatch.setattr(stage, "load_imdb", lambda name: reviews)
    config = config_of(*given(shelf, "--objectives", "dpo")).stage
    config = compare.replace(config, sft=stage.SftConfig(reviews=32, tokens=12, batch_size=16))
    fast = FastPath(checkpointing=True, share_prefix=True)  # a review has nothing to share
    recomputed = stage.build_stage(config, cache_dir=None, fast=fast)
    assert len(used) == 1
    assert recomputed.sft == pytest.approx(stage.build_stage(config, cache_dir=None).sft, rel=1e-4)
    assert len(used) == 1


def test_one_bar_goes_over_fine_tuning_sampling_and_runs(shelf, tmp_path, monkeypatch, capsys):
    """Every share that is told, in order; nothing else draws a bar."""
    told = []
    monkeypatch.setattr(
        work.Bar, "at", lambda self, part, share, before=False: told.append((part, round(share, 2), before))
    )
    where = ["--model", shelf / "model", "--reward", f"{shelf / 'my.py'}:score", "--num-prompts", 6]
    config = config_of(*where, *SMALL, "--objectives", "dpo")
    monkeypatch.setattr(
        stage, "load_imdb", lambda name: {split: {"text": tiny.TEXT * 4} for split in ("train", "test")}
    )
    sft = stage.SftConfig(reviews=32, tokens=12, batch_size=16)
    config = compare.replace(config, stage=compare.replace(config.stage, sft=sft, sampled_together=12))
    compare.run(config, tmp_path / "B")
    assert list(dict.fromkeys(part for part, *_ in told)) == ["fine-tuning", "pairs", "start", "dpo"]
    shares = {part: [share for each, share, before in told if each == part and not before] for part, *_ in told}
    assert shares["fine-tuning"] == [1.0]
    assert shares["pairs"] == [0.33, 0.67, 1.0]
    assert shares["dpo"] == sorted(shares["dpo"])
    assert len(set(shares["dpo"])) > 2
    bars = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "|" in line]
    assert bars
    assert all(" to go" in line for line in bars), bars


def test_the_lengths_of_prompts_are_told_also_where_pairs_have_none(tmp_path):
    tokenizer, config = tiny.tokenizer(tmp_path), SimpleNamespace(evaluation_samples=1)
    made = SimpleNamespace(tokenizer=tokenizer, held_out_prompts=["the film", "a film is"], report=None, config=config)
    made.seen_prompts, made.table = 0, Dataset.from_dict({"prompt": ["", ""]})
    assert compare._data(made)["prompt_tokens"] == {"training": (0, 0, 0), "held-out": (2, 2.5, 3)}
