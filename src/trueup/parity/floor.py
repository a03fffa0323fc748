"""The noise floor, predicted from the arithmetic on both sides, and the judgement of a gap against it.

For an engine of precision p the floor is not what the trainer does against itself (batch shape alone moves a bf16
forward ten times less than a second implementation does) but how far p is from exact: the trainer's rounding error
against the next higher precision and the engine's, taken as independent, add in squares. With equal precision on both
sides that is sqrt(2) times the trainer's own error.

Shapes: T tokens. r = trainer - engine in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from trueup.knobs import LimitsConfig

BOOTSTRAPS = 400
FEW_SEQUENCES = 6
SHAPE_TOKENS = 32
"""Fewer tokens than this do not say how heavy a tail is."""
TAIL_SHARE, TAIL_TOKENS = 0.05, 10
"""Share of a noise sample, and how many of its tokens at least, from which its tail is continued."""
TAIL_COUNTS = (1, 3, 10)
"""How many tokens together are held against the tail: one far off, or more that are less far."""
SMALLEST_ROW = 0.5
"""Of the floor: no row's own prediction is taken as smaller, because few tokens may happen to round well."""
BOTH_SIDES = 1.5
"""Variance of (mean square / predicted mean square) over the variance of one side's own mean square."""
BLOCK_TOKENS = 8
QUARTER = 0.25
FLOAT32_NATS = 1e-3
"""Rms below which a gap or a floor is one of float32 (below 1e-4) and cannot be one of 16 bits (0.03 and more)."""


@dataclass(frozen=True, kw_only=True)
class NoiseShape:
    """How rounding noise is spread over tokens, in units of its rms. The default is Gaussian noise.

    Beyond `tail_start`, which the share `tail_share` of |noise| exceeds, the excess is taken as exponential with mean
    `tail_scale` (peaks over threshold: Coles, An Introduction to Statistical Modeling of Extreme Values, 2001, section
    4). `kurtosis` is the fourth moment, `quartile` the size that a quarter of |noise| exceeds. `row_spread` is the
    standard deviation of the logarithm of a row's mean square.
    """

    tail_start: float = 1.96
    tail_share: float = 0.05
    tail_scale: float = 0.38
    kurtosis: float = 3.0
    quartile: float = 1.15
    row_spread: float = 0.0

    @classmethod
    def of(cls, noise_T: Tensor, row_T: Tensor) -> NoiseShape:
        """Measure it on a sample of noise, [T] each; too small a sample, or one without noise, counts as Gaussian."""
        rms = float(noise_T.square().mean().sqrt()) if len(noise_T) else 0.0
        if rms == 0 or len(noise_T) < SHAPE_TOKENS:
            return cls()
        size = (noise_T / rms).abs()
        ordered = size.sort(descending=True).values
        count = max(TAIL_TOKENS, int(TAIL_SHARE * len(size)))
        start = float(ordered[count])
        row_S = mean_squares(size, row_T).clamp_min(1e-12).log()
        return cls(
            tail_start=start,
            tail_share=count / len(size),
            tail_scale=max(float((ordered[:count] - start).mean()), cls.tail_scale),
            kurtosis=max(float(size.pow(4).mean()), cls.kurtosis),
            quartile=float(size.quantile(1 - QUARTER)),
            row_spread=float(row_S.std()) if len(row_S) > 1 else 0.0,
        )

    def exceeded_by(self, count: int, *, tokens: int, rate: float) -> float:
        """The size that `count` of so many tokens exceed with probability `rate`."""
        expected = _poisson_mean(count, rate)
        return self.tail_start + self.tail_scale * max(0.0, math.log(self.tail_share * tokens / expected))

    def excess(self, tokens: Tensor | int, quantile: float, *, spread: float = 0.0) -> Tensor:
        """By how much the rms of so many tokens may exceed its prediction, as a factor; `quantile` is a normal one.

        The ratio of the mean squares is taken as lognormal. Both are of the same tokens, so that the variance of the
        ratio is that of one side's rounding and of what the prediction has of it. `spread` adds a standard deviation of
        the logarithm: that of a row whose own prediction is not known.
        """
        variance = torch.log1p(BOTH_SIDES * (self.kurtosis - 1) / torch.as_tensor(tokens, dtype=torch.float64))
        return (quantile * (variance + spread**2).sqrt() / 2).exp()


