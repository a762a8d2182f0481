"""The 17 public Raylight workflows by what is known of their nodes: ids, links, and values as they were saved.

Models and prompts are those of tiny files, and nodes of other packs are left out. `NODES` of the project's notes has
the facts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FLUX, WAN, GGUF, CONTROL, VAE, LORA = (
    "flux.safetensors",
    "wan.safetensors",
    "flux.gguf",
    "control.safetensors",
    "vae.safetensors",
    "flux-lora.safetensors",
)
SEEDS = 8
TEN = ["local", "default", 2, 2, 1, 1, False, False, False, "TORCH_FLASH"]
TEN_CFG = ["local", "default", 2, 2, 1, True, False, False, False, "TORCH_FLASH"]
TEN_PARALLEL = ["local", "default", 2, 1, 1, True, False, False, False, "TORCH_FLASH"]
TEN_OF_NINE = ["local", "default", 2, 1, 1, 2, False, False, "TORCH_FLASH", "TORCH_FLASH"]
THIRTEEN = ["local", "default", 2, 2, 1, 1, 1, False, True, False, "TORCH_FLASH", False, False]
FOURTEEN = ["local", "default", 2, 2, 1, 1, 1, False, False, False, False, "TORCH_FLASH", False, False]
BYPASSED = 4


@dataclass(frozen=True, slots=True)
class Out:
    """An output of a node: its node, its place and its type."""

    node: int
    place: int
    type: str


@dataclass(slots=True)
class Saved:
    """A workflow as the frontend saves it, node by node."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)

    def add(self, kind: str, outputs: str = "", values: list[Any] | None = None, mode: int = 0, **links: Out) -> Any:
        """Add a node and return its output, or its outputs if there are several."""
        number = len(self.nodes) + 1
        inputs = []
        for place, (name, start) in enumerate(links.items()):
            link = len(self.links) + 1
            self.links.append([link, start.node, start.place, number, place, start.type])
            self.nodes[start.node - 1]["outputs"][start.place]["links"].append(link)
            inputs.append({"name": name, "type": start.type, "link": link})
        types = outputs.split()
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": [360 * ((number - 1) // 3), 330 * ((number - 1) % 3)],
                "size": [320, 200],
                "flags": {},
                "order": number,
                "mode": mode,
                "inputs": inputs,
                "outputs": [{"name": one, "type": one, "links": []} for one in types],
                "properties": {"Node name for S&R": kind},
                "widgets_values": values or [],
            }
        )
        found = tuple(Out(number, place, one) for place, one in enumerate(types))
        return found[0] if len(found) == 1 else found

    def to_json(self) -> dict[str, Any]:
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def _model(to: Saved, file: str, initializer: list[Any]) -> Out:
    workers = to.add("RayInitializer", "RAY_ACTORS_INIT", initializer)
    if file == GGUF:
        return to.add("RayGGUFLoader", "RAY_ACTORS", [GGUF, "default", "default"], ray_actors_init=workers)
    return to.add("RayUNETLoader", "RAY_ACTORS", [file, "default"], ray_actors_init=workers)


def _prompts(to: Saved, file: str) -> tuple[Out, Out]:
    kind = "wan" if file == WAN else "flux"
    first, second = (
        to.add("LoadTrainingDataset", "LATENT CONDITIONING", [f"{kind}-{one}"]) for one in ("positive", "negative")
    )
    return first[1], second[1]


def _latent(to: Saved, file: str) -> Out:
    if file == WAN:
        return to.add("EmptyHunyuanLatentVideo", "LATENT", [112, 80, 5, 1])
    return to.add("EmptySD3LatentImage", "LATENT", [112, 96, 1])


def _save(to: Saved, latent: Out) -> None:
    to.add("SaveLatent", "", ["saved"], samples=latent)


def _ksampler(to: Saved, model: Out, prompts: tuple[Out, Out], latent: Out, steps: tuple[int, int] = (0, 10000)) -> Out:
    """XFuserKSamplerAdvanced with the 10 values and the control that it had."""
    first, last = steps
    leftover = "disable" if last == 10000 else "enable"
    values = ["enable" if first == 0 else "disable", 7, "randomize", 3, 3.0, "euler", "simple", first, last, leftover]
    return to.add(
        "XFuserKSamplerAdvanced",
        "LATENT RAY_ACTORS",
        values,
        ray_actors=model,
        positive=prompts[0],
        negative=prompts[1],
        latent_image=latent,
    )[0]


def _simple(
    file: str, *patches: tuple[str, list[Any], int], initializer: list[Any] = TEN, parts: int = 1
) -> Callable[[], Saved]:
    """A model, patches of it and a sampler; in two parts each has a model of its own, as Wan 2.2 does."""

    def build() -> Saved:
        to = Saved()
        prompts, latent = _prompts(to, file), _latent(to, file)
        for part in range(parts):
            model = _model(to, file, initializer)
            for kind, values, mode in patches:
                model = to.add(kind, "RAY_ACTORS", values, mode, ray_actors=model)
            steps = (0, 10000) if parts == 1 else ((0, 2), (2, 10000))[part]
            latent = _ksampler(to, model, prompts, latent, steps)
        _save(to, latent)
        return to

    return build


def _custom(file: str, scheduler: str, values: list[Any], patch: str, shift: float) -> Callable[[], Saved]:
    """XFuserSamplerCustom with sigmas from a scheduler of Ray."""

    def build() -> Saved:
        to = Saved()
        prompts, latent = _prompts(to, file), _latent(to, file)
        model = to.add(patch, "RAY_ACTORS", [shift], ray_actors=_model(to, file, TEN))
        sigmas = to.add(scheduler, "SIGMAS", values, ray_actors=model)
        sampler = to.add("KSamplerSelect", "SAMPLER", ["euler"])
        done = to.add(
            "XFuserSamplerCustom",
            "LATENT RAY_ACTORS",
            [True, 11, "randomize", 3.0],
            ray_actors=model,
            positive=prompts[0],
            negative=prompts[1],
            sampler=sampler,
            sigmas=sigmas,
            latent_image=latent,
        )
        _save(to, done[0])
        return to

    return build


