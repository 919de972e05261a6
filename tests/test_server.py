"""The server's command line, /healthz and the status table, and set-ups that people really have."""

import collections
import contextlib
import json
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from clickhouse_http import ClickHouseProcess
from conftest import (
    HOUR,
    ROOT,
    STATUS,
    Connection,
    Database,
    Mirror,
    Script,
    Server,
    free_port,
    now_ms,
    wait_until,
)
from proxy import Proxy

FIGURES = {"rows", "delivered", "rows_per_second", "lag_ms", "poll_ms", "viewers"}


def requests_through(proxy):
    """Let a proxy note when requests come; returns the list of times, which grows."""
    times = []
    proxy.delay(0, when=lambda _: times.append(time.monotonic()) or True)
    return times


# ---------------------------------------------------------------------------------------------
# /healthz, and the status table, which says the same.


def wait_for_report(server, mirror, seconds=60, **expected):
    """Wait until /healthz and a mirror of the status say what is expected; returns the former.

    Whatever it says, its form and its HTTP status must be right.
    """
    said = {}

    def agree():
        status, _, body = server.get("/healthz")
        said.update(json.loads(body))
        assert said.keys() == FIGURES | {"clickhouse", "table"}
        assert status == (200 if said["clickhouse"] == "up" else 503)
        assert said["lag_ms"] is None or said["lag_ms"] >= 0
        row = next(iter(mirror.table(mirror.live).values()), {})
        return all(said[name] == row.get(name) == value for name, value in expected.items())

    wait_until(agree, (expected, said), seconds)
    return said


@pytest.mark.long
def test_health_tells_the_truth_whatever_happens_to_clickhouse(tmp_path, start):
    process = ClickHouseProcess(tmp_path / "data", port=free_port())
    database = Database(process, "test")
    process.password = "another"
    process.start()
    with contextlib.closing(process), Proxy(process.port) as proxy:
        times = requests_through(proxy)
        dsn = database.dsn.replace(str(process.port), str(proxy.port))
        server = start(Server, "--dsn", dsn, "--interval", 0.05)
        # A wrong password is reported once and tried with growing pauses, until a viewer comes.
        wait_until(lambda: len(times) >= 6)
        assert times[5] - times[0] > 1.2
        mirror = start(Mirror, server.url, STATUS)
        nothing = {"rows": 0, "delivered": 0, "rows_per_second": 0, "lag_ms": None}
        wait_for_report(server, mirror, clickhouse="down", viewers=1, **nothing)
        assert server.output.count("Authentication failed") == 1
        process.kill()
        process.password = "admin1234"
        process.start()
        wait_for_report(server, mirror, clickhouse="no table", table="stock_values", **nothing)
        database.create_table()
        wait_for_report(server, mirror, clickhouse="up", **nothing)
        database.insert(300)
        wait_for_report(server, mirror, clickhouse="up", rows=300, delivered=300)
        process.kill()
        wait_for_report(server, mirror, clickhouse="down", rows=300, delivered=300)
        process.start()
        wait_for_report(server, mirror, clickhouse="up", rows=300)
        database.insert(20)
        wait_for_report(server, mirror, rows=320)
        process.pause()
        wait_for_report(server, mirror, clickhouse="down", rows=320, rows_per_second=0)
        process.resume()
        wait_for_report(server, mirror, clickhouse="up", rows=320)
        assert "admin1234" not in server.output


def test_the_figures_of_health(table, start):
    options = ["--dsn", table.dsn, "--interval", 0.05, "--limit", 1000]
    server = start(Server, *options)
    mirror = start(Mirror, server.url, STATUS)
    wait_for_report(server, mirror, clickhouse="up", lag_ms=None)
    assert 0 < wait_until(lambda: server.health()["poll_ms"]) < 5000
    table.insert(300, 1000, step=0)  # 1970
    assert wait_for_report(server, mirror, rows=300)["lag_ms"] is None
    table.insert(300, now_ms() - 3000, step=0)
    wait_for_report(server, mirror, rows=600, delivered=600)
    table.insert(600, now_ms() - 3000, step=0)
    said = wait_for_report(server, mirror, rows=1000, delivered=1200)
    assert said["rows_per_second"] in (60, 90, 120)  # over ten seconds, and the machine may be slow
    assert 3000 <= said["lag_ms"] < 30_000
    table.insert(1, now_ms() + 70 * 8766 * HOUR)  # a wrong clock: no tick that counts
    wait_for_report(server, mirror, delivered=1201, lag_ms=None)
    table.insert(1, now_ms() + 30_000)
    wait_for_report(server, mirror, delivered=1202, lag_ms=0)
    with Connection(server.url), Connection(server.url):
        wait_for_report(server, mirror, viewers=3)
    wait_for_report(server, mirror, viewers=1)


