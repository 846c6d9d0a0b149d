"""What a group of the config names: a class or function, and the options to call it with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

from qtrain.utils.errors import ConfigError


@final
@dataclass(frozen=True)
class Component:
    """A part of a run that the config chooses, ready to be built as often as it is needed.

    ``key`` is its place in the config, for messages. ``plain`` is the node as the config has it, with ``_target_``.
    ``target`` is the class or function behind ``_target_``, checked against the allow-list and its own signature;
    ``None`` where the config gives options and names nothing. ``options`` are the arguments, in which each nested node
    with a ``_target_`` is a component of its own. ``partial`` says that :meth:`build` gives a ``functools.partial``.
    """

    key: str
    plain: Mapping[str, Any]
    target: Callable[..., Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False

    @property
    def name(self) -> str:
        """What a model or a data set is called: its option ``name``, or else after what builds it."""
        return str(self.options.get("name") or called_after(self.plain.get("builder") or self.plain.get("_target_")))

    @property
    def kind(self) -> str:
        """The name of the class or function."""
        return str(self.plain.get("_target_", "")).rpartition(".")[2]

    def get(self, option: str, default: Any = None) -> Any:
        """The value of ``option``, or ``default`` where the config does not give it."""
        return self.options.get(option, default)

    def with_options(self, **options: Any) -> "Component":
        """The same with other plain values for some options."""
        return Component(self.key, {**self.plain, **options}, self.target, {**self.options, **options}, self.partial)

    def build(self, **given: Any) -> Any:
        """A new object. ``given`` are live arguments, which YAML cannot hold; they win over the options.

        Nested components are built first. Raises :class:`ConfigError`, with the full key in front, for a constructor's
        ``ValueError`` and for a file that is not there.
        """
        if self.target is None:
            raise ConfigError(f"{self.key}: has options and names nothing to apply them to; choose one of its group")
        arguments = {**{name: built(value) for name, value in self.options.items()}, **given}
        if self.partial:
            return partial(self.target, **arguments)
        try:
            return self.target(**arguments)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.key}: {error}" if self.key else str(error)) from error


def called_after(path: object) -> str:
    """A name for what the class or function at the dotted ``path`` builds.

    >>> called_after("mypackage.networks.TinyNet"), called_after("mypackage.networks.build")
    ('TinyNet', 'networks.build')
    """
    *_, module, name = ("", *str(path).split("."))
    return name if name[:1].isupper() or not module else f"{module}.{name}"


def built(value: Any) -> Any:
    """``value`` with each component in it built; lists and dicts element by element."""
    if isinstance(value, Component):
        return value.build()
    if isinstance(value, Mapping):
        return {key: built(item) for key, item in value.items()}
    return [built(item) for item in value] if isinstance(value, list) else value
