"""Every check of an argument, written once.

Each check raises a TypeError, ValueError or IndexError that names the argument, the value and the requirement. It
returns the argument in the form that the caller uses. NumPy's integers and floats are numbers. The first parts look at
types, shapes, dtypes and devices only, which torch.compile can trace. The last part reads values, but only on the CPU,
where that waits for no device.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mixfeat.kernels.polynomial import MAX_DEGREE, Polynomial

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Numbers and plain values


def integer(name: str, value: Any, least: int | None = None, most: int = 2**63 - 1) -> int:
    """Check a 64-bit integer in [least, most]."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:  # a tensor has __index__, which may raise
            raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        bound = "less than 2**63" if most == 2**63 - 1 else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, got {value}")
    return value


def real(name: str, value: Any, wanted: str = "a number") -> float:
    """Check a number, finite or not."""
    if type(value) is float:  # the common case first, because isinstance(value, Real) is slow
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # for either sign, because no argument may be that large


def finite(name: str, value: Any, least: float | None = None) -> float:
    """Check a finite number, at least ``least``."""
    number = real(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")
    return number


def positive(name: str, value: Any, hint: str = "") -> float:
    """Check a finite number above 0."""
    number = real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value}{hint}")
    return number


def fraction(name: str, value: Any, wanted: str = "a number") -> float:
    """Check a number in [0, 1]."""
    number = real(name, value, wanted)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def interval(name: str, value: Any) -> tuple[float, float]:
    """Check a pair of finite numbers (low, high), low <= high."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (low, high), got {value!r}")
    low, high = finite(f"{name}[0]", value[0]), finite(f"{name}[1]", value[1])
    if low > high:
        raise ValueError(f"{name} must have low <= high, got ({low}, {high})")
    return low, high


def boolean(name: str, value: Any) -> None:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def degree(value: Any) -> int:
    """Check the degree of an activation."""
    number = integer("degree", value)
    if not 1 <= number <= MAX_DEGREE:
        raise ValueError(f"degree must be between 1 and {MAX_DEGREE}, got {number}")
    return number


def generator(value: Any) -> None:
    """Check a source of randomness, or None."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(value).__name__}")


def float_dtype(name: str, value: Any) -> None:
    """Check a dtype of the operators."""
    if value not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value!r}")


def alpha(value: Any) -> float:
    """Check the parameter of Beta(alpha, alpha)."""
    return positive("alpha", value, " (for Midpoint Mixup pass lam=0.5 instead)")


def activation(value: Any) -> None:
    """Check an activation."""
    if not isinstance(getattr(value, "polynomial", None), Polynomial):
        raise TypeError(f"activation must be a mixfeat activation such as PolyReLU(8, 0.1), got {value!r}")


# Tensors: type, layout, dtype, shape and device


def is_strided(value: Any) -> bool:
    """Return whether a value is a tensor that is not sparse, nested or distributed."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not is_distributed(value)


def is_distributed(value: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as FSDP2's parameters are outside a module's forward."""
    return type(value) not in (Tensor, torch.nn.Parameter) and hasattr(value, "full_tensor")


def kind(value: Any) -> str:
    """Describe a value of the wrong kind."""
    if isinstance(value, Tensor) and is_distributed(value):
        return "a DTensor: call the operator in the forward of the module that FSDP shards, or pass full_tensor()"
    if isinstance(value, Tensor):
        return str(value.dtype if value.layout == torch.strided else value.layout)
    return type(value).__name__


def tensor(name: str, value: Any) -> None:
    """Check a strided tensor."""
    if not is_strided(value):
        raise TypeError(f"{name} must be a tensor, got {kind(value)}")


def float_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Check a strided tensor of one of the operators' dtypes."""
    tensor(name, value)
    if value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {', '.join(names)} or {last}, got {value.dtype}")


def floating(name: str, value: Any) -> None:
    """Check a strided tensor of any floating-point dtype."""
    if not is_strided(value) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {kind(value)}")


def int64_tensor(name: str, value: Any, what: str = "") -> None:
    """Check a strided int64 tensor; ``what`` completes the message."""
    if not is_strided(value) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor{what}, got {kind(value)}")


def same_device(name: str, value: Tensor, device: torch.device, owner: str = "input's") -> None:
    """Check that a tensor is on ``owner`` device."""
    if value.device != device:
        raise ValueError(f"{name} must be on {owner} device {device}, got {value.device}")


def constant(name: str, value: Tensor, why: str) -> None:
    """Check that a tensor does not require grad."""
    if value.requires_grad:
        raise ValueError(f"{name} must not require grad: {why}")


