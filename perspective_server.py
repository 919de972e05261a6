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
import functools
import gzip
import hashlib
import json
import logging
import math
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import clickhouse_connect
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
# What viewers get: the live table, which holds the newest rows under the name of the ClickHouse
# table; the rollups, which ClickHouse computes; and `<live table>_status`, the server's status.
# To add a rollup, add an entry to ROLLUPS.


class Rollup(NamedTuple):
    """The table `<live table>_<name>` with the rows that `sql` gives, one for each `index`.

    In the SQL, {source} stands for the ClickHouse table, {ticks} for the ticks with a plausible
    time, with the columns of TICKS_SQL, and {recent} for the last five minutes of them. It runs
    when rows have changed, at most every `interval` seconds. Cast integers of 64 bits by toFloat64,
    and dates and times to DateTime64(3).
    """

    name: str
    index: str
    interval: float
    sql: str


# Perspective refuses text that is not UTF-8, and ends it at a zero byte.
TEXT_SQL = "replaceAll(toValidUTF8(toString({})), char(0), '\N{REPLACEMENT CHARACTER}')"
# Rollups contain the ticks from the year 2000 to one minute in the future, so that a wrong clock
# cannot freeze a price or stretch an axis. Ticks of the same millisecond are ordered by insert
# block and offset; as one number, because comparing tuples takes ClickHouse five times as long.
PLAUSIBLE_TIME = """t.timestamp >= toDateTime64('2000-01-01 00:00:00', 3, 'UTC')
        AND t.timestamp <= now64(3) + INTERVAL 1 MINUTE"""
YEAR_2000 = 946_684_800_000  # ms since 1970
ARRIVAL_SQL = "toInt128(ms) * 1000000000000000000 + t._block_number * 1000000000 + t._block_offset"
TICKS_SQL = f"""(
    SELECT
        t.timestamp AS time,
        toUnixTimestamp64Milli(t.timestamp) AS ms,
        {TEXT_SQL.format("t.ticker")} AS ticker,
        {TEXT_SQL.format("t.client")} AS client,
        if(isFinite(t.open), toFloat64(t.open), NULL) AS open,
        if(isFinite(t.high), toFloat64(t.high), NULL) AS high,
        if(isFinite(t.low), toFloat64(t.low), NULL) AS low,
        if(isFinite(t.close), toFloat64(t.close), NULL) AS close,
        toFloat64(t.volume) AS volume,
        {{arrival}} AS arrival
    FROM {{source}} AS t
    WHERE {PLAUSIBLE_TIME} {{condition}}
) AS t"""
# The five minutes end at the newest tick, not now: after a pause or a restart the last ticks are
# still shown. They begin with a whole candle.
RECENT_CONDITION = f"""AND t.timestamp >= toStartOfInterval(
        (SELECT t.timestamp FROM {{source}} AS t WHERE {PLAUSIBLE_TIME}
            ORDER BY t.timestamp DESC LIMIT 1) - INTERVAL 5 MINUTE, INTERVAL 2 SECOND)"""
OHLCV_COLUMNS = """argMin(t.open, t.arrival) AS open,
            max(t.high) AS high,
            min(t.low) AS low,
            argMax(t.close, t.arrival) AS close,
            sum(t.volume) AS volume"""
# Limits the size: the tickers with the most volume come first.
ORDER_AND_LIMIT = "sum(volume) OVER (PARTITION BY ticker) DESC, ticker, time DESC LIMIT 20000"
# Perspective never frees a text, so keys are reused after 256 intervals; at most 161 exist at once.
# The number behind the last space, and the length before a text, keep keys distinct.
ROLLUPS = [
    Rollup(
        "tickers",
        index="ticker",
        interval=1,
        sql="""
        SELECT
            t.ticker AS ticker,
            argMax(t.close, t.arrival) AS last,
            argMax(t.close, t.arrival) / argMin(t.open, t.arrival) - 1 AS change,
            max(t.high) AS high,
            min(t.low) AS low,
            sum(t.volume) AS volume
        FROM {recent}
        GROUP BY t.ticker
        ORDER BY volume DESC, ticker LIMIT 20000""",
    ),
    Rollup(
        "candles",
        index="key",
        interval=1,
        sql=f"""
        WITH 2000 AS step
        SELECT
            concat(t.ticker, ' ', toString(intDiv(t.ms, step) % 256)) AS key,
            fromUnixTimestamp64Milli(intDiv(t.ms, step) * step, 'UTC') AS time,
            t.ticker AS ticker,
            {OHLCV_COLUMNS}
        FROM {{recent}}
        GROUP BY t.ticker, intDiv(t.ms, step)
        ORDER BY {ORDER_AND_LIMIT}""",
    ),
    Rollup(
        "history",
        index="key",
        interval=30,
        sql=f"""
        WITH
            (SELECT max(t.ms) - min(t.ms) FROM {{ticks}}) AS span,
            arrayFirst(seconds -> span < seconds * 160000, -- 160 steps of ms
                [1, 5, 15, 60, 300, 900, 3600, 14400, 86400, 604800, 2592000, 7776000, 31536000]
            ) * 1000 AS step
        SELECT
            concat(toString(length(t.ticker)), ' ', t.ticker, ' ', t.client, ' ',
                toString(intDiv(t.ms, step) % 256)) AS key,
            fromUnixTimestamp64Milli(intDiv(t.ms, step) * step, 'UTC') AS time,
            t.ticker AS ticker,
            t.client AS client,
            {OHLCV_COLUMNS},
            toFloat64(count()) AS ticks,
            max(t.time) AS last_tick
        FROM {{ticks}}
        GROUP BY t.ticker, t.client, intDiv(t.ms, step)
        ORDER BY {ORDER_AND_LIMIT}""",
    ),
]
ROLLUP_COLUMNS = {name: kind for name, kind in COLUMNS.items() if name != "date"}


