// A script as it is written for OpenAI: upload, train, follow the events, chat with the new model, stream.
// Arguments: the file with the rows, and the model to start from.
import fs from "node:fs";
import OpenAI from "openai";

const [rows, model] = process.argv.slice(2);
const client = new OpenAI();

const file = await client.files.create({ file: fs.createReadStream(rows), purpose: "fine-tune" });
const retrieved = await client.files.retrieve(file.id);
const content = await (await client.files.content(file.id)).text();

let job = await client.fineTuning.jobs.create({
  training_file: file.id,
  model,
  suffix: "from-node",
  seed: 7,
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 2 } } },
});
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await new Promise((resolve) => setTimeout(resolve, 200));
  job = await client.fineTuning.jobs.retrieve(job.id);
}

const events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 5 })) {
  events.push(event.type);
}
const jobs = [];
for await (const one of client.fineTuning.jobs.list({ limit: 2 })) {
  jobs.push(one.id);
}

const messages = [{ role: "user", content: "What is up?" }];
const whole = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages,
  temperature: 0,
  max_tokens: 12,
});
const stream = await client.chat.completions.create({
  model: job.fine_tuned_model,
  messages,
  temperature: 0,
  max_tokens: 12,
  stream: true,
  stream_options: { include_usage: true },
});
let streamed = "";
let usage = null;
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}

let refusal = null;
try {
  await client.chat.completions.create({ model: "nobody", messages });
} catch (error) {
  refusal = { status: error.status, code: error.code, kind: error.constructor.name };
}

const models = [];
for await (const one of client.models.list()) {
  models.push(one.id);
}
const deleted = await client.files.delete(file.id);

console.log(
  JSON.stringify({
    filename: retrieved.filename,
    content,
    status: job.status,
    model: job.fine_tuned_model,
    events,
    jobs: jobs.includes(job.id),
    whole: whole.choices[0].message.content,
    streamed,
    tokens: usage.completion_tokens,
    refusal,
    listed: models.includes(job.fine_tuned_model),
    deleted: deleted.deleted,
  }),
);
