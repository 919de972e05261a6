"""Draw market ticks and insert them into ClickHouse, a batch every 250 ms.

    numpy -> batch (kept until ClickHouse confirms it) -> MergeTree table `stock_values`

This file owns the table: its name, its columns and how to connect; `perspective_server.py` imports
these from here. `python producer.py --help` lists the options.
"""

import argparse
import ipaddress
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import clickhouse_connect
import numpy as np
from clickhouse_connect.driver.binding import format_str
from clickhouse_connect.driver.exceptions import DatabaseError, DataError, ProgrammingError

# ---------------------------------------------------------------------------------------------
# The table. The schema is written here, once, as SQL.

DEFAULT_DSN = "clickhouse://admin:admin1234@localhost:8123/test"
DSN_FORM = "clickhouse://user:password@host:port/database"
TABLE = "stock_values"
COLUMNS = {
    "timestamp": "DateTime64(3, 'UTC')",
    "ticker": "LowCardinality(String)",
    "client": "LowCardinality(String)",
    "open": "Float32",
    "high": "Float32",
    "low": "Float32",
    "close": "Float32",
    "volume": "UInt32",
    "date": "Date",
}
# The server's cursor is the block number, which these two settings keep through merges.
BLOCK_SETTINGS = {"enable_block_number_column": 1, "enable_block_offset_column": 1}
# A token that is among the last 100,000 inserts adds no row: a batch can safely be sent twice.
DEDUPLICATION = {"non_replicated_deduplication_window": 100_000}
# With these, ClickHouse finds the newest blocks in a table of any size. Older versions lack them.
INDEX_SETTINGS = {
    "add_minmax_index_for_block_number_column": 1,
    "add_minmax_index_for_block_offset_column": 1,
    "part_minmax_index_columns": "'with_block_number_offset'",
}
UNKNOWN_SETTING = 115  # ClickHouse's error codes: SELECT * FROM system.errors
CONNECT_TIMEOUT, QUERY_TIMEOUT = 5, 30  # seconds


class TableMismatchError(Exception):
    """The table exists, but these scripts cannot work with it."""


class BlockNumbersMissingError(TableMismatchError):
    """The table keeps no block numbers. An ALTER, which the message gives, changes that."""


def split_dsn(dsn):
    """Split a DSN into (DSN without database, database, the driver's other arguments).

    Clients connect without a database, because one that does not exist yet refuses them. Raises
    ValueError if the DSN does not parse; its text may hold the password, so do not show it.
    """
    parts = urlsplit(dsn)
    if parts.scheme == "chdb":
        if parts.netloc and (parts.netloc, parts.path) != ("memory", ""):
            raise ValueError("expected chdb:///folder or chdb://memory")
        return dsn, "test", {"interface": "chdb", "path": unquote(parts.path) or None}
    database = unquote(parts.path.strip("/")) or "test"
    if parts.scheme not in ("clickhouse", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"expected {DSN_FORM}")
    # An unquoted / ? or # in the password leaves an @ behind the host.
    if "/" in database or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("expected special characters as %XX")
    options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    secure = options.pop("secure", "").lower() in ("1", "true") or parts.scheme == "https"
    server = parts._replace(path="", query=urlencode(options)).geturl()
    return server, database, {"secure": secure}


def connect(dsn, **options):
    """Open a clickhouse-connect client, which serves one call at a time.

    The DSN's own options win over those given here.
    """
    server, _, arguments = split_dsn(dsn)
    if server.startswith("chdb:"):
        return clickhouse_connect.get_client(**arguments, settings=options.get("settings"))
    bypass_proxy_on_loopback(urlsplit(server).hostname)
    defaults = {
        "autogenerate_session_id": False,  # concurrent queries on one session are refused
        "connect_timeout": CONNECT_TIMEOUT,
        "send_receive_timeout": QUERY_TIMEOUT,
        "query_retries": 0,
        "compress": False,
    }
    try:
        return clickhouse_connect.get_client(dsn=server, **arguments, **defaults | options)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
        if not unknown:
            raise
        raise ProgrammingError(f"unknown DSN option {unknown[1]}: remove it") from None


def bypass_proxy_on_loopback(host):
    """Keep the driver from asking the proxy in `http_proxy` for a server on this machine."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if loopback and host not in listed.split(","):
        os.environ["no_proxy"] = ",".join(filter(None, [listed, host]))


def describe_dsn(dsn):
    """Host, port and database of a DSN, for messages: no user, no password."""
    server, database, arguments = split_dsn(dsn)
    if "path" in arguments:
        return f"the embedded engine in {arguments['path'] or 'memory'}"
    parts = urlsplit(server)
    port = parts.port or (8443 if arguments["secure"] else 8123)
    return f"{parts.hostname}:{port}, database {database}"


def quote_identifier(name):
    """Quote a name for SQL. The driver's function leaves a name that is in quotes as it is."""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def full_name(database, table=TABLE):
    """The quoted name of a table, for SQL."""
    return f"{quote_identifier(database)}.{quote_identifier(table)}"


