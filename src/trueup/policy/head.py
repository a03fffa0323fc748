"""The output head: hidden states to logits, a block at a time, so that full logits are never held.

Shapes: T tokens, D hidden width, V vocabulary, C tokens of a chunk, B vocabulary entries of a block.

*fp32 head* means that the matrix product itself runs in float32, whatever the dtype of hidden states and weight. A
*bf16 head* multiplies in bfloat16 and rounds the logits to bfloat16; taking the softmax of those in float32 afterwards
("fp32 softmax") does not bring the lost bits back. The two are never the same thing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from trueup.errors import ModelError
from trueup.types import ROW_TILE

CAST_BLOCK = 4096
"""Vocabulary rows cast at a time when the weight is not stored in the matmul's dtype."""
STREAM_BLOCK = 2048
"""Vocabulary entries reduced at a time, and the width of every product in bitwise mode."""


@functools.cache
def _instructions() -> frozenset[str]:
    """Names of this CPU's instruction sets; "other" if it is not an x86 CPU."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {"architecture": "unknown"}
    other = {"other"} if found.get("architecture") != "x86_64" else set()
    return frozenset({name for name, there in found.items() if there is True} | other)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for products in a dtype: an x86 CPU has them for 16 bits only with AMX,
    AVX512-BF16 or AVX512-FP16."""
    wanted = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}.get(dtype)
    return wanted is None or device.type != "cpu" or bool((wanted | {"other"}) & _instructions())


class HeadParts(Protocol):
    """What a loaded model offers to make a head of."""

    @property
    def weight_VD(self) -> Tensor:
        """Head weight, or the tied embedding."""
        ...

    @property
    def bias_V(self) -> Tensor | None:
        """Optional bias."""
        ...

    @property
    def softcap(self) -> float | None:
        """Optional soft-cap of the logits."""
        ...

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        ...

    @property
    def bitwise(self) -> bool:
        """Whether products are taken in tiles of rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Head:
    """Everything between the last hidden state and the logits.

    `weight_VD` may be the tied embedding; `bias_V` and `softcap` (logits become c tanh(z / c), Gemma 2, arXiv
    2408.00118, section 2) are optional; `scale` multiplies the logits before the soft-cap. `matmul_dtype` is float32
    (fp32 head), bfloat16 (bf16 head: logits rounded to bfloat16) or float64 (reference). `tiled` (bitwise mode) takes
    every product 16 rows by STREAM_BLOCK columns, so that a row's logits do not depend on its neighbours.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    matmul_dtype: torch.dtype = torch.float32
    tiled: bool = False

    @classmethod
    def of(cls, parts: HeadParts, matmul_dtype: torch.dtype) -> Head:
        """Return the head of a loaded model, multiplying in `matmul_dtype`."""
        return cls(
            weight_VD=parts.weight_VD,
            bias_V=parts.bias_V,
            softcap=parts.softcap,
            scale=parts.logit_scale,
            matmul_dtype=matmul_dtype,
            tiled=parts.bitwise,
        )

    def __post_init__(self) -> None:
        if self.weight_VD.ndim != 2:
            raise ModelError(f"head weight must be [V, D], got shape {tuple(self.weight_VD.shape)}")
        if self.bias_V is not None and self.bias_V.shape != self.weight_VD.shape[:1]:
            raise ModelError(f"head bias has shape {tuple(self.bias_V.shape)} for a vocabulary of {self.vocab_size}")
        if self.softcap is not None and self.softcap <= 0:
            raise ModelError(f"logit soft-cap must be positive, not {self.softcap}")
        if self.matmul_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ModelError(f"head matmul dtype must be bfloat16, float32 or float64, not {self.matmul_dtype}")

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight_VD.shape[0]

    @property
    def logits_dtype(self) -> torch.dtype:
        """float64 for the reference, float32 otherwise (a bf16 head's rounded logits are stored in float32)."""
        return torch.float64 if self.matmul_dtype == torch.float64 else torch.float32

    def at(self, matmul_dtype: torch.dtype) -> Head:
        """Return the same head multiplying in another dtype."""
        return replace(self, matmul_dtype=matmul_dtype)

    def weight_blocks(self, block: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, weight_BD in the matmul's dtype) over the vocabulary."""
        for start in range(0, self.vocab_size, block):
            stop = min(start + block, self.vocab_size)
            yield start, stop, self.weight_VD[start:stop].to(self.matmul_dtype)

    def finish(self, logits_CB: Tensor, start: int, stop: int) -> Tensor:
        """Add bias, scale and soft-cap in place to the products of vocabulary rows start..stop."""
        if self.bias_V is not None:
            logits_CB += self.bias_V[start:stop].to(logits_CB.dtype)
        if self.scale != 1.0:
            logits_CB *= self.scale
        if self.matmul_dtype == torch.bfloat16:
            logits_CB.copy_(logits_CB.bfloat16())
        if self.softcap is not None and self.matmul_dtype == torch.bfloat16:
            # An engine in bf16 rounds after each of the three operations; together they cost more than the product.
            logits_CB.copy_((logits_CB.bfloat16() / self.softcap).tanh() * self.softcap)
        elif self.softcap is not None:
            logits_CB.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CB

    def finish_grad(self, grad_CB: Tensor, logits_CB: Tensor) -> Tensor:
        """Turn a gradient by finished logits into one by the matmul's product, in place."""
        if self.softcap is not None:
            grad_CB *= 1 - (logits_CB / self.softcap) ** 2
        if self.scale != 1.0:
            grad_CB *= self.scale
        return grad_CB

    def product(self, hidden_CD: Tensor, weight_BD: Tensor, out: Tensor | None = None) -> Tensor:
        """Return hidden @ weight^T [C, B] in the logits dtype; both operands are in the matmul dtype already.

        A tiled head needs C to be a multiple of 16.
        """
        if self.tiled:
            product = torch.cat([torch.mm(tile, weight_BD.T) for tile in hidden_CD.split(ROW_TILE)])
            return product.to(self.logits_dtype) if out is None else out.copy_(product)
        if not multiplies(self.matmul_dtype, hidden_CD.device):  # the same numbers, ten times as fast
            product = torch.mm(hidden_CD.float(), weight_BD.float().T).to(self.matmul_dtype)
            return product.to(self.logits_dtype) if out is None else out.copy_(product)
        if self.matmul_dtype != self.logits_dtype:
            product = torch.mm(hidden_CD, weight_BD.T)
            return product.to(self.logits_dtype) if out is None else out.copy_(product)
        return torch.mm(hidden_CD, weight_BD.T, out=out)

    def logits_into(self, hidden_CD: Tensor, out_CV: Tensor) -> Tensor:
        """Fill `out_CV` (logits dtype) with the finished logits of a chunk of tokens."""
        hidden_CD = hidden_CD.to(self.matmul_dtype)
        whole = self.weight_VD.dtype == self.matmul_dtype and multiplies(self.matmul_dtype, hidden_CD.device)
        block = STREAM_BLOCK if self.tiled else self.vocab_size if whole else CAST_BLOCK
        for start, stop, weight_BD in self.weight_blocks(block):
            self.product(hidden_CD, weight_BD, out=out_CV[:, start:stop])
        return self.finish(out_CV, 0, self.vocab_size)
