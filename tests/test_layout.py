"""What a person makes of the page, where it is opened, and browsers that lack something."""

import json
import re
import time
from urllib.parse import quote, urlsplit

import pytest
from browser import GRIDS, LOST, SHOWN, differences
from conftest import ROOT, Script, Server, changed_server, free_port, wait_until
from proxy import Link

PAGE = (ROOT / "prsp-viewer.html").as_uri()
LIGHT = (False, "rgb(255, 255, 255)", {"Pro Light"})
DARK = (True, "rgb(36, 37, 38)", {"Pro Dark"})

# ---------------------------------------------------------------------------------------------
# Remember and reset.


def test_changes_are_remembered_and_reset(site, visit):
    tab = visit(site.url)
    original = tab.workspace()
    assert original["panels"]["newestTicks"]["columns"] == SHOWN
    tab.change("newestTicks", columns=[name for name in SHOWN if name != "client"])
    tab.change("candles", filter=[["ticker", "==", "TLT.N"]])
    wait_until(lambda: len(tab.wait_for_cells()[0]) == 7, "seven columns")
    header = tab.page.locator("perspective-viewer-datagrid[slot=newestTicks] th")
    tab.after(lambda: header.nth(1).click())  # sorts
    edge = tab.page.locator("perspective-viewer > [slot=candles]").bounding_box()
    tab.page.mouse.move(edge["x"] - 2, 300)
    tab.page.mouse.down()
    tab.page.mouse.move(edge["x"] + 120, 300, steps=5)
    tab.after(tab.page.mouse.up)
    tab.after(lambda: tab.select("historyClose"))
    changed = tab.workspace()
    assert changed["panels"]["newestTicks"]["sort"] != original["panels"]["newestTicks"]["sort"]
    assert changed["layout"]["sizes"] != original["layout"]["sizes"]

    tab.page.reload()
    tab.wait_for("live")
    wait_until(lambda: len(tab.wait_for_cells()[0]) == 7, "seven columns")
    assert not differences(tab.workspace(), changed)
    wait_until(lambda: not tab.stored("drawing"), "it is drawn")
    tab.store("1", "drawing")  # as while a slow one is being drawn
    with tab.page.expect_navigation():
        tab.page.click("#reset")
    tab.wait_for("live")
    assert tab.text("#notice") == ""
    wait_until(lambda: len(tab.wait_for_cells()[0]) == 8, "eight columns")
    assert not differences(tab.workspace(), original)

    # On a slow line, a change that would be stored while the page is loaded anew.
    tab.page.route(f"{site.url}/", lambda route: (time.sleep(3), route.continue_()))
    tab.restore("candles", title="Mine")
    with tab.page.expect_navigation():
        tab.page.click("#reset")
    tab.wait_for("live")
    tab.wait_for_cells()
    assert not differences(tab.workspace(), original)


def test_a_stored_layout_that_does_not_fit_gives_way_to_the_original(site, visit):
    tab = visit(site.url)
    original = tab.workspace()
    # Perspective itself complains about panels that were given up.
    tab.forgiven = 'No panel named "[a-zA-Z]+-retired"'
    text = json.dumps(original)
    no_panels = {"panels": {}, "layout": original["layout"] | {"children": []}}
    stored = {
        "bad JSON": text[:-1],
        "unknown column": text.replace('"open"', '"weight"'),
        "unknown table": text.replace('"stock_values"', '"gone"'),
        "no panels": json.dumps(original | no_panels),
    }
    for name, layout in stored.items():
        assert layout != text
        wait_until(lambda: not tab.stored("drawing"), "the one before is drawn")
        tab.store(layout)
        tab.page.reload()
        tab.wait_for_notice("Your layout does not fit the tables. This is the original one.")
        tab.wait_for("live")
        wait_until(lambda: len(tab.wait_for_cells()[0]) == 8, f"rows after {name}")
        assert not differences(tab.workspace(), original), name


# Returns the mark of a drawing, which then stays.
HANGS = """() => {
    const mark = Object.entries(sessionStorage).find(([key]) => key.endsWith(" drawing"))?.[1];
    if (mark) Storage.prototype.setItem = () => {};
    return mark;
}"""
DIES = """for (const end of ["pagehide", "visibilitychange"])
    addEventListener(end, (event) => event.stopImmediatePropagation(), true);"""


