"""Where a run reports to: metrics.jsonl, loggers, and W&B."""
