"""Viewers read, strangers stay out: what an outsider could try, tried on running servers.

`ours` is perspective_server.py, `stock` is Perspective's own handler on a table with some of the
same rows. What an attack does to the stock handler shows that it is an attack. After each of them
`ours` must have the rows that ClickHouse has, and still serve everybody.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import perspective
import pyarrow
import pytest
from clickhouse_http import ClickHouseProcess
from conftest import (
    COLUMNS,
    ROOT,
    Database,
    Script,
    Server,
    Viewer,
    counted,
    free_port,
    wait_until,
)
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.websocket import websocket_connect

import perspective_server
import producer
from perspective_server import fields

TABLE = "stock_values"
TABLES = {TABLE, f"{TABLE}_newest", f"{TABLE}_tickers", f"{TABLE}_candles"}

# --- Messages by hand -----------------------------------------------------------------------------


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def f(number, value):
    """A protobuf field: an int, a float, a text, bytes, or a message as bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def ask(number, body=b"", entity=TABLE, message_id=7):
    return f(1, message_id) + f(2, entity) + f(number, body)


def make(config, view="v", message_id=7):
    return ask(6, f(1, view) + f(2, config), TABLE, message_id)


def shown(*names):
    return f(3, f(2, b"".join(f(1, name) for name in names)))


def filtered(column, operator, *values):
    return f(4, f(1, column) + f(2, operator) + b"".join(f(3, value) for value in values))


def computed(text, name="e"):
    return f(6, f(1, name) + f(2, text))


def aggregated(column, *how):
    return f(7, f(1, column) + f(2, b"".join(f(1, word) for word in how)))


def window(*numbers):
    """Start row, start column, end row, end column; None leaves one out."""
    return b"".join(f(i, number) for i, number in enumerate(numbers, 1) if number is not None)


class Raw(Viewer):
    """A websocket on which one sends what one likes; `answers` are taken apart."""

    async def _connect(self):
        self.answers = collections.deque(maxlen=10_000)
        request = HTTPRequest(self.address, headers=self.headers)
        self.socket = await websocket_connect(request, max_message_size=1 << 30)
        self.reading = asyncio.ensure_future(self._read())

    async def _read(self):
        while (message := await self.socket.read_message()) is not None:
            self.answers.append(dict(fields(message)))
        self.closed.set()

    def send(self, *messages, binary=True):
        async def write():
            for message in messages:
                await self.socket.write_message(message, binary)

        self.run(write(), 60)

    def ask(self, message, seconds=10):
        """Send, and return the answer."""
        wanted = {0, next(fields(message))[1]}  # what is malformed may be answered as message 0
        self.answers.clear()
        self.send(message)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for answer in list(self.answers):
                if answer.get(1, 0) in wanted:
                    return answer
            assert not self.closed.is_set(), "the server hung up"
            time.sleep(0.002)
        raise TimeoutError

    def answer(self, number):
        """What was sent last under this number, or comes within five seconds; it is taken away."""
        return wait_until(lambda: self.heard(number) and self.taken(number), 5, number)

    def heard(self, number):
        return sum(answer.get(1) == number for answer in list(self.answers))

    def taken(self, number):
        found = [answer for answer in list(self.answers) if answer.get(1) == number]
        for answer in found:
            self.answers.remove(answer)
        return found[-1]

    def refused(self, message):
        """Send; the answer must be an error, and its text is returned."""
        answer = self.ask(message)
        assert 50 in answer, answer
        return dict(fields(answer[50]))[1].decode()

    def works(self):
        return 8 in self.ask(ask(8, message_id=random.randrange(1 << 20, 1 << 30)))


# --- The servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def market(clickhouse):
    """A database with 5,000 ticks."""
    database = Database(clickhouse)
    script = Script("producer.py", "--dsn", database.dsn, "--batches", 20, "--interval", 0.05)
    assert script.wait() == 0
    yield database
    database.command(f"DROP DATABASE {database.name}")


@pytest.fixture(scope="module")
def running(market):
    server = Server("--dsn", market.dsn, "--limit", 20_000)
    server.wait_for_rows(5000)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output


@pytest.fixture
def ours(running, market):
    """The server, which must be unharmed after the test."""
    yield running
    wait_until(lambda: running.health()["viewers"] == 0, 15, "all viewers gone")
    with Viewer(running.url) as viewer:
        wait_until(lambda: viewer.rows() == market.rows(), 10, "Perspective agrees")


STOCK = """
import asyncio, sys
import perspective
from perspective.handlers.tornado import PerspectiveTornadoHandler
from tornado.web import Application

async def main():
    server = perspective.Server()
    rows = sys.stdin.buffer.read()
    table = server.new_local_client().table(rows, name="stock_values", limit=5000)
    Application(
        [(r"/websocket", PerspectiveTornadoHandler, {"perspective_server": server})]
    ).listen(int(sys.argv[1]), "127.0.0.1")
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Stock:
    """Perspective's own handler as a process."""

    def __init__(self, rows=1000):
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", STOCK, str(self.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.process.stdin.write(ticks(rows))
        self.process.stdin.close()
        self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def ticks(rows):
    """Ticks as an Arrow stream."""
    columns = producer.Market(1).draw(rows, 1_700_000_000_000, rows * 4)
    arrays = {
        "timestamp": pyarrow.array(columns[0], pyarrow.timestamp("ms", "UTC")),
        "ticker": pyarrow.array(columns[1]).dictionary_encode(),
        "client": pyarrow.array(columns[2]).dictionary_encode(),
        **dict(zip(COLUMNS[3:8], map(pyarrow.array, columns[3:8]), strict=True)),
        "date": pyarrow.array(columns[8], pyarrow.int32()).cast(pyarrow.date32()),
    }
    table, sink = pyarrow.table(arrays), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def stock():
    with Stock() as server:
        yield server


# --- Writing --------------------------------------------------------------------------------------

ROW = ticks(1)


async def update(client, table):
    await table.update(ROW)


async def replace(client, table):
    await table.replace(ROW)


async def clear(client, table):
    await table.clear()


async def make_table(client, table):
    await client.table(ROW, name="mine")


async def make_table_of_that_name(client, table):
    await client.table(ROW, name=TABLE)


async def derive(client, table):
    await client.table(await table.view(), name="derived")


async def join(client, table):
    await client.join(table, table, "ticker", name="joined")


async def delete(client, table):
    await table.delete()


WRITES = [update, replace, clear, make_table, make_table_of_that_name, derive, join, delete]


async def attempt(viewer, write):
    table = await viewer.client.open_table(TABLE)
    await write(viewer.client, table)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_nobody_writes(ours, write):
    with Viewer(ours.url) as viewer:
        with pytest.raises(perspective.PerspectiveError, match="this table is read-only"):
            viewer.run(attempt(viewer, write))
        assert set(viewer.run(viewer.client.get_hosted_table_names())) == TABLES
        assert not viewer.closed.is_set()


