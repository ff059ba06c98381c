"""Requests that are refused: a status of HTTP and one sentence."""

from dqrm.errors import printable

# Longer sentences quote what is of no use to a reader.
_LONGEST = 600


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: of HTTP. sentence: quotes what was received and says what is expected.
        close: whether the connection ends with the answer, as parts of the request may be unread.
    """

    def __init__(self, status: int, sentence: str, close: bool = False) -> None:
        super().__init__(sentence)
        text = printable(sentence)
        self.status, self.close = status, close
        self.sentence = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


def shown(value: object) -> str:
    """A received value for a sentence, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
