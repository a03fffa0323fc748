"""Checkpoints: loading any decoder-only model, scoring hidden states, the real 135M model."""
