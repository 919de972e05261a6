"""The page in headless Chromium, on real servers and real ticks."""

import asyncio
import contextlib
import datetime
import json
import re
import signal
import time
from urllib.parse import quote, urlsplit

import pytest
from browser import VIEWER, differences
from clickhouse_http import ClickHouseProcess
from conftest import ROOT, Database, Mirror, Script, Server, free_port, wait_until
from proxy import Proxy

import producer

LIMIT = 5000  # rows in the window: small, so that new rows soon overwrite others
SHOWN = [
    "timestamp",
    "ticker",
    "client",
    "open",
    "high",
    "low",
    "close",
    "volume",
]  # in the newest ticks
CHARTS = ["candles", "volumeHeatmap", "historyVolume", "historyClose"]
GRIDS = ["tickers", "newestTicks", "historyTable"]
PAGE = (ROOT / "prsp-viewer.html").as_uri()
LOST = "net::ERR_|WebSocket connection to|status of 503"  # Chromium's words, a server is away


LIGHT = (False, "rgb(255, 255, 255)", {"Pro Light"})
DARK = (True, "rgb(36, 37, 38)", {"Pro Dark"})


class Site:
    """A database with ten minutes of old ticks, a producer, and a server with a small window."""

    def __init__(self, clickhouse):
        self.database = Database(clickhouse)
        fill(self.database, 2 * LIMIT, 600_000)
        self.producer = Script("producer.py", "--dsn", self.database.dsn, "--seed", 7)
        self.options = ["--dsn", self.database.dsn, "--limit", LIMIT]
        self.server = Server(*self.options)
        self.url = self.server.url

    @contextlib.contextmanager
    def paused(self):
        """The producer does nothing."""
        self.producer.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.producer.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def site(clickhouse):
    site = Site(clickhouse)
    yield site
    site.server.kill()
    site.producer.kill()
    site.database.drop()


class Link(Proxy):
    """What stands between browser and server: a path that is stripped, a slow line, a dead one.

    It names the server in Host as reverse proxies do, so the server sees a foreign origin.
    """

    def __init__(self, port, path="/", bytes_per_second=None):
        self.path, self.bytes_per_second = path, bytes_per_second
        self.silences, self.busy_until = 0, 0
        super().__init__(port)
        self.url = f"http://localhost:{self.port}"

    def silence(self):
        """Drop what the connections that are open carry from now on; they stay open."""
        self.silences += 1

    async def _requests(self, reader, writer, requests):
        silences = self.silences
        while data := await reader.read(1 << 16):
            if silences == self.silences:
                data = re.sub(b"^(GET|HEAD) %s" % self.path.encode(), rb"\1 /", data)
                data = re.sub(rb"\r\nHost: \S+", b"\r\nHost: localhost:%d" % self.target_port, data)
                writer.write(data)
                await writer.drain()

    async def _answers(self, reader, writer, requests):
        silences = self.silences
        while data := await reader.read(1 << 12):
            if self.bytes_per_second:
                now = time.monotonic()
                self.busy_until = max(now, self.busy_until) + len(data) / self.bytes_per_second
                await asyncio.sleep(self.busy_until - now)
            if silences == self.silences:
                writer.write(data)
                await writer.drain()


class ChangedServer(Server):
    """A server from a copy of the scripts with changes: {file: (old text, new text)}."""

    def __init__(self, folder, changes, *arguments, port):
        self.port, self.url = port, f"http://localhost:{port}"
        for name in ("producer.py", "perspective_server.py", "prsp-viewer.html"):
            old, new = changes.get(name, ("", ""))
            text = (ROOT / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1))
        Script.__init__(self, folder / "perspective_server.py", "--port", port, *arguments)
        self.wait_for("open http://")


def fill(database, rows, span_ms=60_000):
    """Create the table and insert ticks of the `span_ms` before now, as one block."""
    maker = producer.Producer(database.dsn, 1, rows, seed=1)
    maker.open()
    start_ms = round(1000 * time.time()) - span_ms
    maker.insert(maker.market.draw(rows, start_ms, span_ms), "old")
    maker.client.close()


# ---------------------------------------------------------------------------------------------
# What is shown.

