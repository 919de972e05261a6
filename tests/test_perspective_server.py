"""The tail: what ClickHouse has is what Perspective has, each row once, whatever breaks.

Rows are compared as multisets of full rows, not by their number: `agree` waits until a viewer on
a real websocket has what ClickHouse has. Where nothing but inserts happened, `delivered` tells
besides that no row was handed over twice or by reading the window anew.
"""

import asyncio
import collections
import contextlib
import os
import signal
import socket
import textwrap
import time
import types

import perspective
import pyarrow
import pytest
from clickhouse_http import ClickHouseProcess
from conftest import (
    COLUMNS,
    ROOT,
    Database,
    Script,
    Server,
    Viewer,
    counted,
    free_port,
    wait_until,
)
from proxy import Proxy

import perspective_server
import producer
from perspective_server import CANDLES, COLUMNS_OF, NEWEST, TABLE, TICKERS, Tail

DAY = 86_400_000
HEALTH = {
    *("clickhouse", "table", "rows", "delivered", "rows_per_second", "lag_ms", "poll_ms"),
    "viewers",
}


def now_ms():
    return int(time.time() * 1000)


def insert(database, rows=100, at=None, step=1, **settings):
    """Insert one block, its rows `step` ms apart from time `at` on; returns them, see `counted`."""
    batch = producer.Market().draw(rows, 0, 1)
    at = now_ms() if at is None else at
    batch[0] = list(range(at, at + rows * step, step))
    with contextlib.closing(database.connect()) as client:
        client.insert(
            "stock_values",
            batch,
            database=database.name,
            column_names=COLUMNS,
            column_type_names=list(producer.COLUMNS.values()),
            column_oriented=True,
            settings=settings,
        )
    columns = (column if isinstance(column, list) else column.tolist() for column in batch)
    return collections.Counter(zip(*columns, strict=True))


def agree(viewer, database, order="", seconds=15):
    """Wait until the live table has the rows that ClickHouse has, and see that it stays so."""
    expected = database.rows(order)
    wait_until(lambda: viewer.rows() == expected, seconds, "the same rows in both")
    time.sleep(0.15)
    assert viewer.rows() == expected
    return expected


def news(server):
    """What the server has logged since it was up, without times and details."""
    lines = server.lines[[i for i, line in enumerate(server.lines) if "open http" in line][0] + 1 :]
    return [line.split(" ", 1)[1].split(":")[0].split(" (")[0] for line in lines]


def up(server, seconds=15):
    """Wait until /healthz says that all is well."""
    wait_until(lambda: server.get("/healthz")[0] == 200, seconds, lambda: server.output)
    return server


def health(server, clickhouse):
    """Wait until /healthz names this state; returns all that it says, which has the right form."""
    wait_until(lambda: server.health()["clickhouse"] == clickhouse, 15, clickhouse)
    status, headers, _ = server.get("/healthz")
    assert status == (200 if clickhouse == "up" else 503)
    assert headers["Content-Type"].startswith("application/json")
    said = server.health()
    assert set(said) == HEALTH
    assert said["table"] == "stock_values"
    return said


class Program(Script):
    """A Python program given as text, which can import the scripts."""

    def __init__(self, folder, text):
        (folder / "program.py").write_text(textwrap.dedent(text))
        super().__init__(folder / "program.py", env={"PYTHONPATH": str(ROOT)})


@pytest.fixture
def table(database):
    """A database with the empty table in it."""
    with contextlib.closing(producer.connect(database.dsn)) as client:
        producer.create_table(client, database.name)
    client = database.connect()  # one for all commands: connecting is what takes the time
    database.connect = lambda: client
    return database


@pytest.fixture
def fragile(tmp_path):
    """A ClickHouse of this test's own, to be killed; it is not started yet."""
    process = ClickHouseProcess(tmp_path / "fragile", port=free_port())
    yield process
    process.kill()


@pytest.fixture
def proxy(clickhouse):
    with Proxy(clickhouse.port) as between:
        yield between


def through(proxy, database, options=""):
    """The database's DSN by way of the proxy."""
    return database.process.dsn_of(database.name, port=proxy.port) + options


def reads_rows(head):
    """For the proxy's `when`: requests for rows, not for metadata or counts."""
    return b"ArrowStream" in head


# ---------------------------------------------------------------------------------------------
# Every row once.


def test_three_producers_batches_of_1_and_of_100_000_rows_and_merges(database, start):
    server = start(Server, "--dsn", database.dsn, "--interval", 0.05, "--limit", 1_000_000)
    batches = [(1, 0.01, 150), (250, 0.05, 40), (100_000, 1, 1)]
    producers = [
        start(
            *(Script, "producer.py", "--dsn", database.dsn),
            *("--rows", rows, "--interval", interval, "--batches", number),
        )
        for rows, interval, number in batches
    ]
    up(server, 20)
    while any(script.process.poll() is None for script in producers):
        database.command("OPTIMIZE TABLE stock_values FINAL")
    for script, (rows, _, number) in zip(producers, batches, strict=True):
        assert script.wait() == 0
        assert f"{rows * number:,} rows written" in script.output
    total = sum(rows * number for rows, _, number in batches)
    server.wait_for_delivered(total)
    with Viewer(server.url) as viewer:
        assert agree(viewer, database).total() == total
    assert server.health()["delivered"] == total
    assert news(server)[-1] in ("connected", "the table is there"), server.output


@pytest.mark.parametrize("interval", [0.02, 2])
def test_polls_faster_and_slower_than_inserts(database, start, interval):
    server = start(Server, "--dsn", database.dsn, "--interval", interval)
    script = start(
        *(Script, "producer.py", "--dsn", database.dsn),
        *("--rows", 40, "--interval", 0.1, "--batches", 25),
    )
    viewer = start(Viewer, server.url)
    assert script.wait() == 0
    server.wait_for_delivered(1000)
    agree(viewer, database)
    assert server.health()["delivered"] == 1000


