"""Two processes train as one does: whole copies (DDP) and shards (FSDP2), on CPUs by gloo; no GPU has been tried."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from apart import FSDP2, apart, together
from safetensors.torch import load_file

from tpo_lib import train
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.fast import FastPath, memory, pair_loss
from tpo_lib.files.load import load_model
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs import processes, runs
from tpo_lib.runs.accelerated import accelerated
from tpo_lib.runs.run import fit, read_run

CONFIG = TrainConfig(lr=1e-3, warmup_steps=1, log_every=2, eval_every=3, device="cpu", max_steps=5, keep=9)
ONE, TWO = {"batch_size": 4}, {"batch_size": 1, "accumulation": 2}  # an update of four pairs, in two passes each
UNTIED = partial(tiny.family, "llama", tie_word_embeddings=False)
VARIANTS = {name: {"loss_type": name} for name in OBJECTIVES} | {
    "untied": {"loss_type": "tdpo2", "build": UNTIED},
    "biased head": {"loss_type": "tgdpo", "build": tiny.gptj, "optimizer": "rmsprop"},
    "textbook": {"loss_type": "tdpo1", "fast": FastPath(fused=False)},
    "checkpointing": {"loss_type": "dpo", "fast": FastPath(checkpointing=True), "build": UNTIED},
    "shared": {"loss_type": "tdpo2", "fast": FastPath(share_prefix=True), "group_prompts": True, "build": UNTIED},
    "bf16": {"loss_type": "dpo", "precision": "bf16"},
    "lora": {"loss_type": "tgdpo", "lora_rank": 2, "build": UNTIED},
}


def trained(folder: Path, variant: str, settings: dict, **more):
    """A run of a variant, every model loaded in every process."""
    settings = {"build": tiny.llama, "fast": None, **VARIANTS[variant], **settings}
    build, fast = settings.pop("build"), settings.pop("fast")
    if settings["loss_type"] == "tgdpo":
        settings["guide_beta"] = 0.1
    config = replace(CONFIG, **{"output_dir": str(folder)} | settings)
    start = build()
    reference = start if config.lora_rank else build(seed=3)
    policy = (
        runs.new_policy(config, start.requires_grad_(False))
        if config.lora_rank
        else frozen_copy(start).requires_grad_(True)
    )
    pairs = tiny.of_prompts(4) if config.group_prompts else tiny.pairs(24)
    models = {"guide": partial(build, seed=1), "eval_pairs": tiny.pairs(3, seed=5), "fast": fast, "progress": False}
    return fit(config, policy, reference, pairs, **models | more)


def all_of_them(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    for variant in VARIANTS:
        trained(folder / f"{variant}-of-{rank}", variant, TWO)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "sharded"])
def pair(request, tmp_path_factory) -> Path:
    """The runs of two processes, each of which was given a folder of its own."""
    folder = tmp_path_factory.mktemp("two")
    for status, said, told in together(all_of_them, folder, sharded=request.param):
        assert status == 0, told[-3000:]
        (folder / "said").write_text(said + told)  # of the second one
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for variant in VARIANTS:
        trained(folder / variant, variant, ONE)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_alike(found: Path, expected: Path, aside: set[str]) -> None:
    """The same metrics under the same names but those `aside`, losses to 1e-5, and final weights to 1e-4."""
    for row, other in zip(rows_of(found), rows_of(expected), strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - aside:
            close = 1e-5 if name.endswith("loss") else 1e-4
            assert row[name] == pytest.approx(other[name], rel=close, abs=close), (row["step"], name)
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "bf16"])
def test_two_processes_train_as_one_does(variant, pair, alone):
    found = pair / f"{variant}-of-0"
    aside = {"padding"}  # which there is depends on how an update is cut
    if variant == "lora":  # the policy is its reference at first: the sign of a margin there is one of rounding
        aside.add("rewards/accuracies")
    assert_alike(found, alone / variant, aside)
    files = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        for run in (found, alone / variant)
    ]
    assert files[0] == files[1]


def test_in_bf16_weights_stay_float32(pair, alone):
    """Shards are gathered in bf16: numbers are near those of autocast, and what is saved is not rounded to it."""
    found = rows_of(pair / "bf16-of-0")
    for row, other in zip(found, rows_of(alone / "bf16"), strict=True):
        assert {name for name in row if "loss" in name} == {name for name in other if "loss" in name}
        for name in row.keys() & {"loss", "eval_loss", "logps/chosen", "kl/chosen", "eval_kl/rejected"}:
            assert row[name] == pytest.approx(other[name], rel=0.05), (row["step"], name)
    for name, value in load_file(pair / "bf16-of-0" / "final" / "model.safetensors").items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()), name


def test_the_main_process_alone_writes_and_speaks(pair):
    assert not list(pair.glob("*-of-1"))
    assert (pair / "said").read_text() == ""


# Kills ---------------------------------------------------------------------------------------------------------------

LONG = {"epochs": 2, "max_steps": 8, "save_every": 1}


def stretch(rank: int, folder: Path, cut: dict, last: int) -> None:
    """Go on with a run, and die at the row of an update, before its checkpoint."""

    def die(row: dict) -> None:
        if row["step"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(folder, "tgdpo", cut | LONG, resume=True, on_log=die)


def test_a_run_is_killed_and_goes_on_in_other_numbers_of_processes(tmp_path):
    """In one, in two with shards, in two with whole copies, and in one again: rows go over each seam."""
    folder = tmp_path / "run"
    assert apart(stretch, 0, folder, ONE, 2)[0] == -signal.SIGKILL
    for sharded, last in ((True, 4), (False, 6)):
        ended = together(stretch, folder, TWO, last, sharded=sharded)
        assert [status for status, *_ in ended] == [-signal.SIGKILL] * 2, ended
        assert rows_of(folder)[-1]["step"] == last
    with pytest.raises(RuntimeError, match=r"cannot resume .*: pairs per update was 4, is 8\. "):
        trained(folder, "tgdpo", LONG | {"batch_size": 8}, resume=True)
    trained(folder, "tgdpo", LONG | ONE, resume=True)
    trained(tmp_path / "whole", "tgdpo", LONG | ONE)
    assert_alike(folder, tmp_path / "whole", {"padding"})


# Launching, and what is refused ---------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def test_the_command_line_is_launched_by_the_file_for_shards(tmp_path):
    """Two CPU processes in the place of its eight GPUs: they train the guide, then the policy by it."""
    model = tiny.checkpoint_folder(tmp_path / "model", UNTIED)
    rows = [{"prompt": "the film", "chosen": f" is good {i}", "rejected": f" is bad {i}"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"]
    train = [
        "-m",
        "tpo_lib",
        "train",
        "--device",
        "cpu",
        "--model",
        str(model),
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
    ]
    train += ["--loss-type", "tgdpo", "--batch-size", "2", "--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launch, "--main_process_port", "0", *train]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained 2 updates") == done.stderr.count("8 pairs") == 1
    record = read_run(tmp_path / "run")
    assert (record.start["processes"], record.start["pairs per update"]) == (2, 4)
    assert record.start["guide"]["name"] == str(tmp_path / "run" / "guide" / "final")
    before, after = (load_model(folder) for folder in (model, tmp_path / "run"))
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_say_what_they_are_for(path, monkeypatch):
    """Read by accelerate itself, and by ours as accelerate's launcher hands them on."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(path))
    assert config.distributed_type.value == ("MULTI_GPU" if path.stem == "ddp" else "FSDP")
    assert (config.num_machines, config.num_processes) == ((8, 64) if path.stem == "multi_node" else (1, 8))
    with monkeypatch.context() as patched:
        args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "tpo_lib"])
        args, *_ = _validate_launch_command(args)
        for name, value in prepare_multi_gpu_env(args).items():
            patched.setenv(name, value)
        assert processes.sharding() == (path.stem != "ddp")
        if processes.sharding():
            plugin = processes._fsdp2("bf16")
            assert plugin.reshard_after_forward
            assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "FSDP, version 1, which flattens the weights"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "take fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP alone"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "take fsdp_cpu_ram_efficient_loading: false alone"),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "true",
            r"take fsdp_activation_checkpointing: false \(--checkpointing does it\)",
        ),
        ("FSDP_OFFLOAD_PARAMS", "true", "take fsdp_offload_params: false alone"),
    ],
)
def test_what_shards_cannot_keep_to_is_refused(name, value, told, monkeypatch, tmp_path):
    for each, said in {**FSDP2, name: value}.items():
        monkeypatch.setenv(each, said)
    with pytest.raises(ValueError, match=told):
        trained(tmp_path, "dpo", ONE)


