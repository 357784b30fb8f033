"""OpenAI's client for Python."""

import asyncio
import os

import openai

SERVER = {
    "base_url": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "EMPTY"),
}

client = openai.OpenAI(**SERVER)
question = {
    "model": "quire-demo",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 23 + 58?"},
    ],
    "temperature": 0,
}

answer = client.chat.completions.create(**question)
print("answer:", answer.choices[0].message.content)

text = ""
for chunk in client.chat.completions.create(**question, stream=True):
    text += chunk.choices[0].delta.content or ""
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

assert answer.choices[0].message.content == text == "23 + 58 = 81."


async def ask(client: openai.AsyncOpenAI, number: int) -> str:
    content = f"What is {number} + 58?"
    messages = [{"role": "user", "content": content}]
    answer = await client.chat.completions.create(
        model="quire-demo", messages=messages, temperature=0
    )
    return answer.choices[0].message.content


async def ask_many(numbers: range) -> list[str]:
    async with openai.AsyncOpenAI(**SERVER) as client:
        return await asyncio.gather(*(ask(client, number) for number in numbers))


answers = asyncio.run(ask_many(range(20, 40)))
print("many at once:", *answers[:3], "...")
assert answers == [f"{number} + 58 = {number + 58}." for number in range(20, 40)]

# How sure the model was of each token, beside the four next ones.
sure = client.chat.completions.create(**question, logprobs=True, top_logprobs=5)
for token in sure.choices[0].logprobs.content[:3]:
    others = {other.token: round(other.logprob, 1) for other in token.top_logprobs}
    print(f"logprobs of {token.token!r}:", others)
    assert len(others) == 5
    assert max(others, key=others.get) == token.token

# What OpenAI's server does not have goes into extra_body; a request id of your own into a header.
sampled = client.chat.completions.create(
    **question | {"temperature": 1, "seed": 7},
    extra_body={"top_k": 1},
    extra_headers={"X-Request-ID": "my-request-1"},
)
print("request", sampled._request_id, "with top_k 1:", sampled.choices[0].message.content)
assert sampled._request_id == "my-request-1"
assert sampled.choices[0].message.content == text  # of one token there is no choice

# Errors name the field. A full queue and a server that starts are none: the client tries again.
refused = None
try:
    client.chat.completions.create(**question | {"temperature": 7})
except openai.BadRequestError as error:
    refused = error.param
    print("refused:", error.message)
assert refused == "temperature"
