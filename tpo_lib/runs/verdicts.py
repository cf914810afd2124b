"""What the studies, over several seeds, say of the objectives of a run of the bundled model: beside what its one seed says."""

from __future__ import annotations

from collections.abc import Iterable

from tpo_lib.files import store
from tpo_lib.files.load import POCKET

VERDICTS = POCKET.parent / "verdicts.json"  # as `tpo_lib.studies.claims.verdicts` makes it
COLUMNS = ("claim of the paper", "difference [95%]", "verdict", "study")


def of(model: str, objectives: Iterable[str]) -> list[tuple[str, ...]]:
    """Rows of COLUMNS: the claims that compare no others than these objectives; none of another model than the bundled one."""
    known = set(objectives)
    if model != str(POCKET):
        return []
    claims = store.read_json(VERDICTS, "restore it from the repository")["claims"]
    return [
        (each["claim"], each["here"], each["verdict"], each["study"])
        for each in claims
        if known >= {*each["objectives"]}
    ]
