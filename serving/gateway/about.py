"""What the server tells of itself: names, limits, options."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from ... import __version__
from ...engine.config import EngineConfig
from ...protos.quire.v1 import inference_pb2
from ..config import ServeConfig
from .prepare import Served

# Keys, and what says where they are.
_HIDDEN = frozenset({"api_key", "api_key_file", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"})


class About:
    """Made once: what follows from the options does not change."""

    def __init__(self, engine: Mapping[str, Any], serve: Mapping[str, Any]) -> None:
        """engine and serve: the options as they were given."""
        self._created_ns = time.time_ns()
        self._options = {
            name.replace("_", "-"): _shown(value)
            for config, given in ((EngineConfig, engine), (ServeConfig, serve))
            for name, value in given.items()
            if name not in _HIDDEN and value != _defaults(config).get(name)
        }

    def models(self, served: Served) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.Model(
                    name=name,
                    max_model_len=served.limits.max_model_len,
                    created_unix_ns=self._created_ns,
                )
                for name in served.names
            ]
        )

    def server(self, served: Served, core_restarts: int) -> inference_pb2.GetServerInfoResponse:
        limits = served.limits
        return inference_pb2.GetServerInfoResponse(
            version=__version__,
            model=served.names[0],
            max_model_len=limits.max_model_len,
            vocab_size=limits.logits_width,
            max_logprobs=limits.logits_width
            if limits.max_logprobs is None
            else limits.max_logprobs,
            core_restarts=core_restarts,
            options=self._options,
        )


def _defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
