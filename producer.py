"""Draw market ticks and insert them into ClickHouse, a batch every 250 ms.

    numpy -> batch (kept until ClickHouse confirms it) -> MergeTree table `stock_values`

This file owns the table: its name, its columns and how to connect; `perspective_server.py` imports
these from here. `python producer.py --help` lists the options.
"""

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
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
# ClickHouse ignores an insert whose token is among the last 100,000, so a retry adds no rows.
DEDUPLICATION_SETTINGS = {"non_replicated_deduplication_window": 100_000}
# With these, ClickHouse finds the newest blocks in a table of any size. Older versions lack them.
INDEX_SETTINGS = {
    "add_minmax_index_for_block_number_column": 1,
    "add_minmax_index_for_block_offset_column": 1,
    "part_minmax_index_columns": "'with_block_number_offset'",
}
QUERY_TIMEOUT = 30  # seconds


class TableMismatchError(Exception):
    """The table exists, but these scripts cannot work with it."""


class BlockNumbersMissingError(TableMismatchError):
    """The table lacks settings that keep block numbers. The message gives the ALTER to run."""


def split_dsn(dsn):
    """Split a DSN into (DSN without database, database, other arguments for the driver).

    Clients connect without a database, because one that does not exist yet refuses them. Raises
    ValueError if the DSN does not parse. Do not show its message, which may hold the password.
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

    The DSN's own options override those given here.
    """
    server, _, arguments = split_dsn(dsn)
    if server.startswith("chdb:"):
        return clickhouse_connect.get_client(**arguments, settings=options.get("settings"))
    # The HTTP proxy in the environment cannot reach a server on this machine.
    host = urlsplit(server).hostname
    no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    excepted = {host, "*"} & set(no_proxy.split(","))
    if re.fullmatch(r"localhost|127\.[\d.]+|::1", host) and not excepted:
        os.environ["no_proxy"] = f"{no_proxy},{host}"
    defaults = {
        "autogenerate_session_id": False,  # concurrent queries on one session are refused
        "connect_timeout": 5,
        "send_receive_timeout": QUERY_TIMEOUT,
        "query_retries": 0,
        "compress": False,
    }
    try:
        return clickhouse_connect.get_client(dsn=server, **arguments, **defaults | options)
    except TypeError as error:  # an option that the driver does not know
        raise ProgrammingError(f"cannot use an option of the DSN: {error}") from None


def describe_dsn(dsn):
    """The DSN without user, password and options, for messages."""
    return re.sub(r"\?.*", "", re.sub(r"//[^/]*@", "//", dsn))


