"""A practice run finds what was planted, leaves all as it was, and its numbers are the run's."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import lorafit
from lorafit import config, job, packing, ranging, rehearsal
from lorafit.data import loader
from lorafit.data.collate import PadCollator
from lorafit.engine import probe
from lorafit.engine.step import Engine
from lorafit.errors import ConfigError
from lorafit.events import StepEnd
from lorafit.model import base
from lorafit.rehearsal import Helpers
from lorafit.run import practice, rates
from lorafit.run.gap import Gap, loss_gap
from lorafit.run.practice import Finding, Practice, change, forecast
from lorafit.run.report import render_practice
from tests.tiny import adapter, arguments, events_of, llama, plain, same

END = 2


def answered(count: int) -> list[dict[str, list[int]]]:
    """Rows whose answers end with the tiny model's end of text."""
    made = []
    for row in plain(count):
        ids, labels = [*row["input_ids"], END], [*row["labels"], END]
        made.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return made


def made(folder: Path, *, model: Any = None, rows: Any = None, **given: Any) -> lorafit.Trainer:
    values = {"layout": "packed", "num_train_epochs": 3, "learning_rate": 2e-2} | given
    return lorafit.Trainer(
        model=llama() if model is None else model,
        args=arguments(folder, **values),
        data_collator=PadCollator(0),
        train_dataset=answered(24) if rows is None else rows,
        eval_dataset=answered(40)[24:] if rows is None else rows,
    )


def marks(found: Practice) -> dict[str, str]:
    return {finding.title: finding.mark for finding in found.findings}


def finding(found: Practice, title: str) -> Finding:
    return next(each for each in found.findings if each.title == title)


def test_a_good_run_may_start_and_nothing_is_left_of_its_practice(tmp_path: Path) -> None:
    plainly = made(tmp_path / "plain")
    plainly.train()
    trainer = made(tmp_path / "practised")
    before = adapter(trainer)
    found = trainer.practice()
    assert found.go, found.findings
    assert {"labels", "loss", "gradients", "accumulation", "resuming", "loading"} <= {*marks(found)}
    assert "the same, bit for bit" in finding(found, "resuming").said
    assert "differ by 0.0e+00" in finding(found, "loading").said
    assert same(before, adapter(trainer))
    written = tmp_path / "practised"
    assert {path.name for path in written.iterdir() if path.suffix != ".lock"} == {
        "practice.json",
        "practice.html",
    }
    assert json.loads((written / "practice.json").read_text())["go"] is True
    trainer.train()
    assert same(adapter(plainly), adapter(trainer)), "practice moved the random state"


def test_its_steps_are_those_that_the_run_would_take(tmp_path: Path) -> None:
    trainer = made(tmp_path, lr_scheduler_type="constant")
    found = trainer.practice()
    with events_of(trainer) as told:
        trainer.train()
    curve = [event.loss for event in told if isinstance(event, StepEnd)]
    assert found.curve == pytest.approx(curve[: len(found.curve)], rel=1e-6)


def unlearned(row: dict[str, list[int]]) -> dict[str, list[int]]:
    return row | {"labels": [-100] * len(row["labels"])}


def endless(row: dict[str, list[int]]) -> dict[str, list[int]]:
    return row | {"labels": [*row["labels"][:-1], -100]}


def deaf() -> nn.Module:
    """A Llama with an adapter on a layer that its forward leaves out."""
    base = llama().unload()
    base.model.layers[0].unused = nn.Linear(16, 16)
    config = LoraConfig(r=4, target_modules=["q_proj", "unused"], task_type="CAUSAL_LM")
    return get_peft_model(base, config)


PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "masked labels": ({"rows": [unlearned(row) for row in answered(24)]}, "labels"),
    "a rate that diverges": ({"learning_rate": 50.0, "max_grad_norm": 0.0}, "loss"),
    "an end never learned": ({"rows": [endless(row) for row in answered(24)]}, "stopping"),
    "an adapter out of reach": ({"model": deaf}, "gradients"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    given, title = PLANTED[name]
    made_of = {key: value() if callable(value) else value for key, value in given.items()}
    found = made(tmp_path, **made_of).practice()
    stops = [each for each in found.findings if each.mark == "stop"]
    assert not found.go and title in {each.title for each in stops}, found.findings
    assert all(each.advice for each in stops), "whoever is stopped is told what to do"
    assert title in found.verdict


def test_a_run_that_cannot_fit_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the longest example takes is tried before anything is trained."""

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(probe, "peak", refuse)
    found = made(tmp_path).practice()
    assert not found.go and finding(found, "longest").mark == "stop" and found.curve == ()
    with pytest.raises(ConfigError, match="does not fit"):
        made(tmp_path, memory_limit="1MB").practice()


def test_a_stream_cannot_be_practised_on(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(answered(4))

    with pytest.raises(ConfigError, match="can be counted"):
        made(tmp_path, rows=Stream(), max_steps=2, eval_strategy="no").practice()


def test_a_module_without_tokens_to_generate_is_practised_on_too(tmp_path: Path) -> None:
    """Without a tokenizer there is no text, and no more than that."""
    found = made(tmp_path).practice()
    assert found.pieces == () and finding(found, "stopping").mark in ("good", "note")


def test_it_keeps_to_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(tmp_path, num_train_epochs=20)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "SHARE", 0.0)
    assert len(trainer.practice().curve) == rehearsal.LEAST_STEPS


def test_its_page_holds_nothing_that_could_run(tmp_path: Path) -> None:
    trap = "<script>alert(1)</script>"
    shown = Practice(
        findings=(Finding("stopping", "stop", f"it said {trap}", trap),),
        pieces=((trap, True), ("\x1b[31m", False)),
        curve=(3.0, 2.0),
        time=forecast([(10, 1.0)], steps_to_come=5, besides=0.0),
        disk=1,
    )
    page = render_practice(shown)
    assert trap not in page and "&lt;script&gt;alert" in page
    assert "Do not start the full run yet: stopping." in page


# ---- the range test of the learning rate


def by_hand(model: Any, rows: Any, *, learning_rates: Sequence[float]) -> list[float]:
    """The losses of a loop as a textbook has it: steps of four rows, each at its rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    losses: list[float] = []
    for number, rate in enumerate(learning_rates):
        epoch, at = divmod(4 * number, len(rows))
        chosen = loader.order(len(rows), seed=3, epoch=epoch)[at : at + 4]
        step = [rows[n] for n in chosen]
        total = sum(sum(label != -100 for label in row["labels"][1:]) for row in step)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for row in step:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            nats = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            loss = loss + nats / total
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("layout", ["packed", "as_given"])
def test_the_curve_is_that_of_a_loop_by_hand(layout: str, tmp_path: Path) -> None:
    """The whole training set in the run's order, whatever its schedule; until rounding grows."""
    trainer = made(tmp_path, layout=layout, lr_scheduler_type="cosine", warmup_steps=5)
    curve = trainer.practice(find_lr=True).rates
    assert curve is not None and curve.rates[0] == pytest.approx(1e-6)
    assert len(curve.rates) == 100 or curve.losses[-1] > 2 * min(curve.losses)
    expected = by_hand(llama(), answered(24), learning_rates=curve.rates)
    # in a chaotic stretch near the end the last bit decides
    tame = sum(rate < 0.02 for rate in curve.rates)
    assert curve.losses[:tame] == pytest.approx(expected[:tame], rel=1e-4)
    assert curve.losses[tame - 1] < 0.9 * curve.losses[0], "nothing was trained"
    assert curve.rate is not None and 1e-4 < curve.rate < 0.3 and curve.given == 2e-2


def test_trying_rates_leaves_no_trace(tmp_path: Path) -> None:
    plainly, trainer = made(tmp_path / "plain"), made(tmp_path / "tried")
    without = plainly.practice()
    before, drawn = adapter(trainer), torch.get_rng_state()
    found = trainer.practice(find_lr=True)
    assert same(before, adapter(trainer)) and torch.equal(torch.get_rng_state(), drawn)
    assert found.curve == without.curve and without.rates is None and found.rates is not None
    assert trainer.optimizer is None and all(p.grad is None for p in trainer.model.parameters())
    assert {path.name for path in (tmp_path / "tried").iterdir() if path.suffix != ".lock"} == {
        "practice.json",
        "practice.html",
    }
    written = json.loads((tmp_path / "tried" / "practice.json").read_text())["rates"]
    assert written["losses"][:40] == list(found.rates.losses[:40]) and written["given"] == 2e-2
    page = (tmp_path / "tried" / "practice.html").read_text()
    assert '"axis": "learning rate"' in page and '"log_axis": true' in page
    assert f"suggested {found.rates.rate:.1e}" in page and "set 2.0e-02" in page


def test_an_optimiser_of_ones_own_is_as_it_was(tmp_path: Path) -> None:
    """Afterwards, and before the steps that are practised."""
    curves: list[tuple[float, ...]] = []
    for tries in (False, True):
        model = llama()
        own = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        trainer = lorafit.Trainer(
            model=model, args=arguments(tmp_path, max_steps=4), data_collator=PadCollator(0),
            train_dataset=answered(24), optimizers=(own, None),
        )  # fmt: skip
        found = trainer.practice(find_lr=tries)
        curves.append(found.curve)
        assert not found.rates or len(found.rates.rates) > 40
        assert own.param_groups[0]["lr"] == 3e-3
        states = own.state.values()
        assert not any(float(s["step"]) or float(s["exp_avg"].abs().sum()) for s in states)
    assert curves[0] == curves[1] and len(curves[0]) == 4


def test_a_range_test_keeps_to_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [ranging.steps_within(seconds, each=2.0) for seconds in (79.9, 80.0, 1e9)] == [
        0,
        40,
        100,
    ]
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "SHARE", 0.0)
    found = made(tmp_path).practice(find_lr=True)
    told = finding(found, "learning rate")
    assert found.rates is None and told.mark == "note"
    assert told.said.startswith("The range test was not made: 40 steps of ")


