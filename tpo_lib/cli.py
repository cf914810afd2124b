"""The command line: python -m tpo_lib run | train | pairs | evaluate | pocket | derive | notebooks | sweep | bench."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tpo_lib import flags
from tpo_lib.config import PRESETS, TrainConfig, override
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.interrupts import Terminated, on_sigterm, raise_terminated

LONGEST = 1000  # characters of an error
PACKAGES = (
    "tpo_lib",
    "tpo_course",
    "tpo_data",
    "benchmarks",
)  # ours: what they raise on purpose is a sentence, not a fault


def build_parser() -> flags.Parser:
    """The parser of all commands; `commands` holds theirs by name."""
    parser = flags.Parser(prog="python -m tpo_lib", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show errors as Python does")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        _add_run,
        _add_train,
        _add_pairs,
        _add_evaluate,
        _add_pocket,
        _add_derive,
        _add_notebooks,
        _add_sweep,
        _add_bench,
    ):
        add(commands)
    parser.commands = commands.choices
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; user errors end with one line on stderr and exit status 2 (`--traceback`: with Python's traceback)."""
    options = build_parser().parse_args(arguments)
    try:
        with on_sigterm(raise_terminated):
            _judge(options)
            _one_bar_only()
            options.function(options)
    except (KeyboardInterrupt, Terminated) as stop:
        traceback.clear_frames(stop.__traceback__)
        word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(
            f"{word}; the same command continues where it was (train: add --resume; run: leave out --fresh)",
            file=sys.stderr,
        )
        sys.exit(status)
    except Exception as error:
        if options.traceback:
            raise
        said = _sentence(error)
        traceback.clear_frames(error.__traceback__)  # a bar that is still open there would be drawn around the sentence
        print(said, file=sys.stderr)
        sys.exit(2)


def _judge(options) -> None:
    """Refuse what can be seen to fail from the arguments alone, before anything is loaded."""
    from tpo_lib.files.store import check_mark
    from tpo_lib.models import choose_device, choose_precision
    from tpo_lib.runs.prompts import read_prompts
    from tpo_lib.runs.run import checkpoints_in

    for name, value in vars(options).items():
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"--{name.replace('_', '-')} {value!r} names nothing; leave it out or name something")
    _refuse_idle(options)
    if options.command == "train":
        config = flags.read_config(options)
        if config.output_dir is None:
            raise ValueError("--output-dir is missing: where should checkpoints and metrics go?")
        if options.guide and "guide_logps" not in OBJECTIVES[config.loss_type].needs:
            raise ValueError(f"--guide has no effect with {config.loss_type}, which reads no guide; leave it out")
        choose_precision(choose_device(config.device), config.precision)
    elif getattr(options, "device", None):
        choose_device(options.device)
    if getattr(options, "prompts", "model") not in ("model", "imdb"):
        read_prompts(options.prompts)
    suffixes = {"pairs": (".jsonl", ".parquet")}.get(options.command, ())
    if getattr(options, "output", None):
        flags.check_room("--output", options.output, folder=options.command == "bench", suffixes=suffixes)
        for name in ("pairs", "prompts"):
            source = Path(getattr(options, name, None) or "")
            if source.is_file() and Path(options.output).exists() and source.samefile(options.output):
                raise FileExistsError(f"--output {options.output} is what --{name} reads; choose another name")
    for name in ("output_dir", "work_dir", "cache_dir", "runs"):
        if getattr(options, name, None):
            flags.check_room("--" + name.replace("_", "-"), getattr(options, name), folder=True)
    if options.command == "train":
        check_mark(Path(config.output_dir), "run")
        checkpoints_in(Path(config.output_dir), resume=options.resume)


SAMPLING = ("reward", "prompts", "imdb", "num_prompts", "samples_per_prompt", "max_new_tokens", "temperature", "rule")
SAMPLING += ("min_gap",)


