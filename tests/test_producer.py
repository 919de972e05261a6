"""The producer: a market, a table, a steady pace, and each batch stored once, whatever happens."""

import collections
import re
import shlex
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
UNRELATED = "index_granularity = 8192"


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

    def begin(dsn, *arguments, env=None, hangup=signal.SIG_DFL):
        before = signal.signal(signal.SIGHUP, hangup)  # the producer inherits this
        started.append(start(Script, "producer.py", "--dsn", dsn, *arguments, env=env))
        signal.signal(signal.SIGHUP, before)
        return started[-1]

    yield begin
    for script in started:
        script.kill()
        assert not re.search(f"{ClickHouseProcess.password}|s3cret|Traceback", script.output)


def until_printed(script, text, times):
    wait_until(
        lambda: script.output.count(text) >= times, what=f"{times} {text!r} in {script.lines}"
    )


def until_rows(database):
    count = "SELECT count() FROM system.parts WHERE active AND rows AND table LIKE 'stock%'"
    wait_until(lambda: database.command(f"{count} AND database = '{database.name}'"), what="rows")


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


def test_prices_move_but_come_back_to_the_levels_of_their_tickers():
    market = producer.Market(2)
    market.price += 1  # nearly three times the price
    for _ in range(10):
        _, tickers, *_, closes, _, _ = market.draw(500_000, 0, 1000)
    for ticker, level in producer.LEVELS.items():
        mine = closes[tickers == ticker]
        assert level / 1.5 < mine.min() * 1.01 < mine.max() < level * 1.5


def test_the_table_is_created_as_designed_and_holds_the_ticks(produce, database):
    """In any time zone. A seed draws the same ticks again, which are stored again."""
    began = time.time() * 1000
    options = ["--seed", 5, "--rows", 300, "--interval", 0.2]
    script = produce(database.dsn, *options, "--batches", 4, env={"TZ": "America/New_York"})
    assert (script.wait(), written(script)) == (0, 1200)
    made = database.command("SHOW CREATE TABLE stock_values FORMAT TSVRaw").replace("`", "")
    made = " ".join(made.split())
    assert f"( {ALL_COLUMNS} ) ENGINE = MergeTree ORDER BY (timestamp, ticker) SETTINGS" in made
    for part in (BLOCKS, WINDOW, INDEX, "part_minmax_index_columns = 'with_block_number_offset'"):
        assert part in made
    assert stored(database) == drawn(5, 300, 4) != drawn(6, 300, 4)
    batches = batches_of(database, 300)
    assert began - 200 <= batches[0][0] <= batches[-1][1] <= time.time() * 1000
    assert database.command("SELECT sum(date != toDate(timestamp, 'UTC')) FROM stock_values") == 0
    for more, expected in (
        (["--batches", 2], drawn(5, 300, 4) + drawn(5, 300, 2)),
        (["--batches", 1, "--reset"], drawn(5, 300, 1)),
    ):
        assert produce(database.dsn, *options, *more).wait() == 0
        assert stored(database) == expected


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
        (f"venue String, {ALL_COLUMNS}, extra UInt8", FITS.replace(BLOCKS, UNRELATED), BLOCKS),
        (ALL_COLUMNS, FITS.replace(WINDOW, UNRELATED), WINDOW),
    ],
)
def test_a_table_that_does_not_fit_is_left_alone(produce, database, columns, rest, said):
    """If it lacks only settings, the error gives the ALTER after which it fits."""
    create(database, columns, rest)
    error = error_of(produce(database.dsn, "--rows", 10))
    assert said in error and f"{database.name}.stock_values" in error
    assert database.count() == 0
    _, alter, command = error.partition("ALTER TABLE")
    assert alter or "--reset" in error
    if alter:
        database.client.command(alter + command)
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


def test_errors_that_a_retry_cannot_fix_end_it(produce, tmp_path):
    """But the right to insert is enough where the table exists."""
    everything = ["ALL ON *.*"]
    users = {
        "writer": {"password": "w", "grants": ["SELECT, INSERT ON test.*"]},
        "reader": {"password": "r", "grants": ["SELECT ON test.*"]},
        "readonly": {"password": "l", "grants": everything, "settings": {"readonly": 1}},
        "no_ddl": {"password": "d", "grants": everything, "settings": {"allow_ddl": 0}},
    }
    (tmp_path / "chdb.py").write_text("raise ModuleNotFoundError(name='chdb')")
    with ClickHouseProcess(tmp_path / "data", users=users) as process:
        for user in ("admin", "writer"):
            assert produce(process.dsn_of("test", user), "--batches", 1).wait() == 0
        for dsn, said in (
            (process.dsn_of("test", "admin", "s3cret"), "Authentication"),
            (process.dsn_of("test", "reader"), "privileges"),
            (process.dsn_of("test", "readonly"), "readonly"),
            (process.dsn_of("other", "no_ddl"), "prohibited"),
            (f"{process.dsn}?foo=1", "'foo'"),
            (f"{process.dsn}?compress=very", "very"),
            ("chdb://memory", "pip install clickhouse-connect[chdb]"),
        ):
            assert said in error_of(produce(dsn, env={"PYTHONPATH": str(tmp_path)}))