def test_rows_that_come_late_and_out_of_order(table, start):
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.05))
    viewer = start(Viewer, server.url)
    expected = collections.Counter()
    # From just now over the ten minutes that a poll searches first to long before and after.
    for at in (0, -5_000, -599_000, -660_000, -3_600_000, -DAY, -DAY * 365 * 60, DAY * 365 * 100):
        expected += insert(table, 20, now_ms() + at)
    expected += insert(table, 1000, now_ms() - 2 * DAY, step=300_000)  # a week, in one block
    with contextlib.closing(table.connect()) as client:
        order = "ORDER BY cityHash64(timestamp, volume)"
        client.command(f"CREATE TABLE {table.name}.mixed AS {table.name}.stock_values")
        client.command(f"INSERT INTO {table.name}.mixed SELECT * FROM {table.name}.stock_values")
    table.command(f"INSERT INTO stock_values SELECT * FROM {table.name}.mixed {order}")
    expected += expected
    agree(viewer, table)
    assert viewer.rows() == expected
    assert server.health()["delivered"] == expected.total()
    assert news(server) == ["connected"]


def test_a_poll_that_brings_more_rows_than_the_limit(table, start):
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.05, "--limit", 1000))
    viewer = start(Viewer, server.url)
    newest = "ORDER BY _block_number DESC, _block_offset DESC LIMIT 1000"
    insert(table, 700)
    agree(viewer, table)
    insert(table, 700)
    agree(viewer, table, newest)
    insert(table, 2500, now_ms() - DAY)
    agree(viewer, table, newest)
    server.process.send_signal(signal.SIGSTOP)
    for rows in (400, 400, 400, 1):
        insert(table, rows)
    server.process.send_signal(signal.SIGCONT)
    agree(viewer, table, newest)
    assert news(server) == ["connected"]


def test_a_server_restarted_shows_the_newest_rows_again_once_each(table, start):
    at = now_ms() - 10_000
    for late in (2000, 0, 4000, 1000, 3000):  # blocks in another order than times
        insert(table, 1000, at + late)
    table.command("OPTIMIZE TABLE stock_values FINAL")
    for limit in (1000, 10_000, 1000):
        server = up(start(Server, "--dsn", table.dsn, "--interval", 0.05, "--limit", limit))
        newest = f"ORDER BY {perspective_server.NEWEST_FIRST} LIMIT {limit}"
        with Viewer(server.url) as viewer:
            assert agree(viewer, table, newest).total() == min(limit, 5000)
        assert server.stop() == 0


def test_started_before_clickhouse_before_the_database_and_before_the_producer(fragile, start):
    server = start(Server, "--dsn", fragile.dsn, "--interval", 0.05)
    said = health(server, "down")
    assert said["rows"] == said["delivered"] == said["rows_per_second"] == said["viewers"] == 0
    assert said["lag_ms"] is None
    server.wait_for("ClickHouse is away")
    fragile.start()
    assert health(server, "no table")["rows"] == 0
    database = Database(fragile)
    database.name = "test"
    with contextlib.closing(database.connect()) as client:
        client.command("CREATE DATABASE test")
    time.sleep(0.3)
    script = start(Script, "producer.py", "--dsn", fragile.dsn, "--batches", 4)
    assert script.wait() == 0
    server.wait_for_rows(1000)
    assert health(server, "up")["rows"] == 1000
    agree(start(Viewer, server.url), database)
    assert news(server) == [
        "ClickHouse is away, trying again",
        "no table test.stock_values",
        "the table is there",
    ]


def test_timestamps_are_the_instants_inserted_in_every_time_zone(table, start):
    new_york = {"TZ": "America/New_York"}
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.05, env=new_york))
    viewer = start(Viewer, server.url)
    instant = now_ms() - 60_000
    inserted = insert(table, 1, instant)
    server.wait_for_rows(1)
    assert viewer.rows() == inserted

    async def read():
        view = await (await viewer.client.open_table("stock_values")).view()
        return await view.to_json()

    assert [row["timestamp"] for row in viewer.run(read())] == [instant]
    before = now_ms()
    options = ["--dsn", table.dsn, "--batches", 2]
    assert start(Script, "producer.py", *options, env=new_york).wait() == 0
    server.wait_for_rows(501)
    for row in agree(viewer, table) - inserted:
        assert before - 1000 < row[0] < now_ms()
        assert row[-1] == row[0] // DAY


# ---------------------------------------------------------------------------------------------
# Changes that are no inserts. Each is done to a Tail in this process, whose polls the test makes
# itself: after each statement, or one poll that finds all of them done. And then, one after the
# other, to a server that polls as it likes.

