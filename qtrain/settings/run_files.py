"""Names of the files that a run and a sweep leave in their folders."""

CONFIG = "config.yaml"
"""The config as it ran."""

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"

STUDENT = "student.safetensors"
"""A trained student's parameters, scales and code ranges, under the names of its state dict."""

STAGES = "stages"
"""Folder of what each stage of a run keeps."""

TRIALS = "trials.jsonl"
"""What became of the trials of a sweep."""
