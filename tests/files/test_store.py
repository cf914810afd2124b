"""store.py under exceptions, kills at every step, altered bytes, a second run, and optimizer states."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from tpo_data.progress import load_progress, save_progress
from tpo_lib.files import store
from tpo_lib.files.store import (
    MANIFEST,
    CheckpointError,
    alone,
    exclusive,
    keep_last,
    load_state,
    newest,
    read_json,
    save_state,
    sha256_file,
    step_folder,
    verify,
    write_atomically,
    write_file,
    write_json,
)


def writer(text: str):
    """A `write` that fills a folder with two files, one of them in a subfolder."""

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_text(text * 1000)
        (folder / "state").mkdir()
        (folder / "state" / "rng.json").write_text(text)

    return write


def save(root: Path, step: int, text: str | None = None) -> Path:
    folder = step_folder(root, step)
    write_atomically(folder, writer(text or f"step {step};"))
    return folder


def content(folder: Path) -> str:
    return (folder / "state" / "rng.json").read_text()


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# Writing ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_complete_and_lists_the_digest_of_every_file(tmp_path):
    folder = save(tmp_path / "run", 7)
    assert folder.name == "step-00000007"
    assert names(tmp_path / "run") == ["step-00000007"]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == {name: sha256_file(folder / name) for name in ("state/rng.json", "weights.bin")}
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2's own example
    verify(folder)


def fail_at(stage: str, error: BaseException, monkeypatch) -> None:
    """Make one stage of write_atomically raise; `stage` is the call that fails."""

    def failing(*args, **kwargs):
        raise error

    if stage == "manifest":
        monkeypatch.setattr(Path, "write_text", failing)
    elif stage != "write":
        monkeypatch.setattr(os, stage, failing)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
@pytest.mark.parametrize("stage", ["write", "manifest", "fsync", "rename"])
@pytest.mark.parametrize("step", [1, 2], ids=["over_itself", "new"])
def test_a_failure_leaves_the_previous_checkpoint_and_no_debris(tmp_path, monkeypatch, stage, error, step):
    save(tmp_path, 1, "good")

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half of it")
        if stage == "write":
            raise error

    with monkeypatch.context() as patch:
        fail_at(stage, error, patch)
        with pytest.raises(type(error)):
            write_atomically(step_folder(tmp_path, step), write)
    assert names(tmp_path) == ["step-00000001"]
    assert newest(tmp_path, warn=pytest.fail) == step_folder(tmp_path, 1)
    assert content(step_folder(tmp_path, 1)) == "good"
    assert content(save(tmp_path, step, "after")) == "after", "space is back: the next one can be written"


def test_the_last_rename_fails_when_the_old_one_is_already_aside(tmp_path, monkeypatch):
    save(tmp_path, 1, "good")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 1, "new")
    assert len(calls) == 3, "aside, into place (fails), back"
    assert names(tmp_path) == ["step-00000001"]
    assert content(step_folder(tmp_path, 1)) == "good"


def killed_at_call(k: int, action) -> bool:
    """Run `action` in a child that SIGKILLs itself at its k-th call to the file system; True if it got that far."""
    child = os.fork()
    if child == 0:  # must never return into pytest
        count = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        try:
            for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, dying(getattr(os, name)))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("step", [2, 3], ids=["over_itself", "new"])
def test_killed_at_any_call_the_newest_checkpoint_is_a_whole_one(tmp_path, step):
    """Whatever the kill leaves, the newest verifies, is an old or the new one, and the next write succeeds."""
    seen, k, killed = [], 0, True
    while killed:
        k += 1
        root = tmp_path / str(k)
        save(root, 1, "first")
        save(root, 2, "second")
        killed = killed_at_call(k, lambda root=root: save(root, step, "third"))
        seen.append(content(newest(root, warn=pytest.fail)))
        assert content(save(root, step, "fourth")) == "fourth"
        assert names(root) == [f"step-0000000{number}" for number in range(1, step + 1)]
    assert seen[0] == "second"
    assert seen[-1] == "third"
    assert set(seen) <= {"first", "second", "third"}
    assert seen.count("first") <= 1, "only between the two renames of a folder written over itself"
    assert k > 8


def test_every_byte_is_on_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    """Order of events: fsync of each file and folder, rename, fsync of the parent that holds the new name."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b))[1])
    folder = save(tmp_path, 1)
    written = {path.stat().st_ino for path in [folder, *folder.rglob("*")]}
    cut = events.index("rename")
    assert set(events[:cut]) == written
    assert events[cut + 1 :] == [tmp_path.stat().st_ino]


