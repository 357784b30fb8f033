"""Routes of the engines that our users come from which are not here: 404, but with the reason."""

from .http import Receive, Reply, Scope
from .openai.errors import HttpError

_EMBEDDINGS = "embeddings and scores are not available yet"
_OLLAMA = "Ollama's interface is not available yet; its OpenAI routes under /v1 are"
_TGI = "TGI's interface is not available yet; use /v1/completions or /v1/chat/completions"
_LLAMA = "llama-server's interface is not available yet; use the OpenAI routes under /v1"
_SGLANG = "SGLang's interface is not available; use the OpenAI routes under /v1"
_AUDIO = "audio is neither understood nor made"
_FILES = "files, batches and fine-tuning are not available; `quire generate --input` runs a file"
_HOSTED = "it is a service of OpenAI's; nothing is kept on this server"
_LORA = "LoRA adapters are not available yet"

# path, or its beginning if it ends in / -> why
_WHY = {
    "/v1/embeddings": _EMBEDDINGS,
    "/embeddings": _EMBEDDINGS,
    "/embed": _EMBEDDINGS,
    "/v1/rerank": _EMBEDDINGS,
    "/v2/rerank": _EMBEDDINGS,
    "/rerank": _EMBEDDINGS,
    "/v1/score": _EMBEDDINGS,
    "/score": _EMBEDDINGS,
    "/pooling": _EMBEDDINGS,
    "/classify": _EMBEDDINGS,
    "/v1/responses": "the Responses interface is not available yet; use /v1/chat/completions",
    "/v1/messages": "Anthropic's interface is not available yet; use /v1/chat/completions",
    "/v1/audio/": _AUDIO,
    "/v1/realtime": _AUDIO,
    "/v1/images/": "images are neither understood nor made",
    "/v1/moderations": "texts are not moderated",
    "/v1/files": _FILES,
    "/v1/batches": _FILES,
    "/v1/fine_tuning/": _FILES,
    "/v1/assistants": _HOSTED,
    "/v1/threads": _HOSTED,
    "/v1/vector_stores": _HOSTED,
    "/v1/load_lora_adapter": _LORA,
    "/v1/unload_lora_adapter": _LORA,
    "/lora-adapters": _LORA,
    "/api/": _OLLAMA,
    "/generate": _TGI,
    "/generate_stream": _TGI,
    "/info": _TGI,
    "/chat_tokenize": _TGI,
    "/invocations": "SageMaker's interface is not available yet; use /v1/chat/completions",
    "/completion": _LLAMA,
    "/completions": _LLAMA,
    "/embedding": _LLAMA,
    "/infill": _LLAMA,
    "/apply-template": _LLAMA,
    "/props": _LLAMA,
    "/slots": _LLAMA,
    "/get_model_info": _SGLANG,
    "/get_server_info": _SGLANG,
    "/flush_cache": _SGLANG,
    "/tokenizer_info": "the tokenizer's files are not told; /tokenize and /detokenize use them",
    "/load": "see quire_requests_open in /metrics",
    "/sleep": "the engine does not give its memory back while it runs; stop it",
    "/wake_up": "the engine does not sleep",
    "/reset_prefix_cache": "cached prefixes go when their memory is needed; use a cache_salt",
    "/start_profile": "profiles are taken of `quire bench`",
    "/stop_profile": "profiles are taken of `quire bench`",
}


async def no_route(scope: Scope, _: Receive, __: Reply, ___: str | None) -> None:
    """Of any path that has none. Raises HttpError."""
    message = f"there is no route {scope['path'][:200]}"
    if why := why_absent(scope["path"].removeprefix(scope.get("root_path", ""))):
        raise HttpError(404, f"{message}: {why}", type="not_found_error", code="unsupported_route")
    raise HttpError(404, message, type="not_found_error")


def why_absent(path: str) -> str | None:
    """None for a path that none of the engines has."""
    path = path.rstrip("/") or "/"
    if path in _WHY:
        return _WHY[path]
    begins = (why for known, why in _WHY.items() if known.endswith("/") and path.startswith(known))
    return next(begins, None)
