"""A failed update changes nothing: a clear error, and scoring shows that the old version still serves."""

import json
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engine_kit import publish_perturbed, request, row_of
from tests.server_kit import ServerProcess

from trueup.engines.embedded.engine import EmbeddedEngine
from trueup.engines.embedded.options import EngineOptions
from trueup.engines.trueup_http import TrueupEngine
from trueup.errors import EngineError, TrueupError, WeightError
from trueup.model.tiny import make_tiny
from trueup.types import Rollout
from trueup.weights.snapshot import manifest_of
from trueup.weights.store import WeightStore

FAILURES = {
    "corrupted file": "digest",
    "cut file": "damaged",
    "wrong shape": "has shape",
    "missing tensor": "lacks",
    "unknown tensor": "does not have",
    "NaN": "NaN",
    "wrong digest": "digest",
    "wrong dtype": "publish the rounded",
    "path outside": "outside",
    "not complete": "published completely",
    "used number": "served before",
}


def rewrite(folder, tensors, version, *, honest=True):
    """Replace a version's tensors; an honest manifest describes them, a dishonest one stays as it was."""
    save_file(tensors, folder / "model.safetensors")
    if honest:
        manifest = manifest_of(version, tensors)
        (folder / "manifest.json").write_text(manifest.to_json())
        (folder / "COMPLETE").write_text(manifest.digest)


def break_version(how, store, path, tmp_path):
    """Publish version 1 and spoil it; returns the folder to load."""
    folder = publish_perturbed(store, path, 1, scale=0.2).path
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if how == "corrupted file":
        raw = bytearray((folder / "model.safetensors").read_bytes())
        raw[-3] ^= 64
        (folder / "model.safetensors").write_bytes(raw)
    elif how == "cut file":
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-100])
    elif how == "wrong shape":
        rewrite(folder, tensors | {name: tensors[name][:-1].clone()}, 1)
    elif how == "missing tensor":
        rewrite(folder, {n: t for n, t in tensors.items() if n != name}, 1)
    elif how == "unknown tensor":
        rewrite(folder, tensors | {"model.extra": torch.ones(2)}, 1)
    elif how == "NaN":
        from dataclasses import replace

        spoiled = tensors | {name: tensors[name].clone().fill_(float("nan"))}
        save_file(spoiled, folder / "model.safetensors")  # as a publisher that does not look would write it
        clean = manifest_of(1, tensors)
        from trueup.weights.snapshot import tensor_digest

        entry = replace(clean.tensors[name], digest=tensor_digest(spoiled[name]))
        manifest = replace(clean, tensors={**clean.tensors, name: entry})
        (folder / "manifest.json").write_text(manifest.to_json())
        (folder / "COMPLETE").write_text(manifest.digest)
    elif how == "wrong digest":
        content = json.loads((folder / "manifest.json").read_text())
        content["tensors"][name]["digest"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(content))
    elif how == "wrong dtype":
        rewrite(folder, {n: t.double() for n, t in tensors.items()}, 1)
    elif how == "path outside":
        return publish_perturbed(WeightStore(tmp_path / "elsewhere"), path, 1, scale=0.2).path
    elif how == "not complete":
        (folder / "COMPLETE").unlink()
    elif how == "used number":
        rewrite(folder, tensors, 0)
    return folder


@pytest.mark.parametrize("how", FAILURES)
def test_a_bad_version_is_refused_while_the_old_one_serves(tmp_path, how):
    path = make_tiny(tmp_path / "tiny", tied=True)
    store = WeightStore(tmp_path / "weights")
    folder = break_version(how, store, path, tmp_path)
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32, weights_root=store.root))
    box = []
    try:
        rows = [row_of(engine.generate([request(20, tokens=20)])[0][0])]
        before, status = engine.score(rows), engine.status()
        work = threading.Thread(target=lambda: box.append(engine.generate([request(9, n=3, tokens=300)])))
        work.start()
        with pytest.raises(WeightError, match=FAILURES[how]):
            engine.update_weights(folder, clear_cache=False)
        work.join(timeout=60)
        after, now = engine.score(rows), engine.status()
        good = publish_perturbed(WeightStore(store.root / "more"), path, 5, scale=0.2)
        assert engine.update_weights(good.path, clear_cache=True).version == 5
        assert engine.score(rows) != before
    finally:
        engine.close()
    assert after == before and now.version == status.version == 0 and now.model_digest == status.model_digest
    assert all(isinstance(r, Rollout) and set(r.weight_versions) == {0} for r in box[0][0])


def test_killed_in_the_middle_of_an_update_the_process_is_gone(tmp_path):
    """SIGKILL during an update: nobody answers any more, and a restart serves the whole old version."""
    path = make_tiny(tmp_path / "tiny", tied=True)
    store = WeightStore(tmp_path / "weights")
    store.root.mkdir()
    snapshot = publish_perturbed(store, path, 1, scale=0.2)
    server = ServerProcess(path, tmp_path, "--dtype", "float32", "--weights", str(store.root))
    try:
        engine = TrueupEngine(server.url, token=server.token)
        rollout = engine.generate([request(20, tokens=20)])[0][0]
        old = engine.score([row_of(rollout)])[0].logprobs
        outcome = []

        def update():
            try:
                outcome.append(engine.update_weights(snapshot.path, clear_cache=True).version)
            except TrueupError as error:
                outcome.append(str(error))

        thread = threading.Thread(target=update)
        thread.start()
        time.sleep(0.002)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(timeout=30)
        thread.join(timeout=60)
        with pytest.raises(EngineError, match="cannot be reached"):
            engine.status()
    finally:
        server.stop()
    again = ServerProcess(path, tmp_path, "--dtype", "float32", "--weights", str(store.root))
    try:
        engine = TrueupEngine(again.url, token=again.token)
        assert engine.status().version == 0 and engine.score([row_of(rollout)])[0].logprobs == old
        assert engine.update_weights(snapshot.path, clear_cache=True).version == 1
    finally:
        again.stop()


def test_logits_that_are_not_finite_end_requests_as_failures_and_the_engine_goes_on(tmp_path):
    path = make_tiny(tmp_path / "tiny")
    store = WeightStore(tmp_path / "weights")
    huge = publish_perturbed(store, path, 1, scale=0.0)
    tensors = {
        n: t * (1e38 if n == "lm_head.weight" else 1.0) for n, t in load_file(huge.path / "model.safetensors").items()
    }
    rewrite(huge.path, tensors, 1)  # finite weights whose logits overflow
    fine = publish_perturbed(store, path, 2, scale=0.01)
    engine = EmbeddedEngine(path, EngineOptions(dtype=torch.float32))
    try:
        engine.update_weights(huge.path, clear_cache=True)
        failed = engine.generate([request(9, n=2, tokens=5)])[0]
        assert all(not isinstance(r, Rollout) and "finite" in r.reason for r in failed)
        engine.update_weights(fine.path, clear_cache=True)
        assert all(isinstance(r, Rollout) for r in engine.generate([request(9, n=2, tokens=5)])[0])
    finally:
        engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([request(9)])
