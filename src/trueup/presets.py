"""Named starting points of `trueup train`: a file's own keys, and `--set`, go over them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2509.19128: REINFORCE with min(pi/mu, 5) and a leave-one-out baseline; updates in flight, keys kept;
    # learning rate and gradient norm of its repository; the lag ScaleRL (arXiv 2510.13786) found best.
    "pipelinerl": {
        "objective": {"kind": "reinforce"},
        "rollout": {"group_size": 8, "max_lag": 8, "clear_cache": False, "update": "in_flight"},
        "optimizer": {"lr": 1e-6, "clip_norm": 0.3},
    },
    # arXiv 2402.03300: on-policy groups, one update a batch, KL 0.04 to the starting policy.
    "grpo": {
        "objective": {"kind": "grpo", "kl": 0.04},
        "rollout": {"group_size": 16, "max_lag": 0, "clear_cache": True, "update": "drain"},
        "optimizer": {"lr": 1e-6, "clip_norm": 1.0},
    },
    # arXiv 2507.18071 as the migration article ran it: sequence ratios against what the engine reported, asynchronous.
    # The band is ScaleRL's: at the paper's 3e-4 rounding alone clips most sequences of a few hundred bf16 tokens.
    "gspo": {
        "objective": {"kind": "gspo", "old": "bypass", "low": 4e-3, "high": 5e-3},
        "rollout": {"group_size": 8, "max_lag": 4, "clear_cache": False, "update": "in_flight"},
        "optimizer": {"lr": 1e-6, "clip_norm": 0.3},
    },
}