def check_table(client, database, table=TABLE, columns=COLUMNS, writing=False):
    """Return the types of the table's columns by name, in the table's order; {} if there is none.

    Raises TableMismatchError if the table cannot be followed or a column of `columns` is missing
    or of another type, and its subclass BlockNumbersMissingError if an ALTER is all it needs.
    """
    key = f"database = {format_str(database)} AND"
    found = client.query(
        "SELECT engine, partition_key, engine_full FROM system.tables"
        f" WHERE {key} name = {format_str(table)}"
    ).result_rows
    if not found:
        return {}
    engine, partition_key, definition = found[0]
    rows = client.query(
        "SELECT name, type, default_kind FROM system.columns"
        f" WHERE {key} table = {format_str(table)} ORDER BY position"
    ).result_rows
    if not rows:  # it was dropped between the two queries
        return {}
    types = {name: kind for name, kind, default in rows if default not in ("ALIAS", "EPHEMERAL")}

    def lacks(setting):
        return not re.search(rf"\b{setting} = '?(true|[1-9])", definition)

    problems = []
    if engine not in ("MergeTree", "ReplicatedMergeTree", "SharedMergeTree"):
        problems.append(f"its engine is {engine}, and only MergeTree keeps all rows in order")
    elif partition_key and engine != "MergeTree":
        problems.append(f"{engine} counts insert blocks in each partition separately")
    for name, kind in columns.items():
        if types.get(name) != kind:
            problems.append(f"column {name} is {types.get(name, 'missing')}, expected {kind}")
    # Replicated tables have a deduplication window by default.
    if writing and engine == "MergeTree" and any(map(lacks, DEDUPLICATION)):
        problems.append(f"setting {', '.join(DEDUPLICATION)} is missing")
    if problems:
        raise TableMismatchError(
            f"cannot use table {database}.{table}: {'; '.join(problems)}. Use another database"
            + (", or delete it and its rows by `producer.py --reset`" if columns else " or --table")
        )
    missing = list(filter(lacks, BLOCK_SETTINGS))
    if missing:
        raise BlockNumbersMissingError(
            f"table {database}.{table} keeps no block numbers. Run this, which rewrites no data:"
            f" ALTER TABLE {full_name(database, table)} MODIFY SETTING"
            f" {', '.join(f'{name} = 1' for name in missing)}"
        )
    return types


def create_table(client, database, reset=False):
    """Create database and table where they do not exist; `reset` drops the table first.

    A table that exists is not created again: a user who may only insert can run the producer.
    Raises TableMismatchError if that table does not fit.
    """
    if not client.command(f"EXISTS DATABASE {quote_identifier(database)}"):
        client.command(f"CREATE DATABASE IF NOT EXISTS {quote_identifier(database)}")
    if reset:
        client.command(f"DROP TABLE IF EXISTS {full_name(database)} SYNC")
    if check_table(client, database, writing=True):
        return
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    settings = BLOCK_SETTINGS | DEDUPLICATION
    try:
        client.command(create_statement(database, columns, settings | INDEX_SETTINGS))
    except DatabaseError as error:
        if error.code != UNKNOWN_SETTING:
            raise
        client.command(create_statement(database, columns, settings))
    check_table(client, database, writing=True)  # another producer may have been faster


def create_statement(database, columns, settings):
    pairs = ", ".join(f"{name} = {value}" for name, value in settings.items())
    return (
        f"CREATE TABLE IF NOT EXISTS {full_name(database)} ({columns})"
        f" ENGINE = MergeTree ORDER BY (timestamp, ticker) SETTINGS {pairs}"
    )


# ---------------------------------------------------------------------------------------------
# The market. Each price is a mean-reverting random walk: a tick opens where the ticker's last one
# closed, moves by hundredths of a per cent, and is pulled back a little to its level, so that the
# prices are still plausible after a week.

LEVELS = {
    "AAPL.N": 190.0,
    "AMZN.N": 178.0,
    "QQQ.N": 440.0,
    "NVDA.N": 122.0,
    "TSLA.N": 245.0,
    "FB.N": 505.0,
    "MSFT.N": 417.0,
    "TLT.N": 92.0,
    "XIV.N": 35.0,
    "YY.N": 41.0,
    "CSCO.N": 56.0,
    "GOOGL.N": 165.0,
    "PCLN.N": 1790.0,
}
CLIENTS = ["Homer", "Marge", "Bart", "Lisa", "Maggie", "Moe", "Lenny", "Carl", "Krusty"]
RETURN_DEVIATION = 2e-4  # standard deviation of a tick's logarithmic return
MEAN_REVERSION = 1e-5  # share of the distance to its level by which a tick is pulled back
DAY_MS = 86_400_000


