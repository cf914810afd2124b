"""What no log can show: the pairs as the loss reads them, and the models themselves (`doctor LOG --model DIR --pairs F`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.data import EncodedPair, EncodingReport, collate, encode_pairs
from tpo_lib.files import chat
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs
from tpo_lib.files.tokens import leading_ids, response_texts
from tpo_lib.models import ResponseReader, check_pairs, fingerprint, vocabulary
from tpo_lib.runs.run import read_run
from tpo_lib.tools.doctor.logs import SIDES, Log
from tpo_lib.tools.doctor.rules import BREAK_IT, Finding
from tpo_lib.types import IGNORE

MOST = 256  # pairs that the models read
MAX_LENGTH = 512  # where no run says
PAIRS = "01_preferences.ipynb: 11. Which pairs to keep"
ENDS = f"{BREAK_IT}: Runs I and J"
WORDS = {  # check -> severity where it is not good, title, why, chapter, advice
    "rows": ("look", "Rows kept, cut and left out", "What is cut has no end to learn.", ENDS, "raise --max-length"),
    "mask": ("wrong", "What is scored is the response", "A loss on other tokens learns something else.", ENDS, "read them"),
    "bos": ("wrong", "BOS", "A second BOS is no beginning that the model knows.", ENDS, "leave one out"),
    "eos": ("look", "EOS", "Without it nothing teaches to stop; on one side alone it tells the sides apart.", ENDS,
            "end whole responses with one; raise --max-length"),
    "pad": ("look", "Padding", "", "", ""),
    "contradictions": ("look", "Labels that contradict each other", "They teach nothing.", PAIRS, "leave out both"),
    "lengths": ("look", "Lengths of the two sides", "The shortest way to such labels is to write longer, or shorter.", PAIRS,
                "balance lengths, or take SimPO"),
    "vocabulary": ("wrong", "Tokenizer", "Its last ids have no embedding.", ENDS, "take the model's own tokenizer"),
    "reference": ("look", "Model and reference", "", "", ""),
    "run-reference": ("wrong", "The run's own reference", "A reward is a log-ratio to what the run began with.",
                      f"{BREAK_IT}: Run D", "give that as --ref"),
    "nats": ("look", "How well the model knows the responses", "Another tokenizer's ids surprise it like noise.", ENDS,
             "take the model's own tokenizer and template"),
    "labels": ("wrong", "Labels", "A trained model that prefers rejected responses learned from labels of the opposite kind.",
               f"{BREAK_IT}: Run H", "read some pairs; exchange the columns"),
    "log-logps": ("wrong", "The log's log-probabilities", "The same weights on the same tokens give the same number.", ENDS,
                  "give the trained model and the held-out pairs of this log; else repair the mask"),
    "log-rewards": ("wrong", "The log's rewards", "They are beta times the sum of the log-ratios, or a mean, a factor, dropout "
                    "or another reference is in them.", f"{BREAK_IT}: 2. Loud bugs", "compare the reference and the sum"),
}  # fmt: skip
Checked = tuple[str, bool, str]  # name, whether it is good, the numbers


def examine_pairs(
    model: str, pairs: str, *, log: Log, ref=None, split=None, config=None, max_length: int | None = None
) -> list[Finding]:
    """Every direct check, the good ones too, with their numbers; best on the held-out pairs that the log's eval_* are of.

    Raises:
        OSError, ValueError: as the loaders of models and pairs.
    """
    record, tokenizer = read_run(model), load_tokenizer(model)
    table, bad = load_pairs(pairs, split=split, config=config, on_bad_rows="skip")
    most = max_length or (record.config.max_length if record else MAX_LENGTH)
    encoded, report = encode_pairs(table, tokenizer, max_length=most, on_bad_rows="skip")
    if not encoded:
        raise ValueError(f"no pair of {pairs} can be used: {report}")
    policy, reference = load_model(model), load_model(ref) if ref else None
    for name, each in (("model", policy), ("reference", reference)):
        if each is not None:
            check_pairs(each, encoded, name=name, policy=policy)
    found = [
        rows(encoded, report, len(bad), most),
        mask(table, encoded[:MOST], tokenizer),
        *ends(encoded, tokenizer),
        *labels(encoded),
        *weights(policy, reference, record, tokenizer),
        *likes(encoded[:MOST], policy, reference),
        *against_log(log, encoded, policy, reference),
    ]
    return [finding(*checked) for checked in found]


def finding(name: str, good: bool, evidence: str) -> Finding:
    """A check as a finding, "normal" where it is good."""
    severity, title, *words = WORDS[name]
    return Finding(name, "normal" if good else severity, title, evidence, *(("", "", "") if good else words))


# ---- the pairs


def rows(pairs: Sequence[EncodedPair], report: EncodingReport, bad: int, most: int) -> Checked:
    """What became of the table."""
    good = not bad and not report.skipped and report.truncated < 0.1 * len(pairs)
    return "rows", good, f"max_length {most}: {report}" + (f"; {bad} rows could not be read" if bad else "")


def mask(table, pairs: Sequence[EncodedPair], tokenizer) -> Checked:
    """Whether what is scored says the response, whole, and nothing of the prompt."""
    same = asked = prompt = 0
    for pair in pairs:
        batch = collate([pair])
        for side, ids, scored in zip(SIDES, batch.input_ids, batch.labels != IGNORE, strict=True):
            prompt += int(scored[: len(pair.prompt_ids)].sum())
            if ids[scored][-1] == tokenizer.eos_token_id:  # it was not cut
                said, meant = (
                    response_texts(tokenizer, [pair.prompt_ids], [ids[scored].tolist()])[0],
                    table[pair.row][side],
                )
                text = chat.words(meant).strip()  # a template may put something around it
                asked, same = asked + 1, same + (text in said if isinstance(meant, list) else text == said.strip())
    good = same == asked and not prompt
    return "mask", good, f"{same} of {asked} whole responses are scored word by word, and {prompt} tokens of prompts"


def ends(pairs: Sequence[EncodedPair], tokenizer) -> Iterator[Checked]:
    """BOS and EOS: missing, doubled, or on one side alone."""
    lead, eos = leading_ids(tokenizer), tokenizer.eos_token_id

    def doubled(prompts) -> int:
        return sum(bool(lead) and ids[: 2 * len(lead)] == 2 * lead for ids in prompts)

    prompts = [pair.prompt_ids for pair in pairs]
    again = doubled(tokenizer([tokenizer.decode(ids) for ids in prompts[:MOST]])["input_ids"])
    said = (
        f"the tokenizer puts {len(lead)} before a text; {doubled(prompts)} of {len(pairs)} prompts begin with it twice"
    )
    said += f" (tokenized again as text {again} would: add_special_tokens=False)" if again else ""
    yield "bos", not doubled(prompts), said
    shares = [sum(getattr(pair, f"{side}_ids")[-1] == eos for pair in pairs) / len(pairs) for side in SIDES]
    said = f"{shares[0]:.0%} of the chosen and {shares[1]:.0%} of the rejected end with EOS, {tokenizer.eos_token!r}"
    yield "eos", abs(shares[0] - shares[1]) < 0.1 and min(shares) > 0.5, said
    if tokenizer.pad_token_id == eos:
        said = (
            "pad and EOS are one token: here padding is masked by its place; what masks it by id never teaches the EOS"
        )
        yield "pad", True, said


def labels(pairs: Sequence[EncodedPair]) -> Iterator[Checked]:
    """Labels that contradict each other, and lengths that tell the sides apart."""
    keys = {(tuple(p.prompt_ids), tuple(p.chosen_ids), tuple(p.rejected_ids)) for p in pairs}
    against = sum((prompt, rejected, chosen) in keys for prompt, chosen, rejected in keys) // 2
    said = f"{against} pairs stand there the other way round too, {len(pairs) - len(keys)} more than once"
    yield "contradictions", not against, said
    mean = [sum(len(getattr(pair, f"{side}_ids")) for pair in pairs) / len(pairs) for side in SIDES]
    signs = [(len(p.chosen_ids) > len(p.rejected_ids)) - (len(p.chosen_ids) < len(p.rejected_ids)) for p in pairs]
    longer = 0.5 + sum(signs) / len(pairs) / 2
    said = f"{mean[0]:.1f} tokens chosen, {mean[1]:.1f} rejected; the chosen is the longer one in {longer:.0%}"
    yield "lengths", abs(longer - 0.5) <= max(0.15, 1 / math.sqrt(len(pairs))), said  # two standard errors of a coin


# ---- the models


def weights(policy, reference, record, tokenizer) -> Iterator[Checked]:
    """Whether tokenizer and model belong together; whether the reference is the model, and that of its run."""
    said = f"{len(tokenizer)} tokens, the model has {vocabulary(policy)}"
    yield "vocabulary", len(tokenizer) <= vocabulary(policy), said
    if reference is None:
        return
    both = zip(policy.state_dict().values(), reference.state_dict().values(), strict=False)
    moved, other = [float((a - b).abs().max()) for a, b in both], fingerprint(reference)
    differ = f"{sum(map(bool, moved))} of {len(moved)} tensors differ, by up to {max(moved):.2g}"
    yield "reference", True, "the same weights" if fingerprint(policy) == other else differ
    if known := record and record.reference:
        said = f"the run began with {known['name'] or 'one in memory'} (sha256 {known['sha256'][:12]}), this is {other[:12]}"
        yield "run-reference", known["sha256"] == other, said


@torch.no_grad()
def response_logps(model, rows: Sequence[tuple[list[int], list[int]]], batch_size: int = 16) -> Tensor:
    """(n,) log-probabilities of responses behind their prompts, summed over the tokens."""
    reader, sums = ResponseReader(model.eval()), []
    for first in range(0, len(rows), batch_size):
        batch = collate([EncodedPair(i, *row) for i, row in enumerate(rows[first : first + batch_size])]).to(
            model.device
        )
        sums.append(stats.token_stats(reader(batch).logits(), batch.labels, None).logps.sum(-1).cpu())
    return torch.cat(sums)


def both_sides(model, pairs: Sequence[EncodedPair], way=lambda prompt, ids: (prompt, ids)) -> list[Tensor]:
    """`response_logps` of chosen and rejected, or of what `way` makes of a prompt and a response."""
    return [response_logps(model, [way(p.prompt_ids, getattr(p, f"{side}_ids")) for p in pairs]) for side in SIDES]


def likes(pairs: Sequence[EncodedPair], policy, reference) -> Iterator[Checked]:
    """Nats a token, and how often the chosen response is the likelier one."""
    sums = both_sides(policy, pairs)
    lengths = [torch.tensor([len(getattr(p, f"{side}_ids")) for p in pairs]) for side in SIDES]
    nats, uniform = -float(sum(sums).sum() / sum(lengths).sum()), math.log(vocabulary(policy))
    said = f"{nats:.2f} nats a token of these responses; who knows nothing has log V = {uniform:.2f}"
    yield "nats", nats < 0.8 * uniform, said
    means = [a / b for a, b in zip(sums, lengths, strict=True)]
    share = [float((chosen > rejected).float().mean()) for chosen, rejected in (sums, means)]
    said = f"the chosen response is likelier in {share[0]:.0%} of {len(pairs)} pairs, by the token in {share[1]:.0%}"
    base = both_sides(reference, pairs) if reference is not None else sums
    gap, right = (sums[0] - base[0]) - (sums[1] - base[1]), 0.5
    if gap.any():
        right = float((gap > 0).float().mean())
        said += f"; its log-ratio to the reference is the larger one in {right:.0%}"
    yield "labels", right > 0.5 - 1.5 / math.sqrt(len(pairs)), said  # three standard errors below a coin


def against_log(log: Log, pairs: Sequence[EncodedPair], policy, reference) -> Iterator[Checked]:
    """Whether the log's last held-out row is what the model says of these pairs; names the mask, or the exchange, that fits."""
    steps, *logged = log.rows(*(f"eval_logps/{side}" for side in SIDES))
    if not len(steps) or len(pairs) > MOST:
        return
    pad = policy.config.pad_token_id or 0
    said = {
        "": both_sides(policy, pairs),
        "the prompt is counted": both_sides(policy, pairs, lambda prompt, ids: (prompt[:1], prompt[1:] + ids)),
        "the mask is off by one": both_sides(policy, pairs, lambda prompt, ids: (prompt + ids[:1], [*ids[1:], pad])),
    }
    said = {name: [float(side.mean()) for side in both] for name, both in said.items()}
    said["chosen and rejected are swapped"] = said[""][::-1]
    mine, logs, small = said[""], [float(side[-1]) for side in logged], 2e-3 * abs(float(logged[0][-1]))
    off = {name: max(abs(a - b) for a, b in zip(both, logs, strict=True)) for name, both in said.items()}
    best = min(off, key=off.get)
    words = f"{logs[0]:.2f} and {logs[1]:.2f} at step {steps[-1]}; this model says {mine[0]:.2f} and {mine[1]:.2f}"
    if off[""] > small:
        near = off[best] < off[""] / 4  # a batch's longest rows have no padding that a shifted mask could count
        other = "none of our masks is near: padding is counted, or these are other pairs or weights"
        yield "log-logps", False, f"{words}; {f'nearest is that {best}' if near else other}"
        return
    yield "log-logps", True, words
    beta, (_, *rewards) = log.settings.get("beta"), log.rows(*(f"eval_rewards/{side}" for side in SIDES))
    weighted = "weighted" in log.settings or log.loss_type not in ("dpo", "ipo")  # its rewards are no plain sums
    if reference is None or beta is None or weighted or not len(rewards[0]):
        return
    base = [float(side.mean()) for side in both_sides(reference, pairs)]
    meant, found = [beta * (a - b) for a, b in zip(mine, base, strict=True)], [float(side[-1]) for side in rewards]
    good = all(abs(a - b) < 0.05 * abs(a) + beta * small for a, b in zip(meant, found, strict=True))
    said = f"{found[0]:.3g} and {found[1]:.3g}; beta times the log-ratio is {meant[0]:.3g} and {meant[1]:.3g}"
    yield "log-rewards", good, said
