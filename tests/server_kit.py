"""`trueup serve` as a real process for tests: started on a free port, stopped by its own id."""

import select
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 120


class ServerProcess:
    """A running server; `url` and `token` reach it."""

    def __init__(self, model: Path, folder: Path, *arguments: str) -> None:
        self.token_file = folder / "token"
        self.log = (folder / "server.log").open("w+")
        command = [
            sys.executable, "-m", "trueup.cli", "serve", "--model", str(model), "--port", "0",
            "--token-file", str(self.token_file), *arguments,
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.url = self._wait_until_serving()
        self.token = self.token_file.read_text().strip()

    def _wait_until_serving(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        assert self.process.stdout is not None
        while time.monotonic() < deadline and self.process.poll() is None:
            if select.select([self.process.stdout], [], [], 1.0)[0]:
                line = self.process.stdout.readline()
                if line.startswith("serving"):
                    return line.split()[1]
        self.stop()
        self.log.seek(0)
        raise AssertionError(f"the server did not start: {self.log.read()[-2000:]}")

    def stop(self) -> None:
        """End the process and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()
