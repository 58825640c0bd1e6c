"""The pass rules that every hard day shares. Each adds one line to the table of a crew."""

import re
import subprocess

TROUBLE = re.compile(r"Traceback|panicked at|Task exception|InvalidStateError")
# What the events of a session say about rounds.
AVERAGED = re.compile(r"epoch (\d+): averaged gradients with (\d+) peers?, (.*)")
FAULT = re.compile(r"peer (\w+): [\w ]+ \(([^)]*)\)")
LOST = re.compile(r"^lost in |^not in all parts of ")
FAILED = re.compile(
    r"epoch (\d+): (?:no average of gradients, went on alone|missed the average of gradients)"
)
# A slope of 1 MB an hour needs at least this.
SLOPE_MINUTES = 20.0


def litter(running):
    """What somebody has left in its folder for temporary files."""
    found = set(running.private.rglob("*"))
    if running.killed:
        # It had no time to take its one notice along; who starts or looks next on that machine removes it (`local_runs`).
        notice = next(running.private.glob("potluck-*/*.json"), None)
        found -= {notice, notice.parent} if notice else set()
    return found


def nothing_left(crew):
    """After everybody has ended: no process, no socket, no file."""
    processes, sockets = [], []
    for namespace in crew.lab.namespaces:
        listed = subprocess.run(
            ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True
        )
        processes += listed.stdout.split()
        for kind in ("-tl", "-u", "-x"):
            shown = subprocess.run(
                ["ip", "netns", "exec", namespace, "ss", "-Hna", kind],
                capture_output=True,
                text=True,
                check=True,
            )
            sockets += shown.stdout.splitlines()
    files = [path for running in crew.everybody for path in litter(running)]
    crew.check(
        "no orphan process, socket or file",
        f"{len(processes)} processes, {len(sockets)} sockets, {len(files)} files",
        not processes and not sockets and not files,
    )


def no_trouble(crew, except_for=()):
    """No traceback and no panic in the log of a healthy part."""
    found = [
        f"{running.name}: {match.group()}"
        for running in crew.everybody
        if running not in except_for and (match := TROUBLE.search(running.log()))
    ]
    crew.check("no traceback in healthy parts", ", ".join(found) or "none", not found)


def same_weights(crew, ends):
    """All who were there at the end hold the same bits."""
    hashes = sorted({end["hash"] for end in ends})
    epochs = sorted({end["epoch"] for end in ends})
    crew.check(
        f"weights of {len(ends)} live peers equal bit for bit",
        f"{', '.join(hashes)} at epoch {', '.join(map(str, epochs))}",
        len(hashes) == 1 and len(epochs) == 1,
    )


def loss_as_alone(crew, ends, **options):
    """The held-out loss is within 2 % of plain torch in one process, with as many epochs and samples as the run took."""
    lineage = ends[0]["status"]["lineage"]
    options = {**options, "epochs": lineage["epoch"], "target": round(lineage["samples"] / lineage["epoch"])}
    reference = crew.reference(**options)
    worst = max((end["held_out"] for end in ends), key=lambda loss: abs(loss - reference))
    off = worst / reference - 1
    crew.check(
        f"loss within 2 % of one process with batches of {options['target']}",
        f"{worst:.4f} against {reference:.4f}: {off:+.2%}",
        abs(off) <= 0.02,
    )


def named_once(crew, what, peers, pattern, times=1):
    """An injected fault is one line (or `times` lines) in the log of each of these peers."""
    counts = {peer.name: len(re.findall(pattern, peer.story())) for peer in peers}
    wrong = {name: count for name, count in counts.items() if count != times}
    shown = counts if len(counts) <= 6 else wrong
    words = [f"{name} {count}" for name, count in shown.items()]
    if shown is not counts:
        words.insert(0, f"{len(counts) - len(wrong)} of {len(counts)}")
    crew.check(f"{what}: named once by each", ", ".join(words), bool(counts) and not wrong)


def gone(peer):
    """How others name a peer that went without a farewell."""
    return rf"peer {short(peer)} is gone"


def short(peer):
    """A peer's name in the logs of others."""
    return peer.said("ready")[0]["peer"][-6:]


def rounds(peer):
    """Rounds of gradients in a peer's story: epoch, with how many they were begun, and who was lost in the middle of it.

    Only those are lost in a round who were in its plan: the plan counts them, and the round goes on without them.
    """
    found = {}
    for line in peer.story().splitlines():
        if ended := AVERAGED.search(line):
            lost = [name for name, context in FAULT.findall(ended[3]) if LOST.search(context)]
            found[int(ended[1])] = (int(ended[2]), lost)
    return found


