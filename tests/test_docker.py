"""docker.sh against a real Docker engine, which runs for this file alone, on sockets of its own.

In place of ClickHouse's image it starts one of 2 MB: busybox, whose `nc` answers SELECT 1 to the
right user, or misbehaves. Its registry does not exist: each pull fails, and the copy is used.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, free_port, wait_until

import producer

SCRIPT = ROOT / "docker.sh"
NAME = "prsp-clickhouse"
REGISTRY = "127.0.0.1:1/clickhouse"  # nothing listens on port 1
LATEST = "clickhouse/clickhouse-server:latest"
EMBEDDED = "python perspective_server.py --embedded"

# The program of the images, one for each kind; nc starts it again for each request.
SERVE = r"""#!/bin/busybox sh
case $1 in
  ends) echo "no space left on device" >&2; exit 1 ;;
  silent) echo "loading"; exec busybox nc -ll -p 8123 -e /bin/busybox sleep 600 ;;
  answers) exec busybox nc -ll -p 8123 -e /serve request ;;
  troubled) busybox sleep 1; exec busybox nc -ll -p 8123 -e /serve trouble ;;
esac
if [ "$1" = trouble ]; then
  echo >> /requests
  case $(busybox wc -l < /requests) in
    1) exit ;;
    2) printf 'HTTP/1.0 500 Error\r\n\r\n1\n'; exit ;;
    3) printf 'HTTP/1.0 200 OK\r\n\r\n<h1>Hello</h1>\n'; exit ;;
  esac
fi
request=
while IFS= read -r line && [ ${#line} -gt 1 ]; do request="$request$line"; done
for line in "GET /?query=SELECT+1 HTTP/1.0" \
    "X-ClickHouse-User: $CLICKHOUSE_USER" "X-ClickHouse-Key: $CLICKHOUSE_PASSWORD"; do
  case $request in *"$line"*) ;; *) printf 'HTTP/1.0 403 Forbidden\r\n\r\n'; exit ;; esac
done
printf 'HTTP/1.0 200 OK\r\n\r\n1\n'
"""


def run(*command, **options):
    """Run a command that has to succeed; returns what it printed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **options).stdout


def execute(env, *arguments, command=SCRIPT, **options):
    """Run docker.sh, which must not take long in any of the tests."""
    options |= {"env": env, "capture_output": True, "text": True, "timeout": 50}
    return subprocess.run([command, *arguments], **options)


def error_of(result, lines=1):
    """The last of so many lines of an error; those before it are docker's own."""
    assert (result.returncode, "ready" in result.stdout) == (1, False)
    errors = result.stderr.splitlines()
    assert errors[-1].startswith("docker.sh: ")
    assert lines in (None, len(errors)), result.stderr
    return errors[-1]


class Engine:
    """A Docker engine that may not raise limits, as in rootless Docker, on a bridge of its own."""

    def __init__(self, folder):
        self.env = os.environ | {"DOCKER_HOST": f"unix://{folder}/docker.sock"}
        self.bridge, self.address = f"prsp{os.getpid()}", f"198.18.{os.getpid() % 256}.1"
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.address}/24", "dev", self.bridge)
        command = ["prlimit", "--nofile=10000"]
        command += ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]
        command += ["dockerd", "--iptables=false", "--ip6tables=false", "--storage-driver=vfs"]
        command += [f"--bridge={self.bridge}", f"--host={self.env['DOCKER_HOST']}"]
        command += [f"--{name}={folder}/{name}" for name in ("data-root", "exec-root", "pidfile")]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def docker(self, *arguments, **options):
        return run("docker", *arguments, env=self.env, **options)

    def in_container(self, *command):
        return self.docker("exec", NAME, "/bin/busybox", *command).decode().strip()

    def make_images(self, folder):
        (folder / "bin").mkdir()
        shutil.copy(shutil.which("busybox"), folder / "bin/busybox")
        (folder / "serve").write_text(SERVE)
        (folder / "serve").chmod(0o755)
        archive = run("tar", "-C", folder, "-c", ".")
        for kind in ("answers", "troubled", "silent", "ends"):
            changes = [f'--change=CMD ["/serve", "{kind}"]', "--change=VOLUME /data"]
            self.docker("import", *changes, "-", f"{REGISTRY}:{kind}", input=archive)
        self.docker("tag", f"{REGISTRY}:answers", LATEST)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        run("ip", "link", "delete", self.bridge)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    needed = ("docker", "dockerd", "busybox", "ip", "setpriv", "prlimit")
    if os.geteuid() != 0 or not all(map(shutil.which, needed)):
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up(f"a Docker engine needs root and {needed}")
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(folder)
    try:
        wait_until((folder / "docker.sock").exists, folder / "log")
        engine.make_images(tmp_path_factory.mktemp("image"))
        yield engine
    finally:
        engine.stop()


