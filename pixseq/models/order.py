"""The order in which a picture becomes a sequence: one permutation for content, positions, mask and loss alike.

order[p] is the place in the picture (in raster order) of the sequence's position p.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Ordered(nn.Module):
    """A model over sequences. `order` int [T] travels with the weights; None is raster order, which costs nothing.

    `kernels` are the names of functions on it that are to be compiled where there is a compiler for the device, also
    where the model as a whole is not.
    """

    kernels: ClassVar[tuple[str, ...]] = ()
    order: Tensor | None
    inverse: Tensor | None

    def __init__(self, name: str, length: int):
        super().__init__()
        order = None if name == "raster" else torch.arange(length)
        self.register_buffer("order", order)
        self.register_buffer("inverse", None if order is None else order.clone(), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.set_order(module.order))

    def set_order(self, order: Tensor | None) -> None:
        """Raises ValueError if `order` is no permutation of the positions."""
        if (order is None) != (self.order is None):
            raise ValueError("the shape says whether there is an order")
        if order is None or self.order is None:
            return
        inverse = torch.argsort(order)
        if not torch.equal(order[inverse], torch.arange(len(self.order), device=order.device)):
            raise ValueError("the order is no permutation")
        self.order, self.inverse = order, inverse

    def freeze(self, dtype: torch.dtype) -> None:
        """Cast every matrix for good to what autocast computes in, instead of for every batch. From here on there are
        forward passes, nothing is learnt, and the weights are none to save.
        """
        for module in self.modules():
            if type(module) is nn.Linear:
                module.to(dtype)

    def to_sequence(self, x: Tensor) -> Tensor:
        """[B, T, ...] in raster order -> along the sequence."""
        return x if self.order is None else x[:, self.order]

    def to_grid(self, x: Tensor) -> Tensor:
        """[B, T, ...] along the sequence -> in raster order."""
        return x if self.order is None else x[:, self.inverse]