def rollup_sql(rollup, source, block_numbers=True):
    """Return a rollup's SQL over `source`, a table or a subquery."""
    arrival = ARRIVAL_SQL if block_numbers else "ms"
    ticks = functools.partial(TICKS_SQL.format, source=source, arrival=arrival)
    recent = ticks(condition=RECENT_CONDITION.format(source=source))
    return rollup.sql.format(source=source, ticks=ticks(condition=""), recent=recent)


def shown_name(name):
    """Return a column's name in Perspective, which reserves some names."""
    return f"{name}_" if re.fullmatch("psp_(pkey|op|okey)|__INDEX__", name) else name


def select_safely(name, kind):
    """Return SQL that selects a column of a ClickHouse type as a value that Perspective takes.

    NaN and infinity would leave wrong sums behind. What Perspective has no type for is text, and so
    are integers of 64 bits: a browser rounds them above 2^53.
    """
    column = quote_identifier(name)
    plain = re.sub(r"(Nullable|LowCardinality|SimpleAggregateFunction)\((\w+, )?", "", kind)
    if re.match(r"Bool|Date(32)?\b|U?Int(8|16|32)\b", plain):
        # Perspective crashes on a dictionary of anything but strings; `if` makes a plain column.
        value = f"if(1, {column}, NULL)" if "LowCardinality" in kind else column
    elif plain.startswith("DateTime"):
        value = f"toDateTime64({column}, 3, 'UTC')"
    elif plain.startswith(("Float", "BFloat", "Decimal")):
        number = column if plain.startswith("Float") else f"toFloat64({column})"
        value = f"if(isFinite({number}), {number}, NULL)"
    else:
        value = TEXT_SQL.format(column)
    return f"{value} AS {quote_identifier(shown_name(name))}"


# ---------------------------------------------------------------------------------------------
# The tail. MergeTree numbers its insert blocks in the order in which they are committed, and keeps
# the number with each row. So the number of the newest block is a cursor: the rows inserted since
# the last poll are those with cursor < _block_number <= head, whatever their timestamps are and
# however parts were merged. The head is metadata: reading it costs the same at any table size.
#
# Metadata also checks the answer: the number of rows must equal the growth of the parts. If it does
# not, or after anything other than an insert, the window is reloaded.
#
# The live table is a ring: the row with the number `arrival` takes the slot `arrival % limit`, and
# with it the place of the oldest row. The slot is the index, so that changes, replacements and
# removals reach the mirrors.


class Metadata(NamedTuple):
    """Metadata of the table, from ClickHouse's system tables."""

    uuid: str  # changes when the table is recreated or exchanged
    definition: int  # hash of CREATE TABLE; another default also changes rows that lack a value
    mutations: tuple  # number of the newest mutation, and in how many parts it is not done yet
    patch: int  # block of the newest patch part, which is what a lightweight UPDATE writes
    head: int  # the newest insert block
    rows: int  # in all parts


# A mutation takes a block number, which becomes the data version of the parts that it rewrote. Some
# database engines give tables no UUID.
METADATA_SQL = """
SELECT
    (SELECT (if(empty(uuid), toString(metadata_modification_time), toString(uuid)),
             sipHash64(create_table_query))
     FROM system.tables WHERE database = {database} AND name = {table}) AS definition,
    maxIf(data_version, data_version != min_block_number AND name NOT LIKE 'patch-%') AS newest,
    (newest, arrayCount(v -> v < newest, groupArray(data_version))) AS mutations,
    maxIf(max_block_number, name LIKE 'patch-%') AS patch,
    max(max_block_number) AS head,
    sumIf(rows, name NOT LIKE 'patch-%') AS rows,
    sumIf(parts.rows, name NOT LIKE 'patch-%' AND min_block_number > {head}) AS inserted
FROM system.parts WHERE active AND database = {database} AND table = {table}
"""
MUTATIONS_SQL = r"""
SELECT countIf(NOT match(command, '^\\(?(DELETE|UPDATE _row_exists = 0) ')) AS rewrites,
    countIf(arrayMax(block_numbers.number) = {newest}) AS listed
FROM system.mutations WHERE database = {database} AND table = {table}
    AND arrayMax(block_numbers.number) >= {since}
"""


def settings_without_index(metadata):
    """Return settings with which ClickHouse 26.9 finds all rows by block number.

    A part that was attached gets new block numbers, but keeps its index of the old ones. And while
    there are patch parts, the virtual column is not found before the other columns are read.
    """
    return {"use_skip_indexes": 0} | ({"optimize_move_to_prewhere": 0} if metadata.patch else {})