RECENT = """FROM stock_values WHERE timestamp >= toStartOfInterval(
    (SELECT max(timestamp) FROM stock_values) - INTERVAL 5 MINUTE, INTERVAL 2 SECOND)"""
ARRIVAL = "(timestamp, _block_number, _block_offset)"
WINDOW = "FROM stock_values ORDER BY _block_number DESC, _block_offset DESC LIMIT"
BY_SQL = {
    "tickers": f"""SELECT ticker, argMax(close, {ARRIVAL}),
        argMax(toFloat64(close), {ARRIVAL}) / argMin(toFloat64(open), {ARRIVAL}) - 1,
        max(high), min(low), sum(volume) {RECENT} GROUP BY ticker ORDER BY ticker""",
    "candles": f"""SELECT intDiv(toUnixTimestamp64Milli(timestamp), 2000) * 2000 AS time,
        argMin(open, {ARRIVAL}), argMax(close, {ARRIVAL}), max(high), min(low)
        {RECENT} AND ticker = 'AAPL.N' GROUP BY time ORDER BY time""",
    "newestTicks": f"SELECT toUnixTimestamp64Milli(timestamp), {', '.join(SHOWN[1:])} {WINDOW}"
    f" {LIMIT}",
}
PRICE, NUMBER = r"\d{1,3}(,\d{3})*\.\d\d", r"\d{1,3}(,\d{3})*"
TEXTS = {
    "tickers": [r"[A-Z]+\.N", PRICE, r"[+-]?\d+\.\d\d%", PRICE, PRICE, NUMBER],
    "newestTicks": [r"[\d:]{8}\.\d{3}", r"[A-Z]+\.N", "[A-Z][a-z]+", *[PRICE] * 4, NUMBER],
}


def signed(change):
    """A change in per cent, with a sign unless it is zero."""
    return re.sub(r"[+-](?=0\.00%)", "", f"{100 * change:+.2f}%")


def total_ticks(tab):
    """The number of ticks in the first row of the history's grid."""
    rows = tab.cells("historyTable")
    return int(rows[0][1].replace(",", "")) if rows else 0


def test_every_panel_draws_and_moves_and_agrees_with_sql(site, start, visit, tmp_path):
    quick = {"perspective_server.py": ("interval=30", "interval=3")}  # the history
    tab = visit(start(ChangedServer, tmp_path, quick, *site.options, port=free_port()).url)
    panels = tab.workspace()["panels"]
    assert sorted(panels) == sorted(CHARTS + GRIDS)
    assert len({panel["title"] for panel in panels.values()} - {""}) == len(panels)
    assert tab.page.locator("perspective-viewer-datagrid-toolbar:visible").count() == 0
    for panel, texts in TEXTS.items():
        tab.wait_for_other_cells(panel)
        for row in tab.cells(panel):
            assert len(row) == len(texts) and all(map(re.fullmatch, texts, row)), row
    pictures = {}
    for panel in CHARTS:
        tab.select(panel)
        pictures[panel] = tab.wait_for_marks(panel)
    tab.select("historyTable")
    before = wait_until(lambda: total_ticks(tab), 30, "rows in the history")
    assert before > 2 * LIMIT

    with site.paused():
        for panel, sql in BY_SQL.items():
            names, expected = panels[panel]["columns"], site.database.ask(sql)
            assert len(expected) > 2

            def agrees(panel=panel, names=names, expected=expected):
                shown = [
                    row.get("__ROW_PATH__", []) + [row[name] for name in names]
                    for row in tab.rows(panel)
                ]
                return len(shown) == len(expected) and all(
                    one == other or one == pytest.approx(other, rel=1e-9)
                    for row, line in zip(shown, expected, strict=True)
                    for one, other in zip(row, line, strict=True)
                )

            wait_until(agrees, 30, f"{panel} as SQL gives it")
        tickers = [
            [f"{last:,.2f}", signed(change), f"{high:,.2f}", f"{low:,.2f}", f"{volume:,}"]
            for _, last, change, high, low, volume in site.database.ask(BY_SQL["tickers"])
        ]
        wait_until(lambda: [row[1:] for row in tab.cells("tickers")] == tickers, 30, tickers)

        [[ticks, volume]] = site.database.ask("SELECT count(), sum(volume) FROM stock_values")
        assert ticks > before
        wait_until(lambda: total_ticks(tab) == ticks, 45, f"{ticks} ticks in the history")
        assert tab.cells("historyTable")[0][-1] == f"{volume:,}"
        rows = {tuple(row["__ROW_PATH__"]): row for row in tab.rows("historyTable")}
        # Several ticks may share the last millisecond.
        for ticker, closes in site.database.ask(
            "SELECT ticker, groupArray(close) FROM stock_values WHERE (ticker, timestamp) IN"
            " (SELECT ticker, max(timestamp) FROM stock_values GROUP BY ticker) GROUP BY ticker",
        ):
            assert any(rows[ticker,]["close"] == pytest.approx(close) for close in closes)
    for panel in CHARTS:
        tab.select(panel)
        tab.wait_for_marks(panel, other_than=pictures[panel])


