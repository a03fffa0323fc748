"""A small policy with a tokenizer of its own, for runs of seconds: random weights, one token a character.

The head is scaled so that entropies look like a language model's and sampling settings have visible effects.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from trueup.errors import ModelError, nearest

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(c for c in string.printable if c.isprintable())
VOCAB = 128
"""A multiple of 64, so that bitwise mode can run; ids past the characters are never text."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "gemma": ("GemmaConfig", {"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
}
"""Family: transformers' configuration class and what it needs beyond SHAPE."""


def make_tiny(
    folder: Path,
    *,
    family: str = "llama",
    seed: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    **shape: int,
) -> Path:
    """Write a random policy of a model family with its tokenizer into a new or empty folder and return the folder.

    `shape` replaces entries of SHAPE; vLLM on CPU needs a `head_dim` of at least 32.

    Raises ModelError for an unknown family or entry of SHAPE, or a folder that holds something.
    """
    if family not in FAMILIES:
        raise ModelError(f"unknown family {family!r}{nearest(family, FAMILIES)}; one of {', '.join(FAMILIES)}")
    if not shape.keys() <= SHAPE.keys():
        raise ModelError(f"unknown shape {sorted(shape.keys() - SHAPE.keys())[0]!r}; one of {', '.join(SHAPE)}")
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty; name a new folder")
    import transformers

    name, extra = FAMILIES[family]
    config: Any = getattr(transformers, name)(**SHAPE | extra | shape, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    if not tied:
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
    model.to(dtype).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    raw = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
