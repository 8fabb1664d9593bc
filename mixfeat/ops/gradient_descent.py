"""``torch.ops.mixfeat.gradient_descent``: whole runs of full-batch gradient descent, many networks in one call.

The operator takes and returns the momentum buffer, so a run that is split over several calls is the unbroken run, bit
for bit. It works in float32 and float64; callers cast half precision.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixfeat import _checks, backends
from mixfeat.kernels.polynomial import Polynomial
from mixfeat.ops.pairwise_mixup_loss import PAIRS, Objective, Signs, count_runs, list_nodes, merged_nodes
from mixfeat.ops.registration import Operator, forbid_backward

__all__ = ["gradient_descent"]

_NOT_DIFFERENTIABLE = (
    "gradient_descent is not differentiable: detach its input and weight, or call it under torch.no_grad()"
)


def gradient_descent(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    lam: Tensor | None,
    lam_weight: Tensor | None,
    polynomial: Polynomial,
    lr: Tensor,
    steps: int,
    momentum: float,
    weight_decay: float,
    momentum_buffer: Tensor | None = None,
    readout: Tensor | None = None,
    label_lam: Tensor | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
) -> tuple[Tensor, Tensor, Tensor]:
    """Take ``steps`` steps from ``weight`` and return the weight, the loss of each step and the momentum buffer.

    R = 1 if neither input nor weight has runs. Splitting a run does not change its bits if the returned weight and
    momentum buffer are passed on.

    Args:
        input, weight: (N,P,D) or (R,N,P,D), and (C,M,D) or (R,C,M,D); both float32 or both float64.
        target: (N,) or (R,N), int64.
        lam, lam_weight: nodes and their weights (K,), on the CPU; None for plain cross-entropy.
        polynomial: the activation.
        lr: float64 on the CPU, (1 or R, 1 or steps).
        steps, momentum, weight_decay: as :class:`torch.optim.SGD` takes them.
        momentum_buffer: (R,C,M,D), as the previous call returned it; None for zeros.
        readout: the second layer, (C,M) or (R,C,M), which is not trained; None for ones.
        label_lam, label_smoothing, pairs: as :func:`mixfeat.pairwise_mixup_loss` takes them; label_lam (K,) or None.

    Returns:
        weight (R,C,M,D), loss (R,steps), and the momentum buffer (R,C,M,D), empty if momentum is 0.
    """
    args = (
        input, weight, target, lam, lam_weight, polynomial, lr, steps, momentum, weight_decay, momentum_buffer, readout,
        label_lam, label_smoothing, pairs,
    )  # fmt: skip
    with torch.no_grad():
        trained, loss, buffer = _gradient_descent.outputs(*args)
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        trained, loss = (forbid_backward(_NOT_DIFFERENTIABLE, result) for result in (trained, loss))
    return trained, loss, buffer


def _forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    lam: Tensor | None,
    lam_weight: Tensor | None,
    fields: Sequence[float],
    lr: Tensor,
    steps: int,
    momentum: float,
    weight_decay: float,
    momentum_buffer: Tensor | None,
    readout: Tensor | None,
    label_lam: Tensor | None,
    label_smoothing: float,
    pairs: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if lam is not None and lam_weight is not None:
        _checks.node_values(lam, lam_weight)
    if label_lam is not None:
        _checks.label_lam_values(label_lam)
    _checks.class_values(target, weight.shape[-3])
    _checks.lr_values(lr)
    shape = (count_runs(input, weight), *weight.shape[-3:])
    weight = weight.expand(shape).clone(memory_format=torch.contiguous_format)
    if momentum == 0:
        buffer = weight.new_empty(0)
    else:
        buffer = torch.zeros_like(weight) if momentum_buffer is None else momentum_buffer.expand(shape).clone()

    nodes = {} if lam is None or lam_weight is None else merged_nodes(lam, lam_weight, input.dtype)
    name = backends.serving_network(input.device.type, input.dtype, Polynomial.of(fields))
    has_options = readout is not None or label_lam is not None or label_smoothing or pairs != "all"
    in_cuda = name == "triton" and input.is_cuda and backends.serves_cuda() and not has_options
    if in_cuda and input.dtype == torch.float32:
        from mixfeat.kernels import cuda
        from mixfeat.kernels.cuda import gradient_descent as kernel

        problem = kernel.Problem.of(input, weight, list(nodes) or None, momentum)
        if kernel.fits(problem, cuda.capability(input.device)) is None:
            x, y = input if input.dim() == 4 else input[None], torch.atleast_2d(target)
            options = (list(nodes) or None, list(nodes.values()) or None, lr, steps, momentum, weight_decay)
            weight, loss, velocity = kernel.gradient_descent(
                x, weight, y, Polynomial.of(fields), *options, buffer if momentum else None
            )
            return weight, loss, buffer if velocity is None else velocity
    signs = Signs.of(readout) if readout is not None and name == "cpu" else None
    if name == "cpu" and (readout is None or signs):
        return _native(
            input, weight, target, lam, lam_weight, label_lam, label_smoothing, pairs, Polynomial.of(fields), lr, steps,
            momentum, weight_decay, buffer, signs,
        )  # fmt: skip

    def objective() -> tuple[Tensor, Tensor]:
        """Return the loss (R,) and its gradient."""
        if lam is None:
            return _cross_entropy(input, weight, readout, target, fields, label_smoothing)
        options = (lam, lam_weight, label_lam, fields, label_smoothing, pairs, 0, "", False, True, False)
        loss, _, grad, _ = torch.ops.mixfeat.pairwise_mixup_loss.default(input, weight, readout, target, *options)
        return loss, grad

    device = input.device.type
    with torch.autocast(device, enabled=False) if _checks.autocast_is_enabled(device) else contextlib.nullcontext():
        loss = _loop(objective, weight, buffer, lr, steps, momentum, weight_decay)
    return weight, loss, buffer


def _native(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    lam: Tensor | None,
    lam_weight: Tensor | None,
    label_lam: Tensor | None,
    label_smoothing: float,
    pairs: str,
    polynomial: Polynomial,
    lr: Tensor,
    steps: int,
    momentum: float,
    weight_decay: float,
    buffer: Tensor,
    signs: Signs | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the CPU kernel, which may overwrite ``weight`` and ``buffer``; return what :func:`gradient_descent` does."""
    lists: tuple[list[float], list[float], list[float] | None] = ([], [], None)
    if lam is not None and lam_weight is not None:
        lists = list_nodes(lam, lam_weight, label_lam, input.dtype, symmetric=True)
    trained = [weight, buffer] if momentum else [weight]
    if signs:
        polynomial = polynomial._replace(scale=polynomial.scale * signs.magnitude)
        trained = [signs.ordered(t.flatten(1, 2)).view_as(t) for t in trained]
    loss = torch.ops.mixfeat_cpu.gradient_descent.default(
        input, trained[0], target.contiguous(), *lists[:2], Objective(lists[2]).labels(lists[0]), label_smoothing,
        PAIRS.index(pairs), tuple(polynomial), lr, steps, momentum, weight_decay, trained[-1] if momentum else buffer,
        signs and signs.negative_filters,
    )  # fmt: skip
    if signs:
        trained = [signs.as_given(t.flatten(1, 2)).view_as(t) for t in trained]
    return trained[0], loss, trained[-1] if momentum else buffer


