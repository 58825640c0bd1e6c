"""Day 9: everybody leaves, the keeper's machine is restarted, and on Monday new peers go on where the run stopped.

Over the weekend a newer patch version has come out: the keeper and the first peers of Monday run it. One that comes later
has not been updated and trains with them.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys

import rules
from crew import ENDLESS, HardDay
from newer import Newer

TITLE = "all gone, then Monday"
TRAINING = {"epochs": ENDLESS, "target": 256}
FRIDAY, MONDAY = 25, 60
READ = "import sys, torch; state = torch.load(sys.argv[1]); print(sum(v.numel() for v in state.values()))"


def token_of(keeper):
    """The token that the keeper printed."""

    def found(line):
        return "potluck1" in str(line)

    line = keeper.wait("text", found)
    words = str(line.get("text") or line.get("token")).split()
    return next(word for word in words if word.startswith("potluck1"))


def keep(crew, name, host, command, folder, *token):
    """The keeper, always at the same address. Its log says which program every peer says that it is."""
    return crew.start(
        name, host, "env", "POTLUCK_LOG=warn,potluck::net=debug", command, "keeper", *token, "--dir", folder,
        "--every", "1", "--no-port-mapping", "--listen", "/ip4/0.0.0.0/tcp/4001",
    )  # fmt: skip


def saved(folder):
    """The newest epoch on disk."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("epoch-*")), default=-1)


def momenta(folder, epoch):
    """A hash of each of the optimizer's tensors in the checkpoint of an epoch, as peers say them."""
    (checkpoint,) = folder.glob(f"epoch-{epoch:012d}")
    content = (checkpoint / "state.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = {
        name: at["data_offsets"] for name, at in json.loads(content[8:begin]).items() if name[:4] == "opt."
    }
    return {
        name: hashlib.sha256(content[begin + first : begin + end]).hexdigest()
        for name, (first, end) in places.items()
    }


def versions(crew, newer, friday, monday, late, keepers):
    """Who ran what, as they say it of themselves, and as the peers on the other machines were told."""
    said = [{peer.said("ready")[0]["version"] for peer in peers} for peers in (friday, monday, [late])]
    tools = [
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
        for command in (crew.potluck, newer.command)
    ]
    crew.check(
        "Friday's version, Monday's, the late one's; the keepers'",
        f"{', '.join(min(some) for some in said)}; {', '.join(tools)}",
        said == [{newer.was}, {newer.version}, {newer.was}] and tools == [newer.was, newer.version],
    )
    told = [set(re.findall(r"program=\S*?potluck/([\d.]+)", keeper.log())) for keeper in keepers]
    crew.check(
        "what the keepers were told over the wire",
        "; ".join(" and ".join(sorted(some)) for some in told),
        told == [{newer.was}, {newer.was, newer.version}],
    )


def restart(crew, host, folder, last):
    """Monday: the keeper is back at its address, and two peers of the newer version join by the token that it prints."""
    newer = Newer(crew)
    again = keep(crew, "keeper-again", host, newer.command, folder)
    token = token_of(again)
    kept = momenta(folder, last)
    options = {"join": token, "pace": 0.1, **TRAINING}
    first = newer.peer("monday5", crew.lab.public("monday5"), seed=5, **options)
    loaded = first.wait("loaded")
    crew.check("Monday begins where Friday ended", f"{last}, then {loaded['epoch']}", loaded["epoch"] == last)
    same = sum(loaded["state"].get(name) == found for name, found in kept.items())
    crew.check(
        "the optimizer's state is the checkpoint's, bit for bit",
        f"{same} of {len(kept)} tensors, {len(loaded['state'])} loaded",
        0 < len(kept) == same == len(loaded["state"]),
    )
    monday = [first, newer.peer("monday6", crew.lab.public("monday6"), seed=6, **options)]
    began = [peer.wait("epoch")["epoch"] for peer in monday]
    # Nobody else is there: whoever joins later starts at most as far ahead as those before it have come.
    most = first.epoch
    crew.check(
        "the count of epochs goes on",
        f"from {last}: {began}, {most} so far",
        last <= min(began) <= max(began) <= most + 1,
    )
    late = crew.peer("late", crew.lab.public("late"), seed=7, **options)
    late.wait("epoch", lambda line: line["peers"] >= 3)
    return newer, again, monday, late


def play(crew):
    """Three on Friday, three on Monday."""
    host, folder = crew.lab.public("keeper"), crew.folder / "kept"
    first = crew.peer("friday0", crew.lab.public("friday0"), seed=0, pace=0.1, **TRAINING)
    token = first.said("ready")[0]["token"]
    keeper = keep(crew, "keeper", host, crew.potluck, folder, token)
    friday = [first]
    friday += [
        crew.peer(
            f"friday{seed}", crew.lab.public(f"friday{seed}"), join=token, seed=seed, pace=0.1, **TRAINING
        )
        for seed in (1, 2)
    ]
    first.wait("epoch", lambda line: line["epoch"] >= FRIDAY and line["peers"] >= 3)
    for peer in friday:
        peer.order("leave")
    for peer in friday:
        if peer.end():
            raise HardDay(f"{peer.name} ended badly")
    last = max(peer.last("end")["epoch"] for peer in friday)
    crew.wait("the last epoch on the keeper's disk", lambda: saved(folder) >= last)
    keeper.signal(signal.SIGTERM)
    code = keeper.end()
    crew.check("the keeper ends at SIGTERM", f"code {code}", code == 0)
    newer, again, monday, late = restart(crew, host, folder, last)
    versions(crew, newer, friday, monday, late, (keeper, again))
    monday.append(late)
    end = crew.until(monday, MONDAY)
    ends = crew.finish(monday)
    lineage = ends[0]["status"]["lineage"]
    each = lineage["samples"] / lineage["epoch"]
    crew.check(
        "the history goes on over the weekend",
        f"{last} to {lineage['epoch']}, {end} asked for; {each:.0f} samples each",
        last < end <= lineage["epoch"] <= end + 1 and TRAINING["target"] <= each < 1.5 * TRAINING["target"],
    )
    exported = crew.folder / "weights.pt"
    made = subprocess.run(
        [newer.command, "export", str(folder), "--output", str(exported)], capture_output=True, text=True
    )
    crew.check("export works", made.stderr.strip()[:80] or "yes", made.returncode == 0)
    read = subprocess.run([sys.executable, "-c", READ, str(exported)], capture_output=True, text=True)
    crew.check("plain torch loads it", read.stdout.strip() or read.stderr.strip()[-80:], read.returncode == 0)
    rules.all_of_them(crew, ends, monday, **TRAINING)
