"""Networks, schedules and checkpoints against torch's own parts and formulas."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import ModelError
from models.checkpoint import NetworkSpec, load, load_network, save, save_network, weights_sha256
from models.networks import NETWORKS, BatchNorm2d, Normalise, build
from models.optimisation import learning_rate_at, make_optimizer
from models.training import train_step

ROOT = Path(__file__).resolve().parent.parent
SPEC = NetworkSpec("cnn", (8, 8, 1), ("a", "b", "c"), (30.0,), (60.0,), "digits", "0" * 64)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("image_shape", [(2, 3, 1), (8, 8, 1), (28, 28, 1), (32, 32, 3), (65, 40, 4)])
def test_every_network_takes_every_image_shape(name: str, image_shape: tuple[int, int, int]) -> None:
    channels = image_shape[2]
    network = build(name, image_shape, 7, [100.0] * channels, [50.0] * channels)
    images_NHWC = torch.randint(0, 256, (2, *image_shape), dtype=torch.uint8)
    logits_NK = network.train()(images_NHWC)
    assert logits_NK.shape == (2, 7)
    logits_NK.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_normalise_standardises_each_channel_and_puts_it_second() -> None:
    images_NHWC = torch.randint(0, 256, (5, 4, 6, 2), dtype=torch.uint8)
    received = Normalise([10.0, 200.0], [5.0, 20.0])(images_NHWC)
    expected = (images_NHWC.numpy().astype(np.float64) - [10.0, 200.0]) / [5.0, 20.0]
    np.testing.assert_allclose(received.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-6)


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    assert torch.isfinite(Normalise([7.0], [0.0])(torch.full((1, 2, 2, 1), 7, dtype=torch.uint8))).all()


def test_batch_normalisation_alone_is_that_of_torch() -> None:
    images = torch.randn(4, 3, 5, 5)
    ours, theirs = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_an_unknown_network_or_an_impossible_image_is_refused() -> None:
    with pytest.raises(ModelError, match="unknown network 'vgg'; allowed: cnn, alexnet, resnet18"):
        build("vgg", (8, 8, 1), 2, [0.0], [1.0])
    with pytest.raises(ModelError, match="1x8x1"):
        build("cnn", (1, 8, 1), 2, [0.0], [1.0])


@settings(deadline=None)
@given(total=st.integers(4, 400), scheduler=st.sampled_from(["onecycle", "cosine", "step"]))
def test_schedules_are_those_of_torch(total: int, scheduler: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    reference = {
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=total),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total),
        "step": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [-(-total // 2), -(-total * 3 // 4)]),
    }[scheduler]()
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, total, scheduler, 0.5) == pytest.approx(expected, rel=1e-6, abs=1e-9)
        optimizer.step()
        if step < total - 1:
            reference.step()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimisers_are_those_of_torch_and_decay_only_weights(name: str) -> None:
    ours, theirs = SPEC.build(), SPEC.build()
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer(name, ours, weight_decay=0.5)
    decay = {2: 0.5, 4: 0.5, 1: 0.0}  # by the number of a parameter's axes: linear, convolution, all others
    groups = [{"params": [parameter], "weight_decay": decay[parameter.ndim]} for parameter in theirs.parameters()]
    reference = torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    images_NHWC = torch.randint(0, 256, (8, 8, 8, 1), dtype=torch.uint8)
    for rate in (0.1, 0.02, 0.03):
        ours(images_NHWC).square().sum().backward()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert parameter.grad is not None
            other.grad = parameter.grad.clone()
        mine.step(rate)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter, other)


def test_training_does_not_import_torchs_compiler() -> None:
    """It would double the time to the first step."""
    code = """
import sys, torch
from models.networks import build
from models.optimisation import make_optimizer
from models.training import train_step
from utils.compute import Compute, make_deterministic
make_deterministic()
network, compute = build("cnn", (8, 8, 1), 2, [0.0], [1.0]), Compute.pick("cpu", "auto")
images_NHWC, labels_N = torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
for name in ("adamw", "sgd"):
    train_step(network, make_optimizer(name, network, 0.1), images_NHWC, labels_N, learning_rate=0.1,
               label_smoothing=0.1, precision=compute.precision, seed=(0, 0, 0))
print(sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_golden_step() -> None:
    """One step from a fixed start. A change here changes every trained model: if it is wanted, say so in CHANGELOG.md
    and put the new numbers, which the failure prints, in place of these."""
    torch.manual_seed(0)
    network = SPEC.build()
    optimizer = make_optimizer("adamw", network, weight_decay=0.1)
    images_NHWC = (torch.arange(6 * 64, dtype=torch.int32).reshape(6, 8, 8, 1) * 37 % 256).to(torch.uint8)
    labels_N = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = [
        train_step(
            network,
            optimizer,
            images_NHWC,
            labels_N,
            learning_rate=0.01,
            label_smoothing=0.1,
            precision="fp32",
            seed=(0, step, 0),
        )[0].item()
        for step in range(2)
    ]
    assert losses == pytest.approx([1.148481, 0.947681], abs=2e-4)


def test_a_network_survives_the_disk(tmp_path: Path) -> None:
    network = SPEC.build().eval()
    save_network(tmp_path / "deep" / "model.pt", network, SPEC)
    again, spec = load_network(tmp_path / "deep" / "model.pt")
    assert spec == SPEC
    images_NHWC = torch.randint(0, 256, (3, 8, 8, 1), dtype=torch.uint8)
    assert torch.equal(again(images_NHWC), network(images_NHWC))
    assert weights_sha256(again.state_dict()) == weights_sha256(network.state_dict())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.pt"]


def test_the_weights_digest_changes_with_any_bit() -> None:
    weights = SPEC.build().state_dict()
    before = weights_sha256(weights)
    weights["1.0.0.0.weight"].view(torch.int32).view(-1)[5] ^= 1
    assert weights_sha256(weights) != before


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "latest.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"latest\.pt") as refusal:
        load(tmp_path / "latest.pt")
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_carries_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"spec": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ModelError):
        load(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("weights", [1, 1_000_000], ids=["found at the end", "found while torch writes"])
def test_a_full_disk_leaves_the_checkpoint_before(weights: int, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    save(tmp_path / "latest.pt", {"spec": 1})
    (tmp_path / "latest.pt.tmp").symlink_to(full)
    with pytest.raises(ModelError, match="No space left on device; free some space"):
        save(tmp_path / "latest.pt", {"spec": torch.zeros(weights)})
    assert load(tmp_path / "latest.pt") == {"spec": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "latest.pt"]


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own answer is a RuntimeError, which would end the run as FAILED, with a traceback."""

    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell():
                os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "open", lambda path, mode: path.touch() or Interrupted())
        save(tmp_path / "latest.pt", {"spec": torch.zeros(1000)})
    assert list(tmp_path.iterdir()) == []