def test_the_status_line_says_how_the_server_is_doing(site, visit):
    tab = visit(site.url)
    assert tab.text("#state") == "live" and tab.text("#notice") == ""
    wait_until(lambda: 500 <= (tab.figure("rate") or 0) <= 2000, 30, "rows a second")
    assert tab.figure("rows") == site.server.health()["rows"] == LIMIT
    assert tab.figure("lag") < 2000
    other = visit(site.url)
    wait_until(lambda: tab.figure("viewers") == other.figure("viewers") == 2, 30, "two viewers")
    other.page.goto("about:blank")
    wait_until(lambda: tab.figure("viewers") == 1, 30, "one viewer")
    with site.paused():
        tab.wait_for("waiting")
        assert tab.text("#state") == "waiting for rows"
        assert tab.cells()
    tab.wait_for("live")


def test_an_instant_is_the_same_everywhere(database, start, visit):
    """The server in one zone, the browser in another, and the row written in UTC."""
    fill(database, 1)
    database.command("TRUNCATE TABLE stock_values")
    row = "'AAPL.N', 'Homer', 1, 4, 0.5, 2, 1234567, '2021-03-04'"
    database.command(f"INSERT INTO stock_values VALUES ('2021-03-04 20:06:07.089', {row})")
    server = start(Server, "--dsn", database.dsn, env={"TZ": "America/New_York"})
    tab = visit(server.url, "waiting", timezone_id="Asia/Tokyo")
    shown = ["05:06:07.089", "AAPL.N", "Homer", "1.00", "4.00", "0.50", "2.00", "1,234,567"]
    wait_until(lambda: tab.cells() == [shown], 30, "the row")
    assert tab.rows()[0]["timestamp"] == 1_614_888_367_089


# ---------------------------------------------------------------------------------------------
# The page outlives its connection.

MINE = {
    "table": "stock_values_history",
    "title": "Mine",
    "plugin": "Datagrid",
    "group_by": ["client"],
    "split_by": ["ticker"],
    "columns": ["volume", "ticks"],
    "sort": [["volume", "desc"]],
}


def test_the_server_is_killed_and_comes_back(site, start, visit):
    """Rows move again within three seconds, in the same page, with what the person made of it."""
    server = start(Server, *site.options)
    tab = visit(server.url)
    tab.forgiven = LOST
    tab.after(lambda: tab.page.evaluate(f"(panel) => {VIEWER}.addPanel(panel)", MINE))
    tab.change("candles", filter=[["ticker", "==", "MSFT.N"]], title="My candles")
    workspace, loaded_at = tab.workspace(), tab.loaded_at()
    [mine] = [name for name, panel in workspace["panels"].items() if panel["title"] == "Mine"]
    tab.wait_for_cells(mine)
    for long in (False, True):
        server.kill()
        tab.wait_for("reconnecting")
        assert tab.text("#state") == "reconnecting"
        tab.wait_for_notice("The server does not answer. This page keeps its rows")
        before = tab.cells()
        assert len(before) > 10
        if long:
            # Chromium makes a websocket wait 1 to 5 s when some 15 before it were opened in vain.
            sockets = len(tab.sockets)
            tab.page.wait_for_timeout(9000)
            assert len(tab.sockets) <= sockets + 4
        assert tab.cells() == before and not differences(tab.workspace(), workspace)
        server = start(Server, *site.options, port=server.port)
        began = time.monotonic()
        tab.wait_for_other_cells(before=before)
        assert time.monotonic() - began < 3, f"after a {'long' if long else 'short'} outage"
        tab.wait_for("live")
        assert tab.text("#notice") == ""
        assert tab.loaded_at() == loaded_at
        assert not differences(tab.workspace(), workspace)
        assert tab.cells(mine)


