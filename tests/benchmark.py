"""How fast it is, beside the original design and beside what the parts allow.

    python tests/benchmark.py [SECTION ...]

Prints Markdown tables, with the target and whether it was met where there is one. Everything is
measured side by side in one run, on a real engine over HTTP, with the real server as a process and
viewers on real websockets; so read the ratios, not the figures. The engine is chDB behind
tests/clickhouse_http.py, on the same cores as everything else. All sections together
take less than ten minutes and some 5 GB of disk.
"""

import argparse
import asyncio
import contextlib
import copy
import logging
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import clickhouse_connect
import numpy
import perspective
import pyarrow
import pyarrow.compute
from clickhouse_http import ClickHouseProcess
from conftest import Script, Server, Viewer, free_port, wait_until

import perspective_server
import producer

INTERVAL = 0.25  # seconds, of inserts and polls: the default
WINDOW = 100_000  # rows in the live table: the default
COLUMNS = ", ".join(producer.COLUMNS)
SPAWN = multiprocessing.get_context("spawn")

# The views of the page: those of live tables, which each viewer holds all the time, and those of
# the history. As in prsp-viewer.html, without what only concerns how they are drawn.
LIVE, HISTORY = producer.TABLE, f"{producer.TABLE}_history"
NEWEST, TICKERS = perspective_server.NEWEST, perspective_server.TICKERS
MINUTE = {"minute": "toStartOfMinute(timestamp)"}
DASHBOARD = {
    "tickers": {
        "table": TICKERS,
        "columns": ["ticker", "last", "change", "high", "low", "volume"],
        "sort": [["ticker", "asc"]],
    },
    "ticks": {
        "table": NEWEST,
        "columns": ["timestamp", "ticker", "client", "open", "high", "low", "close", "volume"],
        "sort": [["timestamp", "desc"]],
    },
    "candles": {
        "table": perspective_server.CANDLES,
        "filter": [["ticker", "==", "AAPL.N"]],
        "group_by": ["time"],
        "group_rollup_mode": "flat",
        "columns": ["open", "close", "high", "low"],
        "aggregates": {"open": "first", "close": "last", "high": "max", "low": "min"},
    },
    "volume": {
        "table": LIVE,
        "group_by": ["client"],
        "group_rollup_mode": "flat",
        "split_by": ["ticker"],
        "columns": ["volume"],
    },
}
HISTORY_PANELS = {
    "volumes": {
        "table": HISTORY,
        "group_by": ["minute"],
        "group_rollup_mode": "flat",
        "expressions": MINUTE,
        "columns": ["volume"],
        "aggregates": {"volume": "sum"},
    },
    "closes": {
        "table": HISTORY,
        "filter": [["ticker", "==", "AAPL.N"]],
        "group_by": ["minute"],
        "group_rollup_mode": "flat",
        "expressions": MINUTE,
        "columns": ["close"],
        "aggregates": {"close": "last"},
    },
    "everything": {
        "table": HISTORY,
        "group_by": ["ticker", "client"],
        "columns": ["ticks", "close", "high", "low", "volume"],
        "expressions": {"ticks": "1"},
        "aggregates": {
            "ticks": "count",
            "close": "last",
            "high": "max",
            "low": "min",
            "volume": "sum",
        },
    },
}


# ---------------------------------------------------------------------------------------------
# What the sections share.


def table(title, head, rows):
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    print("|", " | ".join(head), "|")
    print("|", " | ".join("---" for _ in head), "|")
    for row in rows:
        print("|", " | ".join(str(cell) for cell in row), "|")
    sys.stdout.flush()


def verdict(met):
    return "met" if met else "**missed**"


