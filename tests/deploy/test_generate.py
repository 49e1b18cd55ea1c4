"""Answers: the likeliest tokens in any batch, stopped where they should be; nothing disturbed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from lorafit.arguments import ModelArguments
from lorafit.deploy import generate as deploy
from lorafit.deploy.generate import Answer, Sampling, generate
from lorafit.errors import UsageError
from lorafit.model import adapters, base, tokens

ONCE = "Once upon a time"
PROMPTS = [ONCE, "Lily", "One day, a little girl named Lily found a needle in her", "The"]


@pytest.fixture
def stories(shared: Path) -> str:
    return str(shared / "models" / "stories260K")


@pytest.fixture
def model(stories: str) -> Any:
    return base.load_model(ModelArguments(model=stories))


@pytest.fixture
def tokenizer(stories: str) -> Any:
    return tokens.load_tokenizer(stories)


def ask(model: Any, tokenizer: Any, prompts: list[str], **changes: Any) -> list[Answer]:
    settings = {"is_chat": False, "stops": (1, 2), "sampling": Sampling(24)} | changes
    return generate(model, tokenizer, prompts=prompts, **settings)


def likeliest(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The greedy continuation, one whole forward per token."""
    ids = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_answers_are_the_likeliest_tokens_in_any_company(model: Any, tokenizer: Any) -> None:
    answers = ask(model, tokenizer, PROMPTS)
    alone = [ask(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert answers == alone
    for prompt, given in zip(PROMPTS, answers, strict=True):
        assert given == Answer(likeliest(model, tokenizer, prompt, 24), 24, stopped=False)


def test_more_prompts_than_a_batch_keep_their_order(model: Any, tokenizer: Any) -> None:
    many = [PROMPTS[index % 4] for index in range(deploy.BATCH + 3)]
    answers = ask(model, tokenizer, many, sampling=Sampling(4))
    assert [given.text for given in answers] == [
        ask(model, tokenizer, [prompt], sampling=Sampling(4))[0].text for prompt in many
    ]
    assert ask(model, tokenizer, []) == []


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(model: Any, tokenizer: Any) -> None:
    (whole,) = ask(model, tokenizer, [ONCE])
    (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"][-1:]
    answers = ask(model, tokenizer, PROMPTS, stops=(stop,))
    assert answers[0].stopped
    assert answers[0].tokens < whole.tokens
    assert whole.text.startswith(answers[0].text)
    assert "." not in answers[0].text
    assert not ask(model, tokenizer, [ONCE], stops=())[0].stopped


def test_an_answer_ends_where_the_context_does(model: Any, tokenizer: Any) -> None:
    def length(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) + 1  # BOS

    fits = ONCE
    while length(fits) < 500:
        fits += " time"
    (given,) = ask(model, tokenizer, [fits], stops=())
    assert given.tokens == 512 - length(fits) < 24
    long = fits + fits
    with pytest.raises(UsageError, match=rf"Prompt 2 has {length(long)} tokens; .* is 512"):
        ask(model, tokenizer, [ONCE, long])


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="Prompt 1 is empty"):
        deploy._check_room([[]], 10)


def test_drawing_follows_the_seed_and_leaves_the_generator_alone(
    model: Any, tokenizer: Any
) -> None:
    def drawn(seed: int) -> list[Answer]:
        return ask(model, tokenizer, PROMPTS, sampling=Sampling(24, temperature=1.0, seed=seed))

    state = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_said_and_nothing_is_changed(model: Any, tokenizer: Any, capfd) -> None:
    model.train()
    model.generation_config.update(temperature=0.6, top_p=0.9, repetition_penalty=5.0, max_length=9)
    settings = model.generation_config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = ask(model, tokenizer, [ONCE])
        ask(model, tokenizer, [ONCE], sampling=Sampling(4, temperature=0.8))
    assert answers[0].text == likeliest(model.eval(), tokenizer, ONCE, 24)
    assert model.train().generation_config.to_dict() == settings
    assert capfd.readouterr() == ("", "")


def test_a_model_in_training_is_asked_in_eval_mode(tokenizer: Any) -> None:
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config).train()  # with dropout
    assert ask(model, tokenizer, PROMPTS) == ask(model, tokenizer, PROMPTS)
    assert model.training


# ---- adapters ----------------------------------------------------------------------------------


@pytest.fixture
def saved(model: Any, tokenizer: Any, stories: str, tmp_path: Path) -> str:
    torch.manual_seed(0)
    tuned = adapters.attach(model, ModelArguments(model=stories))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    contract = {"shape": "raw", "stop_ids": [2]}
    adapters.save_adapter(tuned, tmp_path / "a", tokenizer=tokenizer, contract=contract)
    return str(tmp_path / "a")


def test_base_and_tuned_answer_in_turn(saved: str, stories: str, tokenizer: Any) -> None:
    tuned = deploy.open_adapter(saved)
    alone = base.load_model(ModelArguments(model=stories))
    before = deploy.answer(tuned, PROMPTS, sampling=Sampling(24))
    plain = deploy.answer_with_base(tuned, PROMPTS, sampling=Sampling(24))
    assert plain == ask(alone, tokenizer, PROMPTS, stops=(2,)) != before
    assert deploy.answer(tuned, PROMPTS, sampling=Sampling(24)) == before


def test_the_contract_says_how_to_ask(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = deploy.open_adapter(saved)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(deploy, "generate", lambda *_, **settings: asked.update(settings))
    deploy.answer(tuned, [ONCE])
    assert (asked["is_chat"], asked["stops"]) == (False, [2])
    tuned.contract.clear()
    tuned.tokenizer.chat_template = "{{ messages[0].content }}{{ eos_token }}"
    tuned.contract["shape"] = "raw"
    deploy.answer(tuned, [ONCE])
    assert (asked["is_chat"], asked["stops"]) == (False, (2,))
