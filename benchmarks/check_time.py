"""How long whole `trueup check` commands take: recorded traces, and a full and a quick check of a warm engine.

    python benchmarks/check_time.py [--runs 3] [--only traces|live] [--before SRC] [--model models/smollm2-135m]

From shell to exit. With --before (the src folder of another version of trueup) each command runs with both versions in
turn. Prints a line a command and one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORT = 8371
START_TIMEOUT_S, RUN_TIMEOUT_S = 120.0, 1800.0
TOO_EARLY = (urllib.error.URLError, ConnectionError, TimeoutError)


def variables(source: Path) -> dict[str, str]:
    """The environment in which that version is imported."""
    return dict(os.environ) | {"PYTHONPATH": str(source)}


def seconds_of(arguments: list[str], source: Path) -> tuple[float, int]:
    """How long one check took, and its exit code (0 agree, 1 mismatch)."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "trueup.cli", "check", *arguments]
    done = subprocess.run(command, env=variables(source), capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - started, done.returncode


def measure(name: str, arguments: list[str], sources: dict[str, Path], runs: int) -> dict[str, object]:
    """Run one command with every version in turn; median, least and most seconds of each."""
    seconds: dict[str, list[float]] = {version: [] for version in sources}
    codes: dict[str, int] = {}
    for _ in range(runs):
        for version, source in sources.items():
            took_s, codes[version] = seconds_of(arguments, source)
            seconds[version].append(round(took_s, 1))
    row: dict[str, object] = {"check": name, "exit": codes, "seconds": seconds}
    row["median_s"] = {version: statistics.median(took) for version, took in seconds.items()}
    if "before" in seconds:
        row["ratio"] = [round(now / then, 3) for now, then in zip(seconds["now"], seconds["before"], strict=True)]
    print(name, *(f"{key} {row[key]}" for key in ("exit", "median_s", "seconds", "ratio") if key in row), flush=True)
    return row


def serve(model: Path, folder: Path) -> tuple[subprocess.Popen[bytes], list[str]]:
    """Start an embedded engine and wait until it answers; the process, and how a check reaches it."""
    token = folder / "token"
    command = [sys.executable, "-m", "trueup.cli", "serve", "--model", str(model), "--port", str(PORT)]
    command += ["--weights", str(folder), "--token-file", str(token)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{PORT}", time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url + "/health", timeout=2.0).close()
            return process, ["--engine", url, "--model", str(model), "--token-file", str(token)]
        except TOO_EARLY:
            time.sleep(0.5)
    process.kill()
    raise SystemExit(f"the engine did not answer at {url} within {START_TIMEOUT_S:.0f} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=("traces", "live"))
    parser.add_argument("--before", type=Path, help="src folder of another version of trueup")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m")
    options = parser.parse_args()
    sources = {"now": ROOT / "src"} | ({"before": options.before} if options.before else {})
    rows = []
    if options.only != "live":
        for path in sorted((ROOT / "tests" / "data").glob("vllm-*.jsonl")):
            arguments = ["--trace", str(path), "--model", str(options.model)]
            rows.append(measure(path.stem, arguments, sources, options.runs))
    if options.only != "traces":
        with tempfile.TemporaryDirectory() as place:
            process, reach = serve(options.model, Path(place))
            try:
                seconds_of([*reach, "--quick"], ROOT / "src")  # the engine's first requests are slower
                for depth in ("--full", "--quick"):
                    rows.append(measure(f"live {depth}", [*reach, depth], sources, options.runs))
            finally:
                process.terminate()
                process.wait(timeout=30)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
