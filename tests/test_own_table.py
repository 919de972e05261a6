"""`--table`: any MergeTree table, with what people have in theirs, reaches viewers as it is."""

import contextlib
import json
import re
import time
from urllib.parse import quote

import conftest
import pytest
from browser import VIEWER, differences
from clickhouse_http import ClickHouseProcess
from conftest import STATUS, Database, Mirror, Script, Server, changed_server, free_port, wait_until
from playwright.sync_api import Error as PlaywrightError

BLOCK_NUMBERS = "enable_block_number_column = 1, enable_block_offset_column = 1"
LIMIT = 40  # rows in the window: fewer than the tests insert

# ---------------------------------------------------------------------------------------------
# Tables that people have. A column is (type, SQL of what viewers get, SQL of the value from `n`):
# a test inserts only numbers, and the columns' defaults do the rest. The test of all schemas
# updates the last column but two, renames the last but one, and drops the last.

PLAIN = "{}"
NUMBER = "toFloat64({})"
FINITE = "if(isFinite({0}), toFloat64({0}), NULL)"
TEXT = "toString({})"
UTF8 = "replaceAll(toValidUTF8(toString({})), char(0), '\ufffd')"  # what is no text: \ufffd
TIME = "toUnixTimestamp64Milli(toDateTime64({}, 3))"  # ms since 1970
DAY = "toInt32({})"  # days since 1970
STOCKS = {"tickers", "candles", "history"}


OURS = "psp_(pkey|op|okey)|__INDEX__|(slot|arrival)_*"  # names that Perspective or the ring needs


def shown(name):
    """A column's name at viewers."""
    return f"{name}_" if re.fullmatch(OURS, name) else name


def identifier(name):
    escaped = name.replace("\\", "\\\\").replace("`", "\\`")
    return f"`{escaped}`"


