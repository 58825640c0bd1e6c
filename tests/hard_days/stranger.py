"""A stranger at a node's door: 1,000 connections that send random bytes, or one byte a second, or nothing at all.

Usage: stranger.py ADDRESS PORT SECONDS. Prints one JSON line when all are open, one at the end: at a word on stdin, or
after so many seconds.
"""

import json
import random
import selectors
import socket
import sys
import threading
import time

CONNECTIONS = 1000
# New ones a second: the flood is to cost the node work, not to win a race for this machine's two cores.
RATE = 500


def main():
    """Flood for as long as asked."""
    address, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    chooser, noise = selectors.DefaultSelector(), random.Random(5)
    opened = sent = closed = 0
    deadline = time.monotonic() + seconds
    alive = {}
    told, began = threading.Event(), time.monotonic()
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    while time.monotonic() < deadline and not told.is_set():
        while len(alive) < CONNECTIONS and opened < RATE * (time.monotonic() - began):
            door = socket.socket()
            door.setblocking(False)
            door.connect_ex((address, port))
            chooser.register(door, selectors.EVENT_WRITE | selectors.EVENT_READ)
            alive[door] = ("noise", "drip", "oversize", "mute")[opened % 4]
            opened += 1
            if opened == CONNECTIONS:
                print(json.dumps({"kind": "open", "connections": opened}), flush=True)
        for key, _ in chooser.select(0.05):
            door, manner = key.fileobj, alive[key.fileobj]
            try:
                if manner == "noise":
                    sent += door.send(noise.randbytes(4096))
                elif manner == "oversize":
                    # multistream-select's longest length, then as much as it takes.
                    sent += door.send(b"\xff\xff\xff\x7f" + bytes(65536))
                elif noise.random() < 0.001:
                    sent += door.send(b"\x13")
                if not door.recv(65536):
                    raise ConnectionError
            except BlockingIOError:
                continue
            except OSError:
                chooser.unregister(door)
                door.close()
                del alive[door]
                closed += 1
    print(json.dumps({"kind": "end", "opened": opened, "closed": closed, "sent": sent}), flush=True)


if __name__ == "__main__":
    main()