def failed_rounds(peer):
    """Epochs whose round of gradients gave this peer nothing."""
    return {int(epoch) for epoch in FAILED.findall(peer.story())}


def readings(peer):
    """Every line with figures of memory and files."""
    return peer.said("epoch") + peer.said("arrived")


def flat(crew, peers, rss_mb=8.0, fds=8):
    """Memory and open files after the first third of the epochs: the least of the last quarter is no higher than of the
    first, for each peer by itself."""
    shown, ok, span = [], bool(peers), 0.0
    for peer in peers:
        lines = readings(peer)
        warm = lines[len(lines) // 3 :]
        if len(warm) < 8:
            shown.append(f"{peer.name} only {len(lines)} readings")
            ok = False
            continue
        span = max(span, (lines[-1]["at"] - lines[0]["at"]) / 60)
        early, late = warm[: len(warm) // 4], warm[-(len(warm) // 4) :]
        grown = (min(line["rss_kb"] for line in late) - min(line["rss_kb"] for line in early)) / 1024
        opened = min(line["fds"] for line in late) - min(line["fds"] for line in early)
        shown.append(f"{peer.name} {grown:+.1f} MiB {opened:+d}")
        ok = ok and grown < rss_mb and opened < fds
    # What is under 1 MB an hour cannot be told from nothing in a few minutes.
    short_of = f"; {span:.1f} min, too short for a slope" if span < SLOPE_MINUTES else ""
    crew.check(
        f"memory, open files flat (under {rss_mb:.0f} MiB, {fds} files{short_of})",
        ", ".join(shown) or "nobody",
        ok,
    )


def slope(lines, what="rss_kb", unit=1024 / 1e6, blocks=12):
    """How fast a figure grows after the first third, per hour, and the half width of its 95 % interval; None without data.

    A straight line through the least of each of twelve stretches: single readings lie together in time and are not
    independent, and a heap's high-water marks come and go.
    """
    warm = lines[len(lines) // 3 :]
    size = len(warm) // blocks
    if size == 0:
        return None
    stretches = [warm[at * size : (at + 1) * size] for at in range(blocks)]
    hours = [sum(line["at"] for line in stretch) / size / 3600 for stretch in stretches]
    least = [min(line[what] for line in stretch) * unit for stretch in stretches]
    mean_hours, mean_least = sum(hours) / blocks, sum(least) / blocks
    spread = sum((hour - mean_hours) ** 2 for hour in hours)
    rise = sum((h - mean_hours) * (m - mean_least) for h, m in zip(hours, least, strict=True)) / spread
    left = sum((m - mean_least - rise * (h - mean_hours)) ** 2 for h, m in zip(hours, least, strict=True))
    # Student's t for ten degrees of freedom.
    return rise, 2.228 * (left / (blocks - 2) / spread) ** 0.5


def no_leak(crew, what, peers):
    """Memory grows by less than 1 MB an hour, and open files by less than 6 (one more is 4.5 an hour in half an hour).

    What fails is a rise that is above its bound for certain: the whole interval of 95 %. Where the whole interval is
    below, that is shown; else it is not refuted, which the table says. It can fail from `--minutes 60` on: before, caches
    still fill. Without figures it fails always.
    """
    binding = crew.minutes >= 60
    for name, kind, unit, bound, of in (
        ("memory", "rss_kb", 1024 / 1e6, 1.0, "MB/h"),
        ("open files", "fds", 1, 6.0, "files/h"),
    ):
        shown, ok = [], bool(peers)
        for peer in peers:
            found = slope(readings(peer), kind, unit)
            if found is None:
                shown.append(f"{peer.name} no figures")
                ok = False
                continue
            rise, width = found
            verdict = (
                "shown" if rise + width < bound else "REFUTED" if rise - width >= bound else "not refuted"
            )
            ok = ok and not (binding and verdict == "REFUTED")
            held = slope(readings(peer), "heap_kb", unit) if kind == "rss_kb" else None
            allocated = f" (allocated {held[0]:+.1f} ± {held[1]:.1f})" if held else ""
            shown.append(f"{peer.name} {rise:+.1f} ± {width:.1f}{allocated} {verdict}")
        crew.check(
            f"{what}: {name} under {bound:.0f} {of}; fails if rise - width is above"
            f"{'' if binding else ', from --minutes 60 on'}",
            ", ".join(shown) or "nobody",
            ok,
        )


def all_of_them(crew, ends, peers, except_for=(), **options):
    """The rules that hold for every scenario. Call it when everybody has ended."""
    same_weights(crew, ends)
    loss_as_alone(crew, ends, **options)
    no_trouble(crew, except_for)
    flat(crew, peers)
