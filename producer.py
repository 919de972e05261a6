"""Draw market ticks and insert them into ClickHouse, a batch every quarter of a second.

This file owns the table `stock_values`: its name, its columns and how to reach it.
`perspective_server.py` imports these from here. Run `python producer.py --help` for the options.
"""

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
import uuid
from urllib.parse import parse_qsl, unquote, urlsplit

import clickhouse_connect
import numpy as np
from clickhouse_connect.driver.binding import quote_identifier
from clickhouse_connect.driver.exceptions import DataError, ProgrammingError

# ---------------------------------------------------------------------------------------------
# The table. The schema is written here, once, as SQL; everything downstream reads it from the
# Arrow stream that ClickHouse answers.

DEFAULT_DSN = "clickhouse://admin:admin1234@localhost:8123/test"
DSN_FORM = "clickhouse://user:password@host:port/database"
DSN_OPTIONS = (  # of clickhouse-connect, behind a question mark; the timeouts are whole seconds
    "connect_timeout send_receive_timeout verify ca_cert client_cert client_cert_key tls_mode"
    " server_host_name proxy_path http_proxy https_proxy client_name compress"
)
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
# Block numbers and offsets that survive merges are the server's cursor. The deduplication window
# is what makes it harmless to send the same batch twice, as long as no more inserts than this, of
# all producers together, came in between. ClickHouse keeps some 60 bytes for each.
SETTINGS = {
    "enable_block_number_column": 1,
    "enable_block_offset_column": 1,
    "non_replicated_deduplication_window": 100_000,
}
QUERY_TIMEOUT = 30  # seconds


class TableMismatch(Exception):
    """The table is there, but it is not one that these scripts can work with."""


def split_dsn(dsn):
    """Take a DSN apart into (DSN without the database, database).

    The database is taken out because a client that names one which does not exist yet cannot
    even connect. Raises ValueError if the DSN does not parse.
    """
    parts = urlsplit(dsn)
    if parts.scheme == "chdb":  # embedded: the path of a chdb DSN is a folder, no database
        if parts.netloc and (parts.netloc, parts.path) != ("memory", ""):
            raise ValueError("expected chdb:///folder or chdb://memory")
        return dsn, "test"
    database = unquote(parts.path.strip("/")) or "test"
    if parts.scheme != "clickhouse" or not parts.hostname or parts.port == 0 or "/" in database:
        raise ValueError(f"expected {DSN_FORM}")
    # Behind an unquoted / ? or # of the password; what is before it would pass for host and port.
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("expected the password's special characters as %XX")
    for name, value in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True):
        if name not in DSN_OPTIONS.split() or ("_timeout" in name and int(value) <= 0):
            raise ValueError(f"expected options out of {DSN_OPTIONS}")
    return parts._replace(path="").geturl(), database


def connect(dsn):
    """Open a clickhouse-connect client, which serves one call at a time."""
    server, _ = split_dsn(dsn)
    if server.startswith("chdb:"):
        return clickhouse_connect.get_client(interface="chdb", path=unquote(urlsplit(dsn).path))
    return clickhouse_connect.get_client(
        dsn=server,
        autogenerate_session_id=False,
        connect_timeout=5,
        send_receive_timeout=QUERY_TIMEOUT,
        query_retries=0,
        compress=False,
    )


def full_name(database):
    """The quoted name of the table, for SQL."""
    return f"{quote_identifier(database)}.{TABLE}"


