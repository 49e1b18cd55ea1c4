"""How a knob is declared, remembered and checked. Knows no knob by name, no file and no device.

`@panel` turns a class of `knob(...)` declarations into a dataclass whose constructor also takes
transformers' other names (`lorafit.names`). `Panel` is what every such class can do.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from enum import Enum
from functools import wraps
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Self,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from lorafit.errors import ConfigError, UnknownNameError, nearest
from lorafit.names import ALIASES, NO_OPS, OLD_VALUES, REFUSED, NoOp, Refused

UNSET: Final = object()
"""Says that a knob has no recipe of its own: its default is good."""

SPOKEN: Final = MappingProxyType(
    {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
     list: "a list", dict: "a mapping", NoneType: "none"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Knob:
    """One argument: what it is called, may hold, and holds unless set.

    `span` is the range `low <= value < high`; None leaves a side open. `recipe` equals `default`
    where the default is good.
    """

    name: str
    kind: Any
    default: Any
    help: str
    group: str
    recipe: Any
    unit: str
    choices: tuple[str, ...]
    span: tuple[float | None, float | None]

    @property
    def flag(self) -> str:
        """`--learning-rate` for `learning_rate`."""
        return "--" + self.name.replace("_", "-")

    def complaint(self, value: Any) -> str:
        """What is wrong with `value`, in one line; empty if nothing is."""
        shown = f"{self.name}={value!r:.200}"
        if not fits(value, self.kind):
            return f"{shown} is not {spoken(self.kind)}."
        if isinstance(value, str) and self.choices and value not in self.choices:
            return f"{shown} is not one of {', '.join(filter(None, self.choices))}."
        outside = self._outside(value)
        return f"{shown} is {outside}." if outside else ""

    def _outside(self, number: Any) -> str:
        if not fits(number, float):
            return ""
        low, high = self.span
        too_long = isinstance(number, int) and number.bit_length() > 1_000  # for any float
        if too_long or not math.isfinite(number):
            return "not finite"
        if low is not None and number < low:
            return f"below {low:g}"
        return f"not below {high:g}" if high is not None and number >= high else ""


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`; a whole number is a number, a bool is not.

    Tuples pass for lists, and numpy's numbers for Python's.
    """
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, arm) for arm in arms)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return not isinstance(value, bool) and isinstance(value, number)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(item, arms[0]) for item in value)
    return isinstance(value, origin or kind)


def spoken(kind: Any) -> str:
    """`a whole number or none` for `int | None`."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(spoken(arm) for arm in get_args(kind))
    return SPOKEN[origin or kind]


def knob(
    default: Any,
    help: str,
    *,
    group: str,
    recipe: Any = UNSET,
    unit: str = "",
    choices: tuple[str, ...] = (),
    span: tuple[float | None, float | None] = (None, None),
) -> Any:
    """Declare a knob: a dataclass field that `panel` reads.

    Args:
        default: What Python users get: transformers' value where it has the knob.
        help: One sentence, without a per cent sign (argparse would read it as a format).
        group: The heading under which the command line lists it.
        recipe: What the command line takes instead; UNSET where the default is good.
        unit: steps, rows, tokens, ...
        choices: The texts it may hold.
        span: `(low, high)` of a number: low included, high not.
    """
    declared = {"group": group, "recipe": recipe, "unit": unit, "choices": choices, "span": span}
    metadata = {"help": help, "knob": declared}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def translate(
    knobs: Mapping[str, Knob], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The knobs that `given` sets, old names and values resolved, and a line for each such change.

    Where an old and the new name are both given and differ, the one that is not at its default is
    taken; if neither is, the new one.

    Raises:
        ConfigError: a name that is not honoured, with a value that asks for something.
        UnknownNameError: a name that nobody knows.
    """
    known = {name: value for name, value in given.items() if name in knobs}
    lines: list[str] = []
    for name, value in given.items():
        if name in knobs:
            continue
        if name in ALIASES and ALIASES[name].to in knobs:
            lines += _rename(known, knobs, name=name, value=value)
        elif name in NO_OPS:
            if plain(value) not in NO_OPS[name].silent:
                lines.append(f"{name}={plain(value)!r} has no effect: {NO_OPS[name].why}")
        elif name in REFUSED:
            _refuse(name, plain(value))
        else:
            raise UnknownNameError(
                f"There is no argument {name}.{nearest(name, [*knobs, *ALIASES])}"
            )
    for (name, old), new in OLD_VALUES.items():
        if plain(known.get(name)) == old:
            known[name] = new
            lines.append(f"{name}={old!r} is the old name of {new!r}")
    return known, lines


