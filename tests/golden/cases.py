"""What is compared with TRL 1.13: the policies, the recorded rollouts, and each case as TRL and as trueup name it.

Imported both by the program that made the golden values, in an environment with TRL, and by the test.
"""

from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
GOLDEN = FOLDER / "trl-1.13.0.json"
ROLLOUTS = {"tiny": FOLDER / "tiny", "smollm2": FOLDER / "smollm2"}
"""Rollout logs. tiny: the embedded engine; smollm2: vLLM 0.32.0 on CPU, float32, processed logprobs."""
TEMPERATURE = 0.9
GROUP = 4
MAX_TOKENS = {"tiny": 24, "smollm2": 32}
SCALE = {"tiny": 0.05, "smollm2": 0.01}
"""The policy that is trained is the one that sampled plus noise of this share of each tensor's spread, so that ratios
leave the clip ranges; the one that sampled is the reference."""

CASES = {
    "grpo": {
        "trl": {
            "loss_type": "grpo", "scale_rewards": "group", "beta": 0.04, "epsilon": 0.2, "epsilon_high": 0.2,
            "use_bias_correction_kl": False,
        },
        "ours": {"kind": "grpo", "aggregation": "sequence", "advantage": "std_normalised", "kl": 0.04},
    },
    "dapo": {
        "trl": {"loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28},
        "ours": {
            "kind": "dapo", "aggregation": "token", "advantage": "std_normalised", "drop_overlong": False,
            "drop_zero_variance": False,
        },
    },
    "dr_grpo": {
        "trl": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.2},
        "ours": {"kind": "dr_grpo", "aggregation": "fixed", "advantage": "group_mean"},
    },
    "gspo": {
        "trl": {
            "loss_type": "grpo", "importance_sampling_level": "sequence", "scale_rewards": "group", "beta": 0.0,
            "epsilon": 3e-3, "epsilon_high": 4e-3,
        },
        "ours": {
            "kind": "gspo", "aggregation": "sequence", "advantage": "std_normalised", "low": 3e-3, "high": 4e-3,
        },
    },
    "cispo": {
        "trl": {"loss_type": "cispo", "scale_rewards": "batch", "beta": 0.0, "epsilon_high": 1.2},
        "ours": {
            "kind": "cispo", "aggregation": "token", "advantage": "batch_normalised_rewards", "max_ratio": 1.2,
            "drop_zero_variance": False,
        },
    },
    "cispo_unbounded": {
        "trl": {
            "loss_type": "cispo", "scale_rewards": "group", "beta": 0.001, "epsilon_high": 1e9,
            "use_bias_correction_kl": True,
        },
        "ours": {
            "kind": "cispo", "aggregation": "token", "advantage": "std_normalised", "max_ratio": 1e9, "kl": 0.001,
            "kl_unbiased": True,
            "drop_zero_variance": False,
        },
    },
    "grpo_token_truncate": {
        "trl": {
            "loss_type": "grpo", "scale_rewards": "group", "beta": 0.0,
            "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.1,
        },
        "ours": {"kind": "grpo", "advantage": "std_normalised", "kl": 0.0},
        "correction": {"kind": "truncate_tokens", "upper": 1.1},
    },
    "dapo_sequence_mask": {
        "trl": {
            "loss_type": "dapo", "scale_rewards": "group", "beta": 0.0, "epsilon_high": 0.28,
            "vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.2,
        },
        "ours": {
            "kind": "dapo", "advantage": "std_normalised", "drop_overlong": False, "drop_zero_variance": False,
        },
        "correction": {"kind": "mask_sequences", "upper": 1.2},
    },
}  # fmt: skip
"""Cases without a correction take the recorded logprobs as old policy (bypass); those with one take the trainer's own
(decoupled), as TRL does with vllm_importance_sampling_correction. Padding: TRL's, prompts left and completions right;
nothing is masked as truncated. Everything float32; dr_grpo divides by MAX_TOKENS."""


@torch.no_grad()
def disturb(lm, scale: float) -> None:
    """Turn the policy that sampled into the one that is trained, in place; the same numbers for the same torch."""
    generator = torch.Generator().manual_seed(1)
    for _, tensor in sorted(lm.named_parameters()):
        spread = tensor.float().std().nan_to_num(0.0).clamp_min(0.05)
        tensor += scale * spread * torch.randn(tensor.shape, generator=generator)
