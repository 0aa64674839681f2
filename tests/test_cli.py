"""The command line: the whole way from data to score, and one sentence for every mistake."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fastrssm import doctor
from fastrssm.cli import main

COMMANDS = ("demo", "pretrain", "aime", "bc", "bco", "iidm", "dreamer", "plan2explore", "eval")
COMMANDS += ("data make", "expert", "table", "doctor")
TINY = ["--updates", "2", "--batch-size", "4", "--horizon", "8"]
SIZES = ["--rssm.deter", "16", "--rssm.stoch", "4", "--rssm.hidden", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data/walker-random, runs/model and runs/policy, made by the commands."""
    folder = tmp_path_factory.mktemp("project")
    before = os.getcwd()
    os.chdir(folder)
    data = ["--data", "data/walker-random", "--env", "walker-walk"]
    assert main(["data", "make", "walker-random", "--episodes", "2"]) == 0
    assert main(["pretrain", *data, "--out", "runs/model", *TINY, *SIZES]) == 0
    aime = ["aime", "--model", "runs/model", *data, "--out", "runs/policy", *TINY]
    assert main([*aime, "--eval-every", "0", "--final-episodes", "2"]) == 0
    bc = ["bc", *data, "--out", "runs/bc", "--min-epochs", "1", "--max-epochs", "1"]
    assert main([*bc, "--final-episodes", "0"]) == 0
    for name in ("bco", "iidm"):
        words = [name, "--body", "data/walker-random", *bc[1:5], "--out", f"runs/{name}"]
        words += ["--min-epochs", "1", "--max-epochs", "1", "--batch-size", "500"]
        assert main([*words, "--final-episodes", "0"]) == 0
    for name in ("dreamer", "plan2explore"):
        words = [name, "--scale", "cpu", "--env", "walker-walk", "--out", f"runs/{name}", *SIZES]
        words += ["--episodes", "3", "--prefill", "1", "--num-envs", "2", "--steps", "9"]
        words += ["--updates-per-episode", "1", "--pretrain-updates", "1", "--horizon", "8"]
        assert main(words + (["--final-episodes", "0"] if name == "dreamer" else [])) == 0
    os.chdir(before)
    return folder


@pytest.fixture
def project(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FASTRSSM_DEBUG", raising=False)
    return folder


def test_the_overview_imports_nothing_heavy():
    heavy = ("triton", "mujoco", "numba", "tensorboard", "gymnasium", "matplotlib", "wandb")
    code = (
        "import sys; from fastrssm.cli import main; assert main(['--help']) == 0;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for command in COMMANDS:
        assert command in done.stdout


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastrssm", "fly"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command 'fly', expected one of demo, pretrain, aime")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as done:
        main([*command.split(), "--help"])
    assert done.value.code == 0
    assert f"usage: fastrssm {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "run", ["runs/policy", "runs/bc", "runs/bco", "runs/iidm", "runs/dreamer", "runs/plan2explore"]
)
def test_eval_prints_exactly_one_line_of_json(project, capfd, run):
    words = ["eval", run, "--episodes", "3", "--json"]
    assert main(words) == 0
    first = capfd.readouterr().out
    assert first.count("\n") == 1
    line = json.loads(first)
    assert (line["env"], line["episodes"], line["seed"]) == ("walker-walk", 3, 142)
    low, high = line["score_interval"]
    assert low <= line["score"] <= high
    assert line["return_mean"] * 100 / 943.7876586914062 == pytest.approx(line["score"])
    assert main(words) == 0
    assert capfd.readouterr().out == first
    assert main([*words, "--seed", "5"]) == 0
    assert json.loads(capfd.readouterr().out)["return_mean"] != line["return_mean"]


@pytest.mark.parametrize("command", ["dreamer", "plan2explore"])
def test_a_scale_shows_its_defaults(capsys, command):
    shown = {}
    for scale in ("paper", "cpu"):
        with pytest.raises(SystemExit) as done:
            main([command, f"--scale={scale}", "--help"])
        assert done.value.code == 0
        shown[scale] = " ".join(capsys.readouterr().out.split())
        assert f"those of --scale {scale}" in shown[scale].replace("│ ", "")
    assert "(default: 1000)" in shown["paper"]
    assert "(default: 1000)" not in shown["cpu"].split("--prefill")[0]


