"""The four steps give one loss and one gradient, and what is measured of them is what happened."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tpo_course import ladder
from tpo_lib.losses import OBJECTIVES


def scene(objective: str, **changed) -> ladder.Scene:
    sizes = {"vocab": 211, "pairs": 3, "length": 32, "layers": 1, "hidden": 32}
    return ladder.gpt2_scene(objective, **{**sizes, **changed})


def loss_and_gradient(step, given: ladder.Scene) -> list[torch.Tensor]:
    given.policy.zero_grad()
    output = step(given)
    output.loss.mean().backward()
    rewards = [output.loss.detach(), output.chosen_reward, output.rejected_reward]
    return rewards + [p.grad.clone() for p in given.policy.parameters()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_step_gives_the_same_loss_and_gradient(objective):
    given = scene(objective)
    with torch.no_grad():  # away from the start, where the KL is 0 and pushes nothing
        for p in given.policy.parameters():
            p += 0.05 * torch.randn_like(p)
    expected = loss_and_gradient(ladder.textbook, given)
    assert expected[-1].abs().max() > 0
    for name, step in ladder.STEPS.items():
        for found, right in zip(loss_and_gradient(step, given), expected, strict=True):
            scale = max(1.0, right.abs().max().item())  # IPO's is a square of nats
            torch.testing.assert_close(found, right, rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_a_scene_has_the_models_its_objective_reads():
    frozen = {name: set(scene(name).frozen) for name in OBJECTIVES}
    reads = {name: {field.removesuffix("_logps") for field in OBJECTIVES[name].needs} - {"kl"} for name in OBJECTIVES}
    assert frozen == reads
    assert (reads["simpo"], reads["tdpo2"], reads["tgdpo"]) == (set(), {"ref"}, {"ref", "guide"})
    assert {name: scene(name).with_kl for name in OBJECTIVES} == {name: "tdpo" in name for name in OBJECTIVES}
    even = scene("dpo", ragged=False).batch
    assert (even.attention_mask == 1).all()
    assert (scene("dpo").batch.attention_mask == 0).any()
    assert scene("dpo").batch.input_ids.shape == even.input_ids.shape == (6, 32)


def test_times_are_taken_and_gradients_cleared():
    given = scene("tdpo2")
    seconds = ladder.timed(given, ladder.STEPS, repeats=1)
    assert seconds.keys() == ladder.STEPS.keys()
    assert all(s > 0 for s in seconds.values())
    parts = ladder.breakdown(given, repeats=1)
    assert len(parts) == 6
    assert all(s >= 0 for s in parts.values())
    assert all(p.grad is None for p in given.policy.parameters())


def test_the_watch_counts_what_is_alive():
    with ladder.LiveVocabulary(7) as live:
        a = torch.zeros(2, 3, 7)
        b = a + 1
        view = b.transpose(0, 1)  # no memory of its own
        other = torch.zeros(2, 8)
        del a
        c = view * 2
        del b, view, c
        other += 1
    one = 2 * 3 * 7 * 4
    assert max(live.timeline) == 2 * one
    assert live.timeline[-1] == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the peak is what getrusage says")
def test_a_peak_is_not_that_of_the_process_that_started_it():
    source = inspect.getsource(ladder._high_water)
    script = f"import re, resource, sys\nfrom pathlib import Path\n{source}\nprint(_high_water())"
    peaks = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
        ballast = b"x" * (512 << 20)  # of the second one's parent
    assert abs(peaks[1] - peaks[0]) < len(ballast) / 8
