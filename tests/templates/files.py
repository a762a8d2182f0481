"""Every file that a prompt's nodes name, created under that name."""

from __future__ import annotations

import json
import re
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ltx2
import numpy
import torch
from architectures import diffusion_model, metadata_of, prefix_of_vae
from around import control_net, image_encoder, style_model, text_encoder, vae, write
from loras import lora_for
from official_names import UnknownFile
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from raylight.dev.demo.graphs import Graph

# ComfyUI's folder, by the names that its loaders' inputs have.
FOLDERS = (
    ("unet_name", "diffusion_models"),
    ("ckpt_name", "checkpoints"),
    ("vae_name", "vae"),
    ("lora_name", "loras"),
    (r"clip_name\d?", "text_encoders"),
    ("text_encoder", "text_encoders"),
    ("control_net_name", "controlnet"),
    ("style_model_name", "style_models"),
)
# Loaders whose input has a name that others have, too.
FOLDERS_OF_LOADERS = {"CLIPVisionLoader": "clip_vision", "LatentUpscaleModelLoader": "latent_upscale_models"}
ALL_FOLDERS = sorted({folder for _, folder in FOLDERS} | {*FOLDERS_OF_LOADERS.values()})
DIFFUSION_MODELS = ("diffusion_models", "checkpoints")
MODEL = re.compile(r"\.(safetensors|sft|ckpt|pt|pth|gguf)$")
PICTURE = (96, 64)


@dataclass(frozen=True)
class Asked:
    node: str
    folder: str
    name: str


def asked(graph: Graph) -> Iterator[Asked]:
    """Return the model files that a prompt's nodes name."""
    for node, entry in graph.items():
        for key, value in entry["inputs"].items():
            if not isinstance(value, str) or not MODEL.search(value):
                continue
            folder = FOLDERS_OF_LOADERS.get(entry["class_type"]) or next(
                (folder for pattern, folder in FOLDERS if re.fullmatch(pattern, key)), None
            )
            if folder is None:
                raise UnknownFile(f"{entry['class_type']}: what {key} = {value} is is not known here")
            yield Asked(node, folder, value)


def write_models(graph: Graph, models: Path) -> list[Path]:
    """Write the files that a prompt names to `models`, and return them. Raises UnknownFile."""
    wanted = sorted(set(asked(graph)), key=lambda a: (a.folder == "loras", a.folder, a.name))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    written = []
    for item in wanted:
        path = models / item.folder / item.name
        if path in written:
            continue
        written.append(path)
        if not path.exists():  # otherwise it is from another prompt
            made = _lora(graph, item, shapes) if item.folder == "loras" else _make(item)
            write(path, made, _metadata(item))
        if item.folder in DIFFUSION_MODELS:
            with safe_open(path, "pt") as file:
                shapes[item.name] = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return written


def _make(item: Asked) -> dict[str, Tensor]:
    makers = {
        "diffusion_models": diffusion_model,
        "text_encoders": text_encoder,
        "vae": vae,
        "clip_vision": image_encoder,
        "style_models": style_model,
        "controlnet": control_net,
        "checkpoints": _checkpoint,
        "latent_upscale_models": lambda name: ltx2.upsampler(),
    }
    if item.folder not in makers:
        raise UnknownFile(f"files for {item.folder} ({item.name}) are not made here")
    return makers[item.folder](item.name)


def _metadata(item: Asked) -> dict[str, str] | None:
    if item.folder in DIFFUSION_MODELS:
        return metadata_of(item.name)
    return {"config": json.dumps(ltx2.UPSAMPLER)} if item.folder == "latent_upscale_models" else None


def _checkpoint(name: str) -> dict[str, Tensor]:
    """Return a diffusion model, and a VAE and a text encoder to be filled."""
    tensors = {f"model.diffusion_model.{key}": tensor for key, tensor in diffusion_model(name).items()}
    if metadata_of(name) is not None:
        return tensors | ltx2.vaes()
    tensors |= {prefix_of_vae(name) + key: tensor for key, tensor in vae(name).items()}
    for key, shape in (
        ("clip_l.transformer.text_model.final_layer_norm.weight", (768,)),
        ("clip_g.transformer.text_model.final_layer_norm.weight", (1280,)),
        ("t5xxl.transformer.encoder.final_layer_norm.weight", (4096,)),
    ):
        tensors[f"text_encoders.{key}"] = torch.ones(shape)
    return tensors


def _lora(graph: Graph, item: Asked, shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Return a LoRA for the model at its loader, or if none is found for any model of the prompt."""
    file = _source(graph, item.node) or next(iter(shapes), None)
    if file is None or file not in shapes:
        raise UnknownFile(f"which model the LoRA {item.name} is for is not known here")
    prefix = "" if any(name.startswith("model.diffusion_model.") for name in shapes[file]) else "diffusion_model."
    named = {
        prefix + name.removeprefix("model."): shape
        for name, shape in shapes[file].items()
        if "vae." not in name and "text_encoders." not in name
    }
    return lora_for(named, ["lora"], sum(item.name.encode()), 0.03)


def _source(graph: Graph, node: str) -> str | None:
    """Return the diffusion model file at the other end of a node's `model`, through any nodes between."""
    seen, open_nodes = set(), [node]
    while open_nodes:
        node = open_nodes.pop(0)
        if node in seen or node not in graph:
            continue
        seen.add(node)
        inputs = graph[node]["inputs"]
        if isinstance(file := inputs.get("unet_name", inputs.get("ckpt_name")), str):
            return file
        open_nodes += [value[0] for key, value in inputs.items() if isinstance(value, list) and value]
    return None


def write_media(graph: Graph, folder: Path) -> None:
    """Write pictures, videos and sounds that a prompt loads from ComfyUI's input folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, entry in enumerate(graph.values()):
        for value in entry["inputs"].values():
            if not isinstance(value, str):
                continue
            path = folder / value.removesuffix(" [input]")
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = _picture(seed)
                (picture if path.suffix.lower() in (".png", ".webp") else picture.convert("RGB")).save(path)
            elif path.suffix.lower() in (".mp4", ".webm", ".mov"):
                _video(path, seed)
            elif path.suffix.lower() in (".wav", ".mp3", ".flac", ".m4a", ".ogg"):
                _sound(path)


def _picture(seed: int) -> Image.Image:
    """Return coarse noise: fine noise would vanish when a node reduces it."""
    coarse = numpy.random.default_rng(seed).integers(0, 255, (PICTURE[1] // 8, PICTURE[0] // 8, 4), dtype=numpy.uint8)
    coarse[..., 3] = 255
    coarse[2:6, 4:10, 3] = 0  # the area to repaint, for nodes that use the picture's mask
    return Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC)


def _video(path: Path, seed: int, frames: int = 33) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=16)
        stream.width, stream.height, stream.pix_fmt = *PICTURE, "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_image(_picture(seed).convert("RGB").rotate(index))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _sound(path: Path, seconds: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = (8000 * numpy.sin(numpy.arange(16000 * seconds) / 20)).astype(numpy.int16)
    with wave.open(str(path), "wb") as file:  # readers go by the content, not by the name
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(tone.tobytes())
