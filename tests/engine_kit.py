"""Shared by the engine tests: prompts, perturbed weight versions, and what the trainer says of a rollout."""

import random
import re
from pathlib import Path

import torch

from trueup.engines.base import GenerationRequest
from trueup.engines.embedded.sampler import distribution
from trueup.model.load import LoadedModel, load_model
from trueup.model.packed import open_policy, packed_hidden_states
from trueup.model.scoring import ScoredRow
from trueup.policy.draw import draw, uniform
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores
from trueup.policy.processing import Distribution, History, SeenTokens
from trueup.types import Prompt, Rollout, SamplingParams
from trueup.weights.store import WeightStore, load_tensors

KINDS = {
    "plain": {},
    "hot": {"temperature": 1.3},
    "nucleus": {"temperature": 0.7, "top_p": 0.9},
    "top-k": {"top_k": 20},
    "min-p": {"temperature": 1.3, "min_p": 0.05},
    "all cuts": {"temperature": 0.8, "top_p": 0.95, "top_k": 30, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "penalised nucleus": {"temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5},
    "greedy": {"temperature": 0.0},
}


def prompt(length: int, *, seed: int = 0, low: int = 4, high: int = 100) -> Prompt:
    """Random ids inside every test vocabulary."""
    chooser = random.Random(f"{length} {seed}")
    return Prompt(
        prompt_id=f"{length}-{seed}", task="test", token_ids=tuple(chooser.randrange(low, high) for _ in range(length))
    )


def request(length: int = 9, *, seed: int = 0, n: int = 1, tokens: int = 16, eos: bool = False, **sampling):
    """A generation request of exactly `tokens` tokens unless `eos`."""
    params = SamplingParams(**{"max_tokens": tokens, "seed": seed} | sampling)
    return GenerationRequest(prompt=prompt(length, seed=seed), sampling=params, n=n, ignore_eos=not eos)


def row_of(rollout: Rollout) -> ScoredRow:
    """The rollout as something to score."""
    return ScoredRow(prompt_ids=rollout.prompt.token_ids, completion_ids=rollout.token_ids)


def trainer(path: Path, *, dtype=torch.float32, bitwise: bool = False, grad: bool = True) -> LoadedModel:
    """The trainer's copy of a policy, ready for the packed training forward."""
    model = open_policy(load_model(path, dtype=dtype), bitwise=bitwise)
    for parameter in model.lm.parameters():
        parameter.requires_grad_(grad)
    return model


def load_version(model: LoadedModel, tensors) -> None:
    """Give the trainer the weights of a version."""
    own = dict(model.lm.named_parameters())
    for name, tensor in tensors.items():
        own[name].data = tensor.to(own[name].dtype)


def train_scores(model: LoadedModel, rollouts, *, dist=None, kind=None):
    """Scores [T] of all rollouts' tokens by the training forward: packed, gradients on, fp32 head."""
    return train_scores_and_draws(model, rollouts, dist=dist, kind=kind, draws=False)[0]


def train_scores_and_draws(model: LoadedModel, rollouts, *, dist=None, kind=None, draws=True, head_dtype=torch.float32):
    """The training forward's scores [T], and the tokens [T] that its logits draw with the rollouts' seeds.

    All rollouts have the same sampling parameters but for the seed.
    """
    hidden_TD = packed_hidden_states(model, [row_of(r) for r in rollouts])
    targets_T, history = targets(rollouts)
    head = Head.of(model, head_dtype)
    dist = dist or Distribution.of(kind or rollouts[0].logprob_kind, rollouts[0].sampling)
    scores = token_scores(hidden_TD, head, targets_T, dist=dist, history=history)
    if not draws:
        return scores, None
    drawn_from, greedy = distribution(rollouts[0].sampling)
    noise = [uniform(r.sampling.seed, t) for r in rollouts for t in range(len(r.token_ids))]
    noise_T = None if greedy else torch.tensor(noise, dtype=torch.float64)
    seen = SeenTokens.of(history, targets_T) if drawn_from.penalises else None
    return scores, draw(hidden_TD.detach(), head, drawn_from, noise_T, seen=seen).token_ids_T


def targets(rollouts):
    """Completion ids of all rollouts and the history that penalties need."""
    ids = torch.tensor([i for r in rollouts for i in r.token_ids])
    row = torch.tensor([n for n, r in enumerate(rollouts) for _ in r.token_ids])
    return ids, History(row_T=row, prompts=tuple(torch.tensor(r.prompt.token_ids) for r in rollouts))


def behaviour(rollouts) -> torch.Tensor:
    """What the engine reported, one after another."""
    return torch.tensor([v for r in rollouts for v in r.behaviour_logprobs])


def publish_perturbed(store: WeightStore, path: Path, version: int, *, scale: float = 0.05, only: str = "", dtype=None):
    """Publish a copy of a checkpoint with noise on the tensors whose name matches `only`, visibly another policy."""
    model = load_model(path, dtype=dtype or torch.float32)
    generator = torch.Generator().manual_seed(version)
    tensors = {}
    for name, tensor in model.stored_tensors().items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std().nan_to_num(0.0).clamp_min(0.05)
        change = scale * noise if re.search(only, name) else 0.0
        tensors[name] = (tensor.detach().float() + change).to(tensor.dtype)
    return store.publish(version, tensors)


def tensors_by_version(store: WeightStore, base: Path, *, dtype=torch.float32):
    """A function from version to tensors; 0 is the checkpoint itself."""
    held = {0: {n: t.detach().clone() for n, t in load_model(base, dtype=dtype).stored_tensors().items()}}

    def tensors_of(version: int):
        if version not in held:
            held[version] = load_tensors(store.open(version))
        return held[version]

    return tensors_of
