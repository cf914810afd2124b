"""What a class's copy keeps out of a glance: where the solutions are, if they are here, and files that are read sealed.

`student` writes such a copy. Sealed is packed, not encrypted: a checker has to know the right answer, so that whoever wants to
unpack it can. It keeps honest people honest.

>>> unseal(seal("x = 1"))
'x = 1'
"""

import base64
import zlib
from pathlib import Path

HERE = Path(__file__).parent
SOLUTIONS = next(
    (p for p in (HERE.parent / "solutions", HERE / "solutions") if p.is_dir()), None
)  # a checkout; installed
MARK = "sealed:"
MODULE = '''"""Checkers of this chapter, packed so that their answers are out of a glance."""

from tpo_course.sealed import unseal

exec(compile(unseal("{}"), "<checkers>", "exec"))
'''


def seal(text: str) -> str:
    """Pack a text into one line without quotes."""
    return MARK + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unseal(text: str) -> str:
    """The text itself, packed or not."""
    return (
        zlib.decompress(base64.b85decode(text.strip().removeprefix(MARK))).decode() if text.startswith(MARK) else text
    )
