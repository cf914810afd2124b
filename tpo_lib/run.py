"""A run's folder: what the run was started from, its checkpoints, its metrics. `train.fit` owns one while it trains.

    RUN/start/         written before the first update: training.json, prompts.safetensors
    RUN/checkpoints/   step-00000100, ...: a model folder with training.json and the state of the loop
    RUN/final/         the trained model, with training.json
    RUN/metrics.jsonl  a row a line

training.json holds the settings and, under "start", fingerprints of the models, the tokenizer and the pairs. A run goes on
only with what it was started from; `read_run` tells the rest of the house what that was.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tpo_lib import adapters, checkpoint
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.models import fingerprint, tokenizer_content

FORMAT = 2  # of training.json and of the state beside it; 1 had settings alone and no number
FREE = {"output_dir", "report_to", "log_every", "save_every", "keep", "device", "cache_dir"}  # may change on a resume
ASIDE = FREE | {"precision"}  # what it comes to is recorded under "start": None means another one on another device


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says about the run.

    Attributes:
        folder: where its training.json was found.
        config: its settings.
        start: what it was started from, by name: "start model" (or "adapter base" and "start adapter"), "reference",
            "guide" and "tokenizer" as {"name": folder or hub name or None, "sha256": `origin`'s}; "training pairs",
            "held-out pairs", "training prompts" as {"count", "sha256"}. What a run did not have is not there. Empty for a
            run that is older than this record.
    """

    folder: Path
    config: TrainConfig
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
                checkpoint.verify(start)
                found = load_file(str(start / "prompts.safetensors"))
                prompts = [ids.tolist() for ids in found["ids"].split(found["lengths"].tolist())]
                return prompts if _counted(prompts) == self.start.get("training prompts") else None
        return None


def read_run(folder: str | Path) -> RunRecord | None:
    """What the run in a folder was started from; None where the folder (or hub name) is not a run's.

    Args:
        folder: a run's folder, its `final`, or one of its checkpoints.

    Raises:
        ValueError: its record cannot be read, or was written by a newer version.
    """
    for place in (Path(folder), Path(folder) / "final", Path(folder) / "start"):
        if (place / "training.json").is_file():
            settings, start = _read_training(place)
            return RunRecord(place.resolve(), TrainConfig(**settings), start or {})
    return None


def shared_prompts(training: Sequence[list[int]], held_out: Sequence[list[int]]) -> list[int]:
    """Which held-out prompts the training has seen: equal to one of its prompts, a beginning of one, or a continuation.

    A beginning of one token (BOS, say) is no prompt seen.

    Example:
        >>> shared_prompts([[0, 5, 6], [0, 7]], [[0, 5], [0, 7, 8], [0, 7], [0, 9], [0]])
        [0, 1, 2]
    """
    known = sorted(map(tuple, training))
    every = set(known)

    def seen(ids: tuple[int, ...]) -> bool:
        at = bisect.bisect_left(known, ids)
        begins = len(ids) > 1 and at < len(known) and known[at][: len(ids)] == ids
        return begins or ids in every or any(ids[:end] in every for end in range(2, len(ids)))

    return [i for i, ids in enumerate(held_out) if seen(tuple(ids))]


def origin(model) -> dict:
    """Where a model comes from: {"name": folder or hub name or None, "sha256": `models.fingerprint`}."""
    return {"name": _place(model.config._name_or_path), "sha256": fingerprint(model)}


