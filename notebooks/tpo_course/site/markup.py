"""Markdown as GitHub and Jupyter read it, made into HTML; formulas become MathML, which browsers draw by themselves."""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import mistune
from math_core import LatexError, LatexToMathML
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from tpo_course.site.source import Addresses, Page

FORMULA = r"(?<!\\)\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<inline>(?![\s$])[^$]*?[^$\\\s])\$(?!\d)"
# What a dollar in it does not begin a formula: the code of Markdown, and of HTML with its tags.
IN_MARKDOWN = re.compile(
    rf"(?P<code>(?P<fence>```+|~~~+).*?(?P=fence)|(?P<tick>`+)[^`].*?(?P=tick)(?!`))|{FORMULA}", re.S
)
IN_HTML = re.compile(
    rf"(?P<code><(?P<tag>pre|code|style|script)\b.*?</(?P=tag)>|</?[a-zA-Z][\w-]*(?:\s[^>]*)?/?>)|{FORMULA}", re.S
)
HELD = re.compile("\ue000(\\d+)\ue001")  # a formula while Markdown is read: it has no say in what stands inside
FORMATTER = HtmlFormatter(nowrap=True)
_TO_MATHML = LatexToMathML(fancy_error=False)


def mathml(latex: str, *, block: bool) -> str:
    """A formula as MathML.

    Raises:
        ValueError: it cannot be read; the message ends with why.
    """
    try:
        made = _TO_MATHML.convert_with_local_state(latex.strip(), displaystyle=block)
    except LatexError as error:
        raise ValueError(f"the formula ${latex.strip()}$ cannot be typeset: {error}") from error
    return f'<span class="formula" tabindex="0" role="group" aria-label="formula">{made}</span>' if block else made


def code(source: str, language: str) -> str:
    """A block of code with its words in `<span class>`."""
    try:
        inside = highlight(source, get_lexer_by_name(language), FORMATTER) if language else html.escape(source)
    except ClassNotFound:
        inside = html.escape(source)
    return f'<pre class="code" tabindex="0"><code>{inside.rstrip()}</code></pre>\n'


@dataclass
class Text:
    """What turns the texts of one page into HTML, one after the other, and remembers the page's headings."""

    page: Page
    addresses: Addresses
    headings: list[tuple[int, str, str]] = field(default_factory=list)  # (level, anchor, HTML)
    formulas: int = 0
    _held: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        plugins = ["table", "strikethrough", "url"]
        self._read = mistune.create_markdown(renderer=_Renderer(self), plugins=plugins)

    def markdown(self, text: str) -> str:
        """Markdown as HTML."""
        return self._release(self._read(self._hold(IN_MARKDOWN, text, lambda latex: latex)))

    def html(self, text: str) -> str:
        """HTML that a cell put out: its formulas as MathML, its links those of the site."""
        text = self._release(self._hold(IN_HTML, text, html.unescape))
        text = re.sub(r'(?<=href=")[^"]+', lambda m: html.escape(self.addresses.link(self.page, m[0])), text)
        return re.sub(r"<pre>", '<pre tabindex="0">', text)

    def anchor(self, text: str) -> str:
        """The name of a heading as GitHub makes it, unique in the page."""
        words = re.sub(r"<[^>]+>", "", HELD.sub("", html.unescape(text))).strip().lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-") or "section"
        taken = {anchor for _, anchor, _ in self.headings}
        return next(each for each in (name, *(f"{name}-{n}" for n in range(1, 999))) if each not in taken)

    def _hold(self, pattern: re.Pattern, text: str, clean: Callable[[str], str]) -> str:
        def one(found: re.Match) -> str:
            if found["code"]:
                return found[0]
            block = found["block"] is not None
            self._held.append(mathml(clean(found["block"] if block else found["inline"]), block=block))
            self.formulas += 1
            return f"\ue000{len(self._held) - 1}\ue001"

        return pattern.sub(one, text)

    def _release(self, text: str) -> str:
        return HELD.sub(lambda found: self._held[int(found[1])], text)


class _Renderer(mistune.HTMLRenderer):
    """Headings with anchors, tables that scroll by themselves, coloured code, and links of the site."""

    def __init__(self, text: Text) -> None:
        super().__init__(escape=False)
        self.into = text

    def heading(self, text: str, level: int, **_) -> str:
        anchor = self.into.anchor(text)
        self.into.headings.append((level, anchor, self.into._release(text)))
        here = f'<a class="anchor" href="#{anchor}" aria-label="link to this section">#</a>' if level > 1 else ""
        return f'<h{level} id="{anchor}">{text}{here}</h{level}>\n'

    def block_code(self, code_: str, info: str | None = None) -> str:
        language = (info or "").split(maxsplit=1)
        return code(code_, language[0] if language else "")

    def table(self, text: str) -> str:
        return f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table>\n{text}</table></div>\n'

    def table_cell(self, text: str, align: str | None = None, head: bool = False) -> str:
        style = f' class="{align}"' if align else ""
        return f'<th scope="col"{style}>{text}</th>' if head else f"<td{style}>{text}</td>"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return f'<a href="{html.escape(self.into.addresses.link(self.into.page, url))}">{text}</a>'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        found = self.into.addresses.picture(self.into.page, url)
        alt = html.escape(html.unescape(re.sub(r"<[^>]+>", "", text)))
        return alt if found is None else f'<img src="{html.escape(found)}" alt="{alt}">'
