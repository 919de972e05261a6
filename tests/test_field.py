"""What breaks on other people's machines, profiles and data, and on the second day.

Each case was seen to fail or to mislead once.
"""

import collections
import socket
import time
from http.client import HTTPConnection
from urllib.request import urlopen

import pytest
from clickhouse_http import ClickHouseProcess
from conftest import (
    HOUR,
    Database,
    Mirror,
    Script,
    Server,
    changed_server,
    follow,
    free_port,
    now_ms,
    wait_until,
)

SERVER = "perspective_server.py"
NOWHERE = "clickhouse://u:p@127.0.0.1:9/test"  # nobody listens there
ROLLUPS = ("tickers", "candles", "history")
BLOCK_SETTINGS = "enable_block_number_column = 1, enable_block_offset_column = 1"
INDEX_SETTINGS = (
    "add_minmax_index_for_block_number_column = 1, add_minmax_index_for_block_offset_column = 1,"
    " part_minmax_index_columns = 'with_block_number_offset'"
)


def create(database, columns, name="odd", settings=BLOCK_SETTINGS):
    """Create a table of other columns than the producer's, and its database."""
    database.client.command(f"CREATE DATABASE IF NOT EXISTS {database.name}")
    database.client.command(
        f"CREATE TABLE {database.name}.{name} ({columns}) ENGINE = MergeTree ORDER BY tuple()"
        + (f" SETTINGS {settings}" if settings else "")
    )
    return f"{database.name}.{name}"


def rollups_came(mirror):
    """Whether all rollups have rows; for `wait_until`."""
    return all(mirror.table(f"{mirror.live}_{name}") for name in ROLLUPS)


def count_rows_read(database):
    """How many rows this ClickHouse has read from tables so far."""
    sql = "SELECT value FROM system.events WHERE event = 'SelectedRows'"
    return int(database.client.command(sql))


# ---------------------------------------------------------------------------------------------
# The machine: loopback addresses, clocks, origins, names.


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_program_on_one_loopback_address_is_noticed_on_both(start, family):
    """A browser may take either for localhost, and would show the other program."""
    port = free_port()
    with socket.socket(family) as other:
        other.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        other.listen()
        script = start(Script, SERVER, "--dsn", NOWHERE, "--port", port)
        assert script.wait() == 1
        [line] = script.lines
        assert f"port {port}" in line and "in use" in line and "--port" in line
    start(Server, "--dsn", NOWHERE, port=port)
    for host in ("127.0.0.1", "[::1]", "localhost"):
        with urlopen(f"http://{host}:{port}/") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("seconds", [-100, 100])
def test_clocks_that_differ_by_100_seconds(table, start, tmp_path, seconds):
    """What is new by one of the two clocks is in the rollups. The difference is said once."""
    changes = {"time.time()": f"(time.time() + {seconds})"}
    server, [mirror] = follow(start, table.dsn, script=changed_server(tmp_path, changes))
    table.insert(50, at=now_ms() + max(0, seconds) * 1000)
    wait_until(lambda: rollups_came(mirror), "the rollups")
    ticks = [row["ticks"] for row in mirror.table("stock_values_history").values()]
    assert sum(ticks) == 50
    server.wait_for_delivered(50)
    assert 0 <= server.health()["lag_ms"] < 60_000
    assert server.output.count("clock") == 1
    status = wait_until(mirror.status, "the status")
    assert abs(status["clock_ms"] + seconds * 1000) < 20_000  # the answer's way counts, too


def test_a_refused_origin_is_logged_once_with_the_option_that_allows_it(start):
    server = start(Server, "--dsn", NOWHERE)
    headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    headers |= {"Sec-WebSocket-Key": 22 * "A" + "==", "Origin": "https://desk.example:8443"}
    for _ in range(3):
        connection = HTTPConnection("localhost", server.port)
        connection.request("GET", "/websocket", headers=headers)
        assert connection.getresponse().status == 403
        connection.close()
    assert server.output.count("--allow-origin https://desk.example:8443") == 1


