"""Settings shared by all tests: reproducible examples, no deadline on a busy machine, a fixed seed."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported: no test may reach for the network

import pytest
import torch
from hypothesis import settings

from tpo_lib.losses import OBJECTIVES

# Two processes share the files, a file at a time: the long ones first, so that both end together.
LONG = (
    "test_families",
    "test_compare",
    "test_gpu",
    "test_train",
    "test_processes",
    "test_frozen",
    "test_run",
    "test_wheel",
)
settings.register_profile("tpo", deadline=None, derandomize=True, database=None)
settings.load_profile("tpo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.match("*.ipynb") and item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _light_collections():
    """Every training run collects garbage at its end: let it look at a file's own objects alone."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _objectives():
    """What a file's tests register is gone after them: others go through all objectives there are."""
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


@pytest.fixture(scope="session")
def small_stage(tmp_path_factory):
    """A stage on the bundled model with a few short pairs, small gaps among them; no test changes it."""
    from tpo_lib.runs.stage import build_stage, pocket_stage_config

    config = replace(
        pocket_stage_config(quick=True),
        train_prompts=24,
        held_out_prompts=6,
        max_pairs=128,
        max_new_tokens=16,
        min_gap=0.0,
        max_held_out_pairs=8,
    )
    return build_stage(config, cache_dir=tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The whole site, built once: see `tpo_course.site.build`."""
    from tpo_course.site.build import build

    return build(tmp_path_factory.mktemp("site") / "out")