BLOCK = (
    "INSERT INTO stock_values SELECT now64(3) - toIntervalMillisecond(number), 'NEW', 'Barney',"
    " 2, 3, 1, 2, rand() % 1000000, today() FROM numbers({})"
)
# A part of many blocks, whose rows carry numbers that are the target table's, too.
SOURCE = [
    "DROP TABLE IF EXISTS stock_values_source SYNC",
    "CREATE TABLE stock_values_source AS stock_values",
    *["INSERT INTO stock_values_source SELECT * FROM stock_values LIMIT 30"] * 10,
    "OPTIMIZE TABLE stock_values_source FINAL",
]
CREATE = "CREATE TABLE {} ({}) ENGINE = MergeTree ORDER BY (timestamp, ticker) SETTINGS {}".format(
    "{}",
    ", ".join(f"{name} {kind}" for name, kind in producer.COLUMNS.items()),
    ", ".join(f"{name} = {value}" for name, value in producer.SETTINGS.items()),
)
SYNC = "SETTINGS mutations_sync = 2"
RECREATE = ["DROP TABLE stock_values SYNC", CREATE.format("stock_values")]
CHANGES = {
    "merged": ["OPTIMIZE TABLE stock_values FINAL"],
    "truncated": ["TRUNCATE TABLE stock_values"],
    "refilled": ["TRUNCATE TABLE stock_values", BLOCK.format(300)],
    "refilled and updated": [  # the rows of the patch are as many as those that went
        "TRUNCATE TABLE stock_values",
        BLOCK.format(50),
        "UPDATE stock_values SET volume = 1 WHERE 1",
        BLOCK.format(350),
        "UPDATE stock_values SET volume = 2 WHERE volume > 1",
    ],
    "deleted": ["DELETE FROM stock_values WHERE volume % 3 = 0"],
    "deleted and merged": [
        "DELETE FROM stock_values WHERE volume % 3 = 0",
        "OPTIMIZE TABLE stock_values FINAL",
    ],
    "deleted by ALTER": [f"ALTER TABLE stock_values DELETE WHERE volume % 3 = 0 {SYNC}"],
    "deleted, then inserted": [
        f"ALTER TABLE stock_values DELETE WHERE ticker < 'M' {SYNC}",
        BLOCK.format(50),
    ],
    "inserted, then updated": [
        BLOCK.format(50),
        f"ALTER TABLE stock_values UPDATE volume = volume + 1 WHERE 1 {SYNC}",
    ],
    "updated slowly": [
        "ALTER TABLE stock_values UPDATE volume = volume + 1 + sleepEachRow(0.002) WHERE 1",
        BLOCK.format(50),
    ],
    "patched": ["UPDATE stock_values SET volume = volume + 1 WHERE ticker < 'N'"],
    "patched twice, with an insert": [
        "UPDATE stock_values SET volume = volume + 1 WHERE ticker < 'N'",
        BLOCK.format(50),
        "UPDATE stock_values SET volume = volume + 1 WHERE ticker > 'C'",
    ],
    "deleted and updated": [
        "DELETE FROM stock_values WHERE volume % 3 = 0",
        f"ALTER TABLE stock_values UPDATE volume = volume + 1 WHERE 1 {SYNC}",
    ],
    "expired": [
        "ALTER TABLE stock_values MODIFY TTL toDateTime(timestamp) + INTERVAL 1 DAY"
        " SETTINGS materialize_ttl_after_modify = 0",
        "OPTIMIZE TABLE stock_values FINAL",
    ],
    "partition dropped": ["ALTER TABLE stock_values DROP PARTITION tuple()", BLOCK.format(10)],
    "detached and attached": [
        "ALTER TABLE stock_values DETACH PARTITION tuple()",
        "ALTER TABLE stock_values ATTACH PARTITION tuple()",
    ],
    "attached from another table": [
        *SOURCE,
        "ALTER TABLE stock_values ATTACH PARTITION tuple() FROM stock_values_source",
        "OPTIMIZE TABLE stock_values FINAL",
    ],
    "replaced from another table": [
        *SOURCE,
        "ALTER TABLE stock_values REPLACE PARTITION tuple() FROM stock_values_source",
    ],
    "recreated with fewer blocks": [*RECREATE, BLOCK.format(300)],
    "recreated with as many blocks": [*RECREATE, *[BLOCK.format(100)] * 4],
    "recreated with more blocks": [*RECREATE, *[BLOCK.format(100)] * 6],
    "exchanged": [
        "DROP TABLE IF EXISTS stock_values_other SYNC",
        CREATE.format("stock_values_other"),
        BLOCK.replace("stock_values", "stock_values_other").format(300),
        "EXCHANGE TABLES stock_values AND stock_values_other",
    ],
}


NO_CHANGE = {"merged", "attached from another table"}  # inserts at most


def fill(database):
    """What is in the table before a change: 400 rows in four blocks."""
    for late in (0, 1000, 2000, 2 * DAY):
        insert(database, 100, now_ms() - late)


def done(database):
    """Wait until all mutations are done."""
    sql = f"SELECT count() FROM system.mutations WHERE database = '{database.name}' AND NOT is_done"
    wait_until(lambda: database.command(sql) == 0)


class Local(Tail):
    """A Tail in the test's own process, without its thread."""

    def __init__(self, dsn, interval=0.1, limit=100_000):
        super().__init__(perspective.Server(), dsn, interval, limit)

    def step(self):
        """One round of `run`: a poll, and what is said of it."""
        self.summary_due = 0
        self.stop.clear()
        self.stop.wait = lambda _: self.stop.set()
        self.run()

    def arrow(self, name):
        view = self.perspective.open_table(name).view(columns=list(COLUMNS_OF[name]))
        arrow = view.to_arrow()
        view.delete()
        return pyarrow.ipc.open_stream(arrow).read_all()

    def shown(self, name=TABLE):
        return counted(self.arrow(name))

    def lines(self):
        """The lines of the tickers and of the candles, by time and ticker."""
        tickers, candles = self.arrow(TICKERS).to_pylist(), self.arrow(CANDLES).to_pylist()
        candles.sort(key=lambda candle: -candle["number"])
        assert [candle.pop("number") for candle in candles] == [-i for i in range(len(candles))]
        assert candles == sorted(candles, key=lambda c: (-c["time"].timestamp(), c["ticker"]))
        return {key: pytest.approx(line, rel=1e-6) for key, line in keyed(tickers + candles)}


def keyed(lines):
    return [((line.pop("time", None), line.pop("ticker")), line) for line in lines]


def lines(database, limit=100_000):
    """The same by SQL."""
    with contextlib.closing(database.connect()) as client:

        def ask(group_by, select):
            return client.query_arrow(f"""
                WITH (timestamp, _block_number, _block_offset) AS arrival
                SELECT CAST(ticker AS String) AS ticker, {select},
                    max(high) AS high, min(low) AS low, sum(volume) AS volume
                FROM (SELECT *, _block_number, _block_offset FROM {database.name}.stock_values
                      ORDER BY timestamp DESC, _block_number DESC, _block_offset DESC LIMIT {limit})
                GROUP BY {group_by}
            """).to_pylist()

        tickers = ask(
            "ticker",
            "argMax(close, arrival) AS last,"
            " argMax(toFloat64(close), arrival) / argMin(open, arrival) - 1 AS change",
        )
        candles = ask(
            "time, ticker",
            "fromUnixTimestamp64Milli("
            " intDiv(toUnixTimestamp64Milli(timestamp), 2000) * 2000) AS time,"
            " argMin(open, arrival) AS open, argMax(close, arrival) AS close",
        )
    for candle in candles:
        candle["time"] = candle["time"].replace(tzinfo=None)
    return dict(keyed(tickers + candles))


