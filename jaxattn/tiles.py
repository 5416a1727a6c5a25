"""How keys are laid into blocks and blocks into tiles.

kv_block is numerics, the tile is speed: `step` takes one tile of whole blocks [n, w] at a time.
A block that a rule makes shorter than w, the kernel's own partial last block, and the padding of
a last tile are all one thing: key slots that are not `valid`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import block_rules

TILE_KEYS = 512


class Tile(NamedTuple):
    """kv_block keys in a block of `width` slots, `blocks` of them in a tile."""

    kv_block: int
    width: int
    blocks: int

    @property
    def keys(self) -> int:
        return self.kv_block * self.blocks


def tile_of(
    rule: int | str, context: int, head_dim: int, value_dim: int, keys: int | None = None
) -> Tile:
    """The tile for `context` keys: of about `keys` slots, the same whatever the context is.

    A rule's blocks get one of few widths, so that contexts share compiled steps, and a prefix
    equals a run of that length bit for bit.
    """
    kv_block = block_rules.block_size(rule, context, head_dim, value_dim)
    width = block_rules.width(rule, context, head_dim, value_dim)
    return Tile(kv_block, width, max(1, (keys or TILE_KEYS) // width))


def tile_count(begin: int, stop: int, tile: Tile) -> int:
    """Tiles that keys [begin, stop) fill, the last one in part."""
    return -(-(stop - begin) // tile.keys)


def block_starts(begin: int, stop: int, tile: Tile, order: str, some: range) -> np.ndarray:
    """The first key of each block of `some` of the tiles of keys [begin, stop), in the order they
    are walked: int32 [tiles, n].

    Behind the last block come blocks that start at `stop`: they hold no key.
    """
    count = -(-(stop - begin) // tile.kv_block)
    block = np.arange(some.start * tile.blocks, some.stop * tile.blocks)
    at = count - 1 - block if order == "backward" else block
    starts = np.where(block < count, begin + at * tile.kv_block, stop)
    return starts.astype(np.int32).reshape(-1, tile.blocks)


def split_points(context: int, chunks: int) -> list[tuple[int, int]]:
    """(start, stop) of each non-empty chunk: ceil(context / chunks) keys, as ggml's CPU splits."""
    size = -(-context // chunks)
    return [(a, min(a + size, context)) for a in range(0, context, size)]


def slots(starts: jax.Array, width: int) -> jax.Array:
    """The key that each slot would hold: starts [n] -> int32 [n, w]."""
    return starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
