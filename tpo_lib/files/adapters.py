"""PEFT adapters: fresh ones on a model that is to be trained, and finished ones merged into their base or beside it.

An adapter that a run starts from is always merged: what is loaded is a plain model, so a policy and its reference start
out equal whatever they were started from, and fresh adapters go on top of the merged weights.

Policy, reference and guide are one body in memory where two of them are adapters on the third: each is a model of its own
(`twin`) whose tensors are the same ones. Nothing is switched on or off, so each can be read at any time.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.files.folders import Source, check_weights, find

ALL_LINEAR = "all-linear"  # peft's word for it
WITHOUT_MEANING = ("base_model_name_or_path", "revision", "runtime_config", "peft_version", "inference_mode")


def _peft(who: str):
    try:
        import peft
    except ImportError as error:
        raise ImportError(f'{who} needs peft: pip install "tpo-lib[peft]"') from error
    return peft


def twin(model):
    """A second model of the very same tensors: adapters on one of the two do not change what the other computes."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def add_lora(model, rank: int, *, seed: int, alpha: float | None = None, targets: str = ALL_LINEAR):
    """Wrap a model so that only low-rank adapters of its linear layers are trained; the seed draws their first weights.

    The weights become W + alpha / rank * B A, with A of (rank, in) and B of (out, rank), which begins as zero.

    Args:
        model: its own weights are frozen, and stay what they are; `twin` spares the copy of one that is needed as it is.
        alpha: None takes 2 rank.
        targets: names of layers, or ends of their paths, with commas between; "all-linear" is all but the head.

    Raises:
        ImportError: peft is not installed.
        ValueError: the rank is above the model's width, or a target names no layer.
    """
    peft = _peft(f"--lora-rank {rank}")
    check(rank, targets, model)
    layers = targets if targets == ALL_LINEAR else names(targets)
    alpha = 2 * rank if alpha is None else alpha
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):  # adapters are drawn on the CPU; the caller's generator stays where it is
        torch.manual_seed(seed)
        policy = peft.get_peft_model(model, config)
    # the embeddings are the base's own: otherwise peft asks the hub about that at every checkpoint
    policy.save_pretrained = functools.partial(policy.save_pretrained, save_embedding_layers=False)
    return policy


def names(targets: str) -> list[str]:
    """The layers that a setting lists with commas between."""
    return [name.strip() for name in targets.split(",")]


def check(rank: int, targets: str, model) -> None:
    """Raise ValueError if adapters of this rank are no smaller than the layers they adapt, or a target is none of these."""
    width = model.config.get_text_config().hidden_size
    if rank > width:
        raise ValueError(f"--lora-rank {rank} is above the model's width of {width}, which saves nothing; take 8 or 16")
    layers = [path for path, module in model.named_modules() if getattr(module, "weight", torch.empty(0)).ndim == 2]
    for name in names(targets) if targets != ALL_LINEAR else ():
        if not any(f".{path}".endswith(f".{name}") for path in layers):
            known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in layers))
            raise ValueError(f"--lora-targets: {name!r} names no layer of {type(model).__name__}; it has {known}")


def meaning(settings: dict) -> dict:
    """What of an adapter's configuration decides what it computes: not where its base is, nor what a newer peft leaves empty."""
    empty = (None, {}, [])
    return {k: v for k, v in settings.items() if k not in WITHOUT_MEANING and v not in empty and v is not False}


def settings(source: Source, shapes: dict[str, tuple[int, ...]]):
    """The PEFT configuration of an adapter's folder, whose weights have these shapes.

    Raises:
        ValueError: the adapter is no change of weights, or says more than the installed peft, or its own file, knows of.
        ImportError: peft is not installed.
    """
    peft = _peft(f"the adapter {source.name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Unexpected keyword")  # fields that a newer peft wrote and that mean something
        config = peft.PeftConfig.from_peft_type(**meaning(source.adapter))
    if config.is_prompt_learning:
        raise ValueError(f"it is a {config.peft_type.value} adapter, which cannot be merged into weights; LoRA can")
    ranks = [getattr(config, "r", None) or 0, *(getattr(config, "rank_pattern", None) or {}).values()]
    if max(ranks) > max((n for shape in shapes.values() for n in shape), default=0):
        raise ValueError(f"its adapter_config.json has r = {max(ranks)}, its weights are smaller; one is damaged")
    config.inference_mode = True
    return config


