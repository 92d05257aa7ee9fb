"""The pipeline as a graph: every run, every ancestor that a manifest knows of, and what was made from what."""

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

    state    "finished", "unfinished"; "told" where the manifest of a descendant alone tells of it; "foreign" for a
             model without a manifest; "file" for records without one
    parents  names of nodes, each once
    run      what was given of it; None for an ancestor that was not
    """

    name: str
    stage: str
    state: str
    path: str
    manifest: Mapping[str, Any] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    run: Run | None = None


def ancestry(runs: Sequence[Run], files: Iterable[RecordsFile]) -> list[Node]:
    """Return the runs, their ancestors, and the files that only a stage can have written, parents before children."""
    nodes: dict[str, Node] = {}  # by the digest of the manifest, or by the path of a folder without one
    manifests: dict[str, dict[str, Any]] = {}  # of ancestors, by digest

    def add(key: str, manifest: Mapping[str, Any], path: str, state: str) -> Node:
        stage = str(manifest.get("stage", "model"))
        return nodes.setdefault(key, Node(f"run-{len(nodes) + 1}", stage, state, path, manifest))

    for run in runs:  # before their ancestors, which are often among them
        own, ancestors = flattened(run.manifest or {})
        key = os.path.normpath(run.path) if run.manifest is None else manifest_digest(run.manifest)
        node = add(key, own, run.path, run.state)
        node.run = node.run or run
        manifests = {**ancestors, **manifests}
    given = _writers(nodes.values())
    queue = list(nodes.values())
    for node in queue:  # which grows by the parents that are new
        read = [
            item
            for item in objects(node.manifest.get("inputs"))
            if item.get("manifest_sha256") in manifests and _identity(item) not in given
        ]
        for item in (*objects(node.manifest.get("parents")), *read):
            path, digest = str(item.get("path")), item.get("manifest_sha256", "")
            known, manifest = len(nodes), manifests.get(digest)
            # the run itself may have been given, and its descendant's manifest have been edited
            key = os.path.normpath(path) if manifest is None and digest not in nodes else digest
            parent = add(key, manifest or {}, path, "foreign" if manifest is None else "told")
            if parent.name not in node.parents:
                node.parents.append(parent.name)
            if len(nodes) > known:
                queue.append(parent)
    # the report that a run of probe-knowledge has written beside its conversations
    reports = {os.path.basename(str(as_object(node.manifest.get("options")).get("report"))) for node in nodes.values()}
    for file in files:
        stage = KINDS[file.kind].stage
        if file.run is None and stage is not None and os.path.basename(file.path) not in reports:
            run = Run(file.path, None, "file", None, Path(file.path))
            name = f"run-{len(nodes) + 1}"
            nodes[name] = Node(name, stage, "file", file.path, run=run)
    writers = _writers(nodes.values())
    for node in nodes.values():  # a run that has read a file is a child of what wrote it
        for item in objects(node.manifest.get("inputs")):
            writer = writers.get(_identity(item))
            if writer not in (None, node.name, *node.parents):
                node.parents.append(str(writer))
    return _in_order({node.name: node for node in nodes.values()})


def _writers(nodes: Iterable[Node]) -> dict[tuple[str, int], str]:
    """Map what identifies a file to the name of the node that wrote it."""
    return {
        (node.run.output.name, node.run.output.stat().st_size if node.run.output.is_file() else -2): node.name
        for node in nodes
        if node.run is not None and node.run.folder is None
    }


def _identity(item: Mapping[str, Any]) -> tuple[str, int]:
    """Identify a manifest's input by name and size. To compare hashes would be to read every corpus again."""
    size = item.get("bytes")
    return os.path.basename(str(item.get("path"))), size if isinstance(size, int) else -1


def _in_order(nodes: Mapping[str, Node]) -> list[Node]:
    """Parents first; of those that are free, a child of the latest, so that a chain stays together, else the oldest."""
    position = {name: number for number, name in enumerate(nodes)}

    def age(name: str) -> tuple[str, int]:
        run, created = nodes[name].run, nodes[name].manifest.get("created")
        return str(created or (changed(run.output) if run and run.output.exists() else "")), position[name]

    done: dict[str, int] = {}
    waiting = sorted(nodes, key=age)
    while waiting:
        # files alone can make a circle: the same one written and read
        free = [name for name in waiting if all(parent in done for parent in nodes[name].parents)] or waiting[:1]
        name = max(free, key=lambda name: max((done.get(parent, 0) for parent in nodes[name].parents), default=0))
        waiting.remove(name)
        done[name] = len(done) + 1
    return [nodes[name] for name in done]


# ---- the drawing: a column of nodes, with lanes beside it, as `git log --graph` has them


class Rail(NamedTuple):
    """Lines beside one node, by lanes from 0: its own, those of its parents above, those that go by, and whether a line
    goes on from it."""

    lane: int
    incoming: tuple[int, ...]
    passing: tuple[int, ...]
    leaving: bool


def rails(parents_of: Mapping[str, Sequence[str]]) -> list[Rail]:
    """Draw the lines beside each node, given the names of its parents, parents before children. A node occupies its
    lane until its last child."""
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
