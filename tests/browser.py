"""Headless Chromium for the tests, the benchmark and the pictures."""

import contextlib
import io
import json
import re
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

from conftest import wait_until
from PIL import Image
from playwright.sync_api import Error, sync_playwright

VIEWER = "document.querySelector('perspective-viewer')"
# The panels of the dashboard, and the columns of the newest ticks.
CHARTS = ["candles", "volumeHeatmap", "historyVolume", "historyClose"]
GRIDS = ["tickers", "newestTicks", "historyTable"]
SHOWN = ["timestamp", "ticker", "client", "open", "high", "low", "close", "volume"]

LOST = "net::ERR_|WebSocket connection to|status of 503"  # Chromium's words, a server is away

FLAGS = [
    "--no-sandbox",
    "--use-angle=swiftshader-webgl",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# V8 does not optimise WebAssembly: the tests open many pages, and each for a short time.
QUICK_START = "--js-flags=--liftoff-only"


@contextlib.contextmanager
def launched(*flags):
    """This machine's own Chromium, or else the one that Playwright downloads; None if none."""
    names = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        places = [*map(shutil.which, names), playwright.chromium.executable_path]
        path = next((place for place in places if place and Path(place).exists()), None)
        browser = path and playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags])
        yield browser
        if browser:
            browser.close()


def coloured(png):
    """How many pixels have a colour, unlike background, text and lines."""
    with Image.open(io.BytesIO(png)) as image:
        counted = image.convert("RGB").getcolors(1 << 24)
    return sum(count for count, colour in counted if max(colour) - min(colour) > 50)


