"""Ray: one actor per rank, their placement, and what travels to and from them. Knows nothing of ComfyUI."""
