"""`python -m tpo_lib`: see cli.py."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends with one line too."""

    def leave(number, frame) -> None:
        os.write(2, b"interrupted before anything was done\n")
        os._exit(130)  # an exception would surface in the midst of torch's import, as whatever that makes of it

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else somebody has decided otherwise: nohup, say
        signal.signal(signal.SIGINT, leave)
    from tpo_lib import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
