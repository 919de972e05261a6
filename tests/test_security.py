"""A viewer can mirror tables and nothing else, and pages of other origins cannot connect at all.

The attacks go over real websockets, through Perspective's own client and as raw bytes. Meanwhile a
producer inserts ticks and a viewer that stays follows them: after each test (see `ours`) it holds
exactly what ClickHouse has, and each row has come once, in a delta.
"""

import contextlib
import gzip
import http.client
import os
import random
import re
import socket
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import perspective
import pytest
from conftest import (
    STATUS,
    Connection,
    Database,
    Script,
    Server,
    changed_server,
    follow,
    free_port,
    patched_server,
    wait_until,
)
from tornado.websocket import WebSocketClosedError

TABLE = "stock_values"
# Requests of Perspective's protocol (perspective.proto), the tag of its error, and ids of messages.
FEATURES, HOSTED_TABLES, MAKE_VIEW, SCHEMA, SIZE, DELETE_VIEW, TO_ARROW = 3, 4, 6, 7, 8, 11, 16
ON_UPDATE, REPLACE, UPDATE, ON_REMOVE = 21, 32, 33, 39
ERROR, MARKER_ID, UPDATES_ID = b"\x92\x03", 98, 99

# --- Raw messages and sockets ---------------------------------------------------------------------


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def field(number, value=b""):
    """A protobuf field: an int, a text, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def ask(number, body=b"", entity=TABLE, message_id=1):
    return field(1, message_id) + field(2, entity) + field(number, body)


def make_view(name, more=b"", table=TABLE):
    return ask(MAKE_VIEW, field(1, name) + more, table)


class Raw(Connection):
    """A websocket on which a test sends what it likes."""

    async def _connect(self):
        await super()._connect()
        self.answers, self.client = [], self

    async def handle_response(self, answer):
        self.answers.append(answer)

    def send(self, *messages):
        """Send without waiting for answers; a str goes as a text message."""

        async def write():
            for message in messages:
                await self.socket.write_message(message, isinstance(message, bytes))

        self.run(write())

    def wait_for(self, message_id):
        head = field(1, message_id)
        wait_until(lambda: any(a.startswith(head) for a in self.answers), "an answer")

    def answers_to(self, *messages):
        """Send, and return the answers, but no updates. The connection must go on."""
        self.answers.clear()
        self.send(*messages, ask(FEATURES, message_id=MARKER_ID))
        self.wait_for(MARKER_ID)
        others = field(1, MARKER_ID), field(1, UPDATES_ID)
        return [answer for answer in self.answers if not answer.startswith(others)]

    def assert_accepted(self, *messages):
        for message, answer in zip(messages, self.answers_to(*messages), strict=True):
            assert ERROR not in answer[:50], (message, answer)

    def assert_refused(self, *messages):
        """Each message gets one answer, Perspective's own error."""
        for message, answer in zip(messages, self.answers_to(*messages), strict=True):
            assert ERROR in answer and b"refused" in answer, (message, answer)

    def subscribe(self, view):
        self.send(ask(ON_UPDATE, field(1, 0), view, UPDATES_ID))

    def assert_updates_go_on(self):
        self.answers.clear()
        self.wait_for(UPDATES_ID)


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
UPGRADE["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="


def send_http(server, path, method="GET", body=None, **headers):
    """Send a request; returns the status and the open socket."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    host = {"Host": f"localhost:{server.port}"}
    connection.request(method, path, body, host | headers, encode_chunked=True)
    return connection.getresponse().status, connection.sock


def status(*arguments, **options):
    return send_http(*arguments, **options)[0]


def websocket(server):
    """A websocket as a plain socket, for viewers that do not behave."""
    code, sock = send_http(server, "/websocket", **UPGRADE)
    assert code == 101
    return sock


def frame(message):
    return b"\x82" + bytes([128 | len(message)]) + bytes(4) + message


# --- A server, a producer, and a viewer that stays ------------------------------------------------


@pytest.fixture(scope="module")
def service(clickhouse, start_once):
    database = start_once(Database, clickhouse)
    database.create_table()
    options = ("--interval", 0.1, "--limit", 200_000)
    server, [mirror] = follow(start_once, database.dsn, *options)
    start_once(Script, "producer.py", "--dsn", database.dsn, "--interval", 0.1, "--rows", 10)
    yield SimpleNamespace(database=database, server=server, mirror=mirror, url=server.url)
    assert not re.search("Traceback|UTF-8", server.output)


@pytest.fixture
def ours(service):
    """The server, which must be unharmed after the test."""
    yield service
    rows, mirror = service.database.rows(), service.mirror
    wait_until(lambda: not rows - mirror.rows(), "the mirror has all rows")
    with mirror.lock:
        received = mirror.received.copy()
    assert not rows - received
    assert not (received | mirror.rows()) - service.database.rows()
    assert (mirror.snapshots, mirror.removals) == (1, 0)
    wait_until(lambda: service.server.health()["viewers"] == 1, "the attackers gone")


# --- What a viewer may send -----------------------------------------------------------------------

ATTEMPTS = """
table.update([{"slot": 0, "close": 0.5}]); table.remove([0]); table.clear(); table.delete()
table.replace([{"slot": 0, "close": 0.5}]); client.table({"a": [1]}, name="mine")
client.table({"a": [1]}, name="stock_values", index="a"); client.table(view, name="derived")
client.join(table, table, "ticker", name="joined")
table.view(columns=["ticker"]); table.view(group_by=["ticker"]); table.view(split_by=["ticker"])
table.view(filter=[["ticker", "==", "TLT.N"]]); table.view(sort=[["close", "desc"]])
table.view(expressions={"e": '"high" - "low"'}); table.view(aggregates={"close": "avg"})
table.view(group_by=["ticker"], split_by=["client"], aggregates={"close": "median"})
table.view(group_by=["ticker"], group_by_depth=0); view.collapse(0); view.expand(0)
view.to_csv(); view.to_json(); view.to_ndjson(); view.to_columns(); view.to_arrow(end_row=1)
view.get_min_max("close"); view.column_paths({}); view.num_rows(); view.schema()
view.expression_schema(); view.get_config(); table.describe(); client.system_info()
table.validate_expressions({"e": '"open" + 1'})
"""


def test_perspectives_client_may_mirror_and_do_nothing_else(ours):
    with Connection(ours.url) as viewer:
        tables = viewer.tables()
        assert {TABLE, STATUS} <= set(tables)
        table = viewer.table()
        view = viewer.run(table.view())

        async def attempt(text):
            return await eval(text, {"client": viewer.client, "table": table, "view": view})

        for text in re.split(r"[;\n]\s*", ATTEMPTS.strip()):
            with pytest.raises(perspective.PerspectiveError, match="refused"):
                pytest.fail(f"{text}: {viewer.run(attempt(text))}")
        assert viewer.tables() == tables
        assert viewer.run(view.to_arrow())
        viewer.run(view.delete())


def test_requests_that_are_not_on_the_list_are_refused(ours):
    right = dict.fromkeys((FEATURES, HOSTED_TABLES, SCHEMA, SIZE, ON_REMOVE), b"")
    right |= {TO_ARROW: field(1), ON_UPDATE: field(1, 0)}
    on_the_list = {*right, MAKE_VIEW, DELETE_VIEW}
    others = [n for n in (*range(65), 100, 18999, 1 << 28) if n not in on_the_list]
    bodies = [b"", field(1, 0), field(1, "x"), field(3, "ticker")]
    more = [field(1), field(1, 1), field(1, field(1, 5)), field(1, 0) + field(2), b"\x8a\0\0"]
    with Raw(ours.url) as raw:
        raw.assert_accepted(make_view("v"))
        raw.subscribe("v")
        for body in bodies:
            raw.assert_refused(*[ask(n, body, entity) for n in others for entity in (TABLE, "v")])
        for number, body in right.items():  # nothing more may be asked with these
            entity = TABLE if number in (FEATURES, HOSTED_TABLES, SCHEMA, SIZE) else "v"
            raw.assert_refused(*[ask(number, b, entity) for b in [*bodies, *more] if b != body])
            if number not in (ON_UPDATE, ON_REMOVE):
                raw.assert_accepted(ask(number, body, entity))
        raw.assert_updates_go_on()


def test_views_are_plain_and_belong_to_one_viewer(ours):
    with Raw(ours.url) as owner, Raw(ours.url) as other:
        owner.assert_accepted(make_view("mine"))
        owner.subscribe("mine")
        configurations = [b""] + [field(n, field(1, "ticker")) for n in range(1, 12)]
        other.assert_refused(
            *[make_view("v", field(2, configuration)) for configuration in configurations],
            *[make_view("v", more) for more in (field(1, "w"), field(1, "v"), field(3), b"\n")],
            *[make_view("v", table=table) for table in ("", "v", "nothing", "mine")],
            *[ask(MAKE_VIEW, body) for body in (b"", b"\x8a\0\x01v", b"\n")],
            *[ask(number, b"", "mine") for number in (DELETE_VIEW, ON_REMOVE)],
            ask(ON_UPDATE, field(1, 0), "mine"),
            *[ask(TO_ARROW, field(1), entity) for entity in ("mine", TABLE, "")],
        )
        other.assert_accepted(make_view("mine"), ask(DELETE_VIEW, b"", "mine"))  # its own
        owner.assert_updates_go_on()
        owner.assert_refused(*[make_view("mine", table=table) for table in (TABLE, STATUS)])
        owner.assert_accepted(ask(DELETE_VIEW, b"", "mine"))
        owner.assert_refused(ask(TO_ARROW, field(1), "mine"))


def test_malformed_and_doubled_messages_are_refused(ours):
    head, size, write = field(1, 1) + field(2, TABLE), ask(SIZE), field(UPDATE, field(1, "x"))
    rest, tag = field(2, TABLE) + field(SIZE), bytes([SIZE << 3 | 2])
    malformed = [b"", b"\0", b"\xff" * 30, bytes(300), "", "text \u2026", size.decode()]
    malformed += [size[:end] for end in range(1, len(size))]
    malformed += [size + more for more in (write, field(SIZE), field(2, "x"), field(DELETE_VIEW))]
    malformed += [more + size for more in (write, field(REPLACE), field(2, "x"), field(1, 2))]
    malformed += [head + write + field(SIZE), ask(SIZE, entity=b"\xff")]
    # Numbers in more bytes than they need, and larger than 64 bits.
    malformed += [head + bytes([tag[0] | 128, 0, 0]), head + tag + b"\x80\0"]
    malformed += [b"\x88\0\x01" + rest, b"\x08\x81\0" + rest, head + tag + b"\xff" * 9 + b"\x01"]
    malformed += [b"\x08" + b"\xff" * length + b"\x01" + rest for length in (10, 11, 99)]
    malformed += [head + bytes([SIZE << 3 | kind]) + bytes(8) for kind in (0, 1, 3, 4, 5, 6, 7)]
    random.seed(5)
    noise = [bytearray(random.choice([size, make_view("v"), head + write])) for _ in range(1000)]
    for message in noise * 3:
        message[random.randrange(len(message))] = random.randrange(256)
    with Raw(ours.url) as raw:
        raw.assert_refused(*malformed)
        raw.answers_to(*map(bytes, noise))  # some of them may be right by chance


def test_sizes_and_numbers_are_limited(ours):
    with Raw(ours.url) as raw, Raw(ours.url) as other:
        refused = [ERROR in answer for answer in raw.answers_to(*map(make_view, "abcdefgh" * 8))]
        assert refused == [False] * 8 + [True] * 56  # each name once
        answers = raw.answers_to(*[make_view(f"v{i}") for i in range(200)])
        assert sum(ERROR in answer for answer in answers) > 150
        raw.assert_accepted(ask(DELETE_VIEW, b"", "a"), make_view("again"))
        raw.subscribe("b")
        raw.assert_refused(*[ask(ON_UPDATE, field(1, 0), "b") for _ in range(100)])
        raw.assert_updates_go_on()
        with contextlib.suppress(WebSocketClosedError):
            raw.send(ask(SIZE, bytes(1 << 20)))
        assert raw.closed.wait(20)
        other.assert_accepted(ask(SIZE))
    sock = websocket(ours.server)
    sock.sendall(b"\x82\xff" + struct.pack(">Q", 100 << 20) + b"mask" + bytes(1000))
    wait_until(lambda: ours.server.health()["viewers"] == 1, "not waited for 100 MB")
    sock.close()


# --- Nobody slows anybody down --------------------------------------------------------------------


@pytest.mark.alone
def test_floods_and_viewers_that_leave_do_not_delay_others(ours):
    mirror = ours.mirror
    before, gaps = mirror.updates[TABLE], len(mirror.gaps)
    with Raw(ours.url) as one, Raw(ours.url) as two:
        for raw, name in ((one, "one"), (two, "two")):
            raw.send(make_view(name), *[ask(TO_ARROW, field(1), name)] * 250)
        for i in range(100):
            sock = websocket(ours.server)
            sock.sendall(frame(make_view(f"{i}")) + frame(ask(TO_ARROW, field(1), f"{i}")))
            sock.sendall(frame(make_view("half"))[: -1 - i % 9])
            if i % 2:  # leave with a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        wait_until(lambda: mirror.updates[TABLE] > before + 20, "updates")
    assert max(mirror.gaps[gaps:]) < 2


@pytest.mark.alone
def test_requests_without_a_pause_get_a_small_share_of_the_time(ours):
    def cpu_seconds():
        stat = Path(f"/proc/{ours.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    with Raw(ours.url) as raw:
        began, used = time.monotonic(), cpu_seconds()
        raw.assert_accepted(*[ask(SCHEMA)] * 200)
        share = (cpu_seconds() - used) / (time.monotonic() - began)
    assert share < 0.5


def test_viewers_find_room_where_a_shell_allows_few_files(service, start, tmp_path):
    """The server raises the limit. At the limit it would be busy failing to accept connections."""
    lower = "import resource as r\n_, hard = r.getrlimit(r.RLIMIT_NOFILE)\n"
    script = patched_server(tmp_path, f"{lower}r.setrlimit(r.RLIMIT_NOFILE, (64, hard))")
    server = start(Server, "--dsn", service.database.dsn, script=script)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(websocket(server))
        wait_until(lambda: server.health()["viewers"] == 100, "all of them")
    assert "Traceback" not in server.output


def test_viewers_that_read_nothing_are_disconnected(ours):
    """Each subscribes many times, so that much waits for it soon."""
    server = ours.server
    before = server.memory()
    deaf = [websocket(server) for _ in range(4)]
    for i, sock in enumerate(deaf):
        for name in (f"deaf {i} {j}" for j in range(15)):
            sock.sendall(frame(make_view(name)) + frame(ask(ON_UPDATE, field(1, 0), name)))

    def all_disconnected():
        ours.database.command(
            "INSERT INTO stock_values SELECT now64(3), 'TLT.N', 'Homer', 1, 1, 1, 1, number,"
            " today() FROM numbers(10000)"
        )
        rows = ours.database.count()
        wait_until(lambda: ours.mirror.received.total() >= rows, "the mirror has them")
        return server.output.count("does not read") == len(deaf)

    wait_until(all_disconnected, "disconnected, with one line each")
    assert server.memory() < before + 195
    for sock in deaf:
        sock.close()


def test_a_full_server_says_so_and_who_answers_no_ping_makes_room(service, start, tmp_path):
    limits = {"MAX_VIEWERS = 2000": "MAX_VIEWERS = 3", "PING_SECONDS = 60": "PING_SECONDS = 3"}
    script = changed_server(tmp_path, limits)
    server = start(Server, "--dsn", service.database.dsn, script=script)
    viewers = [start(Raw, server.url) for _ in range(2)]
    silent = websocket(server)
    with Raw(server.url) as refused:
        assert refused.closed.wait(20)
        assert refused.socket.close_code == 1013 and "full" in refused.socket.close_reason
    wait_until(lambda: server.health()["viewers"] == 2, "the silent one gone")
    for viewer in (*viewers, start(Raw, server.url)):
        viewer.assert_accepted(ask(HOSTED_TABLES))
    silent.close()


# --- Origins, host names, paths -------------------------------------------------------------------

CSS, JS = (f"/perspective/perspective-anywidget.{kind}" for kind in ("css", "js"))
ALLOWED = ["https://ticks.example.com", "http://other.example:81"]


def connects(server, **headers):
    """The status of a websocket's handshake: 101 if it is accepted."""
    return status(server, "/websocket", **UPGRADE, **headers)


@pytest.fixture(scope="module")
def public(service, start_once):
    """A server that listens everywhere and allows other origins."""
    options = ("--address", "0.0.0.0", "--allow-origin", *ALLOWED)
    return start_once(Server, "--dsn", service.database.dsn, *options)


def test_pages_of_other_origins_cannot_connect(service, public):
    for server, allowed in ((service.server, []), (public, ALLOWED)):
        own, port, site = server.url, server.port, {"Sec-Fetch-Site": "same-site"}
        strangers = ["null", "file://", "http://evil.example", f"http://evil.example:{port}"]
        strangers += [
            f"http://localhost:{port + 1}",
            "http://localhost",
            f"http://127.0.0.1:{port}",
        ]
        strangers += [f"{own}.evil.example", f"http://evil.example/{own}", f"{own}1", own[:-1]]
        strangers += [f"{ALLOWED[0]}.evil.example", f"{ALLOWED[0]}:81", "http://ticks.example.com"]
        for origin in {*strangers, *ALLOWED} - {*allowed}:
            assert connects(server, Origin=origin) == connects(server, Origin=origin, **site) == 403
            code, headers, _ = server.get(CSS, {"Origin": origin})
            assert code == 200 and "Access-Control-Allow-Origin" not in headers, origin
        for origin in (own, *allowed):
            assert connects(server, Origin=origin) == connects(server, Origin=origin, **site) == 101
            headers = server.get(CSS, {"Origin": origin})[1]
            assert headers["Access-Control-Allow-Origin"] == origin and "Origin" in headers["Vary"]
            for path in ("/", "/healthz", "/nothing"):
                headers = server.get(path, {"Origin": origin})[1]
                assert "Access-Control-Allow-Origin" not in headers
        assert connects(server) == 101  # no browser, so there is no page to fear
    assert connects(public, Origin=ALLOWED[0], Host="ticks.example.com") == 101


def test_other_host_names_get_nothing(service, public, start):
    foreign = ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::1].evil.example"]
    foreign += ["localhost.evil.example", "evil-localhost", "localhost.x", "1.2.3.4.evil.example"]
    foreign += ["ticks.example.com.evil.example", "xticks.example.com", "ticksxexample.com"]
    others = ["192.0.2.7:8080", "[2001:db8::1]:8080", "ticks.example.com", "other.example:81"]
    local = ["LOCALHOST", "localhost:8080", "127.0.0.1", "127.0.0.1:8080", "[::1]:8080"]
    allowed = ("--allow-origin", "http://[2001:db8::1]:81")
    ipv6 = start(Server, "--dsn", service.database.dsn, *allowed)
    for server, refused, answered in (
        (service.server, [*foreign, *others], local),
        (public, foreign, [*local, *others]),
        (ipv6, ["[2001:db8::2]", "2001:db8::1"], ["[2001:db8::1]:81", "[2001:DB8::1]"]),
    ):
        for host in refused:
            assert connects(server, Host=host, Origin=f"http://{host}") == 404, host
            for path in ("/", "/prsp-viewer.html", "/healthz", CSS, "/nothing"):
                assert server.get(path, {"Host": host})[0] == 404, (host, path)
        for host in answered:
            assert server.get("/", {"Host": host})[0] == 200, host
            assert connects(server, Host=host, Origin=f"http://{host}") == 101, host
        assert status(server, "/", Host="evil.example", **{"X-Forwarded-Host": "localhost"}) == 404
        assert status(server, "http://localhost/", Host="evil.example") == 404


