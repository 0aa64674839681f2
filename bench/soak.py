"""Memory over a long run: `python -m bench.soak --steps 10000000`."""

import argparse
import os
from pathlib import Path

import numpy as np

from fastrssm.envs import make_vec

_NUM_ENVS = 8


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stepped(steps):
    """Step cheetahs with short episodes, `steps` in all; give the memory held along the way.

    Returns:
        Bytes at a tenth of the way, when all that is made once is made, and at every further tenth.
    """
    env = make_vec("cheetah-run", _NUM_ENVS, episode_steps=50, autoreset_mode="SameStep")
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (16, *env.action_space.shape))
    held = []
    for _ in range(10):
        for i in range(steps // _NUM_ENVS // 10):
            env.step(actions[i % 16])
        held.append(resident())
    env.close()
    return held


def remade(rounds):
    """Make, step and forget environments; give the memory held as `stepped` does."""
    held = []
    for _ in range(10):
        for _ in range(rounds // 10):
            env = make_vec("cheetah-run", _NUM_ENVS, num_threads=2)
            env.reset(seed=0)
            env.step_async(np.zeros(env.action_space.shape))
            env.step_wait()
            # before the next one is made
            del env
        held.append(resident())
    return held


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000_000, help="of all environments")
    for tenth, held in enumerate(stepped(parser.parse_args().steps), 1):
        print(f"{tenth}/10: {held / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
