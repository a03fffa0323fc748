"""Peak memory of a check of long completions over a large vocabulary, above what holding the model takes.

The policy is random and nearly uniform, so that random tokens are draws from it; their logprobs are computed here, a
few thousand at a time. Prints one JSON object.

    python benchmarks/check_memory.py [--rows 64] [--tokens 4096] [--vocabulary 152000]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from trueup.env import limit_spinning

limit_spinning()  # torch reads the setting when it is loaded

import torch  # noqa: E402

from trueup.model.load import load_model  # noqa: E402
from trueup.model.tiny import make_tiny  # noqa: E402
from trueup.parity import check_rollouts  # noqa: E402

SMALL = 1e-3
"""What the head is multiplied by: logits near 0 for every token."""
PROMPT = 8
AT_ONCE = 256


def peak_gib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rows_of(folder: Path, rows: int, tokens: int) -> list[dict[str, object]]:
    """Random completions with their logprobs under the policy."""
    model = load_model(folder, dtype=torch.float32).lm
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    found: list[dict[str, object]] = []
    with torch.inference_mode():
        for _ in range(rows):
            ids_T = torch.randint(3, vocabulary, (PROMPT + tokens,), generator=generator)
            hidden_TD = model.model(ids_T[None]).last_hidden_state[0, PROMPT - 1 : -1]
            targets_T, logprobs = ids_T[PROMPT:], []
            for at in range(0, tokens, AT_ONCE):
                logits_CV = model.lm_head(hidden_TD[at : at + AT_ONCE])
                chosen_C = logits_CV.gather(1, targets_T[at : at + AT_ONCE, None])[:, 0]
                logprobs += (chosen_C - logits_CV.logsumexp(1)).tolist()
            found.append(
                {
                    "engine": {"name": "random", "flags": {"dtype": "float32"}}, "sampling": {"temperature": 1.0},
                    "prompt_token_ids": ids_T[:PROMPT].tolist(), "completion_token_ids": targets_T.tolist(),
                    "completion_logprobs": logprobs,
                }
            )  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make_tiny(
            Path(place) / "wide", vocab_size=options.vocabulary, max_position_embeddings=PROMPT + options.tokens
        )
        from safetensors.torch import load_file, save_file

        path = folder / "model.safetensors"
        save_file({n: t * SMALL if "lm_head" in n else t for n, t in load_file(path).items()}, path, {"format": "pt"})
        rows = rows_of(folder, options.rows, options.tokens)
        before, started = peak_gib(), time.perf_counter()
        report = check_rollouts(rows, model=folder)
        found = {
            "rows": options.rows, "tokens": options.tokens, "vocabulary": options.vocabulary,
            "verdict": report.verdict, "model_and_rows_gib": round(before, 2),
            "check_gib": round(peak_gib() - before, 2), "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
