"""`guide`: a DPO model's token rewards as columns beside the pairs, so that the guide is trained and read once."""

from __future__ import annotations

import sys

from datasets import Dataset
from tqdm.auto import tqdm

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, token_budget
from tpo_lib.evaluation import pair_stats
from tpo_lib.fast.encode import encode_table
from tpo_lib.fast.fused import pair_loss
from tpo_lib.files import spans
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs, save_pairs
from tpo_lib.files.token_values import to_spans
from tpo_lib.models import check_pairs, choose_device, fingerprint
from tpo_lib.runs import named
from tpo_lib.runs.run import read_run
from tpo_lib.types import PAD

SIDES = ("chosen", "rejected")


def run(options) -> None:
    """Write --pairs with the token rewards of --model; cli.py has the flags."""
    named.check_names(options)
    record, device = read_run(options.model), choose_device(options.device)
    given = {} if options.guide_beta is None else {"guide_beta": options.guide_beta}
    beta = named.guided(TrainConfig(loss_type="tgdpo", hyper=given), options.model).hyper["guide_beta"]
    known = record and (record.reference or record.model)
    name = options.ref or (known and known["name"])
    if not name:
        raise ValueError(f"--model {options.model} does not say what it was trained from: name it with --ref")
    length = options.max_length or (record.config.max_length if record else TrainConfig().max_length)
    tokenizer = load_tokenizer(options.model)
    table, skipped = load_pairs(
        options.pairs, split=options.split, config=options.config, on_bad_rows=options.on_bad_rows
    )
    pairs, report = encode_table(table, tokenizer, max_length=length, on_bad_rows=options.on_bad_rows)
    for row in (*skipped, *report.skipped):
        print(f"skipped {row}", file=sys.stderr)
    if not pairs:
        raise BadRowsError(report.skipped, options.pairs)
    print(f"{options.pairs}: {report}", file=sys.stderr)
    said = [response for side in SIDES for response in table[side] if isinstance(response, list)]
    if turns := sum(len(response) > 1 for response in said):
        print(
            f"{options.pairs}: {turns:,} responses have several turns; rewards of all but the last are left out",
            file=sys.stderr,
        )
    models = {"guide": load_model(options.model, device=device), "reference": load_model(name, device=device)}
    for what, model in models.items():
        check_pairs(model.requires_grad_(False), pairs, name=what, policy=models["guide"])
    if fingerprint(models["guide"]) == fingerprint(models["reference"]):
        raise ValueError(
            f"--model {options.model} and its reference {name} have the same weights, so that every reward would be 0; name "
            "the model that DPO has trained, or with --ref what it was trained from"
        )
    if replaced := [name for name in (f"{side}_token_rewards" for side in SIDES) if name in table.column_names]:
        print(
            f"{options.pairs} has {' and '.join(replaced)}: in {options.output} are those of the model", file=sys.stderr
        )
    made = with_rewards(table, pairs, tokenizer, beta=beta, max_tokens=options.max_tokens, progress=True, **models)
    save_pairs(made, options.output)
    without = f", {len(made) - len(pairs):,} of them without" if len(made) > len(pairs) else ""
    print(
        f"{options.output}: {len(made):,} pairs{without}; reward of a token = {beta:g} (log-ratio of {options.model} to {name})"
    )


def with_rewards(
    table: Dataset,
    pairs,
    tokenizer,
    guide,
    reference,
    *,
    beta: float,
    max_tokens: int = 8192,
    progress: bool = False,
) -> Dataset:
    """The table with beta (log pi_guide - log pi_ref) of every token of its encoded pairs, in nats, as spans.

    Where several tokens make one character, each has their mean; rows that are not among the pairs have none.

    Args:
        table, pairs, tokenizer: as `encode_pairs` took and made them.
        max_tokens: of a forward pass, padding included; a pair that is longer is read alone.
    """
    columns = {f"{side}_token_rewards": [None] * len(table) for side in SIDES}
    encoded = list(pairs)
    most = max(max_tokens, *(pair.size for pair in encoded))
    with tqdm(total=len(encoded), desc="token rewards", unit="pair", disable=not progress) as bar:
        for batch in token_budget(encoded, most):
            for side, rows in _rewards(batch, guide, reference, beta).items():
                for pair, values in zip(batch, rows, strict=True):
                    columns[f"{side}_token_rewards"][pair.row] = values
            bar.update(len(batch))
    kept = table.remove_columns([name for name in columns if name in table.column_names])
    for side in SIDES:
        found = to_spans(table, encoded, tokenizer, side, columns[f"{side}_token_rewards"])
        kept = kept.add_column(f"{side}_token_rewards", found, feature=spans.FEATURE)
    return kept


def _rewards(batch: list[EncodedPair], guide, reference, beta: float) -> dict[str, list[list[float]]]:
    """The rewards of every token of a batch's responses."""
    how = {"batch_size": len(batch), "with_kl": False, "pair_loss": pair_loss}
    tokens = pair_stats(guide, reference, batch, PAD, **how)
    values = beta * (tokens.logps - tokens.ref_logps)  # (2B, T-1)
    rows = [row[mask].tolist() for row, mask in zip(values, tokens.mask, strict=True)]
    return {"chosen": rows[: len(batch)], "rejected": rows[len(batch) :]}