# Polling stays out of ClickHouse's query log. Settings that the user may not change are dropped.
SETTINGS = {
    "max_execution_time": QUERY_TIMEOUT,
    "log_queries": 0,
    "output_format_arrow_low_cardinality_as_dictionary": 1,
}
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # https://arrow.apache.org/docs/format/Columnar.html
DROPPED_CODES = {60, 81, 218}  # ClickHouse's errors for a dropped table or database
# And those that may pass: too slow, too many queries, too little memory; None: a broken connection.
PASSING_CODES = {159, 202, 241, None} | DROPPED_CODES
IDLE_INTERVAL = 5  # seconds between polls while there are no viewers
RATE_SECONDS = 10  # over which rows_per_second is counted
# Perspective never frees a text, so the tables are remade after this many that may be new: about
# 330 bytes each in the server and in each browser.
MAX_TEXTS = 1_500_000


class TableMissingError(Exception):
    """There is no such table yet."""


def may_pass(error):
    """Return whether the same query may succeed later."""
    if not isinstance(error, OSError | DatabaseError) or producer.is_fatal(error):
        return False
    return getattr(error, "code", None) in PASSING_CODES


class Tail:
    """Keeps the newest `limit` rows of a ClickHouse table in a Perspective table.

    `run` polls every `interval` seconds until `stop` is set; it is meant for a thread of its own.
    `error` is set if the table cannot be followed at the start. `revision` grows with each change.
    """

    def __init__(self, relay, dsn, table, interval, limit):
        self.relay, self.dsn, self.table = relay, dsn, table
        self.interval, self.limit = interval, limit
        self.database = producer.split_dsn(dsn)[1]
        self.source = producer.full_name(self.database, table)
        self.names = {"database": format_str(self.database), "table": format_str(table)}
        self.stop, self.wake = threading.Event(), threading.Event()
        self.client = self.metadata = self.error = None
        self.columns = {}  # ClickHouse types by name
        self.hosted_columns = None  # the columns with which the tables were made
        self.arrived = self.revision = self.texts = 0
        self.checkpoints = collections.deque()  # see `window_is_intact`
        self.state, self.reported, self.due = "down", None, time.monotonic()
        self.rows = self.delivered = 0
        self.lag_ms = self.poll_ms = None
        self.deliveries = collections.deque(maxlen=10_000)  # (monotonic time, rows)

    def poll(self):
        """Bring the live table up to date. After any exception the next poll can continue."""
        if self.client is None:
            self.client = producer.connect(self.dsn, settings=SETTINGS)
        head = self.metadata.head if self.metadata else 0
        sql = METADATA_SQL.format(**self.names, head=head)
        [(definition, _, *others, inserted)] = self.query(sql)
        if definition is None or definition[0] is None:
            self.query(f"EXISTS TABLE {self.source}")  # raises if the user may not see it
            raise TableMissingError
        now = Metadata(*definition, *others)
        delivered = self.delivered
        if now != self.metadata and (self.must_reload(now) or not self.append(now, inserted)):
            self.load_window(now)
        if self.delivered > delivered:
            self.lag_ms = self.measure_lag(now)

    def append(self, now, inserted):
        """Hand the rows between the cursor and the head to Perspective.

        `inserted` is the number of rows in new parts, without those merged into older ones. Returns
        False if the live table may differ from the newest rows afterwards.
        """
        old = self.metadata
        settings = settings_without_index(now) if now.patch else None
        grown = now.rows - old.rows
        # With so many rows, the check below cannot tell that others were removed.
        if grown >= self.limit and self.count_rows(old.head, now, settings) != grown:
            return False
        skipped = max(0, grown - self.limit)  # rows that this very poll would overwrite
        first = self.arrived + skipped
        rows = self.read_rows(old.head, now, skipped, first, settings)
        self.metadata = None  # if Perspective fails half-way, only a fresh window is sure
        with self.relay.changing():
            self.relay.tables[self.table].update(rows)
        came, expected = self.count_arrived(first), grown - skipped
        inserts_only = came == expected and now.mutations == old.mutations
        # Otherwise rows outside the window may have been deleted, which does not matter here.
        if not inserts_only and not (expected <= came < self.limit and self.window_is_intact(old)):
            return False
        if skipped + came < inserted:  # an attached part, see `settings_without_index`
            return False
        self.move_cursor(now, first + came, came)
        return True

    def must_reload(self, now):
        """Return whether more than inserts and deletions may have happened since the last poll."""
        old = self.metadata
        if old is None or now.head < old.head:
            return True
        if (now.uuid, now.definition, now.patch) != (old.uuid, old.definition, old.patch):
            return True
        if now.mutations != old.mutations:
            newest, pending = old.mutations
            since = 0 if pending else newest + 1  # older ones may have been done only now
            names = self.names | {"since": since, "newest": now.mutations[0]}
            [(rewrites, listed)] = self.query(MUTATIONS_SQL.format(**names))
            # A mutation that is not listed was killed, or it was a lightweight UPDATE.
            return rewrites > 0 or (not listed and now.mutations[0] >= newest)
        return self.texts > MAX_TEXTS

    def window_is_intact(self, old):
        """Return whether ClickHouse still has all rows of the window.

        A checkpoint (block, arrived) says how many rows had been numbered when that block was the
        newest. The first one lies before the window's oldest row and bounds what is counted.
        """
        block, arrived = self.checkpoints[0]
        count = self.count_rows(block, old, settings_without_index(old))
        return count == self.arrived - arrived

    def count_rows(self, after, now, settings):
        """Count the rows of the blocks `after` < number <= head."""
        [(count,)] = self.query(
            f"SELECT count() FROM {self.source}"
            f" WHERE _block_number > {after} AND _block_number <= {now.head}",
            settings,
        )
        return count

    def load_window(self, now):
        """Load the newest rows into the live table; make it if needed."""
        columns = self.check_table()
        replace = columns == self.hosted_columns and self.texts <= MAX_TEXTS
        self.metadata, self.columns, first = None, columns, self.arrived
        [(block, count)] = self.query(  # of the window's oldest row, and how many rows from it on
            f"WITH (SELECT min(b) FROM (SELECT _block_number AS b FROM {self.source}"
            f" WHERE b <= {now.head} ORDER BY b DESC LIMIT {self.limit})) AS oldest"
            f" SELECT toInt64(oldest), count() FROM {self.source}"
            f" WHERE _block_number >= oldest AND _block_number <= {now.head}",
            settings_without_index(now),
        )
        skipped = max(0, count - self.limit)
        rows = self.read_rows(block - 1, now, skipped, first, settings_without_index(now))
        if replace:
            with self.relay.changing():
                self.relay.tables[self.table].replace(rows)
            log.info("the table was changed by more than inserts: reloaded the window")
        else:
            self.hosted_columns = None
            self.make_tables(rows)
            self.hosted_columns = columns
        self.checkpoints = collections.deque([(block - 1, first - skipped)])
        came = self.count_arrived(first)
        self.move_cursor(now, first + came, came)
        if came < count - skipped:  # rows were deleted between the two queries
            self.metadata = None  # the next poll loads the window again
        if not replace:
            self.texts = 0  # a large window alone must not reach MAX_TEXTS

    def make_tables(self, rows):
        """Make all tables anew, the live one last, so that a viewer who sees it sees all."""
        tables = {}
        nothing = f"(SELECT *, _block_number, _block_offset FROM {self.source} WHERE 0)"
        for rollup in self.rollups:
            try:
                empty = self.read_arrow(rollup_sql(rollup, nothing))
                with self.relay.lock:  # raises if Perspective has no such type, or no such index
                    self.relay.client.table(empty, index=rollup.index).delete()
                tables[f"{self.table}_{rollup.name}"] = empty, rollup.index
            except Exception as error:
                if may_pass(error) or self.check_table() != self.columns:
                    raise  # the next poll makes all tables
                log.warning("going on without rollup %s: %s", rollup.name, explain(error))
        self.relay.host(tables | {self.table: (rows, self.ring[0])})
        self.relay.publish_status(self)

    @property
    def rollups(self):
        """The rollups, if the table has the columns that they need."""
        return ROLLUPS if ROLLUP_COLUMNS.items() <= self.columns.items() else []

    @property
    def ring(self):
        """Names of the columns slot and arrival; underscores follow a name that the table has."""

        def free(name):
            return free(f"{name}_") if name in self.columns else name

        return free("slot"), free("arrival")

    def move_cursor(self, now, arrived, came):
        """Record that Perspective has the rows."""
        self.metadata, self.arrived, self.revision = now, arrived, self.revision + 1
        self.checkpoints.append((now.head, arrived))
        while len(self.checkpoints) > 1 and self.checkpoints[1][1] <= arrived - self.limit:
            self.checkpoints.popleft()
        low_cardinality = re.compile(r"LowCardinality|(Nullable\()?(Enum|Bool)")  # have few texts
        kinds = [kind for kind in self.columns.values() if not low_cardinality.match(kind)]
        self.texts += came * sum("toString" in select_safely("", kind) for kind in kinds)
        with self.relay.lock:
            self.rows = self.relay.tables[self.table].size()
        self.delivered += came
        self.deliveries.append((time.monotonic(), came))

    def measure_lag(self, now):
        """Age in ms of the newest tick with a plausible time; None if the window has none."""
        if not self.columns.get("timestamp", "").startswith("DateTime64"):
            return None
        newest = self.relay.greatest(self.table, "timestamp")
        time_ms = time.time() * 1000
        if newest and newest > time_ms + 60_000:  # stamped by a wrong clock
            [(newest,)] = self.query(
                f"SELECT toUnixTimestamp64Milli(max(t.timestamp)) FROM {self.source} AS t"
                f" WHERE {PLAUSIBLE_TIME} AND _block_number > {self.checkpoints[0][0]}",
                settings_without_index(now) if now.patch else None,
            )
        plausible = newest and newest >= YEAR_2000
        return round(max(0, time_ms - newest)) if plausible else None

    def count_arrived(self, first):
        """How many rows, numbered from `first` on, Perspective has taken."""
        newest = self.relay.greatest(self.table, self.ring[1])
        return 0 if newest is None else max(0, int(newest) + 1 - first)

    def check_table(self):
        """Return the table's columns; see `producer.check_table`."""
        expected = COLUMNS if self.table == TABLE else {}
        columns = producer.check_table(self.client, self.database, self.table, expected)
        if not columns:
            raise TableMissingError
        return columns

    def read_rows(self, after, now, skipped, first, settings):
        """Read the rows of the blocks `after` < number <= head, in the order of arrival.

        The first ones are skipped; the others are numbered from `first` on.
        """
        slot, arrival = map(quote_identifier, self.ring)
        number = f"(rowNumberInAllBlocks() + {first})"
        names = ", ".join(map(quote_identifier, self.columns))
        values = ", ".join(select_safely(name, kind) for name, kind in self.columns.items())
        return self.read_arrow(
            f"SELECT {values}, toInt32({number} % {self.limit}) AS {slot},"
            f" toFloat64({number}) AS {arrival} FROM (SELECT {names} FROM {self.source}"
            f" WHERE _block_number > {after} AND _block_number <= {now.head}"
            f" ORDER BY _block_number, _block_offset LIMIT {self.limit} OFFSET {skipped})",
            settings,
        )

    def read_arrow(self, sql, settings=None):
        """Read rows as the bytes of an Arrow stream: none becomes a Python object."""
        arrow = self.client.raw_query(sql, fmt="ArrowStream", settings=settings)
        if not arrow.endswith(ARROW_END):  # Perspective would accept the beginning silently
            raise OSError("incomplete answer from ClickHouse")
        return arrow

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
                self.report("up", f"following {self.database}.{self.table}")
                pause, idle = 0, not self.relay.viewers
                wait = began - time.monotonic() + max(self.interval, IDLE_INTERVAL * idle)
            self.poll_ms = round(1000 * (time.monotonic() - began), 1)
            self.due = time.monotonic() + wait
            self.wake.wait(max(0, wait))
            self.wake.clear()
        self.close()

    def report_failure(self, error):
        if isinstance(error, TableMismatchError):
            self.report("no table", str(error))
        elif isinstance(error, TableMissingError) or getattr(error, "code", None) in DROPPED_CODES:
            hint = "start producer.py" if self.table == TABLE else "create it, or check --table"
            text = f"no table {self.database}.{self.table}, waiting for it: {hint}"
            self.report("no table", text)
        else:
            self.close()  # in chDB, the rest of an answer would stand before the next one
            problem = "cannot use ClickHouse" if producer.is_fatal(error) else "ClickHouse is away"
            self.report("down", f"{problem}, trying again: {explain(error)}", problem)

    def report(self, state, text, kind=None):
        """Log each change of state once. Another kind of reason is a change, too."""
        self.state = state
        if self.reported != (state, kind or text):
            self.reported = (state, kind or text)
            log.log(logging.INFO if state == "up" else logging.WARNING, "%s", text)
            self.relay.publish_status(self)

    def close(self):
        if self.client:
            with contextlib.suppress(Exception):
                self.client.close()
            self.client = None

    def health(self):
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


