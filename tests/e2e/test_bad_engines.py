"""Engines that are away, mute, broken or slow: exit 2 with one clear line, and nothing waits longer than it says."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from trueup.cli import app
from trueup.engines.http import HttpClient
from trueup.errors import EngineError

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


STATUS_LINE = b"HTTP/1.1 200 OK\r\n"
WHOLE_HEAD = STATUS_LINE + b"content-type: application/json\r\n\r\n"


class Dripping(BadServer):
    """Sends `pieces` without end, one every `pause_s`: each read of it is in time, the whole never is."""

    def __init__(self, *, head, piece, pause_s=0.05):
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def serve(connection):
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(head)
                while True:
                    connection.sendall(piece)
                    time.sleep(pause_s)

        def accept():
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()


@pytest.mark.parametrize(
    "head",
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"],
    ids=["header", "body"],
)
def test_a_timeout_is_of_the_whole_answer_not_of_each_byte(head):
    client = HttpClient(Dripping(head=head, piece=b"x").url)
    start = time.monotonic()
    with pytest.raises(EngineError, match="took longer than allowed"):
        client.get("/v1/models", timeout_s=1.0)
    assert time.monotonic() - start < 5
    client.close()
    with pytest.raises(EngineError, match="was closed"):
        client.get("/v1/models")


def test_an_answer_without_end_is_cut_off():
    client = HttpClient(Dripping(head=WHOLE_HEAD, piece=b"x" * 4096, pause_s=0.0).url, max_bytes=2**20)
    with pytest.raises(EngineError, match="answered more than"):
        client.get("/v1/models")
    client.close()


def test_closing_ends_calls_under_way():
    client = HttpClient(Dripping(head=STATUS_LINE, piece=b"x").url)
    threading.Timer(0.5, client.close).start()
    with pytest.raises(EngineError, match="was closed"):
        client.get("/v1/models", timeout_s=30.0)


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