def test_a_profile_changes_nothing_of_the_table_and_of_the_inserts(produce, tmp_path):
    """Nor that a batch is stored once when its confirmation is lost. Limits are no outage."""
    profiles = {
        "nullable": {"data_type_default_nullable": 1},
        "plain": {"deduplicate_insert": "disable"},
        "older": {"compatibility": "24.2", "insert_deduplicate": 0},
        "limit": {"max_result_rows": 1},
        "busy": {"max_memory_usage": 1, "max_untracked_memory": 1},
    }
    users = {
        name: {"password": "p", "grants": ["ALL ON *.*"], "settings": settings}
        for name, settings in profiles.items()
    }
    with ClickHouseProcess(tmp_path, users=users) as process, Proxy(process.port) as proxy:
        for name, said in (("limit", "refuses the batch"), ("busy", "is away")):
            script = produce(process.dsn_of("test", name))
            script.wait_for(f"ClickHouse {said}, trying again: Code: ")
            assert (script.stop(), written(script), script.output.count("Code")) == (0, 0, 1)
            del profiles[name]
        for name in profiles:
            database = Database(process)
            faults = proxy.faults
            proxy.drop_answer(when=is_insert, times=1)
            dsn = process.dsn_of(database.name, name, port=proxy.port)
            assert produce(dsn, "--rows", 20, "--batches", 2, "--seed", 1).wait() == 0
            assert proxy.faults == faults + 1
            assert stored(database) == drawn(1, 20, 2), name


def test_every_fault_on_the_way_is_survived(produce, database, proxy):
    """One producer meets them all. The driver itself tries a reset connection once more, so such a
    fault happens three times until the producer has to try again."""
    options = ["--interval", 0.02, "--rows", 4000, "--seed", 11]
    script = produce(f"{proxy.dsn}?send_receive_timeout=1", *options)

    def outages():
        return script.output.count("ClickHouse is away"), script.output.count("ClickHouse is back")

    for fault, arguments, times in (
        (proxy.drop_answer, (), 3),  # stored, but the producer does not learn it
        (proxy.cut_answer, (120,), 3),
        (proxy.cut_request, (0,), 3),
        (proxy.cut_request, (40_000,), 3),  # in the middle of a body of many pieces
        (proxy.stall, (), 1),  # never arrives
        (proxy.delay, (1.5,), 1),  # stored, but the answer comes too late
    ):
        done, (_, back) = proxy.faults + times, outages()
        fault(*arguments, when=is_insert, times=times)
        assert proxy.wait(done, 30)
        until_printed(script, "ClickHouse is back", back + 1)
    wait_until(lambda: len({*outages()}) == 1)
    before, _ = outages()
    proxy.refuse()
    until_printed(script, "ClickHouse is away", before + 1)
    away, connections = time.time() * 1000, proxy.connections
    wait_until(lambda: proxy.connections >= connections + 3)  # some attempts, but one line
    back = time.time() * 1000
    proxy.pass_on()
    until_printed(script, "ClickHouse is back", before + 1)
    enough = database.count() + 40_000
    wait_until(lambda: database.count() > enough)
    # One line each; a slow machine may have more of them.
    wait_until(lambda: len({*outages()}) == 1)
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
        wait_until(lambda: proxy.faults >= 9)
        process.kill()
        process.start()
        assert [script.wait(60) for script in scripts] == [0, 0, 0]
        assert [written(script) for script in scripts] == [1800] * 3
        assert stored(database) == drawn(1, 30, 60) + drawn(2, 30, 60) + drawn(3, 30, 60)


