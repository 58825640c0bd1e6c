"""l. The network alone: `potluck bench net` over every kind of connection."""

import json
import subprocess
from collections.abc import Iterator

from harness import ROOT
from table import Row, share

# The targets are for the default path, TCP with TLS 1.3.
DEFAULT = "tcp_tls"
FAR_MS, FAR_MEGABYTES_PER_SECOND = 100, 100
NEAR_CPU_SECONDS_PER_GB = 1.2


def wire(quick: bool) -> Iterator[Row]:
    """Between two processes: MB/s and CPU-seconds per GB of both ends, at 0 and 100 ms, with one stream and four."""
    command = [str(ROOT / "target/release/potluck"), "bench", "net"]
    if quick:
        command += ["--megabytes=100", "--rtt=0"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=1800).stdout
    for found in json.loads(said):
        what = f"{found['kind']}, {found['rtt_ms']} ms, {found['streams']} stream{'s' if found['streams'] > 1 else ''}"
        far = (found["kind"], found["rtt_ms"]) == (DEFAULT, FAR_MS)
        near = (found["kind"], found["rtt_ms"]) == (DEFAULT, 0)
        yield share(
            "wire", what, found["megabytes_per_second"], unit="MB/s",
            at_least=FAR_MEGABYTES_PER_SECOND if far else None, note=f"{found['megabytes']} MB", details=found,
        )  # fmt: skip
        yield share(
            "wire", f"{what}: processor", found["cpu_seconds_per_gb"], unit="CPU-s/GB",
            at_most=NEAR_CPU_SECONDS_PER_GB if near else None, note="both ends together",
        )  # fmt: skip
