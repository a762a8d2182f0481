"""From a fresh clone to a ComfyUI that runs: an environment, a ComfyUI, a link. Standard library only."""