def test_a_full_disk_is_called_a_refusal_and_waited_for(produce, database):
    """ClickHouse wants more free space than there is, as it does on a disk that is full."""
    script = produce(database.dsn, "--interval", 0.02, "--rows", 40, "--seed", 15)
    until_rows(database)
    space = "min_free_disk_bytes_to_perform_insert"
    database.command(f"ALTER TABLE stock_values MODIFY SETTING {space} = {10**17}")
    script.wait_for("ClickHouse refuses the batch, trying again: ")
    database.command(f"ALTER TABLE stock_values RESET SETTING {space}")
    script.wait_for("ClickHouse is back")
    assert script.stop() == 0
    assert "free space" in script.output and "ClickHouse is away" not in script.output
    assert stored(database) == drawn(15, 40, written(script) // 40)


def test_a_dropped_table_is_created_again_but_a_misfit_ends_it(produce, database, proxy):
    """A batch that may be stored is not sent again to a table that would take it twice."""
    script = produce(proxy.dsn, "--interval", 0.05, "--rows", 10)
    for number, dropped in enumerate(("TABLE stock_values", f"DATABASE {database.name}"), 1):
        until_rows(database)
        database.command(f"DROP {dropped} SYNC")
        until_printed(script, "ClickHouse is back", number)
    until_rows(database)
    assert "ClickHouse is away" not in script.output
    proxy.drop_answer(when=is_insert)
    script.wait_for("ClickHouse is away")
    proxy.refuse()
    create(database, ALL_COLUMNS, "ENGINE = Log")
    proxy.pass_on()
    assert script.wait() == 1
    assert script.lines[-1].startswith("producer.py: ")
    assert written(script, confirmed=False) > 0
    assert database.count() == 0


@pytest.mark.alone
@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (signal.SIGTERM, None),
        (signal.SIGINT, "delay"),  # the answer to the batch in hand is late
        (signal.SIGTERM, "stall"),  # it never comes
        (signal.SIGHUP, "refuse"),  # ClickHouse is away
    ],
)
def test_a_signal_ends_it_within_3_seconds(produce, database, proxy, number, fault):
    """It waits for the answer to the batch in hand, but no longer than it may."""
    script = produce(proxy.dsn, "--interval", 0.05, "--rows", 50, "--seed", 15)
    until_rows(database)
    if fault == "refuse":
        proxy.refuse()
        script.wait_for("ClickHouse is away")
    elif fault:
        getattr(proxy, fault)(*[1] * (fault == "delay"), when=is_insert)
        wait_until(lambda: proxy.faults)
    assert script.stop(number, seconds=3) == 0
    batches = written(script, confirmed=fault in (None, "delay")) // 50
    # A batch that was not confirmed may have been stored all the same.
    assert stored(database) in [drawn(15, 50, batches + more) for more in (0, fault == "refuse")]


@pytest.mark.alone
@pytest.mark.parametrize(("number", "fault"), [(signal.SIGINT, "refuse"), (signal.SIGHUP, "stall")])
def test_a_signal_before_clickhouse_is_there_ends_it(produce, proxy, number, fault):
    getattr(proxy, fault)()
    script = produce(proxy.dsn)
    wait_until(lambda: proxy.faults)
    assert script.stop(number, seconds=3) == 0
    assert written(script) == 0


def test_under_nohup_it_outlives_its_terminal(produce, database):
    options = ["--batches", 9, "--rows", 10]
    script = produce(database.dsn, *options, hangup=signal.SIG_IGN)
    until_rows(database)
    assert script.stop(signal.SIGHUP) == 0
    assert written(script) == 90


def test_a_reader_that_leaves_ends_it_quietly():
    command = f"set -o pipefail; {sys.executable} -u producer.py --dsn clickhouse://127.0.0.1:1"
    pipe = ["bash", "-c", f"{command} | head -1"]
    done = subprocess.run(pipe, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("inserting into")


def test_a_fault_in_the_code_is_shown_with_its_line(tmp_path):
    """People edit this file, and the market first of all."""
    code = (ROOT / "producer.py").read_text()
    assert code.count("to_cents(np.exp(") == 1
    (tmp_path / "producer.py").write_text(code.replace("to_cents(np.exp(", "to_cent(np.exp("))
    command = [sys.executable, "producer.py", "--dsn", "chdb://memory"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "to_cent(np.exp(" in done.stderr and "NameError" in done.stderr


def test_help_is_enough_to_use_it(produce, database):
    """It names defaults and units, never a password, and its example works."""
    env = {"CLICKHOUSE_DSN": "clickhouse://u:s3cret@h/test", "COLUMNS": "200"}
    text = produce(database.dsn, "--help", env=env)
    assert text.wait() == 0
    for words in ("seconds between batches (default: 0.25)", "ticks in a batch (default: 250)"):
        assert words in text.output
    [example] = re.findall("^example: python producer.py (.*)$", text.output, re.MULTILINE)
    _, _, *options = shlex.split(example)
    assert produce(database.dsn, *options, "--batches", 1).wait() == 0
    assert database.count() == 5000


def test_an_embedded_engine_keeps_what_was_written(produce, tmp_path):
    """Stopped in the middle; another process reads it."""
    script = produce(f"chdb://{tmp_path}", "--interval", 0.001, "--rows", 100, "--seed", 17)
    wait_until(lambda: list(tmp_path.glob("store/*/*/all_*_*_1")))
    assert script.stop(signal.SIGINT) == 0
    with ClickHouseProcess(tmp_path) as process:
        database = Database(process)
        database.name = "test"
        assert stored(database) == drawn(17, 100, written(script) // 100) != {}