@pytest.mark.parametrize("name", ["trades", "`my.trades`"])
def test_a_table_of_another_database(database, start, name):
    plain = name.strip("`")
    full = create(database, "n UInt32", f"`{plain}`")
    elsewhere = database.process.dsn_of("elsewhere")
    live = {"live": plain, "complete": False}
    _, [mirror] = follow(start, elsewhere, "--table", f"{database.name}.{name}", **live)
    database.client.command(f"INSERT INTO {full} VALUES (1), (2)")
    wait_until(lambda: [row["n"] for row in mirror.table(plain).values()] == [1, 2], "rows")
    status = wait_until(mirror.status, "the status")
    assert (status["database"], status["table"]) == (database.name, plain)


# ---------------------------------------------------------------------------------------------
# The user's profile.

PROFILES = {
    "old": {"compatibility": "24.2"},
    "cut": {"max_result_rows": 1000, "result_overflow_mode": "break", "max_block_size": 500},
    "odd": {
        "prefer_column_name_to_alias": 1,
        "force_primary_key": 1,
        "aggregate_functions_null_for_empty": 1,
        "session_timezone": "Asia/Kolkata",
    },
    "bound": {"max_result_rows": 1000, "result_overflow_mode": "break", "max_block_size": 500}
    | {"readonly": 1},
    "refused": {"readonly": 1, "max_rows_to_sort": 100},
}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """A ClickHouse with a user for each of the profiles."""
    reader = {"password": "s3cret", "grants": ["SELECT ON *.*"]}
    users = {name: reader | {"settings": settings} for name, settings in PROFILES.items()}
    with ClickHouseProcess(tmp_path_factory.mktemp("profiles"), users=users) as process:
        yield process


@pytest.mark.parametrize("user", ["old", "cut", "odd"])
def test_a_profile_changes_nothing(profiles, start, user):
    """Neither what viewers get, from the empty table on, nor how often the window is read."""
    database = Database(profiles)
    database.create_table()
    server, [mirror] = follow(start, profiles.dsn_of(database.name, user))
    for rows in (3000, 50):
        database.insert(rows)
        wait_until(lambda: mirror.rows() == database.rows(), "all rows")
    wait_until(lambda: rollups_came(mirror), lambda: server.output)
    assert mirror.updates["stock_values"] <= 2, server.output
    assert "reloaded" not in server.output and "failed" not in server.output


def test_a_limit_that_the_user_may_not_lift_is_said_once_and_followed(profiles, start):
    database = Database(profiles)
    database.create_table()
    database.insert(3000)
    server, [mirror] = follow(start, profiles.dsn_of(database.name, "bound"))
    server.wait_for("max_result_rows")
    delivered = server.health()["delivered"]
    wait_until(lambda: mirror.status()["delivered"] == delivered, "the window, read again")
    updates = []
    for _ in range(3):
        came = mirror.received.total()
        database.insert(20)
        wait_until(lambda came=came: mirror.received.total() == came + 20, "new rows")
        time.sleep(1.2)  # longer than the pause between two readings of the window
        updates.append(mirror.updates["stock_values"])
    assert updates[2] == updates[0] + 2
    for text in ("max_result_rows", "reloaded"):  # it is read a second time, to be sure
        assert server.output.count(text) == 1


def test_a_query_that_is_refused_again_and_again_is_said_once(profiles, start):
    database = Database(profiles)
    database.create_table()
    database.insert(3000)
    dsn = profiles.dsn_of(database.name, "refused")
    server = start(Server, "--dsn", dsn, "--interval", 0.05)
    server.wait_for("refuses the query (error 396)")
    time.sleep(3)  # time for two more attempts
    assert server.health()["clickhouse"] == "down"
    assert len(server.lines) == 3, server.output


# ---------------------------------------------------------------------------------------------
# The table's columns.


def test_1500_columns_over_http_and_embedded(start, tmp_path):
    columns = ", ".join(f"a_column_with_a_long_name_{i} String DEFAULT 'x'" for i in range(1499))
    with ClickHouseProcess(tmp_path / "data") as process:
        database = Database(process, "test")
        full = create(database, f"n UInt32, {columns}", "wide")
        database.client.command(f"INSERT INTO {full} (n) VALUES (1), (2)")
        start(Server, "--dsn", process.dsn, "--table", "wide").wait_for_delivered(2)
    embedded = start(Server, "--embedded", tmp_path / "data", "--table", "wide")
    embedded.wait_for_delivered(2)
    mirror = start(Mirror, embedded.url, "wide")
    wait_until(lambda: [len(row) for row in mirror.table("wide").values()] == 2 * [1502])


