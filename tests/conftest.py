"""Fixtures that start real processes: ClickHouse over HTTP, the two scripts, and viewers."""

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import clickhouse_connect
import perspective
import pyarrow
import pytest
from clickhouse_http import ClickHouseProcess
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClosedError, websocket_connect

import producer

ROOT = Path(__file__).parent.parent
HOUR = 3_600_000  # ms
STATUS = "server status"  # the table that says what /healthz says, and more
COLUMNS = ["timestamp", "ticker", "client", "open", "high", "low", "close", "volume", "date"]


def pytest_collection_modifyitems(items):
    """Put those marked `long` first."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


# Below those that the system gives to others, and a thousand for each process of pytest.
ports = itertools.count(15_000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw9")[2:]))


def free_port():
    """A TCP port that nobody listens on, and that nobody else is given."""
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def now_ms():
    return int(time.time() * 1000)


def wait_until(check, what=None, seconds=60):
    """Call `check` until it returns something true, and return that; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what() if callable(what) else what or check}")
        time.sleep(0.05)


class Script:
    """One of the scripts as a process of its own; `lines` is what it has printed so far."""

    def __init__(self, name, *arguments, env=None):
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / name), *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {}),
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, text, seconds=60):
        """Wait until `text` has been printed."""
        wait_until(lambda: text in self.output, f"{text!r} in\n{self.output}", seconds)

    def wait(self, seconds=60):
        """Wait for the end; returns the exit status."""
        status = self.process.wait(seconds)
        self.reader.join()
        self.process.stdout.close()
        return status

    def stop(self, number=signal.SIGTERM, seconds=60):
        """Send a signal; returns the exit status, which must come in time.

        The promised three seconds are for tests that run alone.
        """
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def kill(self):
        self.process.kill()
        self.wait()

    def close(self):
        if self.process.poll() is None:
            self.kill()

    @contextlib.contextmanager
    def paused(self):
        """The process does nothing."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def memory(self):
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Server(Script):
    """perspective_server.py as a process, on a port of its own."""

    def __init__(self, *arguments, port=None, env=None, script="perspective_server.py"):
        self.port = port or free_port()
        self.url = f"http://localhost:{self.port}"
        super().__init__(script, "--port", self.port, *arguments, env=env)
        try:
            self.wait_for("open http://")
        except BaseException:
            self.kill()
            raise

    def get(self, path, headers=None):
        """GET a path; returns (status, headers, body)."""
        request = urllib.request.Request(self.url + path, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def health(self):
        return json.loads(self.get("/healthz")[2])

    def wait_for_delivered(self, rows, seconds=60):
        wait_until(
            lambda: self.health()["delivered"] >= rows, f"{rows} rows in {self.health()}", seconds
        )


# Changes for `changed_server`. With a tenth of the time, a run of 5 s would mean 50 s of rest.
QUICK_HISTORY = {"interval=30": "interval=3", "ROLLUP_SHARE = 0.1": "ROLLUP_SHARE = 0.5"}
QUICK = {"interval=1,": "interval=0.2,", "interval=30,": "interval=0.2,"}
QUICK["ROLLUP_SHARE = 0.1"] = "ROLLUP_SHARE = 0.5"


def changed_server(folder, changes):
    """Copy the scripts with strings replaced, {old: new}; returns the path of the copied server."""
    unused = set(changes)
    for name in ("producer.py", "perspective_server.py", "prsp-viewer.html"):
        text = (ROOT / name).read_text()
        unused -= {old for old in unused if old in text}
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / name).write_text(text)
    assert not unused
    return folder / "perspective_server.py"


def quick_rollups(folder, entries=""):
    """Copy the server with these rollups, too, and all as quick as the machine."""
    return changed_server(folder, QUICK | {"\nROLLUPS = [": f"\nROLLUPS = [{entries}"})


def patched_server(folder, code):
    """Write a script that runs `code`, and then the server, in one process; returns its path."""
    script = folder / "patched_server.py"
    run = f"runpy.run_path({str(ROOT / 'perspective_server.py')!r}, run_name='__main__')"
    path = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    script.write_text(f"{code}\n{path}{run}\n")
    return script


async def connect(url):
    """Return a websocket to a server, and a Perspective client that sends on it."""
    address = "ws" + url.removeprefix("http") + "/websocket"
    socket = await websocket_connect(address, max_message_size=1 << 30)

    async def send(message):
        with contextlib.suppress(WebSocketClosedError):
            await socket.write_message(bytes(message), binary=True)

    return socket, perspective.AsyncClient(send)


class Connection:
    """A Perspective client on a real websocket, with an event loop in a thread of its own."""

    def __init__(self, url):
        self.url, self.closed = url, threading.Event()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.run(self._connect())

    def run(self, coroutine, seconds=60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    async def _connect(self):
        self.socket, self.client = await connect(self.url)
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self):
        while (message := await self.socket.read_message()) is not None:
            if isinstance(message, bytes):
                await self.client.handle_response(message)
        self.closed.set()

    def tables(self):
        return self.run(self.client.get_hosted_table_names())

    def table(self, name="stock_values"):
        return self.run(self.client.open_table(name))

    def close(self):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.socket.close)
            self.closed.wait(10)  # Tornado waits 5 s for the other side
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class Mirror:
    """A viewer that stays: it mirrors all tables of a server by snapshot, deltas and removals, and
    connects again when it is cut off. This is what the page does, in Python.

    `tables` holds {name: {index: {column: value}}}; times are ms since 1970, dates days. `received`
    counts each row of the live table that came in a delta: a row that comes twice counts twice.
    `removals` counts its rows that were removed, `snapshots` the connections that were complete,
    `updates` the deltas by table, and `gaps` has the seconds between two of the live table's.
    """

    def __init__(self, url, live="stock_values"):
        self.url, self.live = url, live
        self.tables, self.received = {}, collections.Counter()
        self.snapshots, self.removals, self.updates = 0, 0, collections.Counter()
        self.gaps, self.last = [], None
        self.lock, self.ended = threading.Lock(), threading.Event()
        following = self._keep_following()
        self.thread = threading.Thread(target=asyncio.run, args=[following], daemon=True)
        self.thread.start()

    async def _keep_following(self):
        self.loop = asyncio.get_running_loop()
        while not self.ended.is_set():
            with contextlib.suppress(OSError, HTTPClientError):
                await self._follow()
            self.last = None
            await asyncio.sleep(0.1)

    async def _follow(self):
        """Follow over one connection, until it ends."""
        self.socket, client = await connect(self.url)
        mirroring = asyncio.ensure_future(self._mirror_all(client))
        try:
            while message := not self.ended.is_set() and await self.socket.read_message():
                await client.handle_response(message)
        finally:
            mirroring.cancel()

    async def _mirror_all(self, client):
        while self.live not in (names := await client.get_hosted_table_names()):
            await asyncio.sleep(0.1)
        for name in names:
            await self._mirror(client, name)
        self.snapshots += 1

    async def _mirror(self, client, name):
        source = await client.open_table(name)
        view, index = await source.view(), source.get_index()
        waiting = []  # changes that come before the snapshot

        def change(step, arrow):
            rows = decoded(arrow)
            if waiting is None:
                self._apply(name, step, index, rows)
            else:
                waiting.append((step, rows))

        await view.on_update(lambda _, arrow: change("update", arrow), mode="row")
        await view.on_remove(lambda _, arrow: change("remove", arrow))
        snapshot = decoded(await view.to_arrow())
        with self.lock:
            self.tables[name] = {row[index]: row for row in snapshot}
        for step, rows in waiting:
            if step == "remove":  # the snapshot may lack them already
                rows = [row for row in rows if row[index] in self.tables[name]]
            self._apply(name, step, index, rows)
        waiting = None

    def _apply(self, name, step, index, rows):
        with self.lock:
            table = self.tables[name]
            if step == "remove":
                self.removals += len(rows) * (name == self.live)
                for row in rows:
                    del table[row[index]]
                return
            table.update((row[index], row) for row in rows)
            self.updates[name] += 1
            if name == self.live:
                self.received.update(map(as_tick, rows))
                now = time.monotonic()
                if self.last:
                    self.gaps.append(now - self.last)
                self.last = now

    def rows(self):
        """The live table as a Counter of tuples in the order of COLUMNS."""
        with self.lock:
            return collections.Counter(map(as_tick, self.tables.get(self.live, {}).values()))

    def table(self, name):
        """A mirrored table: {index: {column: value}}."""
        with self.lock:
            return dict(self.tables.get(name, {}))

    def status(self):
        """The one row of the status table, None if it did not come yet."""
        return next(iter(self.table(STATUS).values()), None)

    def wait_for_rows(self, rows, seconds=60):
        wait_until(lambda: len(self.table(self.live)) == rows, f"{rows} rows", seconds)

    def wait_for_more(self, rows, seconds=60):
        """Wait until so many rows came in deltas from now on."""
        rows += self.received.total()
        wait_until(lambda: self.received.total() >= rows, f"{rows} rows", seconds)

    def close(self):
        self.ended.set()
        with contextlib.suppress(AttributeError, RuntimeError):  # never connected, or ended
            self.loop.call_soon_threadsafe(self.socket.close)
        self.thread.join(10)


def decoded(arrow):
    """Rows of Arrow, a stream or a table, as {column: value}; times in ms, dates in days."""
    if isinstance(arrow, bytes):
        arrow = pyarrow.ipc.open_stream(arrow).read_all()
    columns = {}
    for name, column in zip(arrow.column_names, arrow.columns, strict=True):
        if pyarrow.types.is_timestamp(column.type):
            column = column.cast(pyarrow.timestamp("ms")).cast(pyarrow.int64())
        elif pyarrow.types.is_date(column.type):
            column = column.cast(pyarrow.date32()).cast(pyarrow.int32())
        columns[name] = column.to_pylist()
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def as_tick(row):
    """A row as a tuple in the order of COLUMNS."""
    return tuple(row.get(name) for name in COLUMNS)


def counted(arrow):
    """The ticks of Arrow as a Counter of tuples."""
    return collections.Counter(map(as_tick, decoded(arrow)))


block_numbers = itertools.count(1)


class Database:
    """A database of its own on a ClickHouse; it is not created yet."""

    def __init__(self, process, name=None):
        self.process = process
        self.name = name or f"test_{uuid.uuid4().hex[:8]}"
        self.dsn = process.dsn_of(self.name)

    @functools.cached_property
    def client(self):
        return clickhouse_connect.get_client(dsn=self.process.dsn_of(), compress=False)

    def create_table(self):
        """Create the database and the empty table, as the producer does."""
        producer.create_table(self.client, self.name)

    def insert(self, rows=100, at=None, step=1, into="stock_values"):
        """Insert a block of different rows, stamped `at` (or now), and each `step` ms later."""
        at = now_ms() if at is None else at
        self.command(
            f"INSERT INTO {into} (timestamp, ticker, client, open, high, low, close, volume, date)"
            f" SELECT fromUnixTimestamp64Milli(toInt64({at} + number * {step}), 'UTC') AS time,"
            " ['AAPL.N', 'MSFT.N', 'TLT.N'][number % 3 + 1], 'Homer', 2, 3.25, 1,"
            f" 2.5 + number % 5 / 10, {next(block_numbers)} * 100000 + number, time"
            f" FROM numbers({rows}) SETTINGS max_block_size = 1000000"
        )

    def fill(self, rows, span_ms=60_000):
        """Create the table, and insert the producer's ticks of the `span_ms` before now."""
        maker = producer.Producer(self.dsn, 1, rows, seed=1)
        maker.open()
        maker.insert(maker.market.draw(rows, now_ms() - span_ms, span_ms), "old")
        maker.client.close()

    def command(self, sql):
        """Run SQL in which `stock_values` is named without its database."""
        return self.client.command(sql.replace("stock_values", f"{self.name}.stock_values"))

    def ask(self, sql, **options):
        """Return the rows of an answer as tuples; `stock_values` is named without its database."""
        sql = sql.replace("stock_values", f"{self.name}.stock_values")
        return [tuple(row) for row in self.client.query(sql, **options).result_rows]

    def rows(self, order=""):
        """All rows of stock_values as ClickHouse has them; see `counted`."""
        sql = f"SELECT {', '.join(COLUMNS)} FROM {self.name}.stock_values {order}"
        return counted(self.client.query_arrow(sql))

    def count(self):
        return int(self.command("SELECT count() FROM stock_values"))

    def close(self):
        self.client.command(f"DROP DATABASE IF EXISTS {self.name}")
        self.client.close()