# The operators' arguments


def autocast_is_enabled(device_type: str) -> bool:
    """Return whether autocast is active for a device type; some types, such as "meta", do not support it."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return False
    return torch.is_autocast_enabled(device_type)


def network(input: Any, weight: Any, activation_: Any, autocast: bool = True) -> tuple[Tensor, Tensor]:
    """Check samples (N,P,D) or (R,N,P,D) against filters (C,M,D) or (R,C,M,D); return both, cast under autocast.

    With ``autocast=False`` an active autocast only casts input to the weight's dtype.
    """
    activation(activation_)
    _network_tensor("input", input, "(N,P,D) or (R,N,P,D)")
    _network_tensor("weight", weight, "(C,M,D) or (R,C,M,D)")
    device = input.device
    same_device("weight", weight, device)
    if autocast_is_enabled(device.type) and not autocast:
        input = input.to(weight.dtype)
    elif autocast_is_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        input = input if input.dtype == torch.float64 else input.to(dtype)
        weight = weight if weight.dtype == torch.float64 else weight.to(dtype)
    if weight.dtype != input.dtype:
        raise TypeError(f"weight must have input's dtype {input.dtype}, got {weight.dtype}")
    if weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"weight must have input's patch dimension D = {input.shape[-1]} last, got shape {tuple(weight.shape)}"
        )
    if input.dim() == 4 and weight.dim() == 4 and input.shape[0] != weight.shape[0]:
        raise ValueError(f"weight must have as many runs R as input, {input.shape[0]}, got {weight.shape[0]}")
    return input, weight


def _network_tensor(name: str, value: Any, shape: str) -> None:
    float_tensor(name, value)
    if not 3 <= value.dim() <= 4:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def classifier(input: Any, weight: Any, target: Any, activation_: Any, autocast: bool = True) -> tuple[Tensor, Tensor]:
    """Check a network and the classes (N,) or (R,N) of its samples; return input and weight as :func:`network`."""
    input, weight = network(input, weight, activation_, autocast)
    if weight.shape[-3] < 2:
        raise ValueError(
            f"weight must have at least 2 classes (C) for a cross-entropy, got shape {tuple(weight.shape)}"
        )
    runs = input.shape[:-3] or weight.shape[:-3]
    classes("target", target, (*runs, input.shape[-3]), input.device)
    return input, weight


def readout(value: Any, weight: Tensor) -> Tensor:
    """Check the second layer (C,M) or (R,C,M) of filters (C,M,D) or (R,C,M,D); return it in the filters' dtype."""
    floating("readout", value)
    shape = tuple(weight.shape[-3:-1])
    runs = weight.shape[:-3]
    if value.shape not in (shape, (*runs, *shape)):
        shapes = " or ".join(str(one) for one in dict.fromkeys((shape, (*runs, *shape))))
        raise ValueError(f"readout must have shape {shapes}, one number for each filter, got {tuple(value.shape)}")
    same_device("readout", value, weight.device, "weight's")
    return value.to(weight.dtype)


def partner_samples(partner: Any, target: Any, input: Tensor, weight: Tensor, pairs: str) -> tuple[Tensor, Tensor]:
    """Check the second samples of pairs, and their classes, against the first ones and the filters; return both."""
    if partner is None or target is None:
        given, missing = ("partner", "partner_target") if target is None else ("partner_target", "partner")
        raise ValueError(f"{missing} is needed where {given} is given")
    if pairs == "distinct":
        raise ValueError('pairs must be "all" or "different_class" where partner is given, got \'distinct\'')
    _network_tensor("partner", partner, "(N',P,D) or (R,N',P,D)")
    shape = (*input.shape[:-3], partner.shape[-3] if partner.dim() == input.dim() else "N'", *input.shape[-2:])
    if partner.dim() != input.dim() or tuple(partner.shape) != shape or partner.dtype != input.dtype:
        raise ValueError(
            f"partner must have input's dtype {input.dtype} and shape {shape}, got {partner.dtype} and "
            f"{tuple(partner.shape)}"
        )
    same_device("partner", partner, input.device)
    runs = input.shape[:-3] or weight.shape[:-3]
    classes("partner_target", target, (*runs, partner.shape[-3]), input.device)
    return partner, target


