"""A stranger at a node's door, with many addresses: 1,000 connections at a time that send random bytes, or one byte a
second, or more than a message may have, or nothing at all.

Usage: stranger.py ADDRESS PORT SECONDS SOURCE... Prints one JSON line when 1,000 have stood, one at the end: at a word on
stdin, or after so many seconds. Whoever is thrown out comes again.
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
MANNERS = ("noise", "drip", "oversize", "mute")


class Flood:
    """The connections, and what became of them."""

    def __init__(self, address, port, sources):
        self.where, self.sources = (address, port), sources
        self.chooser, self.noise = selectors.DefaultSelector(), random.Random(5)
        self.tried = self.stood = self.most = self.sent = 0
        self.ended = dict.fromkeys(MANNERS, 0)
        # Not answered yet, and those that stand; by the manner of each.
        self.knocking, self.standing = {}, {}

    def knock(self):
        """One more, from the next address."""
        door = socket.socket()
        door.setblocking(False)
        door.bind((self.sources[self.tried % len(self.sources)], 0))
        door.connect_ex(self.where)
        self.chooser.register(door, selectors.EVENT_WRITE)
        # Of each address' connections, each manner gets a part.
        self.knocking[door] = MANNERS[self.tried // len(self.sources) % len(MANNERS)]
        self.tried += 1

    def answered(self, door):
        """It stands, or nobody was there."""
        manner = self.knocking.pop(door)
        if door.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.forget(door)
            return
        self.standing[door] = manner
        self.stood += 1
        self.most = max(self.most, len(self.standing))
        talks = manner in ("noise", "oversize")
        self.chooser.modify(door, selectors.EVENT_READ | (selectors.EVENT_WRITE if talks else 0))

    def talk(self, door, events):
        """What this one does when the node has read or said something."""
        manner = self.standing[door]
        try:
            if events & selectors.EVENT_WRITE and manner == "noise":
                self.sent += door.send(self.noise.randbytes(4096))
            elif events & selectors.EVENT_WRITE:
                # multistream-select's longest length, then as much as it takes.
                self.sent += door.send(b"\xff\xff\xff\x7f" + bytes(65536))
            if events & selectors.EVENT_READ and not door.recv(65536):
                raise ConnectionError
        except BlockingIOError:
            return
        except OSError:
            self.end(door)

    def drip(self):
        """One byte of each of those that send one a second."""
        for door in [door for door, manner in self.standing.items() if manner == "drip"]:
            try:
                self.sent += door.send(b"\x13")
            except BlockingIOError:
                continue
            except OSError:
                self.end(door)

    def end(self, door):
        """The node has closed it."""
        self.ended[self.standing.pop(door)] += 1
        self.forget(door)

    def forget(self, door):
        """Nothing of it stays."""
        self.chooser.unregister(door)
        door.close()


def say(kind, flood):
    """One line to the runner."""
    figures = {"tried": flood.tried, "stood": flood.stood, "most": flood.most, "sent": flood.sent}
    print(json.dumps({"kind": kind, **figures, "closed": flood.ended}), flush=True)


def main():
    """Flood for as long as asked."""
    address, port, seconds, *sources = sys.argv[1:]
    flood = Flood(address, int(port), sources)
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    began = time.monotonic()
    dripped, said = began, False
    while (now := time.monotonic()) < began + float(seconds) and not told.is_set():
        while len(flood.knocking) + len(flood.standing) < CONNECTIONS and flood.tried < RATE * (now - began):
            flood.knock()
        for key, events in flood.chooser.select(0.05):
            if key.fileobj in flood.knocking:
                flood.answered(key.fileobj)
            else:
                flood.talk(key.fileobj, events)
        if now >= dripped + 1:
            dripped = now
            flood.drip()
        if flood.stood >= CONNECTIONS and not said:
            said = True
            say("open", flood)
    say("end", flood)


if __name__ == "__main__":
    main()
