"""j. How cost grows with the number of peers, in the simulator."""

import json
import subprocess
from collections.abc import Iterator

from harness import ROOT
from table import Row, failed, share

VALUES = 100_000


def growth(quick: bool) -> Iterator[Row]:
    """Rounds of 2 to 64 simulated peers with the real averaging: bytes and messages that each sends."""
    for peers in (2, 4) if quick else (2, 4, 8, 16, 32, 64):
        command = [
            str(ROOT / "target/release/potluck"), "sim", "--json", f"--peers={peers}", f"--values={VALUES}",
            "--compression=none", "--rounds=2", "--compute=10", "--rtt=50",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            yield failed("growth", f"{peers} peers", "", done.stderr)
            continue
        found = json.loads(done.stdout)
        least = 2 * (peers - 1) / peers * VALUES * 4
        yield share(
            "growth", f"{peers} peers: bytes per peer by minimum", found["bytes_sent"] / least,
            note=f"{VALUES} floats: {found['messages_sent']:.0f} messages per peer and round, {found['round_seconds']:.2f} s, "
            f"{found['epoch_bytes_up'] / 1e6:.2f} MB up per peer and epoch with membership and heartbeats",
            details={key: found[key] for key in ("bytes_sent", "messages_sent", "round_seconds", "epoch_bytes_up", "members")},
        )  # fmt: skip
