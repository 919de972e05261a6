"""The rollups' mirrors hold exactly what is computed here, in Python, from all rows of ClickHouse.

Most tests run a copy of the server whose rollups may run five times a second.
"""

import collections
import functools
import random
import time

import pytest
from conftest import (
    HOUR,
    Script,
    changed_server,
    follow,
    now_ms,
    quick_rollups,
    wait_until,
)

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
MAX_ROWS, MAX_PAIRS = 20_000, 120  # of a rollup, and of a step of the history
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
    prices = [f"toFloat64(toString({name}))" for name in ("open", "high", "low", "close")]
    names = ", ".join(["ticker", "client", *prices, "volume"])
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
        (ticker,): (close, (close - open_) / abs(open_) if open_ else None, high, low, volume)
        for ticker, rows in grouped(recent(ticks), lambda tick: tick.ticker)
        for open_, high, low, close, volume in [ohlcv(rows)]
    }


def candles(ticks):
    groups = grouped(recent(ticks), lambda tick: (tick.ms // 2000 * 2000, tick.ticker))
    return {key: ohlcv(rows) for key, rows in groups}


def history(ticks, step):
    """In each step, all but the pairs with the most volume are one row of others."""
    steps = collections.defaultdict(list)
    for (start, *pair), rows in grouped(ticks, lambda t: (t.ms // step * step, t.ticker, t.client)):
        steps[start].append((*pair, *ohlcv(rows), len(rows), rows[-1].ms))
    found = {}
    for start, rows in steps.items():
        rows.sort(key=lambda row: (-row[6], row[:2]))
        found |= {(start, *row[:2]): row[2:] for row in rows[:MAX_PAIRS]}
        if others := rows[MAX_PAIRS:]:
            *_, volume, count, last = zip(*others, strict=True)
            values = (*[None] * 4, sum(volume), sum(count), max(last))
            found[start, "(others)", "(others)"] = values
    return found


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
    return {
        key: tuple(None if value is None else round(value, 9) for value in values)
        for key, values in rows.items()
    }


def agree(database, mirror, names=("tickers", "candles", "history"), ticks=None):
    """Wait until the mirrored rollups equal those computed here. Returns the history's step."""
    ticks = ticks or ticks_of(database)
    for name in names:
        if name == "history":
            by_hand = {step: rounded(history(ticks, step)) for step in STEPS}
        else:
            by_hand = {1: rounded({"tickers": tickers, "candles": candles}[name](ticks))}
        step = wait_until(functools.partial(equal, mirror, name, by_hand), name)
    return step


def equal(mirror, name, by_hand):
    found = mirrored(mirror, name)
    return next((step for step, rows in by_hand.items() if rows == found), None)


@pytest.fixture
def quick(tmp_path):
    return quick_rollups(tmp_path)


# ---------------------------------------------------------------------------------------------
# Their content.


def test_the_last_batch_of_a_running_producer_is_in_tickers_and_candles(table, start):
    _, [mirror] = follow(start, table.dsn)
    script = start(Script, "producer.py", "--dsn", table.dsn, "--batches", 8)
    assert script.wait() == 0
    agree(table, mirror, ["tickers", "candles"])


def test_late_rows_ties_odd_prices_wrong_clocks_changes_and_a_truncate(table, start, quick):
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
    prices = {"ZERO": (0.0, 1.0), "OIL": (-10.0, -5.0)}
    insert(table, [Tick(now, t, "x", open=o, close=c) for t, (o, c) in prices.items()])
    agree(table, mirror)
    changes = mirror.table("stock_values_tickers")
    assert (changes["ZERO"]["change"], changes["OIL"]["change"]) == (None, 0.5)
    for sql in (
        "DELETE FROM stock_values WHERE ticker = 'A'",
        "ALTER TABLE stock_values DELETE WHERE client = 'Homer' SETTINGS mutations_sync = 2",
        "ALTER TABLE stock_values UPDATE high = 900 WHERE volume < 2e9 SETTINGS mutations_sync = 2",
    ):
        table.command(sql)
        agree(table, mirror)
    table.command("TRUNCATE TABLE stock_values")
    for name in COLUMNS:
        wait_until(lambda name=name: mirrored(mirror, name) == {}, name)
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
    """In the candles; the history adds up the others."""
    table.command(
        "INSERT INTO stock_values SELECT fromUnixTimestamp64Milli(toInt64("
        f"{now_ms()} - intDiv(number, 5000) * 2000), 'UTC'), toString(number % 5000), 'Homer',"
        " 1, 2, 0.5, 1.5, cityHash64(number % 5000) % 1000000 + 1, today() FROM numbers(30000)"
    )
    _, [mirror] = follow(start, table.dsn, script=quick)
    ticks = ticks_of(table)
    agree(table, mirror, ["tickers", "history"], ticks)
    volume = {ticker: values[-1] for (ticker,), values in tickers(ticks).items()}
    by_volume = sorted(volume, key=lambda ticker: (-volume[ticker], ticker))
    top, rest = set(by_volume[:3333]), set(by_volume[3334:])  # six rows each; the next has two
    wait_until(lambda: len(mirrored(mirror, "candles")) == MAX_ROWS, "candles")
    found = mirrored(mirror, "candles")
    assert found.items() <= rounded(candles(ticks)).items()
    shown = collections.Counter(ticker for _, ticker in found)
    assert {ticker for ticker, rows in shown.items() if rows == 6} == top
    assert not rest & set(shown)


def test_the_keys_of_candles_are_reused(table, start, quick):
    """Perspective, and so each browser, never forgets a string."""
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
    Rollup("clients", columns={"client": "string", "volume": "float"}, interval=0.2,
        sql="SELECT t.client AS client, sum(t.volume) AS volume FROM {recent} GROUP BY t.client"),
    Rollup("broken", columns={"ticker": "string", "value": "float"}, interval=0.2, sql="SELECT"
        " t.ticker AS ticker, throwIf(max(t.volume) > 0) AS value FROM {recent} GROUP BY t.ticker"),
    Rollup("unknown", columns={"ticker": "string", "id": "string"}, interval=1, sql="SELECT"
        " t.ticker AS ticker, generateUUIDv4() AS id FROM {recent} GROUP BY t.ticker"),
    Rollup("odd", columns={"ticker": "string", "value": "string"}, interval=0.2, sql="SELECT"
        " t.ticker AS ticker, if(max(t.volume) = 7, toIPv4('127.0.0.1'), NULL) AS value"
        " FROM {recent} GROUP BY t.ticker"),
    Rollup("lost", columns={"nothing": "string"}, interval=1, sql="SELECT t.ticker AS ticker"
        " FROM {recent}"),"""  # "lost" lacks its column; Perspective has no UUID and no address
    server, [mirror] = follow(start, table.dsn, script=quick_rollups(tmp_path, entries))

    def clients():
        rows = mirror.table("stock_values_clients").values()
        return {row["client"]: row["volume"] for row in rows}

    for seed in range(2):
        insert(table, draw(seed, 50, now_ms() - MINUTE, now_ms()))
        agree(table, mirror)
        expected = collections.Counter()
        for tick in ticks_of(table):
            expected[tick.client] += tick.volume
        wait_until(lambda expected=expected: clients() == expected, "the fourth rollup")
    assert mirror.table("stock_values_broken") == {}
    # Rows that are gone are removed even after a failure.
    insert(table, [Tick(now_ms(), "ODD", "x", volume=7), Tick(now_ms(), "B", "x")])
    server.wait_for("rollup stock_values_odd failed")
    table.command("DELETE FROM stock_values WHERE ticker != 'B'")
    wait_until(lambda: {*mirror.table("stock_values_odd")} == {"B"}, "the row that is left")
    for name in ("broken", "unknown", "lost"):
        assert server.output.count(f"rollup stock_values_{name} ") == 1
    assert server.health()["clickhouse"] == "up"


@pytest.mark.alone
def test_a_slow_rollup_rests_and_holds_up_neither_the_others_nor_the_ticks(table, start, tmp_path):
    """One takes a third of a second and rests for nine times as long; another takes ten."""
    entries = """
    Rollup("tired", columns={"ticker": "string", "value": "float"}, interval=0.2, sql="SELECT"
        " ticker, value + sleep(0.3) AS value FROM (SELECT t.ticker AS ticker,"
        " toFloat64(max(t.ms)) AS value FROM {recent} GROUP BY t.ticker)"),
    Rollup("slow", columns={"ticker": "string", "value": "float"}, interval=0.2, sql="SELECT"
        " ticker, toFloat64(sum(slept)) AS value FROM (SELECT t.ticker AS ticker,"
        " sleepEachRow(0.5) AS slept FROM {recent} LIMIT 20) GROUP BY ticker"
        " SETTINGS function_sleep_max_microseconds_per_block = 60000000"),"""
    script = changed_server(tmp_path, {"\nROLLUPS = [": f"\nROLLUPS = [{entries}"})
    table.insert(100)
    server, [mirror] = follow(start, table.dsn, script=script)
    start(Script, "producer.py", "--dsn", table.dsn, "--interval", 0.1, "--rows", 20)
    updates = mirror.updates
    wait_until(lambda: updates["stock_values_tired"] > 1, "the tired one")
    tickers, tired = updates["stock_values_tickers"], updates["stock_values_tired"]
    mirror.gaps.clear()
    began = time.monotonic()
    wait_until(lambda: updates["stock_values_tired"] >= tired + 2)
    took = time.monotonic() - began
    assert took > 2 * 0.3 / 0.1 - 1
    assert updates["stock_values_tickers"] - tickers >= 3
    assert updates["stock_values_slow"] <= 1
    assert max(mirror.gaps) < 2
    assert server.health()["clickhouse"] == "up"
    assert server.stop(seconds=3) == 0  # although the slow query is running
