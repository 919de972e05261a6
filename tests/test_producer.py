"""The producer: a market, a table, a steady pace, and each batch stored once, whatever happens."""

import collections
import functools
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from clickhouse_http import ClickHouseProcess
from conftest import ROOT, Database, Script, free_port, wait_until
from proxy import Proxy, is_insert

import producer

ALL_COLUMNS = (
    "timestamp DateTime64(3, 'UTC'), ticker LowCardinality(String), client LowCardinality(String),"
    " open Float32, high Float32, low Float32, close Float32, volume UInt32, date Date"
)
BLOCKS = "enable_block_number_column = 1, enable_block_offset_column = 1"
WINDOW = "non_replicated_deduplication_window = 100000"
INDEX = "add_minmax_index_for_block_number_column = 1, add_minmax_index_for_block_offset_column = 1"
FITS = f"ENGINE = MergeTree ORDER BY timestamp SETTINGS {BLOCKS}, {WINDOW}"


until = functools.partial(wait_until, seconds=30)


@pytest.fixture
def proxy(database):
    """A proxy on the way to ClickHouse; its `dsn` goes through it."""
    with Proxy(database.process.port) as proxy:
        proxy.dsn = database.process.dsn_of(database.name, port=proxy.port)
        yield proxy


@pytest.fixture
def produce(start):
    """Starts the producer. Whatever it prints is free of passwords and tracebacks."""
    started = []

    def begin(dsn, *arguments, env=None):
        started.append(start(Script, "producer.py", "--dsn", dsn, *arguments, env=env))
        return started[-1]

    yield begin
    for script in started:
        script.kill()
        assert not re.search(f"{ClickHouseProcess.password}|s3cret|Traceback", script.output)


def until_printed(script, text, times=1):
    until(lambda: script.output.count(text) >= times, what=f"{times} {text!r} in {script.lines}")


def until_rows(database):
    count = "SELECT count() FROM system.parts WHERE active AND rows AND table LIKE 'stock%'"
    until(lambda: database.command(f"{count} AND database = '{database.name}'"), what="rows")


def drawn(seed, rows, batches):
    """What a seed draws, without the times: a Counter of tuples."""
    market, ticks = producer.Market(seed), collections.Counter()
    for _ in range(batches):
        batch = market.draw(rows, 0, 1000)
        ticks.update(zip(*(np.asarray(column).tolist() for column in batch[1:8]), strict=True))
    return ticks


def stored(database):
    """What is in ClickHouse, without the times."""
    return collections.Counter(row[1:8] for row in database.rows().elements())


def batches_of(database, rows):
    """The first and the last timestamp of each batch, in milliseconds."""
    times = [row[0] for row in database.rows("ORDER BY _block_number, timestamp").elements()]
    return [(times[i], times[i + rows - 1]) for i in range(0, len(times), rows)]


def written(script, confirmed=True):
    """How many rows the producer says that it wrote, all of them confirmed or not."""
    rest = "" if confirmed else ", the last batch was not confirmed"
    [rows] = re.findall(rf"^([\d,]+) rows written{rest}$", script.output, re.MULTILINE)
    return int(rows.replace(",", ""))


def error_of(script):
    """The one line with which a producer gives up that could write nothing."""
    assert script.wait() == 1
    *others, error = script.lines
    assert error.startswith("producer.py: ") and "producer.py: " not in "".join(others)
    assert others[-1].startswith("0 rows written")
    return error


def create(database, columns, rest):
    database.command(f"CREATE DATABASE IF NOT EXISTS {database.name}")
    database.command(f"CREATE OR REPLACE TABLE stock_values ({columns}) {rest}")


