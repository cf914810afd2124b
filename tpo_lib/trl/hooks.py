"""What these trainers need of TRL, in one place: where it has moved, the import fails here first, and says what."""

from __future__ import annotations

import inspect
from importlib import metadata

KNOWN = ("1.16",)  # versions that all tests passed with

try:
    from trl import DPOConfig as DPOConfig
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import use_adapter as use_adapter
except ImportError as error:
    if error.name == "trl":
        raise ImportError('tpo_lib.trl needs TRL: pip install "tpo-lib[trl]"') from error
    raise ImportError(
        f"tpo_lib.trl was written for trl {', '.join(KNOWN)}, and the one that is installed cannot give what it needs: {error}"
    ) from error

INPUTS = {"input_ids", "attention_mask", "completion_mask"}  # of a batch, chosen sequences first
STATE = ("_metrics", "_total_train_tokens", "ref_model", "aux_loss_enabled", "_is_vlm")  # that a trainer is made with


def check_hooks(trainer: type = DPOTrainer, collator: type = DataCollatorForPreference) -> None:
    """Raise ImportError at the first thing that is needed of TRL and not there, naming it and the versions that have it."""
    taken = list(inspect.signature(getattr(trainer, "_compute_loss", lambda: None)).parameters)
    made = trainer.__init__.__code__.co_names
    example = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3, 4]}
    batch = {name: value.tolist() for name, value in collator(pad_token_id=0)([example]).items()}
    hooks = {
        "DPOTrainer._compute_loss(self, model, inputs, return_outputs)": taken
        == ["self", "model", "inputs", "return_outputs"],
        "DPOTrainer._send_telemetry(self)": hasattr(trainer, "_send_telemetry"),
        **{f"DPOTrainer.{name}, set at construction": name in made for name in STATE},
        f"a collator that gives {', '.join(sorted(INPUTS))}": batch.keys() == INPUTS,
        "batches with the chosen sequences first": batch.get("input_ids") == [[1, 2, 0], [1, 3, 4]],
        "a completion_mask of 1 on responses": batch.get("completion_mask") == [[0, 1, 0], [0, 1, 1]],
    }
    for hook, there in hooks.items():
        if not there:
            raise ImportError(
                f"tpo_lib.trl needs {hook}, which trl {metadata.version('trl')} does not have; it is known to work with trl "
                f"{', '.join(KNOWN)}: pip install 'trl=={KNOWN[-1]}.*'"
            )


check_hooks()
