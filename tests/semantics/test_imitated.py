"""16 bits on a CPU without instructions for them: float32 that is rounded stands in for a 16-bit body and head."""

import pytest
import torch
from tests.conftest import DATA

from trueup.knobs import CheckConfig
from trueup.model.imitated import imitated
from trueup.model.load import load_model
from trueup.model.scoring import ScoredRow, hidden_states
from trueup.parity.run import check_trace
from trueup.policy import head as heads
from trueup.policy.head import Head


@pytest.fixture
def no_instructions(monkeypatch):
    monkeypatch.setattr(heads, "_instructions", lambda: frozenset({"avx2"}))


def test_what_counts_as_having_them(monkeypatch):
    cpu = torch.device("cpu")
    for found, has in (({"avx2"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True), ({"other"}, True)):
        monkeypatch.setattr(heads, "_instructions", lambda found=found: frozenset(found))
        assert heads.multiplies(torch.bfloat16, cpu) is has
        assert heads.multiplies(torch.float32, cpu) and heads.multiplies(torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_imitated_body_is_as_far_from_float32_as_a_real_one(tiny_model, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (16, 48), generator=generator).tolist()
    rows = [ScoredRow(prompt_ids=tuple(r[:16]), completion_ids=tuple(r[16:])) for r in ids]
    real, exact = load_model(tiny_model, dtype=dtype), load_model(tiny_model, dtype=torch.float32)
    stand_in = imitated(real)
    exact.lm.load_state_dict({n: t.to(dtype).float() for n, t in exact.stored_tensors().items()}, strict=False)
    real_TD, stand_in_TD, exact_TD = (
        torch.cat(hidden_states(m, rows, batch_rows=16)).double() for m in (real, stand_in, exact)
    )
    off = [float((states_TD - exact_TD).square().mean().sqrt()) for states_TD in (real_TD, stand_in_TD)]
    assert off[1] / off[0] == pytest.approx(1, abs=0.25)
    assert (stand_in_TD.to(dtype) == stand_in_TD).all(), "values of the dtype, in float32"


def test_an_imitated_bf16_head_gives_the_numbers_of_a_real_one(no_instructions):
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(5000, 64, generator=generator).bfloat16()
    hidden_TD = torch.randn(20, 64, generator=generator)
    head = Head(weight_VD=weight_VD, matmul_dtype=torch.bfloat16)
    out_TV = head.logits_into(hidden_TD, torch.empty(20, 5000))
    exact_TV = hidden_TD.bfloat16().double() @ weight_VD.double().T
    assert (out_TV == out_TV.bfloat16()).all()
    assert ((out_TV - exact_TV).abs() <= exact_TV.abs() / 256 + 1e-5).all(), "rounded once, from exact products"


@pytest.mark.slow
@pytest.mark.smollm2
def test_a_clean_engine_agrees_on_such_a_cpu_and_the_report_says_so(smollm2, no_instructions):
    report = check_trace(CheckConfig(trace=DATA / "vllm-0.18.1-processed.jsonl", model=smollm2, max_rows=4))
    assert report.exit_code == 0, [s.why for s in report.settings]
    assert any("no instructions for 16 bits" in note for note in report.notes)
