"""JSON schemas as constraints on the tokens of a text, by llguidance: an Earley parser over a trie of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llmkit.errors import UserError
from llmkit.tokenizer.encoding import Tokenizer


class JsonConstraint:
    """What may follow in one text, so that it ends as JSON of a schema."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._size = matcher, vocab_size

    def copy(self) -> JsonConstraint:
        return JsonConstraint(self._matcher.deep_copy(), self._size)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, bool (V,); those that end a text once it is whole."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)

    def take(self, token: int) -> bool:
        """Append an allowed token; False beyond the limits of the parser, which then allows the end alone."""
        return self._matcher.consume_token(token) and not self._matcher.is_error()


class JsonSchemas:
    """Compiles schemas for texts of a tokenizer that end by one of `end_ids`.

    Raises UserError without llguidance, and for a tokenizer that it cannot read (WordPiece, Unigram with Metaspace).
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        self._size = tokenizer.vocab_size
        try:
            from llguidance import LLTokenizer

            self._tokens = LLTokenizer(tokenizer.path.read_text("utf-8"), n_vocab=self._size, eos_token=sorted(end_ids))
        except ImportError:
            raise UserError("JSON schemas need the package llguidance; pip install 'llmkit[serve]'") from None
        except ValueError as error:
            raise UserError(f"{tokenizer.path}: llguidance cannot read it: {str(error)[:200]}") from None

    def compile(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """The constraint of a schema, with a space at most between JSON's tokens. Raises UserError for a wrong one."""
        from llguidance import LLMatcher

        # unbounded white space may go on until max_tokens
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": " ?"})
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"expected a JSON schema, found one with: {matcher.get_error()}")
        return JsonConstraint(matcher, self._size)
