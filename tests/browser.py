"""A browser to test pages in: Chromium, driven through the DevTools protocol."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """Return the browser's program; skip where there is none, or fail where there must be one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = f"no browser found: install one of {', '.join(NAMES)}"
        if os.environ.get("PRAXINO_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return found


@contextmanager
def launch(profile: Path, *flags: str) -> Iterator["Page"]:
    """Start a browser with an empty profile and give a page of it; end it and its children afterwards."""
    command = [find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"]
    command += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"]
    command += ["--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0", "--remote-allow-origins=*"]
    command += [f"--user-data-dir={profile}", *flags, "about:blank"]
    log = profile.with_name(profile.name + ".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=errors, stderr=errors, start_new_session=True)
    try:
        port, path = wait(lambda: (profile / "DevToolsActivePort").read_text().split())
        with Page(f"ws://127.0.0.1:{port}{path}") as page:
            yield page
            page.call("Browser.close")
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the program may be a script that starts it
        process.wait()


def wait(ready: Any, seconds: float = 60.0) -> Any:
    """Call until what comes back is true; errors of what is not there yet count as false."""
    end = time.monotonic() + seconds
    while True:
        try:
            if result := ready():
                return result
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{ready} came to nothing within {seconds} s")
        time.sleep(0.02)


class Page:
    """One page of the browser: it records what is fetched and what goes wrong.

    Attributes:
        fetched: addresses that were asked for since the page was opened.
        errors: texts of exceptions and of errors in the console.
    """

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=60)
        self.numbers, self.session = itertools.count(1), None
        self.fetched: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, content: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.fetched.append(content["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            details = content["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value", part)) for part in content["args"]))
        elif event == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")

    def open(self, path: Path, width: int = 1280, height: int = 900, **media: str) -> None:
        """Open a file in a window of a size, with media features such as `prefers_color_scheme="dark"`."""
        self.fetched, self.errors = [], []
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.resize(width, height)
        self.call("Page.navigate", url=path.resolve().as_uri())
        wait(lambda: self.run("document.readyState === 'complete' && location.protocol === 'file:'"))

    def resize(self, width: int, height: int) -> None:
        """Change the size of the window."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """Return the value of an expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", script))
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until an expression is true, and return it."""
        return wait(lambda: self.run(script), seconds)

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        code = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "End": 35, "Home": 36, " ": 32}.get(key, 0)
        if key == "Enter":
            text = {"text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page, as PNG."""
        settings: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            settings = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", format="png", **settings)["data"]))
