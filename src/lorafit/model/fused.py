"""Decoders shaped like Llama, run by our kernels: which models can be, the swap, the proof.

A model is chosen by its structure (Llama, SmolLM2, Mistral, Qwen2, Qwen3 and what is built like
them) and proven before it is used: `prove` in model/documents.py holds its logits against the
module's own forward. The modules stay the truth: weights, names and files are theirs, and PEFT's A
and B are read anew each time. Knows no loss and no data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorafit.kernels.attention import Documents, Look
from lorafit.kernels.attention_half import Around, AttentionHalf, attention_half
from lorafit.kernels.lora import Adapter, Counters, Layers
from lorafit.kernels.mlp_half import MlpHalf, mlp_half
from lorafit.kernels.products import spare
from lorafit.kernels.rooms import Room, Rooms
from lorafit.model.base import decoder_of, is_hooked
from lorafit.model.lora import LoraLinear, lora_linear, salt_of, sign_of
from lorafit.model.mapped import into_memory
from lorafit.model.quantised import together

RECOMPUTE = ("none", "mlp", "half", "layer")
"""What backward makes again: nothing but norms and products of elements; gate and up; q, k and v
besides; the whole layer but its input."""

_KNOWN = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Read line by line. Others of the same structure are proven in float32, where nothing hides."""

