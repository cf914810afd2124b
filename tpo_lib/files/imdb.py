"""IMDb's reviews, from a folder of parquet files or the hub."""

from __future__ import annotations

import re
from pathlib import Path

SPLITS = ("train", "test", "unsupervised")


def clean_review(text: str) -> str:
    """Return a review with its HTML line breaks as newlines and no white space around it."""
    return re.sub(r"\s*(?:<br\s*/?>\s*)+", "\n", text).strip()


def load_imdb(source: str | None) -> dict[str, dict[str, list]]:
    """Load IMDb as {split: {"text": [...], "label": [...]}}, from a folder of parquet files or from the hub.

    Args:
        source: folder with train.parquet, test.parquet and unsupervised.parquet (columns text, label), or None for
            the hub data set `stanfordnlp/imdb`.
    """
    from datasets import load_dataset

    if source is None:
        data = load_dataset("stanfordnlp/imdb")
    else:
        files = {split: str(Path(source) / f"{split}.parquet") for split in SPLITS}
        missing = [path for path in files.values() if not Path(path).is_file()]
        if missing:
            raise FileNotFoundError(
                f"--imdb {source}: {', '.join(missing)} not found; expected one parquet file per split"
            )
        data = load_dataset("parquet", data_files=files)
    return {
        split: {"text": [clean_review(text) for text in data[split]["text"]], "label": list(data[split]["label"])}
        for split in SPLITS
    }
