"""Headless Chromium, driven over its DevTools pipe: enough to click, type and look at pixels."""

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import time

import numpy as np
from matplotlib import image as mpl_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SECONDS = 60
WEBGL = "use-gl=angle use-angle=swiftshader enable-unsafe-swiftshader"
QUIET = (
    "headless no-sandbox no-first-run disable-background-networking disable-sync hide-scrollbars"
)


class Page:
    """One page; `errors` and `requests` are what it logged and fetched.

    Args:
        send: writes bytes to the browser.
        receive: reads bytes from it.
    """

    def __init__(self, send, receive):
        self._send, self._receive, self._left = send, receive, b""
        self._ids, self._session = itertools.count(1), None
        self.errors, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Result of a command of the DevTools protocol."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._send(json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == number:
                assert "error" not in got, f"{method}: {got['error']}"
                return got["result"]
            self._note(got)

    def _next(self):
        while b"\0" not in self._left:
            self._left += self._receive()
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description"))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path, *, width=1280, height=900, phone=False):
        """Load a file in a window of that size and wait for its viewer, if it has one."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Page.navigate", url=path.as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, expression):
        """Value of a JavaScript expression."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(expression):
            assert time.monotonic() < end, f"never: {expression}; {self.errors}"
            time.sleep(0.05)

    def click(self, selector, *, at=(0.5, 0.5)):
        """Click an element, at a share of its width and height."""
        box = self.run(
            f"(e => {{e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            f"const b = e.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]}})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        x, y = box[0] + at[0] * box[2], box[1] + at[1] * box[3]
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key, *, kinds=("keyDown", "keyUp")):
        """Press and release a key."""
        typed = {"text": key} if len(key) == 1 else {}
        for kind in kinds:
            more = typed if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def png(self, *, selector=None, whole=False):
        """Screenshot, PNG bytes: the window, all of the page, or an element."""
        options = {"captureBeyondViewport": True} if whole or selector else {}
        if selector or whole:
            box = self.run(
                f"(e => {{const b = e.getBoundingClientRect(); return [b.x + scrollX,"
                f"b.y + scrollY, b.width, b.height]}})"
                f"(document.querySelector({json.dumps(selector or 'html')}))"
            )
            names = ("x", "y", "width", "height")
            options["clip"] = {**dict(zip(names, box, strict=True)), "scale": 1}
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def pixels(self, selector):
        """[height, width, 3] of an element, 0 to 1."""
        return mpl_image.imread(io.BytesIO(self.png(selector=selector)))[..., :3]

    def pdf(self):
        """The page as it is printed, PDF bytes."""
        options = {"preferCSSPageSize": True, "printBackground": True}
        return base64.b64decode(self.call("Page.printToPDF", **options)["data"])


@contextlib.contextmanager
def browser(folder, *, webgl=True):
    """A `Page` of a headless Chromium; its profile goes to `folder`."""
    options = [f"--{option}" for option in QUIET.split() + (WEBGL.split() if webgl else [])]
    options += [] if webgl else ["--disable-gpu", "--disable-3d-apis"]
    options += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    pipes = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = subprocess.Popen(
        ["bash", "-c", pipes, CHROMIUM, *options],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)

    def send(content):
        while content:
            content = content[os.write(ours_out, content) :]

    def receive():
        got = os.read(ours_in, 1 << 20)
        assert got, "Chromium has gone."
        return got

    try:
        yield Page(send, receive)
    finally:
        for pipe in (ours_out, ours_in):
            os.close(pipe)
        process.terminate()
        process.wait(SECONDS)


def near(pixels, color, *, within=0.12):
    """[height, width] bool: where a picture has about that color ("#rrggbb")."""
    wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return (np.abs(pixels - wanted) < within).all(axis=-1)