def test_ticks_look_like_a_market():
    """A tick opens where the last one of its ticker closed, between its low and its high."""
    market, closes, seen = producer.Market(1), {}, set()
    start_ms, span_ms = 1_700_000_000_000, 250
    for rows in [5000, 1, 250, 7, 20_000] + [1] * 100:
        batch = [np.asarray(column) for column in market.draw(rows, start_ms, span_ms)]
        times, tickers, clients, opens, highs, lows, ends, volumes, dates = batch
        assert (np.diff(times) >= 0).all()
        assert start_ms <= times.min() <= times.max() < start_ms + span_ms
        assert (dates == times // 86_400_000).all() and min(lows.min(), volumes.min()) > 0
        assert ((lows <= np.minimum(opens, ends)) & (np.maximum(opens, ends) <= highs)).all()
        for ticker, first, last in zip(tickers, opens, ends, strict=True):
            assert first == closes.get(ticker, first)
            closes[ticker] = last
        seen |= set(tickers) | set(clients)
        start_ms += span_ms
    assert seen == {*producer.LEVELS, *producer.CLIENTS}


def test_prices_move_but_stay_at_the_levels_of_their_tickers_and_a_seed_repeats_them():
    market = producer.Market(2)
    for _ in range(3):
        _, tickers, *_, closes, _, _ = market.draw(500_000, 0, 1000)
    for ticker, level in producer.LEVELS.items():
        mine = closes[tickers == ticker]
        assert level / 1.5 < mine.min() * 1.01 < mine.max() < level * 1.5
    assert drawn(7, 100, 5) == drawn(7, 100, 5) != drawn(8, 100, 5)
    assert drawn(None, 100, 5) != drawn(None, 100, 5)


def test_the_table_is_created_as_designed_and_holds_the_ticks(produce, database):
    """In any time zone, and past the HTTP proxy that a company sets for everybody."""
    began = time.time() * 1000
    env = {"TZ": "America/New_York", "http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    options = ["--seed", 5, "--rows", 300, "--interval", 0.2]
    script = produce(database.dsn, *options, "--batches", 4, env=env)
    assert (script.wait(), written(script)) == (0, 1200)
    made = database.command("SHOW CREATE TABLE stock_values FORMAT TSVRaw").replace("`", "")
    made = " ".join(made.split())
    assert f"( {ALL_COLUMNS} ) ENGINE = MergeTree ORDER BY (timestamp, ticker) SETTINGS" in made
    for part in (BLOCKS, WINDOW, INDEX, "part_minmax_index_columns = 'with_block_number_offset'"):
        assert part in made
    assert stored(database) == drawn(5, 300, 4)
    batches = batches_of(database, 300)
    assert began - 200 <= batches[0][0] <= batches[-1][1] <= time.time() * 1000
    assert database.command("SELECT sum(date != toDate(timestamp, 'UTC')) FROM stock_values") == 0
    # The same ticks again are new ticks, not a batch that is sent again. --reset starts over.
    assert produce(database.dsn, *options, "--batches", 2).wait() == 0
    assert stored(database) == drawn(5, 300, 4) + drawn(5, 300, 2)
    assert produce(database.dsn, *options, "--batches", 1, "--reset").wait() == 0
    assert stored(database) == drawn(5, 300, 1)


def test_an_older_clickhouse_gets_a_table_without_index(produce, database, proxy):
    """The proxy misspells one of its settings on the way, so that the engine does not know it."""
    proxy.rewrite = lambda data: data.replace(b"part_minmax_index", b"part_minmax_xxxxx")
    assert produce(proxy.dsn, "--batches", 1, "--rows", 10).wait() == 0
    definition = database.command("SHOW CREATE TABLE stock_values")
    assert BLOCKS in definition and WINDOW in definition and "minmax" not in definition


@pytest.mark.parametrize(
    ("columns", "rest", "said"),
    [
        (ALL_COLUMNS.replace(", date Date", ""), FITS, "column date is missing"),
        (ALL_COLUMNS.replace("UInt32", "Int64"), FITS, "volume is Int64, expected UInt32"),
        (ALL_COLUMNS, FITS.replace("MergeTree", "ReplacingMergeTree"), "is ReplacingMergeTree"),
        (ALL_COLUMNS, FITS.replace(f", {WINDOW}", ""), "deduplication_window is missing"),
    ],
)
def test_a_table_that_does_not_fit_is_left_alone(produce, database, columns, rest, said):
    create(database, columns, rest)
    error = error_of(produce(database.dsn, "--rows", 10))
    assert said in error and f"{database.name}.stock_values" in error and "--reset" in error
    assert database.count() == 0


def test_a_table_with_more_columns_fits_after_the_alter_that_the_error_gives(produce, database):
    columns = f"venue String, {ALL_COLUMNS}, extra UInt8"
    create(database, columns, FITS.replace(BLOCKS, "enable_block_number_column = 0"))
    error = error_of(produce(database.dsn))
    database.client.command(error[error.index("ALTER TABLE") :])
    assert produce(database.dsn, "--rows", 10, "--batches", 1, "--seed", 1).wait() == 0
    assert stored(database) == drawn(1, 10, 1)


@pytest.mark.parametrize(("rows", "batches", "interval"), [(1, 100, 0.001), (100_000, 2, 0.1)])
def test_small_and_large_batches(produce, database, rows, batches, interval):
    options = ["--rows", rows, "--batches", batches, "--interval", interval, "--seed", 6]
    assert produce(database.dsn, *options).wait() == 0
    assert stored(database) == drawn(6, rows, batches)


@pytest.mark.alone
def test_a_slow_insert_does_not_shift_the_schedule(produce, database, proxy):
    """And every few seconds a line says how many rows there are, and how many a second."""
    options = ["--interval", 0.1, "--rows", 50, "--batches", 60, "--seed", 9]
    script = produce(proxy.dsn, *options)
    until_rows(database)
    proxy.delay(1.5, when=is_insert, times=1)
    assert (script.wait(), proxy.faults) == (0, 1)
    assert stored(database) == drawn(9, 50, 60)
    assert re.search(r"^[\d,]+ rows, [\d,]+ rows a second$", script.output, re.MULTILINE)
    batches = batches_of(database, 50)
    for number, (first, last) in enumerate(batches):
        due = batches[0][0] + 100 * number
        assert due - 60 < first <= last < due + 101


def test_wrong_password_missing_rights_unknown_option_and_no_chdb_end_it(produce, tmp_path):
    """But the right to insert is enough where the table exists."""
    users = {
        "writer": {"password": "w", "grants": ["SELECT, INSERT ON test.*"]},
        "reader": {"password": "r", "grants": ["SELECT ON test.*"]},
        "readonly": {"password": "l", "grants": ["ALL ON *.*"], "settings": {"readonly": 1}},
    }
    with ClickHouseProcess(tmp_path / "data", users=users) as process:
        for user in ("admin", "writer"):
            assert produce(process.dsn_of("test", user), "--batches", 1).wait() == 0
        assert "Authentication" in error_of(produce(process.dsn_of("test", "admin", "s3cret")))
        assert "privileges" in error_of(produce(process.dsn_of("test", "reader")))
        assert "readonly" in error_of(produce(process.dsn_of("test", "readonly")))
        assert "'foo'" in error_of(produce(f"{process.dsn}?foo=1"))
        assert "very" in error_of(produce(f"{process.dsn}?compress=very"))
    (tmp_path / "chdb.py").write_text("raise ModuleNotFoundError(name='chdb')")
    error = error_of(produce("chdb://memory", env={"PYTHONPATH": str(tmp_path)}))
    assert "pip install clickhouse-connect[chdb]" in error


def test_every_fault_on_the_way_is_survived(produce, database, proxy):
    """One producer meets them all. The driver itself tries a reset connection once more, so such a
    fault happens three times until the producer has to try again."""
    options = ["--interval", 0.02, "--rows", 4000, "--seed", 11]
    script = produce(f"{proxy.dsn}?send_receive_timeout=1", *options)
    faults = [
        (proxy.drop_answer, (), 3),  # stored, but the producer does not learn it
        (proxy.cut_answer, (120,), 3),
        (proxy.cut_request, (0,), 3),
        (proxy.cut_request, (40_000,), 3),  # in the middle of a body of many pieces
        (proxy.stall, (), 1),  # never arrives
        (proxy.delay, (1.5,), 1),  # stored, but the answer comes too late
    ]

    def outages():
        return script.output.count("ClickHouse is away"), script.output.count("ClickHouse is back")

    for fault, arguments, times in faults:
        done, (_, back) = proxy.faults + times, outages()
        fault(*arguments, when=is_insert, times=times)
        assert proxy.wait(done, 30)
        until_printed(script, "ClickHouse is back", back + 1)
    until(lambda: len({*outages()}) == 1)
    before, _ = outages()
    proxy.refuse()
    until_printed(script, "ClickHouse is away", before + 1)
    away, connections = time.time() * 1000, proxy.connections
    until(lambda: proxy.connections >= connections + 3)  # some attempts, but one line
    back = time.time() * 1000
    proxy.pass_on()
    until_printed(script, "ClickHouse is back", before + 1)
    enough = database.count() + 40_000
    until(lambda: database.count() > enough)
    until(lambda: len({*outages()}) == 1)  # one line each; a slow machine may have more of them
    assert script.stop() == 0
    assert stored(database) == drawn(11, 4000, written(script) // 4000)
    # No tick was drawn meanwhile, so nothing piles up and no tick is older than its batch.
    first = f"SELECT min(timestamp) FROM stock_values WHERE timestamp > {away + 20} / 1000"
    assert database.command(f"SELECT ({first}) > {back - 20} / 1000") == 1


def test_three_producers_outlive_a_crash_of_clickhouse(produce, tmp_path):
    process = ClickHouseProcess(tmp_path, port=free_port())
    with process, Proxy(process.port) as proxy:
        options = ["--interval", 0.02, "--rows", 30, "--batches", 60, "--seed"]
        database = Database(process)
        dsn = process.dsn_of(database.name, port=proxy.port)
        proxy.drop_answer(when=is_insert, times=9)
        scripts = [produce(dsn, *options, seed) for seed in (1, 2, 3)]
        until(lambda: proxy.faults >= 9)
        process.kill()
        process.start()
        assert [script.wait(60) for script in scripts] == [0, 0, 0]
        assert [written(script) for script in scripts] == [1800] * 3
        assert stored(database) == drawn(1, 30, 60) + drawn(2, 30, 60) + drawn(3, 30, 60)


def test_a_batch_that_may_be_stored_is_not_called_refused(produce, database, proxy):
    """Its confirmation was lost; when it is sent again, the table does not fit any more."""
    script = produce(proxy.dsn, "--interval", 0.02, "--rows", 40)
    until_rows(database)
    proxy.drop_answer(when=is_insert)
    until_printed(script, "ClickHouse is away")
    database.command("ALTER TABLE stock_values RENAME COLUMN volume TO amount")
    proxy.pass_on()
    assert script.wait() == 1
    assert written(script, confirmed=False) < database.count()


def test_a_full_disk_is_waited_for(produce, database):
    """ClickHouse wants more free space than there is, as it does on a disk that is full."""
    script = produce(database.dsn, "--interval", 0.02, "--rows", 40, "--seed", 15)
    until_rows(database)
    space = "min_free_disk_bytes_to_perform_insert"
    database.command(f"ALTER TABLE stock_values MODIFY SETTING {space} = {10**17}")
    until_printed(script, "free space")
    database.command(f"ALTER TABLE stock_values RESET SETTING {space}")
    until_printed(script, "ClickHouse is back")
    assert script.stop() == 0
    assert stored(database) == drawn(15, 40, written(script) // 40)


def test_a_dropped_table_is_created_again_but_a_misfit_ends_it(produce, database, proxy):
    """Nothing is sent again to a table that would take it twice."""
    script = produce(proxy.dsn, "--interval", 0.05, "--rows", 10)
    for number, dropped in enumerate(("TABLE stock_values", f"DATABASE {database.name}"), 1):
        until_rows(database)
        database.command(f"DROP {dropped} SYNC")
        until_printed(script, "ClickHouse is back", number)
    until_rows(database)
    proxy.refuse()
    until_printed(script, "ClickHouse is away", 3)
    create(database, ALL_COLUMNS, "ENGINE = Log")
    proxy.pass_on()
    assert script.wait() == 1
    assert script.lines[-1].startswith("producer.py: ")
    assert database.count() == 0


@pytest.mark.alone
@pytest.mark.parametrize("phase", ["steady", "answer late", "no answer", "away"])
def test_a_signal_ends_it_within_3_seconds(produce, database, proxy, phase):
    """It waits for the answer to the batch in hand, but no longer than it may."""
    script = produce(proxy.dsn, "--interval", 0.05, "--rows", 50, "--seed", 15)
    until_rows(database)
    if phase == "answer late":
        proxy.delay(1, when=is_insert)
    elif phase == "no answer":
        proxy.stall(when=is_insert)
    elif phase == "away":
        proxy.refuse()
        until_printed(script, "ClickHouse is away")
    until(lambda: phase == "steady" or proxy.faults)
    assert script.stop(seconds=3) == 0
    batches = written(script, confirmed=phase in ("steady", "answer late")) // 50
    # A batch that was not confirmed may have been stored all the same.
    assert stored(database) in [drawn(15, 50, batches + more) for more in (0, phase == "away")]


@pytest.mark.alone
@pytest.mark.parametrize("phase", ["refuse", "stall"])
def test_a_signal_before_clickhouse_is_there_ends_it(produce, database, proxy, phase):
    getattr(proxy, phase)()
    script = produce(proxy.dsn)
    until(lambda: proxy.faults)
    assert script.stop(signal.SIGINT, seconds=3) == 0
    assert written(script) == 0


def test_a_reader_that_leaves_ends_it_quietly():
    command = f"set -o pipefail; {sys.executable} -u producer.py --dsn clickhouse://127.0.0.1:1"
    pipe = ["bash", "-c", f"{command} | head -1"]
    done = subprocess.run(pipe, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("inserting into")


def test_an_embedded_engine_keeps_what_was_written(produce, tmp_path):
    """Stopped in the middle; another process reads it."""
    script = produce(f"chdb://{tmp_path}", "--interval", 0.001, "--rows", 100, "--seed", 17)
    until(lambda: list(tmp_path.glob("store/*/*/all_*_*_1")))
    assert script.stop(signal.SIGINT) == 0
    with ClickHouseProcess(tmp_path) as process:
        database = Database(process)
        database.name = "test"
        assert stored(database) == drawn(17, 100, written(script) // 100) != {}
