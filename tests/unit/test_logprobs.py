"""policy/logprobs.py, head.py, processing.py against hand-computed values and a reference written the plain way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trueup.errors import ModelError, NumericsError
from trueup.policy import logprobs as module
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores, token_scores_under
from trueup.policy.processing import Distribution, History
from trueup.policy.reduction import Reducer, Wanted
from trueup.types import SAMPLING_FIELDS, LogprobKind, SamplingParams


def identity_head(logits: list[list[float]]) -> tuple[torch.Tensor, Head]:
    """Hidden states that are the logits themselves."""
    hidden = torch.tensor(logits)
    return hidden, Head(weight_VD=torch.eye(hidden.shape[1]))


def reference(logits, targets, dist, history=None):
    """Row by row, in float64, the way vLLM documents it: (logprob, entropy, log kept mass, kept)."""
    out = []
    for t, row in enumerate(logits.double()):
        z = row.clone()
        if dist.penalises:
            owner = int(history.row_T[t])
            earlier = [int(targets[s]) for s in range(t) if int(history.row_T[s]) == owner]
            for v in set(earlier) | {int(i) for i in history.prompts[owner]}:
                z[v] = z[v] / dist.repetition_penalty if z[v] > 0 else z[v] * dist.repetition_penalty
            for v in set(earlier):
                z[v] -= dist.frequency_penalty * earlier.count(v) + dist.presence_penalty
        z = z / dist.temperature
        full = z.softmax(0)
        kept = torch.ones_like(z, dtype=torch.bool)

        def min_p(kept, z=z):
            return kept & (z >= z.max() + math.log(dist.min_p)) if dist.min_p else kept

        def top_kp(kept, z=z):
            z = z.masked_fill(~kept, -math.inf)
            if dist.top_k:
                kept = kept & (z >= z.sort(descending=True).values[min(dist.top_k, len(z)) - 1])
                z = z.masked_fill(~kept, -math.inf)
            if dist.top_p < 1:
                order = z.argsort(descending=True)
                p = z.softmax(0)[order]
                inside = (p.cumsum(0) - p) < dist.top_p
                inside[0] = True
                allowed = torch.zeros_like(kept)
                allowed[order[inside]] = True
                kept = kept & allowed
            return kept

        kept = top_kp(min_p(kept)) if dist.min_p_first else min_p(top_kp(kept))
        logp = z.masked_fill(~kept, -math.inf).log_softmax(0)
        p = logp.exp()
        entropy = -(p[kept] * logp[kept]).sum()
        out.append((float(logp[targets[t]]), float(entropy), float(full[kept].sum().log()), int(kept.sum())))
    *reals, kept = zip(*out, strict=True)
    return [*(torch.tensor(column, dtype=torch.float64) for column in reals), torch.tensor(kept)]


DISTRIBUTIONS = [
    Distribution(),
    Distribution(temperature=0.7),
    Distribution(temperature=0.7, top_p=0.9),
    Distribution(top_k=5),
    Distribution(temperature=1.3, top_k=12, top_p=0.8),
    Distribution(min_p=0.1),
    Distribution(min_p=0.2, top_p=0.7, min_p_first=True),
    Distribution(min_p=0.2, top_p=0.7, min_p_first=False),
    Distribution(presence_penalty=0.8, frequency_penalty=0.4),
    Distribution(repetition_penalty=1.3, temperature=0.8, top_p=0.95),
]


def batch(tokens=9, width=6, vocab=37, seed=0, scale=3.0):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, width) * scale
    weight = torch.randn(vocab, width)
    targets = torch.randint(0, vocab, (tokens,))
    history = History(
        row_T=torch.tensor([0] * (tokens // 2) + [1] * (tokens - tokens // 2)),
        prompts=(torch.tensor([1, 2, 3, 3]), torch.tensor([5, 0])),
    )
    return hidden, weight, targets, history


def test_a_request_names_its_distribution_whole():
    sampling = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=12, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.4,
    )  # fmt: skip
    found = Distribution.of(LogprobKind.PROCESSED, sampling)
    names = [n for n in SAMPLING_FIELDS if hasattr(found, n)]
    assert len(names) == 7 and all(getattr(found, n) == getattr(sampling, n) for n in names) and found.min_p_first
    assert not Distribution.of(LogprobKind.PROCESSED, sampling, min_p_first=False).min_p_first
    assert Distribution.of(LogprobKind.PROCESSED, SamplingParams(), min_p_first=False).min_p_first, "no min-p, no order"
    assert Distribution.of(LogprobKind.TEMPERED, sampling) == Distribution(temperature=0.7)
    assert Distribution.of(LogprobKind.RAW, sampling) == Distribution()


@pytest.mark.parametrize("wrong", [{"top_p": 1.5}, {"top_p": 0.0}, {"min_p": 1.5}, {"top_k": -1}])
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(NumericsError, match="not a distribution"):
        Distribution(**wrong)


def test_two_tokens_by_hand():
    hidden, head = identity_head([[math.log(3.0), 0.0]])
    scores = token_scores(hidden, head, torch.tensor([0]))
    assert float(scores.logprobs_T) == pytest.approx(math.log(0.75), abs=1e-6)
    assert float(scores.entropy_T) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)
    half = token_scores(hidden, head, torch.tensor([1]), dist=Distribution(temperature=0.5))
    assert float(half.logprobs_T) == pytest.approx(math.log(1 / 10), abs=1e-6)  # 3^2 against 1


def test_top_p_by_hand_renormalises_and_reports_the_kept_mass():
    hidden, head = identity_head([[math.log(5.0), math.log(3.0), math.log(2.0)]])
    scores = token_scores(hidden, head, torch.tensor([1]), dist=Distribution(top_p=0.7))
    assert float(scores.logprobs_T) == pytest.approx(math.log(3 / 8), abs=1e-6)
    assert float(scores.log_kept_mass_T) == pytest.approx(math.log(0.8), abs=1e-6)
    assert int(scores.kept_T) == 2
    outside = token_scores(hidden, head, torch.tensor([2]), dist=Distribution(top_p=0.7))
    assert float(outside.logprobs_T) == -math.inf


def test_penalties_by_hand():
    hidden, head = identity_head([[2.0, -1.0, 0.0]] * 2)
    history = History(row_T=torch.tensor([0, 0]), prompts=(torch.tensor([1]),))
    dist = Distribution(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    scores = token_scores(hidden, head, torch.tensor([0, 0]), dist=dist, history=history)
    first = [2.0, -2.0, 0.0]  # the prompt's token 1 is negative: multiplied
    second = [2.0 / 2 - 0.75, -2.0, 0.0]  # token 0 was generated once: divided, then presence and frequency
    for t, row in enumerate((first, second)):
        assert float(scores.logprobs_T[t]) == pytest.approx(float(torch.tensor(row).log_softmax(0)[0]), abs=1e-6)


def test_min_p_order_is_where_v0_and_v1_differ():
    hidden, head = identity_head([[math.log(p) for p in (0.5, 0.2, 0.18, 0.12)]])
    v1 = Distribution(min_p=0.37, top_p=0.72, min_p_first=True)  # min-p keeps 0.5 and 0.2; 0.5/0.7 < 0.72: two kept
    v0 = Distribution(min_p=0.37, top_p=0.72, min_p_first=False)  # top-p keeps three, min-p leaves two
    assert int(token_scores(hidden, head, torch.tensor([0]), dist=v1).kept_T) == 2
    assert int(token_scores(hidden, head, torch.tensor([0]), dist=v0).kept_T) == 2
    tight = [Distribution(min_p=0.37, top_p=0.69, min_p_first=first) for first in (True, False)]
    assert [int(token_scores(hidden, head, torch.tensor([0]), dist=d).kept_T) for d in tight] == [1, 2]


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("extra", [{}, {"softcap": 5.0}, {"bias_V": torch.linspace(-1, 1, 37), "scale": 0.5}], ids=str)
def test_against_the_plain_reference(dist, extra):
    hidden, weight, targets, history = batch()
    head = Head(weight_VD=weight, **extra)
    logits = hidden.double() @ weight.double().T
    if "bias_V" in extra:
        logits = logits + extra["bias_V"].double()
    logits = logits * extra.get("scale", 1.0)
    if "softcap" in extra:
        logits = extra["softcap"] * torch.tanh(logits / extra["softcap"])
    scores = token_scores(hidden, head, targets, dist=dist, history=history)
    logprob, entropy, mass, kept = reference(logits, targets, dist, history)
    assert torch.allclose(scores.logprobs_T.double(), logprob, atol=2e-5, rtol=0)
    assert torch.allclose(scores.entropy_T.double(), entropy, atol=2e-5, rtol=0)
    assert torch.allclose(scores.log_kept_mass_T.double(), mass, atol=2e-5, rtol=0)
    assert torch.equal(scores.kept_T, kept)
    top = (scores.logprobs_T - scores.top_logprobs_T).max()
    assert float(top) <= 1e-6


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("extra", [{}, {"softcap": 4.0, "scale": 0.7}], ids=str)
def test_gradients_against_float64_finite_differences(dist, extra, monkeypatch):
    for name, value in (("GRAD_BLOCK", 16), ("GRAD_TOKENS", 4), ("STREAM_BLOCK", 10), ("STREAM_TOKENS", 4)):
        monkeypatch.setattr(module, name, value)  # several blocks and chunks even for a tiny vocabulary
    hidden, weight, targets, history = batch(scale=1.0)
    bias = torch.linspace(-0.3, 0.3, 37)
    upstream, upstream_entropy = torch.randn(2, len(targets))

    def objective(parts, dtype):
        h, w, b = parts
        head = Head(weight_VD=w, bias_V=b, matmul_dtype=dtype, **extra)
        scores = token_scores(h, head, targets, dist=dist, history=history)
        inside = torch.isfinite(scores.logprobs_T)
        chosen = torch.where(inside, scores.logprobs_T, 0.0)
        return (chosen * torch.where(inside, upstream, 0.0).to(dtype)).sum() + (
            scores.entropy_T * upstream_entropy
        ).sum()

    parts32 = [p.clone().requires_grad_() for p in (hidden, weight, bias)]
    objective(parts32, torch.float32).backward()
    generator = torch.Generator().manual_seed(1)
    for index, part in enumerate(parts32):
        for flat in torch.randperm(part.numel(), generator=generator)[:12].tolist():
            sides = []
            for step in (1e-5, -1e-5):
                moved = [p.detach().double() for p in parts32]
                moved[index] = moved[index].clone()
                moved[index].view(-1)[flat] += step
                sides.append(float(objective(moved, torch.float64)))
            finite = (sides[0] - sides[1]) / 2e-5
            assert float(part.grad.view(-1)[flat]) == pytest.approx(finite, abs=1e-5 * max(1.0, abs(finite)))


def test_many_distributions_from_one_pass_equal_one_by_one_bit_for_bit():
    hidden, weight, targets, history = batch(tokens=40, vocab=301)
    head = Head(weight_VD=weight)
    together = token_scores_under(hidden, head, targets, dists=DISTRIBUTIONS, history=history)
    for dist, scores in zip(DISTRIBUTIONS, together, strict=True):
        alone = token_scores(hidden, head, targets, dist=dist, history=history)
        assert torch.equal(alone.logprobs_T, scores.logprobs_T)
        assert torch.equal(alone.entropy_T, scores.entropy_T)


def test_fp32_head_is_not_fp32_softmax():
    torch.manual_seed(0)
    hidden = (torch.randn(64, 48) * 4).bfloat16()
    weight = torch.randn(500, 48).bfloat16()
    targets = torch.randint(0, 500, (64,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    upcast = (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    fp32 = token_scores(hidden, Head(weight_VD=weight), targets).logprobs_T
    bf16 = token_scores(hidden, Head(weight_VD=weight, matmul_dtype=torch.bfloat16), targets).logprobs_T
    assert (fp32 - exact).abs().max() < 1e-4
    assert torch.allclose(bf16, upcast, atol=1e-5)
    assert (bf16 - exact).abs().mean() > 100 * (fp32 - exact).abs().mean()


def test_bf16_head_gradient_flows_and_is_near_the_fp32_one():
    hidden, weight, targets, _ = batch(tokens=32, width=24)
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        w = weight.bfloat16().requires_grad_()
        token_scores(hidden.bfloat16(), Head(weight_VD=w, matmul_dtype=dtype), targets).logprobs_T.sum().backward()
        grads.append(w.grad.float())
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


def test_nucleus_wider_than_the_first_guess_is_sorted_whole():
    torch.manual_seed(0)
    logits = torch.randn(5, 2000) * 0.01  # almost flat: 90 % of the mass needs about 1,800 tokens
    targets = torch.zeros(5, dtype=torch.long)
    dist = Distribution(top_p=0.9)
    scores = token_scores(logits, Head(weight_VD=torch.eye(2000)), targets, dist=dist)
    assert torch.equal(scores.kept_T, reference(logits, targets, dist)[3])
    assert int(scores.kept_T.min()) > 1500


@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50), dist=st.sampled_from(DISTRIBUTIONS[:8]))
@settings(max_examples=40)
def test_a_constant_added_to_all_logits_changes_nothing(seed, shift, dist):
    hidden, weight, targets, _ = batch(seed=seed)
    plain = token_scores(hidden, Head(weight_VD=weight), targets, dist=dist)
    moved = token_scores(hidden, Head(weight_VD=weight, bias_V=torch.full((37,), shift)), targets, dist=dist)
    same = torch.isfinite(plain.logprobs_T) & torch.isfinite(moved.logprobs_T)
    assert torch.allclose(plain.logprobs_T[same], moved.logprobs_T[same], atol=1e-4)
    assert float(plain.logprobs_T.max()) <= 1e-4


@given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
@settings(max_examples=20)
def test_permuting_tokens_permutes_scores(seed, order):
    hidden, weight, targets, _ = batch(seed=seed, tokens=17)
    permutation = list(range(17))
    order.shuffle(permutation)
    plain = token_scores(hidden, Head(weight_VD=weight), targets).logprobs_T
    shuffled = token_scores(hidden[permutation], Head(weight_VD=weight), targets[permutation]).logprobs_T
    assert torch.allclose(plain[permutation], shuffled, atol=1e-6)


@pytest.mark.parametrize("masked", [slice(90, 100), slice(0, 40)], ids=["end", "first blocks"])
@pytest.mark.parametrize("dist", [Distribution(), Distribution(temperature=0.7, top_p=0.9)], ids=str)
def test_a_masked_padded_vocabulary_gives_finite_entropy_and_gradients(masked, dist, monkeypatch):
    for name in ("STREAM_BLOCK", "GRAD_BLOCK"):
        monkeypatch.setattr(module, name, 16)
    hidden, weight, _, _ = batch(vocab=100)
    targets = torch.arange(45, 54)
    bias = torch.zeros(100)
    bias[masked] = -math.inf
    keep = torch.isfinite(bias)
    hidden.requires_grad_()
    scores = token_scores(hidden, Head(weight_VD=weight, bias_V=bias), targets, dist=dist)
    (scores.logprobs_T[torch.isfinite(scores.logprobs_T)].sum() + scores.entropy_T.sum()).backward()
    short = token_scores(hidden.detach(), Head(weight_VD=weight[keep]), targets - int((~keep[:45]).sum()), dist=dist)
    assert torch.allclose(scores.logprobs_T, short.logprobs_T, atol=1e-5)
    assert torch.allclose(scores.entropy_T, short.entropy_T, atol=1e-5)
    assert bool(torch.isfinite(hidden.grad).all())


def test_autocast_around_forward_and_backward_changes_nothing():
    grads = []
    for enabled in (False, True):
        hidden, weight, targets, _ = batch()
        hidden.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            token_scores(hidden, Head(weight_VD=weight), targets).logprobs_T.sum().backward()
        grads.append(hidden.grad)
    assert torch.equal(*grads)


def test_a_bf16_head_rounds_each_step_of_the_soft_cap_as_engines_do():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16() * 4, torch.randn(200, 32).bfloat16()
    targets = torch.randint(0, 200, (64,))
    own = ((hidden @ weight.T) / 30.0).tanh() * 30.0
    expected = own.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    head = Head(weight_VD=weight, softcap=30.0, matmul_dtype=torch.bfloat16)
    assert torch.allclose(token_scores(hidden, head, targets).logprobs_T, expected, atol=1e-5)


def test_refusals_say_what_is_wrong():
    hidden, weight, targets, _ = batch()
    head = Head(weight_VD=weight)
    broken = hidden.clone()
    broken[3, 0] = math.nan
    with pytest.raises(NumericsError, match="not finite at 1 of 9 tokens, first at 3"):
        token_scores(broken, head, targets)
    with pytest.raises(NumericsError, match="head weight or bias"):
        token_scores(hidden, Head(weight_VD=weight * math.nan), targets)
    with pytest.raises(NumericsError, match="no tokens"):
        token_scores(hidden[:0], head, targets[:0])
    with pytest.raises(NumericsError, match="vocabulary has 37"):
        token_scores(hidden, head, targets + 100)
    with pytest.raises(NumericsError, match="greedy"):
        Distribution.of(LogprobKind.PROCESSED, SamplingParams(temperature=0.0))
    with pytest.raises(NumericsError, match="pass history"):
        token_scores(hidden, head, targets, dist=Distribution(presence_penalty=1.0))
    with pytest.raises(NumericsError):
        Distribution(top_p=0.0)
    with pytest.raises(ModelError, match="soft-cap"):
        Head(weight_VD=weight, softcap=-1.0)
    assert Distribution.of(LogprobKind.RAW, SamplingParams(temperature=0.0)) == Distribution()


@pytest.mark.parametrize("dist", [Distribution(temperature=0.7), Distribution(top_p=0.8, top_k=7)])
def test_without_entropies_everything_else_is_the_same(dist):
    generator = torch.Generator().manual_seed(0)
    hidden_TD, head = torch.randn(40, 8, generator=generator), Head(weight_VD=torch.randn(300, 8, generator=generator))
    targets_T = torch.randint(0, 300, (40,), generator=generator)
    whole = token_scores_under(hidden_TD, head, targets_T, dists=[dist], varentropy=True)[0]
    less = token_scores_under(hidden_TD, head, targets_T, dists=[dist], entropy=False)[0]
    assert bool(torch.isnan(less.entropy_T).all()) and bool((whole.entropy_T > 0).any()) and less.varentropy_T is None
    for name in ("logprobs_T", "log_kept_mass_T", "kept_T", "top_logprobs_T", "below_cut_T"):
        assert torch.equal(getattr(whole, name), getattr(less, name)), name


def test_scoring_a_block_allocates_nothing_of_its_size():
    """Blocks that come and go among small tensors that stay made a process grow by a block each time: 8 GiB a check."""
    generator = torch.Generator().manual_seed(0)
    logits_CB, scratch_2CB = torch.randn(64, 512, generator=generator), torch.empty(2, 64, 512)
    ours = {logits_CB.untyped_storage().data_ptr(), scratch_2CB.untyped_storage().data_ptr()}
    foreign = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() >= logits_CB.numel():
                foreign.extend([func] if out.untyped_storage().data_ptr() not in ours else [])
            return out

    head = Head(weight_VD=torch.randn(512, 4, generator=generator))
    for cut_C in (None, torch.zeros(64)):
        reducer = Reducer(
            torch.zeros(64, dtype=torch.long), Distribution(temperature=0.7), head, cut_C,
            wanted=Wanted(varentropy=True, gradient=True),
        )  # fmt: skip
        with Watch():
            reducer.update(logits_CB, 0, scratch_2CB)
    assert not foreign
