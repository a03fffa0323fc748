"""A faster forward pass for Llama's kind of layer: the same weights, fewer and larger operations.

transformers' modules spend half of a small decoding step outside the matrix products. Here query, key and value are one
product, activation, gating and residual sums are done inside the products (oneDNN's post-operations, which also saves
roundings), and the weights are stored in the blocked form that those products read. Which models: FAMILIES. Whether it
computes what the modules compute is tried when it is built; anything else runs through the modules.

Shapes: T tokens of a step, D hidden width, H query heads, K key-value heads, W head width, I intermediate width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trueup.model.attention import Layout, PackedLayout, Shape
from trueup.model.load import LoadedModel

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}
"""Rms difference from the modules' states on a short sequence, relative to their rms: above rounding (SmolLM2 in bf16:
0.11 on ids chosen at random, 0.02 on text), far below what a wrong operation gives."""
TRIAL_TOKENS, TRIAL_STRIDE = 24, 7919
BLOCKED_FOR_ROWS = 64
"""Rows that the blocked form of a weight is laid out for; any number of rows may use it."""
Weights = Callable[[Tensor], Tensor]
"""From a module's parameter to the values to use for it: its own, or those of a version that is not serving yet."""


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A linear layer's weight in blocked form, with its bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weights: Weights, *linears: nn.Linear) -> _Product:
        """Several layers with one input as one product, outputs side by side."""
        weight = torch.cat([weights(linear.weight) for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([weights(linear.bias) for linear in linears])
        return cls(weight=torch.ops.mkldnn._reorder_linear_weight(weight, BLOCKED_FOR_ROWS), bias=bias)

    def __call__(self, states_TD: Tensor, *, activation: str = "none") -> Tensor:
        """The product, optionally through "swish" (SiLU)."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(states_TD, self.weight, self.bias, activation, [], "")
        return result

    def with_other(self, states_TD: Tensor, other: Tensor, operation: str) -> Tensor:
        """The product "add"ed to or "mul"tiplied with another tensor."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(states_TD, other, self.weight, self.bias, operation)
        return result


@dataclass(frozen=True, kw_only=True)
class _Norm:
    """RMSNorm, rounded once at its end."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, weights: Weights, module: Any) -> _Norm:
        """Of a module with `weight` and `variance_epsilon`."""
        return cls(weight=weights(module.weight).float(), eps=module.variance_epsilon)

    def __call__(self, states: Tensor) -> Tensor:
        """Normalise the last dimension, in float32."""
        wide = states.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.mul_(1 / wide.shape[-1]).add_(self.eps).rsqrt_()
        return (wide * scale).mul_(self.weight).to(states.dtype)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One decoder layer."""

    query_key_value: _Product
    output: _Product
    gate: _Product
    up: _Product
    down: _Product
    input_norm: _Norm
    mlp_norm: _Norm
    query_norm: _Norm | None
    key_norm: _Norm | None
    heads: int
    key_heads: int
    shape: Shape

    @classmethod
    def of(cls, weights: Weights, layer: Any) -> _Layer:
        """Of a transformers decoder layer."""
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        return cls(
            query_key_value=_Product.of(weights, attention.q_proj, attention.k_proj, attention.v_proj),
            output=_Product.of(weights, attention.o_proj),
            gate=_Product.of(weights, mlp.gate_proj),
            up=_Product.of(weights, mlp.up_proj),
            down=_Product.of(weights, mlp.down_proj),
            input_norm=_Norm.of(weights, layer.input_layernorm),
            mlp_norm=_Norm.of(weights, layer.post_attention_layernorm),
            query_norm=_Norm.of(weights, attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_Norm.of(weights, attention.k_norm) if hasattr(attention, "k_norm") else None,
            heads=attention.q_proj.out_features // width,
            key_heads=attention.k_proj.out_features // width,
            shape=Shape(scaling=attention.scaling, window=_window(attention), softcap=None),
        )

    def __call__(self, index: int, states_TD: Tensor, cos_TW: Tensor, sin_TW: Tensor, layout: Layout) -> Tensor:
        """Run the layer over a step's tokens."""
        packed = self.query_key_value(self.input_norm(states_TD)).unflatten(1, (self.heads + 2 * self.key_heads, -1))
        value = packed[:, self.heads + self.key_heads :]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = packed.split([self.heads, self.key_heads, self.key_heads], dim=1)[:2]
            rotated = _rotate(torch.cat((self.query_norm(query), self.key_norm(key)), dim=1), cos_TW, sin_TW)
        else:
            rotated = _rotate(packed[:, : self.heads + self.key_heads], cos_TW, sin_TW)
        query, key = rotated.split([self.heads, self.key_heads], dim=1)
        attended = layout.attend(
            index, query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self.shape
        ).flatten(1)
        states_TD = self.output.with_other(attended, states_TD, "add")
        normed = self.mlp_norm(states_TD)
        gated = self.up.with_other(normed, self.gate(normed, activation="swish"), "mul")
        return self.down.with_other(gated, states_TD, "add")


def _rotate(states_THW: Tensor, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
    """Rotary embedding; the sine of the first half comes with its sign."""
    half = states_THW.shape[-1] // 2
    swapped = torch.cat((states_THW[..., half:], states_THW[..., :half]), dim=-1)
    return torch.addcmul(states_THW * cos_T1W, swapped, sin_T1W)


def _window(attention: Any) -> int | None:
    window = getattr(attention, "sliding_window", None)
    if window is None and attention.config.model_type == "mistral":
        window = getattr(attention.config, "sliding_window", None)
    return window


class FusedBody:
    """The body of a supported model under one set of weights; every version gets one of its own."""

    @torch.no_grad()
    def __init__(self, model: LoadedModel, weights: Weights = torch.detach) -> None:
        body: Any = model.body
        self.embedding = weights(body.embed_tokens.weight)
        self.rotary = body.rotary_emb
        self.layers = [_Layer.of(weights, layer) for layer in body.layers]
        self.norm = _Norm.of(weights, body.norm)

    @torch.no_grad()
    def __call__(self, token_ids: Sequence[int], positions: Sequence[int], layout: Layout) -> Tensor:
        """States [T, D] of a step's tokens."""
        states_TD = F.embedding(torch.tensor(token_ids), self.embedding)
        cos, sin = self.rotary(states_TD, torch.tensor([positions]))
        half = sin.shape[-1] // 2
        sin_T1W = torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)[:, None]
        cos_T1W = cos[0, :, None]
        for index, layer in enumerate(self.layers):
            states_TD = layer(index, states_TD, cos_T1W, sin_T1W, layout)
        return self.norm(states_TD)


@torch.no_grad()
def fuse(model: LoadedModel) -> FusedBody | None:
    """Return the faster body of a policy opened with layouts, or None when it is none of FAMILIES, runs in bitwise
    mode, or does not compute what the modules compute."""
    if model.bitwise or model.lm.config.model_type not in FAMILIES or not torch.backends.mkldnn.is_available():
        return None
    if model.lm.config.hidden_act != "silu":
        return None
    fused = FusedBody(model)
    ids = [TRIAL_STRIDE * (i + 1) % model.vocab_size for i in range(TRIAL_TOKENS)]
    layout = PackedLayout(lengths=(TRIAL_TOKENS,))
    expected = model.body(torch.tensor([ids]), use_cache=False, layout=layout).last_hidden_state[0].float()
    gap = (fused(ids, range(TRIAL_TOKENS), layout).float() - expected).norm() / expected.norm()
    return fused if float(gap) < TOLERANCE.get(model.dtype, 0.0) else None
