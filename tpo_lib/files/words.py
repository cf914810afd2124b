"""Text as words: a tokenizer that no model shares, for scorers that shall not depend on a model's."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from tpo_lib.files.folders import read_settings

IDS = 2**16
MARK = {"tokenizer_class": "HashedWords"}


class HashedWords:
    """Lower-cased words as ids in [1, 65,536), by a checksum: called, counted and saved like a tokenizer. Id 0 is no word.

    Example:
        >>> HashedWords()(["It's FINE -- fine!"])["input_ids"]
        [[23894, 4925, 4925]]
    """

    def __len__(self) -> int:
        return IDS

    def __call__(self, texts: Sequence[str], **_) -> dict[str, list[list[int]]]:
        words = (re.findall(r"[\w']+", text.lower()) for text in texts)
        return {"input_ids": [[1 + zlib.crc32(word.encode()) % (IDS - 1) for word in row] for row in words]}

    def get_vocab(self) -> dict[str, int]:
        """None that could be listed, and so no model's."""
        return {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load.load_tokenizer` knows it by."""
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(MARK) + "\n")


def read_words(folder: Path) -> HashedWords | None:
    """The tokenizer that `save_pretrained` left in a folder, None where there is another or none."""
    path = folder / "tokenizer_config.json"
    return HashedWords() if path.is_file() and read_settings(path) == MARK else None
