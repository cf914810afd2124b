"""Policies, references and guides: loading, freezing, LoRA, and reading them at response positions only.

Models are loaded from safetensors alone, remote code is never run, and dropout is off everywhere: a policy with dropout
would differ from its reference before the first step.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpo_lib import prefix, stats
from tpo_lib.fused import Head, Reading
from tpo_lib.types import IGNORE

MOSTLY_FULL = 0.9  # reading by quarters saves less than a tenth of the positions: not worth four calls
POCKET = Path(__file__).resolve().parents[1] / "data" / "pocket"


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device, or the best one here: CUDA, then MPS, then CPU."""
    if name is not None:
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, name: str | None = None) -> str:
    """Return "no", "bf16" or "fp16" for accelerate: bf16 on GPUs that have it, fp16 on older ones, float32 elsewhere.

    Raises:
        ValueError: fp16 is asked for on a device other than CUDA (gradients would need a loss scaler that exists there only).
    """
    if name is not None:
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"precision fp16 needs a CUDA device, this run is on {device}; use bf16 or no")
        return name
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def explain_missing(kind: str, name: str | Path, error: Exception) -> OSError:
    """An error for a model, tokenizer or data set that could not be loaded: what is missing and what works without it."""
    return OSError(
        f"{kind} {str(name)!r} could not be loaded: it is not a local folder with safetensors weights, and the hub gave no "
        f"such thing ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check the name and the network, pass a "
        "local folder, or use --preset pocket, which needs no download."
    )


def _resolve(name: str | Path) -> str | Path:
    """The folder of a training run stands for its final model."""
    final = Path(name) / "final"
    return final if final.is_dir() and not (Path(name) / "config.json").exists() else name


def load_tokenizer(name: str | Path):
    """Load a tokenizer from a folder or the hub; one without a pad token pads with EOS.

    Raises:
        OSError: it cannot be found; the message names `--preset pocket`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(_resolve(name)))
    except (OSError, ValueError) as error:
        raise explain_missing("tokenizer", name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Load a causal language model from a folder or the hub, in eval mode (gradients flow, dropout does not act).

    Weights are kept in `dtype`; train in float32 and let accelerate's autocast use the shorter type.

    Raises:
        OSError: it cannot be found, or has no safetensors weights; the message names `--preset pocket`.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(_resolve(name)), dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise explain_missing("model", name, error) from error
    return model.to(device).eval()


def frozen_copy(model):
    """Return a copy that no gradient reaches: the reference of a policy, or the guide after its training."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def add_lora(model, rank: int):
    """Wrap a model so that only low-rank adapters of its linear layers are trained (extra `peft`).

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"--lora-rank {rank} needs peft: pip install -e '.[peft]'") from error
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of all weights: equal if and only if the models are."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_content(tokenizer) -> Any:
    """What decides how a tokenizer encodes, as JSON takes it; padding and truncation, which calls set, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return [content, tokenizer.special_tokens_map]


class ResponseReader(nn.Module):
    """A causal language model whose forward reads response positions only: their hidden states, and the head for them.

    Most positions of a padded batch are prompt or padding; skipping the head there is exact and saves its largest matrix
    product. It is one module with one forward, so wrappers such as DistributedDataParallel see everything that runs.

    What a model does to its logits after the head is read from its config (Gemma 2 caps them, Cohere and Granite scale
    them) and then tried on four tokens. Where that does not give the model's own logits, `understood` is False and the
    model's full forward is used.

    With `share_prefix` a pair is read as one sequence with one prompt (prefix.py), which pays where prompts are long.
    """

    def __init__(self, model, *, share_prefix: bool = False):
        super().__init__()
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT adapters live inside it
        self._parts = (
            inner.base_model,
            inner.get_output_embeddings(),
        )  # a tuple: no weight is registered a second time
        config = inner.config
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.understood = self._probe()
        self.share_prefix = share_prefix and self._check_sharing()

    @property
    def head(self) -> Head:
        """The head as it is now (a sharded model gathers its weight for the forward pass)."""
        layer = self._parts[1]
        return Head(layer.weight, layer.bias, self._scale, self._softcap)

    @torch.no_grad()
    def _probe(self) -> bool:
        body, layer = self._parts
        if body is self.model or type(layer) is not nn.Linear:
            return False
        ids = torch.arange(4, device=self.model.device)[None]
        expected = self.model(input_ids=ids, use_cache=False)["logits"].float()
        found = self.head.logits(body(input_ids=ids, use_cache=False)[0]).float()
        tolerance = 16 * torch.finfo(layer.weight.dtype).eps
        return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())

    @torch.no_grad()
    def _check_sharing(self) -> bool:
        """Whether this architecture gives the same hidden states when the two responses of a pair share their prompt.

        Raises:
            ValueError: it does not.
        """
        ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 6, 7]], device=self.model.device)
        mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], device=self.model.device)
        labels = ids.masked_fill(mask == 0, IGNORE).index_fill(1, torch.tensor([0, 1], device=ids.device), IGNORE)
        plain = self._states(ids, mask)
        try:
            shared = prefix.shared_states(self._parts[0], ids, mask, labels)
            same = self.understood and torch.allclose(plain[mask == 1], shared[mask == 1], rtol=1e-3, atol=1e-3)
        except (TypeError, ValueError, RuntimeError) as error:
            same, reason = False, f"{type(error).__name__}: {error}"
        else:
            reason = "its hidden states come out different"
        if not same:
            raise ValueError(
                f"share_prefix does not work with {type(self.model).__name__} ({reason}); train without it"
            )
        return True

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Reading:
        """Read the R positions of `stats.response_mask(labels)`, in its order.

        Args:
            input_ids, attention_mask, labels: (N, T) int64, as in PairBatch.
        """
        mask = stats.response_mask(labels)  # (N, T-1)
        if not self.understood:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return Reading(output["logits"][:, :-1][mask], None)
        if self.share_prefix:
            states = prefix.shared_states(self._parts[0], input_ids, attention_mask, labels)
        else:
            states = self._states(input_ids, attention_mask)
        return Reading(states[:, :-1][mask], self.head)

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(N, T, d) hidden states; on a CPU, much padded batches are read in quarters of similar length."""
        body, (n, t) = self._parts[0], input_ids.shape
        lengths = attention_mask.sum(1)
        order = lengths.argsort()
        groups = order.split(-(-n // 4)) if input_ids.device.type == "cpu" else (order,)
        if len(groups) == 1 or sum(len(g) * lengths[g].max() for g in groups) > MOSTLY_FULL * n * t:
            return body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        parts = []
        for rows in groups:
            longest = int(lengths[rows].max())
            states = body(
                input_ids=input_ids[rows, :longest], attention_mask=attention_mask[rows, :longest], use_cache=False
            )[0]
            parts.append(nn.functional.pad(states, (0, 0, 0, t - longest)))  # (group, T, d)
        return torch.cat(parts)[order.argsort()]
