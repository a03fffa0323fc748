"""pipeline/cores.py: threads that would spin on a core of somebody else's sleep instead."""

import pytest

from trueup.config import load_config
from trueup.pipeline.cores import waiting


@pytest.mark.parametrize(
    "sets, cores, passive",
    [
        ([], 2, True),  # the trainer takes all cores unless it is told otherwise
        (["train.threads=1"], 2, False),
        (["train.threads=2"], 2, True),
        (["train.threads=2"], 4, False),
        (["train.threads=2", "rollout.engines=3"], 4, True),
        (["train.threads=1", "engine.kind=vllm"], 2, True),
        (["rollout.max_lag=0"], 2, False),
        (["rollout.update=synchronous"], 2, False),
    ],
)
def test_threads_sleep_where_two_processes_want_more_cores_than_there_are(sets, cores, passive):
    found = waiting(load_config(None, sets=sets), cores=cores)
    assert found == ({"OMP_WAIT_POLICY": "PASSIVE"} if passive else {})
