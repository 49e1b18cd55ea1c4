"""The law: layout never changes the numbers. And where it cannot hold, that is said."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import lorafit
from lorafit.data.collate import PadCollator
from lorafit.engine import precision
from lorafit.engine.layout import Document, best_fit, packed, unpadded
from lorafit.errors import DataError
from lorafit.events import Evaluated
from tests.parity.side_by_side import CONFIGURATIONS, SMALL
from tests.tiny import adapter, arguments, events_of, fingerprint, llama, numbers, plain, same

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    **CONFIGURATIONS,
}
FUSED = ("llama", "mistral", "qwen2", "qwen3")


def model_of(name: str, *, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else "all-linear"
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    return get_peft_model(base, lora)


def trained(folder: Path, model: Any, *, kind: Any = lorafit.Trainer, **given: Any) -> Any:
    """A trainer after its run of 12 examples, 4 in a step; before it, with `train=False`."""
    resume, train = given.pop("resume", None), given.pop("train", True)
    own = {"data_collator": PadCollator(0), "train_dataset": plain(12), "eval_dataset": plain(5)}
    own |= {name: given.pop(name) for name in (*own, "callbacks") if name in given}
    values = {"layout": "packed", "num_train_epochs": 2, "eval_strategy": "no"}
    trainer = kind(model=model, args=arguments(folder, **(values | given)), **own)
    if train:
        trainer.train(resume)
    return trainer


def far(one: Any, other: Any) -> tuple[float, float]:
    """The largest difference of a loss, relative, and of an adapter's tensor, by norm."""
    losses = zip(numbers(one, "loss"), numbers(other, "loss"), strict=True)
    a, b = adapter(one), adapter(other)
    return (
        max(abs(x - y) / x for (x,), (y,) in losses),
        max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a),
    )


def reason(trainer: Any) -> str:
    return trainer._packing.notices[0]


# ---- the law


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", CONFIGS)
def test_layout_changes_nothing(name: str, dropout: float, tmp_path: Path) -> None:
    """Loss, adapters and evaluation: padded, packed, packed into small micro-batches."""
    given = {"learning_rate": 2e-3, "lr_scheduler_type": "constant"}
    padded = trained(tmp_path, model_of(name, dropout=dropout), layout="as_given", **given)
    assert padded._packing.layout == "as_given"
    for budget in (40, 1024):
        laid = trained(tmp_path, model_of(name, dropout=dropout), token_budget=budget, **given)
        assert laid._packing.layout == "packed", laid._packing.notices
        assert laid._packing.runner.fused == (name in FUSED)
        loss, weights = far(padded, laid)
        assert loss < 1e-6 and weights < 1e-4
        ours, theirs = laid.evaluate()["eval_loss"], padded.evaluate()["eval_loss"]
        assert ours == pytest.approx(theirs, rel=1e-6)
        laid.args.per_device_eval_batch_size = 1
        assert laid.evaluate()["eval_loss"] == pytest.approx(theirs, rel=1e-6)


def test_the_nats_of_each_example_depend_on_no_layout(tmp_path: Path) -> None:
    """Nor on batches; and they are those of the example alone."""
    held = [*plain(7), {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, -100]}]
    told = []
    for layout, size in (("as_given", 1), ("as_given", 3), ("packed", 3), ("packed", 8)):
        given = {"layout": layout, "per_device_eval_batch_size": size}
        args = arguments(tmp_path, **given)
        trainer = lorafit.Trainer(llama(), args, PadCollator(0), train_dataset=held)
        with events_of(trainer) as seen:
            trainer.evaluate(held)
        told += [event for event in seen if isinstance(event, Evaluated)]
    for event in told:
        assert event.nats == pytest.approx(told[0].nats, rel=1e-5)
        assert event.tokens == told[0].tokens and event.tokens[-1] == 0
        assert sum(event.tokens) == event.supervised_tokens
        assert sum(event.nats) == pytest.approx(event.loss * event.supervised_tokens, rel=1e-6)


