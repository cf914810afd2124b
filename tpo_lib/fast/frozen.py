"""What a frozen model says about the pairs, computed once and kept on disk, so that training does without its body.

A reference or a guide says the same in every epoch: one number a token ("logps": DPO and TGDPO), or a distribution
("states": the KL of TDPO) as the hidden state before the head, d numbers instead of V. The head itself stays in memory.
Each different sequence is read and kept once. Values agree with the model's to the rounding that depends on what shares a batch:
1e-6 in float32, more in bf16 and fp16.

A cache is a folder named after all that its values depend on, written as a checkpoint is (complete or absent) and verified
before use; a damaged one is made anew. Every folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from tpo_lib import losses
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate, column
from tpo_lib.fast import tiles
from tpo_lib.fast.prefix import SharedReader
from tpo_lib.fast.table import EncodedTable, Sequences, rows_of
from tpo_lib.files.store import CheckpointError, found_or_made, rows_key, write_atomically
from tpo_lib.models import ResponseReader, fingerprint
from tpo_lib.types import Head, PairBatch, Reading

FORMAT = 3  # raise it whenever the same inputs would give other files
KINDS = {"logps": "log-probs", "states": "hidden states"}

Read = Callable[[PairBatch], Reading | Tensor]


@dataclass(frozen=True)
class FrozenCache:
    """Values of a frozen model at the response positions of pairs, memory-mapped."""

    values: (
        Tensor  # (tokens,) log-probabilities in nats, or (tokens, d) hidden states in the type the model gave them in
    )
    spans: Mapping[int, list[int]]  # row of a pair -> start, end of its chosen and of its rejected tokens in `values`
    head: Head | None  # for hidden states, what turns them into logits

    def read(self, batch: PairBatch) -> Reading | Tensor:
        """(R,) log-probabilities, or a Reading with (R, d) hidden states, in the order of `stats.response_mask`.

        Raises:
            ValueError: a row of the batch is not in the cache.
        """
        rows = batch.rows.tolist()
        if unknown := [row for row in rows if row not in self.spans]:
            raise ValueError(f"rows {unknown[:8]} are not in the cache, which was built for {len(self.spans)} others")
        spans = [self.spans[row] for row in rows]
        parts = [self.values[a:b] for a, b, _, _ in spans] + [self.values[a:b] for _, _, a, b in spans]
        values = torch.cat(parts).to(batch.labels.device)  # (R,) or (R, d)
        return values if self.head is None else Reading(values, self.head)


class Spans(Mapping[int, list[int]]):
    """(n,) rows and what each stands for, (n, 4): a dict in two arrays."""

    def __init__(self, rows: Tensor, spans: Tensor) -> None:
        self._rows, order = rows.sort()
        self._spans = spans[order]

    def __getitem__(self, row: int) -> list[int]:
        at = int(torch.searchsorted(self._rows, row))
        if at == len(self) or self._rows[at] != row:
            raise KeyError(row)
        return self._spans[at].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows.tolist())

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True)
class FrozenReader:
    """A reader of cached values: of the training pairs, and of the held-out ones as `held_out`; None says nothing."""

    training: Read | None
    held_out: Read | None

    def __call__(self, batch: PairBatch) -> Reading | Tensor | None:
        return self.training and self.training(batch)


def open_frozen(
    name: str,
    load: Callable[[], ResponseReader],
    config: TrainConfig,
    pairs: Sequence[EncodedPair],
    eval_pairs: Sequence[EncodedPair],
    *,
    folder: str | Path,
    accelerator,
    progress: bool,
) -> FrozenReader | None:
    """What a frozen model, "reference" or "guide", says of all pairs, from the caches in `folder`; None if nothing is needed.

    `load` gives its reader, on the device: the model is read where a cache is missing, and let go of. Raises as `build_or_open`.
    """
    needs = losses.OBJECTIVES[config.loss_type].needs
    if name == "guide":
        kinds = ("logps" if "guide_logps" in needs else None,) * 2
    else:  # kl/* of the held-out pairs are logged whatever is trained
        kinds = ("states" if "kl" in needs else "logps" if "ref_logps" in needs else None, "states")
    sets = list(zip((pairs, eval_pairs), kinds, (name, f"{name}-eval"), strict=True))
    if not any(rows and kind for rows, kind, _ in sets):
        return None
    reader, readers = load(), []
    identity = identify(reader, accelerator.mixed_precision)
    for rows, kind, label in sets:
        if not (rows and kind):
            readers.append(None)
        elif kind == "states" and not reader.understood:
            print(f"{label}: what follows its head is not understood; it stays in memory", file=sys.stderr)
            readers.append(reader)
        else:
            most = config.max_tokens or 2 * config.batch_size * int(column(rows, "length").max())
            settings = {"autocast": accelerator.autocast, "progress": progress, "max_tokens": most}
            cache = build_or_open(reader, identity, rows, kind=kind, folder=Path(folder), name=label, **settings)
            readers.append(cache.read)
    del reader
    gc.collect()  # modules may refer to each other in cycles: the next body is loaded only once this one is gone
    return FrozenReader(*readers)


def identify(reader: ResponseReader, precision: str) -> dict:
    """All that decides what a frozen model says, apart from the pairs: weights, architecture, reading, precision, libraries."""
    import transformers

    model = reader.model
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "weights": fingerprint(model),
        "architecture": [type(model).__name__, getattr(model.config, "_attn_implementation", None), config],
        "share_prefix": isinstance(reader, SharedReader),
        "precision": [precision, torch.get_float32_matmul_precision(), model.device.type],
        "libraries": [torch.__version__, transformers.__version__],
    }


def build_or_open(
    reader: ResponseReader,
    identity: dict,
    pairs: Sequence[EncodedPair],
    *,
    kind: str,
    folder: Path,
    name: str,
    max_tokens: int,
    autocast: Callable = contextlib.nullcontext,
    progress: bool = True,
) -> FrozenCache:
    """Open the cache of what a frozen model says about pairs; build it where it is missing or damaged.

    Args:
        reader: the model; `identity` is `identify` of it.
        pairs: their rows all different.
        kind: "logps" or "states" (the reader's head must be understood).
        folder: where caches live; this one is `<name>-<kind>-<first 16 digits of its key>`.
        max_tokens: of a forward pass while building, padding included; raised to what the longest pair takes.
        autocast: makes the context in which the model is read in training.

    Raises:
        ValueError: two pairs have the same row.
        OSError: the disk has no room for it; nothing is left behind then.
    """
    rows = column(pairs, "row")
    if len(np.unique(rows)) < len(rows):
        row, count = Counter(rows.tolist()).most_common(1)[0]
        raise ValueError(
            f"{name}: row {row} stands for {count} pairs, but a cache finds a pair by its row; number the pairs anew with "
            "dataclasses.replace(pair, row=i), or train without cache_dir"
        )
    # all token ids: data, tokenizer and truncation in one
    key = rows_key(rows_of(pairs), FORMAT, kind, identity)
    path = folder / f"{name}-{kind}-{key[:16]}"
    opened = partial(_open, key=key, head=reader.head if kind == "states" else None)
    read = partial(_values, reader, kind, autocast)

    def made() -> FrozenCache:
        write_atomically(path, lambda to: _build(read, pairs, key, path, max_tokens, progress, to))
        return opened(path)

    return found_or_made(path, opened, made)


def _open(path: Path, key: str, head: Head | None) -> FrozenCache:
    """Map the cache in a folder that verifies."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        dtype, count = getattr(torch, meta["dtype"]), torch.Size(meta["shape"]).numel()
        if meta["key"] != key or (path / "values.bin").stat().st_size != count * dtype.itemsize:
            raise ValueError("it holds other values than its name says")
        index = load_file(path / "index.safetensors")
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    values = torch.from_file(str(path / "values.bin"), shared=False, size=count, dtype=dtype).view(meta["shape"])
    return FrozenCache(values, Spans(index["rows"], index["spans"]), head)


def _values(reader: ResponseReader, kind: str, autocast: Callable, batch: PairBatch) -> Tensor:
    """(R,) log-probabilities or (R, d) hidden states, by the very computation that training makes without a cache."""
    batch = batch.to(reader.model.device)
    with torch.no_grad(), autocast():
        reading = reader(batch)
        if kind == "states":
            return reading.states
        exact = reading.states.to(torch.promote_types(reading.states.dtype, torch.float32))  # as the policy's are
        return tiles.response_logps(Reading(exact, reading.head), batch.labels)


def _build(
    read: Callable, pairs: Sequence[EncodedPair], key: str, path: Path, max_tokens: int, progress: bool, to: Path
):
    """Write values.bin, index.safetensors and meta.json into the folder `to`, which will become `path`."""
    sequences = Sequences.of(EncodedTable.of(pairs))
    first = read(collate([sequences[0]]))  # tells type and width before anything is written
    _announce(path, len(pairs), sequences, first)
    done, spans = 0, np.zeros((len(sequences), 2), np.int64)  # start and end of every sequence's tokens
    # Written, not mapped: of a full disk the one makes an error, the other a killed process.
    with (
        open(to / "values.bin", "wb") as file,
        tqdm(total=len(sequences), unit="sequence", disable=not progress) as bar,
    ):
        for chunk in sequences.chunks(max(max_tokens, int(sequences.lengths.max()))):
            batch = collate([sequences[i] for i in chunk.tolist()])
            file.write(read(batch).cpu().contiguous().view(torch.uint8).numpy())
            ends = done + sequences.responses[chunk].cumsum()
            spans[chunk] = np.stack([ends - sequences.responses[chunk], ends], 1)
            done = int(ends[-1])
            bar.update(len(chunk))
    both = np.where(sequences.places[..., None] < 0, 0, spans[sequences.places]).reshape(-1, 4)  # (n, 2, 2) -> (n, 4)
    index = {"rows": torch.from_numpy(column(pairs, "row").copy()), "spans": torch.from_numpy(both)}
    save_file(index, to / "index.safetensors")
    meta = {"key": key, "dtype": str(first.dtype).removeprefix("torch."), "shape": [done, *first.shape[1:]]}
    (to / "meta.json").write_text(json.dumps(meta))


def _announce(path: Path, pairs: int, sequences: Sequences, first: Tensor) -> None:
    """Say what will be cached, how large it gets and where; refuse where the disk has no room for it."""
    name, kind, _ = path.name.rsplit("-", 2)
    tokens = int(sequences.responses.sum())
    size = tokens * first[0].numel() * first.itemsize
    width = "".join(f" x {d}" for d in first.shape[1:])
    others = sum(other != path for other in path.parent.glob(f"{name}-{kind}-*"))
    note = f" ({others} beside it hold other weights, pairs, precisions or versions)" if others else ""
    print(
        f"{name} {KINDS[kind]}: {pairs:,} pairs, {tokens:,} tokens{width} x {first.itemsize} B = {size / 1e6:,.1f} MB "
        f"-> {path}{note}",
        file=sys.stderr,
    )
    if size > (free := shutil.disk_usage(path.parent).free):
        raise OSError(
            f"{path.parent} has {free / 1e6:,.1f} MB free, the cache takes {size / 1e6:,.1f} MB; free some, choose another "
            "--cache-dir, or train without one"
        )
