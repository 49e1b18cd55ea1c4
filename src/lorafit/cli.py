"""The command line: verbs, and options made from the panels. Parses, then hands over.

Importing this file imports neither torch nor transformers: `--help` and a wrong flag answer at
once. The only file that turns errors into exit codes: 2 for the user's mistake, 1 for a failure,
130 and 143 for signals.
"""

import inspect
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import typer
from rich.console import Console as Terminal

from lorafit import config, processes
from lorafit.arguments import PANELS, PYTHON_ONLY, TrainingArguments
from lorafit.config import Settings
from lorafit.errors import (
    ConfigError,
    ElsewhereError,
    LorafitError,
    TrainingInterrupted,
    UsageError,
    shown,
)
from lorafit.panel import Knob
from lorafit.run.signals import leave, unwind

TEXT = "\n\t"
"""What an answer may hold besides what can be printed."""

app = typer.Typer(
    name="lorafit",
    help="Fine-tune a small language model with LoRA on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the `lorafit` command."""
    signal.signal(signal.SIGTERM, leave)
    trusts = any(word.startswith("--trust-remote-code") for word in sys.argv)
    if sys.argv[1:2] == ["check"] and not trusts:
        # transformers imports torch for its tokenizers wherever it finds it, and needs it for none
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that torch is not there
    app()


def _exits(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with its errors told on stderr and turned into exit codes."""

    @wraps(command)
    def told(*values: Any, **given: Any) -> None:
        try:
            command(*values, **given)
        except TrainingInterrupted as stopped:
            _leave(str(stopped), 143, by=stopped)
        except KeyboardInterrupt as stopped:
            _leave(str(stopped) or "Stopped.", 130, by=stopped)
        except LorafitError as error:
            _leave(f"error: {error}", 2 if isinstance(error, UsageError) else 1, by=error)

    return told


def _leave(message: str, code: int, *, by: BaseException) -> NoReturn:
    if _is_told_elsewhere(by):
        raise typer.Exit(code)
    Terminal(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(message, markup=False)
    raise typer.Exit(code)


def _is_told_elsewhere(error: BaseException) -> bool:
    """Whether the first of several processes says it, or the first of this machine."""
    with suppress(ConfigError):  # the environment is what is wrong
        if isinstance(error, ElsewhereError | TrainingInterrupted | KeyboardInterrupt):
            return processes.number() > 0
        return isinstance(error, UsageError) and processes.local_number() > 0
    return False


def _options() -> Iterator[inspect.Parameter]:
    """One option for each knob of the three panels, under its group's heading."""
    for panel in PANELS:
        for knob in panel.knobs.values():
            if knob.group == PYTHON_ONLY:
                continue
            option = typer.Option(
                knob.flag if _kind(knob) is not bool else f"{knob.flag}/{_no(knob)}",
                help=_help(knob),
                rich_help_panel=knob.group,
                show_default=False,
            )
            yield inspect.Parameter(
                knob.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_kind(knob) | None, option],
            )


def _no(knob: Knob) -> str:
    return "--no-" + knob.flag.removeprefix("--")


def _kind(knob: Knob) -> type:
    """What the command line reads: bool, int and float as such, everything else as text, which
    `config.load` reads as YAML would."""
    kinds = [kind for kind in get_args(knob.kind) or (knob.kind,) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float) else str


def _help(knob: Knob) -> str:
    value = knob.recipe
    shown = (
        ""
        if value in (None, "")
        else f" [dim]\\[{value}{' ' + knob.unit if knob.unit else ''}][/dim]"
    )
    return knob.help.replace("[", "\\[") + shown


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each knob in place of its `**given`."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    command.__signature__ = signature.replace(parameters=[*own, *_options()])  # type: ignore[attr-defined]
    command.__annotations__ |= {p.name: p.annotation for p in _options()}
    return command


def _resolved(settings: Path | None, given: dict[str, Any]) -> Settings:
    """The panels, from the file and the flags that were given."""
    flags = {name: value for name, value in given.items() if value is not None}
    return config.load(settings, flags)


@app.command()
@_with_options
@_exits
def train(
    settings: Annotated[
        Path | None, typer.Argument(help="A YAML file of arguments; flags win over it.")
    ] = None,
    **given: Any,
) -> None:
    """Train an adapter: lorafit train --model FOLDER_OR_ID --data FILE"""
    resolved = _resolved(settings, given)
    from lorafit import job

    unwind()
    prepared = job.prepare(resolved)
    prepared.trainer.resume_command = _resume_command()
    folder = prepared.run()
    if processes.number():
        return
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    terminal.print(f"Ask it: lorafit generate --adapter {shlex.quote(str(folder))} --prompt ...")


@app.command()
@_with_options
@_exits
def check(
    settings: Annotated[
        Path | None, typer.Argument(help="A YAML file of arguments; flags win over it.")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="The report for machines.")] = False,
    **given: Any,
) -> None:
    """Report on the data, no weight read: lorafit check --model FOLDER_OR_ID --data FILE

    Exits with 1 where something would hurt the training."""
    resolved = _resolved(settings, given)
    from lorafit import review
    from lorafit.run.console import show_report

    unwind()
    report, notices = review.check(resolved)
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    if as_json:
        terminal.print(json.dumps(report.as_dict(), indent=2), markup=False)
    else:
        show_report(terminal, report, notices=notices)
    if report.harms:
        raise typer.Exit(1)