def labels(label_lam: Any, label_smoothing: Any, pairs: Any, nodes_: Tensor | None) -> tuple[Tensor | None, float, str]:
    """Check the label of a pair and which pairs count; return label_lam as (K,) on the CPU, like the nodes."""
    smoothing = fraction("label_smoothing", label_smoothing)
    if pairs not in ("all", "distinct", "different_class"):
        raise ValueError(f'pairs must be "all", "distinct" or "different_class", got {pairs!r}')
    if label_lam is None or nodes_ is None:
        return None, smoothing, pairs
    if not isinstance(label_lam, Tensor):
        number = fraction("label_lam", label_lam, "a number, or a tensor of a number for each node")
        return torch.full_like(nodes_, number), smoothing, pairs
    floating("label_lam", label_lam)
    if label_lam.shape != nodes_.shape and label_lam.dim():
        raise ValueError(
            f"label_lam must have shape {tuple(nodes_.shape)}, one for each node, got {tuple(label_lam.shape)}"
        )
    if label_lam.device.type != "cpu":
        raise ValueError(f"label_lam must be on the CPU, where lam is, got {label_lam.device}")
    constant("label_lam", label_lam, "gradients flow to input, weight and readout only")
    return label_lam.to(nodes_.dtype).expand(nodes_.shape), smoothing, pairs


