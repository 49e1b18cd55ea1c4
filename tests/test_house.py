"""The house's numbers (CONTRIBUTING.md): each rule one function, each failure a list of places.

Reads the sources as text and syntax trees; only the last tests run Python. Code lines are lines
that are not blank, comment or docstring. Raising a number is a page in docs/decisions/.
"""

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lorafit"

# docs/decisions/0017-products-of-our-own.md
FILE_CODE, PACKAGE_CODE, PACKAGE_LINES = 400, 17_600, 26_400
ROOM_CODE = {  # "" is the files at the top, together
    "": 5_060,  # docs/decisions/0014-several-processes.md
    "data": 2_625,  # docs/decisions/0006-strangers-files.md
    "model": 2_340,  # docs/decisions/0016-bf16-on-a-cpu.md
    "kernels": 1_820,  # docs/decisions/0017-products-of-our-own.md
    "engine": 1_900,
    "run": 3_510,
    "deploy": 600,
    "assets": 250,
}
FUNCTION_CODE, KERNEL_CODE, BRANCHES, NESTING = 60, 120, 10, 3
PARAMETERS, POSITIONAL = 7, 2
# their public signatures are not ours
TRANSFORMERS_SHAPED = (
    "face.py",
    "hooks.py",
    "keeping.py",
    "trainer.py",
    "data/collate.py",
    "run/accelerator.py",
)

# Every function of src/ that runs between two steps' beginnings on the plain path (kernels
# excepted): a map-style set packed for a fused model, one fp32 device, no log,
# evaluation or save is due. tests/test_trainer.py traces a run and finds no other.
# Each is named as this file's messages name it: file, colon, qualified name.
STEP_PATH: tuple[str, ...] = (
    "data/collate.py:PadCollator.__call__",
    "data/collate.py:_padded",
    "data/collate.py:_row",
    "data/loader.py:Loader._steps",
    "data/loader.py:keeping.collated",
    "engine/layout.py:MicroBatch.divides",
    "engine/layout.py:MicroBatch.to",
    "engine/layout.py:_end_to_end",
    "engine/layout.py:_even_bins",
    "engine/layout.py:_example",
    "engine/layout.py:best_fit",
    "engine/layout.py:is_plain",
    "engine/layout.py:mapped",
    "engine/layout.py:moved",
    "engine/layout.py:moved.sent",
    "engine/layout.py:packed",
    "engine/layout.py:unpadded",
    "engine/limits.py:peak",
    "engine/objective.py:Whole.of",
    "engine/objective.py:by_documents.part",
    "engine/objective.py:by_documents.states",
    "engine/optim.py:Updater.add_up",
    "engine/optim.py:Updater.apply",
    "engine/optim.py:Updater.norm",
    "engine/optim.py:Updater.parameters",
    "engine/optim.py:Updater.showing_gradients",
    "engine/room.py:Room._attempt",
    "engine/room.py:Room._too_close",
    "engine/room.py:Room._went_well",
    "engine/room.py:Room.held",
    "engine/room.py:Room.tokens",
    "engine/step.py:Engine._advance",
    "engine/step.py:Engine._run_part",
    "engine/step.py:Engine._update",
    "engine/step.py:Engine.step",
    "face.py:Face.control",
    "model/documents.py:_Either.__call__",
    "model/documents.py:_Head._frozen",
    "model/documents.py:_Head.nats",
    "model/fused.py:Decoder.__call__",
    "model/fused.py:Decoder._room",
    "model/fused.py:Decoder._run",
    "model/fused.py:Decoder.normed",
    "model/fused.py:Decoder.refresh",
    "model/fused.py:Decoder.run",
    "model/fused.py:_Layer.factors",
    "model/fused.py:_signs",
    "model/lora.py:LoraLinear.factors",
    "model/lora.py:sign_of",
    "packing.py:Packing.lay_out",
    "run/callbacks.py:Callbacks.fire",
    "run/callbacks.py:Callbacks.moved",
    "run/callbacks.py:Callbacks.says_stop",
    "run/checkpoint.py:random_state",
    "run/console.py:Console.__call__",
    "run/console.py:Console._move_bar",
    "run/journal.py:Journal.__call__",
    "run/journal.py:_plain",
    "run/observers.py:Observers.tell",
    "run/progress.py:Done.read",
    "run/progress.py:Progress.add",
    "run/progress.py:Progress.overdue",
    "run/progress.py:Progress.read",
    "run/report.py:Page.__call__",
    "run/signals.py:Signals.poll",
    "session.py:Session._begin_step",
    "session.py:Session.agree",
    "session.py:Session.epoch",
    "session.py:Session.finish_step",
    "session.py:Session.poll",
    "session.py:Session.reading_is_due",
    "session.py:Session.room",
    "session.py:Session.signals",
    "session.py:Session.steps",
    "session.py:Session.take",
    "session.py:Session.take.run",
    "session.py:Session.world",
    "session.py:Watch.after_micro_batch",
    "session.py:Watch.after_update",
    "session.py:Watch.backward",
    "session.py:Watch.before_update",
    "trainer.py:Trainer._act",
    "trainer.py:Trainer._epoch",
    "world.py:World.added",
    "world.py:World.highest",
    "world.py:World.is_first",
    "world.py:World.jointly",
    "world.py:World.share_gradients",
)
STEP_CODE, STEP_BRANCHES = 615, 96  # docs/decisions/0016-bf16-on-a-cpu.md