def test_fp16_is_refused_over_shards(monkeypatch):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"fp16 scales its losses.* take --precision bf16 or no"):
        processes._fsdp2("fp16")


def cut(rank: int, folder: Path) -> None:
    """What two processes keep of a policy and its reference, beside `memory.step_memory`; then what they refuse."""
    config = replace(CONFIG, loss_type="tdpo2", output_dir=str(folder))
    with accelerated(config) as accelerator:
        frozen = accelerator.place(ResponseReader(UNTIED(seed=3)))
        scorer = train.PairScorer(config, ResponseReader(UNTIED()), pair_loss)
        scorer, optimizer = accelerator.prepare(scorer, train.build_optimizer(config, scorer.policy.model))
        model, shape = scorer.policy.model, memory.from_config(scorer.policy.model.config)
        kept = memory.step_memory(shape, length=8, pairs=2, objective="tdpo2", shards=2)
        assert accelerator.is_fsdp2
        with accelerator.no_sync(scorer):  # not the last pass of an update
            output, _ = train.score(scorer, {"ref": frozen}, collate(tiny.pairs(2)), accelerator, logged=True)
            accelerator.backward(output.loss.sum())
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        for name, tensors in (
            ("weights", model.parameters()),
            ("gradients", [p.grad for p in model.parameters()]),
            ("optimizer", states),
        ):
            assert 4 * sum(x.to_local().numel() for x in tensors) == kept.parts[name], name
        whole = [p for p in frozen.__self__.parameters() if not hasattr(p, "to_local")]  # and ready for its head
        assert sum(p.numel() for p in whole) == shape.root
        assert train.not_finite(model) is None
        name, weight = next(iter(model.named_parameters()))
        if rank == 1:
            weight.to_local().data[-1, -1] = float("nan")
        assert train.not_finite(model) == name  # in the process too that does not have it
    refused(rank, folder)


