"""`make bench`: potluck beside hivemind 1.1.12, Gloo and memcpy, in one run. Writes bench/results.json and a table."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from suites import SUITES
from table import text

HERE = Path(__file__).resolve().parent
HIVEMIND = HERE.parent / ".venv-hivemind"


def install_hivemind():
    """hivemind in an environment of its own; its decoders need numpy < 2.4."""
    if (HIVEMIND / ".installed").exists():
        return
    print("installing hivemind 1.1.12 for comparison (once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(HIVEMIND)], check=True)
    pip = [
        str(HIVEMIND / "bin/pip"),
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    subprocess.run(
        [*pip, "hivemind==1.1.12", "numpy<2.4", "bitsandbytes==0.45.5", "psutil"],
        check=True,
    )
    (HIVEMIND / ".installed").touch()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=sorted(SUITES),
        default=sorted(SUITES),
        help="suites to run",
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    install_hivemind()
    rows, start = [], time.time()
    for name in args.only:
        print(f"[{time.time() - start:5.0f} s] {name}", file=sys.stderr)
        for row in SUITES[name](args.quick):
            rows.append(row)
            print(
                f"    {row.what}: {row.potluck} {row.unit}, ratio {row.ratio}",
                file=sys.stderr,
            )
    machine = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    result = {
        "machine": machine,
        "quick": args.quick,
        "seconds": time.time() - start,
        "rows": [row.json() for row in rows],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(text(rows))
    missed = [row for row in rows if row.holds is False]
    print(f"\n{len(rows)} figures, {len(missed)} miss their target; {args.output}")


if __name__ == "__main__":
    main()
