"""A real vLLM server for tests: started with given flags in its own environment, warmed up, stopped as a group."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.conftest import ROOT
from trueup.engines.vllm_install import find_environment, launch_prefix

START_TIMEOUT_S = 300
WARM_TIMEOUT_S = 180
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
PARITY_FLAGS = (
    "--logprobs-mode", "processed_logprobs", "--no-enable-prefix-caching", "--no-async-scheduling",
    "--generation-config", "vllm", "--hf-overrides", '{"head_dtype": "float32"}',
)  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def folder_with(model: Path, target: Path, **changed: dict) -> Path:
    """A copy of a checkpoint whose weights are links and of whose JSON files some are replaced."""
    target.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, target / file.name)
    import json

    for name, content in changed.items():
        path = target / f"{name}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | content))
    return target


@contextmanager
def vllm_server(model: Path, log: Path, *flags: str, version: str = "0.32.0", dev: bool = False):
    """Serve a checkpoint and yield the URL; the whole process group ends afterwards."""
    environment = find_environment(version, ROOT)
    assert environment is not None, f"vLLM {version} is not installed: trueup vllm install --version {version}"
    port = free_port()
    command = [
        *launch_prefix(environment), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--gpu-memory-utilization", "0.3",
        "--max-model-len", "1024", *flags,
    ]  # fmt: skip
    variables = os.environ | VARIABLES | ({"VLLM_SERVER_DEV_MODE": "1"} if dev else {})
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=variables, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(process, url, log)
            body = {"model": str(model), "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 1.0}
            httpx.post(f"{url}/v1/completions", json=body, timeout=WARM_TIMEOUT_S).raise_for_status()
            yield url
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=30)


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not start: {log.read_text()[-2000:]}")
