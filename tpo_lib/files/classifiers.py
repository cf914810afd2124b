"""What a sequence classifier's configuration says: how much text fits, and which of its outputs is the score."""

from __future__ import annotations

import json
import math


def positions(model) -> float:
    """Tokens that fit into the model's positions; RoBERTa and its kin begin counting after their padding index."""
    known = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = (getattr(table, "padding_idx", None) for table in tables)
    offset = max((index + 1 for index in padding if index is not None), default=0)
    return known - offset if known and known > 0 else math.inf  # XLNet says -1: it has no limit


def reading(config, name: str) -> tuple[str, int]:
    """How the outputs become a score: the activation, as transformers' pipelines choose it, and the positive class."""
    labels = {str(label).strip().lower(): int(index) for index, label in config.id2label.items()}
    regression, single = config.problem_type == "regression", config.num_labels == 1
    if single and (regression or labels.keys() & {"label_0", "0", "score", "reward"}):
        return "none", 0
    sigmoid = single or config.problem_type == "multi_label_classification"
    activation = "none" if regression else "sigmoid" if sigmoid else "softmax"
    for known in ("positive", "pos", *(("label_1", "1") if config.num_labels == 2 else ())):
        if known in labels:
            return activation, labels[known]
    raise ValueError(
        f"classifier {name!r} has the labels {json.dumps(sorted(labels))}; none says which class is positive (positive, pos, "
        "or LABEL_1 of two): rename it in id2label of its config.json"
    )