# Where `**kwargs`, getattr and hasattr may stand: rooms and files, then files with the number of
# functions that may use them.
DYNAMIC_ROOMS = ("model/", "run/callbacks.py", "compat.py", "__init__.py")
DYNAMIC_FUNCTIONS = {
    "hooks.py": 1,
    "run/accelerator.py": 1,  # stands in for any function of the script's
    "arguments.py": 1,  # docs/decisions/0001-rooms.md: old names must be understood when given
    "panel.py": 1,  # the constructor itself
    "cli.py": 5,  # the options of three panels in four verbs, and the wrapper that passes them on
}
HEAVY = {"torch", "transformers", "peft", "datasets", "numpy"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
BRANCH = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
BLOCK = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter"}
MUTATORS = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("add", "discard", "update", "setdefault", "popitem", "appendleft"),
}


@dataclass(frozen=True)
class Source:
    """A file of the package: its name below src/lorafit, text, tree and the rows that are code."""

    name: str
    text: str
    tree: ast.Module
    code: frozenset[int]

    @property
    def room(self) -> str:
        return self.name.rpartition("/")[0].partition("/")[0]

    def size(self, node: ast.AST) -> int:
        """Code lines of `node`, its decorators included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return len(self.code & set(range(first, node.end_lineno + 1)))


@dataclass(frozen=True)
class Named:
    """A function or class, and the functions and classes `around` it, outermost first."""

    source: Source
    node: Definition
    around: tuple[Definition, ...]

    @property
    def path(self) -> str:
        return ".".join(node.name for node in (*self.around, self.node))

    @property
    def place(self) -> str:
        return f"{self.source.name}:{self.node.lineno} {self.path}"

    @property
    def public(self) -> bool:
        local = any(isinstance(node, Function) for node in self.around)
        return not local and not any(part.startswith("_") for part in self.path.split("."))


@cache
def sources() -> tuple[Source, ...]:
    return tuple(read(path) for path in sorted(PACKAGE.rglob("*.py")))


def read(path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    code = code_rows(text) - docstring_rows(tree)
    return Source(path.relative_to(PACKAGE).as_posix(), text, tree, frozenset(code))


def code_rows(text: str) -> set[int]:
    """Rows that hold a token, less those that are blank or comment; docstrings included."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    rows: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            rows.update(range(token.start[0], token.end[0] + 1))
    return {row for row in rows if text.splitlines()[row - 1].strip()}


def docstring_rows(tree: ast.Module) -> set[int]:
    """Rows of strings that stand alone: docstrings, and the lines of prose below a name."""
    return {
        row
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for row in range(node.lineno, node.end_lineno + 1)
    }


@cache
def definitions() -> tuple[Named, ...]:
    return tuple(item for source in sources() for item in below(source, source.tree, ()))


def below(source: Source, node: ast.AST, around: tuple[Definition, ...]) -> Iterator[Named]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield Named(source, child, around)
            yield from below(source, child, (*around, child))
        else:
            yield from below(source, child, around)


def functions() -> Iterator[Named]:
    return (item for item in definitions() if isinstance(item.node, Function))


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}


def parameters(item: Named) -> tuple[list[ast.arg], list[ast.arg]]:
    """Positional and all parameters, the instance or class of a method left out."""
    given = item.node.args
    positional = [*given.posonlyargs, *given.args]
    method = bool(item.around) and isinstance(item.around[-1], ast.ClassDef)
    if method and "staticmethod" not in decorators(item.node):
        positional = positional[1:]
    stars = [star for star in (given.vararg, given.kwarg) if star]
    return positional, [*positional, *given.kwonlyargs, *stars]


def branches(node: ast.AST) -> int:
    """if, elif, for, while, except, case and conditional expressions."""
    return sum(isinstance(child, BRANCH) for child in ast.walk(node))


def nesting(node: ast.AST, parent: ast.AST | None = None) -> int:
    """How deep blocks lie in one another; `elif` goes no deeper than its `if`."""
    elif_of = isinstance(parent, ast.If) and isinstance(node, ast.If) and node in parent.orelse
    inside = max((nesting(child, node) for child in ast.iter_child_nodes(node)), default=0)
    return inside + (isinstance(node, BLOCK) and not elif_of)


