"""The producer: a market, a table, a steady pace, and each batch stored once, whatever breaks."""

import collections
import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clickhouse_http import ClickHouseProcess
from conftest import ROOT, Database, Script, wait_until
from proxy import Proxy, is_insert

import producer

TICKERS = "AAPL.N AMZN.N QQQ.N NVDA.N TSLA.N FB.N MSFT.N TLT.N XIV.N YY.N CSCO.N GOOGL.N PCLN.N"
CLIENTS = "Homer Marge Bart Lisa Maggie Moe Lenny Carl Krusty"
ALL_COLUMNS = ", ".join(f"{name} {kind}" for name, kind in producer.COLUMNS.items())
BLOCKS = "enable_block_number_column = 1, enable_block_offset_column = 1"
FITS = f"ENGINE = MergeTree ORDER BY timestamp SETTINGS {BLOCKS}"
WINDOW = "non_replicated_deduplication_window = 100"


@pytest.fixture
def proxy(clickhouse):
    with Proxy(clickhouse.port) as proxy:
        yield proxy


@pytest.fixture
def produce(start):
    """Starts the producer; what it printed until the end is free of passwords and tracebacks."""
    started = []

    def begin(dsn, *arguments, env=None):
        options = ["--dsn", dsn] if dsn else []
        started.append(start(Script, "producer.py", *options, *arguments, env=env))
        return started[-1]

    yield begin
    for script in started:
        if script.process.poll() is None:
            script.kill()
        assert ClickHouseProcess.password not in script.output
        assert "Traceback" not in script.output


def until(check, seconds=30):
    """`wait_until`, patient enough for a machine that has other things to do, too."""
    return wait_until(check, seconds)


def through(proxy, database, options=""):
    return database.process.dsn_of(database.name, port=proxy.port) + options


def drawn(seed, rows, batches):
    """What that seed draws, without the times: a Counter of tuples."""
    market, ticks = producer.Market(seed), collections.Counter()
    for _ in range(batches):
        batch = market.draw(rows, 0, 1000)
        ticks.update(zip(*(np.asarray(column).tolist() for column in batch[1:8]), strict=True))
    return ticks


def stored(database):
    """What is in ClickHouse, without the times."""
    ticks = collections.Counter()
    for row, times in database.rows().items():
        ticks[row[1:8]] += times
    return ticks


def written(script):
    """How many rows the producer says it has written."""
    [(rows, rest)] = re.findall(r"^([\d,]+) rows written(.*)$", script.output, re.MULTILINE)
    assert not rest
    return int(rows.replace(",", ""))


def create(database, columns, rest):
    database.command("CREATE DATABASE IF NOT EXISTS " + database.name)
    database.command(f"CREATE TABLE stock_values ({columns}) {rest}")


def exists(database):
    with contextlib.closing(database.connect()) as client:
        return client.command(
            "SELECT count() FROM system.tables WHERE name = 'stock_values'"
            f" AND database = '{database.name}'"
        )


