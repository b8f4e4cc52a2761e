"""Turn a trained network into what other systems run: ONNX, int8 ONNX, a torch.export program, a Triton repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils.runtime import launch
from utils.settings import REQUIRED, setting

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from data_loader.dataset import Dataset
    from models.checkpoint import NetworkSpec
    from utils.tracking import Run

FLOAT, INT8, PROGRAM, TRITON = "model.onnx", "model.int8.onnx", "model.pt2", "triton"
TRITON_MODEL = "classifier"


@dataclass(frozen=True)
class Settings:
    """Export a trained model to ONNX, int8 ONNX, torch.export and a Triton model repository."""

    model_uri: str = setting(REQUIRED, "runs:/RUN_ID/model, models:/NAME@ALIAS or models:/NAME/VERSION")
    dataset: str = setting("", "data set to check on; empty: the one that the model's run was trained on")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    output: str = setting("", "new folder to write the files to as well; empty: only to the run")
    report: bool = setting(False, "log FLOPs, bytes and time of each layer, and a roofline picture")


def main(settings: Settings) -> None:
    """Settings, network, data, files, check, comparison, artifacts."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from data_loader.matching import load_matching
    from models.checkpoint import load_network
    from utils import UsageError
    from utils.artifacts import CHECKPOINTS, NETWORK, data_to_load, fetch_run_file, model_run
    from utils.tracking import start_run

    if settings.output and Path(settings.output).exists():
        raise UsageError(f"output '{settings.output}' exists; give a new folder")
    source_run = model_run(settings.model_uri)
    with TemporaryDirectory() as scratch:
        network, spec = load_network(fetch_run_file(source_run, f"{CHECKPOINTS}/{NETWORK}", Path(scratch)))
        with start_run(settings, "export", about=("export", settings.model_uri)) as run:
            run.tags({"source_run": source_run})
            data = load_matching(spec, data_to_load(settings, source_run), settings, "test")
            folder = Path(scratch) / "export"
            write_files(network, spec, data, folder)
            check_against_torch(run, network, data, folder)
            compare_costs(run, data, folder)
            if settings.report:
                report_layers(run, data, folder)
            publish(run, folder, settings.output)


def write_files(network: nn.Module, spec: NetworkSpec, data: Dataset, folder: Path) -> None:
    """The network in all its forms."""
    import numpy as np

    from models.onnx_export import to_onnx
    from models.quantise import CALIBRATION_IMAGES, to_int8
    from models.torch_export import to_program
    from models.triton import to_repository

    to_onnx(network, spec.image_shape, spec.classes, folder / FLOAT, data_digest=spec.data_digest)
    chosen = np.random.default_rng(0).permutation(data.rows["train"])[:CALIBRATION_IMAGES]
    to_int8(folder / FLOAT, data.images_NHWC[np.sort(chosen)], folder / INT8)
    to_program(network, spec.image_shape, spec.classes, folder / PROGRAM)
    to_repository(folder / FLOAT, TRITON_MODEL, folder / TRITON)


def check_against_torch(run: Run, network: nn.Module, data: Dataset, folder: Path) -> None:
    """The ONNX file and the program must give torch's logits and classes on every test image."""
    from models.export_check import LARGEST_DIFFERENCE, agreement, program_form
    from models.onnx_model import OnnxClassifier
    from utils import RunFailed

    forms = {"onnx": OnnxClassifier(folder / FLOAT).logits, "torch_export": program_form(folder / PROGRAM)}
    found = agreement(network, forms, data.images_NHWC, data.rows["test"])
    run.metrics({f"check/{name}_largest_difference": each.largest_difference for name, each in found.items()})
    run.metrics({f"check/{name}_other_class": each.other_class for name, each in found.items()})
    for name, each in found.items():
        if not each.holds:
            raise RunFailed(
                f"{name} differs from torch by up to {each.largest_difference:.2g} (allowed {LARGEST_DIFFERENCE:g}) "
                f"and in the class of {each.other_class} of {each.images} test images (allowed 0); nothing was exported"
            )
        print(f"{name}: torch's class on all {each.images} test images, logits within {each.largest_difference:.1e}")


def compare_costs(run: Run, data: Dataset, folder: Path) -> None:
    """Size, accuracy and speed of the float32 and the int8 file side by side: report.md and metrics."""
    from models.export_check import costs

    paths = {"float32": folder / FLOAT, "int8": folder / INT8}
    table = costs(paths, data.images_NHWC, data.labels_N, data.rows["test"])
    lines = ["| model | bytes | test accuracy | images/s |", "|---|--:|--:|--:|"]
    for row in table:
        run.metrics({f"export/{row['model']}_{key}": float(value) for key, value in row.items() if key != "model"})
        lines.append(
            f"| {row['model']} | {row['bytes']:,} | {row['accuracy']:.4f} | {float(row['images_per_s']):,.0f} |"
        )
    report = "\n".join(lines) + "\n"
    print(report, end="")
    (folder / "report.md").write_text(report, "utf-8")
    run.describe(f"Exported; the forms agree with torch on all {len(data.rows['test'])} test images.\n\n{report}")


def report_layers(run: Run, data: Dataset, folder: Path) -> None:
    """What each layer computes, moves and takes, under the roof of this machine: tables and a picture."""
    from models.layer_times import study
    from models.pictures import roofline

    found = study(folder / FLOAT, data.images_NHWC[data.rows["test"]])
    columns = {key: [row[key] for row in found.table] for key in found.table[0]}
    run.table(found.table, "tables/layers.csv")
    run.later(lambda client: client.log_table(run.id, columns, "tables/layers.json"), {"table": "tables/layers.csv"})
    run.metrics({f"roofline/{key}": value for key, value in found.facts.items()})
    run.picture(roofline(found.table, found.roof.flops_per_s, found.roof.bytes_per_s), "pictures/roofline.png")
    print(found.sentence)


def publish(run: Run, folder: Path, output: str) -> None:
    """All files to the run, and to the local folder in one step."""
    import shutil
    from pathlib import Path

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            run.artifact(path, str(Path("export") / path.relative_to(folder).parent))
    run.flush()
    if output:
        temporary = Path(f"{output}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(folder, temporary)
        temporary.rename(output)
    print(f"exported to run {run.id}, artifact folder export" + (f", and to {output}" if output else ""))


if __name__ == "__main__":
    launch(main, Settings, imports=("torch", "mlflow"))
