"""Tail the table `stock_values` of ClickHouse into Perspective, and serve it to browsers.

Data enters at the left and never turns back: ClickHouse -> Tail -> Perspective table -> viewers.
Run `python perspective_server.py --help` for the options; without a ClickHouse at hand, run
`python perspective_server.py --embedded`.
"""

import asyncio
import base64
import collections
import contextlib
import ctypes
import functools
import hashlib
import ipaddress
import itertools
import json
import logging
import os
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import perspective
from clickhouse_connect.driver.binding import format_str, quote_identifier
from perspective.handlers.tornado import PerspectiveTornadoHandler
from perspective.virtual_servers import VirtualServerHandler
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
#
# The live table is a ring: a new row takes the place of the oldest. ClickHouse numbers the places,
# and they are the table's index, of which viewers see nothing. Perspective's own `limit` would do
# it by removing and inserting, which takes time that grows with the square of the rows.
#
# Three small tables stand beside the live one, since Perspective would sort and scan the whole
# window at each update: the newest ticks, and two that ClickHouse aggregates, with a line for each
# ticker and with its candles. There, candle number 0 is the newest, and older ones count downwards.

NEWEST, NEWEST_TICKS = f"{TABLE}_newest", 1000
TICKERS, CANDLES = f"{TABLE}_tickers", f"{TABLE}_candles"
TICKERS_COLUMNS = {"ticker": "string"} | dict.fromkeys(
    ("last", "change", "high", "low", "volume"), "float"
)
CANDLES_COLUMNS = {"number": "integer", "time": "datetime", "ticker": "string"} | dict.fromkeys(
    ("open", "high", "low", "close", "volume"), "float"
)
CANDLE, MOST_CANDLES = 2, 500  # seconds; of each ticker


class Mark(NamedTuple):
    """What metadata says of the table at one moment."""

    table_id: str  # another one: the table was recreated
    mutations: tuple  # (the newest, how many are not done yet); another one: rows were rewritten
    patch: int  # block number of the newest patch part, which is what a lightweight UPDATE writes
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
    maxIf(max_block_number, startsWith(name, 'patch-')),
    max(max_block_number),
    sumIf(rows, NOT startsWith(name, 'patch-'))
FROM system.parts
WHERE active AND database = {database:String} AND table = {table:String}
"""
# Two ticks may share a millisecond: the insert block and the place in it say which came first. As
# one wide number, since comparing tuples takes five times as long.
STAMP = "toUnixTimestamp64Milli(t.timestamp)"
ARRIVAL = f"toInt128({STAMP}) * {10**18} + t._block_number * {10**9} + t._block_offset"
NEWEST_FIRST = "timestamp DESC, _block_number DESC, _block_offset DESC"
# First the tickers, whose time is null, then the candles.
SUMMARY = f"""
SELECT
    toUnixTimestamp(toStartOfInterval(w.timestamp, INTERVAL {CANDLE} SECOND)) * 1000 AS time,
    w.ticker AS ticker,
    toFloat64(argMin(w.open, w.arrival)) AS open,
    toFloat64(max(w.high)) AS high,
    toFloat64(min(w.low)) AS low,
    toFloat64(argMax(w.close, w.arrival)) AS close,
    close / open - 1 AS change,
    toFloat64(sum(w.volume)) AS volume,
    count() AS rows,
    toUnixTimestamp64Milli(min(w.timestamp)) AS since
FROM (SELECT t.*, {ARRIVAL} AS arrival FROM {{source}} AS t
      WHERE _block_number <= {{head}} AND timestamp >= fromUnixTimestamp64Milli({{since}})
      ORDER BY {NEWEST_FIRST} LIMIT {{limit}}) AS w
