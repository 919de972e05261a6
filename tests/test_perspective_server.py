"""The tail: what ClickHouse has is what Perspective has, each row once."""

import signal

from conftest import Script, Server, Viewer, wait_until


def test_rows_arrive_each_exactly_once(database, start):
    server = start(Server, "--dsn", database.dsn)
    producer = start(Script, "producer.py", "--dsn", database.dsn, "--batches", 20)
    viewer = start(Viewer, server.url)
    assert producer.wait() == 0
    assert "5,000 rows written" in producer.output
    server.wait_for_delivered(5000)
    assert viewer.rows() == database.rows()
    assert server.health()["delivered"] == 5000
    assert server.stop(signal.SIGINT) == 0
