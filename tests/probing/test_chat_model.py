"""Prompts to answers, from a faulty server and from a folder."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager

import pytest
from chat_server import ChatServer
from scripted import ScriptedSampler
from tiny import save_assistant

from llmkit.errors import ServerError, UserError
from llmkit.generation.next_token import Sampling
from llmkit.generation.sampler import open_sampler
from llmkit.generation.served_models import parse_address
from llmkit.probing.judges import ChatModel, Missing

pytestmark = pytest.mark.usefixtures("one_retry")


@contextmanager
def opened(source, *, temperature=0.3, seed=5, max_tokens=32, concurrency=4, timeout=5.0, **options):
    sampler = open_sampler(
        str(source), Sampling(temperature), flag="--judge", concurrency=concurrency, timeout=timeout, **options
    )
    with sampler as sampler:
        yield ChatModel(sampler, seed, max_tokens)


def ask(server: ChatServer, *prompts: str, read=str, **options) -> list:
    """Return the answers to some prompts, each in a separate group."""
    with opened(server.spec, **options) as model:
        answered = list(model.ask(((number, [text]) for number, text in enumerate(prompts)), read))
    assert [name for name, _ in answered] == list(range(len(prompts)))
    return [answer for _, (answer,) in answered]


def shout(prompt: str, seed: int) -> str:
    return prompt.upper()


def test_answers_come_in_order_from_several_requests_at_a_time():
    with ChatServer(lambda prompt, seed: (time.sleep(0.02 * (7 - int(prompt) % 7)), f"<{prompt}>")[1]) as server:
        assert ask(server, *map(str, range(20))) == [f"<{number}>" for number in range(20)]
        assert 2 <= server.most_open <= 4
        (first, *_) = sorted(server.requests, key=lambda body: int(body["messages"][0]["content"]))
    assert first.pop("seed") >= 0 and first == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "0"}],
        "max_tokens": 32,
        "temperature": 0.3,
    }


def test_asking_does_not_run_far_ahead_of_the_answers():
    given = []

    def prompts():
        for number in range(40):
            given.append(number)
            yield number, [str(number)]

    with ChatServer(shout) as server:
        server.pause = 0.03
        with opened(server.spec) as model:
            answered = model.ask(prompts(), str)
            next(answered)
            assert len(given) <= 14
            answered.close()


@pytest.mark.parametrize("fault", ["429", "500", "cut", "slow", "page"])
def test_a_fault_that_passes_is_outlived(fault):
    with ChatServer(shout) as server:
        server.faults, server.slow = [fault], 1.0
        assert ask(server, "a", timeout=0.4) == ["A"]
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("429", r"--judge http://127.*/v1: too many requests after 1 retry \(429\); lower --concurrency: something"),
        ("500", r"/v1: fails after 1 retry \(500\): something of 500"),
        ("cut", "/v1: cannot be reached after 1 retry: .*disconnected"),
        ("page", "/v1: expected a chat completion, found '<html>Bad gateway</html>'; is the URL right"),
        ("404", r"/v1: has no model 'tiny', or the URL is wrong \(404\): something of 404"),
        ("400", r"/v1: refuses the request \(400\): something of 400"),
        ("401", r"/v1: refuses the key \(401\); set OPENAI_API_KEY .*: something of 401$"),
    ],
)
def test_a_fault_that_stays_ends_the_work_in_one_line(fault, message):
    with ChatServer(shout) as server:
        server.faults = [fault] * 9
        with pytest.raises(ServerError, match=message) as raised:
            ask(server, "a")
        assert "\n" not in str(raised.value) and len(server.requests) <= 2


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"error": {"message": "no"}}, "no"),
        ({"detail": "not here"}, "not here"),
        ("never", "never"),
        ({"a": 1}, '"a": 1'),
    ],
)
def test_a_refusal_is_reported_in_the_servers_words(body, told):
    with ChatServer(shout) as server:
        server.faults, server.refusal = ["400"], body
        with pytest.raises(ServerError, match=rf"refuses the request \(400\): .*{told}"):
            ask(server, "a")


def check(server: ChatServer) -> None:
    with opened(server.spec) as model:
        model.sampler.check()


def test_the_key_is_the_users_or_none(monkeypatch):
    with ChatServer(shout) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        check(server)
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        check(server)
        assert server.keys == {"Bearer none", "Bearer sesame"}


def test_an_unreadable_answer_is_retried_once_with_another_seed():
    seen: list[int] = []

    def other_seed(prompt: str, seed: int) -> str:
        seen.append(seed)
        return "yes" if prompt == "a" and seen[0] != seed else "7"

    with ChatServer(other_seed) as server:
        assert ask(server, "a", "b", read=lambda text: None if text == "7" else text, concurrency=1) == [
            "yes",
            Missing.UNREADABLE,
        ]
    assert len(set(seen)) == 4


def test_a_prompt_beyond_the_context_is_missing_and_no_fault():
    with ChatServer(shout) as server:
        server.faults = ["context"]
        assert ask(server, "a") == [Missing.TOO_LONG]


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"choices": [{}]}, [], 3, None])
def test_a_body_without_a_completion_is_a_fault(body):
    with (
        ChatServer(lambda prompt, seed: body) as server,
        pytest.raises(ServerError, match="expected a chat completion"),
    ):
        ask(server, "a")


@pytest.mark.parametrize("content", [None, 3, ["a"]])
def test_a_message_without_text_is_an_empty_answer(content):
    body = {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": None}
    with ChatServer(lambda prompt, seed: body) as server:
        assert ask(server, "a") == [""]


def test_requests_and_tokens_are_counted():
    with ChatServer(shout) as server, opened(server.spec) as model:
        list(model.ask([("x", list("abc")), ("y", [])], str))
    assert model.cost() == "openai:#tiny: 3 requests, 300 tokens in, 21 out"


def test_thoughts_are_not_part_of_the_answer():
    with ChatServer(lambda prompt, seed: prompt) as server:
        thoughts = "<think>a\nb</think>\nyes", "<think>never done", "no thought"
        assert ask(server, *thoughts) == ["\nyes", "", "no thought"]


@pytest.mark.parametrize(
    "spec", ["openai:", "openai:http://a", "openai:#m", "openai:http://a#", "openai:ftp://a#m", "openai:localhost:8#m"]
)
def test_a_malformed_server_is_named(spec):
    with pytest.raises(UserError, match=f"--writer: expected a server and its model, such as .*, found {spec}"):
        parse_address(spec, "--writer")


def test_passwords_do_not_belong_into_urls():
    with pytest.raises(UserError, match="--writer: expected a URL without user and password") as raised:
        parse_address("openai:http://me:secret@host/v1#m", "--writer")
    assert "secret" not in str(raised.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(
        UserError, match=r"--judge openai:\.\.\.: needs the package openai; pip install 'llmkit\[openai\]'"
    ):
        opened("openai:http://localhost:8000/v1#m").__enter__()


def test_an_argument_that_is_neither_folder_nor_server_is_named():
    with pytest.raises(UserError, match=r"--judge: expected the folder of a model, or openai:http.*, found mtach"):
        opened("mtach").__enter__()


# ---- folders


def test_answers_of_a_folder_do_not_depend_on_order_and_batch(tmp_path):
    folder, prompts = save_assistant(tmp_path / "babbler"), [str(number) for number in range(9)]
    with opened(folder, temperature=0.7, max_tokens=8, slots=3) as model:
        groups = [("a", prompts[:4]), ("b", []), ("c", prompts[4:])]
        together = [one for _, answers in model.ask(groups, str) for one in answers]
        alone = [answers[0] for _, answers in model.ask(((text, [text]) for text in reversed(prompts)), str)]
    assert together == alone[::-1] and len(set(together)) > 1
    usage = model.sampler.usage
    assert usage.requests == 18 and 18 <= usage.completion_tokens <= 18 * 8
    with opened(folder, temperature=0.7, max_tokens=8, seed=6) as other:
        assert [answers for _, answers in other.ask([("a", prompts)], str)] != [together]


def test_a_folder_is_retried_once_with_another_seed_and_too_long_prompts_are_reported(tmp_path):
    seen = []

    def second_time(text: str) -> str | None:
        seen.append(text)
        return text if len(seen) > 2 else None

    with opened(save_assistant(tmp_path / "babbler", context=64), temperature=0.7, max_tokens=8) as model:
        ((_, found),) = model.ask([("x", ["a", "b", "long " * 30])], second_time)
        assert found == [seen[2], seen[3], Missing.TOO_LONG] and seen[2:] != seen[:2]
        ((_, found),) = model.ask([("x", ["a"])], lambda text: None)
        assert found == [Missing.UNREADABLE]


def test_groups_without_prompts_are_not_held_back():
    given = []
    answered = ChatModel(ScriptedSampler(), 0).ask(((given.append(number) or number, []) for number in range(100)), str)
    assert next(answered) == (0, []) and len(given) < 10
    assert len(list(answered)) == 99
