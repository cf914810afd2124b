"""IMDb's reviews, from a folder of parquet files or the hub."""

from __future__ import annotations

import re
from pathlib import Path

SPLITS = ("train", "test", "unsupervised")


def clean_review(text: str) -> str:
    """Return a review with its HTML line breaks as newlines and no white space around it."""
    return re.sub(r"\s*(?:<br\s*/?>\s*)+", "\n", text).strip()


def load_imdb(source: str | None) -> dict[str, dict[str, list]]:
    """Load IMDb as {split: {"text": [...], "label": [...]}}.

    Args:
        source: folder with SPLITS as parquet files (columns text, label), or None for the hub's `stanfordnlp/imdb`.
    """
    from datasets import load_dataset

    if source is None:
        data = load_dataset("stanfordnlp/imdb")
    else:
        files = {split: str(Path(source) / f"{split}.parquet") for split in SPLITS}
        if missing := [path for path in files.values() if not Path(path).is_file()]:
            raise FileNotFoundError(f"--imdb {source}: {', '.join(missing)} not found; each split has a parquet file")
        data = load_dataset("parquet", data_files=files)
    found = {split: data[split] for split in SPLITS}
    return {
        split: {"text": list(map(clean_review, table["text"])), "label": list(table["label"])}
        for split, table in found.items()
    }
