"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a column, a flag, a configuration.

    The message is one sentence that quotes what was received and says what would be right. The command line prints it
    without a traceback and exits with code 2.
    """