def quote_identifier(name):
    """Quote a name for SQL. The driver's function does not quote a name that is in quotes."""
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
    tables = client.query(
        "SELECT engine, partition_key, engine_full FROM system.tables"
        f" WHERE {key} name = {format_str(table)}"
    ).result_rows
    columns_found = client.query(
        f"SELECT name, type FROM system.columns WHERE {key} table = {format_str(table)}"
        " AND default_kind != 'EPHEMERAL' ORDER BY position"
    ).result_rows
    if not tables or not columns_found:
        return {}
    types = dict(columns_found)
    [(engine, partition_key, definition)] = tables
    problems = []
    if engine not in ("MergeTree", "ReplicatedMergeTree", "SharedMergeTree"):
        problems.append(f"its engine is {engine}, and only MergeTree keeps all rows in order")
    elif partition_key and engine != "MergeTree":
        problems.append(f"{engine} counts insert blocks in each partition separately")
    for name, kind in columns.items():
        if types.get(name) != kind:
            problems.append(f"column {name} is {types.get(name, 'missing')}, expected {kind}")
    if problems:
        raise TableMismatchError(
            f"cannot use table {database}.{table}: {'; '.join(problems)}. Use another database"
            + (", or delete it and its rows by `producer.py --reset`" if columns else " or --table")
        )
    needed = dict(BLOCK_SETTINGS)
    if writing and engine == "MergeTree":  # the others have a deduplication window by default
        needed |= DEDUPLICATION_SETTINGS
    missing = [
        f"{name} = {value}"
        for name, value in needed.items()
        if not re.search(rf"\b{name} = '?(true|[1-9])", definition)
    ]
    if missing:
        raise BlockNumbersMissingError(
            f"table {database}.{table} lacks settings. Run this, which rewrites no data:"
            f" ALTER TABLE {full_name(database, table)} MODIFY SETTING {', '.join(missing)}"
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
    settings = BLOCK_SETTINGS | DEDUPLICATION_SETTINGS
    try:
        client.command(create_statement(database, settings | INDEX_SETTINGS))
    except DatabaseError as error:
        if error.code != 115:  # unknown setting
            raise
        client.command(create_statement(database, settings))
    check_table(client, database, writing=True)  # another producer may have been faster


def create_statement(database, settings):
    # NOT NULL: a user's profile can make columns Nullable by default.
    columns = ", ".join(f"{name} {kind} NOT NULL" for name, kind in COLUMNS.items())
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
        for i in np.unique(ticker):
            ticks = np.flatnonzero(ticker == i)
            drift = (self.level[i] - self.price[i]) * min(MEAN_REVERSION, 1 / len(ticks))
            path = self.price[i] + np.append(0, np.cumsum(moves[ticks] + drift))
            prices = to_cents(np.exp(path))
            opens[ticks] = prices[:-1]
            closes[ticks] = prices[1:]
            self.price[i] = path[-1]
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
# The producer. It keeps a batch until ClickHouse has confirmed it, and sends it again with the
# same deduplication token until then, so a batch whose confirmation was lost is not stored twice.
# While ClickHouse is away it draws no new ticks.

# ClickHouse's error codes that a retry cannot fix: columns that do not fit, a setting that is
# unknown or may not be changed, a wrong user or password, missing grants.
FATAL_CODES = {16, 44, 53, 115, 164, 192, 193, 194, 392, 452, 497, 516}
# Raised before anything is sent: chdb is not installed, an option makes no sense.
FATAL_ERRORS = (TableMismatchError, DataError, ProgrammingError, ImportError)
# ClickHouse can answer nobody: it is overloaded (159, 202, 241, 745), or cut off from Keeper or
# from other servers (203, 209, 210, 242, 279, 319, 999). A limit (62, 158, 396), a full disk (243),
# too many parts (252) or a table that was dropped (60, 81, 236) only make it refuse a request.
AWAY_CODES = {159, 202, 203, 209, 210, 241, 242, 279, 319, 745, 999}
# Without these, the user's profile could turn deduplication off. Older versions lack the last one.
INSERT_SETTINGS = {"async_insert": 0, "insert_deduplicate": 1, "deduplicate_insert": "enable"}
MAX_PAUSE = 5  # seconds between two attempts
PROGRESS_INTERVAL = 5  # seconds between two lines of progress


def is_fatal(error):
    """Return whether a retry cannot fix the error."""
    if isinstance(error, FATAL_ERRORS) or not isinstance(error, OSError | DatabaseError):
        return True
    return getattr(error, "code", None) in FATAL_CODES or "CERTIFICATE_VERIFY" in str(error)


def is_away(error):
    """Return whether ClickHouse cannot be reached or is not able to answer now."""
    code = getattr(error, "code", None)  # None: the connection failed
    return not is_fatal(error) and (code is None or code in AWAY_CODES)


def explain(error):
    """Return one line that says what went wrong, without what the driver adds at the end."""
    cause = getattr(error.__cause__, "reason", None)  # why urllib3 could not connect
    message = str(cause.args[-1] if cause else error) or type(error).__name__
    message = re.sub("^Received .*?server response: ", "", message)
    return re.split(r" \(version | \(_ssl.c| executing HTTP request|\n", message)[0][:500]


class Producer:
    """Inserts batches at a steady pace until `stop` is set or `batches` are confirmed.

    `log` is called with a sentence at each change of state. `rows` counts the rows that ClickHouse
    has confirmed; `error` is set if the producer ended because of a permanent error.
    """

    def __init__(self, dsn, interval, rows, batches=None, seed=None, reset=False, log=print):
        self.dsn = dsn
        self.database = split_dsn(dsn)[1]
        self.interval = interval
        self.batch_rows = rows
        self.batches = batches
        self.reset = reset
        self.log = log
        self.market = Market(seed)
        self.stop = threading.Event()
        self.client = None
        self.rows = 0
        self.unconfirmed = False  # a batch was sent, and ClickHouse has not confirmed it
        self.error = None

    def run(self):
        """Produce until stopped. Blocks; call it in a thread of its own."""
        try:
            if self.retry(self.open):
                self.produce()
        except (OSError, DatabaseError, *FATAL_ERRORS) as error:
            self.error = error
        except Exception as error:  # a fault in the code: show where
            traceback.print_exc()
            self.error = error
        finally:
            if self.client:
                self.client.close()

    def produce(self):
        run_id = uuid.uuid4().hex
        sent = 0
        due = time.monotonic()
        while sent != self.batches and not self.stop.wait(due - time.monotonic()):
            late = time.monotonic() - due
            span_ms = self.interval * 1000
            start_ms = round((time.time() - late) * 1000 - span_ms)
            batch = self.market.draw(self.batch_rows, start_ms, span_ms)
            attempts = self.retry(self.insert, batch, f"{run_id}-{sent}")
            if not attempts:
                return
            self.rows += self.batch_rows
            sent += 1
            # Catch up after a slow insert; after an outage continue from now.
            due = time.monotonic() if attempts > 1 else due + self.interval

    def open(self):
        self.client = connect(self.dsn)
        create_table(self.client, self.database, self.reset)
        self.reset = False

    def insert(self, batch, token):
        if self.client is None:
            self.open()
        known = self.client.server_settings
        settings = {name: value for name, value in INSERT_SETTINGS.items() if name in known}
        self.unconfirmed = True
        self.client.insert(
            TABLE,
            batch,
            database=self.database,
            column_names=list(COLUMNS),
            column_type_names=list(COLUMNS.values()),
            column_oriented=True,
            settings=settings | {"insert_deduplication_token": token},
        )
        self.unconfirmed = False

    def retry(self, step, *arguments):
        """Call `step` until it succeeds. Returns the number of attempts, 0 if stopped.

        Raises the error if it is permanent.
        """
        attempts = 1
        problem = None
        while True:
            try:
                step(*arguments)
                break
            except Exception as error:
                if is_fatal(error):
                    raise
                before = problem
                problem = "ClickHouse is away" if is_away(error) else "ClickHouse refuses the batch"
                if problem != before:
                    self.log(f"{problem}, trying again: {explain(error)}")
            if self.client:
                self.client.close()
                self.client = None
            if self.stop.wait(min(0.2 * attempts, MAX_PAUSE)):
                return 0
            attempts += 1
        if problem:
            self.log("ClickHouse is back")
        return attempts


# ---------------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the lines of its epilog and reports an error in one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        message = re.sub(r"//\S*@", "//user:password@", message)  # a DSN without --dsn before it
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def number(kind, low, high):
    """Return an argparse type: an int or a float with low <= number <= high."""

    def parse(string):
        value = kind(string)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{string} is not between {low} and {high:,}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when `kind` raises ValueError
    return parse


positive_int = number(int, 1, 2**31 - 1)
seconds = number(float, 0.001, 86400)


def dsn(string):
    """Check a DSN. The error does not repeat it, since it may hold a password."""
    try:
        split_dsn(string)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid DSN, expected {DSN_FORM} with special characters as %XX"
        ) from None
    return string


