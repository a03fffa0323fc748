"""A served engine on which plans are carried out: planted, brought to the weights a plan asks for, checked, healed."""

from __future__ import annotations

import json
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from tests.engine_kit import publish_perturbed
from tests.fault_matrix.plans import Plan, World
from tests.server_kit import ServerProcess
from trueup.config import CheckConfig
from trueup.model.load import load_model
from trueup.parity.context import Contexts
from trueup.parity.live import check_engine
from trueup.parity.prompts import TEXTS
from trueup.parity.run import check_trace
from trueup.parity.update_probe import checkpoint_of
from trueup.trace import write_trace
from trueup.weights.store import WeightStore

COMMON = (" the", ".", ",", "\n", " and", " of", " to", "e", "a", " ")
IN_FLIGHT_TOKENS = 80
PERTURBATION = 0.08


def describe(name: str, model: Path, dtype: str) -> World:
    """What plans may draw from."""
    loaded = load_model(model, dtype=torch.float32)
    tokenizer = Contexts(model).tokenizer
    config = loaded.lm.config
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "X"}], tokenize=False, add_generation_prompt=True)
    sides = tuple(" ".join(map(str, tokenizer.encode(t, add_special_tokens=False))) for t in turn.split("X"))
    common = {tokenizer.encode(t, add_special_tokens=False)[0] for t in COMMON}
    eos = config.eos_token_id
    return World(
        model=name, dtype=dtype, vocab=loaded.vocab_size, eos=eos[0] if isinstance(eos, list) else eos,
        bos=config.bos_token_id, common=tuple(sorted(common)), template=sides,
        kinds=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        heads=config.num_attention_heads, layers=config.num_hidden_layers,
        theta=float(config.rope_parameters["rope_theta"]),
    )  # fmt: skip


