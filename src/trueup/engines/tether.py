"""Run a command that ends when our standard input does: `python tether.py COMMAND...`, whatever ended the parent.

Stands alone (standard library only), since it runs beside environments in which trueup is not installed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0
"""From asking the command to end until it is killed with all it started."""


def main(command: list[str]) -> int:
    """Run the command in our own process group; returns its exit code, 128 and more for a signal as shells do."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # the group's: the command decides how to end
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held while the interpreter ends
            pass
        os.killpg(0, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="stdin").start()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
