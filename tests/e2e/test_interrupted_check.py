"""`check --allow-updates` interrupted in the middle of an update: the engine's weights are put back, and it says so."""

import signal
import subprocess
import sys
import time

import httpx
import pytest
from tests.server_kit import ServerProcess

from trueup.model.tiny import make_tiny

DEADLINE_S = 240


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_check_restores_the_weights(tmp_path, number):
    model = make_tiny(tmp_path / "m", seed=4)
    (tmp_path / "weights").mkdir()
    server = ServerProcess(model, tmp_path, "--dtype", "float32", "--weights", str(tmp_path / "weights"))
    headers = {"Authorization": f"Bearer {server.token}"}

    def status():
        return httpx.get(f"{server.url}/control/status", headers=headers, timeout=30).json()

    try:
        before = status()
        command = [
            sys.executable, "-m", "trueup.cli", "check", "--engine", server.url, "--model", str(model),
            "--token-file", str(server.token_file), "--allow-updates",
        ]  # fmt: skip
        # A shell starts background jobs with SIGINT ignored: the check gets it as at a terminal.
        check = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while status()["model_digest"] == before["model_digest"] and check.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        check.send_signal(number)
        _, errors = check.communicate(timeout=DEADLINE_S)
        after = status()
        assert (after["model_digest"], after["version"]) == (before["model_digest"], before["version"])
        assert not list((tmp_path / "weights").iterdir()), "nothing is left in the weights folder"
        assert check.returncode == 2 and "restored and verified" in errors, errors[-500:]
    finally:
        server.stop()
