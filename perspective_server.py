"""Tail the table `stock_values` of ClickHouse into Perspective, and serve it to browsers.

Data enters at the left and never turns back: ClickHouse -> Tail -> Perspective table -> viewers.
Run `python perspective_server.py --help` for the options; without a ClickHouse at hand, run
`python perspective_server.py --embedded`.
"""

import asyncio
import base64
import collections
import contextlib
import hashlib
import ipaddress
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import perspective
from perspective.handlers.tornado import PerspectiveTornadoHandler
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamBufferFullError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler, StaticFileHandler
from tornado.websocket import WebSocketClosedError

import producer
from producer import COLUMNS, LONGEST_PAUSE, QUERY_TIMEOUT, TABLE, TableMismatch, reason

log = logging.getLogger("perspective_server")

# ---------------------------------------------------------------------------------------------
# The tail. MergeTree numbers its insert blocks in the order in which they become visible, and
# keeps the number with every row. So the number of the newest block is a cursor: the rows that
# came since the last poll are those with `cursor < _block_number <= head`, whatever timestamp
# they carry and however parts were merged meanwhile. The head is metadata, so asking for it costs
# the same at any table size. And metadata checks the answer: as many rows must have come as the
# parts have grown by. If not, something other than an insert happened (rows deleted, a table
# truncated or recreated), and the window is read anew.


class Mark(NamedTuple):
    """What metadata says of the table at one moment."""

    table_id: str  # another one: the table was recreated
    changes: tuple  # (newest mutation, mutations not done yet); another one: rows were rewritten
    head: int  # number of the newest insert block
    rows: int  # rows in all active parts


# The scalar subqueries are answered before the parts are listed, so a mutation that starts in
# between is seen at the next poll. A database engine without UUIDs says zero: there, the time
# of the last change of the table's definition stands in.
MARK = """
SELECT
    (SELECT if(uuid = toUUID('00000000-0000-0000-0000-000000000000'),
               toString(metadata_modification_time), toString(uuid))
     FROM system.tables WHERE database = {database:String} AND name = {table:String}),
    (SELECT (max(toUInt64OrZero(extract(mutation_id, '[0-9]+'))), countIf(NOT is_done))
     FROM system.mutations WHERE database = {database:String} AND table = {table:String}),
    max(max_block_number),
    sum(rows)
FROM system.parts
WHERE active AND database = {database:String} AND table = {table:String}
"""
LATE_MS = 600_000  # rows stamped up to ten minutes back are found by the primary key
ARROW = {"output_format_arrow_low_cardinality_as_dictionary": 1}


