import os

import pytest

# the oracle only steps: dm_control must not look for a display
os.environ["MUJOCO_GL"] = "disable"


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """MuJoCo logs the warnings of dm_control's models to a file in the current folder."""
    monkeypatch.chdir(tmp_path)