GROUP BY GROUPING SETS ((ticker), (ticker, time))
ORDER BY time DESC NULLS FIRST, ticker LIMIT {MOST_CANDLES + 1} BY ticker
SETTINGS group_by_use_nulls = 1, output_format_json_quote_64bit_integers = 0
"""
EARLIEST = -2_208_988_800_000  # ms: 1900, the first that DateTime64 can hold
SUMMARY_SHARE = 0.2  # of the time: over a large window it comes at a slower pace
PATIENCE = 1  # second
PLACES = {TABLE: "place", NEWEST: "newest place"}
PIECE = 2500  # rows in a record batch: the newest ticks take only the last ones
# Rows stamped up to so long before the last poll are looked for at first, since the primary key
# leads to them; then those up to ten minutes before; then all.
LATE_MS = 10_000, 600_000
# ClickHouse lets queries of a larger `priority`, those of the history, wait for these.
TAIL = {"max_execution_time": QUERY_TIMEOUT, "priority": 1}
ARROW = {"output_format_arrow_low_cardinality_as_dictionary": 1, "max_block_size": PIECE}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
RECORD_BATCH = 3
GONE = {60, 81, 218}  # ClickHouse's errors for a table or database that was dropped meanwhile
REST = 0.05  # seconds
QUIET = 60  # seconds without a change, after which the next one is worth a line in the log


def pieces(arrow):
    """Cut an Arrow stream into streams of one record batch each; yields (rows, stream).

    The framing: https://arrow.apache.org/docs/format/Columnar.html ; the fields of a message:
    format/Message.fbs in Arrow's repository; they are in flatbuffers: https://flatbuffers.dev
    """

    def number(kind, at):
        return struct.unpack_from(kind, arrow, at)[0] if at else 0

    def field_of(table, index):
        """Where it stands; 0 if it does not, which means zero."""
        fields_at = table - number("<i", table)
        at = 4 + 2 * index
        offset = number("<H", fields_at + at) if at < number("<H", fields_at) else 0
        return table + offset if offset else 0

    begin, at = [], 0
    while at < len(arrow) - len(ARROW_END):
        message = at + 8 + number("<I", at + 8)
        end = at + 8 + number("<i", at + 4) + number("<q", field_of(message, 3))
        if number("<B", field_of(message, 1)) == RECORD_BATCH:
            header = field_of(message, 2)
            rows = number("<q", field_of(header + number("<I", header), 0))
            yield rows, b"".join([*begin, arrow[at:end], ARROW_END])
        else:  # the schema, or the texts that numbers stand for
            begin.append(arrow[at:end])
        at = end


class Tail:
    """Keeps the newest `limit` rows of the table in the Perspective table of the same name, the
    newest thousand in another, in a third for each ticker the window's last price, the change since
    its first (0.01 is 1 %), high, low and volume, and in a fourth the window as candles.

    `run` polls every `interval` seconds until `stop` is set; it is meant for a thread of its own.
    `error` is set if the table cannot be worked with from the start.
    """

    def __init__(self, perspective_server, dsn, interval, limit):
        self.perspective = perspective_server.new_local_client()
        self.dsn, self.database = dsn, producer.split_dsn(dsn)[1]
        self.source = producer.full_name(self.database)
        self.interval, self.limit = interval, limit
        self.stop = threading.Event()
        self.sizes = {TABLE: limit, NEWEST: min(NEWEST_TICKS, limit)}  # of the rings
        self.placed = dict.fromkeys(self.sizes, 0)  # rows that went into them
        self.client = self.mark = self.summed = self.stamps = self.error = None
        self.tables = {}  # of Perspective, by name
        self.summary_due, self.since = 0, EARLIEST
        self.keys = {}  # what identifies the lines of an aggregated table, by its name
        self.polled = 0  # ms: when the last poll that succeeded began
        self.clickhouse, self.said = "down", (None, None)
        self.rows = self.delivered = 0
        self.lag_ms = self.poll_ms = None
        self.due = time.monotonic()  # when the poll under way, or else the next one, had to begin
        self.arrivals = collections.deque()  # (when, rows) of the last `span` seconds
        self.span = max(5, 2 * interval)
        self.changed = -QUIET  # when rows were last changed by something other than an insert

    def poll(self):
        """Bring the Perspective table up to date. Returns "up" or "no table"; may raise anything.

        After an exception the next poll goes on from the last rows that Perspective has taken.
        """
        now_ms = int(time.time() * 1000)
        if self.client is None:
            self.client = producer.connect(self.dsn)
        mark = self.read_mark()
        if mark.table_id is None:
            return "no table"
        if mark != self.mark and not self.append(mark):
            self.reload(mark)
        self.polled = now_ms
        now = time.monotonic()
        behind = now - self.due > self.interval / 2  # the next rows come first, but not for ever
        if self.summed != mark and now >= self.summary_due + behind * PATIENCE:
            self.summarize(mark)
        return "up"

    def read_mark(self):
        parameters = {"database": self.database, "table": TABLE}
        return Mark(*self.client.query(MARK, parameters=parameters, settings=TAIL).result_rows[0])

    def append(self, mark):
        """Hand the rows between the cursor and the head to Perspective.

        Returns False if that would not make the live table agree with ClickHouse.
        """
        old = self.mark
        if old is None or mark[:3] != old[:3] or mark.head <= old.head:
            return False
        grown = mark.rows - old.rows
        bounds = [f"timestamp >= fromUnixTimestamp64Milli({self.polled - ms})" for ms in LATE_MS]
        for bound in [*bounds, "true"]:
            arrow = self.read(
                f"SELECT *, {self.place(TABLE)}, {self.place(NEWEST)}"
                f" FROM (SELECT {', '.join(COLUMNS)} FROM {self.source} WHERE {bound}"
                f" AND _block_number > {old.head} AND _block_number <= {mark.head}"
                " ORDER BY _block_number, _block_offset"
                f" LIMIT {self.limit + 1} OFFSET {max(0, grown - self.limit)})"
            )
            cut = list(pieces(arrow))
            came = sum(rows for rows, _ in cut)
            if came == min(grown, self.limit):
                break
        else:
            return False
        if came:
            # If Perspective fails half-way, only a fresh window is sure to be right.
            self.mark = None
            self.tables[TABLE].update(arrow)
            newest = len(cut)
            while newest and sum(rows for rows, _ in cut[newest:]) < self.sizes[NEWEST]:
                newest -= 1
            for _, piece in cut[newest:]:
                self.tables[NEWEST].update(piece)
            self.placed = {name: placed + came for name, placed in self.placed.items()}
            self.rows = self.tables[TABLE].size()
            if self.rows != min(self.placed[TABLE], self.limit):
                return False
            self.delivered += came
            self.lag_ms = round(time.time() * 1000 - self.stamps.get_min_max("timestamp")[1])
            self.count_arrival(came)
        self.mark = mark
        return True

    def reload(self, mark):
        """Make the newest rows by timestamp the content of the Perspective table."""
        producer.check_table(self.client, self.database)
        columns = ", ".join(COLUMNS)
        first = TABLE not in self.tables
        self.since = EARLIEST
        self.mark, self.placed = None, dict.fromkeys(self.sizes, 0)
        window, newest = (
            self.read(
                f"SELECT *, {self.place(name)} FROM (SELECT {columns} FROM"
                f" (SELECT {columns}, _block_number, _block_offset FROM {self.source}"
                f"  WHERE _block_number <= {mark.head} ORDER BY {NEWEST_FIRST} LIMIT {size})"
                " ORDER BY timestamp, _block_number, _block_offset)"
            )
            for name, size in self.sizes.items()
        )
        if not self.keys:
            self.make(TICKERS, TICKERS_COLUMNS, "ticker")
            self.make(CANDLES, CANDLES_COLUMNS, "number")
            self.keys = {TICKERS: set(), CANDLES: set()}
        self.put(NEWEST, newest)
        if self.stamps is None:
            self.stamps = self.tables[NEWEST].view(columns=["timestamp"])
        self.put(TABLE, window)  # the last one: who finds it finds all
        self.rows = self.tables[TABLE].size()
        if not first:
            self.tell_change()
        self.delivered += self.rows
        self.mark = mark

    def summarize(self, mark):
        """Have ClickHouse aggregate the window, by ticker and in candles."""
        began = time.monotonic()
        sql = SUMMARY.format(source=self.source, head=mark.head, limit=self.limit, since=self.since)
        # In JSON what is no finite number is null.
        columns = json.loads(self.client.raw_query(sql, fmt="JSONColumns", settings=TAIL))
        tickers = columns["time"].count(None)
        if sum(columns["rows"][:tickers]) == self.limit:
            # Inserts only push rows out of a full window, so older ones need not be read again.
            self.since = min(columns["since"][:tickers])
        candles = {name: column[tickers:] for name, column in columns.items()}
        candles["number"] = [-i for i in range(len(candles["time"]))]
        columns["last"] = columns["close"]
        self.fill(TICKERS, {name: columns[name][:tickers] for name in TICKERS_COLUMNS}, "ticker")
        self.fill(CANDLES, {name: candles[name] for name in CANDLES_COLUMNS}, "number")
        self.summed, now = mark, time.monotonic()
        self.summary_due = now + (now - began) * (1 / SUMMARY_SHARE - 1)

    def fill(self, name, columns, index):
        """Make columns the content of an aggregated table."""
        keys = self.keys[name]
        if columns[index]:
            keys.update(columns[index])
            self.tables[name].update(columns)
        gone = keys.difference(columns[index])
        if gone:
            self.tables[name].remove(list(gone))
            keys -= gone

    def put(self, name, arrow):
        """Make an Arrow stream's rows the content of a ring, which is made if it is not there.

        Perspective's `replace` would show viewers an empty table for a moment.
        """
        if name not in self.tables:
            self.make(name, arrow, PLACES[name])
            self.placed[name] = self.tables[name].size()
            return
        rows, before = sum(rows for rows, _ in pieces(arrow)), self.tables[name].size()
        self.tables[name].update(arrow)
        if before > rows:
            self.tables[name].remove(list(range(rows, before)))
        self.placed[name] = rows

    def make(self, name, rows_or_schema, index):
        self.tables[name] = self.perspective.table(rows_or_schema, name=name, index=index)

    def place(self, name):
        """SQL for the places of the next rows in a ring, as a column."""
        place = f"(rowNumberInAllBlocks() + {self.placed[name]}) % {self.sizes[name]}"
        return f"toInt32({place}) AS {quote_identifier(PLACES[name])}"

    def read(self, sql):
        """Rows as the bytes of one Arrow stream: none of them becomes a Python object."""
        arrow = self.client.raw_query(sql, fmt="ArrowStream", settings=TAIL | ARROW)
        if not arrow.endswith(ARROW_END):  # it failed after it had begun to answer, with status 200
            raise OSError("an answer was cut short")
        return arrow

    def run(self):
        """Poll until stopped, whatever happens; after failures with growing pauses."""
        pause = 0
        while not self.stop.is_set():
            began = self.due = time.monotonic()
            error = None
            try:
                state = self.poll()
            except TableMismatch as mismatch:
                state, error = "no table", mismatch
                if TABLE not in self.tables:
                    self.error = error
                    break
            except Exception as failure:
                state = "no table" if getattr(failure, "code", None) in GONE else "down"
                error = failure
                self.close()
            took = time.monotonic() - began
            self.poll_ms = round(took * 1000, 1)
            self.tell(state, error)
            if state == "up":
                # A long poll is followed by a rest: Perspective has viewers to answer, too.
                pause, wait = 0, max(self.interval - took, min(took / 2, REST))
            elif producer.is_fatal(error):
                wait = pause = LONGEST_PAUSE
            else:
                wait = pause = min(max(2 * pause, self.interval), LONGEST_PAUSE)
            self.due = time.monotonic() + wait
            self.stop.wait(wait)
        self.close()

    def tell(self, state, error):
        """Log a change of state, once. The same state for another reason is a change only if the
        reason is one that somebody has to put right."""
        mismatch = isinstance(error, TableMismatch)
        said = (state, error.code if producer.is_fatal(error) else mismatch)
        self.clickhouse = state
        if said == self.said:
            return
        if state == "up":
            news = {"down": "ClickHouse is back", "no table": "the table is there"}
            news = news.get(self.said[0], "connected")
            log.info("%s: %s rows shown", news, f"{self.rows:,}")
        elif state == "down":
            log.warning("ClickHouse is away, trying again: %s", producer.explain(error))
        elif mismatch:
            log.warning("%s", error)
        else:
            log.warning("no table %s.%s: waiting for producer.py", self.database, TABLE)
        self.said = said

    def tell_change(self):
        """Log that rows were changed; once, if that goes on, as it does with rows that expire."""
        now = time.monotonic()
        if self.clickhouse == "up" and now - self.changed > QUIET:
            log.info("the table was changed: its newest %s rows read anew", f"{self.rows:,}")
        self.changed = now

    def close(self):
        if self.client is not None:
            with contextlib.suppress(Exception):
                self.client.close()
            self.client = None

    def count_arrival(self, rows):
        now = time.monotonic()
        self.arrivals.append((now, rows))
        while self.arrivals[0][0] < now - self.span:
            self.arrivals.popleft()

    def rows_per_second(self):
        since = time.monotonic() - self.span
        return round(sum(rows for when, rows in list(self.arrivals) if when > since) / self.span)

    def health(self):
        """What /healthz says, without the viewers."""
        stuck = time.monotonic() - self.due > 2 * LONGEST_PAUSE
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

READS = {3, 4, 7, 8, 17, 29, 30, 37, 41}  # features, tables, schema, size, ...
VIEW_READS = {*range(10, 17), *range(18, 27), 34, 35, 36, 39, 40}
TABLES, MAKE_PORT, MAKE_VIEW, SCHEMA, DESCRIBE = 4, 5, 6, 7, 41
COLUMN_PATHS, DELETE_VIEW, SIZE, COLLAPSE, EXPAND, SET_DEPTH = 10, 11, 12, 18, 19, 23
DATA = {16, 24, 25, 26, 36}  # as Arrow, columns, CSV, rows, NDJSON
ON_DELETE = 34
UNSUBSCRIBE = {21: 22, ON_DELETE: 35, 39: 40}  # of views: updates, deletion, rows removed
SUBSCRIBES = {4, 29, *UNSUBSCRIBE}  # each costs a callback until the session ends
SERVER_ERROR, VIEW_NOT_FOUND = 50, 1

MAX_VIEWERS = 500
MAX_VIEWS = 50  # of one viewer; the dashboard holds about ten
MAX_DIFFERENT = 200  # views of all viewers together, of which those that are alike count once
MAX_SUBSCRIPTIONS = 2000  # of one viewer
MAX_MESSAGE = 1 << 16  # bytes from a viewer; the dashboard's are below 10 kB
MAX_WAITING = 100  # messages of one viewer
MAX_UNREAD = 256 << 20  # bytes that wait for a viewer to read them
MAX_CELLS = 10_000_000  # of one answer: a million rows with all columns
PING_SECONDS = 30  # a viewer that answers no ping for so long is gone


class Refused(Exception):
    """A viewer asks for what it may not have. The text is for the person at the viewer."""

    def __init__(self, text, status=0):
        super().__init__(text)
        self.status = status  # Perspective's StatusCode: 0 server error, 1 view not found


def fields(message):
    """Take a protobuf message apart: yields (number, value), a value being int, float or bytes.

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
        if tag >> 32:  # the engine would not see the upper bits
            raise ValueError("malformed tag")
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else len(message) + 1)
        if at + size > len(message):
            raise ValueError("malformed field")
        value = bytes(message[at : at + size])
        yield number, value if kind == 2 else struct.unpack("<d" if kind == 1 else "<f", value)[0]
        at += size


