"""Load any decoder-only checkpoint that transformers knows: body, head and digest, from local safetensors only.

Digest: sha256 over the stored tensors in name order, each as name, str(dtype), str(shape tuple), raw bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor, nn

from trueup.errors import ModelError

HEAD_TOLERANCE = 1e-3
"""Largest relative difference between our head and the checkpoint's own forward pass before the load is refused."""
COMPANION_SUFFIXES = (".json", ".txt", ".model", ".jinja")
PUBLISHED_NAMES = ("manifest.json", "state.json")
"""Files of a published version, if the checkpoint is one."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A checkpoint in one dtype: `body(ids [B, L])` gives hidden states, `weight_VD` and the rest make the logits."""

    path: Path
    dtype: torch.dtype
    lm: Any
    body: nn.Module
    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float
    tied: bool
    bitwise: bool = False

    @property
    def vocab_size(self) -> int:
        """Rows of the head: ids below this can be scored."""
        return self.weight_VD.shape[0]

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the configuration allows, if it says."""
        return getattr(self.lm.config, "max_position_embeddings", None)

    def stored_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a published version holds: every parameter and buffer, a tied head once."""
        state: dict[str, Tensor] = dict(self.lm.state_dict())
        if self.tied:
            owner = self.lm.get_input_embeddings().weight.data_ptr()
            embedding = next(name for name, tensor in state.items() if tensor.data_ptr() == owner)
            state = {n: t for n, t in state.items() if n == embedding or t.data_ptr() != owner}
        return state


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise ModelError(
            f"model folder {path} does not exist; pass a local Hugging Face checkpoint, "
            "or make the 135M one with `trueup model smollm2 DIR`"
        )
    if not (path / "config.json").is_file():
        raise ModelError(f"model folder {path} has no config.json: not a Hugging Face checkpoint")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model folder {path} has no .safetensors file (other weight formats are not read)")
    return files


def checkpoint_dtype(path: Path) -> torch.dtype:
    """Return the dtype that config.json declares, bfloat16 if it declares none. Raises ModelError if unreadable."""
    _files(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    return getattr(torch, str(name), torch.bfloat16)


def checkpoint_digest(path: Path) -> str:
    """Digest of the tensors stored in a folder (see the top of this file), in hex. Raises ModelError if damaged."""
    digest = hashlib.sha256()
    try:
        owners = {}
        for file in _files(path):
            with safe_open(file, framework="pt") as handle:
                owners.update(dict.fromkeys(handle.keys(), file))
        for name in sorted(owners):
            with safe_open(owners[name], framework="pt") as handle:
                tensor = handle.get_tensor(name)
            for part in (name, str(tensor.dtype), str(tuple(tensor.shape))):
                digest.update(part.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    except safetensors.SafetensorError as error:
        raise ModelError(f"a weight file in {path} is damaged: {error}") from None
    return digest.hexdigest()


def companion_files(path: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """Configuration, tokenizer and the like of a checkpoint, by name: what makes weights in `dtype` one of their own.

    Raises ModelError when the folder is no checkpoint.
    """
    _files(path)
    found = {
        file.name: file.read_bytes()
        for file in sorted(path.iterdir())
        if file.is_file() and file.suffix in COMPANION_SUFFIXES and not file.name.endswith(".index.json")
    }
    config = json.loads(found["config.json"])
    config.pop("torch_dtype", None)
    found["config.json"] = json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2).encode()
    return {name: found[name] for name in found if name not in PUBLISHED_NAMES}


def load_model(path: Path, *, dtype: torch.dtype, device: str = "cpu") -> LoadedModel:
    """Load a checkpoint for scoring (evaluation mode, no gradient). Raises ModelError with what to do."""
    _files(path)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0][:200]}") from None
    lm = lm.to(device).eval().requires_grad_(False)
    output = lm.get_output_embeddings()
    if output is None or not hasattr(lm, "base_model"):
        raise ModelError(f"{path} is no decoder-only language model: {type(lm).__name__} has no output head")
    config = lm.config
    inputs = lm.get_input_embeddings()
    loaded = LoadedModel(
        path=path,
        dtype=dtype,
        lm=lm,
        body=lm.base_model,
        weight_VD=output.weight,
        bias_V=output.bias,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(getattr(config, "logit_scale", 1.0) or 1.0)
        / float(getattr(config, "logits_scaling", 1.0) or 1.0),
        tied=output.weight.data_ptr() == inputs.weight.data_ptr(),
    )
    _check_head(loaded)
    return loaded


@torch.no_grad()
def _check_head(model: LoadedModel) -> None:
    """Refuse a model whose own logits are not what body, head weight, bias, scale and soft-cap give."""
    ids = torch.arange(4, device=model.weight_VD.device)[None] % model.vocab_size
    own = model.lm(ids).logits[0].double()
    if not bool(torch.isfinite(own).all()):
        bad = [name for name, tensor in model.lm.named_parameters() if not bool(torch.isfinite(tensor).all())]
        where = f"in {bad[0]} ({len(bad)} tensors)" if bad else f"in the forward pass at {model.dtype}"
        raise ModelError(f"the logits of {model.path} are not finite: NaN or infinity {where}")
    ours = model.body(ids).last_hidden_state[0].double() @ model.weight_VD.double().T
    if model.bias_V is not None:
        ours += model.bias_V.double()
    ours *= model.logit_scale
    if model.softcap is not None:
        ours = model.softcap * torch.tanh(ours / model.softcap)
    gap = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-6))
    if not gap < (HEAD_TOLERANCE if model.dtype != torch.bfloat16 else 30 * HEAD_TOLERANCE):
        raise ModelError(
            f"{type(model.lm).__name__} does something to its logits that trueup does not know (relative difference "
            f"{gap:.1e}); its logprobs would not be the trainer's"
        )
