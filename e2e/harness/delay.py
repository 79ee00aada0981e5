"""A TCP proxy that delivers what passes later, as a network does that is long and not narrow, and on some connections not at all."""

import collections
import socket
import threading
import time

PIECE_BYTES = 1 << 16


class DelayProxy:
    """Listens on a free loopback port, and gives each byte to the other side `seconds` after it has come, in both directions."""

    def __init__(self, port: int, seconds: float):
        self.target, self.seconds = ("127.0.0.1", port), seconds
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        # Those that are not cut; what comes on others is taken and never given.
        self.flowing: list[threading.Event] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            flows = threading.Event()
            flows.set()
            self.flowing.append(flows)
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.carry(one, other, flows)

    def carry(self, source: socket.socket, sink: socket.socket, flows: threading.Event) -> None:
        """One direction: a thread that takes, a thread that gives."""
        pieces: collections.deque[tuple[float, bytes]] = collections.deque()
        came = threading.Semaphore(0)

        def take() -> None:
            data = b"-"
            while data:
                try:
                    data = source.recv(PIECE_BYTES)
                except OSError:
                    data = b""
                pieces.append((time.monotonic() + self.seconds, data))
                came.release()

        def give() -> None:
            while True:
                came.acquire()
                due, data = pieces.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                flows.wait()
                try:
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)
                except OSError:
                    source.close()
                    return

        for work in (take, give):
            threading.Thread(target=work, daemon=True).start()

    def stall(self) -> None:
        """Nothing passes any more on the connections that there are; those that are made do as ever."""
        for flows in list(self.flowing):
            flows.clear()

    def stop(self) -> None:
        self.listener.close()
