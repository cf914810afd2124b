"""What these trainers need of TRL, in one place: where it has moved, the import fails here first, and says what."""

from __future__ import annotations

import inspect
from importlib import metadata

KNOWN = ("1.8", "1.10", "1.14", "1.16")  # versions that were trained with
FIX = f"it is known to work with trl {', '.join(KNOWN)}: pip install 'trl=={KNOWN[-1]}.*'"

try:
    from trl import DPOConfig as DPOConfig
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import use_adapter as use_adapter
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError('tpo_lib.trl needs TRL: pip install "tpo-lib[trl]"') from error
except ImportError as error:
    raise ImportError(f"tpo_lib.trl does not find what it needs of TRL ({error}); {FIX}") from error

INPUTS = ("input_ids", "attention_mask", "completion_mask")  # of a batch, all chosen sequences first
STATE = ("_metrics", "_total_train_tokens", "ref_model", "aux_loss_enabled", "_is_vlm")  # set when a trainer is made


def check_hooks(trainer: type = DPOTrainer, collator: type = DataCollatorForPreference) -> None:
    """Raise ImportError at the first thing that is needed of TRL and not there, naming it and the versions that have it."""
    hook = getattr(trainer, "_compute_loss", None)
    taken = list(inspect.signature(hook).parameters) if hook else []
    example = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}
    batch = {name: value.tolist() for name, value in collator(pad_token_id=0)([example]).items()}
    expected = dict(zip(INPUTS, ([[1, 2, 0], [1, 3, 4]], [[1, 1, 0], [1, 1, 1]], [[0, 1, 0], [0, 1, 1]]), strict=True))
    named = "_compute_loss(self, model, inputs, return_outputs)"
    needed = {f"DPOTrainer.{named}": taken == ["self", "model", "inputs", "return_outputs"]}
    needed |= {"DPOTrainer._send_telemetry(self)": hasattr(trainer, "_send_telemetry")}
    needed |= {f"DPOTrainer.{name}, set in its __init__": name in trainer.__init__.__code__.co_names for name in STATE}
    needed |= {f"batches of {', '.join(INPUTS)}, the chosen sequences first": batch == expected}
    for what, there in needed.items():
        if not there:
            raise ImportError(f"tpo_lib.trl needs {what}, which trl {metadata.version('trl')} does not have; {FIX}")


check_hooks()
