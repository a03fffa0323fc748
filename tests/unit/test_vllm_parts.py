"""The parts around vLLM that need no vLLM: cache lives, admission, spans, checkpoints, flags, the plugin's wheel."""

import json
import math
import threading
import time
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.conftest import ROOT

from trueup.engines import vllm_install, vllm_plugin
from trueup.engines.admission import Aborted, Admission
from trueup.engines.lives import PassedUpdate, kv_state, lives_of
from trueup.engines.matrix import capability_table
from trueup.engines.vllm_checkpoint import HEAD, read_checkpoint, serve_folder
from trueup.engines.vllm_completion import StreamCompleter, versions_of_spans
from trueup.engines.vllm_facts import minor, read_facts
from trueup.engines.vllm_flags import FlagReport, is_one_of_few, reported_flags
from trueup.engines.vllm_server import VllmServer, _cause
from trueup.errors import ConfigError, EngineError, ModelError
from trueup.knobs import VllmConfig
from trueup.model.load import load_model
from trueup.model.tiny import make_tiny
from trueup.types import CacheLife, KVState


def lives(versions, *passed, prompt=10, under=0, whole=True):
    updates = [PassedUpdate(version=v, cleared=c) for v, c in passed]
    return lives_of(prompt, versions, updates, sent_under=under, whole_prefill=whole)


def test_without_an_update_a_cache_has_one_life_of_one_version():
    assert lives([0, 0, 0]) == (CacheLife(first_token=0, runs=((0, 12),)),)


def test_a_kept_cache_holds_each_position_under_the_next_tokens_version():
    found = lives([0, 0, 1, 1], (1, False))
    assert found == (CacheLife(first_token=0, runs=((0, 11), (1, 2))),)
    assert kv_state([0, 0, 1, 1], found) == KVState.KEPT


def test_a_cleared_cache_is_computed_again_under_the_new_version():
    found = lives([0, 0, 1, 1], (1, True))
    assert found == (CacheLife(first_token=0, runs=((0, 11),)), CacheLife(first_token=2, runs=((1, 13),)))
    assert kv_state([0, 0, 1, 1], found) == KVState.CLEARED


def test_kept_after_cleared_is_a_life_of_two_versions():
    found = lives([0, 1, 2], (1, True), (2, False))
    assert found == (CacheLife(first_token=0, runs=((0, 10),)), CacheLife(first_token=1, runs=((1, 11), (2, 1))))


def test_a_version_without_a_token_leaves_no_run():
    assert lives([0, 2], (1, False), (2, False)) == (CacheLife(first_token=0, runs=((0, 10), (2, 1))),)


def test_a_prompt_that_met_an_update_is_known_only_if_prompts_are_computed_whole():
    assert lives([1, 1], (1, False)) == (CacheLife(first_token=0, runs=((1, 11),)),)
    assert lives([1, 1], (1, False), whole=False) == ()
    assert lives([1, 1], (1, True), whole=False) == (CacheLife(first_token=0, runs=((1, 11),)),)
    assert lives([2, 2], (1, True), (2, False), whole=False) == ()
    assert kv_state([1, 1], ()) == KVState.UNKNOWN


def test_a_version_served_twice_or_never_says_nothing():
    assert lives([1, 1], (2, False), (1, False), under=1) == ()
    assert lives([3], (1, False)) == ()


@given(st.lists(st.booleans(), max_size=5), st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 9))
def test_lives_cover_every_position_once(cleared, picks, prompt):
    versions = sorted(min(p, len(cleared)) for p in picks)
    found = lives(versions, *((v, c) for v, c in enumerate(cleared, 1)), prompt=prompt)
    ends = [life.first_token for life in found[1:]] + [len(versions)]
    assert found[0].first_token == 0
    for life, end in zip(found, ends, strict=True):
        assert sum(n for _, n in life.runs) == prompt + end - 1


def entering(admission, tokens=10, aborts=0, wait_s=5.0):
    return admission.enter(tokens, aborts=aborts, deadline=time.monotonic() + wait_s)


