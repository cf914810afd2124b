"""Runs side by side: none is made twice, none is lost with its worker, a failing one is named."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import study_workers as workers

from tpo_lib.studies import pool
from tpo_lib.studies.execute import read, record_path

ROOT = Path(__file__).parents[2]
EVALUATE = {"at": [1], "samples": 2}


@pytest.fixture
def fake(monkeypatch):
    """Runs that do as their spec says, by workers of one server that has torch: spawned, each would import it again."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["tpo_lib.studies.pool"])
    monkeypatch.setattr(pool, "get_context", lambda method: server)
    monkeypatch.setattr(pool, "execute", workers.made)


def specs(count: int, **more) -> list[dict]:
    return [{"number": i, "evaluate": EVALUATE} | more for i in range(count)]


def tries(spec: dict, folder) -> int:
    return len(record_path(spec, folder).with_name("tries").read_text())


@pytest.mark.usefixtures("fake")
def test_every_run_is_made_once_and_kept(tmp_path):
    pool.make_all(specs(3), tmp_path, workers=2, progress=False)
    pool.make_all(specs(4), tmp_path, workers=2, progress=False)
    assert [read(spec, tmp_path)["spec"]["number"] for spec in specs(4)] == [0, 1, 2, 3]
    assert [tries(spec, tmp_path) for spec in specs(4)] == [1, 1, 1, 1]


@pytest.mark.usefixtures("fake")
def test_a_killed_worker_costs_its_run_and_no_other(tmp_path):
    one, *others = specs(3)
    one["die"] = 1
    pool.make_all([one, *others], tmp_path, workers=2, progress=False)
    assert tries(one, tmp_path) == 2
    assert all(record_path(spec, tmp_path).exists() for spec in (one, *others))


@pytest.mark.usefixtures("fake")
def test_a_run_that_always_kills_its_worker_is_given_up(tmp_path):
    with pytest.raises(RuntimeError, match="a worker was killed 3 times in a row"):
        pool.make_all(specs(1, die=9), tmp_path, workers=1, progress=False)
    assert tries(specs(1, die=9)[0], tmp_path) == 3


PARENT = """
import sys
sys.path[:0] = [{tests!r}]
import study_workers
from pathlib import Path
from tpo_lib.studies import pool
if __name__ == "__main__":
    pool.execute = study_workers.made
    pool.make_all([{spec}], Path({folder!r}), workers=1, progress=False)
"""


def test_a_worker_ends_with_a_killed_parent(tmp_path):
    spec = specs(1, wait=60)[0]
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), spec=spec, folder=str(tmp_path)))
    pid = record_path(spec, tmp_path).with_name("pid")
    with subprocess.Popen([sys.executable, script], cwd=ROOT) as parent:
        until(pid.exists, 60)
        worker = int(pid.read_text())
        parent.kill()
    until(lambda: not Path(f"/proc/{worker}").exists(), 10)


def until(happens, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.usefixtures("fake")
def test_a_failing_run_is_named_and_the_others_stay(tmp_path):
    good, bad = specs(1)[0], {"number": 7, "evaluate": EVALUATE, "fail": "no pair is left"}
    with pytest.raises(ValueError, match=re.escape("'number': 7") + ".*failed: ValueError: no pair is left"):
        pool.make_all([good, bad], tmp_path, workers=1, progress=False)
    assert record_path(good, tmp_path).exists()


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine='slurm' is unknown; choose one of pool, ray"):
        pool.make_all([], tmp_path, engine="slurm")


def test_what_a_run_takes_of_a_gpu_is_asked_of_a_cluster_alone(tmp_path):
    with pytest.raises(
        ValueError, match=r"num_gpus=0\.5 is what a run takes of a cluster: engine ray knows it, pool does not"
    ):
        pool.make_all([], tmp_path, num_gpus=0.5)


def test_a_host_with_another_device_makes_no_run(tmp_path, monkeypatch):
    (spec,) = specs(1)
    monkeypatch.setattr(pool, "key", lambda spec: "made elsewhere")
    with pytest.raises(ValueError, match="this host would make it on cpu, the one that asks for it would not"):
        pool._record(workers.made, spec, str(tmp_path), pool.record_path(spec, tmp_path).parent.name)
    assert not list(tmp_path.iterdir())


def test_ray_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install tpo-lib\[ray\]"):
        pool.make_all(specs(1), tmp_path, engine="ray", progress=False)


def test_ray_makes_the_same_files_and_repeats_a_killed_run(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(workers)  # Ray's workers do not find what lies beside a test
    monkeypatch.setattr(pool, "execute", workers.made)
    one, *others = specs(3)
    one["die"] = 1
    pool.make_all([one, *others], tmp_path / "ray", engine="ray", workers=2, progress=False)
    pool.make_all([one, *others], tmp_path / "pool", workers=1, progress=False)
    for spec in (one, *others):
        assert read(spec, tmp_path / "ray") == read(spec, tmp_path / "pool")
    assert tries(one, tmp_path / "ray") == 2
