"""Base models and tokenizers: the door to transformers (`compat` and `run.callbacks` aside).

Owns loading and its refusals, and how its forward takes columns, labels and loss. Of adapters it
knows only that `unwrap` looks beneath one.
"""

import inspect
import json
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils.generic import find_labels
from transformers.utils.hub import cached_file

from lorafit.arguments import ModelArguments, TrainingArguments
from lorafit.errors import ConfigError, ModelError
from lorafit.kernels.attention import Documents, Look, attend
from lorafit.kernels.cross_entropy import IGNORE, summed_nats, supervised_tokens
from lorafit.model import guard, quantised, shape
from lorafit.model.shape import Shape
from lorafit.model.tokens import explained, folder_of, quiet, runs_code

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WHY_NO_PICKLE = (
    "Opening a pickle can run code that its author put there (CVE-2025-32434), so lorafit reads "
    "safetensors only."
)


def check_base(name: str) -> None:
    """Nothing, if `name` may be a whole causal language model: a folder is looked into, a Hub id
    is taken at its word.

    Raises:
        ModelError: as `load_model`.
    """
    folder = folder_of(name)
    if folder:
        _check_folder(folder)


@dataclass(frozen=True)
class Home:
    """Where a quantised base is made (any other is loaded on the CPU and placed later), and the
    dtype of the products in its own forward."""

    device: torch.device
    products: torch.dtype = torch.float32


CPU_HOME = Home(torch.device("cpu"))


def check_quantised(arguments: ModelArguments, home: Home) -> None:
    """Nothing, if the base can be quantised as asked, where it is to be.

    Raises:
        ConfigError: it cannot, or to no use. MissingPackageError: bitsandbytes is not here.
    """
    asked, kind = arguments.quantize, home.device.type
    if asked and kind not in ("cpu", "cuda"):
        raise ConfigError(
            f"quantize={asked!r} on {kind}: bitsandbytes quantises for CUDA and CPUs.",
            fix="Leave --quantize out, or train on the CPU: --use-cpu.",
        )
    if asked and kind == "cpu" and arguments.dtype == "float16":
        raise ConfigError(
            f"quantize={asked!r} with dtype='float16' on a CPU.",
            why="What is not quantised (norms, embedding, head) would be multiplied in emulated "
            "float16, slowly and in its narrow range.",
            fix="Write --dtype bfloat16 for as few bytes, or leave --dtype out.",
        )
    if asked:
        quantised.package(f"quantize={asked!r}", instead="leave --quantize out")


def load_model(arguments: ModelArguments, home: Home = CPU_HOME) -> PreTrainedModel:
    """The base on the CPU, in the dtype asked for ("auto": the checkpoint's), in eval mode; one
    that is quantised, by `quantize` or in its files already, on its `home`.

    Only safetensors are read. nf4: QLoRA's, blocks of 64 and double quantisation; int8: LLM.int8's
    with its usual threshold of 6. Linear layers are quantised, the head is not.

    Raises:
        ConfigError, MissingPackageError: as `check_quantised`.
        ModelError: the folder or Hub id is no whole causal language model; said before any
            weight is read where that can be known.
    """
    check_quantised(arguments, home)
    folder = folder_of(arguments.model)
    if folder:
        _check_folder(folder)
    name = str(folder or arguments.model)
    options: dict[str, Any] = {
        "revision": arguments.revision or "main",
        "trust_remote_code": runs_code(
            arguments.model, revision=arguments.revision, repository=arguments.trust_remote_code
        ),
    }
    with quiet(), explained(name, "model"):
        config = AutoConfig.from_pretrained(name, **options)
        _check_causal(config, name)
        _check_depth(config, name)
        if arguments.attn_implementation:
            options["attn_implementation"] = arguments.attn_implementation
        options |= _quantisation(config, arguments.quantize, name=name, home=home)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=arguments.dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    # transformers would fill these with random numbers and only warn.
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"The weights in {name} lack {some(lacking)}.",
            why="They would be random numbers, and training would build on noise.",
            fix="Give a whole causal language model.",
        )
    quantised.settle(model)
    return model


