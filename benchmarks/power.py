"""What a check detects, and how often it cries wolf: false-alarm rates on resampled clean pairs, and a table of power.

Clean pairs are a real engine's logprobs of its own tokens, from recorded traces that agree, beside the trainer's. Rows
are resampled into checks of N tokens, each with a floor predicted from its own tokens. Draws are resampled from the
trainer's own distributions at the recorded contexts. A fault of a size is planted into such a check, and the smallest
size that is found in 95 of 100 is printed. Prints one JSON object as its last line.

    python benchmarks/power.py [--model models/smollm2-135m] [--trace FILE ...] [--checks 10000]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trueup.env import limit_spinning

limit_spinning()  # torch reads the setting when it is loaded

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from trueup.knobs import CheckConfig, LimitsConfig  # noqa: E402
from trueup.parity import draw_parts  # noqa: E402
from trueup.parity.compare import residual  # noqa: E402
from trueup.parity.draw_parts import odd_parts  # noqa: E402
from trueup.parity.draws import SKEW, STATISTICS, top_count_chance  # noqa: E402
from trueup.parity.evidence import ENGINE, EXACT, REFERENCE, TRAINER, EngineModel, Tokens  # noqa: E402
from trueup.parity.floor import Floor, judge, normal_quantile, predict  # noqa: E402
from trueup.parity.grouping import group  # noqa: E402
from trueup.parity.recipe import TRAINERS  # noqa: E402
from trueup.parity.setting import usable_rows  # noqa: E402
from trueup.parity.workbench import Workbench  # noqa: E402
from trueup.trace import read_trace  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TRACES = ("vllm-0.32.0-processed", "vllm-0.18.1-processed", "vllm-0.32.0-processed-fp32")
SIZES = (256, 1024, 4096)
TRIES, FOUND = 200, 0.95
ROW_TOKENS, REPLICAS = 32, 4
"""How draws are divided into rows and replicas, whose parts are judged as well."""
DRAWN = 128
"""Draws that are made at each recorded context."""
LADDER = tuple(1.25**n for n in range(-6, 22))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One setting of a trace. Per usable token [T]: the gap, both sides' rounding errors, and its row."""

    name: str
    gap_T: Tensor
    trainer_T: Tensor
    engine_T: Tensor
    rows: list[Tensor]
    """Indices of each row's tokens."""
    min_floor: float

    def check(self, chooser: random.Random, tokens: int) -> tuple[Tensor, Tensor, Floor]:
        """Rows drawn with replacement until there are so many tokens: (gap, row of each token, floor)."""
        picks: list[Tensor] = []
        while sum(map(len, picks)) < tokens:
            picks.append(chooser.choice(self.rows))
        at_T = torch.cat(picks)[:tokens]
        row_T = torch.repeat_interleave(torch.arange(len(picks)), torch.tensor([len(p) for p in picks]))[:tokens]
        floor = predict(
            self.trainer_T[at_T], self.engine_T[at_T], torch.zeros(tokens), row_T=row_T, lines=range(len(picks)),
            basis="", min_floor=self.min_floor,
        )  # fmt: skip
        return self.gap_T[at_T], row_T, floor


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Draws from one way of drawing at the recorded contexts, judged under the declared distribution: surprise and its
    variance, whether the token is the most likely one, and that one's probability; [T, DRAWN] or [T]."""

    surprise_TK: Tensor
    top_TK: Tensor
    variance_T: Tensor
    chance_T: Tensor

    def alarm(self, tokens: int, limits: LimitsConfig, generator: torch.Generator) -> bool:
        """Whether one check of so many tokens finds the draws wrong: by surprise or by the count of likely tokens, of
        all or of a part."""
        at_T = torch.randint(len(self.variance_T), (tokens,), generator=generator)
        pick_T = torch.randint(DRAWN, (tokens,), generator=generator)
        rate = limits.false_alarm_rate / STATISTICS
        z = float(self.surprise_TK[at_T, pick_T].sum() / self.variance_T[at_T].sum().sqrt())
        if abs(z) > SKEW * normal_quantile(rate / 2):
            return True
        if top_count_chance(self.chance_T[at_T], int(self.top_TK[at_T, pick_T].sum())) < rate:
            return True
        rows = range(-(-tokens // ROW_TOKENS))
        index_T = torch.arange(tokens)
        shape = Tokens(
            targets_T=index_T, row_T=index_T // ROW_TOKENS, position_T=index_T % ROW_TOKENS, engine_T=index_T.double(),
            version_T=index_T, prompts=(), lines=tuple(rows), replicas=tuple(f"{row % REPLICAS}" for row in rows),
        )  # fmt: skip
        drawn = draw_parts.Drawn(
            top_T=self.top_TK[at_T, pick_T], chance_T=self.chance_T[at_T], offset_T=self.surprise_TK[at_T, pick_T],
            variance_T=self.variance_T[at_T], context_T=index_T,
        )  # fmt: skip
        everywhere_T = torch.ones(tokens, dtype=torch.bool)
        return bool(
            odd_parts(drawn, shape, everywhere_T, rate=rate, skew=SKEW, noise_rms=0.0, chance_of=top_count_chance)
        )


def pools(model: Path, trace: Path) -> tuple[list[Pool], dict[str, Drawn]]:
    """Read a trace that agrees: a pool per setting, and draws at the contexts of its first one."""
    check = CheckConfig(trace=trace, model=model)
    bench = Workbench.of(check, lambda message: None)
    rows = read_trace(trace)
    settings = group(rows, TRAINERS["processed"], [])
    bench.set_precision(rows.rows)
    settings = bench.fit_for_model(settings)
    found = []
    for setting in settings:
        evidence = bench.scorer.evidence(setting.case, usable_rows(setting))
        base = EngineModel(dist=setting.case.trainer_distribution)
        left = residual(evidence, base)
        trainer_T, engine_T, reference_T = (
            evidence.scores(s, base.dist).logprobs_T.double() for s in (TRAINER, ENGINE, REFERENCE)
        )
        ok_T = left.usable_T & torch.isfinite(trainer_T) & torch.isfinite(engine_T) & torch.isfinite(reference_T)
        row_T = left.row_T[ok_T]
        found.append(
            Pool(
                name=f"{trace.stem} {setting.case.label()}", gap_T=left.residual_T[ok_T],
                trainer_T=(trainer_T - reference_T)[ok_T], engine_T=(engine_T - reference_T)[ok_T],
                rows=[(row_T == r).nonzero()[:, 0] for r in torch.unique(row_T)], min_floor=bench.limits.min_floor,
            )
        )  # fmt: skip
    plain = next(s for s in settings if not s.case.sampling.transforms)
    return found, drawn(bench, usable_rows(plain))


def drawn(bench: Workbench, rows: list) -> dict[str, Drawn]:
    """Draw at every context of some rows in several ways."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {"declared": lambda logp: logp}
    ways |= {f"T={t}": (lambda logp, t=t: logp / t) for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3)}
    ways |= {f"top_k={k}": (lambda logp, k=k: _top(logp, k)) for k in (1, 5, 20, 50, 100, 200)}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ways}
    variance, chance = [], []
    generator = torch.Generator().manual_seed(0)
    for p_CV in bench.scorer._probabilities(EXACT, rows, 1.0):
        logp_CV = p_CV.double().clamp_min(1e-300).log()
        entropy_C = -(p_CV * logp_CV).sum(1)
        variance.append((p_CV * logp_CV.square()).sum(1) - entropy_C.square())
        chance.append(p_CV.max(1).values.double())
        for name, way in ways.items():
            weights = (way(logp_CV) - way(logp_CV).max(1, keepdim=True).values).exp().float()
            ids_CK = torch.multinomial(weights, DRAWN, replacement=True, generator=generator)
            surprise_CK = -logp_CV.gather(1, ids_CK) - entropy_C[:, None]
            parts[name].append((surprise_CK, ids_CK == p_CV.argmax(1)[:, None]))
    return {
        name: Drawn(
            surprise_TK=torch.cat([s for s, _ in found]), top_TK=torch.cat([t for _, t in found]),
            variance_T=torch.cat(variance), chance_T=torch.cat(chance),
        )
        for name, found in parts.items()
    }  # fmt: skip


def _top(logp_CV: Tensor, count: int) -> Tensor:
    return logp_CV.masked_fill(logp_CV < logp_CV.topk(count, dim=1).values[:, -1:], -torch.inf)


def false_alarms(found: list[Pool], honest: Drawn, checks: int, limits: LimitsConfig) -> dict[str, float]:
    """Share of clean checks that each judgement calls off, over `checks` resamples of every size together."""
    chooser, generator = random.Random(0), torch.Generator().manual_seed(0)
    counts = dict.fromkeys(("tokens together", "row", "token", "bias", "first tokens", "draws"), 0)
    for _ in range(checks):
        tokens = chooser.choice(SIZES)
        gap_T, row_T, floor = chooser.choice(found).check(chooser, tokens)
        verdict = judge(gap_T, row_T, floor, limits, lines=range(int(row_T.max()) + 1))
        counts["tokens together"] += verdict.rms > verdict.rms_limit
        counts["row"] += verdict.far_rows > 0
        counts["token"] += verdict.max_abs > verdict.token_limit
        counts["bias"] += abs(verdict.bias) > verdict.bias_limit
        counts["first tokens"] += verdict.first_rms > verdict.first_rms_limit
        counts["draws"] += honest.alarm(tokens, limits, generator)
    return {name: count / checks for name, count in counts.items()}


def planted(kind: str, gap_T: Tensor, row_T: Tensor, floor: Floor, size: float, chooser: random.Random) -> Tensor:
    """A fault of `size` floors: on every token, on a share of the rows, on a few tokens, or as an offset."""
    gap_T, rows = gap_T.clone(), int(row_T.max()) + 1
    noise_T = torch.randn(
        len(gap_T), dtype=torch.float64, generator=torch.Generator().manual_seed(chooser.randrange(2**31))
    )
    if kind == "all tokens":
        return gap_T + size * floor.rms * noise_T
    if kind.startswith("rows"):
        count = 1 if kind.endswith("one") else max(1, rows // int(kind.rsplit(" ", 1)[1]))
        hit_T = torch.isin(row_T, torch.tensor(chooser.sample(range(rows), count)))
        return torch.where(hit_T, gap_T + size * floor.rms * noise_T, gap_T)
    if kind.startswith("tokens"):
        at_T = torch.tensor(chooser.sample(range(len(gap_T)), int(kind.rsplit(" ", 1)[1])))
        gap_T[at_T] -= size * floor.rms
        return gap_T
    return gap_T + size * floor.rms


def smallest(pool: Pool, kind: str, tokens: int, limits: LimitsConfig) -> float | None:
    """The smallest size, in floors, that at least 95 of 100 checks find."""
    low, high = 0, len(LADDER) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        chooser, seen = random.Random(middle), 0
        for _ in range(TRIES):
            gap_T, row_T, floor = pool.check(chooser, tokens)
            gap_T = planted(kind, gap_T, row_T, floor, LADDER[middle], chooser)
            seen += bool(judge(gap_T, row_T, floor, limits, lines=range(int(row_T.max()) + 1)).reasons)
        if seen >= FOUND * TRIES:
            best, high = LADDER[middle], middle - 1
        else:
            low = middle + 1
    return best


KINDS = {
    "all tokens": "noise on every token", "rows 4": "noise in a quarter of the rows", "rows one": "noise in one row",
    "tokens 1": "one token off", "tokens 3": "three tokens off", "bias": "an offset on every token",
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m")
    parser.add_argument("--trace", type=Path, action="append")
    parser.add_argument("--checks", type=int, default=10_000)
    options = parser.parse_args()
    limits, found, ways = LimitsConfig(), [], {}
    for trace in options.trace or [ROOT / "tests" / "data" / f"{name}.jsonl" for name in TRACES]:
        own, ways = pools(options.model, trace)
        found += own
    result: dict[str, object] = {"checks": options.checks, "stated": limits.false_alarm_rate}
    result["false_alarms"] = false_alarms(found, ways["declared"], options.checks, limits)
    print(json.dumps(result), flush=True)
    coarse = next(p for p in found if p.trainer_T.abs().max() > 1e-3)
    print(f"\nSmallest size that is found with {FOUND:.0%} probability ({coarse.name}), in floors:\n")
    print(f"| fault | {' | '.join(f'{n:,} tokens' for n in SIZES)} |\n|---|{'---|' * len(SIZES)}")
    table: dict[str, list[float | None]] = {}
    for kind, words in KINDS.items():
        table[words] = [smallest(coarse, kind, tokens, limits) for tokens in SIZES]
        print(f"| {words} | {' | '.join('-' if v is None else f'{v:.2g}' for v in table[words])} |", flush=True)
    generator = torch.Generator().manual_seed(1)
    print("\nShare of checks that find draws otherwise than declared (T=1):\n")
    print(f"| drawn with | {' | '.join(f'{n:,} tokens' for n in SIZES)} |\n|---|{'---|' * len(SIZES)}")
    draws = {}
    for name, way in ways.items():
        draws[name] = [sum(way.alarm(n, limits, generator) for _ in range(TRIES)) / TRIES for n in SIZES]
        print(f"| {name} | {' | '.join(f'{v:.0%}' for v in draws[name])} |", flush=True)
    print(json.dumps(result | {"smallest_floors": table, "draws_found": draws}))


if __name__ == "__main__":
    main()
