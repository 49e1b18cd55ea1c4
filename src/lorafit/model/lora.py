"""LoRA layers as kernels take them, and their dropout by counters.

Reads what peft has put into a model without importing it (`adapters.py` is its door): which layers
are plain LoRA over a frozen linear layer, and with what scale and dropout. Knows no files.
"""

import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorafit.kernels.lora import Adapter, Counters, drop
from lorafit.model.base import HOOKS, decoder_of, unwrap
from lorafit.model.quantised import is_packed


@dataclass(frozen=True)
class LoraLinear:
    """A linear layer of torch's and the LoRA on it, as kernels take both.

    Attributes:
        linear: The frozen layer.
        down, up: The modules that hold A and B; None where there is no adapter.
        scale: alpha / r, or what stands for it.
        share: Probability of dropout.
    """

    linear: nn.Linear
    down: nn.Linear | None = None
    up: nn.Linear | None = None
    scale: float = 0.0
    share: float = 0.0

    @property
    def factors(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B as they are now."""
        return (None, None) if self.down is None or self.up is None else (
            self.down.weight, self.up.weight
        )  # fmt: skip


def lora_linear(module: nn.Module) -> LoraLinear | None:
    """What of `module` kernels can run themselves: a frozen linear layer, quantised by bitsandbytes
    or not, bare or beneath one plain LoRA (no DoRA or other variant, no bias of its own, not
    merged). None for all else."""
    kind = type(module)
    layer: Any = module
    wraps = kind.__name__ in _LINEAR and kind.__module__.startswith("peft.tuners.lora.")
    beneath = layer.base_layer if wraps else layer
    known = type(beneath) is nn.Linear or is_packed(beneath)
    if not known or not _is_frozen(beneath) or (wraps and layer.merged):
        return None
    active = layer.active_adapters if wraps else ()
    active = [name for name in active if name in layer.lora_A]
    if not active or layer.disable_adapters:
        return LoraLinear(beneath)
    name = active[0]
    odd = layer.lora_variant.get(name) or layer.lora_bias.get(name) or layer.fan_in_fan_out
    drop = layer.lora_dropout[name]
    if len(active) > 1 or odd or not isinstance(drop, nn.Dropout | nn.Identity):
        return None
    share = drop.p if isinstance(drop, nn.Dropout) else 0.0
    return LoraLinear(beneath, layer.lora_A[name], layer.lora_B[name], layer.scaling[name], share)


def sign_of(module: nn.Module) -> tuple[Any, ...]:
    """Another once `lora_linear` of `module` would give something else, somebody has hooked it, or
    its weights or those beneath its LoRA have changed. Made for every layer of each micro-batch: it
    reads what lies in the module, and calls nothing."""
    own = vars(module)
    parts = own["_modules"]
    beneath = parts.get("base_layer", module)
    hooks = [len(own[name]) for name in HOOKS]
    weights = [
        (id(weight), weight.data_ptr(), weight._version, weight.requires_grad)
        for weight in vars(beneath)["_parameters"].values()
        if weight is not None
    ]
    plain = (id(module), "forward" in own, hooks, weights)
    if "lora_A" not in parts:
        return *plain, id(beneath)
    layer: Any = module
    held = [[*vars(parts[name])["_modules"].items()] for name in _HELD]
    shares = [vars(drop).get("p") for _, drop in held[-1]]
    told = [[*own[name].items()] for name in ("lora_variant", "scaling", "lora_bias")]
    return (
        *plain, id(beneath), str(layer._active_adapter), layer._disable_adapters,
        held, shares, told, [*own["merged_adapters"]],
    )  # fmt: skip


_HELD = ("lora_A", "lora_B", "lora_dropout")


_LINEAR = ("Linear", "Linear4bit", "Linear8bitLt")
"""peft's LoRA over such a layer, by its class's name."""


class CountedDropout(nn.Dropout):
    """LoRA's dropout whose mask is made from counters, while somebody has set them."""

    def __init__(self, share: float, *, salt: int, drawn: "Drawn") -> None:
        super().__init__(share)
        self.adapter, self.drawn = Adapter(1.0, share, salt), drawn

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., D], its leading axes flattened being the counters' tokens."""
        counters, rows = self.drawn.counters, input.reshape(-1, input.shape[-1])
        # those of another batch where somebody runs the model by himself
        if not self.training or counters is None or len(counters.keys_T) != len(rows):
            return super().forward(input)
        return drop(rows, self.adapter, counters=counters).view(input.shape)


@dataclass
class Drawn:
    """The counters of the micro-batch that is run; None: torch's random numbers."""

    counters: Counters | None = None


@contextmanager
def counting_dropout(model: nn.Module, drawn: Drawn) -> Generator[None]:
    """Inside, LoRA's dropouts make their masks from `drawn`."""
    decoder = decoder_of(model)
    swapped: list[tuple[nn.ModuleDict, str, nn.Module]] = []
    for name, module in decoder.named_modules() if decoder is not None else ():
        drops = getattr(module, "lora_dropout", None)
        if not isinstance(drops, nn.ModuleDict):
            continue
        for key, usual in [*drops.items()]:
            if type(usual) is nn.Dropout:
                swapped.append((drops, key, usual))
                counted = CountedDropout(usual.p, salt=salt_of(name), drawn=drawn)
                drops[key] = counted.train(usual.training)
    try:
        yield
    finally:
        for drops, key, usual in swapped:
            drops[key] = usual.train(drops[key].training)


def salt_of(name: str) -> int:
    """What names a module of the decoder in the counters of its dropout."""
    return zlib.crc32(name.encode())


def drops(model: nn.Module) -> bool:
    """Whether a LoRA drops inputs."""
    return any(drop.p > 0 for drop in _lora_dropouts(model))


def base_drops(model: nn.Module) -> bool:
    """Whether the base itself drops anything in training: by a module, or by what its configuration
    says, as many call a function for it."""
    own = {id(drop) for drop in _lora_dropouts(model)}
    modules = (m for m in model.modules() if isinstance(m, nn.Dropout) and id(m) not in own)
    config = getattr(unwrap(model), "config", None)
    said = config.get_text_config().to_dict() if config is not None else {}
    shares = (
        share
        for name, share in said.items()
        if "drop" in name and not name.startswith(("summary_", "classifier_"))
    )
    return any(isinstance(share, float) and share > 0 for share in shares) or any(
        module.p > 0 for module in modules
    )


def passes_through_peft(model: nn.Module) -> bool:
    """Whether an adapter works in PEFT's own forward, above the base: prompts that are learned,
    LoRA that wakes at certain tokens (aLoRA)."""
    configs = getattr(model, "peft_config", None)
    found = configs.values() if isinstance(configs, dict) else ()
    return any(
        getattr(config, "is_prompt_learning", False)
        or getattr(config, "alora_invocation_tokens", None)
        for config in found
    )


def _lora_dropouts(model: nn.Module) -> Iterator[nn.Dropout]:
    for module in model.modules():
        found = getattr(module, "lora_dropout", None)
        if isinstance(found, nn.ModuleDict):
            yield from (drop for drop in found.values() if isinstance(drop, nn.Dropout))


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())
