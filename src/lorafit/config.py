"""Strict YAML and flags -> the three panels, and who set each value.

Owns how a configuration file is read and written: one flat mapping from knob to value. Knows no
knob by name; what the values mean is `arguments`' business.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final

import yaml

from lorafit import foreign
from lorafit.arguments import (
    NOT_IN_FILES,
    ONCE,
    PANELS,
    DataArguments,
    ModelArguments,
    TrainingArguments,
)
from lorafit.errors import ConfigError, UnknownNameError
from lorafit.panel import Knob, fits, translate

KNOBS: Final[Mapping[str, Knob]] = MappingProxyType(
    {name: knob for panel in PANELS for name, knob in panel.knobs.items()}
)
"""Every knob of the three panels; their names are unique."""

MOST_BYTES: Final = 100_000
DEEPEST: Final = 8
LONGEST_NAME: Final = 100
"""A configuration is a few kilobytes and one level deep; beyond these it is something else."""


@dataclass(frozen=True)
class Settings:
    """A resolved configuration.

    `origin` says who set each knob: `default`, `recipe`, `run.yaml:3` or `--learning-rate`;
    `notices` holds a line for each old name that was translated.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    origin: Mapping[str, str]
    notices: tuple[str, ...] = ()


def load(path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """The recipe, changed by the file at `path`, changed by `flags` (knob -> value or text).

    Raises:
        ConfigError: every complaint at once, each with file:line or flag.
        UnknownNameError: the same, where one of them is a name that does not exist.
    """
    answers = _Answers({}, {}, [], [], set())
    for name, (value, place) in (read(path) if path else {}).items():
        if name in NOT_IN_FILES and value:
            raise _said_by_nobody(name, place)
        answers.take(name, value, place=place)
    for name, value in flags.items():
        place = "--" + name.replace("_", "-")
        answers.take(name, _of_flag(value, KNOBS.get(name)), place=place)
    model, data, training = (
        panel.from_recipe({k: v for k, v in answers.values.items() if k in panel.knobs})
        for panel in PANELS
    )
    assert isinstance(model, ModelArguments)
    assert isinstance(data, DataArguments)
    assert isinstance(training, TrainingArguments)
    for complaint in (*model.check(), *data.check(), *training.check()):
        # The knob whose value was thrown out has had its complaint.
        if re.split(r"[ =]", complaint, maxsplit=1)[0] not in answers.refused:
            answers.complaints.append(complaint)
    answers.close()
    held = {**vars(model), **vars(data), **vars(training)}
    origin = {name: answers.origin.get(name) or _unset(KNOBS[name], held[name]) for name in KNOBS}
    return Settings(model, data, training, MappingProxyType(origin), tuple(answers.notices))


def _said_by_nobody(name: str, place: str) -> ConfigError:
    return ConfigError(
        f"{place}: {name} is not read from a file.",
        why="It lets a stranger's Python code run on this machine with all that you may do, and "
        "configurations are passed around.",
        fix=f"Where you have read that code, say so yourself: --{name.replace('_', '-')} ORG/REPO "
        f"({name}='ORG/REPO' in Python).",
    )


@dataclass
class _Answers:
    """What file and flags said so far, new names only, and every complaint about it."""

    values: dict[str, Any]
    origin: dict[str, str]
    notices: list[str]
    complaints: list[str]
    refused: set[str]
    unknown: bool = False

    def take(self, name: str, value: Any, *, place: str) -> None:
        try:
            known, lines = translate(KNOBS, {name: value})
        except ConfigError as error:
            self.unknown |= isinstance(error, UnknownNameError)
            self.complaints.append(f"{place}: {' '.join(str(error).splitlines())}")
            return
        self.notices += [f"{place}: {line}" for line in lines]
        for new, translated in known.items():
            complaint = KNOBS[new].complaint(translated)
            earlier = self.origin.get(new, "")
            if earlier and earlier.rpartition(":")[0] == place.rpartition(":")[0] != "":
                complaint = f"{new} is set in {earlier} already."
            if complaint:
                self.refused.add(new)
                self.complaints.append(f"{place}: {complaint}")
            else:
                self.values[new], self.origin[new] = translated, place

    def close(self) -> None:
        if self.complaints:
            kind = UnknownNameError if self.unknown else ConfigError
            fix = "`lorafit train --help` and docs/arguments.md list every setting."
            raise kind(self.complaints, fix=fix)


def _unset(knob: Knob, value: Any) -> str:
    if knob.recipe != knob.default and value == knob.recipe:
        return "recipe"
    return "default" if value == knob.default else "follows from others"


def _of_flag(value: Any, knob: Knob | None) -> Any:
    """What a flag's text says: a text for a knob of texts, else YAML, with lists by comma."""
    if knob is None or not isinstance(value, str) or fits(value, knob.kind):
        return value
    try:
        scalar = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        return value
    if isinstance(scalar, str) and fits([], knob.kind):
        return [part.strip() for part in scalar.split(",")]
    return scalar


def read(path: Path) -> dict[str, tuple[Any, str]]:
    """Each key of the file with its value and its place, `run.yaml:3`; nothing is interpreted.

    Raises:
        ConfigError: no such file, not YAML, not a flat mapping, a key twice, an anchor or tag.
    """
    try:
        text = foreign.read(path, most=MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"The configuration {path} cannot be read: {reason}.",
            fix="Name a YAML file, or leave it out and use flags.",
        ) from error
    try:
        return dict(_entries(_Loader(text), path))
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise ConfigError(
            f"{place}: {problem}.", fix="Write `name: value`, one per line."
        ) from error


def _entries(loader: "_Loader", path: Path) -> Iterator[tuple[str, tuple[Any, str]]]:
    root = loader.get_single_node()
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "is not a mapping"
        raise ConfigError(f"{path} {what}.", fix="Write `name: value`, one per line.")
    loader.refuse_twins(root)
    for key, value in root.value:
        place = f"{path}:{key.start_mark.line + 1}"
        try:
            made = loader.construct_object(value, deep=True)
        except ValueError:
            raise _problem("a number of more digits than Python reads", key) from None
        yield str(key.value), (made, place)


SCALARS: Final = (
    ("null", r"null|~|", ("n", "~", "")),
    ("bool", r"true|false", ("t", "f")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", tuple("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
     tuple("-+.0123456789")),
)  # fmt: skip
"""YAML 1.2's core scalars, by first character: `no` and dates are texts, `1e-4` is a number."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    first = {letter for *_, letters in SCALARS for letter in letters}
    return {
        letter: [
            (f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"))
            for kind, pattern, letters in SCALARS
            if letter in letters
        ]
        for letter in first
    }


_NODE: Final = (yaml.ScalarEvent, yaml.CollectionStartEvent)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _problem("anchors and aliases are not read here", event)
        if isinstance(event, _NODE) and event.tag is not None:
            raise _problem(f"the tag {event.tag} is not read here", event)
        if self.depth > DEEPEST:
            raise _problem("nested too deeply", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.refuse_twins(node)
        return super().construct_mapping(node, deep)

    def refuse_twins(self, node: yaml.MappingNode) -> None:
        """Raise if a key of `node` occurs twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or len(name) > LONGEST_NAME:
                raise _problem(f"a name is one word or a few, not {name[:LONGEST_NAME]}", key)
            if name in lines:
                raise _problem(f"{name} is set on line {lines[name]} already", key)
            lines[name] = line


def _problem(what: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=at.start_mark)


def _quoted(dumper: Any, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _Dumper(yaml.SafeDumper):
    # Older readers take `no` for false: what they would misread is quoted too.
    yaml_implicit_resolvers: ClassVar[Any] = {
        letter: [*found, *_Loader.yaml_implicit_resolvers.get(letter, [])]
        for letter, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }
    yaml_representers: ClassVar[Any] = {**yaml.SafeDumper.yaml_representers, str: _quoted}


def dump(settings: Settings) -> str:
    """The resolved configuration as YAML, grouped, with who set each value in a comment.

    `load` reads it back to equal panels. What is said for one run only (`--overwrite`,
    `--resume-from-checkpoint`) is left out, and what no file may say.
    """
    lines: list[str] = []
    group = ""
    for panel in (settings.model, settings.data, settings.training):
        for knob in panel.knobs.values():
            if knob.group == ONCE or knob.name in NOT_IN_FILES:
                continue
            if knob.group != group:
                group = knob.group
                lines += ["", f"# {group}"]
            written = yaml.dump(
                vars(panel)[knob.name], Dumper=_Dumper, default_flow_style=True,
                width=math.inf, allow_unicode=True, sort_keys=False,
            )  # fmt: skip
            value = written.removesuffix("\n").removesuffix("\n...")
            lines.append(f"{knob.name}: {value}  # {settings.origin[knob.name]}")
    return "\n".join(lines[1:]) + "\n"
