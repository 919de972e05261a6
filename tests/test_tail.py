"""Viewers that stay hold exactly the newest rows of ClickHouse, each once, whatever happens.

`agree` waits until mirrors on real websockets hold what ClickHouse has, in the order in which it
came. Where nothing but inserts happened, `Mirror.received` shows besides that each row came in one
delta, once, and `Mirror.removals` that no window was replaced.
"""

import collections
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pyarrow
import pytest
from clickhouse_http import ClickHouseProcess
from conftest import (
    HOUR,
    ROOT,
    Connection,
    Database,
    Script,
    Server,
    follow,
    free_port,
    now_ms,
    patched_server,
    quick_rollups,
    wait_until,
)
from proxy import Proxy

import producer

COLUMNS_SQL = """toUnixTimestamp64Milli(timestamp) AS timestamp, ticker, client, open, high, low,
    close, volume, toUInt16(date) AS date"""


def newest(database, limit=25_000):
    """The newest rows in ClickHouse by block and offset, oldest first."""
    sql = (
        f"SELECT {COLUMNS_SQL} FROM stock_values"
        f" ORDER BY _block_number DESC, _block_offset DESC LIMIT {limit}"
    )
    # ClickHouse 26.9 cannot use the index of block numbers after a lightweight UPDATE.
    settings = {"use_skip_indexes": 0, "optimize_move_to_prewhere": 0}
    return database.ask(sql, settings=settings)[::-1]


def arrived(mirror):
    """The rows of the live table in a mirror, by `arrival`."""
    rows = mirror.table("stock_values").values()
    names = producer.COLUMNS
    return [tuple(row[n] for n in names) for row in sorted(rows, key=lambda row: row["arrival"])]


def arrived_columns(mirror):
    return set().union(*mirror.table("stock_values").values())


def agree(database, mirrors, limit=25_000, what="the newest rows"):
    """Wait until mirrors hold the newest `limit` rows, in order and within `limit` slots."""
    expected = newest(database, limit)
    for mirror in mirrors:
        wait_until(lambda mirror=mirror: arrived(mirror) == expected, what)
        assert set(mirror.table("stock_values")) <= set(range(limit))
    return expected


def each_row_came_once(database, mirrors):
    for mirror in mirrors:
        assert mirror.received == database.rows()
        assert (mirror.snapshots, mirror.removals) == (1, 0)


def wait_for_state(server, state):
    wait_until(lambda: server.health()["clickhouse"] == state, lambda: server.output)
    assert server.get("/healthz")[0] == (200 if state == "up" else 503)


# ---------------------------------------------------------------------------------------------
# Inserts.


def test_three_producers_batches_of_1_to_100_000_rows_and_merges(table, start):
    _, mirrors = follow(start, table.dsn, "--limit", 120_000)
    producers = [
        start(
            *(Script, "producer.py", "--dsn", table.dsn),
            *("--rows", rows, "--interval", interval, "--batches", batches),
        )
        for rows, interval, batches in [(1, 0.02, 100), (250, 0.1, 20), (100_000, 1, 1)]
    ]
    while any(script.process.poll() is None for script in producers):
        table.command(MERGE)
    assert [script.wait() for script in producers] == [0, 0, 0]
    for mirror in mirrors:
        mirror.wait_for_rows(105_100)
    agree(table, mirrors, 120_000)
    each_row_came_once(table, mirrors)


@pytest.mark.parametrize("clause", ["", "PARTITION BY toDate(timestamp)"])
def test_old_and_new_timestamps_in_a_table_of_any_kind(database, start, clause):
    """In the producer's table; and in a partitioned one, as an older ClickHouse would make it."""
    database.create_table()
    if clause:
        columns = ", ".join(f"{name} {kind}" for name, kind in producer.COLUMNS.items())
        settings = "enable_block_number_column = 1, enable_block_offset_column = 1"
        database.command(DROP)
        database.command(
            f"CREATE TABLE stock_values ({columns}) ENGINE = MergeTree {clause}"
            f" ORDER BY (timestamp, ticker) SETTINGS {settings}"
        )
    _, mirrors = follow(start, database.dsn, mirrors=2)
    for at in (0, -5000, -HOUR, -50 * 8766 * HOUR, 70 * 8766 * HOUR):
        database.insert(20, now_ms() + at)
    database.insert(60, now_ms() - 200 * HOUR, step=5 * HOUR)  # many days in one block
    database.command(MERGE)
    database.insert(1)
    assert len(agree(database, mirrors)) == 161
    each_row_came_once(database, mirrors)


