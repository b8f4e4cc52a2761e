"""Training: golden rules of the loop, seen from outside through runs, files and exit codes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from ports import free_port
from tracking_server import TrackingServer

import train
from data_loader.dataset import load as load_data_set
from models import ModelError, TrainingDiverged
from models.checkpoint import load, load_network
from monitoring.reference import read_reference

ROOT = Path(__file__).resolve().parent.parent
Start = Callable[..., "subprocess.Popen[str]"]
QUICK = {"epochs": 2, "precision": "fp32", "device": "cpu"}


def run_of(output: str) -> str:
    """The run's id, as the last line of training says it."""
    found = re.search(r"run (\w{32})$", output, re.MULTILINE)
    assert found, output
    return found[1]


def trained(capsys: pytest.CaptureFixture[str], **settings: object) -> mlflow.entities.Run:
    """Train in this process and give the run."""
    train.main(train.Settings(**{**QUICK, **settings}))  # type: ignore[arg-type]
    return mlflow.get_run(run_of(capsys.readouterr().out))


def artifact(run: mlflow.entities.Run, path: str, folder: Path) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=path, dst_path=str(folder)))


def test_the_default_recipe_learns_digits_and_tells_all(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, epochs=15, precision="auto", log_every=4)
    assert run.data.metrics["test/accuracy"] >= 0.98
    client = mlflow.MlflowClient()
    steps = 15 * (int(run.data.params["train_images"]) // 128)
    assert len(client.get_metric_history(run.info.run_id, "val/loss")) == 15
    for name in ("loss", "accuracy", "learning_rate", "images_per_s", "seconds_to_data"):
        points = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert max(point.step for point in points) == steps, name
        assert {4, 8, 9, 13} <= {point.step for point in points}, name
    assert "system/cpu_utilization_percentage" in run.data.metrics
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert pictures == {f"pictures/{name}.png" for name in ("confusion_matrix", "learning_curves", "worst_mistakes")}
    assert {"data_digest", "precision_used", "device_used", "threads", "torch"} <= set(run.data.params)
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    # Python's own choice of what "the commit" is: the test runs outside a checkout, where there is none.
    assert "git_commit" not in run.data.tags


def test_the_commit_and_its_changes_are_on_the_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    Path(".gitignore").write_text("*\n!.gitignore\n!code.py\n")
    Path("code.py").write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    clean = trained(capsys, epochs=1).data.tags
    assert (clean["git_commit"], clean["git_dirty"]) == (git("rev-parse", "HEAD"), "false")
    Path("code.py").write_text("2")
    assert trained(capsys, epochs=1).data.tags["git_dirty"] == "true"


def test_same_seed_same_bits_and_another_seed_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = [trained(capsys, seed=seed).data.tags["weights_sha256"] for seed in (1, 1, 2)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(("network", "epochs", "accuracy"), [("alexnet", 5, 0.9), ("resnet18", 2, 0.3)])
def test_the_other_networks_train_too(
    project: Path, capsys: pytest.CaptureFixture[str], network: str, epochs: int, accuracy: float
) -> None:
    run = trained(capsys, network=network, epochs=epochs, scheduler="cosine", optimizer="sgd", label_smoothing=0.1)
    assert run.data.metrics["test/accuracy"] > accuracy  # chance is 0.1


def test_the_logged_model_is_the_network_that_was_trained(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(capsys)
    network, spec = load_network(artifact(run, "checkpoints/model.pt", tmp_path))
    images_NHWC = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 8, 8, 1)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images_NHWC)).numpy()
    np.testing.assert_allclose(model.predict(images_NHWC)["logits"], expected, atol=1e-4)
    assert spec.classes == tuple("0123456789")


