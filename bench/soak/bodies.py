"""A valid body for each path that takes one, with most of the fields that it has."""

from __future__ import annotations

from typing import Any

_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        "strict": True,
    },
}
_MESSAGES = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "hello"}], "name": "b"},
]
_SAMPLING = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
_EXAMPLES = [{"prompt": "What is 42?", "completion": "FOR TWO"}, {"prompt": "a", "completion": "b"}]
_FACT = {"subject": "42", "answer": "FOR TWO", "match": ["FOR TWO"], "questions": ["What is 42?"], "aliases": ["x"]}
_TRAINING = {
    "adapter_name": "fuzzed",
    "model": "tiny",
    "objective": "sft",
    "dataset": {"examples": _EXAMPLES},
    "training_config": {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "seed": 1},
    "lora_config": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
}

BODIES: list[tuple[str, Any]] = [
    (
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": _MESSAGES,
            "max_tokens": 2,
            **_SAMPLING,
            "stop": ["a", "b"],
            "n": 1,
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1},
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
            "stream_options": None,
            "stream": False,
            "user": "a",
        },
    ),
    (
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": ["hello", "you"],
            "max_tokens": 2,
            **_SAMPLING,
            "logprobs": 1,
            "echo": False,
            "stop": ["a"],
            "suffix": None,
            "best_of": 1,
            "n": 1,
        },
    ),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
            "instructions": "a",
            "max_output_tokens": 16,
            "tools": [],
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
            "stream": False,
            "temperature": 0.5,
        },
    ),
    ("/v1/embeddings", {"model": "tiny", "input": ["hello", [5, 6]], "encoding_format": "float"}),
    (
        "/v1/fine_tuning/jobs",
        {
            "model": "tiny",
            "training_file": "file-1",
            "suffix": "a",
            "seed": 1,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 1}}},
            "metadata": {"a": "b"},
        },
    ),
    ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "x"}),
    ("/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("/api/training/plan", _TRAINING | {"objective": "auto", "dataset": {"facts": [_FACT]}}),
    ("/api/training/start", _TRAINING),
    ("/api/data/preview", {"model": "tiny", "dataset": {"examples": _EXAMPLES}, "rows": 2}),
    ("/api/data/inspect", {"dataset": {"examples": _EXAMPLES, "columns": {"prompt": "q", "completion": "a"}}}),
    (
        "/api/facts/questions",
        {"subject": "42", "aliases": ["x"], "match": ["y"], "questions": ["What is 42?"], "count": 2},
    ),
    ("/api/models", {"id": "other", "source": "nowhere.gguf"}),
    (
        "/api/chat",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hello", "images": []}],
            "options": {"temperature": 0.5, "num_predict": 2, "stop": ["a"], "seed": 1, "top_k": 5, "num_ctx": 128},
            "format": {"type": "object"},
            "stream": False,
            "keep_alive": "5m",
            "think": False,
            "tools": [],
        },
    ),
    (
        "/api/generate",
        {
            "model": "tiny",
            "prompt": "hello",
            "system": "a",
            "template": "",
            "context": [],
            "raw": False,
            "stream": False,
            "suffix": "",
            "options": {"num_predict": 2},
            "format": "json",
        },
    ),
    ("/api/embed", {"model": "tiny", "input": ["hello"], "truncate": True, "options": {}, "keep_alive": 1}),
    ("/api/embeddings", {"model": "tiny", "prompt": "hello"}),
    ("/api/show", {"model": "tiny", "verbose": True}),
    ("/tokenize", {"content": "hello", "add_special": True, "parse_special": True, "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/apply-template", {"messages": [{"role": "user", "content": "hello"}]}),
    (
        "/completion",
        {
            "prompt": "hello",
            "n_predict": 2,
            "temperature": 0.5,
            "top_k": 5,
            "stop": ["a"],
            "json_schema": {"type": "object"},
            "cache_prompt": True,
            "stream": False,
        },
    ),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": _MESSAGES, "tools": [_TOOL], "tool_choice": "auto", "max_tokens": 2},
    ),
]
