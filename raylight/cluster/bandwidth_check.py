"""The check of the links between workers, done once for a set of GPUs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from raylight.parallel.bandwidth import UNEVEN, Links, fast_ranks

from . import machines
from .place import Place

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
_SLOW_GB_PER_S = 2.0  # PCIe 3.0 x4 has 4, also through the host's memory
REMEDY = (
    "start ComfyUI with NCCL_P2P_DISABLE=1, which sends through the host's memory; if that does not help, add "
    "NCCL_SHM_DISABLE=1 or NCCL_IB_DISABLE=1. NCCL_DEBUG=INFO shows what NCCL does"
)

Key = tuple[tuple[str, str, int | None], ...]
_known: dict[Key, Links] = {}


def key_of(places: Mapping[int, Place]) -> Key:
    """Return a key that identifies a set of GPUs."""
    return tuple((place.host, place.device, place.gpu) for place in places.values())


def known(places: Mapping[int, Place]) -> Links | None:
    """Return the links that were measured between these GPUs before, in this process."""
    return _known.get(key_of(places))


def fast_ranks_of(places: Mapping[int, Place]) -> int:
    """Return how many ranks, next to each other, form groups with links that are several times faster than others, as
    measured between GPUs, or else by their machines; 0 if no link is.
    """
    links = known(places)
    if links is None or any(place.gpu is None for place in places.values()):
        return machines.fast_ranks([places[rank].node for rank in sorted(places)])
    return fast_ranks(links, len(places))


def check_exact(links: Links) -> None:
    """Raise RuntimeError if data arrived corrupted."""
    if not links.exact:
        raise RuntimeError(
            f"data between the workers' GPUs arrives corrupted, as happens if the system's settings (IOMMU, ACS) break "
            f"direct transfers between GPUs: {REMEDY}"
        )


def keep(places: Mapping[int, Place], links: Links) -> None:
    """Keep measured links, and log a warning for slow ones."""
    _known[key_of(places)] = links
    if warning := _warning(places, links):
        logger.warning("%s", warning)


def _warning(places: Mapping[int, Place], links: Links) -> str:
    if not links.bytes_per_s or all(place.gpu is None for place in places.values()):
        return ""
    fastest = max(links.bytes_per_s.values())
    pair, slowest = min(links.bytes_per_s.items(), key=lambda item: item[1])
    names = " and ".join(str(places[rank]) for rank in pair)
    if slowest < _SLOW_GB_PER_S * 1e9:
        return (
            f"the link between {names} is slow: {slowest / 1e9:.1f} GB/s. Check that the slots have enough lanes. "
            f"If NCCL_P2P_DISABLE or NCCL_SHM_DISABLE is set, try without. cfg_degree and dp_degree send less "
            f"data than ulysses_degree"
        )
    if fastest > UNEVEN * slowest:
        return (
            f"the link between {names} is much slower than others: {slowest / 1e9:.1f} against {fastest / 1e9:.1f} "
            f"GB/s. Choose other GPUs by GPU_SELECT, or set ulysses_degree to the number of GPUs with fast links to "
            f"each other, and ring_degree to the number of such groups"
        )
    return ""