@pytest.mark.alone
def test_the_status_comes_once_a_second_and_at_each_change_of_state(table, start):
    server = start(Server, "--dsn", table.dsn, "--interval", 0.05)
    mirror = start(Mirror, server.url, STATUS)
    wait_for_report(server, mirror, clickhouse="up")
    began, before = time.monotonic(), mirror.updates[STATUS]
    wait_until(lambda: mirror.updates[STATUS] >= before + 3)
    assert 1.8 < time.monotonic() - began < 6
    began, before = time.monotonic(), mirror.updates[STATUS]
    for _ in range(4):
        table.command("RENAME TABLE stock_values TO stock_values_away")
        wait_for_report(server, mirror, clickhouse="no table")
        table.command("RENAME TABLE stock_values_away TO stock_values")
        wait_for_report(server, mirror, clickhouse="up")
    more = mirror.updates[STATUS] - before - (time.monotonic() - began)
    assert more >= 4  # it is 8 or so; without an update at each change, it is 1 at most


# ---------------------------------------------------------------------------------------------
# Nobody looks.


@pytest.mark.alone
def test_nobody_looks_so_it_polls_every_five_seconds_and_the_first_viewer_is_fresh(table, start):
    with Proxy(table.process.port) as proxy:
        dsn = table.process.dsn_of(table.name, port=proxy.port)
        server = start(Server, "--dsn", dsn, "--interval", 0.2)
        table.insert(10)
        with contextlib.closing(Mirror(server.url)) as mirror:
            mirror.wait_for_rows(10)
            wait_until(lambda: mirror.table("stock_values_history"))
            times = requests_through(proxy)
            wait_until(lambda: len(times) >= 10)
            assert 1.2 < times[9] - times[0] < 4  # --interval holds
        wait_until(lambda: server.health()["viewers"] == 0)

        times, inserted = requests_through(proxy), 10
        end = time.monotonic() + 6.5
        while time.monotonic() < end:
            table.insert(10)
            inserted += 10
            time.sleep(0.1)
        # Two polls at most; each is two requests, after which each rollup runs once.
        assert 2 <= len(times) <= 10
        assert server.get("/healthz")[0] == 200
        assert 10 < server.health()["delivered"] < inserted
        began = time.monotonic()
        start(Mirror, server.url).wait_for_rows(inserted)
        assert time.monotonic() - began < 1


# ---------------------------------------------------------------------------------------------
# Users, proxies and TLS.