def part(message, number):
    """A message's part that is a message itself. If it stands twice, protobuf joins the two."""
    return b"".join(value for found, value in fields(message) if found == number)


def field(number, value):
    """The opposite of `fields`, for one field."""

    def varint(value):
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def refusal(message, text):
    """Perspective's error as the answer to a message that is well formed."""
    asked = dict(fields(message))
    head = field(1, asked.get(1, 0)) + field(2, asked.get(2, b""))
    return head + field(SERVER_ERROR, field(1, text.encode()))


# What a view may be made of. The engine is fast at what dashboards do, but it trusts its clients:
# seen with version 5.6.1, one odd filter, or text where it expects a number, ends the process, and
# one pivot by the wrong column holds up the stream for minutes. So here, too, what is not known to
# be harmless is refused. tests/test_security.py has the messages that taught us.

GROUP_BY, SPLIT_BY, SHOWN, FILTER, SORT, EXPRESSION, AGGREGATE, ANY, DEPTH, ROLLUP = range(1, 11)
MAPS = {EXPRESSION, AGGREGATE}
LISTED = 2  # of the ways to say which columns are shown
SPLITS_FLAT = (12, 0)  # what viewers ask for, and the default
MOST = {GROUP_BY: 3, SPLIT_BY: 2, SHOWN: 1, FILTER: 10, SORT: 5, EXPRESSION: 20, AGGREGATE: 50}
MOST_SHOWN = 50  # columns
MOST_VALUES = 500  # that filters compare with, all together
MAX_EXPRESSION = 1000  # characters in all of a viewer's expressions; each costs at every update
TEXT_COST = 50  # so many characters is a function of texts worth
OPERATORS = {"==", "!=", "<", "<=", ">", ">=", "in", "not in", "is null", "is not null"}
OPERATORS |= {f"{no}{test}" for no in ("", "not ") for test in ("contains", "matches")}
OPERATORS |= {f"{no}{end} with" for no in ("", "not ") for end in ("begins", "ends")}
AGGREGATIONS = {
    *("abs sum", "and", "any", "avg", "count", "distinct count", "distinct leaf", "dominant"),
    *("first", "gmv", "high", "join", "last", "last by index", "last minus first", "low", "max"),
    *("max by", "mean", "median", "min", "min by", "mul", "or", "pct sum parent", "pct sum total"),
    *("q1", "q3", "stddev", "sum", "sum abs", "sum or zero", "unique", "var", "weighted mean"),
}
FIRST_AND_LAST = {"first": b"min by", "last": b"max by"}
IN_ORDER = {"last by index", "last minus first"}  # go by the order of the rows
LARGEST = 1e15  # of a filter's numbers: the engine makes dates of them


COLUMNS_OF = {
    TABLE: COLUMNS,
    NEWEST: COLUMNS,
    TICKERS: TICKERS_COLUMNS,
    CANDLES: CANDLES_COLUMNS,
}


def columns_of(*kinds):
    every = TICKERS_COLUMNS | CANDLES_COLUMNS | COLUMNS
    return "|".join(name for name, kind in every.items() if any(k in kind.lower() for k in kinds))


# An expression is computed for every row while the stream waits, so there are no loops, vectors,
# assignments or comments. Text and numbers do not mix: if a condition chooses between them, the
# engine takes the one for the other and reads memory that is not there.
TEXTS, TIMES, NUMBERS = columns_of("string"), columns_of("date"), columns_of("int", "float")
MANY = columns_of("datetime", "int", "float")  # have about a value per row
HARMLESS = re.compile(
    rf"""\s*(?:
      (?P<few>bucket\(\s*"({TIMES})"\s*,\s*'\d{{0,4}}[hDWMY]'\s*\)
        | hour_of_day\(\s*"({TIMES})"\s*\)
        | "({TEXTS})"\s*[!=]=\s*'[^'"\\\n]+'
        | \d+(\.\d+)?\b | \b(and|date|datetime|false|float|integer|not|or|true)\b)
      | (?P<text>"({TEXTS})" | '[^'"\\\n]+' | (day_of_week|month_of_year)\(\s*"({TIMES})"\s*\)
        | \b(concat|length|lower|substring|upper)\b)
      | (?P<number>"({TIMES}|{NUMBERS})" | bucket\(\s*"({TIMES})"\s*,\s*'\d{{0,4}}[sm]'\s*\)
        | bucket\(\s*("({NUMBERS})"|float\(\s*"({TIMES})"\s*\))\s*,\s*\d+(\.\d+)?\s*\)
        | \b(abs|ceil|else|exp|floor|if|inrange|is_not_null|is_null|log|max|min|now|percent_of|pow
          |round|sqrt|today)\b)
      | (?P<operator>[=!<>]=|[-+*/%^<>])
      | [(),;{{}}]
    )\s*""",
    re.VERBOSE | re.ASCII,
)


def text_of(message, number):
    """A message's part that is a text. If it stands twice, the last one counts."""
    return dict(fields(message)).get(number, b"").decode()


def judge_expression(text):
    """Returns what an expression costs and what stands in it. Raises Refused."""
    at, last, kinds = 0, None, []
    while at < len(text):
        token = HARMLESS.match(text, at)
        if not token:
            raise Refused(f"no expressions here with: {text[at : at + 20]}")
        kind = next(filter(token.groupdict().get, ("few", "text", "number", "operator")), None)
        if kind == last == "operator" and token[kind] != "-":  # they would join: := += <=> //
            raise Refused("two operators in a row")
        at, last = token.end(), kind
        kinds.append(kind)
    if "text" in kinds and "number" in kinds:
        raise Refused("text and numbers do not go into one expression")
    if re.search("date|time|now|today", text):
        kinds.append("time")
    return len(text) + TEXT_COST * kinds.count("text"), set(kinds)


def judge_filter(operator, values):
    if operator not in OPERATORS:
        raise Refused(f"there is no filter {operator}")
    if not values and operator not in ("in", "not in"):
        raise Refused("a filter lacks its value")
    for value in values:
        [(kind, scalar)] = fields(value)
        if type(scalar) is not {1: int, 4: float, 6: bytes, 7: int}.get(kind):
            raise ValueError("malformed value")
        if kind == 4 and not abs(scalar) <= LARGEST:
            raise Refused("a filter's number is too large")


def judge_config(table, config):
    """Look at the configuration of a view of a table before the engine does.

    Returns what its expressions cost; the number of its columns if it has no groups, else None;
    and whether its groups make a tree. Raises Refused.
    """
    parts = {number: [] for number in (*MOST, ANY, DEPTH, ROLLUP)}
    for number, value in fields(config):
        if (number, value) == SPLITS_FLAT:
            continue
        if number not in parts or type(value) is not (bytes if number in MOST else int):
            raise Refused("there is no such kind of view")
        parts[number].append(value)
    columns = COLUMNS_OF.get(table)
    if not columns:
        raise Refused(f"there is no table {table}")
    groups, splits = ([name.decode() for name in parts[n]] for n in (GROUP_BY, SPLIT_BY))
    shown = list(columns)
    for listed in parts[SHOWN]:
        [(kind, names)] = fields(listed)
        if kind == LISTED:  # else the default: all
            shown = [name.decode() for number, name in fields(names) if number == 1]
    filters = [
        (text_of(body, 1), text_of(body, 2), [v for n, v in fields(body) if n == 3])
        for body in parts[FILTER]
    ]
    sorts = [text_of(body, 1) for body in parts[SORT]]
    expressions = [(text_of(entry, 1), text_of(entry, 2)) for entry in parts[EXPRESSION]]
    aggregates = [
        (text_of(entry, 1), [how.decode() for n, how in fields(part(entry, 2)) if n == 1])
        for entry in parts[AGGREGATE]
    ]

    values = sum(len(values) for _, _, values in filters)
    too_long = any(len(parts[number]) > most for number, most in MOST.items())
    if too_long or len(shown) > MOST_SHOWN or values > MOST_VALUES:
        raise Refused("too much for one view: use fewer columns, filters, sorts or groups")
    known = {*columns, *(name for name, _ in expressions if not name.startswith(("psp_", "__")))}
    used = [*groups, *splits, *shown, *sorts, *(name for name, _, _ in filters)]
    used += [name for _, how in aggregates for name in how[1:]]
    for name in used:
        if name not in known:  # the engine has columns of its own besides
            raise Refused(f"there is no column {name}")
    for _, operator, values in filters:
        judge_filter(operator, values)

    cost, many, numbers = 0, set(MANY.split("|")), set(NUMBERS.split("|"))
    for name, text in expressions:
        price, kinds = judge_expression(text)
        cost += price
        if "number" in kinds:
            many.add(name)
        numbers = numbers - {name} if kinds & {"text", "time"} else numbers | {name}
    for name, how in aggregates:
        if how and how[0] not in AGGREGATIONS:
            raise Refused(f"there is no aggregate {how[0]}")
        if how and how[0] in IN_ORDER and columns is COLUMNS:
            raise Refused(f"here rows are in no order: use max by timestamp, not {how[0]}")
        if how and how[0] in ("avg", "mean") and name not in numbers:
            raise Refused(f"there is no average of {name}")
    # A tree with a branch for every row takes the engine minutes; a leaf for every row does not.
    if many.intersection(groups[:-1] + splits):
        raise Refused("columns with that many values only go last into Group By, nowhere else")
    if splits and not groups and not set(splits) <= set(TEXTS.split("|")):
        raise Refused("without Group By, only texts go into Split By")
    deep = not any(parts[ROLLUP])
    if parts[DEPTH] and not deep:
        raise Refused("this view has no depth")
    return cost, None if groups or splits else len(shown), deep


