"""S7 in parity/hypotheses/defaults.py: do rows go on drawing ids that other rows do not hold?"""

from dataclasses import replace

import pytest
import torch
from tests.table_kit import evidence_of, logits_of, trace_rows

from trueup.parity.hypotheses.defaults import _goes_on


def parts(targets_T, length=16):
    """(every other row, all rows) as evidence."""
    rows = trace_rows(targets_T, length)
    logits_TV = logits_of(len(targets_T), int(targets_T.max()) + 1)
    fit = evidence_of(logits_TV[: len(targets_T) // 2], rows[::2])
    return fit, evidence_of(logits_TV, rows)


@pytest.mark.parametrize("seed", range(20))
def test_few_allowed_ids_are_soon_known(seed):
    """Fourteen ids, some of them rare: a few of 64 tokens are new after another 64."""
    weights = torch.tensor([2.0 ** -(i / 2) for i in range(14)])
    targets_T = torch.multinomial(weights, 128, replacement=True, generator=torch.Generator().manual_seed(seed))
    assert not _goes_on(*parts(targets_T))


@pytest.mark.parametrize(("tokens", "ids"), [(128, 120), (800, 400), (4096, 4000)])
def test_a_language_goes_on_with_new_ids(tokens, ids):
    for seed in range(5):
        targets_T = torch.randint(0, ids, (tokens,), generator=torch.Generator().manual_seed(seed))
        assert _goes_on(*parts(targets_T))


def test_without_other_rows_nothing_is_known():
    fit, _ = parts(torch.zeros(128, dtype=torch.long))
    assert _goes_on(fit, replace(fit))
