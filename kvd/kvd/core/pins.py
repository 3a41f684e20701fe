"""Pins: who keeps which block, and all above it, without a lease; and where the directory has them.

Covers what a pin is, and how one is made and ended. How one is asked for: pinning.py. What a pinned
block counts as: budget.py. Those that an earlier daemon left: adopting.py.

    place   0     1     2     3     4     5    ...                       of one arena's directory
            pin | free | pin | pin | never used, but has memory | has none
                                   ^ high_water                 ^ backed
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvd.core.events import DropPin, Effect, WritePin
from kvd.core.tree import Block
from kvd_proto.geometry import round_up
from kvd_proto.happenings import Kind
from kvd_proto.layout import PIN_BYTES

if TYPE_CHECKING:
    from kvd.core.cache import Cache, PinsGrowing


@dataclass(slots=True, eq=False)
class Pin:
    """`owner` keeps `block` until `expires` (seconds of the clock that events bring; 0.0: for
    ever). One that is renewed is another `Pin`, at the same place."""

    owner: str
    block: Block
    place: int
    expires: float

    @property
    def due(self) -> float | None:
        """When it ends by itself; None if it does not, or has ended."""
        is_kept = self.block.arena.pins.find(self.owner, self.block) is self
        return self.expires if self.expires and is_kept else None


def owners(cache: "Cache") -> frozenset[str]:
    """Of all pins there are. A walk of them."""
    arenas = cache.budget.arenas.values()
    return frozenset(pin.owner for arena in arenas for pin in arena.pins.pins.values())


@dataclass(slots=True, eq=False)
class PinTable:
    """The pins of one arena, and where its directory has them."""

    pins: dict[tuple[str, Block], Pin] = field(default_factory=dict)
    """By owner and block, in the order of their making."""
    free: list[int] = field(default_factory=list)
    """Places that had a pin, and have none."""
    high_water: int = 0
    n_bytes: int = 0
    """Charged to the budget."""
    backed: int = 0
    """Of these, what is known to have memory: the others may still be refused."""
    growing: "PinsGrowing | None" = None
    """The job that gives it more."""

    def find(self, owner: str, block: Block) -> Pin | None:
        """The owner's pin of this very block."""
        return self.pins.get((owner, block))

    def take_place(self) -> int | None:
        """A place that has memory; None if there is none."""
        if self.free:
            return self.free.pop()
        if pins_bytes_for(self.high_water + 1) > self.backed:
            return None
        self.high_water += 1
        return self.high_water - 1

    def adopt(self, places: set[int]) -> None:
        """Take over the memory in which an earlier daemon's pins have these places."""
        self.high_water = max(places, default=-1) + 1
        self.free = [place for place in range(self.high_water) if place not in places]
        self.n_bytes = self.backed = pins_bytes_for(self.high_water)


def pins_bytes_for(n_places: int) -> int:
    """Bytes of a directory for so many pins, in whole pages."""
    return round_up(n_places * PIN_BYTES)


def start(cache: "Cache", pin: Pin) -> None:
    """Keep the pin's block from now on."""
    arena = pin.block.arena
    arena.pins.pins[pin.owner, pin.block] = pin
    arena.tenant.pins += 1
    cache.budget.pin(pin.block)
    cache.deadlines.add(pin)


def renew(cache: "Cache", pin: Pin, expires: float) -> None:
    """Let the pin end at another time."""
    arena = pin.block.arena
    renewed = Pin(pin.owner, pin.block, pin.place, expires)
    arena.pins.pins[pin.owner, pin.block] = renewed
    cache.deadlines.add(renewed)


def end(cache: "Cache", pin: Pin, reason: str, effects: list[Effect]) -> None:
    """Keep the pin's block no longer; the journal is told the reason."""
    arena = pin.block.arena
    values = (pin.owner, pin.block.end, reason)
    cache.budget.journal.note(Kind.UNPIN, arena.tenant.name, arena.name, *values)
    del arena.pins.pins[pin.owner, pin.block]
    arena.pins.free.append(pin.place)
    arena.tenant.pins -= 1
    effects.append(DropPin(arena.number, pin.place))
    cache.budget.unpin(pin.block, effects)


def end_below(cache: "Cache", block: Block, effects: list[Effect]) -> None:
    """End the pins that rest on a block which is lost. A walk of the arena's pins."""
    for pin in list(block.arena.pins.pins.values()):
        node: Block | None = pin.block
        while node is not None and node is not block:
            node = node.parent
        if node is block:
            end(cache, pin, "damaged", effects)


def write_effect(pin: Pin) -> WritePin:
    """The effect that makes the pin outlive this daemon."""
    block = pin.block
    return WritePin(block.arena.number, pin.place, block.key, pin.owner, pin.expires)