def test_a_connection_that_forwards_nothing_is_replaced(site, start, visit):
    port = free_port()
    with Link(port) as link:
        start(Server, *site.options, "--allow-origin", link.url, port=port)
        tab = visit(link.url)
        loaded_at, sockets = tab.loaded_at(), len(tab.sockets)
        link.silence()
        began = time.monotonic()
        tab.page.wait_for_timeout(1000)  # what was on its way is shown
        tab.wait_for_other_cells()
        assert 3 < time.monotonic() - began < 8
        assert len(tab.sockets) == sockets + 1 and tab.loaded_at() == loaded_at
        tab.wait_for("live")


def test_clickhouse_goes_away_and_comes_back(tmp_path, start, visit):
    with ClickHouseProcess(tmp_path) as clickhouse:
        server = start(Server, "--dsn", clickhouse.dsn)
        tab = visit(server.url, "waiting")
        tab.wait_for_notice("The server waits for the table stock_values")
        start(Script, "producer.py", "--dsn", clickhouse.dsn)
        tab.wait_for("live")
        tab.wait_for_cells()
        assert tab.text("#notice") == ""
        clickhouse.kill()
        tab.wait_for("away")
        assert tab.text("#state") == "ClickHouse away"
        before = tab.cells()
        assert len(before) > 10 and "" not in before[0]
        tab.wait_for_marks("volumeHeatmap")
        assert tab.cells() == before
        clickhouse.start()
        tab.wait_for_other_cells(before=before)
        tab.wait_for("live")


GROUPS = [["ticker"], ["client"], ["ticker", "client"], ["volume"], ["close"], ["client", "ticker"]]
# Notes each text that a grid's first row, that of the total, shows in any frame.
WATCH_TOTALS = """
window.totals = {};
const look = () => {
    for (const grid of document.querySelectorAll("perspective-viewer-datagrid")) {
        const [row] = grid.shadowRoot.querySelectorAll("tbody tr");
        if (row) totals[[...row.cells].map((cell) => cell.textContent).join(" ")] = true;
    }
    requestAnimationFrame(look);
};
look();
"""


def split(orientation, *children):
    sizes = [1 / len(children)] * len(children)
    parts = {"sizes": sizes, "children": children}
    return {"type": "split-layout", "orientation": orientation} | parts