def _rename(
    known: dict[str, Any], knobs: Mapping[str, Knob], *, name: str, value: Any
) -> list[str]:
    alias = ALIASES[name]
    new = next((new for old, new in alias.values if old == value), value)
    if new is None:
        return []
    lines = [f"{name} is the old name of {alias.to}"] if alias.old else []
    present = known.get(alias.to, UNSET)
    if present is not UNSET and present != new:
        if value == alias.default:
            return lines
        if present != knobs[alias.to].default:
            return [f"{name}={value!r} gives way to {alias.to}={present!r}"]
    known[alias.to] = new
    return lines


def _refuse(name: str, value: Any) -> None:
    entry = REFUSED[name]
    if value not in entry.silent:
        raise ConfigError(
            f"{name}={value!r} is not honoured here.", why=entry.why, fix=entry.instead
        )


def plain(value: Any) -> Any:
    """`value`, or the text of a text-valued enum member such as transformers' IntervalStrategy."""
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value


class Panel:
    """What the panels share. Inert: constructing or setting a value touches no device or file."""

    knobs: ClassVar[Mapping[str, Knob]] = MappingProxyType({})
    """Every knob by name, in order."""

    @classmethod
    def from_recipe(cls, given: Mapping[str, Any]) -> Self:
        """The panel with the recipe's value for each knob that has one and is not `given`."""
        made = cls(**given)
        unset = (knob for name, knob in cls.knobs.items() if name not in made.explicit)
        vars(made).update({k.name: k.recipe for k in unset if k.recipe != k.default})
        made.settle()
        return made

    @property
    def explicit(self) -> frozenset[str]:
        """The names of the knobs that were set: given when constructed, or assigned later.

        Where every field is given at once (`dataclasses.replace`, `HfArgumentParser`, a rebuilt
        `asdict`), or a plain `@dataclass` subclass is constructed, nobody can tell which were
        meant: then those count that differ from their default.
        """
        return vars(self).get("_explicit", frozenset())

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each old name that was translated and each name without effect."""
        return vars(self).get("_notices", ())

    def was_set(self, name: str) -> bool:
        """Whether knob `name` was set (see `explicit`)."""
        return name in self.explicit

    def check(self) -> list[str]:
        """Every complaint about the values, one line each; empty if they can be run."""
        values = vars(self)
        return [line for name, knob in self.knobs.items() if (line := knob.complaint(values[name]))]

    def settle(self) -> None:
        """Fill in what follows from what was set; nothing, unless a panel says otherwise."""

    def __post_init__(self) -> None:
        state = vars(self)
        # set past our constructor, by that of a subclass which is a dataclass itself
        unhonoured = {name: state.pop(name) for name in (*NO_OPS, *REFUSED) if name in state}
        state["_notices"] = (*self.notices, *translate(self.knobs, unhonoured)[1])
        given: frozenset[str] | None = state.pop("_given", None)
        if given is None or len(given) == len(self.knobs):
            bare = self._bare()
            given = frozenset(
                name
                for name, knob in self.knobs.items()
                if state[name] not in (knob.default, bare[name])
            )
        state["_explicit"] = given
        self.settle()

    @classmethod
    def _bare(cls) -> dict[str, Any]:
        """The values of a panel in which nothing was set."""
        made = object.__new__(cls)
        vars(made).update({name: knob.default for name, knob in cls.knobs.items()})
        vars(made)["_explicit"] = frozenset()
        made.settle()
        return vars(made)

    def __setattr__(self, name: str, value: Any) -> None:
        constructed = "_explicit" in vars(self)
        if name in self.knobs or not constructed:
            super().__setattr__(name, plain(value))
        elif name in ALIASES or name in NO_OPS or name in REFUSED:
            self._assign_old(name, value)
        else:
            super().__setattr__(name, value)
        if constructed and name in self.knobs:
            vars(self)["_explicit"] = self.explicit | {name}
            self.settle()

    def _assign_old(self, name: str, value: Any) -> None:
        known, lines = translate(self.knobs, {name: value})
        vars(self)["_notices"] = (*self.notices, *lines)
        for new, translated in known.items():
            setattr(self, new, translated)

    # Scripts read names that are not knobs (`args.push_to_hub`): they see transformers' default,
    # or the knob that took the name's place. Hidden from type checkers, for whom they are mistakes.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in ALIASES and ALIASES[name].to in self.knobs:
                alias, value = ALIASES[name], vars(self)[ALIASES[name].to]
                olds = [old for old, new in alias.values if new == value]
                return [*olds, alias.default][0] if alias.values else value
            for table in (NO_OPS, REFUSED):
                if name in table:
                    return table[name].default
            raise AttributeError(f"{type(self).__name__} has no argument {name}")


P = TypeVar("P", bound=Panel)


@dataclass_transform(field_specifiers=(knob, field))
def panel(cls: type[P]) -> type[P]:
    """Make `cls`, a `Panel` of `knob(...)` declarations, a dataclass that takes old names too."""
    made = dataclass(cls)
    kinds, declared = get_type_hints(made), fields(cast(Any, made))
    made.knobs = MappingProxyType({f.name: _declared(f, kinds[f.name]) for f in declared})
    plain_init = made.__init__

    @wraps(plain_init)
    def __init__(self: P, *values: Any, **given: Any) -> None:
        known, lines = translate(made.knobs, given)
        vars(self)["_notices"] = tuple(lines)
        vars(self)["_given"] = frozenset([*list(made.knobs)[: len(values)], *known])
        plain_init(self, *values, **known)

    made.__init__ = __init__
    return made


def parsed(cls: type[P]) -> type[P]:
    """Give `cls` a dataclass field for each name of transformers' that is not honoured, with its
    default: HfArgumentParser, and subclasses that are dataclasses, hand all fields over."""
    entries = {**NO_OPS, **REFUSED}
    declared = make_dataclass(
        "declared", [(name, _kind(entry), _field(entry)) for name, entry in entries.items()]
    )
    vars(cls)["__dataclass_fields__"].update(vars(declared)["__dataclass_fields__"])
    cls.__annotations__ |= declared.__annotations__
    return cls


def _kind(entry: NoOp | Refused) -> Any:
    kinds = {type(value) for value in entry.silent} - {NoneType}
    kind: Any = next((one for one in (bool, int, float) if one in kinds), str)
    return kind | None if entry.default is None else kind


def _field(entry: NoOp | Refused) -> Any:
    return field(default=entry.default, metadata={"help": entry.why})


def _declared(made: Field[Any], kind: Any) -> Knob:
    default = made.default if made.default_factory is MISSING else made.default_factory()
    declared = dict(made.metadata["knob"])
    # transformers' HfArgumentParser hands all metadata to argparse, which knows `help` alone.
    made.metadata = MappingProxyType({"help": made.metadata["help"]})
    if declared["recipe"] is UNSET:
        declared["recipe"] = default
    return Knob(made.name, kind, default, made.metadata["help"], **declared)
