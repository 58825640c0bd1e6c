"""The measurements. Each yields rows; systems take turns in one run, so that a busy machine is busy for both."""

import statistics
from collections.abc import Iterator

from harness import PeerDied, Swarm, Worker, rounds
from table import Row, faster, share

MIB = 1 << 20


def _turns(workers: dict[str, Worker], word: str, count: int) -> dict[str, list[dict]]:
    """Ask all workers in turn, `count` times."""
    found: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(count):
        for name, worker in workers.items():
            worker.tell(word)
            found[name].append(worker.report("encode", 120))
    return found


def codecs(quick: bool) -> Iterator[Row]:
    """GB/s of f32 input through the public classes, one thread, 10M floats (1M when quick)."""
    numel = 1_000_000 if quick else 10_000_000
    targets = {"float16": (2, 2), "uniform8": (10, 10), "quantile8": (15, None)}
    workers = {name: Worker("codec-" + name, [f"--numel={numel}"]) for name in ("potluck", "hivemind")}
    try:
        for worker in workers.values():
            worker.report("ready", 120)
        copy = _turns({"potluck": workers["potluck"]}, "memcpy", 5)["potluck"]
        memcpy = statistics.median(turn["encode"] for turn in copy)
        yield Row(
            "compression",
            "memcpy",
            "GB/s",
            4e-9 * numel / memcpy,
            note="the ceiling, same run",
        )
        for scheme in (
            "none",
            "float16",
            "scaled16",
            "uniform8",
            "quantile8",
            "blockwise8",
        ):
            turns = _turns(workers, scheme, 3 if quick else 5)
            for index, phase in enumerate(("encode", "decode")):
                ours, theirs = (
                    statistics.median(turn[phase] for turn in turns[name]) if turns[name][0]["ok"] else None
                    for name in ("potluck", "hivemind")
                )
                row = faster(
                    "compression",
                    f"{scheme} {phase}",
                    ours,
                    theirs,
                    "hivemind",
                    targets.get(scheme, (None,) * 2)[index],
                )
                row.potluck, row.peer = (4e-9 * numel / value if value else None for value in (ours, theirs))
                row.unit = "GB/s"
                if phase == "decode":
                    row.note = f"relative error {turns['potluck'][0]['error']:.2g}, hivemind {turns['hivemind'][0]['error']:.2g}"
                yield row
    finally:
        for worker in workers.values():
            worker.end()


def _measure(system: str, peers: int, count: int, **options) -> dict | str:
    try:
        with Swarm(system, peers, **options) as swarm:
            found = rounds(swarm, count)
            found["idle"] = max(ready.get("memory", 0) for ready in swarm.ready)
            return found
    except PeerDied as died:
        return str(died)[-160:].replace("\n", " ")


def _values(numel: int, count: int = 8) -> int:
    """How many values the workers' matrices hold, which is a little less than `numel` (see common.tensors)."""
    rows = max(1, int((numel / count) ** 0.5))
    return count * rows * (numel // count // rows)


def allreduce(quick: bool) -> Iterator[Row]:
    """Seconds of transfer per round; bytes against the butterfly's minimum; CPU; memory."""
    grid = [(2, 1_000_000), (2, 10_000_000), (4, 10_000_000), (8, 1_000_000)]
    grid = grid[:2] if quick else [*grid, (2, 100_000_000)]
    for peers, numel in grid:
        schemes = ["none", "float16", "uniform8", "powersgd"] if numel <= 10_000_000 else ["none", "float16"]
        count = 3 if numel >= 100_000_000 else 5
        floor = _measure("gloo", peers, count, numel=numel)
        for scheme in schemes:
            ours = _measure("potluck", peers, count, numel=numel, scheme=scheme)
            theirs = _measure("hivemind", peers, count, numel=numel, scheme=scheme)
            what = f"{peers} peers, {numel // 1_000_000}M, {scheme}"
            if isinstance(ours, str):
                yield Row(
                    "all-reduce",
                    what,
                    "s",
                    None,
                    holds=False,
                    target=">= 4x",
                    note=ours,
                )
                continue
            target = 4 if numel >= 10_000_000 and scheme != "powersgd" else None
            lost = isinstance(theirs, str)
            note = (
                theirs
                if lost
                else f"CPU {ours['cpu']:.2f} / {theirs['cpu']:.2f} s, memory {ours['memory'] // MIB} / {theirs['memory'] // MIB} MiB"
            )
            yield faster(
                "all-reduce",
                what,
                ours["transfer"],
                None if lost else theirs["transfer"],
                "hivemind",
                target,
                note=note,
            )
            if scheme == "none" and not isinstance(floor, str):
                target = 0.5 if numel >= 10_000_000 else None
                yield faster(
                    "all-reduce",
                    what,
                    ours["transfer"],
                    floor["transfer"],
                    "gloo",
                    target,
                    note="unencrypted floor",
                )
            if ours["wire"] and scheme in {"none", "float16"}:
                minimum = 2 * (peers - 1) / peers * _values(numel) * {"none": 4, "float16": 2}[scheme]
                yield share(
                    "all-reduce",
                    f"{what}: payload by minimum",
                    ours["wire"] / minimum,
                    note="the session's own count, most of any peer; without TLS, stream and TCP headers, "
                    "hence no verdict on the target of 1.02 for the wire",
                )


def overhead(quick: bool) -> Iterator[Row]:
    """A round of 68k parameters: all the time from asking to having the average."""
    count = 5 if quick else 15
    ours = _measure("potluck", 2, count, numel=68_000)
    theirs = _measure("hivemind", 2, 3, numel=68_000, matchmaking_time=5.0)
    if isinstance(ours, str) or isinstance(theirs, str):
        yield Row(
            "overhead",
            "68k parameters, 2 peers",
            "s",
            None,
            holds=False,
            target=">= 20x",
            note=f"{ours} {theirs}"[:160],
        )
        return
    yield faster(
        "overhead",
        "68k parameters, 2 peers",
        ours["seconds"],
        theirs["seconds"],
        "hivemind",
        20,
        note="a step of the averager (not of the optimizer); hivemind waits out its default matchmaking time",
    )
    yield faster(
        "memory",
        "idle peer with torch",
        ours["idle"] / MIB,
        theirs["idle"] / MIB,
        "hivemind",
        None,
        unit="MiB",
    )


def lookups(quick: bool) -> Iterator[Row]:
    """One DHT store and one get, two peers on loopback."""
    found = {}
    for system in ("potluck", "hivemind"):
        with Swarm(system, 2, numel=1000) as swarm:
            swarm.workers[1].tell("dht")
            found[system] = swarm.workers[1].report("store", 120)
    for call in ("store", "get"):
        yield Row(
            "dht",
            call,
            "s",
            found["potluck"][call],
            found["hivemind"][call],
            "hivemind",
            note="no ratio: the peer that stores also reads, so potluck answers a get from its own memory",
        )


SUITES = {
    "codecs": codecs,
    "allreduce": allreduce,
    "overhead": overhead,
    "dht": lookups,
}
