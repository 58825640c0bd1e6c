"""One torch.distributed peer with Gloo: unencrypted and of fixed membership, hence the floor of what is possible."""

import argparse

import torch
import torch.distributed as dist

import common


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peers", type=int, required=True)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--scheme", default="none")
    parser.add_argument("--join", default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    flat = torch.cat([tensor.flatten() for tensor in common.tensors(args.numel, args.rank)])
    if args.join is None:
        store = dist.TCPStore("127.0.0.1", 0, args.peers, is_master=True, wait_for_workers=False)
        common.say(address=f"{store.host}:{store.port}")
    else:
        host, port = args.join.rsplit(":", 1)
        store = dist.TCPStore(host, int(port), args.peers, is_master=False)
        common.say(address=args.join)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=args.peers)
    common.say(ready=True, memory=common.memory_bytes())
    while common.hear() != "stop":
        with common.Meter() as meter:
            dist.all_reduce(flat)
            flat /= args.peers
        common.say(
            ok=True,
            seconds=meter.seconds,
            transfer=meter.seconds,
            cpu=meter.cpu,
            memory=common.memory_bytes(),
        )
    common.finish()


if __name__ == "__main__":
    main()
