"""The panels: old names, what was set, the recipe, every complaint at once, a real dataclass."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from lorafit.arguments import PANELS, DataArguments, ModelArguments, TrainingArguments, in_steps
from lorafit.errors import ConfigError, UnknownNameError
from lorafit.names import ALIASES, NO_OPS, REFUSED
from tests import pages

COURSE = {
    "output_dir": "./slm-finetuned-model",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 3,
    "optim": "paged_adamw_32bit",
    "bf16": True,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "learning_rate": 2e-4,
    "max_grad_norm": 0.3,
}


def test_the_script_of_a_course_is_taken_as_it_stands() -> None:
    args = TrainingArguments(**COURSE)
    assert args.check() == []
    assert args.notices == ()
    assert args.explicit == set(COURSE)
    assert args.effective_batch_size == 16


def test_panels_import_nothing_heavy() -> None:
    code = (
        "import sys, lorafit.config\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestNames:
    @pytest.mark.parametrize(
        ("given", "knob", "value"),
        [
            ({"evaluation_strategy": "steps"}, "eval_strategy", "steps"),
            ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
            ({"warmup_ratio": 0.1, "warmup_steps": 0}, "warmup_steps", 0.1),
            ({"group_by_length": True}, "train_sampling_strategy", "group_by_length"),
            ({"group_by_length": False}, "train_sampling_strategy", "random"),
            ({"no_cuda": True}, "use_cpu", True),
            ({"adafactor": True}, "optim", "adafactor"),
            ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
            ({"include_inputs_for_metrics": True}, "include_for_metrics", ("inputs",)),
            ({"optim": "adamw_hf"}, "optim", "adamw_torch"),
        ],
    )
    def test_an_old_name_sets_the_new_one_and_says_so(
        self, given: dict[str, Any], knob: str, value: Any
    ) -> None:
        args = TrainingArguments(**given)
        assert vars(args)[knob] == value
        assert args.was_set(knob)
        assert len(args.notices) == 1
        assert args.check() == []

    def test_the_new_name_is_taken_where_both_are_given(self) -> None:
        args = TrainingArguments(warmup_ratio=0.1, warmup_steps=100)
        assert args.warmup_steps == 100
        assert args.notices == ("warmup_ratio=0.1 gives way to warmup_steps=100",)
        assert TrainingArguments(warmup_ratio=0.0, warmup_steps=100).warmup_steps == 100

    def test_a_name_that_only_means_unset_sets_nothing(self) -> None:
        args = TrainingArguments(adafactor=False, per_gpu_train_batch_size=None)
        assert args.explicit == frozenset()

    @pytest.mark.parametrize("name", REFUSED)
    def test_a_refused_name_passes_with_its_default_and_raises_else(self, name: str) -> None:
        assert TrainingArguments(**{name: REFUSED[name].default}).notices == ()
        with pytest.raises(ConfigError) as raised:
            TrainingArguments(**{name: "something"})
        assert name in raised.value.what
        assert raised.value.why == REFUSED[name].why
        assert raised.value.fix == REFUSED[name].instead

    @pytest.mark.parametrize("name", NO_OPS)
    def test_a_name_without_effect_is_said_once_unless_at_its_default(self, name: str) -> None:
        assert TrainingArguments(**{name: NO_OPS[name].default}).notices == ()
        args = TrainingArguments(**{name: "something"})
        assert args.notices == (f"{name}='something' has no effect: {NO_OPS[name].why}",)
        assert args.explicit == frozenset()

    def test_an_unknown_name_raises_with_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match=r"Did you mean learning_rate\?"):
            TrainingArguments(learning_rat=1e-4)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            ModelArguments(evaluation_strategy="no")  # type: ignore[call-arg]

    @pytest.mark.parametrize("name", [*ALIASES, *NO_OPS, *REFUSED])
    def test_scripts_can_read_every_name(self, name: str) -> None:
        args = TrainingArguments(warmup_steps=0.1, train_sampling_strategy="group_by_length")
        read = getattr(args, name)
        assert args.warmup_ratio == 0.1 and args.group_by_length is True
        assert name in ALIASES or read == {**NO_OPS, **REFUSED}[name].default

    def test_assigning_an_old_name_does_as_giving_it(self) -> None:
        args = TrainingArguments()
        args.evaluation_strategy = "epoch"
        assert args.eval_strategy == "epoch"
        assert args.was_set("eval_strategy") and len(args.notices) == 1
        with pytest.raises(ConfigError):
            args.push_to_hub = True
        args.my_own = 3
        assert vars(args)["my_own"] == 3
        with pytest.raises(AttributeError):
            args.nobody_s  # noqa: B018


class TestWhatWasSet:
    def test_given_and_assigned_count_and_derived_does_not(self) -> None:
        args = TrainingArguments("out", load_best_model_at_end=True, eval_strategy="no")
        assert args.metric_for_best_model == "loss"
        assert args.explicit == {"output_dir", "load_best_model_at_end", "eval_strategy"}
        args.seed = 42
        assert args.was_set("seed")

    def test_everything_at_once_counts_what_differs(self) -> None:
        args = dataclasses.replace(TrainingArguments(bf16=True), seed=7)
        assert args.explicit == {"bf16", "seed"}

    def test_a_users_subclass_keeps_the_behaviour(self) -> None:
        @dataclasses.dataclass
        class Mine(TrainingArguments):
            cache_dir: str = ""

        args = Mine(bf16=True, eval_strategy="steps", cache_dir="c")
        assert args.explicit == {"bf16", "eval_strategy"}
        assert args.eval_steps == 500 and args.check() == []


class TestRealDataclass:
    def test_fields_replace_asdict_equality_copy_and_pickle(self) -> None:
        args = TrainingArguments("out", evaluation_strategy="no", learning_rate=1e-3)
        names = [f.name for f in dataclasses.fields(args)]
        assert names == [*TrainingArguments.knobs, *NO_OPS, *REFUSED]
        assert TrainingArguments(**dataclasses.asdict(args)) == args
        for twin in (copy.deepcopy(args), copy.copy(args), pickle.loads(pickle.dumps(args))):
            assert twin == args
            assert twin.explicit == args.explicit and twin.notices == args.notices
        assert args != dataclasses.replace(args, seed=1)

    def test_hf_argument_parser_reads_it(self, tmp_path: Path) -> None:
        parser = HfArgumentParser((TrainingArguments,))
        parser.format_help()
        line = "--output_dir o --bf16 --learning_rate 1e-3 --report_to wandb --eval-strategy steps"
        (args,) = parser.parse_args_into_dataclasses(line.split(), look_for_args_file=False)
        assert args.output_dir == "o" and args.bf16 and args.report_to == ["wandb"]
        assert args.explicit >= {"output_dir", "bf16", "learning_rate", "eval_strategy"}
        assert not args.was_set("seed") and args.check() == []

    def test_enum_values_become_texts(self) -> None:
        args = TrainingArguments(
            eval_strategy=IntervalStrategy.EPOCH,
            save_strategy=SaveStrategy.EPOCH,
            lr_scheduler_type=SchedulerType.COSINE,
        )
        args.logging_strategy = IntervalStrategy.NO
        held = (args.eval_strategy, args.save_strategy, args.lr_scheduler_type)
        assert (*held, args.logging_strategy) == ("epoch", "epoch", "cosine", "no")
        assert {type(value) for value in held} == {str}

    def test_dictionaries_are_json(self) -> None:
        args = TrainingArguments(lr_scheduler_kwargs={"num_cycles": 2}, report_to="all")
        assert json.loads(args.to_json_string()) == args.to_dict()
        plain = args.to_sanitized_dict()
        assert plain["train_batch_size"] == 8 and plain["lr_scheduler_kwargs"] == str(
            {"num_cycles": 2}
        )


class TestDerived:
    def test_eval_steps_follow_logging_steps_until_set(self) -> None:
        args = TrainingArguments(eval_strategy="steps", logging_steps=20)
        assert args.eval_steps == 20 and args.do_eval
        args.logging_steps = 30
        assert args.eval_steps == 30
        args.eval_steps = 5
        args.logging_steps = 40
        assert args.eval_steps == 5

    @pytest.mark.parametrize(
        ("metric", "greater"), [(None, False), ("eval_loss", False), ("accuracy", True)]
    )
    def test_the_best_metric(self, metric: str | None, greater: bool) -> None:
        args = TrainingArguments(load_best_model_at_end=True, metric_for_best_model=metric)
        assert args.metric_for_best_model == (metric or "loss")
        assert args.greater_is_better is greater
        assert TrainingArguments().greater_is_better is None

    @pytest.mark.parametrize(
        ("given", "held"),
        [
            (None, []),
            ("none", []),
            (["none"], []),
            ("all", ["all"]),
            ("wandb", ["wandb"]),
            (["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ],
    )
    def test_report_to_is_a_list(self, given: Any, held: list[str]) -> None:
        assert TrainingArguments(report_to=given).report_to == held

    def test_texts_that_hold_mappings_are_read(self) -> None:
        args = TrainingArguments(
            lr_scheduler_kwargs='{"min_lr": 1e-6}',
            activation_checkpointing=True,
            activation_checkpointing_kwargs='{"use_reentrant": false}',
        )
        assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
        assert args.gradient_checkpointing and args.activation_checkpointing
        assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
        assert args.notices == ()

    def test_a_home_folder_is_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        assert TrainingArguments("~/run").output_dir == "/home/me/run"
        assert TrainingArguments(Path("a/b")).output_dir == "a/b"  # type: ignore[arg-type]
        assert TrainingArguments(None).output_dir == "trainer_output"  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("steps", "total", "expected"), [(0, 10, 0), (0.03, 101, 4), (7, 10, 7), (1.0, 10, 1)]
    )
    def test_parts_of_a_run_round_up(self, steps: float, total: int, expected: int) -> None:
        assert in_steps(steps, total) == expected
        assert TrainingArguments(warmup_steps=steps).get_warmup_steps(total) == expected

    def test_one_process_on_the_cpu(self) -> None:
        args = TrainingArguments(use_cpu=True, log_level="info", per_device_eval_batch_size=3)
        assert args.device.type == "cpu" and args.n_gpu == 0
        assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
        assert args.should_save and args.should_log
        assert (args.train_batch_size, args.eval_batch_size) == (8, 3)
        assert (args.get_process_log_level(), TrainingArguments().get_process_log_level()) == (
            20,
            30,
        )
        with args.main_process_first(desc="tokenising"):
            pass


class TestRecipe:
    def test_it_gives_a_good_start_and_counts_as_unset(self) -> None:
        args = TrainingArguments.recipe(output_dir="o")
        assert args.check() == [] and args.explicit == {"output_dir"}
        assert args.effective_batch_size == 16 and args.learning_rate == 2e-4
        assert args.load_best_model_at_end and args.eval_strategy == args.save_strategy == "epoch"
        model = ModelArguments.from_recipe({"model": "m"})
        assert (model.lora_r, model.lora_alpha, model.lora_target_modules) == (16, 32, "all-linear")
        assert DataArguments.from_recipe({"data": "d"}).check() == []

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"learning_rate": 5e-5}, {"learning_rate": 5e-5}),
            ({"eval_strategy": "no"}, {"load_best_model_at_end": False, "save_strategy": "epoch"}),
            ({"evaluation_strategy": "steps"}, {"save_strategy": "steps", "save_steps": 10}),
            ({"eval_steps": 7}, {"eval_strategy": "steps", "save_steps": 7}),
            ({"save_steps": 30}, {"save_strategy": "steps", "eval_steps": 30}),
            ({"save_strategy": "no"}, {"load_best_model_at_end": False, "eval_strategy": "epoch"}),
            ({"save_strategy": "best"}, {"load_best_model_at_end": True, "eval_strategy": "epoch"}),
            ({"fp16": True}, {"bf16": False}),
            ({"max_steps": 20}, {"num_train_epochs": 3.0}),
        ],
    )
    def test_what_is_given_stays_and_the_rest_agrees(
        self, given: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        args = TrainingArguments.recipe(**given)
        assert args.check() == []
        assert {name: vars(args)[name] for name in expected} == expected

    def test_a_contradiction_that_was_given_is_not_hidden(self) -> None:
        assert TrainingArguments.recipe(bf16=True, fp16=True).check()
        assert TrainingArguments.recipe(eval_strategy="no", load_best_model_at_end=True).check()


class TestCheck:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"learning_rate": -1}, "learning_rate=-1 is below 0"),
            ({"learning_rate": math.nan}, "not finite"),
            ({"learning_rate": "2e-4"}, "learning_rate='2e-4' is not a number"),
            ({"num_train_epochs": True}, "num_train_epochs=True is not a number"),
            ({"max_steps": 1.5}, "max_steps=1.5 is not a whole number"),
            ({"adam_beta1": 1.0}, "adam_beta1=1.0 is not below 1"),
            ({"per_device_train_batch_size": 0}, "is below 1"),
            ({"optim": "galore_adamw"}, "optim='galore_adamw' is not one of adamw_torch,"),
            ({"label_names": "labels"}, "label_names='labels' is not a list or none"),
            ({"lr_scheduler_kwargs": "{min_lr"}, "lr_scheduler_kwargs='{min_lr' is not a mapping"),
            ({"lr_scheduler_kwargs": "[1]"}, "lr_scheduler_kwargs=[1] is not a mapping"),
            ({"bf16": True, "fp16": True}, "bf16 and fp16"),
            ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "needs evaluations"),
            ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers"),
            ({"dataloader_persistent_workers": True}, "dataloader_num_workers"),
            ({"num_train_epochs": 0}, "nothing would be trained"),
            ({"warmup_steps": 1.5}, "warmup_steps=1.5 is above 1 and not whole"),
            ({"logging_steps": 0}, "logging_strategy='steps' needs logging_steps"),
            ({"save_steps": 2.5}, "save_steps=2.5 is above 1"),
            ({"load_best_model_at_end": True}, "needs evaluations"),
            ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "to be the same"),
            (
                {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300},
                "save_steps=500 to be a multiple of eval_steps=300",
            ),
            (
                {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1},
                "multiple",
            ),
        ],
    )
    def test_each_complaint(self, given: dict[str, Any], said: str) -> None:
        (complaint,) = TrainingArguments(**given).check()
        assert said in complaint

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"learning_rate": np.float32(1e-3), "seed": np.int64(3)},
            {"include_for_metrics": ("inputs", "loss")},
            {"eval_strategy": "steps", "eval_steps": 0},
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "best"},
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 0.1,
                "save_steps": 0.3,
            },
            {"logging_strategy": "no", "logging_steps": 0},
            {"include_num_input_tokens_seen": True},
        ],
    )
    def test_what_transformers_takes_is_taken(self, given: dict[str, Any]) -> None:
        assert TrainingArguments(**given).check() == []

    def test_all_complaints_come_at_once(self) -> None:
        args = TrainingArguments(seed=-1, layout="x", fp16=True, bf16=True, max_grad_norm=-1)
        assert len(args.check()) == 4

    def test_what_must_be_given(self) -> None:
        assert ModelArguments().check() == ["model is missing."]
        assert DataArguments().check() == ["data is missing."]
        assert DataArguments("d", eval_share=1.0).check() == ["eval_share=1.0 is not below 1."]


def test_every_knob_is_documented_valid_and_named_once() -> None:
    knobs = [knob for panel in PANELS for knob in panel.knobs.values()]
    assert len({knob.name for knob in knobs}) == len(knobs)
    for knob in knobs:
        assert knob.help.endswith(".") and "%" not in knob.help, knob.name
        assert knob.complaint(knob.default) == "" == knob.complaint(knob.recipe)


def test_the_page_is_what_the_panels_say() -> None:
    committed = (pages.DOCS / "arguments.md").read_text(encoding="utf-8")
    assert committed == pages.arguments_page(), "run `python -m tests.pages`"


# ---- what reads or fills dataclass fields


HARMLESS = """
    --push_to_hub False --ddp_find_unused_parameters False --ddp_timeout 1800 --local_rank -1
    --bf16_full_eval False --use_liger_kernel False --auto_find_batch_size False
