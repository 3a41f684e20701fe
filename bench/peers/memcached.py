"""memcached on a Unix socket.

Its protocol is spoken directly, as Redis' is. An item's length is bounded (`-I`), and longer
payloads are stored as several items, whose commands go out together. It gives a key's second store
the memory of the first one.
"""

import os
import pwd
import time

from bench.peers.peer import Bytes, SocketServer, find_program, pieces, version_of

MOST = 16 << 20


class Memcached(SocketServer):
    name = "memcached"

    def start(self, largest: int) -> None:
        program, environment = find_program("memcached", "memcached")
        version = version_of([program, "-V"], environment)
        self.name = f"memcached {version.split()[1]}"
        megabytes = 256 + (4 * largest >> 20)
        command = [program, "-a", "0700", "-m", str(megabytes)]
        command += ["-I", f"{(MOST >> 20) + 1}m", "-t", "2"]
        command += ["-u", pwd.getpwuid(os.getuid()).pw_name]  # root must be told so
        self.serve(command, "-s", environment)

    def store(self, key: str, payload: Bytes) -> float:
        started = time.perf_counter()
        parts = pieces(payload, MOST)
        for index, part in enumerate(parts):
            self._connection.sendall(f"set {key}:{index} 0 0 {part.size}\r\n".encode())
            self._connection.sendall(memoryview(part))
            self._connection.sendall(b"\r\n")
        for _ in parts:
            if (line := self._received.line()) != b"STORED":
                raise ValueError(f"memcached has not stored it: {line.decode()}")
        return time.perf_counter() - started

    def fetch(self, key: str, into: Bytes) -> float:
        started = time.perf_counter()
        parts = pieces(into, MOST)
        names = " ".join(f"{key}:{index}" for index in range(len(parts)))
        self._connection.sendall(f"get {names}\r\n".encode())
        for part in parts:
            line = self._received.line()
            if line.split()[-1] != b"%d" % part.size:
                raise ValueError(f"memcached has another value: {line.decode()}")
            self._received.into(part)
        if (line := self._received.line()) != b"END":
            raise ValueError(f"memcached has more than was asked for: {line.decode()}")
        return time.perf_counter() - started