# ---------------------------------------------------------------------------------------------
# Rollups run in a thread and with a client of their own: a slow or failing one never holds up the
# tail. ClickHouse computes all rows each time. Those that differ from the last time go to
# Perspective, and from there to the viewers.

ROLLUP_SHARE = 0.1  # of the time, for all of them together
ROLLUP_TIMEOUT = 120  # seconds


def finite(value):
    """Return None for NaN and infinity, which Perspective refuses."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RollupState:
    """What is known of a rollup's table since it was made."""

    def __init__(self, rollup, table):
        self.rollup, self.table = rollup, table
        self.rows = {}  # by index, as they are in the table
        self.revision = None  # the tail's, when the rollup last ran
        self.due = 0  # when it may run next
        self.took = math.inf  # seconds, the last time


class Rollups:
    """Keeps the rollups' tables equal to what their SQL gives."""

    def __init__(self, tail, history_source=None):
        self.tail, self.relay = tail, tail.relay
        self.sources = {"history": history_source} if history_source else {}  # other tables
        self.stop, self.client, self.error = threading.Event(), None, None
        self.states, self.failing = {}, set()

    def run(self):
        """Run what is due, one after the other, until `stop` is set."""
        rest_until = 0
        while not self.stop.wait(0.05):
            now = time.monotonic()
            states = map(self.state_of, self.tail.rollups)
            due = [state for state in states if self.is_due(state, now, rest_until)]
            if due:
                state = min(due, key=lambda state: state.due)
                self.refresh(state)
                took = time.monotonic() - now
                # A table that is still empty will have rows soon.
                state.due = now + max(took, state.rollup.interval if state.rows else 1)
                # A single slow run does not count: ClickHouse may have hung.
                rest_until = now + min(took, state.took) / ROLLUP_SHARE
                state.took = took

    def state_of(self, rollup):
        table = self.relay.tables.get(f"{self.tail.table}_{rollup.name}")
        if rollup.name not in self.states or self.states[rollup.name].table is not table:
            self.states[rollup.name] = RollupState(rollup, table)
        return self.states[rollup.name]

    def is_due(self, state, now, rest_until):
        changed = state.revision != self.tail.revision or state.rollup.name in self.sources
        waited = changed and now >= max(state.due, rest_until)
        return state.table is not None and (waited or state.due == 0)

    def refresh(self, state):
        rollup = state.rollup
        elsewhere = self.sources.get(rollup.name)
        sql = rollup_sql(rollup, elsewhere or self.tail.source, block_numbers=not elsewhere)
        revision = self.tail.revision
        try:
            if self.client is None:
                self.client = producer.connect(
                    self.tail.dsn,
                    send_receive_timeout=ROLLUP_TIMEOUT,
                    settings=SETTINGS | {"max_execution_time": ROLLUP_TIMEOUT},
                )
            result = self.client.query(sql, query_formats={"DateTime64": "int"})
            self.apply(state, result.column_names, result.result_rows)
        except Exception as error:
            if self.client:
                with contextlib.suppress(Exception):
                    self.client.close()
                self.client = None
            if self.tail.state == "up" and rollup.name not in self.failing:
                self.failing.add(rollup.name)
                log.warning("rollup %s failed, trying again: %s", rollup.name, explain(error))
        else:
            state.revision = revision
            self.failing.discard(rollup.name)

    def apply(self, state, names, rows):
        """Apply the differences from the last run to the rollup's table."""
        old, rows = state.rows, {row[names.index(state.rollup.index)]: row for row in rows}
        # If Perspective fails half-way, the next run sends all rows, and removes all others.
        state.rows = dict.fromkeys([*old, *rows])
        gone = list(old.keys() - rows.keys())
        changed = [map(finite, row) for key, row in rows.items() if old.get(key) != row]
        with self.relay.changing():
            if state.table not in self.relay.tables.values():
                return  # it was made anew meanwhile
            if gone:
                state.table.remove(gone)
            if changed:
                columns = map(list, zip(*changed, strict=True))
                state.table.update(dict(zip(names, columns, strict=True)))
        state.rows = rows