class Tail:
    """Keeps the newest `limit` rows of the table in the Perspective table of the same name.

    `run` polls every `interval` seconds until `stop` is set; it is meant for a thread of its own.
    `error` is set if the table cannot be worked with from the start.
    """

    def __init__(self, perspective_server, dsn, interval, limit):
        self.perspective = perspective_server.new_local_client()
        self.dsn, self.database = dsn, producer.split_dsn(dsn)[1]
        self.source = producer.full_name(self.database)
        self.interval, self.limit = interval, limit
        self.stop = threading.Event()
        self.client = self.table = self.mark = self.error = None
        self.since = 0  # ms: rows stamped before need the slow way
        self.clickhouse, self.said = "down", None
        self.rows = self.delivered = 0
        self.lag_ms = self.poll_ms = None
        self.began = time.monotonic()  # of the last poll
        self.arrivals = collections.deque([(time.monotonic(), 0)], maxlen=1000)
        self.reloaded = False

    def poll(self):
        """Bring the Perspective table up to date. Returns "up" or "no table"; may raise anything.

        After an exception the next poll goes on from the last rows that Perspective has taken.
        """
        now_ms = time.time() * 1000
        if self.client is None:
            self.client = producer.connect(self.dsn)
        mark = self.read_mark()
        if mark.table_id is None:
            return "no table"
        if mark != self.mark:
            appended = self.append(mark)
            if not appended:
                self.reload(mark)
            self.reloaded = not appended
        self.since = int(now_ms) - LATE_MS
        return "up"

    def read_mark(self):
        parameters = {"database": self.database, "table": TABLE}
        return Mark(*self.client.query(MARK, parameters=parameters).result_rows[0])

    def append(self, mark):
        """Hand the rows between the cursor and the head to Perspective.

        Returns False if that would not make the live table agree with ClickHouse.
        """
        old = self.mark
        if old is None or mark[:2] != old[:2] or mark.head <= old.head:
            return False
        blocks = f"_block_number > {old.head} AND _block_number <= {mark.head}"
        # The bound on the timestamp lets the primary key skip everything older. If the count
        # says that rows came later than that, all blocks are searched.
        for bound in (f" AND timestamp >= fromUnixTimestamp64Milli({self.since})", ""):
            came, newest = self.client.query(
                f"SELECT count(), toUnixTimestamp64Milli(max(timestamp)) FROM {self.source}"
                f" WHERE {blocks}{bound}",
                settings={"max_execution_time": QUERY_TIMEOUT},
            ).result_rows[0]
            if came == mark.rows - old.rows:
                break
        else:
            return False
        if came:
            arrow = self.read(
                f"SELECT {', '.join(COLUMNS)} FROM {self.source} WHERE {blocks}{bound}"
                f" ORDER BY _block_number, _block_offset"
                f" LIMIT {self.limit} OFFSET {max(0, came - self.limit)}"
            )
            self.hand_over(self.table.update, arrow)
            self.delivered += min(came, self.limit)
            self.lag_ms = round(time.time() * 1000 - newest)
            self.arrivals.append((time.monotonic(), min(came, self.limit)))
        self.mark = mark
        return True

    def reload(self, mark):
        """Make the newest rows by timestamp the content of the Perspective table."""
        if self.mark is None or mark.table_id != self.mark.table_id:
            producer.check_table(self.client, self.database)
        columns = ", ".join(COLUMNS)
        window = self.read(
            f"SELECT {columns} FROM"
            f" (SELECT {columns}, _block_number, _block_offset FROM {self.source}"
            f"  WHERE _block_number <= {mark.head} ORDER BY timestamp DESC LIMIT {self.limit})"
            " ORDER BY timestamp, _block_number, _block_offset"
        )
        if self.table is None:
            self.table = self.perspective.table(window, name=TABLE, limit=self.limit)
            self.rows = self.table.size()
            log.info("%s rows shown of %s.%s", f"{self.rows:,}", self.database, TABLE)
        else:
            self.hand_over(self.table.replace, window)
            if not self.reloaded:
                log.info("the table was changed: its newest %s rows read anew", f"{self.rows:,}")
        self.delivered += self.rows
        self.mark = mark

    def read(self, sql):
        """Rows as the bytes of one Arrow stream: none of them becomes a Python object."""
        settings = ARROW | {"max_execution_time": QUERY_TIMEOUT}
        return self.client.raw_query(sql, fmt="ArrowStream", settings=settings)

    def hand_over(self, change, arrow):
        # If Perspective fails half-way, only a fresh window is sure to be right: no cursor then.
        self.mark = None
        change(arrow)
        self.rows = self.table.size()

    def run(self):
        """Poll until stopped, whatever happens; after failures with growing pauses."""
        pause = 0
        while not self.stop.is_set():
            self.began = time.monotonic()
            error = None
            try:
                state = self.poll()
            except TableMismatch as mismatch:
                state, error = "no table", mismatch
                if self.table is None:
                    self.error = error
                    break
            except Exception as failure:
                state, error = "down", failure
                self.close()
            took = time.monotonic() - self.began
            self.poll_ms = round(took * 1000, 1)
            self.tell(state, error)
            if state == "up":
                pause = 0
            elif producer.is_fatal(error):
                pause = LONGEST_PAUSE
            else:
                pause = min(max(2 * pause, self.interval), LONGEST_PAUSE)
            self.stop.wait(pause or max(0, self.interval - took))
        self.close()

    def tell(self, state, error):
        """Log a change of state, once."""
        said, self.said = self.said, (state, error.code if producer.is_fatal(error) else None)
        self.clickhouse = state
        if said == self.said:
            return
        if state == "down":
            log.warning("ClickHouse is away, trying again: %s", producer.explain(error))
        elif state == "no table":
            log.warning(error or f"no table {self.database}.{TABLE} yet: start producer.py")
        elif said and said[0] == "down":
            log.info("ClickHouse is back")

    def close(self):
        if self.client is not None:
            with contextlib.suppress(Exception):
                self.client.close()
            self.client = None

    def rows_per_second(self, seconds=5):
        now = time.monotonic()
        arrivals = [(when, rows) for when, rows in list(self.arrivals) if when > now - seconds]
        return round(sum(rows for _, rows in arrivals) / seconds)

    def health(self):
        """What /healthz says, without the viewers."""
        stuck = time.monotonic() - self.began > self.interval + 2 * LONGEST_PAUSE
        return {
            "clickhouse": "down" if stuck else self.clickhouse,
            "table": TABLE,
            "rows": self.rows,
            "delivered": self.delivered,
            "rows_per_second": self.rows_per_second(),
            "lag_ms": self.lag_ms,
            "poll_ms": self.poll_ms,
        }


