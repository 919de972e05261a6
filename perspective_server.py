"""Follow a ClickHouse table and relay its rows to every open browser.

    ClickHouse -> Tail -> Perspective tables -> Relay -> websockets -> a mirror in each browser

The server computes nothing for viewers: each page has a Perspective engine of its own. There is no
login and no TLS here; put a reverse proxy in front. `python perspective_server.py --help` lists the
options; without a ClickHouse at hand, run `python perspective_server.py --embedded`.
"""

import asyncio
import base64
import collections
import contextlib
import errno
import functools
import gzip
import hashlib
import json
import logging
import math
import os
import re
import resource
import sys
import tempfile
import threading
import time
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import clickhouse_connect
import numpy as np
import perspective
from clickhouse_connect.driver.binding import format_str
from clickhouse_connect.driver.exceptions import DatabaseError
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamBufferFullError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

import producer
from producer import (
    COLUMNS,
    MAX_PAUSE,
    QUERY_TIMEOUT,
    TABLE,
    TableMismatchError,
    explain,
    quote_identifier,
)

log = logging.getLogger("perspective_server")

# ---------------------------------------------------------------------------------------------
# The tail. MergeTree numbers its insert blocks in the order in which they are committed, and keeps
# the number with each row. So the number of the newest block, the head, is a cursor: the rows
# inserted since the last poll are those with cursor < _block_number <= head, whatever their
# timestamps are and however parts were merged. Each poll reads the table's metadata, which costs
# the same at any table size. There are three cases:
#
# 1. Nothing is different: done.
# 2. Only the head and the number of rows are different: the newest rows are read. If as many came
#    as the parts grew by, nothing but inserts happened, and Perspective gets these rows.
# 3. Otherwise the window is reloaded, at most once a second: the newest `limit` rows replace what
#    is there.
#
# The live table is a ring: the row with the number `arrival` takes the slot `arrival % limit`, and
# with it the place of the oldest row. The slot is the index, so that changes, replacements and
# removals reach the mirrors.


class Metadata(NamedTuple):
    """What ClickHouse's system tables say of the table."""

    definition: int  # hash of CREATE TABLE, and of the UUID, which tells a recreated table
    rewritten: tuple  # newest version of the parts that mutations wrote, and how many are older
    patch: int  # block of the newest patch part, which is what a lightweight UPDATE writes
    head: int  # the newest insert block
    rows: int  # in all parts
    hidden: int  # whether some of them were deleted by a lightweight DELETE, and wait for a merge


# Some database engines give tables no UUID. A mutation takes a block number, which becomes the
# data version of the parts that it writes. `added` is the number of rows in parts that are all new.
METADATA_SQL = """
SELECT
    (SELECT sipHash64(if(empty(uuid), toString(metadata_modification_time), toString(uuid)),
                      create_table_query)
     FROM system.tables WHERE database = {database} AND name = {table}) AS definition,
    maxIf(data_version, data_version != min_block_number AND NOT is_patch) AS newest,
    (newest, arrayCount(v -> v < newest, groupArray(data_version))) AS rewritten,
    maxIf(max_block_number, is_patch) AS patch,
    max(max_block_number) AS head,
    sumIf(parts.rows, NOT is_patch) AS rows,
    max(has_lightweight_delete) AS hidden,
    sumIf(parts.rows, NOT is_patch AND min_block_number > {cursor}) AS added,
    toUnixTimestamp64Milli(now64(3)) AS clock_ms
FROM (SELECT *, name LIKE 'patch-%' AS is_patch FROM system.parts
      WHERE active AND database = {database} AND table = {table}) AS parts
"""
BLOCKS_SQL = "_block_number > {after} AND _block_number <= {head}"
# Parts of several blocks whose rows all have the number of the first. A part is named after its
# partition, its first and its last block.
LOST_ORDER_SQL = f"""
SELECT splitByChar('_', _part) AS name FROM {{source}} WHERE {BLOCKS_SQL} GROUP BY _part
HAVING max(_block_number) = toUInt64(name[2]) AND name[2] != name[3] LIMIT 1
"""
# What the queries depend on, whatever the user's profile says; a limit of it must not cut an answer
# silently. What the user may not change is dropped. Polling stays out of ClickHouse's query log.
OVERFLOWS = ("distinct", "group_by", "read", "result", "sort", "timeout")
SETTINGS = dict.fromkeys((f"{name}_overflow_mode" for name in OVERFLOWS), "throw") | {
    "max_execution_time": QUERY_TIMEOUT,
    "max_query_size": 10_000_000,  # bytes; a table of 1,500 columns takes 400,000
    "max_result_rows": 0,
    "limit": 0,
    "offset": 0,
    "force_primary_key": 0,
    "force_index_by_date": 0,
    "use_query_cache": 0,
    "prefer_column_name_to_alias": 0,
    "aggregate_functions_null_for_empty": 0,
    "empty_result_for_aggregation_by_empty_set": 0,
    "log_queries": 0,
    "output_format_arrow_string_as_string": 1,
    "output_format_arrow_low_cardinality_as_dictionary": 1,
}
# ClickHouse 26.9 does not find all rows by the index of block numbers: a part that was attached
# keeps the index of its old ones. While there are patch parts, it finds none.
WITHOUT_INDEX = {"use_skip_indexes": 0}
WITH_PATCHES = {"use_skip_indexes": 0, "optimize_move_to_prewhere": 0}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # https://arrow.apache.org/docs/format/Columnar.html
DROPPED_CODES = {60, 81, 218}  # ClickHouse's errors for a dropped table or database
RELOAD_INTERVAL = 1  # seconds between two readings of the window
MAX_SHORT_WINDOWS = 2  # in sequence, until it is clear that this user does not get all rows
IDLE_INTERVAL = 5  # seconds between polls while there are no viewers


class TableMissingError(Exception):
    """There is no such table yet."""


class Blocks(NamedTuple):
    """The blocks with `after` < number <= `head`, and the settings with which they are found."""

    after: int
    head: int
    settings: dict