@pytest.fixture
def tail(table):
    made = Local(table.dsn)
    yield made
    made.close()


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "polled between"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_table_is_read_anew(table, tail, caplog, change, at_once):
    caplog.set_level("INFO")
    fill(table)
    tail.step()
    assert tail.shown() == table.rows()
    for sql in CHANGES[change]:
        table.command(sql)
        if not at_once:
            tail.step()
    if at_once:
        tail.step()
    done(table)
    tail.step()
    assert tail.shown() == tail.shown(NEWEST) == table.rows()
    assert tail.lines() == lines(table)
    insert(table, 50)
    tail.step()
    assert tail.shown() == tail.shown(NEWEST) == table.rows()
    assert tail.lines() == lines(table)
    assert tail.health()["clickhouse"] == "up"
    assert tail.health()["rows"] == table.count()
    news = [message.split(":")[0] for message in caplog.messages]
    if change.startswith("recreated") and not at_once:
        assert news == ["connected", f"no table {table.name}.stock_values", "the table is there"]
    elif change in NO_CHANGE:
        assert news == ["connected"]
        assert tail.delivered == table.count()
    else:
        assert news == ["connected", "the table was changed"]


GROUPED = [
    {"group_by": ["ticker"], "aggregates": {"open": "last", "volume": "sum"}},
    {"group_by": ["client"], "split_by": ["ticker"], "columns": ["volume"]},
    {"group_by": ["client", "ticker"], "group_rollup_mode": "flat"},
    {"group_by": ["date"], "filter": [["ticker", "==", "AAPL.N"]]},
    {"group_by": ["second"], "expressions": {"second": "bucket(\"timestamp\", '1s')"}},
]


def test_a_server_agrees_after_each_of_these_changes(table, start):
    """With views that would make the engine wait for ever if it had but a few threads."""
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.03))
    viewer = start(Viewer, server.url)
    live = viewer.table()
    for config in GROUPED:
        viewer.run(live.view(**config))
    for change in (
        *("refilled", "deleted and merged", "updated slowly", "patched", "expired"),
        *("detached and attached", "recreated with more blocks", "exchanged"),
    ):
        for sql in RECREATE:
            table.command(sql)
        fill(table)
        agree(viewer, table)
        for sql in CHANGES[change]:
            table.command(sql)
        done(table)
        agree(viewer, table)
        insert(table, 50)
        agree(viewer, table)
        assert health(server, "up")["rows"] == table.count()
    said = news(server)
    assert set(said) <= {
        *("connected", "the table was changed"),
        *(f"no table {table.name}.stock_values", "the table is there"),
    }
    assert said.count("the table was changed") <= 1  # it goes on all the time
    assert all(one != two for one, two in zip(said, said[1:], strict=False))


def test_a_table_that_does_not_fit_ends_the_server_at_the_start(table, start):
    table.command("ALTER TABLE stock_values DROP COLUMN volume")
    server = start(Server, "--dsn", table.dsn)
    assert server.wait(5) == 1
    assert news(server)[0].startswith(f"table {table.name}.stock_values does not fit")
    assert "no volume UInt32" in server.lines[-1]
    assert sum("does not fit" in line for line in server.lines) == 1
    assert "Traceback" not in server.output


def test_a_table_that_does_not_fit_later_on_is_waited_for(table, start):
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.03))
    viewer = start(Viewer, server.url)
    fill(table)
    before = agree(viewer, table)
    table.command("RENAME TABLE stock_values TO stock_values_right")
    assert health(server, "no table")["rows"] == 400
    table.command("CREATE TABLE stock_values (timestamp DateTime) ENGINE = Memory")
    server.wait_for("does not fit")
    time.sleep(0.5)
    assert health(server, "no table")["rows"] == 400
    assert viewer.rows() == before
    table.command("DROP TABLE stock_values SYNC")
    table.command("RENAME TABLE stock_values_right TO stock_values")
    insert(table, 10)
    health(server, "up")
    agree(viewer, table)
    # Changed in place, and back.
    table.command("ALTER TABLE stock_values RENAME COLUMN volume TO amount")
    health(server, "no table")
    table.command("ALTER TABLE stock_values RENAME COLUMN amount TO volume")
    health(server, "up")
    agree(viewer, table)
    wrong = f"table {table.name}.stock_values does not fit"
    said = [line for line in news(server) if line != f"no table {table.name}.stock_values"]
    assert said == ["connected", wrong, "the table is there", wrong, "the table is there"]
    assert len(news(server)) <= len(said) + 2


def test_a_table_dropped_in_mid_poll(table, tail, caplog, monkeypatch):
    """No table is not the same as no ClickHouse, whenever it is noticed."""
    tail.step()
    insert(table, 10)
    read_mark = tail.read_mark

    def drop():
        mark = read_mark()
        table.command("DROP TABLE stock_values SYNC")
        return mark

    with monkeypatch.context() as patched:
        patched.setattr(tail, "read_mark", drop)
        tail.step()
    tail.step()
    assert tail.health()["clickhouse"] == "no table"
    assert caplog.messages == [f"no table {table.name}.stock_values: waiting for producer.py"]
    table.command(CREATE.format("stock_values"))
    insert(table, 10)
    tail.step()
    assert tail.shown() == table.rows()


# ---------------------------------------------------------------------------------------------
# ClickHouse and the way to it break.


def test_clickhouse_killed_twice_in_mid_stream(fragile, start):
    fragile.start()
    database = Database(fragile)
    server = start(Server, "--dsn", database.dsn, "--interval", 0.03)
    options = ["--dsn", database.dsn, "--rows", 200, "--interval", 0.02]
    producers = [start(Script, "producer.py", *options) for _ in range(2)]
    viewer = start(Viewer, server.url)
    up(server)
    for rows in (2000, 6000):
        server.wait_for_delivered(rows, 30)
        fragile.kill()
        said = health(server, "down")
        assert said["rows"] >= rows
        assert viewer.rows().total() == said["rows"]  # it goes on showing what it has
        fragile.start()
        health(server, "up")
    server.wait_for_delivered(10_000, 30)
    assert [script.stop() for script in producers] == [0, 0]
    agree(viewer, database)
    written = sum(int(s.lines[-1].split()[0].replace(",", "")) for s in producers)
    assert server.health()["delivered"] == written == database.count()
    said = [line for line in news(server) if not line.startswith("no table")]
    crash = ["ClickHouse is away, trying again", "ClickHouse is back"]
    assert said in ([first, *crash, *crash] for first in ("connected", "the table is there"))


