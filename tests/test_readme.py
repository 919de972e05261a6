"""What README.md says: its snippets stand in the files, and its commands do what it promises."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, Mirror, Script, Server, changed_server, wait_until

README = (ROOT / "README.md").read_text()


def marked(name):
    """The code between the marks <!-- name --> and <!-- /name -->, without its indentation."""
    [part] = re.findall(rf"<!-- {name} -->(.*?)<!-- /{name} -->", README, re.DOTALL)
    [(indentation, code)] = re.findall(r"( *)```\w+\n(.*?)\n *```", part, re.DOTALL)
    return "\n".join(line.removeprefix(indentation) for line in code.split("\n"))


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def statements(text):
    """The SQL statements of all ```sql blocks in a part of the README."""
    blocks = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    return [part.strip() for block in blocks for part in block.split(";") if part.strip()]


def test_snippets_stand_in_the_files():
    before_mirror = section("How it works").split("<!-- python mirror -->")[0]
    snippets = re.findall(r"```(python|js)\n(.*?)```", before_mirror, re.DOTALL)
    assert len(snippets) >= 2
    for language, code in snippets:
        name = "perspective_server.py" if language == "python" else "prsp-viewer.html"
        assert code in (ROOT / name).read_text(), f"not in {name}:\n{code}"


@pytest.mark.parametrize("script", ["producer.py", "perspective_server.py"])
def test_all_options_are_listed(script):
    result = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    )
    options = set(re.findall(r"--[a-z-]+", result.stdout)) - {"--help"}
    listed = set(re.findall(r"--[a-z-]+", section("Options")))
    assert options and options <= listed


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\((imgs/[\w.-]+)\)|`(tests?_?[\w/]+\.py)`", README):
        path = name[0] or name[1]
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path


def test_the_mirror_in_python_runs_as_it_stands(database, start, tmp_path):
    start(Script, "producer.py", "--dsn", database.dsn)
    server = start(Server, "--dsn", database.dsn)
    viewer = start(Mirror, server.url)
    wait_until(lambda: viewer.table("stock_values_tickers"), 20)
    code = marked("python mirror")
    assert "localhost:8080" in code
    program = tmp_path / "mirror.py"
    program.write_text(code.replace("localhost:8080", f"localhost:{server.port}"))
    running = start(Script, program)
    wait_until(lambda: running.output.count('"AAPL.N"') >= 3, 30, running.lines)
    assert "Traceback" not in running.output


def test_statements_for_tables_that_exist(database):
    """The ALTER for block numbers, the new table with index settings, and the TTL."""
    client = database.client
    client.command(f"CREATE DATABASE {database.name}")
    for table in ("trades", "stock_values"):
        client.command(
            f"CREATE TABLE {database.name}.{table} (timestamp DateTime64(3), id UInt64)"
            " ENGINE = MergeTree ORDER BY timestamp"
        )
    client.command(f"INSERT INTO {database.name}.trades SELECT now64(3), number FROM numbers(9)")
    ran = 0
    for sql in statements(section("Your own table")) + statements(section("Your own ClickHouse")):
        if "temperatures" not in sql and "viewer" not in sql:
            client.command(re.sub(r"\b(mydb|test)\.", f"{database.name}.", sql))
            ran += 1
    assert ran == 5
    assert client.command(f"SELECT count() FROM {database.name}.trades") == 9
    definition = client.command(f"SHOW CREATE TABLE {database.name}.trades")
    assert "with_block_number_offset" in definition
    assert "TTL" in client.command(f"SHOW CREATE TABLE {database.name}.stock_values")


def test_a_dashboard_of_ones_own(database, start, visit, tmp_path):
    """From CREATE TABLE to the picture, with the edits that the README gives."""
    client = database.client
    client.command(f"CREATE DATABASE {database.name}")
    client.command(marked("own table").replace("test.", f"{database.name}."))
    script = changed_server(tmp_path, {})
    replace(script, marked("own rollup"), "ROLLUPS = ", "\n\n\n")
    page = tmp_path / "prsp-viewer.html"
    panels, layout = marked("own panels").split("const layout")
    replace(page, panels, "const panels = ", "\n};\n")
    replace(page, "const layout" + layout, "const layout = ", "\n};\n")
    server = start(
        Server,
        *("--dsn", database.dsn, "--table", "temperatures"),
        script=script,
    )
    mirror = start(Mirror, server.url, "temperatures")
    client.command(
        f"INSERT INTO {database.name}.temperatures"
        " SELECT now64(3) - number * 10, concat('s', toString(number % 3)), 20 + number % 5"
        " FROM numbers(60)"
    )
    expected = client.command(
        f"SELECT uniqExact(sensor, toStartOfMinute(at)) FROM {database.name}.temperatures"
    )
    wait_until(lambda: len(mirror.table("temperatures_minutes")) == expected, 20)
    mirror.wait_for_rows(60)
    tab = visit(server.url, None)
    tab.wait_for_marks("minutes")


def replace(path, code, begin, end):
    """Replace a definition in a file, from `begin` to `end`."""
    text = path.read_text()
    at = text.index(begin)
    path.write_text(text[:at] + code + text[text.index(end, at) + len(end) - 1 :])
