"""Rotary tables, got wrong: another base, another scaling, or none, in all layers or in those of one type.

transformers computes a table from `rope_parameters` of the configuration; this file does so from other parameters.
The change lasts as long as the ExitStack that it is entered into.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trueup.errors import ModelError
from trueup.model.load import LoadedModel

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""As in Llama 3.1's own configuration."""
Parameters = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of frequencies of a module; `layers` is the type of layer that reads it, "" where there is one only."""

    module: nn.Module
    layers: str
    inv_freq: Tensor
    parameters: Parameters

    @property
    def prefix(self) -> str:
        """What the names of its attributes begin with."""
        return f"{self.layers}_" if self.layers else ""


def tables(model: LoadedModel) -> list[Table]:
    """Every rotary table of a model. Raises ModelError when there is none that is known."""
    declared = getattr(model.lm.config, "rope_parameters", None) or {}
    found = []
    for module in model.body.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                layers = name.removesuffix("inv_freq").removesuffix("_")
                own = declared.get(layers, declared) if layers else declared
                found.append(Table(module=module, layers=layers, inv_freq=buffer, parameters=dict(own or {})))
    if not found:
        raise ModelError(f"{type(model.lm).__name__} has no rotary table that the simulation knows")
    return found


def _chosen(model: LoadedModel, layers: str) -> list[Table]:
    found = [t for t in tables(model) if not layers or t.layers == layers]
    if not found:
        raise ModelError(f"{type(model.lm).__name__} has no rotary table for {layers} layers")
    return found


def replace_tables(model: LoadedModel, stack: ExitStack, change: Callable[[Tensor], Tensor], layers: str = "") -> None:
    """Replace the frequencies themselves."""
    for table in _chosen(model, layers):
        name = f"{table.prefix}inv_freq"
        stack.callback(setattr, table.module, name, table.inv_freq)
        setattr(table.module, name, change(table.inv_freq))


def compute_tables(
    model: LoadedModel, stack: ExitStack, parameters: Callable[[Table], Mapping[str, object]], layers: str = ""
) -> None:
    """Compute tables from other rope parameters. Raises ModelError for parameters that transformers does not take."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for table in _chosen(model, layers):
        wanted = dict(parameters(table))
        kind = str(wanted.get("rope_type") or wanted.get("type") or "default")
        config = copy.deepcopy(model.lm.config)
        config.rope_parameters = wanted | {"rope_type": kind}
        try:
            if kind == "default":
                exponent = torch.arange(len(table.inv_freq), dtype=torch.float64) / len(table.inv_freq)
                inv_freq, scaling = float(str(wanted["rope_theta"])) ** -exponent, 1.0
            else:
                inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, table.inv_freq.device)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ModelError(f"rope parameters {json.dumps(wanted, default=str)[:200]}: {error!r}") from None
        if inv_freq.shape != table.inv_freq.shape:
            raise ModelError(f"rope type {kind} gives {len(inv_freq)} frequencies, the model has {len(table.inv_freq)}")
        for name, value in (("inv_freq", inv_freq.to(table.inv_freq)), ("attention_scaling", scaling)):
            name = f"{table.prefix}{name}"
            stack.callback(setattr, table.module, name, getattr(table.module, name))
            setattr(table.module, name, value)


def rope_theta(model: LoadedModel, stack: ExitStack, theta: float, layers: str = "") -> None:
    """Rotary frequencies theta^(-2i/d) of another base (RoFormer, arXiv 2104.09864, equation 15)."""
    compute_tables(model, stack, lambda table: table.parameters | {"rope_theta": theta}, layers)


def rope_linear(model: LoadedModel, stack: ExitStack, factor: float, layers: str = "") -> None:
    """Positions divided by a factor (position interpolation, arXiv 2306.15595)."""
    replace_tables(model, stack, lambda table: table / factor, layers)


def rope_dummy(model: LoadedModel, stack: ExitStack, value: float, layers: str = "") -> None:
    """A rotary table that was never computed: one value everywhere."""
    replace_tables(model, stack, lambda table: torch.full_like(table, value), layers)


def _base(table: Table) -> Parameters:
    return {"rope_theta": table.parameters.get("rope_theta", 10_000.0)}


def rope_unscaled(model: LoadedModel, stack: ExitStack, unused: float, layers: str = "") -> None:
    """The base alone, without the scaling that the configuration asks for."""
    compute_tables(model, stack, _base, layers)


def _original(model: LoadedModel, table: Table) -> Parameters:
    own = table.parameters.get("original_max_position_embeddings")
    return {"original_max_position_embeddings": own or model.max_positions or 4096}


def rope_yarn(model: LoadedModel, stack: ExitStack, factor: float, layers: str = "") -> None:
    """YaRN with a factor (arXiv 2309.00071), from the base and the original length of the configuration."""
    compute_tables(
        model, stack, lambda t: _base(t) | _original(model, t) | {"rope_type": "yarn", "factor": factor}, layers
    )


def rope_llama3(model: LoadedModel, stack: ExitStack, factor: float, layers: str = "") -> None:
    """Llama 3's scaling with a factor, from the base and the original length of the configuration."""
    compute_tables(
        model, stack, lambda t: _base(t) | _original(model, t) | LLAMA3 | {"rope_type": "llama3", "factor": factor},
        layers,
    )  # fmt: skip


def rope_declared(model: LoadedModel, stack: ExitStack, unused: float, declared: str = "{}") -> None:
    """The rope parameters that an engine's own flags declare, as JSON, over those of the configuration."""
    given = json.loads(declared)
    compute_tables(model, stack, lambda table: _base(table) | given.get(table.layers, given))