def in_thread(function):
    box = []

    def run():
        try:
            box.append(function())
        except (Aborted, EngineError) as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, box


def hold(admission, **knobs):
    with entering(admission, **knobs):
        return admission.inside


def test_no_more_are_inside_than_there_are_slots_and_tokens():
    by_slots, by_tokens = Admission(slots=1, capacity_tokens=100), Admission(slots=9, capacity_tokens=15)
    for admission in (by_slots, by_tokens):
        with entering(admission):
            thread, box = in_thread(lambda a=admission: hold(a))
            time.sleep(0.05)
            assert (admission.inside, admission.waiting, box) == (1, 1, [])
        thread.join(5)
        assert box == [1] and admission.inside == admission.waiting == 0
    with entering(Admission(slots=1, capacity_tokens=5), tokens=10):
        pass  # larger than all there is: alone


def test_nobody_enters_a_closed_engine_until_it_opens_or_time_is_over():
    admission = Admission(slots=2, capacity_tokens=100)
    admission.close()
    with pytest.raises(EngineError, match="longer than allowed"):
        hold(admission, wait_s=0.05)
    thread, box = in_thread(lambda: hold(admission))
    time.sleep(0.05)
    assert box == []
    admission.open()
    thread.join(5)
    assert box == [1]


def test_abort_sends_away_who_waits_and_who_began_before():
    admission = Admission(slots=1, capacity_tokens=100)
    with entering(admission):
        thread, box = in_thread(lambda: hold(admission))
        time.sleep(0.05)
        admission.abort()
        thread.join(5)
    assert isinstance(box[0], Aborted)
    with pytest.raises(Aborted):
        hold(admission, aborts=0)
    assert hold(admission, aborts=1) == 1


def test_a_dead_engine_says_why():
    admission = Admission(slots=1, capacity_tokens=100)
    admission.kill("the engine is dead: it was tired")
    with pytest.raises(EngineError, match="tired"):
        hold(admission)
    admission.open()
    assert hold(admission) == 1


