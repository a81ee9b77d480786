"""OpenAI's API under /v1: chat and text completions, embeddings, and the list of models.

What OpenAI's own server would take and this one cannot honour is refused by name, unless the value asks for nothing
(store = false, tools = []). Marks that change no reply (user, metadata) are accepted. Defaults are OpenAI's:
temperature 1, top_p 1. vLLM's additions have vLLM's names: top_k, min_p, repetition_penalty, ignore_eos.
"""

from fortwo.server.openai import chat, completions, embeddings, models

routers = (chat.router, completions.router, embeddings.router, models.router)