def add_dsn_option(parser):
    """Add --dsn, the same for both scripts."""
    parser.add_argument(
        "--dsn",
        type=dsn,
        default=os.environ.get("CLICKHOUSE_DSN") or DEFAULT_DSN,
        help=f"{DSN_FORM}, special characters as %%XX"
        " (default: the variable CLICKHOUSE_DSN, else the container of docker.sh)",
    )


def stop_signals():
    """The signals that end both scripts. Started with nohup, they outlive their terminal."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


EPILOG = """\
example: python producer.py --dsn clickhouse://user:password@host:8123/mydb --rows 5000

Ctrl-C, SIGTERM and SIGHUP end the producer after the batch in hand, with status 0. An error that a
retry cannot fix ends it with status 1, an option that makes no sense with status 2."""


def main(argv=None):
    """Run the producer; returns the exit status."""
    parser = Parser(prog="producer.py", description=__doc__.splitlines()[0], epilog=EPILOG)
    add = parser.add_argument
    add_dsn_option(parser)
    add("--interval", type=seconds, default=0.25, help="seconds between batches (default: 0.25)")
    add("--rows", type=positive_int, default=250, help="ticks in a batch (default: 250)")
    add("--batches", type=positive_int, help="stop after this many batches (default: never)")
    add("--seed", type=number(int, 0, 2**63), help="the same seed draws the same ticks")
    add("--reset", action="store_true", help="first drop the table with all its rows")
    options = vars(parser.parse_args(argv))

    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)  # reported here, once

    def log(line):
        try:
            print(line, flush=True)
        except OSError:  # nobody reads: `producer.py | head`, or a terminal that was closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            producer.stop.set()

    producer = Producer(**options, log=log)
    for signum in stop_signals():
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
