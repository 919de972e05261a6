"""How fast it is, beside the original design and beside what the parts allow.

    python tests/benchmark.py [SECTION ...]

Prints Markdown tables. Everything is measured side by side in one run, on a real engine over HTTP,
with the real server as a process and viewers on real websockets; so read the ratios, not the
figures. The engine is chDB behind tests/clickhouse_http.py, on the same cores as everything else.
"""

import argparse
import asyncio
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import perspective
import pyarrow
from clickhouse_http import ClickHouseProcess
from conftest import Script, Server, Viewer, free_port, wait_until

import perspective_server
import producer

INTERVAL = 0.25  # seconds, of inserts and polls: the default
SECONDS = 6  # that a rate is held for
RATES = [1_000, 10_000, 100_000]
LADDER = [1_000, 3_000, 10_000, 30_000, 100_000, 200_000, 400_000, 800_000]
COLUMNS = ", ".join(producer.COLUMNS)

# The dashboard's views, as the page asks for them.
LAST = ["max by", ["timestamp"]]
DASHBOARD = [
    {
        "group_by": ["ticker"],
        "group_rollup_mode": "flat",
        "columns": ["last", "change", "high", "low", "volume"],
        "expressions": {"last": '"close"', "change": 'log("close" / "open")'},
        "aggregates": {"last": LAST, "change": "sum", "high": "max", "low": "min"},
    },
    {
        "columns": ["timestamp", "ticker", "client", "open", "high", "low", "close", "volume"],
        "sort": [["timestamp", "desc"]],
    },
    {
        "filter": [["ticker", "==", "AAPL.N"]],
        "group_by": ["time"],
        "expressions": {
            "time": 'datetime(bucket(float("timestamp"), 2000))',
            "price": '"open"',
        },
        "columns": ["price", "close", "high", "low"],
        "aggregates": {
            "price": ["min by", ["timestamp"]],
            "close": LAST,
            "high": "max",
            "low": "min",
        },
    },
    {"group_by": ["client"], "split_by": ["ticker"], "columns": ["volume"]},
]


