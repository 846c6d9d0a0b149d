"""Training by Lightning: the module, callbacks, checkpoints, resuming, signals, several ranks."""