def test_six_grouped_panels_stay_right_through_replacements(database, start, visit):
    """After each change they hold what SQL gives, and no frame shows a sum that never was."""
    fill(database, 3000)
    options = ["--dsn", database.dsn, "--limit", LIMIT]
    server = start(Server, *options)
    tab = visit(server.url, "waiting")
    tab.forgiven = LOST
    tab.wait_for_cells()
    number = {"fg_mode": "disabled", "number_format": {"useGrouping": False}}
    grid = {"table": "stock_values", "plugin": "Datagrid", "columns": ["volume", "ticker"]}
    panels = {
        "_".join(group): grid | {"group_by": group, "columns_config": {"volume": number}}
        for group in GROUPS
    }
    tabs = [{"type": "tab-layout", "tabs": [name], "selected": 0} for name in panels]
    pairs = zip(tabs[::2], tabs[1::2], strict=True)
    layout = split("horizontal", *(split("vertical", *pair) for pair in pairs))
    show = f"(workspace) => {VIEWER}.restoreWorkspace(workspace)"
    tab.page.evaluate(show, {"panels": panels, "layout": layout})
    allowed = set()

    def leaves(rows, group):
        """The sums and counts of the groups, in the order of SQL."""
        return sorted(
            (*row["__ROW_PATH__"], row["volume"], row["ticker"])
            for row in rows
            if len(row["__ROW_PATH__"]) == len(group)
        )

    def check():
        [[volume, count]] = database.ask("SELECT sum(volume), count() FROM stock_values")
        allowed.add(f"TOTAL {volume or ''} {count:,}")
        for panel, group in zip(panels, GROUPS, strict=True):
            keys = ", ".join(group).replace("close", "toFloat64(close)")
            sql = f"SELECT {keys}, sum(volume), count() FROM stock_values GROUP BY {keys}"
            expected = sorted(database.ask(sql))
            assert bool(expected) == bool(count)
            wait_until(lambda p=panel, g=group, e=expected: leaves(tab.rows(p), g) == e, 30, sql)
            assert leaves(tab.fresh_rows(panel), group) == expected

    check()
    tab.page.evaluate(WATCH_TOTALS)
    for sql in (
        "ALTER TABLE stock_values UPDATE volume = volume + 1 WHERE 1 SETTINGS mutations_sync = 2",
        "ALTER TABLE stock_values DELETE WHERE ticker = 'FB.N' SETTINGS mutations_sync = 2",
        "INSERT INTO stock_values SELECT * FROM stock_values WHERE client != 'Moe' LIMIT 2000",
        "DELETE FROM stock_values WHERE client = 'Homer'",
        "TRUNCATE TABLE stock_values",
        "INSERT INTO stock_values SELECT now64(3), ['YY.N', 'FB.N'][number % 2 + 1],"
        " ['Moe', 'Lisa'][number % 3 % 2 + 1], 2, 3, 1, 2, number % 7, today() FROM numbers(999)",
    ):
        database.command(sql)
        check()
    server.kill()
    tab.wait_for("reconnecting")
    database.command("DELETE FROM stock_values WHERE ticker = 'FB.N' AND client = 'Moe'")
    start(Server, *options, port=server.port)
    check()
    tab.page.wait_for_timeout(500)
    totals = set(tab.page.evaluate("Object.keys(totals)"))
    assert len(totals) > 5
    assert totals <= allowed


def test_numbers_that_are_not_finite_leave_no_wrong_sums(database, start, visit):
    fill(database, 1)
    database.command("TRUNCATE TABLE stock_values")
    insert = (
        "INSERT INTO stock_values SELECT now64(3), 'AAPL.N', 'Moe', 1, {}, 1, 1, 1, today()"
        " FROM numbers({})"
    )
    database.command(insert.format("5", 40))
    server = start(Server, "--dsn", database.dsn, "--limit", 50)
    tab = visit(server.url, "waiting")
    tab.wait_for_cells()
    tab.restore("newestTicks", group_by=["ticker"], columns=["high", "open"], sort=[])

    def wait_for_sums(high, rows):
        def sums():
            return [[row["high"], row["open"]] for row in tab.rows()] == [[high, rows]] * 2

        wait_until(sums, 30, f"{high} as the sum of {rows} rows")
        assert tab.rows() == tab.fresh_rows("newestTicks")

    wait_for_sums(200, 40)
    database.command(insert.format("[nan, inf, -inf, 5][number + 1]", 4))
    wait_for_sums(205, 44)
    database.command(insert.format("7", 50))  # overwrites them
    wait_for_sums(350, 50)


# ---------------------------------------------------------------------------------------------
# Many rows, slow lines, heavy pivots.


def newest_age(tab):
    """Seconds since the newest row of the blotter."""
    now = datetime.datetime.now(datetime.UTC)
    hour, minute, second = map(float, tab.wait_for_cells()[0][0].split(":"))
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return ((now - midnight).total_seconds() - 3600 * hour - 60 * minute - second) % 86400


