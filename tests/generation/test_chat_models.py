"""Prompts to answers, by a server with all its faults and by a folder."""

from __future__ import annotations

import sys
import time

import pytest
from chat_server import ChatServer
from tiny import save_assistant, save_folder

from llmkit.errors import ServerError, UserError
from llmkit.generation.chat_models import ChatSettings, Missing, open_chat_model, without_thoughts
from llmkit.generation.served_models import parse_address

SETTINGS = ChatSettings(max_tokens=32, seed=5, timeout=5.0, retries=1, concurrency=4)


def ask(server: ChatServer, *prompts: str, read=str, settings: ChatSettings = SETTINGS) -> list:
    """The answers to some prompts, each a group of its own."""
    model = open_chat_model(server.spec, "--judge", settings)
    answered = list(model.ask(((number, [text]) for number, text in enumerate(prompts)), read, 0.3))
    assert [name for name, _ in answered] == list(range(len(prompts)))
    return [answer for _, (answer,) in answered]


def shout(prompt: str, seed: int) -> str:
    return prompt.upper()


def test_answers_come_in_order_from_several_requests_at_a_time():
    with ChatServer(lambda prompt, seed: (time.sleep(0.02 * (7 - int(prompt) % 7)), f"<{prompt}>")[1]) as server:
        assert ask(server, *map(str, range(20))) == [f"<{number}>" for number in range(20)]
        assert 2 <= server.most_open <= 4
        (first, *_) = sorted(server.requests, key=lambda body: int(body["messages"][0]["content"]))
    assert first == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "0"}],
        "max_tokens": 32,
        "temperature": 0.3,
        "seed": 5,
    }


def test_asking_does_not_run_far_ahead_of_the_answers():
    given = []

    def prompts():
        for number in range(40):
            given.append(number)
            yield number, [str(number)]

    with ChatServer(shout) as server:
        server.pause = 0.03
        model = open_chat_model(server.spec, "--judge", SETTINGS)
        answered = model.ask(prompts(), str, 0.3)
        next(answered)
        assert len(given) <= 10
        answered.close()


@pytest.mark.parametrize("fault", ["429", "500", "cut", "slow", "page"])
def test_a_fault_that_passes_is_outlived(fault):
    with ChatServer(shout) as server:
        server.faults, server.slow = [fault], 1.0
        assert ask(server, "a", settings=ChatSettings(max_tokens=32, seed=5, timeout=0.4, retries=1)) == ["A"]
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("429", r"--judge http://127.*/v1: too many requests after 1 retry \(429\); lower --concurrency: something"),
        ("500", r"/v1: fails after 1 retry \(500\): something of 500"),
        ("cut", "/v1: cannot be reached after 1 retry: .*disconnected"),
        ("page", "/v1: expected a chat completion, found '<html>Bad gateway</html>'; is the URL right"),
        ("404", r"/v1: has no model 'tiny', or is another URL \(404\): something of 404"),
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
def test_a_refusal_is_told_in_the_servers_words(body, told):
    with ChatServer(shout) as server:
        server.faults, server.refusal = ["400"], body
        with pytest.raises(ServerError, match=rf"refuses the request \(400\): .*{told}"):
            ask(server, "a")


def test_a_server_that_hangs_is_not_waited_for():
    with ChatServer(shout) as server:
        server.faults, server.slow = ["slow"] * 9, 3.0
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer within 0.3 s after 0 retries; is it overloaded\?"):
            ask(
                server, *"abcdefgh", settings=ChatSettings(max_tokens=32, seed=5, timeout=0.3, retries=0, concurrency=2)
            )
        assert time.monotonic() - started < 2.5


def test_a_server_that_is_down_is_found_before_the_work():
    with ChatServer(shout) as server:
        open_chat_model(server.spec, "--judge", SETTINGS).check()
        server.faults = ["401"]
        with pytest.raises(ServerError, match="refuses the key"):
            open_chat_model(server.spec, "--judge", SETTINGS).check()
    with pytest.raises(ServerError, match=r"cannot be reached after 1 retry: .*refused"):
        open_chat_model(server.spec, "--judge", SETTINGS).check()