# ---------------------------------------------------------------------------------------------
# The guard. Whoever can send to a Perspective session can do anything, so a viewer's messages are
# read before the engine sees them. Each is one protobuf `Request`: field 1 the message's id, field
# 2 the table or view it is about, and one more field whose number says what is asked. Numbers:
# rust/perspective-client/perspective.proto in the Perspective repository. What is not known to
# read is refused, with Perspective's own error, and the connection goes on.

READS = {3, 4, 7, 8, 9, 17, 29, 30, 37, 41}  # features, tables, schema, size, expressions, ...
VIEW_READS = {*range(10, 17), *range(18, 27), 34, 35, 36}
MAKE_PORT, MAKE_VIEW, VALIDATE, DELETE_VIEW = 5, 6, 9, 11
SUBSCRIBES = {4, 21, 29, 34}  # each costs a callback until the session ends
SERVER_ERROR, VIEW_NOT_FOUND = 50, 1

MAX_VIEWERS = 500
MAX_VIEWS = 100  # of one viewer; the dashboard holds about ten
MAX_SUBSCRIPTIONS = 2000  # of one viewer
MAX_MESSAGE = 1 << 20  # bytes from a viewer; the dashboard's are below 10 kB
MAX_UNREAD = 64 << 20  # bytes that wait for a viewer to read them
MAX_EXPRESSION = 1000  # characters in the expressions of one view
PING_SECONDS = 30  # a viewer that answers no ping for so long is gone

# An expression is computed for every row while the stream waits. With a loop, or a vector to walk
# over, one short line can hold it for minutes. A comment could hide the vector's bracket.
ENDLESS = re.compile(rb"\b(for|while|repeat)\b|\bvar\b[^:;]*(\[|/\*|//|#)", re.IGNORECASE)


class Refused(Exception):
    """A viewer asks for what it may not have. The text is for the person at the viewer."""

    def __init__(self, text, status=0):
        super().__init__(text)
        self.status = status  # Perspective's StatusCode: 0 server error, 1 view not found


def fields(message):
    """Take a protobuf message apart: yields (number, value), a value being int or bytes.

    https://protobuf.dev/programming-guides/encoding/ ; raises ValueError if it is malformed.
    """
    at = 0

    def varint():
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(message):
                break
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("malformed number")

    while at < len(message):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else len(message) + 1)
        if at + size > len(message):
            raise ValueError("malformed field")
        yield number, bytes(message[at : at + size])
        at += size


def field(number, value):
    """The opposite of `fields`, for one field."""

    def varint(value):
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


