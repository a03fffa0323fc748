"""`trueup check` against real vLLM servers that are really misconfigured: nothing of the checker's input is edited."""

import pytest
import torch
from tests.vllm_kit import PARITY_FLAGS, folder_with, vllm_server

from trueup.config import CheckConfig
from trueup.parity.live import check_engine

pytestmark = [pytest.mark.vllm, pytest.mark.smollm2]

PROCESSED = ("--logprobs-mode", "processed_logprobs")
HIDDEN = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}


def check(model, url, **knobs):
    return check_engine(CheckConfig(engine=(url,), model=model, **knobs))


def ids(report):
    return [c.id for c in report.causes]


def shown(report):
    rows = [(s.label, s.verdict, s.why, s.gap.get("mean_abs"), s.noise_floor.get("rms")) for s in report.settings]
    return rows, [c.as_dict() for c in report.causes], [p["text"] for p in report.probes], report.notes


def test_default_flags_are_s1(smollm2, tmp_path):
    with vllm_server(smollm2, tmp_path / "log") as url:
        report = check(smollm2, url)
    assert report.exit_code == 1 and ids(report) == ["S1"], shown(report)
    assert report.causes[0].fix == "--logprobs-mode processed_logprobs"


def test_hidden_sampling_defaults_are_s5(smollm2, tmp_path):
    model = folder_with(smollm2, tmp_path / "model", generation_config=HIDDEN)
    with vllm_server(model, tmp_path / "log", *PROCESSED) as url:
        report = check(smollm2, url, sampling="temperature=1.0")
    assert ids(report)[0] == "S5", shown(report)


def test_another_model_folder_is_w16(smollm2, tmp_path):
    from safetensors.torch import load_file, save_file

    model = folder_with(smollm2, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {
        n: (t.float() * (1 + 0.1 * torch.randn(t.shape, generator=generator))).to(t.dtype) for n, t in tensors.items()
    }
    (model / "model.safetensors").unlink()
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    with vllm_server(model, tmp_path / "log", *PARITY_FLAGS) as url:
        report = check(smollm2, url)
    assert ids(report) == ["W16"], shown(report)


def test_a_changed_rope_parameter_is_i8(smollm2, tmp_path):
    rope = {"rope_theta": 20000.0, "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}
    model = folder_with(smollm2, tmp_path / "model", config=rope)
    with vllm_server(model, tmp_path / "log", *PARITY_FLAGS) as url:
        report = check(smollm2, url)
    assert ids(report) == ["I8"], shown(report)
    assert "20000" in report.causes[0].evidence, report.causes[0].evidence


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_parity_flags_agree_at_the_floor_of_their_precision(smollm2, tmp_path, dtype):
    with vllm_server(smollm2, tmp_path / "log", *PARITY_FLAGS, "--dtype", dtype) as url:
        report = check(smollm2, url)
    assert report.verdict == "agree", shown(report)
    floor = report.settings[0].noise_floor["rms"]
    assert (floor < 1e-3) == (dtype == "float32")
