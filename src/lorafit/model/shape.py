"""Sizes of a decoder, read from its `config.json` alone; no weight, neither torch nor transformers.

Owns what a configuration's names mean, family by family, what transformers takes where one is
missing, and where a configuration lies. Knows no device and no bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from lorafit.errors import ModelError
from lorafit.model import guard


class Matrix(NamedTuple):
    """A linear layer: its module's name, and its sizes."""

    name: str
    outputs: int
    inputs: int

    @property
    def numbers(self) -> int:
        """Of its weight."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Shape:
    """Of a decoder.

    Attributes:
        kind: `model_type`.
        queries, keys: Numbers of a token's queries and keys, all heads together; `head` of one.
        matrices: The linear layers of one layer.
        small: Numbers of one layer besides: biases and norms.
        once: Numbers that stand once: the last norm, learned positions.
        tied: Whether the head is the embedding.
        context: The most tokens it can look back on; 0: it does not say.
        dtype: That its weights were saved in.
        is_fused: Whether lorafit's kernels run layers of this family.
        is_estimated: Whether it is a family that this file does not know, taken as Llama.
    """

    kind: str
    layers: int
    hidden: int
    queries: int
    keys: int
    head: int
    feed_forward: int
    vocabulary: int
    tied: bool
    matrices: tuple[Matrix, ...]
    small: int
    once: int
    context: int = 0
    dtype: str = "float32"
    has_head_norms: bool = False
    has_window: bool = False
    is_fused: bool = True
    is_estimated: bool = False

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.queries // self.head

    @property
    def projections(self) -> int:
        """Numbers of all layers' matrices."""
        return self.layers * sum(matrix.numbers for matrix in self.matrices)

    @property
    def table(self) -> int:
        """Numbers of the embedding, and of a head of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All numbers of the base, a tied head counted once."""
        others = self.layers * self.small + self.once
        return self.projections + others + self.table * (1 if self.tied else 2)

    def adapted(self, targets: list[str], rank: int) -> tuple[int, int]:
        """Numbers of a LoRA adapter on the modules `targets` (`all-linear`: every one), and how
        many numbers of x·A it makes of a token in one layer."""
        chosen = [m for m in self.matrices if targets == ["all-linear"] or m.name in targets]
        each = sum(matrix.outputs + matrix.inputs for matrix in chosen)
        return self.layers * rank * each, rank * len(chosen)


@dataclass(frozen=True)
class _Family:
    """Where families built like Llama differ, and what transformers takes for what is not said."""

    tied: bool = False
    head: int = 0
    bias: bool = False
    has_head_norms: bool = False
    is_fused: bool = True
    widths: Mapping[str, str] = field(default_factory=dict[str, str])


_FAMILIES: Final = MappingProxyType(
    {
        "llama": _Family(),
        "mistral": _Family(),
        "qwen2": _Family(bias=True),
        "qwen3": _Family(head=128, has_head_norms=True),
        "gemma": _Family(tied=True, head=256, is_fused=False),
    }
)
_SPARSE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


def of(config: Mapping[str, Any]) -> Shape:
    """The shape that a configuration says.

    Raises:
        ModelError: it is none of a dense decoder, or lacks a size; by name.
    """
    inner = config.get("text_config")
    told = {**config, **inner} if isinstance(inner, Mapping) else config
    kind = str(told.get("model_type", "a model"))
    odd = [name for name in (*_SPARSE, "is_encoder_decoder") if told.get(name)]
    if odd:
        raise ModelError(
            f"The memory of a {kind} is not known: {odd[0]}={told[odd[0]]!r:.40}.",
            why="The plan is of decoders whose layers all run for every token.",
            fix="Give a Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma or GPT-2.",
        )
    if kind == "gpt2":
        return _gpt2(told)
    return _like_llama(told, kind)


