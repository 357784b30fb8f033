"""In which order requests run: sort keys, and the start tags on which the fair one sorts.

A policy is a plain function of one request. What has to be remembered from request to request is in
StartTags, which the scheduler owns and keeps under every policy. Nothing here knows a clock.
"""

from collections.abc import Callable

from .request import Request

# The smallest runs first and is preempted last. Must not change while a request is queued.
Policy = Callable[[Request], tuple[int, ...]]

# Tenants that are remembered before it is worth looking which of them can be forgotten.
_FEW_TENANTS = 64


def fcfs(request: Request) -> tuple[int, ...]:
    """First come, first served."""
    return (request.arrival, request.choice)


def by_priority(request: Request) -> tuple[int, ...]:
    """Lower `priority` first, then first come. A running request makes room only for pages."""
    return (request.priority, request.arrival, request.choice)


def fair(request: Request) -> tuple[int, ...]:
    """Equal shares for the tenants that wait, then first come."""
    return (request.start_tag, request.arrival, request.choice)


POLICIES: dict[str, Policy] = {"fcfs": fcfs, "priority": by_priority, "fair": fair}


class StartTags:
    """Start-time fair queueing (Goyal, Vin and Cheng 1996, section 2) of tenants of equal weight.

    Virtual time counts tokens: it is the largest start tag admitted so far. A request starts at the
    virtual time of its arrival or where its tenant's request before it finishes, whichever is
    later, and finishes its cost after that: the tokens it asks for. So a tenant that waits is
    passed only by others that were given less, and one without requests saves nothing up. Memory:
    tenants whose last request finishes after the virtual time, and as many again.
    """

    def __init__(self) -> None:
        self.virtual_time = 0
        self._last_finish = 0  # the largest finish tag of all
        self._finish_by_tenant: dict[bytes, int] = {}
        self._num_worth_a_look = _FEW_TENANTS

    def on_added(self, request: Request, max_known: int) -> None:
        """Set the start tag of a request, which may have max_known tokens in the end."""
        if request.tenant not in self._finish_by_tenant:
            self._forget_the_passed()
        finish_before = self._finish_by_tenant.get(request.tenant, 0)
        request.start_tag = max(self.virtual_time, finish_before)
        finish = request.start_tag + _cost(request, max_known)
        self._finish_by_tenant[request.tenant] = finish
        self._last_finish = max(self._last_finish, finish)

    def on_admitted(self, request: Request) -> None:
        self.virtual_time = max(self.virtual_time, request.start_tag)

    def on_ended(self, request: Request, max_known: int) -> None:
        """The turn of a request that never ran goes to the next one that its tenant sends.

        Otherwise a tenant that cancels a long queue would wait as if it had been served.
        """
        has_run = request.slot is not None or request.num_preemptions > 0
        if not has_run and request.tenant in self._finish_by_tenant:
            self._finish_by_tenant[request.tenant] -= _cost(request, max_known)

    def on_nobody_waits(self) -> None:
        """Nobody is kept from anything, so nobody is ahead: the end of a busy period."""
        self.virtual_time = self._last_finish

    def _forget_the_passed(self) -> None:
        """Drop tenants that would start at the virtual time anyway. Amortized cost: constant."""
        if len(self._finish_by_tenant) < self._num_worth_a_look:
            return
        self._finish_by_tenant = {
            tenant: finish
            for tenant, finish in self._finish_by_tenant.items()
            if finish > self.virtual_time
        }
        self._num_worth_a_look = max(_FEW_TENANTS, 2 * len(self._finish_by_tenant))


def _cost(request: Request, max_known: int) -> int:
    """Without output that an earlier engine made; the prompt is computed again."""
    return max_known - request.num_output
