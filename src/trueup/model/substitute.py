"""Other weights in a loaded model, for the length of a `with` block: all of them, or those whose name matches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from trueup.errors import ModelError
from trueup.model.load import LoadedModel

EVERYTHING, HEAD, BODY = ".*", "head", "body"
"""Patterns: every tensor; the output head alone, also where it is tied to the embedding; everything but the head."""


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Load every tensor of a folder's safetensors files, whatever it was saved by. Raises ModelError."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file: name a checkpoint or a published weight version")
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as handle:
                tensors.update({name: handle.get_tensor(name).clone() for name in handle.keys()})  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ModelError(f"a weight file in {folder} is damaged: {error}") from None
    return tensors


def check_same_shapes(model: LoadedModel, tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise ModelError unless the tensors are those of the model."""
    own = {n: tuple(t.shape) for n, t in model.stored_tensors().items() if t.is_floating_point()}
    other = {n: tuple(t.shape) for n, t in tensors.items()}
    odd = sorted(n for n in own if other.get(n) != own[n])
    if odd:
        raise ModelError(f"{where} is no version of {model.path}: {odd[0]} is {other.get(odd[0])}, not {own[odd[0]]}")


def _names(model: LoadedModel, pattern: str) -> list[str]:
    """Stored tensors that a pattern names; a tied head alone is none of them."""
    stored = model.stored_tensors()
    head = [n for n, t in stored.items() if t.data_ptr() == model.weight_VD.data_ptr()]
    if pattern == HEAD:
        return [] if model.tied else head
    if pattern == BODY:
        return [n for n in stored if model.tied or n not in head]
    return [n for n in stored if re.search(pattern, n)]


def head_weight(model: LoadedModel, tensors: Mapping[str, Tensor], pattern: str) -> Tensor | None:
    """The head's weight [V, D] in the model's dtype if the pattern takes it from `tensors`, else None."""
    name = next(n for n, t in model.stored_tensors().items() if t.data_ptr() == model.weight_VD.data_ptr())
    taken = pattern == HEAD or (pattern != BODY and re.search(pattern, name))
    return tensors[name].to(model.dtype) if taken else None


@contextmanager
def substituted(model: LoadedModel, tensors: Mapping[str, Tensor], pattern: str) -> Iterator[None]:
    """Run the body with other weights; the model's own are back on every exit."""
    owners = dict(model.lm.named_parameters())
    names = [n for n in _names(model, pattern) if n in owners]
    before = {name: owners[name].data for name in names}
    try:
        with torch.no_grad():
            for name in names:
                owners[name].data = tensors[name].to(before[name])
        yield
    finally:
        for name, tensor in before.items():
            owners[name].data = tensor
