"""What chapters say of the stored studies."""

import pytest

from tpo_course import studies
from tpo_lib.studies import page


def test_a_chapter_shows_the_claims_that_it_names():
    every, some = studies.verdicts("frontier").data, studies.verdicts("frontier", "TDPO1").data
    assert every.splitlines()[0] == "| " + " | ".join(studies.COLUMNS) + " |"
    assert some.splitlines()[:2] == every.splitlines()[:2]
    assert len(every.splitlines()) - 2 == len(studies.load("frontier")[0].hypotheses)
    assert some.splitlines()[2:] == [line for line in every.splitlines()[2:] if "TDPO1" in line.split(" | ")[0]]
    assert page.table(studies.COLUMNS, []) in some


def test_a_word_that_no_claim_has_is_refused():
    with pytest.raises(ValueError, match="no claim of study 'frontier' says 'TPO3'; they are: TDPO2's frontier"):
        studies.verdicts("frontier", "TPO3")
    with pytest.raises(FileNotFoundError, match="there is no such study; there are"):
        studies.verdicts("frontiers")
