"""ComfyUI's process: models that workers run, what is sent to them, and what comes back."""
