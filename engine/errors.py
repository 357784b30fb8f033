"""Every error that quire raises on purpose; an edge maps each class to one status or exit code.

QuireError
├── UsageError                  the caller can mend it: the message says the rule and the way out
│   ├── ConfigError             an option, or a combination of options
│   ├── ModelError              a model's folder, config, weights or tokenizer
│   │   └── UnsupportedModel    well-formed, but we would run it wrongly or not at all
│   ├── RequestError            one request; carries the name of the field
│   │   ├── UnknownModel        it names a model that is not served
│   │   ├── ContextExceeded     its prompt does not fit into the context
│   │   └── DuplicateRequest    its id is that of an open request
│   ├── AuthenticationError     no key, or a wrong one
│   └── MemoryPlanError         the model, or one sequence of it, does not fit
├── Overloaded                  there is no room for the request now; carries when to try again
├── SlowReader                  the caller did not read its answer, which was given up
├── DeadlinePassed              the caller's own limit of time
└── EngineError                 the engine failed, not the caller
    ├── StepFailed              a device step raised; its requests are recomputed or ended
    ├── EngineStopped           the engine was closed while a request was under way
    └── EngineUnavailable       the engine starts, stops or was lost; carries when to try again
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


class UnknownModel(RequestError):
    """The request names a model that is not served."""


class ContextExceeded(RequestError):
    """The prompt leaves no room for an answer in the model's context."""


class DuplicateRequest(RequestError):
    """The same caller has an open request of that id."""


class AuthenticationError(UsageError):
    """The caller showed no key, or none of ours. Never says which part was wrong."""


class MemoryPlanError(UsageError):
    """Does not fit in memory; the message names the option to change."""


class Overloaded(QuireError, RuntimeError):
    """No room for the request now. retry_after_s: when there may be."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SlowReader(QuireError, RuntimeError):
    """The caller did not read its answer, which was given up so that nobody else waits."""


class DeadlinePassed(QuireError, TimeoutError):
    """The time that the caller gave the request has passed."""


class EngineError(QuireError, RuntimeError):
    """The engine failed; the request may be sent again."""


class StepFailed(EngineError):
    """A device step raised an exception."""


class EngineStopped(EngineError):
    """The engine was closed, or had failed, before the request finished."""


class EngineUnavailable(EngineError):
    """The engine starts, stops, or was lost and the request could not go on. retry_after_s: when it
    may be there; None is unknown.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
