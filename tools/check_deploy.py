"""Open the page of a folder that `qgraph deploy` wrote in a headless Chromium, and say what came of it.

    python tools/check_deploy.py FOLDER [--screenshot page.png] [--chromium /usr/bin/chromium]

The exit code is 0 when the page's title begins with "ok": the model ran in the browser and gave the expected result.
Chromium is driven over its own debugging pipe, so nothing besides it and the standard library is needed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder on a free port of this machine, and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, chromium: str, profile: str, width: int = 1000, height: int = 900):
        ours, theirs = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "bash", chromium, *FLAGS,
             f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
            pass_fds=(ours[0], theirs[1]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from, self._number, self._rest = ours[1], theirs[0], 0, b""
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    _session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                more = os.read(self._from, 1 << 20)
                if not more:
                    raise RuntimeError(f"Chromium ended with exit code {self._process.wait()}.")
                self._rest += more
            one, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found

    def value(self, script: str) -> Any:
        """What an expression is in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """End it."""
        self._session = None
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def check(
    folder: Path, chromium: str, screenshot: Path | None = None, seconds: float = 60.0, dark: bool = False
) -> tuple[str, str]:
    """Title and words of the page's verdict, once it has one."""
    with served(folder) as address, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            if dark:
                browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
            browser.call("Page.navigate", url=f"{address}/web/")
            end = time.monotonic() + seconds
            while not str(title := browser.value("document.title")).startswith(("ok", "error")):
                if time.monotonic() > end:
                    raise RuntimeError(f"The page had no verdict after {seconds:.0f} s.")
                time.sleep(0.1)
            words = browser.value("document.getElementById('result').innerText")
            if screenshot is not None:
                shot = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
                screenshot.write_bytes(base64.b64decode(shot))
        finally:
            browser.close()
    return str(title), str(words)


def main() -> int:
    """Check one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--dark", action="store_true", help="as a browser with a dark theme shows it")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    given = parser.parse_args()
    if given.chromium is None:
        parser.error("there is no chromium on this machine; name one with --chromium")
    title, words = check(given.folder, given.chromium, given.screenshot, dark=given.dark)
    print(title)
    print(words)
    return 0 if title.startswith("ok") else 1


if __name__ == "__main__":
    sys.exit(main())
