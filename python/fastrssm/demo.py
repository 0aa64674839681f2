"""The whole of AIME in minutes: data, phase 1, phase 2, evaluation, report.

A small world model and short training, so that two cores suffice; the printed estimate says what
the paper's schedule would take on the same machine.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrssm.algos import aime, bc, pretrain
from fastrssm.envs import TASKS
from fastrssm.models.config import world_model_config
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel
from fastrssm.run import model_agent, stack_agent
from fastrssm.run.agents import Expert, RandomAgent
from fastrssm.run.checkpoint import load_checkpoint, write_atomic
from fastrssm.run.datasets import make_dataset
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, EvalResult, evaluate
from fastrssm.run.log import progress_bar
from fastrssm.run.report import draw_report, read_curve
from fastrssm.run.start import MatmulPrecision, Sizes
from fastrssm.run.video import record_video

_ENV = "walker-walk"
# few updates: a rate many times the paper's that falls to 0 in the end, and windows just long
# enough that a state filtered over a whole episode stays like those of the training
_TRAINING: dict[str, Any] = {
    "horizon": 20,
    "batch_size": 80,
    "lr": 5e-3,
    "lr_decay": 0.5,
    "matmul_precision": "medium",
    "log_every": 500,
}
_BODY, _DEMONSTRATIONS = "walker-walk-buffer", "walker-walk-expert"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Watch AIME learn to walk from observations alone, in about five minutes on two cores."""

    out: Path = Path("runs/demo")
    """Folder for data, runs and report. Run it again to go on where it stopped."""
    body_episodes: int = 250
    """Episodes of past experience, with actions, from which the world model learns its body."""
    demonstrations: int = 300
    """Episodes of the expert, of which AIME sees the observations only."""
    steps: int = 100
    """Decision steps of each demonstration, of which getting up takes 30; an episode has 500."""
    model_updates: int = 6000
    """Gradient steps of phase 1."""
    policy_updates: int = 4000
    """Gradient steps of phase 2."""
    episodes: int = 100
    """Evaluation episodes of each policy."""
    seed: int = 0
    """Of everything."""
    full_length_estimate: bool = True
    """Time a few updates of the paper's size and say how long its schedule would take here."""


