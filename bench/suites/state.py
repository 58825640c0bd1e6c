"""g. State download: 400 MB from one and from three donors."""

from collections.abc import Iterator

from harness import PeerDied, Swarm, systems
from network import Links, missing
from table import Row, failed, share

MEGABYTES, DOWN = 400, 400
WHOLE = "headers leave room for 95 %; what else is missing was not looked into"
SHARED = WHOLE + "; with three donors it is half a second more"


def state(quick: bool) -> Iterator[Row]:
    """A newcomer's download against its link; three donors have a third of that link each, and have to share the work."""
    size = 40 if quick else MEGABYTES
    for donors in (1, 3):
        what = f"{size} MB, {donors} donor{'s' if donors > 1 else ''}"
        if why := missing():
            yield failed("state", what, ">= 0.9", why)
            continue
        up = DOWN / donors
        found, why = {}, {}
        for system in systems("potluck", "hivemind"):
            try:
                found[system] = _download(system, donors, up, size)
            except PeerDied as died:
                why[system] = str(died)
        if "potluck" not in found:
            yield failed("state", what, ">= 0.9", why["potluck"])
            continue
        part = {name: size * 8 / DOWN / seconds for name, seconds in found.items()}
        yield share(
            "state", f"{what}: share of the link", part["potluck"], 0.9, peer=part.get("hivemind"), peer_name="hivemind",
            note=f"{found['potluck']:.1f} / {found.get('hivemind', 0):.1f} s of load_state_from_peers() at {DOWN} Mbit/s down, donors "
            f"{up:.0f} up; the state's own bytes, of which headers leave room for 95 %" + why.get("hivemind", ""),
            details={"seconds": found},
        ).because(SHARED if donors > 1 else WHOLE)  # fmt: skip


def _download(system: str, donors: int, up: float, size: int) -> float:
    seeds = lambda rank: {"seed": int(rank == donors)}
    with Links(donors + 1, 1000) as net:
        for donor in net.hosts[:donors]:
            donor.rate(up, 1000)
        net.hosts[donors].rate(DOWN, DOWN)
        with Swarm("trainer", system, donors, net.hosts, seeds, ballast=size, target=64, pace=0.05) as swarm:
            givers = list(swarm.workers)
            for worker in givers:
                worker.tell("train")
            # It loads its programs while the others train.
            newcomer = swarm.start(donors, net.hosts[donors])
            for worker in givers:
                while worker.report("step", 120)["epoch"] < 1:
                    pass
            newcomer.loaded()
            for worker in givers:
                worker.tell("pause")
            for worker in givers:
                worker.report("paused", 180)
            swarm.open(newcomer)
            report = newcomer.ask("load", "sum", 300)
            # The newcomer began with other extra tensors.
            right = size * 250_000 // 1000 * 499_500
            if not report["ok"] or report["sum"] != right:
                raise PeerDied(f"{system}: what was loaded is not the donors' state")
            return report["seconds"]
