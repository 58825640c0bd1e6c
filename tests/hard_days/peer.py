"""The training program of the hard days: a small torch model, trained as a user would train it.

It prints JSON lines (`ready`, `epoch`, `arrived`, `end`, `left`) and obeys words on stdin (`leave`, `status`, `poison nan`,
`poison big`, `overflow`, `until EPOCH`, `go`). At its last epoch it holds still until it is told to leave. Without `--run` it
trains alone in plain torch: the reference.
"""

import argparse
import ctypes
import hashlib
import json
import logging
import os
import sys
import threading
import time
import zlib
from contextlib import nullcontext

import torch

CONTEXT, VOCABULARY, CROPS, HELD_OUT = 8, 128, 1 << 16, 4096


def text():
    """Contexts and next bytes out of Python's own language reference, which every Python carries; the same for all."""
    from pydoc_data.topics import topics

    joined = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    data = torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()
    starts = torch.randint(
        0, len(data) - CONTEXT - 1, (CROPS + HELD_OUT,), generator=torch.Generator().manual_seed(7)
    )
    return data[starts[:, None] + torch.arange(CONTEXT)], data[starts + CONTEXT]


def network(hidden):
    """About 12,000 parameters with 48 hidden units; the same first weights everywhere."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, 8),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * CONTEXT, hidden),
        torch.nn.Tanh(),
        torch.nn.Linear(hidden, VOCABULARY),
    )


def say(kind, **fields):
    """One line to the runner."""
    print(json.dumps({"kind": kind, "at": round(time.monotonic(), 3), **fields}), flush=True)


def digest(model):
    """A hash over every bit of every weight."""
    total = hashlib.sha256()
    for parameter in model.parameters():
        total.update(parameter.detach().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def state_hashes(optimizer):
    """A hash of each of an optimizer's tensors, named as in a keeper's checkpoint."""
    return {
        f"opt.{index}.{name}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 answers."""

    NAMES = ("arena", "free", "fast", "maps", "mapped", "most", "_", "used", "idle", "top")
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES)


try:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heap
except (OSError, AttributeError):  # another C library
    mallinfo = Heap


