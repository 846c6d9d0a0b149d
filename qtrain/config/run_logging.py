"""Where a run's log goes: short lines to the terminal, full ones to a file in the run's folder."""

from pathlib import Path

from hydra.core.utils import configure_log
from omegaconf import DictConfig, open_dict, read_write


def start_logging(cfg: DictConfig) -> None:
    """Set logging up as ``conf/hydra/job_logging`` says, for the run of the composed ``cfg``, whose folder is made."""
    folder = Path(cfg.hydra.run.dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
        cfg.hydra.runtime.output_dir = str(folder)
    configure_log(cfg.hydra.job_logging, cfg.hydra.verbose)