class Stand:
    """One server (and, for replicas, a second one) of a model in a dtype."""

    def __init__(self, name: str, model: Path, dtype: str, folder: Path, **knobs: object) -> None:
        self.world = describe(name, model, dtype)
        self.model, self.dtype, self.folder, self.knobs = model, dtype, folder, knobs
        self.servers: list[ServerProcess] = []
        self.store = WeightStore(folder / "weights")
        self.store.root.mkdir(parents=True, exist_ok=True)
        self.kind = getattr(torch, dtype)
        self._server()

    def _server(self) -> ServerProcess:
        number = len(self.servers)
        place = self.folder / f"server{number}"
        place.mkdir(parents=True)
        if self.servers:
            shutil.copy(self.servers[0].token_file, place / "token")
        server = ServerProcess(
            self.model, place, "--dtype", self.dtype, "--allow-faults", "--weights", str(self.store.root)
        )
        (self.folder / "token").write_text(server.token) if not number else None
        self.servers.append(server)
        return server

    def close(self) -> None:
        """Stop what was started."""
        for server in self.servers:
            server.stop()

    def post(self, path: str, body: dict, server: int = 0) -> dict:
        """Ask a server's control plane."""
        own = self.servers[server]
        answer = httpx.post(own.url + path, json=body, headers={"Authorization": f"Bearer {own.token}"}, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def plant(self, faults) -> None:
        """Break the first server; () heals it."""
        self.post("/control/faults", {"faults": [{"name": n, "values": v} for n, v in faults]})

    def next_version(self) -> int:
        """A number no version has had."""
        return max(self.store.versions(), default=0) + 1

    def update(self, version: int, *, clear: bool = True, server: int = 0) -> None:
        """Load a published version."""
        body = {"path": str(self.store.folder(version)), "clear_cache": clear}
        self.post("/control/update_weights", body, server)

    def original(self) -> int:
        """Publish the checkpoint itself as a version."""
        version = self.next_version()
        self.store.publish(version, load_model(self.model, dtype=self.kind).stored_tensors())
        return version

    def perturbed(self) -> int:
        """Publish other weights."""
        version = self.next_version()
        publish_perturbed(self.store, self.model, version, scale=PERTURBATION, dtype=self.kind)
        return version

    def checkpoint(self, version: int) -> Path:
        """A version as a checkpoint that the checker can open."""
        target = self.folder / f"checkpoint{version}-{time.monotonic_ns()}"
        return checkpoint_of(target, self.model, self.store.folder(version))

    def carry_out(self, plan: Plan, *, seed: int):
        """Plant, bring about the weights, check, heal; return the report."""
        try:
            return self._staged(plan, seed)
        finally:
            self.plant(())
            if plan.stage != "none":
                self.update(self.original())
                for version in self.store.versions()[:-1]:
                    shutil.rmtree(self.store.folder(version))

    def _staged(self, plan: Plan, seed: int):
        knobs = {"seed": seed} | self.knobs | plan.knobs
        if plan.stage == "none":
            self.plant(plan.faults)
            return self.check(**knobs)
        base = self.original()
        self.update(base)
        if plan.stage == "another model":
            self.update(self.perturbed())
            return self.check(**knobs)
        if plan.stage == "one replica":
            if len(self.servers) < 2:
                self._server()
            new = self.perturbed()
            self.update(new)
            self.update(base, server=1)
            return self.check(replicas=2, model=self.checkpoint(new), **knobs)
        self.plant(plan.faults)
        if plan.stage == "in flight":
            return self._in_flight(base, knobs)
        versions = [self.perturbed() for _ in range(3 if plan.stage == "four updates" else 1)]
        for version in versions:
            self.update(version)
        older = tuple(self.store.folder(v) for v in (base, *versions[:-1]))
        return self.check(model=self.checkpoint(versions[-1]), checkpoints=older, **knobs)

    def check(self, *, replicas: int = 1, model: Path | None = None, **knobs):
        """`trueup check --engine`."""
        urls = tuple(s.url for s in self.servers[:replicas])
        values = {"engine": urls, "model": model or self.model, "token_file": self.folder / "token"} | knobs
        return check_engine(CheckConfig(**values))

    def _in_flight(self, base: int, knobs):
        """Rollouts that span an update, logged with their stamps, checked as a trace."""
        tokenizer = Contexts(self.model).tokenizer
        prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:12]]
        new = self.perturbed()
        answers: dict[int, dict] = {}

        def generate(index: int) -> None:
            body = {
                "prompt": prompts[index], "max_tokens": IN_FLIGHT_TOKENS, "seed": 1000 * knobs["seed"] + index,
                "temperature": 1.0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True,
            }  # fmt: skip
            answers[index] = self.post("/v1/completions", body)

        threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(prompts))]
        before = self._generated()
        for thread in threads:
            thread.start()
        while self._generated() - before < len(prompts) * IN_FLIGHT_TOKENS // 3:
            time.sleep(0.005)
        self.update(new)
        for thread in threads:
            thread.join()
        rows = []
        for index, answer in sorted(answers.items()):
            choice = answer["choices"][0]
            rows.append({
                "engine": {"name": "trueup", "flags": {"dtype": self.dtype, "head_dtype": "float32"}},
                "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
                "prompt_token_ids": prompts[index], "completion_token_ids": choice["token_ids"],
                "completion_logprobs": choice["logprobs"]["token_logprobs"],
                "weight_versions": [v for v, n in choice["weight_versions"] for _ in range(n)],
            })  # fmt: skip
        path = self.folder / f"in-flight-{new}.jsonl"
        write_trace(path, rows)
        return check_trace(CheckConfig(trace=path, model=self.checkpoint(new), checkpoints=(self.store.folder(base),)))

    def _generated(self) -> int:
        own = self.servers[0]
        answer = httpx.get(own.url + "/control/status", headers={"Authorization": f"Bearer {own.token}"}, timeout=60)
        return int(answer.json()["generated_tokens"])


@contextmanager
def stand(name: str, model: Path, dtype: str, folder: Path, **knobs):
    """A stand, stopped afterwards."""
    made = Stand(name, model, dtype, folder, **knobs)
    try:
        yield made
    finally:
        made.close()


def outcome(report, cause: str) -> dict[str, object]:
    """One row's result, as it is written into the table."""
    named = [c.id for c in report.causes]
    ambiguous = sorted({i for s in report.settings for group in s.ambiguous for i in group})
    return {
        "verdict": report.verdict,
        "named": named,
        "first": bool(named) and named[0] == cause,
        "ambiguous": ambiguous,
        "unexplained": sum(s.unexplained is not None for s in report.settings),
        "seconds": round(report.seconds, 1),
    }


def dump(row: dict[str, object]) -> str:
    """A row as a line."""
    return json.dumps(row, separators=(",", ":"))
