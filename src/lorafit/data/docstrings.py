"""Question and answer rows parsed from the running Python's own standard library.

Owns which definitions count as documented, what their first sentence is, and which modules are
held out of all training. Sources are parsed, never imported or run. Knows no tokens or models.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lorafit.errors import DataError

# Parts of the library that are no public interface: tests, demonstrations, tools and tables.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"} | {
    "site-packages",
    "dist-packages",
    "lib-dynload",
}

# Where a file's name is not the name under which people import what it defines.
_PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}

_SENTENCE = re.compile(r".*?(?<!e\.g)(?<!i\.e)(?<!etc)\.(?=\s|$)")
_ANSWER = re.compile(r"[A-Z](?!ee |ame as |ike |[\w.]*\()[^>]{18,158}\.")


@dataclass(frozen=True)
class QuestionAnswer:
    """One row: `question` and `answer`, and the `module` and `line` (from 1) they stand at."""

    question: str
    answer: str
    module: str
    line: int


@dataclass(frozen=True)
class Definition:
    """A documented public function, class or method: dotted `name`, `signature` without a body."""

    name: str
    signature: str
    docstring: str
    module: str
    line: int

    @property
    def first_sentence(self) -> str:
        """The docstring's first sentence, whitespace folded; empty where its opening has none."""
        paragraph = " ".join(self.docstring.split("\n\n")[0].split())
        found = _SENTENCE.match(paragraph)
        return found[0] if found else ""


def pairs(
    train: int = 500, evaluation: int = 100
) -> tuple[list[QuestionAnswer], list[QuestionAnswer]]:
    """(training rows, evaluation rows), the latter from held-out modules only.

    The same Python gives the same rows in the same order (by a hash of the question). No answer
    occurs twice, and no evaluation answer stands anywhere in a source outside the held-out modules.

    Raises:
        DataError: this Python carries too few of its own sources.
    """
    elsewhere, seen = _training_text(), set[str]()
    kept: dict[bool, list[QuestionAnswer]] = {False: [], True: []}
    wanted = {False: train, True: evaluation}
    for row in sorted(_rows(), key=lambda row: sha256(row.question.encode()).digest()):
        side = is_held_out(row.module)
        if len(kept[side]) == wanted[side] or {row.question, row.answer} & seen:
            continue
        if not (side and row.answer in elsewhere):
            seen |= {row.question, row.answer}
            kept[side].append(row)
    if len(kept[False]) < train or len(kept[True]) < evaluation:
        raise DataError(
            f"{library()} gives {len(kept[False])} rows to train on and {len(kept[True])} to"
            f" evaluate, not {train} and {evaluation}.",
            why="The rows are parsed from the standard library's sources, which this Python lacks.",
            fix="Use a Python that keeps its .py files (python.org, uv, pyenv, conda, Debian).",
        )
    return kept[False], kept[True]


def is_held_out(module: str) -> bool:
    """Whether a module, by a hash of its top-level name, is kept out of training (one in six)."""
    return sha256(module.split(".")[0].strip("_").encode()).digest()[0] % 6 == 0


def library() -> Path:
    """The folder that holds the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources() -> Iterator[tuple[str, Path]]:
    """(module, file) for every source of the standard library itself, in order of path."""
    root = library()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if not _SKIPPED & set(parts):
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(parts)
            yield _PUBLIC_NAMES.get(name, name), file


def definitions(module: str, file: Path) -> Iterator[Definition]:
    """Each public documented function, class and method of `file`; none if it cannot be parsed."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # the library carries a few files that are wrong on purpose
        return
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        owner, parent = pending.pop(0)
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.If | ast.Try):
                pending.append((owner, node))
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name, docstring = f"{owner}.{node.name}", ast.get_docstring(node)
            if node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                pending.append((name, node))
            if docstring:
                yield Definition(name, _signature(node), docstring, module, node.lineno)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, node.bases))})"
    return f"({ast.unparse(node.args)})"


def _training_text() -> str:
    files = (file for module, file in sources() if not is_held_out(module))
    return " ".join(" ".join(file.read_text("utf-8", "replace").split()) for file in files)


def _rows() -> Iterator[QuestionAnswer]:
    for module, file in sources():
        if any(word.startswith("_") for word in module.split(".")):
            continue
        for found in definitions(module, file):
            if _ANSWER.fullmatch(found.first_sentence):
                yield QuestionAnswer(
                    f"What does {found.name} do?", found.first_sentence, module, found.line
                )