@pytest.fixture
def docker_sh(engine):
    """Runs docker.sh with an image and two free ports; docker_sh.ports are the last ones."""

    def start(kind="answers", **env):
        start.ports = free_port(), free_port()
        http, native = map(str, start.ports)
        ports = {"CLICKHOUSE_HTTP_PORT": http, "CLICKHOUSE_NATIVE_PORT": native}
        image = {"CLICKHOUSE_IMAGE": f"{REGISTRY}:{kind}" if kind else ""}
        return execute(engine.env | ports | image | env)

    yield start
    subprocess.run(["docker", "rm", "-fv", NAME], env=engine.env, capture_output=True)


def fake_docker(folder, text):
    """Put a `docker` that notes its calls in front of the real one; returns the environment."""
    (folder / "docker").write_text(f'#!/bin/bash\necho "$*" >> {folder}/calls\n{text}\n')
    (folder / "docker").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_first_start_makes_a_clickhouse_that_the_printed_dsn_reaches(docker_sh, engine):
    """With its ports on loopback alone, although this Docker cannot raise the limit of files,
    and although the image cannot be pulled."""
    result = docker_sh(CLICKHOUSE_PASSWORD="of-the-shell", CLICKHOUSE_DB="other")
    assert result.returncode == 0, result.stderr
    assert f"Cannot pull {REGISTRY}:answers" in result.stdout
    assert "Docker cannot raise the limit of open files" in result.stdout
    assert "an earlier start" not in result.stdout
    assert "python producer.py\n  python perspective_server.py\n" in result.stdout
    [export] = re.findall("^ *export .*$", result.stdout, re.MULTILINE)
    dsn = run("bash", "-c", f'{export}\necho -n "$CLICKHOUSE_DSN"').decode()
    assert dsn == producer.DEFAULT_DSN.replace("8123", str(docker_sh.ports[0]))
    user, password, database = re.fullmatch(r"clickhouse://(.*):(.*)@.*/(.*)", dsn).groups()
    container = json.loads(engine.docker("inspect", NAME))[0]
    for name, value in {"USER": user, "PASSWORD": password, "DB": database}.items():
        assert f"CLICKHOUSE_{name}={value}" in container["Config"]["Env"]
    for port, inside in zip(docker_sh.ports, ("8123/tcp", "9000/tcp"), strict=True):
        [published] = container["NetworkSettings"]["Ports"][inside]
        assert published == {"HostIp": "127.0.0.1", "HostPort": str(port)}
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((engine.address, port))


def test_a_second_start_says_that_it_removes_the_first_and_its_data(docker_sh, engine):
    """Not if its image is nowhere. After a reboot, `docker start` brings the first one back."""
    assert docker_sh().returncode == 0
    engine.in_container("touch", "/data/ticks")
    error = error_of(docker_sh("missing"), lines=2)
    assert f"cannot pull {REGISTRY}:missing" in error and EMBEDDED in error
    engine.docker("kill", NAME)
    engine.docker("start", NAME)
    assert engine.in_container("ls", "/data") == "ticks"
    assert f"Removing the container {NAME} of an earlier start, and its data" in docker_sh().stdout
    assert engine.in_container("ls", "/data") == ""
    assert engine.docker("volume", "ls", "--quiet").count(b"\n") == 1
    assert engine.docker("ps", "--all", "--quiet").count(b"\n") == 1


def test_an_engine_that_allows_the_limit_gets_it_with_the_latest_image(docker_sh, tmp_path):
    """A wrapper of the real docker can pull, and takes the limit without passing it on."""
    limit, real = "--ulimit nofile=262144:262144", shutil.which("docker")
    text = f'[ "$1" = pull ] && exit 0\nset -- ${{@/--ulimit}}\nexec {real} ${{@/nofile=*}}'
    result = docker_sh(None, **fake_docker(tmp_path, text))
    assert (result.returncode, result.stderr) == (0, "")
    assert "limit" not in result.stdout
    calls = (tmp_path / "calls").read_text()
    assert f"pull {LATEST}\n" in calls
    [started] = re.findall("^run .*$", calls, re.MULTILINE)
    assert limit in started and started.endswith(f" {LATEST}")