# Single files -------------------------------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch, stage):
    write_file(tmp_path / "a.txt", "good")

    def failing(*args):
        raise FULL

    def half(path: Path) -> None:
        path.write_text("half of")
        if stage == "write":
            raise FULL

    with monkeypatch.context() as patch:
        if stage != "write":
            patch.setattr(os, stage, failing)
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "a.txt", half)
    assert (tmp_path / "a.txt").read_text() == "good"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_is_on_disk_before_its_name_and_the_name_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    write_file(tmp_path / "new" / "a.txt", b"bytes")
    assert events == [(tmp_path / "new" / "a.txt").stat().st_ino, "replace", (tmp_path / "new").stat().st_ino]


def test_a_link_stays_a_link_and_what_is_no_file_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("old")
    (tmp_path / "a.txt").symlink_to(tmp_path / "far" / "a.txt")
    write_file(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "far" / "a.txt").read_text() == "new"
    with pytest.raises(FileExistsError, match="far is no file that may be replaced"):
        write_file(tmp_path / "far", "new")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no file"):
        write_file(tmp_path / "pipe", "new")


def test_json_comes_back_and_damage_is_named_with_its_fix(tmp_path):
    path = tmp_path / "a.json"
    content = {"mean": 0.1 + 0.2, "nested": {"é": [1, None, math.inf]}, "step": 7}
    for indent in (None, 1):
        write_json(path, content, indent=indent)
        assert read_json(path, "no") == content
    whole = path.read_bytes()
    for damaged in (
        whole.replace(b"7", b"8"),
        whole.replace(b"step", b"stop"),
        whole[:-9],
        b"",
        b"[1]",
        b"\xff\xfe\x00",
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.json is damaged \(.*\); make it anew"):
            read_json(path, "make it anew")
    path.write_bytes(b'{"step": 7}')  # of an earlier version
    assert read_json(path, "no") == {"step": 7}


def test_one_builds_while_the_other_waits_and_says_so(tmp_path):
    program = f"""
        from pathlib import Path
        from tpo_lib.files.store import alone
        with alone(Path({str(tmp_path / "entry")!r})):
            print(Path({str(tmp_path / "entry")!r}).read_text())
    """
    with alone(tmp_path / "entry"):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert "waiting for it" in child.stderr.readline()
        (tmp_path / "entry").write_text("built")
    assert child.communicate()[0] == "built\n"


# Reading ------------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[: len(data) // 2])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "weights.bin").write_bytes(bytes(data))


DAMAGE = {
    "truncated": (truncate, "weights.bin was truncated or altered"),
    "altered": (flip_a_bit, "weights.bin was truncated or altered"),
    "missing": (lambda folder: (folder / "state" / "rng.json").unlink(), "state/rng.json is missing"),
    "emptied": (lambda folder: shutil.rmtree(folder / "state"), "state/rng.json is missing"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"no readable {MANIFEST}"),
    "half a manifest": (
        lambda folder: (folder / MANIFEST).write_text('{"weights.bin": "ab'),
        f"no readable {MANIFEST}",
    ),
    "zeroed manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\0" * 99), f"no readable {MANIFEST}"),
    "binary manifest": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), f"no readable {MANIFEST}"),
    "manifest of nothing": (lambda folder: (folder / MANIFEST).write_text("{}"), "lists no files"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1]"), "lists no files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_detected_and_the_one_before_is_used_saying_so(tmp_path, damage):
    for step in (9, 10, 11):
        save(tmp_path, step)
    harm, message = DAMAGE[damage]
    harm(step_folder(tmp_path, 11))
    with pytest.raises(CheckpointError, match="not usable") as caught:
        verify(step_folder(tmp_path, 11))
    assert message in str(caught.value)
    assert str(step_folder(tmp_path, 11)) in str(caught.value)
    said: list[str] = []
    assert newest(tmp_path, warn=said.append) == step_folder(tmp_path, 10)
    assert said == [f"{caught.value}; looking for the one before it"]
    flip_a_bit(step_folder(tmp_path, 10))
    assert newest(tmp_path, warn=said.append) == step_folder(tmp_path, 9)
    truncate(step_folder(tmp_path, 9))
    assert newest(tmp_path, warn=said.append) is None


