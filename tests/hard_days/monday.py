"""Day 9: everybody leaves, the keeper's machine is restarted, and on Monday two new peers go on where the run stopped."""

import signal
import subprocess
import sys

import rules
from crew import ENDLESS, HardDay

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


def keep(crew, name, host, folder, *token):
    """The keeper, always at the same address."""
    return crew.start(
        name, host, crew.potluck, "keeper", *token, "--dir", folder, "--every", "1", "--no-port-mapping",
        "--listen", "/ip4/0.0.0.0/tcp/4001",
    )  # fmt: skip


def saved(folder):
    """The newest epoch on disk."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("epoch-*")), default=-1)


def play(crew):
    """Three on Friday, two on Monday."""
    host, folder = crew.lab.public("keeper"), crew.folder / "kept"
    first = crew.peer("friday0", crew.lab.public("friday0"), seed=0, pace=0.1, **TRAINING)
    token = first.said("ready")[0]["token"]
    keeper = keep(crew, "keeper", host, folder, token)
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
    again = keep(crew, "keeper-again", host, folder)
    token = token_of(again)
    monday = [
        crew.peer(
            f"monday{seed}", crew.lab.public(f"monday{seed}"), join=token, seed=seed, pace=0.1, **TRAINING
        )
        for seed in (5, 6)
    ]
    start = [peer.wait("epoch")["epoch"] for peer in monday]
    crew.check("Monday begins where Friday ended", f"{last}, then {start}", min(start) >= last)
    crew.until(monday, MONDAY)
    ends = crew.finish(monday)
    exported = crew.folder / "weights.pt"
    made = subprocess.run(
        [crew.potluck, "export", str(folder), "--output", str(exported)], capture_output=True, text=True
    )
    crew.check("export works", made.stderr.strip()[:80] or "yes", made.returncode == 0)
    read = subprocess.run([sys.executable, "-c", READ, str(exported)], capture_output=True, text=True)
    crew.check("plain torch loads it", read.stdout.strip() or read.stderr.strip()[-80:], read.returncode == 0)
    rules.all_of_them(crew, ends, monday, **TRAINING)