def test_dropout_drops(tmp_path: Path) -> None:
    """Or the test above would hold for masks that are never made."""
    runs = [trained(tmp_path, model_of("llama", dropout=share)) for share in (0.0, 0.2)]
    assert far(*runs)[0] > 1e-5
    assert far(runs[1], trained(tmp_path, model_of("llama", dropout=0.2), seed=4))[0] > 1e-5


def test_flattened_batches_draw_by_document(tmp_path: Path) -> None:
    given = {"data_collator": transformers.DataCollatorWithFlattening()}
    runs = [
        trained(tmp_path, model_of("llama", dropout=0.2), layout=layout, **given)
        for layout in ("as_given", "packed")
    ]
    assert runs[1]._packing.layout == "packed" and far(*runs)[0] < 1e-6


def test_steps_draw_other_masks() -> None:
    batch = PadCollator(0)(plain(3))
    draws = [packed([batch], budget=99, draw=draw)[0].drawn for draw in ((0, 1), (0, 2), (1, 1))]
    keys = [set(drawn[0].tolist()) for drawn in draws if drawn]
    assert len(keys) == 3 and all(len(found) == 3 for found in keys)
    assert not (keys[0] & keys[1]) | (keys[0] & keys[2])


@pytest.mark.parametrize("level", ["mlp", "half", "layer"])
def test_what_is_made_again_has_the_same_bits(level: str, tmp_path: Path) -> None:
    kept = trained(tmp_path, model_of("qwen3", dropout=0.1))
    again = trained(tmp_path, model_of("qwen3", dropout=0.1), recompute=level)
    assert numbers(kept, "loss") == numbers(again, "loss")
    assert same(adapter(kept), adapter(again))


def test_smoothing_is_for_training_alone(tmp_path: Path) -> None:
    both = [
        trained(tmp_path, model_of("llama"), label_smoothing_factor=0.1, layout=layout)
        for layout in ("as_given", "packed")
    ]
    assert far(*both)[0] < 1e-6
    assert both[0].evaluate()["eval_loss"] == pytest.approx(
        both[1].evaluate()["eval_loss"], rel=1e-6
    )


def test_a_packed_run_resumes_to_the_bit(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **context):
            control.should_save = control.should_training_stop = state.global_step == 4

    whole = trained(tmp_path / "whole", model_of("llama", dropout=0.2))
    trained(tmp_path / "part", model_of("llama", dropout=0.2), callbacks=[Stop()])
    own = {"data_collator": PadCollator(0), "train_dataset": plain(12)}
    values = {"layout": "packed", "num_train_epochs": 2}
    resumed = lorafit.Trainer(
        model=model_of("llama", dropout=0.2), args=arguments(tmp_path / "part", **values), **own
    )
    resumed.train(resume_from_checkpoint=True)
    assert same(adapter(whole), adapter(resumed))


