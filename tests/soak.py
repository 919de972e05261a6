"""The whole chain under faults drawn from a seed, with every row accounted for.

    python tests/soak.py [--minutes 20] [--seed 1] [--rows-per-second 2000] [--viewers 3]

ClickHouse, two producers and the server are processes, the viewers stay and live on deltas, and a
proxy stands on each way to ClickHouse. After each round of faults, when all is quiet, this compares
- what the producers said was written with what ClickHouse has, where no row may be twice;
- what each viewer received in deltas with what ClickHouse got meanwhile, each row once;
- each viewer's mirror with the newest rows by block and offset;
and it bounds the gaps in the stream and the server's memory. The exit status is 1 if anything was
wrong, with one line for each violation.
"""

import argparse
import collections
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from clickhouse_http import ClickHouseProcess
from conftest import Database, Mirror, Script, Server, counted, free_port, wait_until
from proxy import Proxy, is_insert

import producer

ROUND = 30  # seconds
INTERVAL = 0.25  # seconds between the inserts of each of two producers
QUERY_TIMEOUT = 5  # seconds, in both scripts: a stalled answer must not last a whole round
WINDOW = 40  # seconds of rows in the live table: longer than any outage
MAX_GAP = 25  # seconds: a fault of 4, the timeout, 5 between two attempts, and a slow machine
MAX_GROWTH = 200  # MB, of the server since the first round
SETTLE = 60  # seconds within which every viewer has the last rows


class Viewer(Mirror):
    """A mirror whose `received` is that of its present connection."""

    connections = 0

    async def _mirror_all(self, client):
        with self.lock:
            self.connections += 1
            self.received.clear()
        await super()._mirror_all(client)


class Feed(Script):
    """A producer."""

    killed = False

    def __init__(self, dsn, rows, seed):
        options = {"--dsn": dsn, "--rows": rows, "--interval": INTERVAL, "--seed": seed}
        super().__init__("producer.py", *(text for option in options.items() for text in option))

    def kill(self):
        self.killed = True
        super().kill()

    def confirmed(self):
        """How many rows it said were written; one that was killed wrote more."""
        said = re.findall(r"^([\d,]+) rows", self.output, re.MULTILINE) or ["0"]
        return int(said[-1].replace(",", ""))


