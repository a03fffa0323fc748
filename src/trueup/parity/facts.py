"""What the trainer's checkpoint says of itself, as far as hypotheses start from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueup.model.load import LoadedModel

ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Properties of the checkpoint and of what was given beside it.

    `checkpoints`: labels of older weights, oldest first. `versions`: (version, label) of those whose version is
    recorded. `stamps`: the versions stamped on the tokens. `contexts`: what could have been done to the prompts.
    `rope_layers`: the types of layers that have rotary tables of their own; `rope_scaled`: whether a scaling is
    configured for any; `window`: the width of the sliding window, if layers have one. `generation`: sampling defaults
    of generation_config.json. `tensor_kinds`: last names of tensors, e.g. "q_proj", an untied head left out.
    `bf16_head`: the trainer or the engine as declared multiplies its head in bfloat16. `batch_rows`: how many rows a
    trainer had to batch, 0 where the numbers are an engine's.
    """

    checkpoints: tuple[str, ...] = ()
    versions: tuple[tuple[int, str], ...] = ()
    stamps: tuple[int, ...] = ()
    contexts: tuple[str, ...] = ()
    vocab: int = 0
    rope_theta: float = ROPE_THETA
    rope_layers: tuple[str, ...] = ()
    rope_scaled: bool = False
    window: int | None = None
    softcap: float | None = None
    eos_ids: tuple[int, ...] = ()
    generation: Mapping[str, float] = field(default_factory=dict)
    tensor_kinds: tuple[str, ...] = ()
    bf16_head: bool = False
    batch_rows: int = 0

    @property
    def stamped(self) -> bool:
        """Whether tokens carry several versions, and the weights of at least one of these are at hand."""
        return len(self.stamps) > 1 and bool(set(self.stamps) & {version for version, _ in self.versions})


def facts_of(
    model: LoadedModel,
    *,
    checkpoints: tuple[str, ...],
    versions: tuple[tuple[int, str], ...],
    stamps: tuple[int, ...],
    contexts: tuple[str, ...],
    bf16_head: bool,
    batch_rows: int,
) -> Facts:
    """Read them off a loaded checkpoint."""
    config = model.lm.config
    rope = _rope_parameters(config)
    theta = next((p["rope_theta"] for p in rope.values() if p.get("rope_theta")), None)
    eos = getattr(config, "eos_token_id", None)
    stored = model.stored_tensors().items()
    head = set() if model.tied else {n for n, t in stored if t.data_ptr() == model.weight_VD.data_ptr()}
    kinds = dict.fromkeys(_kind(name) for name, tensor in stored if tensor.ndim and name not in head)
    return Facts(
        checkpoints=checkpoints,
        versions=versions,
        stamps=stamps,
        contexts=contexts,
        vocab=model.vocab_size,
        rope_theta=float(theta or getattr(config, "rope_theta", None) or ROPE_THETA),
        rope_layers=tuple(name for name in rope if name),
        rope_scaled=any(p.get("rope_type", "default") != "default" for p in rope.values()),
        window=_window(config),
        softcap=model.softcap,
        eos_ids=tuple(eos if isinstance(eos, list) else [eos] if eos is not None else []),
        generation=generation_defaults(model.path),
        tensor_kinds=tuple(k for k in kinds if k),
        bf16_head=bf16_head,
        batch_rows=batch_rows,
    )


def _rope_parameters(config: Any) -> dict[str, dict[str, Any]]:
    """The rotary parameters by type of layer; under "" where all layers share them."""
    declared = getattr(config, "rope_parameters", None) or {}
    by_layer = {name: dict(own) for name, own in declared.items() if isinstance(own, dict)}
    return by_layer or {"": dict(declared)}


def _window(config: Any) -> int | None:
    """The width of the sliding window, None if no layer uses one."""
    width = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (layers is None or "sliding_attention" in layers)
    return int(width) if width and used else None


def _kind(name: str) -> str:
    """ "model.layers.3.self_attn.q_proj.weight" as "q_proj"."""
    parts = [p for p in name.split(".") if p not in ("weight", "bias")]
    return parts[-1] if parts else name


def generation_defaults(path: Path) -> dict[str, float]:
    """Sampling fields that generation_config.json sets; an engine may apply them where a request is silent."""
    try:
        content = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    if not isinstance(content, dict):
        return {}
    return {n: v for n in names if isinstance(v := content.get(n), int | float) and not isinstance(v, bool)}
