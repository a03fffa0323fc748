"""`trueup serve` as its users meet it: the official openai client, plain HTTP, and those without the token."""

import time

import httpx
import openai
import pytest
from tests.engine_kit import publish_perturbed
from tests.server_kit import ServerProcess

from trueup.model.tiny import make_tiny
from trueup.weights.store import WeightStore

GUARDED = [
    ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/control/status"), ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"), ("POST", "/control/pause"), ("POST", "/control/resume"),
    ("POST", "/control/clear_cache"), ("POST", "/control/update_weights"), ("POST", "/control/score"),
    ("POST", "/control/faults"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    path = make_tiny(folder / "policy", tied=True)
    store = WeightStore(folder / "weights")
    store.root.mkdir()
    publish_perturbed(store, path, 1)
    running = ServerProcess(path, folder, "--dtype", "float32", "--weights", str(store.root),
                            "--set", "serve.request_timeout_s=20")  # fmt: skip
    running.store = store
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.token}"}, timeout=60) as plain:
        yield plain


def test_the_openai_client_completes_text_and_ids(client):
    assert [m.id for m in client.models.list()] == ["policy"]
    text = client.completions.create(model="policy", prompt="2+2=", max_tokens=8, temperature=0.7, logprobs=0, seed=3)
    choice = text.choices[0]
    assert choice.finish_reason in ("length", "stop") and len(choice.logprobs.token_logprobs) <= 8
    assert text.usage.prompt_tokens == 4 and text.usage.completion_tokens == len(choice.logprobs.tokens)
    more = client.completions.create(
        model="policy", prompt=[[5, 6, 7], [8, 9]], n=2, max_tokens=5, logprobs=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True, "top_k": 5},
    )  # fmt: skip
    assert [c.index for c in more.choices] == [0, 1, 2, 3]
    for c in more.choices:
        assert len(c.token_ids) == 5 and c.logprobs.tokens == [f"token_id:{i}" for i in c.token_ids]
        assert c.weight_versions == [[0, 5]]
    assert more.choices[0].prompt_token_ids == [5, 6, 7] and more.choices[3].prompt_token_ids == [8, 9]


def test_the_openai_client_chats(client):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model="policy", messages=messages, max_completion_tokens=6, logprobs=True)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and isinstance(choice.message.content, str)
    assert 1 <= len(choice.logprobs.content) <= 6 and all(c.logprob <= 1e-4 for c in choice.logprobs.content)


def test_streams_carry_the_same_tokens_as_whole_answers(client):
    asked = {"model": "policy", "prompt": "count: ", "max_tokens": 30, "seed": 11, "n": 2, "logprobs": 0}
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(**asked, extra_body=extra)
    ids, texts, reasons, usage = {0: [], 1: []}, {0: "", 1: ""}, {}, None
    options = {"include_usage": True}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options, extra_body=extra):
        usage = chunk.usage or usage
        for c in chunk.choices:
            ids[c.index] += getattr(c, "token_ids", None) or []
            texts[c.index] += c.text
            if c.finish_reason:
                reasons[c.index] = c.finish_reason
    assert ids == {c.index: c.token_ids for c in whole.choices}
    assert texts == {c.index: c.text for c in whole.choices}
    assert reasons == {0: "length", 1: "length"} and usage.completion_tokens == 60
    spoken = ""
    messages = [{"role": "user", "content": "hi"}]
    for chunk in client.chat.completions.create(model="policy", messages=messages, max_tokens=9, seed=4, stream=True):
        spoken += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    once = client.chat.completions.create(model="policy", messages=messages, max_tokens=9, seed=4)
    assert spoken == once.choices[0].message.content


def test_stop_strings_end_text_and_are_left_out_streamed_too(client):
    free = client.completions.create(
        model="policy", prompt="abc", max_tokens=60, seed=5, extra_body={"ignore_eos": True}
    )
    stop = free.choices[0].text[20:22]
    asked = {"model": "policy", "prompt": "abc", "max_tokens": 60, "seed": 5, "stop": stop}
    extra = {"ignore_eos": True}
    cut = client.completions.create(**asked, extra_body=extra).choices[0]
    assert cut.finish_reason == "stop" and free.choices[0].text.startswith(cut.text) and stop not in cut.text
    streamed = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True, extra_body=extra))
    assert streamed == cut.text