def test_it_says_so_on_the_terminal_unless_told_otherwise(tmp_path, capsys):
    truncate(save(tmp_path, 1))
    assert newest(tmp_path) is None
    assert "step-00000001: weights.bin was truncated or altered" in capsys.readouterr().err  # results go to stdout


def test_no_checkpoint_yet(tmp_path):
    assert newest(tmp_path, warn=pytest.fail) is None
    assert newest(tmp_path / "absent", warn=pytest.fail) is None


def test_newest_goes_by_number_not_by_time_or_digits(tmp_path):
    for step in (100, 99, 1000, 20):
        save(tmp_path, step)
    write_atomically(tmp_path / "final", writer("finished, but no checkpoint"))
    write_atomically(tmp_path / "zebra", writer("nor this"))
    assert newest(tmp_path, warn=pytest.fail) == step_folder(tmp_path, 1000)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_keep_last(tmp_path, count):
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text("stays")
    (tmp_path / "notes").mkdir()
    keep_last(tmp_path, count)
    kept = [step_folder(tmp_path, step).name for step in (8, 9, 10, 100)][-count:]
    assert names(tmp_path) == ["metrics.jsonl", "notes", *kept]


@pytest.mark.parametrize("count", [0, -1])
def test_keeping_none_is_refused(tmp_path, count):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=f"keep_last={count} .*at least 1"):
        keep_last(tmp_path, count)
    verify(step_folder(tmp_path, 1))


# What is not ours -----------------------------------------------------------------------------------------------------


