"""`make gpu` where there is no GPU: all but what needs one, and what it keeps when cut off."""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, harness, report

ROOT = Path(__file__).resolve().parents[1]


def test_dry_run_passes_and_its_result_is_rendered(tmp_path):
    make = ["make", "--no-print-directory", "-n", "gpu", "DRY=1", f"PYTHON={sys.executable}"]
    command = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    out = tmp_path / "dry.json"
    run = subprocess.run(
        [*shlex.split(command), "--out", out], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    ended = {piece["piece"]: piece["status"] for piece in result["pieces"]}
    assert ended["tests"] == ended["gpu-rehearsal"] == "done"
    assert result["machine"]["torch"]
    assert {"textbook", "hoisted-graph", "fastrssm-reference"} <= {
        row["provider"] for row in result["rows"]
    }
    text = "\n".join(report.section("dry", result))
    assert "| gpu-rehearsal | done |" in text
    assert "### rehearsal, fwdbwd, tf32, cpu" in text
    assert "### rehearsal of dreamer v3, fwdbwd, tf32, cpu" in text
    assert not any("failed" in row["note"] for row in result["rows"])
    # nothing but the result is left
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def run(tmp_path, monkeypatch):
    has = {"python": "3", "torch": "2", "gpu": "H", "xdist": False}
    monkeypatch.setattr(gpu.Run, "_find_python", lambda self: (sys.executable, has))
    return gpu.Run(argparse.Namespace(dry=False, limit=60, out=tmp_path / "h.json"))


def test_a_piece_cut_off_leaves_what_it_had(run, monkeypatch):
    part = json.dumps({"machine": {"gpu": "H"}, "rows": [{"provider": "first"}]})
    monkeypatch.setitem(gpu.BENCHES, "gpu-W1", 2)
    whole = gpu.Run.call

    def call(self, command, limit, **environment):
        code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
        slow = [sys.executable, "-c", f"{code}; time.sleep(50)", command[-1], part]
        return whole(self, slow, limit, **environment)

    monkeypatch.setattr(gpu.Run, "call", call)
    started = time.monotonic()
    gpu.bench(run, "gpu-W1")
    assert time.monotonic() - started < 20
    result = json.loads(run.out.read_text())
    assert result["rows"] == [{"provider": "first"}]
    assert result["machine"] == {"gpu": "H"}
    assert result["pieces"][0]["status"] == "cut off after 2 s"


def test_no_piece_starts_without_time_for_it(run):
    run.limit = 5
    gpu.pieces(run, ["tests", "gpu-W1"])
    assert [p["status"] for p in run.result["pieces"]] == ["left out: no time"] * 2


def test_without_a_python_that_sees_a_gpu_it_says_what_is_missing(monkeypatch, tmp_path):
    probe = 'print(\'{"torch": null, "gpu": null, "python": "3.0"}\')'
    monkeypatch.setattr(gpu, "PROBE", probe)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=r"no Python with torch and a GPU:\n.*: no torch"):
        gpu.main()


def test_a_provider_without_a_time_is_a_row_with_the_reason():
    workload = harness.Workload(
        "b", "w", "fwd", "float32", "cpu", 64, {"peer": int}, failed={"other": "failed: too large"}
    )
    rows = harness.rows(workload, threads=1, rounds=2)
    assert [row["median_s"] is None for row in rows] == [False, True]
    text = "\n".join(report.table(json.loads(json.dumps(rows))))
    assert "| other | | | | | failed: too large |" in text
    assert "| peer |" in text
