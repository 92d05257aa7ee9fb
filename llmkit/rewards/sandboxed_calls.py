"""Run inside the sandbox: tests in one process call functions of a model's program in another, with plain values.

`serve` is the side of the program, `test` the side of the tests. They exchange lines of JSON. Results are rebuilt as
None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset or dict, so that no object with methods of the
program reaches the tests; any other type fails the call. This file is sent as source text and imports only the standard
library.
"""

import builtins
import gc
import json
import os
import sys
import types

ENDING = ("StopIteration", "StopAsyncIteration")  # would end `all(map(...))` of a test early, as success
ITERATORS = tuple(type(make([])) for make in (iter, reversed)) + tuple(type(iter(make())) for make in (dict, set))
BUILT = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def pack(value):
    """Convert a plain value to JSON; subclasses become their base class. Raises TypeError for other types."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return ["int", int.__int__(value)] if isinstance(value, int) else ["float", float.__float__(value)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[pack(key), pack(item)] for key, item in value.items()]]
    for name, kind in BUILT.items():
        if isinstance(value, kind):
            return [name, [pack(item) for item in value]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared by a test; return plain values")


def unpack(value):
    """Reverse `pack`. Raises ValueError or TypeError for anything else."""
    if value is None or isinstance(value, (bool, str)):
        return value
    kind, *content = value
    if kind in ("int", "float", "complex", "bytes"):
        make = {"int": int, "float": float, "complex": complex, "bytes": bytes.fromhex}[kind]
        if any(isinstance(item, (str, list)) != (kind == "bytes") for item in content):
            raise ValueError("no plain value")
        return make(*content)
    (items,) = content
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    return BUILT[kind](unpack(item) for item in items)


def serve(source, requests, replies):
    """Run a program, then its functions as requested, until the requests end."""
    with os.fdopen(requests, "rb") as incoming, os.fdopen(replies, "wb") as answered:
        module = sys.modules["solution"] = types.ModuleType("solution")
        exec(compile(source, "<solution>", "exec"), module.__dict__)
        for line in incoming:
            name, positional, keywords = json.loads(line)
            positional, keywords = map(unpack, (positional, keywords))
            try:
                value = getattr(module, name)(*positional, **keywords)  # pyright: ignore
                reply = ["value", pack(value), pack(positional)]
            except Exception as error:
                reply = ["error", type(error).__name__, str(error)[:1000]]
            answered.write(json.dumps(reply).encode() + b"\n")
            answered.flush()


def test(prompt, tests, names, entry_point, word, requests, replies):
    """Run the code of the prompt and the tests, with `names` as functions of the program; then print `word`."""
    outgoing, answered = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")

    def function(name):
        def call(*positional, **keywords):
            outgoing.write(json.dumps([name, pack(positional), pack(keywords)]).encode() + b"\n")
            outgoing.flush()
            line = answered.readline(1 << 24)
            if not line.endswith(b"\n"):
                raise RuntimeError("the program ended")
            kind, *content = json.loads(line)
            if kind == "error":
                raise error_of(*content)
            value, changed = map(unpack, content)
            put_back(positional, changed)
            return value

        return call

    module = types.ModuleType("tests")
    exec(compile(prompt, "<prompt>", "exec"), module.__dict__)
    module.__dict__.update({name: function(name) for name in names})
    exec(compile(tests, "<tests>", "exec"), module.__dict__)
    if entry_point:
        module.__dict__["check"](module.__dict__[entry_point])
    print("\n" + word)


def error_of(name, message):
    """Return the exception that the program raised, if it is built in, else a RuntimeError."""
    kind = getattr(builtins, str(name), None)
    if name in ENDING:
        kind = None
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
        return kind(str(message))
    return RuntimeError(f"{name}: {message}")


def put_back(given, changed):
    """Apply the function's changes to the lists, dictionaries and sets that it was given."""
    for mine, theirs in zip(given, changed, strict=True):
        if type(mine) is not type(theirs) or mine == theirs:
            continue
        if any(isinstance(referrer, ITERATORS) for referrer in gc.get_referrers(mine)):
            raise RuntimeError("the program changed what a test iterates over")
        if isinstance(mine, list):
            mine[:] = theirs
        elif isinstance(mine, (dict, set)):
            mine.clear()
            mine.update(theirs)
