"""KV blocks as numbers: which are free, which are held."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Blocks `0 .. total - 1`. Always `free + used == total`, and a block has one holder."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._held = bytearray(total)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks, for a caller that has seen to it that they are free."""
        assert count <= len(self._free), f"{count} KV blocks wanted, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._held[block] = 1
        return blocks

    def give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._held[block], f"KV block {block} is given back twice"
            self._held[block] = 0
            self._free.append(block)