def of_a_ring(config):
    """The configuration as the engine needs it for a ring: there the columns to show are all but
    the place, and "first" and "last", which for the engine go by the place, go by the timestamp."""
    entries = []
    for number, value in fields(config):
        how = number == AGGREGATE and FIRST_AND_LAST.get(text_of(part(value, 2), 1))
        if how:
            names = b"".join(field(1, name) for name in (how, b"timestamp"))
            value = field(1, dict(fields(value))[1]) + field(2, names)
        entries.append((number, value))
    shown = dict(entries).get(SHOWN, b"")
    if LISTED not in dict(fields(shown)):
        names = b"".join(field(1, name.encode()) for name in COLUMNS)
        entries = [entry for entry in entries if entry[0] != SHOWN]
        entries.append((SHOWN, field(LISTED, names)))
    return b"".join(field(*entry) for entry in entries)


def without_places(number, answer):
    """An answer about tables or their columns, as if the rings had no index."""
    if number == TABLES:
        names = (dict(fields(table))[1] for found, table in fields(answer) if found == 1)
        return b"".join(field(1, field(1, name)) for name in names)
    hidden = {place.encode() for place in PLACES.values()}
    columns = (column for found, column in fields(part(answer, 1)) if found == 1)
    kept = (field(1, column) for column in columns if dict(fields(column))[1] not in hidden)
    return field(1, b"".join(kept))


def described(config, complaint):
    """A complaint in the form in which viewers show it beside the expression."""
    names = [text_of(entry, 1).encode() for n, entry in fields(config) if n == EXPRESSION]
    error = field(2, field(1, complaint))
    return b"".join(field(2, field(1, name) + error) for name in names) or field(4, complaint)


class Guard:
    """Decides what one session may ask."""

    def __init__(self, judge_config=judge_config):
        self.judge_config = judge_config
        self.views = {}  # what `judge_config` said of each
        self.subscriptions = 0
        self.making = None  # (message id, view) that the engine has not confirmed yet

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
            if len(asked) != 1:
                raise Refused("malformed message: it must ask for one thing")
            [(number, body)] = asked.items()
            if [type(value) for value in (message_id, entity, body)] != [int, bytes, bytes]:
                raise Refused("malformed message: a field has the wrong type")
            entity.decode()
            if message_id >> 32:
                raise Refused("malformed message: its number is too large")
            answer = self.judge(message_id, entity, number, body)
            return answer and head + answer
        except Refused as refused:
            error = field(1, str(refused).encode()) + field(2, refused.status)
            return head + field(SERVER_ERROR, error)
        except (ValueError, TypeError, AttributeError):
            return head + field(SERVER_ERROR, field(1, b"malformed message"))

    def judge(self, message_id, entity, number, body):
        if number in VIEW_READS:
            if entity not in self.views:
                raise Refused("View not found", VIEW_NOT_FOUND)
            self.judge_window(number, body, *self.views[entity][1:])
            if number == DELETE_VIEW:
                del self.views[entity]
        elif number == MAKE_VIEW:
            [view] = (value for found, value in fields(body) if found == 1)
            view.decode()
            self.make_view(message_id, view, self.configure(entity, body, 2))
        elif number == MAKE_PORT:
            # A port tells a writer its own updates from others'. Readers need none, and each would
            # slow down every update until the server ends. So all are told the same.
            return field(MAKE_PORT, field(1, 1))
        elif number == DESCRIBE:
            try:
                self.configure(entity, body, 1)
            except Refused as refused:  # someone is still writing an expression
                return field(DESCRIBE, described(part(body, 1), str(refused).encode()))
        elif number not in READS:
            raise Refused("this table is read-only")
        if number in SUBSCRIBES:
            self.subscriptions += 1
            if self.subscriptions > MAX_SUBSCRIPTIONS:
                raise Refused(f"no more than {MAX_SUBSCRIPTIONS} subscriptions: connect anew")
        return None

    def configure(self, table, body, where):
        verdict = self.judge_config(table.decode(), part(body, where))
        if verdict[0] + sum(cost for cost, *_ in self.views.values()) > MAX_EXPRESSION:
            raise Refused(f"your expressions are longer than {MAX_EXPRESSION} characters together")
        return verdict

    def judge_window(self, number, body, columns, deep):
        """Rows and columns by number: the engine takes what is out of reach for an address."""
        if number in DATA:
            body = part(body, 1)
        if number in DATA | {COLUMN_PATHS, COLLAPSE, EXPAND}:
            window = dict(fields(body))
            if any(value >> 31 for _, value in fields(body)):
                raise Refused("there is no row or column with such a number")
            start, end = window.get(1, 0), window.get(2, 1 << 31)
            if number == COLUMN_PATHS and columns is not None and not start <= min(columns, end):
                raise Refused("there is no column with such a number")
        if number == SET_DEPTH and not deep:
            raise Refused("this view has no depth")

    def make_view(self, message_id, view, verdict):
        if view in self.views:
            raise Refused("a view of that name exists")
        if len(self.views) >= MAX_VIEWS:
            raise Refused(f"no more than {MAX_VIEWS} views at once: delete some")
        self.views[view] = verdict
        self.making = message_id, view

    def heard(self, answer):
        """Looks at what the engine answers: a view that it did not make does not count."""
        if self.making:
            parts = dict(fields(answer))
            message_id, view = self.making
            if parts.get(1, 0) == message_id:
                self.making = None
                if SERVER_ERROR in parts:
                    self.views.pop(view, None)


# ---------------------------------------------------------------------------------------------
# The sessions. The engine brings every view up to date at every update, whoever looks at it. So
# viewers who ask for the same share one view: fifty viewers of one dashboard cost the engine little
# more than one. The engine knows views by names of ours; by a viewer's own name it would let any
# session read or delete another's.


class Direct:
    """A session of the server's own, which is asked and answers at once."""

    def __init__(self, server):
        self.answers = collections.deque(maxlen=1)
        self.session = server.new_session(self.answers.append)

    def ask(self, entity, number, body=b""):
        """Returns the fields of the engine's answer, by number."""
        self.session.handle_request(field(1, 1) + field(2, entity) + field(number, body))
        return dict(fields(self.answers.pop()))


class EngineError(Exception):
    """The engine refuses. The argument is its error, as a protobuf message."""


class Views:
    """The views of all viewers, by what was asked for. `lock` is held while the engine reads
    expressions: it ends the process if two threads do that at a time (seen with version 5.6.1)."""

    def __init__(self, server):
        self.server, self.engine = server, Direct(server)
        self.lock, self.numbers = threading.Lock(), itertools.count(1)
        self.names, self.users = {}, collections.Counter()

    def take(self, table, config):
        """Returns (key, name), of which the key is for `give_back`. Raises Refused if there are
        too many, EngineError if the engine says no."""
        if table.decode() in PLACES:
            config = of_a_ring(config)
        parts = list(fields(config))
        tree = GROUP_BY in dict(parts) and not dict(parts).get(ROLLUP)
        with self.lock:
            number = next(self.numbers)
            # What is a map in the configuration has no order. And branches of a tree that somebody
            # folds are folded for that one alone.
            parts.sort(key=lambda part: (part[0], part[1] if part[0] in MAPS else b""))
            key = (table, *parts, number if tree else 0)
            if key not in self.names:
                if len(self.names) >= MAX_DIFFERENT:
                    raise Refused(f"no more than {MAX_DIFFERENT} different views at once, of all")
                name = f"view {number}".encode()
                answer = self.engine.ask(table, MAKE_VIEW, field(1, name) + field(2, config))
                if SERVER_ERROR in answer:
                    raise EngineError(answer[SERVER_ERROR])
                self.names[key] = name
            self.users[key] += 1
            return key, self.names[key]

    def give_back(self, key):
        with self.lock:
            self.users[key] -= 1
            if not self.users[key]:
                del self.users[key]
                self.engine.ask(self.names.pop(key), DELETE_VIEW)


