"""Adapters: attached, saved, loaded strictly. The only door to peft, imported late as it is slow.

Owns which tensors training may change (`adapter_state`) and the adapter's folder: PEFT's own
format, the tokenizer, and `lorafit.json`, its contract. Knows no run and no data.
"""

import copy
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafit.arguments import ModelArguments
from lorafit.errors import ModelError, nearest
from lorafit.model import base as bases
from lorafit.model import guard, identity, lora_config, quantised, tokens
from lorafit.model.base import CPU_HOME, Home, PreTrainedModel
from lorafit.panel import fits

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

CONTRACT = "lorafit.json"
"""The file that says what an adapter was trained over, and how to prompt it."""

WEIGHTS = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL_LINEAR = "all-linear"
_WRITTEN = "Give the folder that training wrote (its output_dir or a checkpoint in it)."


@dataclass(frozen=True)
class Tuned:
    """A saved adapter over its base, in eval mode on the CPU. `contract` may be empty."""

    model: "PeftModel"
    tokenizer: Any
    contract: dict[str, Any]


def attach(model: PreTrainedModel, arguments: ModelArguments) -> "PeftModel":
    """`model` with a fresh LoRA adapter; adapter weights are float32 whatever the base's dtype.

    The base is changed in place, as peft does. LoRA: Hu et al. 2021. Over quantised layers as over
    others; norms, embedding and head keep the dtype that they were loaded in.

    Raises:
        ModelError: a module named in `lora_target_modules` or `modules_to_save` does not exist, or
            one of the latter is quantised.
    """
    _import_peft()
    from peft import LoraConfig

    targets, saved = _names(arguments.lora_target_modules), _names(arguments.modules_to_save)
    everything = targets == [ALL_LINEAR]
    _check_exist(model, saved if everything else targets + saved)
    _check_whole(model, saved)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=ALL_LINEAR if everything else targets,
        use_rslora=arguments.use_rslora,
        use_dora=arguments.use_dora,
        modules_to_save=saved or None,
        # GPT-2's Conv1D keeps its weight transposed; peft finds out by itself, with a warning.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        return _wrapped(model, config)
    except ValueError as error:
        raise ModelError(
            f"LoRA cannot be attached to {type(model).__name__}: {error}",
            fix=f"Name linear modules instead: {', '.join(_linear(model))}.",
        ) from error


