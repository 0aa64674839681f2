"""Pytest plugin: one line of JSON per test as it ends, so that a run cut off is not lost.

`pytest -p bench.outcomes` with FASTRSSM_OUTCOMES=FILE in the environment.
"""

import json
import os


def pytest_runtest_logreport(report):
    # a test that did not come as far as its call ends in its setup; workers of xdist report to one
    passing = report.when != "call" and report.outcome == "passed"
    if passing or "PYTEST_XDIST_WORKER" in os.environ:
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
    if report.outcome == "failed":
        line["message"] = _last_line(report)
    with open(os.environ["FASTRSSM_OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")


def _last_line(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return text.strip().splitlines()[0][:300]