def _refuse_idle(options) -> None:
    """Refuse flags that nothing would read beside the others."""
    given, train = vars(options), options.command == "train"
    pairs = given.get("pairs") or (train and PRESETS[options.preset].pairs)
    idle = dict.fromkeys(SAMPLING if train and pairs else (), f"with pairs that are there ({pairs}): none are sampled")
    idle |= dict.fromkeys(() if pairs else ("split", "config"), "without --pairs")
    idle |= dict.fromkeys(() if given.get("eval_pairs") else ("eval_split", "eval_config"), "without --eval-pairs")
    if given.get("prompts", "imdb") != "imdb":
        idle["imdb"] = "without --prompts imdb"
    defaults = build_parser().commands[options.command]
    for name, why in idle.items():
        if name in given and given[name] != defaults.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def _sentence(error: Exception) -> str:
    """An error as one line. What this package did not raise itself keeps its traceback, in a file: it may be a fault of ours."""
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [each for each in frames if each[0].f_globals["__name__"].partition(".")[0] in PACKAGES]
    text = " ".join(str(error).split()) or "no more is known"
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return (
            f"out of memory: {text}; lower --batch-size, --max-tokens, --max-length, --num-prompts or --max-new-tokens"
        )
    known = isinstance(error, ValueError | OSError | RuntimeError | ImportError | FloatingPointError)
    if known and (isinstance(error, OSError) or frames[-1] == ours[-1]):
        return f"{type(error).__name__}: {text}"
    with tempfile.NamedTemporaryFile("w", prefix="tpo_lib-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    frame, line = ours[-1]
    return (
        f"{type(error).__name__} in {Path(frame.f_code.co_filename).name}, line {line}: {text} (traceback: {file.name})"
    )


def _one_bar_only() -> None:
    """Silence the bars that libraries draw for every file they read or write: ours would drown in them."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _add_run(commands) -> None:
    command = commands.add_parser("run", help="compare all objectives on the pocket model and write a report")
    command.add_argument("--quick", action="store_true", help="a small comparison of about a minute")
    command.add_argument("--name", help="folder below --runs (default: pocket, or quick)")
    command.add_argument("--runs", default="runs", help="where runs are kept")
    command.add_argument("--fresh", action="store_true", help="throw away what an earlier run left in the folder")
    command.add_argument("--seed", type=flags.SEED, default=0, help="of prompts, samples and the order of the pairs")
    command.set_defaults(function=_run)


def _run(options) -> None:
    from tpo_lib.runs import compare, report

    config = compare.pocket_comparison(quick=options.quick, seed=options.seed)
    name = ("quick" if options.quick else "pocket") if options.name is None else options.name
    folder = compare.run_folder(options.runs, name)
    summary = compare.run(config, folder, fresh=options.fresh)
    print(report.summary_table(summary))
    print(
        f"\n{summary['wall_time_s'] / 60:.1f} minutes; report: {folder / 'report.html'} (also {folder / 'report.md'})"
    )


def _add_train(commands) -> None:
    command = commands.add_parser("train", help="train one objective")
    _add_models(command)
    command.add_argument("--pairs", help="preference pairs: file, folder or hub name (default: sampled from the model)")
    _add_table(command)
    command.add_argument("--eval-split", help="split of --eval-pairs (default: train)")
    command.add_argument("--eval-config", help="configuration of --eval-pairs")
    command.add_argument("--eval-pairs", help="held-out pairs, scored every --eval-every updates")
    command.add_argument(
        "--guide", help="tgdpo: folder or name of the DPO model that guides (default: train one first)"
    )
    command.add_argument("--resume", action="store_true", help="continue from the newest sound checkpoint")
    _add_sampling(command)
    flags.add_config(command)
    command.set_defaults(function=_train)


def _train(options) -> None:
    from tpo_lib.models import choose_device, load_tokenizer
    from tpo_lib.train import fit

    preset, config = PRESETS[options.preset], flags.read_config(options)
    name, device = _model_name(options), choose_device(config.device)
    _check_names(options)
    _check_rank(config, name)
    config = _guided(options, config)
    tokenizer = load_tokenizer(name)
    with _main_process_first(device):  # of several processes one samples, the others read its cache
        source = options.pairs or preset.pairs or str(_sampled_pairs(options))
        pairs = _encoded(source, options.split, options.config, tokenizer, config, options)
    eval_pairs = None
    if options.eval_pairs:
        eval_pairs = _encoded(options.eval_pairs, options.eval_split, options.eval_config, tokenizer, config, options)
    guide = options.guide
    if guide is None and "guide_logps" in OBJECTIVES[config.loss_type].needs:
        config, guide = _own_guide(config, name, tokenizer, pairs)
    guide = guide and partial(_frozen, guide, device)
    policy, reference = _policy(config, name), partial(_frozen, name, device)
    result = fit(
        config, policy, reference, pairs, eval_pairs=eval_pairs, guide=guide, tokenizer=tokenizer, resume=options.resume
    )
    print(json.dumps(result.metrics[-1] if result.metrics else {}, indent=1))
    print(
        f"trained {result.steps} updates; model: {result.output_dir / 'final'}, metrics: {result.output_dir / 'metrics.jsonl'}"
    )


def _check_names(options) -> None:
    """Refuse what names nothing, or nothing that can be loaded, before anything is loaded or sampled."""
    from tpo_lib.files import folders

    for kind in ("model", "policy", "guide", "reward", "judge"):
        if name := getattr(options, kind, None):
            folders.find(kind, name)
    for kind in ("pairs", "eval_pairs"):
        name = getattr(options, kind, None)
        if name and folders.is_path(name) and not Path(name).exists():
            raise folders.no_such_path(f"--{kind.replace('_', '-')}", name)


def _check_rank(config: TrainConfig, name: str) -> None:
    from tpo_lib import models
    from tpo_lib.files import adapters

    if config.lora_rank:
        adapters.check_rank(config.lora_rank, models.load_config(name))


def _policy(config: TrainConfig, name: str):
    """What is trained: the start model, or fresh adapters on it."""
    from tpo_lib import models
    from tpo_lib.files import adapters

    model = models.load_model(name, device=models.choose_device(config.device))
    return adapters.add_lora(model, config.lora_rank, seed=config.seed) if config.lora_rank else model


def _frozen(name: str | Path, device):
    """A reference or guide; `fit` calls this when it needs the model, and may let it go."""
    from tpo_lib.models import load_model

    return load_model(name, device=device).requires_grad_(False)


def _main_process_first(device):
    """Under `accelerate launch` the other processes wait for the main one; alone, nothing."""
    if "LOCAL_RANK" not in os.environ:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=device.type == "cpu").main_process_first()


def _guided(options, config: TrainConfig) -> TrainConfig:
    """The settings with the beta that --guide was trained with.

    It has to be a run against a reference: there log pi_guide - log pi_ref is a reward.
    """
    from tpo_lib.runs.run import read_run

    if not options.guide or "guide_beta" in config.hyper:
        return config
    try:
        record = read_run(options.guide)
    except ValueError as error:
        raise ValueError(f"{error}: pass --guide-beta") from error
    if record and "ref_logps" not in OBJECTIVES[record.config.loss_type].needs:
        raise ValueError(
            f"--guide {record.folder} is a run of {record.config.loss_type}, which reads no reference, so that it holds no "
            "token rewards: guide with a run of dpo, or say with --guide-beta how its log-ratio is to be read"
        )
    beta = record and record.config.hyperparameters().get("beta")
    if beta is None:
        raise ValueError(
            f"--guide {options.guide} does not say which beta it was trained with; pass it as --guide-beta"
        )
    return replace(config, guide_beta=beta)


def _own_guide(config: TrainConfig, name: str, tokenizer, pairs) -> tuple[TrainConfig, Path]:
    """Where no guide is given: one is trained with DPO; the settings with its beta, and its folder."""
    from tpo_lib.models import choose_device
    from tpo_lib.train import fit

    folder = Path(config.output_dir) / "guide"
    beta = config.guide_beta or config.hyperparameters()["beta"]
    print(f"tgdpo needs a guide: training one with dpo (beta {beta}) into {folder}", file=sys.stderr)
    stage = override(config, loss_type="dpo", beta=beta, output_dir=str(folder))
    reference = partial(_frozen, name, choose_device(config.device))
    fit(stage, _policy(stage, name), reference, pairs, tokenizer=tokenizer, resume=True)
    return replace(config, guide_beta=beta), folder


def _encoded(name: str, split: str | None, part: str | None, tokenizer, config: TrainConfig, options):
    from tpo_lib.data import encode_pairs
    from tpo_lib.files.pairs import load_pairs

    paired = OBJECTIVES[config.loss_type].paired
    table, skipped = load_pairs(name, split=split, config=part, on_bad_rows=options.on_bad_rows, paired=paired)
    for row in skipped:
        print(f"skipped {row}", file=sys.stderr)
    encoded, encoding = encode_pairs(table, tokenizer, max_length=config.max_length, on_bad_rows=options.on_bad_rows)
    for row in encoding.skipped:
        print(f"skipped {row}", file=sys.stderr)
    print(f"{name}: {encoding}", file=sys.stderr)
    return encoded


def _add_pairs(commands) -> None:
    command = commands.add_parser("pairs", help="prompts -> completions -> scored preference pairs")
    _add_models(command)
    _add_sampling(command)
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--seed", type=flags.SEED, default=0, help="of prompts and samples")
    command.add_argument(
        "--output", required=True, help="file to write: .jsonl or .parquet; the histogram goes beside it"
    )
    command.set_defaults(function=_pairs)


def _pairs(options) -> None:
    output = Path(options.output)
    picture = output.with_suffix(".png")
    if picture.exists() and not output.exists():
        raise FileExistsError(f"{picture} is there, where the histogram beside --output goes; choose another name")
    print(f"wrote {_sampled_pairs(options, output)} and {picture}")


def _sampled_pairs(options, output: Path | None = None) -> Path:
    """Sample, score and pair; returns the file written (the cache's own if no output is named)."""
    from tpo_lib import pairing
    from tpo_lib.files import store
    from tpo_lib.files.pairs import save_pairs
    from tpo_lib.models import choose_device, load_model, load_tokenizer
    from tpo_lib.rewards import load_reward
    from tpo_lib.runs.plots import score_gaps
    from tpo_lib.runs.prompts import training_prompts

    _check_names(options)
    name, folder, device = _model_name(options), Path(options.cache_dir or "runs/pairs"), choose_device(options.device)
    scorer, seed = _reward_name(options, name), options.seed or 0
    reward = load_reward(scorer, device=device)  # first: what cannot score shall not cost a model
    model, tokenizer = load_model(name, device=device), load_tokenizer(name)
    prompts = training_prompts(options.prompts, options.num_prompts, model, tokenizer, seed=seed, imdb=options.imdb)
    _say({"model": name, "reward": _scorer_words(reward, scorer), "judge": NO_JUDGE, "prompts": prompts.words})
    table, report = pairing.build_pairs(
        model,
        tokenizer,
        reward,
        prompts=prompts.texts,
        samples_per_prompt=options.samples_per_prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        rule=options.rule,
        min_gap=options.min_gap,
        seed=seed,
        cache_dir=folder,
    )
    print(report)
    if output is None:  # named by its content: another run may sample into the same folder
        output = folder / f"sampled-{store.content_key(table.to_dict())[:16]}.jsonl"
    save_pairs(table, output)
    store.write_file(output.with_suffix(".png"), partial(score_gaps(report).savefig, dpi=110))
    return output


def _add_evaluate(commands) -> None:
    command = commands.add_parser("evaluate", help="reward, judge, KL and diversity of a trained model, with intervals")
    _add_models(command)
    command.add_argument("policy", help="folder or name of the trained model")
    command.add_argument("--judge", help="second classifier, for reporting only")
    _add_prompts(command, 192)
    command.add_argument("--pairs", help="held-out preference pairs: accuracy, reward margin and sequential KL on them")
    _add_table(command)
    command.add_argument("--max-new-tokens", type=flags.COUNT, default=40, help="longest completion")
    command.add_argument("--seed", type=flags.SEED, default=0, help="of prompts and samples")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--cache-dir", metavar="DIR", default="runs/pairs", help="folder that keeps the samples")
    command.add_argument("--output", help="JSON file for metrics and samples")
    command.set_defaults(function=_evaluate)


def _evaluate(options) -> None:
    from dataclasses import asdict

    from tpo_lib.evaluation import evaluate
    from tpo_lib.files import store
    from tpo_lib.models import choose_device, load_model, load_tokenizer
    from tpo_lib.rewards import load_reward
    from tpo_lib.runs.prompts import held_out_prompts, recorded_prompts
    from tpo_lib.runs.run import read_run

    _check_names(options)
    device, record = choose_device(options.device), read_run(options.policy)
    name, source = _reference(options, record)
    scorers = {"reward": _reward_name(options, name), "judge": _judge_name(options, name)}
    # the scorers first: what cannot score shall not cost a model
    reward, judge = (scorer and load_reward(scorer, device=device) for scorer in scorers.values())
    tokenizer, reference = load_tokenizer(name), load_model(name, device=device)
    _check_reference(options, record, reference, tokenizer)
    seen = recorded_prompts(record, tokenizer)
    prompts = held_out_prompts(
        options.prompts, options.num_prompts, reference, tokenizer, seed=options.seed, imdb=options.imdb, seen=seen
    )
    ranking, words = _held_out_pairs(options, record, tokenizer, seen, device)
    sources = {"model": options.policy, "reference": f"{name} ({source})"}
    sources["reward"] = _scorer_words(reward, scorers["reward"])
    same = judge and judge.fingerprint == reward.fingerprint
    sources["judge"] = _scorer_words(judge, scorers["judge"]) + ("; it is the reward once more" if same else "")
    sources |= {"prompts": prompts.words, **words}
    _say(sources)
    result = evaluate(
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
        print(f"{metric:16s} {value.mean:8.3f}  [{value.low:.3f}, {value.high:.3f}]  n={value.n}")
    if options.output:
        metrics = {metric: value.as_dict() for metric, value in result.metrics.items()}
        content = {"sources": sources, "metrics": metrics, "samples": [asdict(sample) for sample in result.samples]}
        store.write_file(options.output, json.dumps(content, indent=1) + "\n")


def _reference(options, record) -> tuple[str, str]:
    """The reference of an evaluation and, in words, who said so: --model, the run's record, or else the preset."""
    from tpo_lib.files.folders import is_path

    known = record and record.reference
    if options.model:
        differs = f"; the run was started from {known['name'] or 'a model in memory'}" if known else ""
        return options.model, f"--model{differs}"
    if known and not known["name"]:
        raise ValueError(
            f"the run in {record.folder} was started from a model in memory: name its reference with --model FOLDER"
        )
    if known and is_path(known["name"]) and not Path(known["name"]).exists():
        raise FileNotFoundError(
            f"{known['name']}, which the run in {record.folder} was started from, is not there any more: put it back, or name "
            "the reference with --model"
        )
    if known:
        return known["name"], "what the run was started from"
    return _model_name(options), "the preset's: there is no record of what the model was started from"


def _check_reference(options, record, reference, tokenizer) -> None:
    """Refuse a reference that has changed since the run, and a policy of another vocabulary."""
    from tpo_lib.files.tokens import vocabulary_name
    from tpo_lib.models import load_tokenizer
    from tpo_lib.runs.run import origin

    # of the base of adapters that no reference was read beside, the record has a digest of another kind
    known = record and (record.start.get("reference") or record.start.get("start model"))
    if known and not options.model and origin(reference)["sha256"] != known["sha256"]:
        raise ValueError(
            f"{known['name']} is not what the run in {record.folder} was started from: its weights have changed since; name "
            "the reference with --model"
        )
    with suppress(OSError):  # a policy without a tokenizer of its own has the reference's
        if vocabulary_name(load_tokenizer(options.policy)) != vocabulary_name(tokenizer):
            raise ValueError(
                f"{options.policy} has another vocabulary than the reference {tokenizer.name_or_path}: there is no KL between "
                "them; name the model that it was trained from with --model"
            )


def _held_out_pairs(options, record, tokenizer, seen, device) -> tuple[dict, dict[str, str]]:
    """Arguments of `evaluate` for --pairs, and the line that says how they rank; by what the run was trained with."""
    from tpo_lib.runs.prompts import overlap
    from tpo_lib.runs.run import shared_prompts

    if not options.pairs:
        return {}, {}
    config = record.config if record else PRESETS[options.preset].train
    pairs = _encoded(options.pairs, options.split, options.config, tokenizer, config, options)
    own = tokenizer.batch_decode([pair.prompt_ids for pair in pairs], skip_special_tokens=True)
    shared = overlap(None if seen is None else len(shared_prompts(seen, own)))
    words, ranking = f"{len(pairs)} from {options.pairs}, prompts {shared}; ranked by", {"pairs": pairs}
    if not record:
        return ranking, {"pairs": f"{words} the plain log-ratio (no record of an objective)"}
    if "guide_logps" in OBJECTIVES[config.loss_type].needs:
        ranking["guide"] = _recorded_guide(record, device)
        if ranking["guide"] is None:
            return ranking, {"pairs": f"{words} the plain log-ratio ({config.loss_type}'s guide is not where it was)"}
    ranking |= {"objective": config.loss_type, "hyperparameters": config.hyperparameters()}
    return ranking, {"pairs": f"{words} {config.loss_type}'s implicit reward, as trained"}


def _recorded_guide(record, device):
    """The guide of a run, or None where its record does not lead to the same model any more."""
    from tpo_lib.models import load_model
    from tpo_lib.runs.run import origin

    known = record.start.get("guide") or {"name": None}
    with suppress(OSError):
        guide = known["name"] and load_model(known["name"], device=device)
        return guide if guide and origin(guide)["sha256"] == known["sha256"] else None


NO_JUDGE = "none"


def _scorer_words(scorer, name: str | None) -> str:
    reads = {"full": "prompt and response", "response": "the response"}
    return f"{scorer.name} ({name}), reads {reads[scorer.scope]}" if scorer else NO_JUDGE


def _say(sources: dict[str, str]) -> None:
    """The head of an output: what it was made with."""
    for what, words in sources.items():
        print(f"{what:10s} {words}")


def _add_pocket(commands) -> None:
    command = commands.add_parser("pocket", help="rebuild the bundled model, reward and judge from IMDb")
    command.add_argument(
        "--imdb", help="folder of train/test/unsupervised.parquet (default: the hub's stanfordnlp/imdb)"
    )
    command.add_argument("--output-dir", default=str(_pocket()), help="where model, reward and judge go")
    command.add_argument(
        "--work-dir", default="runs/pocket-model", help="checkpoints; a killed build continues from here"
    )
    command.add_argument(
        "--steps", type=flags.COUNT, nargs="+", help="training steps of the language model, a number for every cycle"
    )
    command.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the step"
    )
    command.set_defaults(function=_build_pocket)


def _build_pocket(options) -> None:
    from tpo_data import pocket
    from tpo_data.sentiment import SentimentConfig

    config = pocket.PocketConfig(**({"cycles": tuple(options.steps)} if options.steps else {}))
    work = Path(options.work_dir)
    pocket.build(options.imdb, Path(options.output_dir), work, config, SentimentConfig(), compile=options.compile)


def _add_derive(commands) -> None:
    command = commands.add_parser("derive", help="check every step of the derivations in small worlds, with numbers")
    command.add_argument("name", nargs="?", help="one derivation (default: all)")
    command.add_argument("--map", action="store_true", help="print the equation map instead")
    command.set_defaults(function=_derive)


def _derive(options) -> None:
    from tpo_course.derivations import derive_table, equation_map

    print(equation_map() if options.map else derive_table(options.name), end="" if options.map else "\n")


def _add_notebooks(commands) -> None:
    command = commands.add_parser("notebooks", help="execute and clean the notebooks of the course, in place")
    command.add_argument("names", nargs="*", help="file names, or beginnings of them (default: all)")
    command.add_argument("--execute", action=argparse.BooleanOptionalAction, default=True, help="or only tidy them")
    command.set_defaults(function=_notebooks)


def _notebooks(options) -> None:
    from tpo_course import notebooks

    course = notebooks.course()
    unknown = [name for name in options.names if not any(path.name.startswith(name) for path in course)]
    if unknown:
        there = ", ".join(path.name for path in course)
        raise ValueError(f"no notebook is called {' or '.join(unknown)}; there are {there}")
    chosen = [path for path in course if path.name.startswith(tuple(options.names or [""]))]
    for path in chosen:
        seconds = notebooks.refresh(path, execute=options.execute)
        print(f"{path.name}: {'tidied' if seconds is None else f'{seconds:.0f} s'}", flush=True)


def _add_sweep(commands) -> None:
    command = commands.add_parser("sweep", help="train every objective over alpha and beta, for the run browser")
    command.add_argument("--output", default=None, help="JSON file; it is continued (default: data/runs.json)")
    command.set_defaults(function=_sweep)


def _sweep(options) -> None:
    from tpo_lib.runs.sweep import RUNS, sweep

    path = Path(options.output or RUNS)
    print(f"{len(sweep(path)['runs'])} runs in {path}")


def _add_bench(commands) -> None:
    command = commands.add_parser("bench", help="time and memory beside TRL and Liger (40 minutes; extra `bench`)")
    command.add_argument("--quick", action="store_true", help="fewer sections and pairs, about three minutes")
    command.add_argument("--only", nargs="+", default=(), metavar="NAME", help="sections whose names begin so")
    command.add_argument("--contestants", nargs="+", default=(), metavar="NAME", help="only these; nothing is written")
    command.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    command.add_argument("--repetitions", type=flags.COUNT, help="rounds of timing (default: 4, quick: 2)")
    command.add_argument("--output", type=Path, help="folder to write (default: benchmarks, quick: runs/bench)")
    command.set_defaults(function=_bench)


def _bench(options) -> None:
    try:
        from benchmarks import run
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise ImportError("the benchmarks lie beside the package: run this in the repository's root") from error
    run.run(
        options.output,
        quick=options.quick,
        only=options.only,
        labels=options.contestants,
        memory=options.memory,
        repetitions=options.repetitions,
    )


def _add_table(command) -> None:
    command.add_argument("--split", help="split of --pairs, if these are a folder or of the hub (default: train)")
    command.add_argument("--config", help="configuration of --pairs, if these have several")
    command.add_argument(
        "--on-bad-rows", choices=("error", "skip"), default="error", help="stop at them, or list and skip"
    )


def _add_models(command) -> None:
    command.add_argument(
        "--preset", choices=tuple(PRESETS), default="pocket", help="where everything not given comes from"
    )
    command.add_argument("--model", help="start model: folder or hub name (default: the preset's)")
    command.add_argument("--reward", help="reward: folder or hub name of a text classifier (default: the preset's)")


def _add_prompts(command, count: int) -> None:
    command.add_argument(
        "--prompts",
        default="model",
        metavar="model|imdb|FILE",
        help="sampled from the start model, real reviews' beginnings, or a file: text with one a line, or .jsonl with `prompt`",
    )
    command.add_argument(
        "--imdb", help="with --prompts imdb: folder of parquet files (default: the hub's stanfordnlp/imdb)"
    )
    command.add_argument(
        "--num-prompts",
        type=flags.COUNT,
        help=f"how many (default: {count} of 2-8 tokens; of a FILE all; the DPO paper: 25,000)",
    )


def _add_sampling(command) -> None:
    _add_prompts(command, 512)
    command.add_argument(
        "--samples-per-prompt",
        type=flags.SEVERAL,
        default=4,
        help="completions of a prompt (the DPO paper: 4)",
    )
    command.add_argument("--max-new-tokens", type=flags.COUNT, default=40, help="longest completion")
    command.add_argument(
        "--temperature", type=flags.TEMPERATURE, default=1.0, help="divides the logits before sampling"
    )
    command.add_argument(
        "--rule", choices=("all", "best_worst"), default="all", help="all: 6 pairs from 4, as in the paper"
    )
    command.add_argument("--min-gap", type=flags.GAP, default=0.0, help="smallest difference of scores in a pair")
    command.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder of caches: of sampled pairs (without the flag: runs/pairs); train: also of what the frozen models say "
        "(without the flag: none, they are read anew for every batch)",
    )


def _model_name(options) -> str:
    return options.model or PRESETS[options.preset].model or str(_pocket())


def _reward_name(options, model: str) -> str:
    """The reward to score with: the preset's own scores what comes of the preset's model, and nothing else unasked."""
    preset = PRESETS[options.preset]
    own, made_for = preset.reward or str(_pocket()), preset.model or str(_pocket())
    if not options.reward and not _same(_origin(model), made_for):
        raise ValueError(
            f"--reward is missing: {own} was made for {made_for} and may say nothing about {model}; name a reward (any text "
            "classifier), or that one if it is meant"
        )
    return options.reward or own


def _judge_name(options, model: str) -> str | None:
    preset = PRESETS[options.preset]
    if options.judge or not _same(_origin(model), preset.model or str(_pocket())):
        return options.judge
    return preset.judge if preset.model else str(_pocket() / "judge")


def _origin(model: str) -> str:
    """What a run's model was trained from; any other model itself."""
    from tpo_lib.runs.run import read_run

    record = read_run(model)
    return (record and record.model and record.model["name"]) or model


def _same(a: str, b: str) -> bool:
    return a == b or Path(a).resolve() == Path(b).resolve()


def _pocket() -> Path:
    from tpo_lib.models import POCKET

    return POCKET
