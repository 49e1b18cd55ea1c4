"""Plain functions of tensors, compiled by torch where that pays: on CUDA, with Triton there.

Owns when, not what. A CPU has native.cpp, which has no warm-up of seconds for each of them. Where
torch cannot compile, a function runs as it is written: the same numbers to rounding, in more passes
over memory. `LORAFIT_COMPILE=0` asks for that.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]


def compiled(function: Function, first: Tensor) -> Function:
    """`function`, or its compiled self where `first` lies on CUDA."""
    return _compiled(function) if first.is_cuda and _can_compile() else function


@cache
def _can_compile() -> bool:
    return os.environ.get("LORAFIT_COMPILE") != "0" and find_spec("triton") is not None


@cache
def _compiled(function: Function) -> Function:
    # dynamic: one kernel for all numbers of tokens; sizes of the model are constants to it
    return torch.compile(function, dynamic=True, fullgraph=True)
