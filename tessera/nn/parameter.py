"""`ts.nn.Parameter`: torch's parameter, frozen where its type cannot be trained.

In: a tensor of any dtype. Out: a torch.nn.Parameter. Modules of user code call it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Meta(type(torch.nn.Parameter)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.nn.Parameter)


class Parameter(torch.nn.Parameter, metaclass=_Meta):
    """torch.nn.Parameter, which takes no gradient by default where the tensor has integers or 8-bit floats.

    What is made is torch's own class, of which every instance counts as one of this.

    Args:
        data: of any dtype.
        requires_grad: None for True where the dtype is a float of 16 bits or more.
    """

    def __new__(cls, data: Tensor, requires_grad: bool | None = None) -> torch.nn.Parameter:  # type: ignore[misc]
        if requires_grad is None:
            requires_grad = data.is_floating_point() and data.itemsize > 1
        return torch.nn.Parameter(data, requires_grad)
