"""A task with two choices by lm-evaluation-harness over its local-completions. Arguments: the server's URL with /v1,
the model, the folder with its tokenizer, and an empty folder."""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate

url, model, tokenizer, folder = sys.argv[1:]
rows = Path(folder) / "rows.jsonl"
asked = [{"question": "What is up?", "choices": ["the sky", "the sea"], "answer": 0}]
asked += [{"question": "What is down?", "choices": ["the sky", "the sea"], "answer": 1}]
rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
task = {
    "task": "which",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(rows)}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
arguments = {"model": model, "base_url": f"{url}/completions", "tokenizer": tokenizer, "num_concurrent": 1}
found = simple_evaluate("local-completions", arguments, tasks=[task], log_samples=True, bootstrap_iters=0)
samples = sorted(found["samples"]["which"], key=lambda one: one["doc_id"])
likelihoods = [[float(answer[0]) for answer in one["filtered_resps"]] for one in samples]
print(json.dumps({"acc": found["results"]["which"]["acc,none"], "likelihoods": likelihoods}))
