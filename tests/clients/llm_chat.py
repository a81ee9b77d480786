"""A conversation of two turns by `llm`, configured as its manual says. Arguments: the server's URL with /v1, and the
model. LLM_USER_PATH names an empty folder."""

import json
import os
import sys
from pathlib import Path

url, model = sys.argv[1:]
config = Path(os.environ["LLM_USER_PATH"]) / "extra-openai-models.yaml"
config.write_text(f"- model_id: here\n  model_name: {json.dumps(model)}\n  api_base: {json.dumps(url)}\n")

import llm  # noqa: E402  it reads the file when it is imported

conversation = llm.get_model("here").conversation()
options = {"temperature": 0, "max_tokens": 12, "stream": False}
first = conversation.prompt("hello", system="Be brief.", **options)
text = first.text()
second = conversation.prompt("And the rest?", **options)
other = llm.get_model("here").conversation()
other.prompt("hello", system="Be brief.", **options).text()
streamed = "".join(other.prompt("And the rest?", **{**options, "stream": True}))
tokens = second.usage().output
print(json.dumps({"first": text, "second": second.text(), "streamed": streamed, "tokens": tokens}))