class Tail:
    """Keeps the newest `limit` rows of a ClickHouse table in a Perspective table.

    `run` polls every `interval` seconds until `stop` is set; it is meant for a thread of its own.
    `error` is set if the table cannot be followed at the start. `version` changes with the rows: it
    is (how often the window was read, the cursor).
    """

    def __init__(self, relay, health, dsn, database, table, interval, limit):
        self.relay, self.health, self.dsn = relay, health, dsn
        self.database, self.table = database, table
        self.interval, self.limit = interval, limit
        self.source = producer.full_name(database, table)
        self.names = {"database": format_str(database), "table": format_str(table)}
        self.stop, self.wake = threading.Event(), threading.Event()
        self.client = self.error = None
        self.metadata = None  # as of the rows that Perspective has; None: read the window
        self.columns = {}  # ClickHouse types by name
        self.hosted_columns = None  # the columns with which the tables were made
        self.arrived = 0  # rows that were numbered
        self.short_windows = 0  # in sequence: they had fewer rows than metadata says
        self.version = (0, 0)
        self.next_reload = 0  # when the window may be read again
        self.settings = {}  # of queries for block numbers
        self.strings = Strings()

    def poll(self):
        """Bring the live table up to date. After any exception the next poll can continue."""
        if self.client is None:
            self.client = producer.connect(self.dsn, settings=SETTINGS)
        now, added = self.read_metadata()
        if now == self.metadata:
            return
        if self.only_inserts(now) and self.append(now, added):
            return
        self.metadata = None
        if time.monotonic() >= self.next_reload:
            self.load_window(now)

    def read_metadata(self):
        """Return the metadata, and how many rows are in parts that are newer than the cursor."""
        cursor = self.metadata.head if self.metadata else 0
        [row] = self.query(METADATA_SQL.format(**self.names, cursor=cursor))
        definition, _, rewritten, patch, head, rows, hidden, added, clock_ms = row
        if definition is None:
            self.query(f"EXISTS TABLE {self.source}")  # raises if the user may not see it
            raise TableMissingError
        self.health.compare_clocks(clock_ms)
        self.settings = WITH_PATCHES if patch else {}
        return Metadata(definition, rewritten, patch, head, rows, hidden), added

    def only_inserts(self, now):
        """Return whether nothing but the head and the number of rows differs."""
        old = self.metadata
        if old is None or now.head < old.head:
            return False
        return now == old._replace(head=now.head, rows=now.rows)

    def append(self, now, added):
        """Hand the new rows to Perspective, unless others came than the parts grew by.

        Returns whether it did. With more new rows than the window has, they are all of it.
        """
        grown = now.rows - self.metadata.rows
        blocks = Blocks(self.metadata.head, now.head, self.settings)
        rows = self.read_rows(blocks)
        count, newest = self.relay.measure(rows, self.time_column)
        # More rows in new parts than the table grew by: rows were removed, or a part was replaced.
        expected = count == min(grown, self.limit) and added <= grown
        if not expected and self.short_windows < MAX_SHORT_WINDOWS:
            return False
        self.count_strings(blocks)
        self.metadata = None  # if Perspective fails half-way, only a fresh window is sure
        if count:
            with self.relay.change_tables():
                self.relay.tables[self.table].update(rows)
        self.move_cursor(now, count, newest)
        return True

    def load_window(self, now):
        """Read the whole window; make the tables at the start and for other columns."""
        self.next_reload = time.monotonic() + RELOAD_INTERVAL
        self.columns = self.check_table()
        recreate = self.columns != self.hosted_columns or self.strings.too_many
        blocks = self.find_window(now)
        rows = self.read_rows(blocks)
        self.version = self.version[0] + 1, now.head
        if recreate:
            if self.hosted_columns is None:
                self.warn_of_lost_order(blocks)
            self.hosted_columns = None
            self.health.columns = self.columns
            self.health.publish()
            self.relay.host(self.table, rows, self.rollups)
            self.hosted_columns = self.columns
            self.strings.forget()
        else:
            with self.relay.change_tables():
                self.relay.tables[self.table].replace(rows)
            self.health.log_reload()
        self.count_strings(blocks)
        if recreate:
            self.strings.bytes = 0  # a large window alone is not too many
        count, newest = self.relay.measure_table(self.table, self.time_column)
        self.health.rows = 0
        self.move_cursor(now, count, newest)
        self.check_window(count, 0 if now.hidden else min(now.rows, self.limit))

    def find_window(self, now):
        """Return the blocks in which the window is.

        At the start the index finds them quickly: the newest ten are tried, then a hundred times as
        many, and so on. Later the index may not be complete, see WITHOUT_INDEX.
        """
        start = self.hosted_columns is None
        settings = self.settings if start else WITHOUT_INDEX | self.settings
        tried = 10 if start else now.head + 1
        while True:
            blocks = Blocks(now.head - tried, now.head, settings)
            sql = f"SELECT toInt64(min(_block_number)), count() FROM ({self.newest_rows(blocks)})"
            [(oldest, count)] = self.query(sql, settings)
            if count == self.limit or blocks.after < 0:
                return blocks._replace(after=oldest - 1)
            tried *= 100

    def warn_of_lost_order(self, blocks):
        """Log that parts of the window were merged before the table kept block numbers."""
        sql = LOST_ORDER_SQL.format(source=self.source, **blocks._asdict())
        if self.query(sql, blocks.settings):
            log.warning(
                "%s.%s has parts that were merged before it kept block numbers: the order of their"
                " rows is lost, and the window may not hold the newest of them",
                *(self.database, self.table),
            )

    def check_window(self, count, expected):
        """Have the window read again if it lacks rows, which were perhaps deleted just now.

        If it still does, this user does not get all rows.
        """
        self.short_windows = self.short_windows + 1 if count < expected else 0
        if 0 < self.short_windows < MAX_SHORT_WINDOWS:
            self.metadata = None
        elif self.short_windows == MAX_SHORT_WINDOWS:
            log.warning(
                "ClickHouse gives %s of the newest %s rows: a row policy or a limit such as"
                " max_result_rows holds for this user. New rows are followed without counting them",
                *(f"{rows:,}" for rows in (count, expected)),
            )

    def move_cursor(self, now, count, newest):
        """Record that Perspective has the rows."""
        # After too many strings, the next poll recreates the tables.
        self.metadata = None if self.strings.too_many else now
        self.arrived += count
        self.version = self.version[0], now.head
        self.health.deliver(count, newest, self.limit)

    def check_table(self):
        """Return the table's columns; see `producer.check_table`."""
        expected = COLUMNS if self.table == TABLE else {}
        columns = producer.check_table(self.client, self.database, self.table, expected)
        if not columns:
            raise TableMissingError
        return columns

    @property
    def rollups(self):
        """The rollups, if the table has the columns that they need."""
        return ROLLUPS if ROLLUP_COLUMNS.items() <= self.columns.items() else []

    @property
    def time_column(self):
        """The column whose greatest value is the newest tick's time; None without such a column."""
        return "timestamp" if "DateTime64" in self.columns.get("timestamp", "") else None

    def read_rows(self, blocks):
        """Read the newest rows of these blocks, at most `limit`.

        Returns an Arrow stream in the order of arrival, numbered from `arrived` on.
        """
        names = ", ".join(map(quote_identifier, self.columns))
        values = ", ".join(select_safely(name, kind) for name, kind in self.columns.items())
        number = f"(rowNumberInAllBlocks() + {self.arrived})"
        sql = (
            f"SELECT {values}, toInt32({number} % {self.limit}) AS slot,"
            f" toFloat64({number}) AS arrival"
            f" FROM (SELECT {names} FROM ({self.newest_rows(blocks, names)})"
            " ORDER BY _block_number, _block_offset) AS t"
        )
        arrow = self.client.raw_query(sql, fmt="ArrowStream", settings=blocks.settings)
        if not arrow.endswith(ARROW_END):  # Perspective would accept the beginning silently
            raise OSError("incomplete answer from ClickHouse")
        return arrow

    def newest_rows(self, blocks, *names):
        columns = ", ".join([*names, "_block_number", "_block_offset"])
        return (
            f"SELECT {columns} FROM {self.source} WHERE {BLOCKS_SQL.format(**blocks._asdict())}"
            f" ORDER BY _block_number DESC, _block_offset DESC LIMIT {self.limit}"
        )

    def count_strings(self, blocks):
        """Count the strings of the same rows as `read_rows`, if they may be many different ones."""
        names = [name for name, kind in self.columns.items() if is_unbounded_string(kind)]
        if names:
            columns = list(map(quote_identifier, names))
            sql = STRINGS_SQL.format(
                strings=", ".join(f"toString({column})" for column in columns),
                rows=self.newest_rows(blocks, *columns),
            )
            self.strings.add(*self.query(sql, blocks.settings)[0])

    def query(self, sql, settings=None):
        return self.client.query(sql, settings=settings).result_rows

    def run(self):
        """Poll until stopped, whatever happens; after failures with growing pauses."""
        pause = 0
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self.poll()
            except Exception as error:
                waits = isinstance(error, producer.BlockNumbersMissingError)
                permanent = isinstance(error, producer.FATAL_ERRORS) and not waits
                if permanent and self.table not in self.relay.tables:
                    self.error = error
                    break
                self.report_failure(error)
                wait = pause = min(max(2 * pause, self.interval), MAX_PAUSE)
            else:
                if self.metadata:  # otherwise the window is read soon
                    self.health.report("up", f"following {self.database}.{self.table}")
                    pause = 0
                idle = not self.relay.viewers
                wait = began - time.monotonic() + max(self.interval, IDLE_INTERVAL * idle)
            self.health.polled(time.monotonic() - began, wait)
            self.wake.wait(max(0, wait))
            self.wake.clear()
        self.close()

    def report_failure(self, error):
        if isinstance(error, TableMismatchError):
            self.health.report("no table", str(error))
        elif isinstance(error, TableMissingError) or getattr(error, "code", None) in DROPPED_CODES:
            hint = "start producer.py" if self.table == TABLE else "create it, or check --table"
            text = f"no table {self.database}.{self.table}, waiting for it: {hint}"
            self.health.report("no table", text)
        else:
            self.close()  # in chDB, the rest of an answer would stand before the next one
            problem, is_fault = problem_of(error)
            text = f"{problem}, trying again: {explain(error)}"
            self.health.report("down", text, problem, error if is_fault else None)

    def close(self):
        if self.client:
            with contextlib.suppress(Exception):
                self.client.close()
            self.client = None


