"""parity/compare.py: when one prediction is clearly better than another, follows the engine, or only its average."""

import torch

from trueup.parity.compare import Residual, clearly_better

ROWS, LENGTH = 12, 20
ROW = torch.arange(ROWS * LENGTH) // LENGTH


def left(sizes):
    """Residuals of one size in each row."""
    r_T = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(LENGTH)
    usable = torch.ones(len(r_T), dtype=torch.bool)
    return Residual(residual_T=r_T, usable_T=usable, edge_T=~usable, row_T=ROW)


def test_better_on_average_is_not_clearly_better():
    """A prediction that wins in seven rows of twelve wins in most resamples, and not in 99 of 100."""
    some = left([0.1 if row < 7 else 0.3 for row in range(ROWS)])
    other = left([0.3 if row < 7 else 0.1 for row in range(ROWS)])
    assert float(some.residual_T.abs().mean()) < float(other.residual_T.abs().mean())
    assert not clearly_better(some, other, 0.0) and not clearly_better(other, some, 0.0)
    assert clearly_better(left([0.1] * ROWS), left([0.11] * ROWS), 0.0)
