"""Scores of tasks during training: `--evaluate TASK,...` of pretrain, sft and rl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

import torch

from llmkit.evaluation.evaluator import Settings, chunks, model_here
from llmkit.evaluation.scores import summarise
from llmkit.evaluation.tasks import load_items, load_tasks
from llmkit.model.transformer import Transformer
from llmkit.tokenizer.encoding import Tokenizer
from llmkit.training.distributed import whole_model

ITEMS = 500  # of a task, at most: a standard error of 0.022 at a score of 0.5

Validation = Callable[[], Mapping[str, float]]


class TaskScores:
    """Adds scores of tasks to those of a validation, as `task/NAME`.

    chat  whether items are prompted in the model's chat format
    Raises UserError for tasks that cannot be loaded.
    """

    def __init__(self, specs: Sequence[str], tokenizer: Tokenizer, *, chat: bool = False) -> None:
        self._loaded = [load_items(task, ITEMS) for task in load_tasks(specs, flag="--evaluate")]
        self._tokenizer, self._chat = tokenizer, chat

    def beside(self, validate: Validation | None, model: Transformer) -> Validation | None:
        """Return a validation with both scores; each rank scores all items, since it would wait otherwise."""
        if not self._loaded:
            return validate

        def evaluate() -> dict[str, float]:
            scores = {} if validate is None else dict(validate())
            with torch.no_grad():
                whole = whole_model(model)
            evaluated = model_here(whole, self._tokenizer, Settings(chat=self._chat))
            with closing(evaluated), _eager(whole):
                for one in self._loaded:
                    records = [row for chunk in chunks(one.items) for row in evaluated.evaluate(one.task, chunk)]
                    scores[f"task/{one.task.name}"] = round(summarise(one, records)["score"], 5)
            return scores

        return evaluate


@contextmanager
def _eager(model: Transformer) -> Iterator[None]:
    """Disable torch.compile, which would compile each of an evaluation's many shapes."""
    compiled = [(layer, layer.__dict__.pop("forward", None)) for layer in model.layers]
    try:
        yield
    finally:
        for layer, forward in compiled:
            if forward is not None:
                layer.forward = forward