def follow(start, dsn, *options, mirrors=1, live="stock_values", complete=True, **more):
    """Start a server and viewers that stay, and wait until their mirrors are complete."""
    server = start(Server, "--dsn", dsn, "--interval", 0.05, *options, **more)
    viewers = [start(Mirror, server.url, live) for _ in range(mirrors)]
    if complete:
        wait_until(lambda: all(viewer.snapshots for viewer in viewers), lambda: server.output)
    return server, viewers


@pytest.fixture(scope="session")
def clickhouse(tmp_path_factory):
    """A ClickHouse over HTTP, in a process of its own, for the whole run."""
    with ClickHouseProcess(tmp_path_factory.mktemp("clickhouse")) as process:
        yield process


@contextlib.contextmanager
def starting():
    """Yield start(Server, ...), which starts a script, a viewer or whatever has a `close`."""
    with contextlib.ExitStack() as stack:

        def start(kind, *arguments, **options):
            started = kind(*arguments, **options)
            stack.callback(started.close)
            return started

        yield start


@pytest.fixture
def start():
    """Starts what is ended after the test."""
    with starting() as start:
        yield start


@pytest.fixture(scope="module")
def start_once():
    """Starts what all tests of a module use."""
    with starting() as start:
        yield start


@pytest.fixture
def database(clickhouse, start):
    """A database name that no other test uses; the producer creates it."""
    return start(Database, clickhouse)


