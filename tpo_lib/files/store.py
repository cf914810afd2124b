"""Files and checkpoints that survive anything: atomic, verified, and free of pickle.

A checkpoint is a folder of safetensors and JSON files plus `MANIFEST.json`, the SHA-256 of every other file. It is written
beside its place, flushed to disk and renamed, so a folder with its final name is complete; one that was altered afterwards
is told by the digests, and the one before it is used instead.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MANIFEST = "MANIFEST.json"
PREFIX = "step-"
DIGEST = "sha256"
STATE = 2  # format of state.json; 1 had no number
WRITTEN = {"run": ("checkpoints", "final", "metrics.jsonl", "start")}  # other kinds of work have a folder to themselves
DOCUMENTS = (".md", ".png")
LEFT_OVER = re.compile(r"\..+\.(lock|unfinished|replaced|\d+(\.\w+)?)")  # what a kill leaves, and locks


class CheckpointError(RuntimeError):
    """A checkpoint folder is incomplete or was altered; the message names the folder and the file."""


# ---- files


def cache_folder() -> Path:
    """Where downloads and what took long are kept for the next time: TPO_CACHE, by default ~/.cache/tpo_lib."""
    return Path(os.environ.get("TPO_CACHE", Path.home() / ".cache" / "tpo_lib"))


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_key(value: Any) -> str:
    """The SHA-256 of a value as JSON, 64 digits: what a cache entry or a record of some content is named by.

    Example:
        >>> content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def rows_key(rows: Iterable, *head: Any) -> str:
    """The `content_key` of the list of all rows, or of [*head, that list], of which there are few in memory at a time.

    Example:
        >>> rows_key(range(5000)) == content_key([*range(5000)]), rows_key([7], "a", 1) == content_key(["a", 1, [7]])
        (True, True)
    """
    before = json.dumps(head, sort_keys=True, default=str)[:-1] + ", [" if head else "["
    digest, rows = hashlib.sha256(before.encode()), iter(rows)
    comma = ""
    while chunk := list(itertools.islice(rows, 1000)):
        digest.update((comma + json.dumps(chunk, sort_keys=True, default=str)[1:-1]).encode())
        comma = ", "
    digest.update(b"]]" if head else b"]")
    return digest.hexdigest()


