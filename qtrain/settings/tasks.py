"""The tasks that a command can run."""

TASKS = {
    "train": "quantize and train a student, with or without a teacher (the default)",
    "sweep": "many trials over bit widths, schedules and settings, and the front of the best",
    "calibrate": "quantize without training: calibrated, and corrected or rounded by learning where asked",
    "synthesize": "images from nothing but a model, for data=synthetic",
    "evaluate": "accuracy on the test images, of full-precision weights or of a finished run's student",
    "predict": "the likeliest classes of images by a student's file: model=FILE images=FOLDER",
    "report": "one HTML page and a plot of all runs below a folder",
    "review": "the workspace in W&B that shows accuracy against compression",
}
"""Verb -> what it does. `qtrain/tasks/<verb>.py` has `run`."""