def to_cents(prices):
    """Round prices to cents, at least one cent."""
    return np.maximum(np.round(prices, 2), 0.01)


class Market:
    """Random walks of thirteen prices. The same seed draws the same ticks."""

    def __init__(self, seed=None):
        self.random = np.random.default_rng(seed)
        self.tickers = np.array(list(LEVELS), dtype=object)
        self.clients = np.array(CLIENTS, dtype=object)
        self.level = np.log(list(LEVELS.values()))
        self.price = self.level.copy()  # logarithms, unrounded: rounding must not stop the walk
        self.close = to_cents(np.exp(self.price))

    def draw(self, rows, start_ms, span_ms):
        """Draw `rows` ticks spread over [start_ms, start_ms + span_ms), oldest first.

        Returns one sequence for each of COLUMNS, in their order; times are milliseconds since
        1970 UTC, dates are days since then. low <= min(open, close) <= max(open, close) <= high.
        """
        random = self.random
        times = start_ms + np.sort(random.uniform(0, span_ms, rows)).astype(np.int64)
        ticker = random.integers(len(self.tickers), size=rows)
        client = random.integers(len(self.clients), size=rows)
        moves = random.normal(0, RETURN_DEVIATION, rows)
        spread = 1 + np.abs(random.normal(0, RETURN_DEVIATION, (2, rows)))
        opens, closes = np.empty(rows), np.empty(rows)
        for i in range(len(self.tickers)):
            ticks = np.flatnonzero(ticker == i)
            if not len(ticks):
                continue
            path = self.price[i] + np.cumsum(moves[ticks])
            closes[ticks] = to_cents(np.exp(path))
            opens[ticks] = np.append(self.close[i], closes[ticks[:-1]])
            pull = min(1, MEAN_REVERSION * len(ticks))
            self.price[i] = path[-1] + (self.level[i] - path[-1]) * pull
            self.close[i] = closes[ticks[-1]]
        highs = to_cents(np.maximum(opens, closes) * spread[0])
        lows = to_cents(np.minimum(opens, closes) / spread[1])
        return [
            times.tolist(),  # plain ints: what clickhouse-connect takes for DateTime64 and Date
            self.tickers[ticker],
            self.clients[client],
            *(price.astype(np.float32) for price in (opens, highs, lows, closes)),
            (100 * random.geometric(0.02, rows)).astype(np.uint32),
            (times // DAY_MS).tolist(),
        ]


# ---------------------------------------------------------------------------------------------
# The producer. A batch is kept until ClickHouse has confirmed it, and is sent again with the same
# deduplication token until then, so a batch whose confirmation was lost is not stored twice. While
# ClickHouse is away no new ticks are drawn.

# ClickHouse's error codes that a retry cannot fix: columns that do not fit, an unknown setting,
# missing grants, a wrong user or password.
FATAL_CODES = {16, 44, 53, 115, 164, 192, 193, 194, 497, 516}
# Raised before anything is sent: chdb is not installed, an option makes no sense.
FATAL_ERRORS = (TableMismatchError, DataError, ProgrammingError, ImportError, TypeError)
MAX_PAUSE = 5  # seconds between two attempts
PROGRESS_INTERVAL = 5  # seconds between two lines of progress


def is_fatal(error):
    """Return whether a retry cannot fix the error."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or isinstance(error, FATAL_ERRORS):
        return True
    return getattr(error, "code", None) in FATAL_CODES


def explain(error):
    """Return one line that says what went wrong, without the driver's trailers."""
    # urllib3 keeps the cause of a failed connection in `reason`, at the end of a long sentence.
    reason = str(getattr(error.__cause__, "reason", None) or "").partition(" (_ssl.c")[0]
    cause = re.search("(certificate verify failed.*|[^:]*)$", reason)[0].strip()
    text = cause or str(error).strip() or type(error).__name__
    text = text.partition("server response: ")[2] or text
    return re.split(r" \(version | executing HTTP request|\n", text)[0][:500]


class Producer:
    """Inserts batches at a steady pace until `stop` is set or `batches` are confirmed.

    `log` is called with a sentence at each change of state. `rows` counts the rows that ClickHouse
    has confirmed; `error` is set if the producer ended because of a permanent error.
    """

    def __init__(self, dsn, interval, rows, batches=None, seed=None, reset=False, log=print):
        self.dsn, self.database = dsn, split_dsn(dsn)[1]
        self.interval, self.batch_rows, self.batches = interval, rows, batches
        self.market, self.reset, self.log = Market(seed), reset, log
        self.stop = threading.Event()
        self.client = self.error = None
        self.rows = 0
        self.unconfirmed = False  # a batch was sent, and its answer did not come yet

    def run(self):
        """Produce until stopped. Blocks; call it in a thread of its own."""
        try:
            if self.retry(self.open):
                self.produce()
        except Exception as error:
            self.error = error
        finally:
            if self.client:
                self.client.close()

    def produce(self):
        name, number = uuid.uuid4().hex, 0
        due = time.monotonic()
        while number != self.batches and not self.stop.wait(due - time.monotonic()):
            late, span_ms = time.monotonic() - due, self.interval * 1000
            start_ms = round((time.time() - late) * 1000 - span_ms)
            batch = self.market.draw(self.batch_rows, start_ms, span_ms)
            attempts = self.retry(self.insert, batch, f"{name}-{number}")
            if not attempts:
                return
            self.rows, number = self.rows + self.batch_rows, number + 1
            # Catch up after a slow insert; after an outage continue from now.
            due = time.monotonic() if attempts > 1 else due + self.interval

    def open(self):
        self.client = connect(self.dsn)
        create_table(self.client, self.database, self.reset)
        self.reset = False

    def insert(self, batch, token):
        if self.client is None:
            self.open()
        self.unconfirmed = True
        self.client.insert(
            TABLE,
            batch,
            database=self.database,
            column_names=list(COLUMNS),
            column_type_names=list(COLUMNS.values()),
            column_oriented=True,
            settings={"insert_deduplication_token": token, "async_insert": 0},
        )
        self.unconfirmed = False

    def retry(self, step, *arguments):
        """Call `step` until it succeeds. Returns the number of attempts, 0 if stopped.

        Raises the error if it is permanent.
        """
        attempts, pause = 1, 0.1
        while True:
            try:
                step(*arguments)
            except Exception as error:
                if is_fatal(error):
                    if attempts == 1:
                        self.unconfirmed = False  # refused, so nothing is stored
                    raise
                if self.client:
                    self.client.close()
                    self.client = None
                if attempts == 1:
                    self.log(f"ClickHouse is away, trying again: {explain(error)}")
                if self.stop.wait(pause):
                    return 0
                attempts, pause = attempts + 1, min(2 * pause, MAX_PAUSE)
            else:
                if attempts > 1:
                    self.log("ClickHouse is back")
                return attempts


# ---------------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a usage error in one line."""

    def error(self, message):
        message = re.sub(r"//\S*@", "//user:password@", message)  # a DSN without --dsn before it
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind, low, high):
    """Return an argparse type: an int or a float with low <= number <= high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high:,}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` raises ValueError
    return parse


positive_int = number(int, 1, 2**31 - 1)
seconds = number(float, 0.001, 86400)


def dsn(text):
    """Check a DSN. The error does not repeat it, since it may hold a password."""
    try:
        split_dsn(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid DSN, expected {DSN_FORM} with special characters as %XX"
        ) from None
    return text


def add_dsn_option(parser):
    """Add --dsn, the same for both scripts."""
    parser.add_argument(
        "--dsn",
        type=dsn,
        default=os.environ.get("CLICKHOUSE_DSN") or DEFAULT_DSN,
        help="ClickHouse to use (default: $CLICKHOUSE_DSN, else the container of docker.sh)",
    )


def main(argv=None):
    """Run the producer; returns the exit status."""
    parser = Parser(prog="producer.py", description=__doc__.splitlines()[0])
    add_dsn_option(parser)
    parser.add_argument("--interval", type=seconds, default=0.25, help="seconds between batches")
    parser.add_argument("--rows", type=positive_int, default=250, help="ticks in a batch")
    parser.add_argument("--batches", type=positive_int, help="stop after this many")
    parser.add_argument("--seed", type=number(int, 0, 2**63), help="for reproducible ticks")
    parser.add_argument("--reset", action="store_true", help="drop the table and its rows first")
    options = vars(parser.parse_args(argv))

    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)  # reported here, once

    def log(text):
        try:
            print(text, flush=True)
        except OSError:  # the reader of a pipe is gone, as in `producer.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            producer.stop.set()

    producer = Producer(**options, log=log)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: producer.stop.set())
    log(f"inserting into {describe_dsn(options['dsn'])}")
    worker = threading.Thread(target=producer.run, daemon=True)
    worker.start()

    started = shown = time.monotonic()
    while worker.is_alive() and not producer.stop.is_set():
        worker.join(0.1)
        now = time.monotonic()
        if now - shown >= PROGRESS_INTERVAL:
            rate = producer.rows / (now - started)
            log(f"{producer.rows:,} rows, {rate:,.0f} rows a second")
            shown = now
    worker.join(1.5)  # finish the batch in hand

    lost = ", the last batch was not confirmed" if producer.unconfirmed else ""
    log(f"{producer.rows:,} rows written{lost}")
    if producer.error:
        print(f"producer.py: {explain(producer.error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
