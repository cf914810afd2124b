"""What a chapter's live cells run on: the tier that its set-up cell names, or what the runtime can carry.

PRESET = tiers.choose("smollm2-135m (GPU)")     # "pocket", with one sentence, where there is no GPU for it
stage = tiers.stage(PRESET)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

# each tier: its preset, and gigabytes of GPU memory
TIERS = {"pocket (CPU)": ("pocket", 0), "smollm2-135m (GPU)": ("smollm2-135m", 6), "gpt2-imdb (GPU)": ("gpt2-imdb", 14)}
SWITCH = "on Colab: Runtime, Change runtime type, T4 GPU; on Kaggle: Settings, Accelerator"


def choose(tier: str) -> str:
    """The preset of a tier; the pocket model's, and one sentence, where the GPU is missing or too small.

    Raises:
        ValueError: there is no such tier.
    """
    if tier not in TIERS:
        raise ValueError(f"TIER {tier!r} is none; choose one of {', '.join(TIERS)}")
    preset, needed = TIERS[tier]
    there = gpu_gigabytes()
    if there >= needed:
        offer = max((name for name in TIERS if TIERS[name][1] <= there), key=lambda name: TIERS[name][1])
        if TIERS[offer][1] > needed:
            print(f"This machine's GPU has {there:.0f} GB ({_precision()}): TIER = {offer!r} would run here, too.")
        return preset
    found = f"one of {there:.0f} GB" if there else "none"
    print(f"TIER {tier} needs a GPU of {needed} GB and there is {found}: live cells run the pocket model ({SWITCH}).")
    return "pocket"


def gpu_gigabytes() -> float:
    """Memory of the first GPU, 0 without one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 0.0


def _precision() -> str:
    """What the presets' "auto" makes of this GPU: fp16 on a T4, bf16 on newer ones."""
    import torch

    from tpo_lib.models import choose_precision

    return choose_precision(torch.device("cuda"), "auto")


def live(preset: str) -> str:
    """What a cell on the real model runs: the tier's preset, or SmolLM2 where a GPU and its weights are at hand; else pocket."""
    from tpo_lib.files import smollm2

    at_hand = Path(smollm2.name()).is_dir() and gpu_gigabytes() >= TIERS["smollm2-135m (GPU)"][1]
    return smollm2.NAME if preset == "pocket" and at_hand else preset


def comparison(preset: str):
    """The preset's small comparison, with a judge in any case: the chapter on it has a section."""
    from tpo_lib.files.load import POCKET
    from tpo_lib.runs import presets

    config = presets.comparison(preset, quick=True)
    return replace(config, stage=replace(config.stage, judge=config.stage.judge or str(POCKET / "judge")))


def stage(preset: str):
    """The stage of that comparison, its pairs kept in the cache."""
    from tpo_lib.files import store
    from tpo_lib.runs.stage import build_stage

    return build_stage(comparison(preset).stage, cache_dir=store.cache_folder() / "pairs")
