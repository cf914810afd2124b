"""Settings shared by all tests: reproducible examples, no deadline on a busy machine, a fixed seed."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported: no test may reach for the network

import pytest
import torch
from hypothesis import settings

settings.register_profile("tpo", deadline=None, derandomize=True, database=None)
settings.load_profile("tpo")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
