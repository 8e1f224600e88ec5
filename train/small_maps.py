"""Convolutions on maps of a few positions, as matrix products: where oneDNN is slow in training on a CPU.

At 32 px the last stages of a ResNet see maps of 2 x 2 positions and of one. A kernel of 3 x 3 on one position meets it
with its centre alone, all other taps meet padding: the convolution is a product with a ninth of its weights. oneDNN
computes with all of them, and its backward pass takes 25 times as long as its forward pass; that of a depthwise
convolution more than 100 times. ``tests/bench/bench_small_maps.py`` measures what is won.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_POSITIONS = 4  # of a map and of an output: from 3 x 3 on, oneDNN is as fast


class SmallMapConv2d(nn.Conv2d):
    """A convolution that becomes a matrix product where map and output have at most four positions each.

    So it does on a CPU, uncompiled and without autocast, if it pads by zeros and is not dilated:

    - with one group, if the map has no more positions than the kernel has taps: then the product needs no more
      multiplications;
    - with a group for each channel, if so and gradients are wanted: forward alone, oneDNN is faster;
    - with one tap and no padding, however large the map.

    Everything else is left to ``nn.Conv2d``, whose parameters it has. Taps that meet only padding get a gradient of
    zero, as they do there.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = self.padding_mode == "zeros" and self.dilation == (1, 1) and not isinstance(self.padding, str)
        eager = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        product = None
        if plain and eager and input.device.type == "cpu" and input.ndim == 4:
            product = self._product(input.shape[2], input.shape[3])
        if product is None:
            return super()._conv_forward(input, weight, bias)
        output = product(input.permute(0, 2, 3, 1), weight)
        return (output if bias is None else output + bias).permute(0, 3, 1, 2)

    def _product(self, height: int, width: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """From (N, height, width, C) and the weights to (N, rows, columns, D); None where no product pays."""
        grid = Grid(self._meetings(height, 0), self._meetings(width, 1))
        taps = self.kernel_size[0] * self.kernel_size[1]
        if not 0 < grid.positions <= MOST_POSITIONS:
            return None
        if self.groups == taps == 1 and self.padding == (0, 0):
            return lambda input, weight: pointwise(input, weight, self.stride)
        if height * width > min(MOST_POSITIONS, taps):
            return None
        if self.groups == 1:
            return lambda input, weight: dense(input, weight, grid)
        if self.groups == self.in_channels == self.out_channels and torch.is_grad_enabled():
            return lambda input, weight: depthwise(input, weight, grid)
        return None

    def _meetings(self, size: int, axis: int) -> list[Meeting]:
        """One for each position of the output along an axis (0: down, 1: across) of a map of ``size`` positions."""
        taps, padding = self.kernel_size[axis], int(self.padding[axis])
        meetings = []
        for first in range(-padding, size + padding - taps + 1, self.stride[axis]):
            start, stop = (min(max(end, 0), size) for end in (first, first + taps))
            meetings.append(Meeting(slice(start, stop), slice(start - first, stop - first)))
        return meetings


def use_small_map_products(network: nn.Module) -> None:
    """Give a network's plain convolutions the products, in place; its parameters stay as they are.

    Convolutions of a class of their own are left: what they compute is not known here.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d


class Meeting(NamedTuple):
    """Where the kernel, placed for one position of the output, meets the map along one axis.

    Attributes:
        map: positions of the map.
        kernel: taps of the kernel, as many.
    """

    map: slice
    kernel: slice


class Grid(NamedTuple):
    """The output's positions.

    Attributes:
        rows: from the top.
        columns: from the left.
    """

    rows: Sequence[Meeting]
    columns: Sequence[Meeting]

    @property
    def positions(self) -> int:
        """How many there are."""
        return len(self.rows) * len(self.columns)

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """For each position, row by row: indices into (D, H, W, C) and (D, kh, kw, C) of what meets there."""
        every = slice(None)
        for row in self.rows:
            for column in self.columns:
                yield (every, row.map, column.map), (every, row.kernel, column.kernel)


def pointwise(input: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """A kernel of one tap: (N, H, W, C) by (D, C, 1, 1) -> (N, rows, columns, D)."""
    return functional.linear(input[:, :: stride[0], :: stride[1]], weight.permute(0, 2, 3, 1).flatten(1))


def dense(input: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """All channels together, by one matrix with a block for each pair of positions of the map and the output.

    Args:
        input: (N, H, W, C).
        weight: (D, C, kh, kw).
        grid: of the output.

    Returns:
        (N, rows, columns, D).
    """
    kernels = place_kernels(weight, input, grid).flatten(2).flatten(0, 1)  # (P D, H W C)
    output = functional.linear(input.flatten(1), kernels)
    return output.unflatten(1, (len(grid.rows), len(grid.columns), len(weight)))


def depthwise(input: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """Each channel for itself: (N, H, W, C) by (C, 1, kh, kw) -> (N, rows, columns, C)."""
    kernels = place_kernels(weight, input, grid).squeeze(4).permute(0, 2, 3, 1)  # (P, H, W, C)
    outputs = [(input * kernel).sum(dim=(1, 2)) for kernel in kernels.contiguous()]
    return torch.stack(outputs, dim=1).unflatten(1, (len(grid.rows), len(grid.columns)))


def place_kernels(weight: Tensor, input: Tensor, grid: Grid) -> Tensor:
    """The kernels laid on a map once for each of the P positions of the output.

    Args:
        weight: (D, C, kh, kw).
        input: (N, H, W, C); only its size counts.
        grid: of the output.

    Returns:
        (P, D, H, W, C), 0 where the kernel does not reach.
    """
    return _PlacedKernels.apply(weight, input.shape[1:3], grid)  # type: ignore[return-value]


class _PlacedKernels(torch.autograd.Function):
    """In one buffer each way: autograd of slices would make one of the size of the weights for every position."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, size: torch.Size, grid: Grid) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.grid = grid
        placed = weight.new_zeros(grid.positions, len(weight), *size, weight.shape[1])
        kernels = weight.permute(0, 2, 3, 1)  # a view: channels last
        for position, (on_map, in_kernel) in zip(placed, grid.blocks(), strict=True):
            position[on_map] = kernels[in_kernel]
        return placed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        result = torch.zeros_like(weight)  # in the weights' memory format
        kernels = result.permute(0, 2, 3, 1)
        for position, (on_map, in_kernel) in zip(gradients[0], ctx.grid.blocks(), strict=True):
            kernels[in_kernel] += position[on_map]
        return result, None, None
