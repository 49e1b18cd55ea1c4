"""LitGPT: its model, its LoRA and the loop of its finetune_lora, through Fabric.

As there: adapters in the base's dtype ("-true" precisions), a step's loss is the mean of its
micro-batches' means, no clipping. Unlike there: a constant learning rate from the first step.
What is reported is weighted by supervised tokens, so that the first loss can be compared.
"""

import json
from pathlib import Path

import lightning
import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from protocol import LEARNING_RATE, Job, Report

PRECISIONS = {"bf16": "bf16-true", "fp32": "32-true"}


def config(folder: str) -> Config:
    """LitGPT's configuration of the Llama that lies in the folder, with LoRA on all linears."""
    told = json.loads(Path(folder, "config.json").read_text())
    if told["model_type"] != "llama":
        raise SystemExit(f"this peer's runner reads llama only, not {told['model_type']}")
    return Config(
        block_size=2048, vocab_size=told["vocab_size"], padded_vocab_size=told["vocab_size"],
        n_layer=told["num_hidden_layers"], n_head=told["num_attention_heads"],
        n_embd=told["hidden_size"], n_query_groups=told["num_key_value_heads"],
        head_size=told["head_dim"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", norm_eps=told["rms_norm_eps"],
        intermediate_size=told["intermediate_size"],
        rope_base=int(told["rope_parameters"]["rope_theta"]), lora_r=16, lora_alpha=32,
        lora_query=True, lora_key=True, lora_value=True, lora_projection=True, lora_mlp=True,
    )  # fmt: skip


def model(job: Job, fabric: lightning.Fabric) -> torch.nn.Module:
    """The base with fresh adapters."""
    made = config(job.model)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(made, {}, weights, load_file(Path(job.model, "model.safetensors")))
    fabric.seed_everything(1)
    with fabric.init_module(empty_init=False):
        gpt = GPT(made)
    mark_only_lora_as_trainable(gpt)
    gpt.load_state_dict(weights, strict=False)
    return fabric.setup_module(gpt)


def main() -> None:
    """Train, and report."""
    job = Job.read()
    report = Report(job)
    report.imported("litgpt", "lightning", "torch")
    job.refuse(collate=("pad",), order=("sequential",), compile=(False,))
    fabric = lightning.Fabric(accelerator=job.device, devices=1, precision=PRECISIONS[job.dtype])
    rows = list(job.rows())
    gpt = model(job, fabric)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0))
    report.loaded()
    nats = count = 0.0
    for number, numbers in enumerate(job.sequential(), start=1):
        held = [rows[index] for index in numbers]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in held], True, 0)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in held], True, -100)
        logits = gpt(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, labels[..., 1:])
        fabric.backward(loss / job.accumulation)
        targets = int((labels[..., 1:] != -100).sum())
        nats, count = nats + loss.item() * targets, count + targets
        if number % job.accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            report.step(nats / count)
            nats = count = 0.0
    report.done(job.sequential())


if __name__ == "__main__":
    main()
