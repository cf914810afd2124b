"""A real browser in front of a real JupyterLab: open a notebook, run it, use its widgets, see what the reader sees.

The fixtures `lab` and `notebook` (conftest.py) hand this out; a test of a widget is as short as

    def test_next(notebook):
        page = notebook("name.ipynb", ["from tpo_course import widgets", "widgets.something()"])
        page.run_all()
        page.click("Next")
        page.press("beta", "ArrowRight")
        page.wait_for_text("beta = 0.63")
        page.screenshot(tmp_path / "after.png")
        page.assert_clean()

Fixtures
    lab         one JupyterLab for all tests of this folder, serving a temporary copy of `notebooks/`; its files are never yours.
    notebook    notebook(name, cells=None, width=1100, height=900) -> NotebookPage. With `cells` (a list of sources) the
                notebook is written first; without, it must exist in the copy. Every page is closed after its test.
Both skip where there is no Chromium or no playwright. The browser is closed before the tests of other folders go on:
playwright keeps an event loop in the thread, which notebooks under nbval need for themselves.

NotebookPage
    run_all(timeout)        runs all cells, waits for the kernel to be idle, raises if anything reported an error.
    output(cell)            the same page, with everything below confined to the outputs of one cell, counted from 0.
    control(name, nth=0)    the focusable element of the control whose description is `name` (a slider's handle, a
                            dropdown, an input), or the button with that text. A playwright Locator.
    click(name, nth=0)      a mouse click.
    press(name, key, times=1, nth=0)    keys on the focused control: ArrowRight, Enter, Space, Home ...
    choose(name, option, nth=0)         an option of a dropdown, by its text.
    fill(name, text, nth=0)             a text field, left with Tab.
    readout(name)           the value that stands beside a slider.
    text                    all text shown in the outputs, one string: what a reader can read. Typeset mathematics is
                            not in it (see `formulas`).
    formulas                how many formulas are typeset in the outputs now.
    locator(selector)       a playwright Locator in the outputs.
    content(selector)       what is in all elements the selector finds: an image's address, the HTML of anything else.
    wait_for_text(text)     until it shows. wait_for_match(pattern): until the regular expression finds something.
    wait_for_change(before) until `text` differs from `before`; returns the new one.
    wait_for_pictures(before, selector)     until all pictures are others than `before`, and loaded; returns the new ones.
    latency(action, text, fresh=None)       seconds from the start of `action()` until `text` shows, and everything that the
                            selector `fresh` finds is new and, if a picture, loaded; timed by the page itself.
    key_latency(name, key, text, fresh=None)    the same of a key on a control; then waits for the kernel to be idle.
    idle()                  until the kernel has nothing left to do.
    errors                  what went wrong so far: console, uncaught exceptions, errors the kernel sent (cells, callbacks).
    assert_clean()          fails with those errors if there are any.
    screenshot(path)        a picture of the notebook, or of the output. `page` is the playwright page, for everything else.

`at_once(what, seconds)` prints latencies and fails if their lower quartile is above LATENCY: a busy machine delays some
moves, a slow widget delays all of them. A machine that is slow at sums of squares in that moment as well is given longer.

To look at something without pytest: `with serve(folder, scratch) as lab, browse() as chromium:` and
`open_notebook(chromium, lab, "name.ipynb")`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from timeit import repeat
from typing import TYPE_CHECKING

import nbformat

from browser.scripts import CHANGED, CONTENT, IDLE, LOADED, READY, TEXT, WATCH

if TYPE_CHECKING:  # playwright is optional: without it the tests are skipped
    from playwright.sync_api import Browser, Locator, Page

START_SECONDS = 120  # of the server, and of the page's first paint, on a busy machine
ACTION_SECONDS = 30  # of a click or a key: a control that is not there fails the test soon
LATENCY = 0.5  # seconds from a key to the new text and pictures, where SUMS take no longer than SECONDS
SUMS, SECONDS = "sum(i * i for i in range(100_000))", 0.007  # on the two cores that the labs were timed on
PICTURES = ".widget-image"
TOKEN = "course"
SETTINGS = {  # a kernel without a question, no news from the network
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}
BENIGN = re.compile(r"ERR_INTERNET_DISCONNECTED|ERR_NAME_NOT_RESOLVED")  # without a network nothing else is wrong


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address and the folder it serves."""

    url: str
    root: Path

    def write(self, name: str, cells: Sequence[str]) -> None:
        """Write a notebook of code cells into the served folder."""
        document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        document.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(document, self.root / name)


