"""`inspect`: one HTML page that says of every token of preference pairs what a policy makes of it, and what an objective would.

The page needs no other file and asks for none: its numbers stand in it as JSON, its script sorts, filters and colours them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tpo_lib import __version__
from tpo_lib.config import TrainConfig, known_hyperparameters
from tpo_lib.data import EncodedPair, encode_pairs
from tpo_lib.files import folders, store
from tpo_lib.files.formats import BadRowsError
from tpo_lib.files.load import load_config, load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs
from tpo_lib.files.tokens import vocabulary_name
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import check_pairs, choose_device, fingerprint, most_tokens
from tpo_lib.runs import named, own
from tpo_lib.runs.given import taken, token_values
from tpo_lib.runs.run import ADAPTER, RunRecord, read_run
from tpo_lib.runs.runs import check_taken
from tpo_lib.tools.tokenwise import SIDES, read_pairs, summarise

TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 1024  # tokens of prompt and response, where neither a run nor a model nor a flag says less
DIGITS = 6  # significant ones of every number in the page


@dataclass(frozen=True)
class Quantity:
    """What tokens may be coloured by. Blue is what lies above the centre, or below it where `sign` is -1."""

    label: str
    words: str  # what it is, with its unit
    blue: str  # what blue says, and vermilion; "" where no token can be so
    vermilion: str
    centre: float = 0.0
    sign: int = 1


QUANTITIES = {  # the first that there is is shown first
    "logratio": Quantity(
        "log-ratio", "log π − log π_ref of the token, nats", "likelier than under π_ref", "less likely"
    ),
    "kl": Quantity("KL", "KL(π_ref ‖ π) over the vocabulary at the token, nats", "other predictions than π_ref", ""),
    "logp": Quantity("log-probability", "log π of the token, nats", "", "unlikely"),
    "guided": Quantity("token reward", "r̂ of the token: what guides the loss", "guided towards", "guided away"),
    "weight": Quantity(
        "weight f", "what the loss multiplies the token's log-ratio by", "counts more", "counts less", 1.0
    ),
    "slope": Quantity("coefficient", "∂ loss / ∂ log π of the token", "reinforced", "suppressed", sign=-1),
    "kl_slope": Quantity("KL coefficient", "∂ loss / ∂ KL at the token", "let grow", "pulled down", sign=-1),
}


def run(options) -> None:
    """Write the page of --pairs under --model; cli.py has the flags."""
    named.check_names(options)
    record, device = read_run(options.model), choose_device(options.device)
    table, skipped = load_pairs(
        options.pairs, split=options.split, config=options.config, on_bad_rows=options.on_bad_rows
    )
    config, kinds, said = taken(_objective(options, record), table, options.guide)
    sources, notes = _sources(options, record, config.loss_type, "rewards" in kinds)
    numbers = Path(options.output).with_suffix(".json")
    if options.json and numbers.resolve() == Path(options.pairs).resolve():
        raise FileExistsError(f"--json writes {numbers}, which is what --pairs reads; choose another --output")
    tokenizer = _tokenizer(sources, notes)
    pairs, words = _encoded(options, table, config.max_length, tokenizer)
    if said:
        words.append(f"{said[0].upper()}{said[1:]}.")
    if skipped:
        words.append(f"Before that, {len(skipped):,} rows could not be read as pairs (the first: {skipped[0]}).")
    values = token_values(table, pairs, tokenizer, max_length=config.max_length, kinds=kinds) if kinds else None
    models, prints = {}, {}
    for name, source in sources.items():
        models[name] = load_model(source["name"], device=device).requires_grad_(False)
        check_pairs(models[name], pairs, name=name, policy=models["policy"])
        prints[name] = fingerprint(models[name])
        if source.get("sha256", prints[name]) != prints[name]:
            changed = f"{source['name']} has changed since the run in {record.folder}, whose {name} it was"
            raise ValueError(f"{changed}: name one with {source['flag']}")
    how = {"config": config, "given": values, "max_tokens": options.max_tokens, "progress": True}
    found = read_pairs(pairs=pairs, tokenizer=tokenizer, **how, **models)
    settings = {"objective": config.loss_type} | config.hyperparameters()
    settings |= {"max_length": config.max_length, "seed": options.seed, "pairs": options.pairs, "tpo_lib": __version__}
    content = {
        "title": f"Token by token: {options.model}",
        "words": words,
        "notes": notes,
        "models": [{"what": name, "name": str(each["name"]), "sha256": prints[name]} for name, each in sources.items()],
        "settings": settings,
        "summary": summarise(found, [tuple(pair.prompt_ids) for pair in pairs]),
        "pairs": found,
    }
    _write(store.rounded(content, DIGITS), options.output, numbers if options.json else None)
    for line in (*notes, *words):
        print(line, file=sys.stderr)
    for name, value in content["summary"].items():
        print(f"{name:18s} {cell(value)}")
    print(f"page: {options.output}")


def _write(found: Mapping, output: str, numbers: Path | None) -> None:
    store.write_file(output, page(found))
    if numbers:
        store.write_file(numbers, json.dumps(found, ensure_ascii=False) + "\n")


# ---- what is asked for


def _objective(options, record: RunRecord | None) -> TrainConfig:
    """Objective, hyperparameters and length; those of the run in --model count where nothing else is said."""
    given = {name: value for name in known_hyperparameters() if (value := getattr(options, name)) is not None}
    mine = record.config if record and options.loss_type in (None, record.config.loss_type) else None
    usual = "tgdpo" if options.guide else "dpo" if options.ref else "sft"
    name = options.loss_type or (mine.loss_type if mine else usual)
    length = options.max_length or (record and record.config.max_length)
    length = length or int(min(LONGEST, most_tokens(load_config(options.model))))
    hyper = dict(mine.hyper) if mine else {}
    if options.guide:
        hyper.pop("guide_beta", None)  # it was another guide's
    config = TrainConfig(loss_type=name, hyper=hyper | given, max_length=length)
    check_taken(name, given)
    if mine:
        own.check_unchanged(name, record.start.get("objective"))
    guided = "guide_logps" in OBJECTIVES[name].needs
    if options.guide and not guided:
        idle = f"--guide has no effect with {name}, which reads no guide"
        raise ValueError(f"{idle}; leave it out or choose another --loss-type")
    return named.guided(config, options.guide) if guided else config


def _sources(options, record: RunRecord | None, loss_type: str, rewarded: bool) -> tuple[dict[str, dict], list[str]]:
    """The models by what they are, {"name"} and of what the run had also its digest and flag; sentences about what is missing."""
    start = record and (record.start.get("reference") or record.start.get("start model"))
    if record and not start and record.model:
        start = {"name": record.model["name"]}  # the base of adapters: its digest is of another kind
    needs, sources = OBJECTIVES[loss_type].needs, {"policy": {"name": options.model}}
    sources |= _frozen("reference", "--ref", options.ref, start)
    if "guide_logps" in needs and not rewarded:
        sources |= _frozen("guide", "--guide", options.guide, record and record.start.get("guide"))
    reference = ("reference", "--ref DIR, or --loss-type sft for log-probabilities alone")
    fixes = dict.fromkeys(("ref_logps", "kl"), reference)
    fixes["guide_logps"] = ("guide", "--guide DIR, the DPO model that weighs its tokens")
    if record and "token values" in record.start:
        told = "the run was guided by token rewards, which these pairs have not"
        fixes["guide_logps"] = ("guide", f"--loss-type dpo, or --guide DIR: {told}")
    for what, fix in (fixes[need] for need in needs if not (rewarded and need == "guide_logps")):
        if what not in sources:
            raise ValueError(f"{loss_type} needs a {what}: pass {fix}")
    gone = f" The run was started from {start['name']}, which is not here any more." if start and start["name"] else ""
    none = [f"Without a reference (--ref) there is no log-ratio and no KL.{gone}"]
    return sources, [] if "reference" in sources else none


def _frozen(what: str, flag: str, given: str | None, known: Mapping | None) -> dict[str, dict]:
    """What was given, else what the run had, if that is there."""
    if given:
        return {what: {"name": given}}
    name = known and known["name"]
    if not name or (folders.is_path(name) and not Path(name).exists()):
        return {}
    digest = {"sha256": known["sha256"]} if "sha256" in known and Path(name).name != ADAPTER else {}
    return {what: {"name": name, "flag": flag} | digest}


def _tokenizer(sources: Mapping[str, Mapping], notes: list[str]):
    """The policy's, or where it has none the reference's; ValueError where a model means other tokens by the same ids."""
    policy, *others = (source["name"] for source in sources.values())
    try:
        tokenizer = load_tokenizer(policy)
    except OSError as error:
        if "reference" not in sources:
            raise OSError(f"{error} Save one beside the model, or name with --ref a model that has it.") from error
        tokenizer = load_tokenizer(sources["reference"]["name"])
        notes.append(f"{policy} has no tokenizer that can be read: its reference's is used.")
    for name in others:
        with suppress(OSError):  # one without a tokenizer of its own has the policy's
            if vocabulary_name(load_tokenizer(name)) != vocabulary_name(tokenizer):
                other = f"{name} has another vocabulary than {policy}"
                raise ValueError(f"{other}: their tokens cannot be compared; name a model of the policy's own family")
    return tokenizer


def _encoded(options, table: Dataset, max_length: int, tokenizer) -> tuple[list[EncodedPair], list[str]]:
    """The pairs that are shown, and what became of the others, a sentence each; rows are those of the whole table."""
    rows, total = range(len(table)), len(table)
    if total > options.most:
        rows = np.sort(np.random.default_rng(options.seed).choice(total, options.most, replace=False)).tolist()
    pairs, report = encode_pairs(table.select(rows), tokenizer, max_length=max_length, on_bad_rows="skip")
    bad = [replace(each, row=rows[each.row]) for each in report.skipped]
    if bad and (options.on_bad_rows == "error" or not pairs):
        raise BadRowsError(bad, options.pairs)
    chosen = f"a random sample of seed {options.seed}, --most {options.most}" if len(rows) < total else "all there are"
    words = [f"{len(pairs):,} of {total:,} pairs of {options.pairs}: {chosen}.", f"{replace(report, skipped=bad)}."]
    return [replace(pair, row=rows[pair.row]) for pair in pairs], words


# ---- the page


def cell(metric: Mapping | float) -> str:
    """A mean with its interval, or a number."""
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**metric) if isinstance(metric, Mapping) else f"{metric:.3f}"


def page(found: Mapping) -> str:
    """The HTML of what `run` found; all that comes from outside is data in it, never markup."""
    pairs = found["pairs"]
    there = {name: each for name, each in QUANTITIES.items() if name in pairs[0]["chosen"]}
    shown = {name: asdict(each) | {"full": _full(pairs, name)} for name, each in there.items()}
    data = json.dumps({"quantities": shown, "pairs": pairs}, ensure_ascii=False, allow_nan=False)
    data = data.replace("<", "\\u003c")  # in JSON it stands within strings alone; so no </script> ends the data
    how = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=FileSystemLoader(TEMPLATES), **how)
    return templates.get_template("inspect.html.j2").render(found, data=Markup(data), cell=cell)


def _full(pairs: Sequence[Mapping], name: str) -> float:
    """Where the colour is full: 98 of 100 tokens lie within, so that a single one does not bleach the others."""
    values = [value for pair in pairs for side in SIDES for value in pair[side][name]]
    return float(f"{np.quantile(np.abs(np.array(values) - QUANTITIES[name].centre), 0.98):.3g}")
