"""Remedies for failures, by how the workers were set up."""

from __future__ import annotations

import pytest

from raylight.cluster.config import SessionConfig
from raylight.cluster.errors import DIED, FAILED, HUNG, OUT_OF_MEMORY
from raylight.driver.workers import remedies
from raylight.host.recipe import OFFLOADED, REPLICATED, SHARDED
from raylight.parallel.mesh import MeshShape


@pytest.mark.parametrize(
    ("kind", "sharding", "mesh", "with_", "without"),
    [
        (OUT_OF_MEMORY, REPLICATED, MeshShape(ulysses=2), "switch FSDP on", "FSDP_CPU_OFFLOAD"),
        (OUT_OF_MEMORY, REPLICATED, MeshShape(), "a smaller size", "switch FSDP on"),
        (OUT_OF_MEMORY, SHARDED, MeshShape(ulysses=2), "switch FSDP_CPU_OFFLOAD on", "switch FSDP on"),
        (OUT_OF_MEMORY, OFFLOADED, MeshShape(batch=2), "raise ulysses_degree", "switch FSDP"),
        (DIED, REPLICATED, MeshShape(ulysses=2), "the system's memory", "NCCL"),
        (HUNG, REPLICATED, MeshShape(ulysses=2), "NCCL_P2P_DISABLE=1", "FSDP"),
        (FAILED, None, MeshShape(ulysses=2), "restart", "FSDP"),
    ],
)
def test_remedies(kind: str, sharding: str | None, mesh: MeshShape, with_: str, without: str) -> None:
    text = remedies(SessionConfig(mesh, "cuda"), sharding, kind)
    assert with_ in text and without not in text