def problem_of(error):
    """Return what an error means, and whether it is a fault of this program or of Perspective."""
    if not isinstance(error, (OSError, DatabaseError, *producer.FATAL_ERRORS)):
        return f"{type(error).__name__}", True
    if producer.is_fatal(error):
        return "cannot use ClickHouse", False
    if producer.is_away(error):
        return "ClickHouse is away", False
    return f"ClickHouse refuses the query (error {error.code})", False


STATUS_TABLE = "server status"  # no rollup has a name with a space, and --table refuses it
RATE_SECONDS = 10  # over which rows_per_second is counted
MAX_CLOCK_MS = 30_000


class Health:
    """What the server says of itself: a line in the log at each change of state, /healthz, and the
    table STATUS_TABLE, which has one row for the page's status line.
    """

    def __init__(self, relay, database, table, interval):
        self.relay, self.database, self.table, self.interval = relay, database, table, interval
        self.state, self.reported, self.due = "down", None, time.monotonic()
        self.columns = {}  # of the live table
        self.rows = self.delivered = 0
        self.lag_ms = self.poll_ms = self.clock_ms = None
        self.deliveries = collections.deque(maxlen=10_000)  # (monotonic time, rows)
        self.reloaded_at = -math.inf
        page = hashlib.sha256(PAGE.read_bytes()).hexdigest()[:8]
        self.version = f"Perspective {perspective.__version__}, page {page}"
        types = dict.fromkeys(self.status(), "float")
        types |= dict.fromkeys(("clickhouse", "database", "table", "columns", "version"), "string")
        relay.add_table(STATUS_TABLE, types, "table")
        self.publish()

    def report(self, state, text, kind=None, fault=None):
        """Log each change of state once. Another kind of reason is a change, too."""
        self.state = state
        if self.reported != (state, kind or text):
            self.reported = (state, kind or text)
            level = logging.INFO if state == "up" else logging.WARNING
            log.log(level, "%s", text, exc_info=fault)
            self.publish()

    def log_reload(self):
        """Log that the window was reloaded; once, if it is reloaded again and again."""
        now = time.monotonic()
        if now - self.reloaded_at > 10 * RELOAD_INTERVAL:
            log.info("the table was changed by more than inserts: reloaded the window")
        self.reloaded_at = now

    def compare_clocks(self, clock_ms):
        """Note how far ClickHouse's clock is ahead of this machine's."""
        before = self.clock_ms or 0
        self.clock_ms = round(clock_ms - time.time() * 1000)
        if abs(self.clock_ms) > MAX_CLOCK_MS >= abs(before):
            ahead = round(self.clock_ms / 1000)
            log.warning("ClickHouse's clock is %+d s from this machine's: set one of them", ahead)

    def now_ms(self):
        """The later of the two clocks, in ms since 1970."""
        return time.time() * 1000 + max(0, self.clock_ms or 0)

    def deliver(self, count, newest, limit):
        """Note that Perspective has taken `count` rows, the newest of them stamped `newest` ms."""
        self.rows = min(self.rows + count, limit)
        self.delivered += count
        self.deliveries.append((time.monotonic(), count))
        age = self.now_ms() - (newest or 0)
        plausible = newest and newest >= YEAR_2000 and age >= -60_000
        self.lag_ms = round(max(0, age)) if plausible else None

    def polled(self, seconds, wait):
        self.poll_ms = round(1000 * seconds, 1)
        self.due = time.monotonic() + wait

    def as_dict(self):
        """Return what /healthz says."""
        now, span = time.monotonic(), max(RATE_SECONDS, 2 * self.interval)
        delivered = [rows for at, rows in list(self.deliveries) if at >= now - span]
        overdue = now - self.due > 2 * MAX_PAUSE
        return {
            "clickhouse": "down" if overdue else self.state,
            "table": self.table,
            "rows": self.rows,
            "delivered": self.delivered,
            "rows_per_second": round(sum(delivered) / span),
            "lag_ms": self.lag_ms,
            "poll_ms": self.poll_ms,
            "viewers": len(self.relay.viewers),
        }

    def status(self):
        """Return the row of the status table."""
        return self.as_dict() | {
            "database": self.database,
            "columns": json.dumps([*map(shown_name, self.columns), "slot", "arrival"]),
            "version": self.version,
            "time": round(time.time() * 1000),
            "clock_ms": self.clock_ms,
        }

    def publish(self):
        with self.relay.change_tables():
            self.relay.tables[STATUS_TABLE].update([self.status()])


# ---------------------------------------------------------------------------------------------
# Values of any table. Perspective rejects strings that are not UTF-8, and cuts them at a NUL byte.
# NaN and infinity would leave wrong sums behind. What Perspective has no type for becomes a string,
# and so do integers of 64 bits: a browser rounds them above 2^53.

STRING_SQL = "replaceAll(toValidUTF8(toString({})), char(0), '\N{REPLACEMENT CHARACTER}')"


def shown_name(name):
    """Return a column's name in Perspective, where some names are reserved or ours."""
    reserved = re.fullmatch("psp_(pkey|op|okey)|__INDEX__|(slot|arrival)_*", name)
    return f"{name}_" if reserved else name


# By the ClickHouse type, without Nullable and LowCardinality; every other type becomes a string.
VALUE_SQL = {
    r"Bool|U?Int(8|16|32)\b": "{0}",
    r"Date(32)?\b": "toDate32({0})",  # ClickHouse before 26.2 writes a Date as a number
    r"DateTime": "toDateTime64({0}, 3, 'UTC')",
    r"Float": "if(isFinite({0}), {0}, NULL)",
    r"BFloat|Decimal": "if(isFinite(toFloat64({0})), toFloat64({0}), NULL)",
}


def value_sql(kind):
    """Return SQL for a value of a ClickHouse type that Perspective has, too, or None."""
    plain = re.sub(r"(Nullable|LowCardinality|SimpleAggregateFunction)\((\w+, )?", "", kind)
    return next((sql for types, sql in VALUE_SQL.items() if re.match(types, plain)), None)


def is_unbounded_string(kind):
    """Return whether a column of this type is shown as strings, of which there may be many."""
    return value_sql(kind) is None and not re.match(r"LowCardinality|(Nullable\()?Enum", kind)


