"""One peer of potluck or of hivemind 1.1.12: all-reduce rounds and DHT calls, the same calls to both."""

import argparse
import importlib
import json
import threading
import time

import torch

import common

SCHEMES = {"none": "NoCompression", "float16": "Float16Compression", "uniform8": "Uniform8BitQuantization"}
# A round takes up to 10 s where it works; one that does not must not take the others' time.
ROUND_SECONDS = 30


class Peer:
    """The DHT and, once a scheme is chosen, the averager."""

    def __init__(self, given):
        self.given = given
        self.system = importlib.import_module(given.system)
        self.power = importlib.import_module(f"{given.system}.optim.power_sgd_averager")
        self.averager = None
        self.dht = common.join(self.system, given, common.opened())
        self.parts = common.tensors(given.numel, given.rank)

    def resize(self, numel: int, window: float, peers: int):
        """Tensors of another size from the next scheme on, how long hivemind looks for a group, and its size."""
        self.given.numel, self.given.matchmaking_time, self.given.peers = numel, window, peers
        self.parts = common.tensors(numel, self.given.rank)

    def choose(self, scheme: str):
        """A new averager that compresses so."""
        if self.averager is not None:
            self.averager.shutdown()
        options = {
            "dht": self.dht,
            "prefix": f"bench-{scheme}-{self.given.numel}-{self.given.peers}",
            "start": True,
            "min_group_size": self.given.peers,
        }
        if self.given.system == "hivemind":
            window = self.given.matchmaking_time
            # hivemind requires the timeout of a request to be shorter than the search for a group.
            options |= {"min_matchmaking_time": window, "request_timeout": min(3.0, window / 2)}
        if scheme == "powersgd":
            parameters = [torch.nn.Parameter(tensor.clone()) for tensor in self.parts]
            for parameter, tensor in zip(parameters, self.parts):
                parameter.grad = tensor.clone()
            self.averager = self.power.PowerSGDGradientAverager(parameters, averager_rank=4, **options)
            return
        codec = getattr(importlib.import_module(f"{self.given.system}.compression"), SCHEMES[scheme])()
        self.averager = self.system.DecentralizedAverager(self.parts, compression=codec, **options)

    def round(self) -> dict:
        """One step of the averager as users call it; `transfer` is the part after the group has been found."""
        if hasattr(self.averager, "accumulate_grads_"):
            # What was not accumulated has no weight.
            self.averager.accumulate_grads_(batch_size=1)
        with common.Meter() as meter:
            ok, transfer = (hivemind_round if self.given.system == "hivemind" else potluck_round)(self)
        return {
            "ok": ok,
            "seconds": meter.seconds,
            "transfer": min(transfer, meter.seconds),
            "cpu": meter.cpu,
        }

    def dht_stores(self, count: int) -> dict:
        """Mean seconds of a store, one after the other."""
        until = importlib.import_module(f"{self.given.system}.utils").get_dht_time() + 120
        start = time.perf_counter()
        stored = [bool(self.dht.store(f"key{i}", i, until)) for i in range(count)]
        return {"store": (time.perf_counter() - start) / count, "missing": stored.count(False)}

    def dht_gets(self, count: int) -> dict:
        """Mean seconds of a get of what another peer has stored; what is not found is an error, not a fast call."""
        start = time.perf_counter()
        found = [self.dht.get(f"key{i}", latest=True) for i in range(count)]
        seconds = (time.perf_counter() - start) / count
        right = [value is not None and value.value == i for i, value in enumerate(found)]
        return {"get": seconds, "missing": right.count(False)}


def potluck_round(peer):
    """All of the step but finding the group: hivemind's figure has its copies and checks in it too."""
    start = time.perf_counter()
    gathered = peer.averager.step(timeout=ROUND_SECONDS)
    seconds = time.perf_counter() - start
    stats = json.loads(peer.averager.session.status()).get("last_round") or {}
    complete = gathered is not None and len(gathered) == peer.given.peers
    return complete, seconds - stats.get("gather_seconds", 0.0)


def hivemind_round(peer):
    """Timed from the stage in which the all-reduce runs, as hivemind reports it."""
    control = peer.averager.step(wait=False, timeout=ROUND_SECONDS, allow_retries=False)
    running = importlib.import_module("hivemind.averaging.control").AveragingStage.RUNNING_ALLREDUCE
    stages = {}
    done = threading.Event()

    def watch():
        while not done.is_set():
            stages.setdefault(control.stage, time.perf_counter())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        ok = control.result(ROUND_SECONDS) is not None
    except Exception as error:  # hivemind raises what ended the round: a failed round, not a broken benchmark
        common.say(note=repr(error)[:200])
        ok = False
    end = time.perf_counter()
    done.set()
    watcher.join()
    return ok, end - stages.get(running, end)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--matchmaking-time", type=float, default=5.0)
    given = common.options(parser)
    peer = Peer(given)
    common.say(ready=True, address=str(peer.dht.get_visible_maddrs()[0]))
    while (line := common.hear()) != "stop":
        word, _, rest = line.partition(" ")
        if word == "size":
            numel, window, peers = rest.split()
            peer.resize(int(numel), float(window), int(peers))
            common.say(ok=True)
        elif word == "scheme":
            peer.choose(rest)
            common.say(ok=True)
        elif word == "round":
            common.say(**peer.round())
        elif word == "peak":
            with common.Peak() as peak:
                report = peer.round()
            common.say(**report, memory=peak.bytes)
        elif word == "store":
            common.say(**peer.dht_stores(int(rest)))
        elif word == "get":
            common.say(**peer.dht_gets(int(rest)))
        else:
            raise SystemExit(f"unknown word {word!r}")
    common.finish()


if __name__ == "__main__":
    main()