@contextmanager
def serve(root: Path, scratch: Path) -> Iterator[Lab]:
    """JupyterLab on a free port, with every folder of its own below `scratch`; stopped when the block ends.

    Raises:
        RuntimeError: it did not answer in time; the message ends with its log.
    """
    folders = {name: scratch / name.lower() for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    environment = {f"JUPYTER_{name}": str(path) for name, path in folders.items()}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(scratch / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    environment["IPYTHONDIR"] = str(scratch / "ipython")
    for name, content in SETTINGS.items():
        path = scratch / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"]
    command += ["--allow-root", "--expose-app-in-browser"]
    log = scratch / "server.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=os.environ | environment, stdout=stream, stderr=stream)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for_server(server, f"{url}/api/status?token={TOKEN}", log)
        yield Lab(url, root)
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for_server(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer within {START_SECONDS} s; its log ends:\n{log.read_text()[-2000:]}")


@contextmanager
def browse() -> Iterator[Browser]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=flags)
        try:
            yield browser
        finally:
            browser.close()


def open_notebook(browser: Browser, lab: Lab, name: str, *, width: int = 1100, height: int = 900) -> NotebookPage:
    """A fresh page (its own context) with one notebook of the served folder and its kernel ready."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(START_SECONDS * 1000)
    notebook = NotebookPage(page)
    page.on("console", notebook.note_console)
    page.on("pageerror", lambda error: notebook.console.append(f"uncaught: {error}"))
    page.goto(f"{lab.url}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector("#jupyterlab-splash", state="detached")
    page.wait_for_selector(".jp-Notebook")
    page.evaluate("() => { if (!jupyterapp.shell.leftCollapsed) jupyterapp.shell.collapseLeft(); }")  # all width to it
    page.evaluate(READY)
    page.set_default_timeout(ACTION_SECONDS * 1000)
    return notebook


@dataclass
class NotebookPage:
    """One open notebook; see the module's docstring."""

    page: Page
    console: list[str] = field(default_factory=list)
    scope: str = ".jp-Notebook"  # a selector: what the controls, texts and pictures are looked for in

    def output(self, cell: int) -> NotebookPage:
        return replace(self, scope=f'.jp-Cell[data-windowed-list-index="{cell}"] .jp-Cell-outputWrapper')

    def note_console(self, message) -> None:
        if message.type == "error" and not BENIGN.search(message.text):
            self.console.append(f"console: {message.text}")

    def run_all(self, timeout: float = 300) -> None:
        """Run every cell and wait for the last one.

        Raises:
            AssertionError: a cell failed, or the page or the kernel reported an error.
        """
        self.page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
        self.idle(timeout)
        # Widget views and MathJax are fetched on first use.
        self.page.wait_for_load_state("networkidle", timeout=START_SECONDS * 1000)
        self.assert_clean()

    def idle(self, timeout: float = 60) -> None:
        self.page.evaluate(IDLE, timeout * 1000)
        self.page.wait_for_timeout(100)  # the page draws

    def locator(self, selector: str) -> Locator:
        return self.page.locator(self.scope).locator(selector)

    def control(self, name: str, nth: int = 0) -> Locator:
        """The focusable element of a control, by its description or a button's text."""
        labelled = self._labelled(name)
        inside = ("[role=slider]", ".ui-slider-handle", "select", "textarea", "input:not([type=hidden])")
        places = [f"{labelled} {element}:visible" for element in inside]
        return self.locator(", ".join([f"button:text-is({_quoted(name)}):visible", *places])).nth(nth)

    def click(self, name: str, nth: int = 0) -> None:
        self.idle()  # ipywidgets holds a control's new value back while the kernel is busy, but no click
        self.control(name, nth).click()

    def press(self, name: str, key: str, times: int = 1, nth: int = 0) -> None:
        if key in ("Enter", "Space"):
            self.idle()  # as in click
        self.control(name, nth).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def choose(self, name: str, option: str, nth: int = 0) -> None:
        self.control(name, nth).select_option(label=option)

    def fill(self, name: str, text: str, nth: int = 0) -> None:
        self.control(name, nth).fill(text)
        self.page.keyboard.press("Tab")

    def readout(self, name: str) -> str:
        return self.locator(f"{self._labelled(name)} .widget-readout").inner_text()

    def _labelled(self, name: str) -> str:
        return f".widget-inline-hbox:has(> .widget-label:text-is({_quoted(name)}))"

    def content(self, selector: str) -> list[str]:
        return self.page.evaluate(CONTENT, f"{self.scope} {selector}")

    @property
    def text(self) -> str:
        return self.page.evaluate(TEXT, self.scope)

    def wait_for_text(self, text: str, timeout: float = 30) -> None:
        self._until(lambda shown: text in shown, timeout, f"{text!r} did not show")

    def wait_for_match(self, pattern: str, timeout: float = 30) -> str:
        return self._until(lambda shown: re.search(pattern, shown) is not None, timeout, f"nothing matched {pattern!r}")

    def wait_for_change(self, before: str, timeout: float = 30) -> str:
        return self._until(lambda shown: shown != before, timeout, "nothing changed")

    def _until(self, holds: Callable[[str], bool], timeout: float, complaint: str) -> str:
        end = time.monotonic() + timeout
        while not holds(shown := self.text):
            if time.monotonic() > end:
                raise AssertionError(f"{complaint} within {timeout} s; the outputs say:\n{shown}\n{self.errors}")
            self.page.wait_for_timeout(50)
        return shown

    def wait_for_pictures(self, before: Sequence[str], selector: str = PICTURES, timeout: float = 30) -> list[str]:
        where = f"{self.scope} {selector}"
        fresh = f"([where, before]) => ({CHANGED})(before, ({CONTENT})(where)) && ({LOADED})(where)"
        self.page.wait_for_function(fresh, arg=[where, list(before)], timeout=timeout * 1000)
        return self.content(selector)

    def latency(self, action: Callable[[], None], text: str, fresh: str | None = None, timeout: float = 30) -> float:
        """Seconds until `text`, which must not show yet, shows and what `fresh` finds is new; timed inside the page."""
        assert text not in self.text, f"{text!r} shows already"
        found = f"{self.scope} {fresh}" if fresh else ""
        self.page.evaluate(WATCH, [self.scope, text, found, self.content(fresh) if fresh else []])
        action()
        self.wait_for_text(text, timeout)
        return self.page.wait_for_function("() => window.seen", timeout=timeout * 1000).json_value()

    def key_latency(self, name: str, key: str, text: str, fresh: str | None = None) -> float:
        self.control(name).focus()
        seconds = self.latency(lambda: self.page.keyboard.press(key), text, fresh)
        self.idle()
        return seconds

    @property
    def formulas(self) -> int:
        return self.locator(".jp-OutputArea-output mjx-container:visible").count()

    @property
    def errors(self) -> list[str]:
        return self.console + [f"kernel: {error}" for error in self.page.evaluate("() => window.kernelErrors")]

    def assert_clean(self) -> None:
        assert not self.errors, "\n".join(self.errors)

    def close(self) -> None:
        """Shut the kernel down and close the page."""
        self.page.evaluate("() => jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
        self.page.context.close()

    def screenshot(self, path: Path) -> None:
        self.page.locator(self.scope).first.screenshot(path=path)


def at_once(what: str, seconds: Sequence[float]) -> None:
    quick = quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else seconds[0]
    slower = max(1.0, min(repeat(SUMS, number=1, repeat=30)) / SECONDS)
    timed = [round(s, 3) for s in seconds]
    print(
        f"{what}: median {median(seconds):.3f} s, lower quartile {quick:.3f} s of {timed}; machine {slower:.2f} times as slow"
    )
    assert quick <= LATENCY * slower, f"{what}: {timed} s, on a machine {slower:.2f} times as slow"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a \u escape means nothing in a selector