def _poisson_mean(count: int, rate: float) -> float:
    """The mean of a Poisson distribution of which `count` or more come with probability `rate`."""
    low, high = 0.0, float(count)
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(torch.special.gammainc(torch.tensor(float(count)).double(), torch.tensor(middle).double()))
        low, high = (low, middle) if reached > rate else (middle, high)
    return high


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A predicted floor in nats: rms of r from rounding on both sides, the share of each, and the shape of the noise.

    `rows` holds the same rms by line, for the rows it was predicted on, `first_rms` that of the first tokens of rows.
    `bias` is mean(r) + mean(r^2)/2 of the prediction. `basis` says how it was made.
    """

    rms: float
    trainer_rms: float
    engine_rms: float
    basis: str
    bias: float = 0.0
    shape: NoiseShape = NoiseShape()
    rows: Mapping[int, float] = field(default_factory=dict)
    first_rms: float = math.nan

    def as_dict(self) -> dict[str, object]:
        """Return plain numbers for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "rows"}

    def of_rows(self, lines: Sequence[int]) -> Tensor:
        """The predicted rms of each row [S], at least half of the whole's; NaN for a row without a prediction."""
        smallest = SMALLEST_ROW * self.rms
        own = [max(smallest, self.rows[line]) if line in self.rows else math.nan for line in lines]
        return torch.tensor(own, dtype=torch.float64)


def predict(
    trainer_T: Tensor, engine_T: Tensor, reference_T: Tensor, *, row_T: Tensor, basis: str, min_floor: float,
    lines: Sequence[int] = (),
) -> Floor:  # fmt: skip
    """Predict the floor from logprobs of the same tokens in trainer, engine and reference precision, [T] each.

    Tokens that are not finite in all three (outside a kept set) are left out. Errors on the two sides are taken as
    independent: rms = sqrt(rms(trainer - reference)^2 + rms(engine - reference)^2). `lines[row]` names each row.
    """
    trainer, engine, reference = trainer_T.double(), engine_T.double(), reference_T.double()
    usable = torch.isfinite(trainer) & torch.isfinite(engine) & torch.isfinite(reference)
    if not bool(usable.any()):
        return Floor(rms=math.nan, trainer_rms=math.nan, engine_rms=math.nan, basis=basis)
    first = starts(row_T)[usable]
    row, trainer_error, engine_error = row_T[usable], *(x[usable] - reference[usable] for x in (trainer, engine))
    sides = [float(e.square().mean().sqrt()) for e in (trainer_error, engine_error)]
    if bool(torch.equal(trainer_error, engine_error)):  # one precision on both sides: a second engine rounds otherwise
        noise, rows, bias = math.sqrt(2) * trainer_error, row, 0.0
    else:
        difference = trainer_error - engine_error
        noise = torch.cat([difference, trainer_error + engine_error])
        rows = torch.cat([row, row + int(row_T.max()) + 1])
        bias = float((difference + difference.square() / 2).mean())
    found, by_line_T = torch.unique(row).tolist(), row
    if lines:  # the turns of one conversation share a line
        found = sorted({lines[i] for i in found})
        by_line_T = torch.tensor([found.index(line) if line in found else 0 for line in lines])[row]
    both_S = mean_squares(torch.hypot(trainer_error, engine_error), by_line_T).sqrt().tolist()
    return Floor(
        rms=max(min_floor, math.hypot(*sides)),
        trainer_rms=sides[0],
        engine_rms=sides[1],
        basis=basis,
        bias=bias,
        shape=NoiseShape.of(noise, rows),
        rows={line: max(min_floor, rms) for line, rms in zip(found, both_S, strict=True)} if lines else {},
        first_rms=float(torch.hypot(trainer_error, engine_error)[first].square().mean().sqrt()),
    )


def starts(row_T: Tensor) -> Tensor:
    """True for the first token of each row, [T]."""
    return torch.cat([torch.tensor([True]), row_T[1:] != row_T[:-1]])[: len(row_T)]


