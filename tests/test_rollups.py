"""The rollups' mirrors hold exactly what is computed here, in Python, from all rows of ClickHouse.

Most tests run a copy of the server whose rollups may run five times a second.
"""

import collections
import functools
import random
import time

import pytest
from clickhouse_http import ClickHouseProcess
from conftest import HOUR, Database, Script, changed_server, follow, now_ms, wait_until

from producer import COLUMNS as COLUMN_TYPES

MINUTE = 60_000
DAY = 24 * HOUR
YEAR = 365 * DAY
# Of a readable time axis, in ms: 1, 5, 15 seconds, and so on up to a year.
SECONDS = [1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400, 604_800, 2_592_000, 7_776_000, 31_536_000]
STEPS = [1000 * seconds for seconds in SECONDS]
# Some of them would collide in careless keys.
TICKERS = ["AAPL.N", "A", "A 1", "A 1 2", "", "it's `\"\\"]
CLIENTS = ["Homer", "1", "1 2", "2 Homer", ""]
MAX_ROWS = 20_000
IN_2099 = 4_070_908_800_000

Tick = collections.namedtuple(
    "Tick", "ms ticker client open high low close volume", defaults=[1.0, 2.0, 0.5, 1.5, 100]
)


def draw(seed, rows, start, end):
    """Draw ticks stamped from `start` to `end`, many of them in the same milliseconds."""
    chance = random.Random(seed)
    times = [start, end, *(chance.choice((start, end)) for _ in range(10))]
    times += [chance.randrange(start, end) for _ in range(rows - len(times))]
    return [
        Tick(
            *(ms, chance.choice(TICKERS), chance.choice(CLIENTS)),
            *(chance.randrange(400, 800) / 4 for _ in range(4)),
            chance.randrange(1, 4_000_000_000),
        )
        for ms in times
    ]


def insert(database, ticks, into="stock_values"):
    columns = ["timestamp", *Tick._fields[1:]]
    database.client.insert(into, ticks, database=database.name, column_names=columns)


def ticks_of(database):
    """All ticks that count, in the order of their time, then of their arrival."""
    names = ", ".join(f"{name}" for name in Tick._fields[1:])
    rows = database.ask(
        f"SELECT toUnixTimestamp64Milli(timestamp) AS ms, {names}"
        " FROM stock_values ORDER BY ms, _block_number, _block_offset"
    )
    first, last = 946_684_800_000, now_ms() + MINUTE  # from the year 2000 on
    return [Tick(*row) for row in rows if first <= row[0] <= last]


def grouped(ticks, key):
    groups = collections.defaultdict(list)
    for tick in ticks:
        groups[key(tick)].append(tick)
    return groups.items()


def ohlcv(ticks):
    high, low = max(tick.high for tick in ticks), min(tick.low for tick in ticks)
    return ticks[0].open, high, low, ticks[-1].close, sum(tick.volume for tick in ticks)


def recent(ticks):
    """The five minutes before the newest tick, which begin with a whole candle."""
    start = (ticks[-1].ms - 5 * MINUTE) // 2000 * 2000 if ticks else 0
    return [tick for tick in ticks if tick.ms >= start]


def tickers(ticks):
    return {
        (ticker,): (close, close / open_ - 1, high, low, volume)
        for ticker, rows in grouped(recent(ticks), lambda tick: tick.ticker)
        for open_, high, low, close, volume in [ohlcv(rows)]
    }