def test_callbacks_are_told_of_as_many_substeps(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        told = 0

        def on_substep_end(self, args, state, control, **context):
            self.told += 1

    counts = []
    for given in ({"layout": "as_given"}, {"token_budget": 20}, {"token_budget": 999}):
        count = Count()
        trained(tmp_path, llama(), callbacks=[count], **given)
        counts.append(count.told)
    assert counts == [6, 6, 6]


# ---- the user's model


def test_the_users_tensors_stay_what_they_were(tmp_path: Path) -> None:
    """Weights that lie side by side while a run lasts keep values, dtypes and names, and the base
    is saved and loaded as ever."""
    model = llama()
    before = fingerprint(model, trainable=False)
    trained(tmp_path, model)
    assert fingerprint(model, trainable=False) == before
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(9)[None]
    assert torch.equal(back(ids).logits, merged.eval()(ids).logits)


def test_a_base_that_a_callback_edits_is_seen(tmp_path: Path) -> None:
    class Edit(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **context):
            if state.global_step == 2:
                model.get_base_model().model.layers[0].mlp.up_proj.weight.data.mul_(1.5)

    runs = [
        trained(tmp_path, llama(), callbacks=[Edit()], layout=layout)
        for layout in ("as_given", "packed")
    ]
    assert far(*runs)[0] < 1e-6
    assert far(runs[1], trained(tmp_path, llama()))[0] > 1e-4


def test_an_adapter_that_shares_a_layer_is_left_to_the_model(tmp_path: Path) -> None:
    """DoRA: its own forward, packed."""
    dora = get_peft_model(
        transformers.LlamaForCausalLM(CONFIGS["llama"]()),
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer = trained(tmp_path, dora)
    assert trainer._packing.layout == "packed" and not trainer._packing.runner.fused


@pytest.mark.parametrize("where", ["argument", "model"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_recomputation_by_the_model_changes_nothing(name: str, where: str, tmp_path: Path) -> None:
    """A layer that runs again in backward must find the documents; fused layers make themselves
    again, others are run as given."""
    plain_run, again = model_of(name), model_of(name)
    given: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    if where == "argument":
        given["gradient_checkpointing"] = True
    else:
        again.gradient_checkpointing_enable(given.pop("gradient_checkpointing_kwargs"))
        again.enable_input_require_grads()
    runs = [trained(tmp_path, plain_run), trained(tmp_path, again, **given)]
    assert runs[1]._packing.layout == ("packed" if name == "llama" else "as_given")
    loss, weights = far(*runs)
    assert loss < 1e-6 and weights < 1e-4


def test_what_becomes_of_the_adapter_after_training_is_seen(tmp_path: Path) -> None:
    """Disabled, merged, scaled: evaluation is of the model as it is then."""
    runs = {}
    for layout in ("as_given", "packed"):
        trainer = trained(tmp_path, model_of("llama"), layout=layout)
        model = trainer.model
        found = [trainer.evaluate()["eval_loss"]]
        with model.disable_adapter():
            found.append(trainer.evaluate()["eval_loss"])
        model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] *= 9
        found.append(trainer.evaluate()["eval_loss"])
        model.merge_adapter()
        found.append(trainer.evaluate()["eval_loss"])
        model.unmerge_adapter()
        found.append(trainer.evaluate()["eval_loss"])
        runs[layout] = found
    assert len(set(runs["packed"])) >= 3
    assert runs["packed"] == pytest.approx(runs["as_given"], rel=1e-5)


@pytest.mark.parametrize("head", ["adapted", "trained"])
def test_a_head_that_learns_learns_the_same(head: str, tmp_path: Path) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(CONFIGS["llama"]())
        targets = ["q_proj", "lm_head"] if head == "adapted" else ["q_proj"]
        saved = None if head == "adapted" else ["lm_head"]
        config = LoraConfig(
            r=2, target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM"
        )
        return get_peft_model(base, config)

    runs = [trained(tmp_path, make(), layout=layout) for layout in ("as_given", "packed")]
    assert runs[1]._packing.runner.fused
    loss, weights = far(*runs)
    assert loss < 1e-6 and weights < 1e-4


def test_a_bf16_base_on_a_processor_without_bf16_multiplies_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulated, products would be some fifty times as slow. The base's tensors stay bf16."""
    monkeypatch.setattr(precision, "native_bf16", lambda _: False)
    model = llama(dtype=torch.bfloat16)
    before = fingerprint(model, trainable=False)
    trainer = trained(tmp_path, model)
    assert trainer._packing.runner.states.fused.dtype == torch.float32
    assert any("products run in fp32" in line for line in trainer._packing.notices)
    assert fingerprint(model, trainable=False) == before
    padded = trained(tmp_path, llama(dtype=torch.bfloat16), layout="as_given")
    assert far(padded, trainer)[0] < 2e-2
    monkeypatch.setattr(precision, "native_bf16", lambda _: True)
    cpu = precision.Precision(torch.device("cpu"))
    assert precision.products(cpu, torch.bfloat16) == torch.bfloat16
    assert precision.products(cpu, torch.float16) == torch.float32
    autocast = precision.Precision(torch.device("cpu"), torch.bfloat16)
    assert precision.products(autocast, torch.float32) == torch.bfloat16
    assert (
        precision.products(precision.Precision(torch.device("cuda")), torch.float16)
        == torch.float16
    )


# ---- where it cannot hold


class Mine(PadCollator):
    pass


def test_what_is_not_known_to_be_exact_is_run_as_given(tmp_path: Path) -> None:
    extra = [row | {"weight": 1.0} for row in plain(12)]
    recurrent = transformers.MambaConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    state_space = get_peft_model(
        transformers.MambaForCausalLM(recurrent),
        LoraConfig(r=2, target_modules=["in_proj"], task_type="CAUSAL_LM"),
    )
    dropping = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, attention_dropout=0.1)
    )
    dropping = get_peft_model(dropping, LoraConfig(r=2, task_type="CAUSAL_LM"))

    class Loss(lorafit.Trainer):
        def compute_loss(self, *given: Any, **more: Any) -> Any:
            return super().compute_loss(*given, **more)

    def stack(rows: list[Any]) -> Any:
        batch = PadCollator(0)([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        return batch | {"position_ids": torch.zeros_like(batch["input_ids"])}

    watched = llama()
    watched.get_base_model().model.embed_tokens.register_forward_hook(lambda *_: None)
    cases: dict[str, dict[str, Any]] = {
        "a module's forward is watched": {"model": watched},
        "compute_loss is yours": {"kind": Loss},
        "what Mine makes of a row may depend": {"data_collator": Mine(0)},
        "what stack makes of a row may depend": {"data_collator": stack},
        "NEFTune": {"neftune_noise_alpha": 5.0},
        "the base drops activations": {"model": dropping},
        "packed documents are off by": {"model": state_space},
    }
    for expected, given in cases.items():
        model = given.pop("model", None) or llama()
        trainer = trained(tmp_path, model, **given)
        assert trainer._packing.layout == "as_given"
        assert expected in reason(trainer)
    kept = trained(tmp_path, llama(), data_collator=transformers.default_data_collator,
                   train_dataset=[extra[0]] * 4, remove_unused_columns=True)  # fmt: skip
    assert kept._packing.layout == "packed"


def test_what_acts_on_nothing_is_said(tmp_path: Path) -> None:
    given = {"recompute": "half", "token_budget": 50}
    padded = trained(tmp_path, llama(), layout="as_given", **given)
    assert [line.split()[0] for line in padded._packing.notices] == [
        "recompute='half'", "token_budget",
    ]  # fmt: skip
    own = trained(tmp_path, model_of("gemma"), **given)
    assert any("recompute='half' acts on fused layers alone" in n for n in own._packing.notices)
    fused, memory = trained(tmp_path, llama(), **given)._packing.notices
    assert fused.startswith("layers run fused") and memory.startswith("memory: ")


def test_rows_with_more_than_ids_are_run_as_given(tmp_path: Path) -> None:
    """Positions are more, unless they count documents, which transformers keeps apart by them."""
    (row,) = plain(1)
    width = len(row["input_ids"])
    given = {"data_collator": transformers.default_data_collator}
    far_on = [row | {"position_ids": list(range(7, 7 + width))}] * 4
    trainer = trained(tmp_path, llama(), train_dataset=far_on, **given)
    assert "rows hold more than ids, mask and labels" in reason(trainer)
    two = [row | {"position_ids": [*range(5), *range(width - 5)]}] * 4
    runs = [trained(tmp_path, llama(), train_dataset=two, layout=layout, **given)
            for layout in ("packed", "as_given")]  # fmt: skip
    assert runs[0]._packing.layout == "packed" and far(*runs)[0] < 1e-6


def test_an_interrupt_between_packed_micro_batches_saves(tmp_path: Path) -> None:
    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **context):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(lorafit.errors.TrainingInterrupted):
        trained(tmp_path, llama(), callbacks=[Send()], token_budget=20)
    assert (tmp_path / "checkpoint-2").is_dir()


# ---- rows to examples


TOKENIZER = transformers.PreTrainedTokenizerFast


def tokenizer(side: str) -> Any:
    from tokenizers import Tokenizer, models

    made = TOKENIZER(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "[P]": 2}, unk_token="a")),
        pad_token="[P]",
    )
    made.padding_side = side
    return made


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["ours", "language", "seq2seq", "flattening", "padded"])
def test_a_row_in_a_batch_is_the_row_alone(kind: str, side: str) -> None:
    tokens = tokenizer(side)
    collators: dict[str, Any] = {
        "ours": lorafit.DataCollatorForLanguageModeling(tokens, mlm=False),
        "language": transformers.DataCollatorForLanguageModeling(tokens, mlm=False),
        "seq2seq": transformers.DataCollatorForSeq2Seq(tokens),
        "flattening": transformers.DataCollatorWithFlattening(),
        "padded": PadCollator(2, side=side, multiple_of=8),
    }
    rows = plain(4)
    if kind == "language":
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    collate = collators[kind]
    together = list(unpadded(collate([dict(row) for row in rows])))
    alone = [document for row in rows for document in unpadded(collate([dict(row)]))]
    assert len(together) == 4
    for one, other, row in zip(together, alone, rows, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)
        assert one.ids.tolist() == row["input_ids"][: len(one.ids)]
        assert one.tokens == len(row["input_ids"])