def _cross_entropy(
    input: Tensor,
    weight: Tensor,
    readout: Tensor | None,
    target: Tensor,
    fields: Sequence[float],
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Compute the mean cross-entropy (R,), 0 without samples, and its gradient to weight (R,C,M,D)."""
    classes = weight.shape[-3]
    filters = weight if readout is None else weight.flatten(1, 2)[:, :, None]  # each filter is a class of its own
    logits, slope = torch.ops.mixfeat.patch_conv.default(input, filters, None, None, fields, 0)
    if readout is not None:
        logits = (logits.unflatten(-1, (classes, -1)) * readout[..., None, :, :]).sum(-1)
    runs, num_samples, num_classes = logits.shape
    label = target.expand(runs, -1)[..., None] == torch.arange(num_classes, device=target.device)
    log_p = logits.log_softmax(-1).where(label.any(-1, keepdim=True), torch.nan)  # NaN for a target out of range
    scale = 1 / max(1, num_samples)
    share = label.to(log_p.dtype)
    if label_smoothing:
        share = (1 - label_smoothing) * share + label_smoothing / num_classes
    loss = -scale * (share * log_p).sum((1, 2))
    grad = scale * (log_p.exp() - share)
    if readout is not None:
        grad = (grad[..., None] * readout[..., None, :, :]).flatten(-2)
    arguments = (grad, slope, input, filters, None, None, fields, False, True)
    return loss, torch.ops.mixfeat.patch_conv_backward.default(*arguments)[1].view_as(weight)


def _loop(
    objective: Callable[[], tuple[Tensor, Tensor]],
    weight: Tensor,
    buffer: Tensor,
    lr: Tensor,
    steps: int,
    momentum: float,
    weight_decay: float,
) -> Tensor:
    """Update ``weight`` and ``buffer`` in place; return the losses (R,steps)."""
    loss = weight.new_zeros(weight.shape[0], steps)
    rates = lr.to(weight.device, weight.dtype, non_blocking=True).expand(-1, steps)[:, :, None, None, None]
    position = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def step() -> None:
        value, change = objective()
        loss.index_copy_(1, position, value[:, None])
        if weight_decay:
            change = change.add(weight, alpha=weight_decay)
        if momentum:
            change = buffer.mul_(momentum).add_(change)
        weight.sub_(rates.index_select(1, position).squeeze(1) * change)
        position.add_(1)

    _repeat(step, steps, weight.device)
    return loss


_EAGER_STEPS = 3  # steps that compile the kernels and allocate workspaces before the capture


def _repeat(step: Callable[[], None], count: int, device: torch.device) -> None:
    """Call ``step`` ``count`` times, on CUDA by replaying one graph; it may only read and write tensors in place."""
    captures = device.type == "cuda" and count > 2 * _EAGER_STEPS and not torch.cuda.is_current_stream_capturing()
    if not captures:
        for _ in range(count):
            step()
        return
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_EAGER_STEPS):
                step()
            graph = torch.cuda.CUDAGraph()  # torch.cuda.graph would wait for the device
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
            for _ in range(count - _EAGER_STEPS):
                graph.replay()
        current.wait_stream(side)


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    steps, momentum = rest[5:7]
    trained = weight.new_empty((count_runs(input, weight), *weight.shape[-3:]))
    buffer = torch.empty_like(trained) if momentum else trained.new_empty(0)
    return trained, trained.new_empty(trained.shape[0], steps), buffer


def _backward(*_: Any) -> tuple[None, ...]:
    raise RuntimeError(_NOT_DIFFERENTIABLE)


def _flops(input: Tensor, weight: Tensor, *rest: Any) -> int:
    """Count the operations of the products of all patches with all filters, two products in each step."""
    steps = rest[5]
    filters = weight.shape[-3] * weight.shape[-2]
    return 4 * steps * count_runs(input, weight) * math.prod(input.shape[-3:]) * filters


_gradient_descent = Operator(
    "gradient_descent(Tensor input, Tensor weight, Tensor target, Tensor? lam, Tensor? lam_weight, "
    "float[] polynomial, Tensor lr, SymInt steps, float momentum, float weight_decay, Tensor? momentum_buffer, "
    "Tensor? readout, Tensor? label_lam, float label_smoothing, str pairs) "
    "-> (Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    differentiable=("input", "weight"),
    setup_context=lambda ctx, inputs, output: None,
    backward=_backward,
    flops=_flops,
)
