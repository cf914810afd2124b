"""Points and misconceptions of a whole class, from its notebooks: python -m tpo_lib grade handed_in/*.ipynb --csv class.csv

Every notebook is judged in a process of its own, with limits of time and memory and without a network; only its answers and
what they need are run. What fails there is told in its row and costs no other row. That is no sandbox: whoever wants to do harm
can, so grade strangers' notebooks where there is nothing to lose.

A task earns its difficulty, a prediction because it was made, a quiz one point a question. What is answered in words is for a
reader: it earns nothing here and stands in the file of --json.
"""

import contextlib
import csv
import io
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tpo_course import progress
from tpo_lib.files.store import write_file

STARTING = 120  # seconds for a process to import what it needs and read the notebook
ENVIRONMENT = {"TPO_PROGRESS": "off", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "TOKENIZERS_PARALLELISM": "false"}


def grade(path: Path, *, seconds: float = 60, memory: float = 4, record: Path | None = None) -> dict[str, Any]:
    """Judge one notebook.

    Args:
        seconds: that one task may take, with the cells that it needs.
        memory: GiB that the notebook's own code may take.
        record: a `.progress.json` with the answers that were given in widgets.

    Returns:
        {"notebook", "points", "of", "reason", "tasks"}: `reason` says why nothing could be judged, "" if it could; a task is
        {"task", "kind", "of", "status", "points", "mistakes", "message", "answer"}.
    """
    row = {"notebook": str(path), "points": 0, "of": 0, "reason": "", "tasks": []}
    tasks, done = None, []
    while tasks is None or len(done) < len(tasks):
        tasks, more, reason = _process(path, len(done), seconds, memory, record)
        if tasks is None:
            return row | {"reason": reason}
        done += more
        if len(done) < len(tasks):  # it ended, or was ended, in the middle of one
            done.append({"status": "wrong", "points": 0, "mistakes": [], "message": reason, "answer": ""})
    row["tasks"] = [task | verdict for task, verdict in zip(tasks, done, strict=True)]
    return row | {name: sum(task[name] for task in row["tasks"]) for name in ("points", "of")}