# ---------------------------------------------------------------------------------------------
# The relay. All viewers of a table need the same: its rows, then its changes. So the engine has one
# plain view of each table, and encodes each change once for all viewers.


STATUS_TABLE = "server status"  # no rollup and no table of ClickHouse can have this name


class Relay:
    """Hosts the Perspective tables, and sends their changes to the viewers."""

    def __init__(self, loop):
        self.loop = loop
        self.server = perspective.Server()
        self.client = self.server.new_local_client()
        self.lock = threading.Lock()  # of the engine, which one thread at a time may use
        self.turn = asyncio.Lock()  # of the viewers' requests
        self.tables, self.views = {}, {}
        self.viewers = set()
        self.snapshots = {}  # Arrow streams by table, until its next change
        self.changes = []  # (table, kind of message, its body)
        self.max_unread = 4 << 20  # bytes

    @contextlib.contextmanager
    def changing(self):
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

    def greatest(self, name, column):
        """Return the greatest value of a column, None if there is none."""
        with self.lock:
            return self.views[name].get_min_max(column)[1]

    def host(self, tables):
        """Make all tables but the status anew: {name: (Arrow stream, name of the index)}.

        Viewers are disconnected, as their mirrors are out of date; they come back.
        """
        with self.changing():
            outdated = [name for name in self.tables if name != self.status_name]
            if outdated:
                self.loop.call_soon_threadsafe(self.disconnect_viewers)
            for name in outdated:
                table, view = self.tables.pop(name), self.views.pop(name)
                view.delete()
                table.delete()
            for name, (rows, index) in tables.items():
                self.add_table(name, rows, index)

    def add_table(self, name, rows, index):
        table = self.client.table(rows, name=name, index=index)
        view = table.view()

        def note(kind, arrow):
            self.changes.append((name, kind, field(kind, field(1, arrow))))

        view.on_update(lambda _, arrow: note(ON_UPDATE, arrow), mode="row")
        view.on_remove(lambda _, arrow: note(ON_REMOVE, arrow))
        self.tables[name], self.views[name] = table, view

    @contextlib.asynccontextmanager
    async def unchanged(self):
        """Wait until no table is being changed or made, and keep it so."""
        async with self.turn:
            while not self.lock.acquire(blocking=False):
                await asyncio.sleep(0.002)
            try:
                yield
            finally:
                self.lock.release()

    def send(self, changes):
        """Send changes to all who subscribed."""
        for name, kind, body in changes:
            self.snapshots.pop(name, None)
            self.max_unread = max(self.max_unread, UNREAD_SNAPSHOTS * len(body))
            for viewer in list(self.viewers):
                for head in viewer.subscribed(name, kind):
                    viewer.send(head + body)

    async def snapshot(self, name):
        """The rows of a table as an Arrow stream; read once between two changes."""
        if name not in self.snapshots:
            to_arrow = functools.partial(self.views[name].to_arrow, compression="zstd")
            self.snapshots[name] = await self.loop.run_in_executor(None, to_arrow)
        arrow = self.snapshots[name]
        self.max_unread = max(self.max_unread, UNREAD_SNAPSHOTS * len(arrow))
        return arrow

    def disconnect_viewers(self, code=1012, reason="the tables were recreated"):
        self.snapshots.clear()
        for viewer in list(self.viewers):
            viewer.close(code, reason)

    def host_status(self, tail):
        """Host the table with what /healthz says, the table's columns, the version and the time."""
        self.status_name = STATUS_TABLE
        page = hashlib.sha256(PAGE.read_bytes()).hexdigest()[:8]
        self.version = f"Perspective {perspective.__version__}, page {page}"
        types = dict.fromkeys([*tail.health(), "time", "clock_ms"], "float")
        strings = ("clickhouse", "table", "database", "columns", "version")
        types |= dict.fromkeys(strings, "string")
        self.add_table(self.status_name, types, "table")
        self.publish_status(tail)

    def publish_status(self, tail):
        columns = json.dumps([*map(shown_name, tail.columns), *tail.ring])
        more = {
            "database": tail.database,
            "columns": columns,
            "version": self.version,
            "time": round(time.time() * 1000),
            "clock_ms": None,
        }
        with self.changing():
            self.tables[self.status_name].update([tail.health() | more])