@pytest.fixture
def table(database):
    """A database with the empty table in it."""
    database.create_table()
    return database


class Site:
    """A database with ten minutes of old ticks, a producer, and a server with a small window."""

    limit = 5000  # rows: so few that new ones soon overwrite others

    def __init__(self, clickhouse):
        self.database = Database(clickhouse)
        self.database.fill(2 * self.limit, 600_000)
        ticks = ("--seed", 7, "--interval", 0.5, "--rows", 500)
        self.producer = Script("producer.py", "--dsn", self.database.dsn, *ticks)
        self.options = ["--dsn", self.database.dsn, "--limit", self.limit]
        self.server = Server(*self.options)
        self.url = self.server.url

    def paused(self):
        """The producer does nothing."""
        return self.producer.paused()

    def close(self):
        for thing in (self.server, self.producer, self.database):
            thing.close()


@pytest.fixture(scope="module")
def site(clickhouse, start_once):
    return start_once(Site, clickhouse)


@pytest.fixture(scope="module")
def browser():
    from browser import QUICK_START, launched  # here, as that module imports this one

    with launched(QUICK_START) as browser:
        if browser is None:
            end = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            end("no Chromium: install it, or run `playwright install chromium`")
        yield browser


@pytest.fixture
def visit(browser):
    """Opens pages: visit(url, state, ...). After the test, none of them has complained."""
    from browser import Tab

    contexts, tabs = [], []

    def open_tab(url, state="live", beside=None, init=None, width=1200, **options):
        """A tab in a browser profile of its own, or in that of the tab `beside` it."""
        if beside is None:
            size = {"width": width, "height": 760}
            contexts.append(browser.new_context(viewport=size, **options))
        tab = Tab(beside.page.context if beside else contexts[-1], init)
        tabs.append(tab)
        tab.page.goto(url)
        if state:
            tab.wait_for(state)
        if state == "live":
            tab.wait_for_cells()
        return tab

    yield open_tab
    try:
        for tab in tabs:
            tab.check()
    finally:
        for tab in tabs:
            tab.page.goto("about:blank")  # so that no page that is closed loses its graphics first
        for context in contexts:
            context.close()
