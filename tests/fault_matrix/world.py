"""A served engine on which plans are carried out: planted, brought to the weights a plan asks for, checked, healed."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import torch

from tests.engine_kit import publish_perturbed
from tests.fault_matrix.plans import Plan, World
from tests.plain_engine import draw_completions
from tests.plain_trainer import PlainTrainer, make_tiny_gpt2
from tests.server_kit import ServerProcess
from trueup.engines.probe_http import Answer, ProbeClient
from trueup.knobs import CheckConfig
from trueup.model.load import load_model
from trueup.parity import check_rollouts
from trueup.parity.context import Contexts
from trueup.parity.live import check_engine
from trueup.parity.probes import asks_of
from trueup.parity.prompts import TEXTS
from trueup.parity.run import check_trace
from trueup.parity.update_probe import checkpoint_of
from trueup.trace import write_trace
from trueup.weights.store import WeightStore

COMMON = (" the", ".", ",", "\n", " and", " of", " to", "e", "a", " ")
ROWS = 12
SPANNING_TRIES = 4
"""An update that came too late, when most rollouts had ended, shows nothing."""
IN_FLIGHT_TOKENS, TRIAL_TOKENS = 80, 24


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
        self.client = ProbeClient(self.servers[0].url, token=self.servers[0].token, timeout_s=300)

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
        self.client.close()
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

    def perturbed(self, scale: float) -> int:
        """Publish other weights, noisy by a share of each tensor's spread."""
        version = self.next_version()
        publish_perturbed(self.store, self.model, version, scale=scale, dtype=self.kind)
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
            if self.store.versions() or plan.knobs.get("allow_updates"):
                self.update(self.original())
                for version in self.store.versions()[:-1]:
                    shutil.rmtree(self.store.folder(version))

    def _staged(self, plan: Plan, seed: int):
        knobs = {"seed": seed} | self.knobs | plan.knobs
        if plan.stage == "none":
            self.plant(plan.faults)
            return self.check(**knobs)
        if plan.trainer is not None:
            return self._on_trial(plan, seed)
        base = self.original()
        self.update(base)
        if plan.stage == "another model":
            self.update(self.perturbed(plan.scale))
            return self.check(**knobs)
        if plan.stage == "one replica":
            if len(self.servers) < 2:
                self._server()
            new = self.perturbed(plan.scale)
            self.update(new)
            self.update(base, server=1)
            return self.check(replicas=2, model=self.checkpoint(new), **knobs)
        self.plant(plan.faults)
        if plan.stage == "in flight":
            return self._in_flight(base, plan.scale, seed)
        if plan.stage.startswith("stale rows"):
            return self._stale_rows(base, plan.scale, seed, proven=plan.stage == "stale rows")
        versions = [self.perturbed(plan.scale) for _ in range(3 if plan.stage == "four updates" else 1)]
        for version in versions:
            self.update(version)
        older = tuple(self.store.folder(v) for v in (base, *versions[:-1]))
        return self.check(model=self.checkpoint(versions[-1]), checkpoints=older, **knobs)

    def check(self, *, replicas: int = 1, model: Path | None = None, **knobs):
        """`trueup check --engine`."""
        urls = tuple(s.url for s in self.servers[:replicas])
        values = {"engine": urls, "model": model or self.model, "token_file": self.folder / "token"} | knobs
        return check_engine(CheckConfig(**values))

    def _rows(self, prompts: Sequence[tuple[int, ...]], answers: Sequence[Answer]) -> list[dict[str, object]]:
        """Answers as rows of a log."""
        assert not any(a.error for a in answers), answers
        return [
            {
                "engine": {"name": "trueup", "flags": {"dtype": self.dtype, "head_dtype": "float32"}},
                "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
                "prompt_token_ids": list(prompt), "completion_token_ids": list(answer.ids),
                "completion_logprobs": list(answer.logprobs),
            } | ({} if answer.versions is None else {"weight_versions": list(answer.versions)})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]  # fmt: skip

    def _prompts(self) -> list[tuple[int, ...]]:
        """Prompts of different lengths."""
        tokenizer = Contexts(self.model).tokenizer
        texts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:ROWS]]
        return [tuple(ids[: 6 + 3 * i]) for i, ids in enumerate(texts)]

    def _in_flight(self, base: int, scale: float, seed: int):
        """Rollouts that span an update, logged with their stamps, checked as a trace."""
        for attempt in range(SPANNING_TRIES):
            rows, new = self._rows_around_an_update(scale, seed + 1000 * attempt)
            if sum(len(set(row["weight_versions"])) > 1 for row in rows) >= len(rows) // 2:
                break
            self.update(base)
        path = self.folder / f"in-flight-{new}.jsonl"
        write_trace(path, rows)
        return check_trace(CheckConfig(trace=path, model=self.checkpoint(new), checkpoints=(self.store.folder(base),)))

    def _rows_around_an_update(self, scale: float, seed: int) -> tuple[list[dict[str, object]], int]:
        prompts, new = self._prompts(), self.perturbed(scale)
        asks = asks_of(prompts, {"temperature": 1.0}, max_tokens=IN_FLIGHT_TOKENS, seed=seed)
        before = self._generated()
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(self.client.generate, asks, together=True)
            while self._generated() - before < len(prompts) * IN_FLIGHT_TOKENS // 6:
                time.sleep(0.005)
            self.update(new)
            return self._rows(prompts, answers.result()), new

    def _stale_rows(self, base: int, scale: float, seed: int, *, proven: bool):
        """Half of the rollouts made before an update, half after; `proven`: the check is given the older weights."""
        prompts, new = self._prompts(), self.perturbed(scale)
        asks = asks_of(prompts, {"temperature": 1.0}, max_tokens=TRIAL_TOKENS, seed=seed)
        answers = self.client.generate(asks[::2], together=True)
        self.update(new)
        answers += self.client.generate(asks[1::2], together=True)
        older = [str(self.store.folder(base))] if proven else []
        rows = self._rows([*prompts[::2], *prompts[1::2]], answers)
        return check_rollouts(rows, model=self.checkpoint(new), checkpoints=older)

    def _on_trial(self, plan: Plan, seed: int):
        """Rollouts of the engine as it is, scored by a trainer that goes wrong."""
        assert plan.trainer is not None
        mistake, numbers = plan.trainer
        values = {n: int(v) if n in ("batch", "end") else v for n, v in numbers.items()}
        model, rows = self.model, self._trial_rows(seed)
        if mistake == "end":
            model, rows, values["end"] = self._ended(rows)
        if plan.stage == "absolute positions":
            model, rows = self._gpt2_rows(seed)
        trainer = PlainTrainer(model, mistake, dtype=self.kind, **values)
        if plan.stage == "asked":
            return check_rollouts(rows, model=model, trainer=trainer)
        logged = trainer([SimpleNamespace(**r) for r in rows])
        return check_rollouts(rows, model=model, trainer_logprobs=logged)

    def _trial_rows(self, seed: int) -> list[dict[str, object]]:
        prompts = self._prompts()
        asks = asks_of(prompts, {"temperature": 1.0}, max_tokens=TRIAL_TOKENS, seed=seed)
        return self._rows(prompts, self.client.generate(asks, together=True))

    def _ended(self, rows: list[dict[str, object]]) -> tuple[Path, list[dict[str, object]], int]:
        """Completions that end: the token that most of them hold becomes the end token, and they stop at their last."""
        common = Counter(i for r in rows for i in set(r["completion_token_ids"])).most_common(1)[0][0]
        model = Path(shutil.copytree(self.model, self.folder / f"ended-{time.monotonic_ns()}"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"eos_token_id": common}))
        found = []
        for row in rows:
            ids = row["completion_token_ids"]
            stop = len(ids) - ids[::-1].index(common) if common in ids else len(ids)
            found.append(
                row
                | {n: row[n][:stop] for n in ("completion_token_ids", "completion_logprobs")}
                | ({"weight_versions": row["weight_versions"][:stop]} if "weight_versions" in row else {})
            )
        return model, found, common

    def _gpt2_rows(self, seed: int) -> tuple[Path, list[dict[str, object]]]:
        """A model whose positions are absolute, and rows with its own numbers: no engine serves it."""
        model, chooser = self.folder / "gpt2", random.Random(seed)
        if not model.is_dir():
            make_tiny_gpt2(model)
        prompts = [tuple(chooser.randrange(3, 90) for _ in range(4 + 3 * i)) for i in range(ROWS)]
        ids = [tuple(c) for c in draw_completions(model, [list(p) for p in prompts], length=TRIAL_TOKENS, seed=seed)]
        plain = [SimpleNamespace(prompt_token_ids=p, completion_token_ids=c) for p, c in zip(prompts, ids, strict=True)]
        right = PlainTrainer(model, batch=1, dtype=self.kind)(plain)
        answers = [Answer(ids=c, logprobs=tuple(v)) for c, v in zip(ids, right, strict=True)]
        return model, self._rows(prompts, answers)

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
    worst = report.worst
    rms, floor = (worst.gap.get("rms"), worst.noise_floor.get("rms")) if worst is not None else (None, None)
    return {
        "verdict": report.verdict,
        "named": named,
        "first": bool(named) and named[0] == cause,
        "denied": cause in report.ruled_out,
        "hidden": cause in report.not_seen,
        "ambiguous": ambiguous,
        "unexplained": sum(s.unexplained is not None for s in report.settings),
        "rms": None if rms is None else float(f"{rms:.3g}"),
        "floor": None if floor is None else float(f"{floor:.3g}"),
        "seconds": round(report.seconds, 1),
    }


def dump(row: dict[str, object]) -> str:
    """A row as a line."""
    return json.dumps(row, separators=(",", ":"))