# ---------------------------------------------------------------------------------------------
# What a viewer may send. Whoever can send to a Perspective session can do anything, so viewers'
# requests do not reach the engine, except for four that have no parameters. `Viewer.answer` answers
# the others on the list. Everything else gets Perspective's own error.
#
# A request is a protobuf message: field 1 is its id, field 2 the table or view it is about, and one
# more field says what is asked. The answer carries the same id and name. The numbers are those of
# rust/perspective-client/perspective.proto in the Perspective repository.

FEATURES, HOSTED_TABLES, SCHEMA, SIZE = 3, 4, 7, 8
MAKE_VIEW, DELETE_VIEW, TO_ARROW, SERVER_ERROR = 6, 11, 16, 50
ON_UPDATE, CANCEL_UPDATE, ON_REMOVE, CANCEL_REMOVE = 21, 22, 39, 40
ENGINE_REQUESTS = (FEATURES, HOSTED_TABLES, SCHEMA, SIZE)
REQUESTS = (*ENGINE_REQUESTS, MAKE_VIEW, DELETE_VIEW, TO_ARROW)
REQUESTS += (ON_UPDATE, CANCEL_UPDATE, ON_REMOVE, CANCEL_REMOVE)

MAX_VIEWERS = 2000
MAX_VIEWS = 20  # of one viewer; the dashboard has five
MAX_MESSAGE = 4096  # bytes from a viewer; the dashboard's are below 100
UNREAD_SNAPSHOTS = 4  # a viewer may have the bytes of this many unread
PING_SECONDS = 60  # a viewer that answers no ping for so long is gone
REQUEST_SHARE = 0.1  # of the time that one viewer's requests may take


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

    Raises ValueError if it is not, if the number is another, or if there are more than 127 bytes.
    """
    for number in numbers:
        body = message[len(field(number, b"")) :]
        if message == field(number, body):
            return number, body
    raise ValueError("there is no such request")


class Viewer(WebSocketHandler):
    """One viewer's connection."""

    def initialize(self):
        self.relay, self.tail = self.settings["relay"], self.settings["tail"]
        self.session = None  # of the engine; a request that is refused gets none
        self.views = {}  # table by the view's name
        self.subscriptions = {}  # head of the messages by (view, ON_UPDATE or ON_REMOVE)

    def check_origin(self, origin):
        return is_known_origin(origin, self)

    def open(self):
        if len(self.relay.viewers) >= MAX_VIEWERS:
            self.close(1013, f"the server is full: it takes {MAX_VIEWERS} viewers")
            return
        self.session = self.relay.server.new_session(self.answer_from_engine)
        self.relay.viewers.add(self)
        self.tail.wake.set()  # it polls rarely while there are no viewers

    def on_close(self):
        self.relay.viewers.discard(self)
        if self.session:
            self.session.close()

    async def on_message(self, message):
        """Answer a request. The next one is read when this answer has been sent."""
        async with self.relay.unchanged():
            began = time.monotonic()
            answer = await self.respond(message)
            sent = self.send(answer) if answer else None
            took = time.monotonic() - began
        if sent:
            with contextlib.suppress(WebSocketClosedError):
                await sent
        await asyncio.sleep(took * (1 / REQUEST_SHARE - 1))

    async def respond(self, message):
        """Return the answer, an error perhaps; None if the engine answers, or none is due."""
        head = b""
        try:
            head, name, request = split_head(message)
            number, body = split_field(request, REQUESTS)
            if number not in ENGINE_REQUESTS or body != b"":
                return await self.answer(head, name, number, body)
            name.decode()  # otherwise the engine prints an error
            await self.relay.loop.run_in_executor(None, self.session.handle_request, message)
        except Exception as error:
            text = f"refused ({error}): a viewer can mirror tables and nothing else"
            return head + field(SERVER_ERROR, field(1, text.encode()))

    async def answer(self, head, name, number, body):
        """Return the answer to a request. Raises PermissionError if it is not on the list."""
        if number == MAKE_VIEW:
            self.make_view(name.decode(), body)
            return head + field(MAKE_VIEW, body)
        if name not in self.views:
            raise PermissionError("you have no such view")
        if number == TO_ARROW and body == field(1, b""):  # all rows and columns
            arrow = await self.relay.snapshot(self.views[name])
            return head + field(TO_ARROW, field(1, arrow))
        if (number, body) in ((ON_UPDATE, field(1, 0)), (ON_REMOVE, b"")):  # 0: changes by row
            if (name, number) in self.subscriptions:
                raise PermissionError("you have subscribed already")
            self.subscriptions[name, number] = head
            return None
        if number in (CANCEL_UPDATE, CANCEL_REMOVE):
            self.subscriptions.pop((name, number - 1), None)  # 22 cancels 21, and 40 cancels 39
            return head + field(number, b"")
        if number == DELETE_VIEW:
            del self.views[name]
            for kind in (ON_UPDATE, ON_REMOVE):
                self.subscriptions.pop((name, kind), None)
            return head + field(DELETE_VIEW, b"")
        raise PermissionError("there is no such request")

    def make_view(self, table, body):
        """Note a plain view: it has a name and no configuration."""
        _, name = split_field(body, [1])
        if table not in self.relay.tables:
            raise PermissionError("there is no such table")
        if len(self.views) >= MAX_VIEWS:
            raise PermissionError(f"a viewer has at most {MAX_VIEWS} views")
        if any(name in viewer.views for viewer in self.relay.viewers):
            raise PermissionError("the view's name is in use")
        self.views[name] = table

    def subscribed(self, table, kind):
        """Yield the head of each message with which a change of a table is to be sent."""
        for (name, subscribed), head in self.subscriptions.items():
            if subscribed == kind and self.views[name] == table:
                yield head

    def answer_from_engine(self, answer):
        self.relay.loop.call_soon_threadsafe(self.send, answer)

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