def read(source: Source) -> tuple:
    """The PEFT configuration of an adapter's folder, and the shapes of its weights; raises as `settings`."""
    shapes = check_weights(source)
    return settings(source, shapes), shapes


def merge_into(base, source: Source, config, shapes: dict[str, tuple[int, ...]]):
    """Return `base` with an adapter merged into it; its embeddings grow first if the adapter brings larger ones.

    Raises:
        ValueError: the adapter and the base do not fit, or merging changes what they compute.
    """
    _resize(base, shapes)
    plain = merged(_adapted(base, source, config))
    plain.name_or_path = source.name  # the base that adapters on top of it will name
    return plain.requires_grad_(True)  # peft froze what it adapted


def beside(base, folder: Path):
    """The frozen model that `base` and the adapter in a folder are: it shares the base's tensors, and leaves them as they are.

    Raises:
        ValueError, OSError: the adapter does not fit the base, or cannot be read.
    """
    source = find("adapter", folder)
    model = _adapted(twin(base), source, read(source)[0])
    model.name_or_path = source.name
    return model.requires_grad_(False).eval()


def _adapted(base, source: Source, config):
    """`base` with an adapter's file laid over it, not merged."""
    peft = _peft(f"the adapter {source.name}")
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(base, config)
        result = model.load_adapter(str(source.folder), "default", torch_device=str(base.device))
    missing = [name for name in result.missing_keys if ".default" in name]  # the base's own are no part of the file
    if missing or result.unexpected_keys:
        what = f"lacks {missing[:4]}" if missing else f"has {result.unexpected_keys[:4]}, which the base lacks"
        raise ValueError(f"the adapter does not fit its base: it {what}")
    return model


def merged(model):
    """Return the plain model that a PEFT model amounts to, made of the same weights.

    Raises:
        ValueError: the two do not give the same logits (adapters on tied embeddings, or of a kind that cannot be merged).
    """
    before = _logits(model)
    try:
        plain = model.merge_and_unload()
    except (AttributeError, RuntimeError) as error:
        raise ValueError(f"its adapter cannot be merged into weights ({error})") from error
    head = plain.get_output_embeddings()
    if head is not None and head.weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = False  # each was trained on its own; they must not be tied when loaded again
    tolerance = torch.finfo(plain.dtype).eps ** 0.5
    if not stats.close(_logits(plain), before, tolerance, rtol=tolerance):
        raise ValueError("merging its adapter into the weights changes its logits; it can be used as an adapter alone")
    return plain


def whole(policy):
    """What to save of a policy so that it loads on its own: itself, or of one with adapters a merged copy (on the CPU).

    One whose adapters cannot be merged is left as it is, and said to be: it then loads only where its base is.
    """
    if not hasattr(policy, "peft_config"):
        return policy
    device = policy.device
    duplicate = copy.deepcopy(policy.cpu())  # on a GPU there may be no room for two
    policy.to(device)
    try:
        return merged(duplicate)
    except ValueError as error:
        print(f"the policy is saved as an adapter: {error}", file=sys.stderr)
        return policy


@torch.no_grad()
def _logits(model) -> Tensor:
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    return model.eval()(input_ids=ids).logits.float()


def _resize(base, shapes: dict[str, tuple[int, ...]]) -> None:
    """Give the base as many embeddings as the adapter's file has; new rows must all come from the file."""
    tables = {"input": base.get_input_embeddings(), "output": base.get_output_embeddings()}
    names = {module: f"base_model.model.{name}.weight" for name, module in base.named_modules()}
    rows = shapes.get(names[tables["input"]], (len(tables["input"].weight),))[0]
    if rows == len(tables["input"].weight):
        return
    head = tables["output"]
    if head is not None and head.weight is not tables["input"].weight and names[head] not in shapes:
        raise ValueError(f"it has {rows} input embeddings, and no output embeddings to match; save it with both")
    base.resize_token_embeddings(rows, mean_resizing=False)