class Hold:
    """One viewer's hold on a view: what it subscribes to ends with the hold, not with the view."""

    def __init__(self, views, answer, table, config):
        self.views, self.answer = views, answer
        self.key, self.name = views.take(table, config)
        self.session = views.server.new_session(self.hear)
        self.subscriptions = []  # (field number, message's id)

    def handle_request(self, message_id, number, body):
        if number in UNSUBSCRIBE:
            self.subscriptions.append((number, message_id))
        self.session.handle_request(
            field(1, message_id) + field(2, self.name) + field(number, body)
        )

    def hear(self, answer):
        if self.answer:
            self.answer(answer)

    def close(self):
        answer, self.answer = self.answer, None
        for number, message_id in self.subscriptions:
            if number == ON_DELETE:
                answer(field(1, message_id) + field(ON_DELETE, b""))
            self.handle_request(0, UNSUBSCRIBE[number], field(1, message_id))
        self.session.close()
        self.views.give_back(self.key)


class LiveSession:
    """A session with the engine, in which views are shared, and no answer is larger than memory
    has room for."""

    def __init__(self, views, answer):
        self.views, self.answer = views, answer
        self.session = views.server.new_session(self.hear)
        self.ruler = Direct(views.server)
        self.holds = {}

    def handle_request(self, message):
        asked = dict(fields(message))
        message_id, entity = asked.pop(1, 0), asked.pop(2, b"")
        [(number, body)] = asked.items()
        hold, head = self.holds.get(entity), field(1, message_id) + field(2, entity)
        if number == MAKE_VIEW:
            self.answer(head + self.make_view(entity, dict(fields(body))[1], part(body, 2)))
        elif number == DESCRIBE:
            with self.views.lock:
                self.session.handle_request(message)
        elif number not in VIEW_READS:
            self.session.handle_request(message)
        elif not hold:
            error = field(1, b"View not found") + field(2, VIEW_NOT_FOUND)
            self.answer(head + field(SERVER_ERROR, error))
        elif number == DELETE_VIEW:
            del self.holds[entity]
            hold.close()
            self.answer(head + field(DELETE_VIEW, b""))
        elif number in DATA and not self.fits(hold.name, body):
            text = f"more than {MAX_CELLS:,} cells at once: ask for fewer rows or columns"
            self.answer(refusal(message, text))
        else:
            hold.handle_request(message_id, number, body)

    def hear(self, answer):
        parts = dict(fields(answer))
        for number in {TABLES, SCHEMA}.intersection(parts):
            head = field(1, parts.get(1, 0)) + field(2, parts.get(2, b""))
            answer = head + field(number, without_places(number, parts[number]))
        self.answer(answer)

    def make_view(self, table, view, config):
        try:
            self.holds[view] = Hold(self.views, self.answer, table, config)
        except Refused as refused:
            return field(SERVER_ERROR, field(1, str(refused).encode()))
        except EngineError as error:
            return field(SERVER_ERROR, error.args[0])
        return field(MAKE_VIEW, field(1, view))

    def fits(self, name, request):
        """Whether what is asked of a view is few enough rows times columns."""
        window = dict(fields(part(request, 1)))

        def cells(rows, columns):
            rows = min(rows, window.get(3, rows)) - window.get(1, 0)
            columns = min(columns, window.get(4, columns)) - window.get(2, 0)
            return max(0, rows) * max(0, columns)

        if cells(1 << 31, 1 << 31) <= MAX_CELLS:
            return True
        size = dict(fields(self.ruler.ask(name, SIZE)[SIZE]))
        return cells(size.get(3, 0), size.get(4, 0)) <= MAX_CELLS

    def close(self):
        for hold in self.holds.values():
            hold.close()
        self.session.close()
        self.ruler.session.close()


# ---------------------------------------------------------------------------------------------
# The handlers. All of them answer only to the host names that the server is meant to have: a
# foreign name pointed at this address (DNS rebinding) would make a foreign page look like ours.

HERE = Path(__file__).parent
PAGE = HERE / "prsp-viewer.html"
# The browser build that matches the engine to the digit comes in the wheel of perspective-python.
BROWSER_BUILD = Path(perspective.__file__).parent / "widget" / "static"
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Hub:
    """What the handlers share: tail, archive, Perspective server, and the viewers that are there.

    `address` is where the server listens; `origins` are the pages that may connect besides the
    server's own, with "null" for a page from disk.
    """

    def __init__(self, tail, archive, perspective_server, address, origins):
        self.tail, self.archive = tail, archive
        self.perspective_server, self.views = perspective_server, Views(perspective_server)
        self.origins = set(origins)
        self.hosts = LOOPBACK | {address} | {urlsplit(origin).hostname for origin in origins}
        self.everywhere = address in ("", "0.0.0.0", "::")
        self.viewers = set()
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

    def prepare(self):
        super().prepare()
        if not self._finished:
            self.send_error(404)

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
            # The second checksum is that of an input handler in Perspective's filter field.
            f" script-src 'self' blob: 'wasm-unsafe-eval' 'unsafe-hashes' 'sha256-{checksum}'"
            " 'sha256-ql0fd2+U9UEu870FX0Rf6Z8yqUKlNLSDxPI1ipIxack=';"
            " style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'",
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
        live = [viewer for viewer in self.hub.viewers if not isinstance(viewer, HistoryViewer)]
        self.finish(health | {"viewers": len(live)})


class Viewer(Ours, PerspectiveTornadoHandler):
    """One viewer's Perspective session, behind the guard.

    The engine works in the executor's threads, so a heavy pivot holds up nobody's websocket, and
    takes one message of a viewer at a time: who asks faster than the engine answers, or does not
    read the answers, fills only the own socket.
    """

    stranger = 403
    judge_config = staticmethod(judge_config)
    longest_rest = 5  # seconds

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
        self.inbox, self.written = asyncio.Queue(MAX_WAITING), None
        self.guard = Guard(self.judge_config)
        loop = asyncio.get_running_loop()
        self.session = self.new_session(lambda answer: loop.call_soon_threadsafe(self.send, answer))
        self.hub.viewers.add(self)
        self.working = asyncio.create_task(self.work())

    def new_session(self, answer):
        return LiveSession(self.hub.views, answer)

    async def on_message(self, message):
        # While the engine works the socket is read on, or pings and the end would not be heard.
        await self.inbox.put(message)

    async def work(self):
        """Take the viewer's messages one after the other until it leaves."""
        while (message := await self.inbox.get()) is not None:
            connected = self.ws_connection and not self.ws_connection.stream.closed()
            if connected and isinstance(message, bytes):
                await self.take(message)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.executor, self.session.close)
        self.session = None

    async def take(self, message):
        answer = self.guard.check(message)
        if answer:
            self.send(answer)
        else:
            loop, began = asyncio.get_running_loop(), time.monotonic()
            await loop.run_in_executor(self.executor, self.session.handle_request, message)
            # Half of the engine's time belongs to the others.
            await asyncio.sleep(min(self.longest_rest, time.monotonic() - began))
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
        while not self.inbox.empty():
            self.inbox.get_nowait()
        self.inbox.put_nowait(None)


# ---------------------------------------------------------------------------------------------
# History. The live table is a window; all the ticks are in ClickHouse. /history is a second
# Perspective endpoint, whose views ClickHouse computes. Perspective calls that a virtual server: it
# asks a handler to make a view, and then for the view's size, schema and rows. A grouped view is
# one query: its answer is kept in a Perspective engine apart from the live one, and size, schema
# and rows are read from there. A view without groups is asked for page by page.
#
# Viewers write expressions, and expressions become SQL. So nothing is passed on as text: they are
# taken apart into tokens, and put together again from the columns of this one table, literals,
# operators and the functions below. No token can name another table, a setting, a subquery or a
# second statement. What the limits below stop is said in ERRORS.

HISTORY = f"{TABLE}_history"
HISTORY_QUERIES = 3  # at once; the others wait their turn
HISTORY_LIMITS = {
    "priority": 2,
    "max_execution_time": 20,  # seconds
    "max_memory_usage": 4 << 30,  # bytes
    "max_rows_to_read": 10**11,
    "max_rows_to_group_by": 10**6,
    "max_result_rows": 100_000,
    "max_result_bytes": 256 << 20,
    "group_by_use_nulls": 1,  # the names of a total are null
    "output_format_arrow_low_cardinality_as_dictionary": 1,
    "output_format_arrow_compression_method": "none",  # a virtual server's reader knows no other
}
ERRORS = {
    158: "too many rows or groups: filter, or group by less",
    159: "it took ClickHouse longer than 20 seconds: filter, or group by less",
    241: "it took ClickHouse too much memory: filter, or group by less",
    396: "the answer has more than 100,000 rows: filter, or group by less",
    394: "cancelled",
}