def test_rows_padded_beforehand_lose_their_padding() -> None:
    row = plain(1)[0]
    ids, labels = row["input_ids"], row["labels"]
    batch = {
        "input_ids": torch.tensor([[0, 0, *ids, 0]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * len(ids), 0]]),
        "labels": torch.tensor([[-100, -100, *labels, -100]]),
    }
    (document,) = unpadded(batch)
    assert document.ids.tolist() == ids[:-1] and document.targets.tolist() == labels[1:]
    assert document.tokens == len(ids)


def test_a_mask_with_holes_is_refused() -> None:
    batch = PadCollator(0)(plain(1))
    batch["attention_mask"][0, 3] = 0
    with pytest.raises(DataError, match="zeros between ones"):
        list(unpadded(batch))


def test_nothing_is_run_that_predicts_nothing_supervised() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100, -100], [9, -100, -100, -100, -100], [1] * 5]),
    }
    (laid,) = packed([batch], budget=99)
    assert laid.inputs["input_ids"].tolist() == [1, 1, 1, 1, 5, 6]
    assert laid.inputs["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert laid.inputs["rows"].tolist() == [0, 1, 2, 3, 5]
    assert laid.inputs["targets"].tolist() == [1, 1, 1, 1, 7]
    assert (laid.supervised, laid.tokens, laid.positions, laid.rows) == (5, 15, 6, 3)


def test_a_step_without_supervision_still_has_a_micro_batch() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.full((2, 3), -100)}
    (laid,) = packed([batch], budget=99)
    assert (laid.supervised, laid.tokens, laid.positions, laid.rows) == (0, 6, 1, 2)


def test_documents_are_values() -> None:
    assert Document(torch.ones(1), torch.ones(1), 1).tokens == 1


@pytest.mark.parametrize("seed", range(20))
def test_bins_hold_each_length_once_and_little_air(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 120, (60,), generator=generator).tolist()
    bins = best_fit(lengths, budget=100)
    assert sorted(index for members in bins for index in members) == list(range(60))
    sums = [sum(lengths[index] for index in members) for members in bins]
    assert all(total <= 100 or len(members) == 1
               for total, members in zip(sums, bins, strict=True))  # fmt: skip
    # best fit decreasing needs at most 11/9 of the fewest bins, and one (Johnson 1973)
    assert len(bins) <= 11 / 9 * -(-sum(min(length, 100) for length in lengths) // 100) + 1 + sum(
        length > 50 for length in lengths
    )
