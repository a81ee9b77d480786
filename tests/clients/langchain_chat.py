"""A conversation of two turns by LangChain. Arguments: the server's URL with /v1, and the model."""

import json
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=url, api_key="none", temperature=0, max_tokens=12, max_retries=0)
messages = [SystemMessage("Be brief."), HumanMessage("hello")]
first = chat.invoke(messages)
messages += [AIMessage(first.content), HumanMessage("And the rest?")]
second = chat.invoke(messages)
streamed = "".join(str(part.content) for part in chat.stream(messages))
tokens = second.usage_metadata["output_tokens"]
print(json.dumps({"first": first.content, "second": second.content, "streamed": streamed, "tokens": tokens}))
