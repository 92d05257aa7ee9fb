"""The schemas: a record that does not fit is named with what was expected."""

from __future__ import annotations

import pytest

from llmkit.errors import UserError
from llmkit.io.records import Row, check_document


def row(**value: object) -> Row:
    return Row(value, "d.jsonl", 7)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (check_document, {}, "d.jsonl:7: expected field 'text' (a document), found []"),
        (check_document, {"text": {}}, "d.jsonl:7: expected 'text' to be a string, found an object"),
        (check_document, {"text": "x", "source": 3}, "d.jsonl:7: expected 'source' to be a string, found a number"),
    ],
)
def test_a_bad_record_is_named(check, value: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check(row(**value))
    assert str(caught.value) == message