def cluster_bootstrap(statistic_S2: Tensor, *, seed: int = 0) -> Tensor:
    """Resample sequences; `statistic_S2` holds (sum, count) per sequence. Returns the resampled means, sorted."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(statistic_S2), (BOOTSTRAPS, len(statistic_S2)), generator=generator)
    totals = statistic_S2[picks].sum(1)
    return (totals[:, 0] / totals[:, 1]).sort().values


def mean_squares(values_T: Tensor, row_T: Tensor) -> Tensor:
    """The mean square of each row's values, [S], in order of row number."""
    sums_S2 = row_sums(values_T.square(), row_T)
    return sums_S2[:, 0] / sums_S2[:, 1]


def row_sums(values_T: Tensor, row_T: Tensor) -> Tensor:
    """Return (sum, count) of the values of each row, [S, 2] float64, in order of row number."""
    _, inverse = torch.unique(row_T, return_inverse=True)
    rows = int(inverse.max()) + 1
    sums = torch.zeros(rows, dtype=torch.float64).index_add_(0, inverse, values_T.double())
    counts = torch.zeros(rows, dtype=torch.float64).index_add_(
        0, inverse, torch.ones_like(values_T, dtype=torch.float64)
    )
    return torch.stack([sums, counts], dim=1)


def sum_per_row(values: Tensor, row: Tensor) -> Tensor:
    """`row_sums` for `cluster_bootstrap`: with fewer than FEW_SEQUENCES rows, blocks of BLOCK_TOKENS neighbouring
    tokens take the place of rows, because one or two rows alone have no spread."""
    if len(torch.unique(row)) < FEW_SEQUENCES:
        row = row * len(row) + torch.arange(len(row)) // BLOCK_TOKENS
    return row_sums(values, row)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A gap judged as a whole, row by row and token by token, its bias, and the first tokens of rows by themselves,
    which an engine computes otherwise than the rest; `reasons` says what is beyond its limit.

    Each `*_limit` is what a clean engine, whose rounding may be `rms_factor` times the predicted one, exceeds with
    probability `false_alarm_rate`. `rms` is of all tokens, `worst_row_rms` of the row (line `worst_row`) that comes
    closest to its limit or is farthest beyond it; `far_rows` counts those beyond. `bias` is mean(r) + mean(r^2)/2, zero
    for pure noise, since noise alone makes mean(r) = -KL = -mean(r^2)/2 to second order; `bias_se` is its standard
    error. `far_tokens` counts tokens beyond `token_limit`. All in nats.
    """

    tokens: int
    rms: float = math.nan
    rms_limit: float = math.nan
    worst_row: int = -1
    worst_row_rms: float = math.nan
    worst_row_limit: float = math.nan
    far_rows: int = 0
    max_abs: float = math.nan
    token_limit: float = math.nan
    far_tokens: int = 0
    bias: float = math.nan
    bias_se: float = math.nan
    bias_limit: float = math.nan
    first_rms: float = math.nan
    first_rms_limit: float = math.nan
    reasons: tuple[str, ...] = ()
    enough: bool = False

    @property
    def within(self) -> bool:
        """Whether the gap is what rounding alone predicts."""
        return self.enough and not self.reasons

    @property
    def visible_rms(self) -> float:
        """The rms in nats, over all tokens, above which a further gap would show: what is left below the limit, and no
        less than the gap that is there."""
        return max(self.rms, math.sqrt(max(0.0, self.rms_limit**2 - self.rms**2)))


def normal_quantile(rate: float) -> float:
    """The value that a standard normal exceeds with probability `rate`."""
    return NormalDist().inv_cdf(1 - rate)


def judge(
    r_T: Tensor, row_T: Tensor, floor: Floor, limits: LimitsConfig, *, lines: Sequence[int] = (), left: bool = False
) -> Judgement:
    """Judge the finite entries of r, in nats, against a floor; `lines[row]` names each row.

    With `left`, r is what a cause leaves unexplained: then most tokens must be at the floor too (`judge_quartile`).

    What spreads the limits (how heavy the tail is, how much rows differ) is read off the prediction and never off the
    gap itself: a fault in a few rows would widen its own limits otherwise.
    """
    usable = torch.isfinite(r_T)
    r, row = r_T[usable].double(), row_T[usable]
    tokens = len(r)
    if not tokens:
        return Judgement(tokens=0)
    shape, rate = floor.shape, limits.false_alarm_rate
    rms = float(r.square().mean().sqrt())
    rms_limit = limits.rms_factor * floor.rms * float(shape.excess(tokens, normal_quantile(rate)))
    reasons = []
    if rms > rms_limit:
        reasons.append(f"rms {rms:.3g} nats is {rms / floor.rms:.1f} times the predicted floor {floor.rms:.3g}")
    values = {"tokens": tokens, "rms": rms, "rms_limit": rms_limit}
    for judged, reason in (
        _judge_bias(r, row, floor, limits), _judge_rows(r, row, floor, limits, lines), _judge_tokens(r, floor, limits),
        _judge_first(r[starts(row_T)[usable]], floor, limits),
    ):  # fmt: skip
        values |= judged
        reasons += [reason] if reason else []
    if left and (reason := judge_quartile(r_T, row_T, floor, limits, lines=lines)) is not None:
        reasons.append(reason)
    return Judgement(**values, reasons=tuple(reasons), enough=tokens >= limits.min_tokens)  # type: ignore[arg-type]


def _judge_bias(r: Tensor, row: Tensor, floor: Floor, limits: LimitsConfig) -> tuple[dict[str, float], str | None]:
    """An offset may be a share of the floor, but no more than `sequence_nats` over a completion of the mean length."""
    centred = r + r.square() / 2
    bias = float(centred.mean())
    bias_se = max(
        float(cluster_bootstrap(sum_per_row(centred, row), seed=1).std()),
        float(centred.std(unbiased=False)) / math.sqrt(len(r)),
    )
    mean_length = len(r) / len(torch.unique(row))
    allowed = min(limits.bias_factor * floor.rms, abs(floor.bias) + limits.sequence_nats / mean_length)
    bias_limit = max(limits.min_bias, allowed, limits.bias_sigmas * bias_se)
    reason = f"bias {bias:+.3g} nats a token, {abs(bias) / max(bias_se, 1e-300):.0f} standard errors from zero"
    numbers = {"bias": bias, "bias_se": bias_se, "bias_limit": bias_limit}
    return numbers, reason if abs(bias) > bias_limit else None


def _judge_rows(
    r: Tensor, row: Tensor, floor: Floor, limits: LimitsConfig, lines: Sequence[int]
) -> tuple[dict[str, float], str | None]:
    """Each row against what is predicted for itself; without a prediction of its own, against all rows'."""
    found, rms_S, limit_S = _row_limits(r, row, floor, limits, lines)
    worst = int((rms_S / limit_S).argmax())
    far = int((rms_S > limit_S).sum()) if len(found) > 1 else 0
    numbers = {
        "worst_row": lines[int(found[worst])] if lines else int(found[worst]), "worst_row_rms": float(rms_S[worst]),
        "worst_row_limit": float(limit_S[worst]), "far_rows": far,
    }  # fmt: skip
    reason = (
        f"{far} of {len(found)} rows are off by themselves, the worst (line {numbers['worst_row']}) by rms "
        f"{numbers['worst_row_rms']:.3g} nats where {numbers['worst_row_limit']:.3g} would be rounding"
    )
    return numbers, reason if far else None