def test_the_window_is_the_newest_rows_if_a_poll_brings_more_than_the_limit(table, start):
    server, mirrors = follow(start, table.dsn, "--limit", 1000, mirrors=2)
    for rows, at in ((700, 0), (700, -HOUR), (2500, -24 * HOUR), (1, HOUR)):
        table.insert(rows, now_ms() + at)
        agree(table, mirrors, 1000)
    with server.paused():
        for rows in (400, 900, 400, 1):
            table.insert(rows)
    agree(table, mirrors, 1000)
    table.insert(300)
    window = agree(table, mirrors, 1000)
    for mirror in mirrors:
        assert all(mirror.received[row] == 1 for row in window)
        assert max(mirror.received.values()) == 1
        assert mirror.received <= table.rows()
        assert (mirror.snapshots, mirror.removals) == (1, 0)


def test_a_server_starts_with_the_newest_rows_by_arrival(table, start):
    for late in (2000, 0, 4000, 1000, 3000):  # blocks in another order than times
        table.insert(1000, now_ms() - 10_000 + late)
    table.command(MERGE)
    for limit in (1500, 10_000):
        agree(table, follow(start, table.dsn, "--limit", limit)[1], limit)


def test_a_viewer_who_comes_while_the_table_is_made(table, start):
    """It mirrors the table as soon as Perspective lists it."""
    table.insert(200_000)  # so that there is time for that
    server = start(Server, "--dsn", table.dsn, "--limit", 200_000)
    with Connection(server.url) as viewer:
        wait_until(lambda: "stock_values" in viewer.tables(), lambda: server.output)
        view = viewer.run(viewer.table().view())
        rows = pyarrow.ipc.open_stream(viewer.run(view.to_arrow())).read_all()
    assert rows.num_rows == 200_000


# ---------------------------------------------------------------------------------------------
# Changes that are no inserts. A change is a list of statements; a number means an insert of so many
# rows, and a SELECT is repeated until it is true. The servers see all of them in one poll, but for
# those on both sides of POLL.

