"""What may go wrong around the environments: forks, interrupts, forgotten ones, leaks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError

from bench import soak
from fastrssm.envs import make_vec

ROOT = Path(__file__).resolve().parents[2]
THREADS = 4

# what the child says goes through stdout: its exit must be as orderly as its parent's
FORK = """
import os, sys
import numpy as np
from fastrssm.envs import make_vec

def say(*words):
    print(*words, flush=True)

def refused(call):
    try:
        call()
    except RuntimeError as error:
        return "belong to the process that forked" in str(error)
    return False

options = dict(num_threads=4, dtype=np.float64)
env, under_way = make_vec("cheetah-run", 3, **options), make_vec("cheetah-run", 3, **options)
action = np.full((3, 6), 0.5)
env.reset(seed=0)
under_way.reset(seed=0)
under_way.step_async(action)
child = os.fork()
if child == 0:
    say("step", refused(lambda: env.step(action)))
    say("reset", refused(lambda: env.reset(seed=0)))
    say("step_wait", refused(under_way.step_wait))
    env.close()
    new = make_vec("cheetah-run", 3, **options)
    new.reset(seed=0)
    say("new", new.step(action)[1].tolist())
    sys.exit(7)
say("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
say("parent", env.step(action)[1].tolist())
say("under_way", under_way.step_wait()[1].tolist())
"""


def test_a_forked_child_is_refused_and_its_parent_goes_on():
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    env = make_vec("cheetah-run", 3, dtype=np.float64)
    env.reset(seed=0)
    reward = str(env.step(np.full((3, 6), 0.5))[1].tolist())
    assert (done.returncode, done.stderr) == (0, "")
    assert said == {
        "step": "True",
        "reset": "True",
        "step_wait": "True",
        "new": reward,
        "child": "7",
        "parent": reward,
        "under_way": reward,
    }


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def running():
    """Environments whose threads all exist: those that step, and the one of `step_async`."""
    env = make_vec("cheetah-run", THREADS, num_threads=THREADS)
    env.reset(seed=0)
    env.step_async(np.zeros((THREADS, 6)))
    return env


def test_close_ends_the_threads():
    before = threads()
    env = running()
    assert threads() == before + THREADS
    env.close()  # with a step under way
    assert threads() == before
    env.close()


def test_a_forgotten_environment_ends_its_threads():
    before = threads()
    env = running()
    assert threads() == before + THREADS
    del env  # with a step under way
    assert threads() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda env, state: env.reset(),
        lambda env, state: env.step(np.zeros((2, 6))),
        lambda env, state: env.step_async(np.zeros((2, 6))),
        lambda env, state: env.state(),
        lambda env, state: env.set_state(state),
    ],
)
def test_a_closed_environment_says_so(call):
    env = make_vec("cheetah-run", 2)
    env.reset(seed=0)
    state = env.state()
    env.close()
    with pytest.raises(ClosedEnvironmentError, match="after close"):
        call(env, state)


class _Interrupt:
    """SIGINT some milliseconds from now, and Python's own answer to it."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        self.saved = (
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT)),
            signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGALRM, signal.SIGINT), self.saved, strict=True):
            signal.signal(number, handler)


def long_steps():
    """Two like vectors of environments, each step of which lasts milliseconds, and an action."""
    env, same = (make_vec("cheetah-run", 32, action_repeat=40, num_threads=n) for n in (2, 1))
    env.reset(seed=0)
    same.reset(seed=0)
    return env, same, np.full((32, 6), 0.3)


@pytest.mark.parametrize("wait", [0.002, 0.005, 0.011, 0.02])
def test_an_interrupted_step_is_taken_or_not_and_nothing_in_between(wait):
    env, same, action = long_steps()
    taken = 0
    try:
        with _Interrupt(wait):
            while taken < 1000:
                env.step(action)
                taken += 1
    except KeyboardInterrupt:
        pass
    steps = env.state().control_steps // env.action_repeat
    assert (steps == steps[0]).all()
    assert steps[0] in (taken, taken + 1)
    assert taken < 1000
    for _ in range(steps[0]):
        same.step(action)
    for one, other in zip(env.step(action)[0].values(), same.step(action)[0].values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_interrupted_wait_can_be_repeated():
    env, same, action = long_steps()
    env.step_async(action)
    with _Interrupt(1e-4), pytest.raises(KeyboardInterrupt):
        # a late signal is waited for
        (env.step_wait(), signal.pause())
    with pytest.raises(AlreadyPendingCallError):
        env.step(action)
    np.testing.assert_array_equal(env.step_wait()[1], same.step(action)[1])


def test_a_step_whose_start_is_interrupted_is_taken():
    env, same, action = long_steps()
    loop = env._stepper

    class Interrupted:
        def __getattr__(self, name):
            return getattr(loop, name)

        def start(self, *arrays):
            loop.start(*arrays)
            raise KeyboardInterrupt

    env._stepper = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        env.step_async(action)
    env._stepper = loop
    same.step(action)
    np.testing.assert_array_equal(env.step(action)[1], same.step(action)[1])


def test_environments_come_and_go_without_a_trace():
    # where malloc maps large blocks one by one, a freed one is no longer held
    done = subprocess.run(
        [sys.executable, "-c", "from bench import soak; print(*soak.remade(20))"],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    held = [int(word) for word in done.stdout.split()]
    # one environment left behind in each of the last 18 rounds would be 200 MiB
    assert max(held) - held[0] < 2**20


def test_memory_is_flat_over_many_steps():
    held = soak.stepped(200_000)
    # an array of 8 rewards left behind by each of the last 22,500 calls would be 2.2 MiB
    assert max(held) - held[0] < 2**20
