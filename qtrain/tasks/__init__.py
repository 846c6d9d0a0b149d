"""One file a verb: `qtrain/tasks/<verb>.py` has `run`."""
