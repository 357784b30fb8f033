"""One message from lines: plain, continued by a backslash, or between triple quotes."""

from collections.abc import Callable

ReadLine = Callable[[str], str | None]  # takes the prompt to show; None at the end of the input

FIRST, MORE = ">>> ", "... "
QUOTES = '"""'


def read_message(read_line: ReadLine) -> str | None:
    """The message; None at the end of the input, where what was begun is still given."""
    line = read_line(FIRST)
    if line is None:
        return None
    if line.startswith(QUOTES):
        return _quoted(line[len(QUOTES) :], read_line)
    lines = []
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = read_line(MORE)
    return "\n".join([*lines, line] if line is not None else lines)


def _quoted(line: str | None, read_line: ReadLine) -> str:
    lines = []
    while line is not None:
        if line.rstrip().endswith(QUOTES):
            lines.append(line.rstrip()[: -len(QUOTES)])
            break
        lines.append(line)
        line = read_line(MORE)
    return "\n".join(lines).strip("\n")
