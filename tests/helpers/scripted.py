"""A `Sampler` whose completions are a function of the prompt: the text, or the last message."""

from __future__ import annotations

from llmkit.generation.requests import Completion, Usage


class ScriptedSampler:
    """`reply` returns the text of a completion; `prompts` has all prompts so far."""

    name, identity, context, tokenizer, chat, tools, is_assistant = "scripted", {}, None, None, None, None, True

    def __init__(self, reply=str) -> None:
        self.reply, self.prompts, self.usage = reply, [], Usage()

    def check(self) -> None:
        pass

    def encode(self, prompt, tools=None):
        return prompt if isinstance(prompt, str) else prompt[-1].text

    def complete(self, requests, *, on_text=None, on_call=None):
        for request in requests:
            self.prompts.append(request.prompt)
            yield [Completion(self.reply(request.prompt), [], "stop", [], [], [], [])] * request.samples