def test_whole_rollouts_and_prompt_logprobs(http):
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 4, "return_rollout": True, "prompt_logprobs": 0, "ignore_eos": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    rollout = choice["rollout"]
    assert rollout["logprob_kind"] == "processed" and len(rollout["behaviour_logprobs"]) == 4
    assert rollout["weight_versions"] == [[0, 4]] and rollout["cache_lives"] == [{"first_token": 0, "runs": [[0, 7]]}]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == 4
    score = {"rows": [{"prompt_token_ids": [5], "completion_token_ids": [6, 7, 8]}]}
    scored = http.post("/control/score", json=score).json()["scores"][0]["logprobs"]
    told = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    assert told == pytest.approx(scored, abs=1e-5)


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}], ids=str)
def test_nothing_but_health_without_the_token(server, method, path, header):
    before = httpx.get(f"{server.url}/control/status", headers={"Authorization": f"Bearer {server.token}"}).json()
    answer = httpx.request(method, server.url + path, json={"mode": "abort"}, headers=header)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    after = httpx.get(f"{server.url}/control/status", headers={"Authorization": f"Bearer {server.token}"}).json()
    assert (before["paused"], before["version"]) == (after["paused"], after["version"])
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("body", "words"), [
    ({"prompt": []}, "prompt"), ({"prompt": [5], "temperature": -1}, "temperature"), ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": [5], "max_tokens": 5000}, "exceed"), ({"prompt": [4000]}, "vocabulary"),
    ({"prompt": [5], "logit_bias": {"3": 1}}, "logit_bias"), ({"prompt": [5], "logprobs": 5}, "logprobs"),
    ({"prompt": [5], "top_p": 0}, "top_p"), ({"prompt": [5], "best_of": 3}, "best_of"), ({}, "prompt"),
    ({"prompt": [[5], [6]], "stream": True}, "one prompt"), ({"prompt": [5], "temperature": 1e-9}, "temperature"),
])  # fmt: skip
def test_bad_requests_get_one_clear_line(http, body, words):
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]


def test_updates_only_from_the_allowed_folder(http, server, tmp_path):
    outside = publish_perturbed(WeightStore(tmp_path / "w"), server.store.root.parent / "policy", 9)
    (server.store.root / "loop").symlink_to(server.store.root / "loop")
    for path in (
        f"{server.store.root}/{'a' * 300}",
        f"{server.store.root}/loop",
        str(outside.path),
        f"{server.store.root}/../policy",
        "/etc",
        "\0",
        "x" * 5000,
    ):
        answer = http.post("/control/update_weights", json={"path": path, "clear_cache": True})
        assert answer.status_code == 400
    assert http.get("/control/status").json()["version"] == 0


def test_calls_that_wait_never_keep_out_those_they_wait_for(http):
    """Sixty scores and pauses against a paused engine; resume still gets through and all of them are answered."""
    from concurrent.futures import ThreadPoolExecutor

    http.post("/control/pause", json={"mode": "keep"})
    body = {"rows": [{"prompt_token_ids": [5], "completion_token_ids": [6, 7]}]}
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(http.post, "/control/score", json=body) for _ in range(60)]
        time.sleep(0.5)
        assert http.post("/control/resume").status_code == 200
        assert {future.result(timeout=30).status_code for future in waiting} == {200}


def test_a_request_that_meets_a_paused_engine_times_out_in_words(http, server):
    http.post("/control/pause", json={"mode": "keep"})
    try:
        waiting = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token, max_retries=0, timeout=60)
        with pytest.raises(openai.APIStatusError) as caught:
            waiting.completions.create(model="policy", prompt=[5, 6], max_tokens=3)
        assert caught.value.status_code == 408 and "paused" in str(caught.value)
    finally:
        http.post("/control/resume")
    assert http.get("/control/status").json()["running"] == http.get("/control/status").json()["waiting"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(http, server, stream):
    asked = {"prompt": [5], "max_tokens": 1000, "n": 64, "ignore_eos": True, "stream": stream}
    before = http.get("/control/status").json()["generated_tokens"]
    with httpx.Client(base_url=server.url, headers=http.headers) as other:
        if stream:
            with other.stream("POST", "/v1/completions", json=asked, timeout=30) as answer:
                next(answer.iter_bytes())
        else:
            with pytest.raises(httpx.TimeoutException):
                other.post("/v1/completions", json=asked, timeout=0.3)
    deadline = time.monotonic() + 15  # the server ends requests after 20 s anyway
    while (status := http.get("/control/status").json())["running"] or status["waiting"]:
        assert time.monotonic() < deadline, "the abandoned request is still running"
        time.sleep(0.02)
    assert status["generated_tokens"] - before < 64 * 1000 / 2


def test_metrics_and_the_openapi_document(http):
    text = http.get("/metrics").text
    assert "trueup_generated_tokens_total" in text and "trueup_weight_version" in text
    assert {p for _, p in GUARDED} | {"/health"} == set(http.get("/openapi.json").json()["paths"])


def test_a_large_body_is_refused_before_it_is_read(http):
    answer = http.post("/v1/completions", content=b" " * (33 * 2**20), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    chunks = (b" " * 1000 for _ in range(10))
    answer = http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 411


@pytest.mark.slow
def test_requests_that_end_just_as_they_time_out_do_not_stop_the_engine(tmp_path):
    """A cancelled wait and a finished request may meet: the engine must not mind that nobody listens any more."""
    path = make_tiny(tmp_path / "policy")
    hasty = ServerProcess(path, tmp_path, "--dtype", "float32", "--set", "serve.request_timeout_s=0.05")
    headers = {"Authorization": f"Bearer {hasty.token}"}
    codes = set()
    try:
        with httpx.Client(base_url=hasty.url, headers=headers, timeout=60) as http:
            for tokens in range(20, 900, 20):
                body = {"prompt": [5], "max_tokens": tokens, "ignore_eos": True}
                codes.add(http.post("/v1/completions", json=body).status_code)
            assert http.get("/health").status_code == 200
    finally:
        hasty.stop()
    assert codes <= {200, 408}
