"""What a run learns from and what it is evaluated on, made from the data's arguments.

Owns the way from names to examples: found, read, shaped, written by the template, kept, divided.
Knows no model and no weights; `audit` looks at what comes out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np

from lorafit.arguments import DataArguments
from lorafit.data import cache, examples, formats, read, shapes, template
from lorafit.data.cache import Chosen, Stored
from lorafit.data.examples import Policy, Report, Spread, Truncation
from lorafit.data.parse import Faults, Row
from lorafit.data.read import Source
from lorafit.data.shapes import Shape
from lorafit.data.template import Encoder, Supervise
from lorafit.errors import ConfigError, DataError

_CODE = ("parse", "read", "shapes", "formats", "tokenizer", "template", "examples", "cache")
_PACKAGES = ("tokenizers", "transformers", "jinja2")


@dataclass(frozen=True)
class Read:
    """One source as examples; `report` and `faults` say what became of its rows."""

    source: Source
    stored: Stored
    shape: Shape

    @property
    def report(self) -> Report:
        """What became of the rows."""
        return Report(**self.stored.about["report"])

    @property
    def skipped(self) -> tuple[int, list[str]]:
        """How many rows were skipped, and what was wrong with the first of them."""
        return self.stored.about["skipped"], self.stored.about["named"]

    @property
    def unread(self) -> list[str]:
        """The fields of its first rows that hold something and are not read."""
        return self.stored.about["unread"]


@dataclass(frozen=True)
class Sets:
    """The examples of a run; `evaluation` is None where there are none.

    Attributes:
        reads: Every source that was read, those of the evaluation set last.
        stops: The ids at which generation stops.
        notes: Lines about what was found, for a person.
        fingerprint: Of the training data's bytes.
    """

    train: Chosen
    evaluation: Chosen | None
    reads: tuple[Read, ...]
    shape: Shape
    stops: tuple[int, ...]
    notes: tuple[str, ...]
    fingerprint: str


class Maker:
    """Makes sets of one tokenizer.

    Args:
        identity: A hash of all that makes the tokenizer what it is.
        limit: Tokens of the longest example where the arguments name none; None: as long as it is.
        moved: Told how many rows are done, and of about how many, where that is known.
        spread: How the rows are shared out among processes.
    """

    def __init__(
        self,
        data: DataArguments,
        tokenizer: template.Tokenizer,
        *,
        identity: str,
        limit: int | None,
        moved: Callable[[int, int | None], None] = lambda _, __: None,
        spread: Spread = map,
    ) -> None:
        self.data, self.tokenizer, self.moved, self.spread = data, tokenizer, moved, spread
        self.policy = Policy(data.max_length or limit, cast(Truncation, data.truncation))
        self.key = {
            "the tokenizer": identity,
            "the chat template": template.chat_template_of(tokenizer),
            **{name: str(vars(data)[name]) for name in _OF_EXAMPLES},
            **{f"the policy's {name}": str(value) for name, value in asdict(self.policy).items()},
            "lorafit's code": _code(),
            "packages": ", ".join(f"{name} {version(name)}" for name in _PACKAGES),
        }

    def read(self, source: Source, *, like: Shape | None = None) -> tuple[Read, str]:
        """The source's examples, and a line where they had to be made again.

        Args:
            like: The shape that its rows must have; found in its first row without one.

        Raises:
            DataError, ModelError: a row or the template cannot be used.
        """
        shape = like or self._shape(source)
        key = {"the data": source.fingerprint(), **self.key, "the shape": f"{shape} {shape.extras}"}
        stored, note = cache.kept(
            source.label, key, make=lambda folder: self._make(source, shape, folder=folder)
        )
        return Read(source, stored, shape), note

    def _shape(self, source: Source) -> Shape:
        first = next(self._rows(source, Faults(skip=self.data.skip_bad_rows)))
        return shapes.shape_of(
            first,
            wanted=self.data.shape,
            prompt_field=self.data.prompt_field,
            answer_field=self.data.answer_field,
        )

    def _rows(self, source: Source, faults: Faults) -> Iterator[Row]:
        rows = source.rows(faults)
        first = next(rows, None)
        if first is None:
            raise DataError(
                f"{source.label}: this data set is empty.", fix="Give a file that holds rows."
            )
        return chain([first], rows)

    def _make(self, source: Source, shape: Shape, *, folder: Path) -> None:
        faults, report = Faults(skip=self.data.skip_bad_rows), Report()
        unread: dict[str, None] = {}
        encoder = Encoder(
            self.tokenizer,
            is_chat=shape.is_chat,
            supervise=cast(Supervise, self.data.supervise),
        )

        def sample(row: Row) -> formats.Sample:
            made = formats.sample(row, shape)
            if not report.rows:  # the first of them
                unread.update(dict.fromkeys(shapes.unread(row, shape)))
            return made

        def counted() -> Iterator[examples.Example]:
            total = source.count()
            for number, example in enumerate(built):
                if not number % _TOLD:
                    self.moved(report.rows + faults.count, total)
                yield example

        built = examples.build(
            self._rows(source, faults), encoder, sample_of=sample, policy=self.policy,
            faults=faults, report=report, spread=self.spread,
        )  # fmt: skip
        cache.store(
            folder,
            counted(),
            about=lambda: {
                "report": asdict(report), "skipped": faults.count, "named": faults.named,
                "unread": list(unread),
            },
        )  # fmt: skip


_TOLD = 100
"""Examples between two tellings of how far it has come."""
_OF_EXAMPLES = ("shape", "prompt_field", "answer_field", "supervise", "skip_bad_rows")


def _code() -> str:
    here = Path(__file__).parent
    return sha256(b"".join((here / f"{name}.py").read_bytes() for name in _CODE)).hexdigest()


def make(maker: Maker, *, seed: int, given: tuple[Source, Source] | None = None) -> Sets:
    """The sets that the maker's arguments name.

    Args:
        seed: Decides which rows are held back, and which a weight below 1 keeps.
        given: Training and evaluation data that come from elsewhere.

    Raises:
        DataError, ConfigError, ModelError: something cannot be read, divided or written.
    """
    data = maker.data
    names = [str(given[0].label)] if given else _listed(data.data)
    sources = [given[0]] if given else [read.locate(name, split=data.split) for name in names]
    weights = _weights(data.data_weights, names)
    held = given[1] if given else _held_source(data)
    reads, notes, shape = [], [], None
    for source in [*sources, *([held] if held else [])]:
        one, note = maker.read(source, like=shape)
        shape = one.shape
        reads.append(one)
        notes.append(note)
    assert shape is not None
    trained = reads[: len(sources)]
    parts, evaluation = _divided(trained, data=data, seed=seed, own=reads[-1] if held else None)
    train = Chosen(
        [(s, _weighted(n, w, seed=seed)) for (s, n), w in zip(parts, weights, strict=True)]
    )
    return Sets(
        _first(train, data.max_rows),
        None if evaluation is None else _first(evaluation, data.max_eval_rows),
        tuple(reads),
        shape,
        template.stop_ids(maker.tokenizer, is_chat=shape.is_chat),
        tuple(note for note in notes if note),
        sha256("".join(source.fingerprint() for source in sources).encode()).hexdigest(),
    )


def _listed(names: str) -> list[str]:
    """Names with commas between; a file whose own name has commas is one."""
    return [names] if Path(names).exists() else [name.strip() for name in names.split(",")]


def _weights(written: str | list[str] | None, names: Sequence[str]) -> list[float]:
    listed = written.split(",") if isinstance(written, str) else written or ["1"] * len(names)
    try:
        weights = [float(weight) for weight in listed]
    except ValueError:
        weights = []
    if len(weights) != len(names) or not all(weight > 0 for weight in weights):
        raise ConfigError(
            f"data_weights={written!r}: {len(names)} data sets need as many numbers above 0.",
            fix="Write --data a.jsonl,b.jsonl --data-weights 1,0.5 for half of b in each epoch.",
        )
    return weights


def _held_source(data: DataArguments) -> Source | None:
    if data.eval_data:
        return read.locate(data.eval_data, split=data.eval_split or read.HELD_OUT)
    if data.eval_split:
        return read.locate(data.data, split=data.eval_split)
    return None


def _divided(
    reads: Sequence[Read], *, data: DataArguments, seed: int, own: Read | None
) -> tuple[list[tuple[Stored, np.ndarray]], Chosen | None]:
    """The examples to learn from, and those of the rows that are held back. A row whose answers
    are examples of their own goes whole to one side, and so do exact copies."""
    everything = [(one.stored, np.arange(len(one.stored))) for one in reads]
    if own is not None:
        return everything, Chosen([(own.stored, np.arange(len(own.stored)))])
    if not data.eval_share:
        return everything, None
    counts = [int(stored.rows[-1]) + 1 for stored, _ in everything]
    numbers = examples.held_out(sum(counts), share=data.eval_share, seed=seed)
    starts = np.cumsum([0, *counts])
    rows = np.concatenate(
        [stored.rows + n for (stored, _), n in zip(everything, starts, strict=False)]
    )
    wholes = np.concatenate([stored.wholes for stored, _ in everything])
    contents, copies = np.unique(wholes, return_counts=True)
    # text that is more than the share to hold back (a greeting, a refusal) is learned
    common = contents[copies > max(len(numbers), copies.min())]
    held_wholes = np.setdiff1d(wholes[np.isin(rows, numbers)], common)
    is_held = (np.isin(rows, numbers) & ~np.isin(wholes, common)) | np.isin(wholes, held_wholes)
    if is_held.all() or not is_held.any():
        raise DataError(
            f"{sum(counts):,} rows cannot be split into training and evaluation: {len(contents):,} "
            "of them are different.",
            why="Evaluated on copies of what it learned, an adapter always looks good.",
            fix="Give more rows, evaluation data of its own, or hold nothing back: --eval-share 0 "
            "--eval-strategy no",
        )
    held = np.split(is_held, np.cumsum([len(stored) for stored, _ in everything])[:-1])
    sides = list(zip(everything, held, strict=True))
    train = [(stored, every[~is_held]) for (stored, every), is_held in sides]
    return train, Chosen([(stored, every[is_held]) for (stored, every), is_held in sides])


def _weighted(numbers: np.ndarray, weight: float, *, seed: int) -> np.ndarray:
    """`weight` times the examples of an epoch: repetitions, and a fixed sample for the rest."""
    whole, rest = divmod(weight, 1)
    sample = np.random.default_rng(seed).permutation(numbers)[: round(rest * len(numbers))]
    return np.concatenate([np.tile(numbers, int(whole)), np.sort(sample)])


def _first(chosen: Chosen, count: int) -> Chosen:
    parts, left = [], count or len(chosen)
    for stored, numbers in chosen.parts:
        parts.append((stored, numbers[:left]))
        left -= len(parts[-1][1])
    return Chosen(parts)
