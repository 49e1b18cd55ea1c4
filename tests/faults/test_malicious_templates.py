"""Templates, states of callbacks and names that were made to do harm, where a person meets them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from lorafit.arguments import ModelArguments
from lorafit.deploy import generate
from lorafit.errors import ConfigError, DataError, LorafitError, ModelError, shown
from lorafit.model import adapters, base, tokens
from lorafit.run import callbacks
from tests import tiny

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = [
    LOOP,
    "{{ 'a' * 2000000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{% if strftime_now('%Y') != '%Y' %}" + LOOP + "{% endif %}",
    "{% if range(2)|random >= 0 %}{{ messages[0].content }}{% endif %}",
    "{% if documents is defined %}" + LOOP + "{% endif %}",
    "{%+ generation %}" + LOOP + "{% endgeneration %}",
    "{% if 'Lily' in messages[0].content %}" + LOOP + "{% endif %}",
]


@pytest.fixture(scope="module")
def tuned(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tuned")
    stories = str(shared / "models" / "stories260K")
    given = ModelArguments(model=stories, lora_r=2)
    model = adapters.attach(base.load_model(given), given)
    contract = {"shape": "chat", "stop_ids": [2]}
    adapters.save_adapter(
        model, folder, tokenizer=tokens.load_tokenizer(stories), contract=contract
    )
    return generate.open_adapter(str(folder))


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_template_hangs_or_escapes_generation(
    tuned: Any, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lorafit.data.sandbox.SECONDS", 1)
    tuned.tokenizer.chat_template = template
    begun = time.process_time()
    with pytest.raises((ModelError, DataError), match="template"):
        generate.answer(tuned, ["Lily"], sampling=generate.Sampling(max_new_tokens=1))
    assert time.process_time() - begun < 2  # of this process: the child's own is limited
    assert not list(tmp_path.iterdir())


def test_a_state_sets_only_what_the_callback_wrote(tmp_path: Path) -> None:
    stopping = EarlyStoppingCallback(3)
    trainer = tiny.make(tmp_path, callbacks=[stopping])
    state = {
        "args": {"early_stopping_patience": 7, "early_stopping_threshold": "os.system"},
        "attributes": {"early_stopping_patience_counter": 2, "on_step_end": "evil", "__class__": 1},
    }
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"stateful_callbacks": {"EarlyStoppingCallback": state}}))
    trainer._callbacks.resume(file)
    assert vars(stopping) == {
        "early_stopping_patience": 7,
        "early_stopping_threshold": 0.0,
        "early_stopping_patience_counter": 2,
    }


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"on_train_begin": 1}', '{"log_history": "x"}', '{"a":' * 90_000,
     '{"stateful_callbacks": [1]}'],
)  # fmt: skip
def test_what_is_no_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ConfigError, match="is not the state of a run"):
        callbacks._read_state(tmp_path / "s.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not the state of a run"):
        callbacks._read_state(tmp_path / "pipe")


HOSTILE = "\x1b[2J\rdone\nerror: \u202eevil\x07\x9b31m\udc80\u2028"


def test_what_people_named_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    errors = [LorafitError(HOSTILE, why=HOSTILE, fix=["a", HOSTILE])]
    for call in (
        lambda: adapters.load_tuned(tmp_path / HOSTILE[:8]),
        lambda: tokens.load_tokenizer(HOSTILE),
        lambda: adapters._home(tmp_path, "../" + HOSTILE),
        lambda: __import__("lorafit.config").config.load(None, {HOSTILE: 1}),
        lambda: __import__("lorafit.config").config.load(None, {"optim": HOSTILE}),
        lambda: __import__("lorafit.data.read").data.read.locate(HOSTILE),
    ):
        with pytest.raises(LorafitError) as raised:
            call()
        errors.append(raised.value)
    for error in errors:
        assert all(map(str.isprintable, str(error).split("\n"))), repr(str(error))
        assert not any(line.startswith("error: ") for line in str(error).split("\n"))
    assert shown("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"