def is_known_origin(origin, handler):
    """Whether pages of an origin may connect: the server's own, or one of --allow-origin."""
    return origin in handler.settings["origins"] or origin == f"http://{handler.request.host}"


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
        page = PAGE.read_bytes()
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
        health = self.settings["tail"].health()
        self.set_status(200 if health["clickhouse"] == "up" else 503)
        self.finish(health)


def make_app(relay, tail, address, origins):
    """Return the application, which answers to the configured host names only.

    A foreign name that somebody points at this address (DNS rebinding) gets nothing.
    """
    names = {*LOOPBACK, address, *(urlsplit(origin).hostname for origin in origins)}
    hosts = "|".join(re.escape(f"[{name}]" if ":" in name else name) for name in names if name)
    if address in ("", "0.0.0.0", "::"):
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


def origin(text):
    """Parse an origin: scheme://host[:port]."""
    parts = urlsplit(text)
    complete = parts.hostname and parts.port != 0  # raises ValueError if the port is no number
    if text != f"{parts.scheme}://{parts.netloc}" or not complete or "http" not in parts.scheme:
        raise producer.argparse.ArgumentTypeError(f"{text} is not an origin like https://host:port")
    return text


def parse(argv):
    parser = producer.Parser(prog="perspective_server.py", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    producer.add_dsn_option(source)
    add, embedded = parser.add_argument, "ClickHouse and producer in this process, data in PATH"
    source.add_argument("--embedded", nargs="?", const="", metavar="PATH", help=embedded)
    add("--address", default="127.0.0.1", help="where to listen")
    add("--port", type=producer.number(int, 1, 65535), default=8080)
    add("--interval", type=producer.seconds, default=0.25, help="seconds between polls")
    add("--limit", type=producer.positive_int, default=25_000, help="rows in the live table")
    add("--table", default=TABLE, help="the MergeTree table to follow")
    add("--history-table", metavar="[DATABASE.]TABLE", help="what the history is computed from")
    origins = {"nargs": "+", "action": "extend", "default": [], "metavar": "ORIGIN"}
    add("--allow-origin", type=origin, help="other origins whose pages may connect", **origins)
    return parser.parse_args(argv)


def fail(text):
    print(f"perspective_server.py: {text}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def silenced_stderr():
    """Silence the embedded engine, which prints the errors that it also raises."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


async def serve(options, dsn, sockets, signalled):
    """Serve until a signal comes, or until a permanent error, which is returned."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, ended.set)
    if signalled.is_set():
        ended.set()
    relay = Relay(loop)
    tail = Tail(relay, dsn, options.table, options.interval, options.limit)
    relay.host_status(tail)
    history_source = None
    if options.history_table:
        *other, table = options.history_table.split(".", 1)
        history_source = producer.full_name(other[0] if other else tail.database, table)
    workers = [tail, Rollups(tail, history_source)]
    if options.embedded is not None:
        workers.append(producer.Producer(dsn, interval=0.25, rows=250, log=log.info))
    app = make_app(relay, tail, options.address, options.allow_origin)
    server = HTTPServer(app, max_body_size=MAX_MESSAGE, idle_connection_timeout=60)
    server.add_sockets(sockets)
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()

    while not ended.is_set() and all(worker.error is None for worker in workers):
        # In a thread, as it waits for tables that are being made, and the end must not.
        threading.Thread(target=relay.publish_status, args=[tail], daemon=True).start()
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
    signalled = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: signalled.set())  # until `serve` listens to them
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    for library in ("tornado.access", "clickhouse_connect", "urllib3"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # failures are reported here, once
    clickhouse_connect.common.set_setting("invalid_setting_action", "drop")
    try:
        sockets = bind_sockets(options.port, options.address)
    except OSError as error:
        where = f"{options.address} port {options.port}"
        return fail(f"cannot listen on {where} ({error.strerror}): use another --address or --port")
    # Each viewer takes a file descriptor, and many shells allow 1,024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2 * MAX_VIEWERS), hard), hard))
    with contextlib.ExitStack() as cleanup:
        dsn = options.dsn
        if options.embedded is not None:
            folder = options.embedded or cleanup.enter_context(
                tempfile.TemporaryDirectory(prefix="clickhouse-", ignore_cleanup_errors=True)
            )
            dsn = f"chdb://{quote(os.path.abspath(folder))}"
            try:
                os.makedirs(folder, exist_ok=True)
                with silenced_stderr():
                    client = cleanup.enter_context(contextlib.closing(producer.connect(dsn)))
                with contextlib.suppress(TableMismatchError):  # the producer reports it
                    producer.create_table(client, producer.split_dsn(dsn)[1])
            except ImportError:
                return fail("--embedded needs chdb: pip install 'clickhouse-connect[chdb]'")
            except OSError as error:
                return fail(f"cannot write to {folder} ({error.strerror})")
            except Exception as error:
                return fail(f"no engine in {folder}, is it in use elsewhere? {explain(error)}")
        host = options.address
        if host not in LOOPBACK:
            log.warning("listening on %s: anyone who can reach this port can read the data", host)
        host = "localhost" if host in (*LOOPBACK, "", "0.0.0.0", "::") else host
        log.info("connecting to %s", producer.describe_dsn(dsn))
        log.info("open http://%s:%s/", f"[{host}]" if ":" in host else host, options.port)
        error = asyncio.run(serve(options, dsn, sockets, signalled))
    return fail(explain(error)) if error else 0


if __name__ == "__main__":
    sys.exit(main())
