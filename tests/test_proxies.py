"""What README.md says of a reverse proxy in front of the server, with Debian's nginx."""

import os
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request

import pytest
from conftest import Server, free_port, wait_until
from test_readme import adapted, arguments, marked

# Around the README's configuration: everything is in one folder.
MAIN = """
{user}
daemon off;
pid nginx.pid;
error_log errors;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {server}
}}
"""
PASSWORD = "the password"


@pytest.fixture
def nginx(tmp_path):
    """Starts nginx with a `server` block, and a certificate and a user as in the README."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        end = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        end("no nginx")
    certificate = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command = f"{certificate} -subj /CN=localhost -out ticks.pem -keyout ticks.key"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    assert PASSWORD in marked("users")
    users = subprocess.run(
        ["bash", "-c", marked("users")], check=True, capture_output=True, text=True
    )
    (tmp_path / "ticks.users").write_text(users.stdout)
    started = []

    def begin(server):
        user = "user root;" if os.getuid() == 0 else ""  # who may read the folder
        server = server.replace("/etc/nginx", str(tmp_path))
        (tmp_path / "nginx.conf").write_text(MAIN.format(user=user, server=server))
        command = [program, "-p", tmp_path, "-e", "errors", "-c", "nginx.conf"]
        started.append(subprocess.Popen(command))

    yield begin
    for process in started:
        process.terminate()
        process.wait()


def status(url):
    """The status of an answer over TLS without a password; None if there is none yet."""
    try:
        return urllib.request.urlopen(url, context=ssl._create_unverified_context()).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.mark.parametrize(
    ("changes", "allowed", "works"),
    [
        ({}, True, True),
        ({"location / {": "location /ticks/ {", "8080;": "8080/;"}, True, True),
        ({"proxy_set_header Upgrade $http_upgrade;": ""}, True, False),
        ({"proxy_set_header Host $http_host;": ""}, False, False),
    ],
    ids=["right", "under a path", "without Upgrade", "without --allow-origin"],
)
def test_a_page_behind_nginx(nginx, start, visit, site, changes, allowed, works):
    """The page is live with TLS and a password; where the websocket is refused, it says so."""
    port = free_port()
    origin = f"https://localhost:{port}"
    option, example = arguments("team", "perspective_server.py")
    server = start(Server, *site.options, *([option, origin] if allowed else []))
    host = example.removeprefix("https://")
    ours = {host: "localhost", "443": f"127.0.0.1:{port}", "8080": server.port}
    nginx(adapted(marked("nginx"), changes | ours))
    url = origin + ("/" if "location / {" not in changes else "/ticks/")
    wait_until(lambda: status(url) == 401)
    login = {"username": "team", "password": PASSWORD}
    tab = visit(url, "live" if works else None, ignore_https_errors=True, http_credentials=login)
    if not works:
        tab.forgiven = "WebSocket connection to"
        tab.wait_for_notice("proxy")
        tab.wait_for_notice(f"{option} {origin}")
    if not allowed:  # what to add is also in the log
        server.wait_for(f"{option} {origin}")
