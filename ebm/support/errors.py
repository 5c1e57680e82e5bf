"""The one kind of error that a user can cause."""


class UsageError(Exception):
    """A mistake of the user: one line that names what is wrong and says what to do."""
