"""The tables of names against transformers itself: every field, once, with its own default."""

from dataclasses import MISSING, fields

import pytest
import transformers

import lorafit
from lorafit.arguments import TrainingArguments
from lorafit.names import ALIASES, DIFFERENT, NO_OPS, OLD_VALUES, REFUSED, UNCALLED

FIELDS = {field.name: field for field in fields(transformers.TrainingArguments)}
TABLES = (TrainingArguments.knobs, ALIASES, NO_OPS, REFUSED)

# Fields of transformers 4.40 to 5.22 that 5.23 no longer has, read from those releases.
DROPPED = (
    "adafactor", "dispatch_batches", "evaluation_strategy", "fp16_backend", "fp16_opt_level",
    "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "group_by_length",
    "half_precision_backend", "include_inputs_for_metrics", "include_tokens_per_second",
    "jit_mode_eval", "logging_dir", "mp_parameters", "no_cuda", "overwrite_output_dir",
    "past_index", "per_gpu_eval_batch_size", "per_gpu_train_batch_size", "push_to_hub_model_id",
    "push_to_hub_organization", "push_to_hub_token", "ray_scope", "save_safetensors",
    "split_batches", "torchdynamo", "tp_size", "tpu_metrics_debug", "tpu_num_cores", "use_ipex",
    "use_legacy_prediction_loop", "use_mps_device", "warmup_ratio",
)  # fmt: skip

# None there until the constructor replaces it by what is the default here.
SETTLED_THERE = {"output_dir": "trainer_output", "gradient_checkpointing": False}


@pytest.mark.parametrize("name", [*FIELDS, *DROPPED])
def test_every_name_is_accounted_for_exactly_once(name: str) -> None:
    assert sum(name in table for table in TABLES) == 1


counted = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."),
    reason=f"said of transformers 5.23, not {transformers.__version__}",
)


@counted
def test_there_are_as_many_fields_as_the_page_says() -> None:
    assert len(FIELDS) == 114


@counted
@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ALIASES])
def test_defaults_are_transformers_own(name: str) -> None:
    field = FIELDS[name]
    theirs = field.default if field.default is not MISSING else field.default_factory()
    table = next(table for table in TABLES if name in table)
    assert table[name].default == SETTLED_THERE.get(name, theirs)


def test_what_differs_or_is_aliased_is_a_knob() -> None:
    knobs = TrainingArguments.knobs
    targets = [alias.to for alias in ALIASES.values()]
    assert {*DIFFERENT, *targets, *(name for name, _ in OLD_VALUES)} <= set(knobs)
    assert all(new in knobs[name].choices for (name, _), new in OLD_VALUES.items())


def test_every_refusal_says_why_and_what_instead() -> None:
    for name, entry in REFUSED.items():
        assert entry.why.endswith("."), name
        assert entry.instead.rstrip(")").endswith("."), name


@counted
def test_methods_without_a_counterpart_are_all_known() -> None:
    theirs = {name for name in dir(transformers.Trainer) if not name.startswith("__")}
    assert theirs - set(dir(lorafit.Trainer)) == UNCALLED