def _guided_twice() -> Saved:
    """LTX 2.3: two passes of the older XFuserSamplerCustomAdvanced; the second goes on with the model of the first."""
    to = Saved()
    prompts, latent = _prompts(to, WAN), _latent(to, WAN)
    model = _model(to, WAN, FOURTEEN)
    for seed in (42, 43):
        guider = to.add("RayCFGGuider", "RAY_GUIDER", [1], ray_actors=model, positive=prompts[0], negative=prompts[1])
        latent, denoised, model = to.add(
            "XFuserSamplerCustomAdvanced",
            "LATENT LATENT RAY_ACTORS",
            [True, seed, "randomize"],
            guider=guider,
            sampler=to.add("KSamplerSelect", "SAMPLER", ["euler"]),
            sigmas=to.add("ManualSigmas", "SIGMAS", ["1.0, 0.7, 0.3, 0.1"]),
            latent_image=latent,
        )
    _save(to, denoised)
    return to


def _data_parallel() -> Saved:
    """Flux with an image for each seed."""
    to = Saved()
    prompts, latent = _prompts(to, FLUX), _latent(to, FLUX)
    model = to.add(
        "RayTorchCompileModel", "RAY_ACTORS", ["inductor"], BYPASSED, ray_actors=_model(to, FLUX, TEN_PARALLEL)
    )
    noises = to.add("DPNoiseList", "NOISE", [value for seed in range(SEEDS) for value in (seed, "randomize")])
    done = to.add(
        "DPKSamplerAdvanced",
        "LATENT",
        list(range(SEEDS)),
        ray_actors=model,
        noise_list=noises,
        positive=prompts[0],
        negative=prompts[1],
        latent_image=latent,
    )
    _save(to, done)
    return to


def _controlled() -> Saved:
    """Qwen with a ControlNet of Ray."""
    to = Saved()
    prompts, latent = _prompts(to, FLUX), _latent(to, FLUX)
    model = to.add("RayModelSamplingAuraFlow", "RAY_ACTORS", [3], ray_actors=_model(to, FLUX, THIRTEEN))
    controlled = to.add(
        "RayControlNetApply",
        "CONDITIONING CONDITIONING",
        [1, 0, 1],
        positive=prompts[0],
        negative=prompts[1],
        reference=to.add("RayControlNetLoader", "RAY_CONTROL_NET", [CONTROL], ray_actors=model),
        image=to.add("EmptyImage", "IMAGE", [112, 96, 1, 0x3070B0]),
        ray_vae=to.add("RayVAELoader", "RAY_VAE", [VAE]),
    )
    _save(to, _ksampler(to, model, controlled, latent))
    return to


_SD3, _AURA = ("RayModelSamplingSD3", [8], 0), ("RayModelSamplingAuraFlow", [3], 0)
_COMPILED = ("RayTorchCompileModel", ["inductor"], BYPASSED)

FORMS: dict[str, Callable[[], Saved]] = {
    "FluxDev": _simple(FLUX, _COMPILED),
    "Flux_2_Edit": _simple(FLUX),
    "Z_Image_Turbo": _simple(FLUX),
    "Stable_Diffusion": _simple(FLUX, initializer=TEN_OF_NINE),
    "Chroma": _simple(FLUX, _AURA, initializer=TEN_CFG),
    "Kandinsky_I2V": _simple(WAN, _SD3),
    "Qwen_Edit": _simple(FLUX, _AURA, initializer=TEN_CFG),
    "Qwen": _simple(FLUX, _AURA, _COMPILED, initializer=TEN_CFG),
    "WanT2V": _simple(WAN, _SD3, _COMPILED),
    "WAN_22": _simple(WAN, _SD3, parts=2),
    "WAN_SVI": _simple(WAN, _SD3, parts=2),
    "Chroma_Radiance": _custom(FLUX, "RayBetaSamplingScheduler", [3, 0.4, 0.4], "RayModelSamplingAuraFlow", 3),
    "Hunyuan_1_5_I2V": _custom(WAN, "RayBasicScheduler", ["simple", 3, 1], "RayModelSamplingSD3", 8),
    "Flux_2_GGUF": _simple(GGUF),
    "LTX2_3_i2v": _guided_twice,
    "FluxDev_Data_Parallel": _data_parallel,
    "Qwen_2512_Fun_ControlNet": _controlled,
}
# What an older initializer's values mean today, by the names of its inputs.
_PLAIN = {"GPU": 2, "ulysses_degree": 2, "ring_degree": 1, "cfg_degree": 1, "dp_degree": 0, "FSDP": False}
_OFF = {"FSDP_CPU_OFFLOAD": False, "XFuser_attention": "TORCH_FLASH", "skip_comm_test": False, "use_mmap": False}
MEANING: dict[str, dict[str, Any]] = dict.fromkeys(FORMS, _PLAIN | _OFF | {"clear_vram_after_sampling": False}) | {
    "Stable_Diffusion": _PLAIN | _OFF | {"ulysses_degree": 1, "cfg_degree": 2, "clear_vram_after_sampling": False},
    "LTX2_3_i2v": _PLAIN | _OFF | {"dp_degree": 1},
    "FluxDev_Data_Parallel": _PLAIN | _OFF | {"ulysses_degree": 1},
    "Qwen_2512_Fun_ControlNet": _PLAIN | _OFF | {"dp_degree": 1, "clear_vram_after_sampling": True},
}