def _like_llama(told: Mapping[str, Any], kind: str) -> Shape:
    family = _FAMILIES.get(kind, _Family(is_fused=False))
    hidden, heads = _size(told, "hidden_size"), _size(told, "num_attention_heads")
    head = _size(told, "head_dim", otherwise=family.head or hidden // heads)
    queries = heads * head
    keys = _size(told, "num_key_value_heads", otherwise=heads) * head
    wide = _size(told, "intermediate_size", otherwise=4 * hidden)
    biased = queries + 2 * keys if family.bias else 0
    if told.get("attention_bias") and not family.bias:
        biased = queries + 2 * keys + hidden
    biased += 2 * wide + hidden if told.get("mlp_bias") else 0
    slides = told.get("use_sliding_window", kind == "mistral")
    return Shape(
        kind=kind,
        layers=_size(told, "num_hidden_layers"),
        hidden=hidden,
        queries=queries,
        keys=keys,
        head=head,
        feed_forward=wide,
        vocabulary=_size(told, "vocab_size"),
        tied=bool(told.get("tie_word_embeddings", family.tied)),
        matrices=(
            Matrix("q_proj", queries, hidden),
            Matrix("k_proj", keys, hidden),
            Matrix("v_proj", keys, hidden),
            Matrix("o_proj", hidden, queries),
            Matrix("gate_proj", wide, hidden),
            Matrix("up_proj", wide, hidden),
            Matrix("down_proj", hidden, wide),
        ),
        small=biased + 2 * hidden + (2 * head if family.has_head_norms else 0),
        once=hidden,
        context=_size(told, "max_position_embeddings", otherwise=0),
        dtype=_dtype(told),
        has_head_norms=family.has_head_norms,
        has_window=bool(slides and told.get("sliding_window")),
        is_fused=family.is_fused,
        is_estimated=kind not in _FAMILIES,
    )


def _gpt2(told: Mapping[str, Any]) -> Shape:
    hidden, heads = _size(told, "n_embd", otherwise=768), _size(told, "n_head", otherwise=12)
    wide = _size(told, "n_inner", otherwise=4 * hidden)
    context = _size(told, "n_positions", otherwise=1024)
    return Shape(
        kind="gpt2",
        layers=_size(told, "n_layer", otherwise=12),
        hidden=hidden,
        queries=hidden,
        keys=hidden,
        head=hidden // heads,
        feed_forward=wide,
        vocabulary=_size(told, "vocab_size", otherwise=50257),
        tied=bool(told.get("tie_word_embeddings", True)),
        matrices=(
            Matrix("c_attn", 3 * hidden, hidden),
            Matrix("c_proj", hidden, hidden),
            Matrix("c_fc", wide, hidden),
            Matrix("c_proj", hidden, wide),
        ),
        small=3 * hidden + hidden + wide + hidden + 4 * hidden,
        once=2 * hidden + context * hidden,
        context=context,
        dtype=_dtype(told),
        is_fused=False,
    )


def _size(told: Mapping[str, Any], name: str, *, otherwise: int | None = None) -> int:
    value = told.get(name)
    value = otherwise if value is None else value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40:
        return value
    raise ModelError(
        f"The configuration of a {told.get('model_type', 'model')} has {name}={value!r:.40}.",
        why="Without its sizes nobody can say what it needs.",
        fix="Give a Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma or GPT-2.",
    )


def _dtype(told: Mapping[str, Any]) -> str:
    """`torch_dtype` in files of transformers before 5; where neither stands, as torch saves."""
    return str(told.get("dtype") or told.get("torch_dtype") or "float32").removeprefix("torch.")


def read(name: str, *, revision: str = "") -> dict[str, Any]:
    """The configuration of a folder or Hub id: the file in the Hub's cache, or else that one file,
    fetched.

    Raises:
        ModelError: there is none.
    """
    folder = guard.folder_of(name)
    if folder is None:
        return guard.read_settings(_from_hub(name, revision or "main"))
    file = folder / "config.json"
    if not file.exists():
        raise ModelError(
            f"{folder} is not a model: it has no config.json.",
            fix="Give the folder that holds config.json; weights are not needed to plan.",
        )
    return guard.read_settings(file)


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:  # the Hub's errors and those of the network have no common root
        raise ModelError(
            f"{name} is no folder here, and its config.json could not be had from the Hub."
            f"{guard.nearest_folder(Path(name))}",
            why=str(error).strip().split("\n")[0],
            fix=f"Download it first (hf download {name} config.json), or give a folder.",
        ) from error