def rows_beyond(
    r_T: Tensor, row_T: Tensor, floor: Floor, limits: LimitsConfig, *, lines: Sequence[int] = ()
) -> list[int]:
    """The values of row_T of rows that are off by themselves."""
    usable = torch.isfinite(r_T)
    if not bool(usable.any()):
        return []
    found, rms_S, limit_S = _row_limits(r_T[usable].double(), row_T[usable], floor, limits, lines)
    return found[rms_S > limit_S].tolist()


def _row_limits(
    r: Tensor, row: Tensor, floor: Floor, limits: LimitsConfig, lines: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its value of row_T, its rms, and the largest rms that rounding allows it."""
    found = torch.unique(row)
    sums_S2 = row_sums(r.square(), row)
    rms_S = (sums_S2[:, 0] / sums_S2[:, 1]).sqrt()
    own_S = floor.of_rows([lines[int(i)] for i in found]) if lines else torch.full_like(rms_S, math.nan)
    quantile = normal_quantile(limits.false_alarm_rate / len(found))
    known = floor.shape.excess(sums_S2[:, 1], quantile) * own_S
    unknown = floor.shape.excess(sums_S2[:, 1], quantile, spread=floor.shape.row_spread) * floor.rms
    return found, rms_S, limits.rms_factor * torch.where(own_S.isnan(), unknown, known)


def _judge_first(r: Tensor, floor: Floor, limits: LimitsConfig) -> tuple[dict[str, float], str | None]:
    """The first tokens of rows together, against what is predicted for them."""
    if len(r) < FEW_SEQUENCES or math.isnan(floor.first_rms):
        return {}, None
    rms, predicted = float(r.square().mean().sqrt()), max(floor.first_rms, SMALLEST_ROW * floor.rms)
    quantile = normal_quantile(limits.false_alarm_rate)
    limit = limits.rms_factor * predicted * float(floor.shape.excess(len(r), quantile))
    reason = f"the {len(r)} first tokens are off by rms {rms:.3g} nats where {limit:.3g} would be rounding"
    return {"first_rms": rms, "first_rms_limit": limit}, reason if rms > limit else None


def _judge_tokens(r: Tensor, floor: Floor, limits: LimitsConfig) -> tuple[dict[str, float], str | None]:
    """The largest |r|, and those behind it, against the tail of the predicted noise."""
    ordered = r.abs().sort(descending=True).values
    scale, tokens = limits.rms_factor * floor.rms, len(r)
    rate = limits.false_alarm_rate / len(TAIL_COUNTS)
    sizes = {n: scale * floor.shape.exceeded_by(n, tokens=tokens, rate=rate) for n in TAIL_COUNTS if n <= tokens}
    broken = [n for n, size in sizes.items() if float(ordered[n - 1]) > size]
    limit = sizes[max(broken)] if broken else sizes[1]
    far = int((ordered > limit).sum())
    numbers = {"max_abs": float(ordered[0]), "token_limit": limit, "far_tokens": far}
    reason = f"{far} of {tokens} tokens beyond {limit:.3g} nats, the farthest by {float(ordered[0]):.3g}"
    return numbers, reason if broken else None


def judge_quartile(
    r_T: Tensor, row_T: Tensor, floor: Floor, limits: LimitsConfig, *, lines: Sequence[int] = ()
) -> str | None:
    """Why more of the finite entries than rounding explains lie beyond the upper quartile of the noise, or None.

    Where the tail is heavy, a few tokens decide the rms: its limit for a hundred tokens is three floors. Whatever a
    cause leaves must be at the floor in the other tokens as well, and a share of tokens does not depend on the tail.
    Its variance is taken as binomial, times BOTH_SIDES for the prediction's own quartile. A row that is predicted to
    round more than the whole is held against its own prediction.
    """
    usable = torch.isfinite(r_T)
    tokens = int(usable.sum())
    if not tokens:
        return None
    found, inverse = torch.unique(row_T[usable], return_inverse=True)
    own_S = floor.of_rows([lines[int(i)] for i in found]) if lines else torch.full((len(found),), math.nan)
    size_S = limits.rms_factor * floor.shape.quartile * own_S.nan_to_num(floor.rms).clamp_min(floor.rms)
    share = float((r_T[usable].double().abs() > size_S[inverse]).double().mean())
    spread = math.sqrt(BOTH_SIDES * QUARTER * (1 - QUARTER) / tokens)
    limit = QUARTER + normal_quantile(limits.false_alarm_rate) * spread
    reason = (
        f"{share:.0%} of {tokens} tokens beyond {float(size_S.min()):.3g} nats, where rounding puts up to {limit:.0%}"
    )
    return reason if share > limit else None