def test_materialized_and_alias_columns_are_enough_for_the_rollups(database, start):
    full = create(
        database,
        "timestamp DateTime64(3, 'UTC'), ticker LowCardinality(String), price Float32,"
        " client LowCardinality(String) ALIAS 'Homer', volume UInt32 MATERIALIZED 7,"
        " open Float32 ALIAS price, high Float32 ALIAS price, low Float32 MATERIALIZED price,"
        " close Float32 MATERIALIZED price",
    )
    _, [mirror] = follow(start, database.dsn, "--table", "odd", live="odd")
    database.client.command(f"INSERT INTO {full} VALUES ({now_ms() / 1000}, 'A', 187.79)")
    wait_until(lambda: rollups_came(mirror), "the rollups")
    [row] = mirror.table("odd_history").values()
    assert (row["ticker"], row["client"], row["close"], row["volume"]) == ("A", "Homer", 187.79, 7)


def test_a_rollup_whose_name_ends_in_status(site, start, visit, tmp_path):
    entry = """
    Rollup("my_status", columns={"client": "string"}, interval=1,
        sql="SELECT DISTINCT t.client AS client FROM {recent}"),"""
    script = changed_server(tmp_path, {"\nROLLUPS = [": f"\nROLLUPS = [{entry}"})
    server = start(Server, *site.options, script=script)
    assert visit(server.url).page.title()


def test_prices_and_totals_of_3000_tickers_and_9_clients(table, start):
    """In three steps. Prices are those of the ticks, although these are Float32."""
    pairs, steps, at = 27_000, 3, now_ms() - HOUR
    table.command(
        "INSERT INTO stock_values SELECT fromUnixTimestamp64Milli(toInt64("
        f"{at} + intDiv(number, {pairs}) * 20000), 'UTC'), toString(number % 3000),"
        f" toString(intDiv(number % {pairs}, 3000)), 187.79, 187.79, 187.79, 187.79,"
        f" number % 1000 + 1, today() FROM numbers({pairs * steps})"
    )
    _, [mirror] = follow(start, table.dsn, "--limit", 100)
    wait_until(lambda: rollups_came(mirror), "the rollups")
    history = list(mirror.table("stock_values_history").values())
    assert len(history) <= 20_000
    assert len({row["time"] for row in history}) == steps
    totals = tuple(sum(row[name] for row in history) for name in ("ticks", "volume"))
    assert [totals] == table.ask("SELECT count(), sum(volume) FROM stock_values")
    for name in ROLLUPS:
        rows = mirror.table(f"stock_values_{name}").values()
        prices = {row["last" if name == "tickers" else "close"] for row in rows}
        assert prices <= {187.79, None} and 187.79 in prices


# ---------------------------------------------------------------------------------------------
# The second day.


def test_a_history_reads_after_inserts_only_the_steps_that_have_new_ticks(table, start, tmp_path):
    """Seen by a rollup whose rows say how many ticks were read to compute them."""
    entry = """
    Rollup("read", columns={"time": "datetime", "ticks": "float"}, interval=0.2, step="SELECT 1000",
        sql="SELECT fromUnixTimestamp64Milli(intDiv(t.ms, {step}) * {step}, 'UTC') AS time,"
            " toFloat64(sum(count()) OVER ()) AS ticks FROM {ticks} GROUP BY intDiv(t.ms, {step})"),
    """
    script = changed_server(tmp_path, {"\nROLLUPS = [": f"\nROLLUPS = [{entry}"})
    at = now_ms() // 1000 * 1000 - HOUR
    table.insert(900, at, step=10)  # nine steps
    _, [mirror] = follow(start, table.dsn, script=script)

    def counts():
        rows = mirror.table("stock_values_read").values()
        return collections.Counter(row["ticks"] for row in rows)

    wait_until(lambda: counts() == {900: 9}, counts)
    table.insert(20, at + 60_000)
    wait_until(lambda: counts() == {900: 9, 20: 1}, counts)
    table.insert(5, at + 60_500)
    wait_until(lambda: counts() == {900: 9, 25: 1}, counts)
    table.command("DELETE FROM stock_values WHERE volume % 100000 = 3")
    wait_until(lambda: sum(counts().values()) == 10 and len(counts()) == 1, counts)


