"""The page in headless Chromium shows what ClickHouse has, and outlives its connection."""

import datetime
import decimal
import re
import time

import pytest
from browser import CHARTS, GRIDS, LOST, SHOWN, VIEWER, coloured, differences
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
    "tickers": f"""SELECT ticker, toFloat64(toString(argMax(close, {ARRIVAL}))) AS last,
        (last - (toFloat64(toString(argMin(open, {ARRIVAL}))) AS first)) / first,
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
    """A change in per cent, rounded as it is stored, with a sign unless it is zero."""
    return re.sub(r"[+-](?=0\.00%)", "", f"{100 * decimal.Decimal(change):+.2f}%")


def total(tab, column):
    """The sum of a column of the history."""
    return sum(row[column] for row in tab.rows("historyTable"))


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
    tab.wait_for_cells("historyTable")
    before = total(tab, "ticks")
    assert before > 2 * Site.limit
    wait_until(lambda: site.database.count() > before, "more ticks")

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
                    one == other or one == pytest.approx(other, rel=1e-6, abs=1e-6)
                    for row, line in zip(shown, expected, strict=True)
                    for one, other in zip(row, line, strict=True)
                )

            wait_until(agrees, f"{panel} as SQL gives it")

        def cells():
            return [row[1:] for row in tab.cells("tickers")]

        def tickers():
            return [
                [f"{last:,.2f}", signed(change), f"{high:,.2f}", f"{low:,.2f}", f"{volume:,}"]
                for _, last, change, high, low, volume in site.database.ask(BY_SQL["tickers"])
            ]

        wait_until(lambda: cells() == tickers(), lambda: (cells(), tickers()))

        def totals():
            return site.database.ask("SELECT count(), sum(volume) FROM stock_values")

        wait_until(lambda: [(total(tab, "ticks"), total(tab, "volume"))] == totals(), totals)
        rows = {tuple(row["__ROW_PATH__"]): row for row in tab.rows("historyTable")}
        # Several ticks may share the last millisecond.
        pair = "ticker, client"
        for *group, closes in site.database.ask(
            f"SELECT {pair}, groupArray(close) FROM stock_values WHERE ({pair}, timestamp) IN"
            f" (SELECT {pair}, max(timestamp) FROM stock_values GROUP BY {pair}) GROUP BY {pair}",
        ):
            assert any(rows[*group]["close"] == pytest.approx(close) for close in closes)
    for panel in CHARTS:
        tab.select(panel)
        tab.wait_for_marks(panel, other_than=pictures[panel])


def test_the_status_line_says_how_the_server_is_doing(site, visit):
    tab = visit(site.url)
    tab.wait_for("live")
    assert tab.text("#state") == "live" and tab.text("#notice") == ""
    wait_until(lambda: 500 <= (tab.figure("rate") or 0) <= 2000, "rows a second")
    assert tab.figure("rows") == site.server.health()["rows"] == Site.limit
    wait_until(lambda: 0 < (tab.figure("lag") or 0) < 2000, "the age of the newest tick")
    other = visit(site.url)
    wait_until(lambda: tab.figure("viewers") == other.figure("viewers") == 2, "two viewers")
    other.page.goto("about:blank")
    wait_until(lambda: tab.figure("viewers") == 1, "one viewer")
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
    wait_until(lambda: tab.cells() == [shown], "the row")
    assert tab.rows()[0]["timestamp"] == 1_614_888_367_089


def config(tab, panel, *keys):
    return [tab.workspace()["panels"][panel].get(key) for key in keys]


def test_the_dashboard_follows_the_data(database, start, visit):
    """Tickers come after the page; and then one with a tiny price, and more than a chart holds."""
    database.create_table()
    server = start(Server, "--dsn", database.dsn)
    tab = visit(server.url, "waiting")
    tab.page.wait_for_selector("perspective-viewer:not(.empty)")
    assert config(tab, "candles", "filter", "title") == [
        [["ticker", "==", "AAPL.N"]],
        "AAPL.N, two-second candles",
    ]
    database.command(
        "INSERT INTO stock_values SELECT now64(3), concat('T', toString(number % 40)), 'Moe',"
        " 0.00000123, 40123.5, 0.00000123, if(number % 40 = 11, 0.00000123, 1.08213),"
        " number % 40, today() FROM numbers(400)"
    )
    wait_until(lambda: config(tab, "candles", "filter") == [[["ticker", "==", "T39"]]], "T39")
    assert config(tab, "historyClose", "title") == ["T39 history"]
    [[largest]] = config(tab, "volumeHeatmap", "filter")
    assert largest == ["ticker", "in", [f"T{n}" for n in range(39, 19, -1)]]
    prices = ["40,123.50", "0.00000123"]
    expected = {"T1": ["1.08213", *prices], "T11": ["0.00000123", *prices]}

    def shown():
        rows = {row[0]: [row[1], *row[3:5]] for row in tab.cells("tickers")}
        return expected.items() <= rows.items()

    wait_until(shown, expected)
    grid = tab.page.locator("perspective-viewer-datagrid[slot=tickers]")
    tab.after(grid.get_by_text("T11", exact=True).click)
    for panel, title in (("candles", "T11, two-second candles"), ("historyClose", "T11 history")):
        assert config(tab, panel, "filter", "title") == [[["ticker", "==", "T11"]], title]


def test_an_axis_comes_back_when_an_odd_price_is_gone(database, start, visit):
    database.fill(2000)
    tab = visit(start(Server, "--dsn", database.dsn).url, "waiting")
    marks = coloured(tab.wait_for_marks("candles"))
    database.command(
        "INSERT INTO stock_values SELECT max(timestamp), 'AAPL.N', 'Moe', 1e5, 1e5, 1e5, 1e5, 1,"
        " today() FROM stock_values"
    )
    wait_until(lambda: coloured(tab.picture("candles")) < marks / 4, "flat candles")
    database.command("DELETE FROM stock_values WHERE high = 1e5")
    wait_until(lambda: coloured(tab.picture("candles")) > marks / 2, "candles as before")


def test_prices_flash_when_they_change(site, visit):
    tab = visit(site.url)
    flashes = """() => [...document.querySelector("perspective-viewer-datagrid[slot=tickers]")
        .shadowRoot.querySelectorAll("tbody td")].map((cell) => cell.style.animationName)"""

    def flashed():
        seen.update(name[:9] for name in tab.page.evaluate(flashes))
        return {"pulse_pos", "pulse_neg"} <= seen

    seen = set()
    wait_until(flashed, "prices flash")


# A table of one's own: its columns, what is in them, and (plugin, group, split) of its charts.
DASHBOARDS = {
    "foreign exchange": (
        "time DateTime64(3), id UInt32, pair String, bid Float64, venue LowCardinality(String)",
        "now64(3) - toIntervalMillisecond(number * 100), number, ['EUR', 'JPY'][number % 2 + 1],"
        " [1.08213, 0.00000123][number % 2 + 1], ['LMAX', 'CME'][number % 4 % 3 % 2 + 1]",
        {
            "overTime": ("Y Line", ["time by 0.2 s"], ["pair"], ["bid"]),
            "byCategory": ("Heatmap", ["pair"], ["venue"], ["bid"]),
        },
        r"1\.08213|0\.00000123",
    ),
    "sensors": (
        "at DateTime, ok Bool, celsius Float32",
        "now() - number, number % 3 = 0, -5 + number % 7 / 10",
        {
            "overTime": ("Y Line", ["at by 2 s"], ["ok"], ["celsius"]),
            "byCategory": ("X Bar", ["ok"], [], ["celsius"]),
        },
        r"-[45](\.\d)?",
    ),
    "a log without a number": (
        "at DateTime64(9), trace String, level LowCardinality(String), status UInt16",
        "now64(9) - number, hex(MD5(toString(number))), ['INFO', 'WARN'][number % 2 + 1], 200",
        {
            "overTime": ("Y Area", ["at by 2 s"], ["level"], ["number of rows"]),
            "byCategory": ("X Bar", ["level"], [], ["number of rows"]),
        },
        "200",
    ),
    "without a time": (
        "country String, product String, amount Decimal(9, 2)",
        "['CH', 'DE', 'FR'][number % 3 + 1], ['a', 'b'][number % 2 + 1], 40123.5 + number % 30",
        {"byCategory": ("Heatmap", ["country"], ["product"], ["amount"])},
        r"40,1\d\d\.5",
    ),
    "days": (
        "day Date, sales Int32",
        "toDate('2026-07-01') + number % 30, number % 100",
        {"overTime": ("Y Line", ["day"], [], ["sales"])},
        r"\d+",
    ),
    "60 columns": (
        "t DateTime64(3), " + ", ".join(f"x{n} Float64" for n in range(59)),
        "now64(3) - number, " + ", ".join(f"sin(number / {n + 9})" for n in range(59)),
        {"overTime": ("Y Line", ["t by 2 s"], [], ["x0"])},
        r"-?0(\.\d+)?|-?1",
    ),
    "names only": ("name String", "toString(number)", {}, r"\d+"),
}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_drawn_from_the_columns_of_any_table(database, start, visit, name):
    """The table is empty at first. What a person makes of it stays."""
    columns, values, charts, number = DASHBOARDS[name]
    database.create_table()
    source = f"{database.name}.mine"
    settings = "enable_block_number_column = 1, enable_block_offset_column = 1"
    database.client.command(
        f"CREATE TABLE {source} ({columns}) ENGINE MergeTree ORDER BY () SETTINGS {settings}"
    )
    server = start(Server, "--dsn", database.dsn, "--table", "mine")
    tab = visit(server.url, "waiting", timezone_id="America/Los_Angeles")
    tab.page.wait_for_selector("perspective-viewer:not(.empty)")
    database.client.command(f"INSERT INTO {source} SELECT {values} FROM numbers(300)")

    def shown():
        panels = tab.workspace()["panels"]
        keys = ("plugin", "group_by", "split_by", "columns")
        drawn = {name: tuple(panel[key] for key in keys) for name, panel in panels.items()}
        return drawn.pop("rows")[3] == re.findall(r"(\w+) [A-Z]", columns) and drawn == charts

    wait_until(shown, lambda: tab.workspace()["panels"])
    for panel in charts:
        tab.wait_for_marks(panel)
    cells = tab.wait_for_cells("rows")
    assert all(re.fullmatch(number, row[-1 if name != "foreign exchange" else 3]) for row in cells)
    if name == "days":  # a day is the stored one west of UTC, too
        assert cells[0][0] == "7/30/26"
        assert config(tab, "overTime", "columns_config")[0]["day"]["date_format"]["timeZone"]
    tab.change("rows", title="Mine")
    tab.page.reload()
    wait_until(lambda: tab.cells("rows"), "rows")
    assert config(tab, "rows", "title") == ["Mine"] and shown()


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


@pytest.mark.long
def test_the_page_outlives_thirty_restarts_of_the_server(site, start, visit):
    server = start(Server, *site.options)
    tab = visit(server.url)
    tab.forgiven = LOST
    loaded_at = tab.loaded_at()
    for _ in range(30):
        server.kill()
        server = start(Server, *site.options, port=server.port)
        wait_until(lambda server=server: server.health()["viewers"], "the page")
        tab.wait_for("live")
    assert tab.loaded_at() == loaded_at and tab.text("#notice") == ""
    with site.paused():
        sql = f"SELECT sum(volume) FROM (SELECT volume {WINDOW} {Site.limit})"

        def agrees():
            [[volume]] = site.database.ask(sql)
            return sum(row["volume"] for row in tab.rows()) == volume

        wait_until(agrees, "the newest rows, each once")


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
        wait_until(lambda: tab.text("#state") and len(tab.sockets) > sockets, "another one")
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
            wait_until(lambda p=panel, g=group, e=expected: leaves(tab.rows(p), g) == e, sql)
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

        wait_until(sums, f"{high} as the sum of {rows} rows")
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
    for panel in ("historyVolume", "volumeHeatmap") * 4:
        began = time.monotonic()
        tab.select(panel)
        tab.page.wait_for_selector(f"perspective-viewer > [slot={panel}]", state="visible")
        assert time.monotonic() - began < 3
        tab.page.wait_for_timeout(1000)
        ages.append(newest_age(tab))
    assert sorted(ages)[len(ages) // 2] < 5, ages
    making.stop()
    [[expected]] = database.ask(f"SELECT sum(volume) FROM (SELECT volume {WINDOW} 25000)")
    wait_until(lambda: sum(row["volume"] for row in tab.rows()) == expected, "newest rows")


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
        wait_until(lambda: newest_age(tab) < 3, "new rows")
        assert len(tab.sockets) == 1
        assert "disconnected" not in server.output


# Each message to the page's engine is held back for `slow` ms, one after the other.
SLOW_ENGINE = """
window.slow = 0;
let last = Promise.resolve();
for (const kind of [Worker, MessagePort]) {
    const post = kind.prototype.postMessage;
    kind.prototype.postMessage = function (...message) {
        if (!slow) return post.apply(this, message);
        last = last.then(() => new Promise((resolve) => setTimeout(resolve, slow)));
        last.then(() => post.apply(this, message));
    };
}
Object.defineProperty(document, "hidden", { writable: true, value: false });"""


@pytest.mark.alone
def test_a_page_that_falls_behind_starts_over_and_says_so_unless_it_is_hidden(site, visit):
    tab = visit(site.url, init=SLOW_ENGINE)
    loaded_at = tab.loaded_at()
    tab.page.evaluate("() => { document.hidden = true; slow = 500; }")
    tab.page.wait_for_timeout(12_000)
    assert len(tab.sockets) == 1
    tab.page.evaluate("() => { document.hidden = false; }")
    tab.wait_for("catchingUp")
    tab.wait_for_notice("Rows come faster than this page can take them. It starts again")
    tab.page.evaluate("() => { slow = 0; }")
    tab.wait_for("live")
    wait_until(lambda: newest_age(tab) < 3, "new rows")
    assert tab.loaded_at() == loaded_at and len(tab.sockets) > 1
    assert tab.text("#notice") == ""


@pytest.mark.alone
def test_a_processor_six_times_as_slow_keeps_up(site, visit):
    tab = visit("about:blank", None)
    session = tab.page.context.new_cdp_session(tab.page)
    session.send("Emulation.setCPUThrottlingRate", {"rate": 6})
    tab.page.goto(site.url)
    tab.wait_for("live")
    wait_until(lambda: newest_age(tab) < 3, "new rows")
    tab.page.wait_for_timeout(12_000)  # a page that falls behind says so after eight
    wait_until(lambda: newest_age(tab) < 3, "new rows")
    assert len(tab.sockets) == 1 and tab.text("#notice") == ""


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
    wait_until(lambda: witness.rows() == database.rows(window), "all rows")
