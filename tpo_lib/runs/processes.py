"""Several processes: whole copies of the models (DDP), or their shards (FSDP2), behind the same few calls.

With FSDP2 every process keeps 1/n of each weight, of its gradient and of its optimizer state. A layer is whole while it
computes; the embeddings, the last norm and the head are whole from the beginning of `PairScorer.forward`, which reads the head's
weight, to the end of the backward pass. Files are written from whole weights and read into any number of processes.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from tpo_lib.config import TrainConfig
from tpo_lib.fast import FastPath
from tpo_lib.models import ResponseReader, choose_device
from tpo_lib.types import PairBatch, Reading

HALF = {"bf16": torch.bfloat16}


def sharding() -> bool:
    """Whether `accelerate launch` was told to shard."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def load_device(config: TrainConfig) -> torch.device:
    """Where models are loaded: on the run's device, but on the CPU what is to be cut there into shards."""
    return torch.device("cpu") if sharding() else choose_device(config.device)


def first() -> bool:
    """Whether this is the first of the processes that were launched, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def tell(*words, file=None) -> None:
    """Print, in the first process alone."""
    if first():
        print(*words, file=file or sys.stdout)


def check_shards(config: TrainConfig, fast: FastPath, callbacks: Sequence) -> None:
    """Raise ValueError where something does not go with weights in shards."""
    refused = {
        "max_tokens (--max-tokens), processes would make different numbers of passes": config.max_tokens,
        "cache_dir (--cache-dir), one process would read a model of which it has a shard": fast.cache_dir,
        "callbacks, they would be given a shard of the policy": callbacks,
    }
    for words, given in refused.items():
        if given:
            raise ValueError(
                f"weights are in shards (FSDP2), and with {words}: leave that out, or train whole copies "
                "(configs/accelerate/ddp.yaml)"
            )


class Processes(Accelerator):
    """accelerate, with what it leaves open: a loop that reads a head, frozen models, and files that do not know of shards."""

    def __init__(self, *, mixed_precision: str, **settings) -> None:
        plugin = _fsdp2(mixed_precision) if sharding() else None
        super().__init__(mixed_precision=mixed_precision, fsdp_plugin=plugin, **settings)
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on GPUs alone, and would train whole copies here without a word
            self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # accelerate reads it again
        self.sharded = plugin is not None and self.distributed_type == DistributedType.FSDP  # else: one process
        self._named = plugin and plugin.transformer_cls_names_to_wrap

    def prepare(self, scorer, optimizer):
        """The policy with its objective, and its optimizer, as the loop uses them."""
        if self.sharded:
            self._find_layers(scorer.policy)
            self._skeleton = _skeleton(scorer.policy.model) if self.is_main_process else None
        return super().prepare(scorer, optimizer)

    def place(self, reader: ResponseReader) -> Callable[[PairBatch], Reading]:
        """A frozen model where it computes: on the device, or in shards."""
        if not self.sharded:
            return reader.to(self.device)
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        self._find_layers(reader)
        reader = fsdp2_prepare_model(self, reader.requires_grad_(False))
        reader.set_reshard_after_forward(False, recurse=False)  # its head is read when its forward is over
        return reader.__call__  # no module: where it is, it stays

    def _find_layers(self, reader: ResponseReader) -> None:
        """Name the layers that are gathered one by one: those that transformers never splits between devices."""
        inner = reader.model.get_base_model() if hasattr(reader.model, "get_base_model") else reader.model
        known = self._named or getattr(inner, "_no_split_modules", None) or ()
        here = sorted(set(known) & {type(module).__name__ for module in inner.modules()})
        if not here:
            raise ValueError(
                f"{type(inner).__name__} has no layers that are known to stay whole, so that it cannot be sharded by layers: "
                "name their class as fsdp_transformer_layer_cls_to_wrap, or train whole copies (configs/accelerate/ddp.yaml)"
            )
        self.state.fsdp_plugin.transformer_cls_names_to_wrap = here
        reader.mostly_full = 0.0  # every process gathers as often as the others, whatever its batch

    def autocast(self, *args, **settings):
        """Nothing where weights come in the short type: autocast would keep a copy of each beside its shards."""
        return nullcontext() if self.sharded else super().autocast(*args, **settings)

    def no_sync(self, model):
        """Of shards nothing: gradients that wait for the last pass of an update would be whole ones."""
        return nullcontext() if self.sharded else super().no_sync(model)

    def whole(self, policy):
        """The policy with whole weights: itself; of shards a copy on the CPU of the main process, None on the others.

        All processes must ask.
        """
        if not self.sharded:
            return policy
        made: dict[int, Tensor | None] = {}  # tied weights stay one
        state = policy.state_dict(keep_vars=True)  # of shards, whatever was gathered: it cuts that again
        for value in state.values():
            if id(value) not in made:
                full = self._gathered(value)
                parameter = full is not None and isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(full, value.requires_grad) if parameter else full
        if not self.is_main_process:
            return None
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict({name: made[id(value)] for name, value in state.items()}, assign=True)
        return model

    def whole_state(self, optimizer) -> dict:
        """The optimizer's state as one process would have it; of shards, the others than the main process have it empty."""
        state = optimizer.state_dict()
        if not self.sharded:
            return state
        entries = {i: {name: self._gathered(v) for name, v in entry.items()} for i, entry in state["state"].items()}
        return state | {"state": entries}

    def load_state(self, optimizer, state: dict) -> None:
        """Give the optimizer a state that `whole_state` made, in however many processes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def placed(value, parameter):
            if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
                return value  # the number of updates is every process's own
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

        entries = {
            i: {name: placed(value, parameters[i]) for name, value in entry.items()}
            for i, entry in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": entries})

    def _gathered(self, value: Tensor) -> Tensor | None:
        full = value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach()
        return full.cpu() if self.is_main_process else None


def _fsdp2(precision: str) -> FullyShardedDataParallelPlugin:
    """accelerate's settings of FSDP2, as the launcher gave them; ValueError where a run cannot keep to them."""
    plugin = FullyShardedDataParallelPlugin()
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "accelerate is set to FSDP, version 1, which flattens the weights: launch with fsdp_version: 2 "
            "(configs/accelerate/fsdp2.yaml), or a whole copy per process (ddp.yaml), with --lora-rank if that does not fit"
        )
    wrap = getattr(plugin.auto_wrap_policy, "__name__", None)
    refused = {
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": wrap != "transformer_auto_wrap_policy",  # else: all at once
        "fsdp_cpu_ram_efficient_loading: false": plugin.cpu_ram_efficient_loading,  # the others have no weights to check
        "fsdp_activation_checkpointing: false (--checkpointing does it)": plugin.activation_checkpointing,
        "fsdp_offload_params: false": type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
    }
    if needed := [setting for setting, bad in refused.items() if bad]:
        raise ValueError(f"of FSDP2, runs here take {', '.join(needed)} alone; see configs/accelerate/fsdp2.yaml")
    if precision == "fp16":
        raise ValueError("fp16 scales its losses, which is not done over shards here: take --precision bf16 or no")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # weights travel and compute in the short type; gradients are added up in float32, and numbers of the batch stay as they are
    policy = MixedPrecisionPolicy(HALF.get(precision), torch.float32, cast_forward_inputs=False)
    plugin.mixed_precision_policy = policy
    return plugin


def _skeleton(model):
    """The model without its weights."""
    kept = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, kept | {id(b): b.detach().cpu().clone() for b in model.buffers()})
