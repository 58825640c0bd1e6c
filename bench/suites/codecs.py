"""a. Compression: GB/s through the public classes."""

import statistics
from collections.abc import Iterator

from harness import Swarm, systems
from table import Row, faster

# At least so many times hivemind's speed: encode, decode.
TARGETS = {"float16": (2, 2), "uniform8": (10, 10), "quantile8": (15, None)}
# The last two are potluck's own.
SCHEMES = ("none", "float16", "scaled16", "uniform8", "quantile8", "blockwise8", "bfloat16", "blockwise4")
MISSED = {
    ("uniform8", "encode"): "reads the values twice, the second time to index them and to add up 256 sums",
    ("quantile8", "encode"): "bound by sorting a sample and a search per value on one thread",
}


def _turns(swarms: dict[str, Swarm], word: str, count: int) -> list[dict[str, dict]]:
    """Ask both systems in turn, `count` times, after one time to warm up."""
    ask = lambda: {name: swarm.workers[0].ask(word, "encode") for name, swarm in swarms.items()}
    ask()
    return [ask() for _ in range(count)]


def codecs(quick: bool) -> Iterator[Row]:
    """GB/s of f32 input, one thread, 10M floats (1M when quick); the ratio is the median of pairs."""
    numel = 1_000_000 if quick else 10_000_000
    swarms: dict[str, Swarm] = {}
    try:
        for name in systems("potluck", "hivemind"):
            swarms[name] = Swarm("codecs", name, 1, numel=numel)
        copy = [turn["potluck"]["encode"] for turn in _turns({"potluck": swarms["potluck"]}, "memcpy", 5)]
        speed = 4e-9 * numel / statistics.median(copy)
        yield Row("compression", "memcpy", "GB/s", speed, note="the ceiling, same run")
        for scheme in SCHEMES:
            turns = _turns(swarms, scheme, 3)
            for phase, target in zip(("encode", "decode"), TARGETS.get(scheme, (None, None))):
                yield _row(scheme, phase, target, turns, numel)
    finally:
        for swarm in swarms.values():
            swarm.end()


def _row(scheme: str, phase: str, target, turns: list[dict[str, dict]], numel: int) -> Row:
    seconds = {
        name: statistics.median(turn[name][phase] for turn in turns) if turns[0][name]["ok"] else None
        for name in turns[0]
    }
    ours, theirs = seconds["potluck"], seconds.get("hivemind")
    ratio = statistics.median(t["hivemind"][phase] / t["potluck"][phase] for t in turns) if theirs else None
    row = faster("compression", f"{scheme} {phase}", ours, theirs, "hivemind", target, ratio=ratio)
    row.unit = "GB/s"
    row.potluck, row.peer = (4e-9 * numel / value if value else None for value in (ours, theirs))
    able = [name for name in turns[0] if turns[0][name]["ok"]]
    errors = ", ".join(f"{name} {turns[0][name]['error']:.2g}" for name in able)
    notes = [f"relative error {errors}"] if phase == "decode" else []
    row.note = "; ".join(notes)
    return row.because(MISSED.get((scheme, phase), "not seen on a quiet machine: measure again"))