HOUR = "toDateTime('2024-06-01 00:00:00', 'UTC') + n * 3600"
SCHEMAS = {
    "foreign exchange": {
        "time": ("DateTime64(3, 'America/New_York')", TIME, f"({HOUR}) + toIntervalDay(n)"),
        "pair": ("LowCardinality(String)", TEXT, "['EUR/USD', 'USD/JPY'][n % 2 + 1]"),
        "bid": ("Decimal(18, 5)", NUMBER, "1.08213 + n / 1000"),
        "ask": ("Decimal32(4)", NUMBER, "1.0833 + n / 1000"),
        "value_date": ("Date", DAY, "toDate('2024-06-03') + n"),
        "fixing": ("Date32", DAY, "toDate32('1925-01-01') + n"),
        "size": ("Int32", PLAIN, "n * 1000 - 5000"),
    },
    "logs and events": {
        "Timestamp": ("DateTime64(9)", TIME, f"toDateTime64({HOUR}, 9) + 0.123456789"),
        "TraceId": ("String CODEC(ZSTD(1))", TEXT, "lower(hex(MD5(toString(n))))"),
        "SeverityText": ("Enum8('INFO' = 1, 'it''s bad' = -2)", TEXT, "[1, -2][n % 2 + 1]"),
        "Body": ("String", TEXT, "if(n % 3 = 0, '', 'GET /' || char(10) || 'é 漢字')"),
        "Resource": ("Map(LowCardinality(String), String)", TEXT, "map('k', toString(n))"),
        "Duration": ("Int64", TEXT, "-9007199254740993 - n"),
        "Events": ("Array(DateTime64(9))", TEXT, "[Timestamp, Timestamp]"),
        "Links": ("Array(Map(String, String))", TEXT, "[map('a', 'b'), map()]"),
        "id": ("UUID", TEXT, "reinterpretAsUUID(MD5(toString(n)))"),
        "address": ("IPv6", TEXT, "toIPv6('2001:db8::') "),
        "gateway": ("IPv4", TEXT, "toIPv4(3232235520 + n)"),
        "properties": ("JSON", TEXT, """'{"page": {"id": 1}, "tags": ["a", "b"]}'"""),
        "day": ("Date", DAY, "toDate('2024-06-01') + n"),
        "place": ("Tuple(x Float64, name String)", TEXT, "(n / 4, 'it''s')"),
        "value": ("Variant(UInt64, String)", TEXT, "toString(n)"),
    },
    "sensors": {
        "time": ("DateTime", TIME, HOUR),
        "sensor": ("LowCardinality(Nullable(String))", TEXT, "['attic', NULL][n % 2 + 1]"),
        "floor": ("LowCardinality(Nullable(Int16))", PLAIN, "[-1, NULL, 300][n % 3 + 1]"),
        "since": ("LowCardinality(Date)", DAY, "toDate('2024-06-01') + n"),
        "indoors": ("LowCardinality(Bool)", PLAIN, "n % 2"),
        "temperature": ("Nullable(Float32)", FINITE, "[20.1, NULL, nan, -inf][n % 4 + 1]"),
        "humidity": ("Nullable(Decimal(5, 2))", NUMBER, "[40.25, NULL][n % 2 + 1]"),
        "pressure": ("Float64", FINITE, "1 / (n % 5) + 0.1"),
        "working": ("Nullable(Bool)", PLAIN, "[true, false, NULL][n % 3 + 1]"),
        "pulses": ("Nullable(UInt32)", PLAIN, "if(n % 2, NULL, 4294967295)"),
        "calibrated": ("Nullable(DateTime)", TIME, "if(n % 2, NULL, time)"),
        "half": ("BFloat16", NUMBER, "n / 2"),
    },
    "crypto trades": {
        "id": ("UInt64", TEXT, "[9007199254740993, 18446744073709551615, 0][n % 3 + 1]"),
        "time": ("DateTime64(6, 'UTC')", TIME, f"toDateTime64({HOUR}, 6) + 0.654321"),
        "side": ("Enum16('buy' = 1, 'sell' = 2)", TEXT, "n % 2 + 1"),
        "price": ("Decimal128(18)", NUMBER, "toDecimal128('67123.123456789012345678', 18) + n"),
        "fee": ("Decimal(76, 20)", NUMBER, "n / 8"),
        "supply": ("UInt256", TEXT, "toUInt256('1157920892373161954235709850086879') + n"),
        "url": ("String", UTF8, "'https://example.com/?q=' || unhex('FFE9') || toString(n)"),
        "country": ("FixedString(2)", TEXT, "['DE', 'J'][n % 2 + 1]"),
        "digest": ("FixedString(4)", UTF8, "toFixedString(unhex('00FF4100'), 4)"),
        "params.key": ("Array(String)", TEXT, "['a', 'it''s']"),
        "params.value": ("Array(Nullable(UInt64))", TEXT, "[1, NULL]"),
        "took": ("Time64(3)", TEXT, "toTime64(n, 3)"),
        "position": ("Point", TEXT, "(n, 1.5)"),
        "status": ("UInt16", PLAIN, "200 + n"),
        "order": ("Nullable(Int128)", TEXT, "if(n % 2, NULL, -1)"),
        "nonce": ("Nullable(UInt64)", TEXT, "if(n % 2, NULL, 18446744073709551615)"),
    },
    "a hundred columns": {
        f"column_{i}": [
            ("Float32", FINITE, f"n / {i + 1}"),
            ("Int16", PLAIN, f"n - {i}"),
            ("String", TEXT, f"'{i} ' || toString(n)"),
            ("DateTime", TIME, f"{HOUR} + {i}"),
        ][i % 4]
        for i in range(100)
    },
    "odd names": {
        "slot": ("String", TEXT, "'own slot ' || toString(n)"),
        "slot_": ("UInt8", PLAIN, "1"),
        "arrival": ("Float64", NUMBER, "-toFloat64(n)"),
        "psp_pkey": ("String", TEXT, "'key ' || toString(n)"),
        "psp_op": ("UInt8", PLAIN, "n % 2"),
        "psp_okey": ("Float64", NUMBER, "n"),
        "__INDEX__": ("UInt32", PLAIN, "n"),
        "two words": ("Float32", NUMBER, "n"),
        "it's": ("String", TEXT, "'x'"),
        '"quoted"': ("UInt64", TEXT, "n"),
        "back`tick": ("String", TEXT, "'y'"),
        "back\\slash": ("DateTime", TIME, HOUR),
        "100 % %s %(x)s": ("Float64", NUMBER, "n / 4"),
        "{x:String} {}": ("String", TEXT, "'z'"),
        "a; DROP TABLE b --": ("Int32", PLAIN, "n"),
        "__proto__": ("Float64", NUMBER, "n / 2"),
        "constructor": ("String", TEXT, "'c'"),
        "価格": ("Decimal(9, 2)", NUMBER, "n"),
        "AS": ("String", TEXT, "toString(n)"),
        " ": ("Bool", PLAIN, "n % 2"),
    },
    "ticks in another order": {
        "venue": ("LowCardinality(String)", TEXT, "'X'"),
        "volume": ("UInt32", PLAIN, "n"),
        **dict.fromkeys(("close", "low", "high", "open"), ("Float32", NUMBER, "n + 1")),
        "client": ("LowCardinality(String)", TEXT, "'Homer'"),
        "ticker": ("LowCardinality(String)", TEXT, "['A', 'B'][n % 2 + 1]"),
        "timestamp": (
            "DateTime64(3, 'UTC')",
            TIME,
            "toDateTime64('2024-06-01 00:00:00', 3) + n",
        ),
        "note": ("String", TEXT, "''"),
        "more": ("UInt64", TEXT, "n"),
    },
}
PARTITIONS = {
    "foreign exchange": "PARTITION BY toYYYYMM(time)",
    "logs and events": "PARTITION BY toDate(Timestamp)",
}