def test_the_page_keeps_up_with_100_000_rows_a_second(database, start, visit):
    making = start(Script, "producer.py", "--dsn", database.dsn, "--rows", 25_000)
    tab = visit(start(Server, "--dsn", database.dsn).url)
    ages = []
    for panel in ("historyTable", "volumeHeatmap") * 4:
        began = time.monotonic()
        tab.select(panel)
        tab.page.wait_for_selector(f"perspective-viewer > [slot={panel}]", state="visible")
        assert time.monotonic() - began < 3
        tab.page.wait_for_timeout(1000)
        ages.append(newest_age(tab))
    assert sorted(ages)[len(ages) // 2] < 5, ages
    making.stop()
    [[expected]] = database.ask(f"SELECT sum(volume) FROM (SELECT volume {WINDOW} 25000)")
    wait_until(lambda: sum(row["volume"] for row in tab.rows()) == expected, 30, "newest rows")


def test_the_page_opens_and_follows_over_a_slow_line(database, start, visit):
    """1 Mbit/s: for seconds the connection is silent, since the snapshot is under way."""
    fill(database, 50_000)
    start(Script, "producer.py", "--dsn", database.dsn)
    port = free_port()
    with Link(port, bytes_per_second=125_000) as link:
        options = ["--dsn", database.dsn, "--limit", 50_000, "--allow-origin", link.url]
        server = start(Server, *options, port=port)
        tab = visit("about:blank", None)
        tab.forgiven = LOST
        with tab.page.expect_websocket(timeout=60_000):  # after the browser build
            tab.page.goto(link.url)
        began = time.monotonic()
        tab.wait_for("live", 90)
        assert time.monotonic() - began > 5
        # What came while the snapshots were on their way is caught up with.
        wait_until(lambda: newest_age(tab) < 3, 40, "new rows")
        assert len(tab.sockets) == 1
        assert "disconnected" not in server.output


def test_a_page_that_falls_behind_starts_over_and_says_so(database, start, visit):
    """The line becomes too slow for the changes: the page takes a snapshot instead."""
    fill(database, 25_000)
    start(Script, "producer.py", "--dsn", database.dsn, "--rows", 2500)
    port = free_port()
    with Link(port) as link:
        start(Server, "--dsn", database.dsn, "--allow-origin", link.url, port=port)
        tab = visit(link.url)
        loaded_at, sockets = tab.loaded_at(), len(tab.sockets)
        link.bytes_per_second = 100_000
        tab.wait_for("catchingUp", 60)
        tab.wait_for_notice("Rows come faster than this page can take them. It starts again")
        link.bytes_per_second = None
        tab.wait_for("live")
        wait_until(lambda: newest_age(tab) < 3, 30, "new rows")
        assert tab.loaded_at() == loaded_at and len(tab.sockets) > sockets
        assert tab.text("#notice") == ""


def test_a_heavy_pivot_slows_nobody_else(database, start, visit):
    """One page puts timestamp into Split By of the raw ticks, and others miss nothing."""
    fill(database, 25_000)
    making = start(Script, "producer.py", "--dsn", database.dsn)
    server = start(Server, "--dsn", database.dsn)
    witness = start(Mirror, server.url)
    tab = visit(server.url)
    witness.wait_for_rows(25_000)
    witness.gaps.clear()
    tab.restore("newestTicks", split_by=["timestamp"])
    tab.page.wait_for_timeout(8000)
    gaps = list(witness.gaps)
    assert len(gaps) > 10 and max(gaps) < 2, gaps
    making.stop()
    window = "ORDER BY _block_number DESC, _block_offset DESC LIMIT 25000"
    wait_until(lambda: witness.rows() == database.rows(window), 30, "all rows")


# ---------------------------------------------------------------------------------------------
# Remember and reset.


def test_changes_are_remembered_and_reset(site, visit):
    tab = visit(site.url)
    original = tab.workspace()
    assert original["panels"]["newestTicks"]["columns"] == SHOWN
    tab.change("newestTicks", columns=[name for name in SHOWN if name != "client"])
    tab.change("candles", filter=[["ticker", "==", "TLT.N"]])
    wait_until(lambda: len(tab.cells()[0]) == 7, 30, "seven columns")
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
    wait_until(lambda: len(tab.wait_for_cells()[0]) == 7, 30, "seven columns")
    assert not differences(tab.workspace(), changed)
    with tab.page.expect_navigation():
        tab.page.click("#reset")
    tab.wait_for("live")
    wait_until(lambda: len(tab.wait_for_cells()[0]) == 8, 30, "eight columns")
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
        tab.store(layout)
        tab.wait_for_notice("Your layout does not fit the tables. This is the original one.")
        tab.wait_for("live")
        wait_until(lambda: len(tab.wait_for_cells()[0]) == 8, 30, f"rows after {name}")
        assert not differences(tab.workspace(), original), name


DIES = "addEventListener('pagehide', (event) => event.stopImmediatePropagation(), true);"


def test_a_layout_on_which_the_tab_died_gives_way_to_the_original(site, visit):
    """A layout counts as such when it was begun to be drawn, and not finished in five seconds."""

    def die(tab):
        """End the page while it draws; it does not hear of that. Returns when it began, in ms."""
        tab.page.reload(wait_until="commit")
        began = wait_until(lambda: tab.stored("drawing"), 30, "the drawing begins")
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
    wait_until(lambda: not soon.stored("drawing"), 30, "it is drawn")

    late = visit_at(die(soon) + 5100)
    late.wait_for_notice("Your layout was not drawn within 5 s. This is the original one.")
    late.wait_for_cells()
    assert not differences(late.workspace(), original)


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
    wait_until(lambda: tab.themes() == DARK, 30, "dark like the system")
    tab.page.click("#theme")
    wait_until(lambda: tab.themes() == LIGHT, 30, "light as the person wants it")
    tab.page.emulate_media(color_scheme="light")
    tab.page.emulate_media(color_scheme="dark")
    tab.page.reload()
    tab.wait_for("live")
    tab.wait_for_cells()
    assert tab.themes() == LIGHT
    tab.page.click("#theme")
    wait_until(lambda: tab.themes() == DARK, 30, "dark as the person wants it")
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
    tab.page.route("http://localhost:8080/**", lambda route: route.abort())
    tab.page.goto(PAGE)
    tab.wait_for_notice("No answer from localhost:8080.")


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
    wait_until(lambda: tab.wait_for_cells()[0][1:] == ["NYSE"], 30, "the new column")


def test_another_version_of_the_page_and_a_full_server(site, start, visit, tmp_path):
    """The page loads itself anew; and a second one is told that the server takes only one."""
    server = start(Server, *site.options)
    tab = visit(server.url)
    tab.forgiven = LOST
    server.kill()
    changes = {
        "perspective_server.py": ("MAX_VIEWERS = 2000", "MAX_VIEWERS = 1"),
        "prsp-viewer.html": ("<header>", '<header id="newer">'),
    }
    start(ChangedServer, tmp_path, changes, *site.options, port=server.port)
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


NO_WEBGL = """
for (const canvas of [HTMLCanvasElement, OffscreenCanvas]) {
    const original = canvas.prototype.getContext;
    canvas.prototype.getContext = function (kind, ...options) {
        return kind.startsWith("webgl") ? null : original.call(this, kind, ...options);
    };
}
"""


def test_a_browser_without_webgl(site, visit):
    tab = visit(site.url, init=NO_WEBGL)
    tab.wait_for_notice("This browser has no WebGL 2")
    tab.wait_for_other_cells()


def test_charts_come_back_after_the_graphics_process_died(site, visit):
    tab = visit(site.url)
    tab.forgiven = "CONTEXT_LOST_WEBGL"
    tab.wait_for_marks("candles")
    # A page that nobody sees waits: a browser with many pages takes one's context for another's.
    tab.page.evaluate("Object.defineProperty(document, 'hidden', { writable: true, value: true })")
    with tab.page.expect_console_message(lambda message: "CONTEXT_LOST" in message.text):
        tab.page.context.browser.new_browser_cdp_session().send("Browser.crashGpuProcess")
    tab.page.wait_for_timeout(1000)
    with tab.loaded_anew():
        tab.page.evaluate("document.hidden = false; dispatchEvent(new Event('visibilitychange'))")
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
    assert page.get_by_role("status").text_content() == "live"
    assert page.get_attribute("#notice", "role") == "alert"
    for name in ("theme", "reset"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        assert page.locator(f"#{name}").inner_text()
    for dark in (False, True):
        assert page.evaluate("document.documentElement.classList.contains('dark')") == dark
        colours = """(selector) => [document.body, document.querySelector(selector)].map(
            (element, text) => getComputedStyle(element)[text ? "color" : "backgroundColor"])"""
        for selector in ("#state", ".figure", "#rows", "#theme"):
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