def test_a_layout_on_which_the_tab_died_gives_way_to_the_original(site, visit):
    """A layout counts as such when it was begun to be drawn, and not finished in five seconds."""

    def die(tab):
        """End the page while it draws; it does not hear of that. Returns when it began, in ms."""
        tab.page.reload(wait_until="commit")
        began = wait_until(lambda: tab.page.evaluate(HANGS), "the drawing begins")
        tab.page.goto("about:blank")
        return int(began)

    def visit_at(ms):
        return visit(site.url, None, beside=first, init=f"{DIES} Date.now = () => {ms}")

    first = visit(site.url, init=DIES)
    original = first.workspace()
    first.change("candles", title="Mine")
    began = die(first)
    # As when a browser restores two tabs: the other one may be drawing the layout just now.
    soon = visit_at(began + 4900)
    soon.wait_for_cells()
    assert soon.workspace()["panels"]["candles"]["title"] == "Mine"
    wait_until(lambda: not soon.stored("drawing"), "it is drawn")

    late = visit_at(die(soon) + 5100)
    late.wait_for_notice("Your layout was not drawn within 5 s. This is the original one.")
    late.wait_for_cells()
    assert not differences(late.workspace(), original)


MARKS = """
const setItem = Storage.prototype.setItem;
Storage.prototype.setItem = function (key, value) {
    window.marked ||= key.endsWith(" drawing") && value !== "";
    return setItem.call(this, key, value);
};"""


def test_a_layout_that_a_hidden_tab_draws_is_not_marked(site, visit):
    """The browser lets it take its time, which says nothing about the layout."""
    first = visit(site.url)
    first.change("candles", title="Mine")
    hide = "Object.defineProperty(document, 'hidden', { value: true });"
    second = visit(site.url, beside=first, init=hide + MARKS)
    assert second.workspace()["panels"]["candles"]["title"] == "Mine"
    assert second.page.evaluate("window.marked") is False  # layout and theme are stored, no mark


def test_two_tabs_go_their_own_ways(site, visit):
    one = visit(site.url)
    other = visit(site.url, beside=one)
    ways = ((one, "One", "YY.N"), (other, "Other", "FB.N"))
    for tab, title, ticker in ways:
        tab.page.bring_to_front()
        tab.change("candles", title=title, filter=[["ticker", "==", ticker]])
    for tab, title, ticker in ways:
        tab.page.bring_to_front()
        tab.page.reload()
        tab.wait_for("live")
        tab.wait_for_other_cells()
        candles = tab.workspace()["panels"]["candles"]
        assert (candles["title"], candles["filter"]) == (title, [["ticker", "==", ticker]])


def test_light_and_dark(site, visit):
    tab = visit(site.url, color_scheme="light")
    assert tab.themes() == LIGHT
    tab.page.emulate_media(color_scheme="dark")
    wait_until(lambda: tab.themes() == DARK, "dark like the system")
    tab.page.click("#theme")
    wait_until(lambda: tab.themes() == LIGHT, "light as the person wants it")
    tab.page.emulate_media(color_scheme="light")
    tab.page.emulate_media(color_scheme="dark")
    tab.page.reload()
    tab.wait_for("live")
    tab.wait_for_cells()
    assert tab.themes() == LIGHT
    tab.page.click("#theme")
    wait_until(lambda: tab.themes() == DARK, "dark as the person wants it")
    for panel in ("candles", "volumeHeatmap"):
        tab.wait_for_marks(panel)


# ---------------------------------------------------------------------------------------------
# From disk, under a path, with another server than before.


def test_opened_from_disk_it_goes_over_to_the_server(site, start, visit):
    """Before the server runs, and after. It needs no leave: the origin null gets none."""
    port = free_port()
    tab = visit(f"{PAGE}?server=localhost:{port}", "connecting")
    tab.forgiven = LOST
    tab.wait_for_notice(f"No answer from localhost:{port}. Start perspective_server.py")
    server = start(Server, *site.options, port=port)
    tab.wait_for("live")
    tab.wait_for_cells()
    assert tab.page.url == f"{server.url}/" and tab.text("#notice") == ""
    again = visit(f"{PAGE}?server=localhost:{port}")
    assert again.page.url == f"{server.url}/"
    for path in ("/healthz", "/", "/perspective/perspective-anywidget.js"):
        assert "Access-Control-Allow-Origin" not in server.get(path, {"Origin": "null"})[1]


def test_opened_from_disk_without_a_server_it_says_so(visit):
    tab = visit("about:blank", None)
    tab.forgiven = LOST
    for server in ("", "two words", "localhost:99999", "http://localhost:80", "a@b:80", "a:1/b"):
        tab.page.goto(f"{PAGE}?server={quote(server)}")
        assert tab.text("#notice") == f'Invalid server "{server}". Use ?server=host:port.'
        assert tab.text("#state") == "no server"
    tab.page.route("http://localhost**", lambda route: route.abort())
    for question, server in (("", "localhost:8080"), ("?server=LocalHost:80", "LocalHost:80")):
        tab.page.goto(f"{PAGE}{question}")
        tab.wait_for_notice(f"No answer from {server}.")


