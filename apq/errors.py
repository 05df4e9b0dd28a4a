"""The exception for mistakes that users can fix."""


class UserError(ValueError):
    """A mistake in flags, files or specs: scripts print it as one line and exit with code 2."""
