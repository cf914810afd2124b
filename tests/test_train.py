"""The loop: gradients, schedules, resuming after a kill, and every way a run may be refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from apart import apart, together
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tpo_lib import losses, stats, train
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import FastPath
from tpo_lib.fast import path as fused_path
from tpo_lib.files import store
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs import accelerated
from tpo_lib.runs.run import fit

CONFIG = TrainConfig(lr=1e-2, batch_size=4, warmup_steps=1, log_every=1, device="cpu", save_every=1)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(config: TrainConfig, count: int = 8, build=tiny.llama, **kwargs):
    policy = build()
    reference = frozen_copy(policy)
    guide = frozen_copy(build(seed=1)) if config.loss_type == "tgdpo" else None
    return fit(config, policy, reference, tiny.pairs(count), guide=guide, progress=False, **kwargs)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.gemma2])
@pytest.mark.parametrize("name", list(losses.OBJECTIVES))
def test_every_objective_learns_its_pairs(name, build):
    beta = 2.0 if name == "simpo" else 0.1
    config = replace(CONFIG, loss_type=name, beta=beta, guide_beta=0.1, epochs=8, schedule="constant")
    result = trained(config, build=build)
    first, last = result.metrics[0], result.metrics[-1]
    assert result.steps == 16
    assert last["loss"] < 0.8 * first["loss"]
    if name != "sft":
        assert last["rewards/accuracies"] == 1.0
        assert last["rewards/margins"] > first["rewards/margins"]


def test_first_step_of_reference_based_objectives_is_log_2():
    for name in ("dpo", "tdpo1", "tdpo2", "tgdpo"):
        row = trained(replace(CONFIG, loss_type=name, guide_beta=0.1, max_steps=1)).metrics[0]
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["kl/chosen"] == pytest.approx(0, abs=1e-6)


def test_metrics_are_those_of_the_textbook_computation():
    config = replace(CONFIG, loss_type="tdpo2", max_steps=1, batch_size=8)
    policy, reference = tiny.llama(), frozen_copy(tiny.llama(seed=3))
    pairs = tiny.pairs(8)
    batch = collate(pairs, 0)
    with torch.no_grad():
        logits = [m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for m in (policy, reference)]
    chosen, rejected = stats.split(stats.token_stats(logits[0], batch.labels, logits[1], with_kl=True))
    output = losses.tdpo2(chosen, rejected, **config.hyperparameters())
    row = fit(config, policy, reference, pairs, progress=False).metrics[0]
    expected = {
        "loss": output.loss.mean(),
        "rewards/chosen": output.chosen_reward.mean(),
        "rewards/rejected": output.rejected_reward.mean(),
        "rewards/margins": (output.chosen_reward - output.rejected_reward).mean(),
        "rewards/accuracies": (output.chosen_reward > output.rejected_reward).float().mean(),
        "logps/chosen": chosen.logps.sum(-1).mean(),
        "logps/rejected": rejected.logps.sum(-1).mean(),
        "kl/chosen": chosen.kl.sum(-1).mean(),
        "kl/rejected": rejected.kl.sum(-1).mean(),
        "kl/margin": (rejected.kl - torch.zeros(())).sum(-1).mean() - chosen.kl.sum(-1).mean(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


def test_tgdpo_reports_the_share_of_tokens_on_the_floor():
    low = trained(replace(CONFIG, loss_type="tgdpo", guide_beta=0.1, alpha=0.0, max_steps=1)).metrics[0]
    high = trained(replace(CONFIG, loss_type="tgdpo", guide_beta=5.0, alpha=5.0, max_steps=1)).metrics[0]
    assert low["guidance/floor_share"] == 0.0
    assert 0.2 < high["guidance/floor_share"] < 0.8


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_one_window_of_four_equals_four_of_one(optimizer):
    whole = trained(replace(CONFIG, batch_size=4, accumulation=1, optimizer=optimizer))
    parts = trained(replace(CONFIG, batch_size=1, accumulation=4, optimizer=optimizer))
    assert whole.steps == parts.steps == 2
    assert whole.metrics[0]["grad_norm"] == pytest.approx(parts.metrics[0]["grad_norm"], rel=1e-5)
    for name, value in weights(whole.policy).items():
        torch.testing.assert_close(value, weights(parts.policy)[name], rtol=1e-3, atol=2e-4)


def test_incomplete_windows_are_left_out():
    assert trained(replace(CONFIG, batch_size=3), count=8).steps == 2
    with pytest.raises(ValueError, match=r"3 pairs are fewer than the 4 of one update.*--batch-size"):
        trained(CONFIG, count=3)


def test_clipping_bounds_the_update():
    config = replace(CONFIG, optimizer="rmsprop", max_steps=1)
    assert trained(config).metrics[0]["grad_norm"] > 1e-3
    free, clipped = trained(config).metrics[0], trained(replace(config, clip=1e-3)).metrics[0]
    assert free["grad_norm"] == clipped["grad_norm"]  # the norm before clipping is what is logged


def test_learning_rate_schedules():
    config = replace(CONFIG, lr=1.0, warmup_steps=4)
    for schedule, end in (("constant", 1.0), ("linear", 1 / 16), ("cosine", 0.5 * (1 + math.cos(math.pi * 15 / 16)))):
        rates = [train.learning_rate(replace(config, schedule=schedule), step, 20) for step in range(20)]
        assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert rates[-1] == pytest.approx(end)
        assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


@given(count=st.integers(4, 40), epochs=st.integers(1, 3), first=st.integers(0, 6))
def test_a_resumed_run_sees_the_updates_it_would_have_seen(count, epochs, first):
    config, pairs = replace(CONFIG, epochs=epochs), tiny.pairs(count)
    steps = train.planned_steps(config, count, 4)
    every = list(train.updates(config, pairs, 4, 0, steps))
    assert len(every) == steps
    assert list(train.updates(config, pairs, 4, first, steps)) == every[first:]
    assert all(len(set(window)) == 4 for window in every)


def test_dropout_is_off():
    assert trained(CONFIG, build=tiny.gpt2).metrics == trained(CONFIG, build=tiny.gpt2).metrics
    assert not trained(CONFIG, build=tiny.gpt2).policy.training


def test_reference_and_guide_stay_as_they_were():
    policy, reference, guide = tiny.llama(), frozen_copy(tiny.llama()), frozen_copy(tiny.llama(seed=1))
    before = weights(reference), weights(guide)
    fit(
        replace(CONFIG, loss_type="tgdpo", guide_beta=0.1),
        policy,
        reference,
        tiny.pairs(8),
        guide=guide,
        progress=False,
    )
    assert same(before[0], weights(reference))
    assert same(before[1], weights(guide))
    assert not same(before[0], weights(policy))


def test_missing_models_are_named():
    with pytest.raises(ValueError, match="dpo needs a reference model"):
        fit(CONFIG, tiny.llama(), None, tiny.pairs(8))
    with pytest.raises(ValueError, match="tgdpo needs guide="):
        fit(replace(CONFIG, loss_type="tgdpo"), tiny.llama(), tiny.llama(), tiny.pairs(8))
    with pytest.raises(ValueError, match="guide_beta"):
        fit(replace(CONFIG, loss_type="tgdpo"), tiny.llama(), tiny.llama(), tiny.pairs(8), guide=tiny.llama())


def test_frozen_models_may_be_given_as_functions_that_load_them():
    config = replace(CONFIG, loss_type="tgdpo", guide_beta=0.1)
    found = fit(config, tiny.llama(), tiny.llama, tiny.pairs(8), guide=lambda: tiny.llama(seed=1), progress=False)
    assert found.metrics == trained(config).metrics


@pytest.fixture
def accelerate_as_it_was():
    """The loop alone makes a plain Accelerator, which leaves its settings in the process."""
    accelerated.AcceleratorState._reset_state(reset_partial_state=True)  # another test may have left its own
    yield
    accelerated.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_as_it_was")
@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tgdpo"])
def test_the_loop_alone_is_the_textbook_in_memory(name, tmp_path):
    config, pairs = replace(CONFIG, loss_type=name, guide_beta=0.1, eval_every=1), tiny.pairs(8)
    guide = tiny.llama(seed=1) if name == "tgdpo" else None
    models = {"reference": tiny.llama(seed=3), "guide": guide, "pairs": pairs, "eval_pairs": pairs, "progress": False}
    alone = train.fit(config, tiny.llama(), **models)
    plain = fit(config, tiny.llama(), **models, fast=FastPath(fused=False))
    assert alone.metrics == plain.metrics
    assert same(weights(alone.policy), weights(plain.policy))
    with pytest.raises(
        ValueError, match=r"output_dir='.*': this loop keeps a run in memory; tpo_lib\.fit writes one there"
    ):
        train.fit(replace(config, output_dir=str(tmp_path)), tiny.llama(), **models)


def test_objectives_without_reference_train_without_one():
    for name in ("sft", "simpo"):
        result = fit(replace(CONFIG, loss_type=name), tiny.llama(), None, tiny.pairs(8), progress=False)
        assert "kl/chosen" not in result.metrics[-1]


def test_sft_without_a_rejected_side_is_sft_on_the_chosen_one(tmp_path):
    pairs = tiny.pairs(8)
    bare = [replace(pair, rejected_ids=[]) for pair in pairs]
    for fast, more in (({}, {}), ({"fused": False}, {}), ({"cache_dir": str(tmp_path)}, {}), ({}, {"max_tokens": 60})):
        config = replace(CONFIG, loss_type="sft", schedule="constant", eval_every=1, **more)
        settings = {"fast": FastPath(**fast), "progress": False}
        policies = tiny.llama(), tiny.llama()
        rows = [
            fit(config, policy, tiny.llama(seed=3), table, eval_pairs=table, **settings).metrics
            for policy, table in zip(
                policies, ([replace(p, rejected_ids=p.chosen_ids) for p in pairs], bare), strict=True
            )
        ]
        for both, alone in zip(*rows, strict=True):
            invented = ("rejected", "margin", "accuracies")
            assert alone.keys() == {name for name in both if not name.endswith(invented) and "margins" not in name}
            for name in set(alone) - {"padding", "grad_norm"}:
                assert alone[name] == pytest.approx(both[name], rel=1e-5), name
        assert {"eval_loss", "eval_rewards/chosen", "eval_logps/chosen", "eval_kl/chosen"} <= rows[1][-1].keys()
        for a, b in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_without_a_rejected_side_are_refused_where_one_is_needed():
    pairs = tiny.pairs(8)
    bare = [*pairs[:3], replace(pairs[3], rejected_ids=[]), *pairs[4:]]
    sft, sharing = replace(CONFIG, loss_type="sft"), FastPath(share_prefix=True)
    for config, fast, message in (
        (CONFIG, None, "dpo needs a rejected side, which row 3 of pairs lacks"),
        (sft, None, "row 3 of pairs has no rejected side and others have one"),
        (sft, sharing, "no pair to share a prompt in; train without share_prefix"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(config, tiny.llama(), tiny.llama, bare, fast=fast, progress=False)
    with pytest.raises(ValueError, match="which row 3 of eval_pairs lacks"):
        fit(CONFIG, tiny.llama(), tiny.llama, pairs, eval_pairs=bare, progress=False)


def test_held_out_pairs_are_scored():
    result = trained(replace(CONFIG, eval_every=1), eval_pairs=tiny.pairs(6, seed=9))
    held_out = [row for row in result.metrics if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [1, 2]
    assert {"eval_kl/margin", "eval_rewards/accuracies"} <= held_out[0].keys()


def test_callbacks_come_before_every_evaluation_and_at_the_end():
    calls = []
    trained(replace(CONFIG, eval_every=2, epochs=2, batch_size=3), callbacks=[lambda step, policy: calls.append(step)])
    assert calls == [0, 2, 4]


def test_non_finite_loss_stops_and_names_rows(tmp_path):
    policy = tiny.llama()
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), epochs=4)

    def poison(step, model):
        if step == 3:
            with torch.no_grad():
                model.model.embed_tokens.weight[5] = float("nan")

    with pytest.raises(
        train.NonFiniteLoss,
        match=r"step 4: no finite loss in row \d+ \((chosen|rejected)\), column \d+: the policy.s log-probability",
    ):
        fit(
            replace(config, eval_every=1, save_every=2),
            policy,
            frozen_copy(policy),
            tiny.pairs(8),
            callbacks=[poison],
            progress=False,
        )
    kept = store.newest(tmp_path / "run" / "checkpoints")
    assert kept.name == "step-00000002"
    assert torch.isfinite(load_file(kept / "model.safetensors")["model.norm.weight"]).all()


def forbidding(*tokens: int):
    """A GPT-J, whose head has a bias: -inf at these tokens."""
    model = tiny.gptj()
    with torch.no_grad():
        model.lm_head.bias[list(tokens)] = -math.inf
    return model


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2", "tgdpo", "simpo"])
def test_forbidden_tokens_train_alike_on_both_paths_and_leave_json(name, tmp_path):
    pairs, rows = tiny.pairs(8, vocab=60), []  # no response holds tokens 60 to 63
    for fused in (True, False):
        folder = tmp_path / str(fused)
        config = replace(CONFIG, loss_type=name, output_dir=str(folder), eval_every=1, guide_beta=0.1)
        models = forbidding(61), forbidding(61, 62)
        more = {"guide": forbidding(60), "eval_pairs": pairs, "fast": FastPath(fused=fused)}
        fit(config, *models, pairs, **more, progress=False)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines])
    assert len(rows[0]) > 2
    for fused, plain in zip(*rows, strict=True):
        assert fused == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("name", "policy", "reference", "held_out", "message"), [
    ("tdpo1", (), (5,), False, r"step 1: no finite loss in row 9 \(rejected\), column 3: the reference's .* forbids this token"),
    ("dpo", (5,), (5,), False, r"step 1: no finite loss in row 9 \(rejected\), column 3: the policy's .* forbids this token"),
    ("dpo", (), (5,), True, r"held-out pairs: no finite loss in row 9 \(rejected\), column 3: the reference's"),
    ("tdpo2", (61,), (), False, r"step 1: no finite loss in row \d \(chosen\), column \d+: KL.* is inf"),
])  # fmt: skip
def test_forbidden_tokens_in_a_response_are_refused_with_the_place(name, policy, reference, held_out, message, fused):
    good = [replace(pair, row=row) for row, pair in enumerate(tiny.pairs(4, vocab=5))]
    bad = [*good[:3], EncodedPair(9, [0, 1], [2, 3], [4, 5])]
    models = forbidding(*policy), forbidding(*reference)
    config = replace(CONFIG, loss_type=name, eval_every=1, batch_size=4)
    bad, good = (bad, good) if not held_out else (good, bad)
    more = {"eval_pairs": good if held_out else None, "fast": FastPath(fused=fused)}
    with pytest.raises(train.NonFiniteLoss, match=message):
        fit(config, *models, bad, **more, progress=False)


def test_checkpoints_are_model_folders(tmp_path):
    from transformers import AutoModelForCausalLM

    result = trained(replace(CONFIG, output_dir=str(tmp_path / "run")))
    for folder in (result.output_dir / "final", store.newest(result.output_dir / "checkpoints")):
        loaded = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True)
        assert same(weights(loaded), weights(result.policy))
        assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt"))
    rows = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.metrics


def test_only_the_last_checkpoints_are_kept(tmp_path):
    result = trained(replace(CONFIG, output_dir=str(tmp_path / "run"), epochs=3, keep=2))
    assert [path.name for path in sorted((result.output_dir / "checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000006",
    ]


def test_folder_with_a_run_is_refused_without_resume(tmp_path):
    config = replace(CONFIG, output_dir=str(tmp_path / "run"))
    trained(config)
    with pytest.raises(RuntimeError, match="holds a run already; continue it with --resume"):
        trained(config)
    with pytest.raises(RuntimeError, match=r"beta was 0\.1, is 0\.2"):
        trained(replace(config, beta=0.2), resume=True)


def test_folder_in_use_is_refused(tmp_path):
    with store.exclusive(tmp_path / "run"):
        status, told = apart(longer, tmp_path / "run")
    assert status == 1
    assert "is in use by another run" in told


def killed(folder: Path, point) -> None:
    """Train until `point`, an update or a place within a save, and die there."""

    def die(*_) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(real, call: int):
        calls = itertools.count(1)
        return lambda *args: (die if next(calls) == call else real)(*args)

    if point == "writing":  # after the weights of the second checkpoint, before its state
        store.save_state = dying(store.save_state, 2)
    if point == "renaming":  # a complete folder that has not got its name yet
        os.rename = dying(os.rename, 3)
    longer(folder, callbacks=[lambda step, _: die() if point == step else None])


def longer(folder: Path, **more) -> None:
    config = replace(CONFIG, epochs=3, loss_type="tdpo2", output_dir=str(folder), eval_every=1, save_every=2)
    trained(config, **more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder, threads = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes of their own: they end bit for bit alike
    longer(folder)
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("point", [0, 1, 3, "writing", "renaming"])
def test_killed_run_resumes_to_bit_identical_weights(point, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    assert apart(killed, folder, point)[0] == -signal.SIGKILL
    status, told = apart(partial(longer, resume=True), folder)
    assert status == 0, told
    a, b = (load_file(run / "final" / "model.safetensors") for run in (folder, uninterrupted))
    assert same(a, b)
    assert (folder / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()
    assert not list(folder.glob("**/*.unfinished"))


def test_altered_checkpoint_is_passed_over(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "final")
    last = sorted((folder / "checkpoints").iterdir())[-1]
    with open(last / "model.safetensors", "r+b") as file:
        file.truncate(200)
    status, told = apart(partial(longer, resume=True), folder)
    assert status == 0, told
    assert "model.safetensors was truncated or altered" in told
    a, b = (load_file(run / "final" / "model.safetensors") for run in (folder, uninterrupted))
    assert same(a, b)


@pytest.mark.parametrize("cached_first", [True, False])
def test_caches_may_come_and_go_on_a_resume(cached_first, tmp_path):
    config = replace(CONFIG, loss_type="tdpo2", epochs=3, lr=1e-4, output_dir=str(tmp_path / "run"), keep=9)
    settings = [FastPath(cache_dir=str(tmp_path / "caches")), None]
    first, second = settings if cached_first else settings[::-1]
    trained(config, fast=first)
    shutil.rmtree(tmp_path / "run" / "final")
    for late in sorted((tmp_path / "run" / "checkpoints").iterdir())[3:]:
        shutil.rmtree(late)
    resumed, whole = trained(config, fast=second, resume=True), trained(replace(config, output_dir=None))
    assert (tmp_path / "caches").exists()
    for name, value in weights(whole.policy).items():
        torch.testing.assert_close(weights(resumed.policy)[name], value, rtol=1e-6, atol=1e-6)
    assert [row["loss"] for row in resumed.metrics] == pytest.approx([row["loss"] for row in whole.metrics], rel=1e-6)


def test_nothing_sound_to_resume_from_is_refused(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    with pytest.raises(RuntimeError, match="none of the 2 checkpoints"):
        longer(folder, resume=True)
    assert (folder / "metrics.jsonl").read_text() == (uninterrupted / "metrics.jsonl").read_text()  # nothing is lost


def test_full_disk_leaves_the_previous_checkpoint_usable(tmp_path, monkeypatch):
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), epochs=2)
    real, calls = store.save_state, []

    def full(path, state):
        calls.append(path)
        if len(calls) >= 3:
            raise OSError(28, "No space left on device")
        real(path, state)

    monkeypatch.setattr(store, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        trained(config)
    assert store.newest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    assert not list(tmp_path.glob("**/*.unfinished"))
    monkeypatch.setattr(store, "save_state", real)
    resumed, whole = trained(config, resume=True), trained(replace(config, output_dir=None))
    assert same(weights(resumed.policy), weights(whole.policy))


def test_metrics_reach_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="extra dev is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = trained(replace(CONFIG, output_dir=str(tmp_path), report_to="tensorboard"))
    event_file = next(
        path for path in tmp_path.rglob("events.out*") if "rewards/margins" in _tags(EventAccumulator, path)
    )
    events = EventAccumulator(str(event_file)).Reload().Scalars("rewards/margins")
    assert [event.step for event in events] == [1, 2]
    assert events[-1].value == pytest.approx(result.metrics[-1]["rewards/margins"], rel=1e-5)


def _tags(accumulator, path) -> list[str]:
    return accumulator(str(path)).Reload().Tags()["scalars"]


def test_two_processes_make_the_updates_of_one(tmp_path):
    """Data-parallel training on two CPU processes: the same global batch, the same weights."""
    for status, _, told in together(half_of_it, tmp_path / "two"):
        assert status == 0, told
    two = load_file(tmp_path / "two" / "final" / "model.safetensors")
    one = trained(replace(CONFIG, loss_type="tdpo2", optimizer="rmsprop", batch_size=4))
    for name, value in one.policy.state_dict().items():
        if name in two:
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-4)
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] == pytest.approx(one.metrics[-1]["loss"], rel=1e-4)
    assert rows[-1]["pairs_seen"] == 8


def half_of_it(rank: int, folder: Path) -> None:
    trained(replace(CONFIG, loss_type="tdpo2", optimizer="rmsprop", batch_size=2, output_dir=str(folder)))


def test_a_sharded_policy_has_the_gradients_of_a_whole_one():
    """FSDP on two CPU processes: the head is gathered when it runs, its tied weight included."""
    for status, _, told in together(shards_of_gradients):
        assert status == 0, told


def shards_of_gradients(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, ref = init_device_mesh("cpu", (2,)), ResponseReader(tiny.llama())

    def moved():
        model = tiny.llama()
        with torch.no_grad():
            for x in model.parameters():
                x += 0.05 * torch.arange(x.numel(), dtype=x.dtype).sin().view_as(x)
        return model

    def scorer_of(config, model):
        return train.PairScorer(config, ResponseReader(model), fused_path.pair_loss)

    def backward(scorer, pairs):
        batch = collate(pairs, 0)
        with torch.no_grad():
            said = ref(batch)
        scorer(batch, {"ref": said}, False)[0].loss.mean().backward()

    for loss_type in ("dpo", "tdpo1", "tdpo2"):
        config, whole, sharded = replace(CONFIG, loss_type=loss_type), moved(), moved()
        backward(scorer_of(config, whole), tiny.pairs(8))
        scorer = scorer_of(config, sharded)
        for module in [*sharded.model.layers, scorer]:
            fully_shard(module, mesh=mesh)
        scorer.policy.mostly_full = 0.0  # layers are gathered as often in both
        backward(scorer, tiny.pairs(8)[4 * rank : 4 * rank + 4])
        for (name, x), y in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            assert x.to_local().numel() < y.numel(), name
            torch.testing.assert_close(x.grad.full_tensor(), y.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("tdpo1", [True, False, True, False]), ("tdpo2", [False] * 4)])
def test_statistics_are_left_out_between_logged_updates_where_the_loss_can_do_without(name, expected, monkeypatch):
    asked, pair_loss = [], fused_path.pair_loss

    def watched(*args, **kwargs):
        output, tokens = pair_loss(*args, **kwargs)
        asked.append(tokens is None)
        return output, tokens

    monkeypatch.setattr(fused_path, "pair_loss", watched)
    result = trained(replace(CONFIG, loss_type=name, batch_size=2, accumulation=1, epochs=1, log_every=2))
    assert asked == expected
    assert all({"logps/chosen", "kl/rejected"} <= row.keys() for row in result.metrics)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused_before_it_costs_anything(kind, monkeypatch):
    monkeypatch.setattr(accelerated.Processes, "distributed_type", accelerated.DistributedType[kind])
    with pytest.raises(ValueError, match=f"accelerate is set to {kind}.* --lora-rank"):
        trained(CONFIG)


def test_on_log_sees_every_row_and_ends_the_run():
    seen = []
    config = replace(CONFIG, log_every=1, epochs=4)
    result = fit(
        config, tiny.llama(), tiny.llama(), tiny.pairs(8), progress=False,
        on_log=lambda row: seen.append(row) or len(seen) == 3,
    )  # fmt: skip
    assert result.steps == 3
    assert seen == result.metrics
    assert fit(config, tiny.llama(), tiny.llama(), tiny.pairs(8), progress=False, on_log=seen.append).steps > 3


def test_many_weights_on_a_cpu_are_updated_in_one_pass_as_few_are():
    def stepped(count: int) -> torch.Tensor:
        layer = torch.nn.Linear(1, count, bias=False)
        layer.weight.data = torch.linspace(-1, 1, count)[:, None]
        optimizer = train.build_optimizer(replace(CONFIG, lr=1e-3, weight_decay=0.1), layer)
        for _ in range(3):
            layer.weight.grad = layer.weight.detach().cos()
            optimizer.step()
        assert optimizer.param_groups[0]["fused"] == (True if count > 2**25 else None)
        return layer.weight.detach()[:: count // 8, 0]

    # the last of the eight lie a little apart, for the line is cut finer
    torch.testing.assert_close(stepped(2**25 + 8)[:8], stepped(8 * 1024)[:8], rtol=1e-5, atol=3e-4)


GROUPED = replace(CONFIG, loss_type="tgdpo", guide_beta=0.1, batch_size=8, epochs=2, group_prompts=True)


@pytest.mark.parametrize("fast", [{}, {"fused": False}, {"share_prefix": True}, {"cache_dir": "caches"}])
def test_completions_read_once_for_their_pairs_give_the_same_run(fast, tmp_path):
    if "cache_dir" in fast:
        fast = {"cache_dir": str(tmp_path)}
    pairs = tiny.of_prompts(5)  # thirty: three updates of eight, some of which begin within a prompt
    frozen = {"reference": tiny.llama(), "guide": tiny.llama(seed=2)}
    plain = train.fit(replace(GROUPED, output_dir=None), tiny.llama(seed=1), pairs=pairs, progress=False, **frozen)
    assert plain.steps == 6
    read, model = [], tiny.llama(seed=1)
    model.model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    again = fit(GROUPED, model, pairs=pairs, fast=FastPath(**fast), progress=False, **frozen)
    for name, value in weights(plain.policy).items():
        torch.testing.assert_close(weights(again.policy)[name], value, rtol=1e-3, atol=1e-4)
    for row, other in zip(plain.metrics, again.metrics, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "guidance/floor_share"):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name
    assert sum(read) < 0.6 * 2 * 8 * 6


def test_a_run_of_whole_prompts_resumes_bit_for_bit_and_only_as_one(tmp_path):
    pairs, config = tiny.of_prompts(5), replace(GROUPED, loss_type="tdpo2", save_every=1)
    whole = fit(config, tiny.llama(seed=1), tiny.llama(), pairs, progress=False)
    kept = replace(config, output_dir=str(tmp_path))
    fit(kept, tiny.llama(seed=1), tiny.llama(), pairs, progress=False, on_log=lambda row: row["step"] == 2)
    with pytest.raises(RuntimeError, match="group_prompts was True, is False"):
        fit(replace(kept, group_prompts=False), tiny.llama(seed=1), tiny.llama(), pairs, progress=False, resume=True)
    again = fit(kept, tiny.llama(seed=1), tiny.llama(), pairs, progress=False, resume=True)
    assert same(weights(again.policy), weights(whole.policy))
    assert again.metrics == whole.metrics


@pytest.mark.parametrize(
    ("fast", "changes"), [({"share_prefix": True}, {}), ({"fused": False}, {}), ({}, {"max_tokens": 50})]
)
def test_how_a_batch_is_read_does_not_change_the_run(fast, changes):
    config = replace(CONFIG, loss_type="tgdpo", guide_beta=0.1, epochs=2)
    plain, other = trained(config), trained(replace(config, **changes), fast=FastPath(**fast))
    for name, value in weights(plain.policy).items():
        torch.testing.assert_close(weights(other.policy)[name], value, rtol=1e-3, atol=1e-4)
    for row, again in zip(plain.metrics, other.metrics, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "kl/rejected", "guidance/floor_share"):
            assert again[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


def test_a_loop_in_memory_does_not_mind_the_precision_of_the_one_before():
    policy, reference = tiny.llama(), tiny.llama()
    for precision in ("bf16", "no"):  # each in its own, whatever the other had
        config = TrainConfig(precision=precision, batch_size=2, max_steps=1, device="cpu")
        run = train.Progress(config)
        train.fit(config, policy, reference, tiny.pairs(4), run=run, progress=False)
        assert run.accelerator.mixed_precision == precision