@contextlib.contextmanager
def killed_after(process):
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def memory(script):
    """Resident memory in MB."""
    with open(f"/proc/{script.process.pid}/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# --- The market -----------------------------------------------------------------------------------


def check(batch, start_ms, span_ms, closes):
    """Properties of a batch; `closes` holds each ticker's last close and is brought up to date."""
    times, tickers, clients, opens, highs, lows, ends, volumes, dates = map(np.asarray, batch)
    assert (np.diff(times) >= 0).all()
    assert (times >= start_ms).all()
    assert (times < start_ms + span_ms).all()
    assert (dates == times // 86_400_000).all()
    assert (lows <= np.minimum(opens, ends)).all()
    assert (np.maximum(opens, ends) <= highs).all()
    assert (lows > 0).all()
    assert (volumes > 0).all()
    for ticker, first, last in zip(tickers.tolist(), opens.tolist(), ends.tolist(), strict=True):
        assert first == closes.get(ticker, first)
        closes[ticker] = last
    return set(tickers), set(clients)


def test_ticks_look_like_a_market():
    market, closes, seen = producer.Market(1), {}, []
    start_ms = 1_700_000_000_000
    for rows in [5000, 1, 250, 7, 1, 20_000] + [1] * 100:
        seen.append(check(market.draw(rows, start_ms, 250), start_ms, 250, closes))
        start_ms += 250
    assert set.union(*(tickers for tickers, _ in seen)) == set(TICKERS.split())
    assert set.union(*(clients for _, clients in seen)) == set(CLIENTS.split())


def test_prices_move_but_stay_at_the_levels_of_their_tickers():
    market = producer.Market(2)
    market.price += np.log(2)  # even after a boom
    for _ in range(3):
        _, tickers, _, opens, highs, lows, closes, volumes, _ = market.draw(1_000_000, 0, 1000)
    for ticker, level in producer.LEVELS.items():
        mine = closes[tickers == ticker]
        assert level / 1.5 < mine.min() < mine.max() < level * 1.5
        assert mine.max() > mine.min() * 1.01
    assert len(set(producer.LEVELS.values())) == len(TICKERS.split())
    assert (highs > np.maximum(opens, closes)).mean() > 0.5
    assert (lows < np.minimum(opens, closes)).mean() > 0.5
    assert len(np.unique(volumes)) > 100


def test_prices_never_reach_zero(monkeypatch):
    monkeypatch.setattr(producer, "LEVELS", dict.fromkeys(TICKERS.split(), 0.004))
    assert check(producer.Market(3).draw(10_000, 0, 1000), 0, 1000, {})


def test_a_seed_draws_the_same_ticks_again():
    assert drawn(7, 100, 5) == drawn(7, 100, 5)
    assert drawn(7, 100, 5) != drawn(8, 100, 5)
    assert drawn(None, 100, 5) != drawn(None, 100, 5)
    assert drawn(2**64 + 1, 100, 5) != drawn(1, 100, 5)


# --- The table ------------------------------------------------------------------------------------


def test_ticks_in_clickhouse(produce, database):
    began = time.time() * 1000
    env = {"CLICKHOUSE_DSN": database.dsn, "TZ": "America/New_York"}
    options = ["--seed", 5, "--rows", 300, "--interval", 0.2]
    script = produce(None, *options, "--batches", 4, env=env)
    assert script.wait() == 0
    assert written(script) == 1200
    assert script.lines[0] == f"inserting into 127.0.0.1:{database.process.port}, " + (
        f"database {database.name}"
    )

    with contextlib.closing(database.connect()) as client:
        columns = client.query(
            "SELECT name, type FROM system.columns WHERE table = 'stock_values'"
            f" AND database = '{database.name}' ORDER BY position"
        ).result_rows
        assert columns == [
            ("timestamp", "DateTime64(3, 'UTC')"),
            ("ticker", "LowCardinality(String)"),
            ("client", "LowCardinality(String)"),
            ("open", "Float32"),
            ("high", "Float32"),
            ("low", "Float32"),
            ("close", "Float32"),
            ("volume", "UInt32"),
            ("date", "Date"),
        ]
        engine = client.command(
            "SELECT engine_full FROM system.tables WHERE name = 'stock_values'"
            f" AND database = '{database.name}'"
        )
    assert engine.startswith("MergeTree ORDER BY (timestamp, ticker) SETTINGS")
    assert f"{BLOCKS}, non_replicated_deduplication_window = 100000" in engine

    assert stored(database) == drawn(5, 300, 4)
    spans = blocks(database)
    assert [rows for _, _, rows in spans] == [300] * 4
    assert began - 200 <= spans[0][0] <= spans[-1][1] <= time.time() * 1000
    wrong = "SELECT countIf(date != toDate(timestamp, 'UTC')) FROM stock_values"
    assert database.command(wrong) == 0

    # The same ticks again are other ticks, not a batch sent again; and --reset begins anew.
    again = produce(database.dsn, *options, "--batches", 2)
    assert again.wait() == 0
    assert stored(database) == drawn(5, 300, 4) + drawn(5, 300, 2)
    anew = produce(database.dsn, *options, "--batches", 1, "--reset")
    assert anew.wait() == 0
    assert stored(database) == drawn(5, 300, 1)


def blocks(database):
    """(first timestamp, last, rows) of each insert block, in the order of the blocks."""
    with contextlib.closing(database.connect()) as client:
        return client.query(
            "SELECT toUnixTimestamp64Milli(min(timestamp)) AS first,"
            f" toUnixTimestamp64Milli(max(timestamp)), count() FROM {database.name}.stock_values"
            " GROUP BY _block_number ORDER BY _block_number"
        ).result_rows


@pytest.mark.parametrize(
    ("columns", "rest", "said"),
    [
        (ALL_COLUMNS + ", extra String", f"{FITS}, {WINDOW}", "column extra String"),
        (ALL_COLUMNS.replace("UInt32", "Int64"), f"{FITS}, {WINDOW}", "no volume UInt32"),
        (ALL_COLUMNS, f"ENGINE = MergeTree ORDER BY date SETTINGS {WINDOW}", "no enable_block_num"),
        (
            ALL_COLUMNS,
            f"{FITS.replace('offset_column = 1', 'offset_column = 0')}, {WINDOW}",
            "_off",
        ),
        (ALL_COLUMNS, FITS, "no non_replicated_deduplication_window"),
        (ALL_COLUMNS, FITS.replace("ORDER", "PARTITION BY date ORDER"), "PARTITION BY date"),
        (ALL_COLUMNS, FITS.replace("MergeTree", "ReplacingMergeTree"), "engine ReplacingMergeTree"),
        (ALL_COLUMNS, "ENGINE = Memory", "engine Memory"),
    ],
)
def test_a_table_that_does_not_fit_is_named_and_left_alone(database, columns, rest, said):
    create(database, columns, rest)
    made = producer.Producer(database.dsn, 0.25, 10, batches=1)
    made.run()
    assert isinstance(made.error, producer.TableMismatch)
    assert said in str(made.error)
    assert f"{database.name}.stock_values does not fit" in str(made.error)
    assert database.count() == made.rows == 0


def test_a_table_that_does_not_fit_ends_the_program(produce, database):
    create(database, "timestamp DateTime", "ENGINE = Memory")
    script = produce(database.dsn)
    assert script.wait(15) == 1
    assert len(script.lines) == 3
    assert "0 rows written" in script.lines[1:]
    assert "producer.py: table" in script.output
    assert "--reset" in script.output
    assert produce(database.dsn, "--reset", "--batches", 1).wait() == 0


def test_a_table_made_by_hand_fits(database):
    settings = "enable_block_number_column = true, enable_block_offset_column = '1'"
    create(database, ALL_COLUMNS, f"ENGINE = MergeTree ORDER BY date SETTINGS {settings}, {WINDOW}")
    made = producer.Producer(database.dsn, 0.25, 10, batches=1)
    made.run()
    assert (made.error, made.rows, database.count()) == (None, 10, 10)


@pytest.mark.parametrize(("rows", "batches", "interval"), [(1, 100, 0.001), (1_000_000, 1, 86400)])
def test_small_and_large_batches(database, rows, batches, interval):
    made = producer.Producer(database.dsn, interval, rows, batches, seed=6, say=str)
    began = time.time()
    made.run()
    assert (made.error, made.rows) == (None, rows * batches)
    first, last = blocks(database)[0][0] / 1000, blocks(database)[-1][1] / 1000
    assert began - interval - 0.001 < first <= last < time.time()
    if rows > 1:  # spread over the whole interval
        assert last - first > 0.99 * interval
    market = producer.Market(6)
    batches = [market.draw(rows, 0, 1000) for _ in range(batches)]
    tickers, closes, volumes = (np.concatenate([b[i] for b in batches]) for i in (1, 6, 7))
    with contextlib.closing(database.connect()) as client:
        found = client.query(
            "SELECT ticker, count(), sum(close), sum(volume)"
            f" FROM {database.name}.stock_values GROUP BY ticker"
        ).result_rows
    for ticker, count, close, volume in found:
        mine = tickers == ticker
        assert (count, volume) == (mine.sum(), volumes[mine].sum())
        assert close == pytest.approx(closes[mine].sum(dtype=float))
    assert sum(count for _, count, _, _ in found) == rows * len(batches)


# --- The pace -------------------------------------------------------------------------------------


def test_a_slow_insert_does_not_shift_the_schedule(produce, database, proxy):
    """And progress is told as a line every few seconds where there is no terminal."""
    proxy.delay(2.5, when=is_insert, times=1)
    options = ["--interval", 0.25, "--rows", 50, "--batches", 23, "--seed", 9]
    script = produce(through(proxy, database), *options)
    assert script.wait() == 0
    assert stored(database) == drawn(9, 50, 23)
    assert re.search(r"^behind by \d\.\d s: catching up\ncaught up$", script.output, re.MULTILINE)
    assert script.output.count("behind") == script.output.count("caught up") == 1
    assert re.search(r"^[\d,]+ rows, 1?\d\d rows a second$", script.output, re.MULTILINE)
    spans = blocks(database)
    assert len(spans) == 23
    start = spans[0][0]
    for number, (first, last, _) in enumerate(spans):
        assert start + 250 * number - 60 < first <= last < start + 250 * (number + 1) + 1
    assert all(later[0] >= before[1] for before, later in zip(spans, spans[1:], strict=False))


def test_the_wall_clock_may_be_set_back(database, monkeypatch):
    """The pace goes on, and the next ticks carry the new time."""
    wall, shift = time.time, 0
    monkeypatch.setattr(time, "time", lambda: wall() + shift)
    made = producer.Producer(database.dsn, 0.02, 5)
    worker = threading.Thread(target=made.run)
    worker.start()
    try:
        until(lambda: made.rows >= 25)
        shift, before = -3600, made.rows
        until(lambda: made.rows >= before + 50)
    finally:
        made.stop.set()
        worker.join()
    first, last = blocks(database)[0], blocks(database)[-1]
    assert -3700_000 < last[0] - first[0] < -3500_000


def test_progress_on_a_terminal_is_one_line_rewritten(database):
    master, slave = pty.openpty()
    command = [sys.executable, "producer.py", "--dsn", database.dsn, "--interval", "0.1"]
    with killed_after(
        subprocess.Popen([*command, "--batches", "15"], cwd=ROOT, stdout=slave, stderr=slave)
    ) as process:
        os.close(slave)
        output = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while select.select([master], [], [], 20)[0] and (data := os.read(master, 1000)):
                output += data
        os.close(master)
        assert process.wait(5) == 0
    lines = output.decode()
    assert re.search(r"\r\x1b\[K[\d,]+ rows, [\d,]+ rows a second\r\x1b\[K", lines)
    assert "a second\r\n" not in lines
    assert lines.endswith("\r\x1b[K3,750 rows written\r\n")


# --- What is said of mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *[("--interval", text) for text in ("0", "-1", "nan", "inf", "1e9", "soon", "")],
        *[(name, text) for name in ("--rows", "--batches") for text in ("0", "-5", "1.5", "many")],
        *[("--seed", text) for text in ("-1", "x", "1.5")],
        ("--speed", "5"),
        ("stray",),
        ("--dsn",),
        ("clickhouse://admin:s3cret@localhost/test",),
    ],
)
def test_a_bad_option_is_one_line(capsys, monkeypatch, options):
    monkeypatch.setattr(producer, "Producer", lambda **_: pytest.fail("it took that"))
    with pytest.raises(SystemExit) as ending:
        producer.main(options)
    output = capsys.readouterr()
    assert ending.value.code == 2
    assert output.out == ""
    assert output.err.startswith("producer.py: ")
    assert output.err.count("\n") == 1
    assert "s3cret" not in output.err


