"""A vLLM plugin: an fp32 head for 0.18.1, which refuses `head_dtype` for generation, and two mends for CPUs.

This file is copied alone into vLLM's environment, so it imports nothing of trueup. With `--additional-config
'{"trueup_fp32_head": true}'` logits are float32 hidden states times a float32 copy of the head, tied or not. The copy
is made at the first use and thrown away whenever weights are loaded or reloaded.

On a CPU vLLM's scheduler and worker wait for each other in a loop around `sched_yield`. On Linux 6.18 everybody else
was then runnable and not run, for up to 40 s: a trainer beside a busy engine stands still. They sleep instead, as vLLM
has them do on Pythons older than 3.11.1.

Linux lets a process use the tile registers of Intel's AMX only once it has asked. oneDNN asks before its first matmul
in bfloat16; vLLM's own kernels, which small layers and attention use, do not. A worker whose first bfloat16 kernel
was one of vLLM's died of an illegal instruction, so the plugin asks.
"""

from __future__ import annotations

import time
from typing import Any

SWITCH = "trueup_fp32_head"
WITHOUT_FP32_HEAD = "0.18."
"""Versions whose own head has no float32 for generation."""
COPY = "_trueup_fp32_weight"


def register() -> None:
    """vLLM's entry point, called in each of its processes, of some more than once."""
    from vllm import __version__

    _share_the_cpu()
    _ask_for_tiles()
    if __version__.startswith(WITHOUT_FP32_HEAD):
        _wrap_head()


def _share_the_cpu() -> None:
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        shm_broadcast.sched_yield = lambda: time.sleep(0)


def _ask_for_tiles() -> None:
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()


def _wrap_head() -> None:
    """Wrap the head where it was asked for; one that is quantised raises NotImplementedError when first used."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(LogitsProcessor, "_trueup_wrapped", False):
        return
    made, plain_logits = LogitsProcessor.__init__, LogitsProcessor._get_logits
    processed, reloaded = UnquantizedEmbeddingMethod.process_weights_after_loading, GPUModelRunner.reload_weights

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        config = get_current_vllm_config().additional_config
        self._trueup_fp32 = isinstance(config, dict) and bool(config.get(SWITCH))

    def logits(self: Any, hidden_states: Any, lm_head: Any, embedding_bias: Any) -> Any:
        if not self._trueup_fp32:
            return plain_logits(self, hidden_states, lm_head, embedding_bias)
        if type(lm_head.quant_method) is not UnquantizedEmbeddingMethod:
            raise NotImplementedError(f"{SWITCH}: a head quantised by {type(lm_head.quant_method).__name__}")
        weight_VD = getattr(lm_head, COPY, None)
        if weight_VD is None:
            weight_VD = lm_head.weight.detach().float()
            object.__setattr__(lm_head, COPY, weight_VD)
        bias_V = None if embedding_bias is None else embedding_bias.float()
        logits_BV = self._gather_logits(_linear(hidden_states.float(), weight_VD, bias_V))
        return None if logits_BV is None else logits_BV[..., : self.org_vocab_size]

    def process(self: Any, layer: Any) -> None:
        processed(self, layer)
        _forget(layer)

    def reload(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return reloaded(self, *args, **kwargs)
        finally:
            for module in self.get_model().modules():
                _forget(module)

    LogitsProcessor.__init__, LogitsProcessor._get_logits = initialise, logits
    UnquantizedEmbeddingMethod.process_weights_after_loading = process
    GPUModelRunner.reload_weights = reload
    LogitsProcessor._trueup_wrapped = True


def _linear(hidden: Any, weight: Any, bias: Any) -> Any:
    from torch.nn.functional import linear

    return linear(hidden, weight, bias)


def _forget(module: Any) -> None:
    module.__dict__.pop(COPY, None)
