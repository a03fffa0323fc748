"""One GRPOTrainer update of TRL 1.13 on recorded rollouts: loss and gradients, as golden values.

Needs an environment with TRL beside trueup, and the real model:

    python -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt trl==1.13.0 requests -e .
    .venv-trl/bin/python -m tests.golden.make_trl_golden models/smollm2-135m

TRL's own code computes everything: advantages, old and reference logprobs, importance weights, loss. Only its sampling
is replaced, by the recorded completions, and in bypass cases the old logprobs, by the recorded ones.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tests.golden.cases import CASES, GOLDEN, GROUP, MAX_TOKENS, ROLLOUTS, SCALE, TEMPERATURE, disturb
from trueup.model.tiny import make_tiny
from trueup.pipeline.rollout_log import read_groups


def recorded(groups):
    """Rows in TRL's order: prompts, completions, logprobs, rewards."""
    flat = [(r, reward) for g in groups for r, reward in zip(g.rollouts, g.rewards, strict=True)]
    return (
        [list(r.prompt.token_ids) for r, _ in flat],
        [list(r.token_ids) for r, _ in flat],
        [list(r.behaviour_logprobs) for r, _ in flat],
        [reward for _, reward in flat],
    )


class Recorded(GRPOTrainer):
    """GRPOTrainer whose completions were sampled before."""

    def _generate(self, prompts):
        prompt_ids, completion_ids, logprobs, _ = self.rows
        return prompt_ids, completion_ids, None, [""] * len(prompts), logprobs, {}, None, []


def one_update(case, path, groups, kind, folder):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    disturb(model, SCALE[kind])
    rows = recorded(groups)
    args = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        per_device_train_batch_size=len(rows[0]), gradient_accumulation_steps=1, steps_per_generation=1,
        num_generations=GROUP, max_completion_length=MAX_TOKENS[kind], temperature=TEMPERATURE,
        mask_truncated_completions=False, model_init_kwargs=None, **case["trl"],
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": str(i), "reward": r} for i, r in enumerate(rows[3])])
    trainer = Recorded(
        model=model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(path),
        reward_funcs=lambda completions, reward, **_: reward,
    )  # fmt: skip
    trainer.rows = rows
    if trainer.ref_model is not None:
        before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        trainer.ref_model.load_state_dict(before.state_dict())
    trainer.use_vllm = "correction" in case
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    inputs = trainer._generate_and_score_completions(list(data))
    if "correction" not in case:
        inputs["old_per_token_logps"] = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows[2]], batch_first=True
        )
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items() if "clip" in k or k in ("kl", "entropy")}
    return {
        "loss": float(loss.detach()),
        "gradient_norm": float(torch.nn.utils.get_total_norm(gradients.values())),
        "tensor_norms": {n: float(g.norm()) for n, g in gradients.items()},
        "advantages": inputs["advantages"].tolist(),
        "metrics": metrics,
    }


def main():
    assert trl.__version__ == "1.13.0", trl.__version__
    golden = {
        "made_by": "tests/golden/make_trl_golden.py",
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32", "cases": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = {"tiny": make_tiny(Path(folder) / "tiny"), "smollm2": Path(sys.argv[1])}
        for kind, path in paths.items():
            groups = [group for _, group in read_groups(ROLLOUTS[kind])]
            for name, case in CASES.items():
                golden["cases"][f"{kind}/{name}"] = found = one_update(case, path, groups, kind, folder)
                print(kind, name, found["loss"], found["gradient_norm"], found["metrics"], flush=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
