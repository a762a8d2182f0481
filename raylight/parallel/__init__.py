"""Splitting one model's work over ranks: torch and torch.distributed only, never ComfyUI or Ray."""
