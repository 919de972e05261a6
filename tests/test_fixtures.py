"""Do the fixtures do what they promise? The other tests stand on these two."""

import socket
import threading
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import clickhouse_connect
import numpy as np
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError
from clickhouse_http import ClickHouseProcess
from proxy import Proxy, is_insert

VIEWER = {"password": "look", "grants": ["SELECT ON test.t"], "settings": {"readonly": 2}}
COLUMNS = ["timestamp", "ticker", "price", "volume"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ClickHouseProcess(tmp_path_factory.mktemp("engine"), users={"viewer": VIEWER}) as process:
        connect(process.dsn_of()).command("CREATE DATABASE test")
        yield process


@pytest.fixture
def client(server):
    client = connect(server.dsn)
    client.command(
        "CREATE OR REPLACE TABLE t (timestamp DateTime64(3, 'UTC'), ticker LowCardinality(String),"
        " price Float32, volume UInt32) ENGINE = MergeTree ORDER BY timestamp"
        " SETTINGS non_replicated_deduplication_window = 100"
    )
    return client


@pytest.fixture
def proxy(server):
    with Proxy(server.port) as proxy:
        yield proxy
    assert "proxy" not in [thread.name for thread in threading.enumerate()]


def connect(dsn, **options):
    """A client with a pool of connections of its own, so that no test inherits open ones."""
    return clickhouse_connect.get_client(
        dsn=dsn, pool_mgr=clickhouse_connect.driver.httputil.get_pool_manager(), **options
    )


def insert(client, count=1000, token=None):
    """Insert some rows, and return their columns."""
    columns = [
        [1_700_000_000_000 + i for i in range(count)],
        np.array(["AAPL", "GOOG"] * (count // 2), dtype=object),
        np.arange(count, dtype=np.float32),
        np.arange(count, dtype=np.uint32),
    ]
    settings = {"insert_deduplication_token": token} if token else {}
    client.insert("t", columns, column_names=COLUMNS, column_oriented=True, settings=settings)
    return columns


def rows(client):
    return client.command("SELECT count() FROM t")


# --- The server -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, "lz4", "zstd", "gzip", False])
def test_inserted_rows_come_back(server, client, compress):
    client = connect(server.dsn, compress=compress)
    sent = insert(client)
    query = "SELECT toUnixTimestamp64Milli(timestamp), ticker, price, volume FROM t ORDER BY volume"
    assert client.query(query).result_columns == [list(column) for column in sent]


def test_arrow_stream_with_settings(client):
    pyarrow = pytest.importorskip("pyarrow")
    insert(client)
    for setting in (0, 1):
        stream = client.raw_query(
            "SELECT * FROM t",
            fmt="ArrowStream",
            settings={"output_format_arrow_low_cardinality_as_dictionary": setting},
        )
        table = pyarrow.ipc.open_stream(stream).read_all()
        assert table.num_rows == 1000
        assert pyarrow.types.is_dictionary(table.schema.field("ticker").type) == bool(setting)


def test_parameters(client):
    values = {"text": "it's\na \\ tab\t", "number": 7, "long": "x" * 20000}
    query = "SELECT {text:String}, {number:UInt8}, {long:String}"
    assert client.query(query, parameters=values).result_rows == [tuple(values.values())]


def test_the_same_deduplication_token_adds_nothing(client):
    for token in ("a", "a", "b"):
        insert(client, token=token)
    assert rows(client) == 2000


def test_settings_reach_the_engine_and_do_not_leak(client):
    with pytest.raises(DatabaseError, match="Limit for result exceeded") as failure:
        client.query("SELECT * FROM numbers(10)", settings={"max_result_rows": 5})
    assert failure.value.code == 396
    with pytest.raises(DatabaseError) as failure:
        client.command("CREATE TABLE u (a Int8) ENGINE = Memory", settings={"readonly": 1})
    assert failure.value.code == 164
    query = "SELECT getSetting('max_result_rows'), getSetting('readonly')"
    assert client.query(query).result_rows == [(0, 0)]


def test_errors_are_those_of_clickhouse(server, client):
    for query, code in (
        ("SELECT * FROM nowhere", 60),
        ("SELEC", 62),
        ("SELECT 1; SELECT 2", 62),
        ("SELECT 1 INTO OUTFILE 'x'", 358),
    ):
        with pytest.raises(DatabaseError) as failure:
            client.query(query)
        assert failure.value.code == code
    with pytest.raises(DatabaseError, match="Database nowhere does not exist") as failure:
        connect(server.dsn_of("nowhere"))
    assert failure.value.code == 81


def test_plain_http(server):
    url = f"http://127.0.0.1:{server.port}"
    with urlopen(f"{url}/ping") as answer:
        assert answer.read() == b"Ok.\n"
    with urlopen(f"{url}/?query=SELECT%201&user=admin&password=admin1234") as answer:
        assert answer.read() == b"1\n"
    with pytest.raises(HTTPError) as failure, urlopen(f"{url}/?query=SELECT%201"):
        pass
    assert failure.value.code == 403
    failure.value.close()


def test_wrong_password(server):
    with pytest.raises(DatabaseError, match="AUTHENTICATION_FAILED") as failure:
        connect(server.dsn_of("test", password="wrong"))
    assert failure.value.code == 516


def test_the_engine_enforces_the_rights_of_a_user(server, client):
    insert(client)
    viewer = connect(server.dsn_of("test", user="viewer"))
    assert rows(viewer) == 1000
    for statement in (
        "DROP TABLE t",
        "INSERT INTO t (volume) VALUES (1)",
        "SELECT * FROM file('/etc/hostname', 'LineAsString')",
        "CREATE TABLE u (a Int8) ENGINE = Memory",
    ):
        with pytest.raises(DatabaseError) as failure:
            viewer.command(statement)
        assert failure.value.code in (164, 497)


def test_a_slow_query_delays_no_other(server, client):
    slow = threading.Thread(target=connect(server.dsn).command, args=("SELECT sleep(1)",))
    slow.start()
    start = time.monotonic()
    for _ in range(5):
        assert client.command("SELECT 1") == 1
    assert time.monotonic() - start < 0.5
    assert slow.is_alive()
    slow.join()


def test_a_query_ends_with_its_client(server, client):
    query = "SELECT+sleepEachRow(0.1)+FROM+numbers(100)+SETTINGS+max_block_size=1"
    running = "SELECT count() FROM system.processes WHERE query LIKE 'SELECT sleepEachRow(0.1)%'"
    with socket.create_connection(("127.0.0.1", server.port)) as visitor:
        request = f"GET /?query={query}&cancel_http_readonly_queries_on_client_close=1"
        login = f"&user={server.user}&password={server.password}"
        visitor.sendall(f"{request}{login} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_for(lambda: client.command(running) == 1)
    wait_for(lambda: client.command(running) == 0)


def test_a_crash_loses_no_confirmed_row(tmp_path):
    with ClickHouseProcess(tmp_path) as server:
        connect(server.dsn_of()).command("CREATE DATABASE test")
        client, port = connect(server.dsn), server.port
        client.command("CREATE TABLE t (volume UInt32) ENGINE = MergeTree ORDER BY volume")
        confirmed = 0

        def write():
            nonlocal confirmed
            with pytest.raises(OperationalError):
                while True:
                    client.insert("t", [[confirmed]], column_names=["volume"])
                    confirmed += 1

        writer = threading.Thread(target=write)
        writer.start()
        time.sleep(0.5)
        server.kill()
        writer.join()
        server.start()
        assert server.port == port
        # The insert that was under way may be there or not, the confirmed ones must be.
        assert rows(client) in (confirmed, confirmed + 1)
        assert client.command("SELECT count() FROM t WHERE volume < " + str(confirmed)) == confirmed
        assert server.stop() == 0


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- The proxy ------------------------------------------------------------------------------------


@pytest.fixture
def distant(server, client, proxy):
    """A client that reaches the server through the proxy; `client` has made the table."""
    return connect(server.dsn_of("test", port=proxy.port), send_receive_timeout=1)


def test_pass_on(proxy, distant):
    insert(distant)
    assert rows(distant) == 1000
    assert proxy.connections == 1
    assert proxy.faults == 0


def test_refuse_and_recover(proxy, distant):
    proxy.refuse()
    assert proxy.faults == 1  # the connection that was open
    with pytest.raises(OperationalError):
        rows(distant)
    proxy.pass_on()
    assert rows(distant) == 0


def test_delay(proxy, distant):
    proxy.delay(0.3)
    start = time.monotonic()
    assert rows(distant) == 0
    assert 0.3 <= time.monotonic() - start < 0.8


def test_stall(proxy, distant):
    proxy.stall(when=is_insert)
    assert rows(distant) == 0
    with pytest.raises(OperationalError, match="timed out"):
        insert(distant)
    proxy.pass_on()
    assert rows(distant) == 0
    assert proxy.faults == 1


def test_cut_answer(proxy, distant):
    insert(distant)
    read = {"query": "SELECT * FROM t", "fmt": "ArrowStream"}
    whole = distant.raw_query(**read)
    proxy.cut_answer(after=2000)
    with pytest.raises(OperationalError):
        distant.raw_query(**read)
    assert proxy.faults == 3  # so often does the client try a read
    proxy.cut_answer(after=2000, times=1)
    assert distant.raw_query(**read) == whole
    assert proxy.faults == 4


@pytest.mark.parametrize(("token", "expected"), [(None, 2000), ("once", 1000)])
@pytest.mark.parametrize("compress", ["lz4", "zstd", False])
def test_drop_answer_of_an_insert(server, proxy, distant, compress, token, expected):
    """The client tries again by itself, and only a token keeps the rows from being doubled."""
    if token is None:  # else the engine would know the same block again even without a token
        distant.command("ALTER TABLE t MODIFY SETTING non_replicated_deduplication_window = 0")
    writer = connect(server.dsn_of("test", port=proxy.port), compress=compress)
    proxy.drop_answer(when=is_insert, times=1)
    insert(writer, token=token)
    assert proxy.faults == 1
    assert rows(distant) == expected


def test_cut_request_of_an_insert(proxy, distant):
    proxy.cut_request(5000, when=is_insert)
    assert rows(distant) == 0
    with pytest.raises(OperationalError):
        insert(distant)
    assert proxy.wait(faults=1)
    proxy.pass_on()
    assert rows(distant) == 0
    insert(distant)
    assert rows(distant) == 1000


def test_server_away_behind_the_proxy(tmp_path):
    with ClickHouseProcess(tmp_path) as server, Proxy(server.port) as proxy:
        client = connect(server.dsn_of(port=proxy.port), connect_timeout=1)
        server.kill()
        with pytest.raises(OperationalError):
            client.command("SELECT 1")
        server.start()
        assert client.command("SELECT 1") == 1
