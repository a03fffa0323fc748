"""The embedded engine itself: a thread that takes steps, and the calls that other threads make into it.

Everything that touches model, cache or scheduler happens in the engine's own thread between two steps; other threads
hand in functions and wait for their result. New weights are loaded and verified in a thread of their own, beside the
steps; only the swap stands between two of them.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from trueup.engines.base import (
    DEFAULT_TIMEOUT_S,
    EngineStatus,
    GenerationRequest,
    PauseMode,
    Result,
    Scores,
    UpdateReceipt,
)
from trueup.engines.embedded.faults import Planted, Transport
from trueup.engines.embedded.loop import StepLoop, Swap
from trueup.engines.embedded.options import CAPABILITIES, NAME, EngineOptions, Fault
from trueup.engines.embedded.runner import PolicyRunner, Shadow
from trueup.engines.embedded.scheduler import Group
from trueup.engines.embedded.scheduler import Sequence as EngineSequence
from trueup.engines.embedded.tokens import Tokens
from trueup.engines.embedded.worker import Worker, promise, wait
from trueup.errors import EngineError
from trueup.model.bitwise import arithmetic
from trueup.model.load import load_model
from trueup.model.packed import open_policy
from trueup.model.scoring import ScoredRow
from trueup.policy.draw import sample_seed
from trueup.weights.snapshot import WeightSnapshot, dtype_name, manifest_of
from trueup.weights.store import load_tensors, open_update


class EmbeddedEngine:
    """See engines/base.py for the protocol. `submit` is `generate` without waiting."""

    def __init__(self, path: Path, options: EngineOptions | None = None) -> None:
        """Load a Hugging Face checkpoint as weight version 0 and start the engine's thread.

        Raises ModelError when the checkpoint cannot be served.
        """
        options = options or EngineOptions()
        self.name, self.options, self.path = NAME, options, path
        self.capabilities = replace(CAPABILITIES, bitwise=options.bitwise)
        self._updating = threading.Lock()
        self._group_ids = itertools.count()
        self._planted = Planted()
        self._worker = Worker(self._open, name="trueup-engine")

    def _open(self) -> StepLoop:
        """Load everything, in the engine's thread: whichever thread computes first gets OpenMP workers of its own, and
        two sets of them on the same cores halve the speed of both."""
        options = self.options
        model = open_policy(load_model(self.path, dtype=options.dtype), bitwise=options.bitwise)
        self.tokens = Tokens(self.path, model)
        limit = min(model.max_positions or 2048, options.max_length or 2048)
        self._runner = PolicyRunner.of(model, slots=options.slots, capacity=limit, head_dtype=options.head_dtype)
        self._loop = StepLoop(self._runner, self.tokens, options, limit)
        self._arithmetic = arithmetic() if options.bitwise else None
        self._digests = {0: manifest_of(0, model.stored_tensors()).digest}
        return self._loop

    @property
    def max_length(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self._loop.max_length

    @property
    def vocab_size(self) -> int:
        """Ids below this are known to the model."""
        return self._runner.model.vocab_size

    def submit(
        self, request: GenerationRequest, *, on_token: Callable[[EngineSequence], None] | None = None
    ) -> tuple[int, Future[list[Result]]]:
        """Queue a request and return (its id, for `abort`; the future of its n completions).

        `on_token` is called in the engine's thread after each token. Raises EngineError for a request that can never
        run.
        """
        self.check(request)
        length = len(request.prompt.token_ids)
        wanted = request.sampling.max_tokens
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(62)
        group_id = next(self._group_ids)
        members = [
            EngineSequence(
                group=group_id,
                sample=sample,
                tokens=list(request.prompt.token_ids),
                prompt_tokens=length,
                sampling=replace(request.sampling, seed=sample_seed(seed, sample)),
                max_tokens=wanted or self.max_length - length,
                ignore_eos=request.ignore_eos,
                on_token=on_token,
            )
            for sample in range(request.n)
        ]
        group = Group(id=group_id, request=request, members=members, unfinished=request.n)
        future: Future[list[Result]] = promise()
        self._worker.post(lambda: self._loop.add(group, future))
        return group_id, future

    def check(self, request: GenerationRequest) -> None:
        """Raise EngineError for a request that can never run."""
        self._check_ids(request.prompt.token_ids)
        length, wanted = len(request.prompt.token_ids), request.sampling.max_tokens or 1
        if length + wanted > self.max_length:
            raise EngineError(
                f"prompt of {length} tokens and {wanted} to generate exceed the engine's {self.max_length}; "
                "shorten the request or start the engine with a larger max_length"
            )
        self.tokens.check(request)

    def generate(
        self, requests: Sequence[GenerationRequest], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[list[Result]]:
        """See Engine.generate. Raises EngineError when the time is over; the requests are aborted then."""
        for request in requests:
            self.check(request)
        submitted = [self.submit(request) for request in requests]
        return self._collect(submitted, timeout_s)

    def score(self, rows: Sequence[ScoredRow], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Scores]:
        """See Engine.score: rows run through the same steps as generation. Raises EngineError."""
        for row in rows:
            if not row.prompt_ids or not row.completion_ids:
                raise EngineError("a row to score needs a prompt and a completion")
            self._check_ids(row.prompt_ids + row.completion_ids)
            if len(row) > self.max_length:
                raise EngineError(f"a row of {len(row)} tokens exceeds the engine's {self.max_length}")
        submitted: list[tuple[int, Future[Any]]] = []
        for row in rows:
            group_id = next(self._group_ids)
            member = EngineSequence(
                group=group_id,
                sample=0,
                tokens=list((row.prompt_ids + row.completion_ids)[:-1]),
                prompt_tokens=len(row.prompt_ids),
                sampling=None,
            )
            group = Group(id=group_id, request=None, members=[member], unfinished=1)
            future: Future[Any] = promise()
            self._worker.post(lambda g=group, r=row, f=future: self._loop.add_row(g, r, f))  # type: ignore[misc]
            submitted.append((group_id, future))
        return [result for results in self._collect(submitted, timeout_s) for result in results]

    def abort(self, group_id: int) -> None:
        """End a request's completions with finish_reason "abort"; harmless if it is done."""
        self._worker.post(lambda: self._loop.abort(group_id))

    def pause(self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """See Engine.pause. Raises EngineError when the running requests do not end in time."""
        stopped: Future[None] = promise()
        self._worker.post(lambda: self._loop.pause(mode, stopped))
        try:
            wait(stopped, timeout_s, f"pause ({mode})")
        except EngineError:
            self._worker.post(lambda: self._loop.give_up_pause(stopped))
            raise

    def resume(self) -> None:
        """See Engine.resume."""
        self._worker.call(self._loop.resume, DEFAULT_TIMEOUT_S)

    def clear_cache(self) -> None:
        """Forget every key and value: running sequences are computed again, prefixes are dropped."""
        self._worker.call(self._loop.clear_cache, DEFAULT_TIMEOUT_S)

    def update_weights(self, path: Path, *, clear_cache: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> UpdateReceipt:
        """See Engine.update_weights. Raises WeightError, or EngineError when the time is over before the swap."""
        start = time.perf_counter()
        if not self._updating.acquire(timeout=timeout_s):
            raise EngineError(f"another update took longer than allowed ({timeout_s:g} s)")
        try:
            prepared = promise()
            # A thread of its own that ends: OpenMP workers left behind by the load would slow every later step.
            threading.Thread(target=self._prepare, args=(path, prepared), name="trueup-load", daemon=True).start()
            snapshot, shadow = wait(prepared, timeout_s - (time.perf_counter() - start), "loading")
            load_s = time.perf_counter() - start

            def swap() -> Swap:
                self._digests[snapshot.version] = snapshot.manifest.digest
                return self._loop.swap(snapshot.version, shadow, clear_cache)

            swapped = self._worker.call(swap, timeout_s - load_s)
        finally:
            self._updating.release()
        return UpdateReceipt(
            engine=self.name,
            version=snapshot.version,
            previous_version=swapped.previous_version,
            verified_by=("file_digest", "shadow"),
            paused_s=swapped.paused_s,
            load_s=load_s,
            in_flight=swapped.in_flight,
            kv="cleared" if clear_cache else "kept",
        )

    def _prepare(self, path: Path, prepared: Future[tuple[WeightSnapshot, Shadow]]) -> None:
        """Read a version, verify it and make it ready, while the engine goes on stepping."""
        try:
            model = self._runner.model
            snapshot = open_update(
                path, allowed=self.options.weights_root, served=self._digests,
                shapes={n: tuple(t.shape) for n, t in model.stored_tensors().items()}, dtype=model.dtype,
            )  # fmt: skip
            prepared.set_result((snapshot, self._runner.shadow(load_tensors(snapshot))))
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits for it)
            prepared.set_exception(error)

    def plant(self, faults: Sequence[Fault], transport: Transport | None = None) -> None:
        """Break the engine on purpose, between two steps; what was planted before is taken back first.

        Raises EngineError for a fault that is not known or cannot be planted here.
        """
        self._worker.call(lambda: self._planted.replace(self, self._loop, faults, transport), DEFAULT_TIMEOUT_S)

    def status(self) -> EngineStatus:
        """See Engine.status. Raises EngineError when the engine's thread has failed."""
        loop, precision = self._loop, self.options
        self._worker.check_open()
        return EngineStatus(
            engine=self.name,
            version=loop.version,
            model_digest=self._digests.get(loop.version),
            precision={
                "body": dtype_name(precision.dtype),
                "head": dtype_name(precision.head_dtype),
            },
            paused=loop.paused,
            running=len(loop.scheduler.running),
            waiting=len(loop.scheduler.waiting),
            generated_tokens=loop.generated_tokens,
            arithmetic=self._arithmetic,
            details={
                "slots": precision.slots,
                "fused": self._runner.fused is not None,
                "max_length": self.max_length,
                "steps": loop.steps,
                "prefill_tokens": loop.prefill_tokens,
                "prefix_hit_tokens": loop.prefixes.hit_tokens,
                "weights_folder": None if precision.weights_root is None else str(precision.weights_root.absolute()),
                "faults": self._planted.described(),
            },
        )

    def close(self) -> None:
        """See Engine.close."""
        self._worker.close()

    def _check_ids(self, ids: Sequence[int]) -> None:
        self._worker.check_open()
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise EngineError(f"token id {max(ids, key=abs)} is outside the model's vocabulary of {self.vocab_size}")

    def _collect(self, submitted: Sequence[tuple[int, Future[Any]]], timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        try:
            return [wait(future, deadline - time.monotonic(), "generation") for _, future in submitted]
        except EngineError:
            for group_id, _ in submitted:
                self.abort(group_id)
            raise