class Soak:
    def __init__(self, options, clickhouse):
        self.random, self.clickhouse = random.Random(options.seed), clickhouse
        self.database, self.port = Database(clickhouse), free_port()
        self.to_insert, self.to_read = Proxy(clickhouse.port), Proxy(clickhouse.port)
        self.rows = max(1, round(options.rows_per_second * INTERVAL / 2))
        self.limit = options.rows_per_second * WINDOW
        self.seeds = iter(range(options.seed * 10_000, 2**63))
        self.deck, self.faults = [], collections.Counter()
        self.feeds, self.memory = [], []
        self.confirmed = self.worst_gap = self.violations = 0
        first = Script("producer.py", "--dsn", self.database.dsn, "--batches", 1)
        self.expect(first.wait() == 0, first.output)
        self.head = max(self.came_after(0).column("_block_number").to_pylist())
        self.start_server()
        self.viewers = [Viewer(self.server.url) for _ in range(options.viewers)]
        wait_until(lambda: all(viewer.snapshots for viewer in self.viewers), "all mirrors")

    def start_server(self):
        options = ("--dsn", self.dsn(self.to_read), "--limit", self.limit)
        self.server = Server(*options, port=self.port)

    def start_feed(self):
        self.feeds.append(Feed(self.dsn(self.to_insert), self.rows, next(self.seeds)))

    def dsn(self, proxy):
        dsn = self.clickhouse.dsn_of(self.database.name, port=proxy.port)
        return f"{dsn}?send_receive_timeout={QUERY_TIMEOUT}"

    def expect(self, condition, text):
        """Report a violation if the condition does not hold."""
        if not condition:
            self.violations += 1
            print(f"VIOLATION in round {len(self.memory) + 1}: {text}", flush=True)

    def strike(self):
        """One fault, and its end. All kinds have had their turn before one comes again."""
        chance, clickhouse = self.random, self.clickhouse
        victim = chance.choice([feed for feed in self.feeds if not feed.killed])
        proxy = chance.choice([self.to_insert, self.to_read])
        bytes_before_cut, merge = chance.randint(1, 5000), "OPTIMIZE TABLE stock_values FINAL"
        faults = {
            "delay": [lambda: proxy.delay(chance.uniform(0.05, 1))],
            "stall": [proxy.stall],
            "refuse": [proxy.refuse],
            "drop insert's answer": [self.drop_answer_to_insert],
            "drop answer": [lambda: self.to_read.drop_answer(times=3)],
            "cut answer": [lambda: proxy.cut_answer(bytes_before_cut, times=3)],
            "cut insert": [lambda: self.to_insert.cut_request(bytes_before_cut, is_insert)],
            "merge": [lambda: self.database.command(merge)],
            "stop ClickHouse": [clickhouse.pause, clickhouse.resume],
            "kill ClickHouse": [clickhouse.kill, clickhouse.start],
            "kill server": [self.server.kill, self.start_server],
            "kill producer": [victim.kill, self.start_feed],
        }
        self.deck = self.deck or chance.sample(list(faults), len(faults))
        fault = self.deck.pop()
        self.faults[fault] += 1
        self.check_scripts()
        strike, *repair = faults[fault]
        strike()
        time.sleep(chance.uniform(0.2, 4))
        for step in repair:
            step()
        self.to_insert.pass_on()
        self.to_read.pass_on()

    def drop_answer_to_insert(self):
        self.to_insert.drop_answer(is_insert)
        self.to_insert.wait(self.to_insert.faults + 1, 10)  # producers may still be in a pause

    def check_scripts(self):
        for script in (self.server, *self.feeds):
            ended = script.process.poll() not in (None, -signal.SIGKILL)
            self.expect(not ended and "Traceback" not in script.output, script.output)

    def round(self, seconds):
        """Faults for so long, then quiet, then the comparisons."""
        kills, connections = self.faults["kill server"], [v.connections for v in self.viewers]
        for viewer in self.viewers:
            with viewer.lock:
                viewer.last, viewer.gaps = None, []  # the quiet between two rounds is no gap
        self.feeds = []
        self.start_feed()
        self.start_feed()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.random.uniform(0.5, 3))
            self.strike()
        time.sleep(2)
        self.check_scripts()
        for feed in self.feeds:
            self.expect(feed.killed or feed.stop(seconds=10) == 0, feed.output)
        window = self.wait_for_viewers()
        arrow = self.came_after(self.head)
        self.head = max([self.head, *arrow.column("_block_number").to_pylist()])
        came = counted(arrow)
        self.check_inserts(came)
        kills = self.faults["kill server"] - kills
        for number, (viewer, before) in enumerate(zip(self.viewers, connections, strict=True)):
            again = viewer.connections - before
            self.check_viewer(f"viewer {number}", viewer, window, came, again, kills)
        self.memory.append(int(self.server.memory()))
        grown = self.memory[-1] - self.memory[0]
        self.expect(grown <= MAX_GROWTH, f"the server's memory has grown by {grown} MB")

    def came_after(self, block):
        columns = ", ".join(["_block_number", *producer.COLUMNS])
        sql = f"SELECT {columns} FROM {producer.full_name(self.database.name)}"
        return self.database.client.query_arrow(f"{sql} WHERE _block_number > {block}")

    def wait_for_viewers(self):
        """Return the newest rows, once each viewer has them, or should have them."""
        newest = f"ORDER BY _block_number DESC, _block_offset DESC LIMIT {self.limit}"
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            window = self.database.rows(newest)
            if all(viewer.rows() == window for viewer in self.viewers):
                break
            time.sleep(1)
        return window

    def check_inserts(self, came):
        """Each insert that a producer wrote is there, once."""
        said, unsure = 0, any(feed.killed or "not confirmed" in feed.output for feed in self.feeds)
        for feed in self.feeds:
            said += feed.confirmed()
        self.confirmed += said
        text = f"ClickHouse has {came.total()} rows of producers that wrote {said}"
        self.expect(came.total() == said or (unsure and came.total() > said), text)
        twice = came.total() - len(came)
        self.expect(not twice, f"{twice} rows are in ClickHouse twice")

    def check_viewer(self, name, viewer, window, came, again, kills):
        with viewer.lock:
            received, gap = viewer.received.copy(), max(viewer.gaps, default=0)
            viewer.received -= came  # each row counts in one round
        self.worst_gap = max(gap, self.worst_gap)
        rows, more, less = viewer.rows(), received - came, came - received
        kept = f"{name} connected {again} times again, and the server was killed {kills} times"
        self.expect(again <= kills, kept)
        self.expect(not more, f"{name} received {more.total()} rows twice, or with other values")
        self.expect(again or not less, f"{name} did not receive {less.total()} rows")
        wrong = f"{(window - rows).total()} rows, and has {(rows - window).total()} others"
        self.expect(rows == window, f"{name}'s mirror lacks {wrong}")
        self.expect(gap <= MAX_GAP, f"{name} received nothing for {gap:.1f} s")

    def run(self, seconds):
        """Run rounds for so long; returns the exit status."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 5:
            self.round(min(ROUND, left))
            print(f"round {len(self.memory)}: {self.confirmed:,} rows confirmed,", end=" ")
            print(f"{self.faults.total()} faults, worst gap {self.worst_gap:.1f} s,", end=" ")
            print(f"server {self.memory[-1]} MB, {self.violations} violations", flush=True)
        print(f"faults: {dict(self.faults)}")
        return 1 if self.violations else 0

    def close(self):
        for process in (self.server, *self.feeds):
            process.kill()
        for end in (*self.viewers, self.to_insert, self.to_read):
            end.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "minutes": 20.0,
        "seed": 1,
        "rows-per-second": 2000,
        "viewers": 3,
    }.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ClickHouseProcess(folder, port=free_port()) as clickhouse,
        contextlib.closing(Soak(options, clickhouse)) as soak,
    ):
        return soak.run(60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
