"""A study made by hand: four methods, five seeds, two grids; its curves are straight in the root of the KL."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tpo_lib.studies import study

SEEDS = (1, 2, 3, 4, 5)
PLAN = """
number = 1
title = "Toy"
question = "Which is higher?"
primary = "area reward"
[train]
max_steps = 8
[tune]
seed = 0
at = [8]
samples = 1
[report]
seeds = [1, 2, 3, 4, 5]
at = [2, 4, 8]
samples = 1
[[method]]
name = "dpo"
loss_type = "dpo"
grid = { beta = [0.05, 0.1, 1.0], lr = [1e-4, 3e-4] }
[[method]]
name = "tdpo2"
loss_type = "tdpo2"
grid = { alpha = [0.1, 0.5], beta = [0.1], lr = [3e-4] }
each = "alpha"
[[method]]
name = "simpo"
loss_type = "simpo"
beta = 2.0
[[endpoint]]
kind = "area"
between = [1, 4]
"""
GAINS = {"dpo": 0.1, "tdpo2 α0.1": 0.1, "tdpo2 α0.5": 0.13, "simpo": 0.08}  # of reward, a root of a nat
KLS = {"dpo": (0, 1, 4, 16), "tdpo2 α0.1": (0, 1, 4, 16), "tdpo2 α0.5": (0, 1, 4, 9), "simpo": (0, 4, 9, 25)}


def runs(name: str) -> list[dict]:
    """A run a seed: reward and judges rise in the root of the KL, more for some seeds; seed 5 stops short."""
    found = []
    for seed in SEEDS:
        kls = np.array(KLS[name], dtype=float) * (0.5 if seed == 5 else 1)
        reward = 0.5 + GAINS[name] * kls**0.5 + 0.004 * (seed - 3) * (-1 if name == "simpo" else 1) * (kls > 0)
        points = [
            {"step": step, "kl": kl, "reward": value, "judge": value - 0.1}
            for step, kl, value in zip((0, 2, 4, 8), kls.tolist(), reward.tolist(), strict=True)
        ]
        found.append({"seed": seed, "points": points, "endpoints": {}, "training": {}})
    return found


def write(place: Path) -> Path:
    """The study's file and result in a folder of studies, which is returned."""
    place.mkdir(exist_ok=True)
    (place / "toy.toml").write_text(PLAN, encoding="utf-8")
    dpo = [{"loss_type": "dpo", "beta": beta, "lr": lr} for beta in (0.05, 0.1, 1.0) for lr in (1e-4, 3e-4)]
    tdpo2 = [{"loss_type": "tdpo2", "alpha": alpha, "beta": 0.1, "lr": 3e-4} for alpha in (0.1, 0.5)]
    areas = (0.7, 0.71, 0.74, 0.78, 0.6, 0.62)
    grid = [["dpo", setting, area] for setting, area in zip(dpo, areas, strict=True)]
    grid += [["tdpo2", setting, 0.7 + setting["alpha"]] for setting in tdpo2]
    chosen = {"dpo": ["dpo", dpo[3]], "simpo": ["simpo", {"loss_type": "simpo", "beta": 2.0}]}
    chosen |= {f"tdpo2 α{setting['alpha']}": ["tdpo2", setting] for setting in tdpo2}
    result = {"grid": grid, "chosen": chosen, "best": {"dpo": "dpo", "tdpo2": "tdpo2 α0.5", "simpo": "simpo"}}
    result["best_of_n"] = [{"n": n, "kl": np.log(n), "reward": 0.5 + 0.05 * np.log2(n)} for n in (1, 2, 4)]
    study.write(place / "results" / "toy.json", result | {"runs": {name: runs(name) for name in GAINS}})
    return place
