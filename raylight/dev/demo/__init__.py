"""The demo: a real ComfyUI, a small checkpoint with random weights, one graph on stock nodes and one on workers."""
