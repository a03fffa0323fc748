"""What probes mean: pure functions on gaps and reports, each case one that was once got wrong."""

import itertools
import math
from dataclasses import replace

import pytest

from trueup.engines.http import HttpClient, is_loopback
from trueup.engines.probe_http import Answer, Ask, read_token
from trueup.errors import EngineError
from trueup.model.tiny import make_tiny
from trueup.parity import verdicts
from trueup.parity.context import Contexts
from trueup.parity.probes import Gap, Probed, drawn_apart, paired
from trueup.parity.report import Cause, SettingReport


def probe(name, rms, *, limit=0.1, parted=0, tokens=64):
    gap = Gap(tokens=tokens, rms=rms, max_abs=rms, parted=parted, at_once=0, failed=0)
    return Probed(name=name, gap=gap, limit_rms=limit, text=name)


def cause(cause_id, *, layer="semantic", confidence="high", explained=0.9):
    return Cause(
        id=cause_id, layer=layer, title="", confidence=confidence, explained=explained, fix="", evidence=""
    )  # fmt: skip


def report(label="temperature=1", *causes, verdict="mismatch", rms=1.0, left=None):
    unexplained = None if left is None else {"rms": left, "text": "", "layer": "", "floor_rms": 0.05, "reasons": []}
    return SettingReport(
        label=label, verdict=verdict, why="", rows=1, tokens=64, edge_tokens=(), singleton_tokens=0, gap={"rms": rms},
        fixed={"rms": left or 0.05} if causes else None, noise_floor={"rms": 0.05}, judgement={}, causes=causes,
        unexplained=unexplained, ambiguous=(), ruled_out=(), untested={}, kept_mass=None,
    )  # fmt: skip


def ids(causes):
    return [c.id for c in causes]


def test_hidden_defaults_show_in_numbers_or_in_what_is_drawn():
    quiet, drawn = probe("repeat", 0.0), probe("defaults", 0.0, parted=2)
    assert ids(verdicts.hidden_defaults([quiet, probe("defaults", 0.5)], [], [], drawn_apart=0)) == ["S5"]
    assert ids(verdicts.hidden_defaults([quiet, drawn], [], [], drawn_apart=1)) == ["S5"], "raw logprobs"
    assert verdicts.hidden_defaults([quiet, drawn], [], [], drawn_apart=0) == [], "a draw that rounding decided"


class Drawing:
    """Stands for an engine that draws what it is scripted to, or one of two tokens by turns that rounding decides."""

    def __init__(self, omitted, explicit):
        self.turns = {"omitted": itertools.cycle(omitted), "explicit": itertools.cycle(explicit)}

    def generate(self, asks, *, together):
        assert len(asks) == 1 and not together and asks[0].max_tokens == 2, "alone, and no further than they parted"
        return [Answer(ids=(1, next(self.turns[asks[0].sampling["side"]])))]


@pytest.mark.parametrize(
    ("omitted", "explicit", "apart"),
    [([2], [3], 1), ([2], [2], 0), ([2, 3], [3], 0), ([2], [3, 3, 3, 3, 3, 2], 0), (range(100), range(200, 300), 0)],
)
def test_a_pair_that_parted_counts_only_if_it_does_so_every_time_each_side_alike(omitted, explicit, apart):
    pair = tuple(
        Ask(prompt=(1,), sampling={"side": side}, seed=0, max_tokens=9) for side in ("omitted", "explicit")
    )  # fmt: skip
    answers = [Answer(ids=(1, 2, 5)), Answer(ids=(1, 2, 5))], [Answer(ids=(1, 3, 5)), Answer(ids=(1, 2, 5))]
    assert drawn_apart(Drawing(omitted, explicit), [pair, pair], answers) == apart


def test_noise_and_lost_numbers_are_no_hidden_defaults():
    noisy = [probe("repeat", 0.3), probe("defaults", 0.4)]
    assert verdicts.hidden_defaults(noisy, [], [], drawn_apart=0) == []
    lost = report("temperature=1", cause("S9"))
    assert verdicts.hidden_defaults([probe("repeat", 0.0), probe("defaults", 0.5)], [lost], [], drawn_apart=1) == []


