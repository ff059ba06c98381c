"""Invalid user input, and the warning about data that could not be verified."""


class UserError(Exception):
    """Invalid user input: a file, a column, a flag, a configuration.

    The message is one sentence that quotes what was received and says what is expected. The command line prints it
    without a traceback and exits with code 2. Control characters are escaped in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NotVerified(UserWarning):
    """Data was used whose integrity could not be verified. The command line prints it as one sentence."""


def printable(text: str) -> str:
    """The text with control characters escaped: names come from files, and files from strangers."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
