"""A real Chromium, controlled over the pipe of its DevTools protocol: no driver program, no open port, no package.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-pipe",
)  # fmt: skip
# A longer wait means that the browser hangs. No test depends on durations.
HANG_S = 120.0


class Browser:
    """One Chromium. `open` returns tabs without common storage."""

    def __init__(self, program: str, profile: Path) -> None:
        # Chromium reads commands from descriptor 3 and writes answers to 4, both as JSON ended by a zero byte. The
        # copies are far above 4, so that neither is overwritten before it is moved there.
        commands, self._to_browser = os.pipe()
        self._from_browser, answers = os.pipe()
        theirs = [os.dup(commands), os.dup(answers)]
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs[0], 100),
            (os.POSIX_SPAWN_DUP2, theirs[1], 101),
            (os.POSIX_SPAWN_DUP2, 100, 3),
            (os.POSIX_SPAWN_DUP2, 101, 4),
            (os.POSIX_SPAWN_CLOSE, 100),
            (os.POSIX_SPAWN_CLOSE, 101),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(profile / "stderr.log"), os.O_WRONLY | os.O_CREAT, 0o600),
        ]
        arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.pid = os.posix_spawnp(program, arguments, os.environ, file_actions=actions, setsid=True)
        for descriptor in (commands, answers, *theirs):
            os.close(descriptor)
        self._unread = b""
        self._count = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        unsent = json.dumps(command).encode() + b"\0"
        while unsent:
            unsent = unsent[os.write(self._to_browser, unsent) :]
        deadline = time.monotonic() + HANG_S
        while self._count not in self._answers:
            assert self.pump(deadline - time.monotonic()), f"no answer to {method} in {HANG_S:g} s"
        answer = self._answers.pop(self._count)
        assert "error" not in answer, f"{method} {params}: {answer.get('error')}"
        return answer["result"]

    def pump(self, timeout_s: float) -> bool:
        """Read messages of the browser for `timeout_s`. Returns False if there were none."""
        readable, _, _ = select.select([self._from_browser], [], [], max(0.0, timeout_s))
        if not readable:
            return False
        data = os.read(self._from_browser, 1 << 20)
        assert data, "Chromium ended"
        *whole, self._unread = (self._unread + data).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)
        return True

    def open(self, url: str | None = None, width: int = 1280, height: int = 900) -> "Tab":
        """A tab with its own storage, empty or with a page."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, context)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.call("Page.setLifecycleEventsEnabled", enabled=True)
        tab.resize(width, height)
        if url is not None:
            tab.goto(url)
        return tab

    def close(self) -> None:
        os.close(self._to_browser)
        os.close(self._from_browser)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Tab:
    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def goto(self, url: str) -> None:
        """Wait until the page and its resources are loaded, also if it reloads the current page."""
        seen = len(self.browser.events)
        begun = self.call("Page.navigate", url=url)
        assert "errorText" not in begun, f"{url}: {begun.get('errorText')}"
        # For the new document: messages about the old one's end may still arrive.
        loaded = {"name": "load", "loaderId": begun["loaderId"]}
        deadline = time.monotonic() + HANG_S
        while not any(event["params"].items() >= loaded.items() for event in self.browser.events[seen:]):
            assert self.browser.pump(deadline - time.monotonic()), f"{url} is not loaded in {HANG_S:g} s"

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.wait(f"innerWidth === {width} && innerHeight === {height}")  # the answer may come first

    def media(self, **features: str) -> None:
        """For example ``prefers_color_scheme="dark"``."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def network(self, *, offline: bool) -> None:
        """Turn the network off or on."""
        usual = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.enable")
        self.call("Network.emulateNetworkConditions", offline=offline, **usual)
        # The network runs in another process than the page, which needs a separate command.
        answered = "fetch(location, {cache: 'no-store'}).then(() => true, () => false)"
        self.wait(f"{answered}.then((online) => online === {json.dumps(not offline)})")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression. A promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, expression: str) -> list[Any]:
        """The value of an expression of `e` for each element `e`."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => {expression})")

    def wait(self, expression: str, timeout_s: float = HANG_S) -> Any:
        """Wait until the expression is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; the page says:\n{self.text('body')}"
            self.browser.pump(0.03)
        return value

    def text(self, selector: str) -> str:
        """The visible text; empty if the element is not shown."""
        return self.run(_shown_text(selector))

    def wait_text(self, selector: str, part: str, timeout_s: float = HANG_S) -> None:
        self.wait(f"{_shown_text(selector)}.includes({json.dumps(part)})", timeout_s)

    def click(self, selector: str) -> None:
        """Click the middle of the element, after scrolling to it.

        Waits until the element stands still and nothing covers it.
        """
        middle = f"""(() => {{ const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = found.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            return [x, y, found.contains(document.elementFromPoint(x, y))]; }})()"""
        deadline = time.monotonic() + HANG_S
        before, now = None, self.run(middle)
        while now != before or not now[2]:
            assert time.monotonic() < deadline, f"{selector} moves, or is under something: {now}"
            self.browser.pump(0.03)
            before, now = now, self.run(middle)
        x, y, _ = now
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False, control: bool = False) -> None:
        """Tab, Enter or Space."""
        code, number, text = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " ")}[key]
        modifiers = 2 * control + 8 * shift
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **down, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def fill(self, selector: str, text: str) -> None:
        """Replace the content of a field, as typing does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus(), document.activeElement.select()")
        if text:
            self.type(text)
        else:
            self.call("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete", windowsVirtualKeyCode=46)

    def choose(self, selector: str, *files: Path) -> None:
        """Put files into a file field, as its dialog would."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=found["result"]["objectId"])

    def drop(self, x: int, y: int, *files: Path) -> None:
        """Drop files from the desktop at a position in the window."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """The browser's messages about this page: script errors and policy violations.

        Failed requests are left out, as many tests cause them.
        """
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                if params["entry"]["source"] == "network":
                    continue
                found.append(f"{params['entry']['source']}: {params['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
                found.append(f"console: {params['args']}")
        return found


def _shown_text(selector: str) -> str:
    """innerText skips hidden descendants, but not a hidden element itself."""
    found = f"document.querySelector({json.dumps(selector)})"
    return f"({found}?.checkVisibility() ? {found}.innerText : '')"


def program() -> str | None:
    """The path of a Chromium, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def chromium(found: str) -> Iterator[Browser]:
    """A Chromium with an empty profile, which is deleted at the end."""
    profile = Path(tempfile.mkdtemp(prefix="mm-chromium-"))
    browser = Browser(found, profile)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)
