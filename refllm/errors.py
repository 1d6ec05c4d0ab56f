"""The exceptions that a user's mistake raises. Each carries one sentence: what was wrong, where, what would be right.

The command line prints that sentence and exits with code 2; a library user catches `RefllmError` or the plain
`ValueError` that it also is.
"""


class RefllmError(ValueError):
    """Base of every error that refllm raises on purpose."""


class ConfigError(RefllmError):
    """A config.json or a config argument that no model of the family can have."""


class CheckpointError(RefllmError):
    """A checkpoint folder that cannot be read as what it claims to be."""


class TokenizerError(RefllmError):
    """A tokenizer file or a chat template that cannot be used."""


class InputError(RefllmError):
    """Arguments of a call that contradict each other or the model (token ids out of range, masks of a wrong shape)."""


class MissingExtraError(RefllmError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