def none(offenders: list[str], rule: str) -> None:
    assert not offenders, "\n  ".join([f"{rule}:", *offenders])


# Size


def test_files_are_small() -> None:
    over = [f"{s.name}: {len(s.code)}" for s in sources() if len(s.code) > FILE_CODE]
    none(over, f"more than {FILE_CODE} code lines")


def test_the_package_is_small() -> None:
    code = sum(len(source.code) for source in sources())
    lines = sum(len(source.text.splitlines()) for source in sources())
    assert code <= PACKAGE_CODE, f"{code} code lines, at most {PACKAGE_CODE}"
    assert lines <= PACKAGE_LINES, f"{lines} lines, at most {PACKAGE_LINES}"


def test_rooms_keep_their_budget() -> None:
    used = Counter[str]()
    for source in sources():
        used[source.room] += len(source.code)
    over = [
        f"{room or 'top'}: {lines} of {ROOM_CODE.get(room, 0)}"
        for room, lines in used.items()
        if lines > ROOM_CODE.get(room, 0)
    ]
    none(over, "rooms over their budget of code lines (a new room needs one)")


def test_functions_are_short() -> None:
    over = [
        f"{item.place}: {size}"
        for item in functions()
        if (size := item.source.size(item.node))
        > (KERNEL_CODE if item.source.room == "kernels" else FUNCTION_CODE)
    ]
    none(over, f"more than {FUNCTION_CODE} code lines (kernels {KERNEL_CODE})")


def test_functions_have_few_branches() -> None:
    counted = [(item.place, branches(item.node)) for item in functions()]
    none([f"{place}: {n}" for place, n in counted if n > BRANCHES], f"over {BRANCHES} branches")


def test_functions_are_flat() -> None:
    counted = [(item.place, nesting(item.node)) for item in functions()]
    none([f"{place}: {n}" for place, n in counted if n > NESTING], f"nested over {NESTING} deep")


def test_the_path_of_a_step_is_short() -> None:
    known = {f"{item.source.name}:{item.path}": item for item in functions()}
    none([name for name in STEP_PATH if name not in known], "STEP_PATH names no function")
    path = [known[name] for name in STEP_PATH]
    code = sum(item.source.size(item.node) for item in path)
    taken = sum(branches(item.node) for item in path)
    assert code <= STEP_CODE, f"the step's path has {code} code lines, at most {STEP_CODE}"
    assert taken <= STEP_BRANCHES, f"the step's path has {taken} branches, at most {STEP_BRANCHES}"


# Signatures and docstrings


def is_autograd(item: Named) -> bool:
    """A method of an autograd.Function, which torch calls by position."""
    around = item.around[-1] if item.around else None
    bases = around.bases if isinstance(around, ast.ClassDef) else []
    return any(ast.unparse(base) == "torch.autograd.Function" for base in bases)


def is_kernel(item: Named) -> bool:
    """Triton's language: pointers and sizes without types, described by the file."""
    return item.source.name in ("kernels/triton_source.py", "kernels/triton_attention.py")


def test_functions_take_few_parameters() -> None:
    over = []
    for item in functions():
        positional, every = parameters(item)
        # a verb's parameters are its options
        verb = item.source.name == "cli.py" and "command()" in decorators(item.node)
        shaped = (
            is_autograd(item)
            or is_kernel(item)
            or verb
            or (
                item.source.name in TRANSFORMERS_SHAPED
                and (item.public or item.node.name == "__init__")
            )
        )
        if not shaped and (len(every) > PARAMETERS or len(positional) > POSITIONAL):
            over.append(f"{item.place}: {len(every)}, {len(positional)} by position")
    none(over, f"over {PARAMETERS} parameters, or over {POSITIONAL} that may be given by position")


def test_functions_are_annotated() -> None:
    bare = [
        f"{item.place}: {', '.join(missing)}"
        for item in functions()
        if not is_kernel(item)
        and (
            missing := [
                *(arg.arg for arg in parameters(item)[1] if arg.annotation is None),
                *(["what it returns"] if item.node.returns is None else []),
            ]
        )
    ]
    none(bare, "without annotation")


def test_public_names_have_docstrings() -> None:
    modules = [s.name for s in sources() if s.code and not ast.get_docstring(s.tree)]
    names = [
        item.place
        for item in definitions()
        if item.public
        and not is_kernel(item)
        and not {"setter", "deleter", "overload"} & decorators(item.node)
        and not ast.get_docstring(item.node)
    ]
    none([*modules, *names], "public, without docstring")


# Forbidden