def test_the_start_finds_its_window_by_the_index(database, start):
    """In a table of 4,000,000 rows. Without the index, it would read the block numbers of all."""
    rows, size = 4_000_000, 10_000
    full = create(database, "n UInt32", settings=f"{BLOCK_SETTINGS}, {INDEX_SETTINGS}")
    database.client.command(
        f"INSERT INTO {full} SELECT number FROM numbers({rows}) SETTINGS max_block_size = {size},"
        f" min_insert_block_size_rows = {size}, min_insert_block_size_bytes = 0, max_threads = 1"
    )
    before = count_rows_read(database)
    server = start(Server, "--dsn", database.dsn, "--table", "odd", "--limit", 1000)
    server.wait_for_delivered(1000)
    assert count_rows_read(database) - before < 0.2 * rows
    mirror = start(Mirror, server.url, "odd")
    newest = set(range(rows - 1000, rows))
    wait_until(lambda: {row["n"] for row in mirror.table("odd").values()} == newest)


def test_strings_count_by_their_bytes_and_repeated_ones_cost_nothing(database, start, tmp_path):
    changes = {"MAX_STRING_BYTES = 500_000_000": "MAX_STRING_BYTES = 100_000"}
    names = [f"s{i}" for i in range(100)]
    full = create(database, ", ".join(f"{name} String" for name in names))
    script = changed_server(tmp_path, changes)
    server, [mirror] = follow(start, database.dsn, "--table", "odd", live="odd", script=script)

    def insert(rows, value):
        before = server.health()["delivered"]
        values = ", ".join(f"{value} AS {name}" for name in names)
        database.client.command(f"INSERT INTO {full} SELECT {values} FROM numbers({rows})")
        server.wait_for_delivered(before + rows)

    for _ in range(5):
        insert(100, "'the same string'")  # 50,000 in all
    assert mirror.snapshots == 1
    insert(2, "randomPrintableASCII(10000)")  # 2,000,000 bytes
    wait_until(lambda: mirror.snapshots == 2, "the tables to be recreated")


@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_were_merged_before_the_table_kept_block_numbers(database, start, kept):
    full = create(database, "n UInt32", settings=BLOCK_SETTINGS if kept else "")
    for n in range(3):
        database.client.command(f"INSERT INTO {full} SELECT {n} FROM numbers(10)")
    database.client.command(f"OPTIMIZE TABLE {full} FINAL")
    if not kept:
        database.client.command(f"ALTER TABLE {full} MODIFY SETTING {BLOCK_SETTINGS}")
    server = start(Server, "--dsn", database.dsn, "--table", "odd", "--interval", 0.05)
    server.wait_for_delivered(30)
    database.client.command(f"INSERT INTO {full} VALUES (4)")
    server.wait_for_delivered(31)
    assert server.output.count("order of their rows is lost") == (0 if kept else 1)


def test_rows_that_a_lightweight_delete_hides_are_no_missing_rows(database, start):
    """They stay in the parts until a merge. What is dropped after that is noticed as before."""
    full = create(database, "n UInt32")
    for n in range(2):
        database.client.command(f"INSERT INTO {full} SELECT {n} FROM numbers(10)")
    server, [mirror] = follow(start, database.dsn, "--table", "odd", live="odd")
    database.client.command(f"DELETE FROM {full} WHERE rand() % 2 OR n = 1")
    left = int(database.client.command(f"SELECT count() FROM {full}"))
    wait_until(lambda: len(mirror.table("odd")) == left, "the rows that are left")
    time.sleep(2.5)  # time for two more readings of the window, which nothing calls for
    assert server.output.count("reloaded") == 1
    parts = f"SELECT name FROM system.parts WHERE active AND database = '{database.name}'"
    first = database.client.command(f"{parts} ORDER BY min_block_number LIMIT 1")
    database.client.command(f"ALTER TABLE {full} DROP PART '{first}'")
    wait_until(lambda: mirror.table("odd") == {}, "no rows")
    assert "max_result_rows" not in server.output