@pytest.mark.parametrize("harm", ["cut_answer", "drop_answer"])
def test_answers_that_break_off(table, proxy, start, harm):
    server = up(start(Server, "--dsn", through(proxy, table), "--interval", 0.03))
    viewer = start(Viewer, server.url)
    insert(table, 100)
    agree(viewer, table)
    for after in (400, 5_000, 20_000):
        arguments = [after] if harm == "cut_answer" else []
        getattr(proxy, harm)(*arguments, when=reads_rows, times=2)
        done = proxy.faults + 2
        insert(table, 2000)
        assert proxy.wait(done)
        agree(viewer, table)
    assert server.health()["delivered"] == 6100
    crash = ["ClickHouse is away, trying again", "ClickHouse is back"]
    assert news(server) == ["connected", *crash * 3]


def test_an_answer_that_ends_too_early_is_not_taken_for_a_whole_one(table, tail):
    """ClickHouse can fail after it has begun to answer; Perspective would take what there is."""
    tail.step()
    insert(table, 1000)
    whole, times = tail.read, []

    def cut(sql):
        tail.client.raw_query, query = lambda *a, **b: query(*a, **b)[:-8], tail.client.raw_query
        times.append(sql)
        return whole(sql)

    tail.read = cut
    tail.step()
    assert times
    assert tail.health()["clickhouse"] == "down"
    assert tail.rows == 0
    tail.read = whole
    tail.step()
    assert tail.shown() == table.rows()
    assert tail.delivered == 1000


def test_slow_answers_do_not_pile_up(table, proxy, start):
    server = up(start(Server, "--dsn", through(proxy, table), "--interval", 0.02))
    viewer = start(Viewer, server.url)
    connections = proxy.connections
    proxy.delay(0.3)
    for _ in range(5):
        insert(table, 100)
        time.sleep(0.1)
    agree(viewer, table)
    said = health(server, "up")
    assert said["poll_ms"] >= 300
    assert said["delivered"] == 500
    assert proxy.connections == connections
    assert news(server) == ["connected"]


@pytest.mark.parametrize("stop", ["proxy", "clickhouse"])
def test_a_clickhouse_that_hangs(table, proxy, start, stop):
    # The option in the DSN is stronger than QUERY_TIMEOUT, for which a test cannot wait.
    dsn = through(proxy, table, "?send_receive_timeout=1")
    server = up(start(Server, "--dsn", dsn, "--interval", 0.03))
    viewer = start(Viewer, server.url)
    insert(table, 100)
    before = agree(viewer, table)
    if stop == "proxy":
        proxy.stall()
        insert(table, 100)
    else:
        table.process.pause()
    try:
        assert health(server, "down")["rows"] == 100
        assert viewer.rows() == before
        time.sleep(1.5)
    finally:
        proxy.pass_on()
        table.process.resume()
    health(server, "up")
    insert(table, 100)
    agree(viewer, table)
    assert server.health()["delivered"] == table.count()
    crash = ["ClickHouse is away, trying again", "ClickHouse is back"]
    assert news(server) == ["connected", *crash]


def test_a_wrong_password_is_told_plainly_and_tried_slowly(fragile, start):
    dsn = fragile.dsn
    fragile.password = "another"
    fragile.start()
    with contextlib.closing(Database(fragile).connect()) as client:
        client.command("CREATE DATABASE test")
    with Proxy(fragile.port) as proxy:
        server = start(
            Server, "--dsn", dsn.replace(str(fragile.port), str(proxy.port)), "--interval", 0.03
        )
        server.wait_for("wrong user or password")
        proxy.delay(0)  # counts
        time.sleep(1.5)
        assert proxy.faults <= 2
        health(server, "down")
        fragile.stop()
        fragile.password = "admin1234"
        fragile.start()
        health(server, "no table")
        assert server.output.count("wrong user or password") == 1
        assert "admin1234" not in server.output


def test_an_arrow_stream_is_cut_into_its_batches(table, tail):
    """Also where a text comes late, so that its number is told in the middle of the stream."""
    fill(table)
    tail.poll()
    for rows in (1, 999, 12_000):
        insert(table, rows)
    table.command("INSERT INTO stock_values (timestamp, ticker) VALUES (now64(3), 'NEW.N')")
    source = f"FROM {table.name}.stock_values"
    for sql in (
        f"SELECT {', '.join(COLUMNS)} {source} ORDER BY _block_number LIMIT 100001",
        f"SELECT ticker, close {source} ORDER BY close LIMIT 7000 OFFSET 300",
        f"SELECT timestamp, toString(volume) AS text {source} ORDER BY ticker DESC",
        f"SELECT 1 AS one {source} LIMIT 1",
        f"SELECT ticker {source} WHERE ticker = 'none'",
    ):
        whole = tail.read(sql)
        expected = pyarrow.ipc.open_stream(whole).read_all()
        cut = list(perspective_server.pieces(whole))
        read = [pyarrow.ipc.open_stream(piece).read_all() for _, piece in cut]
        assert [rows for rows, _ in cut] == [piece.num_rows for piece in read]
        if "ORDER BY _block_number" in sql:
            assert max(rows for rows, _ in cut) <= perspective_server.PIECE
        assert [row for piece in read for row in piece.to_pylist()] == expected.to_pylist()


@pytest.mark.parametrize("rows", [1, 999, 1000, 1001, 5001, 12_000, 30_000])
def test_the_newest_ticks_and_the_lines_of_the_tickers(table, rows):
    tail = Local(table.dsn, limit=20_000)
    for late in (80_000, 70_000, 60_000):
        insert(table, 8000, now_ms() - late)
    tail.step()
    insert(table, rows, now_ms() - rows)
    tail.step()
    assert tail.shown() == table.rows(f"ORDER BY {perspective_server.NEWEST_FIRST} LIMIT 20000")
    assert tail.shown(NEWEST) == table.rows(
        f"ORDER BY {perspective_server.NEWEST_FIRST} LIMIT 1000"
    )
    assert tail.lines() == lines(table, 20_000)
    assert tail.delivered == 20_000 + min(rows, 20_000)
    tail.close()


