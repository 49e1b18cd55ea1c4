"""Evaluation and prediction: metrics, arrays, prefixes, named sets, sets without labels."""

import numpy as np
from tests.tiny import collate, llama, plain
from transformers import Trainer, TrainingArguments


def arguments(**given):
    values = {
        "output_dir": "out",
        "per_device_eval_batch_size": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **given})


def accuracy(prediction):
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    held = labels != -100
    return {"accuracy": (predicted == labels)[held].mean(), "tokens": held.sum()}


def best_token(logits, labels):
    return logits.argmax(-1)


def trainer_for(held=None, **given):
    own = {name: given.pop(name) for name in list(given) if name in OWN}
    return Trainer(
        model=llama(),
        args=arguments(**given),
        eval_dataset=plain(7) if held is None else held,
        data_collator=collate,
        **own,
    )


OWN = ("compute_metrics", "preprocess_logits_for_metrics")
KEPT = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best_token}


def shapes(found):
    return [None if part is None else np.asarray(part).shape for part in found[:2]]


# Batches differ in width: predictions are padded with -100 to the widest.
trainer = trainer_for(**KEPT)
metrics = trainer.evaluate()
outcome = {"evaluate": [metrics["eval_accuracy"], metrics["eval_tokens"], sorted(metrics)]}
outcome["other set"] = sorted(trainer.evaluate(plain(3), metric_key_prefix="held"))
found = trainer.predict(plain(5))
outcome["predict"] = [shapes(found), found.metrics["test_accuracy"], sorted(found.metrics)]
outcome["label ids"] = found.label_ids.tolist()
found = trainer_for().predict(plain(5), metric_key_prefix="mine")
outcome["logits"] = [shapes(found), sorted(found.metrics), found.predictions[0, 0, :5].tolist()]

bare = [
    {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]}
    for row in [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in plain(4)[:1] * 4]
]
unlabelled = Trainer(model=llama(), args=arguments())
found = unlabelled.predict(bare)
outcome["no labels"] = [shapes(found), sorted(found.metrics)]

several = {"short": plain(3), "long": plain(6)[3:]}
trainer = trainer_for(several, **KEPT)
outcome["named"] = sorted(trainer.evaluate())
outcome["one of them"] = sorted(trainer.evaluate("short"))
outcome["given"] = sorted(trainer.evaluate({"a": plain(3)}))


class Running:
    """Metrics batch by batch."""

    def __init__(self):
        self.right = self.all = self.calls = 0

    def __call__(self, prediction, compute_result):
        predicted, labels = prediction.predictions, prediction.label_ids
        held = labels[:, 1:] != -100
        self.right += int((predicted[:, :-1] == labels[:, 1:])[held].sum())
        self.all, self.calls = self.all + int(held.sum()), self.calls + 1
        return {"accuracy": self.right / self.all, "calls": self.calls} if compute_result else {}


trainer = trainer_for(
    batch_eval_metrics=True, compute_metrics=Running(), preprocess_logits_for_metrics=best_token
)
metrics = trainer.evaluate()
outcome["by batch"] = [metrics["eval_accuracy"], metrics["eval_calls"]]


def everything(prediction):
    inputs, losses = prediction.inputs, prediction.losses
    return {"inputs": inputs.shape[0], "losses": losses.shape[0]}


for given in ({}, {"eval_accumulation_steps": 1}):
    trainer = trainer_for(
        compute_metrics=everything, include_for_metrics=["inputs", "loss"], **given
    )
    metrics = trainer.evaluate()
    outcome[f"asked for {given}"] = [metrics["eval_inputs"], metrics["eval_losses"]]

trainer = trainer_for(prediction_loss_only=True)
outcome["loss only"] = [sorted(trainer.evaluate()), shapes(trainer.predict(plain(3)))]

kinds = []
trainer = trainer_for(
    compute_metrics=lambda p: kinds.append(type(p.predictions).__name__) or {"batches": 1},
    eval_do_concat_batches=False,
)
outcome["in batches"] = [sorted(trainer.evaluate()), kinds]

loop = trainer_for(**KEPT)
batches = loop.get_eval_dataloader()
output = loop.evaluation_loop(batches, "mine", prediction_loss_only=False, metric_key_prefix="x")
outcome["loop"] = [shapes(output), output.num_samples, sorted(output.metrics)]
loss, logits, labels = loop.prediction_step(loop.model, next(iter(batches)), False)
outcome["step"] = [loss.item(), list(logits.shape), list(labels.shape)]
