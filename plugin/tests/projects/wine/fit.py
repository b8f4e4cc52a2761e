"""Fit a nearest-neighbour classifier to a table of wines and log how well it does."""

import argparse

import mlflow
import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

parser = argparse.ArgumentParser()
parser.add_argument("--table", required=True)
parser.add_argument("--neighbours", type=float, required=True)
arguments = parser.parse_args()

table = np.loadtxt(arguments.table, delimiter=",", skiprows=1)
model = make_pipeline(StandardScaler(), KNeighborsClassifier(int(arguments.neighbours)))
with mlflow.start_run():
    scores = cross_val_score(model, table[:, 1:], table[:, 0].astype(int))
    mlflow.log_metric("accuracy", scores.mean())
    mlflow.log_text(repr(model.fit(table[:, 1:], table[:, 0].astype(int))), "model.txt")
print(f"accuracy {scores.mean():.3f}")
