"""What a full queue says of when to try again."""

import pytest
from quire.engine.errors import Overloaded
from quire.serving.gateway.metrics import GatewayMetrics
from quire.serving.gateway.waiting import Waiting, WaitingLimits


def test_delay_grows_while_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("quire.serving.gateway.waiting.time.monotonic", lambda: clock[-1])
    waiting_now = Waiting(WaitingLimits(1, 100), GatewayMetrics("m"))
    waiting_now.enter(1, 1)
    told = []
    for now in (1000.0, 1003.0, 1100.0):
        clock.append(now)
        with pytest.raises(Overloaded) as refused:
            waiting_now.enter(1, 1)
        told.append(refused.value.retry_after_s)
    assert told == [1.0, 3.0, 10.0]