def _quantisation(config: Any, asked: str, *, name: str, home: Home) -> dict[str, Any]:
    """How transformers is told of it; nothing where there is none to be.

    Raises:
        ModelError: the files are quantised otherwise than `asked`.
    """
    there = getattr(config, "quantization_config", None) or {}
    ours = {"nf4": bool(there.get("load_in_4bit")), "int8": bool(there.get("load_in_8bit"))}
    if there and asked and not ours[asked]:
        raise ModelError(
            f"{name} is quantised in its files, and not as quantize={asked!r} asks for: "
            f"{quantised.scheme_of(there)}.",
            why="What quantising has rounded away cannot be had back.",
            fix="Leave --quantize out, or give the base that it was made from.",
        )
    if there and any(ours.values()):
        quantised.package(
            f"{name}, quantised in its files,", instead="give the base that it was made from"
        )
    if not (asked or there):
        return {}
    placed: dict[str, Any] = {"device_map": {"": home.device}}
    if there:
        return placed
    four_bits = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": home.products,
    }
    made: dict[str, Any] = (
        {"load_in_8bit": True} if asked == "int8" else {"load_in_4bit": True, **four_bits}
    )
    return placed | {"quantization_config": BitsAndBytesConfig(**made)}


def unwrap(model: nn.Module) -> Any:
    """The module beneath a PEFT wrapper, or `model` itself."""
    beneath = getattr(model, "get_base_model", None)
    return beneath() if beneath else model


def decoder_of(model: nn.Module) -> Any:
    """What turns ids into hidden states, beneath the head; None where the model does not say."""
    base = unwrap(model)
    return base.get_decoder() if isinstance(base, PreTrainedModel) else None


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps those who look at it."""


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at the module's forward or backward, or has replaced it; the hook by
    which transformers lets embeddings require a gradient does not count."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    odd = [h for h in hooks if getattr(h, "__name__", "") != "make_inputs_require_grads"]
    return bool(odd) or "forward" in vars(module)


def is_watched(model: nn.Module) -> bool:
    """Whether any of its modules `is_hooked`."""
    return any(is_hooked(module) for module in model.modules())


def recomputes(model: nn.Module) -> bool:
    """Whether somebody has told the model to make its activations again in backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def rotary_follows_batch(model: nn.Module) -> bool:
    """Whether positions are rotated by what the longest one in a batch is, not by themselves."""
    kinds = {getattr(module, "rope_type", None) for module in model.modules()}
    return not kinds.isdisjoint(("dynamic", "longrope"))


def is_plain_causal(model: nn.Module) -> bool:
    """Whether the loss is nothing but causal cross entropy, so that nats can be summed from logits.

    Declared by the model (transformers' `ForCausalLMLoss`, no encoder, no router's balance loss)
    and then proved by `causal_loss_matches`, where the model lies.
    """
    base = unwrap(model)
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return False
    home = next(kind for kind in type(base).__mro__ if "forward" in vars(kind))
    if not home.__module__.startswith("transformers.") or "forward" in vars(base):
        return False  # a forward that somebody wrote or changed may make any loss of its own
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return False
    with quiet():  # transformers warns of classes that its table lacks, such as GPT-2's
        declared = base.loss_function is ForCausalLMLoss
    return declared and causal_loss_matches(model, base.device)


