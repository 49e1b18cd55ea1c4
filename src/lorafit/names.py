"""transformers' names that are not knobs here: aliases, no-ops, refusals; and how knobs differ.

Owns those tables and nothing else: pure data, checked in the tests against transformers 5.23's 114
fields and every field that its releases since 4.40 dropped. Knows neither the knobs' values
(`arguments`) nor how a name is acted on (`panel`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of knob `to`. `values` pairs its values with the knob's; None means unset.

    A name that transformers still has is taken without a word (`old` is False).
    """

    to: str
    default: Any = None
    values: tuple[tuple[Any, Any], ...] = ()
    old: bool = True


@dataclass(frozen=True, slots=True)
class NoOp:
    """A name whose work is done anyway, or is not needed: accepted, and `why` is said once.

    `silent` are the values about which nothing is said; the first is transformers' default.
    """

    why: str
    silent: tuple[Any, ...] = (False,)

    @property
    def default(self) -> Any:
        """transformers' default."""
        return self.silent[0]


@dataclass(frozen=True, slots=True)
class Refused:
    """A name that is not honoured: an error with `why` and what to do `instead`.

    `silent` are the values that ask for nothing and pass; the first is transformers' default.
    """

    why: str
    instead: str
    silent: tuple[Any, ...] = (False,)

    @property
    def default(self) -> Any:
        """transformers' default."""
        return self.silent[0]


def _same(names: str, entry: NoOp | Refused) -> dict[str, Any]:
    return dict.fromkeys(names.split(), entry)


ALIASES: Final[Mapping[str, Alias]] = MappingProxyType(
    {
        "evaluation_strategy": Alias("eval_strategy", "no"),
        "warmup_ratio": Alias("warmup_steps", 0.0),
        "group_by_length": Alias(
            "train_sampling_strategy", False, ((True, "group_by_length"), (False, "random"))
        ),
        "per_gpu_train_batch_size": Alias("per_device_train_batch_size"),
        "per_gpu_eval_batch_size": Alias("per_device_eval_batch_size"),
        "no_cuda": Alias("use_cpu", False),
        "adafactor": Alias("optim", False, ((True, "adafactor"), (False, None))),
        "include_inputs_for_metrics": Alias(
            "include_for_metrics", False, ((True, ("inputs",)), (False, None))
        ),
        "torchdynamo": Alias("torch_compile_backend"),
        # transformers 5.20's names for what all its releases call gradient checkpointing.
        "activation_checkpointing": Alias("gradient_checkpointing", old=False),
        "activation_checkpointing_kwargs": Alias("gradient_checkpointing_kwargs", old=False),
    }
)
"""Other name -> the knob that it sets."""

OLD_VALUES: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("optim", "adamw_hf"): "adamw_torch",
        ("optim", "adamw_apex_fused"): "adamw_torch_fused",
    }
)
"""(knob, value that transformers dropped) -> the value that took its place."""

_HALF = "the half precision is torch's own autocast"
_ONE_PROCESS = "nothing is wrapped in DistributedDataParallel here"

NO_OPS: Final[Mapping[str, NoOp]] = MappingProxyType(
    {
        "use_liger_kernel": NoOp("Liger's kernels are not used; the numbers are the same"),
        "liger_kernel_config": NoOp("Liger's kernels are not used", (None,)),
        "auto_find_batch_size": NoOp(
            "it is always so: where memory runs out, the same step runs again in smaller parts, "
            "and examples per step stay the same"
        ),
        "use_cache": NoOp("training keeps no key/value cache"),
        **_same(
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
            NoOp(_ONE_PROCESS, (None, False)),
        ),
        "local_rank": NoOp("the launcher's environment says which process this is", (-1, 0)),
        "enable_jit_checkpoint": NoOp("SIGTERM always saves a checkpoint"),
        "logging_nan_inf_filter": NoOp(
            "nothing is filtered: a non-finite loss is shown as it is and never applied",
            (True, False),
        ),
        "restore_callback_states_from_checkpoint": NoOp(
            "callbacks always get their saved state back", (False, True)
        ),
        # Dropped by transformers between 4.40 and 5.23.
        "logging_dir": NoOp("set the variable TENSORBOARD_LOGGING_DIR for TensorBoard", (None,)),
        "overwrite_output_dir": NoOp(
            "checkpoints of the same step are replaced, nothing else is deleted"
        ),
        "use_mps_device": NoOp("MPS is used where there is one"),
        "fp16_opt_level": NoOp(_HALF, ("O1",)),
        **_same("fp16_backend half_precision_backend", NoOp(_HALF, ("auto",))),
        "use_ipex": NoOp("what Intel's extension did is in torch itself"),
        "jit_mode_eval": NoOp("evaluation runs the model as it trains; use torch_compile"),
        "include_tokens_per_second": NoOp("tokens per second are shown anyway"),
        "use_legacy_prediction_loop": NoOp("there is one evaluation loop"),
        "ray_scope": NoOp("there is no hyper-parameter search here", ("last",)),
        "dispatch_batches": NoOp(
            "each process reads a step's rows and takes its share", (None, False)
        ),
    }
)
"""Name accepted without effect -> why nothing is lost."""

