"""Scores of lm-evaluation-harness: `lm_eval_scores.py FOLDER DATA_DIR TASK LIMIT` prints JSON.

Prompts are those of its default tasks, data files are in llm-foundry's format. `cpu` covers evaluation only, without
imports, loading the model, and the four seconds in which `simple_evaluate` reads the YAML of all its tasks.
"""

import json
import os
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
CHOICE = {"doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
MMLU = "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"
LETTERS = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
FILES = {"openbookqa": "openbook_qa", "mmlu": "mmlu.test"}
TASKS = {
    "arc_easy": {"doc_to_text": "{{query}}\nAnswer:", **CHOICE},
    "arc_challenge": {"doc_to_text": "{{query}}\nAnswer:", **CHOICE},
    "piqa": {"doc_to_text": "{{query}}Answer:", **CHOICE},
    "boolq": {"doc_to_text": "{{query[9:]}}\nAnswer:", **CHOICE},
    "openbookqa": {"doc_to_text": "{{query}}", **CHOICE},
    "copa": {
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{[' ' + choices[0], ' ' + choices[1]]}}",
        "doc_to_target": "gold",
    },
    "winogrande": {"doc_to_text": "gold", "doc_to_choice": "{{context_options}}", "doc_to_target": "continuation"},
    "blimp": {"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0},
    "mmlu": {
        "doc_to_text": LETTERS, "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer", "description": MMLU,
    },
    "lambada_openai": {
        "output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}",
    },
}  # fmt: skip


def main(folder: str, data: str, name: str, limit: int) -> None:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    stem = FILES.get(name, name)
    path = next(path for ending in ("jsonl", "jsonl.gz") if os.path.exists(path := f"{data}/{stem}.{ending}"))
    task = ConfigurableTask(
        config={
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": path}},
            "test_split": "test", "num_fewshot": 0, "output_type": "multiple_choice",
            "metric_list": [{"metric": "acc"}], **TASKS[name],
        }
    )  # fmt: skip
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=16)
    evaluate(lm=model, task_dict={name: task}, limit=1, bootstrap_iters=0)  # warms up lazy imports
    started = time.process_time()
    result = evaluate(lm=model, task_dict={name: task}, limit=limit, log_samples=True, bootstrap_iters=0)
    cpu = time.process_time() - started
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    logprobs = [[answer[0][0] for answer in sample["resps"]] for sample in samples]
    print(json.dumps({"cpu": cpu, "acc": [sample["acc"] for sample in samples], "logprobs": logprobs}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
