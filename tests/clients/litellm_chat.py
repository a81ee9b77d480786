"""A conversation of two turns by LiteLLM. Arguments: the server's URL with /v1, and the model."""

import json
import sys

import litellm

url, model = sys.argv[1:]
settings = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0, "max_tokens": 12}
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
first = litellm.completion(messages=messages, **settings)
messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "And the rest?"}]
second = litellm.completion(messages=messages, **settings)
stream = litellm.completion(messages=messages, stream=True, **settings)
streamed = "".join(part.choices[0].delta.content or "" for part in stream)
said = {
    "first": first.choices[0].message.content,
    "second": second.choices[0].message.content,
    "streamed": streamed,
    "tokens": second.usage.completion_tokens,
}
print(json.dumps(said))
