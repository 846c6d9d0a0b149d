"""Another quantizer in an experiment, by one override: it comes with its own options, and those of the other go.

An experiment chooses quantizers and sets some of their options. If the command line chooses another quantizer, Hydra
would lay the experiment's options over it, where they are unknown or mean something else. So a place whose quantizer
is exchanged is composed by itself and put into the rest. What the command line says about the place applies to the new
quantizer, and is refused if it has no such option. The granularity belongs to the layer: it stays where the new
quantizer has one.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

GROUP = "quantizer"
SHARED = "granularity"
"""The option that a quantizer takes over from the one before."""
ADDED_FILE = re.compile(r"\+[\w/]+[=@]")
"""How an override begins that adds a file: ``+experiment=...``, ``+policy@...``, ``+front=...``."""
HIDDEN = "exchanged"
"""The key under which a multirun hides from Hydra what is about an exchanged quantizer."""
AUTO = "auto"
"""The granularity that says nothing: each quantizer keeps its own."""

Compose = Callable[[str | None, Sequence[str]], DictConfig]
"""Hydra's composing, from the name of the primary config and overrides; ``None`` is an empty config."""


class LayerGranularity(NamedTuple):
    """An ``option`` of the granularity group, with the ``values`` in it."""

    option: str
    values: Mapping[str, Any]

    def overrides(self, place: str) -> list[str]:
        """What makes it the granularity at ``place``."""
        return [f"{SHARED}@{place}={self.option}", *(f"{place}.{key}={value}" for key, value in self.values.items())]


@final
@dataclass(frozen=True)
class Exchange:
    """The quantizer ``after`` in the place of ``before``; ``granularity`` is what it takes over, if anything."""

    place: str
    before: str
    after: str
    granularity: str | None

    def __str__(self) -> str:
        kept = f", and {SHARED} {self.granularity} as before" if self.granularity else ""
        return f"{self.place}: {self.after} in place of {self.before}, with its own options{kept}"


def compose_exchanging(compose: Compose, overrides: Sequence[str]) -> tuple[DictConfig, list[Exchange]]:
    """The config of ``overrides``, and which quantizers are not those of its YAML files."""
    chosen = _chosen_quantizers(overrides)
    if not chosen or not _adds_files(overrides):
        return compose("config", overrides), []
    outside = _beyond(overrides, chosen)
    base = compose("config", outside)
    before = {place: _choice(base, f"{GROUP}@{place}") for place in chosen}
    replaced: list[str] = []
    for place in sorted(chosen, key=len):
        within_another = any(_lies_in(place, other) for other in replaced)
        if not within_another and before[place] not in (None, chosen[place]):
            replaced.append(place)
    rest = _beyond(overrides, replaced)
    if rest != outside:
        base = compose("config", rest)
    exchanges = [_exchange(compose, base, place, str(before[place]), chosen[place], overrides) for place in replaced]
    return base, exchanges


def exchanged_places(overrides: Sequence[str]) -> list[str]:
    """The places in which ``overrides`` may exchange a quantizer: what they say about these belongs together."""
    chosen = [_place_of(text) for text in overrides if text.startswith(f"{GROUP}@")]
    return chosen if _adds_files(overrides) else []


