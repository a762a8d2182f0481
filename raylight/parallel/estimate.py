"""How long a forward takes on some ranks, estimated from what a trial and the link test have found of these.

Between two exchanges ranks wait for the slowest. Counted are products with weights, attention, what a Ulysses exchange
or a ring sends beside them, and for the rest (norms, modulation, activations, positions, and what products take longer
than in a trial) bytes that are read and written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .mesh import MeshShape
from .partition import divide
from .shares import ALIKE, Speeds

SENT_BYTES = 2.0  # of a number that is exchanged
# For each token and channel of each attention call, read and written. With it the forwards of seven models as graphs on
# one H200 (Wan 14B at 480p and 720p, Wan 1.3B, Flux, Qwen Image, Z-Image, LTX-Video) come out within 7 %.
REST_BYTES = 300
SENT_BYTES_IN_8_BITS = 17 / 16  # with the scales of a head of 128


@dataclass(frozen=True, slots=True)
class Work:
    """A forward of one batch row: its `tokens`, the weights that each of them is multiplied with, the attention calls
    over all tokens, and the width and heads of these.
    """

    tokens: int
    weights: int
    attentions: int
    width: int
    heads: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """Operations per second of each rank in products and in attention; of the slowest link between two of them the
    bytes per second, and the seconds of a small exchange; and the bytes per second that each rank reads and writes,
    none if the rest is not to be counted.
    """

    products: tuple[int, ...]
    attention: tuple[int, ...]
    link_bytes_per_s: float
    latency_s: float
    memory: tuple[int, ...] = ()

    def alone(self, rank: int) -> Hardware:
        """Return one rank without the others."""
        products, attention, memory = (one[rank : rank + 1] for one in (self.products, self.attention, self.memory))
        return Hardware(products, attention, self.link_bytes_per_s, self.latency_s, memory)


def forward_s(
    work: Work, rows: int, shape: MeshShape, hardware: Hardware, speeds: Speeds = ALIKE, sent_bytes: float = SENT_BYTES
) -> float:
    """Return the seconds of a forward of `rows` batch rows on a mesh, whose ranks share the work by `speeds`, and
    exchange numbers of `sent_bytes`.
    """
    ranks = shape.ring * shape.ulysses
    firsts = range(0, shape.world_size, ranks)
    each = [rows] * shape.batch
    if rows >= shape.batch:
        overall = speeds.overall
        each = divide(rows, shape.batch, [sum(overall[first : first + ranks]) for first in firsts] if overall else ())
    return max(
        count * _row_s(work, shape, slice(first, first + ranks), hardware, speeds, sent_bytes)
        for count, first in zip(each, firsts, strict=True)
    )


def _row_s(work: Work, shape: MeshShape, group: slice, hardware: Hardware, speeds: Speeds, sent_bytes: float) -> float:
    """Return the seconds of one row on the ranks of one group, which split its tokens."""
    ulysses, ring = shape.ulysses, shape.ring
    by_tokens = (speeds.overall if ring > 1 else speeds.products)[group]
    by_heads = speeds.attention[group]
    tokens = divide(work.tokens, ulysses * ring, by_tokens)
    heads = divide(work.heads, ulysses, [sum(by_heads[place::ulysses]) for place in range(ulysses)] if by_heads else ())
    rest = work.width * work.attentions * REST_BYTES  # of a token
    rest_s = [rest / speed for speed in hardware.memory[group]] or [0.0] * len(tokens)
    products_s = max(
        own * (2 * work.weights / speed + rest)
        for own, speed, rest in zip(tokens, hardware.products[group], rest_s, strict=True)
    )
    operations = 4 * work.tokens * work.width * work.attentions / work.heads  # of a token and a head
    attention_s = max(
        operations * _queries(tokens, rank, ulysses) * heads[rank % ulysses] / speed
        for rank, speed in enumerate(hardware.attention[group])
    )
    of_group = max(_queries(tokens, rank, ulysses) for rank in range(0, ulysses * ring, ulysses))
    exchange_s = ring_s = 0.0
    if ulysses > 1:  # queries, keys, values and results, of which each rank receives the others' parts
        received = 4 * of_group * work.width * sent_bytes * (ulysses - 1) / ulysses**2
        exchange_s = work.attentions * (received / hardware.link_bytes_per_s + 2 * hardware.latency_s)
    if ring > 1:  # keys and values of the heads of this place, beside attention
        passed = 2 * of_group * work.width * sent_bytes * (ring - 1) / ulysses
        ring_s = work.attentions * (passed / hardware.link_bytes_per_s + (ring - 1) * hardware.latency_s)
    return products_s + max(attention_s, ring_s) + exchange_s


def _queries(tokens: Sequence[int], rank: int, ulysses: int) -> int:
    """Return the tokens of the Ulysses group of a rank, which it attends with."""
    first = rank // ulysses * ulysses
    return sum(tokens[first : first + ulysses])
