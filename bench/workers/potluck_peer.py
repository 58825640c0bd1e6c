"""One potluck peer: the same calls as the hivemind worker makes, with what users get by default."""

import argparse
import json
import time

import torch

import common
import potluck
from potluck.compression import Float16Compression, NoCompression, Uniform8BitQuantization
from potluck.optim.power_sgd_averager import PowerSGDGradientAverager

SCHEMES = {"none": NoCompression, "float16": Float16Compression, "uniform8": Uniform8BitQuantization}


def make_averager(args, dht, parts):
    if args.scheme == "powersgd":
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in parts]
        for parameter, tensor in zip(parameters, parts):
            parameter.grad = tensor.clone()
        return PowerSGDGradientAverager(parameters, averager_rank=4, dht=dht, prefix="bench", start=True)
    return potluck.DecentralizedAverager(
        parts, dht, prefix="bench", compression=SCHEMES[args.scheme](), start=True, min_group_size=args.peers
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--scheme", default="none")
    parser.add_argument("--join", default=None)
    parser.add_argument("--listen", default="127.0.0.1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dht = potluck.DHT(
        initial_peers=[args.join] if args.join else [], host_maddrs=[f"/ip4/{args.listen}/tcp/0"], start=True
    )
    parts = common.tensors(args.numel, args.rank)
    averager = make_averager(args, dht, parts)
    common.say(ready=True, address=str(dht.get_visible_maddrs()[0]), memory=common.memory_bytes())
    while (word := common.hear()) != "stop":
        if word == "round":
            with common.Meter() as meter:
                gathered = averager.step(timeout=120)
            stats = json.loads(averager.session.status()).get("last_round") or {}
            common.say(
                ok=gathered is not None and len(gathered) == args.peers,
                seconds=meter.seconds,
                # All of the step but finding the group: hivemind's figure has its copies and checks in it too.
                transfer=meter.seconds - stats.get("gather_seconds", 0.0),
                wire=stats.get("bytes_sent", 0),
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
    """Mean seconds of a store and of a get, one after the other; what failed is an error, not a fast call."""
    start = time.perf_counter()
    results = [dht.store(f"key{i}", i, potluck.utils.get_dht_time() + 60) for i in range(count)]
    stored = time.perf_counter()
    found = [dht.get(f"key{i}", latest=True) for i in range(count)]
    end = time.perf_counter()
    if not all(results) or [value and value.value for value in found] != list(range(count)):
        raise RuntimeError(f"{results.count(False)} stores failed, or not everything stored was found")
    return {"store": (stored - start) / count, "get": (end - stored) / count}


if __name__ == "__main__":
    main()
