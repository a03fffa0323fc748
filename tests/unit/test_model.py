"""model/: loading across families, head handling, scoring, simulations, the real checkpoint."""

import pytest
import torch
from safetensors.torch import save_file
from tests.plain_engine import make_tiny_checkpoint

from trueup.errors import ModelError
from trueup.model.load import checkpoint_digest, checkpoint_dtype, load_model
from trueup.model.scoring import ScoredRow, check_fits, hidden_states
from trueup.model.simulate import ROUNDINGS, round_bf16, simulate, truncate_bf16
from trueup.model.smollm2 import DIGEST, make_smollm2
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores

SMALL = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Mistral": {"sliding_window": 16}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {},
    "Gemma": {}, "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 16}, "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25}, "Phi": {},
}  # fmt: skip


def family(name, folder):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        **(SMALL | FAMILIES[name]), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    lm = getattr(transformers, f"{name}ForCausalLM")(config)
    if lm.lm_head.bias is not None:
        torch.nn.init.normal_(lm.lm_head.bias)
    lm.save_pretrained(folder)
    return folder


def rows(vocab=120):
    torch.manual_seed(2)
    return [
        ScoredRow(
            prompt_ids=tuple(torch.randint(0, vocab, (p,)).tolist()),
            completion_ids=tuple(torch.randint(0, vocab, (c,)).tolist()),
        )
        for p, c in ((3, 7), (9, 2), (5, 12), (1, 1))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_of_every_family_equal_its_own_forward(name, tmp_path):
    model = load_model(family(name, tmp_path / "m"), dtype=torch.float32)
    head = Head.of(model, torch.float32)
    assert model.tied == FAMILIES[name].get("tie_word_embeddings", name in ("Gemma", "Gemma2", "Cohere"))
    for row, hidden_TD in zip(rows(), hidden_states(model, rows(), batch_rows=3), strict=True):
        targets = torch.tensor(row.completion_ids)
        ours = token_scores(hidden_TD, head, targets).logprobs_T
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = model.lm(ids).logits[0, len(row.prompt_ids) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        assert (ours - own).abs().max() < 2e-5


def test_a_head_with_an_unknown_quirk_is_refused(tmp_path, monkeypatch):
    import transformers

    class Doubling(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    folder = make_tiny_checkpoint(tmp_path / "m")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", Doubling.from_pretrained)
    with pytest.raises(ModelError, match="does something to its logits"):
        load_model(folder, dtype=torch.float32)


def test_padding_and_batching_do_not_reach_a_row(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32)
    together = hidden_states(model, rows(), batch_rows=4)
    alone = [hidden_states(model, [r], batch_rows=1)[0] for r in rows()]
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(together, alone, strict=True))


def test_rows_that_do_not_fit_are_refused(tiny_model):
    model = load_model(tiny_model, dtype=torch.float32)
    with pytest.raises(ModelError, match="outside the model's vocabulary of 320"):
        check_fits(model, [ScoredRow(prompt_ids=(1,), completion_ids=(320,))])
    with pytest.raises(ModelError, match="limit is 512"):
        check_fits(model, [ScoredRow(prompt_ids=(1,) * 600, completion_ids=(3,))])


def test_digest_follows_the_published_recipe(tmp_path):
    import hashlib

    tensors = {"b": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "a": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"torch_dtype": "float16"}')
    expected = hashlib.sha256()
    for name in ("a", "b"):
        t = tensors[name]
        expected.update(name.encode() + str(t.dtype).encode() + str(tuple(t.shape)).encode())
        expected.update(t.view(torch.uint8).numpy().tobytes())
    assert checkpoint_digest(tmp_path) == expected.hexdigest()
    assert checkpoint_dtype(tmp_path) == torch.float16


def test_truncation_rounds_toward_zero_and_rounding_to_nearest():
    x = torch.tensor([1.0 + 2**-7 + 2**-9, -(1.0 + 2**-7 + 2**-8 + 2**-9), 3.0])
    assert truncate_bf16(x).tolist() == [1.0 + 2**-7, -(1.0 + 2**-7), 3.0]
    assert round_bf16(x).tolist() == [1.0 + 2**-7, -(1.0 + 2 * 2**-7), 3.0]
    assert (truncate_bf16(x).abs() <= x.abs()).all()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_simulation_changes_the_states_and_leaves_the_model_as_it_was(tiny_model, name):
    model = load_model(tiny_model, dtype=torch.float32)
    before = torch.cat(hidden_states(model, rows(), batch_rows=4))
    with simulate(model, name):
        during = torch.cat(hidden_states(model, rows(), batch_rows=4))
    after = torch.cat(hidden_states(model, rows(), batch_rows=4))
    assert torch.equal(before, after)
    change = float((during - before).norm() / before.norm())
    assert 1e-4 < change < 0.1, change


def test_simulations_refuse_what_they_do_not_know(tmp_path):
    gemma = load_model(family("Gemma", tmp_path / "gemma"), dtype=torch.float32)
    with pytest.raises(ModelError, match="no plain RMS norm"), simulate(gemma, "norm_bf16"):
        pass
    import transformers

    config = transformers.OlmoConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.OlmoForCausalLM(config).save_pretrained(tmp_path / "olmo")
    olmo = load_model(tmp_path / "olmo", dtype=torch.float32)
    with pytest.raises(ModelError, match="no norm layers"), simulate(olmo, "residual_truncated"):
        pass


def test_simulations_refuse_another_dtype(tiny_model):
    model = load_model(tiny_model, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="float32"), simulate(model, "residual_truncated"):
        pass


def test_the_real_model_is_the_one_the_traces_were_recorded_with(smollm2):
    assert checkpoint_digest(smollm2) == DIGEST
    assert make_smollm2(smollm2) == DIGEST, "an existing checkpoint is left as it is"
    model = load_model(smollm2, dtype=torch.bfloat16)
    assert model.tied and model.vocab_size == 49152 and model.weight_VD.shape[1] == 576


def test_the_real_model_chats_in_its_own_template(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    recorded = [
        1,
        9690,
        198,
        2683,
        359,
        253,
        5356,
        5646,
        11173,
        3365,
        3511,
        308,
        34519,
        28,
        7018,
        411,
        407,
        19712,
        8182,
        2,
        198,
        1,
        4093,
        198,
    ]
    assert ids[: len(recorded)] == recorded, "the system prompt of the recorded traces"
    assert ids[-3:] == [1, 520, 9531, 198][-3:]