def loraplus(
    model: Any, kind: type[Optimizer], *, options: Mapping[str, Any], ratio: float, decay: float
) -> Optimizer:
    """LoRA+ (Hayou et al. 2024) through peft: B matrices learn `ratio` times as fast as A.

    Args:
        options: The optimiser's keyword arguments, `lr` among them.
    """
    from peft.optimizers import create_loraplus_optimizer

    rates = {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
    return create_loraplus_optimizer(model, kind, **rates, **options)


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable parameters, all parameters), tied ones counted once."""
    counted = getattr(model, "get_nb_trainable_parameters", None)
    if counted:  # peft's count knows that a 4-bit weight holds two parameters in a byte
        return counted()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def saved_bytes(model: nn.Module) -> int:
    """About what `save_adapter` writes: what is trained of an adapted model, else all of it."""
    whole = not (is_adapted(model) or _is_injected(model))
    return sum(p.numel() * p.element_size() for p in model.parameters() if whole or p.requires_grad)


def without_adapter(model: nn.Module) -> AbstractContextManager[Any]:
    """The base alone, while the context lasts; a model without adapter stays as it is."""
    return model.disable_adapter() if is_adapted(model) else nullcontext()


def is_adapted(model: nn.Module) -> TypeGuard["PeftModel"]:
    """Whether `model` is a PEFT model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def scaling_of(model: nn.Module) -> dict[str, Any]:
    """What an active adapter's tensors do not show of how they are used; empty without one."""
    if not is_adapted(model):
        return {}
    config: Any = model.peft_config[_active(model)]
    names = ("peft_type", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {name: getattr(config, name, None) for name in names}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training may change: the model's own storage, not copies; clone to keep.

    A PEFT model gives its active adapter under PEFT's file names, then what else is trainable and
    a resized embedding. Any other module gives trainable parameters and persistent buffers (running
    means and the like) by name. Tied tensors appear once.
    """
    if is_adapted(model):
        return _distinct(_active_state(model))
    return _distinct(_injected_state(model) if _is_injected(model) else _plain_state(model))


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model, all or none of them.

    Raises:
        ModelError: a tensor is missing, not the model's, of another shape, or not finite.
    """
    targets = adapter_state(model)
    own = model.state_dict()
    targets |= {name: own[name] for name in tensors if name in own and name not in targets}
    common = [name for name in targets if name in tensors]
    faults = {
        "missing": [name for name in targets if name not in tensors],
        "unknown to this model": [name for name in tensors if name not in targets],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} for {list(targets[name].shape)}"
            for name in common
            if tensors[name].shape != targets[name].shape
        ],
        "of another number format": [
            name for name in common if not _converts(tensors[name].dtype, targets[name].dtype)
        ],
    }
    if not any(faults.values()):
        faults["not finite"] = [name for name in common if not tensors[name].isfinite().all()]
    if any(faults.values()):
        raise ModelError(
            "These weights do not fit the model: "
            + "; ".join(f"{bases.some(names)} {what}" for what, names in faults.items() if names),
            why="An adapter that loads in part answers like no model that was ever trained.",
            fix="Load it over the base and with the settings that it was trained with.",
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _converts(stored: torch.dtype, wanted: torch.dtype) -> bool:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return stored == wanted or (stored in floats and wanted in floats)


def restore(model: nn.Module, folder: Path) -> None:
    """Put back what `save_adapter` wrote of `model` into `folder`: its active adapter, or all.

    Raises:
        ModelError: it is not there, is damaged, or does not fit.
    """
    home = _home(folder, _active(model)) if is_adapted(model) else folder
    if type(model).load_state_dict is not nn.Module.load_state_dict and not is_adapted(model):
        model.load_state_dict(read_adapter_state(home), strict=False)  # it knows better
        return
    load_adapter_state(model, read_adapter_state(home))


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    tokenizer: Any = None,
    contract: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write what training made into `folder`; the caller makes that atomic.

    A PEFT model: its adapters in PEFT's format and layout ("default" in `folder` itself, others in
    folders of their names), which peft, transformers and vLLM load. A transformers model:
    `save_pretrained`. Any other module: its state in `model.safetensors`.

    Args:
        tokenizer: Saved beside the weights, chat template included.
        contract: Written as `lorafit.json`.
        card: The text of the model card, `README.md`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_adapted(model):
        _save_peft(model, folder)
    elif isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
        if _is_injected(model):  # with what the user made trainable besides
            _save_tensors(adapter_state(model), folder / ADAPTER)
    else:
        _save_tensors(_distinct(model.state_dict().items()), folder / WEIGHTS)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if contract is not None:
        written = json.dumps(dict(contract), indent=2, ensure_ascii=False)
        (folder / CONTRACT).write_text(written + "\n", encoding="utf-8", errors="backslashreplace")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def read_adapter_state(folder: Path) -> dict[str, Tensor]:
    """The tensors that `save_adapter` wrote into `folder`, on the CPU, for `load_adapter_state`.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    adapter = folder / ADAPTER
    files = [adapter] if adapter.exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        held = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if any(name.endswith(bases.PICKLED) for name in held):
            raise ModelError(
                f"{folder} holds only pickled weights: {bases.some(held)}.",
                why=bases.WHY_NO_PICKLE,
                fix="Where you trust the file, convert it once with peft: "
                "PeftModel.from_pretrained(BASE, OLD).save_pretrained(NEW).",
            )
        raise ModelError(
            f"{folder} holds no {ADAPTER}; it holds {bases.some(held)}.",
            fix=_WRITTEN,
        )
    try:
        for file in files:
            guard.header(file)
        return {name: value for file in files for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: its weights cannot be read: {error}",
            fix="Fetch it again from where it came, or take another checkpoint.",
        ) from error


def read_contract(folder: Path) -> dict[str, Any]:
    """What `lorafit.json` says; empty where another tool wrote the adapter.

    Raises:
        ModelError: the file is not a JSON object, or one of its parts is not what it should be.
    """
    file = folder / CONTRACT
    if not file.exists():
        return {}
    contract = guard.read_json(file)
    odd = [name for name, kind in _KINDS.items() if not fits(contract.get(name), kind | None)]
    base = contract.get("base") or {}
    if not odd:
        odd = [f"base.{name}" for name in _TEXTS if not fits(base.get(name), str | None)]
    if odd or contract.get("shape") not in (None, "chat", "raw"):
        raise ModelError(f"{file} cannot be read: {', '.join(odd) or 'shape'} is of another kind.")
    return contract


_KINDS = {"shape": str, "chat_template": str, "stop_ids": list[int], "base": dict, "metrics": dict}
_TEXTS = ("name", "path", "fingerprint", "headers_sha256", "quantisation")


def load_tuned(
    folder: Path,
    *,
    base: str = "",
    dtype: str = "auto",
    accept: bool = False,
    trust_remote_code: str = "",
    quantize: str = "",
    home: Home = CPU_HOME,
) -> Tuned:
    """The adapter in `folder` over its base, every tensor accounted for.

    Args:
        base: Folder or Hub id of the base, where it is not the one the adapter names.
        dtype: The base's dtype; "auto" is its checkpoint's.
        quantize: nf4, int8 or none; empty: as it was trained.
        home: Where a quantised base is made.
        accept: Take another base than the adapter was trained over, if its shapes fit.
        trust_remote_code: The Hub repository whose Python code may run to load the base.

    Raises:
        ModelError: `folder` holds no LoRA adapter, or one that is not to be trusted; its base is
            not there, is another one, or the two do not fit.
        MissingPackageError: bitsandbytes, where the base is to be quantised.
    """
    _import_peft()
    if not os.path.isdir(folder):  # whatever its name: Path raises for some
        raise ModelError(
            f"{folder!s:.200} is no adapter: there is no such folder.",
            fix=_WRITTEN,
        )
    place = _found(folder)
    for entries in {folder, place}:
        guard.check_entries(entries)
    config, tensors = _read_config(place), read_adapter_state(place)
    contract = read_contract(folder)
    base = base or _base_of(config, contract)
    if not accept:
        identity.check_same(folder, recorded=contract.get("base") or {}, base=base)
    trained = (contract.get("base") or {}).get("quantisation")
    chosen = quantize or (trained if trained in ("nf4", "int8") else "none")
    wanted = ModelArguments(
        model=base,
        revision=config.revision or "",
        dtype=dtype,
        quantize="" if chosen == "none" else chosen,
        trust_remote_code=trust_remote_code,
    )
    model = _load_base(folder, wanted, home=home)
    _check_ranks(config, tensors, folder=place)
    names = [name for name, _ in model.named_modules()]
    lora_config.check_patterns(vars(config), names, file=place / ADAPTER_CONFIG)
    _resize_embedding(model, tensors)
    config.base_model_name_or_path = None  # else peft warns where the base has moved
    with torch.random.fork_rng(devices=[]):  # fresh LoRA weights are drawn, then overwritten
        tuned = _wrapped(model, config)
    try:
        load_adapter_state(tuned, tensors)
    except ModelError as error:
        raise ModelError(f"{folder}: {error.what}", why=error.why, fix=error.fix) from error
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = tokens.load_tokenizer(
        str(folder if has_tokenizer else model.name_or_path), trust_remote_code=trust_remote_code
    )
    tokenizer.chat_template = contract.get("chat_template") or tokenizer.chat_template
    return Tuned(tuned.eval(), tokenizer, contract)


def _import_peft() -> None:
    """For the first time without bitsandbytes, which it would import wherever that is installed."""
    with quantised.unseen():
        from peft import import_utils
    # or it would not find it when it is wanted
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()


def _wrapped(model: PreTrainedModel, config: "LoraConfig") -> "PeftModel":
    from peft import PeftModel, get_peft_model

    alone = nullcontext() if quantised.packed(model) else quantised.unseen()
    with warnings.catch_warnings(), alone:
        # peft 0.21 asks transformers 5.23 by a name that has aged
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        wrapped = get_peft_model(model, config)
    _import_peft()
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _names(written: str | Sequence[str] | None) -> list[str]:
    parts = written.split(",") if isinstance(written, str) else written or ()
    return [part.strip() for part in parts if part.strip()]


def _linear(model: nn.Module) -> list[str]:
    """The last parts of the names of the modules that LoRA usually goes on."""
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
    )


def _check_exist(model: nn.Module, wanted: Sequence[str]) -> None:
    # peft is content when one of several names exists, and trains less than was asked for.
    present = [f".{name}" for name, _ in model.named_modules()]
    for name in wanted:
        if not any(module.endswith(f".{name}") for module in present):
            linear = _linear(model)
            raise ModelError(
                f"{type(model).__name__} has no module {name}.{nearest(name, linear)}",
                fix=f"Its linear modules: {', '.join(linear)}; or {ALL_LINEAR} for all of them.",
            )


def _check_whole(model: PreTrainedModel, saved: Sequence[str]) -> None:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in saved and quantised.packed(module):
            raise ModelError(
                f"modules_to_save: {name} is quantised ({quantised.scheme(model)}).",
                why="Weights of 4 or 8 bits take no gradient, so they cannot be trained in full.",
                fix="Train it by LoRA (--lora-target-modules), or leave --quantize out.",
            )


def _active(model: "PeftModel") -> str:
    """The active adapter's name."""
    return str(model.active_adapter)


