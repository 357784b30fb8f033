"""One line of the input as an id and a request, or an id and what is wrong."""

from dataclasses import dataclass

from ...engine.errors import RequestError
from ..strict_json import read_object
from .line_reader import MAX_LINE_BYTES, Line
from .line_request import LineId, LineRequest, line_id, read_native
from .openai_line import is_openai, read_openai


@dataclass(frozen=True)
class ReadLine:
    """id: as the line gives it, None without a usable one. asked: the request, or its error.
    id_field: what this kind of line calls its id.
    """

    id: LineId | None
    asked: LineRequest | RequestError
    id_field: str = "id"


def read_line(line: Line) -> ReadLine:
    """Never raises for what a file may hold."""
    given_id, id_field = None, "id"
    try:
        if line.content is None:
            raise RequestError(
                f"the line is longer than {MAX_LINE_BYTES >> 20} MiB; shorten its prompt"
            )
        fields = read_object(line.content, "the line")
        read = read_native
        if is_openai(fields):
            id_field, read = "custom_id", read_openai
        given_id = line_id(fields.get(id_field), id_field)
        return ReadLine(given_id, read(fields), id_field)
    except RequestError as error:
        return ReadLine(given_id, error, id_field)
