"""Every family of architectures through everything that is done to a model, against its own logits and plain loops."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from tpo_lib import losses, models, sampling, stats, train
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.evaluation import sequence_kl
from tpo_lib.fast import FastPath
from tpo_lib.files import adapters
from tpo_lib.runs.run import fit
from tpo_lib.sampling import Completion, Sampler

SHARING = list(tiny.FAMILIES)
NAMES = [*SHARING, *tiny.ODD]
PAIRS = tiny.pairs(4, seed=5)  # up to 23 tokens: longer than the windows
CORE = ["gpt2", "llama", "mistral", "gemma2"]  # with every objective
CONFIG = TrainConfig(lr=1e-3, batch_size=4, epochs=3, warmup_steps=1, log_every=1, device="cpu", guide_beta=0.1)
OBJECTIVES = ("dpo", "tdpo1", "tdpo2", "tgdpo")


family = cache(tiny.family)  # never trained: `policy` gives copies


def policy(name: str):
    return copy.deepcopy(family(name))


def frozen(name: str) -> dict:
    return {"reference": family(name, 1), "guide": family(name, 2)}


def plain_logits(model, labels, ids, mask) -> torch.Tensor:
    """(R, V) at the response positions, every sequence read alone and without padding."""
    rows = []
    for row, length in enumerate(mask.sum(1).tolist()):
        logits = model(input_ids=ids[row : row + 1, :length], use_cache=False)["logits"][0, :-1]  # (length-1, V)
        rows.append(logits[labels[row, 1:length] != -100])
    return torch.cat(rows)


def plain_training(name: str, loss_type: str) -> list[float]:
    """The losses of the updates that CONFIG makes of PAIRS, in the plainest way."""
    config = replace(CONFIG, loss_type=loss_type)
    objective = partial(losses.OBJECTIVES[loss_type].fn, **config.hyperparameters())
    model, others = policy(name), frozen(name)
    optimizer, found = train.build_optimizer(config, model), []
    batch = collate(PAIRS, 0)
    read = partial(plain_logits, labels=batch.labels, ids=batch.input_ids, mask=batch.attention_mask)
    with torch.no_grad():
        ref, guide = (read(others[who]) for who in ("reference", "guide"))
    for step in range(config.epochs):
        train.set_learning_rate(optimizer, train.learning_rate(config, step, config.epochs))
        tokens = stats.token_stats(read(model), batch.labels, ref, guide_logits=guide, with_kl=True)
        loss = objective(*stats.split(tokens)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        found.append(loss.item())
    return found


def losses_of(name: str, loss_type: str, **fast) -> list[float]:
    settings = {"guide": family(name, 2), "fast": FastPath(**fast), "progress": False}
    result = fit(replace(CONFIG, loss_type=loss_type), policy(name), frozen(name)["reference"], PAIRS, **settings)
    return [row["loss"] for row in result.metrics]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_models_own_whatever_pads(name):
    model, batch = family(name), collate(tiny.pairs(8), 999)  # no model has that id
    with torch.no_grad():
        expected = plain_logits(model, batch.labels, batch.input_ids, batch.attention_mask)
        reader = models.ResponseReader(model)
        assert reader.understood
        torch.testing.assert_close(reader(batch).logits(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "loss_type"), [
    *((name, loss_type) for name in CORE for loss_type in OBJECTIVES),
    *((name, "tdpo2") for name in NAMES if name not in CORE),
])  # fmt: skip
def test_training_is_that_of_the_plain_loop(name, loss_type, tmp_path):
    expected = pytest.approx(plain_training(name, loss_type), rel=1e-4, abs=1e-5)
    cached = {"cache_dir": str(tmp_path)}
    if name in SHARING:
        assert losses_of(name, loss_type, share_prefix=True, **cached) == expected
    else:
        assert losses_of(name, loss_type, **cached) == expected
    if name in CORE:
        assert losses_of(name, loss_type) == expected
        assert losses_of(name, loss_type, **cached) == expected
        assert losses_of(name, loss_type, share_prefix=True) == expected


class Listening(Sampler):
    """A sampler that remembers what the model said of the tokens it drew."""

    heard = ()

    def draw(self, logits):
        token = super().draw(logits)
        Listening.heard += (logits.log_softmax(-1).gather(-1, token[:, None])[:, 0],)
        return token


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_scored_as_they_were_drawn(name):
    """Sampling pads on the left, scoring on the right; sampled with a cache, scored in one pass."""
    model, other, rows, Listening.heard = family(name), family(name, 1), [[5], [6, 7, 8, 9, 1, 2, 3], [4, 3, 2]], ()
    nothing = SimpleNamespace(eos_token_id=999)  # never drawn
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    drawn = [ids for ids, _ in sampling.sample_ids(model, nothing, rows, Listening(8), 8)]
    heard = torch.stack(Listening.heard, 1)[
        [[0, 2, 1].index(i) for i in range(3)]
    ]  # drawn in the order of their lengths
    for row, ids, logps in zip(rows, drawn, heard, strict=True):
        with torch.no_grad():
            both = [m(input_ids=torch.tensor([row + ids]), use_cache=False)["logits"][0] for m in (model, other)]
        said, ref = (logits[len(row) - 1 : -1] for logits in both)  # (8, V)
        torch.testing.assert_close(
            said.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0], logps, rtol=1e-4, atol=1e-4
        )
        encode = SimpleNamespace(pad_token_id=None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tpo_lib.evaluation.prompt_token_ids", lambda *_, row=row: [row])
            found = sequence_kl(model, other, encode, ["x"], [Completion("", tuple(ids), None)])
        labels = torch.tensor([[stats.IGNORE, *ids]])
        expected = [values.sum().item() for values in stats.kl_entropy_surprisal(said, ref, labels)]
        measured = [found.kl.item(), found.entropy.item(), found.surprisal.item()]
        assert measured == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_adapters_resumes_bit_for_bit(name, tmp_path):
    def run(folder, model, **settings):
        config = replace(CONFIG, output_dir=folder, save_every=1)
        fast = FastPath(share_prefix=name in SHARING)
        return fit(config, model, family(name), PAIRS, fast=fast, progress=False, **settings)

    def adapted():
        return adapters.add_lora(policy(name), 2, seed=3)

    if name == "mamba":
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            adapted()
        return
    whole = run(None, adapted())
    assert whole.metrics[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert whole.metrics[-1]["loss"] < 0.6931
    run(str(tmp_path), adapted(), on_log=lambda row: row["step"] == 2)
    again = run(str(tmp_path), adapted(), resume=True)
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]
    assert models.fingerprint(again.policy) == models.fingerprint(whole.policy)


def test_a_model_that_looks_ahead_is_refused():
    bert = tiny.family(
        "bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.3
    )
    with pytest.raises(ValueError, match=r"BertLMHeadModel looks ahead: .*take a causal language model"):
        models.ResponseReader(bert)


def test_a_model_that_reads_padding_is_refused_where_prompts_differ_in_length():
    rwkv = tiny.family("rwkv", hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    nothing = SimpleNamespace(eos_token_id=0)
    assert len(sampling.sample_ids(rwkv, nothing, [[1, 2], [3, 4]], Sampler(3), 8)) == 2
    with pytest.raises(ValueError, match="RwkvForCausalLM reads the padding before a prompt"):
        sampling.sample_ids(rwkv, nothing, [[1, 2], [3]], Sampler(3), 8)

    def forbid(_, __, output):
        output.logits[..., 7] = -math.inf

    rwkv.register_forward_hook(forbid)
    with pytest.raises(ValueError, match="RwkvForCausalLM reads the padding before a prompt"):
        sampling.sample_ids(rwkv, nothing, [[1, 2], [3]], Sampler(3), 8)