def select_safely(name, kind):
    """Return SQL that selects a column of `t` as a value that Perspective takes."""
    column, sql = f"t.{quote_identifier(name)}", value_sql(kind)
    if sql is None:
        value = f"toLowCardinality({STRING_SQL.format(column)})"  # a repeated string comes once
    elif "LowCardinality" in kind:
        # Perspective crashes on a dictionary of anything but strings; `if` makes a plain column.
        value = sql.format(f"if(1, {column}, NULL)")
    else:
        value = sql.format(column)
    return f"{value} AS {quote_identifier(shown_name(name))}"


# Perspective never frees a string. So the tables are recreated when the strings that came since
# they were made take too much memory, in the server and in each browser.
MAX_STRING_BYTES = 500_000_000
STRING_OVERHEAD = 300  # bytes in Perspective, besides the string itself
STRING_HASHES = 1 << 24
STRINGS_SQL = f"""
SELECT groupArray(hash), groupArray(bytes) FROM (
    SELECT DISTINCT cityHash64(number, string) % {STRING_HASHES} AS hash, length(string) AS bytes
    FROM (SELECT [{{strings}}] AS strings FROM ({{rows}}))
    ARRAY JOIN strings AS string, arrayEnumerate(strings) AS number)
"""


class Strings:
    """Counts the bytes of strings that did not come before. Repeated ones cost nothing."""

    def __init__(self):
        self.forget()

    def forget(self):
        self.seen, self.bytes = np.zeros(STRING_HASHES, bool), 0

    def add(self, hashes, lengths):
        """Count strings by hash and length in bytes; two of the same hash count once."""
        hashes, lengths = np.array(hashes, int), np.array(lengths, int)
        new = ~self.seen[hashes]
        self.bytes += int(np.sum(lengths[new] + STRING_OVERHEAD))
        self.seen[hashes] = True

    @property
    def too_many(self):
        return self.bytes > MAX_STRING_BYTES


# ---------------------------------------------------------------------------------------------
# The relay. All viewers of a table need the same: its rows, then its changes. So the engine has one
# plain view of each table, and encodes each change once for all viewers.


class Relay:
    """Hosts the Perspective tables, and sends their changes to the viewers."""

    def __init__(self, loop):
        self.loop = loop
        self.server = perspective.Server()
        self.client = self.server.new_local_client()
        self.session = self.server.new_session(lambda answer: self.answers.append(answer))
        self.lock = threading.Lock()  # of the engine, which one thread at a time may use
        self.turn = asyncio.Lock()  # of the viewers' requests
        self.tables, self.views = {}, {}
        self.viewers = set()
        self.answers = []  # of the engine to the request in hand
        self.snapshots = {}  # Arrow streams by table, until its next change
        self.changes = []  # (table, kind of message, its body)
        self.max_unread = 4 << 20  # bytes

    @contextlib.contextmanager
    def change_tables(self):
        """Hold the engine while tables change, and then send all messages of the change together.

        Otherwise a viewer could draw half of a change; and a read in another thread would make the
        engine apply the change there, and report it out of order.
        """
        with self.lock:
            try:
                yield
            finally:
                with contextlib.suppress(RuntimeError):  # the server has ended, and its loop too
                    self.loop.call_soon_threadsafe(self.send, self.changes)
                self.changes = []

    @contextlib.asynccontextmanager
    async def read_tables(self):
        """Wait until no table is being changed or made, and keep it so."""
        async with self.turn:
            while not self.lock.acquire(blocking=False):
                await asyncio.sleep(0.002)
            try:
                yield
            finally:
                self.lock.release()

    def host(self, live, rows, rollups):
        """Recreate all tables but the status: those of the rollups, then the live one.

        A viewer who sees the live table sees all. Viewers of earlier tables are disconnected, as
        their mirrors are out of date; they come back.
        """
        with self.change_tables():
            outdated = [name for name in self.tables if name != STATUS_TABLE]
            if outdated:
                self.loop.call_soon_threadsafe(self.disconnect_viewers)
            for name in outdated:
                table, view = self.tables.pop(name), self.views.pop(name)
                view.delete()
                table.delete()
            for rollup in rollups:
                self.add_table(f"{live}_{rollup.name}", rollup.columns, next(iter(rollup.columns)))
            self.add_table(live, rows, "slot")

    def add_table(self, name, rows, index):
        """Make a table of an Arrow stream, or an empty one of {column: type}."""
        table = self.client.table(rows, name=name, index=index)
        view = table.view()

        def note(kind, arrow):
            self.changes.append((name, kind, field(kind, field(1, arrow))))

        view.on_update(lambda _, arrow: note(ON_UPDATE, arrow), mode="row")
        view.on_remove(lambda _, arrow: note(ON_REMOVE, arrow))
        self.tables[name], self.views[name] = table, view

    def measure(self, rows, column):
        """Return how many rows an Arrow stream has, and the greatest value of a column, or None."""
        with self.lock:
            table = self.client.table(rows)
            view = table.view()
            try:
                return table.size(), view.get_min_max(column)[1] if column else None
            finally:
                view.delete()
                table.delete()

    def measure_table(self, name, column):
        """The same of a table that is hosted."""
        with self.lock:
            size = self.tables[name].size()
            return size, self.views[name].get_min_max(column)[1] if column else None

    def ask_engine(self, request):
        """Return the engine's answer to a request that has no parameters."""
        self.session.handle_request(request)
        return self.answers.pop()

    async def snapshot(self, name):
        """The rows of a table as an Arrow stream; read once between two changes."""
        if name not in self.snapshots:
            to_arrow = functools.partial(self.views[name].to_arrow, compression="zstd")
            self.snapshots[name] = await self.loop.run_in_executor(None, to_arrow)
        arrow = self.snapshots[name]
        self.max_unread = max(self.max_unread, UNREAD_SNAPSHOTS * len(arrow))
        return arrow

    def send(self, changes):
        """Send changes to all who subscribed."""
        for name, kind, body in changes:
            self.snapshots.pop(name, None)
            self.max_unread = max(self.max_unread, UNREAD_SNAPSHOTS * len(body))
            for viewer in list(self.viewers):
                for view in viewer.views.values():
                    if view.table == name and kind in view.subscriptions:
                        viewer.send(view.subscriptions[kind] + body)

    def disconnect_viewers(self, code=1012, reason="the tables were recreated"):
        self.snapshots.clear()
        for viewer in list(self.viewers):
            viewer.close(code, reason)


# ---------------------------------------------------------------------------------------------
# What a viewer may send. Whoever can send to a Perspective session can do anything, so viewers'
# requests do not reach the engine, except for four that have no parameters. `Viewer.answer` answers
# the others on the list. Everything else gets Perspective's own error.
#
# A request is a protobuf message: field 1 is its id, field 2 the table or view it is about, and one
# more field says what is asked. The answer carries the same id and name. The numbers are those of
# rust/perspective-client/perspective.proto in the Perspective repository.

FEATURES, HOSTED_TABLES, SCHEMA, SIZE = 3, 4, 7, 8
MAKE_VIEW, DELETE_VIEW, TO_ARROW, ON_UPDATE, ON_REMOVE, SERVER_ERROR = 6, 11, 16, 21, 39, 50
ENGINE_REQUESTS = (FEATURES, HOSTED_TABLES, SCHEMA, SIZE)
REQUESTS = (*ENGINE_REQUESTS, MAKE_VIEW, DELETE_VIEW, TO_ARROW, ON_UPDATE, ON_REMOVE)

MAX_VIEWERS = 2000
MAX_VIEWS = 20  # of one viewer; the dashboard has five
MAX_MESSAGE = 4096  # bytes from a viewer; the dashboard's are below 100
UNREAD_SNAPSHOTS = 4  # a viewer may have the bytes of this many unread
PING_SECONDS = 60  # a viewer that answers no ping for so long is gone
FREE_REQUESTS = 60  # of a page that opens, which sends half as many
REQUEST_SHARE = 0.1  # of the time that the later requests of one viewer may take


