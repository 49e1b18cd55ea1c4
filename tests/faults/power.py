"""A disk whose power fails: from a log of operations, the states that it may be found in.

Two things hold, and nothing else: what an fsync of a file or folder covered is there, and each
operation on names is there whole or not at all. Data that was not synced may be there, in part or
not; names that were not synced may have been kept up to some operation, or each on its own.
"""

import hashlib
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

Kind = IntEnum(
    "Kind", "CREATE WRITE SYNC TRUNCATE RENAME EXCHANGE MKDIR UNLINK RMDIR LINK", start=1
)
Tree = dict[str, "bytes | Tree"]


@dataclass(frozen=True)
class Operation:
    """One line of the log."""

    kind: Kind
    path: str
    other: str
    offset: int
    data: bytes


def read(log: Path) -> list[Operation]:
    """The operations that shim.c wrote."""
    raw, at, found = log.read_bytes(), 0, []
    head = struct.Struct("=IqIII")
    while at < len(raw):
        kind, offset, *sizes = head.unpack_from(raw, at)
        at += head.size
        parts = []
        for size in sizes:
            parts.append(raw[at : at + size])
            at += size
        path, other, data = parts
        found.append(Operation(Kind(kind), path.decode(), other.decode(), offset, data))
    return found


@dataclass(eq=False)
class Node:
    """A file or a folder, whatever it is called: `changes` are (operation, offset, data), data
    being None for a truncation; `synced` the operations that synced it."""

    folder: bool
    changes: list[tuple[int, int, bytes | None]] = field(default_factory=list)
    synced: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Naming:
    """Names that one operation sets or, with None, takes away."""

    at: int
    entries: tuple[tuple[Node, str, Node | None], ...]


class Disk:
    """All that the operations did, by file and folder rather than by path."""

    def __init__(self, operations: list[Operation], root: Path) -> None:
        self.root, self.top = str(root), Node(folder=True)
        self.namings: list[Naming] = []
        self._now: dict[Node, dict[str, Node]] = {self.top: {}}
        for number, operation in enumerate(operations):
            self._take(number, operation)

    def _parent(self, path: str) -> tuple[Node, str]:
        *folders, name = path.removeprefix(self.root).strip("/").split("/")
        node = self.top
        for part in folders:
            node = self._now[node][part]
        return node, name

    def _node(self, path: str) -> Node:
        if path == self.root:
            return self.top
        parent, name = self._parent(path)
        return self._now[parent][name]

    def _take(self, at: int, operation: Operation) -> None:
        match operation.kind:
            case Kind.WRITE:
                self._node(operation.path).changes.append((at, operation.offset, operation.data))
            case Kind.TRUNCATE:
                self._node(operation.path).changes.append((at, operation.offset, None))
            case Kind.SYNC:
                self._node(operation.path).synced.append(at)
            case _:
                self._name(at, operation)

    def _name(self, at: int, operation: Operation) -> None:
        parent, name = self._parent(operation.path)
        here = self._now[parent]
        match operation.kind:
            case Kind.CREATE | Kind.MKDIR:
                made = Node(folder=operation.kind == Kind.MKDIR)
                self._now.setdefault(made, {})
                entries = [(parent, name, made)]
            case Kind.UNLINK | Kind.RMDIR:
                entries = [(parent, name, None)]
            case Kind.LINK:
                entries = [(*self._parent(operation.other), here[name])]
            case Kind.RENAME:
                entries = [(parent, name, None), (*self._parent(operation.other), here[name])]
            case Kind.EXCHANGE:
                other, its = self._parent(operation.other)
                entries = [(parent, name, self._now[other][its]), (other, its, here[name])]
        for folder, called, node in entries:
            if node is None:
                self._now[folder].pop(called)
            else:
                self._now[folder][called] = node
        self.namings.append(Naming(at, tuple(entries)))

    def after(self, at: int, *, seed: str, style: int) -> Tree:
        """A state in which the disk may be found if the power fails before operation `at`.

        Args:
            style: 0: nothing that was not synced; 1: every name, no such data; 2: names up to some
                operation; 3: each name on its own. From 2 on data is drawn. More are as 2 and 3.
        """
        draw = random.Random(seed)
        kind = style if style < 2 else 2 + style % 2
        names: dict[Node, dict[str, Node]] = {}
        past = [naming for naming in self.namings if naming.at < at]
        pinned = [self._is_synced(naming, at) for naming in past]
        # kept in order: everything up to the last one that is synced, and some of what follows
        least = max((n + 1 for n, sure in enumerate(pinned) if sure), default=0)
        upto = draw.randint(least, len(past))
        for number, naming in enumerate(past):
            chosen = (False, True, number < upto, draw.random() < 0.5)[kind]
            if not (pinned[number] or chosen):
                continue
            for folder, called, node in naming.entries:
                entries = names.setdefault(folder, {})
                if node is None:
                    entries.pop(called, None)
                else:
                    entries[called] = node
        return self._tree(self.top, names, at=at, draw=draw if kind >= 2 else None)

    def _is_synced(self, naming: Naming, at: int) -> bool:
        folders = [folder for folder, _, _ in naming.entries]
        return all(any(naming.at < s < at for s in folder.synced) for folder in folders)

    def _tree(
        self,
        node: Node,
        names: dict[Node, dict[str, Node]],
        *,
        at: int,
        draw: random.Random | None,
        above: tuple[Node, ...] = (),
    ) -> Tree:
        found: Tree = {}
        for name, below in sorted(names.get(node, {}).items()):
            if below in above:
                continue
            if below.folder:
                found[name] = self._tree(below, names, at=at, draw=draw, above=(*above, node))
            else:
                found[name] = _content(below, at, draw)
        return found


def _content(node: Node, at: int, draw: random.Random | None) -> bytes:
    synced = max((s for s in node.synced if s < at), default=-1)
    content = bytearray()
    for when, offset, data in node.changes:
        if when >= at:
            break
        if when > synced:
            if draw is None or draw.random() < 0.4:
                continue
            if data and draw.random() < 0.3:
                data = data[: draw.randint(0, len(data))]
        if data is None:
            content[offset:] = b"\0" * 0
            content.extend(b"\0" * (offset - len(content)))
            continue
        content.extend(b"\0" * (offset - len(content)))
        content[offset : offset + len(data)] = data
    return bytes(content)


def _lines(tree: Tree, above: str = "") -> Iterator[bytes]:
    for name, held in sorted(tree.items()):
        if isinstance(held, bytes):
            yield f"{above}/{name} {hashlib.sha256(held).hexdigest()}".encode()
        else:
            yield f"{above}/{name}/".encode()
            yield from _lines(held, f"{above}/{name}")


def digest(tree: Tree) -> str:
    """The same for the same names and contents."""
    return hashlib.sha256(b"\n".join(_lines(tree))).hexdigest()


def write(tree: Tree, folder: Path) -> None:
    """Make the files and folders in `folder`."""
    for name, held in tree.items():
        path = folder / name
        if isinstance(held, bytes):
            path.write_bytes(held)
        else:
            path.mkdir()
            write(held, path)
