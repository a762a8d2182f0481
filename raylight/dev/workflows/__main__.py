"""`make workflows`: write the templates and their thumbnails."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .table import TEMPLATES
from .template import Template
from .thumbnail import draw

FOLDER = Path(__file__).resolve().parents[3] / "example_workflows"


def text(template: Template) -> str:
    """Return the content of a template's file."""
    return json.dumps(template.to_json(), ensure_ascii=False, indent=1) + "\n"


def main(arguments: list[str]) -> int:
    """Write all files, and remove those of templates that no longer exist."""
    parser = argparse.ArgumentParser(prog="make workflows", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder (default: example_workflows)")
    folder = parser.parse_args(arguments).output
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"{template.name}{ending}" for template in TEMPLATES for ending in (".json", ".jpg")}
    for path in folder.iterdir():
        if path.suffix in (".json", ".jpg") and path.name not in kept:
            path.unlink()
    for template in TEMPLATES:
        (folder / f"{template.name}.json").write_text(text(template), "utf-8")
        (folder / f"{template.name}.jpg").write_bytes(draw(template))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
