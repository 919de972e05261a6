"""/history: what ClickHouse computes equals what Perspective computes over the same rows, and a
viewer reaches nothing but this one table."""

import asyncio
import contextlib
import random
import re
import time

import perspective
import pytest
from conftest import Database, Server, Viewer, wait_until

import perspective_server
import producer

HISTORY = "stock_values_history"
START = 1_790_000_000_000  # ms; in September 2026
FIRST, LAST = ["min by", ["timestamp"]], ["max by", ["timestamp"]]
# History's aggregates are ClickHouse's, under ClickHouse's names; these are Perspective's.
SAME_AGGREGATE = {
    "sum": "sum",
    "avg": "avg",
    "count": "count",
    "uniqExact": "distinct count",
    "min": "min",
    "max": "max",
    "first": FIRST,
    "last": LAST,
}
SAME_EXPRESSION = {
    "toStartOfMinute(timestamp)": "bucket(\"timestamp\", '1m')",
    "toStartOfHour(timestamp)": "bucket(\"timestamp\", '1h')",
    "toStartOfDay(timestamp)": 'datetime(bucket(float("timestamp"), 86400000))',
    '"close" * 2': '"close" * 2',
    '"high" - "low"': '"high" - "low"',
    "lower(ticker)": 'lower("ticker")',
}


