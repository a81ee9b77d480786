"""OpenAI's API under /v1: chat and text completions, embeddings, models, responses, files, and fine-tuning jobs.

A parameter of OpenAI that this server does not support is refused by name, unless its value has no effect anyway
(store = false, tools = []). Parameters that change no reply (user, metadata) are accepted. Defaults are OpenAI's
(temperature 1, top_p 1). vLLM's additions have vLLM's names: top_k, min_p, repetition_penalty, ignore_eos.
"""

from fortwo.server.openai import chat, completions, embeddings, files, fine_tuning, models, responses

routers = (
    chat.router,
    completions.router,
    embeddings.router,
    models.router,
    files.router,
    fine_tuning.router,
    responses.router,
)
