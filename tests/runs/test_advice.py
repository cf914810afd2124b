"""Out of memory: what an update takes, and what would take less, by the arithmetic of memory."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from apart import apart

from tpo_lib import cli
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.fast import FastPath
from tpo_lib.fast.memory import SHAPES, step_memory
from tpo_lib.files import store
from tpo_lib.models import frozen_copy
from tpo_lib.runs import advice
from tpo_lib.runs.advice import OutOfMemory
from tpo_lib.runs.run import fit

CONFIG = TrainConfig(batch_size=8, lr=1e-3, warmup_steps=0, device="cpu", precision="no")
PAIRS = [EncodedPair(i, [1] * 64, [2] * 192, [3] * 192) for i in range(8)]  # T = 256, three quarters scored
GPT2 = transformers.GPT2Config()
CPU = torch.device("cpu")


def said(config=CONFIG, fast=None, model=GPT2, precision="no", room=5e9, monkeypatch=None) -> str:
    monkeypatch.setattr(advice, "room_of", lambda device: room)
    return advice.advice(config, fast or FastPath(), model, PAIRS, precision=precision, device=CPU)


def listed(text: str) -> dict[str, tuple[float, bool]]:
    """{remedy: (GB, whether it is said to fit)}, in the order in which they stand."""
    found = re.findall(r"(?:with|,) ((?:--|all)[^:]*): ([\d.]+) GB( \(fits\))?", text)
    return {name: (float(size), bool(fits)) for name, size, fits in found}


def test_remedies_have_the_numbers_of_the_memory_model(monkeypatch):
    text, now = said(monkeypatch=monkeypatch), {"length": 256, "pairs": 8, "objective": "dpo", "scored": 0.75}
    gb = {
        "--batch-size 4 --accumulation 2": {"pairs": 4},
        "--checkpointing": {"checkpointing": True},
        "--cache-dir DIR": {"cached": True},
        "--lora-rank 16": {"lora_rank": 16},
        "--precision bf16": {"precision": "bf16"},
        "--max-length 128": {"length": 128},
    }
    every = {name: value for change in gb.values() for name, value in change.items()}
    expected = {name: step_memory(SHAPES["GPT-2 small"], **now | change).total for name, change in gb.items()}
    expected["all of these"] = step_memory(SHAPES["GPT-2 small"], **now | every).total
    total = step_memory(SHAPES["GPT-2 small"], **now).total
    assert text.startswith(
        f"an update takes about {total / 1e9:.2f} GB, cpu has 5.00 GB; it would take with all of these"
    )
    found = listed(text)
    assert found == {name: (round(size / 1e9, 2), size < 5e9) for name, size in expected.items()}
    sizes = [size for size, _ in found.values()]
    assert sizes == sorted(sizes)
    assert {fits for _, fits in found.values()} == {True, False}


def test_in_shards_it_is_what_one_process_takes():
    shape, now = SHAPES["GPT-2 small"], {"length": 256, "pairs": 8, "objective": "dpo", "scored": 0.75, "shards": 8}
    text = advice.advice(CONFIG, FastPath(), GPT2, PAIRS, precision="no", device=CPU, shards=8)
    assert text.startswith(f"an update takes about {step_memory(shape, **now).total / 1e9:.2f} GB")
    assert "--cache-dir" not in text


def test_what_is_in_use_is_not_advised(monkeypatch):
    config = replace(CONFIG, lora_rank=2, batch_size=1, accumulation=8)
    fast = FastPath(checkpointing=True, cache_dir="somewhere")
    assert [*listed(said(config, fast, precision="bf16", monkeypatch=monkeypatch))] == ["--max-length 128"]
    assert "--cache-dir" not in said(replace(CONFIG, lora_rank=2), monkeypatch=monkeypatch)  # spares nothing there
    assert "--cache-dir" not in said(replace(CONFIG, loss_type="simpo"), monkeypatch=monkeypatch)
    assert "--fused: " in said(fast=FastPath(fused=False), monkeypatch=monkeypatch)
    text = said(replace(CONFIG, max_tokens=2048), monkeypatch=monkeypatch)
    assert "--max-tokens 1024" in text
    assert "--batch-size" not in text
    odd = said(replace(CONFIG, batch_size=5, output_dir="out"), monkeypatch=monkeypatch)
    assert "--batch-size 2 --accumulation 3: " in odd
    assert odd.endswith("(of these --checkpointing and --cache-dir go with --resume)")


def test_adapters_are_advised_where_the_model_is_wider_than_they():
    now = advice.update_of(CONFIG, FastPath(), PAIRS, "no")
    narrow, wide = (
        advice.remedies_of(CONFIG, FastPath(), now, width, "bf16") for width in (advice.RANK, advice.RANK + 1)
    )
    assert wide.keys() - narrow.keys() == {"--lora-rank 16"}


def test_of_a_shape_that_is_not_known_no_numbers_are_made_up(monkeypatch):
    text = said(model=tiny.gemma2().config, monkeypatch=monkeypatch)
    assert text == (
        "what takes less: --batch-size 4 --accumulation 2, --checkpointing, --cache-dir DIR, --precision bf16, --max-length 128"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        MemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_a_run_that_finds_no_memory_says_what_takes_less(error, tmp_path, capsys):
    policy, rows = tiny.llama(), []

    def give_out(*_) -> None:
        if rows and torch.is_grad_enabled():  # in the second update
            raise error

    policy.model.layers[0].register_forward_pre_hook(give_out)
    config = replace(CONFIG, batch_size=2, output_dir=str(tmp_path / "run"), log_every=1)
    with pytest.raises(OutOfMemory) as caught:
        fit(config, policy, frozen_copy(tiny.llama()), tiny.pairs(8), on_log=rows.append, progress=False)
    text = str(caught.value)
    assert text.startswith(str(error))
    assert "an update takes about 0.00 GB, cpu has " in text
    assert "--batch-size 1 --accumulation 2: " in text
    assert caught.value.__cause__ is error
    assert store.newest(tmp_path / "run/checkpoints").name == "step-00000001"  # what was done is kept
    assert cli._sentence(caught.value) == f"out of memory: {text}"


def test_half_as_long_numbers_are_those_that_the_device_has(monkeypatch):
    monkeypatch.setattr(advice, "room_of", lambda device: 0.0)
    for half in ("fp16", "bf16"):
        monkeypatch.setattr(advice, "choose_precision", lambda device, half=half: half)
        text = advice.advice(CONFIG, FastPath(), tiny.llama().config, tiny.pairs(2), precision="no", device="cuda")
        assert f"--precision {half}" in text


def test_other_errors_stay_what_they_are():
    policy = tiny.llama()
    policy.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0 if torch.is_grad_enabled() else None)
    with pytest.raises(ZeroDivisionError):
        fit(replace(CONFIG, batch_size=2), policy, frozen_copy(tiny.llama()), tiny.pairs(8), progress=False)


def starve() -> None:
    import resource

    size = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    policy = tiny.llama(vocab=20000)
    resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20,) * 2)
    try:  # 16 sequences of 127 tokens: 163 MB of logits, several times
        pairs = [EncodedPair(i, [1], [2] * 126, [3] * 126) for i in range(8)]
        fit(CONFIG, policy, frozen_copy(policy), pairs, fast=FastPath(fused=False), progress=False)
    except OutOfMemory as error:
        print(error, file=sys.stderr)
        sys.exit(7)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_process_that_is_given_no_more_memory_says_so():
    status, text = apart(starve)
    assert status == 7, text
    assert re.search(
        r"can't allocate memory.* an update takes about 0\.\d\d GB, cpu has [\d.]+ GB; .*--fused: ", text
    ), text
