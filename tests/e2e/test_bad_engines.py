"""Engines that are away, mute, broken or slow: exit 2 with one clear line, and nothing waits longer than it says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from trueup.cli import app

IDS = [5, 6, 7, 8]
GOOD = {"choices": [{"index": 0, "token_ids": IDS, "logprobs": {"tokens": ["a"] * 4, "token_logprobs": [-1.0] * 4}}]}


class BadServer:
    """Answers /v1/models like a server should and everything else as `behave(request number)` says."""

    def __init__(self, behave):
        outer = self
        self.asked = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = {"data": [{"id": "bad", "max_model_len": 512}]} if self.path == "/v1/models" else {}
                self._send(200 if body else 404, json.dumps(body).encode())

            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked += 1
                status, content = behave(outer.asked)
                self._send(status, content)

            def _send(self, status, content):
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def check(url, model, *arguments):
    start = time.monotonic()
    done = CliRunner().invoke(app, ["check", "--engine", url, "--model", str(model), *arguments])
    return done, time.monotonic() - start


def one_line(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("trueup: ")]
    assert done.exit_code == 2 and len(lines) == 1, done.output
    return lines[0]


def test_nobody_listens(tiny_model):
    done, seconds = check("http://127.0.0.1:9", tiny_model)
    assert "cannot be reached" in one_line(done) and seconds < 10


def test_an_address_that_is_none(tiny_model):
    assert "no engine address" in one_line(check("localhost:8000", tiny_model)[0])


def without(name):
    choice = {k: v for k, v in GOOD["choices"][0].items() if k != name}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, without("logprobs")), "returns no logprobs"),
        ((200, without("token_ids")), "returns no token ids"),
        ((200, b"<html>busy</html>"), "without JSON"),
        ((200, b'{"choices": "none"}'), "no completion"),
        ((200, b"[1, 2]"), "no completion"),
        ((500, b'{"error": "Internal Server Error"}'), "500"),
        ((500, b'{"error": {"message": "Out of range float values are not JSON compliant: nan"}}'), "nan"),
        ((400, b'{"error": {"message": "logprobs is not supported"}}'), "logprobs is not supported"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_engine_that_cannot_be_tested_is_said_in_a_line(tiny_model, answer, words):
    done, seconds = check(BadServer(lambda n: answer).url, tiny_model)
    assert words in one_line(done) and seconds < 30


def test_an_engine_that_hangs_costs_one_timeout_not_one_a_request(tiny_model):
    server = BadServer(lambda n: time.sleep(60) or (200, b"{}"))
    done, seconds = check(server.url, tiny_model, "--set", "check.request_timeout_s=2")
    assert "took longer than allowed" in one_line(done)
    assert seconds < 15, "the requests wait side by side, and none is sent after the first that timed out"


def test_an_engine_that_dies_in_the_middle(tiny_model):
    from tests.conftest import DATA  # noqa: F401  (the model is the one of all tests)

    server = BadServer(lambda n: (200, json.dumps(GOOD).encode()))

    def behave(number):
        if number > 3:
            server.server.server_close()
            raise ConnectionError("gone")
        return 200, json.dumps(GOOD).encode()

    mortal = BadServer(behave)
    done, seconds = check(mortal.url, tiny_model)
    assert "requests failed" in one_line(done) and seconds < 30


def test_a_token_file_that_is_not_there(tiny_model, tmp_path):
    done, _ = check("http://127.0.0.1:9", tiny_model, "--token-file", str(tmp_path / "none"))
    assert "--token-file" in one_line(done)