def test_batches_that_name_other_texts(table, tail):
    """Each record batch of a stream numbers its texts, and they go to Perspective as they are."""
    fill(table)
    tail.step()
    for ticker in ("B", "A", "C", "A"):
        table.command(
            "INSERT INTO stock_values (timestamp, ticker, client, volume)"
            f" SELECT now64(3), '{ticker}', '{ticker} ' || toString(number % 300), number"
            " FROM numbers(4000)"
        )
    tail.step()
    assert tail.shown() == table.rows()
    assert tail.delivered == 16_400


KEPT = [
    {"filter": [["ticker", "==", "AAPL.N"]], "sort": [["volume", "desc"], ["place", "asc"]]},
    {"group_by": ["ticker"], "filter": [["client", "==", "Homer"]], "columns": ["volume"]},
    {"group_by": ["client"], "split_by": ["ticker"], "columns": ["volume", "open"]},
    {
        "group_by": ["ticker"],
        "columns": ["open", "high", "low", "client"],
        "aggregates": {"open": "mean", "high": "max", "low": "min", "client": "distinct count"},
    },
    {
        "columns": ["spread", "ticker"],
        "expressions": {"spread": '"high" - "low"'},
        "filter": [["spread", ">", 0.1]],
        "sort": [["place", "asc"]],
    },
]


def test_views_that_are_kept_agree_with_new_ones(table):
    """Each row that comes takes the place of another, in every view that had that."""
    tail = Local(table.dsn, limit=3000)
    insert(table, 1000)
    tail.step()
    live = tail.perspective.open_table(TABLE)
    kept = [live.view(**config) for config in KEPT]
    for rows in (50, 1950, 700, 2999, 3001, 1, 400):
        insert(table, rows)
        tail.step()
        for view, config in zip(kept, KEPT, strict=True):
            new = live.view(**config)
            mine, expected = view.to_columns(), new.to_columns()
            new.delete()
            assert mine.keys() == expected.keys()
            for name in mine:
                assert mine[name] == expected[name] or mine[name] == pytest.approx(expected[name])
    tail.close()


def test_the_ring_turns_and_is_mended(table):
    """Blocks of all sizes, larger than what is left until its end, and a place that is lost."""
    tail = Local(table.dsn, limit=3000)
    tail.step()
    newest = "ORDER BY _block_number DESC, _block_offset DESC LIMIT"
    for rows in (1, 999, 1500, 700, 2999, 3000, 3001, 6500, 1, 400):
        insert(table, rows)
        tail.step()
        assert tail.lines() == lines(table, 3000)
        assert tail.shown() == table.rows(f"{newest} 3000")
        assert tail.shown(NEWEST) == table.rows(f"{newest} 1000")
        assert (
            len(set(tail.perspective.open_table(TABLE).view().to_columns()["place"])) == tail.rows
        )
    for change in ("INSERT", "DELETE FROM stock_values WHERE volume % 3 = 0", "INSERT"):
        if change == "INSERT":
            insert(table, 500, now_ms() - 3_600_000)  # too late for a full window
        else:
            table.command(change)
        tail.step()
        assert tail.lines() == lines(table, 3000)
    tail.tables[TABLE].remove([17])
    insert(table, 10)
    tail.step()
    assert tail.rows == 3000
    assert tail.shown() == table.rows(f"ORDER BY {perspective_server.NEWEST_FIRST} LIMIT 3000")
    tail.close()


def test_prices_that_are_no_numbers(table, tail):
    table.command(
        "INSERT INTO stock_values (timestamp, ticker, open, high, low, close) VALUES"
        " (now64(3), 'A', 0, nan, inf, 1), (now64(3), 'B', nan, 1, 1, nan)"
    )
    tail.step()
    tail.step()
    assert tail.health()["clickhouse"] == "up"
    rows = {row["ticker"]: row for row in tail.arrow(TICKERS).to_pylist()}
    assert rows["A"]["change"] is None and rows["A"]["last"] == 1
    assert rows["B"]["last"] is None


def test_a_large_window_is_summed_up_at_a_slower_pace(table, tail, monkeypatch):
    insert(table, 100)
    tail.poll()
    due = tail.summary_due
    read = tail.client.raw_query

    def slow(sql, **options):
        if options["fmt"] == "JSONColumns":
            time.sleep(0.05)
        return read(sql, **options)

    monkeypatch.setattr(tail.client, "raw_query", slow)
    tail.summary_due = 0
    insert(table, 100)
    tail.poll()
    rest = 0.05 * (1 / perspective_server.SUMMARY_SHARE - 1)
    assert tail.summary_due > max(due, time.monotonic() + 0.9 * rest)
    insert(table, 100)
    tail.poll()
    assert tail.summed != tail.mark  # not yet again
    tail.summary_due = 0
    tail.poll()  # nothing new, but the lines are still to be drawn
    assert tail.summed == tail.mark
    assert tail.lines() == lines(table)


def test_a_poll_that_is_behind_leaves_the_aggregates_for_later(table, tail):
    tail.poll()
    insert(table, 100)
    tail.summary_due = time.monotonic()
    tail.due = tail.summary_due - tail.interval
    tail.poll()
    assert tail.rows == 100 and tail.summed != tail.mark
    tail.summary_due -= perspective_server.PATIENCE  # but not for ever
    tail.poll()
    assert tail.summed == tail.mark
    assert tail.lines() == lines(table)


