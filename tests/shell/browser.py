"""A real browser, Debian's chromium, headless: what a page is in it, and how it looks.

Spoken to in the DevTools protocol over a pipe (descriptors 3 and 4, messages end with a zero byte),
for which nothing need be installed. Images are looked at by the browser itself.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 60.0
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_COUNT_COLOURS = """
async (image, colours) => {
  const file = await fetch("data:image/png;base64," + image);
  const bitmap = await createImageBitmap(await file.blob());
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const counts = colours.map(() => 0);
  for (let at = 0; at < data.length; at += 4)
    colours.forEach(([red, green, blue], index) => {
      const apart = Math.abs(data[at] - red) + Math.abs(data[at + 1] - green)
        + Math.abs(data[at + 2] - blue);
      if (apart < 6) counts[index] += 1;
    });
  return counts;
}
"""


class Browser:
    """One running browser."""

    def __init__(self, process: "subprocess.Popen[bytes]", to_fd: int, from_fd: int) -> None:
        self._process = process
        self._to_fd = to_fd
        self._from_fd = from_fd
        self._asked = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command."""
        self._asked += 1
        message: dict[str, Any] = {"id": self._asked, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to_fd, data) :]
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            assert select.select([self._from_fd], [], [], max(0.0, left))[0], "no answer"
            part = os.read(self._from_fd, 1 << 20)
            assert part, f"the browser has ended with {self._process.wait()}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(line)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def open_page(self) -> None:
        """A new page, which is the one spoken to from now on."""
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def show(self, url: str, width: int, height: int, scheme: str) -> None:
        """Go to `url` on a screen of that size, for somebody who prefers that colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=url)

    def until(self, expression: str) -> Any:
        """What an expression is as soon as that is true."""
        deadline = time.monotonic() + SECONDS
        while not (found := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"it did not happen in time: {expression}"
            time.sleep(0.05)
        return found

    def screenshot(self) -> bytes:
        """The whole page as it looks now, a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def count_colours(self, image: bytes, colours: list[list[int]]) -> list[int]:
        """How many pixels of a PNG have each of these colours, or one that nobody can tell from it.
        Leaves the page for an empty one, whose policy allows this."""
        self.call("Page.navigate", url="about:blank")
        encoded = base64.b64encode(image).decode()
        return self.evaluate(f"({_COUNT_COLOURS})({json.dumps(encoded)}, {json.dumps(colours)})")


@contextlib.contextmanager
def running_browser(place: Path) -> Iterator[Browser]:
    """A browser; its files are in `place`."""
    assert PROGRAM is not None
    to_browser, to_fd = os.pipe()
    from_fd, from_browser = os.pipe()
    command = [
        *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={place / 'profile'}", "about:blank"),
    ]
    # The pipe's ends are 3 and 4 there.
    shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    with (place / "browser.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "HOME": str(place)},
        )
    os.close(to_browser)
    os.close(from_browser)
    browser = Browser(process, to_fd, from_fd)
    try:
        browser.open_page()
        yield browser
        browser.session = None
        browser.call("Browser.close")
    finally:
        os.close(to_fd)
        os.close(from_fd)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
