"""`trueup check` against real vLLM servers that are really misconfigured: nothing of the checker's input is edited.

The slow ones are run by `make test-vllm`, not by every change: what they plant is planted in trueup's own engine too.
"""

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.vllm_kit import folder_with, vllm_server

from trueup.knobs import CheckConfig
from trueup.parity.live import check_engine

pytestmark = [pytest.mark.vllm, pytest.mark.smollm2]


PROCESSED = ("--logprobs-mode", "processed_logprobs")
HIDDEN = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}


def check(model, server, **knobs):
    return check_engine(CheckConfig(engine=(server.url,), model=model, **knobs))


def ids(report):
    return [c.id for c in report.causes]


def shown(report):
    rows = [(s.label, s.verdict, s.why, s.gap.get("mean_abs"), s.noise_floor.get("rms")) for s in report.settings]
    return rows, [c.as_dict() for c in report.causes], [p["text"] for p in report.probes], report.notes


def moved(model, target):
    """A checkpoint of which every tensor is visibly another."""
    folder = folder_with(model, target)
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: (tensor.float() * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))).to(tensor.dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_default_flags_are_s1(smollm2, vllm_version, tmp_path):
    with vllm_server(smollm2, tmp_path / "run", plain=True, version=vllm_version) as server:
        report = check(smollm2, server)
    assert report.exit_code == 1 and ids(report) == ["S1"], shown(report)
    assert report.causes[0].fix == "--logprobs-mode processed_logprobs"


@pytest.mark.slow
def test_hidden_sampling_defaults_are_s5(smollm2, tmp_path):
    model = folder_with(smollm2, tmp_path / "model", generation_config=HIDDEN)
    with vllm_server(model, tmp_path / "run", plain=True, flags=PROCESSED) as server:
        report = check(smollm2, server, sampling="temperature=1.0")
    assert ids(report)[0] == "S5", shown(report)


@pytest.mark.slow
def test_another_model_folder_is_w16(smollm2, tmp_path):
    model = moved(smollm2, tmp_path / "model")
    with vllm_server(model, tmp_path / "run") as server:
        report = check(smollm2, server)
    assert ids(report) == ["W16"], shown(report)


@pytest.mark.slow
def test_a_changed_rope_parameter_is_i8(smollm2, tmp_path):
    rope = {"rope_theta": 20000.0, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}
    model = folder_with(smollm2, tmp_path / "model", config=rope)
    with vllm_server(model, tmp_path / "run") as server:
        report = check(smollm2, server)
    assert ids(report) == ["I8"], shown(report)
    assert "20000" in report.causes[0].evidence, report.causes[0].evidence


@pytest.mark.slow
def test_a_tied_head_left_at_old_weights_is_named_with_its_tensor(smollm2, tmp_path):
    """What 0.32 does on CPU when a tied checkpoint is reloaded: the body moves, the head does not."""
    trainer = moved(smollm2, tmp_path / "trainer")
    with vllm_server(smollm2, tmp_path / "run", dtype="float32", untie=False) as server:
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(trainer)}}
        httpx.post(f"{server.url}/collective_rpc", json=reload, timeout=120).raise_for_status()
        report = check(trainer, server, checkpoints=(smollm2,))
    assert ids(report)[0] in ("W3", "W15"), shown(report)
    assert "head" in report.causes[0].evidence or "embed_tokens" in report.causes[0].evidence, shown(report)


@pytest.mark.slow
def test_a_cache_that_outlives_an_update_is_w12(smollm2, vllm_version, tmp_path):
    knobs = {"version": vllm_version, "dtype": "float32", "prefix_caching": True}
    with vllm_server(smollm2, tmp_path / "run", **knobs) as server:
        report = check(smollm2, server, allow_updates=True)
    assert ids(report) == ["W12"], shown(report)
    probes = {p["name"]: p for p in report.probes}
    assert not probes["cache before the update"]["differs"], probes["cache before the update"]
    assert "restored and verified" in report.header["touched"], report.header["touched"]


@pytest.fixture(scope="module")
def parity(request, smollm2, vllm_version, tmp_path_factory):
    """A server in the parity configuration, its dtype the parameter; several tests ask it."""
    run = tmp_path_factory.mktemp("parity") / "run"
    with vllm_server(smollm2, run, version=vllm_version, dtype=request.param) as server:
        yield server


@pytest.mark.parametrize("parity", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)], indirect=True)
def test_the_parity_flags_agree_at_the_floor_of_their_precision(smollm2, parity):
    report = check(smollm2, parity)
    assert report.verdict == "agree", shown(report)
    floor = report.settings[0].noise_floor["rms"]
    assert (floor < 1e-3) == (parity.config.dtype == "float32")


@pytest.mark.slow
@pytest.mark.parametrize("parity", ["bfloat16"], indirect=True)
def test_a_server_that_missed_the_update_is_w1(smollm2, parity, tmp_path):
    trainer = moved(smollm2, tmp_path / "trainer")
    report = check(trainer, parity, checkpoints=(smollm2,))
    assert ids(report) == ["W1"], shown(report)


@pytest.mark.parametrize("parity", ["float32"], indirect=True)
def test_updates_of_the_parity_configuration_are_clean(smollm2, parity):
    report = check(smollm2, parity, allow_updates=True)
    assert report.verdict == "agree" and {"W1", "W3", "W4", "W15"} <= report.not_seen.keys(), shown(report)
