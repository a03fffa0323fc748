"""A parity gate in TRL's GRPOTrainer: no first step on rollouts whose logprobs are not what the trainer computes.

Ran with TRL 1.13.0 (its own transformers generation, CPU) in an environment of its own:

    python -m venv .venv-trl && .venv-trl/bin/pip install trl==1.13.0 requests -e .
    .venv-trl/bin/trueup model tiny /tmp/tiny && .venv-trl/bin/python examples/integrate/trl_grpo.py /tmp/tiny

With `use_vllm=True` the engine's numbers are vLLM's; without, TRL has none and only its own forward pass is checked.
"""

import sys

import torch
from trl import GRPOConfig, GRPOTrainer

from trueup.parity import check_rollouts


class CheckedGRPOTrainer(GRPOTrainer):
    """Checks the first batch; everything else is TRL's."""

    parity = None

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.parity is None:
            prompts, completions = batch["prompt_ids"], batch["completion_ids"]
            masks = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
            with torch.no_grad():
                ours = self._get_per_token_logps_and_entropies(
                    self.model, torch.cat([prompts, completions], 1), torch.cat(masks, 1).long(), completions.shape[1]
                )[0].float()
            engine = batch.get("sampling_per_token_logps", ours)
            fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            sampling = {n: v for n in fields if (v := getattr(self.args, n)) is not None}
            rows = [
                {"sampling": sampling, "prompt_token_ids": p[m], "completion_token_ids": c[k],
                 "completion_logprobs": e[k]}
                for p, m, c, k, e in zip(prompts, masks[0], completions, masks[1], engine, strict=True)
            ]  # fmt: skip
            logged = [t[k] for t, k in zip(ours, masks[1], strict=True)]
            dtype = str(self.model.dtype).removeprefix("torch.")
            path = self.model.name_or_path
            self.parity = check_rollouts(rows, model=path, trainer_logprobs=logged, kind="trl", dtype=dtype)
            if self.parity.verdict != "agree":
                causes = "; ".join(f"{c.id} {c.title}: {c.fix}" for c in self.parity.causes)
                raise RuntimeError(f"{self.parity.verdict}: {causes or 'no known cause'}")
        return batch


if __name__ == "__main__":
    from datasets import Dataset

    arguments = GRPOConfig(
        output_dir="/tmp/trl-checked", per_device_train_batch_size=8, num_generations=4, max_completion_length=24,
        max_steps=1, use_cpu=True, report_to=[], logging_steps=1, bf16=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["1 + 2 =", "4 + 5 =", "the cat", "x = "]})
    trainer = CheckedGRPOTrainer(
        model=sys.argv[1],
        args=arguments,
        train_dataset=data,
        reward_funcs=lambda completions, **rest: [float(len(c)) for c in completions],
    )
    trainer.train()
    print(trainer.parity.verdict, trainer.parity.settings[0].gap.get("mean_abs"))