class Source:
    """A ClickHouse table with the columns of a schema, and a column `n` in front of them."""

    def __init__(self, database, schema, name="trades", clause="", settings=BLOCK_NUMBERS):
        self.name, self.limit = name, LIMIT
        self.client = database.client
        self.full_name = f"{identifier(database.name)}.{identifier(name)}"
        self.columns = {"n": PLAIN} | {c: shown for c, (_, shown, _) in schema.items()}
        self.inserted = 0
        columns = ", ".join(
            f"{identifier(name)} {' DEFAULT '.join(definition(kind, sql))}"
            for name, (kind, _, sql) in schema.items()
        )
        self.run(f"CREATE DATABASE IF NOT EXISTS {identifier(database.name)}")
        self.run(
            f"CREATE TABLE {self.full_name} (n UInt32, {columns}) ENGINE = MergeTree"
            f" {clause} ORDER BY (n % 7, n) {settings and 'SETTINGS ' + settings}"
        )

    def run(self, sql):
        return self.client.command(sql, settings={"allow_suspicious_low_cardinality_types": 1})

    def insert(self, rows):
        numbers = f"SELECT number FROM numbers({self.inserted}, {rows})"
        self.run(f"INSERT INTO {self.full_name} (n) {numbers}")
        self.inserted += rows

    def newest(self):
        """The newest rows as ClickHouse prints them, oldest first."""
        shown = (sql.format(identifier(name)) for name, sql in self.columns.items())
        sql = (
            f"SELECT {', '.join(shown)} FROM {self.full_name}"
            f" ORDER BY _block_number DESC, _block_offset DESC LIMIT {self.limit}"
        )
        return self.client.query(sql).result_rows[::-1]

    def arrived(self, mirror):
        """The rows in a mirror, oldest first."""
        rows = sorted(mirror.table(self.name).values(), key=lambda row: row["arrival"])
        return [tuple(row.get(shown(name), "missing") for name in self.columns) for row in rows]

    def agree(self, mirror):
        """Wait until a mirror has the newest rows, and the status the columns in their order."""

        def agrees():
            columns = [*map(shown, self.columns), "slot", "arrival"]
            return (
                mirror.status()
                and json.loads(mirror.status()["columns"]) == columns
                and self.arrived(mirror) == self.newest()
            )

        try:
            wait_until(agrees, mirror.status)
        except pytest.fail.Exception:
            assert self.arrived(mirror) == self.newest()  # says what differs
            raise


def definition(kind, sql):
    """Type and default of a column; a codec stands behind the default."""
    kind, codec, rest = kind.partition(" CODEC")
    return kind, sql + codec + rest


def follow(start, database, source, script="perspective_server.py"):
    options = ("--table", identifier(source.name), "--limit", source.limit)
    server, [mirror] = conftest.follow(
        start, database.dsn, *options, live=source.name, script=script
    )
    return server, mirror


