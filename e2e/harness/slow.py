"""A TCP proxy that lets bytes through at a given pace, so that a fetch takes long enough to be hit in its middle."""

import asyncio
import contextlib
import threading

BLOCK_BYTES = 64 << 10
# Shorter pauses add up: each takes longer than it should.
LEAST_PAUSE_SECONDS = 0.005


class Slow:
    """Listens on a port of its own; what the other side sends passes at `bytes_per_second`, all connections together."""

    def __init__(self, port: int, bytes_per_second: int):
        self.bytes_per_second = bytes_per_second
        self._to, self._free_at = port, 0.0
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """As a Redis."""
        return f"redis://{self.host}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
            await asyncio.gather(self._pass(reader, there_writer, slowly=False), self._pass(there_reader, writer, slowly=True))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, slowly: bool) -> None:
        # Whoever is killed cuts its connections.
        with contextlib.suppress(OSError), contextlib.closing(sink):
            while block := await source.read(BLOCK_BYTES):
                if slowly:
                    now = self._loop.time()
                    self._free_at = max(self._free_at, now) + len(block) / self.bytes_per_second
                    if self._free_at - now > LEAST_PAUSE_SECONDS:
                        await asyncio.sleep(self._free_at - now)
                sink.write(block)
                await sink.drain()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        # Lets them end, and says nothing of what they were cut off in.
        self._loop.run_until_complete(asyncio.sleep(0))
        self._server.close()
        self._loop.close()
