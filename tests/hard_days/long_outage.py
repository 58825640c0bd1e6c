"""Day 5: one link is down for three minutes, one peer suspended, the bootstrap node gone for the whole time; then all are
back, the node with its old identity, so that the old token still lets somebody in."""

import signal
import time

import rules
from crew import ENDLESS

TITLE = "long outage"
TRAINING = {"epochs": ENDLESS, "target": 512}
LAST = 120
# Long enough that the others have missed both many times over; 40 and 10 minutes in the original story.
OUTAGE = 180.0


def play(crew):
    """Four peers, two of them in trouble."""
    where = crew.lab.public("node")
    node, token = crew.node("node", where)
    hosts = [crew.lab.public(f"peer{seed}") for seed in range(4)]
    peers = [
        crew.peer(f"peer{seed}", hosts[seed], join=token, seed=seed, batch=32, pace=0.1, **TRAINING)
        for seed in range(4)
    ]
    stay, unplugged, suspended = peers[:2], peers[2], peers[3]
    crew.wait("four peers", lambda: all((p.last("epoch") or {}).get("peers") == 4 for p in peers))
    node.signal(signal.SIGKILL)
    node.end()
    hosts[2].link(False)
    suspended.signal(signal.SIGSTOP)
    began, at = time.monotonic(), stay[0].epoch
    alone = unplugged.wait("epoch", lambda line: line["peers"] == 1, since=len(unplugged.said("epoch")))
    stay[0].wait("epoch", lambda line: line["peers"] == 2, since=len(stay[0].said("epoch")) - 1)
    crew.wait("the outage", lambda: time.monotonic() - began > OUTAGE)
    went_on = stay[0].epoch - at
    crew.check("the rest go on", f"{went_on} epochs in {OUTAGE:.0f} s", went_on >= 5)
    crew.check("the unplugged one knows", f"alone at epoch {alone['epoch']}", True)
    hosts[2].link(True)
    suspended.signal(signal.SIGCONT)
    back, before = time.monotonic(), {peer: len(peer.said("epoch")) for peer in peers}
    for peer in peers:
        peer.wait("epoch", lambda line: line["peers"] == 4, since=before[peer])
    crew.check("both return unaided", f"{time.monotonic() - back:.1f} s, no node", True)
    again, renewed = crew.node("node-again", where, identity="node")
    crew.check("the node returns as who it was", again.name, renewed == token)
    # Whoever has only the old token can come in by the node alone, and only if the others have dialled it again.
    newcomer = crew.peer(
        "newcomer", crew.lab.public("newcomer"), join=token, seed=4, batch=32, pace=0.1, **TRAINING
    )
    seen = newcomer.wait("epoch", lambda line: line["peers"] == 5)
    crew.check("a newcomer by the old token", f"{seen['peers']} peers at epoch {seen['epoch']}", True)
    everybody = [*peers, newcomer]
    crew.until(everybody, LAST)
    ends = crew.finish(everybody, 400)
    for peer in (unplugged, suspended):
        rules.named_once(crew, f"{peer.name} gone", stay, rules.gone(peer))
        # Once when it came, once when it returned.
        rules.named_once(crew, f"{peer.name} back", stay, rf"peer {rules.short(peer)} is here", times=2)
    rules.named_once(crew, "being alone", [unplugged], "ALONE at epoch")
    histories = {end["status"]["lineage"]["samples"] for end in ends}
    crew.check("one lineage", f"{len(histories)}", len(histories) == 1)
    rules.all_of_them(crew, ends, everybody, **TRAINING)