def field(number, value):
    """Encode a protobuf field, int or bytes: https://protobuf.dev/programming-guides/encoding"""

    def varint(value):
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


# The id of a request, and the length of its name: one byte, as names have fewer than 128.
HEAD = re.compile(rb"(?:\x08(?:[\x80-\xff]{1,9}[\x01-\x7f]|[\0-\x7f]))?(?:\x12([\0-\x7f]))?")


def split_head(message):
    """Split a request into (id and name as they came, name, the rest)."""
    match = HEAD.match(message)
    end = match.end() + (match[1] or b"\0")[0]
    return message[:end], message[match.end() : end], message[end:]


def split_field(message, numbers):
    """Split a message that is one field of bytes into its number and the bytes.

    Raises RefusedError if it is not, if the number is another, or if there are over 127 bytes.
    """
    for number in numbers:
        body = message[len(field(number, b"")) :]
        if message == field(number, body):
            return number, body
    raise RefusedError("there is no such request")


class RefusedError(Exception):
    """A viewer asked for what is not on the list."""


class View(NamedTuple):
    """A viewer's plain view of a table: a name and no configuration."""

    table: str
    subscriptions: dict  # head of the messages by ON_UPDATE or ON_REMOVE


class Viewer(WebSocketHandler):
    """One viewer's connection."""

    def initialize(self):
        self.relay, self.tail = self.settings["relay"], self.settings["tail"]
        self.views = {}  # by name
        self.requests = 0

    def check_origin(self, origin):
        known = is_known_origin(origin, self)
        if not known:
            log_refused_origin(origin[:200], self.request.host[:200])
        return known

    def open(self):
        if len(self.relay.viewers) >= MAX_VIEWERS:
            self.close(1013, f"the server is full: it takes {MAX_VIEWERS} viewers")
            return
        self.relay.viewers.add(self)
        self.tail.wake.set()  # it polls rarely while there are no viewers

    def on_close(self):
        self.relay.viewers.discard(self)

    async def on_message(self, message):
        """Answer a request. The next one is read when this answer has been sent."""
        if self not in self.relay.viewers:
            return
        async with self.relay.read_tables():
            began = time.monotonic()
            answer = await self.respond(message)
            sent = self.send(answer) if answer else None
            took = time.monotonic() - began
        if sent:
            with contextlib.suppress(WebSocketClosedError):
                await sent
        self.requests += 1
        if self.requests > FREE_REQUESTS:
            await asyncio.sleep(took * (1 / REQUEST_SHARE - 1))

    async def respond(self, message):
        """Return the answer, which may be an error; None if none is due."""
        head = b""
        try:
            if isinstance(message, str):
                raise RefusedError("there is no such request")
            head, name, request = split_head(message)
            number, body = split_field(request, REQUESTS)
            if number in ENGINE_REQUESTS and body == b"":
                name.decode()  # otherwise the engine prints an error
                ask = functools.partial(self.relay.ask_engine, message)
                return await self.relay.loop.run_in_executor(None, ask)
            return await self.answer(head, name.decode(), number, body)
        except (RefusedError, UnicodeDecodeError) as error:
            text = f"refused ({error}): a viewer can mirror tables and nothing else"
        except Exception:
            log.exception("cannot answer a viewer")
            text = "the server failed to answer; its log says why"
        return head + field(SERVER_ERROR, field(1, text.encode()))

    async def answer(self, head, name, number, body):
        """Return the answer to a request. Raises RefusedError if it is not on the list."""
        if number == MAKE_VIEW:
            self.make_view(name, split_field(body, [1])[1])
            return head + field(MAKE_VIEW, body)
        if name not in self.views:
            raise RefusedError("you have no such view")
        view = self.views[name]
        if number == DELETE_VIEW and body == b"":
            del self.views[name]
            return head + field(DELETE_VIEW, b"")
        if number == TO_ARROW and body == field(1, b""):  # all rows and columns
            arrow = await self.relay.snapshot(view.table)
            return head + field(TO_ARROW, field(1, arrow))
        if (number, body) in ((ON_UPDATE, field(1, 0)), (ON_REMOVE, b"")):  # 0: changes by row
            if number in view.subscriptions:
                raise RefusedError("you have subscribed already")
            view.subscriptions[number] = head
            return None
        raise RefusedError("there is no such request")

    def make_view(self, table, name):
        if table not in self.relay.tables:
            raise RefusedError("there is no such table")
        if len(self.views) >= MAX_VIEWS:
            raise RefusedError(f"a viewer has at most {MAX_VIEWS} views")
        if name.decode() in self.views:
            raise RefusedError("the view's name is in use")
        self.views[name.decode()] = View(table, {})

    def send(self, message):
        """Write a message. Returns a future that is done when it is on its way, or None."""
        try:
            if self.ws_connection:
                self.ws_connection.stream.max_write_buffer_size = self.relay.max_unread
            sent = self.write_message(message, binary=True)
            sent.add_done_callback(asyncio.Future.exception)  # that of a connection that ended
            return sent
        except WebSocketClosedError:
            pass
        except StreamBufferFullError:
            log.warning("disconnected a viewer that does not read what is sent to it")
            self.ws_connection.stream.close()


# ---------------------------------------------------------------------------------------------
# The rollups: tables that ClickHouse computes. To add one, add an entry to ROLLUPS. Each has a
# thread and a client of its own, so a slow or failing one never holds up another, nor the tail.


class Rollup(NamedTuple):
    """The table `<live table>_<name>` with the rows that `sql` gives.

    `columns` are Perspective's types by name; the first column is the index, with one row for each
    value. In the SQL, {source} stands for the ClickHouse table, {ticks} for the ticks with a
    plausible time, with the columns of TICKS_SQL, and {recent} for the last five minutes of them.
    It runs when rows have changed, at most every `interval` seconds. Cast integers of 64 bits by
    toFloat64, and dates and times to DateTime64(3).

    Rows of steps of time need not be computed again and again. `step` is their length in ms, or SQL
    for it; then {step} is this number, and `time`, a column, is the beginning of the step. After
    inserts, {ticks} and {recent} are only those of the steps that have new ticks, and rows that are
    older than the newest by more than `span` ms are removed.
    """

    name: str
    columns: dict
    sql: str
    interval: float
    step: int | str = None
    span: float = math.inf


# Rollups contain the ticks from the year 2000 to one minute in the future, by the later of the two
# clocks, so that a wrong clock cannot freeze a price or stretch an axis. Ticks of the same
# millisecond are ordered by insert block and offset; as one number, because comparing tuples takes
# ClickHouse five times as long.
YEAR_2000 = 946_684_800_000  # ms since 1970
PLAUSIBLE_TIME = """t.timestamp >= toDateTime64('2000-01-01 00:00:00', 3, 'UTC')
        AND t.timestamp <= greatest(now64(3), fromUnixTimestamp64Milli({now_ms}, 'UTC'))
            + INTERVAL 1 MINUTE"""
