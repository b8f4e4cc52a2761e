"""Train an image classifier: data, network, loop, report. The entry point `main` of the MLproject."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from utils.artifacts import CHECKPOINTS, LATEST, MODEL_FILE, NETWORK
from utils.runtime import EXIT_TERMINATED, launch, stop_requested
from utils.settings import setting

if TYPE_CHECKING:  # what is heavy to import is imported where it is used: --help and typos answer at once
    from data_loader.dataset import Dataset
    from models.training import TrainingState
    from utils.tracking import Run


@dataclass(frozen=True)
class Settings:
    """Train an image classifier and log it to MLflow."""

    dataset: str = setting("digits", "digits, mnist, fashion_mnist, cifar10, a folder, an .npz or s3://bucket/prefix")
    data_version: str = setting("", "tag, branch or commit in DVC's repository, where dataset is then a path")
    data_repo: str = setting("", "that repository: a folder or a git address; empty: the project's own")
    data_dir: str = setting("data", "folder for downloads and decoded images")
    image_size: int = setting(0, "resize images to this many pixels a side; 0 keeps their own size", minimum=0)
    on_error: str = setting("fail", "what a bad image file does", choices=("fail", "skip"))
    network: str = setting("cnn", "network to train", choices=("cnn", "alexnet", "resnet18"))
    epochs: int = setting(15, "passes over the training split", minimum=1)
    batch_size: int = setting(128, "images a step, over all processes", minimum=1)
    learning_rate: float = setting(0.01, "highest learning rate", minimum=0)
    optimizer: str = setting("adamw", "optimiser", choices=("adamw", "sgd"))
    scheduler: str = setting("onecycle", "learning-rate schedule", choices=("onecycle", "cosine", "step", "none"))
    weight_decay: float = setting(0.01, "weight decay (not on biases and normalisation)", minimum=0)
    label_smoothing: float = setting(0.0, "share of each label spread over all classes", minimum=0, maximum=1)
    augmentation: str = setting("shift", "random change of images", choices=("none", "shift", "shift_flip"))
    early_stopping: int = setting(0, "stop after so many epochs without a lower validation loss; 0: never", minimum=0)
    precision: str = setting("auto", "arithmetic", choices=("auto", "fp32", "bf16"))
    device: str = setting("auto", "device", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = setting(0, "seed of everything random", minimum=0)
    log_every: int = setting(50, "optimiser steps of an epoch between two points of the training charts", minimum=1)
    resume: str = setting("", "id of a run to go on from")
    register_as: str = setting("", "name in the model registry to register the model under")


def main(settings: Settings) -> None:
    """Settings, data, network, loop, report."""
    from data_loader.augment import device_batches
    from data_loader.batches import evaluation_batches, steps_per_epoch
    from data_loader.dataset import load_asked
    from models.checkpoint import NetworkSpec
    from models.finished import write_finished
    from models.optimisation import learning_rate_at
    from models.scores import loss_and_accuracy
    from models.training import Window, begin, predict_logits, train_step
    from utils.artifacts import checkpoint_to_go_on_from
    from utils.compute import Compute, keep_freed_memory, make_deterministic
    from utils.progress import Progress
    from utils.tracking import start_run

    make_deterministic()
    keep_freed_memory()
    compute = Compute.pick(settings.device, settings.precision)
    rank, world_size, leads = compute.place.rank, compute.place.world_size, compute.place.leads
    about = (settings.dataset, settings.data_version, settings.network)
    with compute.processes(), start_run(settings, "main", about=about, enabled=leads) as run, run.system_metrics():
        data = load_asked(settings, settings.image_size)
        compute.agree("data_digest", data.digest)
        run.dataset(**data.identity(), context="training", profile=data.profile())
        run.params({"data_digest": data.digest, **data.version, **data.profile(), **compute.facts()})

        spec = NetworkSpec(settings.network, dataset=settings.dataset, **data.facts())
        recipe = {"batch_size": settings.batch_size, "optimizer": settings.optimizer, "seed": settings.seed}
        network, optimizer, state = begin(spec, recipe, settings.weight_decay, compute.device)
        with checkpoint_to_go_on_from(run.id, settings.resume) as checkpoint:
            if checkpoint:
                state.restore(checkpoint, network, optimizer)
                print(f"going on from step {state.step}", flush=True)
        shared_network = compute.shared(network)
        step = partial(train_step, label_smoothing=settings.label_smoothing, precision=compute.precision)

        epoch_steps = steps_per_epoch(len(data.rows["train"]), settings.batch_size)
        total_steps = settings.epochs * epoch_steps
        batches = device_batches(
            data,
            batch_size=settings.batch_size,
            augmentation=settings.augmentation,
            seed=settings.seed,
            steps=state.steps_left(total_steps, settings.early_stopping),
            device=compute.device,
            rank=rank,
            world_size=world_size,
        )
        val_rows, window = data.rows["val"], Window()
        with Progress(total_steps, done=state.step, shown=leads) as progress, stop_requested() as stop:
            for images_NHWC, labels_N in window.time(batches):
                learning_rate = learning_rate_at(state.step, total_steps, settings.scheduler, settings.learning_rate)
                seed = (settings.seed, state.step, rank)
                result = step(shared_network, optimizer, images_NHWC, labels_N, learning_rate=learning_rate, seed=seed)
                window.add(result, learning_rate, images=len(labels_N) * world_size)
                state.step += 1
                progress.advance()

                epoch_ends, stopping = state.step % epoch_steps == 0, compute.any(stop())
                if stopping or state.step % epoch_steps % settings.log_every == 0:
                    run.metrics(window.close(state, compute.mean), step=state.step)
                if epoch_ends:
                    share = evaluation_batches(data.images_NHWC, data.labels_N, val_rows[rank::world_size], 1024)
                    share_NK = predict_logits(network, share, len(data.classes), compute.device, compute.precision)
                    scores = loss_and_accuracy("val", compute.interleave(share_NK).numpy(), data.labels_N[val_rows])
                    state.finish_epoch(scores, learning_rate, network if settings.early_stopping else None)
                    run.metrics(scores, step=state.step)
                    progress.line(state.describe_epoch(settings.epochs))
                if (epoch_ends or stopping) and leads:
                    state.save(run.folder / LATEST, network, optimizer)
                    run.artifact(run.folder / LATEST, CHECKPOINTS, replaces=LATEST)
                if stopping:
                    progress.line(f"SIGTERM: stopped after step {state.step}; the checkpoint is saved")
                    sys.exit(EXIT_TERMINATED)
                if epoch_ends and state.stopped_early(settings.early_stopping):
                    progress.line(f"stopped early: no lower validation loss for {settings.early_stopping} epochs")
                    break
        if leads:
            facts = write_finished(network, state, run.folder / NETWORK, run.folder / MODEL_FILE)
            report(settings, data, state, facts, run)


def report(settings: Settings, data: Dataset, state: TrainingState, facts: dict[str, str], run: Run) -> None:
    """Log the model, of which `facts` are digests, and judge it, as the file that ships, on the test split."""
    from data_loader.pictures import image_grid
    from data_loader.statistics import image_statistics
    from models.onnx_model import OnnxClassifier
    from models.pictures import learning_curves
    from models.report import judge
    from monitoring.reference import REFERENCE_FILE, REFERENCE_FOLDER, chosen_rows, make_reference, write_reference

    onnx_file, rows = run.folder / MODEL_FILE, data.rows["test"]
    run.artifact(run.folder / NETWORK, CHECKPOINTS)
    run.tags(facts)
    run.model(onnx_file, data.images_NHWC[rows[:1]], step=state.step)

    seen = chosen_rows(len(rows))
    logits_NK, embeddings_ME = OnnxClassifier(onnx_file).outputs_of(data.images_NHWC, rows, seen)
    found = judge(logits_NK, data.labels_N[rows], data.classes)
    run.metrics(found.metrics("test"))
    run.picture(learning_curves(state.history), "pictures/learning_curves.png")
    run.picture(found.confusion_matrix, "pictures/confusion_matrix.png")
    if found.captions:
        run.picture(image_grid(data.images_NHWC[rows[found.worst]], found.captions), "pictures/worst_mistakes.png")
    test = (data.images_NHWC, data.labels_N, rows[seen], data.classes)
    reference = make_reference(*test, outputs=(logits_NK[seen], embeddings_ME), statistics=image_statistics)
    run.artifact(write_reference(reference, run.folder / REFERENCE_FILE), REFERENCE_FOLDER)
    result = found.sentence("test", len(rows))
    run.describe(result)
    if settings.register_as:
        facts |= {"dataset": data.name, "network": settings.network, **data.version}
        run.register(settings.register_as, result, facts)
    run.flush()
    print(f"test accuracy {found.scores['accuracy']:.4f} on {len(rows)} images; run {run.id}", flush=True)


if __name__ == "__main__":
    launch(main, Settings, imports=("torch", "mlflow"))
