"""The sink of a call that wants the whole answer at once."""

import asyncio

from ...engine.answer_reader import Piece
from ...engine.errors import QuireError
from ...protos.quire.v1 import inference_pb2
from .answers import Completed, set_summary
from .open_request import Choice, OpenRequest


class Gathered:
    """Keeps every piece until the last one."""

    def __init__(self) -> None:
        self._answers: dict[int, Completed] = {}
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_piece(self, choice: Choice, piece: Piece) -> None:
        self._answers.setdefault(choice.index, Completed(choice)).add(piece)
        if choice.request.is_done and not self._end.done():
            self._end.set_result(None)

    def on_error(self, _: OpenRequest, error: QuireError) -> None:
        if not self._end.done():
            self._end.set_exception(error)

    async def response(self, request: OpenRequest) -> inference_pb2.GenerateResponse:
        """Once the request has ended. Raises QuireError."""
        await self._end
        message = inference_pb2.GenerateResponse(
            request_id=request.terms.request_id,
            model=request.terms.model,
            outputs=[self._answers[choice.index].message() for choice in request.choices],
            prompt_token_ids=request.text.prompt_token_ids,
            prompt_logprobs=request.take_prompt_logprobs(),
        )
        set_summary(message.summary, request)
        return message
