"""What a base in 4 or 8 bits costs in time and loss, and saves in memory.

    python benchmarks/quantised.py FOLDER...

Forward and backward of 512 tokens through two layers as SmolLM2-135M has them (random weights),
by lorafit's kernels and by the model's own forward; processor time, one thread, best of 3. Then for
each base in FOLDER... the loss, in nats per token, of 64 texts that it wrote itself (drawn at
temperature 1), over it in full and quantised: what is lost is the divergence of the two. Writes
results/quantised.txt.
"""

import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from lorafit.arguments import ModelArguments
from lorafit.engine.precision import Precision
from lorafit.kernels.attention import Documents
from lorafit.model import adapters, base, documents, quantised
from lorafit.model.fused import Decoder
from lorafit.model.lora import Drawn
from lorafit.run.gap import Gap, loss_gap

TOKENS, LAYERS = 512, 2
RESULTS = Path(__file__).parent / "results" / "quantised.txt"
KINDS = ("", "nf4", "int8")


def adapted(folder: Path, kind: str) -> Any:
    torch.manual_seed(0)
    given = ModelArguments(model=str(folder), quantize=kind, lora_r=16)
    return adapters.attach(base.load_model(given), given)


def layer_bytes(model: Any) -> int:
    """Of the frozen linear layers: weights, and the scales of quantised ones."""
    state = base.unwrap(model).state_dict()
    return sum(t.numel() * t.element_size() for n, t in state.items() if ".base_layer." in n)


def milliseconds(states: Any, model: Any) -> float:
    """Processor time of a forward and backward, the fastest of 3."""
    ids, positions = torch.arange(TOKENS), torch.arange(TOKENS) % 256
    where: dict[str, Any] = {
        "documents": Documents.on(torch.device("cpu"), (256,) * (TOKENS // 256)),
        "rows_N": torch.arange(TOKENS),
        "counters": None,
    }
    times: list[float] = []
    for _ in range(4):
        began = time.process_time()
        states(ids, positions, **where).square().mean().backward()
        times.append(time.process_time() - began)
        model.zero_grad()
    return 1000 * min(times[1:])


def speed() -> Iterator[str]:
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for kind in KINDS:
            model = adapted(Path(folder), kind).train()
            kernels = milliseconds(Decoder(model, torch.float32), model)
            own = documents._OwnForward(model, autocast=nullcontext, drawn=Drawn())
            by_itself = milliseconds(own, model)
            started = time.process_time()
            for _ in range(5):
                for layer in quantised.packed(model):
                    quantised.whole(layer, torch.float32)
            whole = 1000 * (time.process_time() - started) / 5
            yield (
                f"{kind or 'float32':8} linear layers {layer_bytes(model) / 1e6:6.1f} MB   "
                f"fused {kernels:7.0f} ms   own forward {by_itself:7.0f} ms   "
                f"all layers made whole once {whole:5.0f} ms"
            )


def texts(folder: Path, count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Batches of texts that the base wrote."""
    model = base.load_model(ModelArguments(model=str(folder)))
    begin = model.config.bos_token_id or 0
    torch.manual_seed(0)
    with torch.no_grad():
        ids: Any = model.generate(
            input_ids=torch.full((count, 1), begin), do_sample=True, temperature=1.0, top_k=0,
            top_p=1.0, min_new_tokens=127, max_new_tokens=127,
            attention_mask=torch.ones(count, 1, dtype=torch.long), pad_token_id=0,
        )  # fmt: skip
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]


def losses(folder: Path) -> Iterator[str]:
    batches, precision = texts(folder), Precision(torch.device("cpu"))
    for kind in KINDS[1:]:
        found = loss_gap(adapted(folder, kind), batches, precision=precision, free=10**12)
        assert isinstance(found, Gap), found
        yield f"{folder.name:12} {kind:5} {found}"


def main() -> None:
    torch.set_num_threads(1)
    head = (
        f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, one thread"
    )
    lines = [head, *speed()]
    for folder in sys.argv[1:]:
        lines += losses(Path(folder))
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