def test_of_the_candles_the_newest_are_kept(table, tail):
    table.command(
        "INSERT INTO stock_values (timestamp, ticker, volume) SELECT toDateTime64("
        "'2024-01-01 00:00:00', 3, 'UTC') + number * 2, 'A', number FROM numbers(700)"
    )
    table.command("INSERT INTO stock_values (timestamp, ticker) VALUES ('2020-01-01', 'B')")
    tail.step()
    candles = tail.arrow(CANDLES).to_pylist()
    most = perspective_server.MOST_CANDLES
    assert sorted(c["volume"] for c in candles if c["ticker"] == "A") == [*range(700 - most, 700)]
    assert [c["number"] for c in candles if c["ticker"] == "B"] == [-most]
    assert {t["ticker"]: t["volume"] for t in tail.arrow(TICKERS).to_pylist()} == {
        "A": sum(range(700)),
        "B": 0,
    }


@pytest.mark.parametrize("half_way", [False, True])
@pytest.mark.parametrize("step", ["update", "remove"])
def test_perspective_fails(table, tail, monkeypatch, step, half_way):
    """Between reading and updating: nothing lost and nothing twice, however far it came."""
    fill(table)
    tail.step()
    whole = tail.tables[TABLE]

    def fail(rows):
        if half_way:
            getattr(whole, step)(rows)
        raise perspective.PerspectiveError("out of luck")

    steps = {"size": whole.size, "update": whole.update, "remove": whole.remove, step: fail}
    insert(table, 50)
    if step == "remove":
        table.command("DELETE FROM stock_values WHERE volume % 2 = 0")
    tail.tables[TABLE] = types.SimpleNamespace(**steps)
    for attempt in range(3):
        tail.step()
        nothing_left = step == "remove" and half_way and attempt > 0
        assert tail.health()["clickhouse"] == ("up" if nothing_left else "down")
    tail.tables[TABLE] = whole
    insert(table, 50)
    tail.step()
    assert tail.shown() == table.rows()
    assert tail.health()["clickhouse"] == "up"


def test_a_failed_read_leaves_nothing_in_the_embedded_engine(tmp_path, start):
    """In a process of its own: an engine serves one path for as long as the process lives."""
    text = f"""
        import perspective, producer, perspective_server, time
        dsn = "chdb://{tmp_path}/data"
        producing = producer.Producer(dsn, 0.01, 5000, batches=20)
        producing.run()
        tail = perspective_server.Tail(perspective.Server(), dsn, 0.1, 1_000_000)
        read = tail.read
        for end in (" WHERE NOT throwIf(_block_number = 15)", " SETTINGS max_result_rows = 70000"):
            tail.read = lambda sql: read("SELECT * FROM test.stock_values" + end)
            try:
                tail.poll()
            except Exception as error:
                print("failed", error.code)
                tail.close()
        tail.read = read
        tail.poll()
        print(tail.rows, tail.client.query("SELECT count() FROM test.stock_values").result_rows)
    """
    program = start(Program, tmp_path, text)
    assert program.wait() == 0
    assert program.lines[-3:] == ["failed 395", "failed 396", "100000 [(100000,)]"]


# ---------------------------------------------------------------------------------------------
# What /healthz says; see `health` above for its form.


def test_the_figures_of_healthz(table, start):
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.05, "--limit", 1000))
    said = health(server, "up")
    assert (said["rows"], said["delivered"], said["rows_per_second"]) == (0, 0, 0)
    assert said["lag_ms"] is None
    assert 0 < said["poll_ms"] < 1000
    insert(table, 600, now_ms() - 3000)
    server.wait_for_delivered(600)
    insert(table, 600, now_ms() - 3000)
    server.wait_for_delivered(1200)
    said = health(server, "up")
    assert (said["rows"], said["delivered"], said["viewers"]) == (1000, 1200, 0)
    assert said["rows_per_second"] == 240
    assert 2400 <= said["lag_ms"] < 5000
    viewers = [start(Viewer, server.url) for _ in range(3)]
    wait_until(lambda: server.health()["viewers"] == 3)
    viewers[0].close()
    wait_until(lambda: server.health()["viewers"] == 2)


def test_rows_per_second_counts_every_poll_of_the_last_seconds(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(perspective_server.time, "monotonic", lambda: now)
    tail = Tail(perspective.Server(), producer.DEFAULT_DSN, 0.001, 1000)
    for _ in range(8000):
        now += 0.001
        tail.count_arrival(3)
    assert tail.rows_per_second() == pytest.approx(3000, rel=0.01)
    assert len(tail.arrivals) <= 5001
    now += 2.5
    assert tail.rows_per_second() == pytest.approx(1500, rel=0.01)
    now += 5
    assert tail.rows_per_second() == 0
    slow = Tail(perspective.Server(), producer.DEFAULT_DSN, 20, 1000)
    for _ in range(5):
        now += 20
        slow.count_arrival(2000)
        assert slow.rows_per_second() in (50, 100)


def test_a_poll_that_hangs_is_no_success_and_a_long_rest_is_none(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(perspective_server.time, "monotonic", lambda: now)
    tail = Tail(perspective.Server(), producer.DEFAULT_DSN, 3600, 1000)
    states, answers = [], iter(["up", "up"])

    def poll():
        nonlocal now
        now += 9
        states.append(tail.health()["clickhouse"])
        now += 30
        states.append(tail.health()["clickhouse"])
        return next(answers)

    def wait(seconds):
        nonlocal now
        now += seconds - 1
        states.append(tail.health()["clickhouse"])
        now += 1
        if len(states) == 6:
            tail.stop.set()

    tail.poll, tail.stop.wait = poll, wait
    tail.run()
    assert states == ["down", "down", "up", "up", "down", "up"]


# ---------------------------------------------------------------------------------------------
# The end, and beginnings that fail.


# The end, and beginnings that fail.

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])


def ends_well(script, number=signal.SIGTERM):
    """Send a signal, and see that the end comes in time and in peace."""
    assert script.stop(number) == 0
    assert "Traceback" not in script.output
    assert "Error" not in script.output


@BOTH
def test_a_signal_before_clickhouse_was_ever_there(start, number):
    server = start(Server, "--dsn", f"clickhouse://a:b@127.0.0.1:{free_port()}/test")
    server.wait_for("ClickHouse is away")
    ends_well(server, number)


