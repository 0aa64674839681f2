"""The benchmarks run, and their report says what the rows hold."""

import json

import numpy as np
import pytest

from bench import bench_env, harness, report


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    """dm_control's models leave a log in the current folder."""
    monkeypatch.chdir(tmp_path)


def test_every_environment_provider_steps_the_same_physics():
    """Each provider moves its bodies by one step, and the limit by as many substeps as ours."""
    workload = bench_env.workload("cheetah-run", 2, threads=1)
    assert {"mj_step", "mujoco.rollout", "mujoco.batch", "dm_control"} < set(workload.providers)
    bare = bench_env.Bare("cheetah-run", 2, 1, substeps=2)
    before = [data.time for data in bare.env.data]
    bare(np.zeros((2, 6), np.float32))
    assert [data.time for data in bare.env.data] == pytest.approx(np.add(before, 0.02))
    found = harness.rows(workload, threads=1, rounds=2)
    assert [row["provider"] for row in found] == list(workload.providers)
    limit = next(row for row in found if row["note"] == "limit")
    assert {row["floor_s"] for row in found} == {limit["median_s"]}


def test_report_compares_with_the_best_peer_and_not_with_the_limit():
    base = {"workload": "w", "mode": "step", "dtype": "float32", "device": "cpu", "threads": 2}
    base |= {"rounds": 30, "floor_s": 1e-6, "p25_s": 1e-6, "p75_s": 1e-6}
    rows = [
        base | {"provider": "limit", "median_s": 1e-6, "note": "limit"},
        base | {"provider": "peer", "median_s": 4e-6, "note": ""},
        base | {"provider": "fastrssm-cpu", "median_s": 2e-6, "note": ""},
    ]
    text = "\n".join(report.table(json.loads(json.dumps(rows))))
    assert "limit alone: 1.0 us" in text
    assert "| fastrssm-cpu | 2.0 | 1.0 to 1.0 | 2.00 | 2.00 |" in text
