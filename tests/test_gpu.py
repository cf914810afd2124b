"""`make gpu` in its small form on a CPU: every part runs, every check holds, the page tells what was found."""

from __future__ import annotations

import json

import pandas
import pytest

from benchmarks import gpu, gpu_experiment, gpu_page
from tpo_lib.losses import OBJECTIVES

COMMON = ["--small"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """All parts with made-up reviews, and the page."""
    folder = tmp_path_factory.mktemp("gpu")
    reviews = [f"{i} {word} scenes and the film was rather {word} from its beginning to the end. " * 3
               for i in range(30) for word in ("good", "bad", "odd")]  # fmt: skip
    for name in ("train", "test"):
        pandas.DataFrame({"text": reviews, "label": 0}).to_parquet(folder / f"{name}.parquet")
    gpu.main([*COMMON, "--parts", str(folder / "parts"), "--imdb", str(folder)])
    return folder / "parts"


def read(parts, name: str) -> dict:
    return json.loads((parts / f"{name}.json").read_text())


def test_every_check_holds(parts):
    part = read(parts, "numerics")
    assert part["finished"]
    assert not part["problem"]
    assert len(part["rows"]) > 300
    assert [row for row in part["rows"] if not row["holds"]] == []
    assert {row["precision"] for row in part["rows"]} == {"float32", "bf16", "fp16"}


def test_every_section_measures_those_that_agree(parts):
    rows = read(parts, "bench")["rows"]
    assert [row["kind"] for row in rows if row["kind"] == "failed"] == []
    assert {row["kind"] for row in rows} == {"steps", "largest", "precisions"}
    for row in rows:
        if row["kind"] == "steps":
            assert {"textbook", "fused", "cached", "bodies"} <= row["median_s"].keys()
            assert all(max(row["agreement"][label].values()) < 1e-4 for label in ("fused", "cached"))


def test_the_experiment_trains_every_objective(parts):
    rows = read(parts, "experiment")["rows"]
    assert [row["objective"] for row in rows if row["kind"] == "run"] == [name for name in OBJECTIVES if name != "sft"]
    assert next(row for row in rows if row["kind"] == "sft")["perplexity_after"] > 1
    checks = next(row for row in rows if row["kind"] == "agreement")["rows"]
    assert all(check["holds"] for check in checks)


def test_the_page_has_tables_and_figures_but_no_prompt(parts):
    page = parts / "page"
    text = (page / "README.md").read_text()
    assert "## Goals" in text
    assert "## Numerics" in text
    assert "| TDPO2 |" in text
    assert (page / "steps.png").stat().st_size > 10_000
    assert (page / "frontier.png").stat().st_size > 10_000
    kept = json.loads((page / "results.json").read_text())
    samples = [s for part in kept for row in part["rows"] for p in row.get("points", ()) for s in p["samples"]]
    assert samples
    assert all(set(sample) == {"text", "reward", "judge"} for sample in samples)
    assert all("system" not in part["about"] for part in kept)


def test_a_finished_part_is_not_run_again(parts, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "numerics", lambda **how: pytest.fail("run again"))
    gpu.main([*COMMON, "--only", "numerics", "--parts", str(parts)])
    assert "numerics: read from" in capsys.readouterr().out


def test_what_breaks_a_part_is_written_down_with_what_was_there(tmp_path):
    def rows(**how):
        yield {"kind": "first"}
        raise RuntimeError("the card is gone")

    part = gpu.run_part("bench", rows, tmp_path, seconds=9, device="cpu", small=True)
    assert part["problem"] == "RuntimeError: the card is gone"
    assert not part["finished"]
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == [{"kind": "first"}]


def test_no_part_starts_a_row_after_its_time():
    assert list(gpu.numerics(device="cpu", small=True, left=lambda: 0.0)) == []
    assert list(gpu.gpu_bench.run(device="cpu", small=True, left=lambda: 0.0)) == []
    rows = gpu_experiment.run(device="cpu", small=True, left=lambda: 0.0)
    assert all(row["kind"] != "run" for row in rows)


def test_a_page_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run python -m benchmarks\.gpu first"):
        gpu_page.write(tmp_path, tmp_path / "page")
