"""The command line, python -m tpo_lib: the flags of every command, and errors as one sentence.

`COMMANDS` at the end names them; what they do is in runs/commands.py. Only the command that is asked for has its flags built and
its modules imported, so that --help and --version answer at once.
"""

from __future__ import annotations

import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import tpo_lib
from tpo_lib.files.own_code import is_own, title
from tpo_lib.parser import COUNT, GAP, SEVERAL, TEMPERATURE, Parser, check_room
from tpo_lib.runs.interrupts import Terminated, leave_at_once, on_sigterm, raise_terminated

LONGEST = 1000  # characters of an error
# ours: what they raise on purpose is a sentence, not a fault
PACKAGES = ("__main__", "tpo_lib", "tpo_course", "tpo_data", "benchmarks")
SAMPLING = ("reward", "prompts", "imdb", "num_prompts", "samples_per_prompt", "max_new_tokens", "temperature", "rule")
SAMPLING += ("min_gap",)


class Command(NamedTuple):
    """A command: its line in the help, the function that adds its flags, and the dotted name of what it does."""

    words: str
    add: Callable[[Parser], None]
    function: str


def build_parser(*built: str) -> Parser:
    """The parser of all commands; those in `built` have their flags. `commands` holds theirs by name."""
    parser = Parser(prog="python -m tpo_lib", description=tpo_lib.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tpo_lib {tpo_lib.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(name, help=command.words)
        one.set_defaults(function=command.function)
        if name in built:
            command.add(one)
    parser.commands = commands.choices
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with leave_at_once():
        _load_objective(arguments)
        parser = build_parser(*[word for word in arguments if word in COMMANDS][:1])
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
    """Errors as one line on stderr and status 2, interruptions with what to do next."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        traceback.clear_frames(stop.__traceback__)
        word, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        advice = "the same command continues where it was (train: add --resume; run: leave out --fresh)"
        print(f"{word}; {advice}", file=sys.stderr)
        sys.exit(status)
    except Exception as error:
        if show_traceback:
            raise
        said = _sentence(error)
        traceback.clear_frames(error.__traceback__)  # a bar that is still open there would be drawn around the sentence
        print(said, file=sys.stderr)
        sys.exit(2)


def _load_objective(arguments: Sequence[str]) -> None:
    """Execute the file of --loss-type FILE.py:NAME before the flags are built: its hyperparameters have flags too."""
    scan = Parser(add_help=False)
    scan.add_argument("--loss-type")
    if is_own(spec := scan.parse_known_args(arguments)[0].loss_type):
        from tpo_lib.runs.own import load_objective

        with _told("--traceback" in arguments):
            load_objective(spec)


def _judge(options, parser: Parser) -> None:
    """Refuse what can be seen to fail from the arguments alone, before anything is loaded."""
    given = vars(options)
    for name, value in given.items():
        if isinstance(value, str) and (not value.strip() or "\0" in value):
            raise ValueError(f"--{name.replace('_', '-')} {value!r} names nothing; leave it out or name something")
    _refuse_idle(options, parser)
    if given.get("command") == "train":
        _judge_training(options)
    elif given.get("device"):
        from tpo_lib.models import choose_device

        choose_device(options.device)
    if given.get("prompts", "model") not in ("model", "imdb"):
        from tpo_lib.runs.prompts import read_prompts

        read_prompts(options.prompts)
    if given.get("output"):
        suffixes = {"pairs": (".jsonl", ".parquet")}.get(given.get("command"), ())
        check_room("--output", options.output, folder="command" not in given, suffixes=suffixes)
        for name in ("pairs", "prompts"):
            source = Path(given.get(name) or "")
            if source.is_file() and Path(options.output).exists() and source.samefile(options.output):
                raise FileExistsError(f"--output {options.output} is what --{name} reads; choose another name")
    for name in ("output_dir", "work_dir", "cache_dir", "runs"):
        if given.get(name):
            check_room("--" + name.replace("_", "-"), given[name], folder=True)


def _judge_training(options) -> None:
    """The same for `train`, whose settings are read on the way, into `options.training`."""
    from tpo_lib import flags
    from tpo_lib.files.store import check_mark
    from tpo_lib.losses import OBJECTIVES
    from tpo_lib.models import choose_device, choose_precision
    from tpo_lib.runs.run import checkpoints_in

    config, options.fast = flags.read_config(options), flags.read_fast(options)
    options.training = config
    if config.output_dir is None:
        raise ValueError("--output-dir is missing: where should checkpoints and metrics go?")
    if options.guide and "guide_logps" not in OBJECTIVES[config.loss_type].needs:
        raise ValueError(f"--guide has no effect with {config.loss_type}, which reads no guide; leave it out")
    choose_precision(choose_device(config.device), config.precision)
    check_room("--output-dir", config.output_dir, folder=True)
    check_mark(Path(config.output_dir), "run")
    checkpoints_in(Path(config.output_dir), resume=options.resume)


def _refuse_idle(options, parser: Parser) -> None:
    """Refuse flags that nothing would read beside the others."""
    given, train = vars(options), vars(options).get("command") == "train"
    pairs = given.get("pairs")
    if train and not pairs:
        from tpo_lib.config import PRESETS

        pairs = PRESETS[options.preset].pairs
    idle = dict.fromkeys(SAMPLING if train and pairs else (), f"with pairs that are there ({pairs}): none are sampled")
    idle |= dict.fromkeys(() if pairs else ("split", "config"), "without --pairs")
    idle |= dict.fromkeys(() if given.get("eval_pairs") else ("eval_split", "eval_config"), "without --eval-pairs")
    if given.get("prompts", "imdb") != "imdb":
        idle["imdb"] = "without --prompts imdb"
    for name, why in idle.items():
        if name in given and given[name] != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def _sentence(error: Exception) -> str:
    """An error as one line. What this package did not raise itself keeps its traceback, in a file: it may be a fault of ours."""
    import torch

    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [each for each in frames if each[0].f_globals["__name__"].partition(".")[0] in PACKAGES]
    text = " ".join(str(error).split()) or "no more is known"
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        lower = "--batch-size, --max-tokens, --max-length, --num-prompts or --max-new-tokens"
        return f"out of memory: {text}; lower {lower}"
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


def _add_run(command: Parser) -> None:
    command.add_argument("--quick", action="store_true", help="a small comparison of about a minute")
    command.add_argument("--name", help="folder below --runs (default: pocket, or quick)")
    command.add_argument("--runs", default="runs", help="where runs are kept")
    command.add_argument("--fresh", action="store_true", help="throw away what an earlier run left in the folder")
    _add_seed(command, "of prompts, samples and the order of the pairs")


def _add_train(command: Parser) -> None:
    from tpo_lib.flags import add_config

    _add_models(command)
    command.add_argument("--pairs", help="preference pairs: file, folder or hub name (default: sampled from the model)")
    _add_table(command)
    command.add_argument("--eval-split", help="split of --eval-pairs (default: train)")
    command.add_argument("--eval-config", help="configuration of --eval-pairs")
    command.add_argument("--eval-pairs", help="held-out pairs, scored every --eval-every updates")
    words = "tgdpo: folder or name of the DPO model that guides (default: train one first)"
    command.add_argument("--guide", help=words)
    command.add_argument("--resume", action="store_true", help="continue from the newest sound checkpoint")
    _add_sampling(command)
    add_config(command)


def _add_pairs(command: Parser) -> None:
    _add_models(command)
    _add_objective(command)
    _add_sampling(command)
    _add_device(command)
    _add_seed(command, "of prompts and samples")
    words = "file to write: .jsonl or .parquet; the histogram goes beside it"
    command.add_argument("--output", required=True, help=words)


def _add_evaluate(command: Parser) -> None:
    _add_models(command)
    _add_objective(command)
    command.add_argument("policy", help="folder or name of the trained model")
    command.add_argument("--judge", help="second reward, for reporting only")
    _add_prompts(command, 192)
    command.add_argument("--pairs", help="held-out preference pairs: accuracy, reward margin and sequential KL on them")
    _add_table(command)
    _add_device(command)
    _add_seed(command, "of prompts and samples")
    command.add_argument("--cache-dir", metavar="DIR", default="runs/pairs", help="folder that keeps the samples")
    command.add_argument("--output", help="JSON file for metrics and samples")


def _add_pocket(command: Parser) -> None:
    from tpo_data.pocket import add_flags

    add_flags(command)


def _add_derive(command: Parser) -> None:
    command.add_argument("name", nargs="?", help="one derivation (default: all)")
    command.add_argument("--map", action="store_true", help="print the equation map instead")


def _derive(options) -> None:
    from tpo_course.derivations import derive_table, equation_map

    print(equation_map() if options.map else derive_table(options.name), end="" if options.map else "\n")


def _add_sweep(command: Parser) -> None:
    command.add_argument("--output", default=None, help="JSON file; it is continued (default: data/runs.json)")


def _add_seed(command: Parser, words: str) -> None:
    from tpo_lib.flags import SEED

    command.add_argument("--seed", type=SEED, default=0, help=words)


def _add_objective(command: Parser) -> None:
    words = "FILE.py:NAME of the objective of your own that the run was trained with"
    command.add_argument("--loss-type", type=title, metavar="FILE.py:NAME", help=words)


def _add_device(command: Parser) -> None:
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")


def _add_table(command: Parser) -> None:
    command.add_argument("--split", help="split of --pairs, if these are a folder or of the hub (default: train)")
    command.add_argument("--config", help="configuration of --pairs, if these have several")
    words = "stop at them, or list and skip"
    command.add_argument("--on-bad-rows", choices=("error", "skip"), default="error", help=words)


def _add_models(command: Parser) -> None:
    from tpo_lib.config import PRESETS

    words = "where everything not given comes from"
    command.add_argument("--preset", choices=tuple(PRESETS), default="pocket", help=words)
    command.add_argument("--model", help="start model: folder or hub name (default: the preset's)")
    command.add_argument(
        "--reward", help="reward: folder or hub name of a text classifier, or FILE.py:NAME (default: the preset's)"
    )


def _add_prompts(command: Parser, count: int) -> None:
    words = "sampled from the start model, real reviews' beginnings, or a file: text with one a line, or .jsonl with `prompt`"
    command.add_argument("--prompts", default="model", metavar="model|imdb|FILE", help=words)
    words = "with --prompts imdb: folder of parquet files (default: the hub's stanfordnlp/imdb)"
    command.add_argument("--imdb", help=words)
    words = f"how many (default: {count} of 2-8 tokens; of a FILE all; the DPO paper: 25,000)"
    command.add_argument("--num-prompts", type=COUNT, help=words)
    command.add_argument("--max-new-tokens", type=COUNT, default=40, help="longest completion")


def _add_sampling(command: Parser) -> None:
    _add_prompts(command, 512)
    words = "completions of a prompt (the DPO paper: 4)"
    command.add_argument("--samples-per-prompt", type=SEVERAL, default=4, help=words)
    words = "divides the logits before sampling"
    command.add_argument("--temperature", type=TEMPERATURE, default=1.0, help=words)
    words = "all: 6 pairs from 4, as in the paper"
    command.add_argument("--rule", choices=("all", "best_worst"), default="all", help=words)
    command.add_argument("--min-gap", type=GAP, default=0.0, help="smallest difference of scores in a pair")
    words = (
        "folder of caches: of sampled pairs (without the flag: runs/pairs); train: also of what the frozen models say "
        "(without the flag: none, they are read anew for every batch)"
    )
    command.add_argument("--cache-dir", metavar="DIR", help=words)


ROOM = "tpo_lib.runs.commands"
COMMANDS = {
    "run": Command("compare all objectives on the pocket model and write a report", _add_run, f"{ROOM}.run"),
    "train": Command("train one objective", _add_train, f"{ROOM}.train"),
    "pairs": Command("prompts -> completions -> scored preference pairs", _add_pairs, f"{ROOM}.pairs"),
    "evaluate": Command(
        "reward, judge, KL and diversity of a trained model, with intervals", _add_evaluate, f"{ROOM}.evaluate"
    ),
    "sweep": Command("train every objective over alpha and beta, for the run browser", _add_sweep, f"{ROOM}.sweep"),
    "derive": Command(
        "check every step of the derivations in small worlds, with numbers", _add_derive, "tpo_lib.cli._derive"
    ),
    "pocket": Command(
        "rebuild the bundled model, reward and judge from IMDb", _add_pocket, "tpo_data.pocket.from_flags"
    ),
}
