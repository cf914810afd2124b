"""Tensors are where their models are: on a device that is no CPU (stand_in.py) everything runs, and gives the CPU's numbers.

Each test is a process of its own, since torch keeps a device that was registered.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in
import tiny
import torch
from apart import apart
from stand_in import DEVICE, WrongDevice, watched

from tpo_lib import cli, pairing, train
from tpo_lib.config import TrainConfig
from tpo_lib.fast import FastPath
from tpo_lib.fast.prefix import SharedReader
from tpo_lib.files import adapters
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.rewards import ClassifierReward
from tpo_lib.runs import prompts, runs, sft
from tpo_lib.runs.accelerated import accelerated
from tpo_lib.runs.lab import Laboratory
from tpo_lib.runs.run import fit
from tpo_lib.runs.stage import own_stage
from tpo_lib.sampling import generate

CONFIG = TrainConfig(batch_size=3, accumulation=2, lr=1e-2, warmup_steps=0, precision="no", max_steps=2, log_every=1)
PAIRS, HELD_OUT = tiny.of_prompts(3), tiny.pairs(4, seed=9)
TEXTS = ["a good film", "the plot", "a fine, fine cast"]


def on_the_device(function, *arguments) -> None:
    status, text = apart(_installed, function, arguments)
    assert status == 0, text


def _installed(function, arguments) -> None:
    stand_in.install()
    # before a run moves a policy, four tokens tell what follows its head; at its end, adapters are merged where there is room
    for owner, name in ((ResponseReader, "_probe"), (SharedReader, "_check"), (adapters, "merged")):
        setattr(owner, name, stand_in.unwatched(getattr(owner, name)))
    function(*arguments)


def both(function) -> None:
    """The same numbers on the device, where no model may compute on the CPU, and on the CPU."""
    with watched():
        found = function(DEVICE)
    expected = function("cpu")
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        # on a CPU, batches are cut otherwise
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4), f"{a} on the device, {b} on the CPU"


def refuses(call) -> None:
    with pytest.raises(WrongDevice):
        call()


def the_stand_in() -> None:
    there, here = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 3)
    rows = torch.tensor([1, 0])
    assert (there + 1).cpu().equal(here + 1)
    assert (there + torch.tensor(1.0)).tolist() == [[1.0] * 3] * 2  # a number may come from anywhere
    assert there[rows].device == there.device
    model = tiny.llama().to(DEVICE)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for call in (
        lambda: there + here,
        lambda: here + there,
        lambda: here[rows.to(DEVICE)],
        lambda: there.masked_fill(here == 0, 1.0),
        lambda: torch.stack([there.sum(), here.sum()]),
        lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()),
        lambda: there.index_put_((rows,), here),
        lambda: there.copy_(here).mm(here.T),
    ):
        refuses(call)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with watched():
        refuses(lambda: tiny.llama()(torch.tensor([[1, 2]])))


def test_the_stand_in_refuses_what_a_gpu_refuses():
    on_the_device(the_stand_in)


# ---- training


def trained(device: str, loss_type: str = "tgdpo", fast: FastPath | None = None, how=fit, **changes) -> list[dict]:
    config = replace(CONFIG, loss_type=loss_type, device=device, **changes)
    start = frozen_copy(tiny.llama())  # on the CPU: the run moves all
    needs, said = OBJECTIVES[loss_type].needs, {"eval_pairs": HELD_OUT, "progress": False}
    config = replace(config, guide_beta=0.1) if "guide_logps" in needs else config
    said |= {"fast": fast} if fast else {}
    frozen = {"reference": start, "guide": frozen_copy(tiny.llama(1)) if "guide_logps" in needs else None}
    if fast and fast.cache_dir:
        said["fast"] = replace(fast, cache_dir=f"{fast.cache_dir}/{device}")
        frozen = {name: model and (lambda model=model: model) for name, model in frozen.items()}
    made = how(config, runs.new_policy(config, start), pairs=PAIRS, **frozen, **said)
    assert {p.device.type for p in made.policy.parameters()} == {device}
    ties = "rewards/accuracies"  # in the first update every pair is one
    return [{name: value for name, value in row.items() if name != ties} for row in made.metrics]


def textbook(config: TrainConfig, *models, **said) -> train.TrainResult:
    """`train.fit` itself."""
    with accelerated(config) as accelerator:
        return train.fit(config, *models, **said, run=train.Progress(config, accelerator))


def every_objective() -> None:
    for name in OBJECTIVES:
        both(lambda device, name=name: trained(device, name, max_steps=1))


def every_way(folder: Path) -> None:
    both(lambda device: trained(device, "tdpo2", how=textbook))
    both(lambda device: trained(device, "tdpo1", FastPath(share_prefix=True), log_every=2))
    both(lambda device: trained(device, "tdpo2", FastPath(checkpointing=True), group_prompts=True, optimizer="rmsprop"))
    both(lambda device: trained(device, fast=FastPath(cache_dir=f"{folder}/tgdpo"), group_prompts=True))
    both(lambda device: trained(device, "tdpo2", FastPath(cache_dir=f"{folder}/tdpo2", share_prefix=True)))
    both(lambda device: trained(device, max_tokens=160, lora_rank=2, output_dir=f"{folder}/{device}"))
    guide = runs.load_guide(folder / DEVICE, frozen_copy(tiny.llama()).to(DEVICE))
    assert {p.device.type for p in guide.parameters()} == {DEVICE}


def resumed(folder: Path) -> None:
    def run(device: str, **more):
        config = replace(
            CONFIG, device=device, log_every=2, save_every=1, eval_every=1, output_dir=f"{folder}/{device}", max_steps=3
        )
        return fit(config, tiny.llama(), tiny.llama(), tiny.pairs(20), progress=False, **more).metrics

    def stopped(step: int, policy) -> None:
        if step == 1:
            raise KeyboardInterrupt

    def both_halves(device: str) -> list[dict]:
        with pytest.raises(KeyboardInterrupt):
            run(device, callbacks=[stopped])
        return run(device, resume=True)

    both(both_halves)


def test_every_objective_trains_there_as_on_a_cpu():
    on_the_device(every_objective)


def test_every_way_to_train_does(tmp_path):
    on_the_device(every_way, tmp_path)


def test_a_run_goes_on_there(tmp_path):
    on_the_device(resumed, tmp_path)


# ---- samples, scores, stages


def sampled(folder: Path) -> None:
    model, tokenizer = tiny.llama(vocab=300), tiny.tokenizer(folder / "tokenizer")
    tiny.classifier(folder / "classifier")

    def samples(device: str) -> list:
        said = []
        for settings in ({}, {"top_p": 0.9, "samples_per_prompt": 2}, {"temperature": 0.0}):
            drawn = generate(model.to(device), tokenizer, TEXTS, max_new_tokens=5, seed=1, **settings)
            said += [token for group in drawn for completion in group for token in completion.token_ids]
        return said

    def pairs(device: str) -> list:
        reward = ClassifierReward(folder / "classifier", device=device)
        how = {"max_new_tokens": 6, "seed": 1, "cache_dir": folder / device}
        table, report = pairing.build_pairs(model.to(device), tokenizer, reward, prompts=TEXTS, **how)
        assert report.kept > 4
        return [*reward(TEXTS).tolist(), *table["chosen_score"], *table["rejected_score"]]

    def openings(device: str) -> list:
        return [len(text) for text in prompts.pocket_openings(3, seed=0, device=device)]

    for part in (samples, pairs, openings):
        both(part)


def fine_tuned(folder: Path) -> None:
    tokenizer = tiny.tokenizer(folder)
    reviews = {split: {"text": [" ".join(TEXTS[i % 3 :] * 2) for i in range(20)]} for split in ("train", "test")}
    config = sft.SftConfig(reviews=16, tokens=12, lr=1e-2, batch_size=8, precision="no")

    def said(device: str) -> list:
        start = tiny.llama(vocab=300).to(device)
        return [*sft.fine_tune(start, tokenizer, config, reviews, seed=0, folder=folder / device).values()]

    both(said)


def laboratory(folder: Path) -> None:
    tiny.checkpoint_folder(folder / "model")
    tiny.classifier(folder / "classifier")
    names = {"reward": folder / "classifier", "judge": folder / "classifier", "prompts": TEXTS * 3}

    def said(device: str) -> list:
        counts = {"train_prompts": 3, "held_out_prompts": 3, "max_new_tokens": 6, "held_out_samples": 3}
        rows = [{"prompt": text, "chosen": " good fun", "rejected": f" bad {i}"} for i, text in enumerate(TEXTS * 4)]
        stage = own_stage(folder / "model", rows, **names, device=device, precision="no", max_length=32)
        sampled = own_stage(
            folder / "model", **names | {"prompts": [*TEXTS, "fun", "fine", "really"]}, device=device, **counts
        )
        lab = Laboratory(stage)
        lab.train(lab.config("tgdpo", lr=1e-3, updates=2, batch_size=4))
        points = [point["accuracy_logratio"]["mean"] for _, point in lab.points().values()]
        return [lab.start.metrics["reward"].mean, *points, len(sampled.pairs)]

    both(said)


def test_sampling_pairing_and_scoring_give_what_they_give_on_a_cpu(tmp_path):
    on_the_device(sampled, tmp_path)


def test_fine_tuning_does(tmp_path):
    on_the_device(fine_tuned, tmp_path)


def test_a_laboratory_trains_on_the_device_of_its_stage(tmp_path):
    on_the_device(laboratory, tmp_path)


# ---- the commands


def commands(folder: Path) -> None:
    tiny.checkpoint_folder(folder / "model")
    tiny.classifier(folder / "classifier")
    rows = [{"prompt": f"{TEXTS[i % 3]} {i}", "chosen": " good", "rejected": " bad fun"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    os.chdir(folder)
    scored = f"--device {DEVICE} --reward classifier --prompts prompts.txt --max-new-tokens 6"
    pairs = "--pairs pairs.jsonl --batch-size 4 --warmup-steps 0 --max-steps 2 --max-length 32"
    training = f"train --model model --device {DEVICE} {pairs} --loss-type tgdpo --output-dir"
    comparing = f"compare --model model {scored} {pairs} --objectives tgdpo --evaluations 1 --output-dir compared"
    for command in (
        f"{training} run",
        f"{training} lora --lora-rank 2",
        f"pairs --model model {scored} --output sampled.jsonl",
        f"evaluate run {scored} --pairs pairs.jsonl --cache-dir cache",
        f"evaluate lora {scored} --pairs pairs.jsonl --cache-dir cache",
        f"{comparing} --dry-run",
        comparing,
    ):
        with watched():
            cli.main(["--traceback", *command.split()])
    assert Path("compared/report.html").is_file()


def test_every_command_computes_where_it_is_told_to(tmp_path):
    on_the_device(commands, tmp_path)
