"""How much there is of something: blocks, the tokens in them, and their bytes of stride."""

from dataclasses import dataclass


@dataclass(slots=True)
class Amount:
    """A running total. Slots that are set aside count as blocks without tokens."""

    blocks: int = 0
    tokens: int = 0
    n_bytes: int = 0

    def add(self, blocks: int, tokens: int, stride: int) -> None:
        """Count `blocks` more of `stride` bytes each, with `tokens` in all; negative: less."""
        self.blocks += blocks
        self.tokens += tokens
        self.n_bytes += blocks * stride

    def include(self, other: "Amount") -> None:
        """Count all of another."""
        self.blocks += other.blocks
        self.tokens += other.tokens
        self.n_bytes += other.n_bytes
