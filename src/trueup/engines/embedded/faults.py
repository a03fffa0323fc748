"""Breaking the engine on purpose, so that a checker can be tried on it: the whole of fault injection.

A fault replaces a part of a running engine (its sampler, cache, layout, weights, tokenization or answers) with one that
really misbehaves; the clean path has no branch for it, and `Planted` takes it out again. Numbers come with the fault,
so that whoever tries a checker can draw them at random. A server refuses faults unless it was started to allow them,
and shows them in its status.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trueup.engines.embedded.completions import CompletionWriter
from trueup.engines.embedded.fused import FusedBody, _Norm, _Product
from trueup.engines.embedded.generation_faults import GENERATION_FAULTS
from trueup.engines.embedded.layout import StepLayout
from trueup.engines.embedded.options import Fault
from trueup.engines.embedded.runner import Shadow
from trueup.engines.embedded.wire import CompletionRequest
from trueup.errors import EngineError, nearest
from trueup.policy.head import Head
from trueup.policy.logprobs import token_scores_under
from trueup.policy.processing import Distribution
from trueup.types import LogprobKind

FORBIDDEN = -1e4
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Transport:
    """How a server reads requests and writes answers: as it should, unless a fault says otherwise."""

    def __init__(self) -> None:
        self.incoming: Callable[[CompletionRequest], CompletionRequest] = lambda body: body
        self.writer: type[CompletionWriter] = CompletionWriter


class Planted:
    """The faults that an engine carries now."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._faults: tuple[Fault, ...] = ()

    def described(self) -> list[str]:
        """One line a fault."""
        return [fault.title() for fault in self._faults]

    def replace(self, engine: Any, loop: Any, faults: Sequence[Fault], transport: Transport | None) -> None:
        """Take out what was planted and plant these; called between two steps. Raises EngineError."""
        self._stack.close()
        self._faults = ()
        loop.runner.refresh()
        loop.clear_cache()
        site = Site(engine, loop, transport or Transport(), self._stack)
        try:
            for fault in faults:
                if fault.name not in FAULTS:
                    raise EngineError(f"unknown fault {fault.name!r}{nearest(fault.name, FAULTS)}")
                FAULTS[fault.name](site, **fault.values)
        except Exception as error:  # noqa: BLE001  (whatever went wrong, nothing may stay planted)
            self._stack.close()
            loop.runner.refresh()
            raise error if isinstance(error, EngineError) else EngineError(f"{fault.title()}: {error}") from None
        self._faults = tuple(faults)


