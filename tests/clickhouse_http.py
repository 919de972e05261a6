"""ClickHouse's HTTP interface on top of chDB, in a process of its own: a server for the tests.

chDB is the ClickHouse engine as a library. This program puts the HTTP interface back in front of
it, so that clickhouse-connect and our scripts talk to it as to any server. Since it is a process, a
test can kill it with SIGKILL and start it again on the same path.

    python tests/clickhouse_http.py PATH [--port N] [--user NAME] [--password WORD] [--users JSON]

Tests use the class ClickHouseProcess at the end of this file.

Each request gets an engine connection of its own, which costs 0.2 ms. This keeps the settings of
one query from leaking into the next, and lets queries run side by side. There are no sessions and
no compression: the scripts ask for neither.
"""

import argparse
import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import escape

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

# URL parameters that speak to the HTTP interface; every other one is a setting of the engine.
NOT_SETTINGS = re.compile(
    "buffer_size|client_protocol_version|(de)?compress|database|default_format|query|query_id|role"
    "|session_id|session_timeout|wait_end_of_query"
)

# `INSERT INTO table (columns) SETTINGS ... FORMAT name`, after which the body is data, not SQL.
INSERT = re.compile(
    rb"\s*(INSERT\s+INTO\s+(?:TABLE\s+)?[^\s(]+\s*(?:\([^)]*\))?(?:\s*SETTINGS\s.*?)?)"
    rb"\s+FORMAT\s+(\w+)[ \t]*\n?",
    re.IGNORECASE | re.DOTALL,
)


class Failure(Exception):
    """An error as ClickHouse words it, with its code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def failure_from(error):
    """Turn what chDB raises into a Failure; the engine sometimes wraps its own text in itself."""
    text = str(error)
    found = re.search(r"(Code: (\d+)\. DB::Exception: )(?:\1)?(.*)", text, re.DOTALL)
    if not found:
        return Failure(1002, text)
    message = re.sub(r" \(version [\d.]+\)\. \([A-Z_]+\)$", "", found[3].strip())
    return Failure(int(found[2]), message)


def literal(text):
    """Write a text as a string of SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- The engine -----------------------------------------------------------------------------------
# chDB cannot keep users: it has no place to write them, and CREATE USER says so. It does read roles
# from a configuration file. So each of our users is a role, the engine's only user has no rights
# but these roles, and a request runs after SET ROLE with its user's role alone. The rights are then
# checked by the engine itself.


class Engine:
    """The chDB engine of this process, with its users."""

    def __init__(self, path, users):
        import chdb  # here, so that a test that imports ClickHouseProcess does not load the engine

        path.mkdir(parents=True, exist_ok=True)
        self.users = {name: {"settings": {}} | data for name, data in users.items()}
        self._connect, self._path = chdb.connect, str(path)
        # The engine lives as long as a connection is open, so this one stays open.
        self._keep = chdb.connect(f"{path}?config-file={self._write_config(path)}")
        version, self.timezone = (
            self._keep.query("SELECT version(), timezone()", "TSV").data().split()
        )
        self.version = f"{version} (official build)"

    def _write_config(self, path):
        def grants(texts):
            queries = "".join(f"<query>GRANT {escape(text)}</query>" for text in texts)
            return f"<grants>{queries}</grants>"

        roles = "".join(f"<{u}>{grants(d['grants'])}</{u}>" for u, d in self.users.items())
        (path / "users.xml").write_text(
            "<clickhouse><profiles><default/></profiles><quotas><default/></quotas>"
            "<users><default><password/><networks><ip>::/0</ip></networks>"
            f"<profile>default</profile><quota>default</quota>{grants(self.users)}</default></users>"
            f"<roles>{roles}</roles></clickhouse>"
        )
        config = path / "config.xml"
        users_config = escape(str(path / "users.xml"))
        config.write_text(f"<clickhouse><users_config>{users_config}</users_config></clickhouse>")
        return config

    def run(self, user, database, settings, sql, data, output_format):
        """Run one statement, in a worker thread; returns the result's bytes."""
        connection = self._connect(self._path)
        try:
            connection.query(f"SET ROLE `{user}`")
            # What chDB sets otherwise than a server does.
            own = {"implicit_select": 0, "allow_introspection_functions": 0}
            for group in (own | self.users[user]["settings"], settings):
                if group:
                    pairs = (f"{name} = {literal(str(value))}" for name, value in group.items())
                    connection.query("SET " + ", ".join(pairs))
            if database:
                connection.query("USE `" + database.replace("`", "\\`") + "`")
            with contextlib.ExitStack() as stack:
                if data is not None:
                    # By way of a file: chDB's own inserter does not tell when the data could be
                    # read and not be stored.
                    file = stack.enter_context(tempfile.NamedTemporaryFile())
                    file.write(data)
                    file.flush()
                    source = f" FROM INFILE '{file.name}' "
                    sql = re.sub(r"(?=SETTINGS\s|$)", source, sql, count=1)
                    sql = f"{sql} FORMAT {output_format}"
                return connection.query(sql, output_format).bytes()
        except Exception as error:
            failure = failure_from(error)
            # For the engine, whoever asks is its user `default`.
            text = re.sub(r"^default: ", f"{user}: ", str(failure))
            raise Failure(failure.code, text) from None
        finally:
            connection.close()


# --- The HTTP interface ---------------------------------------------------------------------------