@pytest.mark.parametrize("variable", ["CLICKHOUSE_HTTP_PORT", "CLICKHOUSE_NATIVE_PORT"])
def test_a_busy_port_is_named_and_leaves_no_container(docker_sh, engine, variable):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        error = error_of(docker_sh(**{variable: port}), lines=2)  # the first is the pull's
    assert f"port {port} is taken" in error and variable in error
    assert engine.docker("ps", "--all", "--quiet") == b""


@pytest.mark.parametrize(
    ("image", "seconds", "state", "log"),
    [
        ("ends", 0, "exited", "no space left on device\n"),
        ("silent", 2, "running", "loading\n"),
        ("silent", 60, "running", "loading\n"),
    ],
)
def test_a_container_that_does_not_answer(docker_sh, tmp_path, image, seconds, state, log):
    """One that ended is not waited for, and others for 60 seconds, unless told how long. Here
    bash's clock runs fast for these 60 seconds."""
    (tmp_path / "fast").write_text("sleep() { SECONDS=$((SECONDS + 20)); }\n")
    how = {"CLICKHOUSE_WAIT": "2"} if seconds == 2 else {"BASH_ENV": str(tmp_path / "fast")}
    result = docker_sh(image, **how)
    said = re.search(rf"no answer after (\d+) s .*: {state}\)", error_of(result, lines=None))
    assert seconds <= int(said[1]) < seconds + 25
    assert log in result.stderr


def test_only_the_right_answer_counts(docker_sh, engine):
    """Not a connection that ends, an error, or another service."""
    assert docker_sh("troubled").returncode == 0
    assert engine.in_container("wc", "-l", "/requests") == "4 /requests"


def test_no_docker_that_can_be_used_is_one_line(docker_sh, engine, tmp_path):
    """It is not running, not for this user, or not installed."""
    error = error_of(docker_sh(DOCKER_HOST="unix:///nowhere.sock"))
    assert "daemon is not running" in error and EMBEDDED in error
    with SCRIPT.open() as script:  # on stdin, since `nobody` need not be able to read the folder
        env = engine.env | {"HOME": "/"}
        denied = execute(env, command="bash", stdin=script, cwd="/", user="nobody")
    assert "group docker" in error_of(denied) and EMBEDDED in denied.stderr
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    error = error_of(execute({"PATH": str(tmp_path)}))
    assert "not installed" in error and EMBEDDED in error


@pytest.mark.parametrize("message", ["Ports are not available: TCP 127.0.0.1:9000", "No sockets."])
def test_other_errors_of_docker_are_one_line(tmp_path, message):
    """The stub fails at `run`, so it does not matter who has the default ports here."""
    failure = f'printf "{message}\\nSee --help\\n" >&2; exit 1'
    stub = f"case $1 in run) {failure} ;; container) exit 1 ;; esac"
    error = error_of(execute(fake_docker(tmp_path, stub)))
    assert ("9000 is taken" if "9000" in message else "container: No sockets. See --help") in error
    *_, started, removed = (tmp_path / "calls").read_text().splitlines()
    assert "--publish 127.0.0.1:8123:8123 --publish 127.0.0.1:9000:9000" in started
    assert removed.startswith("rm ")  # docker may have created it


def test_wrong_usage_is_one_line_and_does_nothing(tmp_path):
    env = fake_docker(tmp_path, "")
    result = execute(env, "--help")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    for name in ("HTTP_PORT", "NATIVE_PORT", "WAIT"):
        for value in ("many", "0", "-1"):
            assert value in error_of(execute(env | {f"CLICKHOUSE_{name}": value}))
    assert not (tmp_path / "calls").exists()


def test_shellcheck_finds_nothing():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([shutil.which("shellcheck", path=path), SCRIPT], check=True)


def test_a_checkout_on_windows_keeps_the_ends_of_lines(tmp_path):
    """Git for Windows asks for CRLF, with which docker.sh does not run under WSL."""
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@localhost"]
    origin = tmp_path / "origin"
    run(*git, "init", "--quiet", origin)
    for name in (".gitattributes", "docker.sh", "prsp-viewer.html"):
        shutil.copy(ROOT / name, origin)
    run(*git, "-C", origin, "add", ".")
    run(*git, "-C", origin, "commit", "--quiet", "--message=all")
    run(*git, "clone", "--quiet", origin, tmp_path / "clone")
    for name in ("docker.sh", "prsp-viewer.html"):
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes()
