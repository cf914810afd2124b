"""A run's folder: what the run was started from, its checkpoints, its metrics. `train.fit` owns one while it trains.

    RUN/start/         written before the first update: training.json, prompts.safetensors
    RUN/checkpoints/   step-00000100, ...: a model folder with training.json and the state of the loop
    RUN/final/         the trained model, with training.json; of adapters the merged model, and in final/adapter they alone
    RUN/metrics.jsonl  a row a line

training.json holds the settings and, under "start", fingerprints of the models, the tokenizer and the pairs. A run goes on
only with what it was started from; `read_run` tells the rest of the house what that was.
"""

from __future__ import annotations

import bisect
import json
import signal
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from tpo_lib import train
from tpo_lib.config import TrainConfig, known_hyperparameters, run_settings
from tpo_lib.data import EncodedPair, bare_rows, column
from tpo_lib.fast import FastPath
from tpo_lib.fast.frozen import open_frozen
from tpo_lib.fast.table import EncodedTable, rows_of
from tpo_lib.files import adapters, store
from tpo_lib.files.load import same_weights
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import ResponseReader, check_pairs, choose_precision, fingerprint, tokenizer_content
from tpo_lib.runs import own
from tpo_lib.runs.accelerated import accelerated
from tpo_lib.runs.advice import advised
from tpo_lib.runs.given import Given
from tpo_lib.runs.interrupts import Terminated, on_sigterm
from tpo_lib.runs.processes import check_shards, tell
from tpo_lib.runs.trackers import begin_tracker
from tpo_lib.train import Callback, OnLog, Progress, Sums, TrainResult, check, not_finite
from tpo_lib.types import LossOutput

FORMAT = 2  # of training.json and of the state beside it; 1 had settings alone and no number
ADAPTER = "adapter"  # folder in final/
SORTED = np.dtype(">u4")  # of token ids
FREE = {"output_dir", "report_to", "log_every", "save_every", "keep", "device"}  # may change on a resume
RETIRED = {"share_prefix", "fused", "cache_dir"}  # settings that were: how models are read, which changes no number
ASIDE = FREE | {"precision"}  # what it comes to is recorded under "start": None means another one on another device
GUIDE_IS_REFERENCE = (
    "the guide has the reference's weights, so that every reward of it is 0; give the model that DPO has trained"
)
CUT = {"batch_size", "accumulation"}  # how an update is cut: another number of processes may cut it otherwise


