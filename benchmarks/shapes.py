"""The models that are measured: shapes with random weights, and what a token of each must cost.

Random weights serve: speed and equality do not ask what the weights have learned, only the loss
starts near the logarithm of the vocabulary. Owns sizes and arithmetic; runs nothing on its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama or Qwen3 kind; sizes as in its published configuration."""

    name: str
    family: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    rope_theta: float
    tied: bool = True

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each projection of a layer, by its name."""
        d, f = self.hidden, self.feed_forward
        q, k = self.heads * self.head, self.kv_heads * self.head
        sizes = ((q, d), (k, d), (k, d), (d, q), (f, d), (f, d), (d, f))
        return dict(zip(MODULES, sizes, strict=True))

    def flops_per_token(self, *, mean_context: float, supervised: float) -> float:
        """Useful floating point operations of a token, forward and backward.

        Args:
            mean_context: sum(length^2) / sum(length) of the examples: what causal attention sees.
            supervised: Share of the tokens that carry loss; the head is needed for no others.

        Frozen forward and dX, no dX for the first layer's q, k and v (the embedding is frozen),
        the adapter's forward, dX, dA and dB, causal attention, the frozen head's forward and dX.
        Neither padding nor recomputation counts.
        """
        sizes = self.matrices()
        block = self.layers * sum(rows * columns for rows, columns in sizes.values())
        adapter = self.layers * RANK * sum(rows + columns for rows, columns in sizes.values())
        unneeded = sum(rows * columns for rows, columns in list(sizes.values())[:3])
        attention = 7 * self.heads * self.head * mean_context * self.layers
        head = 4 * self.vocabulary * self.hidden * supervised
        return 4 * block - 2 * unneeded + 6 * adapter + attention + head

    def weight_bytes(self, dtype: str) -> int:
        """Of the base alone: projections, embeddings, head; norms are too small to count."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        block = sum(rows * columns for rows, columns in self.matrices().values())
        return (self.layers * block + tables) * {"bf16": 2, "fp32": 4}[dtype]

    def configuration(self) -> dict[str, object]:
        """The fields that transformers' configuration takes."""
        rope: dict[str, object] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.name.startswith("llama3"):
            rope |= {
                "rope_type": "llama3", "factor": 32.0 if self.tied else 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            }  # fmt: skip
        return {
            "hidden_size": self.hidden, "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head,
            "vocab_size": self.vocabulary, "tie_word_embeddings": self.tied,
            "rope_parameters": rope, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        }  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 2, 64, 160, 4, 2, 16, 512, 1e4),
        Shape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, 1e5),
        Shape("smollm2-360m", "llama", 32, 960, 2560, 15, 5, 64, 49152, 1e5),
        Shape("qwen3-0.6b", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 1e6),
        Shape("llama3.2-1b", "llama", 16, 2048, 8192, 32, 8, 64, 128256, 5e5),
        Shape("qwen3-1.7b", "qwen3", 28, 2048, 6144, 16, 8, 128, 151936, 1e6),
        Shape("llama3.1-8b", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 5e5, tied=False),
    )
}


def folder(shape: Shape, root: Path, *, dtype: str, weights: bool) -> Path:
    """The folder of a model that every peer loads; made if it is missing.

    Args:
        dtype: "bf16" or "fp32". Both are one draw of seed 0: bf16 is a cast of fp32.
        weights: Save them. Without, runners that can draw them from seed 0 on their device.

    A tokenizer of three words lies beside it: some peers ask for one, none needs it.
    """
    made = root / "models" / f"{shape.name}-{dtype}{'' if weights else '-config'}"
    if (made / "complete").exists():
        return made
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(shape.family, **shape.configuration())
    number = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    config.dtype = number
    if weights:
        torch.manual_seed(0)
        exact = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        exact.to(number).save_pretrained(made)
    else:
        config.save_pretrained(made)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(made)
    (made / "complete").touch()
    return made


def drawn(folder: Path, *, device: str) -> Any:
    """The model of a folder's configuration, random bf16 weights drawn on `device` from seed 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.from_pretrained(folder)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