ARRIVAL_SQL = "toInt128(ms) * 1000000000000000000 + t._block_number * 1000000000 + t._block_offset"
TICKS_SQL = f"""(
    SELECT
        t.timestamp AS time,
        toUnixTimestamp64Milli(t.timestamp) AS ms,
        {STRING_SQL.format("t.ticker")} AS ticker,
        {STRING_SQL.format("t.client")} AS client,
        if(isFinite(t.open), t.open, NULL) AS open,
        if(isFinite(t.high), t.high, NULL) AS high,
        if(isFinite(t.low), t.low, NULL) AS low,
        if(isFinite(t.close), t.close, NULL) AS close,
        toFloat64(t.volume) AS volume,
        {{arrival}} AS arrival
    FROM {{source}} AS t
    WHERE {PLAUSIBLE_TIME} {{condition}}
) AS t"""
# The time of the newest tick that counts, by the order of the primary key.
NEWEST_SQL = f"""(SELECT t.timestamp FROM {{source}} AS t WHERE {PLAUSIBLE_TIME}
        ORDER BY t.timestamp DESC LIMIT 1)"""
OLDEST_SQL = NEWEST_SQL.replace("DESC", "ASC")
# The five minutes end at the newest tick, not now: after a pause or a restart the last ticks are
# still shown. They begin with a whole candle.
RECENT_CONDITION = f"""AND t.timestamp >= toStartOfInterval(
        {NEWEST_SQL} - INTERVAL 5 MINUTE, INTERVAL 2 SECOND)"""
CHANGED_CONDITION = f"""AND t.timestamp >= fromUnixTimestamp64Milli(intDiv((
            SELECT minOrNull(toUnixTimestamp64Milli(t.timestamp)) FROM {{source}} AS t
            WHERE {PLAUSIBLE_TIME} AND t._block_number > {{cursor}}
        ), {{step}}) * {{step}}, 'UTC')"""
# toString keeps 187.79 of a Float32 from becoming 187.7899932861328.
OHLCV_COLUMNS = """toFloat64(toString(argMin(t.open, t.arrival))) AS open,
            toFloat64(toString(max(t.high))) AS high,
            toFloat64(toString(min(t.low))) AS low,
            toFloat64(toString(argMax(t.close, t.arrival))) AS close,
            sum(t.volume) AS volume"""
OHLCV_TYPES = dict.fromkeys(("open", "high", "low", "close", "volume"), "float")
# The size of a rollup is bounded: the tickers with the most volume come first, and in the history
# the 120 largest pairs of ticker and client of each step; the others are added up. Perspective
# never frees a string, so keys are reused after 256 steps, more than there are at once. In the
# history the ticker's length comes first, so that "A 1" + "2" and "A" + "1 2" get different keys.
MAX_ROWS = 20_000
ROLLUPS = [
    Rollup(
        "tickers",
        columns={"ticker": "string"}
        | dict.fromkeys(("last", "change", "high", "low", "volume"), "float"),
        interval=1,
        sql=f"""
        SELECT ticker, close AS last, (close - open) / nullIf(abs(open), 0) AS change,
            high, low, volume
        FROM (SELECT t.ticker AS ticker, {OHLCV_COLUMNS} FROM {{recent}} GROUP BY t.ticker)
        ORDER BY volume DESC, ticker LIMIT {MAX_ROWS}""",
    ),
    Rollup(
        "candles",
        columns={"key": "string", "time": "datetime", "ticker": "string"} | OHLCV_TYPES,
        interval=1,
        step=2000,
        span=300_000,
        sql=f"""
        SELECT
            concat(t.ticker, ' ', toString(intDiv(t.ms, {{step}}) % 256)) AS key,
            fromUnixTimestamp64Milli(intDiv(t.ms, {{step}}) * {{step}}, 'UTC') AS time,
            t.ticker AS ticker,
            {OHLCV_COLUMNS}
        FROM {{recent}}
        GROUP BY t.ticker, intDiv(t.ms, {{step}})
        ORDER BY sum(volume) OVER (PARTITION BY ticker) DESC, ticker, time DESC LIMIT {MAX_ROWS}""",
    ),
    Rollup(
        "history",
        columns={"key": "string", "time": "datetime", "ticker": "string", "client": "string"}
        | OHLCV_TYPES
        | {"ticks": "float", "last_tick": "datetime"},
        interval=30,
        step=f"""
        SELECT greatest(1, arrayFirst( -- 0 in an empty table
            seconds -> dateDiff('ms', {OLDEST_SQL}, {NEWEST_SQL}) < seconds * 160000, -- 160 steps
            [1, 5, 15, 60, 300, 900, 3600, 14400, 86400, 604800, 2592000, 7776000, 31536000]
        )) * 1000""",
        sql=f"""
        SELECT
            if(other, concat('others ', number),
                concat(toString(length(ticker)), ' ', ticker, ' ', client, ' ', number)) AS key,
            fromUnixTimestamp64Milli(any(start), 'UTC') AS time,
            if(other, '(others)', ticker) AS ticker,
            if(other, '(others)', client) AS client,
            any(if(other, NULL, open)) AS open,
            any(if(other, NULL, high)) AS high,
            any(if(other, NULL, low)) AS low,
            any(if(other, NULL, close)) AS close,
            sum(volume) AS volume,
            toFloat64(sum(ticks)) AS ticks,
            max(last_tick) AS last_tick
        FROM (
            SELECT *, toString(intDiv(start, {{step}}) % 256) AS number, row_number() OVER (
                PARTITION BY start ORDER BY volume DESC, ticker, client) > 120 AS other
            FROM (
                SELECT t.ticker AS ticker, t.client AS client,
                    intDiv(t.ms, {{step}}) * {{step}} AS start,
                    {OHLCV_COLUMNS}, count() AS ticks, max(t.time) AS last_tick
                FROM {{ticks}}
                GROUP BY t.ticker, t.client, intDiv(t.ms, {{step}})
            )
        )
        GROUP BY key, ticker, client""",
    ),
]
# The rollups are made if the table has these columns.
ROLLUP_COLUMNS = {name: kind for name, kind in COLUMNS.items() if name != "date"}
ROLLUP_SHARE = 0.1  # of a rollup's time in which it may run
ROLLUP_TIMEOUT = 120  # seconds
# One thread: the history of a large table takes seconds, and leaves the other cores alone.
ROLLUP_SETTINGS = {"max_execution_time": ROLLUP_TIMEOUT, "max_threads": 1}


