"""What the core must do, said as simply as possible: sets and dicts of token prefixes.

A block is its path: all tokens from position 0 to its end. There are no holds, no LRU, no slots and
no running totals here, and everything is found by looking at everything. What the core did with
slots and memory: fake_shell.py. Who drives both and compares: world.py.
"""

from collections import deque
from dataclasses import dataclass, field
from struct import pack

Path = tuple[int, ...]


def packed(tokens: Path) -> bytes:
    """As tokens travel. Sorts differently than the tokens do."""
    return pack(f"<{len(tokens)}I", *tokens)


def common(a: Path, b: Path) -> int:
    """How many leading tokens two paths share."""
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


@dataclass(eq=False)
class Commit:
    session: "Session"
    number: int
    answered: bool = False
    failed: bool = False
    pending: "set[Filling]" = field(default_factory=set)


@dataclass(eq=False)
class Source:
    commit: Commit
    offset: int


@dataclass(eq=False)
class Filling:
    """A block that is being stored, and whose staged copies could fill it."""

    arena: "Arena"
    path: Path
    sources: list[Source]

    @property
    def gone(self) -> bool:
        return self.arena.filling.get(self.path) is not self

    def drop_source(self, commit: Commit) -> bool:
        """Returns whether it was the first."""
        was_first = self.sources[0].commit is commit
        self.sources = [source for source in self.sources if source.commit is not commit]
        commit.pending.discard(self)
        return was_first


@dataclass(eq=False)
class Session:
    id: bytes
    tenant: str
    administrator: bool = False
    alive: bool = True
    commits: dict[int, Commit] = field(default_factory=dict)
    last_commit: int = 0
    completed: int = 0
    failures: list[int] = field(default_factory=list)
    flushes: dict[int, int] = field(default_factory=dict)
    """Correlation to the commit it waits for."""
    models: set[int] = field(default_factory=set)

    def advance(self) -> None:
        """What is finished now, in order."""
        while (commit := self.commits.get(self.completed + 1)) is not None:
            if commit.pending or not commit.answered:
                return
            self.completed += 1
            if commit.failed:
                self.failures.append(commit.number)


@dataclass(eq=False)
class Context:
    number: int
    session: Session
    arena: "Arena"
    free_ids: deque[int]
    generation: int = 0
    open: "dict[int, Sequence]" = field(default_factory=dict)


@dataclass(eq=False)
class Sequence:
    context: Context
    seq_id: int
    generation: int
    full: Path
    """Its full blocks."""
    leased: Path
    """Its deepest block."""
    length: int
    touched: float
    idle: float
    stores: bool = True
    limit: int | None = None
    answered: bool = True
    """Whether the client knows of it already."""
    timed_out: bool = False

    @property
    def is_open(self) -> bool:
        return self.context.open.get(self.seq_id) is self

    def rests_on(self, path: Path) -> bool:
        return path in self.context.arena.chain(self.leased)

    def fall_back(self, path: Path) -> None:
        """To the parent of `path`."""
        self.full = self.leased = self.context.arena.parent(path)
        self.length = len(self.full)


@dataclass(eq=False)
class Wanted:
    """A pin that waits for memory, and holds its block meanwhile."""

    session: Session
    correlation: int
    owner: str
    path: Path
    n_tokens: int
    seconds: float


@dataclass
class Planned:
    """What an append meets: all blocks in order; those that are sealed, that are being filled, and
    new ones."""

    paths: list[Path]
    present: list[Path]
    joined: list[Path]
    stored: list[Path]


