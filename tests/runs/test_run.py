"""A run is what it was started from: what is recorded, what a resume refuses, what the rest of the house reads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from apart import apart
from safetensors.torch import load_file

from tpo_lib import cli, train
from tpo_lib.config import TrainConfig
from tpo_lib.fast import FastPath
from tpo_lib.files import store
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.models import frozen_copy
from tpo_lib.runs import run
from tpo_lib.runs.run import FORMAT, origin, read_run, shared_prompts

CONFIG = TrainConfig(lr=1e-2, batch_size=4, warmup_steps=1, log_every=1, device="cpu", save_every=1, keep=9)


def fit(folder: Path, *, resume: bool = False, changes: dict | None = None, **models) -> train.TrainResult:
    """A guided run of four updates, evaluated once; `changes` are settings, `models` arguments of `run.fit`."""
    config = replace(CONFIG, loss_type="tgdpo", guide_beta=0.1, epochs=2, eval_every=4, output_dir=str(folder))
    given = {
        "policy": tiny.llama(),
        "reference": frozen_copy(tiny.llama()),
        "guide": partial(tiny.llama, seed=1),
        "pairs": tiny.pairs(8),
        "eval_pairs": tiny.pairs(4, seed=9),
    }
    given |= models
    return run.fit(replace(config, **changes or {}), **given, resume=resume, progress=False)


def cut(folder: Path, step: int = 2) -> None:
    """Leave of a run what it had after `step` updates."""
    shutil.rmtree(folder / "final")
    for late in sorted((folder / "checkpoints").iterdir())[step:]:
        shutil.rmtree(late)


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "run"
    fit(folder)
    cut(folder)
    return folder


def test_resumed_with_what_it_was_started_from_it_ends_the_same(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    resumed, whole = fit(tmp_path / "run", resume=True), fit(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True))
    assert resumed.metrics == whole.metrics


def test_a_resume_loads_reference_and_guide_once(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    loaded = []

    def load(seed: int):
        loaded.append(seed)
        return tiny.llama(seed)

    fit(tmp_path / "run", resume=True, reference=partial(load, 0), guide=partial(load, 1))
    assert loaded == [0, 1]


@pytest.mark.parametrize("reader", [tiny.llama, lambda: tiny.llama], ids=["in memory", "loaded"])
def test_a_guide_that_is_the_reference_is_refused(reader, tmp_path):
    with pytest.raises(ValueError, match="the guide has the reference's weights"):
        fit(tmp_path / "run", guide=reader())


OTHERS = {
    "start model": ({"policy": lambda: tiny.llama(seed=4)}, r"start model was one in memory \(sha256 \w{12}\), is"),
    "architecture": ({"policy": lambda: altered(tiny.llama(), rms_norm_eps=0.1)}, "start model was"),
    "reference": ({"reference": lambda: tiny.llama(seed=4)}, "reference was"),
    "reference, as a function": ({"reference": lambda: partial(tiny.llama, seed=4)}, "reference was"),
    "guide": ({"guide": lambda: tiny.llama(seed=4)}, "guide was"),
    "more pairs": ({"pairs": lambda: tiny.pairs(20)}, r"training pairs was 8 \(sha256 \w{12}\), is 20 \("),
    "other pairs": ({"pairs": lambda: tiny.pairs(8, seed=1)}, "training pairs was 8"),
    "other response": (
        {"pairs": lambda: [*tiny.pairs(8)[:7], replace(tiny.pairs(8)[7], chosen_ids=[3])]},
        "training p",
    ),
    "order": ({"pairs": lambda: tiny.pairs(8)[::-1]}, "training pairs was 8"),
    "held-out pairs": ({"eval_pairs": lambda: tiny.pairs(5, seed=9)}, "held-out pairs was 4"),
    "no held-out pairs": ({"eval_pairs": lambda: None}, r"held-out pairs was 4 .*, is 0 \("),
}


def altered(model, **settings):
    model.config.update(settings)
    return model


@pytest.mark.parametrize("what", OTHERS)
def test_a_resume_with_something_else_is_refused_by_name(what, half, tmp_path):
    models, message = OTHERS[what]
    shutil.copytree(half, tmp_path / "run")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    with pytest.raises(RuntimeError, match=rf"cannot resume .*run: {message}.*another --output-dir to start anew"):
        fit(tmp_path / "run", resume=True, **{name: make() for name, make in models.items()})
    assert {path: path.read_bytes() for path in before} == before


def test_all_that_differs_is_named_at_once(half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    models = {"policy": tiny.llama(seed=4), "reference": tiny.llama(seed=4), "guide": tiny.llama(seed=5)}
    with pytest.raises(RuntimeError) as caught:
        fit(tmp_path / "run", resume=True, changes={"beta": 0.2, "precision": "bf16"}, pairs=tiny.pairs(9), **models)
    for words in (
        "beta was 0.1, is 0.2; ",
        "start model",
        "training pairs",
        "reference",
        "guide",
        "precision was 'no'",
    ):
        assert words in str(caught.value)


def test_another_precision_of_the_device_is_refused_and_its_name_is_not(half, tmp_path):
    """None means float32 here and bf16 on another device: what counts is what it comes to."""
    shutil.copytree(half, tmp_path / "run")
    with pytest.raises(RuntimeError, match="precision was 'no', is 'bf16'"):
        fit(tmp_path / "run", resume=True, changes={"precision": "bf16"})
    fit(tmp_path / "run", resume=True, changes={"precision": "no"})


def test_a_device_that_only_imitates_bf16_is_told_of(tmp_path, monkeypatch, capsys):
    for real, told in (("bf16", False), ("fp16", True)):
        monkeypatch.setattr(run, "choose_precision", lambda device, real=real: real)
        fit(tmp_path / real, changes={"precision": "bf16"})
        assert ("only imitates bf16, which is slow: --precision fp16" in capsys.readouterr().err) == told


def test_another_tokenizer_is_refused(tmp_path):
    one, other = tiny.tokenizer(tmp_path / "one"), tiny.tokenizer(tmp_path / "other")
    fit(tmp_path / "run", tokenizer=one)
    fit(tmp_path / "run", tokenizer=other, resume=True)  # the same from another place
    other.chat_template = "{{ messages }}"
    with pytest.raises(RuntimeError, match=r"tokenizer was one in memory \(sha256 \w+\), is one"):
        fit(tmp_path / "run", tokenizer=other, resume=True)


def test_adapters_are_held_to_their_base_and_to_their_own_start(tmp_path):
    pytest.importorskip("peft", reason="extra peft is not installed")
    from tpo_lib.files.adapters import add_lora

    def lora(seed: int = 0, start: int = 0):
        base = tiny.llama(seed)
        return add_lora(base, 2, seed=start)

    changes = {"lora_rank": 2}
    fit(tmp_path / "run", policy=lora(), changes=changes)
    cut(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"run: adapter base was .*\)\. Resume with"):
        fit(tmp_path / "run", policy=lora(seed=4), changes=changes, resume=True)
    with pytest.raises(RuntimeError, match=r"run: start adapter was .*\)\. Resume with"):
        fit(tmp_path / "run", policy=lora(start=1), changes=changes, resume=True)
    assert fit(tmp_path / "run", policy=lora(), changes=changes, resume=True).steps == 4


def test_caches_that_spare_the_reference_still_hold_it_to_account(tmp_path):
    fast = FastPath(cache_dir=str(tmp_path / "caches"))
    fit(tmp_path / "run", fast=fast)
    cut(tmp_path / "run")
    with pytest.raises(RuntimeError, match="run: guide was"):
        fit(tmp_path / "run", fast=fast, guide=partial(tiny.llama, seed=4), resume=True)
    assert read_run(tmp_path / "run").reference["sha256"] == origin(tiny.llama())["sha256"]


@pytest.mark.parametrize("place", [".", "final", "start", "checkpoints/step-00000003"])
def test_what_a_run_was_started_from_can_be_read(place, tmp_path, monkeypatch):
    start = tiny.checkpoint_folder(tmp_path / "llama")
    other = tiny.checkpoint_folder(tmp_path / "other", partial(tiny.llama, 3))
    guide = tiny.checkpoint_folder(tmp_path / "guide", partial(tiny.llama, 4))
    monkeypatch.chdir(tmp_path)
    pairs = [replace(pair, prompt_ids=[0, 5, *pair.prompt_ids]) for pair in tiny.pairs(7)]
    pairs.append(replace(pairs[0], row=7, chosen_ids=[9]))  # a prompt may have several pairs
    fit(tmp_path / "run", policy=load_model("llama"), reference=partial(load_model, "other"), pairs=pairs,
        guide=partial(load_model, "guide"), tokenizer=load_tokenizer("llama"))  # fmt: skip
    monkeypatch.chdir("/")  # what was named from another folder is found all the same
    found = read_run(tmp_path / "run" / place)
    assert (found.config.loss_type, found.config.guide_beta) == ("tgdpo", 0.1)
    assert found.model == {"name": str(start), "sha256": origin(load_model(start))["sha256"]}
    assert found.reference == {"name": str(other), "sha256": origin(load_model(other))["sha256"]}
    assert found.start["guide"] == {"name": str(guide), "sha256": origin(load_model(guide))["sha256"]}
    assert len({each["sha256"] for each in (found.model, found.reference, found.start["guide"])}) == 3
    assert found.start["tokenizer"]["name"] == str(start)
    assert found.start["training pairs"]["count"] == 8
    assert found.prompts() == sorted(pair.prompt_ids for pair in pairs[:7])


def test_a_folder_that_is_no_run_is_none(tmp_path):
    assert read_run(tiny.checkpoint_folder(tmp_path / "llama")) is None
    assert read_run("openai-community/gpt2") is None


def test_records_of_before_hyperparameters_were_one_mapping_are_read(tmp_path):
    old = {"loss_type": "tdpo2", "beta": 0.2, "alpha": 0.5, "gamma": None, "shaping": None, "extra": {}, "lr": 1e-3}
    (tmp_path / "training.json").write_text(json.dumps({"format": 2, **old, "start": {}}))
    assert read_run(tmp_path).config == TrainConfig(loss_type="tdpo2", beta=0.2, alpha=0.5, lr=1e-3)


def test_without_a_reference_of_its_own_a_run_is_compared_with_its_start(tmp_path):
    config = replace(CONFIG, loss_type="simpo", output_dir=str(tmp_path / "run"))
    run.fit(config, tiny.llama(), None, tiny.pairs(8), progress=False)
    found = read_run(tmp_path / "run")
    assert "reference" not in found.start
    assert found.reference == origin(tiny.llama())


def test_altered_prompts_are_refused_and_those_of_another_run_are_not_believed(tmp_path):
    for name, count in (("one", 8), ("two", 12)):
        fit(tmp_path / name, pairs=tiny.pairs(count))
    shutil.rmtree(tmp_path / "one" / "start")
    assert read_run(tmp_path / "one").prompts() is None
    shutil.copytree(tmp_path / "two" / "start", tmp_path / "one" / "start")
    assert read_run(tmp_path / "one").prompts() is None
    path = tmp_path / "two" / "start" / "prompts.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(store.CheckpointError, match=r"prompts\.safetensors was truncated or altered"):
        read_run(tmp_path / "two").prompts()


def rewrite(folder: Path, **changes) -> None:
    """Change a checkpoint's training.json as another version would have written it: with a manifest that fits."""
    path = folder / "training.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    manifest = json.loads((folder / store.MANIFEST).read_text())
    (folder / store.MANIFEST).write_text(json.dumps(manifest | {path.name: store.sha256_file(path)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": ..., "start": ...}, "written before runs recorded .*format 1.* --output-dir"),
        ({"format": FORMAT + 1}, f"training.json was written by another version: it has format {FORMAT + 1}"),
        ({"label_smoothing": 0.1, "zeta": 1}, "it has the settings label_smoothing, zeta, which this one"),
    ],
)
def test_checkpoints_of_other_versions_are_refused(changes, message, half, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    rewrite(tmp_path / "run" / "checkpoints" / "step-00000002", **changes)
    with pytest.raises((RuntimeError, ValueError), match=message):
        fit(tmp_path / "run", resume=True)


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default_and_what_is_none_any_more_is_passed_over(
    half, tmp_path
):
    was = {"share_prefix": True, "fused": False, "cache_dir": "caches"}
    shutil.copytree(half, tmp_path / "run")
    rewrite(tmp_path / "run" / "checkpoints" / "step-00000002", weight_decay=..., clip=..., **was)
    with pytest.raises(RuntimeError, match=r"run: clip was 10\.0, is 1\.0\. Resume"):
        fit(tmp_path / "run", resume=True, changes={"clip": 1.0})
    assert fit(tmp_path / "run", resume=True).steps == 4


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_record_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "training.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"training\.json cannot be read"):
        read_run(tmp_path)


def test_shared_prompts_are_equal_ones_beginnings_and_continuations():
    training = ["056", "07", "3"]
    held_out = ["056", "05", "0789", "06", "56", "0", "3", "34", "", "057"]
    assert shared_prompts(training, held_out) == [0, 1, 2, 6]
    assert shared_prompts([], held_out) == []


# Ends before the end ------------------------------------------------------------------------------------------------


def plain(folder: Path | None, callbacks=(), *, resume: bool = False, **changes) -> train.TrainResult:
    """Eight updates that log every third and evaluate every fourth; checkpoints at the end alone."""
    settings = {"loss_type": "tdpo2", "epochs": 4, "log_every": 3, "eval_every": 4, "save_every": 100} | changes
    config = replace(CONFIG, output_dir=folder and str(folder), **settings)
    models = {"policy": tiny.llama(), "reference": frozen_copy(tiny.llama()), "pairs": tiny.pairs(8)}
    more = {"eval_pairs": tiny.pairs(4, seed=9), "callbacks": list(callbacks)}
    return run.fit(config, **models, **more, resume=resume, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> train.TrainResult:
    return plain(tmp_path_factory.mktemp("whole") / "run")


def assert_same(one: train.TrainResult, other: train.TrainResult) -> None:
    assert one.metrics == other.metrics
    assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True))


def checkpoints(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in sorted((folder / "checkpoints").iterdir())]


@pytest.mark.parametrize("save_every", [1, 2, 5])
def test_rows_are_the_same_wherever_a_run_was_saved(save_every, whole, tmp_path):
    """Saved between two rows, what the next one averages over is saved too."""
    plain(tmp_path / "run", save_every=save_every)
    cut(tmp_path / "run", -1)
    resumed = plain(tmp_path / "run", save_every=save_every, resume=True)
    assert_same(resumed, whole)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (whole.output_dir / "metrics.jsonl").read_text()


def fail_at(step: int, error: BaseException, monkeypatch) -> None:
    """Let the forward pass of update `step` (from 1) raise."""
    score = train.score

    def failing(*args, **kwargs):
        if kwargs.get("step") == step:
            raise error
        return score(*args, **kwargs)

    monkeypatch.setattr(train, "score", failing)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_what_was_trained_when_something_fails_is_saved(step, error, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fail_at(step, error, patch)
        with pytest.raises(type(error)):
            plain(tmp_path / "run")
    if step > 1:
        assert checkpoints(tmp_path / "run") == [step - 1]
        assert f"run: saved after update {step - 1}; continue with --resume" in capsys.readouterr().err
    assert_same(plain(tmp_path / "run", resume=True), whole)


def test_a_callback_that_fails_is_called_again(whole, tmp_path):
    calls = []

    def callback(step: int, policy) -> None:
        calls.append(step)
        if calls == [0, 4]:
            raise ValueError("no room for an evaluation")

    with pytest.raises(ValueError, match="no room"):
        plain(tmp_path / "run", [callback])
    assert checkpoints(tmp_path / "run") == [4]
    assert_same(plain(tmp_path / "run", [callback], resume=True), whole)
    assert calls == [0, 4, 4, 8]


def test_half_an_update_is_not_saved(tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def half(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.add_(1)
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(KeyboardInterrupt):
        plain(tmp_path / "run", save_every=1)
    assert checkpoints(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("moving", [False, True], ids=["between", "within an update"])
def test_sigterm_saves_and_goes_on_to_whom_it_was_sent(moving, whole, tmp_path, monkeypatch):
    """Within the optimizer's step the signal waits until weights and step belong together."""
    taken = []
    before = signal.signal(signal.SIGTERM, lambda *_: taken.append(checkpoints(tmp_path / "run")))
    try:
        if moving:
            step = torch.optim.AdamW.step
            calls = []

            def terminated(self, *args, **kwargs):
                calls.append(1)
                if len(calls) == 4:
                    signal.raise_signal(signal.SIGTERM)
                return step(self, *args, **kwargs)

            monkeypatch.setattr(torch.optim.AdamW, "step", terminated)
        with pytest.raises(run.Terminated):
            plain(
                tmp_path / "run", [] if moving else [lambda step, _: step == 4 and signal.raise_signal(signal.SIGTERM)]
            )
        assert taken == [[4]]
        ours = signal.getsignal(signal.SIGTERM)
        assert ours.__name__ == "<lambda>"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert_same(plain(tmp_path / "run", resume=True), whole)


def test_outside_the_main_thread_a_run_leaves_signals_alone(whole):
    with ThreadPoolExecutor(1) as pool:
        assert_same(pool.submit(plain, None).result(), whole)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def poison(step: int, policy) -> None:
        if step == 4:
            policy.model.norm.weight.data[3] = torch.inf

    with pytest.raises(
        train.NonFiniteLoss, match=r"step 4: the weights of .*model\.norm\.weight are not finite.*learning rate"
    ):
        plain(tmp_path / "run", [poison], save_every=2)
    assert checkpoints(tmp_path / "run") == [2]
    with pytest.raises(train.NonFiniteLoss, match="held-out pairs: no finite loss"):
        plain(None, max_steps=1, lr=3e38, optimizer="rmsprop", warmup_steps=0, schedule="constant", precision="no")
    assert plain(tmp_path / "run", save_every=2, resume=True).steps == 8


def test_held_out_pairs_are_scored_at_the_end_without_being_asked_for_on_the_way(whole):
    seen = []
    result = plain(None, [lambda step, _: seen.append(step)], eval_every=0)
    assert [row["step"] for row in result.metrics if "eval_loss" in row] == seen[1:] == [8]
    assert result.metrics[-1] == whole.metrics[-1]


@pytest.mark.parametrize("changes", [{"format": 3}, {"format": 2, "zeta": 1}, {"format": ...}])
def test_a_state_of_another_version_is_refused(changes, tmp_path):
    store.save_state(tmp_path / "state", {"step": 1})
    path = tmp_path / "state.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    with pytest.raises(store.CheckpointError, match=r"state\.json has format \d, this version reads 2"):
        store.load_state(tmp_path / "state")


# accelerate ---------------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_process_may_have_another_precision(whole):
    """Also after a run that failed; and accelerate's state is left as it was found."""
    from accelerate import Accelerator

    mine = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    bf16 = plain(None, precision="bf16")
    assert bf16.metrics != whole.metrics
    with pytest.raises(ZeroDivisionError):
        plain(None, [lambda step, _: step / 0 if step == 4 else None], precision="bf16")
    assert_same(plain(None, precision="no"), whole)
    assert plain(None, precision="bf16").metrics == bf16.metrics
    assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "4", True),
        ("MIXED_PRECISION", "bf16", True),
        ("DYNAMO_BACKEND", "INDUCTOR", True),
        ("DOWNCAST_BF16", "1", False),
        ("MIXED_PRECISION", "no", False),
        ("DYNAMO_BACKEND", "NO", False),
    ],
)
def test_the_environment_does_not_change_the_mathematics(name, value, told, whole, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert_same(plain(None), whole)
    assert (f"ACCELERATE_{name}={value} is not used" in capsys.readouterr().err) == told


def test_another_device_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    with pytest.raises(ValueError, match=r"the run is on device cpu, accelerate on meta: unset"):
        plain(None)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "where", "status", "line"),
    [
        (signal.SIGINT, "torch", 130, "interrupted before anything was done"),
        (
            signal.SIGINT,
            "tpo_course.derivations",
            130,
            "interrupted; the same command continues where it was (train: add --resume; run, compare: leave out --fresh)",
        ),
        (
            signal.SIGTERM,
            "tpo_course.derivations",
            143,
            "terminated; the same command continues where it was (train: add --resume; run, compare: leave out --fresh)",
        ),
    ],
)
def test_a_command_that_is_stopped_says_one_line(number, where, status, line):
    """The signal comes while a module is imported: torch before the command line is there, another within a command."""
    code = f"""
        import builtins, os, runpy, sys
        real = builtins.__import__
        def importing(name, *args, **kwargs):
            if name == {where!r}:
                os.kill(os.getpid(), {int(number)})
            return real(name, *args, **kwargs)
        builtins.__import__ = importing
        sys.argv[1:] = ["derive", "dpo"]
        runpy.run_module("tpo_lib", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert done.stderr.startswith(line)


def terminated(arguments: list[str]) -> None:
    score = train.score

    def scored(*args, **kwargs):
        if kwargs["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    train.score = scored
    cli.main(arguments)


def test_train_saves_before_it_leaves_on_sigterm(tmp_path):
    """The whole way: a command that gets SIGTERM from outside, status 143, and a resume that ends like any other run."""
    rows = [{"prompt": f"the film {i} is", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny.checkpoint_folder(tmp_path / "llama"))
    where = ["--model", model, "--pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu", "--batch-size", "4"]
    status, told = apart(terminated, ["train", *where, "--output-dir", str(tmp_path / "run")])
    assert status == 143, told
    assert "run: saved after update 2; continue with --resume" in told
    assert told.splitlines()[-1].startswith("terminated; the same command continues")
    cli.main(["train", *where, "--output-dir", str(tmp_path / "run"), "--resume"])
    cli.main(["train", *where, "--output-dir", str(tmp_path / "whole")])
    one, other = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Overflowing(torch.amp.GradScaler):
    """A loss scaler on the CPU, where fp16 has none: the gradients of the first so many updates overflow."""

    def __init__(self, updates: int) -> None:
        super().__init__("cpu", init_scale=4.0)
        self.left = updates

    def scale(self, outputs):
        return super().scale(outputs) * (torch.inf if self.left > 0 else 1.0)

    def update(self, *arguments) -> None:
        self.left -= 1
        super().update(*arguments)


@pytest.mark.parametrize(("overflows", "shares", "places"), [(0, [0.0, 0.0], None), (3, [1.0, 0.5], "[2, 4]")])
def test_updates_that_a_loss_scaler_skips_are_counted_and_told(
    tmp_path, monkeypatch, capsys, overflows, shares, places
):
    real = run.Run.__init__

    def with_scaler(self, *arguments) -> None:
        real(self, *arguments)
        self.accelerator.scaler = Overflowing(overflows)

    monkeypatch.setattr(run.Run, "__init__", with_scaler)
    fit(tmp_path / "run", changes={"log_every": 2})
    rows = [row for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["skipped"] for row in rows] == shares
    assert (rows[0]["grad_norm"] is None) == (overflows > 0)
    steps = {store.load_state(path / "state")["optimizer"]["state"][0]["step"].item()
             for path in (tmp_path / "run/checkpoints").glob("*4")}  # fmt: skip
    assert steps == {4 - overflows}  # updates that were made
    said = capsys.readouterr().err
    if places:
        assert f"fp16: between the rows of steps {places} and those before them updates were skipped (metric" in said
    else:
        assert "skipped" not in said