def table(title, head, *rows):
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    print("|", " | ".join(head), "|")
    print("|", " | ".join("---" for _ in head), "|")
    for row in rows:
        print("|", " | ".join(str(cell) for cell in row), "|")
    sys.stdout.flush()


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cpu_seconds(pid):
    """Processor time of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


class Bench:
    """A ClickHouse with the table, and a way to insert ticks that costs little."""

    def __init__(self, clickhouse, name):
        self.dsn = clickhouse.dsn_of(name)
        self.name = producer.full_name(name)
        self.client = producer.connect(self.dsn)
        producer.create_table(self.client, name, reset=True)
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

    def arrow(self, rows):
        """A prepared Arrow stream of ticks."""
        sql = f"SELECT {COLUMNS} FROM {self.name} LIMIT {rows}"
        return self.client.raw_query(sql, fmt="ArrowStream", settings=perspective_server.ARROW)

    def inserted(self):
        return int(self.client.command(f"SELECT count() FROM {self.name}"))

    def hold(self, rate, seconds=SECONDS):
        """Insert at a rate. Returns the rows inserted, or None if that fell behind itself."""
        started, rows = time.monotonic(), 0
        for batch in range(1, round(seconds / INTERVAL) + 1):
            self.insert(round(rate * INTERVAL), step_ms=INTERVAL * 1000 / (rate * INTERVAL))
            rows += round(rate * INTERVAL)
            ahead = started + batch * INTERVAL - time.monotonic()
            if ahead < -1:
                return None
            time.sleep(max(0, ahead))
        return rows


# ---------------------------------------------------------------------------------------------
# The two designs that ask by time window. Each is a server of its own, in a process of its own.


def baseline(kind, dsn, port, connection):
    """Re-read the rows of the last second every 250 ms; "records" as a DataFrame turned into a
    list of dicts, which is the original design; "arrow" as Arrow bytes.

    The work is done on the IO loop, as there. Sends [rows handed over, distinct rows] at the end.
    """
    import tornado.web
    from perspective.handlers.tornado import PerspectiveTornadoHandler

    async def serve():
        server = perspective.Server()
        client = producer.connect(dsn)
        source = producer.full_name(producer.split_dsn(dsn)[1])
        query = f"SELECT {COLUMNS} FROM {source} WHERE timestamp >= now() - INTERVAL 1 SECOND"
        empty = client.raw_query(f"{query} LIMIT 0", fmt="ArrowStream")
        live = server.new_local_client().table(empty, name=producer.TABLE)
        application = tornado.web.Application(
            [(r"/websocket", PerspectiveTornadoHandler, {"perspective_server": server})]
        )
        application.listen(port, "127.0.0.1")
        connection.send("ready")
        handed = 0
        while not connection.poll():
            began = time.monotonic()
            if kind == "records":
                records = client.query_df(query).to_dict("records")
                handed += len(records)
                live.update(records)
            else:
                before = live.size()
                live.update(client.raw_query(query, fmt="ArrowStream"))
                handed += live.size() - before
            await asyncio.sleep(max(0, began + INTERVAL - time.monotonic()))
        asked = connection.recv()
        while asked != "end":
            arrived = pyarrow.ipc.open_stream(live.view().to_arrow()).read_all()
            names = [name for name in arrived.column_names if name != "date"]
            distinct = arrived.group_by(names).aggregate([]).num_rows
            connection.send([handed, distinct])
            asked = connection.recv()

    logging.disable(logging.CRITICAL)
    asyncio.run(serve())


class Baseline:
    def __init__(self, kind, bench):
        self.mine, theirs = multiprocessing.get_context("spawn").Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=baseline, args=(kind, bench.dsn, free_port(), theirs)
        )
        self.process.start()
        assert self.mine.recv() == "ready"

    def result(self):
        """(rows handed over, distinct rows that arrived)."""
        self.mine.send("result")
        handed, distinct = self.mine.recv()
        self.mine.send("end")
        self.process.join()
        return handed, distinct


class Ours:
    def __init__(self, kind, bench):
        self.server = Server("--dsn", bench.dsn)
        wait_until(lambda: self.server.health()["clickhouse"] == "up")

    def result(self):
        delivered = self.server.health()["delivered"]
        self.server.stop()
        return delivered, delivered  # that none is twice or amiss is what the tests show


def against_the_original(clickhouse):
    designs = {"original (records by window)": (Baseline, "records")}
    designs |= {"Arrow by window": (Baseline, "arrow"), "this one (Arrow by block)": (Ours, "")}
    shares, highest = {}, {}
    for title, (design, kind) in designs.items():
        for rate in LADDER:
            bench = Bench(clickhouse, "versus")
            running = design(kind, bench)
            rows = bench.hold(rate)
            time.sleep(2 * INTERVAL)
            handed, arrived = running.result()
            if rows:
                shares[title, rate] = (handed / rows, arrived / rows)
            # Some ticks are alike in all columns, so not quite all can be told apart.
            held = rows is not None and arrived >= 0.995 * rows
            if held:
                highest[title] = rate
            elif rate > max(RATES):
                break
    table(
        "Rows handed to Perspective for each row inserted (share of the rows that arrived)",
        ["design", *(f"{rate:,} rows/s" for rate in RATES), "highest rate held", "ratio"],
        *(
            [
                title,
                *(
                    "{:.2f} ({:.0%})".format(*shares[title, rate])
                    if (title, rate) in shares
                    else "-"
                    for rate in RATES
                ),
                f"{highest.get(title, 0):,}",
                f"{highest.get(title, 0) / highest['original (records by window)']:.0f}",
            ]
            for title in designs
        ),
    )


# ---------------------------------------------------------------------------------------------


def open_tail(bench, limit=100_000):
    """The server's Tail in this process, its window read."""
    tail = perspective_server.Tail(perspective.Server(), bench.dsn, INTERVAL, limit)
    tail.poll()
    return tail


def against_the_limit(clickhouse):
    rows, polls = 25_000, 20
    bench = Bench(clickhouse, "limit")
    bench.insert(rows * 4)
    arrow = bench.arrow(rows)
    live = perspective.Server().new_local_client().table(arrow, limit=100_000)
    tail = open_tail(bench)
    engine, database, ours = [], [], []
    for _ in range(polls):  # in turn, so that a noisy minute hits all three
        began = time.perf_counter()
        live.update(arrow)
        engine.append(time.perf_counter() - began)

        began = time.perf_counter()
        bench.arrow(rows)
        database.append(time.perf_counter() - began)

        bench.insert(rows)
        began = time.perf_counter()
        tail.poll()
        ours.append(time.perf_counter() - began)
    assert tail.delivered == 100_000 + polls * rows
    engine, database, ours = (rows / statistics.median(times) for times in (engine, database, ours))
    tail.close()
    table(
        f"Against the limit, in batches of {rows:,} rows, window 100,000",
        ["Perspective alone", "ClickHouse alone", "this tail", "share of the smaller"],
        [
            *(f"{rate:,.0f} rows/s" for rate in (engine, database, ours)),
            f"{ours / min(engine, database):.2f}",
        ],
    )