def main(args: Args) -> dict[str, EvalResult]:
    """Run the demo and return the results by name: random, AIME, BC, expert."""
    start = time.time()
    body, shown = args.out / "data" / _BODY, args.out / "data" / _DEMONSTRATIONS
    for folder, episodes, steps in (
        (body, args.body_episodes, None),
        (shown, args.demonstrations, args.steps),
    ):
        if not folder.exists():
            _say(start, f"making {episodes} episodes of {folder.name}")
            with progress_bar(folder.name) as advance:
                make_dataset(folder.name, folder, episodes, args.seed, 30, advance, steps=steps)

    model, policy, clone = (str(args.out / name) for name in ("model", "aime", "bc"))
    _say(start, "phase 1: a world model of the own body, from past experience with actions")
    pretrain.train(
        pretrain.Args(
            data=str(body), out=model, updates=args.model_updates, eval_every=0,
            rssm=Sizes(deter=128, stoch=32, hidden=128), idm=False, **_TRAINING,
            env=_ENV, seed=args.seed,
        )
    )  # fmt: skip
    _say(start, "phase 2: a policy, from the expert's observations without its actions")
    every = max(args.policy_updates // 6, 1)
    aime.train(
        aime.Args(
            model=model, data=str(shown), out=policy, updates=args.policy_updates,
            max_episodes=args.demonstrations,
            eval_every=every, eval_episodes=10, final_episodes=0,
            **_TRAINING, env=_ENV, seed=args.seed,
        )
    )  # fmt: skip
    _say(start, "behavioural cloning, which does see the expert's actions, for comparison")
    bc.train(
        bc.Args(
            data=str(shown), out=clone, env=_ENV, seed=args.seed,
            max_episodes=args.demonstrations, final_episodes=0,
        )
    )  # fmt: skip

    _say(start, f"evaluation, {args.episodes} episodes each")
    cpu, seed = torch.device("cpu"), args.seed + EVAL_SEED_OFFSET
    imitator = model_agent.load_agent(load_checkpoint(Path(policy), expected=("aime",)), seed, cpu)
    agents = {
        "random": RandomAgent(TASKS[_ENV].action_size, seed),
        "AIME": imitator,
        "BC with actions": stack_agent.load_agent(
            load_checkpoint(Path(clone), expected=("bc",)), seed, cpu
        ),
        "expert": Expert.open(_ENV),
    }
    results = {
        name: evaluate(agent, _ENV, args.episodes, seed=seed) for name, agent in agents.items()
    }
    scores = {name: result.to_dict() for name, result in results.items()}
    write_atomic(args.out / "scores.json", json.dumps(scores, indent=1).encode())
    report = args.out / "report.png"
    draw_report(
        report,
        f"AIME on {_ENV}: imitation from observation, {args.policy_updates} updates",
        [
            ("phase 1: world model", {
                "log likelihood": read_curve(Path(model), "rec_term"),
                "- KL": read_curve(Path(model), "kl_term"),
            }),
            ("phase 2: return", {"AIME, 10 episodes": read_curve(Path(policy), "eval_return")}),
        ],
        results,
    )  # fmt: skip
    video = args.out / "walker.mp4"
    try:
        # some get up and some do not: one alone would tell nothing
        record_video(imitator, _ENV, video, seed=seed, num_envs=4, height=160, width=160, fps=10)
    except RuntimeError as error:
        video = f"no video: {error}"

    print()
    for name, result in results.items():
        low, high = result.score_interval or (0.0, 0.0)
        print(
            f"{name:16} return {result.mean:6.1f}"
            f"   score {result.score:5.1f}  [{low:.1f}, {high:.1f}]"
        )
    print(f"\n{report}\n{video}\n{args.out / 'scores.json'}\n")
    if args.full_length_estimate:
        print(
            f"This was {args.model_updates} + {args.policy_updates} updates of a small model. The "
            "paper's schedule is 100,000 + 50,000\nupdates of the full one (batch 50, 50 frames). "
            "On this machine that takes about"
        )
        for precision in ("highest", "medium"):
            first, second = _paper_hours(precision)
            print(f"  {first:.1f} + {second:.1f} hours with --matmul-precision {precision}")
    _say(start, "done")
    return results


def _say(start: float, text: str) -> None:
    minutes, seconds = divmod(int(time.time() - start), 60)
    print(f"[{minutes:02d}:{seconds:02d}] {text}", flush=True)


def _paper_hours(precision: MatmulPrecision) -> tuple[float, float]:
    """Time a few updates of the paper's size and extrapolate to both phases, in hours."""
    torch.set_float32_matmul_precision(precision)
    task = TASKS[_ENV]
    config = world_model_config("rssm", task.sensors, "mdp", task.action_size)
    model = WorldModel(config)
    policy = TanhGaussianPolicy(config.feature_size, config.action_size)
    batch = {name: torch.randn(50, 50, size) for name, size, _ in task.sensors}
    batch["pre_action"] = torch.rand(50, 50, task.action_size) * 2 - 1
    noise = torch.Generator()

    def hours(updates: int, *, frozen: bool) -> float:
        module = policy if frozen else model
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-4, fused=True)
        took: list[float] = []
        for _ in range(4):
            start = time.perf_counter()
            if frozen:
                aime.update(
                    model, policy, optimizer, batch, noise,
                    kl_only=False, use_idm=False, grad_clip=100.0,
                )  # fmt: skip
            else:
                pretrain.update(model, optimizer, batch, noise, grad_clip=100.0)
            took.append(time.perf_counter() - start)
        return sorted(took)[1] * updates / 3600

    first = hours(100_000, frozen=False)
    model.freeze()
    return first, hours(50_000, frozen=True)
