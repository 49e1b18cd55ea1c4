"""Gradients -> an update: parameter groups, optimisers, fp32 masters, clipping, found_inf.

Knows parameters and their names, not what they are for. A non-finite loss or gradient is never
applied: where the optimiser can skip on the device (`found_inf`, torch's fused kernels) no step
waits for the answer.
"""

import ast
import math
import re
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit import compat
from lorafit.arguments import TrainingArguments
from lorafit.engine import moments
from lorafit.errors import ConfigError
from lorafit.model import quantised
from lorafit.world import ALONE, World

UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
"""Names whose parameters take no weight decay (the rule of transformers' Trainer)."""


_GIVEN = (
    *("initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha"),
    *("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable"),
)
"""What of an optimiser's groups is told by arguments; the rest is state."""

_ALIKE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")
"""State that has its parameter's shape, which torch does not look at."""


class Updater:
    """Optimiser, fp32 masters and clipping behind one `update()`.

    A parameter of 16 bits gets a float32 master, which stands in for it in the optimiser's groups
    until `close`: gradients of all micro-batches are summed and the update is taken there, then
    rounded into the parameter, whose dtype never changes. What is trainable and no optimiser holds
    counts in the gradient's norm, as in transformers.

    Args:
        world: The processes that step together: trained tensors become the first one's.

    Attributes:
        zero_grad: Forgets all gradients.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module | None = None, *, world: World = ALONE
    ) -> None:
        self.optimizer, self._world = optimizer, world
        held = {p for group in optimizer.param_groups for p in group["params"]}
        trained = [p for p in model.parameters() if p.requires_grad] if model else []
        world.make_same(trained)
        self._others = [p for p in trained if p not in held]
        self.zero_grad = self._zero_all if self._others else optimizer.zero_grad
        halves = (torch.bfloat16, torch.half)
        trained = (p for p in self.parameters if p.requires_grad and p.dtype in halves)
        self._masters = {p: p.detach().float() for p in trained}
        self._swap(self._masters)
        reserve(optimizer)
        self._hooks = [p.register_post_accumulate_grad_hook(self._to_master) for p in self._masters]
        if self._masters:
            self._hooks.append(optimizer.register_step_pre_hook(self._take_edits))
            self._hooks.append(optimizer.register_step_post_hook(self._from_masters))
        # torch's schedules warn where no step came before theirs: here it may not have been applied
        vars(optimizer)["_opt_called"] = True
        self._skips_on_device = _reads_found_inf(optimizer)
        if isinstance(optimizer, _KnowsModes):
            optimizer.train()

    def close(self) -> None:
        """Remove the hooks, and give the optimiser the user's parameters back."""
        for hook in self._hooks:
            hook.remove()
        vars(self.optimizer).pop("found_inf", None)
        self._swap({master: parameter for parameter, master in self._masters.items()})

    def _swap(self, instead: Mapping[Any, Tensor]) -> None:
        """Put the tensors `instead` into groups and state of the optimiser, for those they are."""
        for group in self.optimizer.param_groups:
            group["params"] = [instead.get(p, p) for p in group["params"]]
        state = self.optimizer.state
        for old in [tensor for tensor in state if tensor in instead]:
            state[instead[old]] = state.pop(old)

    @property
    def parameters(self) -> list[Tensor]:
        """Every tensor the optimiser updates, and what is trainable besides."""
        return [*(p for g in self.optimizer.param_groups for p in g["params"]), *self._others]

    def _zero_all(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self._others:
            parameter.grad = None

    def add_up(self, loss: Tensor) -> None:
        """Gradients, and `loss` in place, become their sums over processes."""
        self._world.share_gradients(loss, self.parameters)

    def norm(self, *, max_norm: float) -> Tensor:
        """The total gradient norm (a scalar on the device); gradients are clipped to `max_norm`
        unless it is 0."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def showing_gradients(self) -> AbstractContextManager[None]:
        """Inside, parameters have the gradients of their masters, for whoever looks at them."""
        return self._showing() if self._masters else nullcontext()

    @contextmanager
    def _showing(self) -> Generator[None]:
        for parameter, master in self._masters.items():
            parameter.grad = None if master.grad is None else master.grad.to(parameter.dtype)
        yield
        for parameter in self._masters:
            parameter.grad = None

    def apply(self, finite: Tensor) -> None:
        """Take the step if `finite`, a boolean scalar; leave everything untouched otherwise."""
        if self._skips_on_device:
            vars(self.optimizer)["found_inf"] = (~finite).float()
        if self._skips_on_device or bool(finite):
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and the masters where there are any."""
        return {**moments.saved(self.optimizer), "masters": list(self._masters.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, of this kind of optimiser or of another in its family
        (`moments`); rates, decay and the like are this optimiser's own,
        where a resumed run was given others."""
        given = [{k: g[k] for k in _GIVEN if k in g} for g in self.optimizer.param_groups]
        moments.load(self.optimizer, {key: state[key] for key in ("state", "param_groups")})
        for group, own in zip(self.optimizer.param_groups, given, strict=True):
            before, now = group.get("initial_lr"), own.get("initial_lr")
            if before and now is not None and now != before:
                group["lr"] = group["lr"] * (now / before)
            group |= own
            if not math.isfinite(group["lr"]):
                raise ValueError(f"a learning rate of {group['lr']}")
        for parameter, kept in self.optimizer.state.items():
            self._check_shapes(parameter, kept)
        with torch.no_grad():
            # a run that was saved with parameters of 32 bits has none
            for master, saved in zip(self._masters.values(), state["masters"], strict=False):
                if saved.shape != master.shape:
                    raise ValueError("a master has another shape than its parameter")
                master.copy_(saved)
        self._skips_on_device = _reads_found_inf(self.optimizer)

    def _check_shapes(self, parameter: Tensor, kept: Mapping[str, Any]) -> None:
        adam = isinstance(self.optimizer, torch.optim.Adam)  # which AdamW is too
        needed = {"step", "exp_avg", "exp_avg_sq"} if adam and kept else set[str]()
        if adam and kept and any(group["amsgrad"] for group in self.optimizer.param_groups):
            needed.add("max_exp_avg_sq")
        odd = [name for name in _ALIKE if name in kept and kept[name] is not None]
        if (
            not needed <= kept.keys()
            or any(kept[name].shape != parameter.shape for name in odd)
            or (needed and not 0 <= float(kept["step"]) < math.inf)
        ):
            raise ValueError("what it keeps of a parameter is missing or has another shape")

    def _to_master(self, parameter: Tensor) -> None:
        master, gradient = self._masters[parameter], parameter.grad  # type: ignore[index]
        assert gradient is not None
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    @torch.no_grad()
    def _take_edits(self, *_: Any) -> None:
        """A parameter that somebody has changed since the last step is its master's new value."""
        for parameter, master in self._masters.items():
            unchanged = parameter == master.to(parameter.dtype)
            master.copy_(torch.where(unchanged, master, parameter.float()))

    @torch.no_grad()
    def _from_masters(self, *_: Any) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)


def reserve(optimizer: Optimizer) -> None:
    """Give torch's own Adam and AdamW the state that they would make in their first step, so that
    an update allocates nothing and what does not fit shows before it. Other optimisers are left."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else []))
        on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                step = torch.tensor(0.0, device=parameter.device if on_device else "cpu")
                moments = {name: torch.zeros_like(parameter) for name in names}
                optimizer.state[parameter] = {"step": step, **moments}


@runtime_checkable
class _KnowsModes(Protocol):
    def train(self) -> object: ...
    def eval(self) -> object: ...


@contextmanager
def resting(optimizer: Any) -> Generator[None]:
    """An optimiser that keeps other weights for evaluation (schedule-free ones) has them inside."""
    knows = isinstance(optimizer, _KnowsModes)
    if knows:
        optimizer.eval()
    try:
        yield
    finally:
        if knows:
            optimizer.train()


class Reached:
    """Which trainable parameters a gradient has reached since this was made; close it after."""

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained, self.silent = len(trained), dict.fromkeys(trained)
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._reached, name))
            for name, p in trained.items()
        ]

    def _reached(self, name: str, _parameter: Tensor) -> None:
        self.silent.pop(name, None)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


def _reads_found_inf(optimizer: Optimizer) -> bool:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and "_step_supports_amp_scaling" in vars(optimizer)


def not_finite(model: nn.Module) -> list[str]:
    """The trained parameters that hold a NaN or an infinity; waits for the device."""
    trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
    return [name for name, p in trained if not bool(p.isfinite().all())]


def decayed_names(model: nn.Module) -> list[str]:
    """The parameters that take weight decay: all but biases and those of norms."""
    norms = {
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    names = (name for name, _ in model.named_parameters())
    return [name for name in names if name not in norms and not UNDECAYED.search(name)]


def check_trainable(model: nn.Module) -> None:
    """Nothing, if a parameter is trainable.

    Raises:
        ConfigError: none is.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "No parameter of the model is trainable.",
            why="Training would change nothing.",
            fix="Attach an adapter first: peft.get_peft_model(model, LoraConfig(...)).",
        )


def groups(model: nn.Module, *, decayed: Collection[str], decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters, either may be empty: those named in `decayed`, and
    the others."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Recipe:
    """How an optimiser is made: its class and its keyword arguments; `notice` says where that
    departs from the name it was asked for by."""

    kind: type[Optimizer]
    options: dict[str, Any]
    notice: str = ""

    def make(self, parameter_groups: list[dict[str, Any]]) -> Optimizer:
        """The optimiser of these groups."""
        made: Any = self.kind  # each takes its own keyword arguments
        return made(parameter_groups, **self.options)


def named(
    arguments: TrainingArguments, device: torch.device, *, sizes: Sequence[int] = ()
) -> Recipe:
    """The optimiser that `optim`, `optim_args` and the rates ask for, on `device`.

    Args:
        sizes: Elements of each tensor that is trained, for what is said of paging.

    Raises:
        MissingPackageError: an optimiser of bitsandbytes without the package.
    """
    name, notice = arguments.optim, ""
    if name.startswith("paged_"):
        name, notice = _paged(name, device, sizes=sizes)
    kind, options = _kind(name, arguments, device=device)
    options = {"lr": arguments.learning_rate, **options, **_extra(arguments.optim_args)}
    return Recipe(kind, options, notice)


def _kind(
    name: str, arguments: TrainingArguments, *, device: torch.device
) -> tuple[type[Optimizer], dict[str, Any]]:
    adam = {
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    match name:
        case "adamw_torch":
            # on CUDA the same arithmetic in one kernel, which can skip a step without the host
            return torch.optim.AdamW, {**adam, "fused": True} if device.type == "cuda" else adam
        case "adamw_torch_fused":
            return torch.optim.AdamW, {**adam, "fused": True}
        case "sgd":
            return torch.optim.SGD, {}
        case "adafactor":
            fixed = {"scale_parameter": False, "relative_step": False}
            return compat.adafactor_class(), fixed
        case _:
            return _bitsandbytes(name, adam)


def _paged(name: str, device: torch.device, *, sizes: Sequence[int]) -> tuple[str, str]:
    """What runs under the name of a paged optimiser, and a line about it."""
    total, paged = moments.state_bytes(sizes, name=name)
    share = f"{paged:,} of {total:,} bytes of state" if sizes else "state"
    if device.type == "cuda":
        large = f"tensors of {moments.PAGED_FROM:,} elements and more"
        return name, f"{name}: {share} can leave the GPU ({large})" if sizes else ""
    plain = name.removeprefix("paged_")
    if "adamw" in name and ("32bit" in name or not find_spec(quantised.PACKAGE)):
        plain = "adamw_torch_fused"
    held, _ = moments.state_bytes(sizes, name=plain)
    kept = f", with {held:,} bytes of state in memory" if sizes else ""
    return plain, (
        f"{name}: paging moves optimiser state between GPU and host, and there is no GPU here; "
        f"{plain} runs instead{kept}, nothing lost (on a GPU {share} could leave it)"
    )


def _bitsandbytes(name: str, adam: dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    family = quantised.package(f"optim={name!r}", instead="write optim='adamw_torch_fused'").optim
    lion = "lion" in name
    options: dict[str, Any] = {
        "optim_bits": 8 if "8bit" in name else 32,
        "is_paged": name.startswith("paged_"),
    }
    options |= {"betas": adam["betas"]} if lion else adam
    return (family.Lion if lion else family.AdamW), options


def _extra(optim_args: str | None) -> dict[str, Any]:
    """`momentum=0.9,nesterov=True` as keyword arguments; what reads as a Python literal is one."""
    pairs = (pair.split("=", 1) for pair in (optim_args or "").split(",") if pair.strip())
    return {key.strip(): _literal(value.strip()) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