POLL = "poll"
SYNC, ASYNC = "SETTINGS mutations_sync = 2", "SETTINGS mutations_sync = 0"
ALTER, THIRD = "ALTER TABLE stock_values", "WHERE volume % 3 = 0"
OLD = "WHERE timestamp < now() - INTERVAL 1 DAY"  # outside the window of 100 rows
MERGE = "OPTIMIZE TABLE stock_values FINAL"
DELETE, UPDATE = f"DELETE FROM stock_values {THIRD}", "UPDATE stock_values SET close = close + 1"
DROP, TRUNCATE = "DROP TABLE stock_values SYNC", "TRUNCATE TABLE stock_values"
DETACH, ATTACH = f"{ALTER} DETACH PARTITION tuple()", f"{ALTER} ATTACH PARTITION tuple()"
STOP_MERGES, START_MERGES = (f"SYSTEM {verb} MERGES stock_values" for verb in ("STOP", "START"))
MUTATED, MERGED = (
    f"SELECT count() = 0 FROM system.{table} AND database = '{{database}}'"
    for table in ("mutations WHERE NOT is_done", "merges WHERE 1")
)
COPY = [
    "CREATE TABLE stock_values_other AS stock_values",
    "INSERT INTO stock_values_other SELECT * FROM stock_values LIMIT 300",
]
CHANGES = {
    "merge": [MERGE],
    "truncate": [TRUNCATE],
    "truncate, as many rows": [TRUNCATE, 400, POLL, TRUNCATE, 400],
    "delete": [DELETE],
    "delete of old rows, insert": [f"DELETE FROM stock_values {OLD}", 30],
    "delete, merge": [DELETE, POLL, MERGE],
    "alter delete": [f"{ALTER} DELETE {THIRD} {SYNC}"],
    "alter delete, insert": [f"{ALTER} DELETE {THIRD} {SYNC}", 150],
    "alter delete of old rows": [f"{ALTER} DELETE {OLD} {SYNC}"],
    "insert, alter update": [50, f"{ALTER} UPDATE close = close + 1 {THIRD} {SYNC}"],
    "delete, alter update": [DELETE, f"{ALTER} UPDATE close = close + 1 WHERE 1 {SYNC}"],
    "lightweight update": [f"{UPDATE} {THIRD}"],
    "lightweight updates": [f"{UPDATE} {THIRD}", 50, f"{UPDATE} WHERE ticker = 'TLT.N'", POLL, 9],
    "slow alter update": [
        *(TRUNCATE, 100, 100, 100, POLL),
        f"{ALTER} UPDATE close = close + 1 + sleepEachRow(0.02) WHERE 1 {ASYNC}",
        *(50, POLL, MUTATED),
    ],
    "killed alter update": [  # it has changed some parts
        *(TRUNCATE, f"{ALTER} MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1"),
        *(*[50] * 8, POLL),
        f"{ALTER} UPDATE open = 7 + sleepEachRow(0.02) WHERE 1 {ASYNC}",
        "SELECT countIf(open = 7) > 0 FROM stock_values",
        "KILL MUTATION WHERE database = '{database}'",
        MERGED,
        "SELECT countIf(open != 7) > 0 FROM stock_values",
        f"{ALTER} RESET SETTING max_bytes_to_merge_at_max_space_in_pool",
    ],
    "expired": [
        f"{ALTER} MODIFY TTL toDateTime(timestamp) + INTERVAL 1 DAY"
        " SETTINGS materialize_ttl_after_modify = 0",
        *(POLL, MERGE, POLL, f"{ALTER} REMOVE TTL"),
    ],
    "partition dropped": [f"{ALTER} DROP PARTITION tuple()", 10],
    "partition detached": [DETACH, POLL, ATTACH],
    "partition attached, insert": [MERGE, DETACH, ATTACH, 50],
    "partition replaced": [*COPY, f"{ALTER} REPLACE PARTITION tuple() FROM stock_values_other"],
    "part detached and attached": [
        *(STOP_MERGES, 100, POLL, f"{ALTER} DETACH PART '{{part}}'"),
        *(f"{ALTER} ATTACH PART '{{part}}'", POLL, START_MERGES),
    ],
    "part attached, another dropped": [
        *(STOP_MERGES, 100, 100, POLL, f"{ALTER} DROP PART '{{part}}'"),
        *(f"{ALTER} DETACH PART '{{last}}'", f"{ALTER} ATTACH PART '{{last}}'", 50),
        *(POLL, START_MERGES),
    ],
    **{  # the table grows by less than was inserted, without a mutation
        f"{rows} rows inserted, 200 others dropped{', merge' if merge else ''}": [
            *(TRUNCATE, STOP_MERGES, 200, 1, POLL, rows, f"{ALTER} DROP PART '{{part}}'"),
            *(START_MERGES, *merge),
        ]
        for rows in (250, 300, 500)
        for merge in ([], [MERGE])
    },
    "dropped, fewer blocks": [DROP, POLL, "create", 300],
    "dropped, as many blocks": [TRUNCATE, DROP, "create", 100, 99, POLL, DROP, "create", 100, 99],
    "exchanged": [*COPY, "EXCHANGE TABLES stock_values AND stock_values_other"],
}


@pytest.fixture(scope="module")
def followed(clickhouse, start_once):
    """A table, and two servers that stay through all changes: their mirrors by `--limit`."""
    database = start_once(Database, clickhouse)
    database.create_table()
    servers, mirrors = [], {}
    for limit in (100, 25_000):
        server, [mirrors[limit]] = follow(start_once, database.dsn, "--limit", limit)
        servers.append(server)
    return SimpleNamespace(database=database, servers=servers, mirrors=mirrors)


