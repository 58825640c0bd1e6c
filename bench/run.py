"""`make bench`: potluck beside hivemind 1.1.12, Gloo and memcpy, in one run. Writes bench/results.json and a table."""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

import harness
from harness import PeerDied
from suites import SUITES
from table import Row, failed, text

HERE = Path(__file__).resolve().parent
HIVEMIND = HERE.parent / ".venv-hivemind"


def install_hivemind():
    """hivemind in an environment of its own; its decoders need numpy < 2.4. The torch is the one that stands beside it."""
    if (HIVEMIND / ".installed").exists():
        return
    print("installing hivemind 1.1.12 for comparison (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(HIVEMIND)], check=True)
    pip = [str(HIVEMIND / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
    # What is installed there comes before what is seen here: several GB that need not be there twice.
    seen = sysconfig.get_path("purelib", vars={"base": str(HIVEMIND)})
    (Path(seen) / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    torch = version("torch").split("+")[0]
    wanted = ["hivemind==1.1.12", "numpy<2.4", f"torch=={torch}", "bitsandbytes==0.45.5", "psutil"]
    subprocess.run([*pip, *wanted], check=True)
    (HIVEMIND / ".installed").touch()


def measure(name: str, quick: bool) -> dict:
    """One suite. A suite that breaks is a missed figure, and the next one is run."""
    start, rows = time.monotonic(), []
    try:
        for row in SUITES[name](quick):
            rows.append(row)
            figures = f"{row.what}: {row.potluck} {row.unit}, ratio {row.ratio}"
            print(f"[{time.monotonic() - start:5.0f} s]   {figures}", file=sys.stderr, flush=True)
    except (PeerDied, OSError, subprocess.SubprocessError) as error:
        rows.append(failed(name, "the suite broke", "", error))
    return {
        "seconds": round(time.monotonic() - start, 1),
        "quick": quick,
        "alone": harness.alone,
        "rows": [row.json() for row in rows],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="*", choices=list(SUITES), help="suites to run; the rest of --output is kept"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument(
        "--alone", action="store_true", help="without hivemind: nothing is installed, no ratios"
    )
    parser.add_argument(
        "--install", action="store_true", help="install what stands beside, and measure nothing"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    harness.alone = args.alone
    if not args.alone:
        install_hivemind()
    if args.install:
        return
    suites = {}
    if args.only and args.output.exists():
        suites = json.loads(args.output.read_text())["suites"]
    start = time.monotonic()
    for name in args.only or SUITES:
        print(f"[{time.monotonic() - start:5.0f} s] {name}", file=sys.stderr, flush=True)
        suites[name] = measure(name, args.quick)
        write(args.output, suites)
    rows = [Row(**row) for suite in suites.values() for row in suite["rows"]]
    print(text(rows))
    missed = [row for row in rows if row.holds is False]
    print(f"\n{len(rows)} figures, {len(missed)} miss their target; {args.output}")


def write(output: Path, suites: dict):
    """All suites so far, in one order whatever order they were run in."""
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    ordered = {name: suites[name] for name in SUITES if name in suites}
    seconds = round(sum(suite["seconds"] for suite in ordered.values()), 1)
    output.write_text(
        json.dumps({"machine": machine, "seconds": seconds, "suites": ordered}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
