"""How a check changes the weights of a server and puts them back, for each kind of server that lets it.

The update is the one that a careless pipeline makes: in flight, the cache kept unless told otherwise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from trueup.engines import vllm_control as control
from trueup.engines.base import PauseMode
from trueup.engines.probe_http import ProbeClient
from trueup.engines.vllm_checkpoint import Checkpoint, read_checkpoint, serve_folder
from trueup.errors import EngineError, ModelError, WeightError

TIMEOUT_S = 120.0


class UpdateTarget(Protocol):
    """A server whose weights may be changed; `place` is the folder that versions are published in."""

    place: Path

    def require_unchanged(self) -> None:
        """Raise EngineError when somebody else updated the server since it was first asked."""
        ...

    def load(self, folder: Path, *, clear_cache: bool) -> None:
        """Have the server load a published version. Raises WeightError if it refused and went on as it was,
        EngineError when it may hold anything."""
        ...

    def originals(self, published: Path) -> Sequence[Path]:
        """Folders that hold what the server served, the best first; `published` is our own copy."""
        ...


class TrueupTarget:
    """`trueup serve`: takes published versions from under a folder of its own."""

    def __init__(self, client: ProbeClient) -> None:
        self._client = client
        assert client.facts.weights_folder is not None
        self.place = Path(client.facts.weights_folder) / f".trueup-check-{time.time_ns()}"

    @staticmethod
    def refused(client: ProbeClient, digest: str) -> str | None:
        """Why this server's weights may not be touched, if so; `digest` is that of the trainer's weights."""
        facts = client.facts
        if not facts.weights_folder or not Path(facts.weights_folder).is_dir():
            return "the server takes no weights from a folder on this machine (trueup serve --weights FOLDER)"
        if facts.digest != digest:
            return "the server's weights are not the trainer's: they could not be put back"
        return None

    def require_unchanged(self) -> None:
        """See UpdateTarget. Raises EngineError."""
        status = self._client.http.get("/control/status", timeout_s=self._client.timeout_s)
        facts = self._client.facts
        if (status.get("version"), status.get("model_digest")) != (facts.version or 0, facts.digest):
            raise EngineError("somebody else updated the engine's weights during the check; nothing was changed")

    def load(self, folder: Path, *, clear_cache: bool) -> None:
        """See UpdateTarget."""
        body = {"path": str(folder), "clear_cache": clear_cache}
        self._client.http.post("/control/update_weights", body, timeout_s=TIMEOUT_S)

    def originals(self, published: Path) -> Sequence[Path]:
        """See UpdateTarget."""
        return (published,)


class VllmTarget:
    """vLLM with its development endpoints open: pause, reload, resume; its label of the version is left alone."""

    def __init__(self, client: ProbeClient, model: Checkpoint) -> None:
        self._http, self._model = client.http, model
        assert client.facts.root is not None
        self._root = Path(client.facts.root)
        self._untie = model.tied and not read_checkpoint(self._root).tied
        self._staged = 0
        self.place = Path(tempfile.mkdtemp(prefix="trueup-check-"))

    @staticmethod
    def refused(client: ProbeClient, *, fits: bool) -> str | None:
        """Why this server's weights may not be touched, if so; `fits`: its scores are the trainer's."""
        facts = client.facts
        if not facts.readable:
            return "vLLM's development endpoints are closed (trueup vllm serve, or VLLM_SERVER_DEV_MODE=1)"
        try:
            read_checkpoint(Path(facts.root or ""))
        except ModelError:
            return f"the folder that the server was started with ({facts.root}) cannot be read here"
        return None if fits else "the server's scores are not the trainer's: the weights could not be put back"

    def require_unchanged(self) -> None:
        """Nothing tells who updated a vLLM; the scores that are compared afterwards do."""

    def load(self, folder: Path, *, clear_cache: bool) -> None:
        """See UpdateTarget; a folder without a configuration, a published version, gets one. Raises WeightError."""
        if not (folder / "config.json").is_file():
            self._staged += 1
            folder = serve_folder(self._model, folder, self.place / f"staged{self._staged}", untie=self._untie)
        try:
            control.pause(self._http, PauseMode.KEEP, timeout_s=TIMEOUT_S)
        except EngineError as error:
            raise WeightError(str(error)) from None
        try:
            control.reload(self._http, folder, timeout_s=TIMEOUT_S)
            if clear_cache:
                control.clear_cache(self._http, timeout_s=TIMEOUT_S)
        finally:
            control.resume(self._http, timeout_s=TIMEOUT_S)

    def originals(self, published: Path) -> Sequence[Path]:
        """See UpdateTarget; first the folder that the server was started with, which stays when ours is gone."""
        return (self._root, published)


def refused(client: ProbeClient, *, digest: str, fits: bool) -> str | None:
    """Why a server's weights may not be touched by a check; None if they may."""
    if client.facts.kind == "openai":
        return "the server has no control plane that is known"
    if not client.facts.on_this_machine:
        return "the server is not on this machine: a folder that it names means nothing here"
    if client.facts.kind == "vllm":
        return VllmTarget.refused(client, fits=fits)
    return TrueupTarget.refused(client, digest)
