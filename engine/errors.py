"""Every error that quire raises on purpose; an edge maps each class to one status or exit code.

QuireError
├── UsageError                  the caller can mend it: the message says the rule and the way out
│   ├── ConfigError             an option, or a combination of options
│   ├── ModelError              a model's folder, config, weights or tokenizer
│   │   └── UnsupportedModel    well-formed, but we would run it wrongly or not at all
│   ├── RequestError            one request; carries the name of the field
│   └── MemoryPlanError         the model, or one sequence of it, does not fit
└── EngineError                 the engine failed, not the caller
    ├── StepFailed              a device step raised; its requests are recomputed or ended
    └── EngineStopped           the engine was closed while a request was under way
"""


class QuireError(Exception):
    """The root: catch this to catch everything quire raises on purpose."""


class UsageError(QuireError, ValueError):
    """The caller can mend it. Also a ValueError, which is what vLLM's users catch."""


class ConfigError(UsageError):
    """An option is unknown, out of range, or contradicts another."""


class ModelError(UsageError):
    """A model's files cannot be used as they are."""


class UnsupportedModel(ModelError):
    """The files are sound, but running them would give wrong answers or is not implemented."""


class RequestError(UsageError):
    """One request is refused. `field` names the offending part, as the caller spelled it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class MemoryPlanError(UsageError):
    """Does not fit in memory; the message names the option to change."""


class EngineError(QuireError, RuntimeError):
    """The engine failed; the request may be sent again."""


class StepFailed(EngineError):
    """A device step raised an exception."""


class EngineStopped(EngineError):
    """The engine was closed, or had failed, before the request finished."""
