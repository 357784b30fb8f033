// OpenAI's client for JavaScript.
import assert from "node:assert/strict";

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "EMPTY",
});
const question = {
  model: "quire-demo",
  messages: [
    { role: "system", content: "You are a helpful assistant." },
    { role: "user", content: "What is 23 + 58?" },
  ],
  temperature: 0,
};

const answer = await client.chat.completions.create(question);
console.log("answer:", answer.choices[0].message.content);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...question, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
  process.stdout.write(chunk.choices[0].delta.content ?? "");
}
console.log();

assert.equal(text, "23 + 58 = 81.");
assert.equal(answer.choices[0].message.content, text);
assert.equal(answer.choices[0].finish_reason, "stop");

const models = await client.models.list();
console.log("models:", models.data.map((model) => model.id).join(", "));
assert.deepEqual(models.data.map((model) => model.id), ["quire-demo"]);

// The helper: events as they come, and the whole answer at the end.
const helper = client.chat.completions.stream(question);
const pieces = [];
helper.on("content", (piece) => pieces.push(piece));
console.log("helper:", await helper.finalContent());
assert.equal(pieces.join(""), text);
assert.equal((await helper.finalChatCompletion()).choices[0].message.content, text);

// With include_usage the last chunk counts the tokens.
const chunks = [];
const counting = { ...question, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(counting)) chunks.push(chunk);
const { usage, choices } = chunks.at(-1);
console.log("usage:", usage.prompt_tokens, "tokens in,", usage.completion_tokens, "out");
assert.deepEqual(choices, []);
assert.ok(chunks.slice(0, -1).every((chunk) => chunk.usage === null));
assert.equal(usage.prompt_tokens, answer.usage.prompt_tokens);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);

// A stream that is left ends on the server too; these two were to have 1500 tokens.
const long = { ...question, stream: true, max_tokens: 1500, ignore_eos: true };
const { data: aborted, request_id } = await client.chat.completions
  .create(long, { headers: { "X-Request-Id": "left-early" } })
  .withResponse();
let numChunks = 0;
for await (const _ of aborted) if (++numChunks === 5) aborted.controller.abort();
console.log(`request ${request_id}: aborted after 5 chunks, ${numChunks} seen`);
assert.equal(request_id, "left-early");
assert.ok(numChunks < 1000);
for await (const _ of await client.chat.completions.create(long)) break;

// Errors have classes and name the field.
async function refusal(kind, asked, its = client) {
  const error = await its.chat.completions.create({ ...question, ...asked }).catch((e) => e);
  console.log(`${error.constructor.name}: ${error.message}`);
  assert.ok(error instanceof kind);
  assert.ok(error.requestID);
  return error;
}

const stranger = new OpenAI({ baseURL: client.baseURL, apiKey: "wrong" });
assert.equal((await refusal(OpenAI.BadRequestError, { temperature: 7 })).param, "temperature");
assert.equal((await refusal(OpenAI.NotFoundError, { model: "nobody" })).param, "model");
assert.equal((await refusal(OpenAI.AuthenticationError, {}, stranger)).code, "invalid_api_key");