def check_table(client, database, to_write=False):
    """Whether the table is there. Raises TableMismatch if it is there, but not as written above.

    Who only reads does without the deduplication window.
    """
    key = {"database": database, "table": TABLE}
    found = client.query(
        "SELECT engine, partition_key, engine_full FROM system.tables"
        " WHERE database = {database:String} AND name = {table:String}",
        parameters=key,
    ).result_rows
    if not found:
        return False
    engine, partition_key, engine_full = found[0]
    columns = client.query(
        "SELECT name, type FROM system.columns"
        " WHERE database = {database:String} AND table = {table:String}",
        parameters=key,
    ).result_rows
    wrong = [f"column {name} {kind}" for name, kind in set(columns) - set(COLUMNS.items())]
    wrong += [f"no {name} {kind}" for name, kind in set(COLUMNS.items()) - set(columns)]
    # Other engines remove rows as they merge; block numbers are counted in each partition anew.
    if engine not in ("MergeTree", "ReplicatedMergeTree", "SharedMergeTree"):
        wrong.append(f"engine {engine}")
    if partition_key:
        wrong.append(f"PARTITION BY {partition_key}")
    for name in SETTINGS:  # replicated tables have a deduplication window of their own by default
        needed = "enable_" in name or (to_write and engine == "MergeTree")
        if needed and not re.search(rf"\b{name} = '?(true|[1-9])", engine_full):
            wrong.append(f"no {name}")
    if wrong:
        raise TableMismatch(
            f"table {database}.{TABLE} does not fit: rename it, name another database in the DSN,"
            f" or replace it with `python producer.py --reset` ({', '.join(sorted(wrong))})"
        )
    return True


def create_table(client, database, reset=False):
    """Create database and table where they are not there yet; `reset` drops the table first.

    What exists is not created again, so a user with no right to create can run the producer, too.
    """
    if not client.command(f"EXISTS DATABASE {quote_identifier(database)}"):
        client.command(f"CREATE DATABASE IF NOT EXISTS {quote_identifier(database)}")
    if reset:
        client.command(f"DROP TABLE IF EXISTS {full_name(database)} SYNC")
    if not check_table(client, database, to_write=True):
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        settings = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
        client.command(
            f"CREATE TABLE IF NOT EXISTS {full_name(database)} ({columns})"
            f" ENGINE = MergeTree ORDER BY (timestamp, ticker) SETTINGS {settings}"
        )
        check_table(client, database, to_write=True)  # someone else may have been faster


# ---------------------------------------------------------------------------------------------
# The market. Every ticker has a level of its own and walks around it: each tick opens where the
# ticker's last one closed, moves by some hundredths of a per cent, and is pulled home a little,
# so that after a week of running the prices are still prices.

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
STEP = 2e-4  # standard deviation of a tick's logarithmic return
PULL = 1e-5  # share of the way home that a tick goes: deviations stay near 5 %
DAY_MS = 86_400_000


def cents(prices):
    """Prices in whole cents, and never nothing."""
    return np.maximum(np.round(prices, 2), 0.01)