@pytest.mark.parametrize(
    "dsn",
    [
        *("", "localhost", "http://localhost:8123", "clickhouse://", "clickhouse:///test"),
        *("clickhouse://u:s3cret@h:0/test", "clickhouse://u:s3cret@h:99999/test"),
        *("clickhouse://u:s3cret@h:port/test", "clickhouse://u:s3cret@h/test/table"),
        *("clickhouse://u:123/s3cret@h/test", "clickhouse://u:123?s3cret@h/test"),
        *("clickhouse://u:123#s3cret@h/test", "clickhouse://u:[s3cret@h/test"),
        *("clickhouse://u:s3cret@h/test?connect_timeout=abc", "clickhouse://u:s3cret@h/test?foo=1"),
        *("clickhouse://u:s3cret@h/test?send_receive_timeout=0", "clickhouse://u:s3cret@h/test?x"),
        *("clickhouse://u:s3cret@h/test?database=x", "chdb://memory/test", "chdb://folder/more"),
    ],
)
def test_a_bad_dsn_is_one_line_that_does_not_repeat_it(capsys, monkeypatch, dsn):
    monkeypatch.setattr(producer, "Producer", lambda **_: pytest.fail("it took that"))
    with pytest.raises(SystemExit) as ending:
        producer.main(["--dsn", dsn])
    output = capsys.readouterr()
    assert ending.value.code == 2
    assert output.err.startswith("producer.py: argument --dsn: it does not parse")
    assert output.err.count("\n") == 1
    assert "s3cret" not in output.out + output.err
    assert "123?" not in output.err