class Tab:
    """A page in the browser, and what was heard of it."""

    def __init__(self, context, init=None):
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints, self.urls, self.sockets = [], [], []
        self.forgiven = None  # a pattern of complaints that the test provokes
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on("websocket", lambda socket: self.sockets.append(socket.url))
        if init:
            self.page.add_init_script(init)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def check(self):
        """Nothing in the console, and no other host was asked for anything."""
        self.page.wait_for_timeout(1)  # Playwright reports what has come
        pattern = self.forgiven or "$^"
        complaints = [text for text in self.complaints if not re.search(pattern, text)]
        assert not complaints, complaints
        urls = map(urlsplit, self.urls + self.sockets)
        hosts = {url.hostname for url in urls if url.scheme not in ("data", "blob", "file")}
        assert hosts <= {"localhost", "127.0.0.1"}

    def wait_for(self, state, seconds=60):
        """Wait until the status line says so."""
        self.page.wait_for_selector(f"#state.{state}", timeout=1000 * seconds)

    def wait_for_notice(self, text, seconds=60):
        self.page.wait_for_selector(f'#notice:has-text("{text}")', timeout=1000 * seconds)

    def text(self, selector):
        return self.page.text_content(selector)

    def figure(self, name):
        """A number of the status line, None if there is none."""
        text = self.text(f"#{name}").replace(",", "")
        return int(text) if text.isdigit() else None

    def cells(self, panel="newestTicks", part="tbody"):
        """The rows of a grid as they are on the screen: lists of texts."""
        return self.page.evaluate(
            """([panel, part]) => {
                const grid = document.querySelector(`perspective-viewer-datagrid[slot=${panel}]`);
                return [...grid?.shadowRoot.querySelectorAll(`${part} tr`) ?? []].map(
                    (row) => [...row.cells].map((cell) => cell.textContent));
            }""",
            [panel, part],
        )

    def wait_for_cells(self, panel="newestTicks"):
        """Wait until the dashboard is there and a grid has rows."""
        self.page.wait_for_selector("perspective-viewer:not(.empty)")
        return wait_until(lambda: self.cells(panel), f"rows in {panel}")

    def wait_for_other_cells(self, panel="newestTicks", before=None):
        before = before or self.wait_for_cells(panel)
        wait_until(lambda: self.cells(panel) != before, f"other rows in {panel}")

    def picture(self, panel):
        """A chart as PNG."""
        return self.page.locator(f"perspective-viewer > [slot={panel}]").screenshot()

    def wait_for_marks(self, panel, other_than=None):
        """Wait until a chart shows more colour than its legend has. Returns the picture."""
        least = {"candles": 500, "volumeHeatmap": 5000}.get(panel, 50)

        def marks():
            picture = self.picture(panel)
            return picture != other_than and coloured(picture) > least and picture

        return wait_until(marks, f"marks in {panel}")

    def rows(self, panel="newestTicks"):
        """All that a panel's view holds, as a list of {column: value}."""
        return self.page.evaluate(
            f"async (panel) => (await {VIEWER}.getView({{ panel }})).to_json()", panel
        )

    def fresh_rows(self, panel):
        """What a new view, made as the panel's is, holds."""
        return self.page.evaluate(
            f"""async (panel) => {{
                const table = await {VIEWER}.getTable({{ panel }});
                const kept = await {VIEWER}.getView({{ panel }});
                const view = await table.view(await kept.get_config());
                const rows = await view.to_json();
                await view.delete();
                return rows;
            }}""",
            panel,
        )

    def workspace(self):
        def saved():
            with contextlib.suppress(Error):  # it is just being drawn
                return self.page.evaluate(f"{VIEWER}.saveWorkspace()")

        return wait_until(saved, "a workspace")

    def restore(self, panel, **config):
        """Change a panel as its settings do, without waiting for the result."""
        script = f"([config, panel]) => {{ {VIEWER}.restore(config, {{ panel }}) }}"
        self.page.evaluate(script, [config, panel])

    def change(self, panel, **config):
        """Change a panel, and wait until the page has stored that.

        A dashboard whose first rows come is drawn again, perhaps at the same moment.
        """
        self.page.wait_for_selector("perspective-viewer:not(.empty)")  # drawn for the first time
        before, due = self.stored(), 0

        def is_changed():
            nonlocal due
            if time.monotonic() > due:
                self.restore(panel, **config)
                due = time.monotonic() + 8
            return self.stored() != before and self.is_stored()

        wait_until(is_changed, "it is stored")

    def after(self, gesture):
        """Change something, and wait until the page has stored that."""
        before = self.stored()
        gesture()
        wait_until(lambda: self.stored() != before and self.is_stored(), "it is stored")

    def is_stored(self):
        """Whether what is stored is the layout as it is now."""
        workspace = self.workspace()
        for panel in workspace["panels"].values():
            panel.pop("theme", None)
        return json.loads(self.stored()) == workspace

    def stored(self, name="layout"):
        return self.page.evaluate(
            "(name) => Object.entries(sessionStorage).find(([key]) => key.endsWith(name))?.[1]",
            f" {name}",
        )

    def store(self, value, name="layout"):
        """Put something in the place of the stored layout."""
        self.page.evaluate(
            """([value, name]) => {
                for (const place of [sessionStorage, localStorage]) {
                    const key = Object.keys(place).find((key) => key.endsWith(name));
                    place.setItem(key, value);
                }
            }""",
            [value, f" {name}"],
        )

    def select(self, panel):
        """Bring a panel to the front, by a click at its tab."""
        self.page.click(f"perspective-viewer-tab[slot=tab-{panel}]")

    def themes(self):
        """What is dark: the document, its background, the themes of the panels."""
        background = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = self.page.evaluate("document.documentElement.classList.contains('dark')")
        return dark, background, {panel["theme"] for panel in self.workspace()["panels"].values()}

    @contextlib.contextmanager
    def loaded_anew(self):
        """What is done here makes the page load itself anew, once or several times."""
        before = self.loaded_at()
        yield

        def is_another():
            with contextlib.suppress(Error):  # it is between two pages
                return self.loaded_at() != before

        wait_until(is_another, "the page loads itself anew")

    def loaded_at(self):
        """Another number after each loading of the page."""
        return self.page.evaluate("performance.timeOrigin")


def differences(one, other, path=""):
    """Where two workspaces differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        found = (differences(one.get(key), other.get(key), f"{path}.{key}") for key in keys)
        return [difference for differences in found for difference in differences]
    return [] if one == other else [(path, one, other)]