GRANTED = re.findall(r"GRANT SELECT ON (\S+) TO viewer;", (ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A ClickHouse with the table, and with users who may not do everything."""
    reader = {"password": "s3cret", "grants": ["SELECT ON *.*"]}
    users = {f"readonly_{n}": reader | {"settings": {"readonly": n}} for n in (1, 2)}
    users["readme"] = {"password": "s3cret", "grants": [f"SELECT ON {name}" for name in GRANTED]}
    with ClickHouseProcess(tmp_path_factory.mktemp("guarded"), users=users) as process:
        Database(process, "test").create_table()
        yield process


@pytest.mark.parametrize("user", ["readonly_1", "readonly_2", "readme"])
def test_a_user_who_may_only_read_is_enough_and_polling_is_not_logged(guarded, start, user):
    database, heads = Database(guarded, "test"), []
    with Proxy(guarded.port) as proxy:
        proxy.delay(0, when=heads.append)
        dsn = guarded.dsn_of("test", user, port=proxy.port)
        server = start(Server, "--dsn", dsn, "--interval", 0.05)
        mirror = start(Mirror, server.url)
        wait_until(lambda: mirror.snapshots)
        database.insert(100)
        database.insert(50, now_ms() - 1000)
        wait_until(lambda: mirror.rows() == database.rows())
        database.command("DELETE FROM stock_values WHERE volume % 100000 = 3")
        wait_until(lambda: mirror.rows() == database.rows())
        names = {STATUS, *(f"stock_values_{name}" for name in ("tickers", "candles", "history"))}
        assert mirror.tables.keys() == names | {"stock_values"}
        wait_until(lambda: all(map(mirror.table, names)))
        assert server.health()["clickhouse"] == "up"
        assert "readonly" not in server.output
        # The engine of the tests lets everybody read system tables, so look at what is read.
        read = set(re.findall(rb"system\.(\w+)", b"".join(heads)))
        assert read == {b"tables", b"columns", b"parts", b"settings"}
        assert {f"system.{name.decode()}" for name in read - {b"settings"}} <= set(GRANTED)
        polls = [head for head in heads if b"_block_number" in head]
        assert polls
        if user != "readonly_1":  # whose requests can carry no settings
            assert all(b"log_queries=0" in head for head in polls)


def http_proxy(target):
    """An HTTP proxy that passes everything on to a port of this machine, whoever is `asked` for."""
    proxy, asked = Proxy(target), set()

    def note(request):
        asked.add(request[2].decode())
        return request[1] + b" "

    proxy.asked = asked
    proxy.rewrite = lambda data: re.sub(rb"^(POST|GET) http://([^/ ]+)", note, data)
    return proxy


NO_PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY"), "")


def both(start, dsn, **env):
    """Start a producer of one batch of ten rows, and a server."""
    options = {"env": NO_PROXIES | env}
    return [
        start(Script, "producer.py", "--dsn", dsn, "--rows", 10, "--batches", 1, **options),
        start(Server, "--dsn", dsn, "--interval", 0.05, **options),
    ]


def work(*scripts):
    for script in scripts:
        if isinstance(script, Server):
            script.wait_for("following test_")
        else:
            assert script.wait() == 0, script.output


def test_the_proxy_of_the_environment_is_never_asked_for_this_machine(table, start):
    port, local = table.process.port, table.dsn.replace("127.0.0.1", "localhost")
    a, b = (table.dsn.replace("127.0.0.1", name) for name in ("a.invalid", "b.invalid"))
    with http_proxy(port) as proxy, http_proxy(port) as explicit:
        address = f"http://127.0.0.1:{proxy.port}"
        upper = {"HTTP_PROXY": address, "NO_PROXY": "a.invalid"}
        option = f"?http_proxy=http://127.0.0.1:{explicit.port}"  # a proxy in the DSN wins
        away = both(start, a, **upper)
        works = both(start, table.dsn, **upper), both(start, local + option, http_proxy=address)
        work(*works[0], *works[1])
        assert explicit.asked == {f"localhost:{port}"}
        for script in away:  # NO_PROXY is kept
            script.wait_for("ClickHouse is away")
        assert proxy.asked == set()
        work(*both(start, b, **upper))  # for other hosts the proxy is asked
        assert proxy.asked == {f"b.invalid:{port}"}
        assert table.count() == 30


@pytest.fixture
def tls_context(tmp_path):
    """A TLS server's context, with a certificate for localhost, which signs itself: ca.pem."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.pem", tmp_path / "ca.key")
    return context


def test_tls_on_any_port_and_a_certificate_that_does_not_verify(
    table, start, tls_context, tmp_path
):
    with Proxy(table.process.port, context=tls_context) as proxy:
        port, ca = proxy.port, f"ca_cert={tmp_path / 'ca.pem'}"
        https = f"https://admin:admin1234@localhost:{port}/{table.name}"
        secure = https.replace("https:", "clickhouse:") + "?secure=true"
        env = {"https_proxy": "http://127.0.0.1:9"}  # nothing is there, and nothing may ask it
        work(*both(start, f"{https}?{ca}", **env), *both(start, f"{secure}&{ca}", **env))
        assert table.count() == 20
        other_name = https.replace("localhost", "127.0.0.1")
        wrong = [both(start, dsn) for dsn in (https, f"{other_name}?{ca}")]
        for script, server in wrong:
            assert script.wait(20) == 1
            server.wait_for("certificate")
            for lines in (script.lines, server.lines):
                assert len([line for line in lines if "certificate" in line]) == 1
                assert "admin1234" not in str(lines)
            assert script.lines[-1].startswith("producer.py: ")
            assert "ClickHouse is away" not in script.output + server.output
            assert server.stop() == 0
        assert table.count() == 20


# ---------------------------------------------------------------------------------------------
# Command lines that make no sense.

# Runs command lines one after the other in one process, which saves the imports.
RUNNER = """
import contextlib, io, json, runpy, signal, sys
signal.signal(signal.SIGALRM, lambda *_: sys.exit("did not end"))
for arguments in json.loads(sys.argv.pop()):
    signal.alarm(30)
    sys.argv, output, status = arguments, io.StringIO(), None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(json.dumps([arguments, status, output.getvalue()]), flush=True)
"""
BAD_VALUES = {
    "perspective_server.py --port": "0 99999 -1 x ''",
    "perspective_server.py --interval": "0 -1 nan inf 1e9 soon ''",
    "perspective_server.py --limit": "0 -5 1.5 1e9x 1000001",
    "perspective_server.py --table": "'' a.b.c .b a. '`a' 'server status'",
    "perspective_server.py --allow-origin": "null '*' example.com https://a.example/b ftp://a.example"
    " '' https:// http://a:b",
    "producer.py --interval": "0 -1 nan inf 1e9 soon",
    "producer.py --rows": "0 1.5 many",
    "producer.py --batches": "0 1.5 many",
    "producer.py --seed": "-1 x",
    "producer.py": "clickhouse://admin:s3cret@h/test",
}
BAD_DSNS = """'' localhost http://localhost:8123 clickhouse:// clickhouse:///test
    clickhouse://u:s3cret@h:0/test clickhouse://u:s3cret@h:99999/test
    clickhouse://u:s3cret@h:port/test clickhouse://u:s3cret@h/test/table
    clickhouse://u:123/s3cret@h/test clickhouse://u:123?s3cret@h/test
    clickhouse://u:123#s3cret@h/test clickhouse://u:[s3cret@h/test
    clickhouse://u:s3cret@h/test?x chdb://memory/test chdb://folder/more"""
BAD_LINES = """--allow-origin|--dsn clickhouse://u:s3cret@h/test --embedded
    |clickhouse://u:s3cret@h/test|--dsn|--embedded one two|--rows 7|--table|now"""


def test_bad_options_and_dsns_get_one_line_and_status_2():
    script = "perspective_server.py"
    lines = [[script, *shlex.split(line)] for line in BAD_LINES.split("|")]
    for option, values in BAD_VALUES.items():
        lines += [[*option.split(), value] for value in shlex.split(values)]
    for dsn in shlex.split(BAD_DSNS):
        lines += [[name, "--dsn", dsn] for name in (script, "producer.py")]
    command = [sys.executable, "-c", RUNNER, json.dumps(lines)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120)
    answers = list(map(json.loads, result.stdout.splitlines()))
    wrong = [
        answer
        for answer in answers
        if answer[1] != 2
        or not re.fullmatch(rf"{answer[0][0]}: .*\n", answer[2])
        or re.search(r"s3cret|123[/?#]", answer[2])
    ]
    assert not wrong
    assert len(answers) == len(lines)


def test_dsn_options_that_the_driver_does_not_take_end_both_scripts(start):
    """Waiting does not cure these."""
    dsn = f"clickhouse://u:s3cret@127.0.0.1:{free_port()}/test"
    options = ("foo=1", "compress=very", "connect_timeout=soon")
    for script in [script for option in options for script in both(start, f"{dsn}?{option}")]:
        wait_until(lambda script=script: script.process.poll() is not None, script.lines)
        assert script.wait() in (1, 2)
        assert re.match(r"(producer|perspective_server).py: ", script.lines[-1])
        assert "s3cret" not in script.output
        assert "Traceback" not in script.output


def ends_at_once(script, text):
    """Check that a script ends with status 1, and says why in its last line."""
    assert script.wait() == 1, script.output
    assert script.lines[-1].startswith("perspective_server.py: ")
    assert text in script.lines[-1]
    assert "Traceback" not in script.output


def test_beginnings_that_fail_get_one_line_and_status_1(start, tmp_path):
    path, env = tmp_path / "file" / "data", {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "file").write_text("")
    (tmp_path / "chdb.py").write_text("raise ModuleNotFoundError('No chdb', name='chdb')")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (f"port {port}", f"--port {port}"),
            (f"port {port}", f"--port {port} --embedded"),
            ("192.0.2.1", f"--port {free_port()} --address 192.0.2.1"),
            ("a.invalid", f"--port {free_port()} --address a.invalid"),
            (f"{path}", f"--port {free_port()} --embedded {path}"),
            ("pip install 'clickhouse-connect[chdb]'", f"--port {free_port()} --embedded"),
        ]
        scripts = [
            (start(Script, "perspective_server.py", *options.split(), env=env), text)
            for text, options in cases
        ]
        for script, text in scripts:
            ends_at_once(script, text)
            assert len(script.lines) == 1 or "--embedded" in script.process.args


# ---------------------------------------------------------------------------------------------
# The end.


def ends_well(script, number, seconds=3):
    """Send a signal; the end must come within the promised three seconds, and in peace."""
    assert script.stop(number, seconds) == 0, script.output
    assert "Traceback" not in script.output
    assert "Error" not in script.output


def said_goodbye(viewer):
    return viewer.closed.wait(3) and viewer.socket.close_code == 1001


@pytest.mark.alone
def test_a_signal_before_clickhouse_is_there(start):
    server = start(Server, "--dsn", f"clickhouse://a:b@127.0.0.1:{free_port()}/test")
    viewer = start(Connection, server.url)
    server.wait_for("ClickHouse is away")
    ends_well(server, signal.SIGINT)
    assert said_goodbye(viewer)


@pytest.mark.alone
def test_a_signal_while_a_poll_hangs_and_a_viewer_reads_nothing(table, start):
    release = threading.Event()
    with Proxy(table.process.port) as proxy:
        dsn = table.process.dsn_of(table.name, port=proxy.port)
        server = start(Server, "--dsn", dsn, "--interval", 0.05)
        viewers = [start(Connection, server.url) for _ in range(2)]
        deaf = start(Mirror, server.url)
        wait_until(lambda: deaf.snapshots)
        deaf.loop.call_soon_threadsafe(release.wait, 60)
        for blocks in range(1, 4):
            table.insert(25_000)
            server.wait_for_delivered(25_000 * blocks)
        done = proxy.faults + 1
        proxy.stall()
        assert proxy.wait(done, 10)
        ends_well(server, signal.SIGTERM)
        release.set()
        assert all(map(said_goodbye, viewers))


@pytest.mark.alone
def test_a_closed_terminal_while_the_embedded_engine_runs(start, tmp_path):
    options = ("--interval", 0.05, "--embedded")
    server = start(Server, *options, env={"TMPDIR": str(tmp_path)})
    wait_until(start(Mirror, server.url).rows)
    assert "no table" not in server.output  # nothing is to be done about that here
    ends_well(server, signal.SIGHUP)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# --embedded PATH, and two servers.


def test_embedded_keeps_every_row_even_when_killed(start, tmp_path):
    path, rows = tmp_path / "data", collections.Counter()
    for killed in (True, False):
        server = start(Server, "--embedded", path, "--limit", 100_000)
        with contextlib.closing(Mirror(server.url)) as mirror:
            enough = rows.total() + 500
            wait_until(lambda m=mirror, enough=enough: m.rows().total() >= enough)
            assert rows <= mirror.rows()
            rows = mirror.rows()
            if killed:
                options = ["--port", free_port(), "--embedded", path]
                ends_at_once(start(Script, "perspective_server.py", *options), str(path))
                server.kill()
            else:
                ends_well(server, signal.SIGTERM, seconds=60)  # others run beside this test
    with ClickHouseProcess(path) as process:
        assert rows <= Database(process, "test").rows()


def test_viewers_of_two_servers_agree(table, start):
    table.insert(100)
    servers = [start(Server, "--dsn", table.dsn, "--limit", 2000) for _ in range(2)]
    mirrors = [start(Mirror, server.url) for server in servers]
    batches = ["--batches", 10, "--rows", 500, "--interval", 0.1]
    assert start(Script, "producer.py", "--dsn", table.dsn, *batches).wait() == 0
    newest = table.rows("ORDER BY _block_number DESC, _block_offset DESC LIMIT 2000")
    wait_until(lambda: all(mirror.rows() == newest for mirror in mirrors))

    def agree():
        names = ("stock_values_tickers", "stock_values_candles")
        one, other = [[mirror.table(name) for name in names] for mirror in mirrors]
        return len(one[0]) > 10 and one == other

    wait_until(agree)