class Guard:
    """Decides what one session may ask. `owners` maps every view of any session to its guard.

    Perspective's views are the server's: any session could read or delete another's by its name.
    """

    def __init__(self, owners):
        self.owners = owners
        self.views = set()
        self.subscriptions = 0
        self.making = None  # the view that the engine has not confirmed yet

    def check(self, message):
        """Returns None if the engine may have the message, else the answer to send instead."""
        head = b""
        try:
            asked = {}
            for number, value in fields(message):
                if number in asked:  # the engine would take the last one
                    raise Refused("malformed message: a field stands twice")
                asked[number] = value
            message_id, entity = asked.pop(1, 0), asked.pop(2, b"")
            head = field(1, message_id) + field(2, entity)
            if len(asked) != 1 or not isinstance(message_id, int):
                raise Refused("malformed message: it must ask for one thing")
            [(number, body)] = asked.items()
            if number == MAKE_PORT:
                # A port tells a writer its own updates from others'. Readers need none, and each
                # would slow down every update until the server ends. So all are told the same.
                return head + field(MAKE_PORT, field(1, 1))
            self.judge(number, entity, body)
        except Refused as refused:
            error = field(1, str(refused).encode()) + field(2, refused.status)
            return head + field(SERVER_ERROR, error)
        except (ValueError, TypeError):
            return head + field(SERVER_ERROR, field(1, b"malformed message"))
        return None

    def judge(self, number, entity, body):
        if number in VIEW_READS or number == DELETE_VIEW:
            if entity not in self.views:
                raise Refused("View not found", VIEW_NOT_FOUND)
            if number == DELETE_VIEW:
                self.forget(entity)
        elif number == MAKE_VIEW:
            self.judge_expressions(
                entry
                for inner, config in fields(body)
                if inner == 2
                for part, entry in fields(config)
                if part == 6
            )
            [view] = (value for inner, value in fields(body) if inner == 1)
            if view in self.owners:
                raise Refused("a view of that name exists")
            if len(self.views) >= MAX_VIEWS:
                raise Refused(f"no more than {MAX_VIEWS} views at once: delete some")
            self.owners[view] = self
            self.views.add(view)
            self.making = view
        elif number not in READS:
            raise Refused("this table is read-only")
        elif number == VALIDATE:
            self.judge_expressions(entry for inner, entry in fields(body) if inner == 1)
        if number in SUBSCRIBES:
            self.subscriptions += 1
            if self.subscriptions > MAX_SUBSCRIPTIONS:
                raise Refused(f"no more than {MAX_SUBSCRIPTIONS} subscriptions: connect anew")

    def judge_expressions(self, entries):
        texts = [value for entry in entries for part, value in fields(entry) if part == 2]
        if sum(map(len, texts)) > MAX_EXPRESSION:
            raise Refused(f"the expressions are longer than {MAX_EXPRESSION} characters")
        if any(map(ENDLESS.search, texts)):
            raise Refused("expressions with loops or vectors would hold up the stream")

    def heard(self, answer):
        """Looks at what the engine answers: a view that it did not make does not count."""
        if self.making and any(number == SERVER_ERROR for number, _ in fields(answer)):
            self.forget(self.making)
        self.making = None

    def forget(self, view):
        self.views.discard(view)
        self.owners.pop(view, None)

    def release(self):
        """The session ends, and its views with it."""
        for view in list(self.views):
            self.forget(view)


# ---------------------------------------------------------------------------------------------
# The handlers. All of them answer only to the host names that the server is meant to have: a
# foreign name pointed at this address (DNS rebinding) would make a foreign page look like ours.

HERE = Path(__file__).parent
PAGE = HERE / "prsp-viewer.html"
# The browser build that matches the engine to the digit comes in the wheel of perspective-python.
BROWSER_BUILD = Path(perspective.__file__).parent / "widget" / "static"
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Hub:
    """What the handlers share: the tail, the Perspective server, and the viewers that are there.

    `address` is where the server listens; `origins` are the pages that may connect besides the
    server's own, with "null" for a page from disk.
    """

    def __init__(self, tail, perspective_server, address, origins):
        self.tail, self.perspective_server = tail, perspective_server
        self.origins = set(origins)
        self.hosts = LOOPBACK | {address} | {urlsplit(origin).hostname for origin in origins}
        self.everywhere = address in ("", "0.0.0.0", "::")
        self.viewers, self.owners = set(), {}
        self.executor = ThreadPoolExecutor(max_workers=4, thread_name_prefix="viewers")

    def knows_host(self, host):
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if self.everywhere and name not in self.hosts:
            with contextlib.suppress(ValueError):
                return bool(ipaddress.ip_address(name))  # no name, so nobody can point it here
        return name in self.hosts

    def knows_origin(self, origin, host):
        return origin in self.origins or origin == f"http://{host}"


class Ours:
    """Mixin of all handlers: the host is known, and other origins get what they may have."""

    hub = None
    stranger = 404

    def initialize(self, hub):
        self.hub = hub

    def prepare(self):
        try:
            known = self.hub.knows_host(self.request.host)
        except ValueError:
            known = False
        if not known:
            self.set_status(self.stranger)
            self.finish(f"{self.stranger}: this server does not have that name\n")
            return
        origin = self.request.headers.get("Origin")
        if origin and self.hub.knows_origin(origin, self.request.host):
            self.set_header("Access-Control-Allow-Origin", origin)

    def set_default_headers(self):
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Vary", "Origin")


