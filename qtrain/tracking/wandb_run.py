"""A run in W&B, in addition to our own ``metrics.jsonl``.

A training must neither wait nor end because W&B is slow, missing or unreachable. So nothing here waits for the server
after the run has begun, and nothing raises an error: the first one is logged. Lightning's own logger may wait and
raise. Once it is offline, it also keeps its process offline, and a sweep's workers run several trials in a process.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from qtrain.tracking.loggers import split_metrics
from qtrain.tracking.wandb_client import (
    DATA_DIR,
    TOP1,
    define_metrics,
    environment,
    finite,
    log_layers,
    log_table,
    named_knobs,
    publish,
    remove_parts_before,
    run_id,
)
from qtrain.tracking.wandb_mode import check_mode, unreachable, wandb_mode

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


@final
class WandbRun(Logger):
    """Rows of metrics, bits and costs, and the files that a run used and made, in W&B.

    ``config`` is the run's configuration as plain data; ``knobs`` are a sweep's values for it, shown there as
    ``knobs.<name>``. ``online`` becomes ``offline`` without a key, without a network, or if the server does not answer
    within ``init_timeout_s``; one log line says so, and how to upload. The end waits at most ``finish_timeout_s`` for
    uploads.

    A run that is resumed in the same folder is also resumed in W&B: :meth:`replay` adds the rows that W&B lacks.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        project: str = "qtrain",
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        knobs: Mapping[str, Any] | None = None,
        mode: str = "online",
        host_timeout_s: float = 3.0,
        init_timeout_s: float = 15.0,
        finish_timeout_s: float = 20.0,
    ) -> None:
        super().__init__()
        check_mode("WandbRun", mode)
        self.folder = Path(folder).resolve()
        self.mode = mode
        self.host_timeout_s = host_timeout_s
        self._options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "job_type": job_type,
            "name": name,
            "tags": list(tags),
            "config": {**(config or {}), **({"knobs": named_knobs(knobs)} if knobs else {})},
        }
        self._init_timeout_s, self._finish_timeout_s = init_timeout_s, finish_timeout_s
        self._run: wandb.Run | None = None
        self._over = False
        """Nothing more will be logged: the run has ended, W&B is off, or the client has failed."""
        self._failed = False
        self._later: list[Callable[[wandb.Run], object]] = []
        """Calls that publish files, postponed because the server was unreachable."""
        self._online = False
        self._known_step = -1
        self._best_top1 = -math.inf
        self._used: set[tuple[object, ...]] = set()
        self._whole = False
        """Whether the rows from before this process have been replayed."""

    @property
    def name(self) -> str:
        return str(self._options["project"])

    @property
    def version(self) -> str:
        return run_id(self.folder)

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: W&B got the configuration when the run began."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row with its ``step`` and ``epoch`` for the x axes; metrics that are not finite are left out."""
        metrics = dict(metrics)
        head = {"step": int(step or 0), "epoch": int(metrics.pop("epoch", 0))}
        rows = split_metrics(metrics)
        self._tell(lambda run: self._log_row(run, head, rows))

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log ``rows`` of the run's ``metrics.jsonl`` from before this process, as far as W&B does not have them.

        W&B writes with a delay, so it lacks the last rows of a killed run. For an offline run the last part must have
        all rows. Only the first call has an effect, and it must come before the first row of this process.
        """
        if not self._whole:
            self._tell(lambda run: self._log_rows(run, rows))
            self._whole = True

    def summarize(self, metrics: Mapping[str, Any]) -> None:
        """Set ``metrics`` in the run's summary, its row in W&B's table; those that are not finite are left out."""
        kept = {name: value for name, value in metrics.items() if value is not None and finite(value)}
        self._tell(lambda run: run.summary.update(kept))

    def log_layers(self, layers: Sequence[Mapping[str, Any]]) -> None:
        """Log the table ``allocation``, a row for each of ``layers``, and curves of their bits against their number.

        ``layers`` are rows of :mod:`qtrain.cost.count`.
        """
        self._tell(lambda run: log_layers(run, layers))

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table with a column for each key that occurs; values that are not numbers are shown as text."""
        self._tell(lambda run: log_table(run, name, rows))

    def use_files(self, files: Mapping[str, Path], *, name: str, kind: str) -> None:
        """Record ``files`` as inputs of the run: they become the artifact ``name``, and the run uses it.

        If W&B has the same content under this name, it takes that version, which links the run that made it to this
        one. Files that an earlier stage has recorded are not recorded again.
        """
        said = (name, *files.values())
        if said not in self._used:
            self._used.add(said)
            self._publish(lambda run: publish(run, files, name, kind, {}, used=True))

    def keep_files(
        self, files: Mapping[str, Path], *, name: str, kind: str, about: Mapping[str, Any] | None = None
    ) -> None:
        """Record ``files`` as results of the run: they become the artifact ``name`` of the type ``kind``.

        The keys of ``files`` are the names in the artifact. Files are read when they are uploaded; for an offline run
        this is at ``wandb sync``. ``about`` is shown with the artifact.
        """
        self._publish(lambda run: publish(run, files, name, kind, about or {}, used=False))

    def finalize(self, status: str) -> None:
        """End the run as ``success``, ``stopped``, ``failed``, or ``interrupted`` if it will be resumed later."""
        run, self._run, self._over = self._run, None, True
        if run is None:
            return
        place = Path(run.settings.sync_dir)
        reason = None
        try:
            if status == "interrupted":
                run.mark_preempting()
            if status != "success":
                run.summary.update({"status": status})
            run.finish(exit_code=int(status in ("failed", "interrupted")))
        except TimeoutError:
            reason = unreachable(self.host_timeout_s) or "uploads take longer than logger.wandb.finish_timeout_s"
        except Exception as error:
            self._fail(error)
        else:
            if self._whole and not self._online:
                remove_parts_before(place)
        self._finish_later(place, reason)

    def _finish_later(self, place: Path, reason: str | None) -> None:
        """Write what the server did not get to a place where ``wandb sync`` finds it, and log that."""
        places = [place] if reason is not None else []
        if self._later:
            try:
                with environment(DATA_DIR, str(self.folder / "wandb")):
                    part = self._init("offline")
                    for publish_files in self._later:
                        publish_files(part)
                    part.finish()
                places.append(Path(part.settings.sync_dir))
            except Exception as error:
                self._fail(error)
        if places:
            told, rest = reason or "it was out of reach for a while", " ".join(map(str, places))
            log.warning("W&B: %s; upload the rest of this run later: wandb sync --include-online %s", told, rest)

    def _publish(self, what: Callable[[wandb.Run], object]) -> None:
        """Publish files, or postpone that to an offline part of the run if the server is unreachable.

        With files in its queue the client would wait for such a server for minutes, ignoring its timeout.
        """
        if self._run is not None and self._online and unreachable(self.host_timeout_s) is not None:
            self._later.append(what)
        else:
            self._tell(what)

    @rank_zero_only
    def _tell(self, what: Callable[[wandb.Run], object]) -> None:
        """Call ``what`` with the run; the first call starts the run."""
        if self._over:
            return
        try:
            # Otherwise the client stores files for upload in the user's home, under names that do not tell the run.
            with environment(DATA_DIR, str(self.folder / "wandb")):
                if self._run is None:
                    self._run = self._begin()
                if self._run is not None:
                    what(self._run)
        except Exception as error:  # the client raises many kinds of errors; none may end a training
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Log the first error. W&B then lacks what failed, or everything if the run could not be started."""
        self._over = self._over or self._run is None
        if not self._failed:
            self._failed = True
            log.warning(
                "W&B has failed (%s: %s) and may be incomplete; the run goes on, its metrics are in %s",
                type(error).__name__, str(error).partition("\n")[0], self.folder / "metrics.jsonl",
            )  # fmt: skip

    def _begin(self) -> wandb.Run | None:
        possible, reason = wandb_mode(mode=self.mode, host_timeout_s=self.host_timeout_s)
        if possible == "disabled":
            log.info("W&B is off: %s", reason)
            self._over = True
            return None
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        if possible == "online":
            try:
                run = self._init("online")
            except wandb.Error as error:  # the key is refused, or the server accepts and does not answer
                possible, reason = "offline", str(error).partition("\n")[0]
        if possible == "offline":
            run = self._init("offline")
            log.info("W&B is offline: %s; upload later with `wandb sync %s`", reason, run.settings.sync_dir)
        self._online = possible == "online"
        # Only a server knows which rows it has from an earlier process. The last step may lack the row of a split.
        if run.resumed:
            summary: Any = run.summary
            self._known_step = int(summary.get("step", -1))
            self._best_top1 = float(summary.get("best_val_top1", -math.inf))
        define_metrics(run)
        return run

    def _init(self, mode: str) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            silent=True,
            disable_git=True,
            console="off",
            reinit="create_new",  # a sweep's worker has several runs, one after the other
            init_timeout=self._init_timeout_s,
            finish_timeout=self._finish_timeout_s,
            finish_timeout_raises=True,
        )
        options = {**self._options, "dir": str(self.folder), "id": run_id(self.folder)}
        return wandb.init(mode=mode, resume="allow", settings=settings, **options)  # type: ignore[arg-type]

    def _log_row(self, run: wandb.Run, head: Mapping[str, int], rows: Mapping[str, Mapping[str, float]]) -> None:
        if head["step"] < self._known_step:
            return  # the server has it from an earlier process
        named = {f"{split}/{name}": value for split, values in rows.items() for name, value in values.items()}
        # An infinite value would remain the maximum forever.
        row = {name: float(value) for name, value in named.items() if finite(value)}
        run.log({**head, **row})
        if TOP1 in row:
            # The client's own maximum (define_metric) starts again when a run is resumed.
            self._best_top1 = max(self._best_top1, row[TOP1])
            run.summary.update({"val_top1": row[TOP1], "best_val_top1": self._best_top1})

    def _log_rows(self, run: wandb.Run, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._log_row(run, *_parts(row))


def _parts(row: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """A row of metrics.jsonl as step and epoch, and its metrics by split."""
    metrics = {name: value for name, value in row.items() if name not in ("step", "epoch", "split", "time")}
    return {"step": row["step"], "epoch": row["epoch"]}, {row["split"]: metrics}