def declares_causal_loss(model: nn.Module) -> bool:
    """Whether token t is predicted from t - 1, so that a row's first label is never a target.

    Declared in transformers' table of losses; where that lacks the class (GPT-2), proved.
    """
    base = unwrap(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return False
    declared = LOSS_MAPPING.get(getattr(base, "loss_type", None) or "") is ForCausalLMLoss
    return declared or is_plain_causal(model)


def has_several_labels(model: nn.Module) -> bool:
    """Whether a row may belong to several classes, so that its labels cannot be smoothed."""
    config = getattr(unwrap(model), "config", None)
    return getattr(config, "problem_type", None) == "multi_label_classification"


def accepts_count(model: nn.Module) -> bool:
    """Whether the forward divides its loss by a `num_items_in_batch` that it is given: the rule of
    transformers' Trainer."""
    base = unwrap(model)
    parameters = inspect.signature(base.forward).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return bool(getattr(base, "accepts_loss_kwargs", takes_any))


@torch.no_grad()
def causal_loss_matches(model: nn.Module, device: torch.device) -> bool:
    """Whether the model's own loss is the mean nats of its logits, to 1e-4 relative.

    One forward of two short rows of seeded ids with unequal supervision, in eval mode; modes and
    random state are put back. A forward that fails on plain ids, mask and labels is no match.
    """
    try:
        vocabulary = unwrap(model).get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
        ids, labels = ids.to(device), ids.to(device, copy=True)
        labels[1, :8] = IGNORE
        quantised.settle(model)
        with undisturbed(model):
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        ours = summed_nats(out["logits"], labels) / supervised_tokens(labels, shifted=True)
        return math.isclose(float(out["loss"]), float(ours), rel_tol=1e-4)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Eval mode inside; every module's mode and the random state are put back."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with modes_kept(model), torch.random.fork_rng(devices=list(devices)):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Generator[None]:
    """Each module's own mode, training or not, is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def context_length(model: nn.Module) -> int | None:
    """The most tokens the model can look back on; None where it does not say."""
    config = unwrap(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The ids at which the model's generation stops, else the tokenizer's end of text."""
    config = getattr(unwrap(model), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = getattr(tokenizer, "eos_token_id", None) if named is None else named
    return list(named) if isinstance(named, Sequence) else [] if named is None else [named]


@torch.no_grad()
def logits_of(model: nn.Module, ids_T: Tensor) -> Tensor:
    """What `model` makes of one row without padding, dropout off: [T, V], float32, on the CPU."""
    inputs_BT = ids_T[None].to(unwrap(model).get_input_embeddings().weight.device)
    with undisturbed(model):
        made = model(input_ids=inputs_BT, attention_mask=torch.ones_like(inputs_BT))
    return made["logits"][0].float().cpu()


def weights_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the base was loaded in."""
    return unwrap(model).get_input_embeddings().weight.dtype


def source_of(model: nn.Module) -> tuple[str, str]:
    """The folder or Hub id that the base came from, and its commit there; empty where unknown."""
    base = unwrap(model)
    commit = getattr(base.config, "_commit_hash", None)
    return str(getattr(base, "name_or_path", "")), str(commit or "")


def shape_of(model: nn.Module) -> Shape:
    """The sizes that its configuration says.

    Raises:
        ModelError: they are not those of a dense decoder.
    """
    return shape.of(unwrap(model).config.get_text_config().to_dict())


def label_names(model: nn.Module, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The names of the columns that hold labels: `given`, else found as transformers finds them."""
    return tuple(find_labels(type(unwrap(model))) if given is None else given)


def forward_names(model: nn.Module, labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """The columns that `remove_unused_columns` keeps, as transformers' Trainer chooses them: the
    arguments of the forward beneath any adapter, `label`, `label_ids` and the label names."""
    forward = inspect.signature(unwrap(model).forward).parameters
    return tuple(dict.fromkeys([*forward, "label", "label_ids", *label_names(model, labels)]))


def main_input(model: nn.Module) -> str:
    """The input that `include_for_metrics` means by "inputs"."""
    return getattr(unwrap(model), "main_input_name", "input_ids")


def outputs_ignored(model: nn.Module) -> list[str]:
    """The outputs that are no predictions: the configuration's `keys_to_ignore_at_inference`."""
    config = getattr(unwrap(model), "config", None)
    return list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"]))


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`; one that transformers dispatched or quantised stays where it is."""
    base = unwrap(model)
    fixed = getattr(base, "hf_device_map", None) or getattr(base, "is_quantized", False)
    return model if fixed else model.to(device)


def prepared(model: nn.Module, arguments: TrainingArguments) -> nn.Module:
    """`model` as training runs it: recomputing activations where the arguments ask for it."""
    if arguments.gradient_checkpointing:
        settings = arguments.gradient_checkpointing_kwargs
        enable_recompute(model, settings if isinstance(settings, dict) else None)
    return model


def enable_recompute(model: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
    """Keep no activations inside layers; compute them again in backward. Call after `attach`.

    Args:
        settings: `every_n_layers` and `offload` as in transformers 5.23; the rest goes to
            `torch.utils.checkpoint`. Non-reentrant unless `use_reentrant` is set.

    Raises:
        ModelError: the model has no layers that can be recomputed.
    """
    base = unwrap(model)
    options = {"use_reentrant": False} | dict(settings or {})
    extra = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
    # Renamed in transformers 5.23; the old name warns there.
    enable = getattr(base, "activation_checkpointing_enable", None)
    enable = enable or getattr(base, "gradient_checkpointing_enable", None)
    try:
        if enable is None:
            raise ValueError("it has no such method")
        enable(options, **extra)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{type(base).__name__} cannot recompute activations: {error}.",
            fix="Leave out gradient_checkpointing.",
        ) from error
    # transformers makes the embedding's output require a gradient, which only reentrant
    # checkpoints need; without it the first layer computes no gradient of its input.
    if not options["use_reentrant"] and isinstance(base, PreTrainedModel):
        base.disable_input_require_grads()


def recompute_more(model: nn.Module) -> str:
    """Let the model's layers keep nothing from now on, if they can; "layer", or empty if they
    cannot or do so already."""
    if recomputes(model):
        return ""
    with suppress(ModelError):
        enable_recompute(model)
    return "layer" if recomputes(model) else ""


@contextmanager
def without_cache(model: nn.Module) -> Generator[None]:
    """No key/value cache inside: training has no use for one, and recomputing forbids it."""
    config: Any = getattr(unwrap(model), "config", None)
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


@contextmanager
def attending_by_documents(base: Any, documents: Documents) -> Generator[None]:
    """Inside, `base`'s attention is `kernels.attention`'s over these documents; it is to be given
    one row of tokens without a mask. By transformers' attention interface."""

    def attention(module: Any, *given: Any, **how: Any) -> tuple[Tensor, None]:
        query, key, value, _ = given  # no mask is made for an interface it does not know
        if (
            how.get("softcap")
            or how.get("s_aux") is not None
            or not getattr(module, "is_causal", 1)
        ):
            raise ValueError("attention with soft-capping, sinks or without causality")
        look = Look(how.get("scaling") or query.shape[-1] ** -0.5, how.get("sliding_window") or 0)
        kind = query.device.type
        cast = torch.is_autocast_enabled(kind)  # which would cast torch's own attention
        dtype = torch.get_autocast_dtype(kind) if cast else value.dtype
        q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
        return attend((q, k, v), documents=documents, look=look)[None], None

    config = base.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_BY_DOCUMENTS, attention)
    config._attn_implementation = _BY_DOCUMENTS
    try:
        yield
    finally:
        config._attn_implementation = before


_BY_DOCUMENTS = "lorafit_documents"
MOST_LAYERS = 1_000
"""Eight times those of the deepest model that is known."""


def files_here(name: str, revision: str | None = None) -> Path | None:
    """The folder here that holds the base of that name, or of that Hub id; no network."""
    with suppress(OSError, ValueError):  # a folder that is gone, or no name at all
        file = cached_file(name, "config.json", revision=revision, local_files_only=True)
        return Path(file).parent if file else None
    return None


def vocabulary_resized(model: nn.Module) -> bool:
    """Whether the embedding has other rows than the files that the base came from; no network."""
    base = unwrap(model)
    folder = files_here(getattr(base, "name_or_path", ""))
    if not folder:
        return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return rows is not None and base.get_input_embeddings().weight.shape[0] != rows


def some(names: Sequence[str], most: int = 6) -> str:
    """The first few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _check_folder(folder: Path) -> None:
    """Raises ModelError unless `folder` looks like a whole base with safetensors."""
    guard.check_entries(folder)
    names = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith(PICKLED)]
    if "adapter_config.json" in names:
        config = guard.read_json(folder / "adapter_config.json")
        over = config.get("base_model_name_or_path") or "another model"
        raise ModelError(
            f"{folder} is a LoRA adapter over {over}, not a base model.",
            fix=f"Use it with --adapter {folder}, or give its base: --model {over}",
        )
    if "config.json" not in names:
        raise ModelError(
            f"{folder} is not a model: it has no config.json. It holds {some(names)}.",
            fix="Give the folder that holds config.json and *.safetensors.",
        )
    if not weights and pickled:
        raise ModelError(
            f"{folder} holds only pickled weights: {some(pickled)}.",
            why=WHY_NO_PICKLE,
            fix="Where you trust the file, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW).",
        )
    if (folder / INDEX).exists():
        placed = guard.read_json(folder / INDEX).get("weight_map")
        lacking = sorted(
            set(map(str, placed.values() if isinstance(placed, dict) else ())) - set(weights)
        )
    else:
        lacking = [] if weights else ["*.safetensors"]
    if lacking:
        raise ModelError(
            f"{folder} has no weights: {some(lacking)} not found among {some(names)}.",
            fix="Download the model again; its weights did not arrive whole.",
        )


def _check_depth(config: Any, name: str) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(
            f"{name}: its configuration asks for {layers:,} layers.",
            why="All of them would be made, for hours, before any is found to have no weights.",
            fix="Fetch config.json again from where the model came.",
        )


def _check_causal(config: Any, name: str) -> None:
    written = set(getattr(config, "architectures", None) or ())
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        not written or written & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or (known and not getattr(config, "is_encoder_decoder", False)):
        return
    kind = " ".join(sorted(written)) or config.model_type
    raise ModelError(
        f"{name} is a {kind}, not a causal language model.",
        why="lorafit trains models that predict the next token.",
        fix="Give a model whose config.json names a ...ForCausalLM architecture.",
    )
