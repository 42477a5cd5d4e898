"""Open a page in headless Chromium and see what it says: python tools/check_web.py FOLDER [PAGE].

The folder is served on localhost, with the headers that let WebAssembly use threads. The page is waited for until it
sets the title of its document to words that begin with `ok` or `error`, or writes into an element with the id `result`.
Needs a Chromium or Chrome on the PATH, and the package `playwright` (no browser of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import http.server
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Seen", "browser", "check", "missing", "served"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
"""WebGPU computed by the processor."""
_OVERRIDDEN = {"--disable-gpu"}
"""What would keep WebGPU away."""
_SETTLED = r"""() => {
    const title = document.title.trim();
    const result = document.getElementById("result")?.textContent.trim();
    return /^(ok|error)\b/i.test(title) || (arguments[0] && result) ? { title, result: result ?? "" } : null;
}"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What came of a page.

    Attributes:
        title: of its document.
        result: text of its element with the id `result`; empty when it has none.
        messages: what it wrote to the console, and its uncaught errors.
        requests: addresses that were asked for and not found.
        done: whether it said that it was done in time.
    """

    title: str
    result: str
    messages: tuple[str, ...]
    requests: tuple[str, ...]
    done: bool

    @property
    def ok(self) -> bool:
        """Whether it was done in time and its title does not begin with `error`."""
        return self.done and not self.title.lower().startswith("error")


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, isolated from other origins, which is the condition for memory that threads share."""

    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
    }

    def do_GET(self) -> None:
        if self.path == "/favicon.ico":  # Browsers ask for it by themselves.
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve `folder` on a free port of localhost; gives the address, which ends with a slash."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def browser() -> str | None:
    """The Chromium on the PATH; None when there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def missing() -> str | None:
    """What is not here that the check needs, in words; None when it can run."""
    if browser() is None:
        return f"there is no browser on the PATH ({', '.join(BROWSERS)})"
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "the package `playwright` is not installed"
    return None


def check(
    folder: Path,
    page: str = "index.html",
    *,
    seconds: float = 60.0,
    screenshot: Path | None = None,
    webgpu: bool = False,
    size: tuple[int, int] = (1000, 800),
    element: bool = False,
    flags: Sequence[str] = (),
) -> Seen:
    """Serve `folder` and open `page` of it.

    Args:
        folder: what is served.
        page: path of the page in it, with a query if it takes one.
        seconds: how long the page may take.
        screenshot: where to write a picture (PNG) of the whole page.
        webgpu: give it WebGPU, computed by the processor.
        size: of the window, pixels.
        element: take text in `#result` as the end too, for pages that leave their title alone.
        flags: further flags of the browser.

    Raises:
        SystemExit: no browser or no `playwright` here.
    """
    if (lack := missing()) is not None:
        raise SystemExit(f"Cannot open pages: {lack}.")
    from playwright.sync_api import Error, sync_playwright

    messages: list[str] = []
    requests: list[str] = []
    given = [flag for flag in FLAGS if not (webgpu and flag in _OVERRIDDEN)] + list(WEBGPU if webgpu else ()) + [*flags]
    # A profile of its own, so that nothing of the user's browser is read or changed.
    with tempfile.TemporaryDirectory() as profile, served(folder) as address, sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile,
            executable_path=browser(),
            headless=True,
            args=given,
            viewport={"width": size[0], "height": size[1]},
        )
        tab = context.pages[0] if context.pages else context.new_page()
        tab.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: messages.append(f"uncaught: {error}"))
        tab.on("response", lambda reply: requests.append(reply.url) if reply.status >= 400 else None)
        tab.on("requestfailed", lambda request: requests.append(request.url))
        done = True
        try:
            tab.goto(address + page, timeout=seconds * 1e3)
            condition = _SETTLED.replace("arguments[0]", "true" if element else "false")
            found = tab.wait_for_function(condition, timeout=seconds * 1e3, polling=100).json_value()
            title, result = found["title"], found["result"]
        except Error as error:
            done = False
            messages.append(f"check: {str(error).splitlines()[0]}")
            title = tab.title()
            result = tab.evaluate("document.getElementById('result')?.textContent.trim() ?? ''")
        if screenshot is not None:
            tab.screenshot(path=str(screenshot), full_page=True)
        context.close()
    return Seen(title, result, tuple(messages), tuple(requests), done)


def main() -> int:
    """Exit code 0 when the page is done in time and says no error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", nargs="?", default="index.html")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="write a picture of the page (PNG)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the page may take (60)")
    parser.add_argument("--webgpu", action="store_true", help="with WebGPU, computed by the processor")
    parser.add_argument("--element", action="store_true", help="text in #result ends it too, whatever the title is")
    options = parser.parse_args()
    if not options.folder.is_dir():
        raise SystemExit(f"There is no folder {str(options.folder)!r}.")
    seen = check(
        options.folder,
        options.page,
        seconds=options.seconds,
        screenshot=options.screenshot,
        webgpu=options.webgpu,
        element=options.element,
    )
    print(f"title: {seen.title}\nresult: {seen.result}")
    for line in (*seen.messages, *(f"not found: {address}" for address in seen.requests)):
        print(line, file=sys.stderr)
    return 0 if seen.ok else 1


if __name__ == "__main__":
    sys.exit(main())