def percentile(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


def cpu_seconds(pid):
    """Processor time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def newest_ms(rows):
    """The newest timestamp of an Arrow table of ticks, in milliseconds."""
    newest = pyarrow.compute.max(rows.column("timestamp").cast(pyarrow.timestamp("ms")))
    return newest.cast(pyarrow.int64()).as_py()


@contextlib.contextmanager
def running(kind, *arguments):
    """A script as a process that ends with the block."""
    script = kind(*arguments)
    try:
        yield script
    finally:
        status = script.process.poll()
        if status:
            print(f"({script.process.args[1]} ended with {status}:", *script.lines, ")", sep="\n")
        try:
            script.stop(seconds=10)
        except subprocess.TimeoutExpired:
            print(f"(process {script.process.pid} did not end within 10 s)")
            script.kill()


@contextlib.contextmanager
def serving(bench, limit=WINDOW):
    """The real server, its live table as full as ClickHouse allows."""
    with running(Server, "--dsn", bench.dsn, "--limit", limit) as server:
        wait_until(lambda: server.health()["clickhouse"] == "up")
        yield server


@contextlib.contextmanager
def child(target, *arguments):
    """A function in a process of its own; gives our end of a pipe to it."""
    mine, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a child that dies ends our waiting
    try:
        yield mine
    finally:
        process.kill()
        process.join()


class Bench:
    """A fresh table in a ClickHouse, and a way to insert ticks that costs little."""

    def __init__(self, clickhouse, database):
        self.clickhouse = clickhouse
        self.dsn = clickhouse.dsn_of(database)
        self.name = producer.full_name(database)
        self.client = producer.connect(self.dsn)
        producer.create_table(self.client, database, reset=True)
        tickers = "', '".join(producer.LEVELS)
        people = "', '".join(producer.CLIENTS)
        self.ticks = (
            "SELECT fromUnixTimestamp64Milli(toInt64({first_ms} + number * {step_ms}), 'UTC') AS t,"
            f" ['{tickers}'][rand(1) % 13 + 1], ['{people}'][rand(2) % 9 + 1],"
            " 100 + rand(3) % 100 / 100 AS o, o + 0.5, o - 0.5, o + rand(4) % 100 / 200,"
            " rand(5) % 10000, toDate(t) FROM numbers({rows})"
        )

    def insert(self, rows, first_ms=None, step_ms=0.0):
        """Insert rows made by ClickHouse itself, stamped now unless told otherwise."""
        first_ms = time.time() * 1000 if first_ms is None else first_ms
        ticks = self.ticks.format(first_ms=first_ms, step_ms=step_ms, rows=rows)
        self.client.command(f"INSERT INTO {self.name} ({COLUMNS}) {ticks}")

    def fill_window(self, rows=WINDOW):
        """As much as the live table holds, at 1,000 rows/s until ten seconds ago: from here on
        every row replaces one, which costs the engine more than a table that still grows."""
        self.insert(rows, first_ms=time.time() * 1000 - rows - 10_000, step_ms=1)

    def arrow(self, rows, places=""):
        """Ticks as an Arrow stream, if asked with places in a ring."""
        sql = f"SELECT {COLUMNS}{places} FROM {self.name} LIMIT {rows}"
        return self.client.raw_query(sql, fmt="ArrowStream", settings=perspective_server.ARROW)

    def merge(self):
        """Merge all parts into one, however long that takes."""
        dsn = self.clickhouse.dsn_of()
        patient = clickhouse_connect.get_client(dsn=dsn, send_receive_timeout=600, compress=False)
        with contextlib.closing(patient):
            patient.command(f"SYSTEM START MERGES {self.name}")
            patient.command(f"OPTIMIZE TABLE {self.name} FINAL", settings={"max_execution_time": 0})
            patient.command(f"SYSTEM STOP MERGES {self.name}")

    def drop(self):
        self.client.command(f"DROP TABLE {self.name} SYNC")
        self.client.close()


# ---------------------------------------------------------------------------------------------
# Against the original: the two designs that ask by time window, each a server in a process of its
# own, and this one.

RATES = [1_000, 10_000, 100_000]  # rows/s
ROOMY = 500_000  # rows in the live table; two inserts of the highest rates are more than WINDOW
HOLD = 4  # seconds that a rate is held for
GRACE = 1  # seconds after the last insert, when all rows have to be there
ALL = 0.995  # share of rows that counts as all: some ticks are alike in all columns


def ask_by_window(kind, dsn, port, connection):
    """Re-read the rows of the last second every 250 ms: "records" as a DataFrame turned into a
    list of dicts, which is the original design; "arrow" as Arrow bytes.

    The work is done on the IO loop, as there. What was handed over is kept, and what is distinct
    in it counted at the end. Sends (rows handed over, distinct rows) then.
    """
    import tornado.web
    from perspective.handlers.tornado import PerspectiveTornadoHandler

    async def serve():
        server = perspective.Server()
        client = producer.connect(dsn)
        source = producer.full_name(producer.split_dsn(dsn)[1])
        query = f"SELECT {COLUMNS} FROM {source} WHERE timestamp >= now() - INTERVAL 1 SECOND"
        kinds = {n: perspective_server.perspective_type(k) for n, k in producer.COLUMNS.items()}
        live = server.new_local_client().table(kinds, name=LIVE, limit=ROOMY)
        application = tornado.web.Application(
            [(r"/websocket", PerspectiveTornadoHandler, {"perspective_server": server})]
        )
        application.listen(port, "127.0.0.1")
        live.update(client.raw_query(f"SELECT {COLUMNS} FROM {source}", fmt="ArrowStream"))
        connection.send("ready")
        kept = []
        while not connection.poll():
            began = time.monotonic()
            if kind == "records":
                frame = client.query_df(query)
                for name in ("timestamp", "date"):  # Perspective takes milliseconds, no Timestamps
                    frame[name] = frame[name].to_numpy("datetime64[ms]").astype("int64")
                live.update(frame.to_dict("records"))
                kept.append(pyarrow.Table.from_pandas(frame, preserve_index=False))
            else:
                arrow = client.raw_query(query, fmt="ArrowStream")
                live.update(arrow)
                kept.append(pyarrow.ipc.open_stream(arrow).read_all())
            await asyncio.sleep(max(0, began + INTERVAL - time.monotonic()))
        handed = pyarrow.concat_tables(table for table in kept if table.num_rows)
        distinct = handed.group_by(list(producer.COLUMNS)).aggregate([])
        connection.send((handed.num_rows, distinct.num_rows))
        connection.recv()

    logging.disable(logging.CRITICAL)
    asyncio.run(serve())


@contextlib.contextmanager
def by_window(kind, bench):
    """Gives a function that returns (rows handed over, distinct rows that arrived)."""
    with child(ask_by_window, kind, bench.dsn, free_port()) as connection:
        connection.recv()

        def result():
            connection.send("result")
            return connection.recv()

        yield result


@contextlib.contextmanager
def by_block(_, bench):
    with serving(bench, ROOMY) as server:
        before = server.health()["delivered"]

        def result():
            delivered = server.health()["delivered"] - before
            return delivered, delivered  # that none is twice or amiss is what the tests show

        yield result


def hold(bench, rate):
    """Insert at a rate. Returns the rows inserted, or None if inserting was too slow itself."""
    batch = round(rate * INTERVAL)
    started = time.monotonic()
    for number in range(1, round(HOLD / INTERVAL) + 1):
        bench.insert(batch, step_ms=INTERVAL * 1000 / batch)
        ahead = started + number * INTERVAL - time.monotonic()
        if ahead < -1:
            return None
        time.sleep(max(0, ahead))
    return batch * round(HOLD / INTERVAL)


def try_rate(clickhouse, design, kind, rate):
    """Returns (rows handed over, distinct rows that arrived), both for each row inserted."""
    bench = Bench(clickhouse, "versus")
    bench.fill_window(ROOMY)
    with design(kind, bench) as result:
        rows = hold(bench, rate)
        time.sleep(GRACE)
        handed, arrived = result() if rows else (0, 0)
    bench.drop()
    return (handed / rows, arrived / rows) if rows else (0, 0)


def against_the_original(clickhouse):
    designs = {
        "original (records by window)": (by_window, "records"),
        "Arrow by window": (by_window, "arrow"),
        "this one (Arrow by block)": (by_block, ""),
    }
    shares, highest = {}, {}
    for title, (design, kind) in designs.items():
        for rate in RATES:
            shares[title, rate] = try_rate(clickhouse, design, kind, rate)
        held = max((rate for rate in RATES if shares[title, rate][1] >= ALL), default=0)
        missed = min((rate for rate in RATES if rate > held), default=0)
        while not missed or missed > 1.5 * held > 0:
            rate = round((held * missed) ** 0.5, -2) if missed else 2 * held
            if try_rate(clickhouse, design, kind, rate)[1] >= ALL:
                held = rate
            else:
                missed = rate
        highest[title] = held
    original = highest["original (records by window)"]
    table(
        "Rows handed to Perspective for each row inserted, and the share of all rows that arrived,"
        f" in a window of {ROOMY:,}",
        ["design", *(f"{rate:,} rows/s" for rate in RATES), "highest rate held", "ratio"],
        [
            [
                title,
                *("{:.2f} ({:.1%})".format(*shares[title, rate]) for rate in RATES),
                f"{highest[title]:,.0f} rows/s",
                f"{highest[title] / original:.1f}" if original else "-",
            ]
            for title in designs
        ],
    )
    print(f"\nHeld: {ALL:.1%} of the rows of {HOLD} s had arrived {GRACE} s after the last insert.")


# ---------------------------------------------------------------------------------------------
# Against the limit: what the two parts can do without us.


def open_tail(bench):
    """The server's Tail in this process, its window read."""
    tail = perspective_server.Tail(perspective.Server(), bench.dsn, INTERVAL, WINDOW)
    tail.poll()
    return tail


def timed(call, *arguments):
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


PLACES = f", toInt32(rowNumberInAllBlocks() % {WINDOW}) AS place"


def both_tables(bench):
    """The window in a Perspective table with a limit, and in one that is indexed by the place."""
    new = [perspective.Server().new_local_client() for _ in range(2)]
    alone = new[0].table(bench.arrow(WINDOW), limit=WINDOW)
    return alone, new[1].table(bench.arrow(WINDOW, PLACES), index="place")


def against_the_limit(clickhouse):
    rows, polls = 25_000, 20
    bench = Bench(clickhouse, "capacity")
    bench.fill_window()
    alone, ring = both_tables(bench)
    batch, placed = bench.arrow(rows), bench.arrow(rows, PLACES)
    tail = open_tail(bench)
    limit, index, database, ours = [], [], [], []
    for _ in range(polls):  # in turn, so that a noisy minute hits all of them
        limit.append(timed(alone.update, batch))
        index.append(timed(ring.update, placed))
        database.append(timed(bench.arrow, rows))
        bench.insert(rows)
        ours.append(timed(tail.poll))
    assert tail.delivered == WINDOW + polls * rows
    tail.close()
    rates = [rows / statistics.median(times) for times in (limit, index, database, ours)]
    limit, index, database, ours = rates
    share = ours / min(limit, database)
    table(
        f"Against the limit, in batches of {rows:,} rows, into a full window of {WINDOW:,}",
        [
            "Perspective alone, with its `limit`",
            "Perspective alone, with a ring as ours",
            "ClickHouse alone",
            "this tail",
            "share of the smaller of `limit` and ClickHouse",
            "target",
            "share of the smaller of ring and ClickHouse",
        ],
        [
            [
                *(f"{rate:,.0f} rows/s" for rate in rates),
                f"{share:.2f}",
                f">= 0.8: {verdict(share >= 0.8)}",
                f"{ours / min(index, database):.2f}",
            ]
        ],
    )

    sizes = []
    for view in ("none", "of all rows"):
        alone, ring = both_tables(bench)
        views = [] if view == "none" else [alone.view(), ring.view()]
        for rows in (250, 2_500, 25_000):
            batch, placed = bench.arrow(rows), bench.arrow(rows, PLACES)
            limit = statistics.median(timed(alone.update, batch) for _ in range(6))
            index = statistics.median(timed(ring.update, placed) for _ in range(6))
            times = [f"{seconds * 1000:.1f} ms" for seconds in (limit, index)]
            sizes.append([view, f"{rows:,}", *times, f"{limit / index:.1f}"])
        for made in views:
            made.delete()
    table(
        f"An update of Perspective alone, into a full window of {WINDOW:,}",
        ["view", "rows", "with its `limit`", "with a ring as ours", "ratio"],
        sizes,
    )
    bench.drop()


# ---------------------------------------------------------------------------------------------
# Latency.

LONGEST_WAIT = 20  # seconds for the last rows


class Arrivals:
    """A viewer that subscribes to the rows of the live table and notes when they come."""

    def __init__(self, viewer):
        self.noted = []  # (when, the newest timestamp in ms)
        self.rows = self.newest = 0
        viewer.run(self.subscribe(viewer))

    async def subscribe(self, viewer):
        view = await (await viewer.client.open_table(LIVE)).view()
        await view.on_update(self.note, mode="row")

    def note(self, port, delta):
        rows = pyarrow.ipc.open_stream(delta).read_all()
        self.rows += rows.num_rows
        self.newest = max(self.newest, newest_ms(rows))
        self.noted.append((time.perf_counter(), self.newest))

    def gaps(self, start, end):
        """Milliseconds between two updates that came between two times."""
        times = [when for when, _ in self.noted if start <= when <= end]
        ends = [start, *times, end]  # silence at the edges counts, too
        return [(b - a) * 1000 for a, b in zip(ends, ends[1:], strict=False)]


def latencies(clickhouse, rate, seconds):
    """From ClickHouse's confirmation of each insert until the viewer has its rows, in ms; the rate
    that was held; and the share of the rows that arrived. The rows of an insert have one timestamp.
    """
    bench = Bench(clickhouse, "latency")
    bench.fill_window()
    batch, inserts = round(rate * INTERVAL), []
    chance = numpy.random.default_rng(1)
    with serving(bench) as server, Viewer(server.url) as viewer:
        arrivals = Arrivals(viewer)
        started = time.perf_counter()
        for number in range(round(seconds / INTERVAL)):
            # Somewhere in its quarter of a second, or all would hit the same phase of the polls.
            due = started + (number + chance.uniform()) * INTERVAL
            time.sleep(max(0, due - time.perf_counter()))
            stamp = int(time.time() * 1000)
            bench.insert(batch, first_ms=stamp)
            inserts.append((time.perf_counter(), stamp))
        held = len(inserts) * batch / (inserts[-1][0] - started)
        deadline = time.perf_counter() + LONGEST_WAIT
        while arrivals.newest < stamp and time.perf_counter() < deadline:
            time.sleep(0.05)
        share = arrivals.rows / (len(inserts) * batch)
    bench.drop()
    never = (time.perf_counter(), float("inf"))
    waits = []
    for confirmed, stamp in inserts:
        came = next(when for when, newest in [*arrivals.noted, never] if newest >= stamp)
        waits.append(max(0, came - confirmed) * 1000)
    return waits, held, share


def latency(clickhouse):
    rows = []
    for rate, seconds in ((1_000, 25), (100_000, 12)):
        waits, held, share = latencies(clickhouse, rate, seconds)
        median, high = (percentile(waits, part) for part in (0.5, 0.99))
        target = "none"
        if rate == 1_000:
            most, most_high = INTERVAL * 500 + 25, INTERVAL * 1000 + 60
            met = verdict(median <= most and high <= most_high)
            target = f"median <= {most:.0f}, 99 % <= {most_high:.0f} ms: {met}"
        times = [f"{ms:.0f} ms" for ms in (median, high, max(waits), INTERVAL * 1000)]
        inserted = f"{rate:,} rows/s ({held:,.0f})"
        rows.append([inserted, len(waits), f"{share:.1%}", *times, target])
    table(
        "From ClickHouse's confirmation of an insert until a subscribed viewer holds its rows",
        [
            "rate (held)",
            "inserts",
            "rows arrived",
            "median",
            "99 %",
            "worst",
            "poll interval",
            "target",
        ],
        rows,
    )


# ---------------------------------------------------------------------------------------------
# Growth with the table.


def poll_ms(bench, polls=30):
    """The median time of a poll with 250 new rows; it asks for other blocks each time. Each of them
    draws the tickers and the candles anew, too, which else has its pauses."""
    tail, times = open_tail(bench), []
    for _ in range(polls):
        bench.insert(250)
        tail.summary_due = 0
        times.append(timed(tail.poll) * 1000)
    tail.close()
    return statistics.median(times)


def growth_with_the_table(clickhouse):
    """A tick a millisecond up to now; the table grows by older ones, so that the last minutes,
    which the primary key leads to, hold as much at every size."""
    bench = Bench(clickhouse, "growth")
    bench.client.command(f"SYSTEM STOP MERGES {bench.name}")
    now_ms, rows, results = time.time() * 1000, 0, []
    for size in (1_000_000, 10_000_000, 100_000_000):
        while rows < size:
            chunk = min(9_000_000, size - rows) if rows else size
            rows += chunk
            bench.insert(chunk, first_ms=now_ms - rows, step_ms=1)
        for state in ("unmerged", "merged"):
            if state == "merged":
                bench.merge()
            parts = bench.client.command(
                "SELECT count() FROM system.parts WHERE active AND database = 'growth'"
            )
            results.append([size, state, parts, poll_ms(bench)])
    first = {state: ms for size, state, _, ms in results if size == 1_000_000}
    table(
        "A poll with 250 new rows, as the table grows",
        ["rows in the table", "parts before", "median", "ratio to 1,000,000", "target"],
        [
            [
                f"{size:,}",
                f"{state}, {parts}",
                f"{ms:.1f} ms",
                f"{ms / first[state]:.2f}",
                f"<= 1.5: {verdict(ms / first[state] <= 1.5)}" if size == 100_000_000 else "",
            ]
            for size, state, parts, ms in results
        ],
    )
    bench.drop()


# ---------------------------------------------------------------------------------------------
# Growth with viewers.

LONGEST_START = 15  # seconds until all views have to be there, or it goes on without
WATCH = 6  # seconds


class Watcher(Viewer):
    """One of many viewers that share an event loop. As the page does, it fetches what it shows
    whenever that has changed. Each looks at the candles of another ticker, while there are some."""

    def __init__(self, url, number):
        ticker = list(producer.LEVELS)[number % len(producer.LEVELS)]
        self.dashboard = copy.deepcopy(DASHBOARD)
        self.dashboard["candles"]["filter"] = [["ticker", "==", ticker]]
        self.address, self.headers = f"ws{url.removeprefix('http')}/websocket", {}
        self.closed = threading.Event()
        self.views = self.fetched = self.lag_ms = 0
        self.newest = 0  # the newest timestamp shown, in ms

    def reset(self):
        self.fetched = self.lag_ms = 0
        self.newest = self.newest or time.time() * 1000  # who has seen nothing waits from now on

    async def watch(self):
        await self._connect()
        await asyncio.gather(*(self.show(**config) for config in self.dashboard.values()))

    async def show(self, table, **config):
        view = await (await self.client.open_table(table)).view(**config)
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        await view.on_update(lambda *_: loop.call_soon_threadsafe(changed.set))
        self.views += 1
        while True:
            await changed.wait()
            changed.clear()
            self.look_at(await view.to_arrow(start_row=0, end_row=50))

    def look_at(self, arrow):
        self.fetched += 1
        rows = pyarrow.ipc.open_stream(arrow).read_all()
        if "timestamp" in rows.column_names and rows.num_rows:
            newest = newest_ms(rows)
            if newest > self.newest:  # what it showed until now was as old as this
                self.note_lag()
                self.newest = newest

    def note_lag(self):
        self.lag_ms = max(self.lag_ms, time.time() * 1000 - self.newest)


def crowd(url, size, connection):
    """`size` viewers. Sends how many views were made, and then (updates/s, worst lag) of each."""

    async def main():
        watchers = [Watcher(url, number) for number in range(size)]
        tasks = [asyncio.create_task(watcher.watch()) for watcher in watchers]
        deadline = time.monotonic() + LONGEST_START
        while time.monotonic() < deadline and any(w.views < len(DASHBOARD) for w in watchers):
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        for watcher in watchers:
            watcher.reset()
        connection.send(sum(watcher.views for watcher in watchers))
        began = time.monotonic()
        await asyncio.sleep(WATCH)
        took = time.monotonic() - began
        for watcher in watchers:
            watcher.note_lag()
        failed = [repr(task.exception()) for task in tasks if task.done()]
        rate = took * len(DASHBOARD)
        connection.send((failed, [(w.fetched / rate, w.lag_ms) for w in watchers]))
        await asyncio.sleep(60)

    logging.disable(logging.CRITICAL)
    asyncio.run(main())


def watched(clickhouse, size):
    """The server with a full window, a producer at the default rate and `size` viewers.

    Returns (views made, [(updates/s, worst lag in ms)], what the processes cost, MB, health); the
    cost is in cores, of the server, the producer, and the crowd.
    """
    bench = Bench(clickhouse, "viewers")
    bench.fill_window()
    with (
        serving(bench) as server,
        running(Script, "producer.py", "--dsn", bench.dsn) as feeding,
        child(crowd, server.url, size) as connection,
    ):
        views = connection.recv()
        [crowding] = SPAWN.active_children()
        pids = [server.process.pid, feeding.process.pid, crowding.pid]
        before, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
        failed, stats = connection.recv()
        took = time.monotonic() - began
        cost = [(cpu_seconds(pid) - b) / took for pid, b in zip(pids, before, strict=True)]
        if failed:
            print(f"({len(failed)} viewers failed, the first: {failed[0]})")
        memory, health = memory_mb(server.process.pid), server.health()
    bench.drop()
    return views, stats, cost, memory, health


def growth_with_viewers(clickhouse):
    rows = []
    for size in (1, 10, 50, 200):
        views, stats, cost, memory, health = watched(clickhouse, size)
        rows.append(
            [
                size,
                f"{views} of {size * len(DASHBOARD)}",
                f"{statistics.median(rate for rate, _ in stats):.1f}",
                f"{min(rate for rate, _ in stats):.1f}",
                f"{statistics.median(lag for _, lag in stats) / 1000:.1f} s",
                f"{max(lag for _, lag in stats) / 1000:.1f} s",
                f"{health['poll_ms']:,.0f} ms",
                f"{cost[0]:.0%}",
                f"{cost[2]:.0%}",
                f"{memory:,} MB",
            ]
        )
    table(
        f"Viewers, each with the dashboard's {len(DASHBOARD)} live views, at the default rate"
        " (4 inserts a second), window full",
        [
            "viewers",
            "views made",
            "updates/s (median)",
            "least",
            "worst lag (median viewer)",
            "worst lag",
            "last poll",
            "server's share of a core",
            "the viewers' own",
            "server's memory",
        ],
        rows,
    )
    print("\nLag: how old the newest tick on a viewer's screen became, from its own timestamp.")


# ---------------------------------------------------------------------------------------------
# The producer, and the cost of it all.


def the_producer(clickhouse):
    bench = Bench(clickhouse, "producer")
    rows, batches = 100_000, 20
    began = time.monotonic()
    fast = ["--rows", rows, "--batches", batches, "--interval", 0.001]
    with running(Script, "producer.py", "--dsn", bench.dsn, *fast) as script:
        status = script.wait(120)
        took = time.monotonic() - began
        assert status == 0, script.output
    bench.drop()
    _, _, (server, feeding, _), _, _ = watched(clickhouse, 1)
    table(
        "Cost",
        [
            "producer at full speed",
            "producer at the default rate",
            "server, one viewer with the dashboard",
            "both",
            "target",
        ],
        [
            [
                f"{rows * batches / took:,.0f} rows/s",
                *(f"{share:.1%} of a core" for share in (feeding, server, server + feeding)),
                f"< 15 %: {verdict(server + feeding < 0.15)}",
            ]
        ],
    )


# ---------------------------------------------------------------------------------------------
# Start-up.


def start_up(clickhouse):
    bench = Bench(clickhouse, "start")
    bench.insert(1000)
    rows = []
    for title, options in (
        ("embedded", ["--embedded"]),
        ("ClickHouse over HTTP", ["--dsn", bench.dsn]),
    ):
        times, memory = [], []
        for _ in range(3):
            began = time.monotonic()
            with running(Server, *options) as server:
                wait_until(lambda server=server: server.health()["rows"] > 0)
                times.append(time.monotonic() - began)
                memory.append(memory_mb(server.process.pid))
        rows.append(
            [title, f"{statistics.median(times):.1f} s", f"{statistics.median(memory):,} MB"]
        )
    table("From process start to the first row (median of 3)", ["engine", "time", "memory"], rows)


# ---------------------------------------------------------------------------------------------
# History.


async def draw(client, table, **config):
    """Make a view and fetch all of it, as a panel that is drawn; returns its rows."""
    view = await (await client.open_table(table)).view(**config)
    arrow = await view.to_arrow()
    await view.delete()
    return pyarrow.ipc.open_stream(arrow).read_all().num_rows


def the_history(clickhouse):
    bench = Bench(clickhouse, "history")
    ticks, day_ms = 10_000_000, 86_400_000
    bench.insert(ticks, first_ms=time.time() * 1000 - day_ms - 10_000, step_ms=day_ms / ticks)
    answers, drawn = [], 0
    with (
        serving(bench) as server,
        running(Script, "producer.py", "--dsn", bench.dsn),
        Viewer(server.url) as viewer,
        Viewer(server.url, "/history") as first,
        Viewer(server.url, "/history") as second,
    ):
        for name, config in HISTORY_PANELS.items():
            times = []
            for asking in (first, second):
                began = time.perf_counter()
                rows = asking.run(draw(asking.client, **config), 120)
                times.append(f"{(time.perf_counter() - began) * 1000:,.0f} ms")
            answers.append([name, f"{rows:,}", *times])

        arrivals = Arrivals(viewer)
        time.sleep(1)
        start = time.perf_counter()
        time.sleep(10)
        idle = arrivals.gaps(start, time.perf_counter())
        start = time.perf_counter()
        while time.perf_counter() < start + 10:
            for config in HISTORY_PANELS.values():
                first.run(draw(first.client, **config), 120)
                drawn += 1
        busy = arrivals.gaps(start, time.perf_counter())
    bench.drop()
    table(
        f"History panels over {ticks:,} rows of one day",
        ["panel", "rows of the answer", "first answer", "another viewer asks the same after it"],
        answers,
    )
    table(
        "The live updates at a subscribed viewer meanwhile, at the default rate",
        ["history", "updates", "median gap", "worst gap"],
        [
            [title, len(gaps) - 1, f"{statistics.median(gaps):.0f} ms", f"{max(gaps):.0f} ms"]
            for title, gaps in (
                ("idle, 10 s", idle),
                (f"busy, {drawn} panels one after the other", busy),
            )
        ],
    )


SECTIONS = {
    "original": against_the_original,
    "limit": against_the_limit,
    "latency": latency,
    "table": growth_with_the_table,
    "viewers": growth_with_viewers,
    "producer": the_producer,
    "start": start_up,
    "history": the_history,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    chosen = parser.parse_args().sections or list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    logging.disable(logging.CRITICAL)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},"
        f" perspective-python {perspective.__version__}, load {os.getloadavg()[0]:.1f} at the start"
    )
    began = time.monotonic()
    for name in chosen:
        section = time.monotonic()
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            ClickHouseProcess(folder) as clickhouse,
        ):
            SECTIONS[name](clickhouse)
        print(f"\n({name}: {time.monotonic() - section:.0f} s)", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