def test_under_a_path_behind_a_proxy(site, start, visit):
    port = free_port()
    with Link(port, path="/ticks/") as link:
        start(Server, *site.options, "--allow-origin", link.url, port=port)
        tab = visit(f"{link.url}/ticks/")
        tab.wait_for_other_cells()
        tab.wait_for_marks("candles")
        urls = [url for url in tab.urls + tab.sockets if urlsplit(url).scheme in ("http", "ws")]
        assert len(urls) >= 4  # page, style sheet, script, websocket
        assert {urlsplit(url).path.split("/")[1] for url in urls} == {"ticks"}


def test_a_column_more_makes_the_page_load_itself_anew(database, start, visit):
    start(Script, "producer.py", "--dsn", database.dsn)
    tab = visit(start(Server, "--dsn", database.dsn).url)
    tab.forgiven = LOST
    tab.change("candles", title="Mine")
    with tab.loaded_anew():
        database.command("ALTER TABLE stock_values ADD COLUMN venue String DEFAULT 'NYSE'")
    tab.wait_for("live")
    tab.wait_for_cells()
    assert tab.workspace()["panels"]["candles"]["title"] == "Mine"
    tab.change("newestTicks", columns=["ticker", "venue"])
    wait_until(lambda: tab.wait_for_cells()[0][1:] == ["NYSE"], "the new column")


def test_another_version_of_the_page_and_a_full_server(site, start, visit, tmp_path):
    """The page loads itself anew; and a second one is told that the server takes only one."""
    server = start(Server, *site.options)
    tab = visit(server.url)
    tab.forgiven = LOST
    server.kill()
    changes = {"MAX_VIEWERS = 2000": "MAX_VIEWERS = 1", "<header>": '<header id="newer">'}
    script = changed_server(tmp_path, changes)
    start(Server, *site.options, port=server.port, script=script)
    tab.page.wait_for_selector("#newer #state.live")
    other = visit(server.url, "connecting")
    full = "the server is full: it takes 1 viewers. This page tries again automatically."
    other.wait_for_notice(full)
    tab.page.goto("about:blank")
    other.wait_for("live")
    assert other.text("#notice") == ""


# ---------------------------------------------------------------------------------------------
# Browsers that lack something, and everybody's needs.


def test_a_browser_without_webassembly(site, visit):
    tab = visit(site.url, None, init="delete window.WebAssembly")
    tab.wait_for_notice("This browser has no WebAssembly")
    assert tab.text("#state") == "not supported"


# In workers, which a script of the page does not reach, the blobs that they are made of.
IN_WORKERS = """
const original = Blob;
window.Blob = class extends original {
    constructor(parts, options) {
        super(options?.type?.includes("javascript") ? [`%s;`, ...parts] : parts, options);
    }
};"""
CHARTS_FAIL = {
    "no WebGL 2": "OffscreenCanvas.prototype.getContext = () => null",
    "no frames": "self.createImageBitmap = () => new Promise(() => {})",
}


@pytest.mark.parametrize("reason", CHARTS_FAIL)
def test_charts_that_are_not_drawn_are_explained(site, visit, reason):
    tab = visit(site.url, None, init=IN_WORKERS % CHARTS_FAIL[reason])
    tab.wait_for_notice("Charts were not drawn within 10 s. They need WebGL 2 in a worker")


INVALID_LANGUAGE = "Object.defineProperty(navigator, 'languages', { value: ['c'] });"


def test_failures_of_perspective_are_said_in_a_sentence(site, visit):
    """One at each start, as with a language that no browser knows, and one at a click."""
    tab = visit(site.url, None, init=INVALID_LANGUAGE)
    tab.forgiven = "language|locale|retired"
    tab.wait_for_notice("This page tries again automatically")
    assert re.match("Invalid language|Incorrect locale", tab.text("#notice"))
    tab.page.goto("about:blank")  # it would start again and again
    tab = visit(site.url)
    tab.forgiven = "ClipboardItem"
    tab.page.evaluate("() => { setTimeout(() => { throw new Error('no ClipboardItem'); }); }")
    tab.wait_for_notice("no ClipboardItem")


def test_charts_are_sharp_on_another_screen_and_pages_readable_on_paper(site, visit):
    tab = visit(site.url, color_scheme="dark")
    width = """() => document.querySelector("perspective-viewer > [slot=candles]").shadowRoot
        .querySelector("canvas.webgl-canvas").width"""
    tab.wait_for_marks("candles")
    before = tab.page.evaluate(width)
    session = tab.page.context.new_cdp_session(tab.page)
    screen = {"width": 0, "height": 0, "deviceScaleFactor": 2, "mobile": False}
    session.send("Emulation.setDeviceMetricsOverride", screen)
    wait_until(lambda: tab.page.evaluate(width) > 1.9 * before, "twice as many pixels")
    background = """() => getComputedStyle(document.querySelector("perspective-viewer > [slot]")
        .shadowRoot.querySelector("td, canvas")).printColorAdjust"""
    assert tab.page.evaluate(background) == "exact"