def run(database, steps):
    """Run the statements of a change; see above."""
    sql = "SELECT argMin(name, min_block_number), argMax(name, min_block_number) FROM system.parts"
    [(part, last)] = database.ask(f"{sql} WHERE active AND database = '{database.name}'")
    for step in steps:
        if step == "create":
            database.create_table()
        elif isinstance(step, int):
            database.insert(step)
        else:
            sql = step.format(part=part, last=last, database=database.name)
            done = database.command(sql)
            if sql.startswith("SELECT") and not done:
                wait_until(lambda sql=sql: database.command(sql), sql)


@pytest.mark.parametrize("change", CHANGES)
def test_viewers_agree_after(followed, change):
    database, servers, mirrors = followed.database, followed.servers, followed.mirrors

    def all_agree():
        exists = database.command("EXISTS TABLE stock_values")
        for server, (limit, mirror) in zip(servers, mirrors.items(), strict=True):
            if exists:
                agree(database, [mirror], limit, change)
            wait_for_state(server, "up" if exists else "no table")

    database.command("DROP TABLE IF EXISTS stock_values_other SYNC")
    for at in (-48 * HOUR, -1000, 0):
        database.insert(100, now_ms() + at)
    all_agree()
    snapshots = [mirror.snapshots for mirror in mirrors.values()]
    for _, steps in itertools.groupby(CHANGES[change], lambda step: step != POLL):
        with servers[0].paused(), servers[1].paused():
            run(database, [step for step in steps if step != POLL])
        all_agree()
    database.insert(50)
    all_agree()
    assert [mirror.snapshots for mirror in mirrors.values()] == snapshots  # they stayed connected


@pytest.mark.alone
def test_a_long_mutation_neither_stops_the_ticks_nor_reloads_at_each_poll(table, start):
    table.command(f"{ALTER} MODIFY SETTING max_bytes_to_merge_at_max_space_in_pool = 1")
    for _ in range(200):
        table.insert(20, now_ms() - HOUR)
    _, [mirror] = follow(start, table.dsn)
    script = start(Script, "producer.py", "--dsn", table.dsn, "--rows", 10, "--interval", 0.1)
    mirror.wait_for_more(100)
    mirror.gaps.clear()
    began = time.monotonic()
    table.command(f"{ALTER} UPDATE open = 7 + sleepEachRow(0.005) WHERE 1 {ASYNC}")
    wait_until(lambda: table.command(MUTATED.format(database=table.name)), "the mutation")
    took = time.monotonic() - began
    assert took > 3
    assert script.stop() == 0
    agree(table, [mirror])
    assert max(mirror.gaps) < 2
    reloads = collections.Counter()  # each brings all rows, which only `open` changes
    for row, times in mirror.received.items():
        reloads[row[:3] + row[4:]] += times
    assert 2 <= max(reloads.values()) <= took + 3


# ---------------------------------------------------------------------------------------------
# Rows and columns that are not as expected.

BAD = "INSERT INTO stock_values VALUES ({}, {}, {}, {}, {}, 1, 2, 4294967295, today())"


