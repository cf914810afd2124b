"""`python -m tpo_lib`: see cli.py."""

from tpo_lib.cli import main

if __name__ == "__main__":
    main()