def classes(name: str, target: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Check one class for each sample, in the given shape or its last dimension alone."""
    int64_tensor(name, target, " of classes")
    if target.shape != shape and target.shape != shape[-1:]:
        shapes = " or ".join(str(tuple(s)) for s in dict.fromkeys((shape[-1:], shape)))
        raise ValueError(f"{name} must have shape {shapes}, one class for each sample, got {tuple(target.shape)}")
    same_device(name, target, device)


def any_target(name: str, target: Any, samples: int, device: torch.device) -> None:
    """Check classes (N, ...) or floating targets (N,C,...), N = ``samples``."""
    if not is_strided(target) or not (target.dtype == torch.int64 or target.is_floating_point()):
        raise TypeError(f"{name} must be an int64 tensor of classes, or floating, got {kind(target)}")
    if target.shape[:1] != (samples,) or (target.is_floating_point() and target.dim() < 2):
        wanted = f"({samples},C,...)" if target.is_floating_point() else f"({samples},) or ({samples},...)"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(target.shape)}")
    same_device(name, target, device)


def mixing(
    index: Any, lam: Any, samples: int, device: torch.device, dtype: torch.dtype, patches: int | None = None
) -> Tensor:
    """Check partners and weights for ``samples`` samples, or for each of their ``patches``; return lam as a tensor."""
    if index is None:
        raise ValueError(f"index is needed where lam is given (lam = {lam})")
    if lam is None:
        raise ValueError("lam is needed where index is given; lam = 0.5 is Midpoint Mixup")
    pairing(index, samples, device)
    return sample_lam(lam, samples, device, dtype, patches)


def pairing(index: Any, samples: int, device: torch.device) -> None:
    """Check one partner for each of ``samples`` samples."""
    int64_tensor("index", index)
    if index.shape != (samples,):
        raise ValueError(f"index must have shape ({samples},), one partner for each sample, got {tuple(index.shape)}")
    same_device("index", index, device)


def image_shape(shape: Any, name: str = "input_shape") -> tuple[int, int, int, int]:
    """Check the shape of a batch of images."""
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{name} must be a shape (N,ch,H,W), got {shape!r}")
    if len(shape) != 4:
        wanted = "must be" if name == "input_shape" else "must have shape"
        raise ValueError(f"{name} {wanted} (N,ch,H,W), got {tuple(shape)}")
    num_samples, channels, height, width = (integer(f"{name}[{i}]", size, 0) for i, size in enumerate(shape))
    return num_samples, channels, height, width


def box(value: Any, samples: int, device: torch.device) -> None:
    """Check a box (4,), or one for each of ``samples`` images; :func:`box_values` reads the values."""
    int64_tensor("box", value)
    if value.shape not in ((4,), (samples, 4)):
        raise ValueError(f"box must have shape (4,) or ({samples},4): y0, y1, x0, x1; got {tuple(value.shape)}")
    same_device("box", value, device)


def sample_lam(lam: Any, samples: int, device: torch.device, dtype: torch.dtype, patches: int | None = None) -> Tensor:
    """Check the weights of ``samples`` samples, or of each of their ``patches`` if that is not None.

    Return them as a tensor of the dtype in which ``dtype`` accumulates.
    """
    dtype = accumulation(dtype)
    if not isinstance(lam, Tensor):
        return torch.full((), fraction("lam", lam, "a number or a tensor"), dtype=dtype, device=device)
    floating("lam", lam)
    if lam.shape not in ((), (samples,)) and (patches is None or lam.shape != (samples, patches)):
        of_patches = "" if patches is None else f" or ({samples},{patches})"
        raise ValueError(
            f"lam must have shape (){',' if of_patches else ' or'} ({samples},){of_patches}, got {tuple(lam.shape)}"
        )
    same_device("lam", lam, device)
    constant("lam", lam, "it is a constant of the loss")
    return lam if lam.dtype == dtype else lam.to(dtype)


def nodes(lam: Any, lam_weight: Any) -> tuple[Tensor, Tensor]:
    """Check quadrature nodes and their weights; return both as (K,) tensors on the CPU.

    A number ``lam`` is one node of weight 1. :func:`node_values` reads the values.
    """
    if not isinstance(lam, Tensor):
        number = fraction("lam", lam, "a number, or a tensor of nodes with lam_weight")
        lam = torch.full((), number, dtype=torch.float64, device="cpu")
    if lam_weight is None:
        if lam.dim() != 0:
            raise ValueError(f"lam_weight is needed where lam is a tensor of nodes (lam has shape {tuple(lam.shape)})")
        lam, lam_weight = lam[None], torch.ones(1, dtype=torch.float64, device="cpu")
    elif lam.dim() != 1 or lam.shape[0] == 0:
        raise ValueError(f"lam must be a tensor of nodes (K,) where lam_weight is given, got shape {tuple(lam.shape)}")
    for name, value in (("lam", lam), ("lam_weight", lam_weight)):
        floating(name, value)
        if value.shape != lam.shape:
            raise ValueError(f"{name} must have lam's shape {tuple(lam.shape)}, got {tuple(value.shape)}")
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the CPU: its values decide which pairs are visited, and reading them from "
                f"{value.device} would wait for the device"
            )
        constant(name, value, "gradients flow to input and weight only")
    return lam, lam_weight


def lr(value: Any, runs: tuple[int, ...], steps: int) -> Tensor:
    """Check step sizes; return them as (1 or R, 1 or steps), float64 on the CPU; :func:`lr_values` reads them."""
    if not isinstance(value, Tensor):
        return torch.full((1, 1), finite("lr", value, 0), dtype=torch.float64, device="cpu")
    floating("lr", value)
    if value.device.type != "cpu":
        raise ValueError(f"lr must be on the CPU: reading its values from {value.device} would wait for the device")
    constant("lr", value, "gradient_descent is not differentiable")
    num_runs = runs[0] if runs else 1
    if value.dim() == 0:
        return value.double().view(1, 1)
    if value.dim() == 2 and value.shape[0] in (1, num_runs) and value.shape[1] in (1, steps):
        return value.double()
    fits_runs, fits_steps = value.shape == runs, value.shape == (steps,)
    if fits_runs and fits_steps and steps > 1:
        raise ValueError(
            f"lr of shape ({steps},) is ambiguous where R = steps: give (R,1) for the runs or (1,steps) for the steps"
        )
    if fits_runs or fits_steps:
        return value.double()[:, None] if fits_runs else value.double()[None]
    of_runs = f", ({num_runs},) for the runs, ({num_runs},{steps}) for both" if runs else ""
    raise ValueError(f"lr must be a number or have shape ({steps},) for the steps{of_runs}, got {tuple(value.shape)}")


def momentum(value: Any) -> float:
    """Check a momentum in [0, 1)."""
    number = real("momentum", value)
    if not 0 <= number < 1:
        raise ValueError(f"momentum must be in [0, 1), got {value}")
    return number


def sampling(alpha_: Any, lam: Any, generator_: Any) -> tuple[float, float | None]:
    """Check how lam is drawn; return alpha and the fixed lam, if any."""
    checked = alpha(alpha_), None if lam is None else fraction("lam", lam)
    generator(generator_)
    return checked


def logits(input: Any, name: str = "input", *, positions: bool = False) -> None:
    """Check logits (N,C), or with ``positions`` also (N,C,d1,...)."""
    float_tensor(name, input)
    if (input.dim() != 2 and not (positions and input.dim() > 2)) or input.shape[1] == 0:
        shape = "(N,C) or (N,C,d1,...)" if positions else "(N,C)"
        raise ValueError(f"{name} must have shape {shape} with C at least 1, got {tuple(input.shape)}")


def position_classes(name: str, target: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Check one class for each sample or, beyond one dimension, each position."""
    int64_tensor(name, target, " of classes")
    if target.shape != shape:
        of = "sample" if len(shape) == 1 else "position"
        raise ValueError(f"{name} must have shape {tuple(shape)}, one class for each {of}, got {tuple(target.shape)}")
    same_device(name, target, device)


def class_weight(name: str, value: Any, input: Tensor) -> Tensor:
    """Check a weight for each class of logits; return it in the dtype in which they accumulate."""
    floating(name, value)
    if value.shape != input.shape[1:2]:
        raise ValueError(
            f"{name} must have shape ({input.shape[1]},), one weight for each class, got {tuple(value.shape)}"
        )
    same_device(name, value, input.device)
    constant(name, value, "gradients flow to input only (detach it)")
    return value.to(accumulation(input.dtype))


def soft_target(target: Any, input: Tensor) -> None:
    """Check a distribution over the classes for each row of logits."""
    if not is_strided(target) or target.dtype not in FLOAT_DTYPES:
        raise TypeError(f"target must be a floating-point tensor of probabilities, got {kind(target)}")
    if target.shape != input.shape:
        raise ValueError(f"target must have input's shape {tuple(input.shape)}, got {tuple(target.shape)}")
    same_device("target", target, input.device)
    constant("target", target, "gradients flow to input only (detach it)")


def loss_options(label_smoothing: Any, ignore_index: Any, reduction: Any) -> tuple[float, int, str]:
    """Check the options of a cross-entropy and return them."""
    smoothing = fraction("label_smoothing", label_smoothing)
    ignored = integer("ignore_index", ignore_index, -(2**63))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    return smoothing, ignored, reduction


# Values, which are read on the CPU only; on another device an invalid one gives NaN instead of an error


def explained(operator: Callable[..., Any], args: Sequence[Any], check: Callable[..., Any], *checked: Any) -> Any:
    """Call an operator of the CPU library; if it refuses a value, ``check(*checked)`` raises the error that names it.

    Kernels check values as they read them, so valid ones are read only once.
    """
    try:
        return operator(*args)
    except RuntimeError as error:
        refusal = error
    check(*checked)
    raise refusal


def lam_values(lam: Tensor) -> None:
    """Refuse weights outside [0, 1], including NaN."""
    if lam.device.type == "cpu" and lam.numel():
        low, high = (float(bound) for bound in lam.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"lam must be in [0, 1], got {low if not low >= 0 else high}")


def node_values(lam: Tensor, lam_weight: Tensor) -> None:
    """Refuse nodes outside [0, 1] and weights that do not sum to 1 within their dtype's precision."""
    values, weights = lam.tolist(), lam_weight.tolist()
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"lam must be in [0, 1], got {values}")
    if not abs(sum(weights) - 1) <= 4 * torch.finfo(lam_weight.dtype).eps * len(weights):
        raise ValueError(f"lam_weight must sum to 1, got {weights}, which sum to {sum(weights)}")