def tree(root: Path) -> dict[str, str]:
    """Every file below a folder with its content, links with their target."""
    return {
        str(p.relative_to(root)): f"-> {os.readlink(p)}" if p.is_symlink() else p.read_bytes().hex()
        for p in sorted(root.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def users_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


FOREIGN = {
    "a folder of the user's": (lambda path: users_folder(path), "no readable MANIFEST"),
    "a file": (lambda path: path.write_text("mine"), "not a folder"),
    "a link to a folder of ours": (
        lambda path: (write_atomically(path.with_name("far"), writer("x")), path.symlink_to("far")),
        "not a folder",
    ),
    "ours with a file of the user's": (
        lambda path: (write_atomically(path, writer("x")), (path / "state" / "notes").write_text("mine")),
        "state/notes is not in it",
    ),
    "ours with a link": (
        lambda path: (write_atomically(path, writer("x")), (path / "link").symlink_to("/")),
        "link is not in it",
    ),
    "ours with a model card edited": (
        lambda path: (
            write_atomically(path, lambda to: (to / "README.md").write_text("card")),
            (path / "README.md").write_text("mine"),
        ),
        "README.md was altered",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_ours_is_not_replaced(tmp_path, case):
    make, reason = FOREIGN[case]
    make(tmp_path / "final")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=rf"final would be replaced, but .*{reason}.*; move it away"):
        write_atomically(tmp_path / "final", lambda to: pytest.fail("refused only after the work"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["final", "checkpoints", "metrics.jsonl", "start"])
@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_run_takes_no_folder_where_its_names_are_the_users(tmp_path, name, kind):
    (tmp_path / "pairs.jsonl").write_text("may lie beside a run")
    with exclusive(tmp_path / "new"):
        pass
    {"folder": users_folder, "file": lambda p: p.write_text("mine"), "dangling link": lambda p: p.symlink_to("none")}[
        kind
    ](tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name} was there before.*of a run of ours: move it away"):
        exclusive(tmp_path).__enter__()
    assert tree(tmp_path) == before
    (tmp_path / store.mark("run")).touch()  # what the sentence says a run of an earlier version needs
    if name == "final":
        with pytest.raises(FileExistsError, match="final would be replaced"):
            exclusive(tmp_path).__enter__()
    else:
        with exclusive(tmp_path):
            pass


def test_a_folder_that_is_wanted_whole_is_empty_or_ours(tmp_path):
    with exclusive(tmp_path / "new", "comparison"):
        (tmp_path / "new" / "anything").touch()
    with exclusive(tmp_path / "new", "comparison"):
        pass
    with pytest.raises(FileExistsError, match=r"new/\S+ was there before.*of a build of ours"):
        exclusive(tmp_path / "new", "build").__enter__()
    (tmp_path / "new" / "metrics.jsonl").touch()
    with pytest.raises(FileExistsError, match=r"new/metrics\.jsonl was there before.*of a run of ours"):
        exclusive(tmp_path / "new", "run").__enter__()  # it is the comparison's
    users_folder(tmp_path / "mine")
    with pytest.raises(FileExistsError, match=r"mine/thesis\.tex was there before"):
        exclusive(tmp_path / "mine", "comparison").__enter__()
    assert names(tmp_path / "mine") == ["thesis.tex"]


def test_clearing_removes_ours_and_stops_at_anything_else(tmp_path):
    known = re.compile(r"summary\.json")
    for _ in range(2):
        with exclusive(tmp_path, "run"):
            write_json(tmp_path / "dpo" / "summary.json", {})
            save(tmp_path / "dpo" / "checkpoints", 1)
            truncate(save(tmp_path / "dpo" / "checkpoints", 2))
            (tmp_path / "dpo" / "checkpoints" / ".step-00000003.unfinished").mkdir()
            (tmp_path / "dpo" / "checkpoints" / ".step-00000003.unfinished" / "weights").touch()
            (tmp_path / ".summary.123.json").touch()
            for name in (".git/config", "notes.md", "dpo/checkpoints/step-00000001/notes.md", "dpo/link"):
                path = tmp_path / name
                path.parent.mkdir(exist_ok=True)
                path.symlink_to(tmp_path) if name == "dpo/link" else path.write_text("mine")
                before = tree(tmp_path)
                with pytest.raises(FileExistsError, match=f"{name} is not ours, and nothing was removed"):
                    store.clear(tmp_path, known)
                assert tree(tmp_path) == before
                path.unlink()
            shutil.rmtree(tmp_path / ".git")
            store.clear(tmp_path, known)
        assert names(tmp_path) == [store.mark("run")]


def test_checkpoints_with_something_beside_ours_are_neither_removed_nor_counted(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (step_folder(tmp_path, 1) / "notes").write_text("mine")
    users_folder(tmp_path / "step-by-step")
    (tmp_path / "step-99999999").symlink_to(step_folder(tmp_path, 2))
    keep_last(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-99999999", "step-by-step"]
    assert (tmp_path / "step-by-step" / "thesis.tex").exists()


def test_damaged_checkpoints_are_set_aside_and_the_new_ones_kept(tmp_path):
    """A build whose kept checkpoints are both damaged starts over: what it writes then sorts before the damaged ones."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (900, 1000):
        save_progress(tmp_path, model, [optimizer], step=step)
        state = step_folder(tmp_path, step) / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1])
    assert load_progress(tmp_path, model, [optimizer]) == {}
    for step in (100, 200, 300):
        save_progress(tmp_path, model, [optimizer], step=step)
    kept = [name for name in names(tmp_path) if not name.startswith("damaged-")]
    assert kept == ["step-00000200", "step-00000300"]
    assert [name[:21] for name in names(tmp_path) if name not in kept] == [
        "damaged-step-00000900",
        "damaged-step-00001000",
    ]
    assert load_progress(tmp_path, model, [optimizer])["step"] == 300


def test_documents_may_change_and_files_may_be_added(tmp_path):
    write_atomically(
        tmp_path / "final", lambda to: [(to / name).write_text("ours") for name in ("README.md", "a.json")]
    )
    (tmp_path / "final" / "README.md").write_text("a better card")
    (tmp_path / "final" / "tokenizer.json").write_text("mine")
    verify(tmp_path / "final")


# State --------------------------------------------------------------------------------------------------------------


def same(a, b) -> None:
    """Equal, down to types and bits; tuples come back as lists."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            same(one, two)
    else:
        assert type(a) is type(b)
        assert a == b or (a != a and b != b)


def test_state_round_trip(tmp_path):
    matrix = torch.randn(3, 4)
    state = {
        "step": 3,
        "lr": 1e-7 / 3,
        "edge": [math.inf, -math.inf, math.nan, 0.1 + 0.2, 2**60, True, None, "é"],
        0: {1: {"exp_avg": matrix, "again": matrix}, "1": "not the integer"},
        "views": (matrix.t(), matrix[:, 1], matrix[:0]),
        "dtypes": {
            str(d): (torch.randn(5) * 3).to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64)
        },
        "special": torch.tensor([math.inf, -math.inf, math.nan, -0.0]),
        "bool": torch.tensor([True, False]),
        "0-d": [torch.tensor(2.5), torch.tensor(7), torch.tensor(True)],
        "rng": torch.get_rng_state(),
        "grad": nn.Parameter(torch.ones(2)).data,
        "empty": {},
        "none": [],
    }
    save_state(tmp_path / "state", state)
    assert names(tmp_path) == ["state.json", "state.safetensors"]
    same(state, load_state(tmp_path / "state"))


def test_state_without_tensors_and_with_parameters(tmp_path):
    save_state(tmp_path / "state", {"epoch": 1})
    assert load_state(tmp_path / "state") == {"epoch": 1}
    save_state(tmp_path / "state", {"p": nn.Parameter(torch.ones(2))})
    assert not load_state(tmp_path / "state")["p"].requires_grad


def test_state_that_only_looks_like_a_tensor_reference(tmp_path):
    state = {"__tensor__": "0", "x": {"__dict__": [1]}, "t": torch.ones(1)}
    save_state(tmp_path / "state", state)
    same(state, load_state(tmp_path / "state"))


def test_state_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set"):
        save_state(tmp_path / "state", {"bad": {1, 2}})


def test_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *a, **k: pytest.fail("torch.save pickles"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load unpickles"))
    save_state(tmp_path / "state", {"a": torch.ones(2)})
    load_state(tmp_path / "state")


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, betas=(0.8, 0.95)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon([w for w in p if w.ndim == 2], lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_bit_identically(tmp_path, name, dtype):
    """Three steps, save, three more; loaded into fresh objects the last three give the same bits."""

    def fresh(seed: int):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).to(dtype)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    def steps(model, optimizer, schedule) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 4, dtype=dtype)).square().sum().backward()
            optimizer.step()
            schedule.step()

    first = fresh(0)
    steps(*first)
    parts = {"model": first[0], "optimizer": first[1], "schedule": first[2]}
    save_state(tmp_path / "state", {key: x.state_dict() for key, x in parts.items()} | {"rng": torch.get_rng_state()})
    steps(*first)
    second, state = fresh(1), load_state(tmp_path / "state")
    for key, part in zip(parts, second, strict=True):
        part.load_state_dict(state[key])
    torch.set_rng_state(state["rng"])
    steps(*second)
    for one, two in zip(first, second, strict=True):
        same(one.state_dict(), two.state_dict())


# One run a folder ---------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    with exclusive(folder):
        with pytest.raises(
            RuntimeError, match=rf"run is in use by another run \(process {os.getpid()}\).*--output-dir"
        ):
            exclusive(folder).__enter__()
        with exclusive(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), exclusive(folder):
        raise ZeroDivisionError
    with exclusive(folder):
        assert (folder / store.mark("run")).read_text() == str(os.getpid())


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    program = f"""
        import sys, time
        from pathlib import Path
        from tpo_lib.files.store import exclusive
        with exclusive(Path({str(tmp_path)!r})):
            print("held", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "held\n"
            with pytest.raises(RuntimeError, match=rf"in use by another run \(process {child.pid}\)"):
                exclusive(tmp_path).__enter__()
        finally:
            child.kill()
    assert child.returncode == -signal.SIGKILL
    with exclusive(tmp_path):
        assert (tmp_path / store.mark("run")).read_text() == str(os.getpid())


def test_a_lock_without_an_owner_is_still_a_lock(tmp_path):
    """The other run may not have written its process id yet."""
    with exclusive(tmp_path):
        (tmp_path / store.mark("run")).write_text("")
        with pytest.raises(RuntimeError, match=r"\(process unknown\)"):
            exclusive(tmp_path).__enter__()


def test_the_constants_other_files_rely_on():
    assert (store.MANIFEST, store.PREFIX) == ("MANIFEST.json", "step-")