UNKNOWN_IDENTIFIER = 47

AGGREGATES = {
    "count": "toFloat64(count())",
    "uniqExact": "toFloat64(uniqExact({0}))",
    "any": "any({0})",
    "min": "min({0})",
    "max": "max({0})",
    "first": "argMin({0}, {arrival})",
    "last": "argMax({0}, {arrival})",
}
NUMBER_AGGREGATES = AGGREGATES | {
    "sum": "sum(toFloat64({0}))",
    "avg": "avg({0})",
    "median": "quantileExactInclusive(0.5)({0})",
    "stddevPop": "stddevPop(toFloat64({0}))",
    "varPop": "varPop(toFloat64({0}))",
}
FILTERS = {
    "==": "{0} = {1}",
    "!=": "{0} != {1}",
    ">": "{0} > {1}",
    ">=": "{0} >= {1}",
    "<": "{0} < {1}",
    "<=": "{0} <= {1}",
    "in": "{0} IN ({1})",
    "not in": "{0} NOT IN ({1})",
    "is null": "{0} IS NULL",
    "is not null": "{0} IS NOT NULL",
}
TEXT_FILTERS = FILTERS | {
    "begins with": "startsWith({0}, {1})",
    "ends with": "endsWith({0}, {1})",
    "contains": "position({0}, {1}) > 0",
    "LIKE": "{0} LIKE {1}",
}
FUNCTIONS = """
    abs ceil exp floor greatest least log log10 log2 pow round sign sqrt trunc if coalesce
    concat empty endsWith length lower position replaceAll reverse startsWith substring upper
    toDate toFloat64 toInt32 toString toYear toQuarter toMonth toDayOfMonth toDayOfWeek toHour
    toMinute toSecond toStartOfSecond toStartOfMinute toStartOfHour toStartOfDay toStartOfWeek
    toStartOfMonth toStartOfInterval toIntervalSecond toIntervalMinute toIntervalHour
    toIntervalDay dateDiff
"""
WORDS = " and or not in is null like between case when then else end true false "
TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>\d+(\.\d+)?([eE][+-]?\d+)?(?![\w.]))
      | (?P<text>'[^'\\]*')
      | "(?P<column>[^"]*)"
      | (?P<operator>\|\||[<>=!]=|<>|[-+*/%<>=(),])
      | (?P<word>[A-Za-z]\w*)(?P<call>\s*\()?
    )\s*""",
    re.VERBOSE,
)


def column_sql(name):
    if name not in COLUMNS:
        raise Refused(f"there is no column {name}")
    return f"t.{quote_identifier(name)}"


def expression_sql(text):
    """Put a viewer's expression together again from what is known to be harmless.

    Raises Refused with a sentence for the person who wrote it.
    """
    if len(text) > MAX_EXPRESSION:
        raise Refused(f"an expression has at most {MAX_EXPRESSION} characters")
    sql, at = [], 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if not token:
            raise Refused(f"not understood: {text[at : at + 30]}")
        at, word, call = token.end(), token["word"], token["call"] or ""
        if token["column"] is not None:
            sql.append(column_sql(token["column"]))
        elif word is None:
            sql.append(token["number"] or token["text"] or token["operator"])
        elif (call and word in FUNCTIONS.split()) or word.lower() in WORDS.split():
            sql.append(word + call)
        elif call:
            raise Refused(f"{word} is none of: {', '.join(FUNCTIONS.split())}")
        else:
            sql.append(column_sql(word))
    return " ".join(sql)


def bare(kind):
    """A ClickHouse type without what wraps it and without its arguments."""
    while kind.startswith(("Nullable(", "LowCardinality(")):
        kind = kind[kind.index("(") + 1 : -1]
    return kind.partition("(")[0]


def perspective_type(kind):
    """The type that Perspective has for a ClickHouse type: wide numbers are floats."""
    kind = bare(kind)
    if kind in ("Date", "Date32", "DateTime", "DateTime64"):
        return "date" if kind.startswith("Date3") or kind == "Date" else "datetime"
    if kind in ("Int8", "Int16", "Int32", "UInt8", "UInt16"):
        return "integer"
    if kind.startswith(("Int", "UInt", "Float", "Decimal")):
        return "float"
    return "boolean" if kind == "Bool" else "string"


def shown(sql, kind):
    """SQL that gives a value of a ClickHouse type as Perspective's type in Arrow."""
    casts = {"datetime": "toDateTime64({}, 3, 'UTC')", "integer": "toInt32({})"}
    casts |= {"float": "toFloat64({})", "string": "toString({})"}
    return casts.get(perspective_type(kind), "{}").format(sql)


def literal(value, kind):
    """A filter's value as SQL of the type that it is compared with.

    Perspective sends times as milliseconds since 1970 or as text. Raises Refused.
    """
    try:
        wanted = perspective_type(kind)
        if wanted in ("date", "datetime"):
            number = isinstance(value, int | float)
            sql = (
                f"fromUnixTimestamp64Milli(toInt64({int(value)}), 'UTC')"
                if number
                else f"parseDateTime64BestEffort({format_str(str(value))}, 3, 'UTC')"
            )
            return sql if wanted == "datetime" else f"toDate({sql})"
        if wanted == "boolean":
            return "true" if value in (True, "true") else "false"
        if wanted in ("integer", "float"):
            # What a person reads off a Float32 column is to be found again in it.
            return f"toFloat32({float(value)!r})" if bare(kind) == "Float32" else repr(float(value))
        return format_str(str(value))
    except (ValueError, OverflowError):
        raise Refused(f"{value} is no value of that column") from None


class Flight:
    """A query under way, for all who asked the same."""

    def __init__(self):
        self.answer = Future()
        self.askers = []
        self.tag = f"history-{uuid.uuid4().hex}"


class Archive:
    """Asks ClickHouse about all rows of a table, for all sessions: clients of its own, a few
    queries at once, the same query in flight once. The table's name may have a database in front;
    it may be a Distributed table, over a cluster."""

    def __init__(self, dsn, table=None):
        *database, name = (table or TABLE).split(".")
        names = [*database, name] if database else [producer.split_dsn(dsn)[1], name]
        self.dsn, self.source = dsn, ".".join(map(quote_identifier, names))
        self.turns = threading.Semaphore(HISTORY_QUERIES)
        self.executor = ThreadPoolExecutor(max_workers=100, thread_name_prefix="history")
        self.lock, self.flights, self.idle = threading.Lock(), {}, []
        self.rows, self.counted = 0, -1
        self.answers = perspective.Server().new_local_client()
        self.settings = HISTORY_LIMITS
        if not dsn.startswith("chdb:"):  # chDB could not take it back
            self.settings = HISTORY_LIMITS | {"readonly": 1}

    def ask(self, sql, asker):
        """The answer as Arrow bytes. Blocks; raises Refused with a sentence for the viewer."""
        with self.lock:
            flight = self.flights.get(sql)
            first = flight is None
            if first:
                flight = self.flights[sql] = Flight()
            flight.askers.append(asker)
        if first:
            try:
                answer, error = self.fly(sql, flight), None
            except Exception as failure:
                answer, error = None, failure
            with self.lock:
                del self.flights[sql]
            if error:
                flight.answer.set_exception(error)
            else:
                flight.answer.set_result(answer)
        return flight.answer.result()

    def fly(self, sql, flight):
        with self.turns:
            if not flight.askers:
                raise Refused("cancelled")
            return self.use(
                lambda client: client.raw_query(
                    f"{sql} /* {flight.tag} */", fmt="ArrowStream", settings=self.settings
                )
            )

    def use(self, call):
        """Call with a client of the pool. One that failed is not used again: in chDB, the rest of
        its answer would stand in front of the next one."""
        try:
            client = self.idle.pop() if self.idle else producer.connect(self.dsn)
            try:
                answer = call(client)
            except BaseException:
                client.close()
                raise
            self.idle.append(client)
            return answer
        except Refused:
            raise
        except Exception as error:
            raise Refused(ERRORS.get(getattr(error, "code", None)) or reason(error)) from error

    def size(self, asker):
        """Rows in the table; asked at most once a second, since viewers ask with every drawing."""
        if time.monotonic() > self.counted + 1:
            self.rows = asker.count(f"{self.source} AS t")
            self.counted = time.monotonic()
        return self.rows

    def leave(self, asker):
        """Who leaves wants no answers: queries that nobody else waits for are cancelled."""
        with self.lock:
            doomed = []
            for flight in self.flights.values():
                if asker in flight.askers:
                    flight.askers[:] = [other for other in flight.askers if other is not asker]
                    if not flight.askers:
                        doomed.append(flight.tag)
        for tag in doomed:
            kill = f"KILL QUERY WHERE query LIKE '%{tag}%' AND query NOT LIKE 'KILL%' ASYNC"
            with contextlib.suppress(Refused):
                self.use(lambda client, kill=kill: client.command(kill))

    @functools.cached_property
    def arrival(self):
        """SQL that orders the ticks; other tables than ours may not know their blocks."""
        try:
            self.describe("t._block_number + t._block_offset")
        except Refused as refused:
            if getattr(refused.__cause__, "code", None) != UNKNOWN_IDENTIFIER:
                raise
            return STAMP
        return ARRIVAL

    @functools.lru_cache(maxsize=1000)  # noqa: B019 (there is one archive, for good)
    def describe(self, expression):
        """The ClickHouse type of an expression that `expression_sql` has let through."""
        sql = f"DESCRIBE (SELECT {expression} FROM {self.source} AS t)"
        return self.use(lambda client: client.query(sql).result_rows[0][1])


