"""What README.md says: its code and its commands run as they stand, and what it names exists."""

import json
import re
import shlex
import signal
from pathlib import Path

from conftest import ROOT, Connection, Mirror, Script, Server, changed_server, free_port, wait_until

README = (ROOT / "README.md").read_text()
PAGE = "prsp-viewer.html"


def marked(name):
    """The code between the marks <!-- name --> and <!-- /name -->, without its indentation."""
    [part] = re.findall(rf"<!-- {name} -->(.*?)<!-- /{name} -->", README, re.DOTALL)
    [(indentation, code)] = re.findall(r"( *)```\w+\n(.*?)\n *```", part, re.DOTALL)
    return "\n".join(line.removeprefix(indentation) for line in code.split("\n"))


def arguments(name, script):
    """The arguments of a script in a command of the README."""
    [line] = [line for line in marked(name).split("\n") if script in line]
    return shlex.split(line.split(script)[1])


def adapted(code, changes):
    """Code with names of the README's examples replaced: {old: new}."""
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, str(new))
    return code


def test_what_the_readme_names_exists():
    for path in re.findall(r"\b(?:imgs|tests)/[\w.-]+\w", README):
        assert (ROOT / path).exists(), path
    scripts = "".join((ROOT / name).read_text() for name in ["perspective_server.py", PAGE])
    table = README.split("| read and copy |")[1].split("\n\n")[0]
    names = re.findall(r"(\w+)`", "".join(line.split("|")[-2] for line in table.split("\n")[2:]))
    assert len(names) > 10
    for name in names:
        assert re.search(rf"\b(class|def|function) {name}\b|^{name} = ", scripts, re.M), name


def test_the_commands(start, database):
    """Quick start, Docker, an own DSN: the scripts run, and /healthz answers as the README says."""
    embedded = start(Server, *arguments("quick start", "perspective_server.py"))
    env = {marked("dsn").split()[1].split("=")[0]: database.dsn}
    start(Script, "producer.py", *arguments("docker", "producer.py"), env=env)
    server = start(Server, *arguments("docker", "perspective_server.py"), env=env)
    for each in (embedded, server):
        each.wait_for_delivered(250)
    assert server.health().keys() == json.loads(marked("healthz")).keys()
    folder = Path(re.search(r"chdb://(/\S+)", embedded.output)[1])
    assert folder.name.startswith("clickhouse-") and folder.exists()
    assert embedded.stop(signal.SIGINT) == 0 and not folder.exists()


def test_the_idea_runs_as_it_stands(database, start, visit, tmp_path, monkeypatch):
    """With stock clients: Perspective's in Python, and the page in a browser."""
    start(Script, "producer.py", "--dsn", database.dsn)
    wait_until(lambda: database.client.command(f"EXISTS {database.name}.stock_values"))
    port = free_port()
    dsn = "clickhouse://admin:admin1234@localhost:8123/test"
    ours = {dsn: database.dsn, "'test'": f"'{database.name}'", "8080": port}
    (tmp_path / "idea.py").write_text(adapted(marked("idea.py"), ours))
    (tmp_path / "idea.html").write_text(marked("idea.html"))
    monkeypatch.chdir(tmp_path)
    start(Script, tmp_path / "idea.py")
    url = f"http://localhost:{port}"
    viewer = wait_until(lambda: connected(start, url))
    table = viewer.table()
    before = viewer.run(table.size())
    wait_until(lambda: viewer.run(table.size()) > before)
    tab = visit(url, None)
    cells = tab.page.locator("regular-table td")
    tab.page.wait_for_selector("regular-table td")
    shown = wait_until(lambda: cells.all_inner_texts())
    wait_until(lambda: cells.all_inner_texts() != shown)


def connected(start, url):
    try:
        return start(Connection, url)
    except OSError:
        return None


def test_the_mirror_in_python_runs_as_it_stands(database, start, tmp_path):
    start(Script, "producer.py", "--dsn", database.dsn)
    server = start(Server, "--dsn", database.dsn)
    viewer = start(Mirror, server.url)
    wait_until(lambda: viewer.table("stock_values_tickers"), lambda: server.output)
    program = tmp_path / "mirror.py"
    program.write_text(adapted(marked("python mirror"), {"8080": server.port}))
    running = start(Script, program)
    wait_until(lambda: running.output.count('"AAPL.N"') >= 3, running.lines)
    assert "Traceback" not in running.output


def test_statements_for_tables_that_exist(database, start):
    """The ALTER for block numbers, after which the server follows the table, and the TTL."""
    client = database.client
    client.command(f"CREATE DATABASE {database.name}")
    for table in ("trades", "stock_values"):
        client.command(
            f"CREATE TABLE {database.name}.{table} (timestamp DateTime64(3), id UInt64)"
            " ENGINE = MergeTree ORDER BY timestamp"
        )
    options = arguments("own server", "perspective_server.py")
    assert options[0] == "--dsn"
    server = start(Server, "--dsn", database.dsn, *options[2:])
    statements = re.findall(r"```sql\n(ALTER TABLE .*?)\n```", README, re.DOTALL)
    assert len(statements) == 2
    server.wait_for(statements[0].split("\n")[1])  # the message gives the same statement
    for sql in statements:
        client.command(re.sub(r"\b(mydb|test)\.", f"{database.name}.", sql))
    client.command(f"INSERT INTO {database.name}.trades SELECT now64(3), number FROM numbers(9)")
    server.wait_for_delivered(9)
    assert "TTL" in client.command(f"SHOW CREATE TABLE {database.name}.stock_values")


def test_a_rollup_and_a_panel_of_ones_own(database, start, visit, tmp_path):
    """From CREATE TABLE to the picture, with the edits that the README gives."""
    client = database.client
    client.command(f"CREATE DATABASE {database.name}")
    for statement in adapted(marked("own table"), {"test.": f"{database.name}."}).split(";"):
        client.command(statement)
    script = changed_server(tmp_path, {})
    replace(script, r"ROLLUPS = \[.*?\nROLLUP_COLUMNS = [^\n]*", marked("own rollup"))
    panels = marked("own panels")
    replace(tmp_path / PAGE, r"(async )?function dashboard\(\) \{.*?\n\}", panels)
    server = start(Server, "--dsn", database.dsn, "--table", "temperatures", script=script)
    mirror = start(Mirror, server.url, "temperatures")
    expected = client.command(
        f"SELECT uniqExact(sensor, toStartOfMinute(at)) FROM {database.name}.temperatures"
    )
    wait_until(lambda: len(mirror.table("temperatures_minutes")) == expected)
    mirror.wait_for_rows(600)
    visit(server.url, None).wait_for_marks("minutes")


def replace(path, pattern, code):
    """Replace what a pattern finds first in a file."""
    string, count = re.subn(pattern, lambda _: code, path.read_text(), count=1, flags=re.DOTALL)
    assert count
    path.write_text(string)
