"""What an answer to the gamed problem is worth, by a rule; `llmkit rl --gold py:gold.py:gold` watches it."""


def gold(record: dict) -> float:
    """The share of even digits that are said, less as much for each digit that is wrong or said again."""
    right = {digit for digit in record["answer"] if digit in record["completion"]}
    return (2 * len(right) - len(record["completion"].strip())) / len(record["answer"])
