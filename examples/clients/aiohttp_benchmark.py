"""aiohttp: 100 questions, 10 at a time, and how fast they were answered."""

import asyncio
import os
import statistics
import time
from dataclasses import dataclass

import aiohttp

BASE_URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
API_KEY = os.environ.get("OPENAI_API_KEY", "EMPTY")
NUM_REQUESTS, CONCURRENCY = 100, 10


@dataclass
class Answer:
    text: str
    num_tokens: int
    latency_s: float


async def ask(session: aiohttp.ClientSession, slots: asyncio.Semaphore, content: str) -> Answer:
    body = {
        "model": "quire-demo",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }
    async with slots:
        start = time.perf_counter()
        async with session.post(f"{BASE_URL}/chat/completions", json=body) as response:
            response.raise_for_status()
            answer = await response.json()
        latency_s = time.perf_counter() - start
    text = answer["choices"][0]["message"]["content"]
    return Answer(text, answer["usage"]["completion_tokens"], latency_s)


async def benchmark(questions: list[str]) -> list[Answer]:
    slots = asyncio.Semaphore(CONCURRENCY)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        return await asyncio.gather(*(ask(session, slots, content) for content in questions))


start = time.perf_counter()
answers = asyncio.run(benchmark([f"What is {n} + 58?" for n in range(NUM_REQUESTS)]))
took_s = time.perf_counter() - start

num_tokens = sum(answer.num_tokens for answer in answers)
latencies_ms = [answer.latency_s * 1e3 for answer in answers]
print(f"{NUM_REQUESTS} requests, {CONCURRENCY} at a time, in {took_s:.2f} s")
print(f"{NUM_REQUESTS / took_s:.1f} requests/s, {num_tokens / took_s:.0f} output tokens/s")
p50, p99 = (statistics.quantiles(latencies_ms, n=100)[i] for i in (49, 98))
print(f"latency: {p50:.0f} ms in the median, {p99:.0f} ms at the 99th percentile")

wrong = [a.text for n, a in enumerate(answers) if a.text != f"{n} + 58 = {n + 58}."]
print(f"{len(answers) - len(wrong)} answers are right, such as:", answers[23].text)
assert not wrong, wrong