class Site:
    """Where faults are planted: parts of the engine, and how to put back what was there."""

    def __init__(self, engine: Any, loop: Any, transport: Transport, stack: ExitStack) -> None:
        self.engine, self.loop, self.transport, self.stack = engine, loop, transport, stack
        self.runner = loop.runner

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute until the fault is taken out."""
        own = name in vars(owner)
        before = getattr(owner, name)
        self.stack.callback(lambda: setattr(owner, name, before) if own else delattr(owner, name))
        setattr(owner, name, value)

    def heads(self, change: Callable[[Head], Head]) -> None:
        """Change the head now and at every update."""
        make = self.runner.shadow
        self.put(self.runner, "shadow", lambda tensors: (s := make(tensors)) and replace(s, head=change(s.head)))
        self.runner.head = change(self.runner.head)

    def bodies(self, change: Callable[[FusedBody], None]) -> None:
        """Change the body now and at every update. Raises EngineError where there is no fused body."""
        if self.runner.fused is None:
            raise EngineError("this fault can be planted in fused bodies only")
        make = self.runner.shadow

        def shadow(tensors: Mapping[str, Tensor]) -> Shadow:
            made: Shadow = make(tensors)
            assert made.fused is not None
            change(made.fused)
            return made

        self.put(self.runner, "shadow", shadow)
        change(self.runner.fused)

    def layout(self, make: Callable[[type[StepLayout]], type[StepLayout]]) -> None:
        """Attend otherwise."""
        self.put(self.runner, "layout", make(self.runner.layout))

    def states(self, change: Callable[[Tensor, Sequence[Any]], Tensor]) -> None:
        """Change the last hidden states of each step: change(states, spans)."""
        forward = self.runner.forward
        self.put(self.runner, "forward", lambda spans, ids: change(forward(spans, ids), spans))

    def prompts(self, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
        """Let the model see other prompts than were sent, when it generates."""
        submit = self.engine.submit

        def other(request: Any, **rest: Any) -> Any:
            ids = change(request.prompt.token_ids)
            return submit(replace(request, prompt=replace(request.prompt, token_ids=ids)), **rest)

        self.put(self.engine, "submit", other)

    def reported(self, change: Callable[[Any, Tensor, Head], float]) -> None:
        """Report another number for each drawn token: change(sequence, its state [1, D], head)."""
        sample = self.loop.sample

        def broken(states_TD: Tensor, head: Head, sequences: Sequence[Any], version: int) -> Any:
            failed = sample(states_TD, head, sequences, version)
            bad = {id(s) for s, _ in failed}
            for row, sequence in enumerate(sequences):
                if id(sequence) not in bad:
                    sequence.logprobs[-1] = change(sequence, states_TD[row : row + 1], head)
            return failed

        self.put(self.loop, "sample", broken)

    def drawn(self, change: Callable[[Head, Any], Head]) -> None:
        """Draw each token from another head: change(head, sequence)."""
        sample = self.loop.sample

        def broken(states_TD: Tensor, head: Head, sequences: Sequence[Any], version: int) -> list[Any]:
            found: list[Any] = []
            for row, sequence in enumerate(sequences):
                found += sample(states_TD[row : row + 1], change(head, sequence), [sequence], version)
            return found

        self.put(self.loop, "sample", broken)

    def answers(self, change: Callable[[list[int], list[float]], tuple[list[int], list[float]]]) -> None:
        """Write other ids and logprobs into answers than were computed."""
        base = self.transport.writer

        class Broken(base):  # type: ignore[misc, valid-type]
            def choice(self, result: Any) -> dict[str, Any]:
                fields = super().choice(result)
                self.changed = change(list(result.token_ids), list(result.behaviour_logprobs))
                if fields["logprobs"] is not None:
                    fields["logprobs"]["token_logprobs"] = self.changed[1]
                return fields

            def _extras(self, request: Any, result: Any) -> dict[str, Any]:
                extras = super()._extras(request, result)
                if "token_ids" in extras:
                    extras["token_ids"] = self.changed[0]
                return extras

        self.put(self.transport, "writer", Broken)


def _sampling(site: Site, change: Callable[[Any], Any]) -> None:
    submit = site.engine.submit
    site.put(
        site.engine,
        "submit",
        lambda request, **rest: submit(replace(request, sampling=change(request.sampling)), **rest),
    )


def _own(kind: LogprobKind) -> Callable[[Any], Distribution]:
    return lambda sequence: Distribution.of(kind, sequence.sampling)


def _score(sequence: Any, state_1D: Tensor, head: Head, dist: Distribution) -> Any:
    token = torch.tensor([sequence.tokens[-1]])
    return token_scores_under(state_1D, head, token, dists=[dist])[0]


def _biased(head: Head, ids: Sequence[int], nats: float, *, others: bool = False) -> Head:
    bias_V = torch.zeros(head.vocab_size)
    bias_V[torch.tensor(list(ids), dtype=torch.long)] = 1.0
    bias_V = (1 - bias_V if others else bias_V) * nats
    return replace(head, bias_V=bias_V if head.bias_V is None else head.bias_V + bias_V)


def _ids(text: float | str) -> list[int]:
    return [int(part) for part in str(text).split()]


# Semantic: what number is reported.


def raw_logprobs(site: Site) -> None:
    """S1: the raw logprob where the processed one is due."""
    site.reported(lambda sequence, state, head: float(sequence.raw_logprobs[-1]))


def other_temperature(site: Site, temperature: float) -> None:
    """S3: another temperature than was asked for."""
    _sampling(site, lambda s: replace(s, temperature=temperature))


def full_vocabulary(site: Site) -> None:
    """S4: drawn from the kept set, reported of the full vocabulary."""
    site.reported(lambda sequence, state, head: float(sequence.logprobs[-1] + sequence.log_kept_masses[-1]))


def hidden_defaults(site: Site, **defaults: float) -> None:
    """S5: sampling fields of the engine's own where a request is silent."""
    values = {k: int(v) if k == "top_k" else v for k, v in defaults.items()}
    site.put(
        site.transport,
        "incoming",
        lambda body: body.model_copy(update={k: v for k, v in values.items() if getattr(body, k) is None}),
    )