def finite(value):
    """Return None for NaN and infinity, which Perspective refuses."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RollupThread:
    """Keeps a rollup's table equal to what its SQL gives. `run` is for a thread of its own.

    `source` is another table to compute it from, such as a Distributed one.
    """

    def __init__(self, rollup, tail, source=None):
        self.rollup, self.tail, self.relay = rollup, tail, tail.relay
        self.name, self.source = f"{tail.table}_{rollup.name}", source
        self.stop, self.client, self.error = threading.Event(), None, None
        self.table = None  # Perspective's, which the rows are in
        self.rows = {}  # by index
        self.version, self.step = (0, 0), None  # the tail's version when it last ran
        self.failing = False

    def run(self):
        """Run the SQL when rows have changed, until `stop` is set."""
        due = 0
        while not self.stop.wait(0.1):
            began = time.monotonic()
            table = self.relay.tables.get(self.name)
            changed = self.version != self.tail.version or self.source
            if table is None or (table is self.table and not (changed and began >= due)):
                continue
            try:
                self.refresh(table)
            except Exception as error:
                self.report_failure(error)
            else:
                self.failing = False
            took = time.monotonic() - began
            interval = self.rollup.interval if self.rows else 1  # an empty one has rows soon
            due = began + max(interval, took / ROLLUP_SHARE)

    def refresh(self, table):
        if self.client is None:
            settings = SETTINGS | ROLLUP_SETTINGS
            self.client = producer.connect(
                self.tail.dsn, send_receive_timeout=ROLLUP_TIMEOUT, settings=settings
            )
        version = self.tail.version
        step = self.rollup.step
        if isinstance(step, str):
            step = self.query(step)[1][0][0]
        # All rows are computed after anything but inserts, for another step, and if the limit may
        # have cut rows off.
        inserts_only = version[0] == self.version[0] and table is self.table and not self.source
        partial = inserts_only and step and step == self.step and len(self.rows) < MAX_ROWS
        found, rows = self.query(self.rollup.sql, step, self.version[1] if partial else None)
        names = [*self.rollup.columns]
        if rows and [*found] != names:  # Perspective would ignore the others
            declared = ", ".join(names)
            raise TableMismatchError(f"its SQL gives {', '.join(found)}, and not {declared}")
        rows = {row[0]: row for row in rows}
        if partial:
            rows = self.add_steps(rows, names.index("time"))
        self.apply(table, names, rows)
        self.version, self.step = version, step

    def add_steps(self, rows, time_at):
        """Return the present rows with those of the given steps instead of theirs."""
        steps = {row[time_at] for row in rows.values()}
        rows = {key: row for key, row in self.rows.items() if row[time_at] not in steps} | rows
        oldest = max((row[time_at] for row in rows.values()), default=0) - self.rollup.span
        return {key: row for key, row in rows.items() if row[time_at] >= oldest}

    def query(self, sql, step=None, cursor=None):
        """Return the columns' names and the rows of SQL with placeholders; see Rollup."""
        values = {
            "source": self.source or self.tail.source,
            "now_ms": round(self.tail.health.now_ms()),
            "step": step,
            "cursor": cursor,
        }
        changed = "" if cursor is None else CHANGED_CONDITION.format(**values)
        values["arrival"] = "ms" if self.source else ARRIVAL_SQL
        ticks = TICKS_SQL.format(**values, condition=changed)
        recent = TICKS_SQL.format(**values, condition=changed + RECENT_CONDITION.format(**values))
        sql = sql.format(**values, ticks=ticks, recent=recent)
        formats = {"DateTime64": "int"}
        result = self.client.query(sql, query_formats=formats, settings=self.tail.settings)
        return result.column_names, result.result_rows

    def apply(self, table, names, rows):
        """Apply what is different from the last run."""
        old = self.rows if table is self.table else {}
        # If Perspective fails half-way, the next run sends all rows, and removes all others.
        self.table = table
        self.rows = dict.fromkeys([*old, *rows])
        self.step = None
        gone = list(old.keys() - rows.keys())
        changed = [map(finite, row) for key, row in rows.items() if old.get(key) != row]
        with self.relay.change_tables():
            if self.relay.tables.get(self.name) is not table:
                return  # it was recreated meanwhile
            if gone:
                table.remove(gone)
            if changed:
                columns = map(list, zip(*changed, strict=True))
                table.update(dict(zip(names, columns, strict=True)))
        self.rows = rows

    def report_failure(self, error):
        """Log that the rollup failed, once; if ClickHouse is away, the tail says so."""
        if self.client:
            with contextlib.suppress(Exception):
                self.client.close()
            self.client = None
        if not self.failing and not (self.tail.health.state != "up" and producer.is_away(error)):
            self.failing = True
            fault = error if problem_of(error)[1] else None
            text = explain(error)
            log.warning("rollup %s failed, trying again: %s", self.name, text, exc_info=fault)


# ---------------------------------------------------------------------------------------------
# The other handlers.

PAGE = Path(__file__).parent / "prsp-viewer.html"
# The browser build in the wheel of perspective-python always matches the engine.
BROWSER_BUILD = Path(perspective.__file__).parent / "widget" / "static"
# The page runs its own script, and Perspective's workers and one input handler.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " script-src 'self' blob: 'wasm-unsafe-eval' 'unsafe-hashes' 'sha256-{}'"
    " 'sha256-ql0fd2+U9UEu870FX0Rf6Z8yqUKlNLSDxPI1ipIxack='; worker-src blob:;"
    " style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'"
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # and where this machine finds it


def is_known_origin(origin, handler):
    """Whether pages of an origin may connect: the server's own, or one of --allow-origin."""
    return origin in handler.settings["origins"] or origin == f"http://{handler.request.host}"


@functools.lru_cache(maxsize=100)  # so that each is logged once
def log_refused_origin(origin, host):
    if origin == "null":
        log.warning("refused a page of no origin, such as a sandboxed frame")
    else:
        option = f"--allow-origin {origin}"
        log.warning("refused a page of %s at %s: to let it connect, add %s", origin, host, option)


class Handler(RequestHandler):
    """Headers of all answers."""

    def set_default_headers(self):
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-cache")  # browsers ask whether it has changed


class NotFoundHandler(Handler):
    """All paths that are not in the table of routes, and all unknown host names."""

    def prepare(self):
        self.set_status(404)
        self.set_header("Content-Type", "text/plain")
        self.finish("404: no such page, or an unknown host name: use localhost or --allow-origin\n")


class PageHandler(Handler):
    def get(self):
        page = PAGE.read_bytes().replace(b"\r\n", b"\n")  # browsers hash it with these line ends
        [script] = re.findall(rb"<script[^>]*>(.*?)</script>", page, re.DOTALL)
        checksum = base64.b64encode(hashlib.sha256(script).digest()).decode()
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY.format(checksum))
        self.finish(page)


class BrowserBuildHandler(Handler):
    """The two files of Perspective's browser build, compressed for those who take it."""

    async def get(self, name):
        kind = "text/css" if name.endswith("css") else "text/javascript"
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.set_header("Vary", "Origin, Accept-Encoding")
        origin = self.request.headers.get("Origin")
        if origin and is_known_origin(origin, self):
            self.set_header("Access-Control-Allow-Origin", origin)
        compressed = "gzip" in self.request.headers.get("Accept-Encoding", "")
        if compressed:
            self.set_header("Content-Encoding", "gzip")
        loop = asyncio.get_running_loop()
        content, self.etag = await loop.run_in_executor(None, self.read, name, compressed)
        self.finish(content)

    def compute_etag(self):
        return self.etag

    @staticmethod
    @functools.cache
    def read(name, compressed):
        """Return the content and its ETag, which stay the same across restarts."""
        content = (BROWSER_BUILD / name).read_bytes()
        content = gzip.compress(content, 6, mtime=0) if compressed else content
        return content, f'"{hashlib.sha256(content).hexdigest()}"'


class HealthHandler(Handler):
    """How the server is doing, as JSON; status 503 while ClickHouse is away."""

    def get(self):
        health = self.settings["tail"].health.as_dict()
        self.set_status(200 if health["clickhouse"] == "up" else 503)
        self.finish(health)


def make_app(relay, tail, address, origins):
    """Return the application, which answers to the configured host names only.

    A foreign name that somebody points at this address (DNS rebinding) gets nothing.
    """
    names = {*LOOPBACK, address, *(urlsplit(origin).hostname for origin in origins)}
    hosts = "|".join(re.escape(f"[{name}]" if ":" in name else name) for name in names if name)
    if address in ("", *ANY_ADDRESS):
        hosts += r"|[\d.]+|\[[\da-f:.]+\]"  # an IP address is no name that points elsewhere
    app = Application(
        default_handler_class=NotFoundHandler,
        websocket_max_message_size=MAX_MESSAGE,
        websocket_ping_interval=PING_SECONDS,
        websocket_ping_timeout=PING_SECONDS,
        relay=relay,
        tail=tail,
        origins=origins,
    )
    routes = [
        (r"/(?:prsp-viewer\.html)?", PageHandler),
        (r"/perspective/(perspective-anywidget\.(?:js|css))", BrowserBuildHandler),
        (r"/healthz", HealthHandler),
        (r"/websocket", Viewer),
    ]
    app.add_handlers(f"(?i)({hosts})$", routes)
    return app


