"""Graphs in ComfyUI's API format: the same picture by stock nodes and by workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Graph = dict[str, dict[str, Any]]


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    """Return a node of a graph."""
    return {"class_type": kind, "inputs": inputs}


@dataclass(frozen=True, slots=True)
class Sampling:
    """What both graphs share. `prompts` names the stored conditioning; sizes are in pixels and frames."""

    model: str
    positive: str = "positive"
    negative: str = "negative"
    width: int = 176
    height: int = 144
    frames: int = 9
    batch: int = 1
    seed: int = 7
    steps: int = 6
    cfg: float = 4.0
    sampler: str = "euler"
    scheduler: str = "simple"
    image: bool = False

    def latent(self) -> dict[str, Any]:
        if self.image:
            return node("EmptySD3LatentImage", width=self.width, height=self.height, batch_size=self.batch)
        return node(
            "EmptyHunyuanLatentVideo", width=self.width, height=self.height, length=self.frames, batch_size=self.batch
        )


def stock(job: Sampling, prefix: str = "stock") -> Graph:
    """Return a graph of UNETLoader and KSampler (Advanced), without Raylight."""
    return _common(job, prefix) | {
        "model": node("UNETLoader", unet_name=job.model, weight_dtype="default"),
        "sample": node("KSamplerAdvanced", **_sampler(job), model=["model", 0]),
    }


def initializer(workers: int, **inputs: Any) -> dict[str, Any]:
    """Return a Ray initializer for `workers` workers that split the tokens; `inputs` replace others of its inputs."""
    settings = {
        "ray_cluster_address": "local",
        "ray_cluster_namespace": "default",
        "GPU": workers,
        "ulysses_degree": workers,
        "ring_degree": 1,
        "cfg_degree": 1,
        "dp_degree": 1,
        "sync_ulysses": False,
        "clear_vram_after_sampling": False,
        "FSDP": False,
        "FSDP_CPU_OFFLOAD": False,
        "XFuser_attention": "TORCH_FLASH",
        "skip_comm_test": False,
        "use_mmap": False,
    }
    return node("RayInitializer", **settings | inputs)


def on_workers(job: Sampling, workers: int, prefix: str = "raylight", **inputs: Any) -> Graph:
    """Return the same graph on `workers` workers; other arguments replace inputs of the Ray initializer."""
    return _common(job, prefix) | {
        "workers": initializer(workers, **inputs),
        "model": node("RayUNETLoader", unet_name=job.model, weight_dtype="default", ray_actors_init=["workers", 0]),
        "sample": node("XFuserKSamplerAdvanced", **_sampler(job), ray_actors=["model", 0]),
    }


def _sampler(job: Sampling) -> dict[str, Any]:
    return {
        "add_noise": "enable",
        "noise_seed": job.seed,
        "steps": job.steps,
        "cfg": job.cfg,
        "sampler_name": job.sampler,
        "scheduler": job.scheduler,
        "positive": ["positive", 1],
        "negative": ["negative", 1],
        "latent_image": ["latent", 0],
        "start_at_step": 0,
        "end_at_step": 10000,
        "return_with_leftover_noise": "disable",
    }


def _common(job: Sampling, prefix: str) -> Graph:
    return {
        "positive": node("LoadTrainingDataset", folder_name=job.positive),
        "negative": node("LoadTrainingDataset", folder_name=job.negative),
        "latent": job.latent(),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix=prefix),
    }
