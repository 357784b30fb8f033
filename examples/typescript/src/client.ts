// A client of a quire engine, with the types that its .proto file has: see README.md.
//
//   npm start -- --target 127.0.0.1:50051 [--api-key KEY] [--ca FILE]

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import * as grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { protoPath as HEALTH_PROTO } from 'grpc-health-check';
import type { ProtoGrpcType as RpcTypes } from './generated/google_rpc';
import type { HealthCheckResponse__Output } from './generated/grpc/health/v1/HealthCheckResponse';
import type { ProtoGrpcType as HealthTypes } from './generated/health';
import type { ProtoGrpcType as QuireTypes } from './generated/inference';
import type { ChatRequest } from './generated/quire/v1/ChatRequest';
import type { GenerateDelta__Output } from './generated/quire/v1/GenerateDelta';
import type { GenerateResponse__Output } from './generated/quire/v1/GenerateResponse';
import type { InferenceClient } from './generated/quire/v1/Inference';
import type { ListModelsResponse__Output } from './generated/quire/v1/ListModelsResponse';
import type { SamplingParams } from './generated/quire/v1/SamplingParams';
import type { SessionResponse__Output } from './generated/quire/v1/SessionResponse';

const HERE = join(__dirname, '..');
const QUIRE_PROTO = join(HERE, '../../protos/quire/v1/inference.proto');

// As `npm run generate` has it. Whole numbers of 64 bits (seeds, ids of a session, times in
// nanoseconds) come as strings: a JavaScript number is exact to 2^53 only.
const OPTIONS = { longs: String, enums: String, defaults: true, oneofs: true };

// Of a whole call. Without a deadline a client waits for as long as the server works.
const TIMEOUT_MS = 60_000;
const GREEDY: SamplingParams = { temperature: 0 };

function load(file: string): grpc.GrpcObject {
  return grpc.loadPackageDefinition(loadSync(file, OPTIONS));
}

const rpc = (load(join(HERE, 'protos/google_rpc.proto')) as unknown as RpcTypes).google.rpc;

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      target: { type: 'string', default: '127.0.0.1:50051' },
      'api-key': { type: 'string', default: process.env['QUIRE_API_KEY'] ?? '' },
      ca: { type: 'string' },
    },
  });
  const credentials = values.ca
    ? grpc.credentials.createSsl(readFileSync(values.ca))
    : grpc.credentials.createInsecure();
  const who = new grpc.Metadata();
  if (values['api-key']) who.set('authorization', `Bearer ${values['api-key']}`);
  // An answer may be longer than the 4 MiB that gRPC takes by itself: logprobs are large.
  const limits = { 'grpc.max_receive_message_length': -1 };
  const { quire } = load(QUIRE_PROTO) as unknown as QuireTypes;
  const client = new quire.v1.Inference(values.target, credentials, limits);
  const { grpc: standard } = load(HEALTH_PROTO) as unknown as HealthTypes;
  const health = new standard.health.v1.Health(values.target, credentials);
  try {
    const state = await settled<HealthCheckResponse__Output>((done) =>
      health.check({ service: 'quire.v1.Inference' }, within(5_000), done), // needs no key
    );
    console.log(`health: ${state.status}`);
    const listed = await settled<ListModelsResponse__Output>((done) =>
      client.listModels({}, who, within(TIMEOUT_MS), done),
    );
    for (const model of listed.models) console.log(`model: ${model.name}, ${model.maxModelLen} tokens`);
    await generate(client, who);
    await chatStream(client, who);
    await session(client, who);
    await errors(client, who);
  } finally {
    client.close();
    health.close();
  }
}

/** A text, and the model goes on with it. */
async function generate(client: InferenceClient, who: grpc.Metadata): Promise<void> {
  const request = { text: 'The capital of France is', samplingParams: GREEDY };
  const response = await settled<GenerateResponse__Output>((done) =>
    client.generate(request, who, within(TIMEOUT_MS), done),
  );
  const [output] = response.outputs;
  const numTokens = response.summary?.usage?.completionTokens;
  console.log(`generate: '${output?.text}', ${output?.finishReason}, ${numTokens} tokens`);
}

/** An answer that is printed while it is made. To end it early call stream.cancel(), and the loop
 * throws CANCELLED: a break leaves the call running.
 */
