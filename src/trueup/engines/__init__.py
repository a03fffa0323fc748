"""Rollout engines behind one protocol: the embedded one, any OpenAI-compatible server, and vLLM."""
