"""The SLURM job of this process: its number, its restarts, and how to requeue it.

Without SLURM there is no job, and nothing here has an effect.
"""

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class SlurmJob:
    """A job's number for ``scontrol`` (``12``, or ``12_3`` within an array), and how often it was restarted."""

    number: str
    restarts: int = 0

    @classmethod
    def current(cls, environment: Mapping[str, str] | None = None) -> "SlurmJob | None":
        """The job of this process, or ``None`` outside of SLURM."""
        env = os.environ if environment is None else environment
        number = env.get("SLURM_JOB_ID")
        if not number:
            return None
        # The last task of an array has the number of the whole array, and requeueing that would requeue all tasks.
        if array := env.get("SLURM_ARRAY_JOB_ID"):
            number = f"{array}_{env.get('SLURM_ARRAY_TASK_ID', '')}"
        return cls(number=number, restarts=int(env.get("SLURM_RESTART_COUNT", 0)))

    def __str__(self) -> str:
        return f"SLURM job {self.number}" + (f", restarted {_times(self.restarts)}" if self.restarts else "")

    def requeue(self) -> bool:
        """Ask SLURM to end this job and to start it again; returns whether SLURM agreed, and logs if it did not.

        A job that is being cancelled is not requeued, since SLURM would start it again.
        """
        if "JobState=CANCELLED" in self._shown():
            return False
        done = _scontrol("requeue", self.number)
        if done.returncode != 0:
            log.warning("SLURM job %s cannot be requeued (%s)", self.number, done.stderr.strip() or done.returncode)
        return done.returncode == 0

    def preempted(self) -> bool:
        """Whether SLURM preempts this job: it needs its place for another job and ends it after the grace time.

        The SIGTERM of a preemption is the same as that of ``scancel``; ``scontrol`` tells which it was.
        """
        shown = self._shown()
        time = re.search(r"PreemptTime=(\S+)", shown)
        return time is not None and time.group(1) not in ("None", "Unknown") and "JobState=RUNNING" in shown

    def _shown(self) -> str:
        return _scontrol("show", "job", "--oneliner", self.number).stdout


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, returncode=127, stdout="", stderr=str(error))
