"""The command line: `fastrssm COMMAND`, one per algorithm, and eval, data, expert, demo, doctor.

Every command imports what it needs when it is chosen, so that the overview is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

try:
    import tyro
except ImportError:
    sys.exit("error: the command line needs more packages: pip install 'fastrssm[train]'")

from fastrssm import __version__

Args = TypeVar("Args")

_OVERVIEW = """\
usage: fastrssm COMMAND ...

Recurrent state-space models, and imitation from observation with them (AIME).

commands:
  demo              all of it in minutes, with a report: data, both phases, evaluation
  data make NAME    make a dataset of the paper anew, for example walker-run-expert
  data tape RUN     keep the episodes of a dreamer or plan2explore run as seeds and actions
  data info NAME    episodes, columns, returns and checksum of a folder, or of a recipe
  pretrain          fit a world model to episodes with actions (phase 1 of AIME)
  aime              imitate demonstrations without actions with that model (phase 2)
  bc                clone a policy from demonstrations with actions (upper bound)
  bco, iidm         imitate without a world model: inverse, or forward, model of single steps
  dreamer           learn a task in the imagination of a world model; its replay is a dataset
  plan2explore      the same without a task: explore, for data of a body
  table             the paper's table, or a part of it: data, models, cells, report; --quick
  eval RUN          run the policy of a run
  expert            train the actors that datasets are made from
  doctor            versions, backends and why others are absent, OpenGL, a self-test

a first run:
  fastrssm data make walker-random --episodes 100
  fastrssm pretrain --data data/walker-random --env walker-walk --out runs/model
  fastrssm data make walker-walk-expert
  fastrssm aime --model runs/model --data data/walker-walk-expert --env walker-walk --out runs/walk
  fastrssm eval runs/walk

The same command on the same run folder goes on where it stopped.
`fastrssm COMMAND --help` explains every option. FASTRSSM_DEBUG=1 shows where an error came from.
"""

# where `data make` puts a dataset, and where `data info` looks for a name
_DATA = Path("data")


@dataclass(frozen=True)
class EvalArgs:
    """Run whole episodes with the policy of a run and report their returns."""

    run: tyro.conf.Positional[str]
    """Run folder of any command that learns a policy."""
    episodes: int = 100
    """How many."""
    seed: int | None = None
    """Of the environments and of the model's noise; left out: the run's seed plus 100."""
    num_envs: int = 20
    """Environments stepped together."""
    json: bool = False
    """Print one line of JSON instead of a sentence."""
    video: Path | None = None
    """Film one more episode into this .mp4 or .gif."""
    device: str = "cpu"
    """cpu, cuda or cuda:<n>."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice."""


@dataclass(frozen=True)
class MakeArgs:
    """Make a dataset of the paper anew from actors and tapes that come with the package.

    Name, episodes and seed determine every byte of it.
    """

    name: tyro.conf.Positional[str]
    """Recipe, for example walker-random, walker-stand-buffer or walker-run-expert; or a tape."""
    out: Path | None = None
    """Folder to make; left out: data/NAME, with the name of a tape's file."""
    episodes: int | None = None
    """How many, of a tape spread evenly over it; left out: as many as the paper or the tape has."""
    steps: int | None = None
    """Decision steps of an episode; left out: as many as the task has."""
    seed: int = 0
    """Of the environments and of the policy's noise; a tape has its own."""
    num_envs: int = 16
    """Environments stepped together; changes the speed only."""
    overwrite: bool = False
    """Replace a folder of episodes."""