"""


def test_parsers_of_transformers_take_what_asks_for_nothing() -> None:
    parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    (made,) = parser.parse_args_into_dataclasses(["--output_dir", "o", *HARMLESS.split()])
    assert made.output_dir == "o" and made.push_to_hub is False
    with pytest.raises(ConfigError, match="fsdp_config"):
        parser.parse_args_into_dataclasses(["--output_dir", "o", "--fsdp_config", "x"])
    (made,) = parser.parse_dict({"output_dir": "o", "deepspeed": None, "hub_model_id": None})
    assert made.deepspeed is None


def test_subclasses_that_are_dataclasses() -> None:
    @dataclass
    class Mine(TrainingArguments):
        alpha: float = 0.5

    made = Mine(output_dir="o", push_to_hub=False, alpha=0.1, learning_rate=1e-3)
    assert (made.alpha, made.learning_rate, made.push_to_hub) == (0.1, 1e-3, False)
    assert made.was_set("learning_rate") and not made.was_set("seed")
    with pytest.raises(ConfigError, match="push_to_hub"):
        Mine(output_dir="o", push_to_hub=True)


def test_every_field_of_transformers_is_in_the_dict() -> None:
    theirs = {each.name for each in fields(transformers.TrainingArguments)}
    missing = theirs - set(TrainingArguments("o").to_dict())
    assert missing <= {"activation_checkpointing", "activation_checkpointing_kwargs"}
