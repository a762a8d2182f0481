"""The check of the ways between workers, done once for a set of GPUs, and what its figures mean for people."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from raylight.parallel.bandwidth import Links

from .actor import Place

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
_SLOW_GB_PER_S = 2.0  # PCIe 3.0 x4 has 4, also by way of the host's memory
_UNEVEN = 3.0
REMEDY = (
    "start ComfyUI with NCCL_P2P_DISABLE=1, which takes the way by the host's memory; where that does not help, "
    "with NCCL_SHM_DISABLE=1 or NCCL_IB_DISABLE=1 too. NCCL_DEBUG=INFO shows what NCCL does"
)

Key = tuple[tuple[str, str, int | None], ...]
_known: dict[Key, Links] = {}


def key_of(places: Iterable[Place]) -> Key:
    """What tells one set of GPUs from another."""
    return tuple((place.host, place.device, place.gpu) for place in places)


def known(places: Iterable[Place]) -> Links | None:
    """What was measured for these GPUs before, in this process."""
    return _known.get(key_of(places))


def keep(places: Mapping[int, Place], links: Links) -> None:
    """Take what was measured, and tell people of what is slow. Raises RuntimeError where data arrived wrong."""
    if not links.exact:
        raise RuntimeError(
            f"the workers' GPUs get other data than was sent to them, as happens where the system's "
            f"settings (IOMMU, ACS) break the direct way between GPUs: {REMEDY}"
        )
    _known[key_of(places.values())] = links
    for sentence in _judged(places, links):
        logger.warning("%s", sentence)


def _judged(places: Mapping[int, Place], links: Links) -> list[str]:
    if not links.bytes_per_s or all(place.gpu is None for place in places.values()):
        return []
    fastest = max(links.bytes_per_s.values())
    pair, slowest = min(links.bytes_per_s.items(), key=lambda item: item[1])
    names = " and ".join(str(places[rank]) for rank in pair)
    if slowest < _SLOW_GB_PER_S * 1e9:
        return [
            f"the way between {names} is slow: {slowest / 1e9:.1f} GB/s. Are the cards in slots with enough lanes? "
            f"If NCCL_P2P_DISABLE or NCCL_SHM_DISABLE is set, try without. Fewer tokens travel with cfg_degree or "
            f"dp_degree than with ulysses_degree"
        ]
    if fastest > _UNEVEN * slowest:
        return [
            f"the way between {names} is much slower than others: {slowest / 1e9:.1f} against "
            f"{fastest / 1e9:.1f} GB/s. Choose other GPUs by GPU_SELECT, or let ulysses_degree be the number of "
            f"those that are close to each other and ring_degree that of such groups"
        ]
    return []
