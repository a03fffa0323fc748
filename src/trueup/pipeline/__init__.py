"""From rollouts to updates: the rollout log, the trainer, its checkpoints."""
