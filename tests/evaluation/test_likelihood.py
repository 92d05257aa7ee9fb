"""Log-likelihoods are independent of the batch, and tokens are split as in lm-evaluation-harness."""

from __future__ import annotations

import json
import random

import pytest
import torch
from tiny import END, make_model, save_folder

from llmkit.errors import UserError
from llmkit.evaluation.likelihood import Scorer, encode_pairs, windows
from llmkit.tokenizer.encoding import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_folder(tmp_path_factory.mktemp("model") / "base", make_model()))


def alone(model, ids, start):
    """Return the log-probability of ids[start:], from a pass over this sequence alone, and whether it is greedy."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids[:-1]])))[0, start - 1 :]
    targets = torch.tensor(ids[start:])
    logprob = torch.log_softmax(logits, -1).gather(1, targets.unsqueeze(1)).sum()
    return float(logprob), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("sizes", [{}, {"layer_windows": [4, None]}], ids=["full", "window"])
def test_sequences_that_share_beginnings_score_as_if_alone(sizes):
    model, draw = make_model(context=64, **sizes), random.Random(0)
    stems = [[draw.randrange(256) for _ in range(draw.randrange(1, 30))] for _ in range(6)]
    requests = []
    for _ in range(150):
        tail = [draw.randrange(3) for _ in range(draw.randrange(1, 12))]
        ids = [END, *draw.choice(stems), *tail]
        requests.append((ids, draw.randrange(1, len(ids))))
    requests += requests[:5]  # repeated requests
    with torch.no_grad():  # a greedy one
        best = int(model.logits(model(torch.tensor([[END, *stems[0]]])))[0, -1].argmax())
    requests.append(([END, *stems[0], best], 1 + len(stems[0])))
    scorer = Scorer(model)
    scores = scorer.score(requests)
    for (ids, start), score in zip(requests, scores, strict=True):
        logprob, is_greedy = alone(model, ids, start)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert (score.is_greedy, score.tokens, score.truncated) == (is_greedy, len(ids) - start, False)
    assert scores[-1].is_greedy
    assert scorer.computed < sum(len(ids) - 1 for ids, _ in requests) / 2


def test_a_context_is_cut_on_the_left_and_a_long_continuation_is_scored_in_pieces():
    model, draw = make_model(context=16), random.Random(1)
    ids = [draw.randrange(256) for _ in range(50)]
    cut, whole = Scorer(model).score([(ids, 40), (ids, 1)])
    assert cut.truncated and cut.logprob == pytest.approx(alone(model, ids[-17:], 7)[0], abs=1e-4)
    pieces = [(ids[:17], 1), (ids[16:33], 1), (ids[32:49], 1), (ids[33:], 16)]
    assert windows((ids, 1), 16) == pieces  # like lm-evaluation-harness's disjoint rolling windows
    assert whole.logprob == pytest.approx(sum(alone(model, *piece)[0] for piece in pieces), abs=1e-4)


@pytest.mark.parametrize(
    ("context", "continuation", "expected", "start"),
    [
        ("a b", " c", "a b c", 4),
        ("a b ", "c", "a b c", 4),  # white space goes to the continuation
        ("", "c", "c", 1),  # after the beginning token
        (" \n", "c", " \nc", 1),
    ],
)
def test_pairs_are_encoded_as_one_text(tokenizer, context, continuation, expected, start):
    assert encode_pairs(tokenizer, [(context, continuation)]) == [([END, *tokenizer.encode(expected)], start)]


def test_a_continuation_needs_text(tokenizer):
    with pytest.raises(UserError, match="expected a continuation with text, found '' after 'a'"):
        encode_pairs(tokenizer, [("a", "")])


def test_nan_logits_are_named():
    model = make_model()
    with torch.no_grad():
        model.norm.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        Scorer(model).score([([1, 2, 3], 1)])


def test_a_merge_across_the_boundary_does_not_change_the_tokens_of_the_context(tmp_path):
    folder = save_folder(tmp_path / "base", make_model(vocab_size=258))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["bc"] = 257
    spec["model"]["merges"] = [["b", "c"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = load_tokenizer(folder)
    begin, (a, b, merged, d) = tokenizer.bos_id, (tokenizer.encode(text)[0] for text in ("a", "b", "bc", "d"))
    assert tokenizer.encode("abcd") == [a, merged, d]
    # lm-evaluation-harness: the tokens of the context, then the rest of the tokens of both
    assert encode_pairs(tokenizer, [("ab", "cd"), ("ab", "c")]) == [([begin, a, b, d], 3), ([begin, a, merged], 2)]