def test_eval_speaks_to_people_too(project, capsys):
    assert main(["eval", "runs/policy", "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "over 2 episodes, seed 142" in out
    assert "95 % interval" in out
    # the same episodes as those of the run's own end
    mean = json.loads((project / "runs/policy/eval.json").read_text())["mean"]
    assert f"return {mean:.1f}" in out


def test_eval_films_an_episode(project, monkeypatch, capsys):
    class Camera:
        def __init__(self, env, height, width):
            self.env = env

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def frame(self, index):
            return np.full((1, 1, 3), self.env.data[index].time)

    films = []
    monkeypatch.setattr("fastrssm.run.video.Renderer", Camera)
    monkeypatch.setattr(
        "fastrssm.run.video.write_video",
        lambda path, frames, fps: films.append((path, list(frames), fps)),
    )
    assert main(["eval", "runs/policy", "--episodes", "1", "--video", "walk.mp4"]) == 0
    ((path, times, fps),) = films
    assert (path.name, len(times), fps) == ("walk.mp4", 500, 20.0)
    times = [float(frame[0, 0, 0]) for frame in times]
    assert times == sorted(times)
    assert "500 frames" in capsys.readouterr().err


def test_data_info_knows_folders_and_recipes(project, capsys):
    assert main(["data", "info", "walker-random"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["episodes"], made["frames"]) == (2, 1002)
    assert main(["data", "info", "data/walker-random"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert main(["data", "info", "walker-run-expert"]) == 0
    recipe = json.loads(capsys.readouterr().out)
    assert (recipe["made"], recipe["episodes"], recipe["env_id"]) == (False, 100, "walker-run")


def test_the_tape_of_a_run_makes_its_episodes(project, capsys):
    assert main(["data", "tape", "runs/plan2explore"]) == 0
    assert capsys.readouterr().out == "runs/plan2explore.tape\n"
    words = ["data", "make", "runs/plan2explore.tape"]
    assert main(words) == 0
    assert capsys.readouterr().out == "data/plan2explore\n"
    checksums = []
    for name in ("plan2explore", "runs/plan2explore/episodes"):
        assert main(["data", "info", name]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["episodes"], found["frames"]) == (3, 30)
        checksums.append(found["checksum"])
    assert checksums[0] == checksums[1]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_mistake(project):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fastrssm", "data", "info", "walker-random"],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


DATA = ["--data", "data/walker-random"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "no command 'fly'"),
        (["data", "make", "walker-fly-expert"], "no dataset recipe is called 'walker-fly-expert'"),
        (["data", "make", "walker-random", "--episodes", "1"], "exists already"),
        (["data", "info", "walker-fly"], "no dataset recipe is called 'walker-fly'"),
        (["data", "info", "no/where"], "no/where is not a folder"),
        (["pretrain", *DATA, "--env", "walker-fly", "--out", "x"], "--env is 'walker-fly'"),
        (["pretrain", "--data", "nowhere", "--env", "walker-walk", "--out", "x"], "nowhere"),
        (["pretrain", *DATA, "--env", "cheetah-run", "--out", "x"], "column 'position' is missing"),
        (["pretrain", *DATA, "--env", "walker-walk", "--out", "x", "--device", "tpu"], "'tpu'"),
        (
            ["pretrain", *DATA, "--env", "walker-walk", "--out", "runs/policy"],
            "holds a run of 'aime'",
        ),
        (["dreamer", "--scale", "gpu"], "--scale is 'gpu', expected one of paper, cpu"),
        (["eval", "runs/model"], "holds a run of 'pretrain', expected 'aime' or 'dreamer'"),
        (["eval", "nowhere"], "nowhere is not the folder of a run"),
        (["eval", "runs/policy", "--episodes", "0"], "must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_sentence(project, capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (project / "x").exists()


def test_a_changed_argument_is_listed(project, capsys):
    data = ["--data", "data/walker-random", "--env", "walker-walk"]
    words = ["pretrain", *data, "--out", "runs/model", *TINY, *SIZES, "--lr", "0.1"]
    assert main(words) == 2
    assert "lr: 0.0003 in the run, 0.1 now" in capsys.readouterr().err


def test_debug_shows_where(project, monkeypatch):
    monkeypatch.setenv("FASTRSSM_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere"):
        main(["eval", "nowhere"])


def test_an_interruption_says_how_to_go_on(project, monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastrssm.algos.bc.train", interrupt)
    words = ["bc", *DATA, "--env", "walker-walk", "--out", "y"]
    assert main(words) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_the_doctor_finds_this_installation_well(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for text in ("torch", "mujoco", "instructions", "threads", "gaussian_kl", "egl", "osmesa"):
        assert text in out
    assert "cpu agrees with the reference" in out
    assert out.endswith("all is well\n")


def test_the_doctor_finds_a_fault(capsys, monkeypatch):
    def wrong():
        raise ArithmeticError("cpu differs from the reference by 1.0e+00")

    monkeypatch.setattr(doctor, "_test_kl", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: ArithmeticError: cpu differs" in out
    assert out.endswith("something is broken, see above\n")
