"""The door to transformers: its arguments in both directions, schedules, seeds."""

import copy
import json
import random
import re
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.trainer_utils import IntervalStrategy

import lorafit
from lorafit import compat
from lorafit.arguments import SCHEDULES, TrainingArguments
from lorafit.errors import ConfigError
from tests import drop_in_table, pages


def theirs(**given: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(use_cpu=True, **given)


class TestFromTransformers:
    def test_defaults_stay_unset(self) -> None:
        args = compat.from_transformers(theirs())
        assert args.explicit <= {"use_cpu", "dataloader_pin_memory"}
        assert args.notices == ()
        assert args == TrainingArguments(use_cpu=True, dataloader_pin_memory=False)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
    def test_values_are_carried_over_as_plain_ones(self) -> None:
        given: dict[str, Any] = {
            "output_dir": "o", "learning_rate": 1e-3, "eval_strategy": "steps", "logging_steps": 7,
            "save_strategy": "no", "lr_scheduler_type": "cosine", "optim": "paged_adamw_32bit",
            "gradient_checkpointing": True, "report_to": ["wandb"], "warmup_steps": 0.1,
            "torch_compile": True, "include_num_input_tokens_seen": True,
        }  # fmt: skip
        args = compat.from_transformers(theirs(**given))
        assert args == TrainingArguments(use_cpu=True, dataloader_pin_memory=False, **given)
        assert args.explicit >= set(given)
        assert type(args.eval_strategy) is str and args.eval_steps == 7

    @pytest.mark.parametrize(
        "given",
        [
            {"push_to_hub": True, "hub_token": "secret"},
            {"debug": "underflow_overflow"},
            {"accelerator_config": {"split_batches": True}},
        ],
    )
    def test_what_is_not_honoured_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            compat.from_transformers(theirs(**given))

    def test_a_no_op_leaves_its_line(self) -> None:
        (line,) = compat.from_transformers(theirs(ddp_bucket_cap_mb=25)).notices
        assert "ddp_bucket_cap_mb=25" in line

    def test_a_users_own_fields_come_along(self) -> None:
        @dataclass
        class Mine(transformers.TrainingArguments):
            cache_dir: str = "c"

        args = compat.from_transformers(Mine(use_cpu=True))
        assert vars(args)["cache_dir"] == "c"
        sequence = transformers.Seq2SeqTrainingArguments(use_cpu=True)
        assert compat.from_transformers(sequence).notices == ()


class TestToTransformers:
    def test_there_and_back(self) -> None:
        ours = TrainingArguments(
            "o", bf16=True, tf32=True, optim="paged_adamw_32bit", eval_strategy="epoch",
            gradient_checkpointing=True, load_best_model_at_end=True, save_strategy="epoch",
            report_to=["wandb"], run_name="r", lr_scheduler_kwargs={"num_cycles": 2},
            include_num_input_tokens_seen=True,
        )  # fmt: skip
        made = compat.to_transformers(ours)
        assert made.eval_strategy is IntervalStrategy.EPOCH
        assert vars(made).get("activation_checkpointing", True) is True  # not in every release
        assert compat.from_transformers(made) == ours

    def test_it_reads_as_what_their_constructor_makes(self) -> None:
        given: dict[str, Any] = {
            "output_dir": "o", "eval_strategy": "steps", "logging_steps": 7, "save_steps": 14,
            "load_best_model_at_end": True, "disable_tqdm": True,
        }  # fmt: skip
        expected, made = theirs(**given), compat.to_transformers(
            TrainingArguments(use_cpu=True, dataloader_pin_memory=False, **given)
        )  # fmt: skip
        same = copy.copy(vars(expected))
        # Set up by accelerate, or by 5.3 alone.
        unlike = {"distributed_state", "accelerator_config"}
        unlike |= {"fsdp", "fsdp_config", "trackio_space_id"}
        assert {k: v for k, v in vars(made).items() if k not in unlike} == {
            k: v for k, v in same.items() if k not in unlike
        }
        for read in ("device", "n_gpu", "world_size", "process_index", "should_save", "should_log"):
            assert getattr(made, read) == getattr(expected, read), read
        assert made.parallel_mode == expected.parallel_mode
        assert (
            json.loads(made.to_json_string()).keys() == json.loads(expected.to_json_string()).keys()
        )
        assert made.to_sanitized_dict()["train_batch_size"] == 8
        assert made.get_process_log_level() == expected.get_process_log_level()
        assert str(made)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_runs(name: str) -> None:
    extra = {"warmup_stable_decay": {"num_decay_steps": 3}, "cosine_with_min_lr": {"min_lr": 1e-5},
             "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}  # fmt: skip
    args = TrainingArguments(
        learning_rate=1.0, lr_scheduler_type=name, warmup_steps=0.2, eval_strategy="epoch",
        lr_scheduler_kwargs=extra.get(name),
    )  # fmt: skip
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=args.learning_rate)
    schedule = compat.make_scheduler(optimizer, args, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([1.0] if name == "reduce_lr_on_plateau" else []))
    assert args.check() == []
    warms = name not in ("constant", "reduce_lr_on_plateau")
    assert (rates[0] < 1.0) is warms
    assert max(rates) == pytest.approx(1.0)


def test_seed_and_adafactor() -> None:
    draws = []
    for _ in range(2):
        compat.set_seed(3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert compat.adafactor_class() is transformers.Adafactor


VERDICTS = {"same", "better", "different", "refused", "absent"}


@pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."),
    reason=f"the page lists transformers 5.23, not {transformers.__version__}",
)
@pytest.mark.parametrize(
    ("rows", "kind", "ours"),
    [
        (drop_in_table.TRAINER, transformers.Trainer, lorafit.Trainer),
        (drop_in_table.ARGUMENTS, transformers.TrainingArguments, TrainingArguments),
    ],
    ids=["Trainer", "TrainingArguments"],
)
def test_every_method_stands_in_the_table_once(rows: Any, kind: type, ours: type) -> None:
    listed = [name for names, _, _ in rows for name in re.findall(r"`(\w+)`", names)]
    knobs = {field.name for field in fields(kind)} if kind is not transformers.Trainer else set()
    public = {name for name in dir(kind) if not name.startswith("_")} - knobs
    assert {name for name in listed if not name.startswith("_")} == public
    assert len(listed) == len(set(listed))
    for names, verdict, how in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(ours, name) == (verdict != "absent") or name == "init_hf_repo", name
        assert verdict in VERDICTS and (how or verdict == "same"), names


def test_the_page_is_what_the_tables_say() -> None:
    if not transformers.__version__.startswith("5.23."):
        pytest.skip(f"the page lists transformers 5.23, not {transformers.__version__}")
    committed = (pages.DOCS / "compat.md").read_text(encoding="utf-8")
    assert committed == pages.compat_page(), "run `python -m tests.pages`"
