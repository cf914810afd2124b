"""What the commands run, train, pairs, evaluate and sweep do, once their flags are read and judged (cli.py)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import accelerate

from tpo_lib import pairing
from tpo_lib.config import TrainConfig
from tpo_lib.fast.encode import encode_table
from tpo_lib.fast.evaluation import evaluate as evaluate_policy
from tpo_lib.files import adapters, folders, smollm2, store
from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs, save_pairs
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import choose_device, choose_precision
from tpo_lib.runs import compare, given, named, own, plots, presets, report, runs
from tpo_lib.runs.accelerated import PATIENCE
from tpo_lib.runs.interrupts import Terminated
from tpo_lib.runs.plan import plan
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.processes import first, tell
from tpo_lib.runs.prompts import held_out_prompts, overlap, recorded_prompts, training_prompts
from tpo_lib.runs.run import fit, read_run, shared_prompts
from tpo_lib.runs.settings import CompareConfig
from tpo_lib.runs.sweep import RUNS
from tpo_lib.runs.sweep import sweep as sweep_runs

NO_JUDGE = "none"


def run(options) -> None:
    given = {
        name: getattr(options, name) for name in ("prompts", "reward", "judge", "device") if getattr(options, name)
    }
    config = presets.comparison(options.preset, quick=options.quick, seed=options.seed, imdb=options.imdb, **given)
    if options.objectives:
        known = [run.loss_type for run in config.objectives]
        if unknown := sorted(set(options.objectives) - set(known)):
            raise ValueError(f"--objectives {' '.join(unknown)}: choose from {', '.join(known)}")
        config = replace(
            config, objectives=tuple(run for run in config.objectives if run.loss_type in options.objectives)
        )
    config = presets.changed(config, options.set or ())
    usual = options.preset if options.preset != "pocket" or not options.quick else "quick"
    usual += "-quick" if options.quick and options.preset != "pocket" else ""
    folder = compare.run_folder(options.runs, options.name or usual)
    _compare(replace(config, seeds=tuple(options.seeds or ())), folder, options)


def compare_own(options) -> None:
    config, folder = options.comparison, Path(options.output_dir)
    named.check_names(config.stage)
    for each in config.objectives:
        named.check_adapters(each, config.stage.model)
    _compare(config, folder, options, latest=False)


def _compare(config: CompareConfig, folder: Path, options, **more) -> None:
    if options.dry_run:
        return print(plan(config, folder, options.fast))
    summary = compare.run(config, folder, fast=options.fast, fresh=options.fresh, **more)
    print(report.summary_table(summary))
    minutes = summary["wall_time_s"] / 60
    print(f"\n{minutes:.1f} minutes; report: {folder / 'report.html'} (also {folder / 'report.md'})")


def list_presets(options) -> None:
    print(presets.table())


def get(options) -> None:
    folder = smollm2.get(options.source)
    print(f"{folder}: run --preset {smollm2.NAME}")


def sweep(options) -> None:
    path = Path(options.output or RUNS)
    print(f"{len(sweep_runs(path)['runs'])} runs in {path}")


def train(options) -> None:
    config = options.training
    name, device = named.model_name(options), choose_device(config.device)
    named.check_names(options)
    named.check_adapters(config, name)
    config = named.guided(config, options.guide)
    tokenizer = load_tokenizer(name)
    launched = "LOCAL_RANK" in os.environ  # of several processes one samples, the others wait and read its cache
    process = accelerate.PartialState(cpu=device.type == "cpu", timeout=PATIENCE) if launched else None
    with process.main_process_first() if process else nullcontext():
        source = options.pairs or PRESETS[options.preset].stage.pairs or str(_sampled_pairs(options))
        pairs, table = _encoded(source, options.split, options.config, tokenizer, config, options)
    eval_pairs = held_out = None
    if options.eval_pairs:
        wanted = (options.eval_pairs, options.eval_split, options.eval_config)
        eval_pairs, held_out = _encoded(*wanted, tokenizer, config, options)
    config, kinds, words = given.taken(config, table, options.guide)
    how = {"max_length": config.max_length, "kinds": kinds, "held_out": held_out and (held_out, eval_pairs)}
    values = given.token_values(table, pairs, tokenizer, **how) if kinds else None
    if words:
        tell(f"{source}: {words}" + (f" ({given.summary(values)})" if values else ""), file=sys.stderr)
    guide = options.guide
    if guide is None and "rewards" not in kinds and "guide_logps" in OBJECTIVES[config.loss_type].needs:
        config, guide = _own_guide(config, name, tokenizer, pairs, options.fast)
    policy, reference = named.policy(config, name)
    with _drawn(config) as picture:
        result = fit(
            config,
            policy,
            reference,
            pairs,
            eval_pairs=eval_pairs,
            guide=guide and named.guide(config, guide, reference),
            given=values,
            tokenizer=tokenizer,
            fast=options.fast,
            resume=options.resume,
        )
    tell(json.dumps(result.metrics[-1] if result.metrics else {}, indent=1))
    folder = result.output_dir
    tell(
        f"trained {result.steps} updates; model: {folder / 'final'}, metrics: {folder / 'metrics.jsonl'}, curves: {picture}"
    )


@contextmanager
def _drawn(config: TrainConfig) -> Iterator[Path]:
    """Draw the curves of a run when it has ended, and those so far where Ctrl-C, SIGTERM or what is not finite ended it."""
    folder = Path(config.output_dir)
    picture, rows = folder / "curves.png", folder / "metrics.jsonl"

    def draw() -> None:
        logged = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        if logged and first():  # of several processes
            store.write_file(picture, partial(plots.run(config.loss_type, logged).savefig, dpi=110))

    try:
        yield picture
    except (KeyboardInterrupt, Terminated, FloatingPointError):
        draw()
        raise
    draw()


def _own_guide(config: TrainConfig, name: str, tokenizer, pairs, fast) -> tuple[TrainConfig, Path]:
    """Where no guide is given: one is trained with DPO; the settings with its beta, and its folder."""
    folder = Path(config.output_dir) / "guide"
    beta = runs.guide_settings(config).hyperparameters()["beta"]
    tell(f"{config.loss_type} needs a guide: training one with dpo (beta {beta}) into {folder}", file=sys.stderr)
    inside = replace(config, output_dir=str(folder))
    runs.train_guide(inside, *named.policy(config, name), pairs, tokenizer=tokenizer, fast=fast, progress=True)
    return replace(config, guide_beta=beta), folder


def _encoded(name: str, split: str | None, part: str | None, tokenizer, config: TrainConfig, options):
    paired = OBJECTIVES[config.loss_type].paired
    table, skipped = load_pairs(name, split=split, config=part, on_bad_rows=options.on_bad_rows, paired=paired)
    how = {"max_length": config.max_length, "on_bad_rows": options.on_bad_rows, "cache_dir": options.cache_dir}
    encoded, encoding = encode_table(table, tokenizer, **how, progress=first())
    for row in (*skipped, *encoding.skipped):
        tell(f"skipped {row}", file=sys.stderr)
    tell(f"{name}: {encoding}", file=sys.stderr)
    return encoded, table


def pairs(options) -> None:
    output = Path(options.output)
    picture = output.with_suffix(".png")
    if picture.exists() and not output.exists():
        raise FileExistsError(f"{picture} is there, where the histogram beside --output goes; choose another name")
    print(f"wrote {_sampled_pairs(options, output)} and {picture}")


def _sampled_pairs(options, output: Path | None = None) -> Path:
    """Sample, score and pair; returns the file written (the cache's own if no output is named)."""
    named.check_names(options)
    name, folder = named.model_name(options), Path(options.cache_dir or "runs/pairs")
    device, seed = choose_device(options.device), options.seed or 0
    scorer = named.reward_name(options, name)
    reward = own.scorer(scorer, device)  # first: what cannot score shall not cost a model
    model, tokenizer = load_model(name, device=device), load_tokenizer(name)
    prompts = training_prompts(options.prompts, options.num_prompts, model, tokenizer, seed=seed, imdb=options.imdb)
    _say({"model": name, "reward": _scorer_words(reward, scorer), "judge": NO_JUDGE, "prompts": prompts.words})
    names = ("samples_per_prompt", "max_new_tokens", "temperature", "rule", "min_gap")
    settings = {name: getattr(options, name) for name in names} | {"seed": seed, "cache_dir": folder}
    stage = PRESETS[options.preset].stage
    settings |= {"batch_size": stage.sampled_together, "precision": choose_precision(device, stage.precision)}
    table, made = pairing.build_pairs(model, tokenizer, reward, prompts=prompts.texts, **settings)
    print(made)
    if output is None:  # named by its content: another run may sample into the same folder
        output = folder / f"sampled-{store.content_key(table.to_dict())[:16]}.jsonl"
    save_pairs(table, output)
    store.write_file(output.with_suffix(".png"), partial(plots.score_gaps(made).savefig, dpi=110))
    return output


def merge(options) -> None:
    source = folders.find("adapter", options.adapter)
    if source.adapter is None:
        raise ValueError(
            f"{source.folder} is a whole model: there is nothing to merge (a run's final/ is merged already)"
        )
    base = options.model or folders.base_of(source)
    model = adapters.merge_into(load_model(base), source, *adapters.read(source))
    tokenizer = load_tokenizer(base if options.model and not list(source.folder.glob("token*")) else options.adapter)

    def write(target: Path) -> None:
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
        if (source.folder / "training.json").is_file():  # what the run was started from, for `evaluate`
            shutil.copy(source.folder / "training.json", target)

    store.write_atomically(Path(options.output), write)
    print(f"{options.output}: {base} with {source.name} merged into it")


def evaluate(options) -> None:
    named.check_names(options)
    device, record = choose_device(options.device), read_run(options.policy)
    name, source = named.reference(options, record)
    scorers = named.reward_name(options, name), named.judge_name(options, name)
    # the scorers first: what cannot score shall not cost a model
    reward, judge = (scorer and own.scorer(scorer, device) for scorer in scorers)
    tokenizer, reference = load_tokenizer(name), load_model(name, device=device)
    named.check_reference(options, record, reference, tokenizer)
    seen = recorded_prompts(record, tokenizer)
    wanted = (options.prompts, options.num_prompts, reference, tokenizer)
    prompts = held_out_prompts(*wanted, seed=options.seed, imdb=options.imdb, seen=seen)
    ranking, words = _held_out_pairs(options, record, tokenizer, seen, reference)
    same = "; it is the reward once more" if judge and judge.fingerprint == reward.fingerprint else ""
    sources = {"model": options.policy, "reference": f"{name} ({source})", "reward": _scorer_words(reward, scorers[0])}
    sources |= {"judge": _scorer_words(judge, scorers[1]) + same, "prompts": prompts.words, **words}
    _say(sources)
    result = evaluate_policy(
        load_model(options.policy, device=device),
        reference,
        tokenizer,
        prompts.texts,
        reward,
        judge=judge,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        cache_dir=Path(options.cache_dir),
        **ranking,
    )
    for metric, value in result.metrics.items():
        print(f"{metric:18s} {value.mean:8.3f}  [{value.low:.3f}, {value.high:.3f}]  n={value.n}")
    if options.output:
        store.write_file(options.output, json.dumps({"sources": sources} | result.record(), indent=1) + "\n")


def _held_out_pairs(options, record, tokenizer, seen, reference) -> tuple[dict, dict[str, str]]:
    """Arguments of `evaluate` for --pairs, and the line that says how they rank; by what the run was trained with."""
    if not options.pairs:
        return {}, {}
    config = record.config if record else PRESETS[options.preset].train
    pairs, _ = _encoded(options.pairs, options.split, options.config, tokenizer, config, options)
    mine = tokenizer.batch_decode([pair.prompt_ids for pair in pairs], skip_special_tokens=True)
    shared = overlap(None if seen is None else len(shared_prompts(seen, mine)))
    words, ranking = f"{len(pairs)} from {options.pairs}, prompts {shared}; ranked by the log-ratio", {"pairs": pairs}
    if not record:
        return ranking, {"pairs": f"{words}; own accuracy by it too (no record of an objective)"}
    own.check_unchanged(config.loss_type, record.start.get("objective"))
    if "guide_logps" in OBJECTIVES[config.loss_type].needs:
        if "token values" in record.start:
            return ranking, {"pairs": f"{words}; own accuracy by it too ({config.loss_type} was guided by data)"}
        ranking["guide"] = named.recorded_guide(record, reference)
        if ranking["guide"] is None:
            return ranking, {
                "pairs": f"{words}; own accuracy by it too ({config.loss_type}'s guide is not where it was)"
            }
    ranking |= {"objective": config.loss_type, "hyperparameters": config.hyperparameters()}
    return ranking, {"pairs": f"{words}; own accuracy by {config.loss_type}'s implicit reward, as trained"}


def _scorer_words(scorer, name: str | None) -> str:
    reads = {"full": "prompt and response", "response": "the response"}
    return f"{scorer.name} ({name}), reads {reads[scorer.scope]}" if scorer else NO_JUDGE


def _say(sources: dict[str, str]) -> None:
    """The head of an output: what it was made with."""
    for what, words in sources.items():
        print(f"{what:10s} {words}")
