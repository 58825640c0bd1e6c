"""Starts the peers as separate processes, lets one join late, kills one, and listens to them."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from potluck.demo._invite import joining_line
from potluck.demo._scale import Scale
from potluck.demo._story import PeerStory, Story
from potluck.demo._view import View

# A run that makes no progress for this long is over.
_STALLED_SECONDS = 120.0
_FINISH_SECONDS = 30.0


class DemoFailed(Exception):
    """A peer ended early or the run stalled; the message says which and where its log is."""


class _Process:
    """One child with its event stream."""

    def __init__(self, name: str, arguments: list[str], logs: Path, inbox: queue.Queue) -> None:
        self.name = name
        self.log_path = logs / f"{name.replace(' ', '-')}.log"
        self._log = self.log_path.open("w")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        for variable in ("POTLUCK_TOKEN", "INITIAL_PEERS", "PL_INITIAL_PEERS"):
            environment.pop(variable, None)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "potluck.demo", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    def _read(self, inbox: queue.Queue) -> None:
        for line in self.child.stdout:
            if line.startswith("{"):
                inbox.put((self.name, json.loads(line)))
        inbox.put((self.name, {"kind": "gone"}))

    def tell(self, words: str) -> None:
        """Send the peer a line."""
        try:
            self.child.stdin.write(f"{words}\n")
            self.child.stdin.flush()
        except (BrokenPipeError, OSError):
            pass  # it is already gone, which its event stream reports

    def close(self) -> None:
        """End the process if it has not ended, and everything that belongs to it."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(_FINISH_SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
        self.child.wait()
        self._reader.join(_FINISH_SECONDS)
        self.child.stdin.close()
        self.child.stdout.close()
        self._log.close()

    def log_tail(self) -> str:
        """The end of what the peer wrote to stderr."""
        return "".join(self.log_path.read_text(errors="replace").splitlines(keepends=True)[-15:])


class Director:
    """Runs the demonstration from the first peer to the last."""

    def __init__(self, scale: Scale, options: list[str], logs: Path, view: View) -> None:
        self._scale = scale
        self._options = options
        self._logs = logs
        self._view = view
        self._inbox: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._processes: dict[str, _Process] = {}
        self._loaded: set[str] = set()
        self._ready: set[str] = set()
        self.story = Story(scale.epochs, scale.join_epoch)
        self.join: str | None = None

    def run(self, reference: bool) -> Story:
        """Peers first, then the same training in one plain process."""
        try:
            for name in ("peer A", "peer B", "peer C"):
                self._start(name)
            self._open("peer A", "starts")
            self._listen(lambda: self.join is not None)
            self._view.invite(joining_line(self.join, self._options))
            self._open("peer B", "starts")
            self._listen(lambda: {"peer A", "peer B"} <= self._ready)
            self._tell("peer A", "train")
            self._tell("peer B", "train")
            self._listen(lambda: self.story.epoch >= self._scale.join_epoch)
            self._open("peer C", "joins the running training")
            self._tell("peer C", "train")
            self._listen(lambda: self._may_kill() or self._complete())
            if not self._complete():
                self._kill("peer B")
            self._listen(self._complete)
            self._dismiss()
            if reference:
                self._run_plain()
        finally:
            for process in self._processes.values():
                process.close()
        return self.story

    def _may_kill(self) -> bool:
        newcomer = self.story.peers["peer C"]
        return self.story.epoch >= self._scale.kill_epoch and newcomer.samples > 0

    def _complete(self) -> bool:
        return all(peer.arrived for peer in self.story.survivors)

    def _start(self, name: str) -> None:
        """Load the program; the peer takes part when it is told to open."""
        self.story.peers[name] = PeerStory(name)
        arguments = [
            "--host" if name == "peer A" else "--join=later",
            "--events",
            "--threads",
            "1",
            *self._options,
        ]
        self._processes[name] = _Process(name, arguments, self._logs, self._inbox)

    def _open(self, name: str, how: str) -> None:
        self._listen(lambda: name in self._loaded)
        self._view.happened(f"{name} {how}")
        self._tell(name, "open" if self.join is None else f"open {self.join}")

    def _tell(self, name: str, words: str) -> None:
        self._processes[name].tell(words)

    def _kill(self, name: str) -> None:
        # Recorded first, so that the end of its stream is not taken for a failure.
        self.story.peers[name].killed_at = self.story.epoch
        self._processes[name].child.kill()
        self._view.happened(f"{name} is killed (SIGKILL)")

    def _dismiss(self) -> None:
        for peer in self.story.survivors:
            self._tell(peer.name, "leave")
        self._listen(lambda: all(peer.digest is not None for peer in self.story.survivors))

    def _run_plain(self) -> None:
        self._view.happened("the same training in one plain process, for comparison")
        self.story.plain = PeerStory("plain", joined_at=0)
        arguments = ["--plain", "--events", "--threads", "1", *self._options]
        self._processes["plain"] = _Process("plain", arguments, self._logs, self._inbox)
        for words in ("open", "train", "leave"):
            self._tell("plain", words)
        self._listen(lambda: self.story.plain is not None and self.story.plain.digest is not None)

    def _listen(self, until: Any) -> None:
        """Take in events until the condition holds."""
        deadline = time.monotonic() + _STALLED_SECONDS
        while not until():
            try:
                name, event = self._inbox.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise DemoFailed(
                        f"nothing happened for {_STALLED_SECONDS:.0f} s; logs: {self._logs}"
                    ) from None
                continue
            deadline = time.monotonic() + _STALLED_SECONDS
            self._take(name, event)
            self._view.draw(self.story)

    def _take(self, name: str, event: dict[str, Any]) -> None:
        teller = self.story.plain if name == "plain" else self.story.peers[name]
        if event["kind"] == "open":
            self.join = self.join or event["join"]
        elif event["kind"] == "loaded":
            self._loaded.add(name)
        elif event["kind"] == "ready":
            self._ready.add(name)
        elif event["kind"] != "gone":
            teller.take(event)
        elif teller.killed_at is None and teller.digest is None:
            process = self._processes[name]
            raise DemoFailed(f"{name} ended early (exit code {process.child.wait()}):\n{process.log_tail()}")
