"""Room: how many tokens run at a time, and what happens where that was too many.

Running out of memory is an event, not an end: what was begun is forgotten, memory is handed back,
and the same examples run again in smaller parts, which by the law gives the same numbers. The
smaller size is kept, and a larger one tried again later. On a CPU, where the kernel kills instead
of refusing, the resident memory is watched and parts shrink before the limit is reached. Knows
neither models nor files; telling people is the trainer's.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from lorafit.amounts import shown
from lorafit.engine import limits
from lorafit.engine.layout import MicroBatch
from lorafit.errors import OutOfMemoryError
from lorafit.events import OutOfMemory

T = TypeVar("T")

PATIENCE = 50
"""Steps that go well before a larger size is tried again; twice as many after each failure."""
CLOSE = 0.95
"""Share of the limit up to which resident memory may come."""

_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, Metal, and bitsandbytes' own
    "can't allocate memory",  # torch's CPU allocator on Linux
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the system's words for it
    "bad_alloc",
    "alloc_failed",  # cuBLAS and cuDNN
    "could not create a memory",  # oneDNN
)


def shortage(error: BaseException) -> str | None:
    """What `error` says, in one line, if it means that memory ran out; None of any other."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" Error code")[0]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return text
    told = isinstance(error, RuntimeError | OSError) and any(
        sign in str(error).lower() for sign in _SIGNS
    )
    return text if told else None


class Full(Exception):
    """Memory does not hold even the smallest part.

    Attributes:
        event: What ran.
        fits: Tokens of the largest part that went well; 0 where none did.
        committed: The update had begun, so that it is not known how much of it was applied.
    """

    def __init__(self, event: OutOfMemory, *, fits: int, committed: bool) -> None:
        super().__init__(event.message)
        self.event, self.fits, self.committed = event, fits, committed

    def explained(self, *, after: Sequence[str] = ()) -> OutOfMemoryError:
        """The error for a person.

        Args:
            after: What became of the run, a line each.
        """
        event = self.event
        rows = "one example" if event.rows == 1 else f"{event.rows} examples that cannot be parted"
        part = f"{rows} of {event.tokens:,} tokens"
        article = "a step" if event.doing == "step" else "an evaluation"
        what = "the update of the weights" if self.committed else f"{article} with {part}"
        shorter = f"--max-length {self.fits} (the largest that has run)" if self.fits else (
            f"a --max-length below {event.tokens}"
        )  # fmt: skip
        return OutOfMemoryError(
            [f"Memory ran out in {what}, at step {event.step}: {event.message}"],
            why=["Nothing smaller can be run, and nothing more can be left to backward.", *after],
            fix=f"Try shorter examples, {shorter}; --quantize nf4, a smaller base, or end what "
            "else holds memory (lorafit plan says what each takes).",
        )


@dataclass(frozen=True)
class _Short:
    """Memory ran out, or would; the message says so."""

    message: str


@dataclass
class Room:
    """How much runs at a time now.

    Mutable: `tokens` is the size of a part; `passed` and `committed` say how far an attempt came,
    and whoever runs the parts keeps them.

    Attributes:
        most: The size that was planned.
        divides: Whether a part of several rows may run in two: the loss is a sum over tokens.
        keep_less: Makes backward keep less from now on, by computing more of it again; what it
            does, empty where there is nothing left. See `model.fused.RECOMPUTE`.
        forget: Hands back what is held between micro-batches, before a second attempt.
        tell: Is told of each shortage.
        limit: Bytes of resident memory that the process may have; 0: not watched.
        per_token: Bytes that a token keeps for backward; 0: not known.
        doing: What runs, for the event.
    """

    most: int = sys.maxsize
    divides: bool = False
    keep_less: Callable[[], str] = str
    forget: Callable[[], None] = lambda: None
    tell: Callable[[OutOfMemory], None] = lambda _: None
    limit: int = 0
    per_token: int = 0
    doing: Literal["step", "evaluation"] = "step"
    passed: int = 0
    committed: bool = False
    _now: int = 0
    _since: int = 0
    _patience: int = PATIENCE
    _largest: int = 0
    _mark: int = 0
    _desperate: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a part."""
        return self._now or self.most

    def held(
        self,
        lay_out: Callable[[int], Sequence[MicroBatch]],
        run: Callable[[Sequence[MicroBatch]], T],
        *,
        step: int,
        again: Callable[[], None] = lambda: None,
    ) -> T:
        """What `run` makes of the parts that `lay_out` gives for a size, as small as memory needs.

        Args:
            step: Its number, for the event.
            again: Puts everything back as it was before `run`.

        Raises:
            Full: the smallest parts are too large, or the update had begun.
        """
        while True:
            parts = lay_out(self.tokens)
            self.passed, self.committed = 0, False
            made = self._too_close(parts) or self._attempt(run, parts)
            if not isinstance(made, _Short):
                self._went_well(parts)
                return made
            # the error is gone by now, and with it the frames that held its tensors
            failed = parts[min(self.passed, len(parts) - 1)]
            again()
            self.forget()
            release()
            self._shrink(failed, step=step, message=made.message)

    def _attempt(
        self, run: Callable[[Sequence[MicroBatch]], T], parts: Sequence[MicroBatch]
    ) -> T | _Short:
        try:
            return run(parts)
        except (RuntimeError, MemoryError, OSError) as error:
            message = shortage(error)
            if message is None:
                raise
            return _Short(message)

    def _too_close(self, parts: Sequence[MicroBatch]) -> _Short | None:
        """Whether these would come too close to the limit, where the kernel kills."""
        if not (self.limit and parts):  # of several processes one may have none
            return None
        at = max(range(len(parts)), key=lambda at: parts[at].positions)
        peak, growth = limits.peak(), max(0, parts[at].positions - self._largest) * self.per_token
        # close to it parts are made smaller; beyond it whatever can be done is done
        close = self.divides and parts[at].divides
        allowed = max(int(CLOSE * self.limit) if close else self.limit, self._mark)
        if peak + growth <= allowed:
            return None
        self._mark = max(self._mark, peak)  # what has been reached is no reason a second time
        self.passed = at
        return _Short(f"resident memory would reach {shown(peak + growth)} of {shown(self.limit)}")

    def _shrink(self, failed: MicroBatch, *, step: int, message: str) -> None:
        """Make parts smaller, or keep less of each, or try once more: memory may have been in
        pieces, or another's for a moment."""
        self._since, self._patience = 0, 2 * self._patience
        smaller = self.divides and failed.divides and not self.committed
        if smaller:
            self._now = max(1, min(self.tokens, failed.positions) // 2)
        again = "" if smaller or self.committed else self.keep_less()
        once_more = not self._desperate and not self.committed
        event = OutOfMemory(
            step=step,
            doing=self.doing,
            tokens=failed.positions,
            rows=failed.rows,
            budget=self.tokens,
            recompute=again,
            message=message,
        )
        if not (smaller or again or once_more):
            raise Full(event, fits=self._largest, committed=self.committed)
        self._desperate = not (smaller or again)
        self.tell(event)

    def _went_well(self, parts: Sequence[MicroBatch]) -> None:
        """Count it; after many try a larger size again."""
        self._largest = max([self._largest, *(part.positions for part in parts)])
        self._since, self._desperate = self._since + 1, False
        if self._now and self._since >= self._patience:
            self._since, larger = 0, 2 * self._now
            self._now = larger if larger < self.most else 0


def release() -> None:
    """Hand back what nobody holds: torch's caches, and what the C library keeps of freed blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    limits.trim()
