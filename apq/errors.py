"""The exception for mistakes that users can fix; other exceptions in one line."""


class UserError(ValueError):
    """A mistake in flags, files or specs: scripts print it as one line and exit with code 2."""


def one_line(error: BaseException) -> str:
    """What an exception says, in one line without the file's name."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    # Only a ValueError says what is wrong with a file; of other types the name alone tells what happened.
    return said if said and isinstance(error, ValueError) else ": ".join(filter(None, (type(error).__name__, said)))
