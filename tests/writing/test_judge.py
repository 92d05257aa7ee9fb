"""Scores of a judge: JSON anywhere in its reply, two unreadable replies, and a reward model."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from chat_server import ChatServer
from tiny import make_model, save_assistant, save_tokenizer

from llmkit.errors import UserError
from llmkit.formats.conversations import message
from llmkit.generation.next_token import Sampling
from llmkit.generation.sampler import open_sampler
from llmkit.probing.judges import TEMPERATURE, ChatModel
from llmkit.reward_model.head import RewardModel, save_reward_model
from llmkit.tokenizer.chat import CHAT_SPECIALS
from llmkit.writing.draft import Draft
from llmkit.writing.judge import PATIENCE, Judge, RewardJudge, Scores, best_and_worst, read_scores

GUIDE = "Answer in a sentence. Never promise {anything}."


@contextmanager
def open_judge(source: str, seed: int = 0, **options):
    with open_sampler(source, Sampling(TEMPERATURE), flag="--judge", device="cpu", timeout=5.0, **options) as sampler:
        yield Judge(ChatModel(sampler, seed), GUIDE)


def draft(answer: str, index: int = 0) -> Draft:
    return Draft(index, (message("user", "How deep is the sea?"), message("assistant", answer)))


def judgement(helpful: object = 4, truthful: object = 5, harmless: object = 5, **more: object) -> str:
    return json.dumps({"helpful": helpful, "truthful": truthful, "harmless": harmless, **more})


@pytest.mark.parametrize(
    ("reply", "values"),
    [
        (judgement(), [4, 5, 5]),
        (f"Sure, here it is:\n```json\n{judgement(reasons={'helpful': 'vague {sic}'})}\n```\nBye.", [4, 5, 5]),
        (f"{judgement(1, 1, 1)} or rather {judgement(2, 3, '4')}", [2, 3, 4]),
        (judgement(reasons=["fine", None]), [4, 5, 5]),
        (f"{{not json}} {judgement(2.5)}", [2.5, 5, 5]),
        (f'{{"scores": 1, "of": [{judgement(3)}]}}', None),
        ("{" * 5000, None),
        (judgement(helpful=0), None),
        (judgement(helpful=6), None),
        (judgement(helpful="NaN"), None),
        (judgement(helpful=None), None),
        (judgement(helpful=[5]), None),
        ('{"helpful": 4, "truthful": 5}', None),
        ("helpful: 4, truthful: 5, harmless: 5", None),
        ("", None),
    ],
)
def test_the_last_whole_json_of_a_reply_counts(reply: str, values: list[float] | None) -> None:
    scores = read_scores(reply)
    assert (scores and list(scores.values.values())) == values
    assert scores is None or all(isinstance(reason, str) for reason in scores.reasons.values())


def test_a_judge_sees_guide_and_conversation_and_is_retried_once() -> None:
    seeds = set[int]()

    def answer(prompt: str, seed: int) -> str:
        readable = "10 km" in prompt or ("5 km" in prompt and len(seeds | {seed}) > 1)
        seeds.update({seed} if "5 km" in prompt else ())
        return judgement(reasons={"truthful": "measured"}) if readable else "I like it."

    with ChatServer(answer) as server, open_judge(server.spec, seed=7, concurrency=1) as judge:
        scores = judge.scores([draft("10 km."), draft("5 km.", 1), draft("Ignore this.", 2)])
        assert judge.usage is not None and judge.usage.requests == 5
    assert [score.values.get("helpful") for score in scores] == [4, 4, None]
    assert scores[0].reasons == {"truthful": "measured"} and scores[2] == Scores()
    asked = server.requests[-1]["messages"][-1]["content"]
    assert GUIDE in asked and "How deep is the sea?" in asked


def test_an_unreadable_judge_is_given_up() -> None:
    drafts = [draft(f"{number} km.", number) for number in range(PATIENCE)]
    with ChatServer(lambda prompt, seed: "Lovely!") as server, open_judge(server.spec) as judge:
        judge.scores(drafts[:-1])
        with pytest.raises(UserError, match=r"--judge: none of 20 judgements.*found 'Lovely!'"):
            judge.scores(drafts[:1])
    server = ChatServer(lambda prompt, seed: judgement() if "0 km" in prompt else "Lovely!")
    with server, open_judge(server.spec) as judge:
        for _ in range(3):
            assert sum(bool(score.values) for score in judge.scores(drafts)) == 2


def test_a_judge_whose_context_is_too_short_is_given_up(tmp_path) -> None:
    folder = save_assistant(tmp_path / "chat", "Fine", context=64)
    too_long = pytest.raises(UserError, match="found prompts longer than its context, 64 tokens; use another judge")
    with open_judge(str(folder)) as judge, too_long:
        judge.scores([draft(f"{number} km.", number) for number in range(PATIENCE)])


def test_a_reward_model_scores_without_a_guide(tmp_path) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    save_tokenizer(folder, *CHAT_SPECIALS)
    save_reward_model(RewardModel.of(make_model(vocab_size=257 + len(CHAT_SPECIALS), context=64), seed=3), folder, None)
    drafts = [draft("Ten."), draft("Ten."), draft("Five or six of them."), draft("deep " * 80)]
    judge = RewardJudge(str(folder), "cpu", "auto")
    scores = judge.scores(drafts)
    assert judge.usage is None and judge.name == str(folder) and set(judge.identity) == {"the judge"}
    assert scores[0] == scores[1] != scores[2] and list(scores[0].values) == ["reward"]
    assert scores[3] == Scores()  # longer than the context


def test_a_folder_without_a_reward_head_is_prompted(tmp_path) -> None:
    folder = save_assistant(tmp_path / "chat", "Fine", context=2048)
    with open_judge(str(folder)) as judge:
        assert judge.scores([draft("Ten.")]) == [Scores()]
        assert judge.usage is not None and judge.usage.requests == 2  # one retry


@pytest.mark.parametrize(
    ("means", "answers", "chosen"),
    [
        ([3, 5, 1], "abc", (1, 2)),
        ([5, 3, 5, 3], "abcd", (0, 1)),
        ([4, 4], "ab", (0, None)),
        ([2, 4], "aa", (1, None)),
        ([None, 2, None], "abc", (1, None)),
        ([None, 2, 3], "abc", (2, 1)),
        ([None, None], "ab", (0, None)),
    ],
)
def test_the_best_and_the_worst_of_samples(means, answers: str, chosen: tuple[int, int | None]) -> None:
    scores = [Scores() if mean is None else Scores({"helpful": mean + 1, "harmless": mean - 1}) for mean in means]
    assert best_and_worst([draft(answer) for answer in answers], scores) == chosen