def test_bad_values_arrive_made_safe_and_so_do_the_rows_after_them(table, start, tmp_path):
    """Strings that are not UTF-8, numbers that are none, stamps of a wrong clock."""
    server, [mirror] = follow(start, table.dsn, script=quick_rollups(tmp_path))
    now = "now64(3)"
    for values in (
        ("toDateTime64('2099-01-01', 3, 'UTC')", "'FUTURE'", "'x'", 1, 99),
        (now, "'AAPL.N'", "unhex('5AFC72696368')", 1, 3),
        (now, "unhex('FFFE41')", "'Homer'", 1, 3),
        (now, "'NAN'", "'Homer'", "nan", "inf"),
        (now, "'NAN'", "'Homer'", 2, "-inf"),
        ("toDateTime64(0, 3, 'UTC')", "'PAST'", "'x'", 1, 99),
        (now, "'LAST'", "'Homer'", 1, 3),
    ):
        table.command(BAD.format(*values))
        mirror.wait_for_rows(table.count())
    rows = [row[1:5] for row in arrived(mirror)]
    assert rows == [
        ("FUTURE", "x", 1, 99),
        ("AAPL.N", "Z\ufffdrich", 1, 3),
        ("\ufffdA", "Homer", 1, 3),
        ("NAN", "Homer", None, None),
        ("NAN", "Homer", 2, None),
        ("PAST", "x", 1, 99),
        ("LAST", "Homer", 1, 3),
    ]
    years = [time.gmtime(row[0] / 1000).tm_year for row in arrived(mirror)]
    assert (years[0], years[5]) == (2099, 1970)
    assert {row[7] for row in arrived(mirror)} == {4294967295}
    rollups = [f"stock_values_{name}" for name in ("tickers", "candles", "history")]
    counting = [{"AAPL.N", "\ufffdA", "NAN", "LAST"}] * 3

    def tickers_by_rollup():
        return [{row["ticker"] for row in mirror.table(name).values()} for name in rollups]

    wait_until(lambda: tickers_by_rollup() == counting, tickers_by_rollup)
    tickers = mirror.table("stock_values_tickers")
    assert (tickers["NAN"]["high"], tickers["NAN"]["last"]) == (None, 2)
    clients = {row["client"] for row in mirror.table("stock_values_history").values()}
    assert clients == {"Homer", "Z\ufffdrich"}
    assert server.health()["clickhouse"] == "up"


def test_columns_change_while_a_producer_runs(table, start):
    """And so does a default, which the rows have that have no value of their own."""
    _, [mirror] = follow(start, table.dsn)
    script = start(Script, "producer.py", "--dsn", table.dsn, "--rows", 20, "--interval", 0.1)

    def venues(name="venue"):
        return {row.get(name) for row in mirror.table("stock_values").values()}

    mirror.wait_for_more(40)
    table.command(f"{ALTER} ADD COLUMN venue String DEFAULT 'NYSE'")
    wait_until(lambda: venues() == {"NYSE"}, "the new column")
    mirror.wait_for_more(100)
    table.command(f"{ALTER} MODIFY COLUMN venue DEFAULT 'OTC'")
    wait_until(lambda: "OTC" in venues(), "the new default")
    table.command(f"{ALTER} RENAME COLUMN venue TO place")
    wait_until(lambda: "OTC" in venues("place"), "the new name")
    table.command(f"{ALTER} DROP COLUMN place")
    wait_until(lambda: arrived_columns(mirror) == {*producer.COLUMNS, "slot", "arrival"})
    assert script.stop() == 0
    assert "is away" not in script.output
    agree(table, [mirror])


FAILING_ENGINE = """
import itertools, perspective
make, made = perspective.Client.table, itertools.count(1)
def fail_once(self, rows, **options):
    if next(made) == 6:  # of the first ones that are recreated
        raise perspective.PerspectiveError("it failed once")
    return make(self, rows, **options)
perspective.Client.table = fail_once
"""


def test_viewers_come_back_when_the_engine_fails_to_make_a_table(table, start, tmp_path):
    """An error of Perspective is logged once, and ClickHouse is not said to be away."""
    script = patched_server(tmp_path, FAILING_ENGINE)
    server, [mirror] = follow(start, table.dsn, script=script)
    table.insert(10)
    agree(table, [mirror])
    table.command(f"{ALTER} ADD COLUMN venue String DEFAULT 'NYSE'")
    wait_until(lambda: "venue" in arrived_columns(mirror), "the new column")
    table.insert(10)
    agree(table, [mirror])
    assert server.output.count("Traceback") == 1
    assert "PerspectiveError" in server.output and "away" not in server.output


MISFITS = {  # a change, what is said about it, and the change that takes it back
    "MODIFY COLUMN volume UInt64": (
        "volume is UInt64, expected UInt32",
        "MODIFY COLUMN volume UInt32",
    ),
    "DROP COLUMN volume": ("volume is missing", "ADD COLUMN volume UInt32"),
    "RENAME COLUMN volume TO amount": ("volume is missing", "RENAME COLUMN amount TO volume"),
}


