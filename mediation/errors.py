"""The one error a user can cause, and the one warning they must not miss."""

from __future__ import annotations


class MediationError(Exception):
    """Something the user can mend. The message is one sentence: what was wrong and what to do.

    The command line prints it and exits with code 2.
    """


class FidelityWarning(UserWarning):
    """A dictionary misses so much of the model on these prompts that figures through it mean little."""