# ---------------------------------------------------------------------------------------------
# The command line.

EPILOG = """\
example: python perspective_server.py --dsn clickhouse://user:password@host:8123/mydb --table trades

Ctrl-C, SIGTERM and SIGHUP end the server with status 0. An error that a retry cannot fix ends it
with status 1, an option that makes no sense with status 2."""
MAX_LIMIT = 1_000_000  # rows


def origin(text):
    """Parse an origin: scheme://host[:port]."""
    parts = urlsplit(text)
    complete = parts.hostname and parts.port != 0  # raises ValueError if the port is no number
    if text != f"{parts.scheme}://{parts.netloc}" or not complete or "http" not in parts.scheme:
        raise ArgumentTypeError(f"{text} is not an origin like https://host:port")
    return text


def table_name(text):
    """Parse [DATABASE.]TABLE, each perhaps in backticks, into (database or None, table)."""
    name = r"(`(?:[^`\\]|\\.)+`|[^`.]+)"
    match = re.fullmatch(rf"(?:{name}\.)?{name}", text)
    if not match or text == STATUS_TABLE:
        raise ArgumentTypeError(f"{text} is not a name like mydb.trades or `my.table`")
    return tuple(
        part and re.sub(r"\\(.)", r"\1", part[1:-1] if part[0] == "`" else part)
        for part in match.groups()
    )


def parse(argv):
    about = __doc__.splitlines()[0]
    parser = producer.Parser(prog="perspective_server.py", description=about, epilog=EPILOG)
    add = parser.add_argument
    number = producer.number
    table = {"type": table_name, "metavar": "[DATABASE.]TABLE"}
    source = parser.add_mutually_exclusive_group()
    producer.add_dsn_option(source)
    embedded = "ClickHouse and producer in this process, data in PATH (default: a temporary folder)"
    source.add_argument("--embedded", nargs="?", const="", metavar="PATH", help=embedded)
    add("--address", default="127.0.0.1", help="where to listen (default: 127.0.0.1 and ::1)")
    add("--port", type=number(int, 1, 65535), default=8080, help="TCP port (default: 8080)")
    interval = "seconds between polls (default: 0.25)"
    add("--interval", type=producer.seconds, default=0.25, metavar="SECONDS", help=interval)
    limit = f"rows in the live table (default: 25000, at most {MAX_LIMIT})"
    add("--limit", type=number(int, 1, MAX_LIMIT), default=25_000, metavar="ROWS", help=limit)
    live = f"the MergeTree table to follow (default: {TABLE} in the DSN's database)"
    add("--table", **table, default=(None, TABLE), help=live)
    add("--history-table", **table, help="what the history is computed from, if another")
    origins = {"nargs": "+", "action": "extend", "default": [], "metavar": "ORIGIN"}
    add("--allow-origin", type=origin, help="whose pages may connect, besides our own", **origins)
    return parser.parse_args(argv)


def fail(text):
    print(f"perspective_server.py: {text}", file=sys.stderr)
    return 1


def listen(address, port):
    """Return sockets; for a loopback address those of IPv4 and IPv6, as browsers may take either.

    Raises OSError.
    """
    sockets = []
    for each in ("127.0.0.1", "::1") if address in LOOPBACK else (address,):
        try:
            sockets += bind_sockets(port, each)
        except OSError as error:
            if not sockets or error.errno == errno.EADDRINUSE:
                for listening in sockets:
                    listening.close()
                raise
    return sockets


class StartError(Exception):
    """The server cannot start. The message says why."""


def start_engine(path, cleanup):
    """Start ClickHouse in this process, with its data in `path` or in a temporary folder.

    Returns the DSN. Raises StartError.
    """
    folder = path or cleanup.enter_context(
        tempfile.TemporaryDirectory(prefix="clickhouse-", ignore_cleanup_errors=True)
    )
    dsn = f"chdb://{quote(os.path.abspath(folder))}"
    try:
        os.makedirs(folder, exist_ok=True)
        client = cleanup.enter_context(contextlib.closing(producer.connect(dsn)))
        with contextlib.suppress(TableMismatchError):  # the producer reports it
            producer.create_table(client, producer.split_dsn(dsn)[1])
    except ImportError:
        raise StartError("--embedded needs chdb: pip install 'clickhouse-connect[chdb]'") from None
    except OSError as error:
        raise StartError(f"cannot write to {folder} ({error.strerror})") from None
    except Exception as error:
        text = f"no engine in {folder}, is it in use elsewhere? {explain(error)}"
        raise StartError(text) from None
    return dsn


async def serve(options, sockets, cleanup):
    """Serve until a signal comes, or until a permanent error, which is returned.

    Raises StartError.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for signum in producer.stop_signals():
        loop.add_signal_handler(signum, ended.set)
    embedded = options.embedded is not None
    dsn = start_engine(options.embedded, cleanup) if embedded else options.dsn
    host = options.address
    if host not in LOOPBACK:
        log.warning("listening on %s: anyone who can reach this port can read the data", host)
    host = "localhost" if host in (*LOOPBACK, "") else ANY_ADDRESS.get(host, host)
    log.info("connecting to %s", producer.describe_dsn(dsn))
    log.info("open http://%s:%s/", f"[{host}]" if ":" in host else host, options.port)
    relay = Relay(loop)
    default = producer.split_dsn(dsn)[1]
    database, table = options.table[0] or default, options.table[1]
    health = Health(relay, database, table, options.interval)
    tail = Tail(relay, health, dsn, database, table, options.interval, options.limit)
    sources = {}
    if options.history_table:
        other, name = options.history_table
        sources["history"] = producer.full_name(other or default, name)
    workers = [tail, *(RollupThread(each, tail, sources.get(each.name)) for each in ROLLUPS)]
    if embedded:
        workers.append(producer.Producer(dsn, interval=0.25, rows=250, log=log.info))
    app = make_app(relay, tail, options.address, options.allow_origin)
    server = HTTPServer(app, max_body_size=MAX_MESSAGE, idle_connection_timeout=60)
    server.add_sockets(sockets)
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()

    while not ended.is_set() and all(worker.error is None for worker in workers):
        # In a thread: publishing waits for the engine, and shutdown must not.
        threading.Thread(target=health.publish, daemon=True).start()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), 1)

    server.stop()
    relay.disconnect_viewers(1001, "the server ends")
    for worker in workers:
        worker.stop.set()
    tail.wake.set()
    deadline = time.monotonic() + 1.5
    for thread in threads:
        await loop.run_in_executor(None, thread.join, max(0, deadline - time.monotonic()))
    for library in ("tornado.application", "asyncio"):
        logging.getLogger(library).disabled = True  # what viewers are sent is cancelled now
    return next((worker.error for worker in workers if worker.error), None)


def main(argv=None):
    """Run the server; returns the exit status."""
    options = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for library in ("tornado.access", "clickhouse_connect", "urllib3"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # failures are reported here, once
    clickhouse_connect.common.set_setting("invalid_setting_action", "drop")
    try:
        sockets = listen(options.address, options.port)
    except OSError as error:
        where = f"{options.address} port {options.port}"
        return fail(f"cannot listen on {where} ({error.strerror}): use another --address or --port")
    # Each viewer takes a file descriptor, and many shells allow 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2 * MAX_VIEWERS), hard), hard))
    with contextlib.ExitStack() as cleanup:
        try:
            error = asyncio.run(serve(options, sockets, cleanup))
        except StartError as error:
            return fail(str(error))
    return fail(explain(error)) if error else 0


if __name__ == "__main__":
    sys.exit(main())