def refusable(method):
    """A method of History that may raise: what it says goes to the viewer, see HistorySession.

    Perspective itself would send the traceback.
    """

    @functools.wraps(method)
    def wrapped(self, *arguments):
        try:
            return method(self, *arguments)
        except Refused as refused:
            self.refused = str(refused)
        except Exception:
            log.exception("history failed")
            self.refused = "the server failed, its log says how"
        return NOTHING.get(method.__name__)

    return wrapped


NOTHING = {"table_size": 0, "view_size": 0, "view_schema": {}, "view_get_min_max": (0.0, 0.0)}


class History(VirtualServerHandler):
    """One viewer's views of the history. Perspective calls the methods; see VirtualServerHandler
    in perspective.virtual_servers. `config` is what the viewer's controls say."""

    def __init__(self, archive):
        self.archive = archive
        self.views = {}
        self.refused = None  # what the request under way may not have

    def get_features(self):
        kinds = ("integer", "float", "string", "boolean", "date", "datetime")
        numbers = ("integer", "float")
        return {
            "group_by": True,
            "split_by": False,
            "sort": True,
            "expressions": True,
            "group_rollup_mode": ["rollup", "flat", "total"],
            "filter_ops": {
                kind: list(TEXT_FILTERS if kind == "string" else FILTERS) for kind in kinds
            },
            "aggregates": {
                kind: list(NUMBER_AGGREGATES if kind in numbers else AGGREGATES) for kind in kinds
            },
        }

    def get_hosted_tables(self):
        return [HISTORY]

    def table_schema(self, table, config=None):
        return {name: perspective_type(kind) for name, kind in COLUMNS.items()}

    @refusable
    def table_size(self, table):
        return self.archive.size(self)

    @refusable
    def table_make_view(self, table, name, config):
        self.views[name] = HistoryView(self, config)

    @refusable
    def table_describe(self, table, config):
        schema, errors = {}, {}
        for name, text in config["expressions"].items():
            try:
                schema[name] = perspective_type(self.archive.describe(expression_sql(text)))
            except Refused as refused:
                errors[name] = {"error_message": str(refused), "line": 0, "column": 0}
        answer = {"expression_schema": schema}
        if errors:
            return answer | {"expression_errors": errors}
        try:
            return answer | {"view_schema": HistoryView(self, config, ask=False).schema}
        except Refused as refused:
            return answer | {"config_error": str(refused)}

    @refusable
    def view_schema(self, name, config):
        self.views[name].show(config.get("group_by_depth"))
        return self.views[name].schema

    @refusable
    def view_size(self, name):  # what is asked first of a view that is drawn
        return self.views[name].size()

    def view_column_size(self, name, config):
        return len(self.views[name].schema)

    @refusable
    def view_get_min_max(self, name, column, config):
        return self.views[name].min_max(column)

    @refusable
    def view_get_data(self, name, config, schema, viewport, data):
        data.from_arrow_ipc(self.views[name].page(viewport))

    @refusable
    def view_delete(self, name):
        if name in self.views:
            self.views.pop(name).delete()

    def count(self, rows):
        return int(self.first(f"SELECT toFloat64(count()) AS n FROM {rows}")["n"])

    def first(self, sql):
        """The first row of an answer, as a dict."""
        table = self.keep(sql)
        view = table.view()
        try:
            return view.to_json()[0]
        finally:
            view.delete()
            table.delete()

    def keep(self, sql):
        """Ask, and keep the answer as a Perspective table apart from the live one."""
        return self.archive.answers.table(self.archive.ask(sql, self))

    def refresh(self):
        """Have the views ask again when they are drawn next."""
        for view in list(self.views.values()):
            view.stale = True

    def close(self):
        for view in self.views.values():
            view.delete()


class HistoryView:
    """A view's configuration as SQL, and its answer. Raises Refused for what is not on offer."""

    LISTS = ("group_by", "columns", "filter", "sort", "expressions")

    def __init__(self, history, config, ask=True):
        self.history, self.config = history, config
        self.expressions = {
            name: expression_sql(text) for name, text in config["expressions"].items()
        }
        if config["split_by"] or config.get("windows"):
            raise Refused("history has no split by and no windows")
        if len(config["group_by"]) > 8 or sum(map(len, map(config.get, self.LISTS))) > 100:
            raise Refused("too much for one view: use fewer columns, filters, sorts or groups")
        self.columns = [name for name in config["columns"] if name is not None]
        conditions = [self.condition(*filter) for filter in config["filter"]]
        joint = " OR " if str(config.get("filter_op")).lower() == "or" else " AND "
        self.rows = f"{history.archive.source} AS t"
        if any(conditions):
            self.rows += f" WHERE {joint.join(filter(None, conditions))}"
        self.answer = self.rows_shown = self.depth = None
        self.stale = False
        make = self.make_groups if config["group_by"] else self.make_rows
        self.schema, self.sql = make()
        if ask and config["group_by"]:
            self.answer = history.keep(self.sql)
            self.show(None)

    def show(self, depth):
        """Of a tree, show the branches down to `depth`, or all."""
        if not self.answer:
            return
        if self.rows_shown:
            self.rows_shown.delete()
        self.depth = depth
        levels = len(self.config["group_by"])
        self.lowest = 0 if depth is None else max(0, 2 ** (levels - int(depth)) - 1)
        self.rows_shown = self.answer.view(
            columns=self.answer.columns(),
            filter=[["__GROUPING_ID__", "==" if self.mode == "flat" else ">=", self.lowest]],
        )

    def value(self, name):
        """(SQL, ClickHouse type) of a column or an expression."""
        if name in self.expressions:
            sql = self.expressions[name]
            return f"({sql})", self.history.archive.describe(sql)
        return column_sql(name), COLUMNS[name]

    def condition(self, name, operator, value=None):
        sql, kind = self.value(name)
        template = (TEXT_FILTERS if perspective_type(kind) == "string" else FILTERS).get(operator)
        if not template:
            raise Refused(f"{name} cannot be filtered by {operator}")
        if "{1}" not in template:
            return template.format(sql)
        values = value if isinstance(value, list | tuple) else [value]
        if not values or None in values:
            return None  # a filter that is still being written
        return template.format(sql, ", ".join(literal(value, kind) for value in values))

    def aggregate(self, name):
        """(SQL, Perspective's type) of a column's aggregate in a group."""
        sql, kind = self.value(name)
        number = perspective_type(kind) in ("integer", "float")
        offered = NUMBER_AGGREGATES if number else AGGREGATES
        chosen = self.config["aggregates"].get(name) or ("sum" if number else "count")
        if not isinstance(chosen, str) or chosen not in offered:
            raise Refused(f"{name} cannot be aggregated by {chosen}")
        sql = offered[chosen].format(sql, arrival=self.history.archive.arrival)
        if chosen in ("any", "min", "max", "first", "last"):
            return shown(sql, kind), perspective_type(kind)
        return f"toFloat64({sql})", "float"

    def sorting(self, value):
        """(SQL, ASC or DESC) for each sort of the configuration; `value` gives SQL for a name."""
        for name, direction in self.config["sort"]:
            order, _, absolute = direction.partition(" ")
            if order not in ("asc", "desc") or absolute not in ("", "abs"):
                continue  # "none", and the order of columns, which a split would have
            sql = value(name)[0]
            yield f"abs({sql})" if absolute else sql, order.upper()

    def make_rows(self):
        """The SQL of a view without groups: the rows, in their order of arrival unless sorted."""
        values = {name: self.value(name) for name in self.columns}
        select = [f"{shown(*value)} AS {quote_identifier(n)}" for n, value in values.items()]
        order = [f"{sql} {direction}" for sql, direction in self.sorting(self.value)]
        sql = f"SELECT {', '.join(select) or '1'} FROM {self.rows}"
        order += ["t.timestamp", self.history.archive.arrival]
        sql += f" ORDER BY {', '.join(order)}"
        return {name: perspective_type(kind) for name, (_, kind) in values.items()}, sql

    def make_groups(self):
        """The SQL of a grouped view. Perspective wants the rows as a tree read from the top: the
        total, and after each group its parts, each sorted among its siblings. The bits of
        `__GROUPING_ID__` say which of the names are rolled up, as GROUPING does in SQL. A flat view
        is the tree's leaves in the same order."""
        mode = self.mode = self.config.get("group_rollup_mode") or "rollup"
        groups = [shown(*self.value(name)) for name in self.config["group_by"]]
        paths = [f"p{i}" for i in range(len(groups))]
        identity = f"GROUPING({', '.join(paths)})"
        group_by = f"GROUP BY ROLLUP({', '.join(paths)})"
        if mode == "total":
            identity, group_by = str(2 ** len(groups) - 1), ""
            groups = ["CAST(NULL, 'Nullable(String)')" for _ in groups]
        values = {name: self.aggregate(name) for name in self.columns}
        sorts = list(self.sorting(self.aggregate))
        inner = [f"{identity} AS id"]
        inner += [f"{sql} AS {path}" for sql, path in zip(groups, paths, strict=True)]
        inner += [f"{sql} AS c{i}" for i, (sql, _) in enumerate(values.values())]
        inner += [f"{sql} AS s{i}" for i, (sql, _) in enumerate(sorts)]
        outer = ["toInt32(id) AS __GROUPING_ID__"]
        outer += [f"{path} AS __ROW_PATH_{i}__" for i, path in enumerate(paths)]
        outer += [f"c{i} AS {quote_identifier(name)}" for i, name in enumerate(values)]
        order = []
        for level in range(1, len(paths) + 1):
            own = 2 ** (len(paths) - level) - 1  # the id of a row of this level
            siblings = f"OVER (PARTITION BY {', '.join(paths[:level])})"
            order.append(f"id <= {own}")
            order += [
                f"anyIf(s{i}, id = {own}) {siblings} {direction}"
                for i, (_, direction) in enumerate(sorts)
            ]
            order.append(paths[level - 1])
        sql = (
            f"SELECT {', '.join(outer)} FROM"
            f" (SELECT {', '.join(inner)} FROM {self.rows} {group_by})"
            f" ORDER BY {', '.join(order)}"
        )
        return {name: kind for name, (_, kind) in values.items()}, sql

    def size(self):
        if not self.answer:
            return self.history.count(self.rows)
        if self.stale:
            self.stale = False
            with contextlib.suppress(Refused):  # the old answer is better than none
                fresh = self.history.keep(self.sql)
                self.delete()
                self.answer, self.rows_shown = fresh, None
                self.show(self.depth)
        return self.rows_shown.num_rows()

    def min_max(self, column):
        """Least and greatest value; of a tree, among its lowest branches."""
        if not self.answer:
            value = shown(*self.value(column))
            sql = f"SELECT min({value}) AS a, max({value}) AS b FROM {self.rows}"
            return tuple(self.history.first(sql).values())
        levels = len(self.config["group_by"])
        lowest = 2**levels - 1 if self.mode == "total" else self.lowest
        view = self.answer.view(columns=[column], filter=[["__GROUPING_ID__", "==", lowest]])
        try:
            return view.get_min_max(column)
        finally:
            view.delete()

    def page(self, viewport):
        """The rows of a viewport, {start_row, end_row}, as an Arrow stream."""
        start, end = viewport.get("start_row") or 0, viewport.get("end_row")
        if self.answer:
            end = self.answer.size() if end is None else end
            return self.rows_shown.to_arrow(start_row=start, end_row=end, compression=None)
        limit = "" if end is None else f" LIMIT {max(0, int(end) - int(start))} OFFSET {int(start)}"
        return self.history.archive.ask(self.sql + limit, self.history)

    def delete(self):
        if self.answer:
            self.rows_shown.delete()
            self.answer.delete()