_HUB = Refused(
    "lorafit uploads nothing.",
    "Upload the saved adapter: huggingface_hub.upload_folder(folder_path=..., repo_id=...).",
    (None,),
)
_SHARDED = Refused(
    "lorafit does not shard or wrap the model through accelerate.",
    "Leave it out: one process uses one device.",
    (None, "", False),
)
_LAUNCH = Refused(
    "lorafit takes the process group that is there, else torch's for the device.",
    "Call torch.distributed.init_process_group(...) before the Trainer is made.",
    (None,),
)
_TRACKIO = Refused(
    "lorafit keeps no Trackio storage.",
    "Use report_to='trackio' with trackio_space_id.",
    (None,),
)
_TPU = Refused("lorafit runs on CPU, CUDA and MPS, not on TPUs.", "Leave it out.", (None, False))
_FULL_EVAL = Refused(
    "Evaluation uses the precision of training, so that the two losses can be compared.",
    "Leave it out; bf16=True covers evaluation too.",
)
_GENERATION = Refused(
    "Evaluation measures the loss; it does not generate.",
    "Call generate on the tuned model, or `lorafit generate`.",
    (None, False),
)

REFUSED: Final[Mapping[str, Refused]] = MappingProxyType(
    {
        "push_to_hub": Refused(_HUB.why, _HUB.instead),
        **_same("hub_model_id hub_token hub_revision", _HUB),
        "hub_private_repo": Refused(_HUB.why, _HUB.instead, (None, False)),
        "hub_always_push": Refused(_HUB.why, _HUB.instead),
        "hub_strategy": Refused(_HUB.why, _HUB.instead, ("every_save",)),
        "fsdp": Refused(_SHARDED.why, _SHARDED.instead, (None, "", False, [])),
        "fsdp_config": Refused(_SHARDED.why, _SHARDED.instead, (None, {})),
        **_same("deepspeed parallelism_config", _SHARDED),
        "accelerator_config": Refused(
            "accelerate is not used.",
            "Use dataloader_drop_last, data_seed and gradient_accumulation_steps.",
            (None,),
        ),
        "ddp_backend": _LAUNCH,
        "ddp_timeout": Refused(_LAUNCH.why, _LAUNCH.instead, (1800,)),
        "debug": Refused(
            "There are no debug modes: a non-finite loss is found, named and never applied.",
            "Leave it out.",
            ("", []),
        ),
        "optim_target_modules": Refused(
            "GaLore and APOLLO train full layers; lorafit trains adapters.",
            "Choose layers with peft's target_modules (lora_target_modules).",
            (None,),
        ),
        "average_tokens_across_devices": Refused(
            "A step's loss is always divided by all its supervised tokens.",
            "Leave it out.",
            (True,),
        ),
        **_same("bf16_full_eval fp16_full_eval", _FULL_EVAL),
        "ignore_data_skip": Refused(
            "A resumed run goes on with the examples that it has not seen; finding them is fast.",
            "Leave it out, or start a new run from the saved adapter.",
        ),
        "skip_memory_metrics": Refused(
            "transformers' memory tracker slows every step.",
            "Leave it out; use torch.cuda.max_memory_allocated().",
            (True,),
        ),
        "eval_use_gather_object": Refused(
            "Predictions are collected as arrays only.", "Return tensors from the model."
        ),
        "save_on_each_node": Refused(
            "One process saves, into one folder.", "Use a folder that all nodes share."
        ),
        "log_on_each_node": Refused("Only the first process logs.", "Leave it out.", (True,)),
        "log_level_replica": Refused(
            "Only the first process logs.", "Use log_level.", ("warning",)
        ),
        "dataloader_multiprocessing_context": Refused(
            "Workers start as Python's multiprocessing does by default.",
            "Call multiprocessing.set_start_method(...) first.",
            (None,),
        ),
        "dataloader_in_order": Refused(
            "The order of examples follows from the seed; out of order it would be chance.",
            "Leave it out.",
            (True,),
        ),
        **_same("trackio_bucket_id trackio_static_space_id", _TRACKIO),
        # Dropped by transformers between 4.40 and 5.23, or Seq2SeqTrainingArguments' own.
        "save_safetensors": Refused(
            "lorafit writes safetensors only and reads no pickle.", "Leave it out.", (True,)
        ),
        "split_batches": Refused(
            "It changes what per_device_train_batch_size means.",
            "Divide per_device_train_batch_size by the number of processes.",
            (None, False),
        ),
        **_same("sharded_ddp fsdp_transformer_layer_cls_to_wrap", _SHARDED),
        **_same("fsdp_min_num_params tp_size", Refused(_SHARDED.why, _SHARDED.instead, (0,))),
        "xpu_backend": _LAUNCH,
        "mp_parameters": Refused(
            "SageMaker's model parallelism is not supported.", "Leave it out.", ("",)
        ),
        **_same("tpu_num_cores tpu_metrics_debug", _TPU),
        "past_index": Refused(
            "Hidden state is not carried from one batch to the next.", "Leave it out.", (-1,)
        ),
        **_same("push_to_hub_model_id push_to_hub_organization push_to_hub_token", _HUB),
        **_same(
            "predict_with_generate generation_max_length generation_num_beams generation_config "
            "sortish_sampler",
            _GENERATION,
        ),
    }
)
"""Name refused -> why, and what to do instead."""