def test_a_table_that_does_not_fit_is_refused_at_the_start_and_later_waited_for(table, start):
    table.insert(100)
    server, [mirror] = follow(start, table.dsn)
    rows = agree(table, [mirror])

    def comes_back():
        wait_for_state(server, "up")
        table.insert(10)
        return agree(table, [mirror])

    for change, (problem, undo) in MISFITS.items():
        said = server.output.count(problem)
        table.command(f"{ALTER} {change}")
        server.wait_for(problem)
        wait_for_state(server, "no table")
        assert arrived(mirror) == rows
        late = start(Script, "perspective_server.py", "--dsn", table.dsn, "--port", free_port())
        assert late.wait() == 1
        [line] = late.lines[2:]  # after what it follows, and where
        assert problem in line
        table.command(f"{ALTER} {undo}")
        rows = comes_back()
        assert server.output.count(problem) == said + 1
    table.command("RENAME TABLE stock_values TO stock_values_away")
    wait_for_state(server, "no table")
    table.command("CREATE TABLE stock_values (timestamp DateTime) ENGINE = Memory")
    server.wait_for("its engine is Memory")
    assert arrived(mirror) == rows
    table.command(DROP)
    table.command("RENAME TABLE stock_values_away TO stock_values")
    comes_back()


# ---------------------------------------------------------------------------------------------
# Failures.


def test_clickhouse_the_server_and_a_producer_are_killed(tmp_path, start):
    fragile = start(ClickHouseProcess, tmp_path / "data", port=free_port()).start()
    database = Database(fragile)
    database.create_table()
    server, mirrors = follow(start, database.dsn, mirrors=2)
    options = ["--dsn", database.dsn, "--rows", 50, "--interval", 0.25]
    producers = [start(Script, "producer.py", *options) for _ in range(2)]

    def rows_move():
        server.wait_for_delivered(server.health()["delivered"] + 300, 40)

    for kills in (1, 2):
        rows_move()
        fragile.kill()
        wait_for_state(server, "down")
        fragile.start()
        wait_for_state(server, "up")
        assert server.output.count("ClickHouse is away") == kills
    rows_move()
    producers[0].kill()
    rows_move()
    assert producers[1].stop() == 0
    agree(database, mirrors)
    each_row_came_once(database, mirrors)
    server.kill()
    database.insert(300)
    server = start(Server, "--dsn", database.dsn, "--interval", 0.05, port=server.port)
    agree(database, mirrors)
    database.insert(300)
    agree(database, mirrors)
    # The other tables are mirrored after the live one.
    wait_until(lambda: all(mirror.snapshots == 2 for mirror in mirrors), "all tables, once")


def test_answers_that_break_off_come_late_or_never(table, start):
    with Proxy(table.process.port) as proxy:
        # The option in the DSN is stronger than the default of 30 s, too long for a test.
        dsn = table.process.dsn_of(table.name, port=proxy.port) + "?send_receive_timeout=2"
        server, mirrors = follow(start, dsn, mirrors=2)
        table.insert(100)
        agree(table, mirrors)

        def reads_rows(head):
            return b"ArrowStream" in head

        for after in (400, 5_000, 20_000):
            proxy.cut_answer(after, when=reads_rows, times=2)
            done = proxy.faults + 2
            table.insert(2000)
            assert proxy.wait(done, 30)
            agree(table, mirrors)
        proxy.drop_answer(when=reads_rows, times=1)
        table.insert(100)
        agree(table, mirrors)
        proxy.delay(0.3)
        connections = proxy.connections
        for _ in range(3):
            table.insert(100)
            agree(table, mirrors)
        assert server.health()["poll_ms"] >= 300
        assert proxy.connections <= connections + 1  # polls do not pile up
        for harm in (proxy.refuse, proxy.stall):
            harm()
            table.insert(100)
            wait_for_state(server, "down")
            before = [mirror.rows().total() for mirror in mirrors]
            assert before == [table.count() - 100] * 2
            proxy.pass_on()
            wait_for_state(server, "up")
            agree(table, mirrors)
        each_row_came_once(table, mirrors)


@pytest.mark.long
def test_no_row_is_lost_or_doubled_in_a_minute_of_faults():
    """One minute of the soak; see soak.py for what it asserts."""
    command = [sys.executable, ROOT / "tests/soak.py", "--minutes", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
