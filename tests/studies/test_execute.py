"""One run of a study on the bundled model, small: its record, its guides, and that it is a function of its spec."""

from __future__ import annotations

import pytest
import torch

from tpo_lib.files import store
from tpo_lib.runs.run import shared_prompts
from tpo_lib.studies import bench, execute

DATA = {"seed": 3, "train_prompts": 24, "max_pairs": 24, "max_new_tokens": 12, "min_gap": 0.1}
DPO = {"loss_type": "dpo", "beta": 0.1, "lr": 3e-4, "batch_size": 8, "max_steps": 2, "warmup_steps": 0, "seed": 3}
EVALUATE = {"on": "test", "at": [1, 2], "samples": 2, "seed": 3}
SPEC = {"data": DATA, "train": DPO, "evaluate": EVALUATE}
TGDPO = SPEC | {"train": DPO | {"loss_type": "tgdpo", "alpha": 1.0, "guide_beta": 0.1}, "guide": DPO | {"max_steps": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs on a bench with few prompts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TEST", 8), ("VALIDATION", 4), ("HELD_OUT_PAIRS", 8)):
            patch.setattr(bench, name, value)
        for cached in (bench.build, bench._held_out):
            cached.cache_clear()
        threads = torch.get_num_threads()  # a run takes one, and stays with it
        yield tmp_path_factory.mktemp("runs")
        torch.set_num_threads(threads)
        for cached in (bench.build, bench._held_out):
            cached.cache_clear()


def made(spec: dict, folder) -> dict:
    execute.execute(spec, folder)
    return execute.read(spec, folder)


def test_a_record_has_the_start_and_every_evaluation(folder):
    found = made(SPEC, folder)
    assert found["spec"] == SPEC
    assert [point["step"] for point in found["points"]] == [0, 1, 2]
    start, _, end = found["points"]
    assert start["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert end["metrics"]["kl"]["mean"] > 0.01
    assert len(end["by_prompt"]["reward"]) == 8
    assert sum(end["by_prompt"]["reward"]) / 8 == pytest.approx(end["metrics"]["reward"]["mean"], abs=1e-5)
    assert found["versions"]["threads"] == "1"


def test_a_run_is_a_function_of_its_spec(folder, tmp_path):
    again = made(SPEC, tmp_path)
    for part in ("points", "training", "guide", "pairs"):
        assert again[part] == made(SPEC, folder)[part]


def test_a_run_that_is_there_is_not_made_again(folder, monkeypatch):
    made(SPEC, folder)
    monkeypatch.setattr(execute, "_made", None)
    execute.execute(SPEC, folder)


def test_prompts_of_the_three_parts_share_no_beginning(folder):
    for seed in (0, 1):
        data = bench.build(bench.Data(seed=seed, train_prompts=40, max_pairs=8, min_gap=0.0), folder / "pairs")
        parts = data.stage.held_out_prompts, data.validation, data.training
        assert len(parts[0]) == bench.TEST
        for one in parts:
            for other in parts:
                if one is not other:
                    assert not shared_prompts(one, other)


def test_seeds_share_test_prompts_and_nothing_else(folder):
    one, other = (bench.build(bench.Data(**DATA | {"seed": seed}), folder / "pairs") for seed in (3, 4))
    assert one.stage.held_out_prompts == other.stage.held_out_prompts
    assert one.stage.held_out_pairs == other.stage.held_out_pairs
    assert set(one.training) != set(other.training)
    assert one.on("validation", 2).held_out_prompts == one.validation


def test_what_a_gpu_makes_lies_apart(monkeypatch):
    here = execute.key({"data": DATA})
    assert here == store.content_key({"format": execute.FORMAT, "spec": {"data": DATA}, "own": []})[:24]
    found = {here}
    for device, precision in (("cuda", "bf16"), ("cuda", "fp16"), ("mps", "no")):
        monkeypatch.setattr(execute, "choose_device", lambda device=device: torch.device(device))
        monkeypatch.setattr(execute, "choose_precision", lambda device, precision=precision: precision)
        found.add(execute.key({"data": DATA}))
    assert len(found) == 4


def test_a_guide_is_trained_once_and_kept(folder, monkeypatch):
    first = made(TGDPO, folder)
    kept = execute.key({"data": DATA, "train": TGDPO["guide"]})
    assert (folder / kept / "model.safetensors").is_file()
    monkeypatch.setattr(execute, "_trained", guarded(execute._trained, "dpo"))
    again = made(TGDPO | {"evaluate": EVALUATE | {"samples": 1}}, folder)
    assert again["training"] == first["training"]


def guarded(train, never: str):
    def trained(config, *given, **more):
        assert config.loss_type != never, "the guide was trained again"
        return train(config, *given, **more)

    return trained


def test_a_shuffled_guide_and_a_matched_beta_leave_a_note(folder):
    shuffled = made(TGDPO | {"guided_by": {"kind": "shuffled"}}, folder)
    plain = made(TGDPO, folder)
    assert shuffled["guide"]["std"] > 0
    assert shuffled["training"] != plain["training"]
    matched = made(SPEC | {"guide": TGDPO["guide"], "match": {"alpha": 1.0, "guide_beta": 0.1}}, folder)
    assert matched["guide"]["beta"] == pytest.approx(0.1 * matched["guide"]["f"], rel=1e-4)
    assert matched["training"] != made(SPEC, folder)["training"]


def test_labels_and_another_writer_change_the_pairs(folder):
    noisy = made(SPEC | {"data": DATA | {"labels": {"noise": 0.5}}}, folder)
    assert noisy["pairs"]["noise"]["swapped"] > 0
    assert noisy["training"] != made(SPEC, folder)["training"]
    written = made(SPEC | {"data": DATA | {"writer": 1}}, folder)
    assert written["pairs"]["pairs"] > 0
    assert written["training"] != made(SPEC, folder)["training"]


def test_an_online_run_and_the_best_of_n(folder):
    online = {
        "estimator": "rloo",
        "updates": 1,
        "prompts_per_update": 4,
        "minibatches": 2,
        "epochs": 1,
        "max_new_tokens": 12,
    }
    found = made({"data": DATA, "online": online, "evaluate": EVALUATE | {"at": [1]}}, folder)
    assert found["points"][-1]["metrics"]["kl"]["mean"] > 0
    assert found["training"][0]["tokens"] > 0
    best = made({"data": DATA, "best_of": 4, "evaluate": EVALUATE}, folder)
    assert [len(best["scores"][name]) for name in ("reward", "judge", "second_judge")] == [8] * 3
    assert len(best["scores"]["reward"][0]) == 4


def test_an_evaluation_past_the_end_is_refused(folder):
    with pytest.raises(ValueError, match=r"made 2 updates and is evaluated at \[1, 3\]"):
        execute.execute(SPEC | {"evaluate": EVALUATE | {"at": [1, 3]}}, folder)
