"""Linear layers whose weights lie in 4 or 8 bits (bitsandbytes'), and the door to that package.

QLoRA: Dettmers et al. 2023 (NF4, double quantisation); LLM.int8: Dettmers et al. 2022. Owns what a
base is quantised to, and its weights in full. Where lorafit runs layers itself, a product is that
of the dequantised weights in the dtype of products, in training and in evaluation alike. That is
what bitsandbytes computes of NF4; of int8 it rounds activations too where it evaluates, and on a
GPU always, by what else is in the batch (its outliers), so that documents would see each other.
"""

import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import ERROR, getLogger
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lorafit.errors import MissingPackageError

PACKAGE = "bitsandbytes"


def package(wanted: str, *, instead: str) -> Any:
    """bitsandbytes, quietly, and without the compiled code that it would fetch from the Hub where
    the package `kernels` is installed.

    Args:
        wanted: What needs it, for people.
        instead: What to do otherwise.

    Raises:
        MissingPackageError: it is not installed.
    """
    getLogger(PACKAGE).setLevel(ERROR)  # a line for each product that rounds activations
    try:
        with _hidden("kernels"):
            import bitsandbytes
    except ImportError as missing:
        raise MissingPackageError(
            f"{wanted} needs bitsandbytes, which is not installed.",
            fix=f"pip install 'lorafit[quant]', or {instead}.",
        ) from missing
    return bitsandbytes


@contextmanager
def unseen() -> Generator[None]:
    """Inside, bitsandbytes is not found unless it was imported before: peft imports it wherever it
    finds it, seconds for nothing."""
    with _hidden(PACKAGE):
        yield


@contextmanager
def _hidden(name: str) -> Generator[None]:
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


class Packed(nn.Linear):
    """What a type checker is told of bitsandbytes' Linear4bit and Linear8bitLt."""

    state: Any
    quant_state: Any
    support_avx512bf16_for_cpu: bool


def is_packed(module: nn.Module) -> TypeGuard[Packed]:
    """Whether `module` is a linear layer of bitsandbytes whose weights are quantised by now."""
    ours = isinstance(module, nn.Linear) and type(module).__module__.startswith(f"{PACKAGE}.")
    return ours and (
        module.weight.dtype == torch.int8 or getattr(module.weight, "quant_state", None) is not None
    )


def packed(model: nn.Module) -> list[Packed]:
    """Every such layer of `model`."""
    return [module for module in model.modules() if is_packed(module)]


def scheme(base: nn.Module) -> str:
    """nf4, fp4, int8, or another method by the name that the configuration has; "none"."""
    layers = packed(base)
    if layers:
        return str(getattr(layers[0].weight, "quant_type", "int8"))
    said = getattr(getattr(base, "config", None), "quantization_config", None)
    return scheme_of(said.to_dict() if said and not isinstance(said, dict) else said or {})


def scheme_of(said: Mapping[str, Any]) -> str:
    """The same of what a configuration says."""
    if said.get("load_in_4bit"):
        return str(said.get("bnb_4bit_quant_type"))
    return "int8" if said.get("load_in_8bit") else str(said.get("quant_method", "none"))


def numel(parameter: Tensor) -> int:
    """The weights in `parameter`: two in each byte of four bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else torch.Size(state.shape).numel()


def settle(model: nn.Module) -> None:
    """Keep 4-bit weights in one order. On processors with AVX512-BF16 bitsandbytes evaluates with
    products in bf16 whatever the compute dtype, and reorders the weights for it."""
    for layer in packed(model):
        state = getattr(layer.weight, "quant_state", None)
        if state is None:
            continue
        layer.support_avx512bf16_for_cpu = False
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import (
                _convert_weight_packed_for_cpu_inverse,  # pyright: ignore[reportPrivateUsage]
            )

            weight: Any = layer.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                weight.data, state
            )


def whole(linear: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weights of `linear` [out, in] in `dtype`: a copy where they are quantised."""
    weight: Any = linear.weight
    if not is_packed(linear):
        return weight.detach().to(dtype)
    if weight.dtype == torch.int8:
        scale = getattr(weight, "SCB", None)  # it moves to the layer's state when that first runs
        scale = linear.state.SCB if scale is None else scale
        return weight.data.to(dtype).mul_(scale.unsqueeze(1).mul(1 / 127))
    from bitsandbytes.functional import dequantize_blockwise

    state, scales = weight.quant_state, weight.quant_state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    # not dequantize_4bit(): that rounds to the dtype that the files had
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.data, scales.float(), state.blocksize, state.quant_type, state.shape, dtype
    )


@dataclass(frozen=True)
class Together:
    """Layers that read the same rows, one weight below the other: made anew at each call."""

    linears: tuple[nn.Linear, ...]
    dtype: torch.dtype

    def __call__(self) -> Tensor:
        """[O, D], a copy that nobody keeps."""
        if len(self.linears) == 1:
            return whole(self.linears[0], self.dtype)
        rows = [linear.out_features for linear in self.linears]
        first = self.linears[0]
        made_OD = torch.empty(
            sum(rows), first.in_features, dtype=self.dtype, device=first.weight.device
        )
        for linear, part in zip(self.linears, made_OD.split(rows), strict=True):
            part.copy_(whole(linear, self.dtype))
        return made_OD


def together(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Together | None:
    """The layers as one, if any of them is quantised."""
    return Together(tuple(linears), dtype) if any(map(is_packed, linears)) else None


@contextmanager
def exactly(model: nn.Module) -> Generator[None]:
    """Inside, quantised layers of `model` give the products of their dequantised weights."""
    layers = packed(model)
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    made = _Product.apply(x, layer, dtype)
    assert isinstance(made, Tensor)
    return made


class _Product(torch.autograd.Function):
    """x W', with W dequantised again in backward instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
        ctx.how = layer, dtype, x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return functional.linear(x.to(dtype), whole(layer, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer, dtype, given = ctx.how
        return (grads[0].to(dtype) @ whole(layer, dtype)).to(given), None, None
