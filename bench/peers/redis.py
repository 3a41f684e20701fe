"""Redis on a Unix socket, without persistence.

Its protocol is spoken directly: a value is sent from the payload and received in the buffer, with
no copy in between, which no client for Python does. Values are at most 512 MB: longer payloads are
stored as several, whose commands go out together. A key's second store gives back what the first
one took, so memory is as warm as the server's allocator keeps it.
"""

import time

from bench.peers.peer import Bytes, SocketServer, find_program, pieces, version_of

MOST = 256 << 20


class Redis(SocketServer):
    name = "Redis"

    def start(self, largest: int) -> None:
        program, environment = find_program("redis-server", "redis-server")
        version = version_of([program, "--version"], environment)
        self.name = f"Redis {version.split('v=')[1].split()[0]}"
        command = [program, "--port", "0", "--unixsocketperm", "700"]
        command += ["--save", "", "--appendonly", "no"]
        command += ["--loglevel", "warning", "--daemonize", "no"]
        # Longer than a payload takes: its buffer of one client is bounded otherwise.
        command += ["--client-query-buffer-limit", "1gb", "--proto-max-bulk-len", "512mb"]
        self.serve(command, "--unixsocket", environment)

    def store(self, key: str, payload: Bytes) -> float:
        started = time.perf_counter()
        parts = pieces(payload, MOST)
        for index, part in enumerate(parts):
            name = f"{key}:{index}"
            head = f"*3\r\n$3\r\nSET\r\n${len(name)}\r\n{name}\r\n${part.size}\r\n"
            self._connection.sendall(head.encode())
            self._connection.sendall(memoryview(part))
            self._connection.sendall(b"\r\n")
        for _ in parts:
            if (line := self._received.line()) != b"+OK":
                raise ValueError(f"Redis has not stored it: {line.decode()}")
        return time.perf_counter() - started

    def fetch(self, key: str, into: Bytes) -> float:
        started = time.perf_counter()
        parts = pieces(into, MOST)
        names = [f"{key}:{index}" for index in range(len(parts))]
        asked = "".join(f"*2\r\n$3\r\nGET\r\n${len(name)}\r\n{name}\r\n" for name in names)
        self._connection.sendall(asked.encode())
        for part in parts:
            if (line := self._received.line()) != b"$%d" % part.size:
                raise ValueError(f"Redis has another value: {line.decode()}")
            self._received.into(part)
        return time.perf_counter() - started
