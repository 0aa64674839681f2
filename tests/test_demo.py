import json

import pytest

from fastrssm import demo


@pytest.fixture
def tiny(tmp_path):
    return demo.Args(
        out=tmp_path / "demo",
        body_episodes=3,
        demonstrations=3,
        model_updates=4,
        policy_updates=6,
        episodes=2,
        full_length_estimate=False,
    )


def test_demo_runs_end_to_end_and_goes_on(tiny, capsys, monkeypatch):
    def no_opengl(*args, **kwargs):
        raise RuntimeError("no OpenGL for rendering")

    monkeypatch.setattr(demo, "record_video", no_opengl)
    results = demo.main(tiny)
    assert list(results) == ["random", "AIME", "BC with actions", "expert"]
    scores = json.loads((tiny.out / "scores.json").read_text())
    assert scores["expert"]["score"] > 90 > scores["random"]["score"]
    assert (tiny.out / "report.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(tiny.out / "report.png") in printed
    assert "no video: no OpenGL for rendering" in printed
    # the second time nothing is trained, and the scores are the same
    again = demo.main(tiny)
    assert {name: result.returns for name, result in again.items()} == {
        name: result.returns for name, result in results.items()
    }
