"""Thousands of random requests, generated from the server's own OpenAPI document: no 5xx, no unauthenticated change."""

import math
import random

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from tests.engine_kit import publish_perturbed
from tests.server_kit import ServerProcess

from trueup.model.tiny import make_tiny
from trueup.weights.store import WeightStore

SHARES = {
    "POST /v1/completions": 0.31, "POST /v1/chat/completions": 0.2, "POST /control/pause": 0.1,
    "POST /control/update_weights": 0.14, "POST /control/score": 0.14, "POST /control/resume": 0.03,
    "POST /control/clear_cache": 0.03, "POST /control/faults": 0.03, "GET /v1/models": 0.005, "GET /metrics": 0.005,
    "GET /control/status": 0.005, "GET /health": 0.005,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = make_tiny(folder / "policy")
    store = WeightStore(folder / "weights")
    store.root.mkdir()
    publish_perturbed(store, path, 1)
    running = ServerProcess(path, folder, "--dtype", "float32", "--weights", str(store.root),
                            "--set", "serve.request_timeout_s=0.5", "--set", "serve.max_length=64")  # fmt: skip
    yield running
    running.stop()


def run_examples(strategy, count, send, operation):
    """Send up to `count` generated cases; returns how many were sent."""
    sent = 0

    @given(case=strategy)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def run(case):
        nonlocal sent
        sent += 1
        send(case, operation)

    run()
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_random_requests(server, wanted):
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = {op.label: op for op in (result.ok() for result in schema.get_all_operations())}
    assert set(operations) == set(SHARES)
    good = {"Authorization": f"Bearer {server.token}"}
    counts: dict[int, int] = {}
    chooser = random.Random(0)
    with httpx.Client(base_url=server.url, timeout=60) as http, requests.Session() as session:

        def state():
            answer = http.get("/control/status", headers=good)
            assert answer.status_code == 200, answer.text
            status = answer.json()
            return status["paused"], status["version"], status["model_digest"]

        def send(case, operation):
            unknown = chooser.random() < 0.15 and operation.label != "GET /health"
            before = state() if unknown else None
            headers = {"Authorization": "Bearer nobody"} if unknown else good
            answer = case.call(base_url=server.url, headers=headers, session=session, timeout=60)
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, (operation.label, case.body, answer.status_code, answer.text[:500])
            if unknown:
                assert answer.status_code == 401 and state() == before, (operation.label, answer.status_code)
            if operation.label == "POST /control/pause" and not unknown:
                http.post("/control/resume", headers=good)

        for label, operation in operations.items():
            share, sent = math.ceil(wanted * SHARES[label]), 0
            if operation.body:
                for mode in schemathesis.GenerationMode:
                    sent += run_examples(operation.as_strategy(generation_mode=mode), share // 2, send, operation)
            for _ in range(sent, share):  # no body to vary, or no more distinct ones
                send(operation.Case(), operation)
        print(dict(sorted(counts.items())))
        assert sum(counts.values()) >= wanted
        assert counts.get(200, 0) > wanted // 10 and counts.get(401, 0) > wanted // 20
        http.post("/control/resume", headers=good)
        final = http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3}, headers=good)
        assert final.status_code == 200