def ignored_penalties(site: Site) -> None:
    """S6: penalties that were asked for are not applied."""
    _sampling(site, lambda s: replace(s, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0))


def logit_bias(site: Site, ids: str, nats: float) -> None:
    """S6: a bias on the logits of some ids that nobody asked for."""
    site.drawn(lambda head, sequence: _biased(head, _ids(ids), nats))


def grammar(site: Site, ids: str, every: float = 0.0) -> None:
    """S7: only some ids may be drawn, and every n-th token is forced."""
    allowed = _ids(ids)

    def constrained(head: Head, sequence: Any) -> Head:
        count = len(sequence.completion)
        forced = every and count % int(every) == int(every) - 1
        return _biased(head, allowed[:1] if forced else allowed, FORBIDDEN, others=True)

    site.drawn(constrained)


def top_entry(site: Site) -> None:
    """S8: the most likely token's logprob instead of the drawn one's."""
    own = _own(LogprobKind.PROCESSED)
    site.reported(lambda seq, state, head: float(_score(seq, state, head, own(seq)).top_logprobs_T[0]))


def placeholder(site: Site, value: float, share: float, seed: float = 0.0) -> None:
    """S9: some numbers got lost and a constant stands in their place."""
    lost = random.Random(seed)
    site.answers(lambda ids, values: (ids, [value if lost.random() < share else v for v in values]))


def transport_grid(site: Site, grid: str) -> None:
    """S10: rounded on the way: bf16, fp16, or a number of decimals."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def rounded(ids: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        if grid in kinds:
            return ids, torch.tensor(values, dtype=torch.float64).to(kinds[grid]).double().tolist()
        return ids, [round(v, int(float(grid))) for v in values]

    site.answers(rounded)


# Tokenization: which tokens the numbers belong to, which prompt the model saw.


def shifted(site: Site, by: float) -> None:
    """T1: the number at position t is that of token t + by."""

    def moved(ids: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        at = [min(max(t + int(by), 0), len(values) - 1) for t in range(len(values))]
        return ids, [values[t] for t in at]

    site.answers(moved)


def extra_entry(site: Site) -> None:
    """T2: one logprob more than tokens."""
    site.answers(lambda ids, values: (ids, [*values, values[-1]]))


def retokenized(site: Site) -> None:
    """T3: prompts are decoded to text and encoded again. Raises EngineError without a tokenizer."""
    tokenizer = site.engine.tokens.tokenizer
    if tokenizer is None:
        raise EngineError("the model has no tokenizer")
    site.prompts(lambda ids: tuple(tokenizer.encode(tokenizer.decode(list(ids)), add_special_tokens=False)) or ids)


def double_bos(site: Site, bos: float) -> None:
    """T4: a BOS token in front of every prompt."""
    site.prompts(lambda ids: (int(bos), *ids))


def other_template(site: Site, before: str = "", after: str = "") -> None:
    """T5: a template's ids before and after every prompt."""
    site.prompts(lambda prompt: (*_ids(before), *prompt, *_ids(after)))


def synthetic_end(site: Site, token: float, value: float) -> None:
    """T7: an end token nobody drew takes the place of the last one."""
    site.answers(lambda ids, values: ([*ids[:-1], int(token)], [*values[:-1], value]))


def cut_prompts(site: Site, last: float) -> None:
    """T9: prompts are cut to their last tokens."""
    site.prompts(lambda ids: ids[-int(last) :])


