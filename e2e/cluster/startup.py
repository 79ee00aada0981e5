"""Times pods from their creation to the moment when their process has read a first file."""

import contextlib
import socket
import threading
import time

from harness import process

from .case import PODS
from .cluster import Cluster

PORT = 7777


class Stopwatch:
    """A listener on the control plane's machine, to which a pod says its name once it has read its file.

    What Kubernetes says of a pod is late by up to a second, because kubelet looks at containers once a second.
    """

    def __init__(self, cluster: Cluster):
        self.cluster, self.machine = cluster, cluster.plane.machine
        self.times: dict[str, float] = {}
        self.changed = threading.Condition()
        with self.machine.network():
            self.socket = socket.create_server((self.machine.address, PORT))
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        # Closing ends it.
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                now = time.monotonic()
                with connection:
                    name = connection.recv(100).decode().strip()
                with self.changed:
                    self.times[name] = now
                    self.changed.notify_all()

    def time(self, pod: dict, seconds: float = 120) -> float:
        """Creates the pod, waits for its word, deletes it and waits for its end; the time to its word, in seconds."""
        name = pod["metadata"]["name"]
        begin = time.monotonic()
        answer = self.cluster.plane.request("POST", f"/{PODS}", pod)
        if answer.status != 201:
            raise process.Failed(f"creating pod {name}: {answer.read().decode()}")
        with self.changed:
            if not self.changed.wait_for(lambda: name in self.times, seconds):
                raise process.Failed(f"pod {name} has not read its file in {seconds} s:\n{self.cluster.kubectl('describe', 'pod', name).stdout}")
            found = self.times.pop(name) - begin
        self.cluster.delete_pods(name)
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)