def test_the_key_is_the_users_or_none(monkeypatch):
    with ChatServer(shout) as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        open_chat_model(server.spec, "--judge", SETTINGS).check()
        monkeypatch.setenv("OPENAI_API_KEY", "sesame")
        open_chat_model(server.spec, "--judge", SETTINGS).check()
        assert server.keys == {"Bearer none", "Bearer sesame"}


def test_an_unreadable_answer_is_asked_for_once_more_with_another_seed():
    def only_even(text: str) -> str | None:
        return text if text.endswith(("0", "2", "4", "6", "8")) else None

    with ChatServer(lambda prompt, seed: f"{prompt}{seed}" if prompt == "a" else "7") as server:
        assert ask(server, "a", "b", read=only_even) == ["a6", Missing.UNREADABLE]
        assert sorted(body["seed"] for body in server.requests) == [5, 5, 6, 6]


def test_a_prompt_beyond_the_context_is_missing_and_no_fault():
    with ChatServer(shout) as server:
        server.faults = ["context"]
        assert ask(server, "a") == [Missing.TOO_LONG]


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None}, {"choices": [{}]}, [], 3, None])
def test_a_body_that_is_no_completion_is_a_fault(body):
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
    with ChatServer(shout) as server:
        model = open_chat_model(server.spec, "--judge", SETTINGS)
        list(model.ask([("x", list("abc")), ("y", [])], str, 0.3))
    assert str(model.usage) == "3 requests, 300 tokens in, 21 out"
    assert model.name == "openai:#tiny"


def test_what_is_thought_aloud_is_no_part_of_the_answer():
    assert without_thoughts("<think>a\nb</think>\nyes") == "\nyes"
    assert without_thoughts("<think>never done") == "" and without_thoughts("no thought") == "no thought"


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
        open_chat_model("openai:http://localhost:8000/v1#m", "--judge", SETTINGS)


def test_what_is_neither_folder_nor_server_is_named():
    with pytest.raises(UserError, match=r"--judge: expected the folder of a model, or openai:http.*, found mtach"):
        open_chat_model("mtach", "--judge", SETTINGS)


# ---- folders


def test_a_folder_answers_whatever_the_order_and_the_company(tmp_path):
    folder = save_assistant(tmp_path / "babbler")
    model = open_chat_model(str(folder), "--judge", ChatSettings(max_tokens=8, seed=5, slots=3))
    model.check()
    prompts = [str(number) for number in range(9)]
    together = [
        one
        for _, answers in model.ask([("a", prompts[:4]), ("b", []), ("c", prompts[4:])], str, 0.7)
        for one in answers
    ]
    alone = [answers[0] for _, answers in model.ask(((text, [text]) for text in reversed(prompts)), str, 0.7)]
    assert together == alone[::-1] and len(set(together)) > 1
    assert model.usage.requests == 18 and 18 <= model.usage.completion_tokens <= 18 * 8
    other = open_chat_model(str(folder), "--judge", ChatSettings(max_tokens=8, seed=6))
    assert [answers for _, answers in other.ask([("a", prompts)], str, 0.7)] != [together]


def test_a_folder_is_asked_once_more_with_another_seed_and_told_what_is_too_long(tmp_path):
    seen = []

    def second_time(text: str) -> str | None:
        seen.append(text)
        return text if len(seen) > 2 else None

    folder = save_assistant(tmp_path / "babbler", context=64)
    model = open_chat_model(str(folder), "--judge", ChatSettings(max_tokens=8, seed=5))
    ((_, found),) = model.ask([("x", ["a", "b", "long " * 30])], second_time, 0.7)
    assert found == [seen[2], seen[3], Missing.TOO_LONG] and seen[2:] != seen[:2]
    ((_, found),) = model.ask([("x", ["a"])], lambda text: None, 0.7)
    assert found == [Missing.UNREADABLE]


def test_groups_without_prompts_are_not_held_back(tmp_path):
    model = open_chat_model(str(save_assistant(tmp_path / "m")), "--judge", ChatSettings(max_tokens=8, seed=5, slots=2))
    given = []
    answered = model.ask(((given.append(number) or number, []) for number in range(100)), str, 0.7)
    assert next(answered) == (0, []) and len(given) < 10


def test_a_base_model_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match=r"expected the special tokens of conversations.*llmkit sft"):
        open_chat_model(str(save_folder(tmp_path / "base")), "--judge", SETTINGS)