def padded_vocabulary(site: Site, rows: float) -> None:
    """T10: rows of zeros beyond the vocabulary take part in every softmax, of scores too; they are never drawn."""
    count = site.runner.head.weight_VD.shape[0]

    def padded(head: Head) -> Head:
        return replace(
            head, weight_VD=torch.cat([head.weight_VD, head.weight_VD.new_zeros(int(rows), head.weight_VD.shape[1])])
        )

    own = _own(LogprobKind.PROCESSED)
    site.heads(padded)
    site.drawn(lambda head, sequence: replace(head, weight_VD=head.weight_VD[:count]))
    site.reported(lambda seq, state, head: float(_score(seq, state, head, own(seq)).logprobs_T[0]))


# Weights: what an update does.


def ignored_sync(site: Site) -> None:
    """W1: an update is confirmed and never applied."""
    site.put(site.runner, "swap", lambda shadow: None)


def late_sync(site: Site, lag: float) -> None:
    """W2: an update applies the weights of so many versions ago."""
    swap, queue = site.runner.swap, []

    def late(shadow: Shadow) -> None:
        queue.append(shadow)
        if len(queue) > int(lag):
            swap(queue[-1 - int(lag)])

    site.put(site.runner, "swap", late)


def partial_sync(site: Site, pattern: str) -> None:
    """W3: tensors whose name matches keep their old values."""
    make = site.runner.shadow

    def partial(tensors: Mapping[str, Tensor]) -> Shadow:
        old = {n: t.detach().clone() for n, t in site.runner.model.stored_tensors().items() if re.search(pattern, n)}
        return make({**tensors, **old})

    site.put(site.runner, "shadow", partial)


def repeated_repack(site: Site, pattern: str, factor: float) -> None:
    """W4: each load scales some tensors once more."""
    make = site.runner.shadow

    def repacked(tensors: Mapping[str, Tensor]) -> Shadow:
        return make({n: t * factor if re.search(pattern, n) else t for n, t in tensors.items()})

    site.put(site.runner, "shadow", repacked)


def dummy_table(site: Site, value: float) -> None:
    """W5: a rotary table that was never computed."""
    _rotary(site, lambda table: torch.full_like(table, value))


def torn_update(site: Site, steps: float) -> None:
    """W11: for some steps only half of the tensors are new; then the cache is cleared."""
    swap, make, step = site.runner.swap, site.runner.shadow, site.loop.step
    waiting: list[tuple[int, Shadow]] = []

    def tear(shadow: Shadow) -> None:
        names = sorted(shadow.tensors)
        old = site.runner.model.stored_tensors()
        half = {n: (shadow.tensors[n] if i % 2 else old[n].detach().clone()) for i, n in enumerate(names)}
        swap(make(half))
        waiting[:] = [(int(steps), shadow)]

    def mend() -> None:
        if waiting:
            left, shadow = waiting.pop()
            if left > 0:
                waiting.append((left - 1, shadow))
            else:
                swap(shadow)
                site.loop.clear_cache()
        step()

    site.put(site.runner, "swap", tear)
    site.put(site.loop, "step", mend)


def stale_prefixes(site: Site) -> None:
    """W12: cached prompts outlive the weights that computed them."""
    site.put(site.loop.prefixes, "_enter", lambda version: None)
    site.put(site.loop.prefixes, "clear", lambda: None)


def stale_head(site: Site) -> None:
    """W15: updates leave the head behind."""
    make = site.runner.shadow
    site.put(site.runner, "shadow", lambda tensors: replace(make(tensors), head=site.runner.head))


# Inference: the same weights, computed otherwise.


def _rotary(site: Site, change: Callable[[Tensor], Tensor]) -> None:
    rotary = site.runner.model.body.rotary_emb
    table = rotary.inv_freq
    site.stack.callback(setattr, rotary, "inv_freq", table)
    rotary.inv_freq = change(table.clone())


class _TruncatingNorm(_Norm):
    """Drops the low half of the residual stream's float32 on its way in."""

    def __call__(self, states: Tensor) -> Tensor:
        if states.dtype == torch.float32:
            states.copy_((states.contiguous().view(torch.int32) & -65536).view(torch.float32))
        return super().__call__(states)


