"""types.py: records cannot be changed by accident, and a batch moves as a whole."""

from __future__ import annotations

import inspect
import re
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from tpo_lib.types import IGNORE, LossOutput, PairBatch, TokenStats


def test_ignore_is_the_index_that_torch_and_transformers_ignore():
    assert IGNORE == -100 == torch.nn.CrossEntropyLoss().ignore_index


def test_a_batch_moves_as_a_whole_and_keeps_its_fields_apart():
    names = [field.name for field in fields(PairBatch)]
    assert names == ["input_ids", "attention_mask", "labels", "rows"]
    batch = PairBatch(*(torch.full((2, 3), i) for i in range(4)))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in names)
    same = batch.to("cpu")
    assert all(torch.equal(getattr(same, name), getattr(batch, name)) for name in names)


@pytest.mark.parametrize("record", [PairBatch, TokenStats, LossOutput])
def test_records_are_frozen_and_every_field_is_explained(record):
    values, source = record(*(torch.zeros(1) for field in fields(record))), inspect.getsource(record)
    for field in fields(record):
        with pytest.raises(FrozenInstanceError):
            setattr(values, field.name, None)
        assert re.search(rf"^    {field.name}: .*  # \(", source, re.MULTILINE), "shape first"


def test_what_an_objective_may_not_need_is_optional():
    stats = TokenStats(torch.zeros(1, 2), None, torch.ones(1, 2, dtype=torch.bool))
    assert (stats.kl, stats.guide_logps) == (None, None)
    assert LossOutput(*[torch.zeros(1)] * 3).token_weights is None