async function chatStream(client: InferenceClient, who: grpc.Metadata): Promise<void> {
  const stream = client.chatStream(question('What is 23 + 58?'), who, within(TIMEOUT_MS));
  process.stdout.write('stream: ');
  for await (const delta of stream as AsyncIterable<GenerateDelta__Output>) {
    process.stdout.write(delta.text);
  }
  process.stdout.write('\n');
}

/** Many requests over one stream; the last one is cancelled after its first words. */
async function session(client: InferenceClient, who: grpc.Metadata): Promise<void> {
  const stream = client.session(who, within(TIMEOUT_MS));
  const asked = new Map([
    ['1', 'What is 2 + 3?'],
    ['2', 'What is the capital of Japan?'],
    ['3', 'Tell me a story.'],
  ]);
  for (const [id, text] of asked) {
    stream.write({ submit: { id, chat: question(text), timeoutNs: 30e9 } });
  }
  const answers = new Map([...asked.keys()].map((id) => [id, '']));
  const open = new Set(asked.keys());
  const add = (id: string, text: string) => answers.set(id, answers.get(id) + text);
  for await (const response of stream as AsyncIterable<SessionResponse__Output>) {
    for (const { id, delta, error } of response.events) {
      if (!open.has(id)) continue; // sent before the server knew of the cancel
      if (error) { // of this request; the others go on
        add(id, `error ${error.code}: ${error.message}`);
        open.delete(id);
      } else if (delta) {
        add(id, delta.text);
        if (delta.summary) {
          open.delete(id);
        } else if (id === '3') {
          stream.write({ cancel: { id } });
          open.delete(id); // nothing more is said of it
          add(id, ' … cancelled');
        }
      }
    }
    if (open.size === 0) stream.end(); // then the server ends its side, and the loop
  }
  for (const [id, text] of answers) console.log(`session ${id}: ${text}`);
}

/** A value that is refused, and a deadline that passes. */
async function errors(client: InferenceClient, who: grpc.Metadata): Promise<void> {
  const refused = { text: 'Hi', samplingParams: { temperature: 9 } };
  const endless = question('Hi', { ignoreEos: true }); // to the end of the context
  for (const answer of [
    () => settled<GenerateResponse__Output>((done) =>
      client.generate(refused, who, within(TIMEOUT_MS), done)),
    () => settled<GenerateResponse__Output>((done) =>
      client.chat(endless, who, within(50), done)),
  ]) {
    try {
      await answer();
    } catch (error) {
      console.log(`expected error: ${explain(error)}`);
    }
  }
}

function question(text: string, samplingParams = GREEDY): ChatRequest {
  return { messages: [{ role: 'user', content: text }], samplingParams };
}

function within(ms: number): grpc.CallOptions {
  return { deadline: Date.now() + ms };
}

/** The answer of a call that takes a callback. */
function settled<Answer>(start: (done: grpc.requestCallback<Answer>) => void): Promise<Answer> {
  return new Promise((resolve, reject) => {
    start((error, answer) => (answer === undefined ? reject(error) : resolve(answer)));
  });
}

/** The status, the field at fault and when to try again, as far as the server said. */
function explain(error: unknown): string {
  if (!(error instanceof Error && 'code' in error)) return String(error);
  const { code, details, metadata } = error as grpc.ServiceError;
  const lines = [`${grpc.status[code]}: ${details}`];
  const [bytes] = metadata.get('grpc-status-details-bin');
  if (bytes !== undefined) {
    for (const detail of rpc.Status.deserialize(bytes as Buffer).details) {
      if (!('value' in detail)) continue;
      const value = detail.value as Buffer;
      if (detail.type_url.endsWith('/google.rpc.BadRequest')) {
        const { fieldViolations } = rpc.BadRequest.deserialize(value);
        lines.push(...fieldViolations.map((violation) => `  field ${violation.field}`));
      } else if (detail.type_url.endsWith('/google.rpc.RetryInfo')) {
        const delay = rpc.RetryInfo.deserialize(value).retryDelay;
        if (delay) lines.push(`  try again in ${Number(delay.seconds) + delay.nanos / 1e9} s`);
      }
    }
  }
  return lines.join('\n');
}

main().catch((error: unknown) => {
  console.error(explain(error));
  process.exitCode = 1;
});