@dataclass(frozen=True)
class TapeArgs:
    """Record the episodes of a dreamer or plan2explore run as seeds and actions, a byte each.

    The tape is played once, to see that it gives the same episodes again.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    out: Path | None = None
    """File to write; left out: RUN.tape."""


@dataclass(frozen=True)
class InfoArgs:
    """Print episodes, frames, columns, returns and checksum of a dataset as JSON."""

    name: tyro.conf.Positional[str]
    """A folder of episodes, or the name of a recipe."""


@dataclass(frozen=True)
class DoctorArgs:
    """Print versions, backends, OpenGL and threads, and test this installation for two seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 doctor found a fault or a cell of the table failed, 2 bad input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_OVERVIEW, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "demo": _demo,
        "pretrain": _pretrain,
        "aime": _aime,
        "bc": _bc,
        "bco": _bco,
        "iidm": _iidm,
        "dreamer": _dreamer,
        "plan2explore": _plan2explore,
        "table": _table,
        "eval": _eval,
        "data": _data,
        "expert": _expert,
        "doctor": _doctor,
    }
    try:
        if words[0] not in commands:
            raise ValueError(f"no command {words[0]!r}, expected one of {', '.join(commands)}")
        code = commands[words[0]](words[1:])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader, `head` for example, has enough; python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if os.environ.get("FASTRSSM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(name: str, args: type[Args], run: Callable[[Args], object], words: list[str]) -> int:
    run(tyro.cli(args, args=words, prog=f"fastrssm {name}"))
    return 0


def _demo(words: list[str]) -> int:
    from fastrssm import demo

    return _run("demo", demo.Args, demo.main, words)


def _expert(words: list[str]) -> int:
    from fastrssm.run import expert

    return _run("expert", expert.Args, expert.train, words)


def _pretrain(words: list[str]) -> int:
    from fastrssm.algos import pretrain

    return _run("pretrain", pretrain.Args, pretrain.train, words)


def _aime(words: list[str]) -> int:
    from fastrssm.algos import aime

    return _run("aime", aime.Args, aime.train, words)


def _bc(words: list[str]) -> int:
    from fastrssm.algos import bc

    return _run("bc", bc.Args, bc.train, words)


def _bco(words: list[str]) -> int:
    from fastrssm.algos import bco

    return _run("bco", bco.Args, bco.train, words)


def _iidm(words: list[str]) -> int:
    from fastrssm.algos import iidm

    return _run("iidm", iidm.Args, iidm.train, words)


def _dreamer(words: list[str]) -> int:
    from fastrssm.algos import dreamer

    return _run_at_scale("dreamer", dreamer.Args, dreamer.SCALES, dreamer.train, words)


def _plan2explore(words: list[str]) -> int:
    from fastrssm.algos import plan2explore as p2e

    return _run_at_scale("plan2explore", p2e.Args, p2e.SCALES, p2e.train, words)


def _run_at_scale(
    name: str,
    args: Any,
    scales: Mapping[str, Mapping[str, Any]],
    run: Callable[[Any], object],
    words: list[str],
) -> int:
    """Take `--scale` first, since it decides the defaults that the help of the others shows."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--scale", default="paper")
    chosen, rest = parser.parse_known_args(words)
    if chosen.scale not in scales:
        expected = ", ".join(scales)
        raise ValueError(f"--scale is {chosen.scale!r}, expected one of {expected}")
    defaults = args(env=tyro.MISSING, out=tyro.MISSING, **scales[chosen.scale])
    text = f"{args.__doc__} The defaults below are those of --scale {chosen.scale}; there are: "
    run(
        tyro.cli(
            args,
            args=rest,
            default=defaults,
            prog=f"fastrssm {name}",
            description=f"{text}{', '.join(scales)}.",
        )
    )
    return 0


def _table(words: list[str]) -> int:
    from fastrssm.run import table

    # decides the defaults that the help of the others shows
    defaults = table.QUICK if "--quick" in words else table.Args()
    args = tyro.cli(table.Args, args=words, default=defaults, prog="fastrssm table")
    return 1 if table.make_table(args) else 0


def _eval(words: list[str]) -> int:
    args = tyro.cli(EvalArgs, args=words, prog="fastrssm eval")
    from fastrssm.run import model_agent, stack_agent
    from fastrssm.run.checkpoint import load_checkpoint
    from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
    from fastrssm.run.start import choose_device
    from fastrssm.run.video import record_video

    device = choose_device(args.device, args.threads)
    with_model, with_stack = ("aime", "dreamer", "plan2explore"), ("bc", "bco", "iidm")
    checkpoint = load_checkpoint(Path(args.run), expected=(*with_model, *with_stack))
    trained = checkpoint.config["args"]
    seed = trained["seed"] + EVAL_SEED_OFFSET if args.seed is None else args.seed
    load_agent = (
        model_agent.load_agent if checkpoint.algorithm in with_model else stack_agent.load_agent
    )
    agent = load_agent(checkpoint, seed, device)
    # first, since it fails at once where there is no OpenGL
    if args.video is not None:
        frames = record_video(agent, trained["env"], args.video, seed=seed)
        print(f"{args.video}: {frames} frames", file=sys.stderr)
    result = evaluate(agent, trained["env"], args.episodes, seed=seed, num_envs=args.num_envs)
    if args.json:
        line = {
            "run": args.run,
            "step": checkpoint.step,
            "env": result.env_id,
            "return_mean": result.mean,
            "return_std": result.std,
            "score": result.score,
            "score_interval": result.score_interval,
            "episodes": args.episodes,
            "seed": seed,
        }
        print(json.dumps(line))
    else:
        print(
            f"{result.env_id}: return {result.mean:.1f} +- {result.std:.1f} "
            f"over {args.episodes} episodes, seed {seed}"
        )
        if result.score is not None and result.score_interval is not None:
            low, high = result.score_interval
            print(f"score {result.score:.1f}, 95 % interval [{low:.1f}, {high:.1f}]; expert = 100")
    return 0


def _data(words: list[str]) -> int:
    chosen = tyro.cli(
        Annotated[MakeArgs, tyro.conf.subcommand("make", prefix_name=False)]
        | Annotated[TapeArgs, tyro.conf.subcommand("tape", prefix_name=False)]
        | Annotated[InfoArgs, tyro.conf.subcommand("info", prefix_name=False)],
        args=words,
        prog="fastrssm data",
        description="Make datasets, and look at them.",
    )
    match chosen:
        case MakeArgs():
            return _make(chosen)
        case TapeArgs():
            return _tape(chosen)
        case InfoArgs():
            return _info(chosen)


def _make(args: MakeArgs) -> int:
    from fastrssm.run.datasets import make_dataset
    from fastrssm.run.log import progress_bar

    stem = args.name.removesuffix(".tape")
    folder = _DATA / Path(stem).name if args.out is None else args.out
    with progress_bar(args.name) as advance:
        make_dataset(
            args.name,
            folder,
            args.episodes,
            args.seed,
            args.num_envs,
            advance,
            steps=args.steps,
            overwrite=args.overwrite,
        )
    print(folder)
    return 0


def _tape(args: TapeArgs) -> int:
    from fastrssm.run.tapes import record_run, save_tape

    out = Path(f"{args.run}.tape") if args.out is None else args.out
    save_tape(out, record_run(args.run))
    print(out)
    return 0


def _info(args: InfoArgs) -> int:
    from fastrssm.data import info
    from fastrssm.data.recipes import parse

    for folder in (Path(args.name), _DATA / args.name):
        if folder.is_dir():
            print(json.dumps(info(folder), indent=2))
            return 0
    if "/" in args.name:
        raise ValueError(f"{args.name} is not a folder")
    recipe = parse(args.name)
    print(json.dumps({"name": args.name, **vars(recipe), "made": False}, indent=2))
    return 0


def _doctor(words: list[str]) -> int:
    tyro.cli(DoctorArgs, args=words, prog="fastrssm doctor")
    from fastrssm import doctor

    return doctor.main()