_UNCALLED = """
    _build_accelerator_args _clip_grad_norm _defer_fsdp_gradient_reduction _determine_best_metric
    _evaluate _finalize_training _finish_current_push
    _get_dataloader _get_grad_norm _get_num_items_in_batch
    _has_mixed_mesh_grads _hp_search_setup _init_training_state _inner_training_loop
    _issue_warnings_after_load _load_best_model _load_callback_state _load_from_checkpoint
    _load_optimizer_and_scheduler _load_rng_state _load_scaler _maybe_log_save_evaluate
    _mixed_mesh_grad_norm _move_model_to_device _prepare_context_parallel_inputs
    _prepare_for_training _push_from_checkpoint
    _report_to_hp_search _run_epoch _save_optimizer_and_scheduler _save_rng_state _save_scaler
    _set_signature_columns_if_needed _sync_replicated_trainable_parameters
    _track_num_input_tokens _tune_save_checkpoint _update_auto_batch_size _validate_args
    _wrap_model create_accelerator_and_postprocess end floating_point_ops get_batch_samples
    get_cp_size get_sp_size get_total_train_batch_size get_tp_size init_hf_repo
    set_initial_training_values store_flos
"""
UNCALLED: Final = frozenset(_UNCALLED.split())
"""Methods of transformers' Trainer that have no counterpart here: a subclass that overrides one is
told that it is never called."""

DIFFERENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "optim": "the names listed in arguments.md; paged and 8-bit ones are bitsandbytes' own on "
        "CUDA; without CUDA a paged optimiser runs unpaged, which is said once",
        "bf16": "accepted everywhere; used where the hardware multiplies bfloat16 itself, else "
        "the run is fp32, which is said once",
        "fp16": "needs CUDA; refused elsewhere when training starts, not when constructed",
        "tf32": "set when training starts, not when constructed; no effect without CUDA",
        "eval_strategy": "left unset with an eval_dataset, lorafit evaluates before, during and "
        "after training anyway; those readings are not in log_history; 'no' written out stops it",
        "report_to": "'all' stays 'all' until training starts",
        "disable_tqdm": "None until training starts: progress is shown where there is a terminal",
        "train_sampling_strategy": "'group_by_length' orders by (seed, epoch) alone, so a resumed "
        "run needs no saved state; 'batch_rebalance' is not offered",
        "lr_scheduler_type": "'greedy' is not offered",
        "neftune_noise_alpha": "scaled by each document's own length, not by its batch's padding",
        "label_smoothing_factor": "of the training loss; evaluation is the plain loss",
        "dataloader_drop_last": "of training alone: evaluation reads every row",
        "save_only_model": "a run that is interrupted saves all that resuming needs",
        "gradient_checkpointing": "re-entrant only where gradient_checkpointing_kwargs asks for it",
        "max_grad_norm": "a gradient that is not finite is not clipped but not applied at all",
    }
)
"""Knob with transformers' name that does not do quite the same -> how."""
