"""Packed, shared-prompt, padded and one-by-one: the same states, losses and gradients, and no leakage between rows."""

import random

import pytest
import torch
from tests.engine_kit import load_version, trainer

from trueup.model.load import load_model
from trueup.model.packed import packed_hidden_states
from trueup.model.scoring import ScoredRow
from trueup.model.tiny import FAMILIES, make_tiny
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores


def rows_of_groups(*, seed: int = 0, groups=((37, 4), (5, 3), (64, 2), (1, 2)), longest: int = 40) -> list[ScoredRow]:
    """Groups of (prompt length, completions), completions of 1 to `longest` tokens, each group with one of 1 token."""
    chooser = random.Random(seed)
    rows = []
    for length, count in groups:
        prompt = tuple(chooser.randrange(4, 100) for _ in range(length))
        sizes = [1, *(chooser.randint(2, longest) for _ in range(count - 1))]
        rows += [
            ScoredRow(prompt_ids=prompt, completion_ids=tuple(chooser.randrange(4, 100) for _ in range(n)))
            for n in sizes
        ]
    return rows


def padded_logprobs(model, rows):
    """Plain transformers: right-padded batch with an attention mask, log_softmax of whole logits."""
    width = max(len(r) for r in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.prompt_ids + row.completion_ids), 1
    logprobs = model.lm(ids, attention_mask=mask).logits.log_softmax(-1)
    found = []
    for i, row in enumerate(rows):
        first = len(row.prompt_ids) - 1
        found.append(logprobs[i, first : len(row) - 1].gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0])
    return torch.cat(found)


def our_logprobs(model, rows, **how):
    hidden = packed_hidden_states(model, rows, **how)
    targets = torch.tensor([i for r in rows for i in r.completion_ids])
    return token_scores(hidden, Head.of(model, torch.float32), targets).logprobs_T


def gradients(model, logprobs_T):
    """Gradients of a weighted sum of logprobs (mean-one weights, so that every token counts differently)."""
    weight = torch.linspace(0.5, 1.5, len(logprobs_T)) / len(logprobs_T)
    loss = (weight * logprobs_T).sum()
    model.lm.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.lm.named_parameters()}


def assert_same(first, second, rtol=1e-5):
    """Loss and every tensor's gradient within `rtol`, relative, in norm."""
    torch.testing.assert_close(first[0], second[0], rtol=rtol, atol=0)
    for name, gradient in first[1].items():
        error = float((gradient - second[1][name]).norm() / gradient.norm().clamp_min(1e-12))
        assert error < rtol, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_shared_padded_and_one_by_one_agree(tmp_path, family):
    path = make_tiny(tmp_path / family, family=family)
    rows = rows_of_groups()
    plain = load_model(path, dtype=torch.float32)
    plain.lm.requires_grad_(True)
    expected = gradients(plain, padded_logprobs(plain, rows))
    model = trainer(path)
    assert_same(expected, gradients(model, our_logprobs(model, rows)))
    assert_same(expected, gradients(model, our_logprobs(model, rows, share_prompts=True)))
    alone = torch.cat([our_logprobs(model, [row]) for row in rows])
    assert_same(expected, gradients(model, alone))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_mode_shares_prompts_to_the_last_bit(tmp_path, family, dtype):
    model = trainer(make_tiny(tmp_path / family, family=family, dtype=dtype), dtype=dtype, bitwise=True)
    rows = rows_of_groups()
    apart, shared = our_logprobs(model, rows), our_logprobs(model, rows, share_prompts=True)
    assert torch.equal(apart, shared)
    loss, found = gradients(model, shared)
    assert_same((loss, gradients(model, apart)[1]), (loss, found), rtol=1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("share", [False, True])
def test_no_row_sees_another(tmp_path, share):
    """Changing a completion leaves every other row's states as they were, and the gradient of one row alone is the
    gradient of that row in a pack with others that do not count."""
    model = trainer(make_tiny(tmp_path / "tiny"), bitwise=True)
    rows = rows_of_groups()
    before = packed_hidden_states(model, rows, share_prompts=share).detach()
    changed = [*rows]
    changed[2] = ScoredRow(prompt_ids=rows[2].prompt_ids, completion_ids=tuple(9 for _ in rows[2].completion_ids))
    after = packed_hidden_states(model, changed, share_prompts=share).detach()
    start = sum(len(r.completion_ids) for r in rows[:2])
    end = start + len(rows[2].completion_ids)
    assert not torch.equal(before[start + 1 : end], after[start + 1 : end])
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[end:], after[end:])

    def only(logprobs_T, span):
        model.lm.zero_grad()
        logprobs_T[span].sum().backward()
        return logprobs_T[span].sum().detach(), {n: p.grad.clone() for n, p in model.lm.named_parameters()}

    in_pack = only(our_logprobs(model, rows, share_prompts=share), slice(start, end))
    assert_same(only(our_logprobs(model, [rows[2]]), slice(None)), in_pack)


def test_a_shared_prompt_is_computed_once(tmp_path):
    """The body sees the prompt's tokens once a group: counted at its input."""
    model = trainer(make_tiny(tmp_path / "tiny"))
    rows = rows_of_groups(groups=((50, 4), (50, 4)))
    seen = []
    model.body.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].shape[1]), with_kwargs=True)
    packed_hidden_states(model, rows)
    packed_hidden_states(model, rows, share_prompts=True)
    completions = sum(len(r.completion_ids) - 1 for r in rows)
    assert seen == [8 * 50 + completions, 2 * 50 + completions]


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_real_model_shares_prompts(smollm2):
    rows = rows_of_groups(groups=((60, 4), (20, 3)))
    plain = load_model(smollm2, dtype=torch.float32)
    plain.lm.requires_grad_(True)
    expected = gradients(plain, padded_logprobs(plain, rows))
    model = trainer(smollm2)
    load_version(model, plain.stored_tensors())
    for share in (False, True):
        found = gradients(model, our_logprobs(model, rows, share_prompts=share))
        assert_same(expected, found, rtol=1e-4)  # one tensor of 272 on its own: float32 rounding over 30 layers
        error = sum(float((g - found[1][n]).square().sum()) for n, g in expected[1].items()) ** 0.5
        size = sum(float(g.square().sum()) for g in expected[1].values()) ** 0.5
        assert error / size < 1e-5
