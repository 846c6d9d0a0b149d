"""One training step of qtrain's student beside the same network as peers quantize it, in one process and in turns.

    python scripts/bench_peers.py                                     # W4A4 ResNet-20, batch 128, all peers installed
    python scripts/bench_peers.py --peers brevitas torchao --threads 2 --results results/bench.csv
    python scripts/bench_peers.py --size 64 --batch 32 model=timm model.name=resnet18

Every peer gets the network, the loss and the optimizer of the experiment, and is prepared as its documentation says.
All ratios are to compiled full precision, to eager with ``--no-compile``. A peer is measured eager, and compiled
by ``torch.compile`` where it compiles; why it does not is printed. A peer that is not installed is left out, with what
to install; none is a dependency of qtrain. What they do differs, and the table says it: steps are learned (qtrain,
Brevitas, NNCF), or ranges are observed (torchao) or come from a calibration before (Model-Optimizer, torch's operator).
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_harness
import torch
from bench_harness import FULL, Measured, Work, columns, conditions, measure, mode_name, seconds, table
from bench_step import CHANNELS, CLASSES, EXPERIMENT, Setting, build, quantized, training_step
from torch import Tensor, nn

from qtrain.config.compose import compose
from qtrain.distillation.hard import Hard
from qtrain.distillation.objective import Objective
from qtrain.pipeline.results import append_row, provenance
from qtrain.settings.run_settings import RunSettings
from qtrain.training.fused import use_fused_

LAYERS = (nn.Conv2d, nn.Linear)
"""The layers whose weights and inputs are quantized, in all cases."""

Prepare = Callable[[nn.Module, Tensor, int], nn.Module]
"""(network, images, bits) -> the network as the peer trains it."""


@dataclass(frozen=True)
class Peer:
    """``package`` is its name among installed distributions, ``bits`` those that it can train; ``None``: any."""

    package: str
    prepare: Prepare
    learns: str
    bits: tuple[int, ...] | None = None


def brevitas(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Layers of ``brevitas.nn`` in place of torch's, with its default quantizers: scales that are learned."""
    layers, quant = (importlib.import_module(name) for name in ("brevitas.nn", "brevitas.quant"))
    how: dict[str, Any] = {
        "weight_quant": quant.Int8WeightPerTensorFloat,
        "weight_bit_width": bits,
        "input_quant": quant.Int8ActPerTensorFloat,
        "input_bit_width": bits,
        "input_collect_stats_steps": 1,  # 300 by default, which cost more than those after them
    }
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d:
                shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
                options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
                new = layers.QuantConv2d(*shape, bias=layer.bias is not None, **options, **how)
            elif type(layer) is nn.Linear:
                new = layers.QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **how)
            else:
                continue
            new.load_state_dict(layer.state_dict(), strict=False)
            setattr(parent, name, new)
    return model.to(memory_format=torch.channels_last).train()


