"""A checkpoint as vLLM is given it: a folder of links, with a tied head written out and a config both versions read.

On CPU vLLM 0.32 leaves the head of a tied model at its old weights when it reloads (the body moves), so a tied
checkpoint is served and updated as an untied one: the same numbers, the head stored as a tensor of its own.
vLLM 0.18.1 reads its configuration as transformers 4 wrote it; the fields it looks for stand beside the present ones.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open
from safetensors.torch import save_file

from trueup.errors import ModelError, WeightError

HEAD = "lm_head.weight"
WEIGHTS, HEAD_FILE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""A single file beside an index would be read alone, so it becomes the first of two."""
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING_SUFFIX = "embed_tokens.weight"
NEVER_UNTIED = ("gemma",)
"""Families whose vLLM implementation reads no head of its own, whatever the configuration says."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face folder, read without loading it: `shapes` are its stored tensors', `tied` whether it has no head
    of its own."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return HEAD not in self.shapes

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.shapes[self.embedding][0]

    @property
    def embedding(self) -> str:
        """Name of the embedding tensor. Raises ModelError when there is none."""
        found = [name for name in self.shapes if name.endswith(EMBEDDING_SUFFIX)]
        if len(found) != 1:
            raise ModelError(f"{self.path} has {len(found)} tensors called {EMBEDDING_SUFFIX}; expected one")
        return found[0]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read configuration and tensor shapes. Raises ModelError when the folder is no safetensors checkpoint."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as handle:
                shapes |= {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} is no readable Hugging Face checkpoint: {error}") from None
    if not shapes or not isinstance(config, dict):
        raise ModelError(f"{path} holds no .safetensors weights or no configuration")
    return Checkpoint(path=path, config=config, shapes=shapes)


def serve_folder(model: Checkpoint, weights: Path, target: Path, *, untie: bool = True) -> Path:
    """Make `target`, from which vLLM can start or reload: the model's configuration and tokenizer, the weights of
    the folder `weights` (links), and unless `untie` is off the tied head as a tensor.

    Raises ModelError for a tied family that vLLM cannot hold untied, WeightError when a weight file is damaged.
    """
    kind = str(model.config.get("model_type", ""))
    untie = untie and model.tied
    if untie and kind.startswith(NEVER_UNTIED):
        raise ModelError(f"{kind} is tied in vLLM whatever its checkpoint holds: it cannot be updated verifiably there")
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for file in model.path.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt", ".gguf") and file.name != INDEX_FILE:
            shutil.copy(file, target / file.name)
    names: dict[str, str] = {}
    for file in sorted(weights.glob("*.safetensors")):
        name = WEIGHTS if file.name == "model.safetensors" and untie else file.name
        (target / name).symlink_to(file.resolve())
        names |= dict.fromkeys(_names(file), name)
    if untie:
        _write_head(target, names, model.embedding)
    (target / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    _patch(target / "config.json", _config_changes(model, untied=untie))
    if (target / "tokenizer.json").is_file() and (target / "tokenizer_config.json").is_file():
        _patch(target / "tokenizer_config.json", _tokenizer_changes(target))
    return target


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightError(f"{file} is damaged: {error}") from None


def _write_head(target: Path, names: dict[str, str], embedding: str) -> None:
    if embedding not in names:
        raise WeightError(f"{embedding} is not among the weights: the head that is tied to it cannot be written")
    with safe_open(target / names[embedding], framework="pt") as handle:
        head_VD = handle.get_tensor(embedding)
    save_file({HEAD: head_VD.contiguous()}, target / HEAD_FILE, metadata={"format": "pt"})
    names[HEAD] = HEAD_FILE


def _config_changes(model: Checkpoint, *, untied: bool) -> dict[str, Any]:
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    dtype = model.config.get("dtype") or model.config.get("torch_dtype")
    if dtype is not None:
        changes["torch_dtype"] = dtype
    rope = model.config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        changes["rope_theta"] = rope["rope_theta"]
    return changes


def _tokenizer_changes(target: Path) -> dict[str, Any]:
    changes: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = target / "chat_template.jinja"
    if template.is_file():
        changes["chat_template"] = template.read_text(encoding="utf-8")
    return changes


def _patch(file: Path, changes: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes, indent=2), encoding="utf-8")
