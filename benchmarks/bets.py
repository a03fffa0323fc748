"""How often bets on other ways of drawing call honest draws off, and how much they win on others (parity/draw_bets.py).

Tables of random logits stand for a policy; tokens are drawn from them, or from them with an engine's rounding, and the
bets are those of a check. Prints rates, the largest win of an honest sample, and one JSON object as its last line.

    python benchmarks/bets.py [--checks 10000]
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.table_kit import drawn, evidence_of, logits_of, trace_rows

from trueup.knobs import LimitsConfig
from trueup.parity.draw_bets import best_bet
from trueup.parity.draws import STATISTICS
from trueup.parity.evidence import EngineModel
from trueup.types import SamplingParams

ROWS, LENGTH, VOCAB, SPREAD = 20, 20, 60, 2.0
HONEST = (
    ({}, 0.0), ({}, 0.06), ({"temperature": 0.7}, 0.0), ({"temperature": 1.3}, 0.06), ({"top_k": 10}, 0.0),
    ({"top_k": 10}, 0.06),
)  # fmt: skip
"""Sampling, and the rms of an engine's rounding, nats a logit."""


def called_off(seed: int, sampling: dict, noise_rms: float, *, rate: float, top_k: int | None = None) -> bool:
    """Whether a sample is called off; `top_k`: the draws have another one than is declared."""
    logits_TV = logits_of(ROWS * LENGTH, VOCAB, scale=SPREAD, seed=2 * seed)
    generator = torch.Generator().manual_seed(2 * seed + 1_000_003)
    engine_TV = logits_TV + noise_rms * torch.randn(logits_TV.shape, generator=generator, dtype=torch.float64)
    params = SamplingParams(**sampling)
    own_top_k = params.top_k if top_k is None else top_k
    targets_T = drawn(engine_TV, temperature=params.temperature, top_k=own_top_k, seed=2 * seed + 1)
    evidence = evidence_of(logits_TV, trace_rows(targets_T, LENGTH), sampling=params)
    model = EngineModel(dist=evidence.case.processed)
    usable_T = torch.isfinite(evidence.scores(model.source, model.dist).logprobs_T)
    slack = int(usable_T.sum()) * noise_rms**2
    return best_bet(evidence, model, usable_T, rate=rate, slack=slack) is not None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=10_000)
    checks = parser.parse_args().checks
    rate = LimitsConfig().false_alarm_rate / STATISTICS
    each, result = -(-checks // len(HONEST)), {}
    for at, (sampling, noise_rms) in enumerate(HONEST):
        name = f"{SamplingParams(**sampling).label()}, rounding {noise_rms:g}"
        off = sum(called_off(at * each + n, sampling, noise_rms, rate=rate) for n in range(each))
        looser = sum(called_off(at * each + n, sampling, noise_rms, rate=0.01) for n in range(min(each, 300)))
        result[name] = off / each
        print(f"{name:50} {off} of {each} honest samples; at a rate of 0.01: {looser} of {min(each, 300)}", flush=True)
    found = sum(called_off(n, {}, 0.0, rate=rate, top_k=20) for n in range(100)) / 100
    print(f"top_k=20 in the draws alone, {ROWS * LENGTH} tokens over {VOCAB} ids: found in {found:.0%}")
    print(json.dumps({"stated_rate": rate, "limit_nats": -math.log(rate), "false_alarms": result, "top_k_20": found}))


if __name__ == "__main__":
    main()