@BOTH
def test_a_signal_in_mid_poll_with_viewers(table, proxy, start, number):
    server = up(start(Server, "--dsn", through(proxy, table), "--interval", 0.03))
    viewers = [start(Viewer, server.url) for _ in range(3)]
    insert(table, 100)
    for viewer in viewers:
        agree(viewer, table)
    proxy.stall()
    assert proxy.wait(proxy.faults + 1)
    ends_well(server, number)
    assert all(viewer.closed.wait(2) for viewer in viewers)


def test_a_signal_while_viewers_wait_for_heavy_views(table, start):
    server = up(start(Server, "--dsn", table.dsn, "--interval", 0.03, "--limit", 1_000_000))
    viewers = [start(Viewer, server.url) for _ in range(8)]
    insert(table, 200_000)
    server.wait_for_rows(200_000)

    async def ask(client):
        stock_values = await client.open_table("stock_values")
        await stock_values.view(group_by=["client", "timestamp"])

    asked = [asyncio.run_coroutine_threadsafe(ask(v.client), v.loop) for v in viewers]
    time.sleep(0.5)
    assert not all(future.done() for future in asked)  # seconds of work, which nobody waits for
    ends_well(server)


def embedded(start, *arguments, kind=Server, **options):
    return start(kind, "--embedded", *arguments, "--interval", 0.05, **options)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *(("bound", signal.SIGINT), ("bound", signal.SIGTERM), ("open", signal.SIGTERM)),
        *(("rows", signal.SIGINT), ("viewers", signal.SIGTERM)),
    ],
)
def test_a_signal_to_the_embedded_server(start, tmp_path, phase, number):
    port, env = free_port(), {"TMPDIR": str(tmp_path)}
    arguments = ["perspective_server.py", "--embedded", "--interval", 0.05, "--port", port]
    server = start(Script, *arguments, env=env)
    if phase == "bound":

        def bound():
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                return True

        wait_until(bound)
    else:
        server.wait_for("open http://")
    if phase in ("rows", "viewers"):
        server.wait_for("rows shown")
    if phase == "viewers":
        viewers = [start(Viewer, f"http://localhost:{port}") for _ in range(3)]
        wait_until(lambda: viewers[0].rows())
    ends_well(server, number)
    assert "rows written" in server.lines[-1]
    assert os.listdir(tmp_path) == []


def stored(path):
    """The rows that a new process finds in a folder that an embedded server has used."""
    with ClickHouseProcess(path) as process:
        database = Database(process)
        database.name = "test"
        return database.rows()


def test_what_the_embedded_server_has_written_is_there_afterwards(start, tmp_path):
    path, before = tmp_path / "data", collections.Counter()
    for _ in range(2):
        server = up(embedded(start, path))
        with Viewer(server.url) as viewer:
            rows = before.total()
            wait_until(lambda rows=rows, viewer=viewer: viewer.rows().total() >= rows + 750)
            shown = viewer.rows()
        assert before <= shown
        ends_well(server)
        rows += int(server.lines[-1].split()[1].replace(",", ""))
        before = stored(path)
        assert shown <= before
        assert before.total() == rows


def test_the_embedded_server_killed_starts_again_with_every_row(start, tmp_path):
    path, shown = tmp_path / "data", collections.Counter()
    for _ in range(2):
        server = up(embedded(start, path))
        with Viewer(server.url) as viewer:
            rows = shown.total()
            wait_until(lambda rows=rows, viewer=viewer: viewer.rows().total() >= rows + 500)
            assert shown <= viewer.rows()
            shown = viewer.rows()
            server.kill()
    assert shown <= stored(path)


def one_line(script, status):
    assert script.wait(10) == status, script.output
    assert len(script.lines) == 1, script.output
    assert script.lines[0].startswith("perspective_server.py: ")
    return script.lines[0]


def test_embedded_without_chdb(start, tmp_path):
    (tmp_path / "chdb.py").write_text("raise ModuleNotFoundError(\"No module named 'chdb'\")")
    env = {"PYTHONPATH": str(tmp_path)}
    script = start(Script, "perspective_server.py", "--embedded", "--port", free_port(), env=env)
    assert "pip install 'clickhouse-connect[chdb]'" in one_line(script, 1)


def test_embedded_where_nothing_can_be_written(start, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "data"
    options = ["perspective_server.py", "--port", free_port(), "--embedded"]
    assert str(path) in one_line(start(Script, *options, path), 1)


def test_embedded_where_another_process_works(start, tmp_path):
    with ClickHouseProcess(tmp_path / "data"):
        options = ["perspective_server.py", "--port", free_port(), "--embedded"]
        assert str(tmp_path / "data") in one_line(start(Script, *options, tmp_path / "data"), 1)


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = start(Script, "perspective_server.py", "--embedded", "--port", port)
        assert f"port {port}" in one_line(script, 1)


@pytest.mark.parametrize(
    "options",
    [
        *(["--interval", text] for text in ("0", "-1", "nan", "inf", "soon", "")),
        *(["--limit", text] for text in ("0", "-5", "1.5", "many", "99999999999")),
        *(["--port", text] for text in ("0", "-1", "65536", "http")),
        *(["--dsn", text] for text in ("", "http://localhost", "clickhouse://", "x")),
        *(["--dsn", f"clickhouse://a:secret@localhost:{port}/test"] for port in ("x", 0, 70000)),
        ["--dsn", "clickhouse://me@here/test", "--embedded"],
        ["--embedded", "one", "two"],
        ["--allow-origin", "example.com"],
        ["--allow-origin", "https://example.com/page"],
        ["--rows", "7"],
        ["now"],
    ],
    ids=" ".join,
)
def test_bad_options_get_one_line_and_status_2(capsys, options):
    with pytest.raises(SystemExit) as exit:
        perspective_server.main(options)
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("perspective_server.py: ")
    assert said.err.count("\n") == 1
    assert "secret" not in said.err


def test_a_bad_option_to_the_real_program(start):
    script = start(Script, "perspective_server.py", "--interval", 0)
    one_line(script, 2)
    env = {"CLICKHOUSE_DSN": "clickhouse://me:secret@localhost:port/test"}
    script = start(Script, "perspective_server.py", env=env)
    assert "secret" not in one_line(script, 2)
