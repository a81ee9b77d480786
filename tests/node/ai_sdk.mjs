// A conversation of two turns by Vercel's AI SDK: through its provider for OpenAI-compatible servers, and through
// OpenAI's own provider, which uses /v1/responses. Arguments: the server's URL with /v1, and the model.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL, model] = process.argv.slice(2);
const providers = {
  compatible: createOpenAICompatible({ name: "fortwo", baseURL, includeUsage: true })(model),
  openai: createOpenAI({ baseURL, apiKey: "none" })(model),
};

const found = {};
for (const [name, chosen] of Object.entries(providers)) {
  const settings = { model: chosen, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
  const messages = [
    { role: "system", content: "Be brief." },
    { role: "user", content: "hello" },
  ];
  const first = await generateText({ ...settings, messages });
  messages.push({ role: "assistant", content: first.text }, { role: "user", content: "And the rest?" });
  const second = await generateText({ ...settings, messages });
  const stream = streamText({ ...settings, messages });
  let streamed = "";
  for await (const part of stream.textStream) {
    streamed += part;
  }
  found[name] = {
    first: first.text,
    second: second.text,
    streamed,
    tokens: (await stream.usage).outputTokens,
    reason: await stream.finishReason,
  };
}
console.log(JSON.stringify(found));
