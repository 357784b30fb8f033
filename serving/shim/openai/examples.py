"""Bodies that /openapi.json shows. Each gets an answer from any model with a chat template; clients
of tests send them all.
"""

from typing import Any

QUESTION = [{"role": "user", "content": "What is 23 + 58?"}]

CHAT_EXAMPLES: list[Any] = [
    {"messages": QUESTION, "temperature": 0},
    {
        "messages": [{"role": "system", "content": "Be brief."}, *QUESTION],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 16,
    },
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}],
        "n": 2,
        "seed": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 16,
        "stop": ["\n\n"],
        "logprobs": True,
        "top_logprobs": 5,
        "prompt_logprobs": 1,
        "return_token_ids": True,
    },
]
COMPLETION_EXAMPLES: list[Any] = [
    {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0},
    {
        "prompt": ["Once upon a time", "One, two,"],
        "n": 2,
        "seed": 1,
        "max_tokens": 8,
        "stop": ".",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    {
        "prompt": "Once upon a time",
        "max_tokens": 4,
        "echo": True,
        "logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    },
    {"prompt": "One, two,", "max_tokens": 4, "logprobs": 0, "prompt_logprobs": 1},
    {"prompt": "One, two,", "max_tokens": 0, "echo": True},
]