def fit(
    config: TrainConfig,
    policy,
    reference,
    pairs: Sequence[EncodedPair],
    *,
    eval_pairs: Sequence[EncodedPair] | None = None,
    guide=None,
    given: Given | None = None,
    loss: Callable[..., LossOutput] | None = None,
    tokenizer=None,
    fast: FastPath | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """`train.fit` on the fast path, and in the folder `config.output_dir`, if there is one: it survives any kill.

    Args:
        config, policy, pairs, eval_pairs, callbacks, on_log, progress: as in `train.fit`.
        reference, guide: frozen models, or functions without arguments that load them: with `fast.cache_dir` each is let go
            of once it is read.
        given: rewards and weights of the tokens where they are data, from `token_values`; rewards make a guide needless.
        loss: as in `train.fit`, and tried first; a run's folder records its name and digest (`own.described`).
        tokenizer: saved beside the weights, so that checkpoints load on their own.
        fast: how models are read; None takes the fast path. With its `cache_dir`, training rows of DPO, TGDPO and SimPO have
            no kl/*: log-probabilities are cached there, not distributions.
        resume: continue from the newest sound checkpoint in `config.output_dir`, bit for bit, in another number of processes
            to rounding. A run leaves one also where an error, Ctrl-C or SIGTERM ends it, unless its weights are in shards.

    Raises:
        ValueError, NonFiniteLoss: as `train.fit`; the guide has the reference's weights; loss is none (`own.check_loss`); a
            tracker cannot begin, or accelerate is set to what checkpoints do not gather (`accelerated`), or shards, and a
            setting does without (`check_shards`).
        OutOfMemory: with what an update takes and would take otherwise (`advice`).
        RuntimeError: output_dir is in use, or holds another run: what it was started from is compared, and what differs named.
    """
    fast, eval_pairs = fast or FastPath(), eval_pairs or ()
    tables = pairs, eval_pairs
    bare = [row for table in tables for row in bare_rows(table)[:1]]
    if bare and fast.share_prefix:
        raise ValueError(
            f"row {bare[0]} has no rejected side and there is no pair to share a prompt in; train without share_prefix"
        )
    rewards = given is not None and "rewards" in given.caches
    check(config, reference, guide or rewards or None, pairs, eval_pairs)  # before anything is loaded
    if isinstance(guide, torch.nn.Module) and isinstance(reference, torch.nn.Module) and same_weights(guide, reference):
        raise ValueError(GUIDE_IS_REFERENCE)
    if loss is not None:
        own.check_loss(loss, config)
    policy = fast.reader(policy.eval(), config)
    check_pairs(policy.model, *tables, name="policy")
    longest = [table[int(column(table, "length").argmax())] for table in tables if table]
    if fast.fused and not policy.understood:
        kind = type(policy.model).__name__
        tell(f"{kind}: what follows its head is not understood; all logits are made", file=sys.stderr)
    with (
        accelerated(config) as accelerator,
        fast.around(policy.model),
        advised(config, fast, policy.model, longest, accelerator),
    ):
        if accelerator.sharded:
            check_shards(config, fast, callbacks)
        if accelerator.mixed_precision == "bf16" and choose_precision(accelerator.device) == "fp16":
            tell("this GPU only imitates bf16, which is slow: --precision fp16 is what it has", file=sys.stderr)
        run = Run(config, tokenizer, pairs, eval_pairs, accelerator)
        if loss is not None and run.folder is not None:
            run.start["objective"] = own.described(loss)
        if given is not None and run.folder is not None:
            run.start["token values"] = given.fingerprint

        def load(name: str, model) -> ResponseReader:
            model = model if isinstance(model, torch.nn.Module) else model()
            if isinstance(model, ResponseReader):
                raise ValueError(f"the {name} is a reader: give its model, if it is frozen, or train with train.fit")
            run.note(name, model)
            check_pairs(model, *tables, name=name, policy=policy.model)
            return fast.reader(model, config)

        def read(name: str, model):
            if model is None:
                return None
            if fast.cache_dir is None:
                return load(name, model)
            how = {"folder": fast.cache_dir, "accelerator": accelerator, "progress": progress}
            return open_frozen(name, lambda: accelerator.place(load(name, model)), config, pairs, eval_pairs, **how)

        with run.owned(resume=resume):
            frozen = {"reference": read("reference", reference), "guide": read("guide", guide)}
            run.take_up(policy.model)
            if fast.cache_dir is None:  # only now, for a guide may be made of the reference's tensors
                frozen = {name: reader and accelerator.place(reader) for name, reader in frozen.items()}
            told = {"callbacks": callbacks, "on_log": on_log, "progress": progress}
            how = {"eval_pairs": eval_pairs, "given": given, "loss": loss, "pair_loss": fast.pair_loss, "run": run}
            return train.fit(config, policy, pairs=pairs, **frozen, **how, **told)


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about the run."""

    folder: Path  # where its training.json was found
    config: TrainConfig
    # What it was started from, by name: "start model" (or "adapter base" and "start adapter"), "reference", "guide" and
    # "tokenizer" as {"name": folder or hub name or None, "sha256"}; "training pairs", "held-out pairs" and "training prompts"
    # as {"count", "sha256"}; an "objective", or a loss, of your own; a tracker's run by its id. Empty for a run that is older
    # than this record.
    start: dict

    @property
    def model(self) -> dict | None:
        """The start model, {"name", "sha256"}; with --lora-rank the base of the adapters."""
        return self.start.get("start model") or self.start.get("adapter base")

    @property
    def reference(self) -> dict | None:
        """The reference, {"name", "sha256"}; the start model where the objective had none."""
        return self.start.get("reference") or self.model

    def prompts(self) -> list[list[int]] | None:
        """Token ids of the distinct training prompts, sorted; None where they were not recorded beside this folder.

        Raises:
            CheckpointError: they were altered.
        """
        for place in (self.folder, *self.folder.parents[:2]):
            start = place if place.name == "start" else place / "start"
            if (start / "prompts.safetensors").is_file():
                store.verify(start)
                found = load_file(str(start / "prompts.safetensors"))
                prompts = [ids.tolist() for ids in found["ids"].split(found["lengths"].tolist())]
                return prompts if _counted(prompts, prompts) == self.start.get("training prompts") else None
        return None


def read_run(folder: str | Path) -> RunRecord | None:
    """What the run in a folder (or its `final`, or a checkpoint) was started from; None where it, or a hub name, is no run's.

    Raises:
        ValueError: its record cannot be read, or was written by a newer version.
    """
    for place in (Path(folder), Path(folder) / "final", Path(folder) / "start"):
        if (place / "training.json").is_file():
            settings, start = _read_training(place)
            try:
                return RunRecord(place.resolve(), TrainConfig(**settings), start or {})
            except ValueError as error:
                raise ValueError(f"{place / 'training.json'} holds settings that are none here: {error}") from error
    return None


def shared_prompts(training: Sequence[str], held_out: Sequence[str]) -> list[int]:
    """Which held-out prompts the training has seen: one of its prompts, a beginning (two characters or more) or a continuation.

    Example:
        >>> shared_prompts(["The film", "A"], ["The", "The film is", "The film", "Then", "T", "A plot"])
        [0, 1, 2]
    """
    known = sorted(training)
    every, lengths = set(known), {len(text) for text in known if len(text) > 1}

    def seen(text: str) -> bool:
        at = bisect.bisect_left(known, text)
        begins = len(text) > 1 and at < len(known) and known[at].startswith(text)
        return begins or text in every or any(text[:length] in every for length in lengths if length < len(text))

    return [i for i, text in enumerate(held_out) if seen(text)]


def origin(model) -> dict:
    """Where a model comes from: {"name": folder or hub name or None, "sha256": `models.fingerprint`}."""
    return {"name": _place(model.name_or_path), "sha256": fingerprint(model)}


def adapter_base(policy) -> dict:
    """Like `origin`, of what a model with adapters on it was without them; names in it depend on which layers are adapted."""
    kept = {name: p for name, p in policy.named_parameters() if not (p.requires_grad or ".default" in name)}
    return {"name": _place(policy.get_base_model().name_or_path), "sha256": fingerprint(kept)}


def checkpoints_in(folder: Path, *, resume: bool) -> list[Path]:
    """A run's checkpoints; RuntimeError where its folder holds one not to be resumed, or the model of one that cannot be."""
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    if checkpoints and not resume:
        raise RuntimeError(f"{folder} holds a run already; continue it with --resume or choose another --output-dir")
    if not checkpoints and (folder / "final").exists():
        raise RuntimeError(
            f"{folder / 'final'} is the model of a run whose checkpoints are gone, and would be replaced; move it "
            "away or choose another --output-dir"
        )
    return checkpoints


class Run(Progress):
    """A run that a folder keeps: checkpoints, metrics and what it was started from (no folder without `config.output_dir`)."""

    def __init__(self, config: TrainConfig, tokenizer, pairs, eval_pairs, accelerator) -> None:
        super().__init__(config, accelerator)
        self.tokenizer, self.pairs, self.eval_pairs = tokenizer, pairs, eval_pairs
        self.folder = Path(config.output_dir) if config.output_dir else None
        self.writes = self.folder is not None and accelerator.is_main_process
        self.start: dict = {}
        self._checkpoints: list[Path] = []
        self._saved = self._rows_before = 0  # step of the last checkpoint; rows before the last update
        self._told: set[tuple] = set()  # rows that the tracker knows from before
        self._prompts: list[bytes] = []  # until they are written
        self._left: dict | None = None  # state of the loop in the checkpoint that is gone on from
        self._whole = True  # weights, optimizer and step belong together
        self._terminated = False

    @contextmanager
    def owned(self, *, resume: bool) -> Iterator[None]:
        """Hold the folder; RuntimeError where another process does, or it holds a run and `resume` is False."""
        with store.exclusive(self.folder) if self.writes else nullcontext():
            self._checkpoints = checkpoints_in(self.folder, resume=resume) if self.folder else []
            yield

    def note(self, name: str, model) -> None:
        """Write down which reference or guide the run has; ValueError where the guide is the reference."""
        if self.folder is not None:
            self.start[name] = origin(model)
            if name == "guide" and self.start.get("reference", {}).get("sha256") == self.start[name]["sha256"]:
                raise ValueError(GUIDE_IS_REFERENCE)

    def take_up(self, policy) -> None:
        """Note what the run is started from, and give the policy the weights of the newest sound checkpoint, if it has any.

        Now, while they are whole. Raises RuntimeError, naming every difference, where it is another run's.
        """
        if self.folder is None:
            return
        self._prompts = _prompts(self.pairs)
        self.start |= _identity(policy, self.tokenizer, self.pairs, self.eval_pairs, self._prompts)
        config, processes = self.config, self.accelerator.num_processes
        self.start |= {"pairs per update": config.batch_size * config.accumulation * processes, "processes": processes}
        self.start |= {"precision": self.accelerator.mixed_precision}
        if source := OBJECTIVES[config.loss_type].source:
            self.start.setdefault("objective", {"name": config.loss_type, "sha256": source})
        if self._checkpoints:
            found = self._found()
            _load_weights(policy, found)
            self._left = store.load_state(found / "state")

    def begin(self, policy, optimizer, steps: int, per_update: int, *, shown: bool) -> None:
        """A clean start, or the state of the loop that `take_up` found."""
        if self._left is not None:
            self._continue(optimizer, self._left)
            self._left = None
        self._begin_tracker()
        if self.writes:
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
            store.write_file(self.folder / "metrics.jsonl", lines)
            store.write_atomically(self.folder / "start", self._write_start)
        self._prompts = []
        super().begin(policy, optimizer, steps, per_update, shown=shown)

    def _begin_tracker(self) -> None:
        """Begin a tracker's run, or go on with the one that is recorded; it is told what it has not been told yet."""
        if self.config.report_to is None:
            return
        record, metrics = f"{self.config.report_to} run", self.folder and self.folder / "metrics.jsonl"
        if record in self.start and metrics.exists():  # rows past the checkpoint come again, as they were
            for line in metrics.read_text().splitlines():
                with suppress(ValueError):  # a kill may have cut the last one
                    self._told.add(_moment(json.loads(line)))
        self.start.setdefault(record, uuid.uuid4().hex[:8])
        begin_tracker(self.accelerator, self.config, self.start[record])
        for row in self.rows:
            self._track(row)

    def _track(self, row: dict) -> None:
        if _moment(row) not in self._told:
            told = {name: value for name, value in row.items() if name != "step" and value is not None}
            self.accelerator.log(told, step=row["step"])

    def _found(self) -> Path:
        """The newest sound checkpoint of this very run; those after it are set aside."""
        found = store.newest(self.folder / "checkpoints", warn=partial(tell, file=sys.stderr))
        if found is None:
            raise RuntimeError(
                f"none of the {len(self._checkpoints)} checkpoints in {self.folder} is usable; remove the folder to start over"
            )
        settings, before = _read_training(found)
        if before is None:
            raise RuntimeError(
                f"{found} was written before runs recorded what they were started from (format 1, this is {FORMAT}): finish it "
                "with the version that began it, or start anew in another --output-dir, from its weights if you like "
                "(--model)"
            )
        # what was not given, or is newer than the run, had its default
        old, now = (c.to_dict() for c in (TrainConfig(**settings), self.config))
        ours = {"objective": {"name": f"the library's {self.config.loss_type}", "sha256": ""}}  # it is not recorded
        cut = CUT if before.get("processes", self.start["processes"]) != self.start["processes"] else set()
        changed = _differences(old, now, ASIDE | cut) + _differences(ours | before, ours | self.start, {"processes"})
        if changed:
            raise RuntimeError(
                f"cannot resume {self.folder}: {'; '.join(changed)}. Resume with what the run was started with, or choose "
                "another --output-dir to start anew"
            )
        self.start = before | self.start
        self.accelerator.wait_for_everyone()
        if self.writes:
            store.set_aside(self.folder / "checkpoints", found)
        return found

    def _continue(self, optimizer, state: dict) -> None:
        self.accelerator.load_state(optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self._saved = state["step"]
        self.step, self.rows, self.norm, self.pending = (state[name] for name in ("step", "rows", "norm", "pending"))
        self._rows_before = len(self.rows)
        device = self.accelerator.device  # of a run that was interrupted, the sums of its main process alone are known
        for sums in state["sums"][self.accelerator.process_index :: self.accelerator.num_processes]:
            on_device = {n: [v.to(device) if isinstance(v, torch.Tensor) else v for v in e] for n, e in sums.items()}
            self.sums.add(on_device)

    def log(self, row: dict) -> None:
        """Keep a metrics row, append it to metrics.jsonl, hand it to the tracker."""
        super().log(row)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self._track(row)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """While weights and step change: neither is saved without the other, and SIGTERM waits."""
        self._whole = False
        yield
        self._whole = True
        if self._terminated:
            raise Terminated

    def advance(self, norm: float, sums: Sums) -> None:
        """As for any Progress; rows that are made from here on belong to this update."""
        super().advance(norm, sums)
        self._rows_before = len(self.rows)

    def save(self, policy, optimizer) -> None:
        """Write the checkpoint of this step, unless weights are not finite, and let go of those before the last few."""
        if self.folder is None:
            return
        self.check_finite(policy)
        sums = gather_object([_on_cpu(self.sums)])
        policy, state = self.accelerator.whole(policy), self.accelerator.whole_state(optimizer)
        if self.writes:
            self._checkpoint(policy, state, sums)

    def finish(self, policy) -> None:
        """Write the trained model, unless its weights are not finite."""
        super().finish(policy)
        skipped = [row["step"] for row in self.rows if row.get("skipped")]
        if skipped and self.accelerator.is_main_process:
            told = (
                f"between the rows of steps {skipped[:8]} and those before them updates were skipped (metric skipped)"
            )
            print(f"fp16: {told}: their gradients overflowed, and the loss scale was halved", file=sys.stderr)
        policy = self.folder and self.accelerator.whole(policy)
        if self.writes:
            whole = adapters.whole(policy)
            self._write(self.folder / "final", whole, adapter=None if whole is policy else policy)

    @contextmanager
    def guarded(self, policy, optimizer) -> Iterator[None]:
        """Whatever ends the block early, an error, Ctrl-C or SIGTERM: what the last whole update left is saved first."""

        def terminate(number, frame) -> None:
            self._terminated = True
            if self._whole:
                raise Terminated

        try:
            with on_sigterm(terminate):
                try:
                    yield
                except BaseException:
                    self.bar.close()  # what is said from here on stands below it
                    self._rescue(policy, optimizer)
                    raise
        except BaseException:
            if self._terminated:
                signal.raise_signal(signal.SIGTERM)  # now to whom it was sent
            raise

    def _rescue(self, policy, optimizer) -> None:
        if not (self.writes and self._whole and self.step > self._saved):
            return
        if self.accelerator.sharded:  # who knows where the other processes are, which would have to bring theirs
            print(f"{self.folder}: updates after {self._saved} are lost, for weights are in shards", file=sys.stderr)
            return
        if not_finite(policy) is not None:
            return
        self._whole = False  # another SIGTERM waits
        if self.pending:
            del self.rows[self._rows_before :]  # they come again with what was broken off
        try:
            self._checkpoint(policy, optimizer.state_dict(), [_on_cpu(self.sums)])
            print(f"{self.folder}: saved after update {self.step}; continue with --resume", file=sys.stderr)
        except Exception as error:  # the one that ended the run is told
            print(f"{self.folder}: update {self.step} could not be saved ({error})", file=sys.stderr)

    def _checkpoint(self, policy, optimizer: dict, sums: list[dict]) -> None:
        scaler = self.accelerator.scaler
        state = {name: getattr(self, name) for name in ("step", "rows", "norm", "pending")} | {"sums": sums}
        state |= {"optimizer": optimizer, "rng": torch.get_rng_state()}
        state["scaler"] = scaler and scaler.state_dict()
        self._write(store.step_folder(self.folder / "checkpoints", self.step), policy, state)
        self._saved = self.step
        store.keep_last(self.folder / "checkpoints", self.config.keep)

    def _write(self, folder: Path, policy, state: dict | None = None, adapter=None) -> None:
        """A `from_pretrained` folder, atomically; with a state also what it takes to continue."""

        def write(target: Path) -> None:
            policy.save_pretrained(str(target))
            if adapter is not None:
                adapter.save_pretrained(str(target / ADAPTER))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(target))
            self._write_training(target)
            if state is not None:
                store.save_state(target / "state", state)

        store.write_atomically(folder, write)

    def _write_start(self, target: Path) -> None:
        self._write_training(target)
        ids = torch.from_numpy(np.frombuffer(b"".join(self._prompts), SORTED).astype(np.int32))
        lengths = torch.tensor([len(prompt) // SORTED.itemsize for prompt in self._prompts])
        save_file({"ids": ids, "lengths": lengths}, target / "prompts.safetensors")

    def _write_training(self, target: Path) -> None:
        content = {"format": FORMAT, **self.config.to_dict(), "start": self.start}
        (target / "training.json").write_text(json.dumps(content, indent=1))


def _moment(row: dict) -> tuple[int, bool]:
    """What tells a row from all others: its update, and whether it is of training or of held-out pairs."""
    return row["step"], "lr" in row


def _on_cpu(sums: Sums) -> dict[str, list]:
    return {name: [v.cpu() if isinstance(v, torch.Tensor) else v for v in entry] for name, entry in sums.totals.items()}


def _identity(
    policy, tokenizer, pairs: Sequence[EncodedPair], eval_pairs: Sequence[EncodedPair], prompts: list[bytes]
) -> dict:
    """All that a run is started from and that is known before the frozen models are loaded."""
    if hasattr(policy, "peft_config"):
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        found = {"adapter base": adapter_base(policy)}
        found["start adapter"] = {"name": None, "sha256": fingerprint(trained)}
    else:
        found = {"start model": origin(policy)}
    if tokenizer is not None:
        key = store.content_key([tokenizer_content(tokenizer), getattr(tokenizer, "chat_template", None)])
        found["tokenizer"] = {"name": _place(tokenizer.name_or_path), "sha256": key}
    found["training pairs"] = _counted(pairs, rows_of(pairs))
    found["training prompts"] = _counted(prompts, (np.frombuffer(prompt, SORTED).tolist() for prompt in prompts))
    found["held-out pairs"] = _counted(eval_pairs, rows_of(eval_pairs))
    return found


def _prompts(pairs: Sequence[EncodedPair]) -> list[bytes]:
    """The different prompts, sorted: as bytes, which take a tenth of the memory of ids and sort as they do."""
    return sorted(prompt.astype(SORTED).tobytes() for prompt in EncodedTable.of(pairs).distinct_prompts())


def _counted(many: Sized, rows: Iterable) -> dict:
    return {"count": len(many), "sha256": store.rows_key(rows)}


def _place(name: str | None) -> str | None:
    """A folder's whole path, so that it is found from elsewhere too; a hub name as it is."""
    if not name:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _read_training(folder: Path) -> tuple[dict, dict | None]:
    """Settings and start as a folder's training.json has them; the start is None in format 1."""
    path = folder / "training.json"
    try:
        content = json.loads(path.read_text())
        written, start = content.pop("format", 1), content.pop("start", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    content = {name: value for name, value in content.items() if name not in RETIRED}
    content |= content.pop("extra", {})  # where hyperparameters of one's own stood before
    mine = content.get("loss_type") not in OBJECTIVES  # an objective that is not loaded may take anything
    unknown = [] if mine else sorted(content.keys() - run_settings().keys() - known_hyperparameters().keys())
    if written > FORMAT or unknown:
        what = f"the settings {', '.join(unknown)}" if unknown else f"format {written}"
        raise ValueError(
            f"{path} was written by another version: it has {what}, which this one (format {FORMAT}) does not know"
        )
    return content, start


def _differences(before: dict, now: dict, aside: set[str] = frozenset()) -> list[str]:
    """What differs, in words; things with a digest are compared by it, so a folder may have moved."""

    def seen(value) -> tuple:
        """What is compared, and how it is told."""
        if not isinstance(value, dict) or "sha256" not in value:
            return value, repr(value)
        what = value["name"] or "one in memory" if "name" in value else value["count"]
        return value["sha256"], f"{what} (sha256 {value['sha256'][:12]})"

    both = {name: (seen(before[name]), seen(now[name])) for name in now if name in before and name not in aside}
    return [f"{name} was {old[1]}, is {new[1]}" for name, (old, new) in both.items() if old[0] != new[0]]


def _load_weights(policy, folder: Path) -> None:
    if hasattr(policy, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
        return
    saved = type(policy).from_pretrained(str(folder), dtype=policy.dtype, use_safetensors=True, trust_remote_code=False)
    policy.load_state_dict(saved.state_dict())
