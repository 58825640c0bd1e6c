"""The pass rules that every hard day shares. Each adds one line to the table of a crew."""

import re
import subprocess

TROUBLE = re.compile(r"Traceback|panicked at|Task exception|InvalidStateError")


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
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    crew.check(f"{what}: named once by each", shown, all(count == times for count in counts.values()))


def flat(crew, peers, rss_mb=8.0, fds=8):
    """Memory and open files after the first third of the epochs: the least of the second half is no higher than theirs."""
    worst_rss = worst_fds = None
    for peer in peers:
        lines = peer.said("epoch") + peer.said("arrived")
        warm = lines[len(lines) // 3 :]
        if len(warm) < 8:
            continue
        early, late = warm[: len(warm) // 4], warm[-(len(warm) // 4) :]
        grown = (min(line["rss_kb"] for line in late) - min(line["rss_kb"] for line in early)) / 1024
        opened = min(line["fds"] for line in late) - min(line["fds"] for line in early)
        worst_rss = grown if worst_rss is None else max(worst_rss, grown)
        worst_fds = opened if worst_fds is None else max(worst_fds, opened)
    if worst_rss is None:
        crew.check("memory and open files flat", "nobody stayed long enough", False)
        return
    crew.check(
        f"memory and open files flat (under {rss_mb:.0f} MiB, {fds} files)",
        f"{worst_rss:+.1f} MiB, {worst_fds:+d} files",
        worst_rss < rss_mb and worst_fds < fds,
    )


def slope(lines, what="rss_kb", blocks=12):
    """How fast the memory grows after the first third, in MB per hour, and the half width of its 95 % interval.

    A straight line through the least of each of twelve stretches: single readings lie together in time and are not
    independent, and a heap's high-water marks come and go.
    """
    warm = lines[len(lines) // 3 :]
    size = len(warm) // blocks
    if size == 0:
        return None
    stretches = [warm[at * size : (at + 1) * size] for at in range(blocks)]
    hours = [sum(line["at"] for line in stretch) / size / 3600 for stretch in stretches]
    least = [min(line[what] for line in stretch) * 1024 / 1e6 for stretch in stretches]
    mean_hours, mean_least = sum(hours) / blocks, sum(least) / blocks
    spread = sum((hour - mean_hours) ** 2 for hour in hours)
    rise = sum((h - mean_hours) * (m - mean_least) for h, m in zip(hours, least, strict=True)) / spread
    left = sum((m - mean_least - rise * (h - mean_hours)) ** 2 for h, m in zip(hours, least, strict=True))
    # Student's t for ten degrees of freedom.
    return rise, 2.228 * (left / (blocks - 2) / spread) ** 0.5


def no_leak(crew, what, peers):
    """Memory grows by less than 1 MB an hour. It is a rule from half an hour on: before, caches still fill."""
    found = {}
    for kind in ("rss_kb", "heap_kb"):
        slopes = [slope(peer.said("epoch") + peer.said("arrived"), kind) for peer in peers]
        found[kind] = max(filter(None, slopes), default=(0.0, float("inf")))
    (rise, width), (held, held_width) = found.values()
    binding = crew.minutes >= 60
    crew.check(
        f"{what}: memory's slope{' under 1 MB/h' if binding else ' (a rule from --minutes 60 on)'}",
        f"{rise:+.1f} ± {width:.1f} MB/h (95 %), of what is allocated {held:+.1f} ± {held_width:.1f}",
        not binding or rise - width < 1.0,
    )


def all_of_them(crew, ends, peers, except_for=(), **options):
    """The rules that hold for every scenario. Call it when everybody has ended."""
    same_weights(crew, ends)
    loss_as_alone(crew, ends, **options)
    no_trouble(crew, except_for)
    flat(crew, peers)