def refused(rank: int, folder: Path) -> None:
    """Each by one sentence, in both processes, before anything is written."""
    for told, settings, more in (
        ("max_tokens .*, processes would make different numbers of passes", {"max_tokens": 64}, {}),
        ("cache_dir .*, one process would read a model of which it has a shard", {"fast": FastPath(cache_dir="x")}, {}),
        ("callbacks, they would be given a shard", {}, {"callbacks": [print]}),
        ("leaves its model in a folder alone", {"output_dir": None}, {}),
        ("LlamaForCausalLM has no layers that are known", {}, {}),
    ):
        if "no layers" in told:
            os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Another"
        with pytest.raises(ValueError, match=told):
            trained(folder, "sft", TWO | settings, **more)


def test_what_is_cut_and_what_shards_do_without(tmp_path):
    for status, _, told in together(cut, tmp_path / "run", sharded=True):
        assert status == 0, told[-3000:]
    assert not list(tmp_path.glob("run/final")) + list(tmp_path.glob("run/checkpoints"))


def test_one_process_has_nothing_to_shard(monkeypatch, tmp_path):
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    trained(tmp_path / "asked", "dpo", ONE)
    for name in FSDP2:
        monkeypatch.delenv(name)
    trained(tmp_path / "plain", "dpo", ONE)
    assert rows_of(tmp_path / "asked") == rows_of(tmp_path / "plain")
