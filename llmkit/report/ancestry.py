"""The pipeline as a graph of runs and of all ancestors that their manifests name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llmkit.io.manifest import flattened, manifest_digest
from llmkit.report.records import KINDS, RecordsFile, as_object, objects
from llmkit.report.runs import Run, changed


@dataclass
class Node:
    """One output and how it was made.

    state    "finished", "unfinished"; "told" if only a descendant's manifest names it; "foreign" for a model without
             a manifest; "file" for records without one
    parents  names of nodes, each once
    run      None for an ancestor that was not given
    """

    name: str
    stage: str
    state: str
    path: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    run: Run | None = None


def ancestry(runs: Sequence[Run], files: Iterable[RecordsFile]) -> list[Node]:
    """Return runs, their ancestors, and files that only one stage can have written, parents before children."""
    nodes: dict[str, Node] = {}  # by the digest of the manifest, or by the path of a folder without one
    manifests: dict[str, dict[str, Any]] = {}  # ancestors' manifests by digest

    def add(key: str, manifest: Mapping[str, Any], path: str, state: str) -> Node:
        stage = str(manifest.get("stage", "model"))
        return nodes.setdefault(key, Node(f"run-{len(nodes) + 1}", stage, state, path, manifest))

    for run in runs:  # add them before their ancestors, which are often given too
        own, ancestors = flattened(run.manifest or {})
        key = os.path.normpath(run.path) if run.manifest is None else manifest_digest(run.manifest)
        node = add(key, own, run.path, run.state)
        node.run = node.run or run
        manifests = {**ancestors, **manifests}
    given = _writers(nodes.values())
    queue = list(nodes.values())
    for node in queue:  # grows by new parents
        read = [
            item
            for item in objects(node.manifest.get("inputs"))
            if item.get("manifest_sha256") in manifests and _identity(item) not in given
        ]
        for item in (*objects(node.manifest.get("parents")), *read):
            path, digest = str(item.get("path")), item.get("manifest_sha256", "")
            known, manifest = len(nodes), manifests.get(digest)
            # the parent may be given as a run even if the descendant's manifest was edited
            key = os.path.normpath(path) if manifest is None and digest not in nodes else digest
            parent = add(key, manifest or {}, path, "foreign" if manifest is None else "told")
            if parent.name not in node.parents:
                node.parents.append(parent.name)
            if len(nodes) > known:
                queue.append(parent)
    # reports that probe-knowledge wrote next to its conversations
    reports = {os.path.basename(str(as_object(node.manifest.get("options")).get("report"))) for node in nodes.values()}
    for file in files:
        stage = KINDS[file.kind].stage
        if file.run is None and stage is not None and os.path.basename(file.path) not in reports:
            run = Run(file.path, None, "file", None, Path(file.path))
            name = f"run-{len(nodes) + 1}"
            nodes[name] = Node(name, stage, "file", file.path, run=run)
    writers = _writers(nodes.values())
    for node in nodes.values():  # a run that read a file is a child of the run that wrote it
        for item in objects(node.manifest.get("inputs")):
            writer = writers.get(_identity(item))
            if writer not in (None, node.name, *node.parents):
                node.parents.append(str(writer))
    return _in_order({node.name: node for node in nodes.values()})


def _writers(nodes: Iterable[Node]) -> dict[tuple[str, int], str]:
    """Map a file's identity to the name of the node that wrote it."""
    return {
        (node.run.output.name, node.run.output.stat().st_size if node.run.output.is_file() else -2): node.name
        for node in nodes
        if node.run is not None and node.run.folder is None
    }


def _identity(item: Mapping[str, Any]) -> tuple[str, int]:
    """Identify a manifest's input by name and size, because hashing would read every corpus again."""
    size = item.get("bytes")
    return os.path.basename(str(item.get("path"))), size if isinstance(size, int) else -1


def _in_order(nodes: Mapping[str, Node]) -> list[Node]:
    """Sort topologically; of the free nodes take a child of the latest, to keep chains together, else the oldest."""
    position = {name: number for number, name in enumerate(nodes)}

    def age(name: str) -> tuple[str, int]:
        run, created = nodes[name].run, nodes[name].manifest.get("created")
        return str(created or (changed(run.output) if run and run.output.exists() else "")), position[name]

    done: dict[str, int] = {}
    waiting = sorted(nodes, key=age)
    while waiting:
        # only files can form a cycle: the same file written and read
        free = [name for name in waiting if all(parent in done for parent in nodes[name].parents)] or waiting[:1]
        name = max(free, key=lambda name: max((done.get(parent, 0) for parent in nodes[name].parents), default=0))
        waiting.remove(name)
        done[name] = len(done) + 1
    return [nodes[name] for name in done]


# ---- the drawing: a column of nodes with lanes beside it, as in `git log --graph`


class Rail(NamedTuple):
    """The lines beside one node, as lanes from 0: its own, those from its parents, those that pass by, and whether a
    line leaves it."""

    lane: int
    incoming: tuple[int, ...]
    passing: tuple[int, ...]
    leaving: bool


def rails(parents_of: Mapping[str, Sequence[str]]) -> list[Rail]:
    """Lay out the lines beside each node, given each node's parents, parents before children. A node occupies its lane
    until its last child."""
    waiting = Counter(parent for parents in parents_of.values() for parent in parents)
    lanes: list[str | None] = []
    drawn: list[Rail] = []
    for node, parents in parents_of.items():
        lane_of = {name: lane for lane, name in enumerate(lanes) if name is not None}
        drawn_above = [name for name in parents if name in lane_of]
        incoming = tuple(lane_of[name] for name in drawn_above)
        for name in parents:
            waiting[name] -= 1
        for name in drawn_above:
            if not waiting[name]:
                lanes[lane_of[name]] = None
        ended = [lane for lane in incoming if lanes[lane] is None]
        free = [lane for lane, name in enumerate(lanes) if name is None] + [len(lanes)]
        lane = min(ended or free)
        if lane == len(lanes):
            lanes.append(None)
        passing = tuple(lane for lane, name in enumerate(lanes) if name is not None)
        leaving = waiting[node] > 0
        lanes[lane] = node if leaving else None
        drawn.append(Rail(lane, incoming, passing, leaving))
    return drawn
