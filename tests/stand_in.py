"""A stand-in for a GPU: a device named "stand" whose tensors compute on the CPU and refuse what tensors of a GPU refuse.

`install` registers it for good, before anything is differentiated: use it in a process of its own (apart.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps

import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "stand"
# What a GPU takes from a CPU: copies, a number without dimensions (but in lists of tensors), and positions (it copies them).
COPIES = {"aten::copy_", "aten::_to_copy"}
LISTS = {"aten::cat", "aten::stack"}
INDEXED = {"aten::index.Tensor": {1}, "aten::index_put_": {1}, "aten::_index_put_impl_": {1}}
LIBRARY = torch.library.Library("aten", "IMPL")


class WrongDevice(RuntimeError):
    """Tensors of two devices met, or a module of a model ran on the wrong one."""


class OnDevice(torch.Tensor):
    """A tensor on the device; `held`, on the CPU, has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{DEVICE}:0",
        )
        made.held = held
        return made

    def __deepcopy__(self, memo: dict):
        if id(self) not in memo:
            made = memo[id(self)] = OnDevice(self.held.detach().clone()).requires_grad_(self.requires_grad)
            vars(made).update({name: value for name, value in vars(self).items() if name != "held"})
        return memo[id(self)]

    def tolist(self):
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __repr__(self, **_):
        return f"{self.held!r} on {DEVICE}"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.name()
        _refuse_mixture(name, args, kwargs)
        target = kwargs.get("device")
        held_args, held_kwargs = tree_map_only(OnDevice, lambda t: t.held, (args, kwargs))
        if target is not None:
            held_kwargs["device"] = "cpu"
        result = operation(*held_args, **held_kwargs)
        if name == "aten::copy_":
            return args[0]
        if target is not None and torch.device(target).type == "cpu":
            return result
        known = {id(t.held): t for t in _tensors((args, kwargs)) if isinstance(t, OnDevice)}
        return tree_map_only(torch.Tensor, lambda t: known.get(id(t)) if id(t) in known else OnDevice(t), result)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _refuse_mixture(name: str, args: tuple, kwargs: dict) -> None:
    given = [arg for place, arg in enumerate(args) if place not in INDEXED.get(name, ())]
    tensors = [] if name in COPIES else _tensors((given, kwargs))
    mine = [t for t in tensors if isinstance(t, OnDevice)]
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and (t.ndim or name in LISTS)]
    if strangers:
        raise WrongDevice(f"{name}: a tensor {tuple(strangers[0].shape)} of the CPU meets the device's")
    if tensors and not mine:
        raise WrongDevice(f"{name}: a tensor of the CPU is looked up at positions on the device")
    if kwargs.get("generator") is not None:
        raise WrongDevice(f"{name}: a generator of the CPU draws for the device")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return OnDevice(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source, target, non_blocking=False):
    """What `torch.tensor(..., device=)` ends in: it goes past __torch_dispatch__."""
    target.held.copy_(getattr(source, "held", source))
    return target


class _Module:
    """What torch asks the module of a device."""

    def __getattr__(self, name: str):
        known = {"is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1}
        known |= {"_is_in_bad_fork": False, "manual_seed_all": None, "synchronize": None, "empty_cache": None}
        known["get_amp_supported_dtype"] = [torch.bfloat16]
        if name not in known:
            raise AttributeError(name)
        return lambda *_: known[name]


def install() -> None:
    """Register the device; what is told no device computes on the CPU, as everywhere."""
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
    LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
    LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # otherwise tied weights come apart on the way
    torch.nn.modules.module.register_module_forward_pre_hook(_refuse_cpu)
    with suppress(ImportError):  # an extra
        from peft.utils import save_and_load

        save_and_load.safe_load_file = _load_file
    torch.inference_mode = torch.no_grad  # a view of such a tensor is not made of a subclass


def _load_file(path, device):
    """safetensors knows no devices but its own."""
    return {name: tensor.to(device) for name, tensor in load_file(path).items()}


_watched = False


def _refuse_cpu(module, inputs) -> None:
    strangers = [n for n, p in module.named_parameters(recurse=False) if _watched and not isinstance(p, OnDevice)]
    if strangers:
        raise WrongDevice(f"{type(module).__name__} computes on the CPU: its {strangers[0]} was not moved")


@contextmanager
def watched(on: bool = True) -> Iterator[None]:
    """Within the block accelerate finds the device, and no module of a model may compute on the CPU."""
    global _watched
    before, _watched = _watched, on
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": DEVICE} if on else {}
    try:
        yield
    finally:
        _watched = before
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        os.environ |= {"ACCELERATE_TORCH_DEVICE": DEVICE} if before else {}


def unwatched(function: Callable) -> Callable:
    """The function, which is meant to compute on the CPU."""

    @wraps(function)
    def free(*args, **kwargs):
        with watched(False):
            return function(*args, **kwargs)

    return free