class Run:
    """The folder of a run under way, or nothing where `config.output_dir` is None: identity, checkpoints, metrics.

    Attributes:
        step: updates made.
        rows: metrics rows so far.
    """

    def __init__(self, config: TrainConfig, tokenizer, accelerator) -> None:
        self.config, self.tokenizer, self.accelerator = config, tokenizer, accelerator
        self.folder = Path(config.output_dir) if config.output_dir else None
        self.writes = self.folder is not None and accelerator.is_main_process
        self.start: dict = {}
        self.step, self.rows = 0, []

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the folder; a second run into it is refused."""
        with checkpoint.exclusive(self.folder) if self.writes else nullcontext():
            yield

    def begin(self, policy, optimizer, frozen: dict, pairs, eval_pairs, per_update: int, *, resume: bool) -> None:
        """A clean start, or (`resume`) the newest sound checkpoint: weights, optimizer, step and rows.

        Args:
            frozen: {"reference" | "guide": a model, a function that loads one, or None}.
            per_update: pairs of one update.

        Raises:
            RuntimeError: the folder holds another run, or one that is not to be continued; every difference is named.
        """
        if self.folder is None:
            return
        if self.config.report_to:
            plain = {
                name: value for name, value in self.config.to_dict().items() if isinstance(value, int | float | str)
            }
            self.accelerator.init_trackers("tensorboard", config=plain)
        checkpoints = sorted(self.folder.glob("checkpoints/step-*"))
        if checkpoints and not resume:
            raise RuntimeError(
                f"{self.folder} holds a run already; continue it with --resume or choose another --output-dir"
            )
        if not checkpoints and (self.folder / "final").exists():
            raise RuntimeError(
                f"{self.folder / 'final'} is the model of a run whose checkpoints are gone, and would be replaced; move it "
                "away or choose another --output-dir"
            )
        self.start = _identity(policy, self.tokenizer, pairs, eval_pairs)
        self.start |= {"pairs per update": per_update, "precision": self.accelerator.mixed_precision}
        if checkpoints:
            self._continue(policy, optimizer, frozen, checkpoints)
        elif self.writes:
            checkpoint.write_file(self.folder / "metrics.jsonl", "")

    def _continue(self, policy, optimizer, frozen: dict, checkpoints: list[Path]) -> None:
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is None:
            raise RuntimeError(
                f"none of the {len(checkpoints)} checkpoints in {self.folder} is usable; remove the folder to start over"
            )
        settings, before = _read_training(found)
        if before is None:
            raise RuntimeError(
                f"{found} was written before runs recorded what they were started from (format 1, this is {FORMAT}): finish it "
                "with the version that began it, or start anew in another --output-dir, from its weights if you like "
                "(--model)"
            )
        for name, model in frozen.items():
            if name in before and model is not None:
                self.start[name] = origin(_loaded(model))
        # what was not given, or is newer than the run, had its default
        old, now = (c.to_dict() for c in (TrainConfig(**settings), self.config))
        changed = _differences(old, now, ASIDE) + _differences(before, self.start)
        if changed:
            raise RuntimeError(
                f"cannot resume {self.folder}: {'; '.join(changed)}. Resume with what the run was started with, or choose "
                "another --output-dir to start anew"
            )
        _load_weights(policy, found)
        state = checkpoint.load_state(found / "state")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.start, self.step, self.rows = before | self.start, state["step"], state["rows"]
        self.accelerator.wait_for_everyone()
        if self.writes:
            checkpoint.set_aside(self.folder / "checkpoints", found)
            rows = "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
            checkpoint.write_file(self.folder / "metrics.jsonl", rows)

    def noting(self, name: str, model):
        """A frozen model as a function that loads it and writes down what it was; None stays None."""
        if model is None or self.folder is None:
            return model

        def load():
            loaded = _loaded(model)
            self.start[name] = origin(loaded)
            return loaded

        return load

    def record(self, pairs: Sequence[EncodedPair]) -> None:
        """Write down what the run was started from, once all of it is known."""
        if not self.writes:
            return
        prompts = _prompts(pairs)

        def write(target: Path) -> None:
            self._write_training(target)
            ids = torch.tensor([i for prompt in prompts for i in prompt], dtype=torch.int32)
            save_file({"ids": ids, "lengths": torch.tensor([len(p) for p in prompts])}, target / "prompts.safetensors")

        checkpoint.write_atomically(self.folder / "start", write)

    def log(self, row: dict) -> None:
        """Keep a metrics row, append it to metrics.jsonl, hand it to the tracker."""
        self.rows.append(row)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def save(self, policy, optimizer) -> None:
        """Write the checkpoint of this step and let go of those before the last `config.keep`."""
        if not self.writes:
            return
        state = {
            "step": self.step,
            "rows": self.rows,
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        self._write(checkpoint.step_folder(self.folder / "checkpoints", self.step), policy, state)
        checkpoint.keep_last(self.folder / "checkpoints", self.config.keep)

    def finish(self, policy) -> None:
        """Write the trained model."""
        if self.writes:
            self._write(self.folder / "final", adapters.whole(policy))

    def _write(self, folder: Path, policy, state: dict | None = None) -> None:
        """A `from_pretrained` folder, atomically; with a state also what it takes to continue."""

        def write(target: Path) -> None:
            policy.save_pretrained(str(target))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(str(target))
            self._write_training(target)
            if state is not None:
                checkpoint.save_state(target / "state", state)

        checkpoint.write_atomically(folder, write)

    def _write_training(self, target: Path) -> None:
        content = {"format": FORMAT, **self.config.to_dict(), "start": self.start}
        (target / "training.json").write_text(json.dumps(content, indent=1))


def _identity(policy, tokenizer, pairs: Sequence[EncodedPair], eval_pairs: Sequence[EncodedPair] | None) -> dict:
    """All that a run is started from and that is known before the frozen models are loaded."""
    if hasattr(policy, "peft_config"):
        weights = dict(policy.named_parameters())
        name = _place(policy.get_base_model().config._name_or_path)
        base = {name: p for name, p in weights.items() if not p.requires_grad}
        adapter = {name: p for name, p in weights.items() if p.requires_grad}
        found = {"adapter base": {"name": name, "sha256": fingerprint(base)}}
        found["start adapter"] = {"name": None, "sha256": fingerprint(adapter)}
    else:
        found = {"start model": origin(policy)}
    if tokenizer is not None:
        name = _place(tokenizer.name_or_path)
        found["tokenizer"] = {
            "name": name,
            "sha256": _digest([tokenizer_content(tokenizer), getattr(tokenizer, "chat_template", None)]),
        }
    found["training pairs"] = _counted([astuple(pair) for pair in pairs])
    found["training prompts"] = _counted(_prompts(pairs))
    found["held-out pairs"] = _counted([astuple(pair) for pair in eval_pairs or ()])
    return found


def _prompts(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    return sorted(map(list, {tuple(pair.prompt_ids) for pair in pairs}))


def _counted(rows: Sequence) -> dict:
    return {"count": len(rows), "sha256": _digest(rows)}


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _place(name: str | None) -> str | None:
    """A folder's whole path, so that it is found from elsewhere too; a hub name as it is."""
    if not name:
        return None
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _loaded(model: torch.nn.Module | Callable) -> torch.nn.Module:
    return model if isinstance(model, torch.nn.Module) else model()


