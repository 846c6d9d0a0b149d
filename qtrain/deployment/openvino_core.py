"""The one OpenVINO of a process.

A core's CPU plugin gives the thread that first compiles a model a signal stack of its own, and remembers the former.
When the core ends, the plugin puts that back, even if it was another core's, which is freed by then (seen in OpenVINO
2026.4). The next signal then ends the process without a word, and torch's data workers have a handler of SIGCHLD. One
core that stays until the process ends frees no stack that is in use, and loads the plugin once.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov


@cache
def openvino_core() -> "ov.Core":
    """What reads and compiles models, the same one at each call."""
    import openvino as ov

    return ov.Core()
