"""b. All-reduce: seconds, bytes against the butterfly's minimum, CPU, memory."""

from collections.abc import Iterator

from harness import PeerDied, Swarm, alternate, end_all, median, pairwise, systems
from network import loopbacks
from table import Row, failed, faster, share

MIB = 1 << 20
SCHEMES = ("none", "float16", "uniform8", "powersgd")
BUSY = "both cores are busy throughout, with TLS, checks of every value, hashes and copies"
FLOOR = "Gloo encrypts, checks and agrees on nothing, and adds where the values are"
BYTES = {"none": 4, "float16": 2, "uniform8": 1}
# hivemind's averager waits for a group this long by default; where only the transfer is compared, it waits less.
DEFAULT_WINDOW, SHORT_WINDOW = 5.0, 1.5


def values(numel: int, count: int = 8) -> int:
    """How many values the workers' matrices hold, which is a little less than `numel` (see common.tensors)."""
    rows = max(1, int((numel / count) ** 0.5))
    return count * rows * (numel // count // rows)


def minimum(numel: int, peers: int, scheme: str) -> float:
    """Bytes that each peer of a butterfly must send: every part once to its reducer, every sum once back."""
    return 2 * (peers - 1) / peers * values(numel) * BYTES[scheme]


def allreduce(quick: bool) -> Iterator[Row]:
    """The grid: peers, values, schemes, rounds of each system. What is left out does not fit in half an hour."""
    if quick:
        grid = {2: [(1_000_000, SCHEMES[:2], 2)]}
    else:
        grid = {
            2: [(1_000_000, SCHEMES[:3], 3), (10_000_000, SCHEMES, 3), (100_000_000, SCHEMES[:2], 2)],
            4: [(1_000_000, SCHEMES[:1], 3), (10_000_000, SCHEMES[:3], 3)],
            8: [(10_000_000, SCHEMES[:1], 2)],
        }
    names, swarms = systems("potluck", "hivemind", "gloo"), {}
    with loopbacks(names) as hosts:
        try:
            for peers, cells in grid.items():
                yield from _swarms(names, swarms, hosts, peers, cells)
        finally:
            end_all(swarms)


def _swarms(names: list[str], swarms: dict[str, Swarm], hosts, peers: int, cells: list) -> Iterator[Row]:
    """Rounds of so many peers. Those of before stay, because to start eight takes longer than all of their rounds."""
    size = f"{peers} peers"
    try:
        if "gloo" in swarms:
            swarms.pop("gloo").end()
        for name in names:
            here = [hosts[name]] * peers if hosts[name] else None
            if name in swarms:
                swarms[name].grow(peers, here)
            # Eight more processes would only say what two and four have said of Gloo, whose membership is fixed.
            elif name != "gloo" or peers < 8:
                swarms[name] = Swarm("averager" if name != "gloo" else "gloo", name, peers, here)
        for numel, schemes, turns in cells:
            size = f"{peers} peers, {numel // 1_000_000}M"
            yield from _cell(size, swarms, hosts, peers, numel, schemes, turns)
    except PeerDied as died:
        yield failed("all-reduce", size, ">= 4x", died)
        end_all(swarms)


def _cell(size, swarms, hosts, peers: int, numel: int, schemes, turns: int) -> Iterator[Row]:
    window = None
    for scheme in schemes:
        # As users run it, with and without compression.
        usual = (peers, numel) == (2, 10_000_000) and scheme in ("none", "float16")
        before, window = window, DEFAULT_WINDOW if usual else SHORT_WINDOW
        if window != before:
            for swarm in swarms.values():
                swarm.ask(f"size {numel} {window} {peers}")
        # Gloo does not compress; it is the floor of the uncompressed round.
        some = {name: swarm for name, swarm in swarms.items() if name != "gloo" or scheme == "none"}
        memory = _warm(some, scheme)
        count = (lambda name: hosts[name].sent()) if hosts["potluck"] else None
        found = alternate(some, turns, count)
        yield from _rows(f"{size}, {scheme}", peers, numel, scheme, window, found, memory)


def _warm(swarms: dict[str, Swarm], scheme: str) -> dict[str, int]:
    """One round that is not timed, in which the peak memory is sampled: of those who have seen no larger size before."""
    memory = {}
    for name, swarm in swarms.items():
        swarm.ask(f"scheme {scheme}")
        memory[name] = max(peer["memory"] for peer in swarm.ask("peak")[swarm.newest :])
    return memory


def _rows(what, peers, numel, scheme, window, turns, memory) -> Iterator[Row]:
    figures = {
        name: {
            "seconds": median(turns, name, "seconds"),
            "transfer": median(turns, name, "transfer"),
            "cpu": median(turns, name, "cpu"),
            "wire_bytes": median(turns, name, "wire"),
            "peak_bytes": memory[name],
            "rounds": len(turns),
            "failed": sum(not turn[name]["ok"] for turn in turns),
        }
        for name in turns[0]
    }
    ours, theirs = figures["potluck"], figures.get("hivemind", {})
    big = numel >= 10_000_000 and scheme != "powersgd"
    note = f"MB/s of vector {_rate(numel, ours)} / {_rate(numel, theirs)}"
    note += f", CPU-s of all peers {_two(ours, theirs, 'cpu', 1)}, peak MiB of a peer {_two(ours, theirs, 'peak_bytes', MIB)}"
    note += "".join(
        f", {name} failed {f['failed']} of {f['rounds']}" for name, f in figures.items() if f["failed"]
    )
    yield faster(
        "all-reduce", f"{what}: transfer only", ours["transfer"], theirs.get("transfer"), "hivemind",
        4 if big else None, note=note, ratio=pairwise(turns, "hivemind", "transfer"), details=figures,
    ).because(BUSY)  # fmt: skip
    default = window == DEFAULT_WINDOW
    yield faster(
        "all-reduce", f"{what}: whole step", ours["seconds"], theirs.get("seconds"), "hivemind",
        4 if big and default else None, ratio=pairwise(turns, "hivemind", "seconds"),
        note=f"hivemind waits {window:g} s for a group" + (", its default" if default else ", less than its default"),
    )  # fmt: skip
    if "gloo" in figures:
        yield faster(
            "all-reduce", f"{what}: transfer only", ours["transfer"], figures["gloo"]["transfer"], "gloo",
            0.5 if big else None, ratio=pairwise(turns, "gloo", "transfer"), note="unencrypted, fixed membership",
        ).because(FLOOR)  # fmt: skip
    if ours["wire_bytes"] and scheme in BYTES:
        least = peers * minimum(numel, peers, scheme)
        yield share(
            "all-reduce", f"{what}: bytes by minimum", ours["wire_bytes"] / least, at_most=1.02 if big else None,
            peer=theirs["wire_bytes"] / least if theirs.get("wire_bytes") else None, peer_name="hivemind",
            note="everything on loopback in the round: TLS, streams, TCP, IP, acknowledgements, membership",
        )  # fmt: skip


def _rate(numel: int, figures: dict) -> str:
    return f"{4e-6 * numel / figures['transfer']:.0f}" if figures.get("transfer") else "-"


def _two(ours: dict, theirs: dict, key: str, unit: float) -> str:
    return " / ".join(f"{f[key] / unit:.3g}" if f.get(key) else "-" for f in (ours, theirs))