_HALVES = (torch.bfloat16, torch.float16)
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding that do not change with the longest position of a batch."""


@dataclass(frozen=True)
class _Layer:
    """A layer's frozen halves, and where its adapters' matrices are."""

    attention: AttentionHalf
    mlp: MlpHalf
    projections: tuple[LoraLinear, ...]

    def factors(self) -> list[Tensor | None]:
        """A and B of q, k, v, o, gate, up and down as they are now."""
        return [factor for projection in self.projections for factor in projection.factors]


class Decoder:
    """A decoder whose layers our kernels run.

    Args:
        model: The causal language model, adapter and all.
        dtype: Of the matrix products.
        recompute: One of `RECOMPUTE`.

    Raises:
        Unfit: its structure is not one that is known; the message is for people.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, recompute: str = "none") -> None:
        self.decoder: Any = decoder_of(model)
        self.dtype, self.recompute = dtype, recompute
        if dtype in _HALVES and type(self.decoder).__name__ not in _KNOWN:
            raise Unfit(f"rounding to 16 bits could hide how {type(self.decoder).__name__} differs")
        _check(model, self.decoder)
        self._layers: list[_Layer] = []
        self._seen: list[Any] = []
        self._changes = 0
        self._rooms = Rooms(len(self.decoder.layers))
        self.refresh()
        weight = self.decoder.embed_tokens.weight
        if weight.device.type == "cpu" and weight.dtype == dtype:
            into_memory(model)
            self.refresh()

    def __call__(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        rows_N: Tensor,
        counters: Counters | None,
    ) -> Tensor:
        """The normed hidden states of some tokens, [N, D] in the residual stream's dtype.

        Args:
            rows_N: Which tokens.
            counters: Of LoRA's dropout, where it is wanted.
        """
        x_TD = self.run(ids_T, positions_T, documents=documents, counters=counters)
        return self.normed(x_TD, rows_N)

    def normed(self, x_TD: Tensor, rows_N: Tensor) -> Tensor:
        """The last norm, of the tokens `rows_N` of what `run` gave."""
        return self.decoder.norm(x_TD[rows_N])

    def run(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        *,
        documents: Documents,
        counters: Counters | None,
    ) -> Tensor:
        """What the layers make of the tokens, [T, D]; on a CPU there may be rows of no token beyond
        them, as another document (`spare`)."""
        self.refresh()
        if fill := spare(ids_T, self.dtype):
            ids_T, positions_T = (functional.pad(x, (0, fill)) for x in (ids_T, positions_T))
            documents = Documents((*documents.lengths, fill))
            counters = counters and counters.filled(fill)
        x_TD = self.decoder.embed_tokens(ids_T[None])[0]
        # asked for float32, as the angles of a bfloat16 model are rounded nowhere else
        exact = x_TD.new_empty(0, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        cosine, sine = self.decoder.rotary_emb(exact, positions_T[None])
        rotary = cosine[0].contiguous(), sine[0].contiguous()
        self._rooms.begin(len(x_TD), keeps=torch.is_grad_enabled())
        for number, layer in enumerate(self._layers):
            factors, room = layer.factors(), self._room(number, x_TD.device)
            around = Around(documents, rotary, counters, self.dtype, room)
            if self.recompute == "layer" and torch.is_grad_enabled():
                run = partial(self._run, layer, around)
                x_TD = checkpoint(
                    run, x_TD, *factors, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD = self._run(layer, around, x_TD, *factors)
        return x_TD

    def _room(self, number: int, device: torch.device) -> Room | None:
        """Where a layer writes, on a CPU: to its own places what a backward needs of it."""
        if device.type != "cpu":
            return None
        own = number if torch.is_grad_enabled() else -1
        keeps = -1 if self.recompute == "layer" else own
        return Room(self._rooms, own, keeps, self._rooms.turn)

    def keep_less(self) -> str:
        """Make the next more of `RECOMPUTE` again from now on; its name, empty after the last."""
        further = RECOMPUTE[RECOMPUTE.index(self.recompute) + 1 :]
        self.recompute = further[0] if further else self.recompute
        return further[0] if further else ""

    def forget(self) -> None:
        """Hand back what is held between micro-batches."""
        self._rooms.clear()

    def factors(self) -> list[Tensor]:
        """Every A and B that the layers read, in their order."""
        return [f for layer in self._layers for f in layer.factors() if f is not None]

    def _run(self, layer: _Layer, around: Around, *given: Any) -> Tensor:
        x_TD, factors = given[0], given[1:]
        x_TD = attention_half(
            x_TD, layer.attention, around=around, factors=factors[:8],
            keeps=self.recompute != "half",
        )  # fmt: skip
        return mlp_half(
            x_TD, layer.mlp, counters=around.counters, dtype=around.dtype, factors=factors[8:],
            keeps=self.recompute not in ("mlp", "half"), room=around.room,
        )  # fmt: skip

    def refresh(self) -> int:
        """Take up what somebody has changed since it was looked at: weights, which adapter is
        active or merged, its scale and dropout. How many times there was something.

        Raises:
            Unfit: the kernels cannot run what the model has become.
        """
        layers = self.decoder.layers
        if self._seen == [sign for layer in layers for sign in _signs(layer)]:
            return self._changes
        self._changes += 1
        self._layers = [_taken(layer, at, dtype=self.dtype) for at, layer in enumerate(layers)]
        self._seen = [sign for layer in layers for sign in _signs(layer)]  # now side by side
        return self._changes


class Unfit(Exception):
    """A model that these kernels cannot run; the message says why."""


def _check(model: nn.Module, decoder: Any) -> None:
    """Raises Unfit unless every part of `decoder` is one that the kernels know."""
    if _children(decoder) != _DECODER:
        raise Unfit(f"{type(decoder).__name__} is not built like Llama")
    if getattr(decoder.rotary_emb, "rope_type", "default") not in _FIXED_ROTARY:
        raise Unfit(f"its rotary embedding is {decoder.rotary_emb.rope_type}")
    if any(is_hooked(module) for module in model.modules()):
        raise Unfit("a module has hooks")
    for name in ("embed_tokens", "norm"):
        if any(p.requires_grad for p in decoder.get_submodule(name).parameters()):
            raise Unfit(f"{name} is trained")
    for layer in decoder.layers:
        _check_layer(layer)


def _check_layer(layer: Any) -> None:
    attention = _children(layer.self_attn) - {"q_norm", "k_norm"}
    if (_children(layer), attention, _children(layer.mlp)) != (_LAYER, _ATTENTION, _MLP):
        raise Unfit(f"{type(layer).__name__} is not built like Llama's")
    if "SiLU" not in type(layer.mlp.act_fn).__name__:
        raise Unfit(f"{type(layer.mlp).__name__} is not SwiGLU")
    if not (hasattr(layer.self_attn, "scaling") and hasattr(layer.self_attn, "head_dim")):
        raise Unfit(f"{type(layer.self_attn).__name__} does not say how it scales")
    for norm in _norms(layer):
        if not hasattr(norm, "variance_epsilon") or norm.weight.requires_grad:
            raise Unfit(f"{type(norm).__name__} is not a frozen RMSNorm as Llama's")
    for module in _modules(layer):
        if lora_linear(module) is None:
            raise Unfit(f"a {type(module).__name__} is not plain LoRA over a frozen layer")


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _modules(layer: Any) -> Iterator[nn.Module]:
    return (layer.get_submodule(name) for name in _PROJECTIONS)


def _norms(layer: Any) -> Iterator[nn.Module]:
    yield from (layer.input_layernorm, layer.post_attention_layernorm)
    yield from (n for name, n in layer.self_attn.named_children() if name in ("q_norm", "k_norm"))


def _signs(layer: Any) -> Iterator[Any]:
    """What changes when something that `_taken` reads does."""
    for part in vars(layer)["_modules"].values():
        for module in vars(part)["_modules"].values() or (part,):
            yield sign_of(module)


def _projection(module: nn.Module) -> LoraLinear:
    found = lora_linear(module)
    if found is None or is_hooked(module):
        raise Unfit(f"a {type(module).__name__} is not plain LoRA over a frozen layer any more")
    return found


def _taken(layer: Any, number: int, *, dtype: torch.dtype) -> _Layer:
    attention = layer.self_attn
    parts = tuple(map(_projection, _modules(layer)))
    salts = [salt_of(f"layers.{number}.{name}") for name in _PROJECTIONS]
    width = attention.head_dim
    norms = [norm.weight.detach() for norm in _norms(layer)]  # type: ignore[operator]
    side = partial(_side_by_side, dtype=dtype)
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window"):
        window = getattr(attention.config, "sliding_window", None)
    return _Layer(
        AttentionHalf(
            norm_D=norms[0],
            eps=layer.input_layernorm.variance_epsilon,
            qkv=side(parts[:3], salts[:3]),
            out=side(parts[3:4], salts[3:4]),
            heads=parts[0].linear.out_features // width,
            groups=parts[1].linear.out_features // width,
            look=Look(attention.scaling, window or 0),
            head_norms=(norms[2], norms[3]) if len(norms) > 2 else None,
        ),
        MlpHalf(
            norm_D=norms[1],
            eps=layer.post_attention_layernorm.variance_epsilon,
            gate_up=side(parts[4:6], salts[4:6]),
            down=side(parts[6:], salts[6:]),
        ),
        parts,
    )


def _side_by_side(
    parts: Sequence[LoraLinear], salts: Sequence[int], *, dtype: torch.dtype
) -> Layers:
    """The layers as one. In the dtype of the product the modules' weights become views of the joint
    one, so that nothing is held twice; in another they are left alone and a copy is held. Quantised
    ones are left alone too, and made whole for each product."""
    linears = [part.linear for part in parts]
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    joint = (
        torch.cat([b.detach().to(dtype) for b in biases]) if len(biases) == len(linears) else None
    )
    if biases and joint is None:
        raise Unfit("some of the layers that read the same rows have a bias, others none")
    adapters = (
        None if part.down is None else Adapter(part.scale, part.share, salt)
        for part, salt in zip(parts, salts, strict=True)
    )
    return Layers(
        together(linears, dtype) or _joint(weights, dtype=dtype),
        torch.cat([bias.detach() for bias in biases]).to(dtype) if biases else None,
        tuple(linear.out_features for linear in linears),
        tuple(adapters),
    )


def _joint(weights: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
    rows = [weight.detach() for weight in weights]
    begin, width = rows[0], rows[0].shape[1]
    if begin.dtype == dtype and len(rows) == 1:
        return begin
    ends = [row.data_ptr() + row.nbytes for row in rows]
    adjacent = all(end == row.data_ptr() for end, row in zip(ends, rows[1:], strict=False))
    if begin.dtype == dtype and adjacent and len({_home(row) for row in rows}) == 1:
        return begin.as_strided((sum(map(len, rows)), width), (width, 1))  # joined before
    joint_OD = torch.cat([row.to(dtype) for row in rows])
    if begin.dtype == dtype:
        for weight, part in zip(weights, joint_OD.split([len(row) for row in rows]), strict=True):
            weight.data = part
    return joint_OD


def _home(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
