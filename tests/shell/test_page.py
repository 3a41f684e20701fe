"""The status page in a real browser, with real data of a daemon that is at work: what is drawn, and
how it looks, on a phone and a desk, in the light and in the dark."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd_proto.keys import arena_fingerprint
from kvd_proto.messages import Evict, Pin
from tests.shell.browser import PROGRAM, Browser, running_browser
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, many_tokens, raw_client, until
from tests.shell.scraping import free_port, get, history
from tests.support import running_daemon

pytestmark = [
    pytest.mark.skipif(
        PROGRAM is None,
        reason="NOT TESTED: the status page, which needs a browser (apt install chromium)",
    ),
    pytest.mark.timeout(300),
]

SAMPLE_SECONDS = 0.25
MODEL = "SmolLM2-135M-Instruct"
EVIL = '<img src=x onerror="evil=1"><script>evil=1</script>'
STATES = ["active", "pinned", "cached", "filling", "free", "staging", "directory"]
CURVES = ["hit", "evict", "p50", "p99"]
WIDTHS = {"phone": (360, 740), "desk": (1280, 900)}
DIRECTORY = os.environ.get("KVD_SCREENSHOTS")
"""Where to keep the screenshots, if anywhere."""


class Work(threading.Thread):
    """A client that stores, finds and evicts, until it is stopped."""

    def __init__(self, client: Raw, context: int) -> None:
        super().__init__()
        self._client = client
        self._context = context
        self.is_stopping = threading.Event()
        self.rounds = 0

    def run(self) -> None:
        while not self.is_stopping.wait(0.02):
            first = 1000 * (self.rounds % 12)
            for _ in range(1 + self.rounds % 3):
                tokens = many_tokens(first, 16 * BLOCK_TOKENS)
                sequence = self._client.store(self._context, tokens)
                self._client.release(self._context, sequence)
            if self.rounds % 10 == 0:
                self._client.call(Evict(MODEL, 20))
            self.rounds += 1


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Work]:
    """A daemon at work for a while: every state has memory, and samples are there of all."""
    place = tmp_path_factory.mktemp("page")
    flags = ("--max-memory", "2MiB", "--metrics", f"127.0.0.1:{port}")
    prefix = (sys.executable, "-m", "tests.shell.quick_history_daemon", str(SAMPLE_SECONDS))
    with contextlib.ExitStack() as opened:
        daemon = opened.enter_context(
            running_daemon(*flags, runtime_dir=place / "rt", prefix=prefix)
        )
        client = opened.enter_context(raw_client(daemon))
        holder = opened.enter_context(raw_client(daemon, name="holder"))
        context = client.open(name=MODEL)
        other = holder.open(name=EVIL, fingerprint=bytes(32))
        fingerprint = arena_fingerprint(bytes(32), "llama-state", BLOCK_TOKENS)
        held = many_tokens(0, 40 * BLOCK_TOKENS)
        holder.store(other, held)
        pinned = many_tokens(500_000, 30 * BLOCK_TOKENS)
        holder.release(other, holder.store(other, pinned))
        holder.call(Pin(fingerprint, pinned, "test", 0))
        holder.alloc(other, b"", reserve=20 * BLOCK_TOKENS)  # set aside: filling
        freed = holder.alloc(other, b"", reserve=25 * BLOCK_TOKENS)
        holder.release(other, freed)  # backed, and free
        working = Work(client, context)
        working.start()
        try:
            where = ("127.0.0.1", port)
            until(lambda: len(history(where)["time"]) >= 24, 60)
            yield working
        finally:
            working.is_stopping.set()
            working.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, work: Work) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("browser")) as running:
        yield running


def see(browser: Browser, port: int, width: int, height: int, scheme: str) -> None:
    """Open the page, and wait until it is drawn."""
    browser.show(f"http://127.0.0.1:{port}/", width, height, scheme)
    browser.until("document.querySelectorAll('.area').length === 7")


def colour_of(browser: Browser, selector: str, what: str = "color") -> list[int]:
    style = f"getComputedStyle(document.querySelector({selector!r})).{what}"
    return browser.evaluate(f"{style}.match(/[0-9]+/g).slice(0, 3).map(Number)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", WIDTHS)
def test_everything_is_drawn_and_can_be_seen(
    browser: Browser, port: int, scheme: str, screen: str
) -> None:
    width, height = WIDTHS[screen]
    see(browser, port, width, height, scheme)
    selectors = [f".area.{state}" for state in STATES] + [f".curve.{name}" for name in CURVES]
    for selector in selectors:
        box = browser.evaluate(
            f"(({{width, height}}) => [width, height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        assert box[0] > 0.3 * min(width, 500), f"{selector} is {box[0]} wide"
    colours = [colour_of(browser, selector) for selector in selectors]
    assert len({tuple(colour) for colour in colours[: len(STATES)]}) == len(STATES)
    paper = colour_of(browser, "body", "backgroundColor")
    assert (sum(paper) > 600) == (scheme == "light")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "it fits the screen"
    boxes = "[...document.querySelectorAll('.wide')].map((e) => e.scrollWidth - e.clientWidth)"
    assert max(browser.evaluate(boxes)) <= 0, "and so does each table"
    image = browser.screenshot()
    if DIRECTORY:
        (Path(DIRECTORY) / f"page-{screen}-{scheme}.png").write_bytes(image)
    counts = browser.count_colours(image, [*colours, paper])
    for selector, count in zip(selectors, counts, strict=False):
        assert count > 50, f"{selector}: {count} pixels"
    assert counts[-1] > 5000, "the paper"


def test_what_it_says_is_what_the_daemon_says(browser: Browser, port: int, work: Work) -> None:
    see(browser, port, 1280, 900, "light")
    text = browser.evaluate("document.body.innerText")
    for word in ("Tokens found", "of 2.0 MiB", "all accounted for", "of 100; 0 timed out", MODEL):
        assert word in text
    assert browser.evaluate("document.title").startswith("kvd: test-")
    status = history(("127.0.0.1", port))["status"]
    assert browser.evaluate("shown.status.accounting.budget_bytes") == 2 << 20
    assert browser.evaluate("shown.status.models.length") == len(status["models"]) == 2
    rows = browser.evaluate("document.querySelectorAll('#tables tbody tr').length")
    assert rows == len(status["models"]) + len(status["tenants"])
    for model in browser.evaluate("shown.status.models"):
        assert model["blocks"]["total"] > 0
        assert model["stride_bytes"] == STRIDE
    # The areas lie on each other: the last one ends where all memory in use ends.
    memory = browser.evaluate("shown.memory")
    last = {state: values[-1] for state, values in memory.items()}
    assert all(last[state] > 0 for state in ("active", "pinned", "filling", "staging", "directory"))
    assert sum(last.values()) <= 2 << 20


def test_it_goes_on_by_itself(browser: Browser, port: int, work: Work) -> None:
    see(browser, port, 1280, 900, "light")
    before = browser.evaluate("shown.time[shown.time.length - 1]")
    browser.until(f"shown.time[shown.time.length - 1] > {before} + 1")
    before = browser.evaluate("document.querySelector('.curve.hit').getAttribute('d')")
    browser.until(f"document.querySelector('.curve.hit').getAttribute('d') !== {before!r}")


def test_a_name_is_text_and_nothing_else(browser: Browser, port: int) -> None:
    see(browser, port, 360, 740, "dark")
    assert browser.evaluate("typeof evil") == "undefined"
    assert EVIL in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.querySelectorAll('img, main script').length") == 0


def test_it_loads_nothing_but_itself_and_its_data(browser: Browser, port: int) -> None:
    see(browser, port, 1280, 900, "light")
    requests = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    base = f"http://127.0.0.1:{port}"
    assert set(requests) - {f"{base}/favicon.ico"} == {f"{base}/", f"{base}/history.json"}
    complaints = [
        event["params"]
        for event in browser.events
        if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
        and "favicon" not in str(event)
    ]
    assert complaints == []


def test_no_other_script_could_run(browser: Browser, port: int) -> None:
    """Were a name ever to become markup, the policy would still not let it run."""
    policy = get(("127.0.0.1", port), "/").headers["content-security-policy"]
    assert "unsafe" not in policy
    see(browser, port, 1280, 900, "light")
    browser.evaluate(
        "(() => { const made = document.createElement('div'); document.body.append(made);"
        f" made.innerHTML = {EVIL!r};"
        " const script = document.createElement('script'); script.textContent = 'evil = 1';"
        " document.body.append(script); })()"
    )
    browser.until("document.querySelector('img').complete")
    assert browser.evaluate("typeof evil") == "undefined"


def test_touching_a_chart_tells_its_values(browser: Browser, port: int) -> None:
    see(browser, port, 360, 740, "light")
    told = browser.evaluate(
        "(() => { const svg = document.getElementById('memory');"
        " svg.dispatchEvent(new PointerEvent('pointerdown', {clientX: 200}));"
        " return [getComputedStyle(svg.querySelector('.cursor')).visibility,"
        " svg.getAttribute('aria-label')]; })()"
    )
    assert told[0] == "visible"
    assert told[1].startswith("Memory by state: active ")


def test_it_says_so_when_nobody_answers(browser: Browser, port: int) -> None:
    see(browser, port, 360, 740, "dark")
    browser.call(
        "Network.emulateNetworkConditions",
        offline=True,
        latency=0,
        downloadThroughput=-1,
        uploadThroughput=-1,
    )
    try:
        browser.until("document.getElementById('trouble').textContent.startsWith('No answer: ')")
    finally:
        browser.call(
            "Network.emulateNetworkConditions",
            offline=False,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
    browser.until("document.getElementById('trouble').textContent === ''")