@pytest.mark.parametrize("name", SCHEMAS)
def test_rows_of_any_schema_arrive_once_through_inserts_merges_mutations_and_an_alter(
    database, start, name
):
    source = Source(database, SCHEMAS[name], clause=PARTITIONS.get(name, ""))
    rollups = STOCKS if "ticker" in source.columns else set()
    source.insert(20)
    server, mirror = follow(start, database, source)
    source.agree(mirror)
    assert {*mirror.tables} == {"trades", STATUS, *(f"trades_{n}" for n in rollups)}
    for rows in (5, 1, 24):
        source.insert(rows)
        source.run(f"OPTIMIZE TABLE {source.full_name} FINAL")
    source.agree(mirror)
    assert (sum(mirror.received.values()), mirror.snapshots, mirror.removals) == (30, 1, 0)
    said = server.health()
    assert (said["table"], said["rows"], said["delivered"]) == ("trades", LIMIT, 50)
    assert (said["lag_ms"] is None) == ("timestamp" not in source.columns)

    *_, updated, renamed, dropped = source.columns
    value = re.sub(r"\bn\b", "(n + 1)", SCHEMAS[name][updated][2])
    source.run(
        f"ALTER TABLE {source.full_name} UPDATE {identifier(updated)} = {value} WHERE n % 3 = 0"
        " SETTINGS mutations_sync = 1"
    )
    source.agree(mirror)
    source.run(f"ALTER TABLE {source.full_name} DELETE WHERE n = 45 SETTINGS mutations_sync = 1")
    source.insert(3)
    source.agree(mirror)
    assert mirror.snapshots == 1

    source.run(
        f"ALTER TABLE {source.full_name} ADD COLUMN added Nullable(UInt64) DEFAULT n FIRST,"
        f" RENAME COLUMN {identifier(renamed)} TO `new name`, DROP COLUMN {identifier(dropped)}"
    )
    source.insert(3)
    source.columns.pop(dropped)
    source.columns["new name"] = source.columns.pop(renamed)
    source.columns = {"added": TEXT} | source.columns
    source.agree(mirror)
    wait_until(lambda: mirror.snapshots > 1, "the mirror came back")
    source.insert(3)
    source.agree(mirror)
    if rollups:
        wait_until(lambda: {*mirror.table("trades_tickers")} == {"A", "B"})
    assert "Traceback" not in server.output


# ---------------------------------------------------------------------------------------------
# What cannot be followed, not yet, or not by this user.

UUID = "00000000-0000-0000-0000-0000000000"
REFUSED = {
    "View": "CREATE VIEW {} AS SELECT 1 AS n",
    "MaterializedView": "CREATE MATERIALIZED VIEW {} ENGINE = MergeTree ORDER BY n SETTINGS"
    f" {BLOCK_NUMBERS} AS SELECT n FROM trades",
    "Memory": "CREATE TABLE {} (n UInt32) ENGINE = Memory",
    "Dictionary": "CREATE DICTIONARY {} (n UInt32, x String) PRIMARY KEY n"
    " SOURCE(CLICKHOUSE(TABLE 'trades')) LAYOUT(FLAT()) LIFETIME(0)",
    # Without a cluster and without Keeper, these two can be attached all the same.
    "Distributed": f"ATTACH TABLE {{}} UUID '{UUID}01' (n UInt32) ENGINE = Distributed(c, d, t)",
    "ReplicatedMergeTree": f"ATTACH TABLE {{}} UUID '{UUID}02' (n UInt32) ENGINE ="
    f" ReplicatedMergeTree('/t', 'r') PARTITION BY n ORDER BY n SETTINGS {BLOCK_NUMBERS}",
    **{
        f"{kind}MergeTree": f"CREATE TABLE {{}} (n UInt32, s Int8) ENGINE = {kind}MergeTree{option}"
        f" ORDER BY n SETTINGS {BLOCK_NUMBERS}"
        for kind, option in [("Replacing", ""), ("Summing", ""), ("Collapsing", "(s)")]
    },
}


def test_what_cannot_be_followed_ends_the_server_with_one_line_that_says_why(database, start):
    Source(database, {})
    scripts = {}
    for engine, statement in REFUSED.items():
        name = f"{database.name}.{engine}"
        database.client.command(
            statement.format(name).replace(" trades", f" {database.name}.trades")
        )
        options = ("--dsn", database.dsn, "--table", engine, "--port", free_port())
        scripts[engine] = start(Script, "perspective_server.py", *options)
    for engine, script in scripts.items():
        assert script.wait() == 1, engine
        [line] = [line for line in script.lines if "cannot use" in line]
        assert line == script.lines[-1]
        reason = {"ReplicatedMergeTree": f"{engine} counts insert blocks in each partition"}
        assert f"{database.name}.{engine}: {reason.get(engine, f'its engine is {engine},')}" in line
        assert "Traceback" not in script.output


