"""Caches of what frozen models say: equal to them, made anew when anything differs, never half written, one body at a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from apart import apart, together

from tpo_lib import losses, stats
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.fast import FastPath, frozen
from tpo_lib.fast.prefix import SharedReader
from tpo_lib.files.store import MANIFEST
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs.run import fit
from tpo_lib.train import TrainResult
from tpo_lib.types import Reading

CONFIG = TrainConfig(lr=1e-4, batch_size=4, warmup_steps=1, log_every=1, device="cpu", guide_beta=0.1)
PAIRS = tiny.pairs(9)


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def cached(folder: Path, model=None, pairs=PAIRS, kind="logps", precision="no", **settings) -> frozen.FrozenCache:
    reader = model if isinstance(model, ResponseReader) else ResponseReader(model or tiny.llama())
    settings = {"name": "reference", "max_tokens": 90, "progress": False} | settings
    identity = frozen.identify(reader, precision)
    return frozen.build_or_open(reader, identity, pairs, kind=kind, folder=folder, **settings)


def live(model, batch) -> Reading:
    with torch.no_grad():
        return ResponseReader(model)(batch)


def unread() -> ResponseReader:
    """A reader of the usual model that must not be read."""
    reader = ResponseReader(tiny.llama())

    def refuse(*_):
        raise AssertionError("the model was read although its cache is there")

    reader.forward = refuse
    return reader


def folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir())


# ---- values


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.gemma2, tiny.granite, tiny.gptj])
def test_cached_values_are_the_models_own_in_any_batch(build, tmp_path):
    logps, states = (cached(tmp_path, build(), kind=kind) for kind in ("logps", "states"))
    for rows in ([3], [8, 0, 5], range(9)):
        batch = collate([PAIRS[i] for i in rows], 0)
        expected = stats.from_readings(live(build(), batch), batch.labels)
        torch.testing.assert_close(logps.read(batch), expected.logps[expected.mask], rtol=1e-6, atol=1e-6)
        found = states.read(batch)
        torch.testing.assert_close(found.states, live(build(), batch).states, rtol=1e-6, atol=1e-6)
        expected = live(build(), batch).logits()
        assert (found.logits() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_short_types_come_back_as_they_were(weights, tmp_path):
    reader, batch = ResponseReader(tiny.llama().to(weights)), collate(PAIRS[:1], 0)  # alone when built, alone here
    states, logps = (
        cached(tmp_path, reader, pairs=PAIRS[:1], kind=kind, precision="bf16", autocast=bf16)
        for kind in ("states", "logps")
    )
    with bf16():
        said = live(reader.model, batch)
        expected = stats.from_readings(said, batch.labels)
    assert states.values.dtype == weights
    assert torch.equal(states.read(batch).states, said.states)  # bit for bit
    assert logps.values.dtype == torch.float32
    assert torch.equal(logps.read(batch), expected.logps[expected.mask])


def test_short_types_agree_as_two_batchings_do(tmp_path):
    """1e-6 is a promise in float32 alone: in bf16 the model itself may give other values in another batch."""
    reader = ResponseReader(tiny.llama())
    cache = cached(tmp_path, reader, precision="bf16", autocast=bf16)

    def said(rows) -> torch.Tensor:
        batch = collate([PAIRS[i] for i in rows], 0)
        with bf16():
            tokens = stats.from_readings(live(reader.model, batch), batch.labels)
        return tokens.logps[tokens.mask]

    def read(rows) -> torch.Tensor:
        return cache.read(collate([PAIRS[i] for i in rows], 0))

    alone = [said([i]) for i in range(9)]  # each: chosen, then rejected
    together = said(range(9))
    rounding = torch.finfo(torch.bfloat16).eps * together.abs().max()
    for other in (read_in_order(alone), read(range(9))):
        assert (other - together).abs().max() < 4 * rounding


def read_in_order(alone: list[torch.Tensor]) -> torch.Tensor:
    """Values of single pairs in the order of their batch: all chosen first."""
    lengths = [len(pair.chosen_ids) for pair in PAIRS]
    chosen = [values[:n] for values, n in zip(alone, lengths, strict=True)]
    return torch.cat(chosen + [values[n:] for values, n in zip(alone, lengths, strict=True)])


def test_a_head_that_is_not_understood_can_still_be_cached_as_log_probs(tmp_path):
    model = tiny.llama()
    model.register_forward_hook(lambda _, __, output: {"logits": 2 * output.logits})
    reader, batch = ResponseReader(model), collate(PAIRS, 0)
    assert not reader.understood
    expected = stats.from_readings(live(model, batch), batch.labels)
    torch.testing.assert_close(
        cached(tmp_path, reader).read(batch), expected.logps[expected.mask], rtol=1e-6, atol=1e-6
    )


def test_unknown_and_repeated_rows_are_named(tmp_path):
    cache = cached(tmp_path, pairs=PAIRS[:4])
    with pytest.raises(ValueError, match=r"rows \[7\] are not in the cache"):
        cache.read(collate([PAIRS[0], PAIRS[7]], 0))
    with pytest.raises(ValueError, match=r"reference: row 2 stands for 2 pairs.*replace\(pair, row=i\)"):
        cached(tmp_path, pairs=[*PAIRS, replace(PAIRS[3], row=2)])


# ---- found again, or made anew


def test_a_second_opening_does_not_read_the_model(tmp_path, capsys):
    first = cached(tmp_path)
    assert "reference log-probs" in capsys.readouterr().err
    again = cached(tmp_path, unread())
    assert torch.equal(first.values, again.values)
    assert first.spans == again.spans
    assert capsys.readouterr().err == ""
    with pytest.raises(AssertionError, match="although its cache is there"):  # the guard guards
        cached(tmp_path, unread(), kind="states")


def another_weight():
    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    return {"model": model}


def another_setting():
    model = tiny.llama()
    model.config.rms_norm_eps = 1e-5
    return {"model": model}


CHANGES = {
    "weight": another_weight,
    "architecture": another_setting,
    "token": lambda: {"pairs": [replace(PAIRS[0], prompt_ids=[0, 63]), *PAIRS[1:]]},
    "truncation": lambda: {"pairs": [replace(pair, chosen_ids=pair.chosen_ids[:3]) for pair in PAIRS]},
    "row": lambda: {"pairs": [replace(PAIRS[0], row=77), *PAIRS[1:]]},
    "precision": lambda: {"precision": "bf16", "autocast": bf16},
    "reading": lambda: {"model": SharedReader(tiny.llama())},
    "kind": lambda: {"kind": "states"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_differs_makes_another_cache(what, tmp_path, capsys):
    cached(tmp_path)
    capsys.readouterr()
    cached(tmp_path, **CHANGES[what]())
    assert len(folders(tmp_path)) == 2
    told = capsys.readouterr().err
    assert "->" in told
    assert ("1 beside it hold other weights" in told) == (what != "kind")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["values.bin", "index.safetensors", "meta.json", MANIFEST])
def test_damage_is_found_told_and_mended(name, damage, tmp_path, capsys):
    whole = cached(tmp_path).values.clone()
    [folder] = folders(tmp_path)
    damage(folder / name)
    capsys.readouterr()
    assert torch.equal(cached(tmp_path).values, whole)
    told = capsys.readouterr().err
    assert told.count("cannot be used and is built anew") == 1
    assert name in told or name == MANIFEST  # whose digests name the file that no longer fits
    assert folders(tmp_path) == [folder]
    cached(tmp_path, unread())


def test_a_folder_under_another_ones_name_is_not_believed(tmp_path, capsys):
    cached(tmp_path)
    [mine] = folders(tmp_path)
    other = tiny.llama(seed=1)
    wrong = cached(tmp_path, other).values.clone()
    [theirs] = set(folders(tmp_path)) - {mine}
    shutil.rmtree(theirs)
    shutil.copytree(mine, theirs)
    assert torch.equal(cached(tmp_path, other).values, wrong)
    assert "holds other values than its name says" in capsys.readouterr().err


# ---- building


def test_the_size_is_announced_and_true(tmp_path, capsys):
    pairs = tiny.pairs(400)
    tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    cached(tmp_path, pairs=pairs, kind="states", max_tokens=4096)
    told = capsys.readouterr().err
    size = (folders(tmp_path)[0] / "values.bin").stat().st_size
    assert 1e5 < size == tokens * 16 * 4
    assert f"400 pairs, {tokens:,} tokens x 16 x 4 B = {size / 1e6:.1f} MB -> {folders(tmp_path)[0]}" in told


def test_a_cache_larger_than_the_disk_is_refused_before_it_is_built(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"0\.0 MB free, the cache takes .* another --cache-dir"):
        cached(tmp_path)
    assert folders(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        cached(tmp_path)
    assert folders(tmp_path) == []


def killed(folder: Path) -> None:
    frozen.save_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cached(folder)


def test_a_kill_leaves_no_half_cache(tmp_path):
    status, told = apart(killed, tmp_path)
    assert status == -signal.SIGKILL, told
    assert [folder.suffix for folder in folders(tmp_path)] == [".unfinished"]
    cached(tmp_path)
    assert [folder.name[:15] for folder in folders(tmp_path)] == ["reference-logps"]


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path, monkeypatch):
    built, build = [], frozen._build

    def slow(*args):
        built.append(args)
        threading.Event().wait(0.2)
        build(*args)

    monkeypatch.setattr(frozen, "_build", slow)
    found, reader = [], ResponseReader(tiny.llama())
    workers = [threading.Thread(target=lambda: found.append(cached(tmp_path, reader))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(built) == 1
    assert len(found) == 3


def test_a_sequence_of_several_pairs_is_read_and_kept_once(tmp_path, capsys):
    six = tiny.of_prompts(2)
    four = {(*pair.prompt_ids, None, *side) for pair in six for side in (pair.chosen_ids, pair.rejected_ids)}
    cache = cached(tmp_path, pairs=six, kind="states", progress=True)
    assert len(six) == 12
    assert len(four) == 8
    assert "8/8" in capsys.readouterr().err
    assert len(cache.values) == sum(len(each) - each.index(None) - 1 for each in four)
    for rows in ([5], [11, 0, 3], range(12)):
        batch = collate([six[i] for i in rows], 0)
        expected = live(tiny.llama(), batch).states
        torch.testing.assert_close(cache.read(batch).states, expected, rtol=1e-6, atol=1e-6)
    bare = [replace(pair, rejected_ids=[]) for pair in six]
    batch = collate(bare, 0)
    found = cached(tmp_path, pairs=bare, kind="states").read(batch)
    torch.testing.assert_close(found.states, live(tiny.llama(), batch).states, rtol=1e-6, atol=1e-6)


def test_the_bar_is_optional(tmp_path, capsys):
    cached(tmp_path, progress=True)
    assert "18/18" in capsys.readouterr().err
    cached(tmp_path, kind="states", progress=False)
    assert "18/18" not in capsys.readouterr().err


# ---- training


def trained(config: TrainConfig, build=tiny.llama, **settings) -> TrainResult:
    """A run of 12 updates from a policy that differs from its reference; held-out pairs are longer than max_tokens."""
    settings = {"reference": build, "guide": partial(build, seed=1)} | settings
    config = replace(config, accumulation=2, max_tokens=96, epochs=4, eval_every=3)
    longer = tiny.pairs(6, seed=9, longest=40)
    return fit(config, build(seed=7), pairs=tiny.pairs(24), eval_pairs=longer, progress=False, **settings)


def assert_same_metrics(rows: list[dict], expected: list[dict]) -> None:
    """Equal to 1e-6 of each value, or of what a margin is the difference of (the KL of a response is a sum of nats)."""
    assert len(rows) == len(expected) > 4
    for row, other in zip(rows, expected, strict=True):
        for name, value in row.items():
            kin = [row[name.replace("margin", side)] for side in ("chosen", "rejected")] if "kl/margin" in name else []
            assert value == pytest.approx(other[name], rel=1e-6, abs=1e-6 * max([1, *map(abs, kin)])), name


@pytest.mark.parametrize("name", list(losses.OBJECTIVES))
def test_runs_with_and_without_caches_agree(name, tmp_path):
    config = replace(CONFIG, loss_type=name)
    fast = FastPath(cache_dir=str(tmp_path))
    plain, run = trained(config), trained(config, fast=fast)
    assert_same_metrics(run.metrics, plain.metrics)
    for a, b in zip(run.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    again = trained(config, fast=fast)
    assert again.metrics == run.metrics
    assert all("eval_kl/margin" in row for row in run.metrics if "eval_loss" in row)
    needs = losses.OBJECTIVES[name].needs
    assert ("kl/margin" in run.metrics[0]) == ("kl" in needs)
    kinds = ["guide-eval-logps", "guide-logps"] if "guide_logps" in needs else []
    kinds += ["reference-states"] if "kl" in needs else ["reference-logps"] if "ref_logps" in needs else []
    assert [path.name[:-17] for path in folders(tmp_path)] == sorted([*kinds, "reference-eval-states"])


@pytest.mark.parametrize(("fused", "settings"), [(False, {}), (True, {"optimizer": "rmsprop"})])
@pytest.mark.parametrize("build", [tiny.gpt2, tiny.gemma2])
def test_other_models_and_the_textbook_path_agree_too(build, fused, settings, tmp_path):
    """GPT-2's key bias has no effect and a gradient of rounding alone, which the optimizers blow up: metrics, not weights."""
    config = replace(CONFIG, loss_type="tdpo2", **settings)
    run = trained(config, build=build, fast=FastPath(fused=fused, cache_dir=str(tmp_path)))
    assert_same_metrics(run.metrics, trained(config, build=build, fast=FastPath(fused=fused)).metrics)


