"""Fine-tune a small language model with LoRA: the script a course would teach, imports changed.

    python examples/drop_in.py
    python examples/drop_in.py --model FOLDER_OR_ID --data questions.jsonl

Without arguments it runs offline on lorafit's embedded base and on Python's own documentation.
`--data` takes JSON lines with the fields `question` and `answer`.
"""

import argparse
from dataclasses import asdict
from importlib.resources import files

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from lorafit.data.docstrings import pairs

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(files("lorafit") / "assets" / "base"))
parser.add_argument("--data")
parser.add_argument("--output", default="./slm-finetuned-model")
options = parser.parse_args()

# 1. The base model and its tokenizer
tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

# 2. LoRA on all linear layers
lora_config = LoraConfig(
    r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
)
peft_model = get_peft_model(model, lora_config)
peft_model.print_trainable_parameters()

# 3. The data: a small subset to train on, another to evaluate on
if options.data:
    dataset = load_dataset("json", data_files=options.data, split="train")
else:
    train, held_out = pairs(train=500, evaluation=100)
    dataset = Dataset.from_list([asdict(pair) for pair in train + held_out])


def tokenize(example: dict[str, str]) -> dict[str, list[int]]:
    """One question with its answer, ended by the end-of-text token."""
    text = f"Question: {example['question']}\nAnswer: {example['answer']}{tokenizer.eos_token}"
    return tokenizer(text, truncation=True, max_length=512)


tokenized = dataset.map(tokenize, remove_columns=dataset.column_names)
small_train_dataset = tokenized.select(range(500))
small_eval_dataset = tokenized.select(range(500, 600))

# 4. Train
training_args = TrainingArguments(
    output_dir=options.output,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    num_train_epochs=3,
    optim="paged_adamw_32bit",
    bf16=True,
    logging_steps=10,
    save_strategy="epoch",
    learning_rate=2e-4,
    max_grad_norm=0.3,
)
trainer = Trainer(
    model=peft_model,
    args=training_args,
    train_dataset=small_train_dataset,
    eval_dataset=small_eval_dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
)
training_results = trainer.train()
print(f"Final training loss: {training_results.training_loss:.4f}")

# 5. Save the adapter, and load it back over a fresh base
adapters = f"{options.output}/custom-slm-lora-adapters"
trainer.save_model(adapters)
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
tuned = PeftModel.from_pretrained(base, adapters)
print(f"Adapter loaded back from {adapters}: {tuned.peft_config['default'].r=}")