class QueryHandler(RequestHandler):
    """One statement in, one result out, or an error in ClickHouse's own form."""

    def initialize(self, engine, workers):
        self.engine, self.workers = engine, workers

    def prepare(self):
        arguments = self.request.query_arguments
        self.urlparams = {name: values[-1].decode() for name, values in arguments.items()}
        self.set_header("X-ClickHouse-Timezone", self.engine.timezone)

    async def post(self):
        try:
            await self.answer(self.authenticate())
        except Failure as failure:
            self.set_status(500)
            self.set_header("Content-Type", "text/plain; charset=UTF-8")
            self.set_header("X-ClickHouse-Exception-Code", failure.code)
            version = self.engine.version
            self.finish(f"Code: {failure.code}. DB::Exception: {failure} (version {version})\n")
        except StreamClosedError:
            pass  # the client is gone, and nobody is left to be told

    def authenticate(self):
        """Return the user's name."""
        login = self.request.headers.get("Authorization", "").removeprefix("Basic ")
        user, _, password = b64decode(login).decode().partition(":")
        if self.engine.users.get(user, {}).get("password") != password:
            raise Failure(
                516,
                f"{user}: Authentication failed: password is incorrect, or there is no user with"
                " such name. (AUTHENTICATION_FAILED)",
            )
        return user

    def statement(self):
        """Split the request into SQL, the data that follows an INSERT (or None), and its format."""
        body = self.request.body
        # ClickHouse reads the query parameter and the body as one text.
        query = self.urlparams.get("query", "").encode()
        body = query + b"\n" + body if query and body else query + body
        insert = INSERT.match(body)
        if insert:
            return insert[1].decode(), body[insert.end() :], insert[2].decode()
        return body.decode(errors="replace"), None, None

    async def answer(self, user):
        """Have the engine run the statement, and send its result."""
        sql, data, output_format = self.statement()
        if data is None:
            output_format = (
                self.request.headers.get("X-ClickHouse-Format")
                or self.urlparams.get("default_format")
                or "TabSeparated"
            )
        settings = {n: v for n, v in self.urlparams.items() if not NOT_SETTINGS.fullmatch(n)}
        answer = await asyncio.get_running_loop().run_in_executor(
            *(self.workers, self.engine.run),
            *(user, self.urlparams.get("database"), settings, sql, data, output_format),
        )
        # As ClickHouse does, in chunks: the length of an answer is not known beforehand.
        self.set_header("Content-Type", "text/tab-separated-values; charset=UTF-8")
        for start in range(0, len(answer) or 1, 1 << 20):
            self.write(answer[start : start + (1 << 20)])
            await self.flush()
        await self.finish()


def make_app(engine, workers):
    """The routes, as a table."""
    parts = {"engine": engine, "workers": workers}
    return Application([(r"/", QueryHandler, parts)], log_function=lambda handler: None)


async def serve(path, port, users):
    """Serve until killed."""
    engine = Engine(path, users)
    workers = ThreadPoolExecutor(64)
    server = HTTPServer(
        make_app(engine, workers),
        max_body_size=1 << 30,
        max_buffer_size=1 << 30,
        idle_connection_timeout=10,  # ClickHouse's keep_alive_timeout
    )
    # Tornado's bind_sockets sets SO_REUSEADDR: a server that was killed gets its port back at once.
    sockets = bind_sockets(port, "127.0.0.1")
    server.add_sockets(sockets)
    print("ready", sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="where the engine keeps its data")
    parser.add_argument("--port", type=int, default=0, help="0 means any that is free")
    parser.add_argument("--user", default="admin", help="a user who may do everything")
    parser.add_argument("--password", default="admin1234")
    parser.add_argument(
        "--users",
        type=json.loads,
        default={},
        metavar="JSON",
        help="users with fewer rights: {name: {password, grants: [text after GRANT], settings}}",
    )
    args = parser.parse_args()
    admin = {"password": args.password, "grants": ["ALL ON *.* WITH GRANT OPTION"]}
    asyncio.run(serve(args.path.resolve(), args.port, {args.user: admin} | args.users))


# --- For the tests --------------------------------------------------------------------------------


class ClickHouseProcess:
    """A server process that a test starts, kills and starts again; it keeps its path and port.

    users: {"viewer": {"password": "...", "grants": ["SELECT ON test.*"], "settings": {}}}
    """

    user, password = "admin", "admin1234"

    def __init__(self, path, port=0, users=None):
        self.path, self.port, self.users = Path(path), port, users or {}
        self.process = None

    @property
    def dsn(self):
        """The admin's DSN, with the database `test`, which a test has to create first."""
        return self.dsn_of("test")

    def dsn_of(self, database="", user=None, password=None, port=None):
        """A DSN with another database (or none), another user, or the port of a proxy."""
        user, password = user or self.user, password or self.users.get(user, {}).get("password")
        login = f"{quote(user, safe='')}:{quote(password or self.password, safe='')}"
        return f"clickhouse://{login}@127.0.0.1:{port or self.port}/{database}"

    def start(self):
        """Start, and return as soon as it answers."""
        options = {"port": self.port, "user": self.user, "password": self.password}
        command = [sys.executable, __file__, str(self.path), "--users", json.dumps(self.users)]
        command += [f"--{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline().split()
        if line[:1] != ["ready"]:
            self.kill()
            raise RuntimeError("the ClickHouse server of the tests did not start")
        self.port = int(line[1])
        return self

    def kill(self):
        """End it as a crash would."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def pause(self):
        """Let it hang: connections open, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.kill()

    close = kill


if __name__ == "__main__":
    main()
