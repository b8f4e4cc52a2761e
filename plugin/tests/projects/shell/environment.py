"""Prints a digest of each variable that a test asks about, never the value."""

import hashlib
import os

for name in sorted(os.environ):
    if name.startswith(("MLFLOW_", "AWS_", "TEST_", "MLPROJECT_")):
        print(name, hashlib.sha256(os.environ[name].encode()).hexdigest()[:12])
