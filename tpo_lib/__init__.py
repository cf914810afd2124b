"""Token-level preference optimization: DPO, TDPO and TGDPO, derived, checked and trained.

Data flows one way: pairs -> PairBatch -> TokenStats -> LossOutput -> update -> metrics -> figures. `__all__` below lists what
you need for it, in that order; nothing is imported before it is used.

>>> import tpo_lib
>>> tpo_lib.TrainConfig(loss_type="tdpo2").hyperparameters()
{'beta': 0.1, 'alpha': 0.5}
"""

import sys
from importlib import import_module

if sys.platform == "win32":
    raise ImportError(
        "tpo_lib needs Linux or macOS: on Windows install WSL 2 and clone the repository there (docs/commands.md)"
    )

__version__ = "0.2.0"

_HOME = {  # module: what it gives
    "files.load": ("load_model", "load_tokenizer"),
    "models": ("frozen_copy",),
    "rewards": ("load_reward",),
    "runs.prompts": ("sample_prompts",),
    "sampling": ("generate",),
    "pairing": ("build_pairs",),
    "files.pairs": ("save_pairs", "load_pairs"),
    "data": ("encode_pairs", "collate"),
    "types": ("PairBatch", "TokenStats", "LossOutput"),
    "stats": ("token_stats", "split"),
    "losses": ("sft", "dpo", "tdpo1", "tdpo2", "tgdpo", "simpo", "ipo", "OBJECTIVES", "Objective", "Hyperparameter"),
    "runs.own": ("register",),
    "fast.fused": ("pair_loss",),
    "config": ("TrainConfig",),
    "runs.presets": ("PRESETS",),
    "runs.given": ("token_values",),
    "runs.run": ("fit",),
    "fast.path": ("FastPath",),
    "fast.evaluation": ("evaluate",),
    "intervals": ("bootstrap",),
    "runs.seeds": ("paired_differences",),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
__all__ = list(_MODULE)


def home(name: str) -> str:
    """The module that a name comes from.

    >>> home("fit")
    'tpo_lib.runs.run'
    """
    return f"{__name__}.{_MODULE[name]}"


def __getattr__(name: str):
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(home(name)), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
