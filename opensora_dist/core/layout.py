"""Names in a run directory, for all who write there or read it."""

from __future__ import annotations

CONFIG_NAME = "config.yaml"  # in every checkpoint too
ENVIRONMENT_NAME = "environment.json"
METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "events.jsonl"
EVALUATION_NAME = "evaluation.json"
REPORT_NAME = "report.html"
CHECKPOINTS_DIR = "checkpoints"
SAMPLES_DIR = "samples"
LOGS_DIR = "logs"
