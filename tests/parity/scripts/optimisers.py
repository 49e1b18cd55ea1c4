"""Optimisers and schedules: by name, by class, by hand; groups, rates, counts."""

import torch
from tests.tiny import collate, llama, plain
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler


def trainer_with(model=None, **given):
    own = {name: given.pop(name) for name in list(given) if name.startswith("optimizer")}
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model=llama() if model is None else model,
        args=TrainingArguments(**{**values, **given}),
        train_dataset=plain(12),
        data_collator=collate,
        **own,
    )


def train(**given):
    trainer = trainer_with(**given)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


NAMES = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"]
SCHEDULES = {
    "linear": {}, "cosine": {}, "constant": {}, "constant_with_warmup": {}, "polynomial": {},
    "inverse_sqrt": {}, "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2, "num_stable_steps": 2},
}  # fmt: skip
outcome = {name: train(optim=name) for name in NAMES}
outcome["arguments"] = train(optim="sgd", optim_args="momentum=0.9,nesterov=True")
for name, more in SCHEDULES.items():
    outcome[name] = train(lr_scheduler_type=name, lr_scheduler_kwargs=more, warmup_steps=2)
outcome["warm-up as a part"] = train(warmup_steps=0.5)
outcome["class"] = train(optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.05}))

kinds = {}
for name in NAMES:
    kind, more = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("out", optim=name))
    kinds[name] = [kind.__name__, {key: more[key] for key in sorted(more)}]
outcome["kinds"] = kinds

model = llama()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
schedule = get_scheduler("constant", optimizer)
outcome["own"] = train(model=model, optimizers=(optimizer, schedule))
assert optimizer.param_groups[0]["params"][0] is next(
    p for p in model.parameters() if p.requires_grad
)
model = llama()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
outcome["own optimiser alone"] = train(model=model, optimizers=(optimizer, None))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.final_norm = nn.Linear(4, 1)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


net = Net()
trainer = trainer_with(model=net)
trainer.create_optimizer_and_scheduler(num_training_steps=6)
by_address = {id(p): name for name, p in net.named_parameters()}
outcome["groups"] = [
    ([by_address[id(p)] for p in group["params"]], group["weight_decay"], group["lr"])
    for group in trainer.optimizer.param_groups
]
outcome["decayed"] = sorted(trainer.get_decay_parameter_names(net))
outcome["asked"] = [
    trainer.get_learning_rates(),
    trainer.get_num_trainable_parameters(),
    trainer.get_optimizer_group(net.first.weight)["weight_decay"],
    len(trainer.get_optimizer_group()),
]