def latency(clickhouse):
    rows = []
    for rate in (1_000, 100_000):
        bench = Bench(clickhouse, "latency")
        bench.insert(1000)
        server = Server("--dsn", bench.dsn)
        wait_until(lambda server=server: server.health()["clickhouse"] == "up")
        waits, batch = [], round(rate * INTERVAL)
        with Viewer(server.url) as viewer:
            seen, arrived = [0], threading.Condition()

            def on_update(port, delta, seen=seen, arrived=arrived):
                with arrived:
                    seen[0] += pyarrow.ipc.open_stream(delta).read_all().num_rows
                    arrived.notify_all()

            async def subscribe(viewer=viewer, on_update=on_update):
                view = await (await viewer.client.open_table(producer.TABLE)).view()
                await view.on_update(on_update, mode="row")

            viewer.run(subscribe())
            chance = numpy.random.default_rng(1)
            for number in range(1, 61):
                time.sleep(chance.uniform(0, INTERVAL))  # or all would hit the same phase
                bench.insert(batch)
                confirmed = time.perf_counter()
                with arrived:
                    assert arrived.wait_for(lambda: seen[0] >= number * batch, 10)  # noqa: B023
                waits.append((time.perf_counter() - confirmed) * 1000)
        server.stop()
        rows.append(
            [
                f"{rate:,} rows/s",
                *(f"{percentile(waits, share):.0f} ms" for share in (0.5, 0.99)),
                f"{max(waits):.0f} ms",
                f"{INTERVAL * 1000:.0f} ms",
            ]
        )
    table(
        "From ClickHouse's confirmation until a subscribed viewer holds the rows (60 inserts)",
        ["rate", "median", "99th percentile", "worst", "poll interval"],
        *rows,
    )


def growth_with_the_table(clickhouse):
    rows, results = 0, []
    bench = Bench(clickhouse, "growth")
    start_ms = time.time() * 1000 - 100e6  # a tick a millisecond, up to now
    for size in (1_000_000, 10_000_000, 100_000_000):
        while rows < size:
            chunk = min(5_000_000, size - rows)
            bench.insert(chunk, first_ms=start_ms + rows, step_ms=1)
            rows += chunk
        for state in ("unmerged", "merged"):
            if state == "merged":
                bench.client.command(
                    f"OPTIMIZE TABLE {bench.name} FINAL", settings={"max_execution_time": 0}
                )
            tail, times = open_tail(bench), []
            for _ in range(20):
                bench.insert(250)
                began = time.perf_counter()
                tail.poll()
                times.append((time.perf_counter() - began) * 1000)
            tail.close()
            results.append([f"{size:,}", state, statistics.median(times)])
    first = {state: ms for size, state, ms in results if size == "1,000,000"}
    table(
        "A poll with 250 new rows, as the table grows",
        ["rows in the table", "parts", "median", "ratio to 1,000,000"],
        *([size, state, f"{ms:.1f} ms", f"{ms / first[state]:.2f}"] for size, state, ms in results),
    )
    bench.client.command(f"DROP TABLE {bench.name} SYNC")


def crowd(url, size, seconds, connection):
    """`size` viewers in a process of their own, each with the dashboard's views. Like the page,
    each fetches what it shows whenever a view has changed. Sends [updates, worst gap] of each."""

    async def watch(viewer, stats):
        panel = await viewer.client.open_table(producer.TABLE)

        async def show(config):
            view, changed = await panel.view(**config), asyncio.Event()
            loop = asyncio.get_running_loop()
            await view.on_update(lambda *_: loop.call_soon_threadsafe(changed.set))
            last = time.monotonic()
            while True:
                await changed.wait()
                changed.clear()
                await view.to_arrow(start_row=0, end_row=50)
                now = time.monotonic()
                stats.append((now, now - last))
                last = now

        await asyncio.gather(*(show(config) for config in DASHBOARD))

    viewers = [Viewer(url) for _ in range(size)]
    stats = [[] for _ in viewers]
    tasks = [
        asyncio.run_coroutine_threadsafe(watch(viewer, stat), viewer.loop)
        for viewer, stat in zip(viewers, stats, strict=True)
    ]
    connection.send("ready")
    time.sleep(3)
    for stat in stats:
        stat.clear()
    time.sleep(seconds)
    connection.send(
        [
            (len(stat) / len(DASHBOARD) / seconds, max((gap for _, gap in stat), default=seconds))
            for stat in stats
        ]
    )
    connection.recv()
    for task in tasks:
        task.cancel()
    os._exit(0)


