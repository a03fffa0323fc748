"""What a weight version consists of: a manifest of every tensor's name, shape, dtype and digest.

Tensor digest: sha256 of the raw bytes. Manifest digest: sha256 over the tensors in name order, each as name, dtype,
shape, digest, so that a renamed, reshaped or recast tensor is another manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trueup.errors import WeightError
from trueup.types import is_integer

SCHEMA = "trueup.weights/1"
MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
COMPLETE_FILE = "COMPLETE"
LOSSLESS = {("bfloat16", "float32"), ("float16", "float32")}
"""(stored, engine) dtypes between which a cast keeps every value."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a manifest: `dtype` without the "torch." prefix, `digest` in hex."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Every tensor of one weight version, by name."""

    version: int
    tensors: Mapping[str, TensorEntry]

    @property
    def digest(self) -> str:
        """Digest of the contents, whatever the version number (see the top of this file)."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            total.update("\x1f".join((name, entry.dtype, str(entry.shape), entry.digest, "")).encode())
        return total.hexdigest()

    def to_json(self) -> str:
        """Return the manifest as it is written beside the weights."""
        tensors = {
            name: {"shape": list(e.shape), "dtype": e.dtype, "digest": e.digest}
            for name, e in sorted(self.tensors.items())
        }
        return json.dumps({"schema": SCHEMA, "version": self.version, "digest": self.digest, "tensors": tensors})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest. Raises WeightError for anything that is not one, or whose digest is not its own."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise WeightError(f"{MANIFEST_FILE} is not valid JSON: {error}") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise WeightError(f"{MANIFEST_FILE} is no {SCHEMA} manifest")
        version, tensors = content.get("version"), content.get("tensors")
        if not (
            isinstance(version, int) and is_integer(version) and version >= 0 and isinstance(tensors, dict) and tensors
        ):
            raise WeightError(f"{MANIFEST_FILE} needs a version >= 0 and at least one tensor")
        manifest = cls(version=version, tensors={name: _entry(name, value) for name, value in tensors.items()})
        if content.get("digest") != manifest.digest:
            raise WeightError(
                f"{MANIFEST_FILE} was changed after it was written: its digest is not that of its entries"
            )
        return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSnapshot:
    """A published weight version: where it lies and what it must contain."""

    version: int
    path: Path
    manifest: Manifest


def _entry(name: str, value: Any) -> TensorEntry:
    shape = value.get("shape") if isinstance(value, dict) else None
    if not (
        isinstance(shape, list)
        and all(is_integer(n) and n >= 0 for n in shape)
        and isinstance(value.get("dtype"), str)
        and isinstance(value.get("digest"), str)
        and _DIGEST.fullmatch(value["digest"])
    ):
        raise WeightError(f"{MANIFEST_FILE}: entry {name!r} needs shape, dtype and digest")
    return TensorEntry(shape=tuple(shape), dtype=value["dtype"], digest=value["digest"])


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor's raw bytes, in hex."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return (
        hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
        if flat.numel()
        else hashlib.sha256().hexdigest()
    )


def manifest_of(version: int, tensors: Mapping[str, Tensor]) -> Manifest:
    """Describe tensors. Raises WeightError when one is not finite: such weights are never published."""
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise WeightError(f"version {version} holds NaN or infinity in {bad[0]} ({len(bad)} tensors)")
    return Manifest(
        version=version,
        tensors={
            name: TensorEntry(shape=tuple(t.shape), dtype=dtype_name(t.dtype), digest=tensor_digest(t))
            for name, t in tensors.items()
        },
    )


def check_fits_model(manifest: Manifest, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Refuse a manifest that does not hold exactly the tensors of a model, in its shapes and without loss of bits.

    `expected` maps the model's stored tensor names (a tied head is not stored) to shapes; `dtype` is the engine's.
    Raises WeightError naming the first offender and the number of them.
    """
    missing = sorted(set(expected) - set(manifest.tensors))
    if missing:
        raise WeightError(f"version {manifest.version} lacks {missing[0]} ({len(missing)} tensors missing)")
    extra = sorted(set(manifest.tensors) - set(expected))
    if extra:
        raise WeightError(f"version {manifest.version} holds {extra[0]}, which the model does not have ({len(extra)})")
    for name, shape in expected.items():
        entry = manifest.tensors[name]
        if entry.shape != tuple(shape):
            raise WeightError(f"{name} has shape {entry.shape} in version {manifest.version}, the model has {shape}")
        if entry.dtype != dtype_name(dtype) and (entry.dtype, dtype_name(dtype)) not in LOSSLESS:
            raise WeightError(
                f"{name} is stored as {entry.dtype}, the engine computes in {dtype_name(dtype)}: publish the rounded "
                "weights, so that trainer and engine hold the same values"
            )