def test_spans_become_versions_only_if_they_cover_the_tokens():
    spans = [{"version": "default", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": 3}]
    assert versions_of_spans(spans, 3) == [0, 0, 7]
    assert versions_of_spans(spans, 4) == [] == versions_of_spans(spans[1:], 3) == versions_of_spans(spans, 2)
    assert versions_of_spans([], 0) == []


def test_a_tied_checkpoint_is_served_with_its_head_written_out(tmp_path):
    path = make_tiny(tmp_path / "tiny", tied=True)
    model = read_checkpoint(path)
    assert model.tied and model.vocab_size == 128
    folder = serve_folder(model, path, tmp_path / "served")
    served = read_checkpoint(folder)
    assert not served.tied and served.config["tie_word_embeddings"] is False
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(model.shapes) | {HEAD}
    ids = torch.tensor([[5, 6, 7]])
    one, other = (load_model(p, dtype=torch.float32).lm(ids).logits for p in (path, folder))
    assert torch.equal(one, other)
    assert torch.equal(load_file(folder / index[HEAD])[HEAD], load_file(path / "model.safetensors")[model.embedding])
    assert read_checkpoint(serve_folder(model, path, tmp_path / "as it is", untie=False)).tied


def test_a_family_that_vllm_always_ties_is_refused(tmp_path):
    path = make_tiny(tmp_path / "gemma", family="gemma", tied=True)
    with pytest.raises(ModelError, match="tied in vLLM"):
        serve_folder(read_checkpoint(path), path, tmp_path / "served")
    with pytest.raises(ModelError, match="no readable"):
        read_checkpoint(tmp_path)


def test_a_flag_is_verified_only_by_a_probe():
    def state(asked, reported, found):
        return FlagReport(flag="f", asked=asked, reported=reported, found=found).state

    assert state(False, False, False) == state(False, None, False) == "verified"
    assert state(True, True, None) == "reported" and state(True, None, None) == "untested"
    assert state(False, True, False) == state(False, False, True) == state(False, True, None) == "differs"


def test_a_draw_among_equal_logits_is_a_processed_one_too():
    """Logits of a bfloat16 head tie: two that share the top are both kept by a kept set of one."""
    assert all(is_one_of_few(value) for value in (0.0, -math.log(2), -math.log(3)))
    assert not any(is_one_of_few(value) for value in (-0.001, -0.5, -math.log(9), -math.inf, math.nan))


def test_flags_are_read_from_a_servers_own_configuration():
    config = {
        "model_config": {"dtype": "torch.bfloat16", "logprobs_mode": "raw_logprobs", "hf_overrides": {}},
        "cache_config": {"enable_prefix_caching": True},
        "scheduler_config": {"async_scheduling": True},
        "additional_config": {vllm_plugin.SWITCH: True},
    }
    found = reported_flags(config)
    assert found["fp32 head"] is True and found["dtype"] == "bfloat16" and found["async-scheduling"] is True
    config["additional_config"] = {}
    assert reported_flags(config)["fp32 head"] is False
    config["model_config"]["hf_overrides"] = {"head_dtype": "float32"}
    assert reported_flags(config)["fp32 head"] is True and reported_flags({}) == {}


def test_a_version_that_was_never_tried_is_refused():
    with pytest.raises(EngineError, match=r"vLLM 0.21.0: its control plane was never tried.*0.32"):
        read_facts(lambda path, **_: {"version": "0.21.0"}, "policy")
    assert minor("0.18.1+cpu") == "0.18"


def test_a_closed_control_plane_is_said_to_be_closed():
    def get(path, **_):
        if path == "/version":
            return {"version": "0.32.0"}
        raise EngineError("404")

    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE"):
        read_facts(get, "policy")


def test_the_launcher_names_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="--model"):
        VllmServer(VllmConfig())
    with pytest.raises(ConfigError, match=r"trueup vllm install --version 0\.18\.1"):
        VllmServer(VllmConfig(model=tmp_path, environments=tmp_path, version="0.18.1"))


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["loading", "ValueError: too long", "EngineDeadError: see above"], "ValueError: too long"),
        (["Worker proc W-0 died unexpectedly (exit code: -4)", "RuntimeError: cancelled"], "Worker proc W-0 died"),
        (["loading", "still loading"], "still loading"),
        ([], "it is empty"),
    ],
)
def test_of_a_log_the_line_is_shown_that_says_what_went_wrong(tmp_path, lines, cause):
    log = tmp_path / "vllm.log"
    log.write_text("\n".join(lines))
    assert cause in _cause(log)


def test_the_plugins_wheel_holds_the_file_that_stands_here(tmp_path):
    source = tmp_path / "plugin.py"
    source.write_text("SWITCH = 1\n")
    wheel = vllm_install._plugin_wheel(source, tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read(f"{vllm_install.PLUGIN}.py").decode() == "SWITCH = 1\n"
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert b"[vllm.general_plugins]" in archive.read(entry)
        record = archive.read(next(n for n in names if n.endswith("RECORD"))).decode()
    assert all(name in record for name in names)


def test_the_documented_capabilities_are_the_declared_ones():
    assert capability_table() in (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


class CountingServer:
    """What a stream completer asks of a vLLM 0.18.1: a counter of generated tokens. In place of the real server, whose
    other clients cannot be timed."""

    url = "http://127.0.0.1:1"

    def __init__(self):
        self.generated = 7

    def text(self, path):
        assert path == "/metrics"
        return f'vllm:generation_tokens_total{{model_name="m"}} {float(self.generated)}\n'


def test_tokens_of_others_count_only_while_a_request_of_ours_runs():
    server = CountingServer()
    completer = StreamCompleter(server, "m")
    server.generated += 360  # others asked before our first request
    with completer.scoring():
        server.generated += 1
    completer.settle(1.0)
    server.generated += 5  # and between two of ours
    completer.settle(1.0)
    with completer.scoring():
        server.generated += 1
    completer.settle(1.0)
    with completer.scoring():
        server.generated += 1
        with pytest.raises(EngineError, match="somebody else asks this engine"):
            completer.settle(0.1)
