"""Conversion tried on timm: one small model of each family, converted, counted, saved and loaded.

    python scripts/scan_timm.py                                       # all families, hours on two cores
    python scripts/scan_timm.py --limit 20                            # the first 20 that the table lacks
    python scripts/scan_timm.py --models resnet18 cait_xxs24_224 --results /tmp/timm.csv

Each model has random weights and is tried in a process of its own. It passes if the student with quantizers off gives
the original's output bit for bit, if its multiplications are those that :class:`Counter` counts in the calls of torch's
functions (it knows nothing of qtrain's counter), and if the file that is saved gives the student's logits when it is
loaded. Otherwise its row has the reason. Models that the table has are not tried again, so that a scan that was stopped
goes on. A family is a module of timm and the leading word of a name.
"""

import argparse
import logging
import math
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import qtrain
from qtrain.convert.layers import set_quantization
from qtrain.models.factory import create_model
from qtrain.pipeline.results import append_row, provenance, read_results
from qtrain.utils.errors import one_line

RESULTS = Path("results/timm_models.csv")
CLASSES = 10
SIZES = (64, 128)
"""Pixels that are tried before a model's own, where it takes images of any size."""

CANDIDATES = 10
"""So many of a family's models, those that sound small, are built without memory to find the smallest."""

SMALL = (
    "zepto", "atto", "femto", "pico", "nano", "xxs", "xxt", "xxtiny", "xtiny", "tiny", "tinier", "xs", "xsmall", "s0",
    "a0", "b0", "x0", "t0", "mini", "small", "s",
)  # fmt: skip
"""Words in names of small models, from the smallest."""


class Counter(TorchFunctionMode):
    """Inside, ``total`` counts the multiplications of products from the shapes in the calls of torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if name in ("conv1d", "conv2d", "conv3d"):
            self.total += output.numel() * math.prod(_given(args, kwargs, 1, "weight").shape[1:])
        elif name.startswith("conv_transpose"):
            self.total += args[0].numel() * math.prod(_given(args, kwargs, 1, "weight").shape[1:])
        elif name in ("linear", "matmul", "rmatmul", "mm", "bmm", "mv", "dot"):
            self.total += output.numel() * args[0 if name != "rmatmul" else 1].shape[-1]
        elif name in ("addmm", "baddbmm", "addmv"):
            self.total += output.numel() * args[1].shape[-1]
        elif name == "einsum":
            self.total += _einsum(args[0], args[1] if isinstance(args[1], list | tuple) else args[1:])
        elif name == "scaled_dot_product_attention":
            q, k, v = (_given(args, kwargs, i, key) for i, key in enumerate(("query", "key", "value")))
            self.total += math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif name == "multi_head_attention_forward":
            self.total += _attention(*(_given(args, kwargs, i, key) for i, key in enumerate(("query", "key"))))
        elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            self.total += math.prod(args[0].shape[:-1]) * sum(w.numel() for w in args[2] if w.ndim == 2)
        return output


def _given(args: Sequence[Any], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _einsum(equation: str, operands: Sequence[Tensor]) -> int:
    """Products of operands two by two from the left, over all indices of the two; what is summed early is not seen."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    size = {index: n for term, tensor in zip(terms, operands, strict=True)
            for index, n in zip(term, tensor.shape, strict=False) if index != "."}  # fmt: skip
    total, left = 0, terms[0]
    for number, right in enumerate(terms[1:], 2):
        both = dict.fromkeys(left + right)
        total += math.prod(size[index] for index in both)
        left = "".join(index for index in both if index in output or any(index in term for term in terms[number:]))
    return total


def _attention(query: Tensor, key: Tensor) -> int:
    """Four projections and two products, for tokens (L, N, E) and (S, N, E)."""
    length, batch, width = query.shape
    return batch * (2 * (length + len(key)) * width**2 + 2 * length * len(key) * width)


