"""Head benchmark: trueup's chunked logprob against plain fp32 logits, log_softmax, gather.

2,048 tokens x 49,152 vocabulary x 576 hidden (SmolLM2-135M's head). Every run is a process of its own, the two sides
alternate, and ratios are medians over pairs of neighbouring runs. Prints one JSON object as its last line:
memory_ratio (peak extra memory of trueup, above inputs, outputs and gradients, over one fp32 logits tensor),
time_ratio (forward and backward, trueup / plain), scoring_time_ratio (no gradient). Goals: 1/8, 1.4, 1.05.

With `--busy N` it measures what N busy neighbours cost instead: busy_over_quiet is trueup's scoring time beside N
processes that each keep a core busy, over its time alone. Goal: at most 3 with 2 neighbours on 2 cores.

    python benchmarks/head.py [--pairs 5] [--dtype float32|bfloat16] [--busy 2]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from trueup.env import limit_spinning

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, VOCAB, WIDTH = 2048, 49152, 576
LOGITS_BYTES = TOKENS * VOCAB * 4
SIDES = ("chunked", "plain")


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes first: full fp32 logits, log_softmax, gather."""
    logits = hidden.float() @ weight.float().T
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """trueup's path."""
    from trueup.policy.head import Head
    from trueup.policy.logprobs import token_scores

    return token_scores(hidden, Head(weight_VD=weight), targets).logprobs_T


def one(side: str, mode: str, dtype: str, what: str) -> dict[str, float]:
    """Run one side in this process: seconds per repetition, or peak extra bytes."""
    import torch

    measure_memory = what == "memory"
    if measure_memory:  # freed blocks go back to the system at once, so that the peak is what the computation holds
        ctypes.CDLL("libc.so.6").mallopt(-3, 65536)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    grad = mode == "train"
    hidden = torch.randn(TOKENS, WIDTH).to(kind).requires_grad_(grad)
    weight = (torch.randn(VOCAB, WIDTH) * 0.05).to(kind).requires_grad_(grad)
    targets = torch.randint(0, VOCAB, (TOKENS,))
    upstream = torch.randn(TOKENS)
    function = {"plain": plain, "chunked": chunked}[side]

    def step() -> None:
        if grad:
            hidden.grad = weight.grad = None
            function(hidden, weight, targets).backward(upstream)
        else:
            with torch.no_grad():
                function(hidden, weight, targets)

    small = slice(0, 64)
    with torch.set_grad_enabled(grad):  # starts the thread pool and the kernels' own buffers on a small input
        out = function(hidden[small], weight[:1024], targets[small] % 1024)
    if grad:
        out.backward(upstream[small])
    hidden.grad = weight.grad = None
    if measure_memory:
        before = _resident()
        _reset_peak()
        step()
        gradients = (hidden.numel() + weight.numel()) * hidden.element_size() if grad else 0
        return {"extra_bytes": _peak() - before - gradients - TOKENS * 4}
    step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times)}


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM") if sys.platform == "linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")


def measure(side: str, mode: str, dtype: str, what: str = "time") -> dict[str, float]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--one", side, mode, dtype, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def beside_neighbours(dtype: str, pairs: int, count: int) -> dict[str, object]:
    """Score alone and beside `count` busy processes, in turns."""
    quiet, busy = [], []
    for _ in range(pairs):
        quiet.append(measure("chunked", "score", dtype)["seconds"])
        neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            busy.append(measure("chunked", "score", dtype)["seconds"])
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()
    ratios = sorted(b / q for b, q in zip(busy, quiet, strict=True))
    return {
        "neighbours": count, "seconds_quiet": round(statistics.median(quiet), 3),
        "seconds_busy": round(statistics.median(busy), 3), "busy_over_quiet": round(statistics.median(ratios), 3),
        "busy_over_quiet_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }  # fmt: skip


def main() -> None:
    """Run the pairs and print the ratios."""
    limit_spinning()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="busy processes beside the measured one")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    result: dict[str, object] = {"tokens": TOKENS, "vocab": VOCAB, "hidden": WIDTH, "dtype": options.dtype}
    if options.busy:
        print(json.dumps(result | beside_neighbours(options.dtype, options.pairs, options.busy)))
        return
    for mode, key in (("train", "time_ratio"), ("score", "scoring_time_ratio")):
        pairs = [[measure(side, mode, options.dtype)["seconds"] for side in SIDES] for _ in range(options.pairs)]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        result[key] = round(statistics.median(ratios), 3)
        result[f"{key}_range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        extra = {side: measure(side, mode, options.dtype, "memory")["extra_bytes"] / LOGITS_BYTES for side in SIDES}
        prefix = "" if mode == "train" else "scoring_"
        result[f"{prefix}memory_ratio"] = round(extra["chunked"], 4)
        result[f"{prefix}memory_ratio_plain"] = round(extra["plain"], 3)
        for index, side in enumerate(SIDES):
            result[f"{prefix}seconds_{side}"] = round(statistics.median(p[index] for p in pairs), 3)
        print(mode, json.dumps(result), flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
