"""The trainer's side on a GPU: the same logprobs, gradients and verdicts as on the CPU that the suite runs on.

Shapes: T tokens, D hidden width, V vocabulary. The engine of the traces is vLLM on a CPU: each verdict on them compares
kernels of two machines.
"""

import pytest
import torch
from tests.conftest import DATA
from tests.semantics.test_shared_prompts import rows_of_groups

from trueup.knobs import CheckConfig
from trueup.model.altered import ALTERATIONS
from trueup.model.load import load_model
from trueup.model.misbatched import BATCHINGS, misbatched_states
from trueup.model.packed import open_policy, packed_hidden_states
from trueup.model.scoring import hidden_states
from trueup.model.simulate import ROUNDINGS, simulate
from trueup.parity.run import check_trace
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores
from trueup.policy.processing import Distribution, History

pytestmark = pytest.mark.cuda
FILTERED = Distribution(temperature=0.7, top_p=0.9, top_k=50, presence_penalty=0.3)


@pytest.fixture(autouse=True)
def gpu():
    assert torch.cuda.is_available(), "these tests need an NVIDIA GPU: leave them out with -m 'not cuda'"


def scored(hidden_TD, weight_VD, targets_T, dist, matmul_dtype):
    """Logprobs and entropies, and the gradients of their weighted sum by states and weight, all on the CPU."""
    hidden_TD, weight_VD = (t.detach().clone().requires_grad_() for t in (hidden_TD, weight_VD))
    device = hidden_TD.device
    history = History(row_T=torch.zeros(len(targets_T), dtype=torch.long, device=device), prompts=(targets_T[:3],))
    found = token_scores(
        hidden_TD, Head(weight_VD=weight_VD, matmul_dtype=matmul_dtype), targets_T, dist=dist, history=history
    )
    weight_T = torch.linspace(0.5, 1.5, len(targets_T), device=device, dtype=found.logprobs_T.dtype)
    usable_T = torch.isfinite(found.logprobs_T)
    (weight_T * (found.logprobs_T + 0.1 * found.entropy_T))[usable_T].sum().backward()
    return [t.detach().double().cpu() for t in (found.logprobs_T, found.entropy_T, hidden_TD.grad, weight_VD.grad)]


@pytest.mark.parametrize("dist", [Distribution(), FILTERED], ids=["plain", "filtered"])
def test_logprobs_and_gradients_are_those_of_float64(dist):
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(300, 64, generator=generator)
    weight_VD = torch.randn(5003, 64, generator=generator) / 4
    targets_T = torch.randint(5003, (300,), generator=generator)
    expected = scored(hidden_TD.double(), weight_VD.double(), targets_T, dist, torch.float64)
    got = scored(hidden_TD.cuda(), weight_VD.cuda(), targets_T.cuda(), dist, torch.float32)
    assert bool((torch.isfinite(got[0]) == torch.isfinite(expected[0])).all())
    for ours, exact in zip(got, expected, strict=True):
        finite = torch.isfinite(exact)
        assert float((ours - exact)[finite].norm() / exact[finite].norm()) < 1e-5


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_the_training_forward_is_the_cpus(smollm2, dtype, tolerance):
    rows = rows_of_groups()
    found = []
    for device in ("cpu", "cuda"):
        model = open_policy(load_model(smollm2, dtype=dtype, device=device), bitwise=False)
        targets_T = torch.tensor([i for r in rows for i in r.completion_ids], device=device)
        with torch.no_grad():
            hidden_TD = packed_hidden_states(model, rows, share_prompts=True)
            found.append(token_scores(hidden_TD, Head.of(model, torch.float32), targets_T).logprobs_T.cpu())
    assert float((found[0] - found[1]).square().mean().sqrt()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bitwise_states_do_not_depend_on_the_neighbours(smollm2, dtype):
    rows = rows_of_groups()
    model = open_policy(load_model(smollm2, dtype=dtype, device="cuda"), bitwise=True)
    with torch.no_grad():
        together = packed_hidden_states(model, rows, share_prompts=True)
        alone = torch.cat([packed_hidden_states(model, [row]) for row in rows])
    assert torch.equal(together, alone)


VALUES = {"rope_theta": 5e5, "rope_linear": 2.0, "embedding_scale": 2.0, "kv_float8": 4, "window": 8}


@pytest.fixture(scope="module")
def both(smollm2):
    """The float32 model on each device."""
    return [load_model(smollm2, dtype=torch.float32, device=device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("name", [*ROUNDINGS, *ALTERATIONS])
def test_an_engine_imitated_is_the_one_imitated_on_a_cpu(both, name):
    rows = rows_of_groups()
    plain = torch.cat(hidden_states(both[0], rows, batch_rows=4))
    found = []
    for model in both:
        with simulate(model, name, VALUES.get(name, 0.0)):
            found.append(torch.cat(hidden_states(model, rows, batch_rows=4)).cpu())
    # A rounding falls the other way where the last bits of float32 differ: two thirds of the effect for norm_bf16.
    assert float((found[1] - found[0]).norm()) < float((found[0] - plain).norm())


@pytest.mark.parametrize("name", BATCHINGS)
def test_a_wrong_batch_is_wrong_as_on_a_cpu(both, name):
    cpu, cuda = (torch.cat(misbatched_states(model, rows_of_groups(), name, 4)).cpu() for model in both)
    assert float((cuda - cpu).norm() / cpu.norm()) < 1e-3


@pytest.mark.parametrize(
    "name, causes",
    [
        ("0.18.1-defaults", ["S1"]), ("0.32.0-defaults", ["S1"]), ("0.18.1-processed", []), ("0.32.0-processed", []),
        ("0.32.0-processed-fp32", []), ("0.8.5-v0", ["I1"]),
    ],
)  # fmt: skip
def test_recorded_traces_have_the_verdict_they_have_on_a_cpu(smollm2, name, causes):
    report = check_trace(CheckConfig(trace=DATA / f"vllm-{name}.jsonl", model=smollm2, device="cuda"))
    for setting in report.settings:
        rms, floor = setting.gap["rms"], setting.noise_floor["rms"]
        print(f"{name:22} {setting.label:58} {setting.verdict:9} rms {rms:.2e} floor {floor:.2e}")
    assert [c.id for c in report.causes] == causes


@pytest.mark.parametrize("matmul_dtype", [torch.float32, torch.bfloat16], ids=["fp32 head", "bf16 head"])
def test_tensor_cores_in_tf32_are_not_an_fp32_head(smollm2, matmul_dtype):
    """What torch does if it is allowed to: between a bf16 head and an fp32 one. trueup does not allow it."""
    model = load_model(smollm2, dtype=torch.float32, device="cuda")
    generator = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(1000, 20000, (8, 64), generator=generator).cuda()
    hidden_TD = model.body(ids_BL).last_hidden_state.flatten(0, 1)
    targets_T = ids_BL.roll(-1, 1).flatten()
    exact = Head.of(model, torch.float64)

    def rms(head):
        with torch.no_grad():
            gap_T = (
                token_scores(hidden_TD, head, targets_T).logprobs_T
                - token_scores(hidden_TD, exact, targets_T).logprobs_T
            )
        return float(gap_T.double().square().mean().sqrt())

    plain = rms(Head.of(model, matmul_dtype))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        tf32 = rms(Head.of(model, torch.float32))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    print(f"rms {plain:.2e}, tf32 {tf32:.2e}")
    assert (plain < tf32 / 30) if matmul_dtype == torch.float32 else (tf32 < plain)
