"""Logs to the run that MLFLOW_RUN_ID names, as any training script does."""

import mlflow

with mlflow.start_run():
    mlflow.log_metric("answer", 42)
    mlflow.log_text("written by the job", "note.txt")
