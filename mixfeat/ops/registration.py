"""The one way to register an operator with PyTorch, and the only user of PyTorch's private names.

An :class:`Operator` is declared once, with everything that PyTorch needs to know about it::

    _double = Operator(
        "double(Tensor input) -> Tensor",
        forward=lambda input: 2 * input,
        fake=torch.empty_like,
        differentiable=("input",),
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda ctx, grad, needs: (2 * grad,),
    )

It is then ``torch.ops.mixfeat.double``. A call goes through PyTorch's dispatcher when tracing, a mode, a transform or a
tensor subclass is active, and otherwise straight to ``forward``: for a small problem the dispatcher takes longer than
the kernel.

Every private name is looked up with a fallback, so a release of PyTorch without it is served by public names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixfeat import backends

__all__ = [
    "Folded", "Operator", "can_bypass_dispatcher", "fold_runs", "forbid_backward", "graph_is_kept", "is_batched",
    "is_transformed", "saved_tensors_are_hooked",
]  # fmt: skip

Folded = tuple[Sequence[Any], Callable[[Tensor], Tensor]]


class Operator:
    """An operator of PyTorch, ``torch.ops.mixfeat.NAME``.

    The first ``results`` outputs are results. The others serve the backward pass and have no derivative. If ``results``
    is more than 1, "result" and its gradient below are tuples.

    Args:
        schema: name, arguments and outputs, in PyTorch's schema language.
        forward: computes the outputs on any device. Outputs are new tensors, and no argument is mutated.
        fake: returns empty outputs with the shapes, dtypes and strides that ``forward`` gives them.
        results: the number of results.
        differentiable: names of the arguments that have a gradient.
        request: ``request(args)`` returns the arguments with which ``forward`` also computes the outputs that
            ``backward`` needs, for those tensors that require grad. Callers pass the arguments for no gradient.
        setup_context: ``setup_context(ctx, inputs, output)`` saves tensors for the backward pass, as for a
            :class:`torch.autograd.Function`. ``ctx.direct`` is true if only the operator holds its further outputs.
        backward: ``backward(ctx, grad, needs)`` returns the gradients of the differentiable arguments, given that of
            the result; ``needs`` selects them. It runs without recording and on the backend of the forward call.
        recorded_backward: the same in plain PyTorch, for gradients that are differentiated again.
        definition: ``definition(*args)`` returns the result in plain PyTorch. It serves the transforms of
            :mod:`torch.func` and forward-mode differentiation.
        foldable: names of the tensors whose batches under :func:`torch.func.vmap` one call can serve. The definition
            serves if another tensor is batched, and under other transforms.
        fold: ``fold(size, in_dims, args)`` returns the arguments of one call for a batch of ``size``, and a function
            that moves the batch first in its result.
        flops: ``flops(*args)`` returns the floating-point operations of the matrix products, which
            :class:`torch.utils.flop_counter.FlopCounterMode` counts; 0 by default.
    """

    def __init__(
        self,
        schema: str,
        *,
        forward: Callable[..., Any],
        fake: Callable[..., Any],
        results: int = 1,
        differentiable: Sequence[str] = (),
        request: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Sequence[Tensor | None]] | None = None,
        recorded_backward: Callable[..., Sequence[Tensor | None]] | None = None,
        definition: Callable[..., Any] | None = None,
        foldable: Sequence[str] = (),
        fold: Callable[[int, Sequence[Any], Sequence[Any]], Folded] | None = None,
        flops: Callable[..., int] = lambda *args: 0,
    ) -> None:
        self.name = schema[: schema.index("(")]
        qualified = f"mixfeat::{self.name}"
        torch.library.define(qualified, schema[len(self.name) :], tags=torch.Tag.pt2_compliant_tag)
        self.overload = getattr(torch.ops.mixfeat, self.name).default
        self.forward = forward
        self._request, self._setup_context, self._definition, self._flops = request, setup_context, definition, flops
        self._backward, self._recorded_backward = backward, recorded_backward
        arguments = [argument.name for argument in self.overload._schema.arguments]
        self._num_arguments = len(arguments)
        self._tensors = [i for i, a in enumerate(self.overload._schema.arguments) if "Tensor" in str(a.type)]
        self._several = len(self.overload._schema.returns) > 1
        self._results = results
        self._foldable, self._fold = [arguments.index(name) for name in foldable], fold
        self._places = [arguments.index(name) for name in differentiable]
        self._apply: Callable[..., Any] | None = None
        torch.library.impl(qualified, "CompositeExplicitAutograd", forward)
        torch.library.register_fake(qualified, fake)
        if backward is not None:
            self._register_derivative(qualified)
        if fold is not None:
            self._register_vmap(qualified)

    def __call__(self, *args: Any) -> Any:
        """Return the result, or a tuple of several."""
        output: Any
        if can_bypass_dispatcher(args, self._tensors):
            if self._apply is not None and torch.is_grad_enabled():
                for place in self._places:
                    if args[place] is not None and args[place].requires_grad:
                        return self._apply(True, *args)
            output = self.forward(*args)
        elif self._definition is not None and is_transformed(args) and not self._is_foldable(args):
            return self._definition(*args)
        else:
            if self._apply is None and self._request is not None and torch.is_grad_enabled():
                args = self._request(args)
            output = self._dispatched(*args)
        return self._result(output)

    def _result(self, output: Any) -> Any:
        if not self._several:
            return output
        return output[0] if self._results == 1 else output[: self._results]

    def outputs(self, *args: Any) -> Any:
        """Return all outputs, without derivatives; the first two arguments may be batches of gradients."""
        if (
            can_bypass_dispatcher(args, self._tensors)
            and not any(  # in this order: Dynamo cannot trace is_batched
                isinstance(arg, Tensor) and is_batched(arg) for arg in args[:2]
            )
        ):
            return self.forward(*args)
        if self._definition is None and _has_tangent(args):
            raise NotImplementedError(f"{self.name} has no forward-mode derivative (jvp, jacfwd)")
        return self._dispatched(*args)

    def _dispatched(self, *args: Any) -> Any:
        """Call through PyTorch's dispatcher.

        The FLOP formula is registered with each counter that is active at the call, not at import: PyTorch's module of
        FLOP counters imports Triton, which then decides whether it interprets.
        """
        if not torch.compiler.is_compiling():
            for registry in _flop_registries():
                registry.setdefault(self.overload.overloadpacket, lambda *args, out_val=None: self._flops(*args))
        return self.overload(*args)

    def backward(self, ctx: Any, results_grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        """Return a gradient or None for each argument, given those of the results."""
        grads: list[Tensor | None] = [None] * self._num_arguments
        if self._backward is None or all(grad is None for grad in results_grads):
            return grads
        if self._recorded_backward is not None and (torch.is_grad_enabled() or is_transformed(results_grads)):
            found = self._recorded_backward(ctx, self._result_grad(results_grads), needs)
        else:
            with backends.as_chosen(ctx.chosen):
                resolved = [None if grad is None else grad.resolve_neg() for grad in results_grads]
                found = self._backward(ctx, self._result_grad(resolved), needs)
        for place, need, value in zip(self._places, needs, found, strict=True):
            grads[place] = value if need else None
        return grads

    def _result_grad(self, grads: Sequence[Tensor | None]) -> Any:
        return grads[0] if self._results == 1 else tuple(grads)

    def _register_derivative(self, qualified: str) -> None:
        if _below_autograd is None:
            self._register_derivative_publicly(qualified)
            return
        below_autograd, operator = _below_autograd, self
        compute, request, save = self.forward, self._request, self._save  # looked up once: small calls take only us

        def forward(ctx: Any, direct: bool, *args: Any) -> Any:
            if request is not None:
                args = request(args)
            if direct:
                output = compute(*args)
            else:
                with below_autograd():
                    output = operator.overload(*args)
            return save(ctx, args, output, direct)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = [ctx.needs_input_grad[1 + place] for place in operator._places]
            return None, *operator.backward(ctx, grads[: operator._results], needs)

        name = "".join(word.capitalize() for word in self.name.split("_"))
        function: Any = type(
            name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        )
        self._apply = _apply_of(function)

        # torch.library.register_autograd does the same, and makes a call three times as expensive.
        def autograd(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(
                args[place] is not None and args[place].requires_grad for place in operator._places
            ):
                return function.apply(False, *args)
            with below_autograd():
                return operator.overload(*args)

        torch.library.impl(qualified, "Autograd", autograd)

    def _register_derivative_publicly(self, qualified: str) -> None:
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self._save(ctx, inputs, output, False)

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            needs = [ctx.needs_input_grad[place] for place in self._places]
            return tuple(self.backward(ctx, grads[: self._results], needs))

        torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    def _register_vmap(self, qualified: str) -> None:
        rest = (None,) * (len(self.overload._schema.returns) - 1)

        def batch(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
            arguments, unfold = self._fold(info.batch_size, in_dims, args)  # type: ignore[misc]
            result = unfold(self(*arguments))
            if not self._several:
                return result, 0
            return (result, *(result.new_empty(0) for _ in rest)), (0, *rest)  # backward runs below vmap

        torch.library.register_vmap(qualified, batch)

    def _is_foldable(self, args: Sequence[Any]) -> bool:
        """Return whether vmap is the only transform, at any depth, and all batched tensors are foldable."""
        if self._fold is None or _transforms is None or _is_batch is None or _has_tangent(args):
            return False
        if not all(str(level.key()).endswith("Vmap") for level in _transforms()):
            return False
        return not any(
            args[place] is not None and place not in self._foldable and _is_batch(args[place])
            for place in self._tensors
        )

    def _save(self, ctx: Any, args: tuple[Any, ...], output: Any, direct: bool) -> Any:
        """Save tensors for the backward pass and return the outputs that autograd sees."""
        ctx.chosen, ctx.direct = backends.chosen(), direct
        ctx.set_materialize_grads(False)
        self._setup_context(ctx, args, output)  # type: ignore[misc]
        if not self._several:
            return output
        if direct:
            return self._result(output)
        ctx.mark_non_differentiable(*output[self._results :])
        return output


def fold_runs(
    size: int, in_dims: Sequence[Any], args: Sequence[Any], dims: dict[int, int]
) -> tuple[list[Any], int | None]:
    """Turn the batch of :func:`torch.func.vmap` into runs: the batch size times the number of existing runs.

    Args:
        size: size of the batch.
        in_dims: dimension of the batch in each argument, or None.
        args: arguments of one call.
        dims: number of each tensor's dimensions without runs, by its place; all runs share a tensor without runs.

    Returns:
        The arguments, and the number of existing runs, or None.
    """
    folded, runs = list(args), None
    for place in dims:
        if in_dims[place] is not None:
            folded[place] = args[place].movedim(in_dims[place], 0)
        elif args[place] is not None and args[place].dim() > dims[place]:
            folded[place] = args[place].expand(size, *args[place].shape)
        if folded[place] is not None and folded[place].dim() == dims[place] + 2:
            runs = folded[place].shape[1]
    for place in dims if runs is not None else ():
        tensor = folded[place]
        if tensor is not None and tensor.dim() > dims[place]:
            each = tensor if tensor.dim() == dims[place] + 2 else tensor[:, None].expand(-1, runs, *tensor.shape[1:])
            folded[place] = each.flatten(0, 1)
    return folded, runs


class _Forbidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, tensor: Tensor) -> Tensor:
        ctx.message = message
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)


def forbid_backward(message: str, tensor: Tensor) -> Tensor:
    """Return a tensor whose backward pass raises, instead of treating it as a constant."""
    return _Forbidden.apply(message, tensor.detach().requires_grad_())


# PyTorch's private names


def _private(owner: Any, name: str) -> Any:
    """Return a private name of PyTorch, or None in a release without it."""
    return getattr(owner, name, None)


_below_autograd = _private(torch._C, "_AutoDispatchBelowAutograd")
_num_dispatch_modes = _private(torch._C, "_len_torch_dispatch_stack")
_dispatch_modes = _private(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack")
_transforms_are_active = _private(torch._C, "_are_functorch_transforms_active")
_transforms = _private(_private(torch._C, "_functorch"), "get_interpreter_stack")
_is_batch = _private(_private(torch._C, "_functorch"), "is_batchedtensor")
_keep_graph = _private(_private(torch._C, "_autograd"), "_get_current_graph_task_keep_graph")
_default_hooks = _private(_private(torch._C, "_autograd"), "_top_saved_tensors_default_hooks")
_is_legacy_batch = _private(_private(torch._C, "_functorch"), "is_legacy_batchedtensor")
_knows_forward_mode = _private(forward_ad, "_current_level") is not None
_knows_the_state = (
    _below_autograd is not None
    and _num_dispatch_modes is not None
    and _transforms_are_active is not None
    and _knows_forward_mode
)
_PLAIN = (Tensor, torch.nn.Parameter)


def is_transformed(args: Sequence[Any]) -> bool:
    """Return whether a transform of :mod:`torch.func`, or forward-mode differentiation of an argument, is active."""
    if torch.compiler.is_compiling():
        return False
    return (_transforms_are_active is not None and _transforms_are_active()) or _has_tangent(args)


def _has_tangent(args: Sequence[Any]) -> bool:
    if torch.compiler.is_compiling() or (_knows_forward_mode and forward_ad._current_level < 0):
        return False
    return any(isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None for arg in args)


def _flop_registries() -> list[dict[Any, Any]]:
    """Return the registries of the active FLOP counters."""
    modes = [] if _dispatch_modes is None else _dispatch_modes()
    registries = (getattr(getattr(mode, "counter", None), "flop_registry", None) for mode in modes)
    return [registry for registry in registries if registry is not None]


def is_batched(grad: Tensor) -> bool:
    """Return whether ``torch.autograd.grad(..., is_grads_batched=True)`` passes several gradients at once."""
    return _is_legacy_batch is not None and _is_legacy_batch(grad)


def can_bypass_dispatcher(args: Sequence[Any], tensors: Sequence[int]) -> bool:
    """Return whether PyTorch's dispatcher would only call the operator's ``forward``.

    It would unless tracing, a mode, a functorch transform, dual numbers, a tensor subclass or a lazily negated view is
    involved. ``tensors`` lists the places of arguments that are tensors or None.
    """
    if (
        not _knows_the_state
        or torch.compiler.is_compiling()
        or _num_dispatch_modes()
        or _transforms_are_active()
        or forward_ad._current_level >= 0
    ):
        return False
    for place in tensors:
        tensor = args[place]
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return False
    return True


def graph_is_kept() -> bool:
    """Return whether another backward pass may follow this one through the same graph."""
    return _keep_graph is None or _keep_graph()


def saved_tensors_are_hooked() -> bool:
    """Return whether hooks may keep tensors that are saved for the backward pass now."""
    return _default_hooks is None or _default_hooks(True) is not None


def _apply_of(function: Any) -> Callable[..., Any]:
    """Return ``function.apply`` without its setup for functorch's transforms."""
    base = _private(torch._C, "_FunctionBase")
    return function.apply if base is None else super(torch.autograd.Function, function).apply