def label_lam_values(label_lam: Tensor) -> None:
    """Refuse label shares outside [0, 1]."""
    values = label_lam.tolist()
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"label_lam must be in [0, 1], got {values}")


def lr_values(lr_: Tensor) -> None:
    """Refuse step sizes that are negative or not finite."""
    if lr_.numel():
        low, high = (float(bound) for bound in lr_.aminmax())
        if not (low >= 0 and high < math.inf):
            raise ValueError(f"lr must be finite and at least 0, got {low if not low >= 0 else high}")


def partners(index: Tensor, lam: Tensor, samples: int) -> Tensor:
    """Refuse partners outside [0, samples) and their weights outside [0, 1]; return the partners contiguous."""
    lam_values(lam)
    return partner_values(index, samples)


def partner_values(index: Tensor, samples: int) -> Tensor:
    """Refuse partners outside [0, samples); return them contiguous."""
    _within("index", index, samples)
    return index.contiguous()


def box_values(box_: Tensor, height: int, width: int) -> None:
    """Refuse boxes that are not inside images of this size."""
    if box_.device.type == "cpu":
        for edges in box_.reshape(-1, 4).tolist():
            y0, y1, x0, x1 = edges
            if not (0 <= y0 <= y1 <= height and 0 <= x0 <= x1 <= width):
                raise ValueError(
                    f"box must have 0 <= y0 <= y1 <= H = {height} and 0 <= x0 <= x1 <= W = {width}, got {edges}"
                )


def class_values(target: Tensor, num_classes: int, name: str = "target") -> None:
    """Refuse classes outside [0, num_classes)."""
    _within(name, target, num_classes)


def _within(name: str, value: Tensor, size: int) -> None:
    if value.device.type == "cpu" and value.numel():
        low, high = (int(bound) for bound in value.aminmax())
        if low < 0 or high >= size:
            raise IndexError(f"{name} must lie in [0, {size}), got {low if low < 0 else high}")
