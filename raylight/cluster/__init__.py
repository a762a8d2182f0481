"""Ray: the session, one actor per rank, their health, and what is sent between them. Knows nothing of ComfyUI."""
