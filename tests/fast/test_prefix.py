"""prefix.py: one prompt for two responses, and hidden states as if each had its own."""

from __future__ import annotations

import pytest
import tiny
import torch

from tpo_lib import stats
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import prefix
from tpo_lib.fast.prefix import DistinctReader, SharedReader
from tpo_lib.models import ResponseReader


def test_worked_by_hand():
    batch = collate([EncodedPair(0, [5, 6], [7, 8], [9])], pad_token_id=0)
    shared = prefix.share(batch)
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert shared.visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the rejected token sees the prompt and itself
    ]
    assert shared.row.tolist() == [0, 0]
    assert shared.where.tolist() == [[0, 1, 2, 3], [0, 1, 4, -1]]


def test_what_has_room_behind_another_prompt_goes_there():
    pairs = [EncodedPair(0, [5, 6], [7, 8], [9]), EncodedPair(1, [4], [3], [2]), EncodedPair(2, [5, 6], [7], [1])]
    shared = prefix.share(collate(pairs, pad_token_id=0))
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 7, 9, 1], [4, 3, 2, 0, 0, 0, 0]]
    shared = prefix.share(collate([*pairs, EncodedPair(3, [8], [2], [3])], pad_token_id=0))
    assert shared.input_ids.tolist() == [[5, 6, 7, 8, 7, 9, 1], [4, 3, 2, 8, 2, 3, 0]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2, 2, 2], [0, 1, 1, 0, 1, 1, 0]]
    assert shared.visible[1, 0, :6, :6].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],  # the other prompt sees itself alone
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]


def test_every_family_that_shares_is_tested():
    assert set(tiny.FAMILIES) == prefix.FAMILIES


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_hidden_states_and_gradients_are_those_of_two_sequences(name):
    model, batch = tiny.family(name), collate(tiny.pairs(7), 0)
    assert batch.labels.shape[1] > 2 * tiny.WINDOW
    found = []
    for reader in (ResponseReader, SharedReader):
        model.zero_grad()
        states = reader(model)(batch).states
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append((states, [p.grad.clone() for p in model.base_model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, one.abs().max().item()))


def test_a_prompt_is_read_once():
    pairs = [EncodedPair(row, [0] + [1 + row] * 30, [2] * 5, [3] * 4) for row in range(6)]
    batch, model, read = collate(pairs, 0), tiny.llama(), []
    reader = SharedReader(model)
    model.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    reader(batch)
    assert read == [6 * (31 + 5 + 4)]  # two sequences each: 6 * 2 * 36


def every_state(reading) -> torch.Tensor:
    return reading.states if reading.rows is None else reading.states[reading.rows]


def test_pairs_with_two_prompts_are_read_as_they_are():
    batch = collate([EncodedPair(0, [5, 6], [7, 8], [9]), EncodedPair(1, [5, 6], [7, 8], [9])], pad_token_id=0)
    batch.input_ids[3, 1] = 4
    plain, shared = (every_state(reader(tiny.llama())(batch)) for reader in (ResponseReader, SharedReader))
    torch.testing.assert_close(plain, shared)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("reader", [DistinctReader, SharedReader])
def test_completions_that_stand_in_three_pairs_are_read_once(reader, name):
    model, batch, read, found = tiny.family(name), collate(tiny.of_prompts(3), 0), [], []
    distinct = {tuple(row) for row in batch.input_ids.tolist()}
    assert (len(batch.labels), len(distinct)) == (36, 12)
    for each in (ResponseReader, reader):
        model.zero_grad()
        reading = each(model)(batch)
        states = every_state(reading)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append((states, [p.grad.clone() for p in model.base_model.parameters()]))
    responses = dict(zip(map(tuple, batch.input_ids.tolist()), batch.labels, strict=True)).values()
    assert len(reading.states) == sum(int((row != -100).sum()) for row in responses)
    torch.testing.assert_close(found[0][0], found[1][0])
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, one.abs().max().item()))
    again = reader(model)
    model.base_model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"]), with_kwargs=True)
    again(batch)
    if reader is DistinctReader:
        assert sum(map(len, read)) == 12
    else:  # a row for every prompt with all its responses, or fewer
        assert len(read[0]) <= 3


def test_the_same_tokens_after_another_prompt_are_another_sequence():
    pairs = [EncodedPair(0, [5, 6], [7, 8], [9]), EncodedPair(1, [5], [6, 7, 8], [6, 9])]  # the same ids, cut elsewhere
    batch = collate(pairs, 0)
    for reader in (DistinctReader, SharedReader):
        reading = reader(tiny.llama())(batch)
        assert reading.rows is None
        torch.testing.assert_close(reading.states, ResponseReader(tiny.llama())(batch).states)


def test_holes_in_the_labels_are_kept():
    batch = collate(tiny.pairs(4, longest=9), 0)
    batch.labels[1, int(stats.response_mask(batch.labels)[1].int().argmax()) + 2] = -100
    model = tiny.llama()
    plain, shared = (reader(model)(batch).states for reader in (ResponseReader, SharedReader))
    torch.testing.assert_close(plain, shared)


def test_an_architecture_that_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(prefix, "shared_states", lambda body, _, batch: body(input_ids=batch.input_ids)[0] + 1)
    with pytest.raises(ValueError, match=r"share_prefix does not work with LlamaForCausalLM.*train without it"):
        SharedReader(tiny.llama())


@pytest.mark.parametrize("name", tiny.ODD)
def test_places_that_count_are_refused_by_the_configuration(name):
    with pytest.raises(ValueError, match=f"share_prefix does not work with {name} .*; train without it"):
        SharedReader(tiny.family(name))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"layer_types": ["chunked_attention", "full_attention"]},
            "it has layers of chunked_attention, full_attention",
        ),
        ({"use_bidirectional_attention": True}, "not known to be causal"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 takes no mask of ours"),
    ],
)
def test_the_configuration_tells_what_is_refused(settings, reason):
    config = tiny.family("gemma3_text").config
    for name, value in settings.items():
        setattr(config, f"_{name}" if name.startswith("attn") else name, value)
    with pytest.raises(ValueError, match=f"share_prefix does not work with gemma3_text .*{reason}.*train without it"):
        prefix.layer_windows(config)


def test_windows_are_read_from_the_configuration():
    assert prefix.layer_windows(tiny.family("gpt2").config) == {None: None}
    assert prefix.layer_windows(tiny.family("mistral").config) == {None: tiny.WINDOW}
    mixed = {"full_attention": None, "sliding_attention": tiny.WINDOW}
    assert prefix.layer_windows(tiny.family("gemma2").config) == mixed
    assert prefix.layer_windows(tiny.family("qwen2").config) == mixed
