"""From files to sets, and the report on them: what would hurt is found and named."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorafit.arguments import DataArguments
from lorafit.data import cache, sets
from lorafit.data.audit import Audit, audit
from lorafit.data.sets import Maker, Sets
from lorafit.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2.5")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))


def pairs(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make(tokenizer: Any, *, limit: int | None = None, **given: Any) -> Sets:
    maker = Maker(DataArguments(**given), tokenizer, identity="qwen", limit=limit)
    return sets.make(maker, seed=3)


def report(tokenizer: Any, made: Sets) -> Audit:
    return audit(made, tokenizer, batch_size=2)


TWENTY = pairs(*((f"What is {n} + {n}?", str(2 * n)) for n in range(20)))


def test_a_clean_set_has_nothing_that_would_hurt(tokenizer: Any, tmp_path: Path) -> None:
    made = make(tokenizer, data=write(tmp_path / "a.jsonl", TWENTY), eval_share=0.2)
    found = report(tokenizer, made)
    assert (found.harms, found.shared, found.same_prompt) == ((), 0, 0)
    assert found.evaluation is not None
    assert (found.train.examples, found.evaluation.examples) == (16, 4)
    lengths = [len(made.train[n]["input_ids"]) for n in range(16)]
    shape = found.train.lengths
    assert (shape.shortest, shape.longest, sum(shape.counts)) == (min(lengths), max(lengths), 16)
    assert found.train.tokens == sum(lengths)
    learned = [sum(y != -100 for y in made.train[n]["labels"]) for n in range(16)]
    assert found.train.supervised == sum(learned)
    assert found.sources == (f"{tmp_path / 'a.jsonl'}: 20 rows",)
    assert found.shown[-2][1] and found.shown[-2][0].endswith("<|im_end|>")
    assert json.loads(json.dumps(found.as_dict()))["train"]["examples"] == 16


def test_leaks_and_copies_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [*TWENTY, TWENTY[0], TWENTY[1]])
    other = pairs(("What is 3 + 3?", "six"))
    held = write(tmp_path / "b.jsonl", [TWENTY[0], *other, *pairs(("Who?", "me"))])
    found = report(tokenizer, make(tokenizer, data=train, eval_data=held))
    assert (found.shared, found.same_prompt, found.train.repeated) == (1, 2, 2)
    (harm,) = found.harms
    assert harm.startswith("1 evaluation examples are trained on too")
    assert "2 training examples are exact copies of earlier ones" in found.remarks
    assert "1 evaluation prompts are trained on with another answer" in found.remarks


def test_lost_stops_and_answers_would_hurt(tokenizer: Any, tmp_path: Path) -> None:
    rows = pairs(("Hi", "word " * 40), ("Hi", "short"))
    made = make(tokenizer, data=write(tmp_path / "a.jsonl", rows), eval_share=0.0, max_length=60)
    assert [harm.split(":")[0] for harm in report(tokenizer, made).harms] == [
        "1 learned stretches do not end with a stop token, so the model may not learn to stop"
    ]
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b")) * 9]
    file = write(tmp_path / "b.jsonl", [{"messages": turns}])
    made = make(tokenizer, data=file, eval_share=0.0, max_length=60)
    assert any("rows lost an answer" in harm for harm in report(tokenizer, made).harms)


def test_token_rows_without_an_end_would_hurt(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_BLOCK", 1)
    file = write(tmp_path / "a.jsonl", [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 151645]}])
    found = report(tokenizer, make(tokenizer, data=file, eval_share=0.0))
    assert found.train.without_stop == 1
    assert "end them with the tokenizer's end-of-text token" in found.harms[0]


def test_what_is_not_read_is_said(tokenizer: Any, tmp_path: Path) -> None:
    rows = [row | {"id": "7", "hint": ""} for row in TWENTY]
    found = report(tokenizer, make(tokenizer, data=write(tmp_path / "a.jsonl", rows)))
    assert "not read, nor learned: id" in found.remarks


def test_common_texts_are_learned_and_copies_are_not_held_against_themselves(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [*TWENTY, *pairs(("Hi", "I do not know.")) * 20]
    for seed in range(3):
        maker = Maker(
            DataArguments(data=write(tmp_path / "a.jsonl", rows)),
            tokenizer,
            identity="",
            limit=None,
        )
        made = sets.make(maker, seed=seed)
        assert made.evaluation is not None and len(made.train) >= 36
        assert report(tokenizer, made).shared == 0
    same = write(tmp_path / "b.jsonl", pairs(("Hi", "Hello")) * 3)
    with pytest.raises(DataError, match=r"3 rows cannot be split .*: 1 of them are different"):
        make(tokenizer, data=same)


def test_evaluation_data_has_splits_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    for name, number in (("train", 0), ("test", 1), ("dev", 2)):
        write(tmp_path / f"{name}.jsonl", TWENTY[: 10 + number])
    train = write(tmp_path / "other.json", TWENTY)
    for wanted, count in (({}, 12), ({"eval_split": "test"}, 11), ({"split": "train"}, 12)):
        made = make(tokenizer, data=train, eval_data=str(tmp_path), **wanted)
        assert made.evaluation is not None and len(made.evaluation) == count


def test_ids_of_another_tokenizer_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    for wrong in (200_000, -6, 2**40):
        file = write(tmp_path / "a.jsonl", [{"input_ids": [5, wrong]}])
        with pytest.raises(DataError, match=f"a.jsonl:1: the ids lie between .*{wrong}"):
            make(tokenizer, data=file, eval_share=0.0)


def test_skipped_rows_are_counted_and_named(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*TWENTY, {"question": "Hi", "answer": ""}])
    with pytest.raises(DataError, match=r"a.jsonl:21: 'answer' is empty"):
        make(tokenizer, data=file)
    found = report(tokenizer, make(tokenizer, data=file, skip_bad_rows=True))
    assert found.sources[0].endswith(
        "20 rows; 1 skipped: a.jsonl:21: 'answer' is empty, and it is what should be learned."
    )


def test_another_shape_in_the_middle_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*TWENTY, {"text": "Once"}])
    with pytest.raises(DataError, match=r"a.jsonl:21: this row has no 'question'"):
        make(tokenizer, data=file)


def test_several_sets_with_weights(tokenizer: Any, tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.jsonl", TWENTY[start:end])
            for name, start, end in (("a", 0, 12), ("b", 12, 20)))  # fmt: skip
    made = make(tokenizer, data=f"{a},{b}", data_weights="2,0.5", eval_share=0.0)
    assert len(made.train) == 2 * 12 + 4
    again = make(tokenizer, data=f"{a},{b}", data_weights="2,0.5", eval_share=0.0)
    assert [made.train[n] for n in range(28)] == [again.train[n] for n in range(28)]
    for weights in ("1", "1,0", "1,x"):
        with pytest.raises(ConfigError, match="data_weights"):
            make(tokenizer, data=f"{a},{b}", data_weights=weights)


def test_answers_of_one_conversation_stay_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ("
        "'<think>\n' if m.role == 'assistant' and loop.last else '') + m.content }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    turns = [
        {"messages": [{"role": r, "content": f"{c}{n}"} for r, c in (("user", "a"),
         ("assistant", "b"), ("user", "c"), ("assistant", "d"))]}
        for n in range(10)
    ]  # fmt: skip
    made = make(tokenizer, data=write(tmp_path / "a.jsonl", turns), eval_share=0.3)
    tokenizer.chat_template = own
    held = made.evaluation
    assert held is not None and (len(made.train), len(held)) == (14, 6)
    sides = [
        {int(stored.rows[number]) for stored, numbers in side.parts for number in numbers}
        for side in (made.train, held)
    ]
    assert sides[0].isdisjoint(sides[1])
    assert "10 became one example for each answer" in str(made.reads[0].report)


def test_rows_are_limited_after_the_split(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TWENTY)
    made = make(tokenizer, data=file, eval_share=0.5, max_rows=4, max_eval_rows=2)
    assert made.evaluation is not None
    assert (len(made.train), len(made.evaluation)) == (4, 2)


def test_the_models_context_is_the_longest_example(tokenizer: Any, tmp_path: Path) -> None:
    rows = pairs(("Hi", "word " * 40))
    made = make(tokenizer, data=write(tmp_path / "a.jsonl", rows), eval_share=0.0, limit=50)
    assert len(made.train[0]["input_ids"]) == 50


def test_copies_are_held_back_together(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", TWENTY * 3)
    found = report(tokenizer, make(tokenizer, data=file, eval_share=0.1))
    assert found.evaluation is not None and found.evaluation.examples % 3 == 0
    assert (found.shared, found.train.examples + found.evaluation.examples) == (0, 60)
