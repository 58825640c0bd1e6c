"""One hivemind 1.1.12 peer: all-reduce rounds and DHT calls. Runs in hivemind's own environment."""

import argparse
import threading
import time

import hivemind
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.compression import (
    Float16Compression,
    NoCompression,
    Uniform8BitQuantization,
)
from hivemind.optim.power_sgd_averager import PowerSGDGradientAverager

import common

SCHEMES = {
    "none": NoCompression,
    "float16": Float16Compression,
    "uniform8": Uniform8BitQuantization,
}


def make_averager(args, dht, parts):
    options = dict(
        dht=dht,
        prefix="bench",
        start=True,
        min_matchmaking_time=args.matchmaking_time,
        request_timeout=min(1.0, args.matchmaking_time / 2),
        target_group_size=None,
        min_group_size=args.peers,
    )
    if args.scheme == "powersgd":
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in parts]
        for parameter, tensor in zip(parameters, parts):
            parameter.grad = tensor.clone()
        return PowerSGDGradientAverager(parameters, averager_rank=4, **options)
    return hivemind.DecentralizedAverager(parts, compression=SCHEMES[args.scheme](), **options)


def one_round(averager):
    """A step; the transfer alone is timed from the stage in which the all-reduce runs, as hivemind reports it."""
    control = averager.step(wait=False, timeout=120, allow_retries=False)
    stages = {}
    done = threading.Event()

    def watch():
        while not done.is_set():
            stages.setdefault(control.stage, time.perf_counter())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ok = control.result(120) is not None
    end = time.perf_counter()
    done.set()
    watcher.join()
    began = stages.get(AveragingStage.RUNNING_ALLREDUCE, end)
    return ok, end - began


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--scheme", default="none")
    parser.add_argument("--join", default=None)
    parser.add_argument("--listen", default="127.0.0.1")
    parser.add_argument("--matchmaking-time", type=float, default=2.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dht = hivemind.DHT(
        initial_peers=[args.join] if args.join else [],
        host_maddrs=[f"/ip4/{args.listen}/tcp/0"],
        start=True,
    )
    parts = common.tensors(args.numel, args.rank)
    averager = make_averager(args, dht, parts)
    common.say(
        ready=True,
        address=str(dht.get_visible_maddrs()[0]),
        memory=common.memory_bytes(),
    )
    while (word := common.hear()) != "stop":
        if word == "round":
            with common.Meter() as meter:
                ok, transfer = one_round(averager)
            common.say(
                ok=ok,
                seconds=meter.seconds,
                transfer=transfer,
                cpu=meter.cpu,
                memory=common.memory_bytes(),
            )
        elif word == "dht":
            common.say(**dht_calls(dht))
        else:
            common.say(error=f"unknown word {word!r}")
    averager.shutdown()
    dht.shutdown()
    common.finish()


def dht_calls(dht, count=50):
    """Mean seconds of a store and of a get, one after the other."""
    start = time.perf_counter()
    for index in range(count):
        dht.store(
            f"key{index}",
            index,
            hivemind.get_dht_time() + 60 if hasattr(hivemind, "get_dht_time") else time.time() + 60,
        )
    stored = time.perf_counter()
    for index in range(count):
        dht.get(f"key{index}", latest=True)
    end = time.perf_counter()
    return dict(store=(stored - start) / count, get=(end - stored) / count)


if __name__ == "__main__":
    main()
