"""A look whether a module, which code of a node has changed, works on each token by itself as its place says."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_TOKENS = 8
_TOLERANCE = 0.05
"""Of the largest value; kernels differ by a hundredth in half precision, what looks at other tokens by much more."""


class TokenProbe:
    """Hooks on one module: its first call is done once more with few of its tokens."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self._path = path
        self._few: Tensor | None = None
        self._handles = (module.register_forward_pre_hook(self._before),
                         module.register_forward_hook(self._after, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        # Copied, as the module may write into what it is given.
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].shape[1] > _TOKENS:
            self._few = args[0][:, :_TOKENS].clone()

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        few, self._few = self._few, None
        self.remove()
        if few is None or not isinstance(output, Tensor) or output.shape[:2] != args[0].shape[:2] or any(
                isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            return
        alone = module.forward(few, *args[1:], **kwargs)
        apart = (alone - output[:, :_TOKENS]).abs().max()
        if not apart <= _TOLERANCE * alone.abs().max():
            raise ValueError(f"a node has changed {self._path} of the model, which does not work on each token by "
                             f"itself any more, and here tokens are split over workers: remove the node, or use "
                             f"cfg_degree, dp_degree or GPU = 1 instead")
