"""A small VAE in the form of ComfyUI's approximate one (TAESD), with a computed encoder and a trained decoder.

The encoder takes the 16 principal components of blocks of 8 x 8 pixels. TAESD's layers can do this exactly: pixels are
not negative, so ReLU leaves them unchanged; convolutions of stride 2 collect 2 x 2, then 4 x 4 of them; the last layers
compute the components as differences of two positive parts. As the encoder needs no training, the transformer can be
trained beside the decoder.

TAESD's decoder has 64 channels for photographs. These pictures need half of them; the others are stored as zeros, which
stay zeros through convolutions, ReLU and residual sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .scenes import SIZE, draw_scene, render

CHANNELS = 16  # of the latents, as Wan 2.1's
BLOCK = 8
WIDTH = 32
FULL_WIDTH = 64
SCALE = 0.25  # `vae_scale`: the decoder bounds what it is given to 3, and these latents are wider than those of TAESD
CROP = 64
NOISE = 0.1  # added to latents in training, so that the decoder forgives what a sampler leaves


@dataclass(frozen=True, slots=True)
class Codec:
    """Convert pictures to the latents that a transformer learns, of mean about 0 and standard deviation 1.

    `matrix` (CHANNELS, 3, BLOCK, BLOCK) and `bias` (CHANNELS) make them from pixels in 0..1. `mean` and `std`
    (CHANNELS) are the latent format's, by which a VAE's latents differ from them.
    """

    matrix: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of_scenes(cls, mean: Tensor, std: Tensor, seed: int, count: int = 400) -> Codec:
        """Make a codec from the principal components of random scenes.

        Each is divided by the square root of its standard deviation. Dividing by the deviation itself would make
        details as strong as colors.
        """
        sample = pictures(random.Random(seed), count)
        blocks = functional.unfold(sample, BLOCK, stride=BLOCK).transpose(1, 2).reshape(-1, 3 * BLOCK * BLOCK).double()
        middle = blocks.mean(0)
        values, vectors = torch.linalg.eigh((blocks - middle).T @ (blocks - middle) / len(blocks))
        values, vectors = values[-CHANNELS:].flip(0), vectors[:, -CHANNELS:].flip(1)
        gain = values**-0.25
        gain /= (values * gain**2).mean().sqrt()
        matrix = vectors * gain
        return cls(matrix.T.reshape(CHANNELS, 3, BLOCK, BLOCK).float(), -(middle @ matrix).float(), mean, std)

    def encode(self, pixels: Tensor) -> Tensor:
        """Convert pixels (B, 3, H, W) in 0..1 to latents (B, CHANNELS, H / 8, W / 8)."""
        return functional.conv2d(pixels, self.matrix, self.bias, stride=BLOCK)

    def for_decoder(self, latents: Tensor) -> Tensor:
        """Return the decoder's input for these latents: the VAE's latents, scaled."""
        return (latents * self.std.reshape(1, -1, 1, 1) + self.mean.reshape(1, -1, 1, 1)) * SCALE


def pictures(generator: random.Random, count: int, size: int = SIZE) -> Tensor:
    """Return random scenes (count, 3, size, size) in 0..1; below SIZE they are crops, aligned to blocks."""
    tensors = []
    for _ in range(count):
        left, top = (generator.randrange(0, SIZE - size + 1, BLOCK) for _ in range(2))
        picture = render(draw_scene(generator)).crop((left, top, left + size, top + size))
        tensors.append(torch.from_numpy(np.array(picture)))
    return torch.stack(tensors).permute(0, 3, 1, 2).float() / 255


def _conv(n_in: int, n_out: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **options)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _encoder(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3, width), _Block(width)]
    for _ in range(3):
        layers += [_conv(width, width, stride=2, bias=False), _Block(width), _Block(width), _Block(width)]
    return nn.Sequential(*layers, _conv(width, CHANNELS))


def _decoder(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [_Clamp(), _conv(CHANNELS, width), nn.ReLU()]
    for _ in range(3):
        layers += [
            _Block(width),
            _Block(width),
            _Block(width),
            nn.Upsample(scale_factor=2),
            _conv(width, width, bias=False),
        ]
    return nn.Sequential(*layers, _Block(width), _conv(width, 3))


def encoder_state(codec: Codec) -> dict[str, Tensor]:
    """Return the codec as weights of TAESD's encoder, which outputs the VAE's latents times SCALE."""
    network = _encoder(FULL_WIDTH)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        first, second, third, fourth, last = (layer for layer in network if isinstance(layer, nn.Conv2d))
        for colour in range(3):
            first.weight[colour, colour, 1, 1] = 1
        # Of what is collected, channel (row * side + column) * 3 + colour is a pixel of a square of that side.
        for convolution, side in ((second, 1), (third, 2)):
            for row in range(2 * side):
                for column in range(2 * side):
                    for colour in range(3):
                        source = (row % side * side + column % side) * 3 + colour
                        target = (row * 2 * side + column) * 3 + colour
                        convolution.weight[target, source, 1 + row // side, 1 + column // side] = 1
        matrix = codec.matrix.reshape(CHANNELS, 3, 2, 4, 2, 4).permute(0, 3, 5, 1, 2, 4).reshape(CHANNELS, 48, 2, 2)
        fourth.weight[:CHANNELS, :48, 1:, 1:] = matrix
        fourth.weight[CHANNELS : 2 * CHANNELS, :48, 1:, 1:] = -matrix
        for channel in range(CHANNELS):
            last.weight[channel, channel, 1, 1] = codec.std[channel] * SCALE
            last.weight[channel, CHANNELS + channel, 1, 1] = -codec.std[channel] * SCALE
        last.bias.copy_((codec.bias * codec.std + codec.mean) * SCALE)
    return network.state_dict()


def train_decoder(
    codec: Codec,
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
    batch: int = 8,
    learning_rate: float = 3e-3,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Train and return weights of TAESD's decoder, at its full width."""
    torch.manual_seed(seed)
    generator = random.Random(seed)
    network = _decoder(WIDTH).to(device)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    for step in range(steps):
        target = pictures(generator, batch, CROP)
        latents = codec.encode(target)
        result = network(codec.for_decoder(latents + NOISE * torch.randn_like(latents)).to(device))
        target = target.to(device)
        loss = functional.mse_loss(result, target) + 0.3 * functional.l1_loss(result, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    return _padded(network.state_dict(), _decoder(FULL_WIDTH).state_dict())


def _padded(tensors: dict[str, Tensor], shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {name: torch.zeros_like(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        result[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return result


def vae_state(encoder: dict[str, Tensor], decoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return both in one state dict, as ComfyUI's VAE loader expects TAESD."""
    return {
        "vae_scale": torch.tensor(SCALE),
        "vae_shift": torch.tensor(0.0),
        **{f"taesd_encoder.{name}": tensor for name, tensor in encoder.items()},
        **{f"taesd_decoder.{name}": tensor for name, tensor in decoder.items()},
    }