def test_a_missing_table_and_then_its_block_numbers_are_waited_for(database, start):
    """The table's name is one that would find the other table if it was not quoted."""
    Source(database, {}, "another").insert(3)
    name = "x' OR name != '"
    server = start(Server, "--dsn", database.dsn, "--table", name, "--interval", 0.05)
    mirror = start(Mirror, server.url, live=name)
    server.wait_for(f"no table {database.name}.{name}, waiting for it")
    source = Source(database, SCHEMAS["sensors"], name, settings="")
    source.insert(10)
    server.wait_for("ALTER TABLE")
    status, _, body = server.get("/healthz")
    assert (status, json.loads(body)["clickhouse"], mirror.snapshots) == (503, "no table", 0)
    [line] = [line for line in server.lines if "ALTER TABLE" in line]
    assert "rewrites no data" in line
    source.run(line[line.index("ALTER TABLE") :])
    source.insert(10)
    source.agree(mirror)
    assert server.get("/healthz")[0] == 200


def test_a_user_is_told_the_grant_that_is_missing(start, tmp_path):
    users = {
        "reader": {"password": "r", "grants": ["SELECT ON mine.trades"]},
        "stranger": {"password": "s", "grants": ["SELECT ON other.*"]},
    }
    with ClickHouseProcess(tmp_path / "clickhouse", users=users) as process:
        database = Database(process)
        database.name = "mine"
        source = Source(database, SCHEMAS["sensors"])
        source.insert(3)
        servers = {}
        for user in users:
            options = ("--dsn", process.dsn_of("mine", user=user), "--table", "trades")
            servers[user] = start(Server, *options)
        source.agree(start(Mirror, servers["reader"].url, live="trades"))
        told = re.compile(r"(?i)grant.*\btrades\b")  # ClickHouse hides the table from this user
        stranger = servers["stranger"]
        wait_until(lambda: told.search(stranger.output), lambda: stranger.output)


@pytest.mark.parametrize(
    "name",
    [
        "x'; DROP TABLE trades; -- \\",
        '`, (SELECT 1 FROM trades) AS `x"',
        "%s %(x)s {x:String} {0} {source} \\' OR 1 = 1 #.trades",
    ],
)
def test_names_that_look_like_sql_read_nothing_else_and_change_nothing(clickhouse, start, name):
    database = Database(clickhouse)
    database.name, database.dsn = name, clickhouse.dsn_of(quote(name, safe=""))
    schema = SCHEMAS["ticks in another order"] | {name: ("String", TEXT, "'theirs'")}
    source, other = Source(database, schema, name), Source(database, schema)
    try:
        source.insert(5)
        other.insert(7)
        before = other.newest()
        server, mirror = follow(start, database, source)
        source.agree(mirror)
        assert {*mirror.tables} == {name, STATUS, *(f"{name}_{n}" for n in STOCKS)}
        source.insert(5)
        source.agree(mirror)

        def volume():
            return sum(row["volume"] for row in mirror.table(f"{name}_tickers").values())

        wait_until(lambda: volume() == sum(range(10)), "the tickers of these rows alone")
        assert other.newest() == before
    finally:
        source.run(f"DROP DATABASE {identifier(name)}")


# ---------------------------------------------------------------------------------------------
# Perspective never frees a string.

NEW_STRINGS = {
    f"string_{i}": ("String", TEXT, f"hex(MD5(concat(toString(n), ' {i}')))") for i in range(10)
}


def bounded(folder, megabytes):
    """The server, which recreates its tables after so many megabytes of new strings."""
    changes = {"MAX_STRING_BYTES = 500_000_000": f"MAX_STRING_BYTES = {megabytes}_000_000"}
    return changed_server(folder, changes)


def test_a_million_new_strings_in_bounded_memory(database, start, tmp_path):
    source = Source(database, NEW_STRINGS)
    source.limit = 6000
    server, mirror = follow(start, database, source, bounded(tmp_path, 40))
    used, returned = [server.memory()], 1
    while source.inserted < 120_000:
        source.insert(5000)
        server.wait_for_delivered(source.inserted)
        used.append(server.memory())
        if source.inserted % 30_000 == 0:
            source.agree(mirror)
            wait_until(lambda last=returned: mirror.snapshots > last, "it came back by itself")
            returned = mirror.snapshots
    # The strings alone would take 400 MB.
    assert max(used) - used[0] < 200, used


def test_a_large_window_does_not_recreate_its_tables_at_each_insert(database, start, tmp_path):
    source = Source(database, NEW_STRINGS)
    source.limit = 400
    source.insert(400)
    _, mirror = follow(start, database, source, bounded(tmp_path, 1))
    for _ in range(5):
        source.insert(1)
        source.agree(mirror)
    assert mirror.snapshots == 1


# ---------------------------------------------------------------------------------------------
# The page, in Chromium.


