"""Drop the rows of a table of wines that lack a value."""

import argparse
import csv
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--table", required=True)
parser.add_argument("--output", required=True)
arguments = parser.parse_args()

with Path(arguments.table).open() as file:
    header, *rows = csv.reader(file)
kept = [row for row in rows if all(row)]
with Path(arguments.output).open("w", newline="") as file:
    csv.writer(file).writerows([header, *kept])
print(f"kept {len(kept)} of {len(rows)} rows")
