"""The hard days: real training processes, real faults, real networks; one table of what was measured.

    run.py                   every scenario
    run.py --list            their names
    run.py --only NAME       one of them; may be repeated
    run.py --minutes 1440    length of the long haul

Needs root, because it makes network namespaces. Logs stay in .build/hard-days.
"""

import argparse
import importlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import rules
from crew import ROOT, Crew, HardDay, open_lab

import netlab

SCENARIOS = (
    "home_spot",
    "spot_notice",
    "two_laptops",
    "behind_nat",
    "long_outage",
    "stampede",
    "odd_couple",
    "poisoner",
    "monday",
    "long_haul",
)


def binary():
    """The `potluck` command: what $POTLUCK says, or what cargo built."""
    for path in (os.environ.get("POTLUCK"), ROOT / "target/release/potluck", ROOT / "target/debug/potluck"):
        if path and Path(path).is_file():
            return str(path)
    sys.exit("the potluck command is not built: cargo build --release -p potluck-cli")


def play(name, potluck, minutes):
    """One scenario; its lines of the table."""
    scenario = importlib.import_module(name)
    folder = ROOT / ".build" / "hard-days" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    with open_lab() as lab:
        crew = Crew(lab, folder, potluck, minutes)
        try:
            scenario.play(crew)
        except (HardDay, netlab.LabError) as error:
            crew.check("goes to its end", error, False)
        finally:
            crew.close()
        rules.nothing_left(crew)
    crew.check("length", f"{time.monotonic() - began:.0f} s", True)
    return [(scenario.TITLE, *check) for check in crew.checks]


def show(lines):
    """Lines of the table."""
    for title, rule, measured, ok in lines:
        print(f"{title:<20} | {rule:<52} | {measured:<60} | {'ok' if ok else 'FAILED'}", flush=True)


def main():
    """Play them, print the table, exit with 1 if a rule did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print the names of the scenarios")
    parser.add_argument(
        "--only",
        action="append",
        choices=SCENARIOS,
        metavar="NAME",
        help="only this one; may be repeated",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the long haul")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SCENARIOS))
        return
    # A shell that runs this in the background makes it ignore Ctrl-C, and whatever it starts too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if reason := netlab.missing():
        sys.exit(f"make hard-days: {reason}")
    potluck, failed = binary(), 0
    show([("scenario", "pass rule", "measured", True)])
    for name in arguments.only or SCENARIOS:
        lines = play(name, potluck, arguments.minutes)
        show(lines)
        failed += sum(not ok for *_, ok in lines)
    print(f"{failed} rules failed" if failed else "every rule holds")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