def test_objectives_without_reference_need_none_with_caches_either(tmp_path):
    for name in ("sft", "simpo"):
        config, fast = replace(CONFIG, loss_type=name), FastPath(cache_dir=str(tmp_path))
        trained(config, reference=None, guide=None, fast=fast)
        fit(
            config, tiny.llama(), pytest.fail, PAIRS, fast=fast, progress=False
        )  # nothing to evaluate: it is not even loaded
    assert folders(tmp_path) == []


def test_another_alpha_reads_the_same_caches(tmp_path, capsys):
    config, fast = replace(CONFIG, loss_type="tgdpo"), FastPath(cache_dir=str(tmp_path))
    first = trained(config, fast=fast)
    capsys.readouterr()
    other = trained(replace(config, alpha=0.9), fast=fast)
    assert "->" not in capsys.readouterr().err
    assert other.metrics[0]["loss"] != first.metrics[0]["loss"]
    assert_same_metrics(other.metrics, trained(replace(config, alpha=0.9)).metrics)


def test_a_reference_that_cannot_be_cached_stays_and_says_so(tmp_path, capsys):
    def odd(seed: int = 0):
        model = tiny.llama(seed)
        model.register_forward_hook(lambda _, __, output: {"logits": 2 * output.logits})
        return model

    config = replace(CONFIG, loss_type="tdpo1")
    run = trained(config, reference=odd, fast=FastPath(cache_dir=str(tmp_path)))
    assert "reference: what follows its head is not understood; it stays in memory" in capsys.readouterr().err
    assert run.metrics == trained(config, reference=odd).metrics


