"""Checks of a call's tensors, each error naming the argument; and the types that autocast gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from xent._arguments import class_parallel
from xent._autograd import transforms
from xent._core.logits import compute_dtype
from xent._core.low_rank import LowRank
from xent._core.validators import FLOATING


def check_tensors(*, spread: bool = False, **given: object) -> None:
    """Raise a TypeError that names what is no dense tensor, None apart; DTensors pass where ``spread``."""
    for name, value in given.items():
        if isinstance(value, LowRank):
            raise TypeError(
                f"{name} is a LowRank, which losses from features take, and this does not: "
                f"pass {name}.to_dense()"
            )
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not spread and class_parallel.is_dtensor(value):
            raise TypeError(f"{name} is a DTensor, which is not taken here: pass {name}.full_tensor()")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            kind = str(value.layout).removeprefix("torch.")
            raise TypeError(
                f"{name} must be a dense tensor, got one of layout {kind}: pass {name}.to_dense()"
            )


def require_tensors(*, spread: bool = False, **given: object) -> None:
    """Raise a TypeError that names what is no dense tensor, None too."""
    for name, value in given.items():
        if value is None:
            raise TypeError(f"{name} must be a tensor, got None")
    check_tensors(spread=spread, **given)


def require_weight(*, spread: bool = False, **given: object) -> None:
    """Raise a TypeError unless each is a dense tensor or a LowRank."""
    require_tensors(
        spread=spread, **{name: value for name, value in given.items() if not isinstance(value, LowRank)}
    )


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor's operations are those of torch.Tensor, or of what torch wraps around it.

    A quantised weight of another library is a subclass whose operations differ.
    """
    kind = type(tensor)
    if kind in (Tensor, torch.nn.Parameter):
        return True
    if kind.__module__.startswith(("torch._subclasses", "torch.distributed.")):
        return True  # tensors of shapes alone, and those of many processes
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    plain = getattr(Tensor.__torch_function__, "__func__", None), torch._C._disabled_torch_function_impl
    return function in plain and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def check_floating(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are floating and of one type."""
    first = of_first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        dtype = tensor.dtype
        if dtype not in FLOATING:
            raise TypeError(f"{name} must be of a floating type of 16, 32 or 64 bits, got {dtype}")
        if first is None:
            first, of_first = name, dtype
        elif dtype != of_first:
            raise TypeError(
                f"{first} is {of_first} but {name} is {dtype}: convert one of them, or use torch.autocast"
            )


def check_devices(*tensors: Tensor | None) -> None:
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def product_dtype(asked: torch.dtype | None, input: Tensor) -> torch.dtype:
    if asked is None and input.dtype in (torch.float32, torch.float64):
        return input.dtype
    full = compute_dtype(input.dtype)
    if asked is None:
        return full if input.device.type == "cpu" else input.dtype
    allowed = (full, torch.bfloat16, input.dtype) if full == torch.float32 else (full,)
    if asked not in allowed:
        names = ", ".join(sorted({str(dtype) for dtype in allowed}))
        raise ValueError(f"product_dtype of {input.dtype} features can be {names}; got {asked}")
    return asked


def lower(tensor: Tensor) -> Tensor:
    """Return a factor of a product as autocast has it: in its half type, float64 apart."""
    if not autocasts(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def loss_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of the loss: that of the logits, but never a half type under autocast."""
    return torch.float32 if autocasts(tensor) else tensor.dtype


def autocasts(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64


def is_readable(*tensors: Tensor | None) -> bool:
    """Return whether data may be read here: on a CPU, outside of graphs and vmap."""
    return not (
        transforms.is_opaque(*tensors)
        or any(t is not None and t.device.type != "cpu" for t in tensors)
        or transforms.batched(*tensors)
    )
