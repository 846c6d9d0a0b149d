"""The command line. Help, one line for each mistake, and the way to a task.

Nothing heavy is imported here: help reads the YAML files as text, a typo in a key is found before torch is loaded.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qtrain import __version__
from qtrain.command_help import INSTALL, completions, group_help, help_text
from qtrain.settings.conf_dir import conf_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

USER_ERROR = 2
INTERRUPTED = 130
UNREAD = 128 + 13
"""Exit code where who reads the output stops early, as head does: that of SIGPIPE."""
LEFT_OUT = 1
"""Exit code of a task that did what it could, and says what it left out."""

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
"""Errors of a file system that is away for a while; nobody has to mend a command for them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (default: the process's own) and exit the process."""
    with _command_line(spelled_out(sys.argv[1:] if argv is None else argv)) as arguments:
        try:
            answered = _answered(arguments)
            if not answered:
                _run_hydra(arguments)
            sys.stdout.flush()
            if answered:
                sys.exit(0)
        except KeyboardInterrupt:
            _say("interrupted; the same command again goes on from the last resume point")
            sys.exit(INTERRUPTED)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_unread():
                sys.exit(UNREAD)
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            if not _is_users(error):
                traceback.print_exc()
                sys.exit(1)
            # What was told to stop, and did in good order, or left something out, brings its own code.
            stopped: int | None = getattr(error, "exit_code", None)
            _say(_one_line(error) if stopped else f"error: {_one_line(error)}")
            if getattr(error, "errno", None) not in PASSING:
                _tell_batch_script(stopped or USER_ERROR)
            sys.exit(stopped or USER_ERROR)


def _answered(arguments: Sequence[str]) -> bool:
    """Whether the command line asked for help, the version or a completion, which it now has."""
    if "--version" in arguments:
        print(f"qtrain {__version__}")
        return True
    flag = next((flag for flag in ("--help", "-h") if flag in arguments), None)
    if flag is not None:
        asked = arguments[arguments.index(flag) + 1 :]
        print(group_help(conf_dir(), asked[0]) if asked and "=" not in asked[0] else help_text(conf_dir()))
        return True
    if arguments[:1] not in (["-sc"], ["--shell-completion"]):
        return False
    if arguments[1:] == ["install=bash"]:
        print(INSTALL)
        return True
    typed = os.environ.get("COMP_LINE", "").split(" ")[-1]
    found = completions(conf_dir(), typed) if arguments[1:] == ["query=bash"] else None
    if found is not None:
        print(" ".join(found))
    return found is not None


def spelled_out(argv: Sequence[str]) -> list[str]:
    """``argv`` in the words of the config: beside ``task=predict``, ``model=FILE`` means ``checkpoint="FILE"``.

    A file is no option of the group `model`. Likewise ``images=FILES`` means ``images=["FILES"]``, a list. Both are
    quoted, since names of files may hold what Hydra's grammar does not take; a list, or what is quoted, is left alone.
    """
    if "task=predict" not in argv:
        return list(argv)
    from hydra.core.override_parser.types import Quote, QuotedString

    spelled = []
    for word in argv:
        key, _, value = word.partition("=")
        if key in ("model", "images") and not value.startswith(("[", "'", '"')):
            value = QuotedString(value, Quote.double).with_quotes()
        keys = {"model": f"checkpoint={value}", "images": f"images={value if value.startswith('[') else f'[{value}]'}"}
        spelled.append(keys.get(key, word))
    return spelled


@contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[list[str]]:
    """``argv`` as ``sys.argv``, where Hydra, and Lightning when it starts further processes, look for it."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        yield sys.argv[1:]
    finally:
        sys.argv = before


def _run_hydra(arguments: list[str]) -> None:
    from qtrain.config.compose import compose, compose_config, from_config
    from qtrain.config.multirun import check_multirun
    from qtrain.config.run_logging import logged_in, start_logging
    from qtrain.run_task import run_task
    from qtrain.training.signals import requeue_outside_of_training
    from qtrain.utils.compat import hydra_argument_parser
    from qtrain.utils.errors import ConfigError

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m qtrain --help")

    parser = hydra_argument_parser()
    parser.error = refuse  # type: ignore[method-assign]
    parsed = parser.parse_args(arguments)
    for flag in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(parsed, flag) is not None:
            refuse(f"--{flag.replace('_', '-')} is not for qtrain; configs of your own: hydra.searchpath=[file://DIR]")
    if parsed.hydra_help or parsed.info or parsed.shell_completion:
        _hydra_main(lambda cfg: None)
    elif parsed.cfg == "job" and not parsed.multirun:
        cfg = compose_config(parsed.overrides)
        from_config(cfg, parsed.overrides)
        _show(cfg, parsed.package, resolve=parsed.resolve)
    elif parsed.multirun or parsed.cfg:
        # Before Hydra makes a folder or starts a callback. It would also print its own errors, in several lines.
        if parsed.multirun:
            check_multirun(parsed.overrides)
        else:
            compose(parsed.overrides)
        _multirun(parsed.overrides)
    else:
        notes: list[str] = []
        cfg = compose_config(parsed.overrides, notes=notes)
        settings = from_config(cfg, parsed.overrides)
        start_logging(cfg)
        # Variants have folders of their own.
        with nullcontext() if settings.variants else logged_in(Path(settings.run_dir)):
            for note in notes:
                log.info(note)
            with _requeued(), requeue_outside_of_training():
                run_task(settings, _composing(parsed.overrides))


def _show(cfg: DictConfig, package: str | None, *, resolve: bool) -> None:
    """Print the config of a run as YAML, all of it or what lies at ``package``."""
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    from qtrain.config.explain import explain
    from qtrain.utils.errors import ConfigError

    with open_dict(cfg):
        cfg.pop("hydra")
    place = None if package in (None, "_global_") else package
    try:
        if resolve:
            OmegaConf.resolve(cfg)
        shown = cfg if place is None else OmegaConf.select(cfg, place, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    if shown is None:
        raise ConfigError(f"--package: the config has nothing at {place!r}")
    if place is not None:
        print(f"# @package {place}")
    print(OmegaConf.to_yaml(shown).rstrip("\n") if OmegaConf.is_config(shown) else shown)


def _multirun(typed: Sequence[str]) -> None:
    """Let Hydra run the jobs of this command one after the other, or hand them to a launcher."""
    from hydra.core.hydra_config import HydraConfig

    from qtrain.config.exchange import hidden, revealed
    from qtrain.config.multirun import named_job, swept_keys
    from qtrain.run_task import run_task
    from qtrain.training.signals import requeue_outside_of_training

    incomplete: list[Exception] = []
    swept = swept_keys(typed)
    shown, names = hidden(typed)
    as_shown = dict(zip(typed, shown, strict=True))
    sys.argv = [sys.argv[0], *(as_shown.get(argument, argument) for argument in sys.argv[1:])]

    def job(cfg: DictConfig) -> Mapping[str, Any] | None:
        try:
            with _requeued(), requeue_outside_of_training():
                given = HydraConfig.get().overrides
                overrides, settings = named_job(_composing(revealed([*given.hydra, *given.task], names)), swept)
                return run_task(settings, overrides)
        except Exception as error:
            if not _is_users(error) or "SUBMITIT_EXECUTOR" in os.environ:  # a job elsewhere, with a list of its own
                raise
            if getattr(error, "exit_code", None) != LEFT_OUT:
                raise _JobStoppedError(error) from error
            incomplete.append(error)
            _say(_one_line(error))
            return None

    try:
        _hydra_main(job)
    except _JobStoppedError as stopped:
        raise stopped.reason from stopped
    if incomplete:
        raise incomplete[-1]


class _JobStoppedError(BaseException):
    """Ends a multirun with the job that failed; of an ``Exception`` Hydra would go on with the next."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


def _hydra_main(job: Callable[[DictConfig], Any]) -> None:
    import hydra

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()


@contextmanager
def _requeued() -> Iterator[None]:
    """Where SLURM is to start this job again, wait in this block's end until it ends the process."""
    try:
        yield
    except Exception as error:
        if getattr(error, "requeued_job", None):
            from qtrain.training.signals import wait_for_the_end

            wait_for_the_end()
        raise


def _composing(overrides: Sequence[str]) -> list[str]:
    """Those of ``overrides`` that further configs of the same run are composed of, with the user's own YAML files."""
    hydras = [own for own in overrides if own.lstrip("+~").startswith("hydra")]
    return [own for own in overrides if own not in hydras or own.startswith("hydra.searchpath=")]


def _is_users(error: BaseException) -> bool:
    """Whether the one who typed the command can mend ``error``."""
    kinds: list[type[BaseException]] = [ValueError, OSError]
    for module, name in (
        ("hydra.errors", "HydraException"),
        ("omegaconf.errors", "OmegaConfBaseException"),
        ("pytorch_lightning.utilities.exceptions", "MisconfigurationException"),
        ("qtrain.utils.errors", "RunInterruptedError"),
        ("qtrain.utils.errors", "IncompleteError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return isinstance(error, tuple(kinds))


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC and "make room" not in line:
        return f"no space left on the disk ({line}); make room, and the same command goes on from the last resume point"
    return line


def _is_unread() -> bool:
    """Whether nobody reads the output any more; what is left of it is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors alone
    unread = bool(poll.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at the end fails once more
    return unread


def _tell_batch_script(code: int) -> None:
    """That this end is final, for whoever would start a failed job again; see slurm/env.sh."""
    if file := os.environ.get("QTRAIN_EXIT_FILE"):
        with suppress(OSError):
            Path(file).write_text(f"{code}\n", encoding="utf-8")


def _say(message: str) -> None:
    print(f"qtrain: {message}", file=sys.stderr)