def wait_for_grid(tab, columns, first):
    """Wait until the grid has these columns, and in its first row these strings by column."""

    def shows():
        with contextlib.suppress(PlaywrightError):  # the page is loading itself anew
            heads, rows = tab.cells("rows", "thead"), tab.cells("rows")
            if not heads or not rows or heads[-1] != columns or len(rows[0]) != len(columns):
                return False
            return first.items() <= dict(zip(columns, rows[0], strict=True)).items()

    wait_until(shows, f"{columns} {first}")


@pytest.mark.alone
def test_the_page_stays_when_tables_are_recreated_for_too_many_strings(
    database, start, visit, tmp_path
):
    """It comes back within a second or so, without loading itself anew, in the same layout."""
    source = Source(database, NEW_STRINGS)
    source.limit = 1000
    source.insert(100)
    server, mirror = follow(start, database, source, bounded(tmp_path, 8))
    tab = visit(server.url, "waiting")
    tab.wait_for_cells("rows")
    tab.change("rows", columns=["n", "string_0"], title="Mine")
    chart = {"table": "trades", "plugin": "Y Line", "group_by": ["n"], "columns": ["slot"]}
    tab.after(lambda: tab.page.evaluate(f"(panel) => {VIEWER}.addPanel(panel)", chart))
    tab.page.click("#theme")
    wait_until(lambda: tab.themes()[2] == {"Pro Dark"}, "dark")
    workspace, loaded_at = tab.workspace(), tab.loaded_at()
    page = tab.page
    for recreated in (1, 2):
        page.evaluate(f"async () => {{ kept = await {VIEWER}.getView({{ panel: 'rows' }}); }}")
        while mirror.snapshots == recreated:
            source.insert(1000)
            source.agree(mirror)
        began = time.monotonic()
        newest = source.newest()[-1]
        wait_until(lambda n=newest: tab.cells("rows")[:1] == [[f"{n[0]:,}", n[1]]], newest)
        assert time.monotonic() - began < 2
        tab.wait_for_cells("rows")  # the chart has been restored, too
        assert not differences(tab.workspace(), workspace)
        # With the views of the old tables, their strings are gone.
        assert page.evaluate("kept.num_rows().then(() => false, () => true)")
    assert tab.loaded_at() == loaded_at
    assert tab.text("#notice") == ""


@pytest.mark.parametrize(
    ("name", "group", "chart"),
    [
        ("crypto trades", "side", {"plugin": "Y Line", "group_by": ["time"], "columns": ["price"]}),
        ("odd names", "__proto__", {"plugin": "X/Y Scatter", "columns": ["two words", "価格"]}),
    ],
)
def test_the_page_shows_pivots_charts_and_remembers_any_schema(
    database, start, visit, name, group, chart
):
    source = Source(database, SCHEMAS[name])
    source.insert(30)
    server, _ = follow(start, database, source)
    tab = visit(server.url, None, width=4000)
    columns = [*map(shown, source.columns)]

    def newest_row():
        values = zip(source.columns.items(), source.newest()[-1], strict=True)
        return {shown(column): value for (column, sql), value in values if sql == TEXT and value}

    wait_for_grid(tab, columns, newest_row())
    source.insert(4)
    wait_for_grid(tab, columns, {"n": "33"} | newest_row())
    assert [row["n"] for row in tab.rows("rows")] == [row[0] for row in source.newest()[::-1]]
    if name == "crypto trades":
        ids = {row[columns.index("id")] for row in tab.cells("rows")}
        assert ids == {"9007199254740993", "18446744073709551615", "0"}
    assert tab.page.title().startswith("trades")

    tab.change("rows", group_by=[group], columns=["n"], aggregates={"n": "count"})
    counts = source.client.query(
        f"SELECT count() FROM {source.full_name} GROUP BY {identifier(group)} ORDER BY 1"
    ).result_rows
    expected = [*(count for (count,) in counts), 34]
    wait_until(lambda: sorted(row["n"] for row in tab.rows("rows")) == expected, expected)
    tab.change("rows", **{"group_by": [], "aggregates": {}} | chart)
    tab.wait_for_marks("rows")
    tab.page.reload()
    tab.wait_for_marks("rows")
    panel = tab.workspace()["panels"]["rows"]
    assert {key: panel.get(key) for key in chart} == chart

    tab.page.click("#reset")
    wait_for_grid(tab, columns, newest_row())
    source.run(f"ALTER TABLE {source.full_name} ADD COLUMN added UInt64 DEFAULT 9007199254740993")
    source.insert(1)
    wait_for_grid(tab, [*columns, "added"], {"n": "34", "added": "9007199254740993"})
