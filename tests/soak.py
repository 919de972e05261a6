"""Hours in minutes: the whole chain under faults drawn from a seed, and the books kept.

    python tests/soak.py [--minutes 20] [--seed 1] [--rows-per-second 10000] [--viewers 20]

Real ClickHouse (chDB over HTTP), producer and server as processes, viewers on real websockets, and
a proxy on each way to ClickHouse. In rounds of about a minute, faults strike at random: answers
delayed, dropped, cut in mid-body, inserts cut, connections refused or stalled, ClickHouse stopped
for seconds or killed with SIGKILL, the Perspective server killed and started again. A round ends
with the producer stopped, and with the comparison of all its rows: what its seed draws, what
ClickHouse holds, and what a viewer reads. Exits with 1 if a row is missing or there twice.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas
import pyarrow
from clickhouse_http import ClickHouseProcess
from conftest import Script, Server, Viewer, free_port, wait_until
from proxy import Proxy, is_insert

import producer

ROUND = 60  # seconds
INTERVAL = 0.25
FAULTS = ["delay", "stall", "refuse", "drop", "cut_answer", "cut_insert"]
FAULTS += ["pause", "kill", "restart_server"]
WITHOUT_TIME = [name for name in producer.COLUMNS if name not in ("timestamp", "date")]


def hashes(frame):
    """A hash for each row, sorted: equal for equal sets of rows, duplicates included."""
    frame = frame.copy()
    for name in ("ticker", "client"):
        frame[name] = frame[name].astype(str)
    for name in ("open", "high", "low", "close"):
        frame[name] = frame[name].astype("float32")
    frame["volume"] = frame["volume"].astype("int64")
    return pandas.util.hash_pandas_object(frame, index=False).sort_values().reset_index(drop=True)


def compare(expected, found):
    """(rows missing, rows too many) in `found`."""
    counts = pandas.concat([expected.value_counts(), found.value_counts()], axis=1).fillna(0)
    more = counts.iloc[:, 1] - counts.iloc[:, 0]
    return int(-more[more < 0].sum()), int(more[more > 0].sum())


class Watcher:
    """A viewer that reads what changes, connects again when it must, and notes its gaps."""

    def __init__(self, url):
        self.url, self.ended = url, threading.Event()
        self.updates, self.worst, self.last = 0, 0.0, None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.ended.is_set():
            with contextlib.suppress(Exception), Viewer(self.url) as viewer:
                watching = asyncio.run_coroutine_threadsafe(self._watch(viewer), viewer.loop)
                # A call that was under way when the connection broke would never return.
                while not (watching.done() or viewer.closed.is_set() or self.ended.is_set()):
                    time.sleep(0.1)
                watching.cancel()
            self.last = None  # a gap in the stream is counted, a restart of the server is not
            self.ended.wait(0.5)

    async def _watch(self, viewer):
        table = await viewer.client.open_table(producer.TABLE)
        view = await table.view(group_by=["ticker"], columns=["close", "volume"])
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        await view.on_update(lambda *_: loop.call_soon_threadsafe(changed.set))
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), 0.5)
                changed.clear()
                await asyncio.wait_for(view.to_arrow(), 10)
                now = time.monotonic()
                if self.last is not None:
                    self.worst = max(self.worst, now - self.last)
                self.updates, self.last = self.updates + 1, now

    def close(self):
        self.ended.set()
        self.thread.join(15)


class Soak:
    def __init__(self, options, folder):
        self.options, self.random = options, random.Random(options.seed)
        self.clickhouse = ClickHouseProcess(folder)
        self.clickhouse.start()
        self.to_insert, self.to_read = Proxy(self.clickhouse.port), Proxy(self.clickhouse.port)
        self.port = free_port()
        self.confirmed = self.unsure = self.held = self.delivered = self.missing = self.twice = 0
        self.faults, self.memory = {}, []
        self.server = None
        self.start_server()

    def dsn(self, proxy):
        # Not the 30 seconds by default: a stalled answer should not be the rest of a round.
        return f"{self.clickhouse.dsn_of('test', port=proxy.port)}?send_receive_timeout=10"

    def start_server(self):
        if self.server:
            with contextlib.suppress(Exception):
                self.delivered += self.server.health()["delivered"]
            self.server.kill()
        limit = 2 * ROUND * self.options.rows_per_second
        self.server = Server("--dsn", self.dsn(self.to_read), "--limit", limit, port=self.port)

    def strike(self):
        """One fault, and its end."""
        chance, proxy = self.random, self.random.choice([self.to_insert, self.to_read])
        aim = is_insert if proxy is self.to_insert else None
        fault = chance.choice(
            [
                "delay",
                "stall",
                "refuse",
                "drop",
                "cut_answer",
                "cut_insert",
                "pause",
                "kill",
                "restart_server",
            ]
        )
        self.faults[fault] = self.faults.get(fault, 0) + 1
        seconds = chance.uniform(0.2, 4)
        if fault == "delay":
            proxy.delay(chance.uniform(0.05, 1))
        elif fault == "stall":
            proxy.stall()
        elif fault == "refuse":
            proxy.refuse()
        elif fault == "drop":
            proxy.drop_answer(aim, times=chance.randint(1, 3))
        elif fault == "cut_answer":
            proxy.cut_answer(chance.randint(1, 2000), times=chance.randint(1, 5))
        elif fault == "cut_insert":
            self.to_insert.cut_request(chance.randint(1, 50_000), is_insert, times=2)
        elif fault == "pause":
            self.clickhouse.pause()
        elif fault == "kill":
            self.clickhouse.kill()
        elif fault == "restart_server":
            self.start_server()
        time.sleep(seconds)
        if fault == "pause":
            self.clickhouse.resume()
        elif fault == "kill":
            self.clickhouse.start()
        proxy.pass_on()
        self.to_insert.pass_on()

    def round(self, number, seconds):
        rows = round(self.options.rows_per_second * INTERVAL)
        seed = self.options.seed * 1000 + number
        began_ms = int(time.time() * 1000 - INTERVAL * 1000)
        feeding = Script(
            "producer.py",
            *("--dsn", self.dsn(self.to_insert), "--rows", rows, "--interval", INTERVAL),
            *("--seed", seed),
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(self.random.uniform(0.5, 6))
            self.strike()
        time.sleep(2)
        feeding.stop(seconds=10)
        written = int(feeding.lines[-1].split()[0].replace(",", ""))
        self.confirmed += written
        # Ended in the middle of an outage: it may come to be stored, and says so.
        unsure = rows if "not confirmed" in feeding.lines[-1] else 0
        return self.balance(rows, seed, written, unsure, began_ms)

    def balance(self, rows, seed, written, unsure, began_ms):
        """Compare what was drawn, what ClickHouse holds and what a viewer reads of a round."""
        market = producer.Market(seed)
        drawn = pandas.concat(
            pandas.DataFrame(dict(zip(producer.COLUMNS, market.draw(rows, 0, 1), strict=True)))
            for _ in range((written + unsure) // rows)
        )[WITHOUT_TIME]
        columns = ["timestamp", *WITHOUT_TIME]

        def hold():
            with contextlib.closing(producer.connect(self.clickhouse.dsn_of("test"))) as client:
                self.held = int(client.command("SELECT count() FROM test.stock_values"))
                return client.query_arrow(
                    f"SELECT {', '.join(producer.COLUMNS)} FROM test.stock_values"
                    f" WHERE timestamp >= fromUnixTimestamp64Milli({began_ms})"
                ).to_pandas()

        def read():
            with Viewer(self.server.url) as viewer:
                config = {"filter": [["timestamp", ">=", began_ms]], "columns": columns}
                return viewer.run(self.fetch(viewer, config), 120).to_pandas()[columns]

        wait_until(lambda: self.server.health()["clickhouse"] == "up", 60, self.server.lines)
        deadline = time.monotonic() + 20
        while True:  # the last poll, or the last insert, may still be under way
            held = hold()
            missing, _ = compare(hashes(drawn[:written]), hashes(held[WITHOUT_TIME]))
            _, twice = compare(hashes(drawn), hashes(held[WITHOUT_TIME]))
            lost, doubled = compare(
                hashes(self.stamped(held[columns])), hashes(self.stamped(read()))
            )
            if not missing + twice + lost + doubled or time.monotonic() > deadline:
                break
            time.sleep(1)
        if len(held) > written and not twice:
            self.unsure += unsure
        if missing + twice + lost + doubled:
            print(f"ClickHouse: {missing} missing, {twice} twice; viewer: {lost}, {doubled}")
        self.missing += missing + lost
        self.twice += twice + doubled
        return missing + lost, twice + doubled

    @staticmethod
    def stamped(frame):
        frame = frame.copy()
        times = frame["timestamp"]
        if times.dt.tz is not None:
            times = times.dt.tz_convert(None)
        frame["timestamp"] = times.astype("datetime64[ms]").astype("int64")
        return frame

    @staticmethod
    async def fetch(viewer, config):
        table = await viewer.client.open_table(producer.TABLE)
        view = await table.view(**config)
        arrow = await view.to_arrow()
        await view.delete()
        return pyarrow.ipc.open_stream(arrow).read_all()

    def measure(self):
        status = Path(f"/proc/{self.server.process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        self.memory.append(int(line.split()[1]) // 1024)

    def run(self):
        until = time.monotonic() + 60 * self.options.minutes
        watchers = [Watcher(self.server.url) for _ in range(self.options.viewers)]
        number = 0
        while (left := until - time.monotonic()) > 5:
            missing, twice = self.round(number, min(ROUND, left))
            self.measure()
            number += 1
            print(
                f"round {number}: {self.confirmed:,} rows confirmed, {missing} missing, {twice}"
                f" twice, {sum(self.faults.values())} faults, server {self.memory[-1]} MB",
                flush=True,
            )
        for watcher in watchers:
            watcher.ended.set()
        for watcher in watchers:
            watcher.close()
        self.delivered += self.server.health()["delivered"]
        middle = self.memory[len(self.memory) // 2]
        restarts = {name: self.faults.get(name, 0) for name in ("kill", "restart_server")}
        print(f"""
rows confirmed        {self.confirmed:,}
rows in ClickHouse    {self.held:,}, {self.unsure:,} of them sent when a producer was ended
rows delivered        {self.delivered:,} (windows read anew included)
duplicates            {self.twice}
losses                {self.missing}
faults                {sum(self.faults.values())}: {self.faults}
restarts survived     ClickHouse {restarts["kill"]}, server {restarts["restart_server"]}
server's memory       {self.memory[0]} MB at first, {middle} MB in the middle, \
{self.memory[-1]} MB at the end
viewers               {len(watchers)}, {min(w.updates for w in watchers):,} updates at least, \
worst gap {max(w.worst for w in watchers):.1f} s (outages included)""")
        right = self.held == self.confirmed + self.unsure
        return 0 if right and self.missing == self.twice == 0 else 1

    def close(self):
        self.server.kill()
        self.to_insert.close()
        self.to_read.close()
        self.clickhouse.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows-per-second", type=int, default=10_000)
    parser.add_argument("--viewers", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, folder)
        try:
            return soak.run()
        finally:
            soak.close()


if __name__ == "__main__":
    sys.exit(main())
