"""Set-up of a fresh clone: an environment, a ComfyUI, a link. Standard library only."""