def families() -> dict[str, list[str]]:
    """Family -> names of its models."""
    found: dict[str, list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            word = re.match(r"[a-z]+", name.removeprefix("tf_").removeprefix("gc_"))
            found.setdefault(f"{module}/{word.group() if word else name}", []).append(name)
    return found


def smallest(names: Sequence[str]) -> tuple[str, int]:
    """The model of ``names`` with the fewest parameters among those that sound small, and how many these are."""

    def rank(name: str) -> tuple[int, list[int], int]:
        words = re.split(r"[_.]", name)
        size = next((i for i, word in enumerate(SMALL) if any(part.endswith(word) for part in words)), len(SMALL))
        return size, [int(number) for number in re.findall(r"\d+", name)][:2], len(name)

    candidates = sorted(names, key=rank)[:CANDIDATES]
    sizes = {name: size for name in candidates if (size := _parameters(name)) is not None}
    name = min(sizes, key=lambda each: sizes[each], default=candidates[0])
    return name, sizes.get(name, 0)


def _parameters(name: str) -> int | None:
    """How many parameters the model ``name`` has; ``None`` where it cannot be built."""
    for device in ("meta", "cpu"):  # some constructors look at values, which meta tensors do not have
        with suppress(Exception), torch.device(device):
            return sum(p.numel() for p in timm.create_model(name, num_classes=CLASSES).parameters())
    return None


def tried(name: str) -> dict[str, Any]:
    """What the model ``name`` gives: counts, and the reason why it does not pass, empty if it does."""
    row: dict[str, Any] = {"reason": ""}
    try:
        for key, value in _steps(name):
            row[key] = value
    except Exception as error:  # whatever a model raises is the finding
        row["reason"] = f"{type(error).__name__}: {one_line(error)}"[:300]
    return row


@torch.no_grad()
def _steps(name: str) -> Iterator[tuple[str, Any]]:
    model, images = _settled(name)
    yield "image_size", images.shape[-1]
    expected = model(images)
    with Counter() as counter:
        model(images[:1])  # tables of positions are computed once, for however many images
    macs = counter.total
    yield "independent_macs", macs
    observers = {"weight_observer": "min_max", "input_observer": "min_max"}
    student = qtrain.quantize(model, images, weight_bits=4, input_bits=4, **observers)  # type: ignore[arg-type]
    report, cost = qtrain.describe(student), qtrain.cost(student, images)
    yield "layers", len(report.layers)
    yield "skipped", "; ".join(sorted(set(report.skipped.values())))[:300]
    yield "size_bytes", cost.size_bytes
    yield "fp_size_bytes", cost.fp_size_bytes
    yield "macs", cost.macs
    quantized = student(images)
    set_quantization(student, enabled=False)
    if not torch.equal(student(images), expected):
        yield "reason", f"quantizers off: differs by {float((student(images) - expected).abs().max()):.2g}"
        return
    set_quantization(student, enabled=True)
    if not torch.isfinite(quantized).all():
        yield "reason", "quantized: not finite"
        return
    if not cost.macs == qtrain.cost(model, images).macs == macs:
        yield "reason", f"counted: {cost.macs} quantized, {qtrain.cost(model, images).macs} in float, {macs} by calls"
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.safetensors"
        size = qtrain.save(student, file)
        yield "file_bytes", size.file_bytes
        if not torch.equal(qtrain.load(file)(images), quantized):
            yield "reason", "loaded: other logits than the student"
        elif size.file_bytes - size.header_bytes != cost.size_bytes:
            yield "reason", f"saved: {size.file_bytes - size.header_bytes} bytes, counted {cost.size_bytes}"


def _settled(name: str) -> tuple[nn.Module, Tensor]:
    """The model as after training, so that no branch counts for nothing, with images that it takes."""
    cfg: Any = timm.get_pretrained_cfg(name)
    own = cfg.input_size[-1]
    last: Exception | None = None
    sizes = (own,) if cfg.fixed_input_size else (*(size for size in SIZES if size < own), own)
    for size, most in product(sizes, (1.0, 0.1)):
        torch.manual_seed(0)
        model = create_model(name=name, num_classes=CLASSES, image_size=size).eval()
        for parameter in model.parameters():
            if parameter.ndim <= 1 or not parameter.any():
                nn.init.uniform_(parameter, -0.1 * most, most)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        images = torch.randn(2, cfg.input_size[0], size, size)
        try:
            if torch.isfinite(model(images)).all():
                return model, images
            last = ValueError("the original's output is not finite")
        except Exception as error:  # too small an image for it
            last = error
    raise last or ValueError("no size")


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """:func:`tried` in a process of its own, which is ended after ``seconds``."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, Any] = {"reason": f"took more than {seconds:.0f} s"}
    try:
        if ours.poll(seconds):
            row = ours.recv()
    except EOFError:
        process.join(10)
        row = {"reason": f"its process ended with exit code {process.exitcode}, by lack of memory perhaps"}
    process.kill()
    process.join()
    return row


def _send(name: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the row says what was skipped
    pipe.send(tried(name))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="of timm; without it, the smallest of each family")
    parser.add_argument("--limit", type=int, help="try at most so many models now")
    parser.add_argument("--parameters", type=float, default=60e6, help="larger models are not tried (%(default).0f)")
    parser.add_argument("--seconds", type=float, default=600, help="for one model (%(default).0f)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file, a row for each model (%(default)s)")
    options = parser.parse_args(arguments)
    rows = read_results(options.results) if options.results.is_file() else []
    done = {row["model"] for row in rows}
    known = families()
    if options.models:
        family_of = {name: family for family, names in known.items() for name in names}
        chosen = [(family_of.get(name, name), [name]) for name in options.models if name not in done]
    else:
        tried_before = {row["family"] for row in rows}
        chosen = [(family, names) for family, names in known.items() if family not in tried_before]
    for family, names in chosen[: options.limit]:
        name, parameters = smallest(names)
        if name in done:
            continue
        start = time.perf_counter()
        if parameters > options.parameters:
            found: dict[str, Any] = {"reason": f"not tried: its smallest model has {parameters} parameters"}
        else:
            found = in_a_process(name, options.seconds)
        status = "pass" if not found["reason"] else "not tried" if found["reason"].startswith("not tried") else "fail"
        wall_s = round(time.perf_counter() - start, 1)
        row = {"task": "scan_timm", "model": name, "w_bits": 4, "a_bits": 4, "wall_s": wall_s,
               "family": family, "parameters": parameters, "status": status}  # fmt: skip
        append_row(options.results, provenance() | row | found)
        done.add(name)
        print(f"{name:<40} {wall_s:7.1f} s  {status} {found['reason']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
