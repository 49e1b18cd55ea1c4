"""The base and its adapter for peers that train transformers' models. Owns nothing else."""

from pathlib import Path
from typing import Any

import torch

from protocol import CLIP, LEARNING_RATE, Job

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUMBERS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model(job: Job) -> Any:
    """The base as it was saved, or drawn from seed 0 on the job's device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(job.model, "model.safetensors").exists():
        return AutoModelForCausalLM.from_pretrained(job.model, dtype=NUMBERS[job.dtype])
    torch.manual_seed(0)
    with torch.device(job.device):
        config = AutoConfig.from_pretrained(job.model)
        return AutoModelForCausalLM.from_config(config, dtype=NUMBERS[job.dtype])


def adapted(job: Job) -> Any:
    """The base with LoRA of rank 16 on all linears, alpha 32, no dropout; float32 adapters."""
    from peft import get_peft_model

    made = model(job)
    torch.manual_seed(1)
    return get_peft_model(made, lora())


def lora() -> Any:
    """PEFT's configuration, the same for all."""
    from peft import LoraConfig

    return LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def tokenizer(job: Job) -> Any:
    """The three words that lie beside the model; only its padding id matters."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.model)


def arguments(job: Job, knobs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Training arguments by the names that transformers, TRL, Unsloth and lorafit share.

    Args:
        knobs: In place of the job's.
    """
    return {
        "output_dir": job.scratch, "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation, "max_steps": job.steps,
        "learning_rate": LEARNING_RATE, "max_grad_norm": CLIP, "lr_scheduler_type": "constant",
        "optim": "adamw_torch", "bf16": job.dtype == "bf16", "use_cpu": job.device == "cpu",
        "train_sampling_strategy": job.order, "logging_steps": job.log_every,
        "logging_first_step": True, "save_strategy": "no", "report_to": "none",
        "seed": 0, "disable_tqdm": True, "dataloader_pin_memory": job.device == "cuda",
        **(job.knobs if knobs is None else knobs),
    }  # fmt: skip
