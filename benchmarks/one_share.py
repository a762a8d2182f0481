"""One rank's exact share of a denoising step on one GPU, and from it the time of N GPUs.

The share is what rank 0 of N does: its tokens through all blocks, its heads over all tokens. What it would receive is
made up locally, of the right size, so that packing costs what it costs; the bytes that it would send are counted, and
take the time that a link of a given bandwidth takes, not hidden behind computation. A prediction, not a measurement of
N GPUs.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LINKS = {"NVLink": 450.0, "PCIe 4 x16": 25.0, "PCIe 3 x8": 6.0}  # GB/s, one way, as reached in practice

# Real widths; latents of 832x480 with 33 frames and of 1024x1024.
FULL = {
    "wan": ("Wan T2V", {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "text_dim": 4096},
            (1, 16, 9, 60, 104), {"c_crossattn": (1, 512, 4096)}),
    "flux": ("Flux Dev", {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
                          "axes_dim": [16, 56, 56], "mlp_ratio": 4.0, "context_in_dim": 4096, "vec_in_dim": 768},
             (1, 16, 128, 128), {"c_crossattn": (1, 512, 4096), "y": (1, 768), "guidance": (1,)}),
}


class OneShare:
    """Ulysses of rank 0 of `degree`, without the others."""

    def __init__(self, degree: int) -> None:
        self._degree = degree
        self.sent = 0

    def __call__(self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], mask: Tensor | None,
                 scale: float | None) -> Tensor:
        if self._degree == 1:
            return kernel(q, k, v, mask, scale)
        heads, total = -(-q.shape[1] // self._degree), sum(lengths)
        away = 1 - 1 / self._degree
        self.sent += int(away * 2 * q.element_size() * (q.numel() + k.numel()))  # q, k and v there, the output back
        q, k, v = (self._received(t, heads, total) for t in (q, k, v))
        out = kernel(q, k, v, mask, scale)
        return out[:, :, : lengths[0]].repeat(1, self._degree, 1, 1)[:, : heads * self._degree]

    def _received(self, local: Tensor, heads: int, total: int) -> Tensor:
        """All tokens of this rank's heads, packed as an exchange packs them."""
        packed = torch.cat([part.reshape(-1) for part in local.split(heads, 1)])  # what is sent
        received = packed.clone().view(self._degree, local.shape[0], heads, -1, local.shape[3])
        return torch.cat(list(received), dim=2)[:, :, :total]


def measure(name: str, degrees: Sequence[int], layers: int | None, repeats: int) -> dict[int, tuple[float, int]]:
    """For each degree the median seconds of one step of its share, and the bytes that a rank sends in it."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from raylight.attention.kernels import kernel
    from raylight.host import attention_hook
    from raylight.parallel.attention import SequenceAttention
    from raylight.parallel.hooks import SequenceHooks
    from raylight.parallel.tokens import TokenState
    from raylight.plans import plan_for

    class ShareHooks(SequenceHooks):
        """Gathers as if the other ranks' pieces were like this one's."""

        def _join(self, local: Tensor, gather: Any) -> Tensor:
            tokens, sizes = self._tokens, self._tokens.sizes(gather.stream)
            before = tokens.lengths(gather.after)[0]
            head, tail = local.split([before, sizes[0]], gather.dim)
            tokens.leave(gather.stream)
            share.sent += tail.numel() * tail.element_size()
            return torch.cat([head, *(tail.narrow(gather.dim, 0, size) for size in sizes)], gather.dim)

    model, inputs = _model(name, layers)
    device = torch.device("cuda")
    seconds: dict[int, list[float]] = {degree: [] for degree in degrees}
    sent = {}
    for turn in range(repeats + 1):
        for degree in degrees:
            tokens, share = TokenState(0, degree), OneShare(degree)
            hooks = None
            if degree > 1:
                hooks = ShareHooks(model.diffusion_model, plan_for(model.diffusion_model), tokens)
            options: dict[str, Any] = {}
            attention = SequenceAttention(tokens, share)
            attention_hook.install(options, attention, kernel("auto", device))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.inference_mode():
                start.record()
                model.apply_model(**inputs, transformer_options=options["transformer_options"])
                end.record()
            torch.cuda.synchronize()
            if turn:  # the first is warm-up
                seconds[degree].append(start.elapsed_time(end) / 1e3)
            sent[degree] = share.sent
            if hooks is not None:
                hooks.remove()
    return {degree: (statistics.median(seconds[degree]), sent[degree]) for degree in degrees}


def _model(name: str, layers: int | None) -> tuple[Any, dict[str, Tensor]]:
    """The model at real width in bfloat16 with random weights made on the GPU, and inputs for it."""
    import comfy.supported_models

    from raylight.zoo import families

    family_name, changes, shape, texts = FULL[name]
    family = families()[family_name]
    changes = dict(changes)
    if layers is not None:
        changes.update({key: layers for key in ("num_layers", "depth", "depth_single_blocks") if key in changes})
    config = getattr(comfy.supported_models, family.config)({**family.unet_config, **changes})
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, "", device=torch.device("cuda")).to("cuda").eval().requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        scale = max(1, parameter[0].numel()) ** -0.5 if parameter.ndim >= 2 else 0.1
        parameter.normal_(0, scale, generator=generator)
    inputs = {key: torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)
              for key, size in {"x": shape, **texts}.items()}
    return model, inputs | {"t": torch.tensor([0.7], device="cuda")}


def report(name: str, degrees: Sequence[int], layers: int | None, repeats: int) -> None:
    """Print what was measured, and the prediction for each link."""
    measured = measure(name, degrees, layers, repeats)
    whole = measured[degrees[0]][0]
    size = "" if layers is None else f", {layers} layers of each kind instead of all"
    print(f"\n{name}: latent {FULL[name][2]}{size}; one rank's share measured, N GPUs predicted")
    print(f"{'N':>3} {'share s':>9} {'of 1/N':>8} {'sent MB':>9}   " + "   ".join(f"{link:>20}" for link in LINKS))
    for degree, (seconds, sent) in measured.items():
        cells = []
        for bandwidth in LINKS.values():
            predicted = seconds + sent / bandwidth / 1e9
            cells.append(f"{predicted:>9.3f} s {whole / predicted:>6.2f}x")
        print(f"{degree:>3} {seconds:>9.3f} {seconds * degree / whole:>8.1%} {sent / 1e6:>9.0f}   "
              + "   ".join(f"{cell:>20}" for cell in cells))
