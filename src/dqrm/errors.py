"""The one error that is the user's to mend, and the warning about what could not be checked."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a column, a flag, a configuration.

    The message is one sentence that quotes what was received and says what would be right. The command line prints it
    without a traceback and exits with code 2. What would steer a terminal is written out in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NotVerified(UserWarning):
    """Something was used whose integrity could not be checked. The command line prints it as one sentence."""


def printable(text: str) -> str:
    """The text with what would steer a terminal written out: names come from files, and files from strangers."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