PATHS = r"""/perspective /perspective/ /perspective/__init__.py /perspective/perspective-anywidgetX
    /perspective/../../../../perspective_server.py /perspective/%2e%2e/%2e%2e/__init__.py
    /perspective/..%2f..%2f__init__.py /perspective//etc/passwd /perspective/%2Fetc%2Fpasswd
    /perspective/....//....//__init__.py /perspective/..\..\__init__.py /favicon.ico /tests/ *
    /perspective/perspective-anywidget.js/../../../__init__.py /perspective_server.py /producer.py
    /perspective/perspective-anywidget.js%00 /.git/config /static/perspective-anywidget.js /healthz/
    //localhost/healthz /websocket/ /prsp-viewer.html/ /prsp-viewerXhtml"""


def test_only_the_page_and_the_browser_build_are_served(service):
    server, chunks = service.server, {"Transfer-Encoding": "chunked"}
    for path in PATHS.split():
        assert status(server, path) == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "EVIL"):
        for path in ("/", "/healthz", CSS, "/websocket", "/nothing"):
            assert status(server, path, method) in (404, 405), (method, path)
    assert status(server, "/websocket") == 400
    with contextlib.suppress(ConnectionError):  # too much is not read to its end
        assert status(server, "/", "POST", **{"Content-Length": "99999999"}) in (400, 413)
    with contextlib.suppress(ConnectionError):
        assert status(server, "/", "POST", iter([bytes(4096)] * 9999), **chunks) in (400, 413)
    with contextlib.suppress(ConnectionError):
        assert status(server, "/", X="a" * 100_000) in (400, 431)
    kinds = {"/": "text/html", "/healthz": "application/json", "/nothing": "text/plain"}
    kinds |= {"/prsp-viewer.html": "text/html", CSS: "text/css", JS: "text/javascript"}
    for path, kind in kinds.items():
        headers = server.get(path)[1]
        assert headers["Content-Type"].startswith(kind), path
        assert headers["X-Content-Type-Options"] == "nosniff", path
    policy = server.get("/")[1]["Content-Security-Policy"]
    for part in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{part} 'none'" in policy
    scripts = re.search("script-src ([^;]*)", policy)[1].split()
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "data:"} & {*scripts}
    assert "http" not in policy


