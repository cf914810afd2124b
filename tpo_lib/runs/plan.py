"""What a comparison will do and take on this machine, before it begins: a few steps are timed and multiplied.

python -m tpo_lib run --preset smollm2-135m --dry-run
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset

from tpo_lib.data import EncodedPair, encode_pairs
from tpo_lib.fast import FastPath
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import choose_device, choose_precision, frozen_copy
from tpo_lib.runs import costs, runs, work
from tpo_lib.runs.settings import CompareConfig
from tpo_lib.runs.stage import given_pairs
from tpo_lib.sampling import generate

SAMPLED = 32  # sequences that are sampled for the estimate


def plan(config: CompareConfig, folder: Path, fast: FastPath | None = None) -> str:
    """The stages of a comparison in words, with their estimated time, and the memory and disk that it takes.

    Raises:
        OSError: a model cannot be found.
    """
    stage, first = config.stage, config.objectives[0]
    device = choose_device(stage.device)
    model, tokenizer = load_model(stage.model, device=device), load_tokenizer(stage.model)
    table = given_pairs(stage)[0] if stage.pairs else None
    sequence_s, pair_s, peak = _timed(config, model, tokenizer, table, fast)
    parts = work.parts(config, table and len(table))
    rows = [(part.name, part.words, part.sampled * sequence_s + part.trained * pair_s) for part in parts]
    weights = sum(p.numel() for p in model.parameters()) * 4
    kept = {run.folder for run in [*config.runs(), *config.guides().values()]}
    disk = len(kept) * weights * (1 + 3 * first.keep) + (weights * 4 if stage.sft else 0)
    total = sum(seconds for *_, seconds in rows)
    precision = choose_precision(device, first.precision)
    width = max(12, *(len(name) for name, *_ in rows))
    lines = [f"{name:{width}} {what:62} {_duration(seconds):>9}" for name, what, seconds in rows]
    lines += [f"{'in all':{width}} {'':62} {_duration(total):>9}", ""]
    memory = "memory not measured, which Linux alone tells," if math.isnan(peak) else f"memory about {peak:.1f} GB"
    lines += [
        f"{memory} on {device} in {precision}, disk about {disk / 1e9:.1f} GB in {folder} "
        f"({shutil.disk_usage(_there(folder)).free / 1e9:.0f} GB free)"
    ]
    return "\n".join(lines)


def _timed(
    config: CompareConfig, model, tokenizer, table: Dataset | None, fast: FastPath | None
) -> tuple[float, float, float]:
    """Seconds a sampled sequence and a trained pair (the slowest objective is no more than a third above), and the peak in GB."""
    stage, run = config.stage, config.objectives[0]
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(100, model.config.vocab_size, (count,), generator=draw).tolist()

    precision = choose_precision(model.device, stage.precision)
    text = tokenizer.decode(ids(work.PROMPT))
    with costs.measured() as sampling:
        together = min(SAMPLED, stage.sampled_together)
        generate(
            model,
            tokenizer,
            [text] * together,
            max_new_tokens=stage.max_new_tokens,
            seed=0,
            batch_size=together,
            precision=precision,
        )
    pairs = [
        EncodedPair(i, ids(work.PROMPT), ids(stage.max_new_tokens), ids(stage.max_new_tokens))
        for i in range(3 * run.batch_size)
    ]
    if table:
        some = table.select(range(min(3 * run.batch_size, len(table))))
        pairs = encode_pairs(some, tokenizer, max_length=stage.max_length, on_bad_rows="skip")[0]
    if "guide_logps" in OBJECTIVES[run.loss_type].needs:  # there is no guide yet
        run = runs.guide_settings(run)
    run = replace(run, batch_size=min(run.batch_size, len(pairs)))
    settings = replace(run, max_steps=None, accumulation=1, warmup_steps=0, log_every=100, output_dir=None, epochs=1)
    start = frozen_copy(model)
    with costs.measured() as training:
        runs.train(settings, runs.new_policy(settings, start), start, pairs, fast=fast)
    return sampling["seconds"] / together, training["seconds"] / len(pairs), training.get("peak_gb", float("nan"))


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{seconds:.0f} s"
    )


def _there(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