@app.command()
@_with_options
@_exits
def practice(
    settings: Annotated[
        Path | None, typer.Argument(help="A YAML file of arguments; flags win over it.")
    ] = None,
    *,
    promote: Annotated[
        bool, typer.Option("--promote", help="Start the full run if nothing speaks against it.")
    ] = False,
    find_lr: Annotated[
        bool,
        typer.Option("--find-lr", help="First steps at rising learning rates: which one to take."),
    ] = False,
    **given: Any,
) -> None:
    """Try the whole path on a few hundred rows: lorafit practice --model FOLDER_OR_ID --data FILE

    Exits with 0 only if the full run should be started."""
    resolved = _resolved(settings, given)
    from lorafit import job

    unwind()
    prepared = job.prepare(resolved)
    if not prepared.practise(find_lr=find_lr).go:
        raise typer.Exit(1)
    if promote:
        prepared.trainer.resume_command = _resume_command()
        prepared.run()


@app.command()
@_exits
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Output folders of runs; several side by side.")
    ] = None,
    *,
    output: Annotated[
        Path | None, typer.Option(help="Where to write it: report.html in the run's folder.")
    ] = None,
) -> None:
    """The verdict on a run, and its page with plots: lorafit report FOLDER

    Of several runs, one page side by side: report.html where you are."""
    from lorafit.run import report as pages
    from lorafit.run.store import JOURNAL, REPORT

    here = Path() if Path(JOURNAL).is_file() else Path(TrainingArguments.knobs["output_dir"].recipe)
    named = folders or [here]
    target = output or (named[0] / REPORT if len(named) == 1 else Path(REPORT))
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    for run in pages.write(named, target):
        name = f"{run.folder}: " if len(named) > 1 else ""
        terminal.print(shown(f"{name}{run.verdict}"), markup=False)
        for text in run.left_out:
            terminal.print(shown(f"{name}{text}"), markup=False)
    terminal.print(shown(str(target)), markup=False)


def _resume_command() -> str:
    given, words = iter(sys.argv[1:]), list[str]()
    for word in given:
        if word == "--resume-from-checkpoint":
            next(given, None)  # its value
        elif not word.startswith("--resume-from-checkpoint=") and word not in _SAID_ONCE:
            words.append(word)
    launched = "torchrun --nproc-per-node=... -m " if processes.count() > 1 else ""
    return launched + shlex.join(["lorafit", *words, "--resume-from-checkpoint=auto"])


_SAID_ONCE = ("--overwrite", "--accept")


@app.command()
@_exits
def generate(
    *,
    adapter: Annotated[str, typer.Option(help="The folder of a trained adapter.")],
    prompt: Annotated[list[str], typer.Option(help="What to ask; repeat it for several.")],
    base: Annotated[str, typer.Option(help="The base, where it has moved.")] = "",
    accept: Annotated[
        bool, typer.Option(help="Take another base than it was trained over.")
    ] = False,
    trust_remote_code: Annotated[
        str, typer.Option(help="Hub repository (org/name) whose Python code may run.")
    ] = "",
    quantize: Annotated[
        Literal["none", "nf4", "int8"] | None,
        typer.Option(help="How the base is loaded; not said: as it was trained."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, where temperature is not 0.")] = 0,
    compare: Annotated[bool, typer.Option(help="Answer with the base too.")] = False,
) -> None:
    """Answer prompts with an adapter over the base it names."""
    from lorafit.deploy import generate as deploy

    unwind()
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    tuned = deploy.open_adapter(
        adapter,
        base=base,
        accept=accept,
        trust_remote_code=trust_remote_code,
        quantize=quantize or "",
    )
    sampling = deploy.Sampling(max_new_tokens, temperature, seed)
    answers = deploy.answer(tuned, prompt, sampling=sampling)
    bases = (
        deploy.answer_with_base(tuned, prompt, sampling=sampling)
        if compare
        else [None] * len(prompt)
    )
    for question, before, after in zip(prompt, bases, answers, strict=True):
        if len(prompt) > 1 or compare:
            terminal.print(f"> {question}", markup=False, style="bold")
        if before is not None:
            terminal.print(f"base:  {shown(before.text, keep=TEXT)}", markup=False)
            terminal.print(f"tuned: {shown(after.text, keep=TEXT)}", markup=False)
        else:
            terminal.print(shown(after.text, keep=TEXT), markup=False)


@app.command()
@_exits
def demo(
    *,
    output_dir: Annotated[Path, typer.Option(help="Where to write the run.")] = Path(
        "lorafit-demo"
    ),
    overwrite: Annotated[bool, typer.Option(help="Replace a run that lies there.")] = False,
) -> None:
    """Train offline on this Python's own documentation, and show what changed."""
    from lorafit import demo as tour

    unwind()
    tour.run(output_dir, overwrite=overwrite)


@app.command()
@_with_options
@_exits
def plan(
    settings: Annotated[
        Path | None, typer.Argument(help="A YAML file of arguments; flags win over it.")
    ] = None,
    *,
    device: Annotated[str, typer.Option(help="cpu or cuda; empty: where training would run.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The plan for machines.")] = False,
    **given: Any,
) -> None:
    """The memory a run would take, from config.json alone: lorafit plan --model FOLDER_OR_ID

    Exits with 2 where nothing fits."""
    if device not in ("", "cpu", "cuda"):
        raise ConfigError(f"--device {device} is not one of cpu, cuda.")
    # no example is read, and the panel of data asks for a name
    resolved = _resolved(settings, given | {"data": given["data"] or "-"})
    from lorafit import forecast

    made = forecast.make(resolved, device)
    terminal = Terminal(highlight=False, emoji=False, soft_wrap=True)
    told = [json.dumps(made.as_dict(), indent=2)] if as_json else made.lines()
    terminal.print("\n".join(told), markup=False)
