"""A TCP proxy for the tests: it stands between a client and a server and does harm on demand.

    with Proxy(server.port) as proxy:
        client = clickhouse_connect.get_client(dsn=server.dsn_of("test", port=proxy.port))
        proxy.drop_answer(when=is_insert, times=1)
        client.insert(...)  # is executed, but the answer never comes; the client tries again

It runs in a thread of its own with an asyncio loop. A mode holds from the moment it is set, for
the requests that begin then, also on connections that are open already. The proxy knows just
enough of HTTP for that: bytes from the client that follow bytes from the server begin a new
request, since clickhouse-connect never sends a second request before the first is answered.
"""

import asyncio
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

HEAD = 1 << 16  # so much of a request is shown to a `when`; what it looks for must lie within


def is_insert(head):
    """For `when`: requests that insert.

    clickhouse-connect puts the statement at the start of the body, where compression can hide it.
    But it sends data as application/octet-stream and queries as text, which tells them apart.
    """
    return b"application/octet-stream" in head or b"INSERT INTO" in head


@dataclass
class Fault:
    """What is done to requests for which `when` is true; `left` counts down, None is for ever."""

    kind: str
    amount: float = 0
    when: object = None
    left: int | None = None

    def aims_at(self, head):
        return self.when is None or self.when(bytes(head))


@dataclass
class Request:
    """One request on its way through, with the fault that it will meet."""

    head: bytearray = field(default_factory=bytearray)
    fault: Fault | None = None
    sent: int = 0
    answered: int = 0


class Cut(Exception):
    """Raised to reset a connection."""