def growth_with_viewers(clickhouse):
    rows, seconds = [], 8
    for size in (1, 10, 50, 200):
        bench = Bench(clickhouse, "viewers")
        server = Server("--dsn", bench.dsn)
        feeding = Script("producer.py", "--dsn", bench.dsn)
        wait_until(lambda server=server: server.health()["rows"] > 2000)
        mine, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=crowd, args=(server.url, size, seconds, theirs)
        )
        process.start()
        mine.recv()
        time.sleep(3)
        cpu, began = cpu_seconds(server.process.pid), time.monotonic()
        stats = mine.recv()
        share = (cpu_seconds(server.process.pid) - cpu) / (time.monotonic() - began)
        health, memory = server.health(), memory_mb(server.process.pid)
        mine.send("end")
        process.join()
        feeding.stop()
        wait_until(lambda: server.health()["delivered"] == bench.inserted())  # noqa: B023
        server.stop()
        rows.append(
            [
                size,
                f"{statistics.median(rate for rate, _ in stats):.1f}",
                f"{min(rate for rate, _ in stats):.1f}",
                f"{max(gap for _, gap in stats) * 1000:.0f} ms",
                f"{health['lag_ms']} ms",
                f"{share:.0%}",
                f"{memory:,} MB",
            ]
        )
    table(
        "Viewers, each with the dashboard's four views, at the default rate (4 inserts a second)",
        ["viewers", "updates/s", "least", "worst gap", "lag", "server's share of a core", "memory"],
        *rows,
    )


def the_producer(clickhouse):
    bench = Bench(clickhouse, "producer")
    rows, batches = 100_000, 20
    began = time.monotonic()
    fast = Script(
        "producer.py", "--dsn", bench.dsn, "--rows", rows, "--batches", batches, "--interval", 0.001
    )
    assert fast.wait(120) == 0
    rate = rows * batches / (time.monotonic() - began)
    server = Server("--dsn", bench.dsn)
    slow = Script("producer.py", "--dsn", bench.dsn)
    with Viewer(server.url) as viewer:
        wait_until(lambda: server.health()["clickhouse"] == "up")

        async def show():
            opened = await viewer.client.open_table(producer.TABLE)
            for config in DASHBOARD:
                view = await opened.view(**config)
                loop = asyncio.get_running_loop()

                async def fetch(view=view):
                    await view.to_arrow(start_row=0, end_row=50)

                def update(*_, loop=loop, fetch=fetch):
                    asyncio.run_coroutine_threadsafe(fetch(), loop)

                await view.on_update(update)

        viewer.run(show())
        time.sleep(2)
        pids = [slow.process.pid, server.process.pid]
        cpu, began = [cpu_seconds(pid) for pid in pids], time.monotonic()
        time.sleep(15)
        took = time.monotonic() - began
        shares = [(cpu_seconds(pid) - before) / took for pid, before in zip(pids, cpu, strict=True)]
    slow.stop()
    server.stop()
    table(
        "Cost",
        [
            "producer at full speed",
            "producer at the default rate",
            "server at the default rate, one viewer with the dashboard",
            "both",
        ],
        [
            f"{rate:,.0f} rows/s",
            *(f"{share:.1%} of a core" for share in (*shares, sum(shares))),
        ],
    )


def start_up(clickhouse):
    bench = Bench(clickhouse, "start")
    bench.insert(1000)
    rows = []
    for title, options in (
        ("embedded", ["--embedded"]),
        ("ClickHouse over HTTP", ["--dsn", bench.dsn]),
    ):
        began = time.monotonic()
        server = Server(*options)
        wait_until(lambda server=server: server.health()["rows"] > 0)
        took = time.monotonic() - began
        rows.append([title, f"{took:.1f} s", f"{memory_mb(server.process.pid):,} MB"])
        server.stop()
    table("From process start to the first row", ["engine", "time", "memory then"], *rows)


SECTIONS = {
    "original": against_the_original,
    "limit": against_the_limit,
    "latency": latency,
    "viewers": growth_with_viewers,
    "producer": the_producer,
    "start": start_up,
    "table": growth_with_the_table,
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
        with (
            tempfile.TemporaryDirectory() as folder,
            ClickHouseProcess(folder) as clickhouse,
        ):
            SECTIONS[name](clickhouse)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
