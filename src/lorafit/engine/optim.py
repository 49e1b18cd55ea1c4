"""Gradients -> an update: parameter groups, optimisers, fp32 masters, clipping, found_inf.

Knows parameters and their names, not what they are for. A non-finite loss or gradient is never
applied: where the optimiser can skip on the device (`found_inf`, torch's fused kernels) no step
waits for the answer.
"""

import ast
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.errors import ConfigError, MissingPackageError

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names whose parameters take no weight decay (the rule of transformers' Trainer)."""


class Updater:
    """Optimiser, fp32 masters and clipping behind one `update()`.

    A trainable parameter that is not float32 gets a float32 master: gradients of all micro-batches
    are summed and the update is taken there, then rounded into the parameter, whose dtype never
    changes. The masters are what `optimizer.param_groups` holds.
    """

    def __init__(self, optimizer: Optimizer, masters: Mapping[nn.Parameter, Tensor]) -> None:
        self.optimizer = optimizer
        self._masters = dict(masters)
        self._hooks = [p.register_post_accumulate_grad_hook(self._to_master) for p in masters]
        if masters:
            self._hooks.append(optimizer.register_step_post_hook(self._from_masters))
        # torch's schedules warn where no step came before theirs: here it may not have been applied
        vars(optimizer)["_opt_called"] = True
        self._skips_on_device = _reads_found_inf(optimizer)

    def close(self) -> None:
        """Remove the hooks from the user's parameters and optimiser."""
        for hook in self._hooks:
            hook.remove()

    def parameters(self) -> list[Tensor]:
        """Every tensor the optimiser updates."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def norm(self, *, max_norm: float) -> Tensor:
        """The total gradient norm (a scalar on the device); gradients are clipped to `max_norm`
        unless it is 0."""
        return nn.utils.clip_grad_norm_(self.parameters(), max_norm or math.inf)

    def apply(self, finite: Tensor) -> None:
        """Take the step if `finite`, a boolean scalar; leave everything untouched otherwise."""
        if self._skips_on_device:
            vars(self.optimizer)["found_inf"] = (~finite).float()
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and the masters where there are any."""
        return {**self.optimizer.state_dict(), "masters": list(self._masters.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.optimizer.load_state_dict({key: state[key] for key in ("state", "param_groups")})
        with torch.no_grad():
            for master, saved in zip(self._masters.values(), state["masters"], strict=True):
                master.copy_(saved)

    def _to_master(self, parameter: Tensor) -> None:
        master, gradient = self._masters[parameter], parameter.grad  # type: ignore[index]
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def _from_masters(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)


def _reads_found_inf(optimizer: Optimizer) -> bool:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and "_step_supports_amp_scaling" in vars(optimizer)


def masters_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """A float32 copy for each trainable parameter of another floating dtype."""
    halves = (p for p in parameters if p.requires_grad and p.dtype in (torch.bfloat16, torch.half))
    return {p: p.detach().float() for p in halves}


def groups(model: nn.Module, masters: Mapping[nn.Parameter, Tensor], *, decay: float) -> list[Any]:
    """Two parameter groups, with weight decay and without (biases and norms)."""
    norms = {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    decayed: list[Tensor] = []
    undecayed: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            skip = name in norms or UNDECAYED.search(name)
            (undecayed if skip else decayed).append(masters.get(parameter, parameter))
    both = [{"params": decayed, "weight_decay": decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def build(
    model: nn.Module, arguments: TrainingArguments, *, device: torch.device
) -> tuple[Updater, str]:
    """The updater that `optim` names, and one line to say where it departs from the name.

    Raises:
        ConfigError: nothing is trainable.
        MissingPackageError: an optimiser of bitsandbytes without the package.
    """
    masters = masters_of(model.parameters())
    parameter_groups = groups(model, masters, decay=arguments.weight_decay)
    if not parameter_groups:
        raise ConfigError(
            "No parameter of the model is trainable.",
            why="Training would change nothing.",
            fix="Attach an adapter first: peft.get_peft_model(model, LoraConfig(...)).",
        )
    optimizer_class, options, notice = named(arguments, device, parameter_groups=parameter_groups)
    options = {"lr": arguments.learning_rate, **options, **_extra(arguments.optim_args)}
    made: Any = optimizer_class  # each takes its own keyword arguments
    return Updater(made(parameter_groups, **options), masters), notice


def named(
    arguments: TrainingArguments, device: torch.device, *, parameter_groups: list[Any]
) -> tuple[type[Optimizer], dict[str, Any], str]:
    """Class, keyword arguments and notice for `arguments.optim` on `device`."""
    name = arguments.optim
    adam = {
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    if name.startswith("paged_") and device.type != "cuda":
        name, notice = _unpaged(name, parameter_groups)
    else:
        notice = ""
    match name:
        case "adamw_torch":
            return torch.optim.AdamW, adam, notice
        case "adamw_torch_fused":
            return torch.optim.AdamW, {**adam, "fused": True}, notice
        case "sgd":
            return torch.optim.SGD, {}, notice
        case "adafactor":
            fixed = {"scale_parameter": False, "relative_step": False}
            return compat.adafactor_class(), fixed, notice
        case _:
            return (*_bitsandbytes(name, adam), notice)


def _unpaged(name: str, parameter_groups: list[Any]) -> tuple[str, str]:
    trainable = sum(p.numel() for group in parameter_groups for p in group["params"])
    plain = "adamw_torch_fused" if "adamw" in name else name.removeprefix("paged_")
    return plain, (
        f"{name}: paging moves optimiser state between GPU and host, and there is no GPU here; "
        f"{plain} runs instead with {trainable * 8 / 1e6:.1f} MB of state in memory, nothing lost"
    )


def _bitsandbytes(name: str, adam: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    try:
        from bitsandbytes.optim.adamw import AdamW  # pyright: ignore[reportMissingImports]
        from bitsandbytes.optim.lion import Lion  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise MissingPackageError(
            f"optim={name!r} is bitsandbytes' optimiser, which is not installed.",
            fix="pip install 'lorafit[quant]', or write optim='adamw_torch_fused'.",
        ) from missing
    lion = "lion" in name
    options: dict[str, Any] = {
        "optim_bits": 8 if "8bit" in name else 32,
        "is_paged": name.startswith("paged_"),
    }
    options |= {"betas": adam["betas"]} if lion else adam
    return (Lion if lion else AdamW), options


def _extra(optim_args: str | None) -> dict[str, Any]:
    """`momentum=0.9,nesterov=True` as keyword arguments; what reads as a Python literal is one."""
    pairs = (pair.split("=", 1) for pair in (optim_args or "").split(",") if pair.strip())
    return {key.strip(): _literal(value.strip()) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