class NotFound(Ours, RequestHandler):
    """Everything that is not in the table of routes."""

    def get(self):
        self.send_error(404)

    head = post = get

    def write_error(self, status, **_):
        self.set_header("Content-Type", "text/plain")
        self.finish(f"{status}\n")


class Page(Ours, RequestHandler):
    """The page, with a policy that allows its own script and what Perspective needs."""

    def get(self):
        page = PAGE.read_bytes()
        [script] = re.findall(rb"<script[^>]*>(.*?)</script>", page, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(script).digest()).decode()
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.set_header("Cache-Control", "no-cache")
        self.set_header(
            "Content-Security-Policy",
            "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
            f" script-src 'self' 'wasm-unsafe-eval' 'sha256-{checksum}';"
            " worker-src blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
            " font-src 'self' data:; connect-src 'self'",
        )
        self.finish(page)

    head = get


class BrowserBuild(Ours, StaticFileHandler):
    """The two files of Perspective's browser build; browsers ask again whether they changed."""

    def initialize(self, hub):
        Ours.initialize(self, hub)
        StaticFileHandler.initialize(self, path=str(BROWSER_BUILD))

    def set_extra_headers(self, path):
        self.set_header("Cache-Control", "no-cache")


class Health(Ours, RequestHandler):
    """How the tail is doing, as JSON; 503 while ClickHouse is away."""

    def get(self):
        health = self.hub.tail.health()
        self.set_status(200 if health["clickhouse"] == "up" else 503)
        self.set_header("Cache-Control", "no-store")
        self.finish(health | {"viewers": len(self.hub.viewers)})


class Viewer(Ours, PerspectiveTornadoHandler):
    """One viewer's Perspective session, behind the guard.

    The engine works in the executor's threads, so a heavy pivot holds up nobody's websocket, and
    takes one message of a viewer at a time: who asks faster than the engine answers, or does not
    read the answers, fills only the own socket.
    """

    stranger = 403

    def initialize(self, hub):
        Ours.initialize(self, hub)
        PerspectiveTornadoHandler.initialize(
            self, perspective_server=hub.perspective_server, executor=hub.executor
        )

    def prepare(self):
        Ours.prepare(self)
        if not self._finished and len(self.hub.viewers) >= MAX_VIEWERS:
            self.set_status(503)
            self.finish(f"{MAX_VIEWERS} viewers are connected, no more are taken\n")

    def check_origin(self, origin):
        return self.hub.knows_origin(origin, self.request.host)

    def open(self):
        self.ws_connection.stream.max_write_buffer_size = MAX_UNREAD
        self.lane, self.written = asyncio.Lock(), None
        self.guard = Guard(self.hub.owners)
        loop = asyncio.get_running_loop()
        self.session = self.hub.perspective_server.new_session(
            lambda answer: loop.call_soon_threadsafe(self.send, answer)
        )
        self.hub.viewers.add(self)

    async def on_message(self, message):
        if not isinstance(message, bytes):
            return
        async with self.lane:
            answer = self.guard.check(message)
            if answer:
                self.send(answer)
            elif self in self.hub.viewers:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.executor, self.session.handle_request, message)
        if self.written:
            with contextlib.suppress(WebSocketClosedError):
                await self.written

    def send(self, answer):
        try:
            self.guard.heard(answer)
            self.written = self.write_message(answer, binary=True)
        except WebSocketClosedError:
            pass
        except StreamBufferFullError:
            log.warning("a viewer does not read what it asked for: disconnected")
            self.ws_connection.stream.close()

    def on_close(self):
        self.hub.viewers.discard(self)
        self.guard.release()
        asyncio.get_running_loop().create_task(self.leave())

    async def leave(self):
        async with self.lane:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.executor, self.session.close)


def make_app(hub):
    """All that the server answers to."""
    shared = {"hub": hub}
    return Application(
        [
            (r"/(?:prsp-viewer\.html)?", Page, shared),
            (r"/perspective/(perspective-anywidget\.(?:js|css))", BrowserBuild, shared),
            (r"/healthz", Health, shared),
            (r"/websocket", Viewer, shared),
        ],
        default_handler_class=NotFound,
        default_handler_args=shared,
        websocket_max_message_size=MAX_MESSAGE,
        websocket_ping_interval=PING_SECONDS,
        websocket_ping_timeout=PING_SECONDS,
    )


# ---------------------------------------------------------------------------------------------
# The program.