@pytest.mark.parametrize("write", [update, replace, clear, make_table, derive, delete])
def test_the_stock_handler_lets_everybody_write(write):
    with Stock(100) as stock, Viewer(stock.url, headers={"Origin": "http://evil"}) as viewer:
        viewer.run(attempt(viewer, write))


UPDATE = f(1, f(3, ROW))
HIDDEN = {
    "behind a read": f(8, b"") + f(33, UPDATE),
    "before a read": f(33, UPDATE) + f(8, b""),
    "behind many reads": f(8, b"") * 50 + f(33, UPDATE),
    "behind an unknown field": f(99, b"") + f(33, UPDATE),
    "behind a number that is no message": f(8, 1) + f(33, UPDATE),
    "behind a fixed number": varint(8 << 3 | 1) + bytes(8) + f(33, UPDATE),
    "in a tag with bits too many": varint(33 << 3 | 2 | 1 << 33) + varint(len(UPDATE)) + UPDATE,
    "in a tag longer than needed": b"\x8a\x82\x80\x00" + varint(len(UPDATE)) + UPDATE,
    "behind a second id": f(1, 9) + f(33, UPDATE),
    "behind a second name": f(8, b"") + f(2, TABLE) + f(33, UPDATE),
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_nothing_hides_behind_something(ours, hidden):
    with Raw(ours.url) as raw:
        assert raw.refused(f(1, 7) + f(2, TABLE) + hidden)
        assert raw.works()


def test_the_stock_handler_takes_what_is_hidden():
    with Stock(100) as stock, Raw(stock.url) as raw:
        raw.send(f(1, 7) + f(2, TABLE) + HIDDEN["behind a read"])
        wait_until(
            lambda: dict(fields(raw.ask(ask(8, message_id=8))[8]))[2] == 101, 5, "a row more"
        )


def test_of_all_numbers_only_those_known_to_read(ours):
    known = {3, 4, 5, 7, 8, 17, 29, 30, 37, 41}
    with Raw(ours.url) as raw:
        for number in [n for n in (*range(3, 61), 99, 1000, 2**20, 2**29 - 1) if n not in known]:
            assert 50 in raw.ask(f(1, 7) + f(2, TABLE) + f(number, b"")), number
        for number in known - {29}:  # 29 is answered when the table is deleted
            assert 50 not in raw.ask(ask(number)), number
        assert raw.works()


# --- The views of others --------------------------------------------------------------------------

OF_A_VIEW = [*range(10, 17), *range(18, 27), 34, 35, 36, 39, 40]


def test_views_belong_to_their_session(ours):
    with Raw(ours.url) as owner, Raw(ours.url) as other:
        assert 6 in owner.ask(make(b"", "mine"))
        for number in OF_A_VIEW:
            assert other.refused(ask(number, b"", "mine")) == "View not found", number
            for name in ("view 1", "view 2", "view 3"):  # as the engine may know it
                assert other.refused(ask(number, b"", name)) == "View not found", (number, name)
        assert "name exists" in owner.refused(make(f(1, "client"), "mine"))
        assert 6 in other.ask(make(f(1, "client"), "mine"))  # another view of the same name
        assert 12 in other.ask(ask(12, b"", "mine"))
        assert 11 in other.ask(ask(11, b"", "mine"))
        assert other.refused(ask(12, b"", "mine")) == "View not found"
        assert 12 in owner.ask(ask(12, b"", "mine"))
        assert 11 in owner.ask(ask(11, b"", "mine"))
        assert 6 in owner.ask(make(b"", "mine"))  # the name is free again


def test_a_view_that_is_not_made_does_not_exist(ours):
    with Raw(ours.url) as raw:
        for number in (7, 1 << 32, (1 << 32) + 7):  # the engine takes 32 bits of a number
            assert 50 in raw.ask(f(1, number) + f(2, "nope") + f(6, f(1, "v") + f(2, b"")))
            assert raw.refused(ask(11, b"", "v")) == "View not found"
        assert raw.works()


def test_the_stock_handler_shares_views(stock):
    with Raw(stock.url) as owner, Raw(stock.url) as other:
        assert 6 in owner.ask(make(b"", "mine"))
        assert 11 in other.ask(ask(11, b"", "mine"))
        assert 50 in owner.ask(ask(12, b"", "mine"))


ODD_VIEWS = {
    "no name": ask(6, f(2, b"")),
    "a number as name": ask(6, f(1, 5)),
    "two names": ask(6, f(1, "a") + f(1, "b")),
    "no text as name": ask(6, f(1, b"\xff\xfe")),
    "a number as entity": f(1, 7) + f(2, 5) + f(12, b""),
    "no text as entity": ask(12, b"", b"\xff\xfe"),
}


@pytest.mark.parametrize("message", ODD_VIEWS.values(), ids=ODD_VIEWS)
def test_odd_names_are_refused(ours, message):
    with Raw(ours.url) as raw:
        assert raw.refused(message)
        assert raw.works()


# --- What the engine cannot stand -----------------------------------------------------------------
# Seen with Perspective 5.6.1: what ends the process, and what keeps the engine busy for minutes.

DEADLY = {
    "a filter without value": [make(filtered("open", "=="))],
    "a filter with half a value": [make(filtered("date", "==", f(4, float("nan"))))],
    "a filter with a date far away": [make(filtered("date", ">", f(4, 1e308)))],
    "a filter by or": [make(filtered("open", "or", f(4, 1.0))), None],
    "a bucket of time by number": [make(shown("e") + computed('bucket("timestamp", 1)'))],
    "a bucket of text by number": [make(shown("e") + computed("bucket('a', 1)"))],
    "text or number, as the data will": [
        make(
            shown("e")
            + computed("if (\"volume\" > 3000) {1} else {'a'}")
            + f(5, f(1, "e") + f(2, 1))
        ),
        None,
    ],
    "text or time": [make(shown("e") + computed("datetime(0 / 0) ? 'a' : \"date\""))],
    "a column of the engine": [make(shown("psp_okey", "open")), ask(26, b"", "v")],
    "an average of text": [
        make(f(1, "client") + shown("ticker") + aggregated("ticker", "avg")),
        None,
    ],
    "an average of time": [
        make(f(1, "client") + shown("timestamp") + aggregated("timestamp", "mean")),
        None,
    ],
    "the width of nothing": [
        make(
            f(1, "client")
            + shown("low")
            + aggregated("low", "high minus low")
            + filtered("ticker", "==", f(6, "none"))
        )
    ],
    "a row far away": [make(f(1, "ticker")), ask(18, f(1, 1 << 31), "v")],
    "another row far away": [make(f(1, "ticker")), ask(19, f(1, 1 << 31), "v")],
    "a column far away": [make(f(1, "ticker")), ask(25, f(1, window(0, 0, 9, 0xFFFFFFFF)), "v")],
    "a depth of nothing": [
        make(f(1, "client") + filtered("ticker", "==", f(6, "none")) + f(10, 1)),
        ask(23, f(1, 0), "v"),
    ],
}
ENDLESS = {
    "a loop": [make(shown("e") + computed("var i := 0; while (i < 100000) { i += 1 }; i"))],
    "a vector": [make(shown("e") + computed("var v[1000000] := {1}; sum(v)"))],
    "paths from beyond the end": [make(shown("open")), ask(10, window(5, 9), "v")],
}


def play(raw, messages):
    """Send messages; None is a change of the table, made by someone who may."""
    raw.send(*(message or ask(33, f(1, f(3, ticks(50)))) for message in messages))


@pytest.mark.parametrize("messages", DEADLY.values(), ids=DEADLY)
def test_no_message_ends_the_server(ours, messages):
    with Raw(ours.url) as raw:
        assert raw.refused(list(filter(None, messages))[-1 if messages[-1] else 0])
        for message in filter(None, messages):
            raw.ask(message)
        assert raw.works()


@pytest.mark.parametrize("messages", DEADLY.values(), ids=DEADLY)
def test_the_stock_handler_dies(messages):
    with Stock() as stock, Raw(stock.url) as raw:
        for _ in range(6):  # it may take a while to meet what is wrong
            with contextlib.suppress(Exception):
                play(raw, messages)
        wait_until(lambda: stock.process.poll() is not None, 10, "the end")
        assert stock.process.returncode < 0


@pytest.mark.parametrize("messages", ENDLESS.values(), ids=ENDLESS)
def test_no_message_keeps_the_engine_busy(ours, messages):
    with Raw(ours.url) as raw:
        *before, last = messages
        for message in before:
            assert 6 in raw.ask(message)
        assert raw.refused(last)
        assert raw.works()


@pytest.mark.parametrize("messages", ENDLESS.values(), ids=ENDLESS)
def test_the_stock_handler_is_kept_busy(messages):
    with Stock() as stock, Raw(stock.url) as raw:
        play(raw, messages)
        time.sleep(1)
        with pytest.raises(TimeoutError):
            raw.ask(ask(8, message_id=99), 1)
        stock.process.kill()


EXPRESSIONS = [
    *("for (var i := 0; i < 9; i += 1) {1}", "WHILE (1) {1}", "While(1){1}", "repeat 1 until (0)"),
    *("var v[9] := {1}; v[0]", "var v /* [ */ [9]; 1", "// for\n1", "# x\n1", "/**/1", "1 // x"),
    *('"open" := 1', '"open" += 1', '"open" : = 1', '"open" + == 1', '"ticker" <=> "open"'),
    *("~{1, 2}", "[*] {case 1 > 0: 2;}", "switch {case 1 > 2: 3; default: 4}", "return [1]"),
    *("col('open')", 'vlookup("open", 1)', "index()", "random()", "replace_all('a', 'a', 'aa')"),
    *('string("open")', "''", '""', "'a\\'b'", '"a\'b"', '"psp_okey"', "1e9", "1.", "x", "\0"),
    *("if (\"open\" > 1) {'a'} else {1}", "min('a', \"open\")", 'concat("ticker", "open")'),
    *("b\u00fccket", '"open" \uff0b 1'),
]
WAYS = {
    "a view": lambda text: make(computed(text)),
    "a view's second expression": lambda text: make(computed("1", "a") + computed(text)),
    "an expression of that name": lambda text: make(computed(text) + computed("1")),
    "a second text": lambda text: make(f(6, f(1, "e") + f(2, "1") + f(2, text))),
    "a text before a fixed number": lambda text: make(
        f(6, f(1, "e") + f(2, text) + varint(2 << 3 | 1) + b"        ")
    ),
    "a second configuration": lambda text: ask(6, f(1, "v") + f(2, b"") + f(2, computed(text))),
    "a first configuration": lambda text: ask(6, f(1, "v") + f(2, computed(text)) + f(2, b"")),
    "validate": lambda text: ask(9, f(1, f(1, "e") + f(2, text))),
    "a tag with bits too many": lambda text: ask(
        6, f(1, "v") + varint(2 << 3 | 2 | 1 << 33) + varint(len(computed(text))) + computed(text)
    ),
}


@pytest.mark.parametrize("text", EXPRESSIONS, ids=lambda text: repr(text)[:40])
def test_what_no_expression_may_have(text):
    with pytest.raises(perspective_server.Refused):
        perspective_server.judge_config(TABLE, computed(text))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_no_way_leads_around(ours, way):
    with Raw(ours.url) as raw:
        assert raw.refused(way("var i := 0; while (i < 9) { i += 1 }; i"))
        assert raw.works()


CONFIGS = {
    "a branch for every row": f(1, "timestamp") + f(1, "ticker"),
    "a computed branch for every row": computed('"open" * 2') + f(1, "e") + f(1, "ticker"),
    "a bucket for every row": computed("bucket(\"timestamp\", '1s')") + f(1, "e") + f(1, "date"),
    "a column for every row": f(1, "ticker") + f(2, "timestamp"),
    "a column for every hour, no groups": computed('hour_of_day("timestamp")') + f(2, "e"),
    "a group that is none": f(1, 5) + f(2, "date"),
    "four groups": b"".join(f(1, name) for name in ("ticker", "client", "ticker", "client")),
    "many columns": shown(*["open"] * 51),
    "columns in two parts": shown(*["open"] * 30) * 2,
    "many sorts": f(5, f(1, "open") + f(2, 1)) * 6,
    "many filters": filtered("open", ">", f(4, 1.0)) * 11,
    "many values": filtered("ticker", "in", *[f(6, "a")] * 501),
    "many expressions": b"".join(computed("1", str(i)) for i in range(21)),
    "an empty value": filtered("open", "==", b""),
    "a value of no kind": filtered("open", "==", f(9, 1)),
    "a value of the wrong kind": filtered("open", "==", f(4, 1)),
    "a column that is not there": shown("nope"),
    "an expression with a name of the engine": shown("psp_okey") + computed("1", "psp_okey"),
    "an aggregate behind another": f(7, f(1, "ticker") + f(2, f(9, "sum") + f(1, "avg"))),
    "an aggregate of an own kind": aggregated("open", "udf combiner"),
    "a window": f(11, f(1, "w") + f(2, f(2, "open") + f(3, "sum"))),
    "an average of a day": computed('"date"') + aggregated("e", "avg"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_no_view_may_be(config):
    with pytest.raises((perspective_server.Refused, ValueError, TypeError, AttributeError)):
        perspective_server.judge_config(TABLE, config)


# --- Noise ----------------------------------------------------------------------------------------


def recorded():
    """The messages of an ordinary session, as the client sends them."""
    server, sent = perspective.Server(), []

    def send(message):
        sent.append(bytes(message))
        session.handle_request(message)

    client = perspective.Client(send)
    session = server.new_session(client.handle_response)
    server.new_local_client().table(ticks(10), name=TABLE)
    table = client.open_table(TABLE)
    table.schema(), table.size(), table.columns(), table.validate_expressions({"e": '"open" + 1'})
    view = table.view(
        columns=["open", "volume"],
        group_by=["ticker"],
        split_by=["client"],
        filter=[["volume", ">", 1], ["ticker", "in", ["AAPL.N", "TLT.N"]]],
        sort=[["open", "desc"]],
        aggregates={"open": "avg", "volume": ["weighted mean", ["open"]]},
        expressions={"e": '"high" - "low"'},
    )
    view.on_delete(print), view.on_update(print, mode="row"), view.schema(), view.get_config()
    view.to_arrow(), view.to_csv(), view.to_json(start_row=1, end_row=9), view.to_columns()
    view.column_paths(start_col=0, end_col=2), view.expand(0), view.collapse(0)
    view.get_min_max("open"), view.dimensions(), view.expression_schema()
    session.close()
    return sent


def test_noise_is_answered_and_forgotten(ours):
    """12,000 messages: random bytes, and an ordinary session's messages cut and mutated."""
    noise, samples = random.Random(5), recorded()
    with Raw(ours.url) as raw:

        async def storm():
            for message in samples:
                await raw.socket.write_message(message, binary=True)
            for i in range(12_000):
                message = bytearray(noise.choice(samples))
                if i % 4 == 0:
                    message = noise.randbytes(noise.choice([0, 1, 2, 5, 20, 300]))
                elif i % 4 == 1:
                    del message[noise.randrange(len(message)) :]
                elif i % 4 == 2:
                    for _ in range(noise.randint(1, 4)):
                        message[noise.randrange(len(message))] = noise.randrange(256)
                else:
                    at = noise.randrange(len(message))
                    message[at:at] = noise.choice(samples)[: noise.randrange(40)]
                await raw.socket.write_message(bytes(message), binary=True)

        raw.run(storm(), 60)
        raw.send("a text\u2026 " * 100, binary=False)
        wait_until(raw.works, 30)
    assert ours.process.poll() is None


# --- Too much -------------------------------------------------------------------------------------


def test_a_large_message_ends_its_own_connection_only(ours):
    with Raw(ours.url) as raw, Raw(ours.url) as other:
        with contextlib.suppress(Exception):
            raw.send(ask(8, bytes(1 << 20 | 1)))
        assert raw.closed.wait(5)
        assert other.works()


def test_a_hundred_megabytes_are_not_waited_for(ours):
    with handshake(ours.port) as sock:
        sock.sendall(b"\x82\xff" + struct.pack(">Q", 100 << 20) + b"mask" + bytes(1000))
        assert ended(sock)


def handshake(port, *headers):
    """A websocket as a plain socket."""
    sock = socket.create_connection(("127.0.0.1", port), 5)
    request = [
        *("GET /websocket HTTP/1.1", f"Host: localhost:{port}", "Upgrade: websocket"),
        *("Connection: Upgrade", "Sec-WebSocket-Version: 13"),
        *("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers),
    ]
    sock.sendall("\r\n".join([*request, "", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += sock.recv(4096)
    assert b" 101 " in answer.split(b"\r\n")[0]
    return sock


def frame(message):
    size = (
        bytes([0x80 | len(message)])
        if len(message) < 126
        else b"\xfe" + struct.pack(">H", len(message))
    )
    return b"\x82" + size + bytes(4) + message


def ended(sock):
    """Whether the server closes a connection."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 20):
            pass
    return True


def test_thousands_of_views(ours):
    with Raw(ours.url) as raw:
        made = sum(6 in raw.ask(make(shown("open"), f"v{i}", i + 1)) for i in range(200))
        assert made == perspective_server.MAX_VIEWS
        assert "no more than" in raw.refused(make(b"", "one more"))
        assert 11 in raw.ask(ask(11, b"", "v0"))
        assert 6 in raw.ask(make(b"", "one more"))
        raw.send(*(make(b"", f"w{i}") for i in range(3000)))
        assert raw.works()


def test_views_that_failed_do_not_count(ours):
    with Raw(ours.url) as raw:
        for i in range(2 * perspective_server.MAX_VIEWS):
            assert raw.refused(ask(6, f(1, f"v{i}"), "no such table"))
        assert 6 in raw.ask(make(b""))


def test_thousands_of_subscriptions_and_ports(ours):
    limit = perspective_server.MAX_SUBSCRIPTIONS
    with Raw(ours.url) as raw:
        assert 6 in raw.ask(make(b""))
        raw.send(*(ask(21, b"", "v", i + 1) for i in range(limit)))
        assert "subscriptions" in raw.refused(ask(21, b"", "v", 1 << 20))
        raw.send(*(ask(5, b"", TABLE, 1 << 21 | i) for i in range(3000)))
        assert dict(fields(raw.ask(ask(5))[5])) == {1: 1}
        assert raw.works()


def test_expressions_of_all_views_together(ours):
    text = '"open" + 1' * 30
    with Raw(ours.url) as raw:
        assert 6 in raw.ask(make(computed(text.replace('1"', '1 + "')), "a"))
        assert 6 in raw.ask(make(computed(text.replace('1"', '1 + "')), "b"))
        assert "longer than" in raw.refused(make(computed(text.replace('1"', '1 + "')), "c"))
        assert 11 in raw.ask(ask(11, b"", "a"))
        assert 6 in raw.ask(make(computed(text.replace('1"', '1 + "')), "c"))


def test_an_answer_too_large_for_memory(monkeypatch):
    answers = []
    monkeypatch.setattr(perspective_server, "MAX_CELLS", 1000)
    server = perspective.Server()
    server.new_local_client().table(ticks(500), name=TABLE)
    session = perspective_server.LiveSession(perspective_server.Views(server), answers.append)
    session.handle_request(make(shown("open", "close", "high")))
    for number in (16, 24, 25, 26, 36):
        for asked, fits in [
            ((), False),
            ((None, None, 300), True),
            ((None, None, 400), False),
            ((200,), True),
            ((None, None, 500, 2), True),
            ((None, None, 2**31 - 1, 2**31 - 1), False),
            ((None, 1), True),
        ]:
            answers.clear()
            session.handle_request(ask(number, f(1, window(*asked)), "v"))
            assert (number in dict(fields(answers[0]))) == fits, (number, asked)
    session.close()


# --- The dashboard and its people -----------------------------------------------------------------


def test_a_viewer_can_do_what_viewers_do(ours, market):
    updates = []

    async def session(viewer):
        table = await viewer.client.open_table(TABLE)
        assert await table.size() >= 5000
        assert set(await table.columns()) == set(COLUMNS)
        good = await table.validate_expressions({"e": '"high" - "low"'})
        assert good["expression_schema"] == {"e": "float"} and not good["errors"]
        for text in ('"high" - ', '"nothing" - 1', "while (1) {1}"):
            assert "e" in (await table.validate_expressions({"e": text}))["errors"]
        view = await table.view(
            columns=["spread", "volume"],
            group_by=["ticker"],
            split_by=["client"],
            filter=[["volume", ">", 100], ["ticker", "!=", "YY.N"]],
            sort=[["volume", "desc"]],
            aggregates={"spread": "max", "volume": "sum"},
            expressions={"spread": '"high" - "low"'},
        )
        await view.on_update(lambda *_: updates.append(time.monotonic()))
        assert (await view.schema())["volume"] == "integer"
        assert await view.num_rows() == 13  # the total and twelve tickers
        assert await view.expression_schema() == {"spread": "float"}
        assert (await view.get_config())["group_by"] == ["ticker"]
        assert (await view.to_csv()).startswith('"ticker')
        assert pyarrow.ipc.open_stream(await view.to_arrow()).read_all().num_rows == 13
        assert len(await view.to_json()) == 13
        assert len((await view.to_columns(end_row=5))["__ROW_PATH__"]) == 5
        assert (await view.to_ndjson()).count("\n") >= 12
        await view.collapse(0)
        await view.expand(0)
        flat = await table.view(columns=["open", "close"], sort=[["open", "asc"]])
        low, high = await flat.get_min_max("open")
        assert low < high
        assert await flat.column_paths({"start_col": 1, "end_col": 2}) == [["close"]]
        callback = await flat.on_delete(lambda: updates.append("deleted"))
        await flat.remove_delete(callback)
        await flat.delete()
        return view

    with Viewer(ours.url) as viewer:
        view = viewer.run(session(viewer))
        rows = ours.health()["rows"]
        assert Script("producer.py", "--dsn", market.dsn, "--batches", 2).wait() == 0
        ours.wait_for_rows(rows + 500)
        wait_until(lambda: updates, 5, "an update")
        viewer.run(view.delete())


def test_the_places_of_the_rings_are_nobodys_business(ours):
    async def session(viewer):
        assert set(await viewer.client.get_hosted_table_names()) == TABLES
        for name in (TABLE, f"{TABLE}_newest"):
            table = await viewer.client.open_table(name)
            assert table.get_index() is None
            assert await table.columns() == list(COLUMNS)
            assert set(await table.schema()) == set(COLUMNS)
            view = await table.view()
            assert set(await view.schema()) == set(COLUMNS)
            assert set(await view.to_columns(end_row=1)) == set(COLUMNS)
            assert (await view.get_config())["columns"] == list(COLUMNS)

    with Viewer(ours.url) as viewer:
        viewer.run(session(viewer))
    with Raw(ours.url) as raw:
        for place in perspective_server.PLACES.values():
            for config in (shown(place), f(1, place), f(2, place), f(5, f(1, place) + f(2, 1))):
                assert "no column" in raw.refused(make(config))
            assert "no column" in raw.refused(make(filtered(place, "is null", f(1, 1))))
            assert 50 in raw.ask(make(computed(f'"{place}" + 1')))


@pytest.mark.parametrize("name", [TABLE, f"{TABLE}_newest"])
def test_first_and_last_go_by_the_timestamp(database, start, name):
    """Also in a ring that has turned, and for rows that came late."""
    assert Script("producer.py", "--dsn", database.dsn, "--batches", 1).wait() == 0
    server = start(Server, "--dsn", database.dsn, "--limit", 1500, "--interval", 0.05)
    server.wait_for_rows(250)
    values = "'AAPL.N', 'Homer', {0}, {0}, {0}, {0}, 1, today()"
    for late in (0, 3000, 1000, 2000):
        database.command(
            "INSERT INTO stock_values SELECT now64(3) + toIntervalMillisecond(number - "
            f"{late}), {values.format('toFloat32(number + ' + str(late) + ')')} FROM numbers(400)"
        )
        server.wait_for_delivered(server.health()["delivered"])
    server.wait_for_delivered(1850)
    rows = 1500 if name == TABLE else 1000
    arrival = "(timestamp, _block_number, _block_offset)"
    newest = "ORDER BY _block_number DESC, _block_offset DESC LIMIT"
    with contextlib.closing(database.connect()) as client:
        expected = client.query(f"""
            SELECT ticker, argMin(open, {arrival}), argMax(close, {arrival}) FROM
                (SELECT *, _block_number, _block_offset FROM {database.name}.stock_values
                 {newest} {rows})
            WHERE ticker = 'AAPL.N' GROUP BY ticker""").result_rows

    async def session(viewer):
        view = await (await viewer.client.open_table(name)).view(
            group_by=["ticker"],
            group_rollup_mode="flat",
            filter=[["ticker", "==", "AAPL.N"]],
            columns=["open", "close"],
            aggregates={"open": "first", "close": "last"},
        )
        return await view.to_columns()

    with Viewer(server.url) as viewer:
        columns = viewer.run(session(viewer))
        assert [("AAPL.N", *columns["open"], *columns["close"])] == expected
    with Raw(server.url) as raw:
        for how in ("last by index", "last minus first"):
            wrong = make(f(1, "ticker") + shown("open") + aggregated("open", how))
            assert "max by timestamp" in raw.refused(wrong)


@pytest.mark.parametrize(
    "text",
    [
        *('"high" - "low"', '("close" - "open") / "open" * 100', 'log("close" / "open")', "-1"),
        *("bucket(\"timestamp\", '1s')", "bucket(\"timestamp\", '5m')", "bucket(\"date\", 'W')"),
        *('datetime(bucket(float("timestamp"), 2000))', 'bucket("open", 0.5)', '"open" > -1'),
        *('if ("close" > "open") 1; else -1;', "if (\"ticker\" == 'AAPL.N') {1} else {2}"),
        *('concat("ticker", \' \', "client")', 'upper("ticker")', 'day_of_week("timestamp")'),
    ],
)
def test_ordinary_expressions_are_computed(ours, text):
    with Raw(ours.url) as raw:
        assert 6 in raw.ask(make(shown("e") + computed(text)))
        answer = raw.ask(ask(24, f(1, window(0, 0, 5, 1)), "v"))
        [values] = json.loads(dict(fields(answer[24]))[1]).values()
        assert len(values) == 5 and None not in values


def test_expressions_are_read_one_at_a_time(database, start):
    """Two threads at a time in the engine's parser would end the process."""
    server = start(Server, "--dsn", database.dsn, "--interval", 0.02)
    start(Script, "producer.py", "--dsn", database.dsn, "--interval", 0.02)
    server.wait_for_delivered(1000)

    def write_expressions(number):
        with Raw(server.url) as raw:
            for i in range(40):
                text = f'log("close" / "open") + {number * 1000 + i}'
                if number % 2:
                    answer = raw.ask(ask(41, f(1, shown("e") + computed(text))))
                    assert b"rror" not in answer[41], answer
                else:
                    assert 6 in raw.ask(make(shown("e") + computed(text), f"v{i}"))
                    assert 11 in raw.ask(ask(11, b"", f"v{i}"))

    with ThreadPoolExecutor(8) as many:
        list(many.map(write_expressions, range(8)))
    assert server.process.poll() is None, server.output


class Watcher(Viewer):
    """An ordinary viewer that notes when updates come."""

    def __init__(self, url):
        super().__init__(url)
        self.came = []

        async def watch():
            table = await self.client.open_table(TABLE)
            self.view = await table.view(group_by=["ticker"], columns=["close", "volume"])
            await self.view.on_update(lambda *_: self.came.append(time.monotonic()))

        self.run(watch())

    def worst_gap(self, since):
        times = [since, *(t for t in self.came if t > since), time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))


def never_reads(port):
    sock = handshake(port)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(frame(make(b"", f"deaf{sock.fileno()}")) + frame(ask(21, b"", "v")))
    with contextlib.suppress(OSError):
        sock.settimeout(1)
        for _ in range(300):
            sock.sendall(frame(ask(25, b"", f"deaf{sock.fileno()}")))
    return sock


def floods(port):
    sock = handshake(port)
    sock.settimeout(0.5)
    name = f"flood{sock.fileno()}"
    sock.sendall(frame(make(f(1, "timestamp"), name)))
    with contextlib.suppress(OSError):
        for _ in range(20_000):
            sock.sendall(frame(ask(26, b"", name)))
    return sock


def leaves_in_mid_message(port):
    for _ in range(50):
        sock = handshake(port)
        sock.sendall(frame(make(f(1, "client")))[:-3])
        sock.close()
    return None


def comes_and_leaves(port):
    with ThreadPoolExecutor(20) as many:
        for sock in many.map(lambda _: handshake(port), range(200)):
            sock.sendall(frame(make(f(1, "client"), os.urandom(8).hex())))
            sock.close()
    return None


def memory(process):
    with open(f"/proc/{process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_nobody_disturbs_the_others(database, start):
    server = start(Server, "--dsn", database.dsn, "--limit", 20_000)
    start(Script, "producer.py", "--dsn", database.dsn)
    server.wait_for_delivered(2000)
    watcher = start(Watcher, server.url)
    comes_and_leaves(server.port)  # what a thread or an arena takes once does not count
    time.sleep(1)
    before = memory(server.process)
    for nuisance in (
        never_reads,
        never_reads,
        floods,
        floods,
        leaves_in_mid_message,
        comes_and_leaves,
    ):
        since = time.monotonic()
        sock = nuisance(server.port)
        time.sleep(1.5)
        assert watcher.worst_gap(since) < 2, nuisance
        if sock:
            sock.close()
    wait_until(lambda: server.health()["viewers"] == 1, 20, "the others gone")
    wait_until(lambda: memory(server.process) < before + 50, 20, "their memory back")
    assert "Traceback" not in server.output


# --- In this process, with other limits -----------------------------------------------------------


@contextlib.contextmanager
def in_process(rows=100):
    """The handlers on an event loop in a thread; yields (hub, port)."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    server = perspective.Server()
    server.new_local_client().table(ticks(rows), name=TABLE)
    archive = SimpleNamespace(executor=ThreadPoolExecutor(1), leave=lambda _: None)
    tail = SimpleNamespace(health=lambda: {"clickhouse": "up"})
    hub = perspective_server.Hub(tail, archive, server, "127.0.0.1", ["null"])
    port = free_port()

    async def listen():
        http = HTTPServer(perspective_server.make_app(hub))
        http.add_sockets(bind_sockets(port, "127.0.0.1"))
        ready.set()
        return http

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    http = asyncio.run_coroutine_threadsafe(listen(), loop).result(5)
    try:
        yield hub, port
        wait_until(lambda: not hub.viewers and not hub.views.users, 10, "all views released")
    finally:
        asyncio.run_coroutine_threadsafe(http.close_all_connections(), loop).result(5)
        loop.call_soon_threadsafe(http.stop)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


GROUPED = f(1, "client") + f(10, 1)  # flat, so there is nothing to fold


def numbers(raw, view, number=24, body=b""):
    """A view's data as Perspective's columns."""
    return json.loads(dict(fields(raw.ask(ask(number, f(1, body), view))[number]))[1])


def test_who_asks_for_the_same_shares_a_view():
    with in_process() as (hub, port):
        url = f"http://localhost:{port}"
        table = hub.perspective_server.new_local_client().open_table(TABLE)
        with Raw(url) as one, Raw(url) as two:
            asked = GROUPED + shown("a", "b")
            texts = computed('"open"', "a"), computed('"close"', "b")
            assert 6 in one.ask(make(asked + texts[0] + texts[1], "v"))
            assert 6 in two.ask(make(asked + texts[1] + texts[0], "w"))  # a map has no order
            assert len(hub.views.names) == 1
            assert numbers(one, "v") == numbers(two, "w")
            one.send(ask(21, b"", "v", message_id=51))
            two.send(ask(21, b"", "w", message_id=52))
            two.send(ask(34, b"", "w", message_id=53))
            assert 12 in one.ask(ask(12, b"", "v")) and 12 in two.ask(ask(12, b"", "w"))
            table.update(ticks(10))
            assert 21 in one.answer(51) and 21 in two.answer(52)
            assert 11 in two.ask(ask(11, b"", "w"))
            assert 34 in two.answer(53)  # its own has been deleted
            assert len(hub.views.names) == 1
            before = numbers(one, "v")
            table.update(ticks(10))
            assert 21 in one.answer(51)
            assert numbers(one, "v") != before
            assert two.works()
            assert two.heard(52) == 0  # who has deleted a view hears no more of it
            assert 6 in two.ask(make(f(1, "client"), "w"))
            assert len(hub.views.names) == 2
        wait_until(lambda: not hub.views.names)


def test_a_subscription_ends_with_its_hold_also_in_the_engine(monkeypatch):
    """Closing a session would leave it there for as long as others hold the view."""
    server, came = perspective.Server(), []
    table = server.new_local_client().table(ticks(10), name=TABLE)
    views = perspective_server.Views(server)
    one, two = (perspective_server.Hold(views, came.append, TABLE.encode(), b"") for _ in "ab")
    monkeypatch.setattr(two, "hear", came.append)
    two.session.close()
    two.session = server.new_session(came.append)
    two.handle_request(5, 21, b"")
    table.update(ticks(10))
    assert [dict(fields(answer))[1] for answer in came] == [5]
    open_session = two.session
    two.session = SimpleNamespace(handle_request=two.session.handle_request, close=lambda: None)
    two.close()
    came.clear()
    table.update(ticks(10))
    assert came == []
    open_session.close()
    one.close()
    assert not views.names


def test_what_somebody_folds_is_folded_for_that_one_alone():
    with in_process() as (hub, port):
        url = f"http://localhost:{port}"
        with Raw(url) as one, Raw(url) as two:
            for raw in (one, two):
                assert 6 in raw.ask(make(f(1, "client") + f(1, "ticker")))
            whole = numbers(one, "v")
            assert 18 in one.ask(ask(18, f(1, 0), "v"))
            assert len(numbers(one, "v")["open"]) == 1
            assert numbers(two, "v") == whole
            assert len(hub.views.names) == 2


def test_the_number_of_different_views_is_limited(monkeypatch):
    monkeypatch.setattr(perspective_server, "MAX_DIFFERENT", 2)
    with in_process() as (hub, port):
        url = f"http://localhost:{port}"
        with Raw(url) as one, Raw(url) as two:
            assert 6 in one.ask(make(b"", "a"))
            assert 6 in one.ask(make(GROUPED, "b"))
            assert "no more than 2 different views" in two.refused(make(shown("open"), "c"))
            assert two.refused(ask(12, b"", "c")) == "View not found"
            assert 6 in two.ask(make(GROUPED, "c"))  # is there
            assert 11 in one.ask(ask(11, b"", "a"))
            assert 6 in two.ask(make(shown("open"), "d"))


def test_the_number_of_viewers_is_limited(monkeypatch):
    monkeypatch.setattr(perspective_server, "MAX_VIEWERS", 3)
    with in_process() as (hub, port), contextlib.ExitStack() as all_of_them:
        url = f"http://localhost:{port}"
        first = Raw(url)
        for _ in range(2):
            all_of_them.enter_context(Raw(url))
        with pytest.raises(HTTPClientError, match="503"):
            Raw(url)
        first.close()
        wait_until(lambda: len(hub.viewers) == 2)
        all_of_them.enter_context(Raw(url))


def test_who_answers_no_ping_is_gone(monkeypatch):
    monkeypatch.setattr(perspective_server, "PING_SECONDS", 0.3)
    with in_process() as (hub, port), Raw(f"http://localhost:{port}") as alive:
        dead = handshake(port)
        dead.sendall(frame(make(b"", "left behind")))
        wait_until(lambda: len(hub.viewers) == 2 and hub.views.users)
        wait_until(lambda: len(hub.viewers) == 1 and not hub.views.users, 10)
        time.sleep(0.5)
        assert alive.works()
        dead.close()


def test_who_leaves_leaves_nothing(monkeypatch):
    with in_process() as (hub, port):
        for i in range(20):
            with Raw(f"http://localhost:{port}") as raw:
                assert 6 in raw.ask(make(b"", f"v{i}"))
                [name] = hub.views.names.values()
        wait_until(lambda: not hub.views.users)
        sent = []
        session = hub.perspective_server.new_session(lambda answer: sent.append(answer))
        session.handle_request(ask(12, b"", name))
        assert 50 in dict(fields(sent[-1]))  # who was the last takes the view along
        session.close()


# --- Strangers ------------------------------------------------------------------------------------


def connects(server, **headers):
    try:
        Raw(server.url, headers=headers).close()
    except HTTPClientError as error:
        return error.code
    return 101


def test_pages_of_strangers_do_not_connect(ours, stock):
    for origin in ("http://evil.example", f"http://localhost:{ours.port + 1}", "http://localhost"):
        assert connects(stock, Origin=origin) == 101
        assert connects(ours, Origin=origin) == 403
        for path in ("/healthz", "/perspective/perspective-anywidget.css"):
            status, headers, _ = ours.get(path, {"Origin": origin})
            assert status == 200 and "Access-Control-Allow-Origin" not in headers
    for origin in (ours.url, "null"):
        assert connects(ours, Origin=origin) == 101
        for path in ("/healthz", "/perspective/perspective-anywidget.css"):
            assert ours.get(path, {"Origin": origin})[1]["Access-Control-Allow-Origin"] == origin
    assert connects(ours) == 101  # no browser, so there is no page to fear


def test_names_of_strangers_get_nothing(ours, stock):
    for host in (
        "evil.example",
        f"evil.example:{ours.port}",
        "localhost.evil.example",
        "1.2.3.4",
    ):
        assert connects(stock, Host=host, Origin=f"http://{host}") == 101
        assert connects(ours, Host=host, Origin=f"http://{host}") == 403, host
        for path in ("/", "/healthz", "/perspective/perspective-anywidget.js", "/nothing"):
            status, _, body = ours.get(path, {"Host": host})
            assert status == 404 and len(body) < 100, (host, path)
    for host in ("127.0.0.1", "LOCALHOST", f"[::1]:{ours.port}", f"localhost:{ours.port}"):
        assert ours.get("/healthz", {"Host": host})[0] == 200, host


@pytest.mark.parametrize(
    "allowed, comes, stays_out",
    [
        ([""], [], ["null", "http://evil.example"]),
        (["https://a.example"], ["https://a.example"], ["null", "http://a.example"]),
        (
            ["https://a.example", "http://b.example:81", "null"],
            ["https://a.example", "http://b.example:81", "null"],
            ["https://b.example:81"],
        ),
    ],
)
def test_allowed_origins_replace_the_list(market, start, allowed, comes, stays_out):
    server = start(Server, "--dsn", market.dsn, "--allow-origin", *allowed)
    for origin in (*comes, server.url):
        assert connects(server, Origin=origin) == 101, origin
    for origin in stays_out:
        assert connects(server, Origin=origin) == 403, origin


def test_listening_to_everybody_is_said(market, start):
    server = start(Server, "--dsn", market.dsn, "--address", "0.0.0.0")
    [line] = [line for line in server.lines if "0.0.0.0" in line]
    assert "everybody who reaches this port can read the table" in line
    assert server.get("/healthz", {"Host": "192.0.2.7:8080"})[0] in (200, 503)  # no name: no harm
    assert server.get("/healthz", {"Host": "evil.example"})[0] == 404


# --- Files and HTTP -------------------------------------------------------------------------------


def raw_http(port, request):
    with socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while chunk := sock.recv(65536):
                answer += chunk
    return answer


def status_of(port, line, *headers):
    request = "\r\n".join([line, f"Host: localhost:{port}", "Connection: close", *headers, "", ""])
    answer = raw_http(port, request.encode())
    return int(answer.split()[1]), answer


@pytest.mark.parametrize(
    "path",
    [
        "/perspective/../../../../perspective_server.py",
        "/perspective/%2e%2e/%2e%2e/__init__.py",
        "/perspective/..%2f..%2f__init__.py",
        "/perspective/....//....//__init__.py",
        "/perspective/..\\..\\__init__.py",
        "/perspective//etc/passwd",
        "/perspective/perspective-anywidget.js/../../../__init__.py",
        "/perspective/perspective-anywidget.js%00.py",
        "/perspective/",
        "/perspective",
        "/static/perspective-anywidget.js",
        "/producer.py",
        "/perspective_server.py",
        "/.git/config",
        "/tests/",
        "//localhost/healthz",
    ],
)
def test_only_three_files_are_served(ours, path):
    status, answer = status_of(ours.port, f"GET {path} HTTP/1.1")
    assert status == 404
    for secret in (b"import ", b"root:", b"[core]", b"Index of"):
        assert secret not in answer


def test_files_say_what_they_are(ours):
    for path, kind in {
        "/": "text/html",
        "/prsp-viewer.html": "text/html",
        "/perspective/perspective-anywidget.js": "text/javascript",
        "/perspective/perspective-anywidget.css": "text/css",
        "/healthz": "application/json",
        "/nothing": "text/plain",
    }.items():
        _, headers, body = ours.get(path)
        assert headers["Content-Type"].startswith(kind), path
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Origin" in headers["Vary"]
        assert body
    policy = ours.get("/")[1]["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    for part in ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert part in policy
    scripts = re.search("script-src ([^;]*)", policy)[1]
    assert "'unsafe-inline'" not in scripts and "*" not in policy and "http" not in policy


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "EVIL"])
def test_other_methods_do_nothing(ours, method):
    for path in ("/", "/healthz", "/perspective/perspective-anywidget.css", "/websocket", "/x"):
        status, _ = status_of(ours.port, f"{method} {path} HTTP/1.1", "Content-Length: 0")
        assert status in (404, 405), path


def test_garbage_instead_of_http(ours):
    lines = len(ours.lines)
    assert status_of(ours.port, "GET /websocket HTTP/1.1")[0] == 400
    assert status_of(ours.port, "GET /healthz HTTP/1.1", "Host: [")[0] in (400, 404)
    assert b" 200 " not in raw_http(ours.port, b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 100_000)
    assert status_of(ours.port, "POST /healthz HTTP/1.1", "Content-Length: 99999999")[0] >= 400
    for garbage in (b"\x16\x03\x01" + bytes(500), b"GET\r\n\r\n", b"\0" * 100 + b"\r\n\r\n"):
        assert b" 200 " not in raw_http(ours.port, garbage)
    assert ours.get("/healthz")[0] == 200
    assert "Traceback" not in "\n".join(ours.lines[lines:])


# --- Secrets and rights ---------------------------------------------------------------------------

PASSWORD = "t0p-s3cret"


def test_the_password_is_nowhere(clickhouse, start):
    dsns = [
        clickhouse.dsn_of("test", password=PASSWORD),
        clickhouse.dsn_of("test", password=PASSWORD, port=free_port()),
        f"clickhouse://admin:{PASSWORD}@no.such.host.invalid:8123/test",
    ]
    servers = [start(Server, "--dsn", dsn) for dsn in dsns]
    servers += [start(Server, env={"CLICKHOUSE_DSN": dsns[0]})]
    producers = [start(Script, "producer.py", "--dsn", dsn) for dsn in dsns]
    for server in servers:
        server.wait_for("away")
        assert PASSWORD not in str([server.get(path) for path in ("/healthz", "/", "/nothing")])
    wait_until(lambda: all(len(script.lines) > 1 for script in producers), 10)
    for script in (*servers, *producers):
        script.stop()
        assert script.lines and PASSWORD not in script.output
    for name, wrong in itertools.product(
        ("producer.py", "perspective_server.py"),
        (
            f"http://admin:{PASSWORD}@localhost/test",
            f"clickhouse://admin:{PASSWORD}@localhost:99999/test",
            f"clickhouse://admin:{PASSWORD}@/test",
            f"clickhouse://admin:{PASSWORD}@[/test",
        ),
    ):
        script = start(Script, name, "--dsn", wrong)
        assert script.wait() == 2
        assert len(script.lines) == 1 and PASSWORD not in script.output


def test_the_scripts_print_no_password():
    """The demo's password is public, and stands where it is set, but nowhere in what is printed."""
    for name in ("producer.py", "perspective_server.py", "docker.sh"):
        for line in (ROOT / name).read_text().splitlines():
            if re.match(r"\s*(print|say|log\.\w+|echo|printf|complain)\b", line):
                line = re.sub(r"where\(.*?\)|export CLICKHOUSE_DSN=", "", line)
                assert not re.search(r"admin1234|\$\{?\w*password|[^(]dsn\b", line, re.IGNORECASE)
    shown = Script("producer.py", "--help")
    assert shown.wait() == 0 and "admin1234" not in shown.output


READER = [
    f"SELECT ON test.{TABLE}",
    *(f"SELECT ON system.{name}" for name in ("tables", "columns", "parts", "mutations")),
]
WRITER = [f"INSERT ON test.{TABLE}", "SELECT ON system.tables", "SELECT ON system.columns"]


def test_few_rights_are_enough(tmp_path, start):
    users = {
        "reader": {"password": "r", "grants": READER},
        "readonly": {"password": "o", "grants": READER, "settings": {"readonly": 2}},
        "writer": {"password": "w", "grants": WRITER},
    }
    with ClickHouseProcess(tmp_path / "clickhouse", users=users) as process:
        everything = Script("producer.py", "--dsn", process.dsn, "--batches", 1)
        assert everything.wait() == 0
        servers = [
            start(Server, "--dsn", process.dsn_of("test", user=user))
            for user in ("reader", "readonly")
        ]
        for server in servers:
            server.wait_for_rows(250)
        writer = Script(
            "producer.py", "--dsn", process.dsn_of("test", user="writer"), "--batches", 4
        )
        assert writer.wait() == 0, writer.output
        for server in servers:
            server.wait_for_rows(1250)
            with Viewer(server.url) as viewer, contextlib.closing(connect(process)) as client:
                everything = f"SELECT {', '.join(COLUMNS)} FROM test.{TABLE}"
                assert viewer.rows() == counted(client.query_arrow(everything))
        for user, may_not in (("reader", "INSERT"), ("readonly", "INSERT"), ("writer", "SELECT")):
            script = Script(
                "producer.py", "--dsn", process.dsn_of("test", user=user), "--batches", 1
            )
            assert (script.wait() == 1) == (may_not == "INSERT"), script.output
        for server in servers:
            server.stop()


def connect(process):
    import clickhouse_connect

    return clickhouse_connect.get_client(dsn=process.dsn_of(), compress=False)
