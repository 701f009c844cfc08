"""KV blocks as numbers: which are free, which are used, which are kept because their contents may be wanted again."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def next_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block: it stands for these tokens after all those that `before` stands for."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


def first_key(tenant: int) -> bytes:
    """What a tenant's chains begin with: the same tokens of two tenants have different keys."""
    return blake2b(tenant.to_bytes(8, "little", signed=True), digest_size=16).digest()


class BlockPool:
    """Blocks `0 .. total - 1`. Always `free + cached + used == total`.

    A used block has one or more holders. One that nobody holds is cached if its contents have a key, else free;
    cached ones are taken when no free one is left, the least recently used first.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._given_back: list[int] = []
        self._holders: list[int] = []  # of the blocks that were ever taken: the simulator has thousands of machines
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # In the order of last use. Taking the first of a plain dict passes by all that were taken before it.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._given_back) + self.total - len(self._holders)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """How many can be taken."""
        return len(self._given_back) + self.total - len(self._holders) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    def take(self, count: int) -> list[int]:
        """`count` blocks, for a caller that has seen to it that they are available."""
        assert count <= self.available, f"{count} KV blocks wanted, {self.available} available"
        blocks = []
        for _ in range(count):
            if self._given_back:
                block = self._given_back.pop()
            elif len(self._holders) < self.total:
                block = len(self._holders)
                self._holders.append(0)
            else:
                block, _ = self._cached.popitem(last=False)
                del self._block_of[self._key_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def find(self, key: bytes) -> int | None:
        """The block that holds what the key stands for."""
        return self._block_of.get(key)

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def hold(self, block: int) -> None:
        """One more holder of a block that `find` named."""
        self._cached.pop(block, None)
        self._holders[block] += 1

    def name(self, block: int, key: bytes) -> None:
        """The block's contents are computed. If another block holds the same, that one stays the one to be found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def give_back(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert self._holders[block], f"KV block {block} is given back twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._given_back.append(block)