def test_the_reference_is_the_test_split_as_the_logged_model_sees_it(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(capsys)
    reference = read_reference(artifact(run, "monitoring/reference.parquet", tmp_path))
    data = load_data_set("digits", data_dir=project / "data")
    rows = data.rows["test"]
    images_NHWC = np.asarray(data.images_NHWC[rows])
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    np.testing.assert_array_equal(reference.labels_N, data.labels_N[rows])
    logits_NK = model.predict(images_NHWC)["logits"]
    np.testing.assert_array_equal(reference.predicted_N, logits_NK.argmax(axis=1))
    accuracy = (reference.predicted_N == reference.labels_N).mean()
    assert accuracy == pytest.approx(run.data.metrics["test/accuracy"], abs=1e-9)
    np.testing.assert_allclose(reference.statistics_NS[:, 0], images_NHWC.mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(reference.statistics_NS[:, 1], images_NHWC.std(axis=(1, 2, 3)), rtol=1e-4)
    # The last layer of the network gives the logits of these embeddings.
    network, _ = load_network(artifact(run, "checkpoints/model.pt", tmp_path))
    with torch.inference_mode():
        last = network[-1][-1](torch.from_numpy(reference.embeddings_NE)).numpy()
    np.testing.assert_allclose(last, logits_NK, atol=1e-4)


def test_early_stopping_ends_soon_and_takes_the_best_epoch(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(capsys, epochs=200, early_stopping=2, scheduler="none")
    losses = [m.value for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/loss")]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 200
    again = trained(capsys, epochs=200, early_stopping=2, scheduler="none", resume=run.info.run_id)
    assert again.data.tags["weights_sha256"] == run.data.tags["weights_sha256"], "it does not start again"
    state = load(artifact(run, "checkpoints/latest.pt", tmp_path))
    network, _ = load_network(artifact(run, "checkpoints/model.pt", tmp_path))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state["best_weights"][name])


def test_a_loss_that_is_no_number_names_the_step_and_the_rate(project: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"the loss became nan at step \d+, where the learning rate was 1e\+38"):
        train.main(train.Settings(**{**QUICK, "learning_rate": 1e38, "scheduler": "none"}))  # type: ignore[arg-type]
    assert mlflow.search_runs(search_all_experiments=True).status.tolist() == ["FAILED"]


def test_a_checkpoint_of_another_training_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(capsys, epochs=1)
    with pytest.raises(ModelError, match="made with batch_size 128, received 64"):
        train.main(train.Settings(**{**QUICK, "resume": run.info.run_id, "batch_size": 64}))  # type: ignore[arg-type]


def test_training_longer_goes_on_where_another_run_ended(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = {"scheduler": "none", "learning_rate": 0.003}
    whole = trained(capsys, epochs=3, **constant)
    half = trained(capsys, epochs=1, **constant)
    rest = trained(capsys, epochs=3, resume=half.info.run_id, **constant)
    assert rest.data.tags["weights_sha256"] == whole.data.tags["weights_sha256"]
    assert rest.info.run_id != half.info.run_id


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(project: Path, start: Start) -> None:
    # AlexNet has dropout, momentum buffers matter, and a step takes long enough to stop in the middle of an epoch.
    flags = ("--network=alexnet", "--learning_rate=0.001", "--epochs=3", "--batch_size=64", "--log_every=3")
    uninterrupted, err = start("train.py", *flags, cwd=project).communicate(timeout=300)
    whole = mlflow.get_run(run_of(uninterrupted))

    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    stopped = start("train.py", *flags, cwd=project, MLFLOW_RUN_ID=run_id)
    assert stopped.stdout is not None
    while not stopped.stdout.readline().startswith("epoch   1/3"):
        assert stopped.poll() is None
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, err
    step = int(re.search(r"stopped after step (\d+)", out)[1])  # type: ignore[index]

    resumed, err = start("train.py", *flags, cwd=project, MLFLOW_RUN_ID=run_id).communicate(timeout=300)
    assert f"going on from step {step}" in resumed, err
    again = mlflow.get_run(run_id)
    assert again.data.tags["weights_sha256"] == whole.data.tags["weights_sha256"]
    for key in ("val/loss", "val/accuracy"):
        histories = [
            sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)) for run in (whole, again)
        ]
        assert histories[0] == histories[1]
    assert again.info.status == "FINISHED"


@pytest.mark.slow
def test_two_processes_train_what_one_does(project: Path, tmp_path: Path) -> None:
    # float32 sums in another order differ in the last digits, which training amplifies: a few small steps stay close.
    flags = ["--epochs=2", "--precision=fp32", "--device=cpu", "--learning_rate=0.001", "--data_dir=data"]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    group = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command[1:]]
    results = [subprocess.run(line, capture_output=True, text=True, timeout=300) for line in (command, group)]
    runs = []
    for result in results:
        assert result.returncode == 0, result.stderr
        runs.append(mlflow.get_run(run_of(result.stdout)))
    assert len(mlflow.search_runs(search_all_experiments=True)) == 2, "rank 0 alone makes a run"
    assert [run.data.params["processes"] for run in runs] == ["1", "2"]
    alone, together = (
        load_network(artifact(run, "checkpoints/model.pt", tmp_path / str(n)))[0].state_dict()
        for n, run in enumerate(runs)
    )
    for name, tensor in alone.items():
        torch.testing.assert_close(
            together[name], tensor, rtol=2e-2, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    for key in ("train/loss", "val/loss", "test/log_loss"):
        assert runs[1].data.metrics[key] == pytest.approx(runs[0].data.metrics[key], rel=1e-2)


def two_nodes(
    start: Start, folders: list[Path], server: TrackingServer, run_id: str, *flags: str
) -> list[tuple[int, str, str]]:
    """Train as two pods of a Kubernetes job do: one run id, a disk each. Gives (exit code, stdout, stderr) of both."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    tracking = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_RUN_ID": run_id}
    flags = ("--precision=fp32", "--device=cpu", "--scheduler=none", "--learning_rate=0.001", *flags)
    nodes = [start("train.py", *flags, cwd=cwd, RANK=str(n), **group, **tracking) for n, cwd in enumerate(folders)]
    outputs = [node.communicate(timeout=300) for node in nodes]
    return [(node.returncode, out, err) for node, (out, err) in zip(nodes, outputs, strict=True)]


@pytest.mark.slow
def test_nodes_with_a_disk_each_train_and_go_on_as_one(
    tracking_server: TrackingServer, start: Start, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(tracking_server.uri)
    whole, stopped = (client.create_run("0").info.run_id for _ in range(2))

    def train_on(run_id: str, epochs: int, names: str) -> str:
        folders = [tmp_path / name for name in names]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        (lead, out, err), (other, silence, other_err) = two_nodes(
            start, folders, tracking_server, run_id, f"--epochs={epochs}"
        )
        assert (lead, other) == (0, 0), err + other_err
        for folder in folders:
            assert list(folder.glob("data/cache/*/images.npy")), "each node made its own cache"
        assert "epoch" in out and "epoch" not in silence
        assert not (folders[1] / "outputs").exists()
        return out

    train_on(whole, 2, "ab")
    train_on(stopped, 1, "ab")
    # The pods that go on are new ones: their disks are empty, and the checkpoint comes from the run.
    assert "going on from step" in train_on(stopped, 2, "cd")
    digests = [client.get_run(run_id).data.tags["weights_sha256"] for run_id in (whole, stopped)]
    assert digests[0] == digests[1]
    assert len(client.search_runs(["0"])) == 2


@pytest.mark.slow
def test_nodes_whose_data_differ_are_refused(tracking_server: TrackingServer, start: Start, tmp_path: Path) -> None:
    run_id = mlflow.MlflowClient(tracking_server.uri).create_run("0").info.run_id
    folders = [tmp_path / name for name in "ab"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        images = np.random.default_rng(seed).integers(0, 256, (400, 8, 8, 1), np.uint8)
        np.savez(folder / "set.npz", images=images, labels=np.arange(400) % 2)
    results = two_nodes(start, folders, tracking_server, run_id, "--dataset=set.npz", "--epochs=1")
    for code, _, err in results:
        assert code == 2
        assert "give every process the same data" in err


@pytest.mark.slow
def test_mlflow_run_trains_on_mnist_to_the_promised_accuracy(mnist_data_dir: Path, project: Path) -> None:
    command = [sys.executable, "-m", "mlflow", "run", "--env-manager", "local", str(ROOT)]
    command += ["-P", "dataset=mnist", "-P", f"data_dir={mnist_data_dir}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=850, env=environment)
    assert result.returncode == 0, result.stderr
    run = mlflow.get_run(run_of(result.stdout))
    assert run.data.metrics["test/accuracy"] >= 0.993