def _active_state(model: "PeftModel") -> Iterator[tuple[str, Tensor]]:
    yield from _peft_state(model, _active(model))
    yield from _trainable(model)


def _is_injected(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether transformers put an adapter into its own model: `model.add_adapter(config)`."""
    return isinstance(model, PreTrainedModel) and getattr(model, "_hf_peft_config_loaded", False)


def _injected_state(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.get_adapter_state_dict().items():
        yield f"base_model.model.{name}", tensor
    yield from _trainable(model)


def _peft_state(model: "PeftModel", name: str) -> Iterator[tuple[str, Tensor]]:
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config[name]
    kept = bool(config.modules_to_save)
    # Said outright, as "auto" would ask the Hub for the base's configuration.
    grown = not kept and bases.vocabulary_resized(model)
    yield from get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=grown
    ).items()


def _trainable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()


def _plain_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _trainable(model)
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _distinct(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The named tensors, tied ones under their first name only."""
    first: dict[tuple[int | str, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in named:
        first.setdefault((tensor.data_ptr() or name, tensor.shape), (name, tensor))
    return dict(first.values())


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, file, metadata={"format": "pt"})


def _home(folder: Path, name: str) -> Path:
    """Where PEFT's layout has the adapter of that name.

    Raises:
        ModelError: the name leads elsewhere than into `folder`.
    """
    if name == "default":
        return folder
    possible = "\0" not in name and len(os.fsencode(name)) <= _LONGEST
    if not possible or name in ("", "..") or Path(name).name != name:
        raise ModelError(
            f"{name:.80}: an adapter of this name cannot be saved.",
            why="An adapter lies in a folder of its name.",
            fix="Name it by one word: get_peft_model(..., adapter_name='mine').",
        )
    return folder / name


_LONGEST = 255
"""Bytes that file systems allow a name."""


def _found(folder: Path) -> Path:
    """`folder`, or the one adapter in it where it has none itself."""
    inside = sorted(file.parent for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return inside[0] if len(inside) == 1 and not (folder / ADAPTER_CONFIG).exists() else folder


def _save_peft(model: "PeftModel", folder: Path) -> None:
    # Not peft's own save_pretrained: that leaves out parameters which the user made trainable.
    for name in model.peft_config:
        state = (
            adapter_state(model) if name == _active(model) else _distinct(_peft_state(model, name))
        )
        home = _home(folder, name)
        home.mkdir(exist_ok=True)
        _save_tensors(state, home / ADAPTER)
        _save_config(model, name, folder=home)


def _save_config(model: "PeftModel", name: str, *, folder: Path) -> None:
    config = copy.copy(model.peft_config[name])
    beneath = bases.unwrap(model)
    config.inference_mode = True
    config.base_model_name_or_path = (
        config.base_model_name_or_path or getattr(beneath, "name_or_path", None) or None
    )
    classes = {
        "base_model_class": type(beneath).__name__,
        "parent_library": type(beneath).__module__,
    }
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else classes)


def _read_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise ModelError(
            f"{folder} is no adapter: it has no {ADAPTER_CONFIG}.",
            fix=_WRITTEN,
        )
    settings = lora_config.checked(guard.read_json(file), usual=vars(LoraConfig()), file=file)
    try:
        return LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def _check_ranks(config: "LoraConfig", tensors: Mapping[str, Tensor], *, folder: Path) -> None:
    """Raises ModelError where more rows are asked for than any tensor has: they would be made, at
    the cost of their memory, before a shape is found not to fit."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    asked = max(config.r, *(config.rank_pattern or {}).values(), 0)
    if asked > largest:
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} says rank {asked:,}, and no tensor in {ADAPTER} has more "
            f"than {largest:,} rows.",
            fix="Take both files from the same adapter.",
        )


def _base_of(config: "LoraConfig", contract: Mapping[str, Any]) -> str:
    """The base an adapter names; the contract's absolute path where the name leads nowhere."""
    named = config.base_model_name_or_path or ""
    for place in (named, contract.get("base", {}).get("path")):
        if place and Path(place).is_dir():
            return place
    return named


def _load_base(folder: Path, wanted: ModelArguments, *, home: Home) -> PreTrainedModel:
    try:
        return bases.load_model(wanted, home)
    except ModelError as error:
        raise ModelError(
            f"The base of the adapter {folder}, {wanted.model or 'not named'}, cannot be loaded: "
            f"{error.what}",
            why=error.why,
            fix=error.fix
            if wanted.model and "code" in error.what
            else "Say where it is: --base FOLDER_OR_ID",
        ) from error


def _resize_embedding(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give the base as many token rows as the adapter's own embedding has, if it brings one."""
    weight: Any = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is weight)
    beneath_lora = name.replace(".weight", ".base_layer.weight")
    for key in (name, beneath_lora):
        brought = tensors.get(f"base_model.model.{key}")
        if brought is not None and brought.shape[0] != weight.shape[0]:
            model.resize_token_embeddings(brought.shape[0], mean_resizing=False)