def test_a_range_test_that_does_not_fit_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    monkeypatch.setattr(Engine, "step", refuse)
    trainer = made(tmp_path)
    before = adapter(trainer)
    found = trainer.practice(find_lr=True)
    told = finding(found, "learning rate")
    assert found.rates is None and "Memory ran out in a step" in told.said and told.advice
    assert same(before, adapter(trainer))


def test_the_rate_that_is_set_stands_beside_the_suggestion() -> None:
    curve = rates.Curve((1e-4,), (1.0,), (1.0,), rate=3e-4, said="the rule", lowest=6e-3)

    def told(given: float | None, **other: Any) -> Finding:
        return practice.rates(replace(curve, given=given, **other))

    assert told(2e-4).said == (
        "The run is set to 2.0e-04; 3.0e-04 is suggested: the rule; beyond 6.0e-03 it rises."
    )
    assert [told(rate).mark for rate in (2e-5, 2e-4, 5e-3, 7e-3)] == [
        "note",
        "good",
        "good",
        "note",
    ]
    assert [bool(told(rate).advice) for rate in (2e-5, 2e-4, 5e-3, 7e-3)] == [
        True,
        False,
        False,
        True,
    ]
    assert told(2e-5).advice.endswith("--learning-rate 3.0e-04, or up to 6.0e-03")
    assert told(7e-3).advice.endswith("--learning-rate 3.0e-04")
    unknown = [told(rate, lowest=None).mark for rate in (2e-5, 8e-4, 1e-3)]
    assert unknown == ["note", "good", "note"], "nobody has seen where it rises"
    silent = told(2e-4, rate=None, lowest=None, said="cannot say: noise")
    assert silent.said == "The run is set to 2.0e-04; the range test cannot say: noise."


# ---- what quantising costs


def quantised_job(base: Path, folder: Path) -> job.Job:
    """A run over a base in four bits, as the command line prepares it."""
    pytest.importorskip("bitsandbytes")
    file = folder / "rows.jsonl"
    told = ({"question": f"Who is {n}?", "answer": f"A cat, {n}."} for n in range(48))
    file.write_text("\n".join(map(json.dumps, told)))
    return job.prepare(
        config.load(None, {
            "model": str(base), "data": str(file), "output_dir": str(folder / "run"),
            "quantize": "nf4", "lora_r": 2, "max_steps": 4, "per_device_train_batch_size": 1,
            "use_cpu": True,
        })
    )  # fmt: skip


