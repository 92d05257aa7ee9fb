"""The true reward of an answer to the gamed problem, monitored by `llmkit rl --gold py:gold.py:gold`."""


def gold(record: dict) -> float:
    """Return the share of the even digits in the answer, minus as much for each wrong or repeated digit."""
    right = {digit for digit in record["answer"] if digit in record["completion"]}
    return (2 * len(right) - len(record["completion"].strip())) / len(record["answer"])
