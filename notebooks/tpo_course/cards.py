"""How tasks and verdicts look: as HTML in a notebook, and as plain text everywhere else."""

import base64
import html
import re

from tpo_course.sealed import SOLUTIONS

BOX = "border:1px solid #8a8a8a;border-radius:6px;padding:.6em 1em;max-width:60em;line-height:1.5"
ANSWERS = ("Solution", "Answer", "The truth", "A full answer")  # what the folds of answers are called (`answer`)
FOLDED = re.compile(rf"<details[^>]*><summary>({'|'.join(ANSWERS)})</summary>(?:(?!<details).)*?</details>", re.DOTALL)
BLOCK = r"(?:p|table|tr|ul|ol|li|pre|div|details)\b[^<>]*>"  # what begins a line, if its tag does not stand at one
LOOKS = {  # status: sign, colour
    "correct": ("✓", "#007a55"),
    "wrong": ("✗", "#b03a00"),
    "not attempted": ("○", "#555555"),
    "predicted": ("●", "#0b5fa5"),
    "answered": ("●", "#0b5fa5"),
    "assessed": ("●", "#0b5fa5"),
}


def as_html(text: str) -> str:
    """Inline Markdown, `code` and *emphasis*, as HTML in one line; HTML and LaTeX between dollars stay as they are.

    >>> as_html("Return `a < b`, *not* $a^* < b^*$.")
    'Return <code>a &lt; b</code>, <i>not</i> $a^* < b^*$.'
    """

    def span(match: re.Match[str]) -> str:
        code, latex, emphasis = match.groups()
        if latex:
            return latex
        return f"<code>{html.escape(code, quote=False)}</code>" if code else f"<i>{emphasis}</i>"

    return re.sub(r"`([^`]+)`|(\$[^$]+\$)|(?<!\w)\*([^*\s][^*]*)\*(?!\w)", span, " ".join(text.split()))


def plain(page: str) -> str:
    """HTML as plain text: no tags, no entities; code in backquotes, LaTeX as it is written. Folded answers are left out.

    >>> plain("<b>Not</b> <code>a &lt; b</code>: π<sub>ref</sub>, e<sup>x</sup>")
    'Not `a < b`: π_ref, e^x'
    >>> plain("Two points.<ul><li>one</li><li>two</li></ul>" + fold("The truth", "7."))
    'Two points.\\n- one\\n- two'
    """
    page = FOLDED.sub("", page)
    for old, new in (
        (r"</?code>", "`"),
        ("<sub>", "_"),
        ("<sup>", "^"),
        (r"(?:<br>|</p>|</tr>|</li>|</pre>) *", "\n"),
        (r"</t[dh]>(?=<t[dh])", "  "),
        ("</summary>", ": "),
        (rf"(?<![\n ]) *((?:<{BLOCK} *)+)", r"\n\1"),
        ("<li>", "- "),
    ):
        page = re.sub(old, new, page)
    return html.unescape(re.sub(r"<[a-z/][^<>]*>", "", page)).strip()


def fold(summary: str, body: str) -> str:
    """Words that unfold a body, without a kernel and by keyboard."""
    return f'<details style="margin:.2em 0 .2em 1em"><summary>{summary}</summary>{body}</details>'


def answer(summary: str, body: str) -> str:
    """The same of a right answer; "" in a class's copy, which has none."""
    return fold(summary, body) if SOLUTIONS else ""


def dots(difficulty: int) -> str:
    """The difficulty, in signs and in words."""
    signs = "●" * difficulty + "○" * (5 - difficulty)
    return f"<span title='difficulty {difficulty} of 5'>{signs}</span> difficulty {difficulty} of 5"


def minutes(count: int) -> str:
    """How long a task takes.

    >>> minutes(1), minutes(2)
    ('about 1 minute', 'about 2 minutes')
    """
    return f"about {count} minute{'s' * (count != 1)}"


def verdict(status: str, message: str) -> str:
    """What a checker says, as HTML."""
    sign, colour = LOOKS[status]
    head = f'<b style="color:{colour}">{sign} {status}</b>'
    return f'<div style="border-left:4px solid {colour};padding:.4em .8em;line-height:1.5">{head}<br>{message}</div>'


def letters(count: int) -> str:
    """The letters that choices are told by: "abc".

    >>> letters(3)
    'abc'
    """
    return "abcdefghijklmnopqrstuvwxyz"[:count]


def image(png: bytes, alt: str) -> str:
    """A PNG inside HTML, with its description."""
    source = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt, quote=True)}" style="max-width:100%">'
