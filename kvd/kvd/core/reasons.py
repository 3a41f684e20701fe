"""Why a block is dropped. Every place that drops one says so, and each is counted by it.

ROOM         the budget was full, and it was the block that was unused for longest
QUOTA        the same, within its tenant's quota
REDUCED      the budget, or its tenant's quota, was made smaller
COMMAND      somebody asked for it (`evict`)
SUPERSEDED   a longer block beside it has all of its tokens
DAMAGED      an earlier daemon left it, and its bytes, or those of a block above it, had changed
ORPHANED     a block above it could not be stored
ARENA        its model gave way to another one, or to whoever needed the room
"""

from enum import StrEnum


class Reason(StrEnum):
    ROOM = "room"
    QUOTA = "quota"
    REDUCED = "reduced"
    COMMAND = "command"
    SUPERSEDED = "superseded"
    DAMAGED = "damaged"
    ORPHANED = "orphaned"
    ARENA = "arena"
