"""Errors that reach the user as one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """A config that cannot run. The message is one line: what, where (full key), and what would be right."""


def one_line(error: BaseException, most: int = 200) -> str:
    """The first line of what ``error`` says, at most ``most`` printable characters; its kind where it says nothing."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    said = "".join(c if c.isprintable() else "?" for c in line.strip()[:most])
    return f"no {said}" if isinstance(error, KeyError) else said or type(error).__name__


@contextmanager
def as_config_error(where: str) -> Iterator[None]:
    """Turn a ``ValueError`` or ``OSError`` of the block into a :class:`ConfigError` with the key ``where`` in front."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


@contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Put ``where`` in front of the message of a ``ValueError`` of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def first_line(error: BaseException) -> str:
    """The first line of a message, or the error's type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class IncompleteError(Exception):
    """What could be done was done; the message says what was left out. The process ends with ``exit_code``."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


class RunInterruptedError(Exception):
    """The run was asked to stop, saved itself and stopped. ``exit_code`` follows the shell: 128 + signal number.

    ``requeued_job`` is the number of the SLURM job that will continue the run, or ``None``.
    """

    def __init__(self, *, signum: int, resume_point: Path | None, requeued_job: str | None = None) -> None:
        self.signum = signum
        self.resume_point = resume_point
        self.requeued_job = requeued_job
        self.exit_code = 128 + signum
        saved = f"saved {resume_point}" if resume_point else "nothing was saved yet"
        on = f"; SLURM job {requeued_job} is requeued and goes on from there" if requeued_job else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}{on}")
