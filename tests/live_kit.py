"""A served engine for tests of the live check: the real server and engine, in a thread of this process."""

import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.embedded.server import make_app
from trueup.knobs import CheckConfig
from trueup.model.load import load_model
from trueup.parity.live import check_engine
from trueup.weights.store import WeightStore

TOKEN = "t" * 24
START_TIMEOUT_S = 60.0


class Live:
    """A running server; `plant` breaks it, `check` runs the checker against it."""

    def __init__(self, engine: EmbeddedEngine, url: str, model: Path, folder: Path) -> None:
        self.engine, self.url, self.model, self.folder = engine, url, model, folder
        self.token_file = folder / "token"
        self.token_file.write_text(TOKEN)
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)

    def plant(self, name: str = "", **values) -> None:
        """Break the engine in one way (none heals it)."""
        faults = [{"name": name, "values": values}] if name else []
        answer = self.http.post("/control/faults", json={"faults": faults})
        assert answer.status_code == 200, answer.text

    def restore(self) -> None:
        """Load the checkpoint's own weights again, under the number they are served as."""
        store = WeightStore(self.folder / "weights" / "restore")
        shutil.rmtree(store.root, ignore_errors=True)
        tensors = load_model(self.model, dtype=self.engine.options.dtype).stored_tensors()
        self.engine.update_weights(store.publish(self.engine.status().version, tensors).path, clear_cache=True)

    def check(self, **knobs):
        """Run `trueup check --engine`."""
        values = {"engine": (self.url,), "model": self.model, "token_file": self.token_file} | knobs
        return check_engine(CheckConfig(**values))


@contextmanager
def served(model: Path, folder: Path, *, dtype=torch.float32, **options):
    """Serve a checkpoint with faults allowed and updates from `folder`/weights."""
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    engine = EmbeddedEngine(model, EngineOptions(dtype=dtype, weights_root=weights, **options))
    app = make_app(engine, TOKEN, allow_faults=True)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(engine, f"http://127.0.0.1:{port}", model, folder)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.close()