async def serve(hub, sockets, producing):
    """Serve until SIGINT or SIGTERM, or until tail or embedded producer cannot go on."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
    server = HTTPServer(make_app(hub), max_body_size=1 << 16, idle_connection_timeout=60)
    server.add_sockets(sockets)

    while not ended.is_set() and not hub.tail.error and not (producing and producing.error):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), 0.2)

    server.stop()
    for viewer in list(hub.viewers):
        viewer.close(1001, "the server ends")
    await asyncio.sleep(0.1)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(server.close_all_connections(), 0.5)


def port(text):
    """A TCP port, for argparse."""
    value = int(text)
    if not 0 < value < 65536:
        raise producer.argparse.ArgumentTypeError(f"{text} is no port (1 to 65535)")
    return value


def origin(text):
    """An origin, for argparse: scheme://host[:port], "null", or "" for none."""
    parts = urlsplit(text)
    if text not in ("", "null") and text != f"{parts.scheme}://{parts.netloc}":
        raise producer.argparse.ArgumentTypeError(f"{text} is no origin, as https://example.com is")
    return text


def parse(argv):
    parser = producer.Parser(prog="perspective_server.py", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    producer.add_dsn(source)
    source.add_argument(
        "--embedded",
        nargs="?",
        const="",
        metavar="PATH",
        help="no server needed: ClickHouse and producer run in this process (default: in memory"
        " of this run only, else in folder PATH)",
    )
    parser.add_argument("--address", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=port, default=8080)
    parser.add_argument(
        "--interval", type=producer.seconds, default=0.25, help="seconds between polls"
    )
    parser.add_argument(
        "--limit", type=producer.count, default=100_000, help="rows in the live table"
    )
    parser.add_argument(
        "--allow-origin",
        type=origin,
        nargs="*",
        action="extend",
        metavar="ORIGIN",
        help="pages that may connect besides the server's own (default: null, a page from disk)",
    )
    return parser.parse_args(argv)


def complain(text):
    print(f"perspective_server.py: {text}", file=sys.stderr)
    return 1


def main(argv=None):
    """Run the server; returns the exit status."""
    options = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("tornado.access").setLevel(logging.ERROR)
    # What the driver has to say of a failure, the tail says itself, once.
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
    try:
        sockets = bind_sockets(options.port, options.address)
    except OSError as error:
        return complain(
            f"cannot listen on {options.address} port {options.port} ({error.strerror}):"
            " name another --address or --port"
        )

    with contextlib.ExitStack() as cleanup:
        dsn = options.dsn
        if options.embedded is not None:
            folder = options.embedded or cleanup.enter_context(
                tempfile.TemporaryDirectory(prefix="clickhouse-", ignore_cleanup_errors=True)
            )
            dsn = f"chdb://{quote(os.path.abspath(folder))}"
            try:
                cleanup.enter_context(contextlib.closing(producer.connect(dsn)))
            except ImportError:
                return complain("--embedded needs chdb: pip install 'clickhouse-connect[chdb]'")
            except Exception as error:
                return complain(f"no engine in {folder}: {reason(error)}")
        return run(options, dsn, sockets)


def run(options, dsn, sockets):
    perspective_server = perspective.Server()
    tail = Tail(perspective_server, dsn, options.interval, options.limit)
    origins = ["null"] if options.allow_origin is None else filter(None, options.allow_origin)
    hub = Hub(tail, perspective_server, options.address, list(origins))
    threads = [threading.Thread(target=tail.run, daemon=True)]
    producing = None
    if options.embedded is not None:
        producing = producer.Producer(dsn, interval=0.25, rows=250, say=log.info)
        threads.append(threading.Thread(target=producing.run, daemon=True))
    for thread in threads:
        thread.start()

    log.info("tailing %s", producer.where(dsn))
    if options.address not in LOOPBACK:
        log.warning(
            "listening on %s: everybody who reaches this port can read the table", options.address
        )
    shown = options.address if ":" not in options.address else f"[{options.address}]"
    if hub.everywhere or options.address in LOOPBACK:
        shown = "localhost"
    log.info("open http://%s:%s/", shown, options.port)
    asyncio.run(serve(hub, sockets, producing))

    tail.stop.set()
    if producing:
        producing.stop.set()
    deadline = time.monotonic() + 2
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    error = tail.error or (producing and producing.error)
    if error:
        return complain(producer.explain(error))
    if producing:
        log.info("%s rows written", f"{producing.rows:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
