"""Peers of kvd: programs that a user could share payloads through instead, and kvd itself.

Each module has one class with the interface `Peer`. A peer is started and stopped by the benchmark,
listens on a Unix socket or on loopback, keeps nothing on disk and reports to nobody. One that
cannot be run here raises LeftOut, with a word that says why. `make bench-peers` gets them.

Seconds are measured by the peer itself: around what a user of it would call, and nothing else.
"""

from bench.peers.peer import LeftOut, Peer

__all__ = ["LeftOut", "Peer"]
