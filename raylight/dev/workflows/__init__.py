"""The workflow templates of `example_workflows/`: one description in Python, and what makes files of it.

Nothing here imports ComfyUI: what its nodes look like is in `signatures`, which the tests compare with ComfyUI.
"""
