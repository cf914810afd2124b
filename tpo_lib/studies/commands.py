"""What `python -m tpo_lib study` does."""

from __future__ import annotations

from pathlib import Path

from tpo_lib.files import store
from tpo_lib.runs.verdicts import VERDICTS
from tpo_lib.studies import claims, page, study
from tpo_lib.studies.spec import FOLDER, Study


def study_paths(names: list[str], every: bool) -> list[Path]:
    """The files of the studies that are asked for; those that others take settings from come first."""
    known = sorted(FOLDER.glob("*.toml"))
    if bool(names) == every:
        there = ", ".join(path.stem for path in known) or f"none in {FOLDER}/ of this folder"
        raise ValueError(f"name a study, or say --all; there are {there}")
    paths = known if every else [Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml" for name in names]
    needs = {path: sum(bool(method.tuned) for method in Study.read(path).methods) for path in paths}
    return sorted(paths, key=lambda path: needs[path] > 0)


def run(options) -> None:
    """Run studies, write their results, pictures and pages, and the README beside them."""
    for path in study_paths(options.study_name, options.all):
        plan = Study.read(path)
        how = {"engine": options.engine, "workers": options.workers, "num_gpus": options.num_gpus}
        result = study.run(path, runs=Path(options.runs) / "studies", **how)
        place = path.parent / "results" / f"{path.stem}.md"
        store.write_file(place, page.page(plan, result, page.pictures(plan, result, place.parent)))
        print(
            page.table(page.CLAIMS, page.claim_rows(plan, result))
            if plan.hypotheses
            else page.endpoints_table(plan, result)
        )
        print(f"\nwritten: {place}")
        if path.parent == FOLDER:
            _write(FOLDER / "README.md", claims.index(FOLDER))
            if (readme := Path("README.md")).is_file():
                _write(readme, claims.show(readme.read_text(encoding="utf-8"), FOLDER))
            if path.resolve().is_relative_to(VERDICTS.parents[1]):  # the studies of the repository that this code is of
                store.write_json(VERDICTS, claims.verdicts(FOLDER))


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        store.write_file(path, text)
        print(f"written: {path}")
