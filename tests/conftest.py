"""Shared by all tests: where the real model is, and a tiny one with a plain engine of its own."""

from pathlib import Path

import hypothesis
import pytest

from trueup.env import limit_spinning

limit_spinning()  # before any test loads torch
hypothesis.settings.register_profile("house", deadline=None)  # a busy machine fails no test
hypothesis.settings.load_profile("house")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
SMOLLM2 = ROOT / "models" / "smollm2-135m"


def pytest_addoption(parser):
    parser.addoption("--vllm-version", default="0.32.0", help="the vLLM that tests marked vllm start")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Whatever asks for the real model is marked so."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("smollm2")


@pytest.fixture(scope="session")
def vllm_version(request):
    return request.config.getoption("--vllm-version")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real 135M checkpoint; `make setup` builds it."""
    assert (SMOLLM2 / "config.json").is_file(), "the real model is missing: run `make setup`"
    return SMOLLM2


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A small Llama with peaked logits, so that sampling settings have visible effects."""
    from tests.plain_engine import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