def write_file(path: str | Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file that is complete or not there, and the folders above it.

    Args:
        content: text (UTF-8), bytes, or a function that writes the file it is given, whose suffix is that of `path`.

    Raises:
        OSError: it cannot be written, the disk is full, or `path` is something else than a file; what was there remains.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise FileExistsError(f"{path} is no file that may be replaced; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # two processes never share it
    try:
        if callable(content):
            content(unfinished)
        else:
            unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        _fsync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_json(path: str | Path, content: dict, *, indent: int | None = None) -> None:
    """Write a JSON object that will be read back: `read_json` checks the digest that stands in it as "sha256"."""
    write_file(path, json.dumps(content | {DIGEST: _digest(content)}, indent=indent) + "\n")


def read_json(path: str | Path, fix: str) -> dict:
    """Read what `write_json` wrote; CheckpointError, which ends with `fix`, where it was altered."""
    try:
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if content.pop(DIGEST, None) not in (None, _digest(content)):  # earlier versions wrote none
            raise ValueError("it is not what was written: the digest differs")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); {fix}") from error
    return content


def rounded(value: Any, digits: int) -> Any:
    """The same nest of dicts and lists with every float cut to so many significant digits, for files that are kept small."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list) else value


def settle(path: Path, facts: dict, fix: str) -> None:
    """Add to a JSON file what the work in its folder was begun with; RuntimeError where it would go on with something else."""
    known, facts = read_json(path, fix) if path.exists() else {}, json.loads(json.dumps(facts))
    changed = [name for name, value in facts.items() if known.get(name, value) != value]
    if changed:
        raise RuntimeError(f"{path.parent} was begun with another {' and another '.join(changed)}; {fix}")
    write_json(path, known | facts)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()  # in the order of the file


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- folders with a manifest


def write_atomically(final: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder through `write(folder)` and give it its final name only once every byte is on disk.

    If anything raises (a full disk, an interrupt, `prove` where `final` is not ours), `final` is left as it was.
    """
    prove(final)
    unfinished, replaced = (final.with_name(f".{final.name}.{word}") for word in ("unfinished", "replaced"))
    shutil.rmtree(unfinished, ignore_errors=True)  # left over from a kill
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        write_manifest(unfinished)
        for path in [*unfinished.rglob("*"), unfinished]:
            _fsync(path)
        shutil.rmtree(replaced, ignore_errors=True)  # of a kill too, and no sooner: it may be the only whole one
        if final.exists():
            os.rename(final, replaced)
        os.rename(unfinished, final)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # only now that the new one stands in its place


def write_manifest(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder` into its MANIFEST.json."""
    manifest = {name: sha256_file(folder / name) for name in sorted(_names(folder) - {MANIFEST})}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _names(folder: Path) -> set[str]:
    """All files and links below `folder`, by their path from there."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}


def _manifest(folder: Path) -> dict[str, str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict) or not manifest:
            raise ValueError("it lists no files")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error}); the checkpoint is not usable") from error
    return manifest


def verify(folder: Path, *, digest: Callable[[Path], str] = sha256_file) -> None:
    """Raise CheckpointError unless every listed file of `folder`, but for documents, has the digest its manifest promises."""
    for name, promised in _manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; the checkpoint is not usable")
        if path.suffix not in DOCUMENTS and digest(path) != promised:
            raise CheckpointError(f"{folder}: {name} was truncated or altered; the checkpoint is not usable")


def verify_loaded(folder: Path) -> None:
    """`verify` of a folder that is about to be loaded: once per file and content, and only if the manifest is ours."""
    if not (folder / MANIFEST).exists():
        return
    try:
        if all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in _manifest(folder).values()):
            verify(folder, digest=_known_digest)
    except CheckpointError as error:
        fix = f"restore it, or, if the change is yours, remove {folder / MANIFEST}, and it loads unchecked"
        raise CheckpointError(f"{error}; {fix}") from None


def _known_digest(path: Path) -> str:
    stat = path.stat()
    return _digest_once(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


_digest_once = functools.cache(lambda path, *content: sha256_file(path))


# ---- what may be replaced


def prove(folder: Path) -> None:
    """Raise FileExistsError unless `folder` may be replaced: nothing is in it but what its manifest lists, as written."""
    if not os.path.lexists(folder) or re.search(r"(^|-)[0-9a-f]{16,64}$", folder.name):  # a cache's: ours by its name
        return
    if folder.is_symlink() or not folder.is_dir():
        reason = "it is not a folder"
    elif not os.listdir(folder):
        return
    elif not (reason := _foreign(folder)):
        altered = (name for name, promised in _manifest(folder).items() if sha256_file(folder / name) != promised)
        reason = next((f"{name} was altered" for name in altered), None)
    if reason:
        raise FileExistsError(f"{folder} would be replaced, but is not what was written there ({reason}); move it away")


def _foreign(folder: Path) -> str | None:
    """What in `folder` does not agree with its manifest, by names alone; None if all does."""
    try:
        listed = {MANIFEST, *_manifest(folder)}
    except CheckpointError:
        return f"no readable {MANIFEST}"
    found = _names(folder)
    return next((f"{name} is missing" if name in listed else f"{name} is not in it" for name in listed ^ found), None)


def mark(kind: str) -> str:
    """Name of the file that says that a folder is ours, and from which kind of work; it is the work's lock too."""
    return f".tpo_lib.{kind}.lock"


def check_mark(folder: Path, kind: str) -> None:
    """Raise FileExistsError where something that `kind` of work would replace is in a folder without its mark."""
    ours = folder / mark(kind)
    for name in () if ours.is_file() else WRITTEN.get(kind) or os.listdir(folder):
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"{folder / name} was there before, and {ours} is not, which would say that it is of a {kind} of ours: move it "
                "away or choose another folder (to go on with one of an earlier version, make that file)"
            )


def clear(folder: Path, known: re.Pattern) -> None:
    """Empty a folder of ours, but for its mark: of files whose names match `known` or that stand in a manifest.

    Raises:
        FileExistsError: there is something else; it is named, and nothing was removed.
    """
    listed = set()
    for manifest in folder.rglob(MANIFEST):
        with contextlib.suppress(CheckpointError):
            listed |= {manifest, *(manifest.parent / name for name in _manifest(manifest.parent))}
    for path in sorted(folder / name for name in _names(folder)):
        left_over = any(map(LEFT_OVER.fullmatch, path.relative_to(folder).parts))
        if path.is_symlink() or not (path in listed or left_over or known.fullmatch(path.name)):
            raise FileExistsError(f"{path} is not ours, and nothing was removed; move it out of {folder} first")
    for path in sorted(folder.iterdir(), key=lambda path: path.is_file()):  # single files last: they say what it was
        if path.suffix != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- checkpoints


def newest(folder: Path, *, warn: Callable[[str], None] = lambda words: print(words, file=sys.stderr)) -> Path | None:
    """The newest checkpoint below `folder` that verifies, telling of every one that had to be passed over; or None."""
    for candidate in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            verify(candidate)
        except CheckpointError as error:
            warn(f"{error}; looking for the one before it")
        else:
            return candidate
    return None


def keep_last(folder: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints below `folder`; count is at least 1."""
    if count < 1:
        raise ValueError(f"keep_last={count} would leave no checkpoint to resume from; keep at least 1")
    # what is not ours, or has files beside ours in it, is neither removed nor counted
    ours = [path for path in sorted(folder.glob(f"{PREFIX}*")) if not path.is_symlink() and not _foreign(path)]
    for old in ours[:-count]:
        shutil.rmtree(old)


def set_aside(folder: Path, found: Path | None) -> None:
    """Rename the checkpoints below `folder` that come after `found` (None: all), which `newest` could not use."""
    # else a run that goes on from `found` would count them among its last ones, and remove its own
    for damaged in sorted(folder.glob(f"{PREFIX}*")):
        if found is None or damaged.name > found.name:
            damaged.rename(folder / f"damaged-{damaged.name}-{time.time_ns()}")


def step_folder(folder: Path, step: int) -> Path:
    """Name of the checkpoint of `step` (zero-padded, so that names sort as numbers)."""
    return folder / f"{PREFIX}{step:08d}"


def save_state(path: Path, state: dict) -> None:
    """Write a nested dict of tensors and JSON values as `path`.safetensors and `path`.json, without pickle."""
    tensors: dict[str, torch.Tensor] = {}

    def strip(value):
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"__tensor__": name}
        if isinstance(value, dict):
            return {"__dict__": [[key, strip(item)] for key, item in value.items()]}  # keeps integer keys integers
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    tree = strip(state)
    save_file(tensors, str(path.with_suffix(".safetensors")))
    path.with_suffix(".json").write_text(json.dumps({"format": STATE, "tree": tree}))


def load_state(path: Path) -> dict:
    """Read what `save_state` wrote; CheckpointError where another version wrote it."""
    content = json.loads(path.with_suffix(".json").read_text())
    if content.get("format", 1) != STATE or content.keys() != {"format", "tree"}:
        raise CheckpointError(
            f"{path}.json has format {content.get('format', 1)}, this version reads {STATE}: go on with the version that wrote "
            "it, or start anew in another folder"
        )
    tensors = load_file(str(path.with_suffix(".safetensors")))

    def fill(value):
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {key: fill(item) for key, item in value["__dict__"]}
        return [fill(item) for item in value] if isinstance(value, list) else value

    return fill(content["tree"])


# ---- locks, and what is built once


@contextlib.contextmanager
def _locked(path: Path, busy: Callable[[Any], None]) -> Iterator[Any]:
    """Hold the lock of a file, which dies with the process; where another one has it, `busy(file)` says what then."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy(file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def alone(path: Path) -> contextlib.AbstractContextManager:
    """Build the file or folder `path` alone: other processes wait here, and then find it built."""
    words = f"another process is at work on {path}; waiting for it"
    return _locked(path.with_name(f".{path.name}.lock"), lambda _: print(words, file=sys.stderr))


@contextlib.contextmanager
def exclusive(folder: Path, kind: str = "run") -> Iterator[None]:
    """Hold `folder` for this process and kind of work alone; the lock's file stays, the mark of a folder of ours.

    Raises:
        FileExistsError: something that would be replaced is there, and not from such work; nothing was changed.
        RuntimeError: another process holds the folder.
    """

    def busy(lock) -> None:
        lock.seek(0)
        owner = f"another run (process {lock.read().strip() or 'unknown'})"
        raise RuntimeError(
            f"{folder} is in use by {owner}; choose another --output-dir or wait for it to end"
        ) from None

    folder.mkdir(parents=True, exist_ok=True)
    check_mark(folder, kind)
    with _locked(folder / mark(kind), busy) as lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _fsync(folder)
        prove(folder / "final")  # now, not when the work is done
        yield


def found_or_made(folder: Path, read: Callable[[Path], Any], make: Callable[[], Any]) -> Any:
    """What `read` finds in a folder that verifies, else what `make` makes, which writes the folder; others wait meanwhile."""
    unusable = (
        CheckpointError,
        OSError,
        ValueError,
        TypeError,
    )  # what `read` raises where it finds something else; it is told

    def found() -> Any:
        verify(folder)
        return read(folder)

    with contextlib.suppress(*unusable):
        return found()
    with alone(folder):
        try:
            return found()  # another process may have made it by now
        except unusable as error:
            if folder.exists():
                print(f"{folder} cannot be used and is built anew: {error}", file=sys.stderr)
        return make()


def cached(
    folder: str | Path | None,
    key: str,
    read: Callable[[Path], Any],
    make: Callable[[], Any],
    write: Callable[[Any, Path], None],
) -> Any:
    """`found_or_made` of the entry `key` in the folder of a cache, kept by `write(made, entry)`; without a folder, made.

    The key ends with the digits of a `content_key` of all that decides the entry.
    """

    def made() -> Any:
        found = make()
        try:
            write_atomically(entry, functools.partial(write, found))
        except OSError as error:  # a full disk shall not cost what was made
            print(f"not cached: {error}", file=sys.stderr)
        return found

    if folder is None:
        return make()
    entry = Path(folder) / key
    return found_or_made(entry, read, made)
