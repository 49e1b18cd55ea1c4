"""The model card: the README.md beside an adapter, made from its contract."""

import html
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from lorafit.errors import shown


def model_card(contract: Mapping[str, Any], *, about: Mapping[str, Any] | None = None) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    Args:
        contract: What `lorafit.json` holds; `base` at least.
        about: More for the front matter, under the Hub's names; None is left out.
    """
    base, metrics = contract.get("base", {}), contract.get("metrics", {})
    name = shown(str(base.get("name") or base.get("model_type") or "its base"))
    facts = {
        "Base": f"{name} ({base.get('parameters', 0):,} parameters, {base.get('dtype', '')})",
        "Data": contract.get("data", {}).get("rows", "not recorded"),
        "Steps": metrics.get("step", 0),
        "Evaluation loss": _nats(metrics.get("eval_loss")),
        "Answers end with token": contract.get("stop_ids", ["not recorded"])[0],
    }
    lines = "\n".join(f"| {what} | {_escaped(value)} |" for what, value in facts.items())
    given = {key: value for key, value in (about or {}).items() if value}
    tags = given.pop("tags", [])
    tags = [*([tags] if isinstance(tags, str) else tags), "lora", "lorafit"]
    front = {"base_model": name, "library_name": "peft", **given, "tags": tags}
    return f"""---
{yaml.safe_dump(front, sort_keys=False, width=math.inf).strip()}
---

# A LoRA adapter for {_escaped(name)}

| | |
|---|---|
{lines}

Load it with peft, or ask it:

```
lorafit generate --adapter THIS_FOLDER --prompt "..."
```

Trained with lorafit. `lorafit.json` holds the adapter's contract: base, chat template, stop tokens.
"""


def _escaped(value: Any) -> str:
    """What people's files and names say, as text that neither Markdown nor HTML takes up."""
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(shown(str(value)), quote=False))


def _nats(loss: float | None) -> str:
    return "not recorded" if loss is None else f"{loss:.4f} nats per supervised token"