def hidden(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``overrides`` as a multirun may give them to Hydra, which composes each job by itself and knows no exchange.

    What is about an exchanged place is under another key, which :func:`revealed` maps back.
    """
    places, names, shown = exchanged_places(overrides), {}, []
    for number, text in enumerate(overrides):
        key, equals, value = text.partition("=")
        if equals and lies_in_any(text, places):
            names[f"+{HIDDEN}.no{number}"] = key
            text = f"+{HIDDEN}.no{number}={value}"
        shown.append(text)
    return shown, names


def revealed(overrides: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """What :func:`hidden` was given, of a single job."""
    parts = [text.partition("=") for text in overrides]
    return [f"{names.get(key, key)}{equals}{value}" for key, equals, value in parts]


def lies_in_any(override: str, places: Iterable[str]) -> bool:
    """Whether ``override`` is about one of ``places`` or something in it."""
    return any(_lies_in(_place_of(override), place) for place in places)


def own_node(
    compose: Compose, place: str, quantizer: str, within: Sequence[str] = (), keeps: LayerGranularity | None = None
) -> tuple[DictConfig, bool]:
    """The node of ``quantizer`` alone at ``place``, as the overrides ``within`` change it.

    It takes over the granularity that it ``keeps`` if it has one; also returns whether it does.
    """
    inner = [override for override in within if not _is_choice(override, place)]
    groups = [override for override in inner if _parsed(override).package is not None]
    others = [override for override in inner if override not in groups]
    first = f"+{GROUP}@{place}={quantizer}"
    alone = compose(None, [first, *groups])
    own = None if keeps is None else _granularity_place(alone, place)
    kept = [] if keeps is None or own is None else keeps.overrides(own)
    if kept or others:
        alone = compose(None, [first, *kept, *groups, *others])
    node = OmegaConf.select(alone, place)
    assert isinstance(node, DictConfig)
    return node, bool(kept)


def _exchange(
    compose: Compose, base: DictConfig, place: str, before: str, after: str, overrides: Sequence[str]
) -> Exchange:
    """Put the quantizer ``after`` in its ``place`` in ``base``."""
    within = [own for own in overrides if _lies_in(_place_of(own), place)]
    # Whoever took an option of the former quantizer away by hand means what happens here anyway.
    within = [own for own in within if not (_parsed(own).is_delete() and _is_there(base, _place_of(own)))]
    said = any(_parsed(own).key_or_group == SHARED for own in within)
    keeps = None if said else _granularity_of(base, place)
    paths = [own for own in overrides if own.startswith("hydra.searchpath=")]
    node, kept = own_node(lambda name, given: compose(name, [*paths, *given]), place, after, within, keeps)
    with open_dict(base):
        OmegaConf.update(base, place, node, merge=False, force_add=True)
    return Exchange(place, before, after, keeps.option if keeps is not None and kept else None)


def _granularity_of(base: DictConfig, place: str) -> LayerGranularity | None:
    """The granularity that the YAML files choose for the quantizer at ``place``, or for the one inside it."""
    own = _granularity_place(base, place)
    option = None if own is None else _choice(base, f"{SHARED}@{own}")
    if own is None or option is None or option == AUTO:
        return None
    node = OmegaConf.to_container(OmegaConf.select(base, own), resolve=False)
    assert isinstance(node, dict)
    return LayerGranularity(option, {str(key): value for key, value in node.items() if key != "_target_"})


def _granularity_place(cfg: DictConfig, place: str) -> str | None:
    """Where the quantizer at ``place``, or the one inside it, has its granularity."""
    groups = [str(group) for group in cfg.hydra.runtime.choices]
    found = [group.partition("@")[2] for group in groups if group.startswith(f"{SHARED}@{place}.")]
    return found[0] if found else None


def _choice(cfg: DictConfig, group: str) -> str | None:
    option = cfg.hydra.runtime.choices.get(group)
    return None if option is None else str(option)


def _chosen_quantizers(overrides: Sequence[str]) -> dict[str, str]:
    """Place -> the quantizer that ``overrides`` choose instead of what is there; of several the last."""
    chosen: dict[str, str] = {}
    for text in overrides:
        # To parse is slow, and most overrides are about something else.
        if text.startswith(f"{GROUP}@"):
            override = _parsed(text)
            option = override.value()
            if override.package and isinstance(option, str):
                chosen[override.package] = option
    return chosen


def _adds_files(overrides: Sequence[str]) -> bool:
    """Whether a file is added (an experiment, a policy) that may set options of quantizers, as the root never does."""
    return any(ADDED_FILE.match(text) for text in overrides)


def _beyond(overrides: Sequence[str], places: Iterable[str]) -> list[str]:
    return [override for override in overrides if not lies_in_any(override, places)]


def _is_there(cfg: DictConfig, place: str) -> bool:
    parent, _, key = place.rpartition(".")
    node = OmegaConf.select(cfg, parent)
    return isinstance(node, DictConfig) and key in node


def _is_choice(override: str, place: str) -> bool:
    """Whether ``override`` chooses the quantizer at ``place`` itself."""
    parsed = _parsed(override)
    return parsed.key_or_group == GROUP and parsed.package == place


def _lies_in(place: str, other: str) -> bool:
    return place == other or place.startswith(f"{other}.")


def _place_of(override: str) -> str:
    """The place in the config that ``override`` changes."""
    try:
        parsed = _parsed(override)
    except HydraException:  # Hydra says what is wrong with it when it composes
        return ""
    return str(parsed.package or parsed.key_or_group)


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
