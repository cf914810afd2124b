"""Run a chat template on the conversations of stdin, one JSON object a line: a process that may be ended at any time.

jinja's sandbox keeps a template away from files and the network, not from loops and memory. No thread could be stopped in
the middle of `10 ** 10 ** 9`, a process can. It imports nothing of the library, and starts in half a second.
"""

import faulthandler
import json
import os
import sys
import time

SECONDS = 10.0  # to begin with
PER_CHAT = 0.05  # seconds that each conversation adds; usual ones take a hundredth of it
CHARACTERS = 2**31  # written in all
MEMORY = 4 * 2**30  # bytes of address space, where the system keeps count


def main() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    from jinja2 import Environment
    from transformers.utils.chat_template_utils import render_jinja_template

    start = time.monotonic()  # behind the imports, which take longer than that on a busy machine
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # a thread that needs no lock of Python's
    given = json.loads(sys.stdin.readline())
    tokens = Environment().lex("\n".join(given["templates"]))
    written = 0
    answer([word.strip("'\"") for _, kind, word in tokens if kind in ("name", "string")])
    for number, line in enumerate(sys.stdin, start=1):
        left = SECONDS + PER_CHAT * number - (time.monotonic() - start)
        faulthandler.dump_traceback_later(max(left, 1e-3), exit=True)
        chat = json.loads(line)
        template = given["templates"]["tools" in chat]
        try:
            chats = [chat.pop("messages")]
            (text,), _ = render_jinja_template(chats, chat_template=template, **chat, **given["special"])
            written += len(text)
            if written > CHARACTERS:
                raise MemoryError
            answer({"text": text})
        except MemoryError:
            os._exit(3)  # the next conversation would take as long to fail
        except Exception as error:  # whatever a template may raise
            answer({"error": f"{type(error).__name__}: {error}"[:300]})


def answer(value) -> None:
    """Write a line at once: its number tells which conversation a template was stopped at."""
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
