"""A real Chromium, driven over the pipe of its DevTools protocol: no driver program, no open port, no package.

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
# Whatever takes longer hangs; no test depends on how long anything takes.
HANG_S = 120.0


class Browser:
    """One Chromium; `open` gives tabs that know nothing of each other."""

    def __init__(self, program: str, profile: Path) -> None:
        # Chromium reads commands from descriptor 3 and writes answers to 4, both as JSON ended by a zero byte.
        # The copies are far above 4, so that neither is overwritten before it is moved there.
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
        """Take in what the browser says within `timeout_s`; False if that was nothing."""
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
        """A tab with storage of its own, empty or with a page in it."""
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
        """Until the page and all that it names is loaded; also where it is the page that is there already."""
        seen = len(self.browser.events)
        begun = self.call("Page.navigate", url=url)
        assert "errorText" not in begun, f"{url}: {begun.get('errorText')}"
        # Of this very document: what was there before may still tell of its own end.
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
        """Take the network away, or give it back."""
        usual = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.enable")
        self.call("Network.emulateNetworkConditions", offline=offline, **usual)
        # The process that has the network is told apart from the page.
        answered = "fetch(location, {cache: 'no-store'}).then(() => true, () => false)"
        self.wait(f"{answered}.then((online) => online === {json.dumps(not offline)})")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def each(self, selector: str, expression: str) -> list[Any]:
        """The value of an expression of `e` for each element `e`."""
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => {expression})")

    def wait(self, expression: str, timeout_s: float = HANG_S) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}; the page says:\n{self.text('body')}"
            self.browser.pump(0.03)
        return value

    def text(self, selector: str) -> str:
        """What a person reads there; nothing, where it is not shown."""
        return self.run(_shown_text(selector))

    def wait_text(self, selector: str, part: str, timeout_s: float = HANG_S) -> None:
        self.wait(f"{_shown_text(selector)}.includes({json.dumps(part)})", timeout_s)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element, wherever it is scrolled to.

        Like a person, it waits until the element stands still with nothing over it.
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
        """Into whatever has the focus."""
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
        """Replace what stands in a field, as typing does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus(), document.activeElement.select()")
        if text:
            self.type(text)
        else:
            self.call("Input.dispatchKeyEvent", type="keyDown", key="Delete", code="Delete", windowsVirtualKeyCode=46)

    def choose(self, selector: str, *files: Path) -> None:
        """Files in a file field, as its dialog would."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], objectId=found["result"]["objectId"])

    def drop(self, x: int, y: int, *files: Path) -> None:
        """Files from the desktop, dropped at a place in the window."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the browser said of this page: errors of its scripts and breaches of its policy.

        Requests that failed are left out: they are what many tests are about.
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
    """innerText leaves out what is not shown, but not where the element itself is not."""
    found = f"document.querySelector({json.dumps(selector)})"
    return f"({found}?.checkVisibility() ? {found}.innerText : '')"


def program() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@contextlib.contextmanager
def chromium(found: str) -> Iterator[Browser]:
    """A Chromium with an empty profile, gone with everything it wrote at the end."""
    profile = Path(tempfile.mkdtemp(prefix="mm-chromium-"))
    browser = Browser(found, profile)
    try:
        yield browser
    finally:
        browser.close()
        shutil.rmtree(profile, ignore_errors=True)
