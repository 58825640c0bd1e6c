"""``python -m potluck.demo``: see ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from potluck.demo._invite import hosting_line, options_of
from potluck.demo._scale import FULL, QUICK, STAY_SECONDS, Scale


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m potluck.demo",
        description="Trains a small language model in peers that come, go and get killed, and compares it with the "
        "same training in one plain process. Exit code 0: the loss fell and the survivors' weights are equal to the bit; 1: not.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for loss.png, results.json, logs"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="shared optimizer steps (default: 120, 40 with --quick; for --host and --join: until Ctrl-C)",
    )
    parser.add_argument("--quick", action="store_true", help="a much smaller model and run, for tests")
    parser.add_argument("--no-reference", action="store_true", help="leave out the plain process")
    parser.add_argument(
        "--host", action="store_true", help="be one peer, and print the line that others paste"
    )
    parser.add_argument("--join", metavar="TOKEN", help="be one peer of the run that printed this line")
    parser.add_argument("--threads", type=int, help="CPU threads of this peer")
    parser.add_argument(
        "--stay",
        type=float,
        metavar="SECONDS",
        help="at the end a peer trains on, for others to join: until it has been alone for so long, 0: not at all "
        f"(default: until Ctrl-C on a terminal, {STAY_SECONDS:.0f} anywhere else)",
    )
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--events", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.epochs is not None and arguments.epochs < 6:
        parser.error("--epochs must be at least 6, to have time for a join and a loss")
    if arguments.stay is not None and not arguments.stay >= 0:
        parser.error("--stay must be a number of seconds, 0 or more")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run what the arguments ask for; the result is the exit code."""
    arguments = _arguments(argv)
    scale = QUICK if arguments.quick else FULL
    if arguments.epochs is not None:
        scale = dataclasses.replace(scale, epochs=arguments.epochs)
    else:
        scale = dataclasses.replace(scale, endless=bool(arguments.host or arguments.join))
    if arguments.host or arguments.join or arguments.plain:
        from potluck.demo import _peer

        return _peer.run(
            scale,
            join=arguments.join,
            plain=arguments.plain,
            events=arguments.events,
            threads=arguments.threads,
            options=options_of(arguments.quick, arguments.epochs),
        )
    return _whole(arguments, scale)


def _whole(arguments: argparse.Namespace, scale: Scale) -> int:
    from potluck.demo._director import DemoFailed, Director
    from potluck.demo._report import report
    from potluck.demo._view import View

    arguments.output.mkdir(parents=True, exist_ok=True)
    # All of them end at one epoch, whoever joins from elsewhere too.
    options = options_of(arguments.quick, scale.epochs)
    director = Director(scale, options, arguments.output, View())
    try:
        story = director.run(reference=not arguments.no_reference)
    except DemoFailed as failure:
        print(f"the demonstration failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    code = report(story, scale, arguments.output)
    if code == 0 and arguments.stay != 0:
        code = _stay(arguments)
    if code == 0:
        print("\nTo start a peer that others can join, at any time:")
        print(f"  {hosting_line()}")
    return code


def _stay(arguments: argparse.Namespace) -> int:
    """The peers of the demonstration have ended, so somebody has to be there for whoever pastes the line."""
    from potluck.demo import _peer

    stay = arguments.stay
    if stay is None and not sys.stdout.isatty():
        stay = STAY_SECONDS
    print("\nNow together with other machines: this one trains the same model again.")
    try:
        return _peer.run(
            dataclasses.replace(QUICK if arguments.quick else FULL, endless=True),
            join=None,
            plain=False,
            events=False,
            threads=arguments.threads,
            options=options_of(arguments.quick, None),
            stay=stay,
        )
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
