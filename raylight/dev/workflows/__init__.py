"""The workflow templates of `example_workflows/`, described in Python and written as files.

Nothing here imports ComfyUI. `signatures` describes its nodes, and the tests compare that with ComfyUI.
"""