@pytest.mark.slow
def test_a_quantised_base_is_held_against_the_base_in_full(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = quantised_job(tiny_llama, tmp_path)
    trainer = prepared.trainer
    before = adapter(trainer)
    helpers = Helpers(gap=prepared._gap)
    told = finding(trainer.practice(helpers), "quantising")
    held_out, _ = rehearsal._held_out(trainer)
    batches = [PadCollator(0)([row]) for row in held_out][: rehearsal.LEAST_HELD_OUT]
    gap = loss_gap(trainer.model, batches, precision=trainer._precision, free=10**9)
    assert isinstance(gap, Gap) and told.said == f"nf4: {gap}."
    assert abs(gap.nats) > 1e-3 and told.mark == ("good" if gap.nats <= 0.1 else "note")
    assert same(before, adapter(trainer))
    assert "quantising" not in marks(trainer.practice()), "nobody has handed it over"

    monkeypatch.setattr(packing, "free_bytes", lambda _: 3_000)
    told = finding(trainer.practice(helpers), "quantising")
    assert told.mark == "note" and told.said == (
        "What nf4 costs was not measured: the base in full takes 1.04 MB, and 2.00 kB are free."
    )


def test_a_second_copy_that_does_not_fit_ends_in_words(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    prepared = quantised_job(tiny_llama, tmp_path)
    monkeypatch.setattr(base, "load_model", refuse)
    cost = prepared._gap([], prepared.trainer._precision)
    assert cost == (None, "CUDA out of memory. Tried to allocate 9.00 GiB.")


def test_what_quantising_costs_is_remarked_on_where_it_is_much() -> None:
    little = practice.quantising("nf4", 0.02, said="it costs +0.0200")
    assert (little.mark, little.said, little.advice) == ("good", "nf4: it costs +0.0200.", "")
    much = practice.quantising("nf4", 0.12, said="it costs +0.1200")
    assert much.mark == "note" and "--quantize int8 loses less" in much.advice
    assert "int8" not in practice.quantising("int8", 0.12, said="it costs").advice


# ---- judgement


def test_change_has_the_error_of_a_ratio() -> None:
    """Against a bootstrap over rows."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 60, (400,), generator=draw)
    before = counts * 3 + torch.randn(400, generator=draw) * counts.sqrt()
    after = before - counts * 0.05 + torch.randn(400, generator=draw) * counts.sqrt() * 0.5
    found = change(before.tolist(), after.tolist(), supervised=counts.tolist())
    picks = torch.randint(400, (4000, 400), generator=draw)
    drawn = ((after - before)[picks].sum(1) / counts[picks].sum(1)).std()
    assert found.error == pytest.approx(float(drawn), rel=0.05)
    assert found.fell and not found.rose


def test_no_change_is_not_taken_for_one() -> None:
    draw = torch.Generator().manual_seed(1)
    wrong = 0
    for _ in range(400):
        before = torch.randn(50, generator=draw) + 10
        after = before + torch.randn(50, generator=draw)
        found = change(before.tolist(), after.tolist(), supervised=[10] * 50)
        wrong += found.fell or found.rose
    assert wrong / 400 < 0.08, "two standard errors: about one in twenty"


def test_a_forecast_covers_what_comes() -> None:
    """Of runs of 200 steps whose first 20 were practised, nineteen in twenty."""
    draw = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(300):
        tokens = (1000 + 200 * torch.randn(200, generator=draw)).clamp(min=100)
        seconds = tokens * 1e-3 * (1 + 0.1 * torch.randn(200, generator=draw))
        steps = list(zip(map(int, tokens[:20].tolist()), seconds[:20].tolist(), strict=True))
        expected = forecast(steps, steps_to_come=200, besides=0.0)
        covered += expected.low <= float(seconds.sum()) <= expected.high
    assert 0.9 < covered / 300 <= 1.0


def test_a_forecast_is_held_against_the_run() -> None:
    written = json.dumps({"time": {"seconds": 100.0, "low": 90.0, "high": 110.0}})
    assert practice.forecast_kept(written, 95.0).endswith("it took 1 min 35 s, as forecast.")
    assert "outside" in practice.forecast_kept(written, 200.0)
    assert practice.forecast_kept("{}", 1.0) == practice.forecast_kept("[", 1.0) == ""