class Proxy:
    """Listens on `port` of 127.0.0.1 and passes everything on to `target_port`, until told not to.

    `connections` counts the connections taken, `faults` the faults that were really done.
    """

    def __init__(self, target_port, port=0, context=None):
        self.target_port, self.context = target_port, context  # of TLS, for its clients
        self.connections = self.faults = 0
        self.rewrite = bytes  # applied to each piece of a request
        self._fault = None
        self._writers = set()
        # Bound here and not in the loop, so that the port is known and taken at once.
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    # The modes. Each replaces the one before. `when` sees the first bytes of a request; after
    # `times` faults the proxy passes everything again.

    def pass_on(self):
        """Do no harm."""
        self._fault = None

    def refuse(self):
        """Reset every connection that is open, and each new one at once."""
        self._fault = Fault("refuse")
        asyncio.run_coroutine_threadsafe(self._reset_all(), self._loop).result()

    def stall(self, when=None, times=None):
        """Take requests and never answer: the server does not see them."""
        self._fault = Fault("stall", 0, when, times)

    def delay(self, seconds, when=None, times=None):
        """Hold each answer back for a while."""
        self._fault = Fault("delay", seconds, when, times)

    def drop_answer(self, when=None, times=None):
        """Let the server do what was asked, and reset the connection when it begins to answer."""
        self._fault = Fault("drop_answer", 0, when, times)

    def cut_answer(self, after, when=None, times=None):
        """Reset the connection after so many bytes of an answer, its headers counted."""
        self._fault = Fault("cut_answer", after, when, times)

    def cut_request(self, after, when=None, times=None):
        """Reset both connections after so many bytes of a request, its headers counted."""
        self._fault = Fault("cut_request", after, when, times)

    def wait(self, faults, seconds=5):
        """Wait until so many faults are done; tell whether they were."""
        end = time.monotonic() + seconds
        while self.faults < faults and time.monotonic() < end:
            time.sleep(0.005)
        return self.faults >= faults

    def close(self):
        """Close the port and all connections, and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    # What runs in the thread.

    def _run(self):
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self):
        server = await asyncio.start_server(self._connection, sock=self._socket, ssl=self.context)
        await self._closing.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next round

    async def _connection(self, client_reader, client_writer):
        """Serve one client: two pumps, and when either ends, both connections end."""
        self.connections += 1
        server_writer, pumps = None, []
        self._writers.add(client_writer)
        try:
            self._cut_if("refuse", self._fault)
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self.target_port
            )
            requests = [Request(answered=1)]  # the next byte from the client begins a new one
            pumps = [
                asyncio.ensure_future(self._requests(client_reader, server_writer, requests)),
                asyncio.ensure_future(self._answers(server_reader, client_writer, requests)),
            ]
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in done:
                pump.result()
        except (Cut, OSError):  # OSError: the server is away, or one of the two reset
            for writer in (client_writer, server_writer):
                reset(writer)
        except asyncio.CancelledError:
            pass  # close()
        finally:
            self._writers.discard(client_writer)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (client_writer, server_writer):
                if writer:
                    writer.close()

    async def _requests(self, reader, writer, requests):
        while data := await reader.read(HEAD):
            if requests[-1].answered:
                requests[:] = [Request()]
            request = requests[-1]
            if request.fault is None:
                # The headers and the body may come one after the other, so look with each piece.
                request.head += data[: HEAD - len(request.head)]
                fault = self._fault
                if fault and fault.left != 0 and fault.aims_at(request.head):
                    request.fault = fault
            if self._strikes("stall", request):
                while await reader.read(HEAD):  # until the client gives up
                    pass
                return
            fault, room = request.fault, 0
            if fault and fault.kind == "cut_request":
                room = max(0, int(fault.amount) - request.sent)
                if len(data) > room:
                    writer.write(data[:room])
                    self._cut_if("cut_request", fault)
            writer.write(self.rewrite(data))
            request.sent += len(data)
            await writer.drain()

    async def _answers(self, reader, writer, requests):
        while data := await reader.read(HEAD):
            request = requests[-1]
            fault = request.fault
            if request.answered == 0:
                self._cut_if("drop_answer", fault)
                if self._strikes("delay", request):
                    await asyncio.sleep(fault.amount)
            if fault and fault.kind == "cut_answer":
                room = max(0, int(fault.amount) - request.answered)
                if len(data) > room:
                    writer.write(data[:room])
                    self._cut_if("cut_answer", fault)
            request.answered += len(data)
            writer.write(data)
            await writer.drain()

    def _strikes(self, kind, request):
        """Whether a fault of this kind is done now, which is counted here."""
        fault = request.fault
        if fault is None or fault.kind != kind or fault.left == 0:
            return False
        if fault.left is not None:
            fault.left -= 1
        self.faults += 1
        return True

    def _cut_if(self, kind, fault):
        if self._strikes(kind, Request(fault=fault)):
            raise Cut

    async def _reset_all(self):
        for writer in list(self._writers):
            self.faults += 1
            reset(writer)


def reset(writer):
    """Close a connection the rude way, with a TCP reset, as a crash or a firewall does."""
    if writer and not writer.transport.is_closing():
        linger = struct.pack("ii", 1, 0)  # on, for 0 seconds: close() sends a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


class Link(Proxy):
    """What stands between browser and server: a path that is stripped, a slow line, a dead one.

    It names the server in Host as reverse proxies do, so the server sees a foreign origin.
    """

    def __init__(self, port, path="/", bytes_per_second=None):
        self.path, self.bytes_per_second = path, bytes_per_second
        self.silences, self.busy_until = 0, 0
        super().__init__(port)
        self.url = f"http://localhost:{self.port}"

    def silence(self):
        """Drop what the connections that are open carry from now on; they stay open."""
        self.silences += 1

    async def _requests(self, reader, writer, requests):
        silences = self.silences
        while data := await reader.read(1 << 16):
            if silences == self.silences:
                data = re.sub(b"^(GET|HEAD) %s" % self.path.encode(), rb"\1 /", data)
                data = re.sub(rb"\r\nHost: \S+", b"\r\nHost: localhost:%d" % self.target_port, data)
                writer.write(data)
                await writer.drain()

    async def _answers(self, reader, writer, requests):
        silences = self.silences
        while data := await reader.read(1 << 12):
            if self.bytes_per_second:
                now = time.monotonic()
                self.busy_until = max(now, self.busy_until) + len(data) / self.bytes_per_second
                await asyncio.sleep(self.busy_until - now)
            if silences == self.silences:
                writer.write(data)
                await writer.drain()
