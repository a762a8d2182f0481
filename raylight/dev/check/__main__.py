"""Say which seams of the ComfyUI in $COMFYUI_PATH are gone: `make check`."""

from __future__ import annotations

import logging
import os
import sys
import time


def main() -> int:
    """Print a sentence for each seam that is gone, and return 1 if there are any."""
    began = time.monotonic()
    # ComfyUI before the pack, as in the workers: both have a module named `nodes`.
    here = [path for path in sys.path if path not in ("", os.getcwd())]
    sys.path[:] = [os.environ["COMFYUI_PATH"], *here, os.getcwd()]
    from comfy.cli_args import args

    args.cpu = True
    logging.getLogger().setLevel(logging.ERROR)
    from comfyui_version import __version__

    from raylight.dev.check import all_seams

    seams = all_seams()
    gone = [sentence for seam in seams if (sentence := seam.missing())]
    for sentence in gone:
        print(f"- {sentence}")
    there = f"all {len(seams)}" if not gone else f"{len(seams) - len(gone)} of {len(seams)}"
    print(
        f"ComfyUI {__version__} has {there} seams that Raylight stands on ({time.monotonic() - began:.0f} s)."
        + (" Update Raylight, or report these lines." if gone else "")
    )
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
