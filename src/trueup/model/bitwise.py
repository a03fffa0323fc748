"""Bitwise mode: arithmetic in which a token's logprob has the same bits whoever computes it, and beside whom.

Matrix products choose their kernel by the number of rows, so a token's result depends on its neighbours. Here every
linear layer works in tiles of 16 rows (the product of a tile is the same whatever the other rows hold), attention in
fixed tiles (model/attention.py), and the number of rows is a multiple of 16, so that no element falls into a vector
kernel's scalar remainder. Norms, rotary embeddings and row sums need nothing: their rows do not see each other.

The equality holds between two processes with the same torch, instruction set and thread count: `arithmetic()` names
them and adds a digest of what the machine really computes; `require_same_arithmetic` compares two of them.

Shapes: T rows, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.model.attention import KEY_TILE, QUERY_TILE
from trueup.types import ROW_TILE

MAX_VECTOR_THREADS = 8
"""16 rows of 64 numbers can be dealt to this many threads in whole vectors."""


class TiledLinear(nn.Linear):
    """A linear layer whose forward product is taken 16 rows at a time; made by changing the class of an nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply to [..., D] where the number of rows is a multiple of 16."""
        return _TiledProduct.apply(input, self.weight, self.bias)


class _TiledProduct(torch.autograd.Function):
    """Tiled forward, one large backward product."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        if rows.shape[0] % ROW_TILE:
            raise ModelError(f"bitwise mode cannot run a layer on {rows.shape[0]} rows: it needs multiples of 16")
        ctx.save_for_backward(states, weight)
        ctx.biased = bias is not None
        out = torch.cat([F.linear(tile, weight, bias) for tile in rows.split(ROW_TILE)])
        return out.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_states = (grad @ weight).view(states.shape) if ctx.needs_input_grad[0] else None
        grad_weight = grad.T @ states.reshape(-1, states.shape[-1]) if ctx.needs_input_grad[1] else None
        return grad_states, grad_weight, (grad.sum(0) if ctx.biased else None)


def make_bitwise(lm: Any) -> None:
    """Turn a model's linear layers (the head excepted: it is ours) into tiled ones, in place.

    Raises ModelError when a width or the thread count would leave elements to a vector kernel's scalar remainder.
    """
    threads = torch.get_num_threads()
    if threads > MAX_VECTOR_THREADS or threads & (threads - 1):
        raise ModelError(
            f"bitwise mode needs 1, 2, 4 or 8 threads, not {threads}: other numbers split vectors between threads"
        )
    for name, module in lm.base_model.named_modules():
        if isinstance(module, nn.Linear):
            if module.out_features % ROW_TILE or module.in_features % ROW_TILE:
                raise ModelError(f"bitwise mode needs widths that are multiples of 16; {name} is {module}")
            module.__class__ = TiledLinear
    for parameter in lm.parameters():  # a checkpoint's pages are not aligned as an update's tensors are
        parameter.data = parameter.data.clone()
    vocab = lm.get_output_embeddings().weight.shape[0]
    if vocab % 64:
        raise ModelError(f"bitwise mode needs a vocabulary that is a multiple of 64, not {vocab}: pad the head")


def padded_rows(rows: int) -> int:
    """The next multiple of 16."""
    return -(-rows // ROW_TILE) * ROW_TILE


def arithmetic() -> dict[str, object]:
    """What two processes must share for their bits to be equal, with a digest of a few products and exponentials."""
    generator = torch.Generator().manual_seed(0)
    total = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(n, 576, generator=generator).to(dtype) for n in (ROW_TILE, 1536))
        product = F.linear(left, right)
        tile = torch.bmm(
            product.float().view(4, 4 * ROW_TILE, -1)[:, :, :64], product.float().view(4, 64, -1)[:, :, :64]
        )
        for value in (product.float(), tile, (product.float() / 32).exp(), F.silu(product).float(), tile.sum(1)):
            total.update(value.contiguous().numpy().tobytes())
    return {
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "row_tile": ROW_TILE,
        "attention_tiles": [QUERY_TILE, KEY_TILE],
        "probe": total.hexdigest(),
    }


def require_same_arithmetic(own: Mapping[str, object], other: Mapping[str, object] | None) -> None:
    """Raise ModelError naming what differs, because bits would."""
    if other is None:
        raise ModelError("the engine does not run in bitwise mode: start it with --bitwise")
    for key in own:
        if own[key] != other.get(key):
            raise ModelError(
                f"bitwise mode needs the same {key} on both sides: {own[key]} here, {other.get(key)} in the engine"
            )