class HistorySession:
    """What `perspective.Server.new_session` gives, for the history."""

    def __init__(self, archive, answer):
        self.archive, self.answer = archive, answer
        self.busy = threading.Lock()  # a session may be closed in the middle of a request
        self.history = History(archive)
        self.server = perspective.VirtualServer(self.history)

    def handle_request(self, message):
        with self.busy:
            self.history.refused = None
            answer = self.server.handle_request(message)
            if self.history.refused:
                answer = refusal(message, self.history.refused)
        self.answer(answer)

    def close(self):
        with self.busy:
            self.server.close()
            self.history.close()


class HistoryViewer(Viewer):
    """One viewer's session with the history, behind the same guard.

    ClickHouse computes the views, not the engine, so `History` says what they may be made of.
    """

    judge_config = staticmethod(lambda table, config: (0, None, True))
    longest_rest = 0

    def initialize(self, hub):
        super().initialize(hub)
        self.executor = hub.archive.executor

    def new_session(self, answer):
        return HistorySession(self.hub.archive, answer)

    async def on_message(self, message):
        # Perspective has no word for it: the page says when it wants to see newer answers.
        if message == "refresh":
            self.session.history.refresh()
        else:
            await super().on_message(message)

    def on_close(self):
        # At once, not when its turn comes: the query under way may be what it waits for.
        self.executor.submit(self.hub.archive.leave, self.session.history)
        super().on_close()


def make_app(hub):
    """All that the server answers to."""
    shared = {"hub": hub}
    return Application(
        [
            (r"/(?:prsp-viewer\.html)?", Page, shared),
            (r"/perspective/(perspective-anywidget\.(?:js|css))", BrowserBuild, shared),
            (r"/healthz", Health, shared),
            (r"/websocket", Viewer, shared),
            (r"/history", HistoryViewer, shared),
        ],
        default_handler_class=NotFound,
        default_handler_args=shared,
        websocket_max_message_size=MAX_MESSAGE,
        websocket_ping_interval=PING_SECONDS,
        websocket_ping_timeout=PING_SECONDS,
    )


# ---------------------------------------------------------------------------------------------
# The program.


async def serve(hub, sockets, producing, ended):
    """Serve until `ended` is set, or until tail or embedded producer cannot go on."""
    server = HTTPServer(make_app(hub), max_body_size=1 << 16, idle_connection_timeout=60)
    server.add_sockets(sockets)

    trimming = asyncio.create_task(give_memory_back())
    while not ended.is_set() and not hub.tail.error and not (producing and producing.error):
        await asyncio.sleep(0.1)
    trimming.cancel()

    server.stop()
    for viewer in list(hub.viewers):
        viewer.close(1001, "the server ends")
    await asyncio.sleep(0.1)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(server.close_all_connections(), 0.5)
    # What viewers still wait for is cancelled now, which Tornado would report as an error.
    logging.getLogger("tornado.application").disabled = True


async def give_memory_back():
    """What viewers had who are gone, or a window that was read anew: the C library would keep it
    for the process's many threads."""
    with contextlib.suppress(AttributeError):  # only glibc has it
        trim = ctypes.CDLL(None).malloc_trim
        while True:
            await asyncio.sleep(10)
            await asyncio.get_running_loop().run_in_executor(None, trim, 0)


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
        help="no server needed: ClickHouse and producer run in this process, with the data in"
        " the folder PATH (default: a temporary one)",
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
    parser.add_argument(
        "--history-table",
        metavar="[DATABASE.]TABLE",
        help="where /history finds all rows, such as a Distributed table (default: the live one's)",
    )
    return parser.parse_args(argv)


def complain(text):
    print(f"perspective_server.py: {text}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def silent():
    """For the engine, which writes to the process's stderr what it then also raises."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def main(argv=None):
    """Run the server; returns the exit status."""
    options = parse(argv)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("tornado.access").setLevel(logging.CRITICAL)
    # What the driver has to say of a failure, the tail says itself, once.
    for driver in ("clickhouse_connect", "urllib3"):
        logging.getLogger(driver).setLevel(logging.CRITICAL)
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
                os.makedirs(folder, exist_ok=True)
                with silent():
                    cleanup.enter_context(contextlib.closing(producer.connect(dsn)))
            except ImportError:
                return complain("--embedded needs chdb: pip install 'clickhouse-connect[chdb]'")
            except OSError as error:
                return complain(f"cannot write to {folder} ({error.strerror})")
            except Exception as error:
                return complain(f"no engine in {folder}, is it in use elsewhere? {reason(error)}")
        return run(options, dsn, sockets, ended)


def run(options, dsn, sockets, ended):
    # The engine waits for ever (seen with version 5.6.1) if a table is emptied that has as many
    # grouped views as there are threads. Threads that wait cost next to nothing.
    perspective.set_num_cpus(MAX_DIFFERENT + 10)
    perspective_server = perspective.Server()
    tail = Tail(perspective_server, dsn, options.interval, options.limit)
    origins = ["null"] if options.allow_origin is None else filter(None, options.allow_origin)
    archive = Archive(dsn, options.history_table)
    hub = Hub(tail, archive, perspective_server, options.address, list(origins))
    threads = [threading.Thread(target=tail.run, daemon=True)]
    producing = None
    if options.embedded is not None:
        producing = producer.Producer(dsn, interval=0.25, rows=250, say=log.info)
        threads.append(threading.Thread(target=producing.run, daemon=True))

    log.info("tailing %s", producer.where(dsn))
    if options.address not in LOOPBACK:
        log.warning(
            "listening on %s: everybody who reaches this port can read the table", options.address
        )
    shown = options.address if ":" not in options.address else f"[{options.address}]"
    if hub.everywhere or options.address in LOOPBACK:
        shown = "localhost"
    log.info("open http://%s:%s/", shown, options.port)
    for thread in threads:
        thread.start()
    asyncio.run(serve(hub, sockets, producing, ended))

    tail.stop.set()
    if producing:
        producing.stop.set()
    deadline = time.monotonic() + 1.5
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    error = tail.error or (producing and producing.error)
    if error:
        return complain(producer.explain(error))
    if producing:
        log.info("%s rows written", f"{producing.rows:,}")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # sys.exit would wait for what the engine computes for some viewer