def nncf(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """``nncf.quantize``; its quantizers learn. The first step builds its extension in C++."""
    package: Any = importlib.import_module("nncf")
    made: nn.Module = package.quantize(model, package.Dataset([images]), subset_size=1)
    return made.train()


def torchao(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """Quantization in PyTorch 2 exports (pt2e), with the quantizer for inductor on x86; ranges are observed."""
    base = "torchao.quantization.pt2e"
    prepare: Any = importlib.import_module(f"{base}.quantize_pt2e")
    x86: Any = importlib.import_module(f"{base}.quantizer.x86_inductor_quantizer")
    pt2e: Any = importlib.import_module(base)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    made = prepare.prepare_qat_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    trained: nn.Module = pt2e.move_exported_model_to_train(made)
    return trained


def model_optimizer(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """``mtq.quantize`` with its default for integers at other bits; ranges are of the calibration, weights learn."""
    quantization: Any = importlib.import_module("modelopt.torch.quantization")
    config = copy.deepcopy(quantization.INT8_DEFAULT_CFG)
    for rule in config["quant_cfg"]:
        if "num_bits" in rule.get("cfg", {}):
            rule["cfg"]["num_bits"] = bits
    made: nn.Module = quantization.quantize(model, config, lambda network: network(images))
    return made.train()


class FakeQuantized(nn.Module):
    """A layer between torch's own fake-quantize operators, with the scales of a range that was seen once."""

    def __init__(self, layer: nn.Module, seen: Tensor, bits: int) -> None:
        super().__init__()
        self.layer, self.bits = layer, bits
        self.scale: Tensor
        self.register_buffer("scale", seen.abs().max() / (2 ** (bits - 1) - 1))

    def forward(self, x: Tensor) -> Tensor:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        scale = weight.detach().abs().max() / high
        none = torch.zeros((), dtype=torch.int32, device=x.device)
        with_codes = torch.fake_quantize_per_tensor_affine(weight, scale, none, low, high)
        inputs = torch.fake_quantize_per_tensor_affine(x, self.scale, none, low, high)
        out: Tensor = torch.func.functional_call(self.layer, {"weight": with_codes}, (inputs,))
        return out


def torch_operator(model: nn.Module, images: Tensor, bits: int) -> nn.Module:
    """``torch.fake_quantize_per_tensor_affine`` before each layer and on its weight; nothing learns but the weights."""
    seen: dict[nn.Module, Tensor] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.update({layer: inputs[0].detach()}))
        for layer in layers
    ]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer in seen:
                setattr(parent, name, FakeQuantized(layer, seen[layer], bits))
    return model.train()


PEERS = {
    "brevitas": Peer("brevitas", brevitas, "steps"),
    "nncf": Peer("nncf", nncf, "steps", bits=(8,)),
    "torchao": Peer("torchao", torchao, "nothing", bits=(8,)),
    "model_optimizer": Peer("nvidia-modelopt", model_optimizer, "nothing"),
    "torch_operator": Peer("torch", torch_operator, "nothing"),
}


def version_of(peer: Peer) -> str | None:
    """The installed version, ``None`` where there is none."""
    try:
        return importlib.metadata.version(peer.package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peer_step(setting: Setting, model: nn.Module) -> Work:
    """Forward, cross-entropy, backward and the experiment's optimizer, as for full precision."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = setting.cfg.optimizer.build()([{"params": parameters}])
    use_fused_(optimizer)

    def run() -> None:
        loss = nn.functional.cross_entropy(model(setting.image), setting.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Work(run, [*model.parameters(), *model.buffers(), setting.image, setting.target])


def peer_cases(name: str, setting: Setting, bits: int, modes: Sequence[bool]) -> list[tuple[Measured, Work]]:
    """The step of one peer, in each mode (compiled or not); without those that fail, whose reason is printed."""
    peer, found = PEERS[name], []
    own = bits if peer.bits is None or bits in peer.bits else peer.bits[0]
    case = f"{name} {version_of(peer)} W{own}A{own}, learns {peer.learns}"
    for compiled in modes:
        try:
            model = peer.prepare(build(setting.cfg.model, setting.size), setting.image, own)
            model(setting.image)  # what a first batch settles, such as ranges, before it is compiled
            work = peer_step(setting, torch.compile(model) if compiled else model)  # type: ignore[arg-type]
            first = seconds(work.run, setting.device)
        except Exception as error:
            print(f"{case}, {mode_name(compiled)}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        found.append((Measured(case, compiled, (FULL,), base_compiled=modes[-1], first_s=first), work))
    return found


def own_cases(setting: Setting, bits: int, modes: Sequence[bool]) -> list[tuple[Measured, Work]]:
    """Full precision and qtrain's student, in each mode."""
    cases, cfg = [], setting.cfg
    for compiled in modes:
        setting = replace(setting, compiled=compiled)
        labels = Objective(terms={"hard": Hard()})
        full = training_step(setting, build(cfg.model, setting.size), labels, None)
        cases.append(
            (Measured(FULL, compiled, () if compiled == modes[-1] else (FULL,), base_compiled=modes[-1]), full)
        )
        student = training_step(setting, quantized(cfg, setting.size), labels, None)
        case = f"qtrain W{bits}A{bits}, learns steps"
        cases.append((Measured(case, compiled, (FULL,), base_compiled=modes[-1]), student))
    return cases


def append_results(path: Path, results: Sequence[Measured], cfg: RunSettings, notes: str) -> None:
    """A row for each case and mode; ``name`` is whose step it is."""
    known = provenance() | {"config_hash": cfg.identity, "experiment": "peers", "task": "bench", "dataset": "random"}
    for one in results:
        row = {**known, "model": cfg.model.name, "distill": "none", "notes": notes, **columns(one, results)}
        append_row(
            path, row | {"name": "" if one.case == FULL else one.case, "case": FULL if one.case == FULL else "student"}
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="(all)")
    parser.add_argument(
        "--bits", type=int, default=4, help="of weights and inputs, where the peer has them (%(default)s)"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return bench_harness.parse(parser, arguments, over=EXPERIMENT)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    bits = options.bits
    try:
        cfg = compose(
            [
                f"+experiment={EXPERIMENT}", "model.weights=null", "teacher=none", "objective=hard",
                f"quantize.bits.weight={bits}", f"quantize.bits.input={bits}", *options.overrides,
            ]
        )  # fmt: skip
    except ValueError as error:
        print(f"bench_peers: error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(cfg.seed)
    image = torch.randn(options.batch, CHANNELS, options.size, options.size).to(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (options.batch,))
    setting = Setting(cfg, image, target, bf16=False, compiled=False)
    modes = [False, True] if options.compile else [False]
    cases = own_cases(setting, bits, modes)
    for name in options.peers:
        if version_of(PEERS[name]) is None:
            print(f"{name}: not installed; pip install {PEERS[name].package}")
        else:
            cases += peer_cases(name, setting, bits, modes)
    measure(cases, device=torch.device("cpu"), rounds=options.rounds, steps=options.steps, warmup=3)
    results = [measured for measured, _ in cases]
    notes = conditions(batch=options.batch, size=options.size, bf16=False, rounds=options.rounds, steps=options.steps)
    print(f"{cfg.model.name}: {notes}\n{table(results)}")
    if options.results:
        append_results(options.results, results, cfg, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