def resources():
    """Resident bytes that are this process's own, those of them that somebody holds, open files, threads."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    heap = mallinfo()
    return {
        "rss_kb": int(fields["RssAnon"].split()[0]),
        "heap_kb": (heap.used + heap.mapped) // 1024,
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": int(fields["Threads"]),
    }


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="name of the run; without it: plain torch")
    parser.add_argument("--join", help="token")
    parser.add_argument("--identity", help="identity file")
    parser.add_argument("--owner", help="owner of a closed run")
    parser.add_argument("--seed", type=int, default=0, help="order of the data")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--target", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--pace", type=float, default=0.02, help="seconds that a batch takes on this machine")
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--half", action="store_true", help="fp16 AMP with a gradient scaler")
    parser.add_argument("--compression", choices=("none", "float16", "8bit", "powersgd"), default="none")
    parser.add_argument("--ballast", type=int, default=0, help="MiB of extra state that newcomers load")
    parser.add_argument("--outbound-only", action="store_true")
    parser.add_argument("--hold", action="store_true", help="import everything, then wait for the word `go`")
    return parser.parse_args()


class Orders:
    """What the runner asked for, read in a thread of its own."""

    def __init__(self):
        self.leave = threading.Event()
        self.status = threading.Event()
        self.overflow = threading.Event()
        self.go = threading.Event()
        self.poison = "off"
        self.until = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in sys.stdin:
            word, _, rest = line.strip().partition(" ")
            if word == "poison":
                self.poison = rest
            elif word == "until":
                self.until = int(rest)
            else:
                getattr(self, word).set()
        self.leave.set()


class Training:
    """Model, data and one batch of work."""

    def __init__(self, options):
        self.options = options
        self.model = network(options.hidden)
        inputs, labels = text()
        self.inputs, self.labels = inputs[:CROPS], labels[:CROPS]
        self.held_inputs, self.held_labels = inputs[CROPS:], labels[CROPS:]
        self.order = torch.Generator().manual_seed(1000 + options.seed)
        self.inner = torch.optim.Adam(self.model.parameters(), lr=4e-3)

    def loss(self, size):
        """The loss of one batch."""
        chosen = torch.randint(0, CROPS, (size,), generator=self.order)
        with torch.autocast("cpu", torch.float16) if self.options.half else nullcontext():
            return torch.nn.functional.cross_entropy(
                self.model(self.inputs[chosen]).float(), self.labels[chosen]
            )

    @torch.no_grad()
    def held_out(self):
        """The loss on what is never trained on."""
        return float(torch.nn.functional.cross_entropy(self.model(self.held_inputs), self.held_labels))


def alone(training):
    """The reference: one process, the whole target batch at once."""
    for _ in range(training.options.epochs):
        training.inner.zero_grad()
        training.loss(training.options.target).backward()
        training.inner.step()
    say("end", epoch=training.options.epochs, held_out=training.held_out(), hash=digest(training.model))


def compression(name):
    """Arguments of the optimizer."""
    import potluck

    if name == "powersgd":
        from functools import partial

        # Of 12,000 parameters, rank 8 is too few: plain PowerSGD, without any fault, then ends 1.1 % above the reference.
        return {"grad_averager_factory": partial(potluck.PowerSGDGradientAverager, averager_rank=16)}
    schemes = {
        "none": potluck.NoCompression(),
        "float16": potluck.Float16Compression(),
        "8bit": potluck.SizeAdaptiveCompression(
            threshold=256, less=potluck.Float16Compression(), greater_equal=potluck.Uniform8BitQuantization()
        ),
    }
    return {"grad_compression": schemes[name]}


class Peer:
    """One peer of a run."""

    def __init__(self, training):
        import potluck

        potluck.use_hivemind_log_handler("in_hivemind")
        logging.getLogger("potluck").setLevel(logging.INFO)
        self.training, self.options, self.orders = training, training.options, Orders()
        options = self.options
        if options.hold:
            say("held")
            self.orders.go.wait()
        self.scaler = torch.amp.GradScaler("cpu") if options.half else None
        self.dht = potluck.DHT(
            initial_peers=options.join,
            start=True,
            identity_path=options.identity,
            client_mode=options.outbound_only,
        )
        extra = {}
        if options.ballast:
            # Never averaged, always part of what a newcomer loads.
            generator = torch.Generator().manual_seed(options.seed)
            self.ballast = torch.rand(options.ballast << 18, generator=generator)
            extra = {"extra_tensors": [self.ballast], "average_state_every": 1 << 30}
        self.optimizer = potluck.Optimizer(
            dht=self.dht,
            run_id=options.run,
            target_batch_size=options.target,
            batch_size_per_step=options.batch * options.accumulate,
            optimizer=training.inner,
            owner=options.owner,
            **compression(options.compression),
            **extra,
        )
        self.poisoned()
        say(
            "ready",
            peer=str(self.dht.peer_id),
            token=self.dht.token(options.run),
            version=potluck.__version__,
            gradients=[shape.numel() for shape in self.optimizer.grad_averager._flat.shapes],
            ballast=self.ballast_crc(),
        )
        self.seen = -1
        self.samples = 0

    def ballast_crc(self):
        """A checksum of the extra state, or None."""
        return zlib.crc32(self.ballast.numpy()) if self.options.ballast else None

    def poisoned(self):
        """On the word `poison`, one contribution is spoilt behind the back of every check on this side."""
        averager = self.optimizer.grad_averager
        honest = averager.load_accumulators_into_averager_

        def load():
            honest()
            poison, self.orders.poison = self.orders.poison, "off"
            if poison == "nan":
                averager._flat.views[0].fill_(float("nan"))
            elif poison == "big":
                for view in averager._flat.views:
                    view.mul_(1e6)
            if poison != "off":
                say("poisoned", epoch=self.optimizer.local_epoch, how=poison)

        averager.load_accumulators_into_averager_ = load

    def batch(self):
        """One step, as in any training loop."""
        options, optimizer = self.options, self.optimizer
        optimizer.zero_grad()
        for _ in range(options.accumulate):
            loss = self.training.loss(options.batch)
            if self.orders.overflow.is_set():
                self.orders.overflow.clear()
                loss = loss * 1e30
            scaled = loss / options.accumulate
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
        optimizer.report_loss(loss.detach())
        if self.scaler is None:
            optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            # The scaler's own word for it: it lowers the scale when it has left out a step.
            if (after := self.scaler.get_scale()) < before:
                say("overflow", before=before, after=after, samples=options.batch * options.accumulate)
        self.samples += options.batch * options.accumulate
        time.sleep(options.pace)

    def report(self, kind="epoch"):
        """How far this peer is; a line for every change of the epoch."""
        epoch = self.optimizer.local_epoch
        if kind == "epoch" and epoch == self.seen:
            return
        self.seen = epoch
        status = self.optimizer.status()
        say(
            kind,
            epoch=epoch,
            loss=status["loss"],
            peers=len(status["peers"]),
            lineage=bytes(status["lineage"]["hash"][:4]).hex(),
            state_averages=status["lineage"]["state_averages"],
            hash=digest(self.training.model),
            samples=self.samples,
            **resources(),
        )

    def answer(self):
        """Answer the word `status`."""
        if self.orders.status.is_set():
            self.orders.status.clear()
            say("status", status=self.optimizer.status())

    def train(self):
        """Train to the last epoch, hold still until everybody is there, leave."""
        self.optimizer.load_state_from_peers()
        say("loaded", epoch=self.optimizer.local_epoch, state=state_hashes(self.training.inner))
        while self.optimizer.local_epoch < (self.orders.until or self.options.epochs):
            if self.orders.leave.is_set():
                break
            self.batch()
            self.report()
            self.answer()
        shown = None
        while not self.orders.leave.wait(0.05):
            self.optimizer._follow(0)
            self.answer()
            now = (self.optimizer.local_epoch, digest(self.training.model))
            if now != shown:
                shown = now
                self.report("arrived")
        say(
            "end",
            epoch=self.optimizer.local_epoch,
            hash=digest(self.training.model),
            held_out=self.training.held_out(),
            samples=self.samples,
            ballast=self.ballast_crc(),
            status=self.optimizer.status(),
            **resources(),
        )
        self.optimizer.shutdown()
        self.dht.shutdown()
        say("left")


def main():
    """Train, as the arguments say."""
    torch.set_num_threads(1)
    options = arguments()
    training = Training(options)
    if options.run is None:
        alone(training)
    else:
        Peer(training).train()


if __name__ == "__main__":
    main()
