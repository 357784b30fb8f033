"""Hugging Face's InferenceClient. Without a model in the call it sends the name "dummy"."""

import asyncio
import os

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError

SERVER = {
    "base_url": os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("OPENAI_API_KEY", "EMPTY"),
}

client = InferenceClient(**SERVER)
question = {
    "model": "quire-demo",
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 23 + 58?"},
    ],
    "temperature": 0,
}

answer = client.chat_completion(**question)
print("answer:", answer.choices[0].message.content)

text = ""
for chunk in client.chat_completion(**question, stream=True):
    text += chunk.choices[0].delta.content or ""
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

assert answer.choices[0].message.content == text == "23 + 58 = 81."
assert answer.choices[0].finish_reason == "stop"
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def asynchronously() -> None:
    async with AsyncInferenceClient(**SERVER) as client:
        whole = await client.chat_completion(**question)
        print("asynchronously:", whole.choices[0].message.content)
        stream = await client.chat_completion(**question, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert whole.choices[0].message.content == "".join(pieces) == text


asyncio.run(asynchronously())

sure = client.chat_completion(**question, logprobs=True, top_logprobs=5)
tokens = sure.choices[0].logprobs.content
print("logprobs:", {one.token: round(one.logprob, 1) for one in tokens[0].top_logprobs})
assert "".join(token.token for token in tokens[:-1]) == text  # the last one ends the answer

refused = None
try:
    client.chat_completion(**question | {"temperature": 7})
except BadRequestError as error:
    refused = error.response.json()["error"]
    print("refused:", refused["message"])
assert refused["param"] == "temperature"