@pytest.mark.parametrize("name", ["tdpo2", "tgdpo"])
def test_frozen_bodies_are_loaded_one_by_one_and_let_go(name, tmp_path):
    alive: list[weakref.ref] = []

    def bodies() -> int:
        return sum(ref() is not None for ref in alive)

    def load(seed: int):
        assert bodies() == 0, "the last frozen model is still there"
        model = frozen_copy(tiny.llama(seed=seed))
        model.itself = partial(id, model)  # a cycle, as wrapped forwards make them: no count of references frees it
        alive.extend(weakref.ref(part) for part in (model, model.model, model.model.layers[0].mlp.up_proj.weight))
        return model

    seen = []
    for _ in range(2):  # built, then found
        trained(
            replace(CONFIG, loss_type=name),
            fast=FastPath(cache_dir=str(tmp_path)),
            reference=partial(load, 0),
            guide=partial(load, 1),
            callbacks=[lambda step, policy: seen.append(bodies())],
        )
    assert len(alive) == 3 * (4 if name == "tgdpo" else 2)
    assert set(seen) == {0}


def test_models_given_as_they_are_stay_as_they_are(tmp_path):
    reference = tiny.llama()
    trained(CONFIG, reference=reference, fast=FastPath(cache_dir=str(tmp_path)))
    assert all(p.requires_grad for p in reference.parameters())


def half_of_it(rank: int, folder: Path) -> None:
    config, fast = replace(CONFIG, loss_type="tdpo2", batch_size=2), FastPath(cache_dir=str(folder))
    rows = fit(config, tiny.llama(seed=7), tiny.llama, PAIRS, fast=fast, progress=False).metrics
    print(json.dumps(rows))


def test_two_processes_share_one_cache(tmp_path):
    both = together(half_of_it, tmp_path)
    assert [status for status, *_ in both] == [0, 0], both
    assert sum(told.count("reference hidden states: 9 pairs") for _, _, told in both) == 1
    one = fit(replace(CONFIG, loss_type="tdpo2"), tiny.llama(seed=7), tiny.llama, PAIRS, progress=False)
    rows = json.loads(both[0][1])
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in one.metrics], rel=1e-4)
