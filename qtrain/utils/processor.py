"""What the processor can do, as the system tells it."""

import platform
from pathlib import Path


def processor_flags() -> frozenset[str]:
    """The instruction sets of the first core, by the names of Linux; empty where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, found = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(found.split())
    except OSError:
        pass
    return frozenset()


def saturates_in_16_bits() -> bool:
    """Whether products of unsigned with signed bytes are added in pairs in 16 bits, too few for 8-bit weights.

    So it is on x86 processors without VNNI (``vpmaddubsw``).
    """
    return platform.machine().lower() in ("x86_64", "amd64") and not any("vnni" in flag for flag in processor_flags())
