"""What becomes of transformers' Trainer in lorafit, name by name and habit by habit.

Rows of docs/compat.md: names, verdict, how. `tests/test_compat.py` holds the names to both classes.
"""

TRAINER = (
    ("`Trainer(...)`", "same", "every parameter, in transformers' order; `tokenizer` too"),
    ("`train`", "better", "a path, True, False or `'auto'`, which starts afresh where there is no "
     "checkpoint; SIGINT and SIGTERM save first. Returns the mean loss of the whole run, also of a "
     "resumed one (there: of its last part)"),
    ("`evaluate`", "better", "nats over all supervised tokens, divided once: the number does not "
     "depend on the batch size. Named sets as a dict, one by its name, another set, any prefix"),
    ("`predict` `evaluation_loop` `prediction_step`", "same", "with labels or not. A loss that "
     "the module returns without labels is a loss here, a prediction there"),
    ("`compute_loss`", "same", "an override gets `num_items_in_batch` where it takes it; one that "
     "was written before there was such a parameter works too (a TypeError there)"),
    ("`training_step` `compute_loss_context_manager` `autocast_smart_context_manager`", "same",
     "used where they or `_prepare_inputs` are overridden, or called by you; else the engine does "
     "the same"),
    ("`loss_is_scaled_for_ga`", "same", ""),
    ("`get_train_dataloader` `get_eval_dataloader` `get_test_dataloader` `num_examples`", "same",
     "torch's DataLoader; your own may be anything that gives batches each time it is iterated. A "
     "plain one that shuffles gets the run's order through `accelerator.prepare`, as there; one "
     "with a batch sampler of its own keeps it"),
    ("`create_optimizer` `create_scheduler` `create_optimizer_and_scheduler`", "same", ""),
    ("`get_optimizer_cls_and_kwargs` `get_decay_parameter_names` `get_learning_rates` "
     "`get_num_trainable_parameters` `get_optimizer_group`", "same", ""),
    ("`add_callback` `pop_callback` `remove_callback`", "same", "transformers' own handler. Taking "
     "out `ProgressCallback` (`PrinterCallback` with `disable_tqdm=True`) silences the console; "
     "adding transformers' own hands it the screen"),
    ("`log`", "same", "`learning_rate` is the one the step was taken with, also where a callback "
     "changed it (there: what the schedule says)"),
    ("`log_metrics` `save_metrics` `save_state`", "same", ""),
    ("`metrics_format`", "same", "callable on the trainer (a TypeError in 5.23)"),
    ("`save_model`", "better", "the adapters in PEFT's files and layout, with what else was made "
     "trainable, tokenizer, contract (`lorafit.json`) and `training_args.json`; no pickle"),
    ("`create_model_card`", "same", "the run's facts with what is given; no upload"),
    ("`call_model_init`", "same", "`model_init` is called again by each `train()`"),
    ("`is_world_process_zero` `is_local_process_zero`", "same", ""),
    ("`push_to_hub` `init_hf_repo`", "refused", "lorafit uploads nothing. "
     "`huggingface_hub.upload_folder(folder_path=..., repo_id=...)` does"),
    ("`hyperparameter_search`", "refused", "one training per setting: call one from optuna"),
    ("`create_accelerator_and_postprocess` `get_batch_samples` `floating_point_ops` `store_flos` "
     "`get_total_train_batch_size` `set_initial_training_values` `get_cp_size` `get_sp_size` "
     "`get_tp_size` `end`", "absent", "an override of one of them, or of a private method without "
     "a counterpart, is named when training starts: nothing calls it"),
    ("`_save_checkpoint` `_save` `_get_train_sampler` `_get_eval_sampler` `_prepare_inputs`",
     "same", "the private ones that subclasses override"),
)  # fmt: skip
"""Methods of the Trainer."""

ARGUMENTS = (
    ("`device` `n_gpu` `parallel_mode` `process_index` `local_process_index` `world_size`", "same",
     "`device` looks at the machine when it is asked, not when arguments are made"),
    ("`train_batch_size` `eval_batch_size` `get_warmup_steps` `get_process_log_level` `should_log` "
     "`should_save` `main_process_first`", "same", ""),
    ("`to_dict` `to_json_string` `to_sanitized_dict`", "same", ""),
    ("`set_dataloader` `set_evaluate` `set_logging` `set_lr_scheduler` `set_optimizer` `set_save` "
     "`set_testing` `set_training` `set_push_to_hub`", "absent", "write the fields"),
    ("`ddp_timeout_delta` `default_optim` `is_torch_greater_or_equal_than_2_8` "
     "`place_model_on_device`", "absent", "of accelerate and of older torch"),
)  # fmt: skip
"""Methods and properties of TrainingArguments."""

