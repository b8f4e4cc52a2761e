"""How long each layer takes on this machine, and what this machine does at best: ONNX Runtime, one thread."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from models.roofline import Layer, Roof, layers

RUNS, WARM_UP = 20, 3
BATCH = 16
"""Images in the batch that is timed: about what a busy service puts together."""
SIDE = 384
"""Of the matrices multiplied: all three fit a second-level cache. On the machine it was tried on products of two thirds
and of twice the side were slower (243 and 225 GFLOP/s against 252)."""
COPIED_BYTES = 128 * 2**20
"""More than any cache holds."""
MEASURED_S = 0.5


@dataclass(frozen=True)
class Study:
    """The layers of a network under the roof of this machine."""

    roof: Roof
    table: list[dict[str, str | int | float]]
    """One row a layer, see `table`."""
    facts: dict[str, float]
    """How it was measured, and what is no layer's."""

    @property
    def sentence(self) -> str:
        """The result in a line."""
        bound = [float(row["microseconds"]) for row in self.table if row["bound_by"] == "memory"]
        share = sum(bound) / sum(float(row["microseconds"]) for row in self.table)
        return (
            f"roofline of one thread, batch {BATCH}: {self.roof.flops_per_s / 1e9:.0f} GFLOP/s and "
            f"{self.roof.bytes_per_s / 1e9:.0f} GB/s; memory binds {len(bound)} of {len(self.table)} layers, "
            f"{share:.0%} of the time"
        )


def study(path: Path, images_NHWC: np.ndarray) -> Study:
    """Time the layers of the ONNX file `path` on some of the images, between two measurements of the roof.

    The better of the two counts: the machine may have had other work for a while.
    """
    found = layers(onnx.load(path), BATCH)
    before = measure_roof()
    seconds, others_s = measure_layers(path, found, np.resize(images_NHWC[:BATCH], (BATCH, *images_NHWC.shape[1:])))
    after = measure_roof()
    roof = Roof(max(before.flops_per_s, after.flops_per_s), max(before.bytes_per_s, after.bytes_per_s))
    facts = {
        "threads": 1.0,
        "batch": float(BATCH),
        "peak_gflops_per_s": roof.flops_per_s / 1e9,
        "peak_gbytes_per_s": roof.bytes_per_s / 1e9,
        "ridge_flops_per_byte": roof.ridge,
        "layout_changes_microseconds": others_s * 1e6,
    }
    return Study(roof, table(found, seconds, roof), facts)


def measure_roof() -> Roof:
    """The best of half a second each: ONNX Runtime's product of two matrices, and NumPy's copy of an array.

    A copy of n bytes moves 2 n: they are read and written. (A processor that reads what it is about to overwrite moves
    more; that is not counted, here or in the layers.)
    """
    product = helper.make_node("MatMul", ["a", "b"], ["c"])
    ends = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in "abc"}
    graph = helper.make_graph([product], "product", [ends["a"], ends["b"]], [ends["c"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = _session(model.SerializeToString(), onnxruntime.SessionOptions())
    matrices = {name: np.full((SIDE, SIDE), 0.5, np.float32) for name in "ab"}
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.zeros_like(source)
    return Roof(
        flops_per_s=2 * SIDE**3 / _least_s(lambda: session.run(None, matrices)),
        bytes_per_s=2 * COPIED_BYTES / _least_s(lambda: np.copyto(target, source)),
    )


def measure_layers(path: Path, found: list[Layer], images_NHWC: np.ndarray) -> tuple[list[float], float]:
    """Seconds of each layer for one batch, and those that belong to none: changes of layout.

    The least of the runs, as in `measure_roof`: whatever else the machine does only adds to it.
    """
    options = onnxruntime.SessionOptions()
    with TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = _session(str(path), options)
        (end,) = session.get_inputs()
        for _ in range(WARM_UP + RUNS):
            session.run(None, {end.name: images_NHWC})
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    durations_s: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations_s[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e6)
    layer_of = {name: number for number, layer in enumerate(found) for name in layer.nodes}
    seconds, others_s = [0.0] * len(found), 0.0
    for name, values in durations_s.items():
        number = layer_of.get(name, layer_of.get(re.sub(r"(_bn)?_nchwc$", "", name)))
        least_s = min(values[WARM_UP:])
        if number is None:
            others_s += least_s
        else:
            seconds[number] += least_s
    return seconds, others_s


def _session(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _least_s(act: Callable[[], object]) -> float:
    """The shortest of the runs that fit into MEASURED_S, the first left out: others on the machine only add to it."""
    act()
    least_s, until = float("inf"), time.perf_counter() + MEASURED_S
    while (started := time.perf_counter()) < until:
        act()
        least_s = min(least_s, time.perf_counter() - started)
    return least_s


def table(found: list[Layer], seconds: list[float], roof: Roof) -> list[dict[str, str | int | float]]:
    """One row a layer: what it computes and moves, how long it takes, and how much of the roof it reaches."""
    return [
        {
            "layer": layer.name,
            "operations": layer.operations,
            "flops": layer.flops,
            "bytes": layer.bytes,
            "flops_per_byte": round(layer.intensity, 3),
            "microseconds": round(taken_s * 1e6, 1),
            "gflops_per_s": round(layer.flops / taken_s / 1e9, 3) if taken_s else 0.0,
            "gbytes_per_s": round(layer.bytes / taken_s / 1e9, 3) if taken_s else 0.0,
            "share_of_roof": round(roof.least_s(layer) / taken_s, 3) if taken_s else 0.0,
            "bound_by": "memory" if roof.binds_by_memory(layer) else "arithmetic",
        }
        for layer, taken_s in zip(found, seconds, strict=True)
    ]
