"""Checks of what the sampling core is given: each error names the argument, the value and the rule.

A wrong stride or dtype would not fail in a kernel, it would read other numbers. So every public
function of serve.ops checks its arguments before any kernel sees them; what can only be known by
looking at the values (a row without any finite logit) is checked where the values are read anyway.
"""

from collections.abc import Sequence
from numbers import Integral, Real

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    dense: bool = True,
) -> torch.Tensor:
    """The tensor itself, or ValueError/TypeError; None in ``shape`` takes any size of at least one.

    ``dense`` asks that the last dimension is contiguous, which is what the kernels read by.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch tensor.")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {_short(value.dtype)}; it must be {' or '.join(map(_short, dtypes))}.")
    wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    fits = value.ndim == len(shape) and all(
        (found >= 1 if n is None else found == n) for found, n in zip(value.shape, shape, strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be {wanted}.")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}; it must be on {device}, as the logits or hidden states are.")
    if dense and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {value.stride(-1)} in its last dimension; it must be 1 (use .contiguous())."
        )
    return value


def check_size(name: str, value: int, *, least: int = 1) -> int:
    """The integer itself, or ValueError when it is below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}.")
    return value


def check_uniforms(value: torch.Tensor, rows: int, device: torch.device) -> None:
    """ValueError unless these are float64 uniforms [rows, n]; on the CPU also unless all lie in (0, 1)."""
    check_tensor("uniforms", value, shape=(rows, None), dtypes=(torch.float64,), device=device)
    if device.type == "cpu":
        wrong = ~((value > 0) & (value < 1))
        if bool(wrong.any()):
            row, place = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"uniforms of row {row} hold {value[row, place].item()}; each must be above 0 and below 1."
            )


def per_row(
    name: str,
    value: float | torch.Tensor,
    rows: int,
    *,
    rule: str,
    low: float,
    high: float = float("inf"),
    open_low: bool = False,
    dtype: torch.dtype = torch.float64,
    device: torch.device,
) -> torch.Tensor:
    """One number per row [rows] from a number or a tensor, checked against its range on the CPU.

    A tensor on a GPU is trusted: looking at it would make the host wait at every step.
    """
    if isinstance(value, torch.Tensor):
        whole = (torch.int32, torch.int64)
        dtypes = (*FLOATS, *whole) if dtype.is_floating_point else whole
        check_tensor(name, value, shape=(rows,), dtypes=dtypes, device=device)
        if value.device.type == "cpu":
            wrong = ~((value > low if open_low else value >= low) & (value <= high))
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"{name} of row {row} is {value[row].item()}; {rule}.")
        return value.to(dtype)
    kind, article = (Real, "a number") if dtype.is_floating_point else (Integral, "an integer")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}; it must be {article}, and {rule.removeprefix('it must be ')}.")
    if not ((value > low if open_low else value >= low) and value <= high):
        raise ValueError(f"{name} is {value!r}; {rule}.")
    return torch.full((rows,), value, dtype=dtype, device=device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