def test_an_engine_that_does_not_start_is_no_silent_server(site, visit):
    tab = visit(site.url, None, init=IN_WORKERS % "if (!self.window) throw Error('odd')")
    tab.forgiven = "odd"
    tab.wait_for_notice("Perspective's engine is starting.")


def test_why_the_server_refuses_the_connection(site, start, visit):
    """The page was loaded, so the server is there."""
    port = free_port()
    with Link(port) as link:
        server = start(Server, *site.options, port=port)
        tab = visit(link.url, None)
        tab.forgiven = "WebSocket connection to"
        tab.wait_for_notice("The server refuses the websocket.")
        assert f"--allow-origin {link.url}" in tab.text("#notice")
        server.kill()
        tab.forgiven = LOST
        tab.wait_for_notice("No answer from the server yet.")


def test_clocks_that_differ_are_told(site, start, visit, tmp_path):
    script = changed_server(tmp_path, {'"clock_ms": ': '"clock_ms": -95_000 or '})
    tab = visit(start(Server, *site.options, script=script).url)
    tab.wait_for_notice("ClickHouse's clock is 95 s behind the server's.")


def test_charts_come_back_after_the_graphics_process_died(site, start, visit):
    server = start(Server, *site.options)
    tab = visit(server.url)
    tab.forgiven = f"CONTEXT_LOST_WEBGL|{LOST}"
    tab.wait_for_marks("candles")
    # A page that nobody sees waits: a browser with many pages takes one's context for another's.
    tab.page.evaluate("Object.defineProperty(document, 'hidden', { writable: true, value: true })")
    with tab.page.expect_console_message(lambda message: "CONTEXT_LOST" in message.text):
        tab.page.context.browser.new_browser_cdp_session().send("Browser.crashGpuProcess")
    server.kill()
    tab.wait_for("reconnecting")
    with tab.loaded_anew():
        tab.page.evaluate("document.hidden = false; dispatchEvent(new Event('visibilitychange'))")
        tab.page.wait_for_timeout(1000)
        assert tab.text("#state") == "reconnecting" and tab.cells()  # it does not leave its rows
        start(Server, *site.options, port=server.port)
    tab.wait_for("live")
    for panel in ("candles", "volumeHeatmap"):
        tab.wait_for_marks(panel)
    assert tab.text("#notice") == ""


def luminance(colour):
    """Of a colour such as rgb(1, 2, 3), as WCAG has it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_everybody_can_use_it(site, visit):
    tab = visit(site.url, color_scheme="light")
    page = tab.page
    assert page.get_attribute("html", "lang") == "en"
    assert page.title() == "stock_values: ClickHouse and Perspective"
    tab.wait_for("live")
    assert page.get_by_role("status").text_content() == "live"
    assert page.get_attribute("#notice", "role") == "alert"
    link = page.get_by_role("link", name=f"{site.database.name}.stock_values")
    assert link.get_attribute("href") == "healthz"
    for name in ("source", "theme", "reset"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        assert page.locator(f"#{name}").inner_text()
    for dark in (False, True):
        assert page.evaluate("document.documentElement.classList.contains('dark')") == dark
        colours = """(selector) => [document.body, document.querySelector(selector)].map(
            (element, text) => getComputedStyle(element)[text ? "color" : "backgroundColor"])"""
        for selector in ("#source", "#state", ".figures", "#rows", "#theme"):
            levels = sorted(map(luminance, page.evaluate(colours, selector)))
            assert (levels[1] + 0.05) / (levels[0] + 0.05) >= 4.5, (dark, selector)
        page.focus("#theme")
        page.keyboard.press("Enter")
    page.set_viewport_size({"width": 390, "height": 844})
    with tab.loaded_anew():
        page.click("#reset")
    tab.wait_for_cells("tickers")
    for name in ("rate", "lag", "rows", "viewers", "theme", "reset"):
        box = page.locator(f"header #{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.locator("perspective-viewer > [slot=candles]").bounding_box()["width"] > 380
    ends = "(grid) => [...grid.shadowRoot.querySelectorAll('th, td')].map((cell) =>"
    ends += " cell.getBoundingClientRect().right)"
    for panel in GRIDS:  # no column is clipped
        tab.select(panel)
        tab.wait_for_cells(panel)
        assert max(page.locator(f"perspective-viewer > [slot={panel}]").evaluate(ends)) <= 390
    page.set_viewport_size({"width": 720, "height": 450})  # a laptop at 200 % zoom
    with tab.loaded_anew():
        page.click("#reset")
    tab.wait_for_cells("tickers")
    assert page.locator("perspective-viewer > [slot=candles]").bounding_box()["height"] > 150