def test_what_a_dsn_says():
    split = producer.split_dsn
    assert split("clickhouse://u:p@h:1/db?verify=0") == ("clickhouse://u:p@h:1?verify=0", "db")
    assert split("clickhouse://h") == ("clickhouse://h", "test")
    assert split("clickhouse://h/my%20db/")[1] == "my db"
    assert split("chdb:///tmp/a")[1] == split("chdb://memory")[1] == "test"
    assert producer.where("clickhouse://u:p@h/db") == "h:8123, database db"
    assert producer.where("chdb:///tmp/a%20b").endswith(" /tmp/a b")


def test_mistakes_of_a_real_process(produce):
    script = produce("clickhouse://u:s3cret@h/test?foo=bar")
    assert script.wait(15) == 2
    assert len(script.lines) == 1
    senseless = produce("clickhouse://u:s3cret@127.0.0.1:1/test?compress=very")
    assert senseless.wait(15) == 1
    assert "very" in senseless.lines[-1]
    assert "s3cret" not in script.output + senseless.output


def test_no_chdb_is_told_and_not_waited_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "clickhouse_connect.driver._chdbclient", None)
    monkeypatch.setitem(sys.modules, "chdb", None)
    made = producer.Producer("chdb://memory", 0.25, 10)
    made.stop.wait = pytest.fail  # what it does between two attempts
    made.run()
    assert isinstance(made.error, ImportError)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A ClickHouse with a database and with users who may not do everything."""
    users = {
        "writer": {"password": "w", "grants": ["SELECT, INSERT ON market.*"]},
        "reader": {"password": "r", "grants": ["SELECT ON market.*"]},
        "limited": {"password": "l", "grants": ["ALL ON *.*"], "settings": {"readonly": 1}},
    }
    with ClickHouseProcess(tmp_path_factory.mktemp("guarded"), users=users) as process:
        made = producer.Producer(process.dsn_of("market"), 0.25, 10, batches=1)
        made.run()
        assert made.error is None
        yield process


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        ("admin", "wr0ng", "wrong user or password: "),
        ("reader", None, "the user lacks a right: "),
        ("limited", None, "Setting insert_deduplication_token is readonly"),
    ],
)
def test_what_waiting_does_not_heal_ends_at_once(produce, guarded, user, password, said):
    script = produce(guarded.dsn_of("market", user=user, password=password))
    assert script.wait(15) == 1
    assert len(script.lines) == 3
    assert "0 rows written" in script.output
    assert script.lines[-1].startswith(f"producer.py: {said}")
    assert "wr0ng" not in script.output


def test_the_right_to_insert_is_enough_where_the_table_is_there(guarded):
    made = producer.Producer(guarded.dsn_of("market", user="writer"), 0.01, 10, batches=2)
    made.run()
    assert (made.error, made.rows) == (None, 20)


# --- Nothing lost, nothing twice ------------------------------------------------------------------


def test_every_fault_on_the_way_is_survived(produce, database, proxy):
    """One producer meets them all. clickhouse-connect itself tries again once where the connection
    was reset, so a fault happens three times: the driver fails, and the producer's turn fails."""
    script = produce(
        through(proxy, database, "?send_receive_timeout=1"),
        *("--interval", 0.02, "--rows", 40, "--seed", 11, "--reset"),
    )
    faults = [
        (proxy.drop_answer, ()),  # stored, but nobody knows
        (proxy.cut_answer, (10,)),
        (proxy.cut_answer, (120,)),
        (proxy.cut_request, (0,)),
        (proxy.cut_request, (900,)),  # in mid-body
        (proxy.cut_request, (2000,)),
        (proxy.stall, ()),  # never arrives
        (proxy.delay, (1.5,)),  # stored, but the answer is too late
    ]
    for number, (fault, arguments) in enumerate(faults, 1):
        before = proxy.faults
        fault(*arguments, when=is_insert, times=1 if fault in (proxy.stall, proxy.delay) else 3)
        until(lambda n=number: script.output.count("ClickHouse is back") == n)
        assert proxy.faults > before
    proxy.refuse()
    until(lambda: script.output.count("ClickHouse is away") == len(faults) + 1)
    time.sleep(0.5)  # some attempts, one sentence
    assert script.output.count("ClickHouse is away") == len(faults) + 1
    proxy.pass_on()
    until(lambda: script.output.count("ClickHouse is back") == len(faults) + 1)
    assert script.stop() == 0
    assert stored(database) == drawn(11, 40, written(script) // 40)


def test_a_batch_cut_in_the_middle_is_sent_again_as_a_whole(database, proxy):
    """Thousands of rows are a body of many pieces."""
    proxy.cut_request(100_000, when=is_insert, times=3)
    made = producer.Producer(through(proxy, database), 0.01, 20_000, 3, seed=12, say=str)
    made.run()
    assert (made.error, made.rows, proxy.faults) == (None, 60_000, 3)
    assert stored(database) == drawn(12, 20_000, 3)


def test_equal_batches_are_all_stored(database, monkeypatch):
    """ClickHouse itself takes an equal block for one sent again, if nothing says otherwise."""
    batch = producer.Market(1).draw(10, 1_700_000_000_000, 250)
    monkeypatch.setattr(producer.Market, "draw", lambda *_: batch)
    made = producer.Producer(database.dsn, 0.01, 10, batches=3)
    made.run()
    assert (made.error, made.rows, database.count()) == (None, 30, 30)


def test_three_producers_outlive_a_crash_of_clickhouse(produce, tmp_path):
    with ClickHouseProcess(tmp_path) as process, Proxy(process.port) as proxy:
        database = Database(process)
        dsn = through(proxy, database)
        options = ["--interval", 0.02, "--rows", 30, "--batches", 60, "--seed"]
        scripts = [produce(dsn, *options, seed) for seed in (1, 2, 3)]
        for script in scripts:
            script.wait_for("inserting into")
        until(lambda: proxy.connections >= 3)
        proxy.drop_answer(when=is_insert, times=20)
        assert proxy.wait(20, seconds=20)
        process.kill()
        for script in scripts:
            script.wait_for("ClickHouse is away (")
        process.start()
        assert [script.wait(30) for script in scripts] == [0, 0, 0]
        assert [written(script) for script in scripts] == [1800] * 3
        assert stored(database) == drawn(1, 30, 60) + drawn(2, 30, 60) + drawn(3, 30, 60)


def test_ticks_are_not_drawn_while_clickhouse_is_away(produce, database, proxy):
    """The market makes a pause, so memory does not grow, and no tick is older than it should be."""
    options = ["--interval", 0.1, "--rows", 10_000, "--batches", 20, "--seed", 13]
    script = produce(through(proxy, database), *options)
    until(lambda: exists(database) and database.count())
    proxy.refuse()
    script.wait_for("ClickHouse is away (")
    before, away = memory(script), time.time() * 1000
    time.sleep(1.5)  # fifteen batches of 1 MB
    assert memory(script) - before < 10
    back = time.time() * 1000
    proxy.pass_on()
    assert script.wait() == 0
    assert (
        script.output.count("ClickHouse is away") == script.output.count("ClickHouse is back") == 1
    )
    assert written(script) == 200_000
    assert stored(database) == drawn(13, 10_000, 20)
    inside = f"timestamp BETWEEN {away + 100} / 1000 AND {back - 100} / 1000"
    assert database.command(f"SELECT count() FROM stock_values WHERE {inside}") == 0


def test_a_full_disk_is_waited_for(produce, database):
    """ClickHouse wants more room to be left than there is, as it does on a disk that is full."""
    script = produce(database.dsn, "--interval", 0.02, "--rows", 40, "--seed", 15)
    until(lambda: exists(database) and database.count())
    room = "min_free_disk_bytes_to_perform_insert"
    database.command(f"ALTER TABLE stock_values MODIFY SETTING {room} = {10**17}")
    script.wait_for("ClickHouse is away (")
    before = database.count()
    time.sleep(0.5)
    assert database.count() == before
    assert "free space" in script.output
    database.command(f"ALTER TABLE stock_values RESET SETTING {room}")
    script.wait_for("ClickHouse is back")
    assert script.stop() == 0
    assert stored(database) == drawn(15, 40, written(script) // 40)


def test_a_table_that_is_dropped_is_created_again(produce, database):
    script = produce(database.dsn, "--interval", 0.05, "--rows", 10)
    until(lambda: exists(database) and database.count())
    database.command("DROP TABLE stock_values SYNC")
    script.wait_for("ClickHouse is back")
    database.command(f"DROP DATABASE {database.name} SYNC")
    until(lambda: script.output.count("ClickHouse is back") == 2)
    until(lambda: exists(database) and database.count() > 20)
    assert script.stop() == 0
    assert database.count() < written(script)


def test_a_table_that_no_longer_fits_ends_it(produce, database):
    script = produce(database.dsn, "--interval", 0.05, "--rows", 10)
    until(lambda: exists(database) and database.count())
    database.command("CREATE OR REPLACE TABLE stock_values (timestamp DateTime) ENGINE = Memory")
    assert script.wait(15) == 1
    # Found out by the insert, or by a look at the table if the connection was made anew.
    assert re.match(
        "producer.py: (the table lacks a column: |table .* does not fit)", script.lines[-1]
    )


def test_nothing_is_sent_again_to_a_table_that_takes_it_twice(produce, database, proxy):
    """Replaced by one with the same columns and no deduplication: that is found out in time."""
    script = produce(through(proxy, database), "--interval", 0.05, "--rows", 10)
    until(lambda: exists(database) and database.count())
    proxy.refuse()
    script.wait_for("ClickHouse is away (")
    database.command(f"CREATE OR REPLACE TABLE stock_values ({ALL_COLUMNS}) ENGINE = Log")
    proxy.pass_on()
    assert script.wait(15) == 1
    assert "does not fit" in script.lines[-1]
    assert database.count() == 0


# --- The end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_batches(produce, database, number):
    script = produce(database.dsn, "--interval", 3600, "--rows", 77, "--seed", 14)
    until(lambda: exists(database) and database.count() == 77)
    time.sleep(0.2)  # confirmed, too
    assert script.stop(number) == 0
    assert written(script) == 77


@pytest.mark.parametrize("fault", ["stall", "delay"])
def test_a_signal_in_the_middle_of_an_insert(produce, database, proxy, fault):
    """It waits for the answer, but not longer than it may."""
    script = produce(through(proxy, database), "--interval", 0.02, "--rows", 50, "--seed", 15)
    until(lambda: exists(database) and database.count())
    if fault == "stall":
        proxy.stall(when=is_insert)
    else:
        proxy.delay(1, when=is_insert)
    assert proxy.wait(1)
    assert script.stop() == 0
    last = script.lines[-1]
    if fault == "stall":
        assert last.endswith(" rows written, the last batch was not confirmed")
    batches = int(last.partition(" ")[0].replace(",", "")) // 50
    assert stored(database) == drawn(15, 50, batches)
    assert fault == "stall" or written(script)


@pytest.mark.parametrize("fault", ["refuse", "stall"])
def test_a_signal_while_clickhouse_is_not_there_yet(produce, database, proxy, fault):
    getattr(proxy, fault)()
    script = produce(through(proxy, database))
    if fault == "refuse":
        script.wait_for("ClickHouse is away (")
    assert proxy.wait(1)
    assert script.stop(signal.SIGINT) == 0
    assert written(script) == 0


def test_a_signal_while_clickhouse_is_away_again(produce, database, proxy):
    script = produce(through(proxy, database), "--interval", 0.02, "--rows", 50, "--seed", 16)
    until(lambda: exists(database) and database.count())
    proxy.refuse()
    script.wait_for("ClickHouse is away (")
    assert script.stop() == 0
    last = script.lines[-1]
    assert last.endswith(" rows written, the last batch was not confirmed")
    batches = int(last.partition(" ")[0].replace(",", "")) // 50
    assert stored(database) in (drawn(16, 50, batches), drawn(16, 50, batches + 1))


def test_nobody_reads_the_output(database):
    """As in `producer.py | head -1`."""
    command = [sys.executable, "-u", "producer.py", "--dsn", database.dsn, "--interval", "0.05"]
    with killed_after(
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    ) as process:
        assert process.stdout.readline().startswith("inserting into")
        process.stdout.close()
        until(lambda: exists(database) and database.count())
        database.command("DROP TABLE stock_values SYNC")  # so there is something to say
        assert process.wait(5) == 0
        assert process.stderr.read() == ""
        process.stderr.close()


def test_the_embedded_engine_alone(produce, tmp_path):
    """Stopped in the middle; another process reads what it left."""
    script = produce(f"chdb://{tmp_path}", "--interval", 0.001, "--rows", 100, "--seed", 17)
    script.wait_for("inserting into the embedded engine")
    until(lambda: list(tmp_path.glob("store/*/*/all_*_*_1")), 10)
    assert script.stop() == 0
    assert written(script) > 0
    with ClickHouseProcess(tmp_path) as process:
        database = Database(process)
        database.name = "test"
        assert stored(database) == drawn(17, 100, written(script) // 100)
