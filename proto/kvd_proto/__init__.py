"""What both sides of the wire agree on: messages, errors, geometry, keys, payloads, layouts.

This package imports nothing of ours. `PROTOCOL.md` beside it says the same in prose, complete
enough to write a client in another language.
"""

PROTOCOL_VERSION = 1
