"""A conversation of two turns by LlamaIndex. Arguments: the server's URL with /v1, and the model."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, model = sys.argv[1:]
chat = OpenAILike(
    model=model, api_base=url, api_key="none", is_chat_model=True, temperature=0, max_tokens=12, max_retries=0
)
messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="hello")]
first = chat.chat(messages)
messages += [first.message, ChatMessage(role="user", content="And the rest?")]
second = chat.chat(messages)
streamed = "".join(part.delta or "" for part in chat.stream_chat(messages))
tokens = second.raw.usage.completion_tokens
said = {"first": first.message.content, "second": second.message.content, "streamed": streamed, "tokens": tokens}
print(json.dumps(said))
