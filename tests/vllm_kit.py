"""A real vLLM server for tests, started as a user starts it or with a user's own flags, and stopped as a group."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import ROOT
from trueup.engines.vllm_server import VllmServer
from trueup.knobs import VllmConfig


def folder_with(model: Path, target: Path, **changed: dict) -> Path:
    """A copy of a checkpoint whose weights are links and of whose JSON files some are replaced."""
    target.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (target / file.name).symlink_to(file.resolve())
        else:
            shutil.copy(file, target / file.name)
    for name, content in changed.items():
        path = target / f"{name}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | content))
    return target


def vllm_config(model: Path, run: Path, **knobs) -> VllmConfig:
    """The parity configuration on a free port, but for `knobs`."""
    return VllmConfig(**{"model": model, "run": run, "environments": ROOT, "port": 0, "max_length": 1024} | knobs)


@contextmanager
def vllm_server(model: Path, run: Path, *, plain: bool = False, **knobs):
    """Start a server and yield it. `plain`: vLLM's own defaults, on the checkpoint as it is, but for `flags`."""
    server = (PlainServer if plain else VllmServer)(vllm_config(model, run, **knobs))
    server.start()
    try:
        yield server
    finally:
        server.stop()


class PlainServer(VllmServer):
    """vLLM as somebody starts it who read only its own manual."""

    def command(self, folder: Path) -> list[str]:
        """The command line without the parity flags."""
        flags = ["--enforce-eager", "--gpu-memory-utilization", "0.3", "--max-model-len", str(self.max_length)]
        return [*self.launch(self.config.model), *flags, *self.config.flags]

    def variables(self) -> dict[str, str]:
        """Without the control plane."""
        return {k: v for k, v in super().variables().items() if k != "VLLM_SERVER_DEV_MODE"}
