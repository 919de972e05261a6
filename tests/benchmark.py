"""How fast it is, at the viewer: python tests/benchmark.py [SECTION ...]

Prints Markdown tables with the targets, and whether they were met. Server and producer are
processes, viewers are websockets and Chromium, and ClickHouse is tests/clickhouse_http.py in a
process of its own. All run on the same cores, so read the ratios, not the figures. All sections
take some eight minutes and 4 GB of disk.
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy
import perspective
import pyarrow
import pyarrow.compute
from browser import launched
from clickhouse_http import ClickHouseProcess
from conftest import Database, Script, Server, free_port, wait_until

import producer

INTERVAL = 0.25  # seconds between inserts, and between polls: the default
WINDOW = 25_000  # rows in the live table: the default
ROOMY = 500_000  # rows in the live table where none is to be overwritten before it is sent
GRACE = 1  # seconds after the last insert in which all rows have to come
LIVE = producer.TABLE
TABLES = [LIVE, *(f"{LIVE}_{name}" for name in ("tickers", "candles", "history", "status"))]
SPAWN = multiprocessing.get_context("spawn")


def table(title, head, rows):
    """Print a Markdown table; the columns of head and rows are separated by | already."""
    print("", f"### {title}", "", f"| {head} |", re.sub("[^|]+", " --- ", f"| {head} |"), sep="\n")
    print(*(f"| {row} |" for row in rows), sep="\n", flush=True)


def target(text, met):
    return f"{text}: {'met' if met else '**missed**'}"


def stat(pid):
    """The fields of /proc/PID/stat that stand behind the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds(*pids):
    """Processor time of processes and their threads so far."""
    ticks = sum(int(ticks) for pid in pids for ticks in stat(pid)[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def shares(seconds, *groups):
    """The share of a core that each group of processes uses, during so many seconds."""
    before, began = [cpu_seconds(*group) for group in groups], time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    return [(cpu_seconds(*g) - old) / took for g, old in zip(groups, before, strict=True)]


# ---------------------------------------------------------------------------------------------
# Viewers that cost little: they mirror tables as the page does, on a bare socket, but only note
# what comes. The requests are those of Perspective's protocol, see perspective_server.py.


def field(number, value):
    """Encode a short field of a protobuf message."""
    tag = number << 3 | (0 if isinstance(value, int) else 2)
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + (bytes([value]) if isinstance(value, int) else bytes([len(value)]) + value)


def frame(message):
    """A websocket frame, masked with zeros."""
    return bytes([0x82, 0x80 | len(message), 0, 0, 0, 0]) + message


@functools.lru_cache(8)
def decoded(name, arrow):
    """Number of rows; and of ticks their volumes, which number them, and the newest time in ms.

    Most viewers receive the same bytes, so this costs little for many of them.
    """
    rows = pyarrow.ipc.open_stream(arrow).read_all()
    if name != LIVE or not rows.num_rows:
        return rows.num_rows, numpy.empty(0), 0
    times = rows.column("timestamp").cast(pyarrow.timestamp("ms")).cast(pyarrow.int64())
    return rows.num_rows, rows.column("volume").to_numpy(), pyarrow.compute.max(times).as_py()


class BareViewer:
    """A viewer. `kind` may be "silent", who reads nothing after the snapshots, or "flood"."""

    def __init__(self, port, tables, kind, number):
        self.port, self.tables, self.kind = port, tables, kind
        self.name = f"{os.getpid()}-{number}"  # of its views
        self.mirrored, self.first = set(), {}  # tables, and when their first rows came
        self.deltas, self.lag, self.newest = [], 0, time.time() * 1000

    async def run(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        writer.write(
            f"GET /websocket HTTP/1.1\r\nHost: localhost:{self.port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        for number, name in enumerate(self.tables):
            view = f"{self.name}-{number}".encode()
            requests = [field(2, name.encode()) + field(6, field(1, view))]  # make a view
            for request in (field(21, field(1, 0)), field(39, b""), field(16, field(1, b""))):
                requests.append(field(2, view) + request)  # on update, on remove, to Arrow
            for kind, request in enumerate(requests):
                writer.write(frame(field(1, 4 * number + kind + 1) + request))
        while True:
            head, length = await reader.readexactly(2)
            if length > 125:
                length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
            message = await reader.readexactly(length)
            number, kind = divmod(message[1] - 1, 4)  # an answer carries the request's number
            if head & 15 == 2 and kind in (1, 3):
                self.note(self.tables[number], kind, message)
            if len(self.mirrored) == len(self.tables) and self.kind == "silent":
                await asyncio.sleep(3600)
            while len(self.mirrored) == len(self.tables) and self.kind == "flood":
                writer.write(frame(field(1, 3) + field(2, LIVE.encode()) + field(8, b"")) * 1000)
                await writer.drain()

    def note(self, name, kind, message):
        arrow = message[message.index(b"\xff\xff\xff\xff") :]  # which a stream begins with
        rows, volumes, newest = decoded(name, arrow)
        if rows:
            self.first.setdefault(name, time.monotonic())
        if kind == 3:
            self.mirrored.add(name)
        elif name == LIVE:
            now_ms = time.time() * 1000
            self.lag, self.newest = max(self.lag, now_ms - self.newest), max(self.newest, newest)
            self.deltas.append((time.monotonic(), volumes[volumes > 0]))

    def report(self):
        """What came since the last report: when and up to which row, how many rows, how many
        different ones; how old the newest tick became; and when each table had its first rows."""
        deltas, lag = self.deltas, max(self.lag, time.time() * 1000 - self.newest)
        self.deltas, self.lag = [], 0
        ids = numpy.concatenate([[], *(volumes for _, volumes in deltas)])
        arrivals = [(when, max(volumes, default=0)) for when, volumes in deltas]
        return arrivals, len(ids), len(numpy.unique(ids)), lag, self.first


async def watch(pipe, port, size, *options):
    """Run viewers; each message through the pipe asks for their reports."""
    viewers = [BareViewer(port, *options, number) for number in range(size)]
    tasks = [asyncio.create_task(viewer.run()) for viewer in viewers]
    while any(len(viewer.mirrored) < len(viewer.tables) for viewer in viewers):
        await asyncio.sleep(0.01)
    pipe.send("mirrored")
    while True:
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        if lost := [task.exception() for task in tasks if task.done()]:
            print(f"({len(lost)} viewers lost their connections: {lost[0]!r})")
        pipe.send([viewer.report() for viewer in viewers])


def run_child(main, *arguments):
    logging.disable(logging.CRITICAL)
    asyncio.run(main(*arguments))


class Child:
    """An async function in a process of its own, which answers when it is asked."""

    def __init__(self, main, *arguments):
        self.pipe, theirs = SPAWN.Pipe()
        arguments = (main, theirs, *arguments)
        self.process = SPAWN.Process(target=run_child, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # so that a child that dies ends our waiting
        self.pipe.recv()  # it is ready

    def ask(self):
        self.pipe.send("")
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.join()


def viewers_of(port, size=1, tables=TABLES, kind=None):
    return Child(watch, port, size, tables, kind)


# ---------------------------------------------------------------------------------------------
# What the sections share.


class Ticks:
    """A table in a database of its own, whose rows are numbered by their volume."""

    def __init__(self, clickhouse, filled=WINDOW):
        database = Database(clickhouse)
        self.dsn, self.name = database.dsn, producer.full_name(database.name)
        self.client, self.last = producer.connect(self.dsn, send_receive_timeout=600), 0
        producer.create_table(self.client, database.name)
        if filled:  # in a full window, each new row replaces one
            self.insert(filled, time.time() * 1000 - filled - 10_000, filled, numbered=False)

    def command(self, sql):
        self.client.command(sql.format(table=self.name))

    def insert(self, rows, first_ms=None, span_ms=1000 * INTERVAL, numbered=True):
        """Insert rows that ClickHouse draws, stamped up to now if not told otherwise."""
        first_ms = time.time() * 1000 - span_ms if first_ms is None else first_ms
        tickers, clients = list(producer.LEVELS), producer.CLIENTS
        self.command(
            "INSERT INTO {table} SELECT fromUnixTimestamp64Milli("
            f"toInt64({first_ms} + number * {span_ms / rows}), 'UTC') AS time,"
            f" {tickers}[rand(1) % 13 + 1], {clients}[rand(2) % 9 + 1],"
            " 100 + rand(3) % 100 / 100 AS o, o + 0.5, o - 0.5, o + rand(4) % 100 / 200,"
            f" {numbered:d} * ({self.last} + 1 + number), toDate(time) FROM numbers({rows})"
        )
        self.last += rows * numbered

    def insert_at(self, rate, seconds):
        """Insert at a rate for so long. Returns the number of rows, which may be smaller."""
        before, began = self.last, time.monotonic()
        for number in range(round(seconds / INTERVAL)):
            time.sleep(max(0, began + number * INTERVAL - time.monotonic()))
            if time.monotonic() > began + seconds:
                break
            self.insert(round(rate * INTERVAL))
        return self.last - before


@contextlib.contextmanager
def running(kind, *arguments):
    """A script as a process that ends with the block."""
    script = kind(*arguments)
    try:
        if kind is Server:
            wait_until(lambda: script.health()["rows"], 60, "rows")
        yield script
    finally:
        script.stop(seconds=20)


# ---------------------------------------------------------------------------------------------
# 1 and 2: beside the original design, in windows of the same size.


async def serve_original(pipe, dsn, port):
    """The original design: re-read the last second's rows every 250 ms, as records."""
    from perspective.handlers.tornado import PerspectiveTornadoHandler
    from tornado.web import Application

    server, client = perspective.Server(), producer.connect(dsn)
    sql = f"SELECT * FROM {producer.full_name(producer.split_dsn(dsn)[1])}"
    kinds = dict.fromkeys(producer.COLUMNS, "float") | {"timestamp": "datetime", "date": "date"}
    kinds |= {"ticker": "string", "client": "string", "volume": "integer"}
    live = server.new_local_client().table(kinds, name=LIVE, limit=ROOMY)
    live.update(client.raw_query(sql, fmt="ArrowStream"))
    route = ("/websocket", PerspectiveTornadoHandler, {"perspective_server": server})
    Application([route]).listen(port, "127.0.0.1")
    handed, recent = 0, f"{sql} WHERE timestamp >= now() - INTERVAL 1 SECOND"
    pipe.send("serving")
    while True:
        began = time.monotonic()
        result = client.query(recent, query_formats={"DateTime64": "int", "Date": "int"})
        records = [row | {"date": row["date"] * 86_400_000} for row in result.named_results()]
        live.update(records)
        handed += len(records)
        await asyncio.sleep(max(0.01, began + INTERVAL - time.monotonic()))
        if pipe.poll():
            pipe.recv()
            pipe.send(handed)


@contextlib.contextmanager
def original(ticks):
    """Gives the port, the tables, and a function that tells how many rows Perspective was given."""
    port = free_port()
    with Child(serve_original, ticks.dsn, port) as server:
        yield port, [LIVE], server.ask


@contextlib.contextmanager
def relay(ticks, limit=ROOMY):
    with running(Server, "--dsn", ticks.dsn, "--limit", limit) as server:
        yield server.port, TABLES, lambda: server.health()["delivered"]


@contextlib.contextmanager
def trial(clickhouse, design):
    """Gives a function that inserts at a rate, and returns the number of rows that were inserted;
    and for each of them: rows given to Perspective, that came to a viewer, different ones."""
    ticks = Ticks(clickhouse, ROOMY)
    with design(ticks) as (port, tables, handed), viewers_of(port, 1, tables) as viewers:

        def insert(rate, seconds):
            viewers.ask()
            before, rows = handed(), ticks.insert_at(rate, seconds)
            time.sleep(GRACE)
            [(_, came, distinct, *_)] = viewers.ask()
            return rows, *(count / rows for count in (handed() - before, came, distinct))

        yield insert
    ticks.command("DROP TABLE {table} SYNC")


def rows_delivered(clickhouse):
    rates, rows = (1_000, 10_000, 100_000), []
    for name, design in {
        "original": original,
        "this": relay,
        f"this, window {WINDOW:,}": functools.partial(relay, limit=WINDOW),
    }.items():
        with trial(clickhouse, design) as insert:
            results = [insert(rate, 4)[1:] for rate in rates]
        cells = " | ".join("{:.2f}, {:.2f}, {:.1%}".format(*result) for result in results)
        met = {share for result in results for share in result} == {1}
        rows.append(f"{name} | {cells} | {target('1.00, and all', met) if name == 'this' else ''}")
    title = "Rows given to Perspective and rows that came to a viewer, for each row inserted, and"
    title += f" the share of all rows among them (window {ROOMY:,})"
    table(title, f"design | {' | '.join(f'{rate:,} rows/s' for rate in rates)} | target", rows)


def highest_rate(clickhouse):
    held = []
    for design, rate in ((original, 1_000), (relay, 40_000)):
        with trial(clickhouse, design) as insert:

            def holds(rate, seconds, insert=insert):
                rows, *_, distinct = insert(rate, seconds)
                return rows > 0.95 * rate * seconds and distinct > 0.999

            while holds(rate, 3):
                rate *= 2
            while rate > 100:
                rate /= 1.3
                time.sleep(2)  # what is left of the last trial
                if holds(rate, 3) and holds(rate, 20):
                    break
        held.append(rate)
    ratio = held[1] / held[0]
    title = "Highest rate held for 20 s: a viewer has all rows a second after the last insert"
    cells = f"{held[0]:,.0f} rows/s | {held[1]:,.0f} rows/s | {ratio:.1f}"
    goal = target(">= 10", ratio >= 10)
    table(f"{title} (window {ROOMY:,})", "original | this | ratio | target", [f"{cells} | {goal}"])


# ---------------------------------------------------------------------------------------------
# 3 to 5: latency, many viewers, large tables.


def latency(clickhouse):
    rows = []
    for interval, median, high in ((0.25, 150, 280), (0.05, 40, 100)):
        ticks, inserted = Ticks(clickhouse), []
        options = "--dsn", ticks.dsn, "--interval", interval
        with running(Server, *options) as server, viewers_of(server.port) as viewers:
            began = time.monotonic()
            for number in range(100):  # each at another phase of the polls
                due = began + (number + random.random()) * INTERVAL
                time.sleep(max(0, due - time.monotonic()))
                ticks.insert(250)
                inserted.append((time.monotonic(), ticks.last))
            time.sleep(2)
            [(arrivals, *_)] = viewers.ask()
        waits = []
        for confirmed, last in inserted:
            came = next(when for when, newest in arrivals if newest >= last)
            waits.append(1000 * max(0, came - confirmed))
        waits.sort()
        found = statistics.median(waits), waits[math.ceil(0.99 * len(waits)) - 1]
        cells = f"{found[0]:.0f} ms | {found[1]:.0f} ms | {waits[-1]:.0f} ms"
        met = found[0] <= median and found[1] <= high
        rows.append(f"{interval} s | {cells} | {target(f'<= {median}, {high} ms', met)}")
    title = "From ClickHouse's confirmation of an insert until a viewer has its rows (1,000 rows/s)"
    table(title, "`--interval` | median | 99 % | worst | target", rows)


def many_viewers(clickhouse, sizes=(1, 10, 50, 200, 500)):
    ticks, rows, seconds = Ticks(clickhouse), [], 8
    feeding = running(Script, "producer.py", "--dsn", ticks.dsn)
    with running(Server, "--dsn", ticks.dsn) as server, feeding:
        for size in sizes:
            with viewers_of(server.port, size) as viewers:
                time.sleep(1)
                viewers.ask()
                share, own = shares(seconds, [server.process.pid], [viewers.process.pid])
                reports = viewers.ask()
                status = Path(f"/proc/{server.process.pid}/status").read_text()
            memory = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024
            rates = [len(arrivals) / seconds for arrivals, *_ in reports]
            slowest, fastest, lag = min(rates), max(rates), max(report[3] for report in reports)
            goal = {
                200: target("slowest >= 3.8, share <= 70 %", slowest >= 3.8 and share <= 0.7),
                500: target("slowest >= half of the fastest", slowest >= fastest / 2),
            }.get(size, "")
            cells = f"{slowest:.1f} | {fastest:.1f} | {lag / 1000:.1f} s | {share:.0%}"
            rows.append(f"{size:,} | {cells} | {memory} MB | {own:.0%} | {goal}")
    title = "Viewers that mirror all tables, at 4 inserts of 250 rows a second"
    head = "viewers | updates/s of the slowest | of the fastest | age of the newest tick, at worst"
    head += " | server's share of a core | its memory | the viewers' own share | target"
    table(title, head, rows)


def growth(clickhouse, sizes=(1_000_000, 10_000_000, 100_000_000)):
    ticks, rows, first = Ticks(clickhouse, filled=0), [], {}
    ticks.command("SYSTEM STOP MERGES {table}")
    now_ms, held = time.time() * 1000, 0
    for size in sizes:
        while held < size:  # a tick a millisecond, older and older
            some = min(10_000_000, size - held)
            held += some
            ticks.insert(some, now_ms - held, some, numbered=False)
        for state in ("fresh parts", "merged"):
            if state == "merged":
                ticks.command("SYSTEM START MERGES {table}")
                ticks.command("OPTIMIZE TABLE {table} FINAL")
                ticks.command("SYSTEM STOP MERGES {table}")
            poll, starts = poll_and_start(ticks)
            ratio = poll / first.setdefault(state, poll)
            goal = target("<= 1.5", ratio <= 1.5) if size == sizes[-1] else ""
            rows.append(f"{size:,} | {state} | {poll:.0f} ms | {ratio:.2f} | {goal} | {starts}")
    ticks.command("DROP TABLE {table} SYNC")
    title = "A poll with 250 new rows; and the time from the server's start until a viewer has rows"
    head = "rows in the table | state | poll (median) | ratio to the first | target"
    table(title, f"{head} | live | tickers | candles | history", rows)


def poll_and_start(ticks):
    """The median time of a poll in ms; and the times until the tables have rows, as text."""
    began, times, first = time.monotonic(), [], {}
    with running(Server, "--dsn", ticks.dsn) as server, viewers_of(server.port) as viewers:
        while len(times) < 15 or len(first) < len(TABLES):
            before = server.health()["delivered"]
            ticks.insert(250)
            wait_until(lambda before=before: server.health()["delivered"] > before, 30, "the rows")
            time.sleep(0.06)  # this poll has ended now, and the next one has not begun
            times.append(server.health()["poll_ms"])
            first = viewers.ask()[0][-1]
    starts = " | ".join(f"{first[name] - began:.1f} s" for name in TABLES[:-1])
    return statistics.median(times), starts


# ---------------------------------------------------------------------------------------------
# 6 to 8: the page, what all of it costs, isolation.

# Each page notes what the first row of the grid of the newest ticks shows, and when.
WATCH_GRID = """
Object.assign(window, { first: null, seen: [[0, 0]], oldest: 0, stall: 0 });
let before = performance.now();
setInterval(() => {
    const now = performance.now();
    stall = Math.max(stall, now - before);
    before = now;
    const grid = document.querySelector("perspective-viewer-datagrid[slot=newestTicks]");
    const cells = grid?.shadowRoot.querySelector("tbody tr")?.cells;
    if (!cells?.[7]) return;
    first ??= now;
    const shown = new Date(`1970-01-01T${cells[0].textContent}Z`).getTime();
    oldest = Math.max(oldest, Date.now() % 86_400_000 - shown);
    const volume = Number(cells[7].textContent.replaceAll(",", ""));
    if (volume !== seen.at(-1)[1]) seen.push([Date.now(), volume]);
}, 10);
"""


@contextlib.contextmanager
def pages():
    """Gives a function that opens a page in Chromium, and waits for its first row."""
    with launched() as browser:
        size = {"width": 1440, "height": 900}
        context = browser.new_context(viewport=size, timezone_id="UTC", locale="en-GB")
        context.add_init_script(WATCH_GRID)

        def open_page(url):
            page = context.new_page()
            page.goto(url)
            wait_until(lambda: page.evaluate("first"), 60, "the first row")
            return page

        yield open_page


def chromium_pids():
    """All processes of Chromium that this one has started."""
    family, found = {os.getpid()}, []
    for pid in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            if int(stat(pid)[1]) in family:
                family.add(pid)
                if "chrom" in Path(f"/proc/{pid}/comm").read_text():
                    found.append(pid)
    return found


def page(clickhouse):
    ticks, rows, firsts, waits = Ticks(clickhouse), [], [], []
    with running(Server, "--dsn", ticks.dsn) as server, pages() as open_page:
        for _ in range(4):
            tab = open_page(server.url)
            firsts.append(tab.evaluate("first"))
            tab.wait_for_timeout(1000)
            tab.close()
        cold, warm = firsts[0], statistics.median(firsts[1:])
        goal = target("<= 2,000 ms", warm <= 2000)
        rows.append(f"first row with a cold and a warm cache | {cold:.0f}, {warm:.0f} ms | {goal}")

        tab, inserted = open_page(server.url), []
        ticks.insert_at(1000, 5)
        for _ in range(50):
            time.sleep(random.uniform(0.1, 0.4))
            first = ticks.last + 1
            ticks.insert(250)
            inserted.append((time.time() * 1000, first))
        tab.wait_for_timeout(2000)
        seen = tab.evaluate("seen")
        for confirmed, first in inserted:
            came = next(when for when, number in seen if number >= first)
            waits.append(max(0, came - confirmed))
        median, worst = statistics.median(waits), max(waits)
        goal = target("<= 300, 600 ms", median <= 300 and worst <= 600)
        rows.append(
            f"insert to grid, median and worst of 50 | {median:.0f}, {worst:.0f} ms | {goal}"
        )

        for rate in (1_000, 10_000, 100_000):
            ticks.insert_at(rate, 2)
            tab.evaluate("oldest = stall = 0")
            pids, began = chromium_pids(), time.monotonic()
            before = cpu_seconds(*pids)
            held = ticks.insert_at(rate, 8) / (time.monotonic() - began)
            share = (cpu_seconds(*pids) - before) / (time.monotonic() - began)
            oldest, stall = tab.evaluate("[oldest, stall]")
            cells = f"{share:.0%} of a core, rows at most {oldest / 1000:.1f} s old, hangs at most"
            goals = {1_000: target("<= 45 %", share <= 0.45)}
            goals[100_000] = target("rows <= 2 s old", oldest <= 2000)
            goal = goals.get(rate, "")
            rows.append(f"at {rate:,} rows/s ({held:,.0f}) | {cells} {stall:.0f} ms | {goal}")
    table("The page in Chromium, software rendering included", "what | measured | target", rows)


def cost(clickhouse):
    ticks, rows, seconds = Ticks(clickhouse), [], 12
    feeding = running(Script, "producer.py", "--dsn", ticks.dsn)
    with running(Server, "--dsn", ticks.dsn) as server, feeding as feed, viewers_of(server.port):
        time.sleep(2)
        ours, database = [server.process.pid, feed.process.pid], [clickhouse.process.pid]
        both, beside = shares(seconds, ours, database)
    with running(Server, "--embedded") as server, viewers_of(server.port):
        time.sleep(2)
        [embedded] = shares(seconds, [server.process.pid])
    rows.append(f"server and producer | {both:.1%} | {target('<= 4 %', both <= 0.04)}")
    rows.append(f"ClickHouse beside them | {beside:.1%} | {target('<= 15 %', beside <= 0.15)}")
    rows.append(f"`--embedded`, all in one | {embedded:.1%} | {target('<= 20 %', embedded <= 0.2)}")
    title = "Share of a core at the default rate, with one viewer"
    table(title, "processes | share of a core | target", rows)


WORST_PIVOT = """document.querySelector("perspective-viewer").restore(
    { group_by: ["ticker"], split_by: ["timestamp"], columns: ["close", "volume"] },
    { panel: "newestTicks" }), 0"""


def isolation(clickhouse):
    ticks = Ticks(clickhouse)
    with (
        running(Server, "--dsn", ticks.dsn) as server,
        running(Script, "producer.py", "--dsn", ticks.dsn),
        viewers_of(server.port, 3) as others,
        viewers_of(server.port, kind="silent"),
        viewers_of(server.port, kind="flood"),
        pages() as open_page,
    ):
        tab = open_page(server.url)
        time.sleep(2)
        others.ask()
        tab.evaluate(WORST_PIVOT)
        time.sleep(10)
        reports = others.ask()
    arrivals = [[when for when, _ in arrivals] for arrivals, *_ in reports]
    gap = max(b - a for times in arrivals for a, b in zip(times, times[1:], strict=False))
    title = "One tab is busy with its worst pivot, a viewer reads nothing, another one floods"
    goal = target("<= two intervals, 500 ms", gap <= 2 * INTERVAL)
    table(title, "longest gap of three others in 10 s | target", [f"{1000 * gap:.0f} ms | {goal}"])


SECTIONS = {
    "rows": rows_delivered,
    "rate": highest_rate,
    "latency": latency,
    "viewers": many_viewers,
    "growth": growth,
    "page": page,
    "cost": cost,
    "isolation": isolation,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--thousand", action="store_true", help="1,000 viewers, too")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    logging.disable(logging.CRITICAL)
    versions = f"Python {platform.python_version()}, perspective-python {perspective.__version__}"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {load}")
    began = time.monotonic()
    for name in options.sections or SECTIONS:
        section, more = time.monotonic(), {}
        if name == "viewers" and options.thousand:
            more = {"sizes": (1, 10, 50, 200, 500, 1000)}
        with tempfile.TemporaryDirectory() as folder, ClickHouseProcess(folder) as clickhouse:
            SECTIONS[name](clickhouse, **more)
        print(f"\n({name}: {time.monotonic() - section:.0f} s)", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
