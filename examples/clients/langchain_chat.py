"""LangChain's ChatOpenAI."""

import asyncio
import os

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    model="quire-demo",
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "EMPTY"),
    temperature=0,
    stream_usage=True,
)
messages = [("system", "You are a helpful assistant."), ("human", "What is 23 + 58?")]

answer = llm.invoke(messages)
print("answer:", answer.content)

for chunk in llm.stream(messages):
    print(chunk.content, end="", flush=True)
print()

assert answer.content == "23 + 58 = 81."
assert answer.response_metadata["finish_reason"] == "stop"
assert answer.response_metadata["model_name"] == "quire-demo"

# Chunks add up, the count of tokens with them.
first, *rest = llm.stream(messages)
whole = sum(rest, first)
print("usage:", whole.usage_metadata)
assert whole.content == answer.content
for counted in ("input_tokens", "output_tokens", "total_tokens"):
    assert whole.usage_metadata[counted] == answer.usage_metadata[counted] > 0

questions = [f"What is {number} + 58?" for number in range(20, 30)]
expected = [f"{number} + 58 = {number + 58}." for number in range(20, 30)]
batch = [answer.content for answer in llm.batch(questions)]
print("batch:", *batch[:3], "...")
assert batch == expected


async def asynchronously() -> list[str]:
    one = await llm.ainvoke(messages)
    streamed = [chunk.content async for chunk in llm.astream(messages)]
    assert one.content == "".join(streamed) == answer.content
    return [answer.content for answer in await llm.abatch(questions)]


assert asyncio.run(asynchronously()) == expected

sure = llm.bind(logprobs=True, top_logprobs=5).invoke(messages)
tokens = sure.response_metadata["logprobs"]["content"]
print("logprobs:", {one["token"]: round(one["logprob"], 1) for one in tokens[0]["top_logprobs"]})
assert "".join(one["token"] for one in tokens[:-1]) == answer.content  # the last one ends it
assert all(len(one["top_logprobs"]) == 5 for one in tokens)

# By this class LangChain's middleware knows that a conversation is to be shortened.
is_refused = False
try:
    llm.invoke("a " * 5000)
except ContextOverflowError as error:
    is_refused = True
    print("refused:", error)
assert is_refused