class Market:
    """Thirteen prices that walk. The same seed draws the same ticks."""

    def __init__(self, seed=None):
        self.random = np.random.default_rng(seed)
        self.tickers = np.array(list(LEVELS), dtype=object)
        self.clients = np.array(CLIENTS, dtype=object)
        self.home = np.log(list(LEVELS.values()))
        self.price = self.home.copy()  # logarithms, unrounded: rounding must not stop the walk
        self.close = cents(np.exp(self.price))

    def draw(self, rows, start_ms, span_ms):
        """Draw `rows` ticks spread over [start_ms, start_ms + span_ms), oldest first.

        Returns one sequence for each of COLUMNS, in their order; times are milliseconds since
        1970 UTC, dates are days since then. low <= min(open, close) <= max(open, close) <= high.
        """
        random = self.random
        times = start_ms + np.sort(random.uniform(0, span_ms, rows)).astype(np.int64)
        ticker = random.integers(len(self.tickers), size=rows)
        client = random.integers(len(self.clients), size=rows)
        moves = random.normal(0, STEP, rows)
        spread = 1 + np.abs(random.normal(0, STEP, (2, rows)))
        opens, closes = np.empty(rows), np.empty(rows)
        for i in range(len(self.tickers)):
            mine = np.flatnonzero(ticker == i)
            if not len(mine):
                continue
            path = self.price[i] + np.cumsum(moves[mine])
            closes[mine] = cents(np.exp(path))
            opens[mine] = np.append(self.close[i], closes[mine[:-1]])
            self.price[i] = path[-1] + (self.home[i] - path[-1]) * min(1, PULL * len(mine))
            self.close[i] = closes[mine[-1]]
        # Rounding keeps the order of numbers, so high and low stay outside of open and close.
        highs = cents(np.maximum(opens, closes) * spread[0])
        lows = cents(np.minimum(opens, closes) / spread[1])
        return [
            times.tolist(),  # plain ints: what clickhouse-connect takes for DateTime64 and Date
            self.tickers[ticker],
            self.clients[client],
            *(price.astype(np.float32) for price in (opens, highs, lows, closes)),
            (100 * random.geometric(0.02, rows)).astype(np.uint32),
            (times // DAY_MS).tolist(),
        ]


# ---------------------------------------------------------------------------------------------
# The producer. A batch is kept until ClickHouse has confirmed it and goes out again, under the
# same deduplication token, for as long as that takes: a batch that arrived although its answer
# was lost is not stored twice. While ClickHouse is away no new ticks are drawn.

FATAL = {
    16: "the table lacks a column",  # the numbers are ClickHouse's, see system.errors
    44: "the table computes a column",
    53: "the table has another type",
    115: "this ClickHouse is too old",
    164: "the user may only read",
    192: "unknown user",
    193: "wrong password",
    194: "password required",
    497: "the user lacks a right",
    516: "wrong user or password",
}
# What the driver or Python refuses before anything is sent: chdb not installed, a senseless option.
HOPELESS = (TableMismatch, DataError, ProgrammingError, ImportError, TypeError)
LONGEST_PAUSE = 5  # seconds between two attempts


def reason(error):
    """One line that says what went wrong, without the driver's trailers."""
    # urllib3 keeps why there is no connection in `reason`, at the end of a long sentence.
    cause = str(getattr(error.__cause__, "reason", None) or "").rpartition(": ")[2]
    text = cause or str(error).strip() or type(error).__name__
    text = text.partition("server response: ")[2] or text
    return re.split(r" \(version | executing HTTP request|\n", text)[0][:500]


def is_fatal(error):
    """Whether ClickHouse's answer is one that waiting does not heal."""
    return getattr(error, "code", None) in FATAL


def explain(error):
    """`reason`, with what the error's number means in front."""
    return f"{FATAL[error.code]}: {reason(error)}" if is_fatal(error) else reason(error)


class Producer:
    """Inserts batches at a steady pace until `stop` is set or `batches` are confirmed.

    `say` gets a sentence at each change of state. After `run`, `rows` is what ClickHouse has
    confirmed, and `error` the reason if it ended because of something that cannot heal.
    """

    def __init__(self, dsn, interval, rows, batches=None, seed=None, reset=False, say=print):
        self.dsn, self.database = dsn, split_dsn(dsn)[1]
        self.interval, self.batch_rows, self.batches = interval, rows, batches
        self.market, self.reset, self.say = Market(seed), reset, say
        self.stop = threading.Event()
        self.client = self.error = None
        self.rows = 0
        self.unconfirmed = False  # a batch was sent, and nobody knows whether it arrived

    def run(self):
        """Produce. Blocks; meant for a thread of its own."""
        try:
            if self.until_it_works(self.open):
                self.produce()
        except Exception as error:
            self.error = error
        finally:
            if self.client:
                self.client.close()

    def produce(self):
        name, behind, number = uuid.uuid4().hex, False, 0
        # The pace is kept by the monotonic clock, which nobody can set. `epoch` is what the
        # wall clock shows when that one is at zero: it changes when somebody sets the wall clock.
        due, epoch = time.monotonic(), time.time() - time.monotonic()
        while number != self.batches and not self.stop.wait(due - time.monotonic()):
            late = time.monotonic() - due
            if abs(time.time() - time.monotonic() - epoch) > 0.1:
                epoch = time.time() - time.monotonic()
            if behind != (late > max(self.interval, 1)):
                behind = not behind
                self.say(f"behind by {late:.1f} s: catching up" if behind else "caught up")
            span_ms = self.interval * 1000
            start_ms = round((epoch + due) * 1000 - span_ms)
            batch = self.market.draw(self.batch_rows, start_ms, span_ms)
            attempts = self.until_it_works(self.insert, batch, f"{name}-{number}")
            if not attempts:
                return
            self.rows, number = self.rows + self.batch_rows, number + 1
            # Slow inserts are caught up with; an outage is a pause of the market.
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

    def until_it_works(self, step, *arguments):
        """Call `step` until it returns. Returns how many attempts that took, 0 if stopped."""
        attempts, pause = 1, 0.1
        while True:
            try:
                step(*arguments)
            except HOPELESS:
                raise
            except Exception as error:
                if is_fatal(error):
                    raise
                if self.client:
                    self.client.close()
                    self.client = None
                if attempts == 1:
                    self.say(f"ClickHouse is away ({reason(error)}): no new ticks until it is back")
                if self.stop.wait(pause):
                    return 0
                attempts, pause = attempts + 1, min(2 * pause, LONGEST_PAUSE)
            else:
                if attempts > 1:
                    self.say("ClickHouse is back")
                return attempts


# ---------------------------------------------------------------------------------------------
# The command line.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message):
        message = re.sub(r"//\S*@", "//user:password@", message)  # a DSN without --dsn before it
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def seconds(text):
    """A time in seconds, for argparse: more than 0 and at most a day."""
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def count(text):
    """A number of things, for argparse: a whole number above 0."""
    value = int(text)
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above 0")
    return value


def whole(text):
    """A seed, for argparse: a whole number, and numpy wants none below 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 up")
    return value


def dsn(text):
    """A DSN, for argparse. The complaint does not repeat it: there may be a password in it."""
    try:
        split_dsn(text)
    except ValueError:
        options = f", of the options {DSN_OPTIONS}" if "?" in text else ""
        raise argparse.ArgumentTypeError(
            f"it does not parse, expected {DSN_FORM} with %XX for special characters{options}"
        ) from None
    return text


def add_dsn(parser):
    """Add --dsn, the same for both scripts."""
    parser.add_argument(
        "--dsn",
        type=dsn,
        default=os.environ.get("CLICKHOUSE_DSN") or DEFAULT_DSN,
        help="ClickHouse to use (default: $CLICKHOUSE_DSN, else the container of docker.sh)",
    )


def where(dsn):
    """The DSN's host and database, for people: no user, no password."""
    parts = urlsplit(dsn)
    if parts.scheme == "chdb":
        return f"the embedded engine in {unquote(parts.path) or 'memory'}"
    return f"{parts.hostname}:{parts.port or 8123}, database {split_dsn(dsn)[1]}"


def main(argv=None):
    """Run the producer; returns the exit status."""
    parser = Parser(prog="producer.py", description=__doc__.splitlines()[0])
    add_dsn(parser)
    parser.add_argument("--interval", type=seconds, default=0.25, help="seconds between batches")
    parser.add_argument("--rows", type=count, default=250, help="ticks in a batch")
    parser.add_argument("--batches", type=count, help="stop after so many (default: never)")
    parser.add_argument("--seed", type=whole, help="draw the same ticks again")
    parser.add_argument("--reset", action="store_true", help="drop the table and its rows first")
    options = vars(parser.parse_args(argv))

    # What the driver has to say of a failure, the producer says itself, once.
    logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
    terminal = sys.stdout.isatty()

    def say(text, end="\n"):
        try:
            print(f"\r\x1b[K{text}" if terminal else text, end=end, flush=True)
        except OSError:  # nobody reads on, as in `producer.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            producer.stop.set()

    producer = Producer(**options, say=say)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: producer.stop.set())
    say(f"inserting into {where(options['dsn'])}")
    worker = threading.Thread(target=producer.run, daemon=True)
    worker.start()

    started = shown = time.monotonic()
    every = 0.5 if terminal else 5
    while worker.is_alive() and not producer.stop.is_set():
        worker.join(0.1)
        now = time.monotonic()
        if now - shown >= every:
            rate = producer.rows / (now - started)
            line = f"{producer.rows:,} rows, {rate:,.0f} rows a second"
            say(line, end="" if terminal else "\n")
            shown = now
    worker.join(1.5)  # the batch in hand

    lost = ", the last batch was not confirmed" if producer.unconfirmed else ""
    say(f"{producer.rows:,} rows written{lost}")
    if producer.error:
        print(f"producer.py: {explain(producer.error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
