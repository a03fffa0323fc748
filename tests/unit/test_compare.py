"""Runs beside one another: the band of a reference, and the first step at which a run leaves it."""

import json

import numpy as np
import pytest

from trueup.errors import ConfigError
from trueup.monitor.compare import departures, grouped
from trueup.monitor.curves import draw_comparison


def make_run(folder, *, seed, lr=1e-3, leaves=None, steps=100):
    folder.mkdir()
    noise = np.random.default_rng(seed)
    content = {"train": {"run": str(folder)}, "rollout": {"seed": seed}, "optimizer": {"lr": lr}}
    (folder / "config.json").write_text(json.dumps(content))
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            shift = 1.0 if leaves is not None and step >= leaves else 0.0
            record = {"batch": step, "reward": step / steps + 0.05 * noise.standard_normal() + shift}
            out.write(json.dumps(record) + "\n")
    return folder


def test_runs_that_differ_in_seeds_alone_are_one_group(tmp_path):
    runs = [make_run(tmp_path / f"a{i}", seed=i) for i in range(3)] + [make_run(tmp_path / "b", seed=0, lr=1e-4)]
    assert [len(g.runs) for g in grouped(runs)] == [3, 1]
    with pytest.raises(ConfigError, match="holds no run"):
        grouped([tmp_path])


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_step_at_which_a_run_leaves_the_band_is_named(tmp_path, seeds):
    reference = [make_run(tmp_path / f"a{i}", seed=i) for i in range(seeds)]
    stays = make_run(tmp_path / "stays", seed=7, lr=2e-3)
    leaves = make_run(tmp_path / "leaves", seed=8, lr=3e-3, leaves=60)
    groups = grouped([*reference, stays, leaves])
    (found,) = departures(groups)
    assert found.run == "leaves" and found.metric == "reward" and 57 <= found.step <= 61
    draw_comparison(groups, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