@dataclass(eq=False)
class Arena:
    number: int
    tenant: str
    block_tokens: int
    stride: int
    sealed: dict[Path, int] = field(default_factory=dict)
    """To the slot that it was sealed in."""
    filling: dict[Path, Filling] = field(default_factory=dict)
    births: dict[Path, int] = field(default_factory=dict)
    """How often a block of this path has been begun: one that comes back is another block."""
    unchecked: set[Path] = field(default_factory=set)
    """Of the sealed ones: what an earlier daemon left and nobody has checked yet."""
    former: set[Path] = field(default_factory=set)
    """Of the sealed ones: what clients of an earlier daemon may still read."""
    pins: dict[tuple[str, Path], float] = field(default_factory=dict)
    """By owner and block: when each ends; 0.0: never."""
    wanted: list[Wanted] = field(default_factory=list)

    def parent(self, path: Path) -> Path:
        return path[: (len(path) - 1) // self.block_tokens * self.block_tokens]

    def chain(self, path: Path) -> list[Path]:
        """The blocks from the first to `path`."""
        ends = [*range(self.block_tokens, len(path), self.block_tokens), len(path)]
        return [path[:end] for end in ends] if path else []

    def visible(self) -> list[Path]:
        """Sealed blocks all of whose ancestors are sealed, and all are checked."""
        served = self.sealed.keys() - self.unchecked
        return [path for path in served if all(up in served for up in self.chain(path))]

    def matched(self, tokens: Path) -> int:
        """How many tokens of a prompt are cached: by looking at every block."""
        return max((common(path, tokens) for path in self.visible()), default=0)

    def best(self, tokens: Path) -> Path:
        """The block to lease for a prompt: of those that agree equally long the one that sorts next
        before the prompt, or else next after it."""
        matched = self.matched(tokens)
        if not matched:
            return ()
        agreeing = [path for path in self.visible() if common(path, tokens) == matched]
        last = [path for path in agreeing if len(self.parent(path)) < matched]
        end = len(self.parent(last[0])) + self.block_tokens
        before = [path for path in last if packed(path) < packed(tokens[:end])]
        return max(before, key=packed) if before else min(last, key=packed)

    def known(self) -> set[Path]:
        """All that is there, served or not."""
        return self.sealed.keys() | self.filling.keys()

    def not_served(self, path: Path) -> str | None:
        """If the tokens of `path`, of which a block has the last ones and which do not match, are
        there all the same: why they are not served. Of several blocks the first one says."""
        start = len(self.parent(path))
        found = [
            each
            for each in self.known()
            if each[: len(path)] == path and len(self.parent(each)) == start
        ]
        if not found:
            return None
        return "filling" if min(found, key=packed) in self.filling else "unchecked"

    def extension(self, path: Path) -> Path | None:
        """The first sealed sibling of an open tail that begins with it and goes on."""
        found = [
            other
            for other in self.sealed.keys() - self.unchecked
            if len(other) > len(path)
            and other[: len(path)] == path
            and self.parent(other) == self.parent(path)
        ]
        return min(found, key=packed, default=None)

    def plan(self, full: Path, tokens: Path) -> Planned:
        planned = Planned([], [], [], [])
        for path in self.chain(full + tokens)[len(full) // self.block_tokens :]:
            is_tail = len(path) % self.block_tokens != 0
            if path in self.filling:
                planned.joined.append(path)
            elif path in self.sealed:
                planned.present.append(path)
            elif is_tail and (longer := self.extension(path)) is not None:
                planned.present.append(longer)
                path = longer
            else:
                planned.stored.append(path)
            planned.paths.append(path)
        return planned

    def belongs_to(self, tokens: Path) -> set[Path]:
        """What goes on from a prompt, and open tails that are a part of its end."""
        start = self.common_blocks(tokens)
        end = tokens[: start + self.block_tokens]
        goes_on = {path for path in self.known() if path[: len(tokens)] == tokens}
        if len(end) == start + self.block_tokens:
            goes_on = set()  # its next block is not there, so nothing is there that has its end
        tails = {path for path in self.known() if self.parent(path) == tokens[:start]}
        return goes_on | {path for path in tails if path == end[: len(path)] and len(path) > start}

    def common_blocks(self, tokens: Path) -> int:
        """How many tokens of a prompt are in full blocks that are there, served or not."""
        end = 0
        while (
            end + self.block_tokens <= len(tokens)
            and tokens[: end + self.block_tokens] in self.known()
        ):
            end += self.block_tokens
        return end

    def remove(self, path: Path, sequences: list[Sequence]) -> None:
        """No source can fill this block: it goes with everything below, which is forgotten here
        when its record is dropped."""
        for sequence in sequences:
            if sequence.context.arena is self and sequence.rests_on(path):
                sequence.fall_back(path)
        for below in [other for other in self.filling if path in self.chain(other)]:
            for source in self.filling.pop(below).sources:
                source.commit.failed = True
                source.commit.pending = {each for each in source.commit.pending if not each.gone}

    def leased(self, sequences: list[Sequence]) -> set[Path]:
        """What sequences lease, ancestors of filling blocks, and what waits to be pinned."""
        paths = [sequence.leased for sequence in sequences if sequence.context.arena is self]
        paths += self.filling
        paths += [wanted.path for wanted in self.wanted]
        return {up for path in paths for up in self.chain(path)}

    def pinned(self) -> set[Path]:
        """What pins keep, leased or not."""
        return {up for _, path in self.pins for up in self.chain(path)}

    def end_pins(self, now: float) -> None:
        """Those whose time is over."""
        self.pins = {key: due for key, due in self.pins.items() if not due or due > now}

    def next_end(self) -> float | None:
        """When the first pin ends by itself."""
        return min((due for due in self.pins.values() if due), default=None)