def candles(ticks):
    groups = grouped(recent(ticks), lambda tick: (tick.ms // 2000 * 2000, tick.ticker))
    return {key: ohlcv(rows) for key, rows in groups}


def history(ticks, step):
    groups = grouped(ticks, lambda t: (t.ms // step * step, t.ticker, t.client))
    return {key: (*ohlcv(rows), len(rows), rows[-1].ms) for key, rows in groups}


OHLCV = ["open", "high", "low", "close", "volume"]
COLUMNS = {  # first those that identify a row, then its values
    "tickers": (["ticker"], ["last", "change", "high", "low", "volume"]),
    "candles": (["time", "ticker"], OHLCV),
    "history": (["time", "ticker", "client"], [*OHLCV, "ticks", "last_tick"]),
}


def mirrored(mirror, name):
    keys, values = COLUMNS[name]
    rows = list(mirror.table(f"stock_values_{name}").values())
    found = rounded({tuple(row[k] for k in keys): [row[v] for v in values] for row in rows})
    assert len(found) == len(rows), f"{name} has a row twice"
    return found


def rounded(rows):
    """Perspective changes the 16th digit of some numbers."""
    return {key: tuple(round(value, 9) for value in values) for key, values in rows.items()}


def agree(database, mirror, names=("tickers", "candles", "history"), ticks=None):
    """Wait until the mirrored rollups equal those computed here. Returns the history's step."""
    ticks = ticks or ticks_of(database)
    for name in names:
        if name == "history":
            by_hand = {step: rounded(history(ticks, step)) for step in STEPS}
        else:
            by_hand = {1: rounded({"tickers": tickers, "candles": candles}[name](ticks))}
        step = wait_until(functools.partial(equal, mirror, name, by_hand), 60, name)
    return step


def equal(mirror, name, by_hand):
    found = mirrored(mirror, name)
    return next((step for step, rows in by_hand.items() if rows == found), None)


QUICK = dict.fromkeys(("interval=1,", "interval=30,"), "interval=0.2,")
QUICK["ROLLUP_SHARE = 0.1"] = "ROLLUP_SHARE = 0.5"  # otherwise 5 s in a run are 50 s of rest


def with_more(entries):
    """Changes for `changed_server`: these rollups, too, and all as quick as the machine."""
    return QUICK | {"\nROLLUPS = [": f"\nROLLUPS = [{entries}"}


@pytest.fixture
def quick(tmp_path):
    return changed_server(tmp_path, QUICK)


# ---------------------------------------------------------------------------------------------
# Their content.


def test_the_last_batch_of_a_running_producer_is_in_tickers_and_candles(table, start):
    _, [mirror] = follow(start, table.dsn)
    script = start(Script, "producer.py", "--dsn", table.dsn, "--batches", 8)
    assert script.wait() == 0
    agree(table, mirror, ["tickers", "candles"])


def test_late_rows_ties_wrong_clocks_changes_and_a_truncate(table, start, quick):
    now = now_ms()
    insert(table, draw(1, 300, now - 4 * MINUTE, now))
    server, [mirror] = follow(start, table.dsn, script=quick)
    agree(table, mirror)
    insert(table, draw(2, 100, now - 4 * MINUTE, now))  # late, and ties across blocks
    agree(table, mirror)
    insert(table, draw(3, 100, now - HOUR, now - 10 * MINUTE))
    agree(table, mirror)
    clocks = (0, IN_2099, now_ms() + 10 * MINUTE, now_ms() + 20_000)  # the last one counts
    insert(table, [Tick(ms, ticker, "Homer") for ms in clocks for ticker in ("A", "B")])
    assert len(ticks_of(table)) == table.count() - 6
    agree(table, mirror)
    for sql in (
        "DELETE FROM stock_values WHERE ticker = 'A'",
        "ALTER TABLE stock_values DELETE WHERE client = 'Homer' SETTINGS mutations_sync = 2",
        "ALTER TABLE stock_values UPDATE high = 900 WHERE volume < 2e9 SETTINGS mutations_sync = 2",
    ):
        table.command(sql)
        agree(table, mirror)
    table.command("TRUNCATE TABLE stock_values")
    for name in COLUMNS:
        wait_until(lambda name=name: mirrored(mirror, name) == {}, 20, name)
    insert(table, draw(4, 50, now - MINUTE, now))
    agree(table, mirror)
    assert server.health()["clickhouse"] == "up"
    assert "failed" not in server.output


def test_the_five_minutes_end_at_the_newest_tick(table, start, quick):
    old = now_ms() - 3 * DAY
    insert(table, [*draw(1, 300, old - 20 * MINUTE, old), Tick(IN_2099, "A", "x")])
    _, [mirror] = follow(start, table.dsn, script=quick)
    agree(table, mirror)
    times = {time for time, _ in mirrored(mirror, "candles")}
    assert old - 2000 < max(times) <= old < min(times) + 5 * MINUTE + 2000
    now = now_ms()
    insert(table, [Tick(now, "A", "x")])
    agree(table, mirror)
    assert list(mirrored(mirror, "tickers")) == [("A",)]  # the others are removed
    assert list(mirrored(mirror, "candles")) == [(now // 2000 * 2000, "A")]


def test_the_steps_of_the_history_grow_with_its_span(table, start, quick):
    now, last = now_ms(), 0
    _, [mirror] = follow(start, table.dsn, script=quick)
    for span in (10_000, HOUR, YEAR):
        insert(table, draw(span, 400, now - span, now))
        step = agree(table, mirror)
        assert step > last
        assert 10 <= len({time for time, *_ in mirrored(mirror, "history")}) <= 200
        last = step


def test_of_5_000_tickers_those_with_the_most_volume_are_shown(table, start, quick):
    table.command(
        "INSERT INTO stock_values SELECT fromUnixTimestamp64Milli(toInt64("
        f"{now_ms()} - intDiv(number, 5000) * 2000), 'UTC'), toString(number % 5000), 'Homer',"
        " 1, 2, 0.5, 1.5, cityHash64(number % 5000) % 1000000 + 1, today() FROM numbers(30000)"
    )
    _, [mirror] = follow(start, table.dsn, script=quick)
    ticks = ticks_of(table)
    agree(table, mirror, ["tickers"], ticks)
    volume = {ticker: values[-1] for (ticker,), values in tickers(ticks).items()}
    by_volume = sorted(volume, key=lambda ticker: (-volume[ticker], ticker))
    top, rest = set(by_volume[:3333]), set(by_volume[3334:])  # six rows each; the next has two
    for name, by_hand in (("candles", candles(ticks)), ("history", history(ticks, 1000))):
        wait_until(lambda name=name: len(mirrored(mirror, name)) == MAX_ROWS, 30, name)
        found = mirrored(mirror, name)
        assert found.items() <= rounded(by_hand).items()
        shown = collections.Counter(ticker for _, ticker, *_ in found)
        assert {ticker for ticker, rows in shown.items() if rows == 6} == top
        assert not rest & set(shown)


def test_the_keys_of_candles_are_reused(table, start, quick):
    """Perspective, and so each browser, never forgets a text."""
    _, [mirror] = follow(start, table.dsn, script=quick)
    at, keys, times = now_ms() - DAY, set(), set()
    for _ in range(4):
        insert(table, [Tick(at + i * 2000, t, "x") for i in range(150) for t in ("A", "A 1")])
        at += 150 * 2000
        agree(table, mirror, ["candles"])
        keys |= set(mirror.table("stock_values_candles"))
        times |= {time for time, _ in mirrored(mirror, "candles")}
    assert len(times) == 600
    assert len(keys) <= 2 * 300


def test_history_table_is_where_the_history_comes_from(table, start, quick):
    """It has no block numbers: here it is a table over two others, as over the nodes of a cluster.

    Its rows are read again although the live table does not move.
    """
    now, name = now_ms(), table.name
    ticks = sorted(Tick(now - i * 7919, *t[1:]) for i, t in enumerate(draw(1, 300, 0, 100)))
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMN_TYPES.items())
    client = table.client
    for part in ("part_1", "part_2"):
        engine = "MergeTree ORDER BY timestamp"
        client.command(f"CREATE TABLE {name}.{part} ({columns}) ENGINE = {engine}")
    client.command(f"CREATE TABLE {name}.all AS {name}.part_1 ENGINE = Merge('{name}', '^part_')")
    insert(table, ticks[:200], "part_1")
    _, [mirror] = follow(start, table.dsn, "--history-table", f"{name}.all", script=quick)
    agree(table, mirror, ["history"], ticks[:200])
    insert(table, [Tick(now, "LIVE", "x")])
    agree(table, mirror, ["tickers", "candles"])
    insert(table, ticks[200:], "part_2")
    agree(table, mirror, ["history"], ticks)


# ---------------------------------------------------------------------------------------------
# Their place: one entry each, and away from the ticks.


def test_a_fourth_rollup_is_one_entry_and_a_failing_one_is_said_once(table, start, tmp_path):
    entries = """
    Rollup("clients", index="client", interval=0.2, sql="SELECT t.client AS client, sum(t.volume)"
        " AS volume FROM {recent} GROUP BY t.client"),
    Rollup("broken", index="ticker", interval=0.2, sql="SELECT t.ticker AS ticker,"
        " throwIf(max(t.volume) > 0) AS value FROM {recent} GROUP BY t.ticker"),
    Rollup("ids", index="ticker", interval=1, sql="SELECT t.ticker AS ticker, generateUUIDv4() AS"
        " id FROM {recent} GROUP BY t.ticker"),
    Rollup("lost", index="nothing", interval=1, sql="SELECT t.ticker AS ticker FROM {recent}"),"""
    server, [mirror] = follow(start, table.dsn, script=changed_server(tmp_path, with_more(entries)))

    def clients():
        rows = mirror.table("stock_values_clients").values()
        return {row["client"]: row["volume"] for row in rows}

    for seed in range(2):
        insert(table, draw(seed, 50, now_ms() - MINUTE, now_ms()))
        agree(table, mirror)
        expected = collections.Counter()
        for tick in ticks_of(table):
            expected[tick.client] += tick.volume
        wait_until(lambda expected=expected: clients() == expected, 20, "the fourth rollup")
    assert mirror.table("stock_values_broken") == {}
    for name in ("broken", "ids", "lost"):
        assert server.output.count(f"rollup {name}") == 1
    assert server.health()["clickhouse"] == "up"


def test_a_price_of_zero_stops_no_rollup(table, start):
    _, [mirror] = follow(start, table.dsn)
    insert(table, [Tick(now_ms(), "ZERO", "x", open=0.0), Tick(now_ms(), "A", "x")])
    wait_until(lambda: len(mirror.table("stock_values_tickers")) == 2, 60, "both tickers")
    assert mirror.table("stock_values_tickers")["ZERO"]["change"] is None
    insert(table, [Tick(now_ms(), "A", "x", close=1.25)])
    wait_until(lambda: mirror.table("stock_values_tickers")["A"]["last"] == 1.25, 60, "the price")


def test_rows_that_are_gone_are_removed_even_after_a_failure(table, start, tmp_path):
    """Perspective cannot take an IP address, but its absence."""
    entry = """
    Rollup("odd", index="ticker", interval=0.2, sql="SELECT t.ticker AS ticker, if(max(t.volume)"
        " = 700, toIPv4('127.0.0.1'), NULL) AS value FROM {recent} GROUP BY t.ticker"),"""
    server, [mirror] = follow(start, table.dsn, script=changed_server(tmp_path, with_more(entry)))
    insert(table, [Tick(now_ms(), "A", "x"), Tick(now_ms(), "B", "x")])
    wait_until(lambda: {*mirror.table("stock_values_odd")} == {"A", "B"}, 20, "both rows")
    insert(table, [Tick(now_ms(), "A", "x", volume=700)])
    server.wait_for("rollup odd failed")
    table.command("DELETE FROM stock_values WHERE ticker = 'B' OR volume = 700")
    wait_until(lambda: {*mirror.table("stock_values_odd")} == {"A"}, 20, "the row that is left")


def test_a_slow_rollup_rests_nine_tenths_of_the_time(table, start, tmp_path):
    entry = """
    Rollup("slow", index="ticker", interval=0.2, sql="SELECT ticker, value + sleep(0.3) AS value"
        " FROM (SELECT t.ticker AS ticker, toFloat64(max(t.ms)) AS value FROM {recent} GROUP BY"
        " t.ticker)"),"""
    script = changed_server(tmp_path, {"\nROLLUPS = [": f"\nROLLUPS = [{entry}"})
    _, [mirror] = follow(start, table.dsn, script=script)
    start(Script, "producer.py", "--dsn", table.dsn)
    runs = mirror.updates
    wait_until(lambda: runs["stock_values_slow"] >= 2, 120)  # a single slow run does not count
    began = time.monotonic()
    wait_until(lambda: runs["stock_values_slow"] >= 5, 120)
    assert time.monotonic() - began > 3 * 0.3 / 0.1 - 1


def test_a_clickhouse_that_hung_once_does_not_hold_up_the_rollups(start, tmp_path):
    with ClickHouseProcess(tmp_path / "data") as process:
        database = Database(process)
        database.create_table()
        _, [mirror] = follow(start, database.dsn)
        start(Script, "producer.py", "--dsn", database.dsn, "--rows", 20)
        wait_until(lambda: mirror.updates["stock_values_tickers"] > 1, 60)
        process.pause()
        time.sleep(15)  # ten times as long would be 150 s of rest
        process.resume()
        updates = mirror.updates["stock_values_tickers"]
        wait_until(lambda: mirror.updates["stock_values_tickers"] > updates + 2, 100)


@pytest.mark.alone
def test_a_rollup_of_ten_seconds_does_not_hold_up_the_ticks(table, start, tmp_path):
    entries = """
    Rollup("slow", index="ticker", interval=0.2, sql="SELECT ticker, toFloat64(sum(slept)) AS value"
        " FROM (SELECT t.ticker AS ticker, sleepEachRow(0.5) AS slept FROM {recent} LIMIT 20)"
        " GROUP BY ticker SETTINGS function_sleep_max_microseconds_per_block = 60000000"),"""
    server, [mirror] = follow(start, table.dsn, script=changed_server(tmp_path, with_more(entries)))
    start(Script, "producer.py", "--dsn", table.dsn, "--interval", 0.1, "--rows", 20)
    running = "SELECT count() FROM system.processes WHERE query LIKE '%sleepEachRow(0.5)%LIMIT 20%'"
    running += " AND query NOT LIKE '%system.processes%'"
    wait_until(lambda: table.command(running), 20, "the slow rollup")
    mirror.gaps.clear()
    time.sleep(4)  # the time over which the rhythm is measured
    assert table.command(running), "the slow rollup has ended too early"
    assert len(mirror.gaps) > 8
    assert max(mirror.gaps) < 2
    assert server.health()["clickhouse"] == "up"
    assert server.stop(seconds=3) == 0  # although the query is running
