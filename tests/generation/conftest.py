"""Fixtures of the generation tests."""

import pytest
from tiny import save_tokenizer

from llmkit.model.devices import threads
from llmkit.tokenizer.chat import CHAT_SPECIALS
from llmkit.tokenizer.encoding import load_tokenizer


@pytest.fixture(autouse=True)
def on_one_thread():
    """Use one thread: on a busy machine, a tiny model on two threads waits 50 times as long as it computes."""
    with threads(1):
        yield


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="package")
def chat_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat-tokenizer")
    save_tokenizer(folder, *CHAT_SPECIALS)
    return load_tokenizer(folder)