HABITS = (
    ("callbacks", "same", "every event in the same order with the same keywords; a real "
     "`transformers.TrainingArguments`, optimiser and schedule; control flags"),
    ("flags set in `on_train_begin`", "different", "are acted on; transformers forgets them"),
    ("stateful callbacks", "better", "always restored; several of one class each get their own "
     "state (there: the first checkpoint's, and the list grows). One that is gone is named"),
    ("the bars of `ProgressCallback`", "different", "lorafit's console stands in its place"),
    ("`trainer.accelerator`", "different", "what scripts ask of it; its error names the rest"),
    ("`state.log_history` and `trainer_state.json`", "same", "the same keys at the same steps"),
    ("`checkpoint-N`", "better", "whole or not there: written beside, checked, renamed. Inside are "
     "other files: safetensors and JSON, no pickle is read or written"),
    ("`save_total_limit`", "different", "the best and the last are never deleted: with a limit of "
     "1, a best that is not the last leaves two (there: the last goes at the end)"),
    ("`save_model` overridden", "different", "in a checkpoint it sees the folder that is renamed "
     "when it is whole; `_save(..., state_dict=...)` writes the model's own weights"),
    ("resuming", "better", "bit-identical on a CPU, dropout and data order included; a damaged "
     "checkpoint is skipped by name; arguments that changed are named"),
    ("resuming with another batch size", "better", "goes on at the same row with the new one "
     "(there: the checkpoint's batches with the new accumulation)"),
    ("resuming a checkpoint of transformers", "refused", "its optimiser is a pickle: load the "
     "weights and train afresh"),
    ("several adapters on one model", "same", "the active one is trained, all are saved"),
    ("`model.add_adapter(config)`", "better", "can be resumed (an error there in 5.23)"),
    ("weights of 16 bits", "better", "are updated through fp32 masters, by your own optimiser too"),
    ("a loss or gradient that is not finite", "better", "is not applied and not averaged away; "
     "three in a row end the run"),
    ("a trained tensor without gradient", "better", "is named by the second step; no gradient at "
     "all ends the run"),
    ("an evaluation set without `eval_strategy`", "different", "is read a few times for journal "
     "and terminal, within 5% of the run's cost; not where evaluation is overridden"),
    ("what lies in `output_dir`", "different", "besides checkpoints `journal.jsonl` and "
     "`report.html` (watching.md), `.lorafit.lock` while it trains; no pickle"),
    ("evaluation rows with labels all masked", "different", "weigh nothing (there: NaN)"),
    ("a stream that ends early", "same", "the run stops, and says where"),
    ("padding", "better", "a step's examples lie end to end where that is exact, and the loss is "
     "the same to rounding (numerics.md); `layout='as_given'` runs your batches literally. "
     "`on_substep_end` is called as often either way"),
    ("`include_num_input_tokens_seen='all'`", "different", "counts the tokens that were run: "
     "packed rows have no padding"),
    ("hooks on modules", "same", "a model that is watched when a run begins sees your batches, run "
     "as given"),
    ("noise, data order, the base's own dropout", "same", "from the same random numbers in the "
     "same order; not where a collator draws some too, as accelerate reads one batch ahead"),
    ("LoRA's dropout", "different", "from counters, so that the layout does not change it; from "
     "torch's random numbers, as there, where the collator is yours"),
    ("`bf16=True` and a loss of your own", "same", "the model's forward alone is cast; your code "
     "sees float32"),
    ("`group_by_length`", "different", "another shuffle, which resuming can compute again"),
    ("several processes under torchrun", "same", "the last step of an epoch is not filled up with "
     "rows from its beginning; every process reads a step's rows and takes its share, so leave "
     "a `DistributedSampler` out; every process predicts all rows; gradients are summed, so a loss "
     "of yours is not to be multiplied by `num_processes` (several.md)"),
)  # fmt: skip
"""What scripts rely on besides names."""
