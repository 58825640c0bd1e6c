"""A headless Chromium for tests, spoken to over its DevTools pipe: no port is opened and no package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

_ANSWER_SECONDS = 30.0
# Chromium reads DevTools commands from descriptor 3 and answers on 4; ours must not be among those two.
_FIRST_FREE = 10


class Chromium:
    """One browser with one page. Everything that the page asks for and complains about is kept."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        assert program, "no chromium: install it (make setup does so for root)"
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_FREE) for fd in (theirs_in, theirs_out)]
        options = [
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            # Whatever is asked for elsewhere fails, and is seen all the same.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        redirect = f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, program, *options],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *theirs):
            os.close(fd)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._last_id, self._session = 0, ""
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(_ANSWER_SECONDS)
        self._reader.join(_ANSWER_SECONDS)
        os.close(self._write)
        os.close(self._read)

    def _listen(self) -> None:
        buffer = b""
        while chunk := os.read(self._read, 1 << 16):
            *messages, buffer = (buffer + chunk).split(b"\0")
            for message in messages:
                self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]].put(message)
            return
        parameters = message["params"]
        match message["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(json.dumps(parameters["entry"]))

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        answers = self._answers[self._last_id] = queue.Queue()
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = answers.get(timeout=_ANSWER_SECONDS)
        del self._answers[message["id"]]
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]  # type: ignore[no-any-return]

    def open(self, url: str) -> None:
        """Go to a page."""
        found = self.call("Page.navigate", url=url)
        assert "errorText" not in found, f"{url}: {found['errorText']}"

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = 60) -> Any:
        """Wait within the page until a JavaScript expression is true, and give its value."""
        step = min(seconds, _ANSWER_SECONDS / 2)
        wait = f"""new Promise(done => {{
            const end = performance.now() + {step * 1000};
            const look = () => {{
                let found = false;
                try {{ found = {condition}; }} catch (error) {{ if (!(error instanceof TypeError)) throw error; }}
                if (found || performance.now() > end) done(found); else setTimeout(look, 50);
            }};
            look();
        }})"""
        for _ in range(max(1, round(seconds / step))):
            if found := self.value(wait):
                return found
        page = self.value("document.body.innerText")
        raise AssertionError(f"not within {seconds} s: {condition}\nthe page says:\n{page}")

    def press(self, key: str, code: int) -> None:
        """Press and let go of a key that types no letter."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def look(self, width: int, height: int, scheme: str) -> None:
        """Be a screen of this size, whose owner likes pages ``light`` or ``dark``."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        preference = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=preference)

    def screenshot(self, path: Path) -> None:
        """Keep the whole page as a picture."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(data))
