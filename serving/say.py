"""What a command says about itself."""

from ..engine import notices


def say(line: str) -> None:
    """To stderr, after the command's name."""
    notices.say(f"quire: {line}")
