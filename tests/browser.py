"""A headless Chromium that a test drives over a pipe, by the DevTools protocol alone."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
    "--use-gl=angle", "--use-angle=swiftshader", "--no-first-run", "--single-process", "--no-zygote",
)  # fmt: skip


def find_chromium() -> str:
    """The program that CHROMIUM names, or one on the path; the test is skipped where there is none."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        pytest.skip("needs a Chromium: on the PATH, or named by the variable CHROMIUM")
    return found


class Browser:
    """One page. Network requests that it makes are listed in `requests`, script errors in `errors`."""

    def __init__(self, profile: Path) -> None:
        inner_read, self._out = os.pipe()
        self._in, inner_write = os.pipe()
        program = [
            find_chromium(),
            *FLAGS,
            "--window-size=1280,900",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{inner_read} 4>&{inner_write}', *program],
            pass_fds=(inner_read, inner_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inner_read)
        os.close(inner_write)
        self._read, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.dialogs = 0
        pages = [t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def open(self, path: Path) -> float:
        """Loads a file; returns the seconds until the page has been drawn."""
        started = time.monotonic()
        self._call("Page.navigate", url=path.resolve().as_uri())
        ready = "document.readyState === 'complete' && location.protocol === 'file:'"
        while not self.value(ready):
            time.sleep(0.01)
        self._drawn()
        return time.monotonic() - started

    def _drawn(self) -> None:
        """Waits for two frames."""
        self.value(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        )

    def value(self, expression: str):
        """The value of a JavaScript expression, awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point(self, selector: str, kind: str = "click") -> None:
        """Moves the mouse onto the first such element, and presses it there."""
        where = f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center'}}); const b = e.getClientRects()[0];
            return [b.left + b.width / 2, b.top + b.height / 2]; }})()"""
        x, y = self.value(where)
        moves = ["mouseMoved"] if kind == "move" else ["mouseMoved", "mousePressed", "mouseReleased"]
        for move in moves:
            pressed = {} if move == "mouseMoved" else {"button": "left", "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=move, x=x, y=y, **pressed)
        self._drawn()

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                block = os.read(self._in, 1 << 20)
                assert block, "the browser has ended"
                self._read += block
            text, _, self._read = self._read.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, params: dict) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.dialogs += 1