def test_the_browser_build_is_compressed_and_cached(service):
    for path in (CSS, JS):
        static = Path(perspective.__file__).parent / "widget" / "static"
        content = (static / path.rpartition("/")[2]).read_bytes()
        for encoding in ("identity", "gzip, deflate, br"):
            asked = {"Accept-Encoding": encoding}
            code, headers, body = service.server.get(path, asked)
            compressed = headers.get("Content-Encoding") == "gzip"
            assert code == 200 and compressed == ("gzip" in encoding)
            assert (gzip.decompress(body) if compressed else body) == content
            assert len(body) < len(content) or not compressed
            assert body[4:8] == bytes(4) or not compressed  # no time: the ETag outlives a restart
            assert "Accept-Encoding" in headers["Vary"]
            again = service.server.get(path, asked | {"If-None-Match": headers["ETag"]})
            assert (again[0], again[2]) == (304, b"")
            assert service.server.get(path, asked | {"If-None-Match": '"other"'})[0] == 200


def test_the_password_is_nowhere(clickhouse, start):
    login = "clickhouse://admin:t0p%40s3cret@"
    dsns = [f"{login}127.0.0.1:{port}/test" for port in (clickhouse.port, free_port())]
    servers = [start(Server, "--dsn", dsn) for dsn in dsns]
    servers.append(start(Server, env={"CLICKHOUSE_DSN": dsns[0]}))
    scripts = [start(Script, "producer.py", "--dsn", dsn) for dsn in dsns]
    wrong = [f"http{login[10:]}h/test", *(f"{login}{rest}" for rest in ("h:99999/test", "[/test"))]
    names = ("producer.py", "perspective_server.py")
    ended = [start(Script, name, "--dsn", dsn) for name in names for dsn in wrong]
    for server in servers:
        server.wait_for("trying again")
        with Raw(server.url) as viewer:
            said = [viewer.answers_to(b"", ask(SCHEMA)), server.get("/healthz"), server.get("/")]
            assert "s3cret" not in str(said)
    for script in ended:
        assert script.wait() == 2 and len(script.lines) == 1, script.output
    for script in (*servers, *scripts):
        wait_until(lambda script=script: script.lines, "something said")
        script.stop()
    for script in (*servers, *scripts, *ended):
        assert script.lines and "s3cret" not in script.output
