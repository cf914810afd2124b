"""accelerate, set up by a run's settings alone: neither the environment nor an earlier run in the process has a say."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from tpo_lib.config import TrainConfig
from tpo_lib.models import choose_device, choose_precision
from tpo_lib.runs.processes import Processes, tell
from tpo_lib.runs.trackers import check_tracker

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
PATIENCE = timedelta(hours=2)  # the others wait while the main process samples pairs, or writes a large checkpoint


@contextmanager
def accelerated(config: TrainConfig) -> Iterator[Processes]:
    """accelerate, set up by the run's settings alone; afterwards the process finds accelerate as it left it.

    Raises:
        ValueError: it is set to another device, to shard the weights otherwise than by FSDP2 (DeepSpeed, Megatron, tensor or
            context parallelism), or to what a sharded run cannot keep to: it has a folder, for its model is nowhere else.
        ModuleNotFoundError, ValueError: as `check_tracker`.
    """
    check_tracker(config)
    device = choose_device(config.device)
    precision = choose_precision(device, config.precision)
    # it takes from the environment what it is not told
    settings = {"GRADIENT_ACCUMULATION_STEPS": "1", "MIXED_PRECISION": precision, "DYNAMO_BACKEND": "no"}
    for name, used in settings.items():
        value = os.environ.get(f"ACCELERATE_{name}", used)
        if value.lower() != used:
            told = f"ACCELERATE_{name}={value} is not used: the run's own settings decide (--accumulation, --precision)"
            tell(told, file=sys.stderr)
    # it keeps its settings in the process, where no second Accelerator may change them
    states = (PartialState, AcceleratorState, GradientState)
    before = [(state, dict(state._shared_state)) for state in states]
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    accelerator = None
    try:
        for state in states:
            state._reset_state()
        accelerator = Processes(
            mixed_precision=precision,
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=device.type == "cpu",
            log_with=config.report_to,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        _check_accelerator(accelerator, device)
        if accelerator.sharded and config.output_dir is None:
            raise ValueError("a sharded run leaves its model in a folder alone, where it is whole: name an output_dir")
        yield accelerator
        if accelerator.use_distributed and not grouped:
            atexit.register(torch.distributed.destroy_process_group)  # not now: a launcher's group is made only once
    finally:
        for tracker in accelerator.trackers if accelerator else ():
            tracker.finish()
        for state, values in before:
            state._shared_state.clear()
            state._shared_state.update(values)


def _check_accelerator(accelerator: Processes, device: torch.device) -> None:
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None or (accelerator.distributed_type in SHARDED and not accelerator.sharded):
        raise ValueError(
            f"accelerate is set to {parallelism or accelerator.distributed_type.value}, which shards the weights in a way that "
            "checkpoints do not gather: launch with configs/accelerate/fsdp2.yaml, or with --multi_gpu (a whole copy per "
            "process) and --lora-rank if that does not fit"
        )
    found = accelerator.device
    if found.type != device.type or device.index not in (None, found.index or 0):
        raise ValueError(
            f"the run is on device {device}, accelerate on {found}: unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, and "
            "choose among several GPUs by CUDA_VISIBLE_DEVICES"
        )
