"""Makes the embedded base: a tokenizer and a Llama of 3.1 million parameters, of Python's text.

Owns the corpus, the architecture and the recipe; README.md beside it says what came out. Modules
that `lorafit.data.docstrings` holds out are read only to measure loss on them. No question, answer
or chat turn is ever shown: the markers of the chat template are tokens without training.
"""

import argparse
import ast
import json
import logging
import math
import platform
import random
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.data.docstrings import Definition, definitions, is_held_out, library, sources

ASSETS = Path(__file__).parent
END, PAD, ROLES = "<|endoftext|>", "<|pad|>", ["<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT, BATCH, VOCABULARY, HEAD = 512, 4, 3072, 8000
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Identifiers fall into their words, snake_case and CamelCase alike: a sentence can repeat them.
WORDS = r" ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])| ?\d| ?_+| ?[^\s\w]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Reading:
    """One point of the loss curve: nats per token, and bits per byte of the held-out text."""

    step: int
    tokens: int
    seconds: float
    train_nats: float
    held_out_nats: float
    held_out_bits_per_byte: float


def corpus(head: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: source files, and docstrings as a help page shows them."""
    documents: dict[bool, list[str]] = {False: topics(), True: []}
    for module, file in sources():
        held_out = is_held_out(module)
        text = source(file, HEAD if held_out else head)
        documents[held_out] += [text, *help_pages(definitions(module, file))]
    return documents[False], documents[True]


def source(file: Path, head: int) -> str:
    """The head of a source file as one document: much of every module rather than all of a few."""
    return file.read_text(encoding="utf-8", errors="replace")[:head].strip()


def help_pages(found: Iterator[Definition]) -> Iterator[str]:
    """Each docstring under its name and signature, then an index of names and first sentences."""
    index: list[str] = []
    for one in found:
        yield f"{one.name}{one.signature}\n{textwrap.indent(one.docstring, '    ')}"
        module, _, last = one.name.rpartition(".")
        opening = one.docstring.split("\n\n")[0]
        yield f"Help on {last} in {module}:\n\n{last}{one.signature}\n    {opening}"
        if one.first_sentence:
            index.append(f"{one.name} - {one.first_sentence}")
    for _, part in groupby(enumerate(index), key=lambda numbered: numbered[0] // 12):
        yield "\n".join(line for _, line in part)


def topics() -> list[str]:
    """The language reference that `help()` carries, a document a topic; empty where missing."""
    file = library() / "pydoc_data" / "topics.py"
    if not file.exists():
        return []
    table = next(
        n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.Assign)
    )
    return [text.strip() for text in ast.literal_eval(table.value).values()]


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of `WORDS`; every text survives a round trip."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD, *ROLES],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama: 4 layers of width 256, 4 heads on 2 pairs of keys and values, tied."""
    end, pad = (tokenizer.backend_tokenizer.token_to_id(token) for token in (END, PAD))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model


def blocks(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Documents end to end, each closed by `END`, as (blocks, CONTEXT + 1) token ids."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([text + END for text in documents]):
        ids += encoding.ids
    count = (len(ids) - 1) // CONTEXT
    return torch.tensor(ids[: count * CONTEXT + 1]).unfold(0, CONTEXT + 1, CONTEXT)


def size(documents: list[str]) -> int:
    """Bytes of all documents together."""
    return sum(len(text.encode()) for text in documents)


def batches(corpus_blocks: torch.Tensor) -> Iterator[torch.Tensor]:
    """(BATCH, CONTEXT + 1) ids without end, each epoch in a new order."""
    while True:
        yield from corpus_blocks[torch.randperm(len(corpus_blocks))].split(BATCH)


def nats(model: LlamaForCausalLM, block: torch.Tensor, *, length: int = CONTEXT) -> torch.Tensor:
    """Mean nats per next token, over windows of `length`; matrix products in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=block[:, :-1].reshape(-1, length), use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten())


@torch.no_grad()
def held_out_nats(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """The mean loss over 16 blocks of the held-out modules, the same ones each time."""
    chosen = held_out[:: max(1, len(held_out) // 16)][:16]
    return sum(nats(model, part).item() for part in chosen.split(BATCH)) / math.ceil(
        len(chosen) / BATCH
    )


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 4% of the run, then a cosine to a twentieth of the peak."""
    if progress < 0.04:
        return peak * (progress + 0.001) / 0.041
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (progress - 0.04) / 0.96)))


def train(
    model: LlamaForCausalLM,
    train_blocks: torch.Tensor,
    *,
    held_out: torch.Tensor,
    options: argparse.Namespace,
    bytes_per_token: float,
) -> Iterator[Reading]:
    """Trains in place until `options.steps` or `options.minutes`; a reading every 100 steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    began, total, since = time.monotonic(), 0.0, 0
    for step, block in enumerate(batches(train_blocks)):
        seconds = time.monotonic() - began
        progress = min(1.0, max(step / options.steps, seconds / 60 / options.minutes))
        if progress == 1.0 or step % 100 == 0:
            held = held_out_nats(model, held_out)
            mean = total / since if since else nats(model, block).item()
            bits = held / math.log(2) / bytes_per_token
            yield Reading(step, step * BATCH * CONTEXT, seconds, mean, held, bits)
            total, since = 0.0, 0
        if progress == 1.0:
            return
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.learning_rate)
        # Short windows are cheaper; the last quarter of the run learns to use the whole context.
        loss = nats(model, block, length=CONTEXT // 2 if progress < 0.75 else CONTEXT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total, since = total + loss.item(), since + 1


@torch.no_grad()
def settle_markers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives the tokens that never occurred the mean row, each with a little noise of its own.

    Training only ever pushed those rows away from everything: a direction no text has.
    """
    rows = model.lm_head.weight  # tied: the embedding too
    unseen = [tokenizer.convert_tokens_to_ids(marker) for marker in (PAD, *ROLES)]
    rows[unseen] = rows[len(unseen) + 1 :].mean(0) + torch.randn(len(unseen), rows.shape[1]) * 0.02


def main() -> None:
    """Reads the options, trains, writes the model's folder and `base_training.json` beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "base")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head", type=int, default=HEAD, help="characters read of each source")
    parser.add_argument("--resume", action="store_true", help="go on from the model in --out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(options.seed)
    texts, held_out_texts = corpus(options.head)
    random.Random(options.seed).shuffle(texts)  # neighbours in a block should be strangers
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(options.out)
        if options.resume
        else make_tokenizer(texts)
    )
    train_blocks, held_out = blocks(tokenizer, texts), blocks(tokenizer, held_out_texts)
    model = make_model(tokenizer)
    if options.resume:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.out).state_dict())
    bytes_per_token = size(held_out_texts) / (held_out.shape[0] * CONTEXT)
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "documents": len(texts),
        "corpus_bytes": size(texts),
        "corpus_tokens": train_blocks.shape[0] * CONTEXT,
        "held_out_bytes_per_token": bytes_per_token,
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
    }
    curve = []
    for reading in train(
        model,
        train_blocks,
        held_out=held_out,
        options=options,
        bytes_per_token=bytes_per_token,
    ):
        curve.append(asdict(reading))
        logging.info(json.dumps(curve[-1]))
    settle_markers(model, tokenizer)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out, save_jinja_files=False)
    report = options.out.parent / f"{options.out.name}_training.json"
    stages = json.loads(report.read_text())["stages"] if options.resume else []
    report.write_text(json.dumps({"stages": [*stages, {**facts, "curve": curve}]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