def test_nondeterminism_beside_stale_weights_stays_named():
    stale = report("temperature=1", cause("W1", layer="weights", explained=0.97))
    assert ids(verdicts.not_explained_by([stale], [cause("I15", layer="inference")], [])) == ["I15"]
    lost = report("temperature=1", cause("S9", explained=0.97))
    assert verdicts.not_explained_by([lost], [cause("I15", layer="inference")], []) == []


def test_a_sampling_cause_is_kept_where_it_leaves_what_the_scores_are_off_by():
    scoring = report("temperature=1 [engine's scores]", rms=0.4, left=0.4)
    raw = report("temperature=0.7", cause("S1", confidence="medium"), left=0.4)
    whole = report("temperature=1", cause("S3"), left=0.01)
    filled = report("temperature=1.1", cause("S8"), cause("S9"), left=0.01)
    kept = verdicts.settle([scoring, raw, whole, filled], [], [])
    assert ids(kept[1].causes) == ["S1"] and not kept[2].causes, "S3 explains what sampling cannot"
    assert not kept[3].causes and kept[3].unexplained is not None, "nor can what is reported"


def test_where_plain_sampling_is_off_an_incomplete_cause_of_filters_leaves_as_much():
    """Applying filters before the temperature explains half of a temperature that grows along the completion."""
    plain = report("temperature=1", left=0.53)
    half = report("temperature=0.7", cause("S4", confidence="medium"), left=0.08)
    both = report("temperature=1.1", cause("S1", confidence="medium"), left=0.5)
    whole = report("temperature=0.7", cause("S1"))
    kept = verdicts.settle([plain, half, both, whole], [], [])
    assert [ids(r.causes) for r in kept] == [[], [], ["S1"], ["S1"]] and kept[1].unexplained is not None


def test_beside_noise_a_right_cause_and_what_is_left_stay():
    noise = [probe("batch", 0.3)]
    partly = report("temperature=0.7", cause("S1", confidence="medium"), left=0.3)
    guess = report("temperature=1", cause("I14", confidence="medium"), left=2.0)
    kept = verdicts.settle([partly, guess], [cause("I3", layer="inference")], noise)
    assert ids(kept[0].causes) == ["S1"] and kept[0].unexplained is None
    assert not kept[1].causes and kept[1].unexplained is not None


def test_noise_is_not_the_reason_for_far_more_than_itself():
    """A model without its attention scale amplifies the rounding of a batch to 1.2 nats, and is off by 4.2."""
    noise, found = [probe("batch", 1.2)], [cause("I3", layer="inference"), cause("W2", layer="weights")]
    settled = verdicts.settle([report(left=4.2)], found, noise)
    batch, weights = verdicts.beside_what_is_left(found, settled)
    assert batch.confidence == "low" and "off by 4.2 nats for another reason" in batch.evidence
    assert weights == found[1]
    settled = verdicts.settle([report(left=1.7)], found, noise)
    assert verdicts.beside_what_is_left(found, settled) == found, "the noise accounts for it"


def test_a_cache_in_8_bits_that_is_not_recognised_is_not_called_batch_noise():
    """Keys and values in e4m3 are 0.117 nats off; batch noise just above the limit does not account for that."""
    found = [cause("I3", layer="inference")]
    settled = verdicts.settle([report(left=0.117)], found, [probe("batch, scored", 0.067, limit=0.065)])
    assert settled[0].unexplained is not None
    assert verdicts.beside_what_is_left(found, settled)[0].confidence == "low"


