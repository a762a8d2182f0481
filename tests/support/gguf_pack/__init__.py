"""A stand-in for ComfyUI-GGUF, written for Raylight's tests: the names and the behaviour that Raylight uses of it, with
the formats left to the `gguf` package. It is no part of ComfyUI-GGUF, and slow.

Like that pack's own, this module is for ComfyUI alone, where it registers nodes: workers must not run it.
"""

raise ImportError("the package itself is imported: its nodes would be registered")
