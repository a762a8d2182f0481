"""The only place that touches ComfyUI: models, sampling, previews, progress, and the attention hook."""
