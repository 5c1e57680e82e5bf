"""Shared pieces: errors a user can cause, the replay buffer, image panels and plots, logs."""


class UsageError(Exception):
    """A mistake of the user: one line that names what is wrong and says what to do."""
