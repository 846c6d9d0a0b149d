"""The tasks that a command can run."""

TASKS = {
    "train": "quantize and train a student, with or without a teacher (default)",
    "lint": "what a target will compute in floating point, and why",
    "allocate": "which layer gets how many bits, for a budget of bytes or time",
    "sweep": "many trials over bits, schedules and settings, and their front",
    "calibrate": "quantize without training; learned rounding where asked",
    "synthesize": "images from nothing but a model, for data=synthetic",
    "evaluate": "accuracy on the test images, of weights or of a student",
    "predict": "the likeliest classes: model=FILE images=FOLDER",
    "export": "ONNX, proved to compute what was trained: checkpoint=RUN",
    "verify": "an exported folder against its student again",
    "benchmark": "the export's time beside full precision and the runtime's 8 bits",
    "profile": "a table of how long each layer takes on this machine, by its bits",
    "report": "one HTML page and a plot of all runs below a folder",
    "review": "the workspace in W&B of accuracy against compression",
}
"""Verb -> what it does. `qtrain/tasks/<verb>.py` has `run`."""
