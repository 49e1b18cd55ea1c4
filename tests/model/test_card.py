"""The card says what people's files are called, and does nothing of what they say."""

import re

import pytest
import yaml

from lorafit.model.card import model_card

HOSTILE = [
    "<script>alert(1)</script>",
    "a: b\n---\n# evil\n<img src=x onerror=y>",
    "---",
    "x | y](javascript:z) ![i](http://evil)",
    "!!python/object/apply:os.system [x]",
    "&a *a",
    "\x1b[2J\u202e\udc80 #",
    "'\"{[",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_wherever_it_stands(name: str) -> None:
    contract = {"base": {"name": name, "parameters": 7, "dtype": name}, "data": {"rows": name}}
    card = model_card(contract, about={"datasets": [name], "license": name})
    card.encode("utf-8")
    start, front, body = (
        card.split("\n---\n", 2)[0],
        *card.removeprefix("---\n").split("\n---\n", 1),
    )
    assert start.startswith("---\n")
    read = yaml.safe_load(front)
    assert read["library_name"] == "peft" and read["license"] == read["datasets"][0] == name
    assert all(sign not in body for sign in ("<script", "<img", "\x1b", "\n# evil", "\n---"))
    assert not re.search(r"(?<!\\)[\[\]|]\S*\(", body)
    assert body.count("\n# ") == 1 and body.count("\n| ") == 6


def test_a_plain_name_stays_as_it_is() -> None:
    card = model_card({"base": {"name": "org/tiny-2.5", "parameters": 7, "dtype": "float32"}})
    assert "# A LoRA adapter for org/tiny-2.5\n" in card and "base_model: org/tiny-2.5\n" in card
    assert "| Base | org/tiny-2.5 (7 parameters, float32) |" in card
