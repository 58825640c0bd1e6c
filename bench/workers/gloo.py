"""One torch.distributed peer with Gloo: unencrypted and of fixed membership, hence the floor of what is possible."""

import argparse

import torch
import torch.distributed as dist

import common


def values(numel: int, rank: int) -> torch.Tensor:
    """All values in one vector."""
    return torch.cat([tensor.flatten() for tensor in common.tensors(numel, rank)])


def main():
    given = common.options(argparse.ArgumentParser())
    flat = values(given.numel, given.rank)
    address = common.opened()
    if address is None:
        store = dist.TCPStore(given.listen, 0, given.peers, is_master=True, wait_for_workers=False)
        # The others must know before this one waits for them.
        common.say(ready=True, address=f"{store.host}:{store.port}")
    else:
        host, port = address.rsplit(":", 1)
        store = dist.TCPStore(host, int(port), given.peers, is_master=False)
    dist.init_process_group("gloo", store=store, rank=given.rank, world_size=given.peers)
    if address is not None:
        common.say(ready=True, address=address)
    while (word := common.hear()) != "stop":
        if word.startswith("size"):
            flat = values(int(word.split()[1]), given.rank)
        if word.startswith(("size", "scheme")):
            common.say(ok=True)
            continue
        with common.Meter() as meter:
            dist.all_reduce(flat)
            flat /= given.peers
        common.say(ok=True, seconds=meter.seconds, transfer=meter.seconds, cpu=meter.cpu, memory=0)
    common.finish()


if __name__ == "__main__":
    main()