def bf16_rounding(site: Site) -> None:
    """I1: the residual stream is stored in bf16 by truncation."""

    def truncate(body: FusedBody) -> None:
        def norm(old: _Norm) -> _Norm:
            return _TruncatingNorm(weight=old.weight, eps=old.eps)

        body.layers = [replace(x, input_norm=norm(x.input_norm), mlp_norm=norm(x.mlp_norm)) for x in body.layers]
        body.norm = norm(body.norm)

    site.bodies(truncate)


def bf16_head(site: Site) -> None:
    """I2: the head is multiplied and rounded in bf16."""
    site.heads(lambda h: replace(h, weight_VD=h.weight_VD.bfloat16(), matmul_dtype=torch.bfloat16))


def crosstalk(site: Site, share: float) -> None:
    """I3: in a batch, a sequence takes up a share of its neighbour's state."""

    def mix(states_TD: Tensor, spans: Sequence[Any]) -> Tensor:
        return states_TD + share * states_TD.roll(1, 0) if len(spans) > 1 else states_TD

    site.states(mix)


def decode_drift(site: Site, factor: float) -> None:
    """I4: decoding scales attention scores otherwise than prefill does."""

    def make(base: type[StepLayout]) -> type[StepLayout]:
        class Drifting(base):  # type: ignore[misc, valid-type]
            def _decode(self, query: Tensor, keys: Tensor, values: Tensor, shape: Any) -> Any:
                return super()._decode(query, keys, values, replace(shape, scaling=factor * shape.scaling))

        return Drifting

    site.layout(make)


def rounded_prefixes(site: Site, kind: str = "e4m3") -> None:
    """I5: cached prompts are kept in 8 bits."""
    cache, save = site.runner.cache, site.runner.cache.save

    def coarse(slot: int, count: int) -> dict[int, tuple[Tensor, ...]]:
        saved = save(slot, count)
        return {i: tuple(t.to(FLOAT8[kind]).to(t.dtype) for t in pair) for i, pair in saved.items()}

    site.put(cache, "save", coarse)


def kv_float8(site: Site, kind: str = "e4m3") -> None:
    """I6: keys and values are kept in 8 bits."""

    def make(base: type[StepLayout]) -> type[StepLayout]:
        class Coarse(base):  # type: ignore[misc, valid-type]
            def write(self, layer: int, key: Tensor, value: Tensor) -> Any:
                limit = torch.finfo(FLOAT8[kind]).max
                return super().write(
                    layer, *(t.clamp(-limit, limit).to(FLOAT8[kind]).to(t.dtype) for t in (key, value))
                )

        return Coarse

    site.layout(make)


def rope_theta(site: Site, theta: float) -> None:
    """I8: another rotary base."""
    _rotary(site, lambda t: theta ** -(torch.arange(len(t), dtype=torch.float32) / len(t)))


def rope_linear(site: Site, factor: float) -> None:
    """I8: positions divided by a factor."""
    _rotary(site, lambda table: table / factor)


def _shapes(site: Site, change: Callable[[Any], Any]) -> None:
    def make(base: type[StepLayout]) -> type[StepLayout]:
        class Reshaped(base):  # type: ignore[misc, valid-type]
            def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Any) -> Any:
                return super().attend(layer, query, key, value, change(shape))

        return Reshaped

    site.layout(make)


def window(site: Site, width: float) -> None:
    """I9: attention sees the last positions only."""
    _shapes(site, lambda shape: replace(shape, window=int(width)))


def not_finite(site: Site, share: float, seed: float = 0.0) -> None:
    """I11: now and then a token's state turns into NaN."""
    chance = random.Random(seed)

    def spoil(states_TD: Tensor, spans: Sequence[Any]) -> Tensor:
        lost_T1 = torch.tensor([[chance.random() < share] for _ in states_TD])
        return states_TD.masked_fill(lost_T1, math.nan)

    site.states(spoil)


def attention_scale(site: Site, factor: float) -> None:
    """I12: scores are multiplied by another factor."""
    _shapes(site, lambda shape: replace(shape, scaling=factor))


