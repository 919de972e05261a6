"""One start in Firefox: another engine, layout and graphics than Chromium's."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from base64 import b64decode

import pytest
from browser import CHARTS, coloured
from conftest import free_port, wait_until

STATE = """
const panel = (name) => document.querySelector(`perspective-viewer > [slot=${name}]`);
return {
    state: document.querySelector("#state")?.className,
    notice: document.querySelector("#notice")?.textContent,
    rows: panel("newestTicks")?.shadowRoot?.querySelector("tbody")?.textContent,
};"""


class MarionetteError(Exception):
    """Firefox refuses a command."""


class Firefox:
    """Debian's Firefox on a virtual screen, spoken to by its own protocol, Marionette.

    A message is its length, a colon, and JSON: a command is [0, id, name, parameters], an answer
    [1, id, error, result]. https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
    """

    def __init__(self, folder):
        port = free_port()
        (folder / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
        screen = "xvfb-run", "--auto-servernum", "--server-args=-screen 0 1280x800x24"
        browser = "firefox-esr", "--marionette", "--no-remote", "--profile", str(folder)
        self.log = open(folder / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*screen, *browser],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"LIBGL_ALWAYS_SOFTWARE": "1", "HOME": str(folder)},
        )
        try:
            self.socket = wait_until(lambda: self.connect(port), "Firefox", seconds=120)
            self.file = self.socket.makefile("rb")
            self.receive()  # its greeting
            self.do("NewSession")
        except BaseException:
            self.close()
            raise

    @staticmethod
    def connect(port):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=120)
        except OSError:
            return None

    def receive(self):
        size = b""
        while (byte := self.file.read(1)) != b":":
            assert byte, "Firefox has ended"
            size += byte
        return json.loads(self.file.read(int(size)))

    def do(self, name, **parameters):
        """Send a command; returns its result. Raises MarionetteError."""
        command = json.dumps([0, 1, f"WebDriver:{name}", parameters]).encode()
        self.socket.sendall(b"%d:%b" % (len(command), command))
        _, _, error, result = self.receive()
        if error:
            raise MarionetteError(error)
        return result

    def evaluate(self, script):
        return self.do("ExecuteScript", script=script, args=[])["value"]

    def find(self, selector):
        return self.do("FindElement", using="css selector", value=selector)["value"]

    def click(self, selector):
        move = {"type": "pointerMove", "x": 0, "y": 0, "origin": self.find(selector)}
        press = [{"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp")]
        mouse = {"type": "pointer", "id": "mouse", "actions": [move, *press]}
        self.do("PerformActions", actions=[mouse])

    def picture(self, panel):
        """A panel as PNG."""
        [element] = self.find(f"perspective-viewer > [slot={panel}]").values()
        return b64decode(self.do("TakeScreenshot", id=element, full=False)["value"])

    def close(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def firefox(tmp_path):
    if not shutil.which("firefox-esr") or not shutil.which("xvfb-run"):
        end = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        end("no Firefox or virtual screen: install firefox-esr, xvfb and libgl1-mesa-dri")
    browser = Firefox(tmp_path)
    yield browser
    browser.close()


@pytest.mark.long
def test_the_page_goes_live_in_firefox_and_follows_while_it_is_hidden(site, firefox):
    firefox.do("Navigate", url=site.url)

    def is_live():
        state = firefox.evaluate(STATE)
        return state["state"] == "live" and state["rows"] and state

    before = wait_until(is_live, lambda: firefox.evaluate(STATE), seconds=120)
    assert before["notice"] == ""
    wait_until(lambda: is_live()["rows"] != before["rows"], "other rows")

    def has_marks(panel):
        with contextlib.suppress(MarionetteError):  # the panel has no size yet
            return coloured(firefox.picture(panel)) > 500

    for panel in CHARTS:
        firefox.click(f"perspective-viewer-tab[slot=tab-{panel}]")
        wait_until(functools.partial(has_marks, panel), f"marks in {panel}")

    page = firefox.do("GetWindowHandle")["value"]
    firefox.do("NewWindow", type="tab", focus=True)
    wait_until(lambda: firefox.evaluate("return document.hidden"), "a hidden page")
    shown_at = time.monotonic() + 15
    while time.monotonic() < shown_at:
        assert firefox.evaluate(STATE)["state"] in ("live", "waiting")  # and not connecting anew
        time.sleep(0.5)
    firefox.do("SwitchToWindow", handle=page)
    wait_until(lambda: not firefox.evaluate("return document.hidden"), "a page that is shown")
    wait_until(is_live, lambda: firefox.evaluate(STATE))
    assert firefox.evaluate(STATE)["notice"] == ""
