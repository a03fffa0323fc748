"""Parity: does the engine report what the trainer computes, and if not, why not.

Probe -> Evidence -> Hypothesis -> Attribution -> ParityReport. All but scorer.py, run.py and terminal.py is pure.
"""