@pytest.fixture(scope="module")
def ticks(clickhouse):
    """A database with 20,000 ticks over three days, no two in the same millisecond."""
    database = Database(clickhouse)
    market = producer.Market(7)
    with contextlib.closing(database.connect()) as client:
        producer.create_table(client, database.name)
        for batch in range(20):
            columns = market.draw(1000, START + batch * 13_000_000, 12_000_000)
            times = START + batch * 13_000_000
            columns[0] = [times + 12_000 * number + number % 7 for number in range(1000)]
            columns[8] = [ms // producer.DAY_MS for ms in columns[0]]
            client.insert(
                producer.TABLE,
                columns,
                database=database.name,
                column_names=list(producer.COLUMNS),
                column_type_names=list(producer.COLUMNS.values()),
                column_oriented=True,
            )
    yield database
    database.command(f"DROP DATABASE {database.name}")


@pytest.fixture(scope="module")
def server(ticks):
    server = Server("--dsn", ticks.dsn)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def history(server):
    with Viewer(server.url, "/history") as viewer:
        yield viewer


@pytest.fixture(scope="module")
def memory(ticks):
    """The same rows in a Perspective table of this process."""
    with contextlib.closing(ticks.connect()) as client:
        arrow = client.raw_query(
            f"SELECT {', '.join(producer.COLUMNS)} FROM {ticks.name}.stock_values"
            " ORDER BY timestamp",
            fmt="ArrowStream",
            settings=perspective_server.ARROW,
        )
    return perspective.Server().new_local_client().table(arrow)


def ask(viewer, config, read="to_columns", *positional, **arguments):
    """Make a view of the history, read it, delete it."""

    async def run():
        table = await viewer.client.open_table(HISTORY)
        view = await table.view(**config)
        try:
            return await getattr(view, read)(*positional, **arguments)
        finally:
            await view.delete()

    return viewer.run(run())


def in_memory(memory, config):
    config = dict(config)
    config["expressions"] = {
        name: SAME_EXPRESSION[text] for name, text in config.get("expressions", {}).items()
    }
    config["aggregates"] = {
        name: SAME_AGGREGATE[aggregate] for name, aggregate in config.get("aggregates", {}).items()
    }
    view = memory.view(**config)
    try:
        return view.to_columns()
    finally:
        view.delete()


def agree(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if any(isinstance(value, float) for value in values):
            assert found[name] == pytest.approx(values, rel=1e-9, nan_ok=True), name
        else:
            assert found[name] == values, name


HOUR = {"hour": "toStartOfHour(timestamp)"}
BY_HAND = [
    {"columns": ["timestamp", "ticker", "client", "open", "volume", "date"]},
    {"columns": ["ticker"], "filter": [["ticker", "==", "AAPL.N"]]},
    {"columns": ["ticker", "close"], "filter": [["ticker", "!=", "AAPL.N"]]},
    {"columns": ["close"], "filter": [["close", ">", 100], ["close", "<=", 200.5]]},
    {"columns": ["close"], "filter": [["close", "<", 50], ["close", ">=", 400]], "filter_op": "or"},
    {"columns": ["ticker"], "filter": [["ticker", "in", ["TLT.N", "FB.N"]]]},
    {"columns": ["ticker"], "filter": [["ticker", "not in", ["TLT.N", "FB.N"]]]},
    {"columns": ["client"], "filter": [["client", "begins with", "M"]]},
    {"columns": ["client"], "filter": [["client", "ends with", "y"]]},
    {"columns": ["client"], "filter": [["client", "contains", "gg"]]},
    {"columns": ["client"], "filter": [["client", "is not null", None]]},
    {"columns": ["volume"], "filter": [["date", "==", "2026-09-22"]]},
    {"columns": ["timestamp"], "filter": [["timestamp", ">=", START + 50_000_000]]},
    {"columns": ["timestamp", "volume"], "sort": [["volume", "desc"], ["timestamp", "asc"]]},
    {"columns": ["ticker"], "sort": [["timestamp", "desc"]]},
    {"columns": ["spread", "hour"], "expressions": {"spread": '"high" - "low"', **HOUR}},
    {"columns": ["volume"], "group_by": ["ticker"]},
    {"columns": ["volume"], "group_by": ["ticker"], "sort": [["volume", "desc"]]},
    {"columns": ["volume"], "group_by": ["ticker", "client"], "sort": [["volume", "desc"]]},
    {"columns": ["volume"], "group_by": ["ticker", "client"], "group_rollup_mode": "flat"},
    {"columns": ["volume"], "group_by": ["ticker", "client"], "group_rollup_mode": "total"},
    {"columns": ["volume", "ticker"], "group_by": ["date", "ticker", "client"]},
    {"columns": ["volume"], "group_by": ["ticker", "client"], "group_by_depth": 1},
    {
        "columns": ["volume", "close"],
        "group_by": ["hour"],
        "expressions": HOUR,
        "aggregates": {"close": "last"},
    },
    {
        "columns": ["open", "high", "low", "close"],
        "group_by": ["minute"],
        "expressions": {"minute": "toStartOfMinute(timestamp)"},
        "aggregates": {"open": "first", "high": "max", "low": "min", "close": "last"},
        "filter": [["ticker", "==", "NVDA.N"]],
    },
    {
        "columns": ["close", "timestamp", "client"],
        "group_by": ["ticker"],
        "aggregates": {"close": "avg", "timestamp": "max", "client": "uniqExact"},
    },
]


def draw(chance):
    """A configuration at random."""
    config = {"columns": chance.sample(["volume", "close", "high", "low", "ticker", "client"], 3)}
    groups = chance.sample(["ticker", "client", "date", "hour", "day"], chance.randint(0, 3))
    config["expressions"] = {
        "hour": "toStartOfHour(timestamp)",
        "day": "toStartOfDay(timestamp)",
        "twice": '"close" * 2',
    }
    config["columns"] += chance.sample(["twice"], chance.randint(0, 1))
    numbers = ["sum", "avg", "count", "min", "max", "first", "last", "uniqExact"]
    config["aggregates"] = {
        name: chance.choice(["count", "uniqExact", "first", "last"])
        if name in ("ticker", "client")
        else chance.choice(numbers)
        for name in config["columns"]
    }
    if groups:
        config["group_by"] = groups
        config["group_rollup_mode"] = chance.choice(["rollup", "rollup", "flat", "total"])
    filters = [
        ["ticker", "!=", "YY.N"],
        ["client", "in", ["Homer", "Lisa", "Moe"]],
        ["volume", ">", 3000],
        ["close", "<", 300],
        ["timestamp", "<", START + 100_000_000],
        ["client", "contains", "a"],
    ]
    config["filter"] = chance.sample(filters, chance.randint(0, 2))
    # In memory, != counts as true for all rows in a filter of alternatives; see the test with SQL.
    equal = ["ticker", "!=", "YY.N"] not in config["filter"]
    config["filter_op"] = chance.choice(["and", "or"]) if equal else "and"
    if "volume" in config["columns"] and chance.random() < 0.6:
        config["aggregates"]["volume"] = "sum"  # no two groups have the same
        # Rows of the same volume have no order among themselves, so time decides.
        config["sort"] = [["volume", chance.choice(["asc", "desc"])]]
        if not groups:
            config["sort"].append(["timestamp", "asc"])
    return config


@pytest.mark.parametrize("config", BY_HAND, ids=str)
def test_equals_perspective(history, memory, config):
    found = ask(history, config)
    expected = in_memory(memory, config)
    assert len(next(iter(expected.values()))) > 0
    agree(found, expected)


@pytest.mark.parametrize("seed", range(40))
def test_equals_perspective_at_random(history, memory, seed):
    config = draw(random.Random(seed))
    agree(ask(history, config), in_memory(memory, config))


def test_first_and_last_go_by_arrival_within_a_millisecond(clickhouse, start):
    database = Database(clickhouse)
    with contextlib.closing(database.connect()) as client:
        producer.create_table(client, database.name)
        for price in (3, 1, 2):  # three blocks, all in one millisecond
            client.command(
                f"INSERT INTO {database.name}.stock_values (timestamp, ticker, close)"
                f" SELECT fromUnixTimestamp64Milli(toInt64({START})), 'A', {price} + number / 10"
                " FROM numbers(3)"
            )
    server = start(Server, "--dsn", database.dsn)
    viewer = start(Viewer, server.url, "/history")
    for aggregate, price in (("first", 3.0), ("last", 2.2)):
        config = {"columns": ["close"], "group_by": ["ticker"], "aggregates": {"close": aggregate}}
        assert ask(viewer, config)["close"] == pytest.approx([price, price])
    database.command(f"DROP DATABASE {database.name}")


@pytest.mark.parametrize(
    ("aggregate", "sql"),
    [
        ("median", "quantileExactInclusive(0.5)(close)"),
        ("stddevPop", "stddevPop(toFloat64(close))"),
        ("varPop", "varPop(toFloat64(close))"),
    ],
)
def test_equals_sql(history, ticks, aggregate, sql):
    """Where the two engines define a thing differently, SQL by hand is the measure."""
    config = {"columns": ["close"], "group_by": ["ticker"], "aggregates": {"close": aggregate}}
    found = ask(history, config)
    with contextlib.closing(ticks.connect()) as client:
        expected = client.query(
            f"SELECT ticker, {sql} FROM {ticks.name}.stock_values GROUP BY ROLLUP(ticker)"
            " ORDER BY ticker"
        ).result_rows
    assert found["__ROW_PATH__"] == [[name] if name else [] for name, _ in expected]
    assert found["close"] == pytest.approx([value for _, value in expected])


def test_alternatives_equal_sql(history, ticks):
    filters = [["ticker", "!=", "YY.N"], ["volume", ">", 10_000]]
    config = {"columns": ["volume"], "filter": filters, "filter_op": "or"}
    expected = ticks.command(
        "SELECT count() FROM stock_values WHERE ticker != 'YY.N' OR volume > 10000"
    )
    assert ask(history, config, "num_rows") == expected < 20_000


@pytest.mark.parametrize("kind", ["float", "string", "datetime", "date"])
def test_all_that_is_offered_works(history, kind):
    """Each aggregate and each filter that the viewer offers for a type is one that answers."""
    column = {"float": "close", "string": "ticker", "datetime": "timestamp", "date": "date"}[kind]
    value = {"float": 100.5, "string": "AAPL.N", "datetime": START, "date": "2026-09-22"}[kind]
    features = perspective_server.History(None).get_features()
    for aggregate in features["aggregates"][kind]:
        config = {"columns": [column], "group_by": ["client"], "aggregates": {column: aggregate}}
        assert len(ask(history, config)[column]) == 10, aggregate
    for operator in features["filter_ops"][kind]:
        config = {"columns": [column], "filter": [[column, operator, value]]}
        ask(history, config, end_row=5)


@pytest.mark.parametrize("function", perspective_server.FUNCTIONS.split())
def test_each_function_on_offer_works(history, function):
    arguments = {
        "coalesce": "close, 1",
        "concat": "ticker, client",
        "dateDiff": "'second', timestamp, timestamp",
        "empty": "ticker",
        "endsWith": "ticker, 'N'",
        "greatest": "open, close",
        "if": "close > open, 1, 0",
        "least": "open, close",
        "length": "ticker",
        "lower": "ticker",
        "position": "ticker, 'A'",
        "pow": "close, 2",
        "replaceAll": "ticker, 'A', 'B'",
        "reverse": "ticker",
        "startsWith": "ticker, 'A'",
        "substring": "ticker, 1, 2",
        "upper": "ticker",
        "toStartOfInterval": "timestamp, toIntervalMinute(5)",
    }.get(function)
    if function.startswith("toInterval"):
        text = f"toStartOfInterval(timestamp, {function}(2))"
    elif arguments is None and function.startswith("to") and function not in ("toFloat64",):
        text = f"{function}({'close' if function in ('toInt32', 'toString') else 'timestamp'})"
    else:
        text = f"{function}({arguments or 'close'})"
    config = {"columns": ["e"], "expressions": {"e": text}}
    assert ask(history, config, end_row=3)["e"][0] is not None


def test_times_and_dates_to_the_millisecond(history, ticks):
    config = {"columns": ["timestamp", "date"], "sort": [["timestamp", "asc"]]}
    found = ask(history, config, end_row=100)
    with contextlib.closing(ticks.connect()) as client:
        rows = client.query(
            "SELECT toUnixTimestamp64Milli(timestamp), toUnixTimestamp(toDateTime(date, 'UTC'))"
            f" FROM {ticks.name}.stock_values ORDER BY timestamp LIMIT 100"
        ).result_rows
    assert found["timestamp"] == [ms for ms, _ in rows]
    assert found["date"] == [seconds * 1000 for _, seconds in rows]
    assert any(ms % 1000 for ms in found["timestamp"])


def test_pages_exports_and_extremes(history, memory):
    config = {"columns": ["timestamp", "volume"]}
    page = ask(history, config, start_row=1000, end_row=1010)
    assert (
        page["volume"] == memory.view(**config).to_columns(start_row=1000, end_row=1010)["volume"]
    )
    assert ask(history, config, "num_rows") == 20_000
    assert ask(history, config, "to_csv", end_row=2).startswith("timestamp,volume")
    extremes = memory.view(**config).get_min_max("volume")
    assert ask(history, config, "get_min_max", "volume") == extremes
    grouped = {"columns": ["volume"], "group_by": ["ticker"]}
    assert ask(history, grouped, "num_rows") == 14
    extremes = memory.view(**grouped).get_min_max("volume")
    assert ask(history, grouped, "get_min_max", "volume") == extremes
    assert ask(history, grouped, "to_columns", start_row=1, end_row=3)["__ROW_PATH__"] == [
        ["AAPL.N"],
        ["AMZN.N"],
    ]
    assert "AAPL.N" in ask(history, grouped, "to_csv")


# ---------------------------------------------------------------------------------------------
# Attacks. An expression is SQL that a viewer wrote; so are, to a lesser degree, names and values.

ATTACKS = {
    "(SELECT count() FROM system.tables)": "no column SELECT",
    "(select password from system.users limit 1)": "no column select",
    "close FROM system.tables --": "no column FROM",
    "file('/etc/passwd')": "file is none of",
    "url('http://127.0.0.1/', 'CSV')": "url is none of",
    "remote('127.0.0.1', system.one)": "remote is none of",
    "s3('x')": "s3 is none of",
    "executable('x', 'CSV', 'a Int8')": "executable is none of",
    "system.one": "no column system",
    "t.close": "no column t",
    "sleep(3)": "sleep is none of",
    "sleepEachRow(1)": "sleepEachRow is none of",
    "throwIf(1)": "throwIf is none of",
    "arrayJoin(range(1000000))": "arrayJoin is none of",
    "repeat('x', 1000000000)": "loops|repeat is none of",
    "currentUser()": "currentUser is none of",
    "getSetting('max_threads')": "getSetting is none of",
    "dictGet('d', 'a', 1)": "dictGet is none of",
    "joinGet('j', 'a', 1)": "joinGet is none of",
    "version()": "version is none of",
    "_part": "not understood",
    "close SETTINGS max_execution_time=0": "no column SETTINGS",
    "close; DROP TABLE stock_values": "not understood",
    "close) FROM t; INSERT INTO stock_values VALUES (": "no column FROM",
    "close /* a comment */": "no column a",
    "close -- a comment": "no column a",
    "'it''s' || \\'": "not understood",
    "'\\' || (SELECT 1) || '": "not understood",
    '"close` FROM system.one"': "no column close` FROM",
    "`close`": "not understood",
    "{x:String}": "not understood",
    "close :: String": "not understood",
    "x -> x": "no column x",
    "[1, 2]": "not understood",
    "close @ 1": "not understood",
    "$$x$$": "not understood",
    "WITH RECURSIVE x AS (SELECT 1) SELECT 1": "no column WITH",
    "lambda(x)": "lambda is none of",
    "": "Syntax error",
    "(((": "Syntax error",
    "close +": "Syntax error",
    "if(": "Syntax error",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_expression_reaches_nothing_but_the_columns(history, ticks, attack):
    before = ticks.count()
    with pytest.raises(perspective.PerspectiveError) as error:
        ask(history, {"columns": ["e"], "expressions": {"e": attack}})
    assert re.search(ATTACKS[attack], str(error.value))
    assert "Traceback" not in str(error.value)

    async def validate():
        table = await history.client.open_table(HISTORY)
        return await table.validate_expressions({"e": attack})

    said = history.run(validate())["errors"]["e"]["error_message"]
    assert re.search(ATTACKS[attack], said)
    assert ticks.count() == before


@pytest.mark.parametrize(
    "config",
    [
        {"columns": ["nope"]},
        {"columns": ["close`, (SELECT 1) AS `x"]},
        {"columns": ["close"], "group_by": ["(SELECT 1)"]},
        {"columns": ["close"], "sort": [["close; DROP TABLE x", "desc"]]},
        {"columns": ["close"], "filter": [["1=1 OR ticker", "==", "x"]]},
        {"columns": ["close"], "filter": [["ticker", "== '' OR 1=1 --", "x"]]},
        {"columns": ["close"], "filter": [["close", ">", "1 OR 1=1"]]},
        {"columns": ["close"], "group_by": ["ticker"], "aggregates": {"close": "sum(1) --"}},
        {"columns": ["close"], "group_by": ["ticker"], "aggregates": {"close": "groupArray"}},
    ],
    ids=str,
)
def test_names_and_operators_are_no_way_in(history, config):
    with pytest.raises(perspective.PerspectiveError) as error:
        ask(history, config)
    assert "Traceback" not in str(error.value)
    assert "Code:" not in str(error.value), "it should not have come as far as ClickHouse"


def test_values_are_values(history):
    for text in ("' OR 1=1 --", "\\' OR 1=1 --", "{x:String}", "%s", "x'; DROP TABLE y; --", "\0"):
        for operator in ("==", "begins with", "LIKE", "contains"):
            config = {"columns": ["ticker"], "filter": [["ticker", operator, text]]}
            assert ask(history, config)["ticker"] == []
    name = "a`b\\c'd\"e"
    config = {"columns": [name], "expressions": {name: "close * 2"}, "filter": [[name, ">", 0]]}
    assert len(ask(history, config, end_row=3)[name]) == 3


def test_writing_is_refused(history, server):
    async def write(table, what):
        await getattr(table, what[0])(*what[1:])

    table = history.table(HISTORY)
    for what in (("update", [{"close": 1}]), ("replace", [{"close": 1}]), ("clear",), ("delete",)):
        with pytest.raises(perspective.PerspectiveError, match="read-only"):
            history.run(write(table, what))
    assert history.run(table.size()) == 20_000


# ---------------------------------------------------------------------------------------------
# No harm to the stream, and none to ClickHouse.

BUSY = " + ".join(
    f"length(replaceAll(toString(close + volume * {n}), '1', '22'))" for n in range(9)
)


@pytest.fixture
def many(request, database):
    """Millions of rows, a millisecond apart, made by ClickHouse itself."""
    with contextlib.closing(database.connect()) as client:
        producer.create_table(client, database.name)
        client.command(
            f"INSERT INTO {database.name}.stock_values"
            " SELECT fromUnixTimestamp64Milli(toUnixTimestamp64Milli(now64(3)) - toInt64(number)),"
            " toString(number % 13), toString(number % 9),"
            f" 1, 1, 1, 1, number % 100, today() FROM numbers({request.param})"
        )
    return database


def running(database):
    sql = "SELECT count() FROM system.processes WHERE query LIKE '%/* history-%' AND query NOT LIKE"
    return int(database.command(f"{sql} '%system.processes%'"))


@pytest.mark.parametrize("many", [1_000_000], indirect=True)
def test_too_much_is_refused_with_a_reason(many, start):
    server = start(Server, "--dsn", many.dsn)
    viewer = start(Viewer, server.url, "/history")
    with pytest.raises(perspective.PerspectiveError, match="more than 100,000 rows"):
        ask(viewer, {"columns": ["close"]})
    with pytest.raises(perspective.PerspectiveError, match="100,000 rows|too many rows"):
        ask(viewer, {"columns": ["close"], "group_by": ["timestamp"]})
    assert ask(viewer, {"columns": ["close"]}, end_row=10)["close"] == [1.0] * 10


@pytest.mark.parametrize("many", [20_000_000], indirect=True)
def test_the_stream_keeps_its_rhythm_and_leaving_cancels(many, start):
    server = start(Server, "--dsn", many.dsn)
    server.wait_for_rows(100_000)
    slow = {"columns": ["close"], "group_by": ["e"], "expressions": {"e": BUSY}}
    viewers = [start(Viewer, server.url, "/history") for _ in range(3)]

    async def begin(viewer):
        table = await viewer.client.open_table(HISTORY)
        return await table.view(**slow)

    for viewer in viewers:
        asyncio.run_coroutine_threadsafe(begin(viewer), viewer.loop)
    wait_until(lambda: running(many) == 1, what="asked once, for three viewers")
    worst = 0
    for _ in range(3):
        delivered = server.health()["delivered"]
        many.command("INSERT INTO stock_values (timestamp, ticker) VALUES (now64(3), 'A')")
        began = time.monotonic()
        wait_until(lambda d=delivered: server.health()["delivered"] > d)
        worst = max(worst, time.monotonic() - began)
    assert worst < 1
    assert running(many) == 1, "it should take longer, to show what follows"
    viewers[0].close()
    assert running(many) == 1, "others still wait for it"
    for viewer in viewers[1:]:
        viewer.close()
    wait_until(lambda: running(many) == 0, what="cancelled")


@pytest.mark.parametrize("many", [20_000_000], indirect=True)
def test_a_query_under_way_does_not_hold_up_the_end(many, start):
    server = start(Server, "--dsn", many.dsn)
    server.wait_for_rows(100_000)
    viewer = start(Viewer, server.url, "/history")
    slow = {"columns": ["close"], "group_by": ["e"], "expressions": {"e": BUSY}}

    async def begin():
        table = await viewer.client.open_table(HISTORY)
        return await table.view(**slow)

    asyncio.run_coroutine_threadsafe(begin(), viewer.loop)
    wait_until(lambda: running(many) == 1)
    assert server.stop(seconds=3) == 0
    assert "Traceback" not in server.output
    wait_until(lambda: running(many) == 0, what="cancelled")
