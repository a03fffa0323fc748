"""A trainer written the plain way, sharing no code with trueup: batches, padding and packs as one would write them.

It makes logprobs with a known mistake in its mechanics, for the checks of the user's own trainer.
"""

from pathlib import Path

import numpy as np
import torch

PAD = 0
MISTAKES = ("pack", "positions", "attended", "dropout", "shape", "end")


def make_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Random GPT-2: its positions are absolute, so that counting padding as positions shows (rotary ones hide it)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=96, n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


class PlainTrainer:
    """A transformers model with an fp32 head scoring `batch` rows at a time; `mistake` says what is wrong with it.

    pack: rows of a batch in one sequence, no mask. positions: left padding, positions that count it. attended: left
    padding that is attended to. dropout: logits that are noisy by the share `strength`. shape: numbers that move by
    `strength` a row of the batch. end: the logprob of token `end` is masked as padding.
    """

    def __init__(self, folder, mistake="", *, batch=8, strength=0.05, dtype=torch.float32, end=2):
        from transformers import AutoModelForCausalLM

        assert mistake in ("", *MISTAKES), mistake
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.weight_VD = self.model.get_output_embeddings().weight.float()
        self.mistake, self.batch, self.strength, self.end = mistake, batch, strength, end
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def __call__(self, rows):
        found = []
        for at in range(0, len(rows), self.batch):
            found += self._batch(rows[at : at + self.batch])
        return found

    def _logits(self, ids, **inputs):
        return self.model.base_model(ids, **inputs).last_hidden_state.float() @ self.weight_VD.T

    def _batch(self, rows):
        sequences = [list(r.prompt_token_ids) + list(r.completion_token_ids) for r in rows]
        if self.mistake == "pack":
            flat = torch.tensor([i for s in sequences for i in s])
            logits = self._logits(flat[None])[0]
            starts = np.cumsum([0, *map(len, sequences)])[:-1]
            return [self._read(logits[s : s + len(q)], q, r) for s, q, r in zip(starts, sequences, rows, strict=True)]
        width = max(map(len, sequences))
        left = self.mistake in ("positions", "attended")
        ids = torch.full((len(rows), width), PAD)
        mask = torch.zeros_like(ids)
        for i, q in enumerate(sequences):
            at = slice(width - len(q), width) if left else slice(0, len(q))
            ids[i, at], mask[i, at] = torch.tensor(q), 1
        if self.mistake == "attended":
            mask[:] = 1
        extra = {"position_ids": torch.arange(width).expand(len(rows), -1)} if left else {}
        logits = self._logits(ids, attention_mask=mask, **extra)
        if self.mistake == "dropout":
            logits = logits * (1 + self.strength * torch.randn(logits.shape, generator=self.generator))
        if self.mistake == "shape":
            logits = logits * (1 + self.strength * len(rows))
        parts = [logits[i, width - len(q) :] if left else logits[i, : len(q)] for i, q in enumerate(sequences)]
        return [self._read(z, q, r) for z, q, r in zip(parts, sequences, rows, strict=True)]

    def _read(self, logits, sequence, row):
        first = len(row.prompt_token_ids)
        values = logits.log_softmax(-1)[first - 1 : -1].gather(1, torch.tensor(sequence[first:])[:, None])[:, 0]
        if self.mistake == "end":
            values = torch.where(torch.tensor(sequence[first:]) == self.end, 0.0, values)
        return values.tolist()
