"""vLLM as a rollout engine, 0.32 and 0.18.1: exact versions, updates in flight that are verified, nothing lost.

An update is validated before vLLM hears of it (it answers 200 to a missing tensor), loaded while the engine stands
still, labelled, and a canary is scored afterwards. Whatever goes wrong once vLLM has begun to load leaves the engine
marked dead, and restarted with the last good weights where the caller can restart it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trueup.engines import vllm_control as control
from trueup.engines.admission import Aborted, Admission
from trueup.engines.base import (
    DEFAULT_TIMEOUT_S,
    EngineCapabilities,
    EngineStatus,
    GenerationRequest,
    PauseMode,
    Result,
    RolloutFailure,
    Scores,
    UpdateReceipt,
    require_sampling,
)  # fmt: skip
from trueup.engines.canary import Canary
from trueup.engines.lives import PassedUpdate, lives_of
from trueup.engines.openai_http import OpenAIEngine
from trueup.engines.vllm_checkpoint import read_checkpoint, serve_folder
from trueup.engines.vllm_completion import COMPLETERS, read_metrics, record
from trueup.engines.vllm_facts import minor, read_facts
from trueup.engines.vllm_server import VllmServer
from trueup.errors import EngineError
from trueup.model.scoring import ScoredRow
from trueup.policy.draw import sample_seed
from trueup.types import LogprobKind
from trueup.weights.snapshot import WeightSnapshot
from trueup.weights.store import load_tensors, open_update

NAME = "vllm"
LIMIT_RETRIES = 3
RESERVED_SLOTS = 1
"""Left free of rollouts, so that a canary is scored at once whatever runs."""
CAPABILITIES = EngineCapabilities(
    logprob_kinds=frozenset({LogprobKind.PROCESSED}), scores=True, pause_modes=frozenset(PauseMode), updates=True,
    clears_cache=True, keeps_cache=True, weight_versions=True, cache_lives=True,
)  # fmt: skip


class VllmEngine(OpenAIEngine):
    """See engines/base.py for the protocol. Nobody else may ask or update the same server meanwhile."""

    def __init__(
        self,
        url: str,
        *,
        model: Path,
        staging: Path,
        weights_root: Path | None = None,
        head_dtype: torch.dtype = torch.float32,
        untie: bool = True,
        canary: bool = True,
        restart: Callable[[Path], None] | None = None,
    ) -> None:
        """Connect to a server that serves `model` as version 0.

        `staging` holds the folders that vLLM reloads from; `weights_root`: updates come from under it only. `untie`:
        the server was given the tied head as a tensor (vllm_checkpoint.py). `restart` starts the server again on such
        a folder. Raises EngineError when nobody answers, for a version that was never tried, and, by the canary, when
        other weights are served; how far its scores are off (`start_distance`) is the canary's measure from then on.
        """
        super().__init__(url, kind=LogprobKind.PROCESSED, model=None, scores=True)
        self.name = NAME
        self.checkpoint = read_checkpoint(model)
        self.facts = read_facts(self._http.get, self.model)
        self.kind = self.facts.kind
        self.capabilities = replace(CAPABILITIES, logprob_kinds=frozenset({self.kind}))
        self._staging, self._weights_root, self._untie, self._restart = staging, weights_root, untie, restart
        self._completer = COMPLETERS[minor(self.facts.version)](self._http, self.model)
        self._admission = Admission(
            slots=max(1, self.facts.slots - RESERVED_SLOTS), capacity_tokens=self.facts.capacity_tokens
        )
        self._head_dtype = head_dtype
        self._updating = threading.Lock()
        self._passed: list[PassedUpdate] = []
        self._digests: dict[int, str] = {0: ""}  # no digest is known, and 0 names nothing else
        self._refuted: set[int] = set()
        self._trusted = threading.Event()
        self._trusted.set()
        self._good: Path | None = staging / "start" if restart is not None else None
        self._paused, self._dead = False, ""
        self._canary_due: tuple[torch.Tensor | None, Path] | None = None
        self.restarts = self.retried_requests = 0
        self._completer.set_version(0)
        self._canary: Canary | None = None
        if canary:
            self._canary = Canary(
                model, dtype=self.facts.dtype, head_dtype=head_dtype, max_length=self.facts.max_length
            )
            self.start_distance = self._canary.calibrate(self._canary_scores())

    @classmethod
    def of(cls, server: VllmServer, *, weights_root: Path | None = None, canary: bool = True) -> VllmEngine:
        """The engine of a server that was started here, restarted when it must be."""
        config = server.config
        assert config.model is not None
        return cls(
            server.url, model=config.model, staging=server.run / "served", weights_root=weights_root,
            head_dtype=getattr(torch, config.head), untie=config.untie, canary=canary, restart=server.restart,
        )  # fmt: skip

    def generate(
        self, requests: Sequence[GenerationRequest], *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> list[list[Result]]:
        """See Engine.generate; completions of a request run side by side, each a request of its own."""
        self._check_alive()
        for request in requests:
            require_sampling(self.capabilities, request.sampling, self.name)
            self.facts.require_room(request, self.checkpoint.vocab_size)
        deadline, aborts = time.monotonic() + timeout_s, self._admission.aborts
        singles = [(request, sample) for request in requests for sample in range(request.n)]
        results = iter(
            self._side_by_side(lambda item, _: self._one(*item, deadline=deadline, aborts=aborts), singles, timeout_s)
        )
        return [[next(results) for _ in range(request.n)] for request in requests]

    def score(self, rows: Sequence[ScoredRow], *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[Scores]:
        """See Engine.score; the version is the one that was served when a row entered. Raises EngineError."""
        self._check_alive()
        deadline, aborts = time.monotonic() + timeout_s, self._admission.aborts

        def one(row: ScoredRow, _: float) -> Scores:
            try:
                with self._admission.enter(self.facts.blocks(len(row) + 1), aborts=aborts, deadline=deadline):
                    version, passed = self.version, len(self._passed)
                    with self._completer.scoring():
                        scores = self._score_one(row, deadline - time.monotonic())
            except Aborted:
                raise EngineError("scoring was aborted") from None
            return replace(scores, version=version if passed == len(self._passed) else None)

        return self._side_by_side(one, rows, timeout_s)

    def pause(self, mode: PauseMode = PauseMode.KEEP, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """See Engine.pause."""
        self._check_alive()
        self._admission.close()
        if mode == PauseMode.ABORT:
            self._admission.abort()
        try:
            control.pause(self._http, PauseMode(mode), timeout_s=timeout_s)
        except EngineError:
            self._admission.open()
            raise
        self._paused = True

    def resume(self) -> None:
        """See Engine.resume; after an update that found the engine paused, its canary is scored now."""
        self._check_alive()
        control.resume(self._http)
        self._paused = False
        self._judge()
        self._admission.open()

    def reset_prefix_cache(self) -> None:
        """Forget cached prompts, and keys and values of running requests: they are computed again."""
        self._check_alive()
        control.clear_cache(self._http)

    def update_weights(self, path: Path, *, clear_cache: bool, timeout_s: float = DEFAULT_TIMEOUT_S) -> UpdateReceipt:
        """See Engine.update_weights. Raises WeightError before vLLM is touched; EngineError when an update failed
        inside vLLM, which is then dead, or restarted with the weights it had."""
        self._check_alive()
        deadline = time.monotonic() + timeout_s
        if not self._updating.acquire(timeout=timeout_s):
            raise EngineError(f"another update took longer than allowed ({timeout_s:g} s)")
        try:
            return self._update(path, clear_cache, deadline)
        finally:
            self._updating.release()

    def status(self) -> EngineStatus:
        """See Engine.status: what vLLM's metrics say of its requests, and who waits outside it."""
        self._check_alive()
        metrics = read_metrics(self._http)
        inside = self._admission.inside
        running = min(int(metrics["num_requests_running"]), inside)
        return EngineStatus(
            engine=self.name,
            version=self.version,
            model_digest=self._digests[self.version] or None,
            precision={
                "body": str(self.facts.dtype).removeprefix("torch."),
                "head": str(self._head_dtype).removeprefix("torch."),
            },
            paused=control.is_paused(self._http),
            running=running,
            waiting=min(int(metrics["num_requests_waiting"]), inside - running) + self._admission.waiting,
            generated_tokens=int(metrics["generation_tokens_total"]),
            details={
                "vllm": self.facts.version, "slots": self._admission.slots, "restarts": self.restarts,
                "retried_requests": self.retried_requests, "max_length": self.facts.max_length,
                "prefix_caching": self.facts.prefix_caching,
            },
        )  # fmt: skip

    def _one(self, request: GenerationRequest, sample: int, *, deadline: float, aborts: int) -> Result:
        sampling = request.sampling
        limit = sampling.max_tokens or self.facts.max_length - len(request.prompt.token_ids)
        seed = None if sampling.seed is None else sample_seed(sampling.seed, sample)
        request = replace(request, n=1, sampling=replace(sampling, max_tokens=limit, seed=seed))
        for attempt in range(LIMIT_RETRIES + 1):
            restarts = self.restarts
            try:
                tokens = self.facts.blocks(len(request.prompt.token_ids) + limit)
                with self._admission.enter(tokens, aborts=aborts, deadline=deadline):
                    sent, sent_under = len(self._passed), self.version
                    made = self._completer.complete(request, self._sampling(request), deadline - time.monotonic())
                self._trusted.wait(max(0.0, deadline - time.monotonic()))
                passed = self._passed[sent:]
            except Aborted:
                return RolloutFailure(prompt_id=request.prompt.prompt_id, reason="abort")
            except EngineError:
                if attempt == LIMIT_RETRIES or not self._comes_back(restarts, deadline):
                    raise
            else:
                unasked = made.finish_reason == "abort" and self._admission.aborts == aborts
                if not unasked and not self._refuted.intersection(made.versions):
                    lives = lives_of(
                        len(request.prompt.token_ids), made.versions, passed, sent_under=sent_under,
                        whole_prefill=self.facts.whole_prefill,
                    )  # fmt: skip
                    return record(request, made, lives, kind=self.kind, engine=self.name)
            self.retried_requests += 1
        return RolloutFailure(prompt_id=request.prompt.prompt_id, reason=f"lost {LIMIT_RETRIES + 1} times")

    def _sampling(self, request: GenerationRequest) -> dict[str, Any]:
        body = self._body(request)
        for name in ("model", "prompt", "return_token_ids", "return_tokens_as_token_ids"):
            del body[name]
        salt = [request.cache_salt] if request.cache_salt is not None else []
        if self.facts.prefix_caching:
            body["cache_salt"] = " ".join([f"v{self.version}", *salt])
        return body

    def _update(self, path: Path, clear_cache: bool, deadline: float) -> UpdateReceipt:
        started = time.perf_counter()
        snapshot = open_update(
            path,
            allowed=self._weights_root,
            served=self._digests,
            shapes=self.checkpoint.shapes,
            dtype=self.facts.dtype,
        )
        tensors = load_tensors(snapshot)
        folder = serve_folder(
            self.checkpoint, snapshot.path, self._staging / f"v{snapshot.version:06d}", untie=self._untie
        )
        expected_T = None if self._canary is None else self._canary.expect(tensors)
        del tensors
        read_s = time.perf_counter() - started
        was_paused, previous = self._paused, self.version
        self._admission.close()
        paused = time.perf_counter()
        try:
            self._stand_still(was_paused, deadline)
        except EngineError as error:
            if not control.answers(self._http):
                raise self._die(f"vLLM went away before version {snapshot.version} was loaded: {error}") from None
            if not was_paused:
                with suppress(EngineError):
                    control.resume(self._http)
                self._admission.open()
            raise
        in_flight = self._admission.inside
        self._trusted.clear()
        try:
            loading = time.perf_counter()
            self._load(folder, snapshot, clear_cache, deadline - time.monotonic())
            load_s = read_s + time.perf_counter() - loading
            if not was_paused:
                control.resume(self._http)
            paused_s = time.perf_counter() - paused
        except EngineError as error:
            raise self._die(f"the update to version {snapshot.version} failed inside vLLM: {error}") from None
        verified = ["file_digest"]
        self._canary_due = (expected_T, folder)
        if not was_paused:
            if self._judge():
                verified.append("canary")
            self._admission.open()
        return UpdateReceipt(
            engine=self.name, version=snapshot.version, previous_version=previous, verified_by=tuple(verified),
            paused_s=paused_s, load_s=load_s, in_flight=in_flight, kv="cleared" if clear_cache else "kept",
        )  # fmt: skip

    def _stand_still(self, was_paused: bool, deadline: float) -> None:
        completer = self._completer
        if completer.unaccountable:
            if was_paused or not self._admission.wait_empty(deadline):
                raise EngineError("a request was given up while others ran; they must end before an update")
            completer.restarted()
        if not was_paused:
            control.pause(self._http, PauseMode.KEEP, timeout_s=min(control.TIMEOUT_S, deadline - time.monotonic()))
        completer.settle(min(control.TIMEOUT_S, deadline - time.monotonic()))

    def _load(self, folder: Path, snapshot: WeightSnapshot, clear_cache: bool, timeout_s: float) -> None:
        control.reload(self._http, folder, timeout_s=timeout_s)
        self._completer.set_version(snapshot.version)
        if clear_cache:
            control.clear_cache(self._http)
        self.version = snapshot.version
        self._digests[snapshot.version] = snapshot.manifest.digest
        self._passed.append(PassedUpdate(version=snapshot.version, cleared=clear_cache))

    def _judge(self) -> bool:
        """Score the canary that is due, if one is. Returns whether it could have told these weights from the old ones.

        Raises EngineError, the engine dead or restarted, if it does not fit.
        """
        if self._canary_due is None:
            return False
        (expected_T, folder), self._canary_due = self._canary_due, None
        tells = False
        if self._canary is not None and expected_T is not None:
            try:
                verdict = self._canary.judge(self._canary_scores(), expected_T)
            except EngineError as error:
                raise self._die(f"the canary of version {self.version} could not be scored: {error}") from None
            if not verdict.fits:
                raise self._die(f"version {self.version} is not what vLLM computes with: {verdict}")
            tells = verdict.tells
        stale, self._good = self._good, folder
        if stale is not None and stale != folder:
            shutil.rmtree(stale, ignore_errors=True)
        self._refuted.discard(self.version)
        self._trusted.set()
        return tells

    def _canary_scores(self) -> torch.Tensor:
        assert self._canary is not None
        values: list[float] = []
        for row in self._canary.rows:
            with self._completer.scoring():
                values += self._score_one(row, control.TIMEOUT_S).logprobs
        return torch.tensor(values, dtype=torch.float64)

    def _die(self, reason: str) -> EngineError:
        """Mark the engine dead, restart it if that is possible, and return the error to raise."""
        self._dead = f"the engine is dead: {reason}"
        self._refuted.add(self.version)
        self._trusted.set()
        if self._restart is None or self._good is None:
            self._admission.kill(self._dead)
            return EngineError(self._dead)
        self._admission.close()
        good = max((v for v in self._digests if f"v{v:06d}" == self._good.name), default=0)
        try:
            self._restart(self._good)
            self._completer.restarted()
            self._completer.set_version(good)
            if self._canary is not None:
                self._canary.calibrate(self._canary_scores())
        except EngineError as error:
            self._dead += f"; its restart failed: {error}"
            self._admission.kill(self._dead)
            return EngineError(self._dead)
        self.version, self._dead, self._paused = good, "", False
        self._refuted.discard(good)
        self._canary_due = None
        self.restarts += 1
        self._passed.append(PassedUpdate(version=good, cleared=True))
        self._admission.open()
        return EngineError(f"{reason}; vLLM was restarted with version {good}")

    def _comes_back(self, restarts: int, deadline: float) -> bool:
        """Whether the engine was, or is being, restarted since; waits for it."""
        while self._dead and self._restart is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.restarts > restarts and not self._dead

    def _check_alive(self) -> None:
        if self._dead:
            raise EngineError(self._dead)
