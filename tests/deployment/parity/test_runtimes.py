"""Runtimes are called alike, and one that is not there is named with its remedy."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qtrain.deployment.onnx.write import export
from qtrain.deployment.parity import runtimes
from qtrain.deployment.parity.runtimes import RUNTIMES, chosen, of_any_length
from qtrain.deployment.parity.verify import verify
from tests.deployment.onnx.test_write import CASES, SIZE, images, student


def test_both_runtimes_are_installed_with_the_tests() -> None:
    assert chosen(None) == ["onnxruntime", "openvino"]
    assert chosen(["openvino", "openvino"]) == ["openvino"]


def test_an_unknown_runtime_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"^runtimes: must be among onnxruntime, openvino, got tensorrt"):
        chosen(["tensorrt"])


def test_a_runtime_that_is_not_installed_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else there(name))
    with pytest.raises(ValueError, match=r"^runtimes: openvino is not installed; pip install 'qtrain\[export\]'"):
        chosen(["onnxruntime", "openvino"])
    assert chosen(None) == ["onnxruntime"]


@pytest.mark.parametrize(
    ("body", "bits"), [pytest.param(*case, marks=[] if case[0] == "residual" else [pytest.mark.slow]) for case in CASES]
)
def test_openvino_gives_the_trained_codes(body: str, bits: int) -> None:
    verdict = verify(student(body, bits=bits), [images()], SIZE, runtimes=["onnxruntime", "openvino"])
    assert verdict.passed, verdict.faults
    tier = verdict.tiers[-1]
    assert tier.name == "openvino" and len(tier.layers) >= 2
    assert all(layer.unexplained == 0 for layer in tier.layers.values())


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("batch", [None, 4])
def test_any_number_of_images_runs(name: str, batch: int | None) -> None:
    made = student("squeeze and excite", bits=8)
    run = of_any_length(RUNTIMES[name](export(made, SIZE, batch=batch).to_bytes()), batch)
    for number in (1, 4, 7):
        logits = run({"images": images(number)})["logits"]
        assert logits.shape == (number, 5)
        torch.testing.assert_close(logits, made(images(number)).detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_gives_the_same_twice(name: str) -> None:
    run = RUNTIMES[name](export(student("residual", bits=8), SIZE).to_bytes())
    assert torch.equal(run({"images": images()})["logits"], run({"images": images()})["logits"])


def test_a_file_for_batches_of_one_length_is_compared_on_whole_batches() -> None:
    made = student("residual", bits=8)
    file = export(made, SIZE, batch=4).to_bytes()
    verdict = verify(made, [images(3), images(7)], SIZE, file, runtimes=None)
    assert verdict.passed and verdict.images == 8
    with pytest.raises(ValueError, match=r"^images: there are too few to compare; give at least those of a batch of 4"):
        verify(made, [images(3)], SIZE, file)


def test_what_is_left_over_is_filled_and_taken_off_again() -> None:
    seen = []

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(inputs["images"])
        return {"logits": 2 * inputs["images"]}

    x = torch.arange(5.0).reshape(5, 1)
    assert torch.equal(of_any_length(run, 2)({"images": x})["logits"], 2 * x)
    assert [part.flatten().tolist() for part in seen] == [[0, 1], [2, 3], [4, 0]]


def test_a_runtime_that_does_not_run_the_file_fails_its_comparison_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> runtimes.Runtime:
        raise RuntimeError("no kernel for it\nand a long story")

    monkeypatch.setitem(RUNTIMES, "openvino", broken)
    verdict = verify(student("residual", bits=8), [images(4)], SIZE, runtimes=None)
    assert verdict.faults == ["openvino: it does not run: no kernel for it"]


@pytest.mark.parametrize(("target", "left_out"), [("onnxruntime", 1), ("openvino", 0)])
def test_a_quantizer_that_openvino_leaves_out_before_a_sum_is_named(target: str, left_out: int) -> None:
    made = student("residual", bits=8, target=target)
    tier = verify(made, [images(1), images(7)], SIZE, runtimes=["openvino"]).tiers[-1]
    assert len(tier.notes) == left_out
    for note in tier.notes:
        assert "leaves out the quantizers between (1), the first body.add_0.left.QuantizeLinear" in note
        assert note.endswith("target=openvino quantizes the shortcut alone")


TWO_MODELS_THEN_A_SIGNAL = """
import signal, subprocess, sys
from qtrain.deployment.parity.runtimes import OpenVino
from qtrain.deployment.profile.sessions import OpenVinoSession

model = sys.stdin.buffer.read()
signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch does for the workers of a data loader
first, second = OpenVino(model), OpenVinoSession(model, threads=1)
del first
del second
subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""


def test_a_process_outlives_the_models_that_openvino_compiled_for_it() -> None:
    model = export(student("residual", bits=8), SIZE).to_bytes()
    command = [sys.executable, "-c", TWO_MODELS_THEN_A_SIGNAL]
    done = subprocess.run(command, input=model, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"alive\n"), done.stderr.decode()
