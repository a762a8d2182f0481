"""`python -m raylight.dev.zoo.day_one [FAMILY ...]`: call families without their plans, on ranks of this machine.

Minutes for all of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from raylight.dev.setup import comfyui


def main(arguments: list[str] | None = None) -> int:
    """Print how each situation is computed, and why it is not split; return 1 if any output is wrong."""
    parser = argparse.ArgumentParser(prog="python -m raylight.dev.zoo.day_one", description=__doc__)
    parser.add_argument("family", nargs="*", help="the families, all if none is given")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(arguments)
    comfyui.put_on_path(Path(__file__).resolve().parents[4])
    from raylight.dev.zoo import families
    from raylight.dev.zoo.day_one.measure import SPLIT, WRONG, measure, outcomes
    from raylight.dev.zoo.day_one.section import section

    if unknown := [name for name in options.family if name not in families()]:
        print(f"no family {', '.join(unknown)}; there are {', '.join(families())}", file=sys.stderr)
        return 1
    measured = measure(options.family or list(families()), options.ranks)
    found_ways = outcomes(measured)
    for (family, situation), outcome in found_ways.items():
        rank = measured[family, situation][0]
        why = "" if outcome == SPLIT else rank.failure or " / ".join(rank.said)
        print(f"{outcome:<18} {family}, {situation}  {why}".rstrip())
    print(section(found_ways))
    return int(WRONG in found_ways.values())


if __name__ == "__main__":
    sys.exit(main())