def _mask(site: Site, hidden: Callable[[Tensor, Tensor], Tensor]) -> None:
    def make(base: type[StepLayout]) -> type[StepLayout]:
        class Masked(base):  # type: ignore[misc, valid-type]
            @staticmethod
            def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
                return base.visible(query, key, window) & ~hidden(query, key)

        return Masked

    site.layout(make)


def skips_first(site: Site) -> None:
    """I12: later tokens do not see the first one."""
    _mask(site, lambda query, key: (key == 0) & (query > 0))


def skips_self(site: Site) -> None:
    """I12: a token does not see itself; the first one does."""
    _mask(site, lambda query, key: (key == query) & (query > 0))


def softcap(site: Site, cap: float) -> None:
    """I14: a soft-cap on the logits."""
    site.heads(lambda head: replace(head, softcap=cap))


def logit_scale(site: Site, factor: float) -> None:
    """I14: a factor on the logits."""
    site.heads(lambda head: replace(head, scale=head.scale * factor))


def embedding_scale(site: Site, factor: float) -> None:
    """I14: a factor on the input embeddings."""
    site.bodies(lambda body: setattr(body, "embedding", body.embedding * factor))


def noise(site: Site, share: float, seed: float = 0.0) -> None:
    """I15: every step adds noise to the states, a share of their size."""
    generator = torch.Generator().manual_seed(int(seed))

    def shaken(states_TD: Tensor, spans: Sequence[Any]) -> Tensor:
        random_TD = torch.randn(states_TD.shape, generator=generator)
        return states_TD + (share * states_TD.float().square().mean().sqrt() * random_TD).to(states_TD.dtype)

    site.states(shaken)


# Outside the catalogue: nothing a checker has a name for.


def skipped_layer(site: Site, index: float) -> None:
    """One decoder layer is left out."""

    def skip(body: FusedBody) -> None:
        del body.layers[int(index)]

    site.bodies(skip)


class _Gelu(_Product):
    """A product through another activation."""

    def __call__(self, states_TD: Tensor, *, activation: str = "none") -> Tensor:
        return F.gelu(super().__call__(states_TD))


def other_activation(site: Site) -> None:
    """The gate goes through GELU instead of SiLU."""

    def change(body: FusedBody) -> None:
        gates = (_Gelu(weight=layer.gate.weight, bias=layer.gate.bias) for layer in body.layers)
        body.layers = [replace(layer, gate=gate) for layer, gate in zip(body.layers, gates, strict=True)]

    site.bodies(change)


def silent_head(site: Site, index: float) -> None:
    """One attention head of every layer says nothing."""

    def make(base: type[StepLayout]) -> type[StepLayout]:
        class Silent(base):  # type: ignore[misc, valid-type]
            def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Any) -> Any:
                out = super().attend(layer, query, key, value, shape)
                out[:, int(index)] = 0
                return out

        return Silent

    site.layout(make)


def blended_report(site: Site, share: float) -> None:
    """A number between the raw logprob and twice it is reported."""
    site.reported(
        lambda sequence, state, head: float(sequence.logprobs[-1] * (1 + share * math.sin(sequence.tokens[-1])))
    )


def mirrored_state(site: Site, first: float) -> None:
    """The first entries of the last state are in reverse order."""
    site.states(lambda states, spans: torch.cat([states[:, : int(first)].flip(1), states[:, int(first) :]], dim=1))


FAULTS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        raw_logprobs, other_temperature, full_vocabulary, hidden_defaults, ignored_penalties, logit_bias, grammar,
        top_entry, placeholder, transport_grid, shifted, extra_entry, retokenized, double_bos, other_template,
        synthetic_end, cut_prompts, padded_vocabulary, ignored_sync, late_sync, partial_sync, repeated_repack,
        dummy_table, torn_update, stale_prefixes, stale_head, bf16_rounding, bf16_head, crosstalk, decode_drift,
        rounded_prefixes, kv_float8, rope_theta, rope_linear, window, not_finite, attention_scale, skips_first,
        skips_self, softcap, logit_scale, embedding_scale, noise, skipped_layer, other_activation, silent_head,
        blended_report, mirrored_state,
    )
} | GENERATION_FAULTS  # fmt: skip
"""By name; a docstring starts with the id of the cause it plants, if there is one."""
