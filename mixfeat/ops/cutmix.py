"""``torch.ops.mixfeat.cutmix``: a box of each image replaced by its partner's, and its backward pass."""

from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends, reference
from mixfeat.ops import fallback
from mixfeat.ops.mixup import in_shape_of, sample_order, samples_of
from mixfeat.ops.registration import Operator

__all__ = ["cutmix"]


def cutmix(input: Tensor, index: Tensor, box: Tensor) -> Tensor:
    """Return the images with a box pasted from their partners, in input's memory format."""
    return _cutmix(input, index, box)


def _image_order(images: Tensor) -> list[int]:
    """Return the order of dimensions in memory: channels last, or else first."""
    order = sample_order(images)
    return order if order == [0, 2, 3, 1] else [0, 1, 2, 3]


def _run(images: Tensor, index: Tensor, box: Tensor, backward: bool) -> Tensor:
    name = backends.serving(images.device.type, images.dtype)
    num_samples, channels, height, width = images.shape
    by_formula = name == "reference" or (backward and box.dim() == 2)  # gradients with a box for each image are rare
    if by_formula or name != "cpu":
        index = _values(index, box, num_samples, height, width)
    if by_formula:
        result = (fallback.cutmix_backward if backward else fallback.cutmix)(images, index, box)
        return _in_format_of(result, images)
    order = _image_order(images)
    samples, pixel = samples_of(images, order), 1 if order[1] == 1 else channels  # contiguous elements of a pixel
    if name == "cpu":
        run = torch.ops.mixfeat_cpu.cutmix_backward if backward else torch.ops.mixfeat_cpu.cutmix
        arguments = (samples, index.contiguous(), box.contiguous(), height, width, pixel)
        result = _checks.explained(run.default, arguments, _values, index, box, num_samples, height, width)
    else:
        from mixfeat.kernels.triton import cutmix as kernels

        launch = kernels.cutmix_backward if backward else kernels.cutmix
        result = torch.empty(samples.shape, dtype=images.dtype, device=images.device)
        launch(samples, index, box, height, width, pixel, result)
    return in_shape_of(result, images, order)


def _values(index: Tensor, box: Tensor, num_samples: int, height: int, width: int) -> Tensor:
    """Refuse partners and boxes out of range; return the partners contiguous."""
    index = _checks.partner_values(index, num_samples)
    _checks.box_values(box, height, width)
    return index


def _in_format_of(result: Tensor, images: Tensor) -> Tensor:
    """Copy a result into the memory format of ``images``."""
    return _empty(images).copy_(result)


def _empty(images: Tensor) -> Tensor:
    order = _image_order(images)
    return in_shape_of(images.new_empty([images.shape[d] for d in order]), images, order)


_cutmix_backward = Operator(
    "cutmix_backward(Tensor grad, Tensor index, Tensor box) -> Tensor",
    forward=lambda grad, index, box: _run(grad, index, box, True),
    fake=lambda grad, index, box: _empty(grad),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


_cutmix = Operator(
    "cutmix(Tensor input, Tensor index, Tensor box) -> Tensor",
    forward=lambda input, index, box: _run(input, index, box, False),
    fake=lambda input, index, box: _empty(input),
    differentiable=("input",),
    setup_context=_setup_context,
    backward=lambda ctx, grad, needs: (_cutmix_backward.outputs(grad, *ctx.saved_tensors),),
    recorded_backward=lambda ctx, grad, needs: (fallback.cutmix_backward(grad, *ctx.saved_tensors),),
    definition=reference.cutmix,
)