def dynamic_rows(tree: ast.Module) -> Iterator[int]:
    """Where a `**keyword` parameter is taken, or getattr or hasattr named."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments) and node.kwarg:
            yield node.kwarg.lineno
        elif isinstance(node, ast.Name) and node.id in ("getattr", "hasattr"):
            yield node.lineno


def test_attributes_are_looked_up_in_the_open() -> None:
    over = []
    for source in sources():
        users = {owner(source, row) for row in dynamic_rows(source.tree)}
        allowed = source.name.startswith(DYNAMIC_ROOMS)
        if not allowed and len(users) > DYNAMIC_FUNCTIONS.get(source.name, 0):
            over.append(f"{source.name}: {', '.join(sorted(users))}")
    none(over, "**kwargs, getattr or hasattr where, or in more functions than, they may stand")


def owner(source: Source, row: int) -> str:
    """The outermost function or method around `row`."""
    around = [
        item.path
        for item in definitions()
        if item.source is source
        and isinstance(item.node, Function)
        and item.node.lineno <= row <= item.node.end_lineno
    ]
    return min(around, key=len, default="the module")


def test_nothing_is_printed() -> None:
    printed = [
        f"{source.name}:{node.lineno}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id in ("print", "breakpoint")
    ]
    none(printed, "print or breakpoint (cli, console and demo write through rich)")


def is_mutable(value: ast.expr | None) -> bool:
    """Whether `value` is a list, dict or set as such: not one frozen by a call around it."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2].partition("[")[0] in MUTABLE_CALLS
    return isinstance(value, MUTABLE)


def module_containers(tree: ast.Module) -> Iterator[ast.Name]:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target for target in targets if isinstance(target, ast.Name))


def mutated(node: ast.AST) -> str:
    """The name whose contents `node` changes, or which it rebinds; empty if none."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        node = node.value
    elif isinstance(node, ast.AugAssign):
        node = node.target
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value if node.func.attr in MUTATORS else node
    else:
        return ""
    return node.id if isinstance(node, ast.Name) else ""


def test_modules_hold_no_state() -> None:
    """Lists, dicts and sets of a module are constants: UPPER_CASE, never changed; no `global`."""
    held = []
    for source in sources():
        names = {name.id for name in module_containers(source.tree)} - {"__all__"}
        held += [f"{source.name}: {name} is not UPPER_CASE" for name in names if not name.isupper()]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Global):
                held.append(f"{source.name}:{node.lineno} global {', '.join(node.names)}")
            elif mutated(node) in names:
                held.append(f"{source.name}:{node.lineno} changes {mutated(node)}")
    none(held, "mutable module state")


def is_inert(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
    return not isinstance(node, (*BLOCK, ast.Delete, ast.Assert)) and not (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    )


def test_importing_does_no_work() -> None:
    """A module's own level holds imports, definitions, names and prose."""
    busy = [f"{s.name}:{n.lineno}" for s in sources() for n in s.tree.body if not is_inert(n)]
    none(busy, "work at import time")


def test_nothing_is_called_utils() -> None:
    vague = [s.name for s in sources() if s.name.rpartition("/")[2] in ("utils.py", "helpers.py")]
    none(vague, "a file says what it owns")


def test_nothing_inside_imports_the_front_door() -> None:
    through = [
        f"{source.name}:{node.lineno} {alias.name}"
        for source in sources()
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.ImportFrom) and node.module == "lorafit" and not node.level)
        or (isinstance(node, ast.Import) and any(a.name == "lorafit" for a in node.names))
        for alias in node.names
        if not (PACKAGE / alias.name).is_dir() and not (PACKAGE / f"{alias.name}.py").is_file()
    ]
    none(through, "imports a name from lorafit/__init__.py")


# What is loaded, and when


def run(code: str) -> str:
    """What `code` writes as its last line, in a Python of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    loaded = run(
        "import sys, json\n"
        f"sys.argv = ['lorafit', *{words}]\n"
        "from lorafit import cli\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
        "print()\n"
        "print(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    none(sorted(HEAVY & set(json.loads(loaded))), f"loaded by lorafit {' '.join(words)}")


def test_public_names_are_served_when_asked() -> None:
    told = json.loads(
        run(
            "import sys, json, lorafit\n"
            "before = [name for name in sys.modules if '.' not in name]\n"
            "served = [name for name in dir(lorafit) if not name.startswith('_')]\n"
            "values = [getattr(lorafit, name) for name in lorafit.__all__]\n"
            "unknown = hasattr(lorafit, 'no_such_name')\n"
            "print(json.dumps([list(lorafit.__all__), served, before, unknown]))"
        )
    )
    names, served, before, unknown = told
    none(sorted(HEAVY & set(before)), "loaded by import lorafit")
    public = [name for name in names if not name.startswith("_")]
    assert sorted(public) == sorted(served), "lorafit.__all__ and dir(lorafit) differ"
    assert not unknown, "a name that does not exist is served"