def _process(path: Path, skip: int, seconds: float, memory: float, record: Path | None) -> tuple[Any, list[dict], str]:
    """The tasks (None if they did not come), the verdicts that came, and why it ended before the last one."""
    command = [sys.executable, "-m", "tpo_course.grade_one", str(path.absolute()), str(skip), str(memory)]
    command += [str(record.absolute())] if record else []
    roots = os.pathsep.join(filter(None, [*_roots(), os.environ.get("PYTHONPATH")]))
    how = {
        "env": os.environ | ENVIRONMENT | {"PYTHONPATH": roots},
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch, open(f"{scratch}/errors", "w+b") as errors:
        os.mkdir(f"{scratch}/here")
        process = subprocess.Popen(command, cwd=f"{scratch}/here", stderr=errors, start_new_session=True, **how)
        try:
            tasks, verdicts, reason = _listen(process, seconds)
        finally:
            _end(process)
        if tasks is None and not reason:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines()
            reason = (
                f"the process that reads it ended with status {process.returncode}: {said[-1] if said else 'no word'}"
            )
    return (
        tasks,
        verdicts,
        reason or f"This ended the process (status {process.returncode}): out of memory, or os._exit?",
    )


def _listen(process: subprocess.Popen, seconds: float) -> tuple[Any, list[dict], str]:
    """The same, as far as the process tells it within its time; "" for a reason that it did not tell."""
    lines: queue.Queue[bytes] = queue.Queue()

    def pass_on() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(b"")

    threading.Thread(target=pass_on, daemon=True).start()
    tasks, verdicts = None, []
    while tasks is None or len(verdicts) < len(tasks):
        try:
            line = lines.get(timeout=STARTING if tasks is None else seconds)
        except queue.Empty:
            took = f"{STARTING} s to be read" if tasks is None else f"{seconds:g} s: an endless loop?"
            return tasks, verdicts, f"It took longer than {took}"
        if not line.endswith(b"\n"):
            return tasks, verdicts, ""
        told = json.loads(line)
        if "reason" in told:
            return None, [], told["reason"]
        if "tasks" in told:
            tasks = told["tasks"]
        elif "status" in told:
            verdicts.append(told)
    return tasks, verdicts, ""


def _end(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def _roots() -> list[str]:
    """Where this process found the course, for the other one."""
    return list(dict.fromkeys(str(Path(sys.modules[name].__file__).parents[1]) for name in ("tpo_course", "tpo_lib")))


# ---- a class


def find(names: Iterable[str]) -> list[Path]:
    """The notebooks that are named, and those in the folders that are; a file that is not there is kept, for its row."""
    found = []
    for path in map(Path, names):
        inside = sorted(
            p for p in path.rglob("*.ipynb") if not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        found += inside if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def summary(rows: list[dict]) -> dict[str, Any]:
    """Over a class: how many notebooks were judged, how every task stands, and which misconception was met how often."""
    judged = [row for row in rows if not row["reason"]]
    tasks: dict[str, Counter] = {}
    mistakes: Counter = Counter()
    for task in (task for row in judged for task in row["tasks"]):
        tasks.setdefault(task["task"], Counter())[task["status"]] += 1
        mistakes.update(f"{task['task']}: {name}" for name in task["mistakes"])
    return {
        "notebooks": len(rows),
        "judged": len(judged),
        "tasks": {name: dict(count) for name, count in tasks.items()},
        "mistakes": dict(mistakes.most_common()),
    }


def table(rows: list[dict]) -> str:
    """One CSV row a notebook: points, why it could not be judged, the misconceptions, and the points of every task."""
    tasks = list(dict.fromkeys(task["task"] for row in rows for task in row["tasks"]))
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(["notebook", "points", "of", "reason", "not attempted", "mistakes", *tasks])
    for row in rows:
        by_name = {task["task"]: task for task in row["tasks"]}
        left = sum(task["status"] == "not attempted" for task in row["tasks"])
        mistakes = "; ".join(f"{name}: {each}" for name, task in by_name.items() for each in task["mistakes"])
        points = [by_name[name]["points"] if name in by_name else "" for name in tasks]
        write([_cell(row["notebook"]), row["points"], row["of"], _cell(row["reason"]), left, mistakes, *points])
    return text.getvalue()


def _cell(text: str) -> str:
    """A learner's file name or message as a spreadsheet takes it: never as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def words(rows: list[dict]) -> str:
    """What the command prints."""
    width = max(len(row["notebook"]) for row in rows)
    lines = []
    for row in rows:
        wrong = [f"{t['task']} ({', '.join(t['mistakes']) or 'wrong'})" for t in row["tasks"] if t["status"] == "wrong"]
        said = row["reason"] or "; ".join(wrong)
        lines.append(f"{row['notebook']:{width}s}  {row['points']:3d} of {row['of']:3d}  {said}".rstrip())
    about = summary(rows)
    lines.append(f"\n{about['judged']} of {about['notebooks']} notebooks judged")
    lines += [f"{count:4d} x {mistake}" for mistake, count in about["mistakes"].items()]
    return "\n".join(lines)


def run(options) -> None:
    """The command `grade`."""
    paths = find(options.notebooks)
    if not paths:
        raise ValueError(f"{' '.join(options.notebooks)}: no notebooks in there")

    def one(path: Path) -> dict:
        record = path.parent / progress.NAME if options.records else None
        try:
            row = grade(path, seconds=options.seconds, memory=options.memory, record=record)
        except Exception as error:  # one learner's file is never the end of the class
            row = {
                "notebook": str(path),
                "points": 0,
                "of": 0,
                "reason": f"{type(error).__name__}: {error}",
                "tasks": [],
            }
        print(f"{path}: {row['reason'] or f'''{row['points']} of {row['of']}'''}", file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(one, paths))
    print(words(rows))
    if options.json:
        write_file(
            options.json, json.dumps({"summary": summary(rows), "notebooks": rows}, indent=1, ensure_ascii=False) + "\n"
        )
    if options.csv:
        write_file(options.csv, table(rows))
