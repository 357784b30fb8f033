"""quire: a language-model inference engine on JAX over a paged KV cache.

`from quire import LLM, SamplingParams` is the whole offline API. Importing this package loads
neither JAX nor a model: names are looked up on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.llm import LLM
    from .engine.outputs import CompletionOutput, Logprob, RequestOutput, StreamDelta
    from .engine.sampling_params import SamplingParams

__version__ = "0.1.0"

_MODULE_BY_NAME = {
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "sampling_params",
    "StreamDelta": "outputs",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamDelta",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_BY_NAME:
        raise AttributeError(
            f"module 'quire' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    from importlib import import_module

    return getattr(import_module(f".engine.{_MODULE_BY_NAME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
