"""Callbacks: every event with its keywords, flags that steer the run, state that is kept."""

from tests.tiny import collate, llama, plain
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import (
    EarlyStoppingCallback,
    ExportableState,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Diary(TrainerCallback):
    """Writes each event with what came with it."""

    def __init__(self):
        self.pages = []
        for name in EVENTS:
            setattr(self, name, self.write(name))

    def write(self, name):
        def told(args, state, control, **context):
            given = sorted(key for key, value in context.items() if value is not None)
            flags = [key for key, value in sorted(vars(control).items()) if value]
            self.pages.append((name, state.global_step, state.epoch, given, flags))

        return told


class Steering(TrainerCallback):
    """Does by flags and groups what arguments could have done."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **context):
        self.rates = []
        assert model is not None and optimizer is not None

    def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **context):
        if state.global_step == 2:
            for group in optimizer.param_groups:
                group["lr"] = 1e-4
        self.rates.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))

    def on_step_end(self, args, state, control, **context):
        control.should_save = state.global_step == 1
        control.should_evaluate = state.global_step == 2
        control.should_log = state.global_step == 2
        if state.global_step == 4:
            control.should_epoch_stop = True

    def on_log(self, args, state, control, logs=None, **context):
        logs["seen"] = state.global_step


class Patience(TrainerCallback, ExportableState):
    """Counts steps, and keeps the count in checkpoints."""

    def __init__(self, limit=7):
        self.limit, self.steps = limit, 0

    def on_step_end(self, args, state, control, **context):
        self.steps += 1
        if self.steps >= self.limit:
            control.should_training_stop = True

    def state(self):
        return {"args": {"limit": self.limit}, "attributes": {"steps": self.steps}}


def arguments(**given):
    values = {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**values, **given})


def trainer_with(*callbacks, **given):
    return Trainer(
        model=llama(),
        args=arguments(**given),
        train_dataset=plain(10),
        eval_dataset=plain(3),
        data_collator=collate,
        callbacks=list(callbacks),
    )


def names(trainer):
    return [type(callback).__name__ for callback in trainer.callback_handler.callbacks]


diary, steering = Diary(), Steering()
trainer = trainer_with(diary, steering)
trainer.train()
outcome = {"pages": diary.pages, "rates": steering.rates, "log": trainer.state.log_history}

trainer = trainer_with(eval_strategy="epoch", save_strategy="epoch", logging_steps=2)
trainer.add_callback(Patience)
trainer.train()
kept = trainer.state.stateful_callbacks["Patience"]
trainer = trainer_with(
    Patience(8),
    eval_strategy="epoch",
    save_strategy="epoch",
    restore_callback_states_from_checkpoint=True,
)
trainer.train(resume_from_checkpoint="out/checkpoint-3")
patience = [c for c in trainer.callback_handler.callbacks if isinstance(c, Patience)]
outcome["patience"] = [kept, trainer.state.global_step, [(c.limit, c.steps) for c in patience]]

trainer = trainer_with(
    EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0),
    eval_strategy="steps",
    eval_steps=1,
    save_strategy="steps",
    save_steps=1,
    load_best_model_at_end=True,
)
trainer.train()
outcome["early"] = [trainer.state.global_step, trainer.state.best_global_step]
outcome["best"] = trainer.state.best_model_checkpoint

trainer = trainer_with(Patience)
outcome["handlers"] = [names(trainer)]
trainer.add_callback(Diary)
popped = trainer.pop_callback(Diary)
outcome["popped"] = [type(popped).__name__, trainer.pop_callback(Diary), names(trainer)]
trainer.remove_callback(PrinterCallback)
trainer.add_callback(ProgressCallback)
outcome["handlers"].append(names(trainer))
trainer.remove_callback(ProgressCallback)
outcome["handlers"].append(names(trainer))
