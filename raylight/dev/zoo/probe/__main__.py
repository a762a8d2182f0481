"""`python -m raylight.dev.zoo.probe MODEL`: show where a model's blocks have tokens, and draft its plan.

MODEL is a family of `raylight.dev.zoo` or a `.safetensors` file, of which only the header is read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raylight.dev.setup import comfyui


def main(arguments: list[str] | None = None) -> int:
    """Print the report. Return 1, with a message, if the model cannot be called with these inputs."""
    parser = argparse.ArgumentParser(prog="python -m raylight.dev.zoo.probe", description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=SIZES",
        help="an argument of the model's forward, such as c_crossattn=1,T,4096 or x=1,16,F,H,W; the "
        "letters are varied: T is text, F, H and W are the image",
    )
    parser.add_argument(
        "--device",
        choices=("meta", "cpu"),
        default="meta",
        help="meta computes nothing, so that any size fits; a few models only run on cpu",
    )
    options = parser.parse_args(arguments)
    comfyui.put_on_path(Path(__file__).resolve().parents[4])
    from comfy.cli_args import args

    args.cpu = True  # before ComfyUI picks a device
    from raylight.dev.zoo.probe.report import report

    try:
        print(report(options.model, options.input, options.device))
    except ValueError as error:
        print(f"{options.model}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