def test_decoding_is_not_blamed_for_hidden_defaults():
    scoring = report("temperature=1 [engine's scores]", verdict="agree")
    plain = replace(report(left=1.0), gap={"rms": 1.0, "mean_abs": 1.0})
    assert verdicts.only_generation_is_off([scoring, plain], [cause("S5")]) is None


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (lambda ids: (1, *ids), "T4"),
        (lambda ids: ids[-5:], "T9"),
        (lambda ids: ids[:-1], "T9"),
        (lambda ids: (*ids, 9, 9), "T5"),
        (lambda ids: ids, None),
    ],
)
def test_an_echo_of_other_prompt_ids_says_what_was_done_to_them(tmp_path, seen, expected):
    contexts = Contexts(make_tiny(tmp_path / "m"))
    sent = (tuple(range(40, 50)),)
    echo = verdicts.prompt_echo(sent, [[Answer(ids=(5,), logprobs=(-1.0,), prompt_ids=seen(sent[0]))]], contexts)
    assert (None if echo is None else echo.id) == expected


def test_the_same_missing_number_twice_is_no_difference():
    answer = Answer(ids=(1, 2), logprobs=(math.nan, -1.0))
    assert paired([answer], [answer]).rms == 0.0
    assert paired([answer], [replace(answer, logprobs=(-1.0, -1.0))]).rms == math.inf


def test_a_token_is_one_line_and_never_quoted(tmp_path):
    file = tmp_path / "token"
    file.write_bytes(b"\xef\xbb\xbfsecret\n")
    assert read_token(file) == "secret"
    for bad in ("one\ntwo", "", "späte"):
        file.write_text(bad)
        with pytest.raises(EngineError) as error:
            read_token(file)
        assert "one line" in str(error.value) and (not bad or bad not in str(error.value))


@pytest.mark.parametrize("url", ["http://user:secret@host:1", "http://[::1:80", "ftp://host", "host:80"])
def test_addresses_that_are_refused(url):
    with pytest.raises(EngineError) as error:
        HttpClient(url)
    assert "secret" not in str(error.value)


def test_loopback_by_name_alone():
    assert is_loopback("http://127.0.0.1:1") and is_loopback("http://[::1]:1") and is_loopback("http://localhost")
    assert not is_loopback("http://10.0.0.1") and not is_loopback("http://localhost.example")


@pytest.mark.parametrize(
    ("tokens", "at_once", "limit", "differs"),
    [(4, 2, 0.1, False), (0, 5, 0.1, False), (0, 6, 0.1, True), (4, 2, 1e-4, True), (16, 1, 1e-4, False)],
)
def test_first_tokens_that_part_are_a_mark_only_where_rounding_cannot_part_them(tokens, at_once, limit, differs):
    gap = Gap(tokens=tokens, rms=0.0, max_abs=0.0, parted=at_once, at_once=at_once, failed=0)
    assert Probed(name="cache", gap=gap, limit_rms=limit, text="").differs == differs


@pytest.mark.parametrize(("shapes", "found"), [(0.0, ["I5"]), (0.05, ["I5"]), (0.3, [])])
def test_a_cached_prompt_is_off_only_if_it_moves_numbers_further_than_another_batch_does(shapes, found):
    others = [probe("repeat", 0.0), probe("batch", shapes)]
    assert ids(verdicts.cached(probe("cache", 0.4), [], others, updated=False, blurred=False)) == found


@pytest.mark.parametrize(("share", "kept"), [(0.8, []), (0.6, ["I3"])])
def test_coarse_rounding_accounts_for_what_batches_move_though_no_pass_repeats_all_of_it(share, kept):
    plain = report("temperature=1", cause("I6", layer="inference", explained=share), left=0.03)
    assert ids(verdicts.not_explained_by([plain], [cause("I3", layer="inference")], [])) == kept


@pytest.mark.parametrize(("own_floor", "kept"), [(0.4, []), (0.05, ["I3"])])
def test_batch_noise_that_a_broken_model_amplifies_is_no_cause_of_its_own(own_floor, kept):
    """A rotary table of ones makes SmolLM2 round twenty times as coarsely: its batches differ by as much."""
    plain = report("temperature=1", cause("W5", layer="weights", explained=0.99))
    plain = replace(plain, fixed={"rms": 0.3, "floor_rms": own_floor})
    probes = [probe("repeat", 0.0), probe("batch, scored", 0.3)]
    assert ids(verdicts.not_explained_by([plain], [cause("I3", layer="inference")], probes)) == kept