def _read_training(folder: Path) -> tuple[dict, dict | None]:
    """Settings and start as a folder's training.json has them; the start is None in format 1."""
    path = folder / "training.json"
    try:
        content = json.loads(path.read_text())
        written, start = content.pop("format", 1), content.pop("start", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    unknown = sorted(content.keys() - {field.name for field in fields(TrainConfig)})
    if written > FORMAT or unknown:
        what = f"the settings {', '.join(unknown)}" if unknown else f"format {written}"
        raise ValueError(
            f"{path} was written by another version: it has {what}, which this one (format {FORMAT}) does not know"
        )
    return content, start


def _differences(before: dict, now: dict, aside: set[str] = frozenset()) -> list[str]:
    """What differs, in words; things with a digest are compared by it, so a folder may have moved."""

    def digested(value) -> bool:
        return isinstance(value, dict) and "sha256" in value

    def told(value) -> str:
        if not digested(value):
            return repr(value)
        what = value["name"] or "one in memory" if "name" in value else value["count"]
        return f"{what} (sha256 {value['sha256'][:12]})"

    def identity(value):
        return value["sha256"] if digested(value) else value

    return [
        f"{name} was {told(before[name])}, is {told(now[name])}"
        for name in now
        if name not in aside and name in before and identity(before[name]) != identity(now[name])
    ]


def _load_weights(policy, folder: Path) -> None:
    if hasattr(policy, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy, load_peft_weights(str(folder), device="cpu"))
        return
    saved = type(policy).from_pretrained(str(folder), dtype=policy.dtype, use_safetensors=True, trust_remote_code=False)
    policy.load_state_dict(saved.state_dict())
