"""The page in headless Chromium shows what ClickHouse has, and outlives its connection."""

import datetime
import re
import time

import pytest
from browser import CHARTS, GRIDS, LOST, SHOWN, VIEWER, differences
from clickhouse_http import ClickHouseProcess
from conftest import (
    QUICK_HISTORY,
    Mirror,
    Script,
    Server,
    Site,
    changed_server,
    free_port,
    wait_until,
)
from proxy import Link

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
    f" {Site.limit}",
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
    quick = changed_server(tmp_path, QUICK_HISTORY)
    tab = visit(start(Server, *site.options, script=quick).url)
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
    assert before > 2 * Site.limit
    wait_until(lambda: site.database.count() > before, 30, "more ticks")

    with site.paused():
        for panel, sql in BY_SQL.items():
            names = panels[panel]["columns"]

            def agrees(panel=panel, names=names, sql=sql):
                expected = site.database.ask(sql)  # an insert may have been under way
                shown = [
                    row.get("__ROW_PATH__", []) + [row[name] for name in names]
                    for row in tab.rows(panel)
                ]
                return len(shown) == len(expected) > 2 and all(
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
    tab.wait_for("live")
    assert tab.text("#state") == "live" and tab.text("#notice") == ""
    wait_until(lambda: 500 <= (tab.figure("rate") or 0) <= 2000, 30, "rows a second")
    assert tab.figure("rows") == site.server.health()["rows"] == Site.limit
    wait_until(lambda: 0 < (tab.figure("lag") or 0) < 2000, 30, "the age of the newest tick")
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
    database.fill(1)
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


@pytest.mark.alone
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
        tab.page.wait_for_timeout(1000)  # the last rows are drawn
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


@pytest.mark.alone
def test_a_connection_that_forwards_nothing_is_replaced(site, start, visit):
    port = free_port()
    with Link(port) as link:
        start(Server, *site.options, "--allow-origin", link.url, port=port)
        tab = visit(link.url)
        loaded_at, sockets = tab.loaded_at(), len(tab.sockets)
        link.silence()
        began = time.monotonic()
        tab.page.wait_for_timeout(1000)  # what was on its way is shown
        before = tab.cells()
        wait_until(lambda: tab.text("#state") and len(tab.sockets) > sockets, 30, "another one")
        assert 3 < time.monotonic() - began < 8
        began = time.monotonic()
        tab.wait_for_other_cells(before=before)
        assert time.monotonic() - began < 3
        assert len(tab.sockets) == sockets + 1 and tab.loaded_at() == loaded_at
        tab.wait_for("live")


def test_clickhouse_goes_away_and_comes_back(tmp_path, start, visit):
    with ClickHouseProcess(tmp_path, port=free_port()) as clickhouse:
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
        tab.wait_for_marks("volumeHeatmap")
        tab.page.wait_for_timeout(1000)  # the last rows are drawn
        before = tab.cells()
        assert len(before) > 10 and "" not in before[0]
        tab.page.wait_for_timeout(1000)
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


def test_six_grouped_panels_stay_right_through_replacements(database, start, visit, tmp_path):
    """After each change they hold what SQL gives, and no frame shows a sum that never was.

    The server waits before each message, so that many frames are drawn between a removal and the
    rows that replace what was removed.
    """
    database.fill(3000)
    options = ["--dsn", database.dsn, "--limit", Site.limit]
    messages = "        for name, kind, body in changes:\n"
    script = changed_server(tmp_path, {messages: f"{messages}            time.sleep(0.1)\n"})
    server = start(Server, *options, script=script)
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
        database.command("OPTIMIZE TABLE stock_values FINAL")  # a mutation changes part after part
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
    database.fill(1)
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


@pytest.mark.alone
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


@pytest.mark.long
def test_the_page_opens_and_follows_over_a_slow_line(database, start, visit):
    """1 Mbit/s: for seconds the connection is silent, since the snapshot is under way."""
    database.fill(50_000)
    start(Script, "producer.py", "--dsn", database.dsn)
    port = free_port()
    with Link(port, bytes_per_second=125_000) as link:
        options = ["--dsn", database.dsn, "--limit", 50_000, "--allow-origin", link.url]
        server = start(Server, *options, port=port)
        tab = visit("about:blank", None)
        tab.forgiven = LOST
        with tab.page.expect_websocket(timeout=120_000):  # after the browser build
            tab.page.goto(link.url)
        began = time.monotonic()
        tab.wait_for("live", 90)
        assert time.monotonic() - began > 5
        # What came while the snapshots were on their way is caught up with.
        wait_until(lambda: newest_age(tab) < 3, 40, "new rows")
        assert len(tab.sockets) == 1
        assert "disconnected" not in server.output


@pytest.mark.alone
def test_a_page_that_falls_behind_starts_over_and_says_so(database, start, visit):
    """The line becomes too slow for the changes: the page takes a snapshot instead."""
    database.fill(25_000)
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


@pytest.mark.alone
def test_a_heavy_pivot_slows_nobody_else(database, start, visit):
    """One page puts timestamp into Split By of the raw ticks, and others miss nothing."""
    database.fill(25_000)
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
