"""How fast nas-gate is, as ratios taken in one run with interleaved repetitions.

    python benchmarks/speed.py                    # all sections, into results/speed/speed.json and speed.md
    python benchmarks/speed.py --only step        # one of: step memory prune growth cost imports
    python benchmarks/speed.py --quick --output runs/speed.json      # few repetitions, to see that it works

  step     a training step of ResNet-56 on 32x32 images (batch 128, bf16 autocast, channels_last, 2 threads; forward,
           loss, backward, SGD): plain, gated on the consumers' weights with the penalty in the loss (nas-gate), and
           gated on activations with the same gates and penalty
  memory   the peak of the same three: bytes that PyTorch allocates (its own profiler, exact), and the largest resident
           set of a process of its own above what it held before the model was built
  prune    attach + land + remove with proof, against Torch-Pruning's whole call (dependency graph, magnitude
           importance, ratio 0.5, local; `pip install -e ".[benchmark]"`), one thread, 224x224 images
  growth   attach + land + remove on ResNets for CIFAR of growing depth: the slope of log seconds over log operations
  cost     one evaluation of the cost with its gradient, ResNet-50
  imports  `import nas_gate` after `import torch`, and the packages that it pulls in

Every number is the median of repetitions that go round the variants; a ratio is the median of the ratios within
rounds. Run it on a machine that does nothing else: the load at the start of each section is recorded with it, as are
hardware, versions, seed and command.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _environment
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nas_gate
from nas_gate import models
from nas_gate.gating import Gates

SEED = 0
ROOT = Path(__file__).resolve().parent.parent
BATCH = 128
VARIANTS = ("plain", "gated", "activations")
PRUNED = ("resnet50", "efficientnet_b0", "vgg16", "vit_b_16", "densenet201", "swin_t", "maxvit_t")
PEER_LIMIT = 120.0
"""Seconds after which the peer's call is given up (it does not end on Swin and MaxViT)."""
TRAINING_PACKAGES = ("hydra", "lightning_fabric", "omegaconf", "optuna", "pandas", "rich", "sklearn", "torchvision")

Result = dict[str, Any]


# -- measuring ----------------------------------------------------------------------------------------------------


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every variant in every round; each call times itself, and the order turns round by round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            taken = variants[name]()
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios within rounds."""
    return round(statistics.median(a / b for a, b in zip(of, to)), 4)


def medians(seconds: Mapping[str, Sequence[float]], digits: int = 4) -> dict[str, float]:
    return {n: round(statistics.median(s), digits) for n, s in seconds.items()}


# -- step and memory ----------------------------------------------------------------------------------------------


class GatedActivations(nn.Module):
    """The other way to gate: every consumer's input is multiplied by the gates of its channels.

    Same function and same gates as `nas_gate.GatedModel`, for networks whose consumers take their units along
    dimension 1 of their input. Calling it is like calling the model.
    """

    def __init__(self, gated: nas_gate.GatedModel) -> None:
        super().__init__()
        structure = gated.structure
        self.model = copy.deepcopy(gated.model)
        self.gates = Gates(structure, gated.gates.function)
        self.cost = gated.cost
        self._keep = torch.ones(structure.units)
        for slots in structure.gates:
            path, _, tensor = slots.tensor.rpartition(".")
            if tensor != "weight" or slots.dim != 1:
                raise ValueError(f"gates must lie on dimension 1 of weights, but one is on {slots.tensor}:{slots.dim}")
            units = torch.from_numpy(slots.units)
            index = torch.where(units >= 0, units, structure.units)
            self.model.get_submodule(path).register_forward_pre_hook(self._gate(index))

    def _gate(self, index: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            shape = [-1 if d == 1 else 1 for d in range(x.dim())]
            return (x * self._keep.index_select(0, index).view(shape).to(x.dtype),)

        return hook

    def forward(self, x: Tensor) -> Tensor:
        keep = self.gates()
        self._keep = torch.cat([keep, keep.new_ones(1)])
        out: Tensor = self.model(x)
        return out

    def cost_share(self, metric: str = "macs") -> Tensor:
        return self.cost.share(self.gates(), metric)


def network(variant: str) -> nn.Module:
    """ResNet-56 plain or gated, in channels_last. Gate weights are random, so that about half are closed."""
    torch.manual_seed(SEED)
    plain = models.build("resnet56")
    if variant == "plain":
        return plain.to(memory_format=torch.channels_last)
    model: Any = nas_gate.attach(plain, torch.randn(1, 3, 32, 32))
    if variant == "activations":
        model = GatedActivations(model)
    nn.init.normal_(model.gates.weight, generator=torch.Generator().manual_seed(SEED))
    result: nn.Module = model.to(memory_format=torch.channels_last)
    return result


def trainer(variant: str) -> Callable[[], None]:
    """One training step of a variant: forward under bf16 autocast, loss, backward, SGD with momentum."""
    model: Any = network(variant).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), generator=generator)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        if variant != "plain":
            loss = loss + nas_gate.penalty(model, target=0.5, weight=4.0)
        loss.backward()
        optimizer.step()

    return step


def same_function() -> float:
    """Largest relative difference of the two ways to gate, evaluation mode, float32: they must be one function."""
    a, b = network("gated").eval(), network("activations").eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        left, right = a(x), b(x)
    return float((left - right).abs().max() / left.abs().max())


def step(quick: bool) -> Result:
    torch.set_num_threads(2)
    difference = same_function()
    if difference > 1e-4:
        raise RuntimeError(f"both ways to gate must be one function, but their outputs differ by {difference:.3g}")
    steps = {v: trainer(v) for v in VARIANTS}
    seconds = interleaved({v: lambda v=v: timed(steps[v]) for v in VARIANTS}, 3 if quick else 40, warmup=2)
    return {
        "threads": 2,
        "rounds": len(seconds["plain"]),
        "seconds": medians(seconds),
        "gated_to_plain": ratio(seconds["gated"], seconds["plain"]),
        "activations_to_plain": ratio(seconds["activations"], seconds["plain"]),
        "target": "gated_to_plain <= 1.03",
        "all_seconds": {n: [round(t, 4) for t in s] for n, s in seconds.items()},
    }


def _allocated(variant: str) -> int:
    """Peak bytes that PyTorch holds from building the model to the end of the third step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work = trainer(variant)
        for _ in range(3):
            work()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident(variant: str) -> int:
    """Largest resident set in bytes during three steps, above what the process held before."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    work = trainer(variant)
    for _ in range(3):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _measure_memory(how: str, variant: str, answers: Any) -> None:
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    answers.put({"allocated": _allocated, "resident": _resident}[how](variant))


def memory(quick: bool) -> Result:
    values: dict[str, dict[str, list[float]]] = {"allocated": {}, "resident": {}}
    for how, rounds in (("allocated", 1), ("resident", 1 if quick else 5)):
        for _ in range(rounds):
            for variant in VARIANTS:
                values[how].setdefault(variant, []).append(_apart(_measure_memory, (how, variant), 600.0))
    result: Result = {"threads": 2, "target": "gated_to_plain <= 1.02"}
    for how, by_variant in values.items():
        result[how] = {
            "megabytes": {v: round(statistics.median(m) / 1e6, 1) for v, m in by_variant.items()},
            "gated_to_plain": ratio(by_variant["gated"], by_variant["plain"]),
            "activations_to_plain": ratio(by_variant["activations"], by_variant["plain"]),
        }
    return result


def _apart(work: Callable[..., None], arguments: tuple[Any, ...], limit: float) -> Any:
    """What `work(*arguments, queue)` puts into the queue, in a fresh process; None where it is not done in time."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=work, args=(*arguments, answers))
    process.start()
    try:
        return answers.get(timeout=limit)
    except Exception:  # queue.Empty: not in time, or it died
        return None
    finally:
        if process.is_alive():
            process.join(5)
        if process.is_alive():
            process.kill()
        process.join()


# -- prune and growth ---------------------------------------------------------------------------------------------


def ours(model: nn.Module, example: Tensor) -> float:
    """Seconds of attach + land + remove with proof. Gate weights are random (learning them is not timed)."""
    begin = time.perf_counter()
    gated = nas_gate.attach(model, example)
    attached = time.perf_counter()
    nn.init.normal_(gated.gates.weight, generator=torch.Generator().manual_seed(SEED))
    resumed = time.perf_counter()
    nas_gate.remove(gated, target=0.5)
    return (attached - begin) + (time.perf_counter() - resumed)


def theirs(model: nn.Module, example: Tensor) -> float:
    """Seconds of Torch-Pruning's call on the model itself; the classifier's outputs are left alone."""
    import torch_pruning

    last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    begin = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        global_pruning=False,
        ignored_layers=[last],
        num_heads=heads,
    )
    pruner.step()
    return time.perf_counter() - begin


def _prune_once(name: str, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answers.put(theirs(models.build(name).eval(), torch.randn(1, 3, 224, 224)))


def prune(quick: bool) -> Result:
    torch.set_num_threads(1)
    result: Result = {"threads": 1, "target": "nas-gate <= 3 s for each, and below the peer on VGG and DenseNet"}
    for name in PRUNED:
        torch.manual_seed(SEED)
        model, example = models.build(name).eval(), torch.randn(1, 3, 224, 224)
        limit = 20.0 if quick else PEER_LIMIT
        peer = _apart(_prune_once, (name,), limit)
        variants = {"nas-gate": lambda m=model, x=example: ours(m, x)}
        if peer is not None:
            variants["torch-pruning"] = lambda m=model, x=example: theirs(copy.deepcopy(m), x)
        seconds = interleaved(variants, 1 if quick else 5, warmup=0 if quick else 1)
        entry: Result = {"rounds": len(seconds["nas-gate"]), "seconds": medians(seconds, 3)}
        if peer is None:
            entry["torch-pruning"] = f"not done after {limit:.0f} s, or failed"
        else:
            entry["ratio"] = ratio(seconds["nas-gate"], seconds["torch-pruning"])
        result[name] = entry
        _note(f"  {name}: {entry['seconds']}")
    return result


class _Counter(TorchDispatchMode):
    """Counts ATen operations."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def growth(quick: bool) -> Result:
    torch.set_num_threads(1)
    depths = (20, 56, 110) if quick else (20, 56, 110, 218, 434, 866)
    networks: dict[str, tuple[nn.Module, Tensor]] = {}
    operations: dict[str, int] = {}
    for depth in depths:
        torch.manual_seed(SEED)
        model, example = models.cifar.resnet(depth).eval(), torch.randn(1, 3, 32, 32)
        with torch.no_grad(), _Counter() as counter:
            model(example)
        networks[str(depth)], operations[str(depth)] = (model, example), counter.operations
    work = {d: lambda m=m, x=x: ours(m, x) for d, (m, x) in networks.items()}
    seconds = medians(interleaved(work, 1 if quick else 5, warmup=1))
    points = [(math.log(operations[d]), math.log(seconds[d])) for d in seconds]
    largest = points[-2:]
    return {
        "threads": 1,
        "target": "exponent about 1 at most",
        "operations": operations,
        "seconds": seconds,
        "exponent": round(statistics.linear_regression(*zip(*points)).slope, 3),
        "exponent_of_the_last_two": round(statistics.linear_regression(*zip(*largest)).slope, 3),
    }


# -- cost and imports ---------------------------------------------------------------------------------------------


def cost(quick: bool) -> Result:
    torch.set_num_threads(1)
    structure = nas_gate.analyze(models.build("resnet50"), torch.randn(1, 3, 224, 224))
    model = nas_gate.CostModel(structure)
    keep = torch.rand(structure.units, requires_grad=True)

    def evaluate(metric: str) -> None:
        keep.grad = None
        model(keep, metric).backward()

    metrics = ("macs", "params")
    seconds = interleaved({m: lambda m=m: timed(lambda: evaluate(m)) for m in metrics}, 20 if quick else 200, warmup=10)
    return {
        "threads": 1,
        "units": structure.units,
        "milliseconds": {m: round(1e3 * statistics.median(s), 4) for m, s in seconds.items()},
        "target": "macs below 1 ms",
    }


IMPORT = """
import sys, time
a = time.perf_counter()
import torch
b, before = time.perf_counter(), set(sys.modules)
import nas_gate
c = time.perf_counter()
new = sorted({m.partition(".")[0] for m in set(sys.modules) - before} - {m.partition(".")[0] for m in before})
print(b - a, c - b, *[m for m in new if m not in sys.stdlib_module_names and not m.startswith("_")])
"""


def imports(quick: bool) -> Result:
    runs = []
    for _ in range(2 if quick else 11):
        runs.append(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)
    split = [r.split() for r in runs][1:]  # the first fills the file cache
    packages = split[0][2:]
    return {
        "seconds_torch": round(statistics.median(float(s[0]) for s in split), 3),
        "seconds_nas_gate_after_torch": round(statistics.median(float(s[1]) for s in split), 3),
        "packages_beside_torch": packages,
        "training_packages": sorted(set(packages) & set(TRAINING_PACKAGES)),
        "target": "training_packages is empty",
    }


# -- all ----------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[bool], Result]] = {
    "step": step,
    "memory": memory,
    "prune": prune,
    "growth": growth,
    "cost": cost,
    "imports": imports,
}


def table(results: Mapping[str, Result]) -> str:
    """The results as Markdown, for the sections that there are."""
    lines = ["| what | measured | beside it | target |", "|---|---|---|---|"]
    if r := results.get("step"):
        s = r["seconds"]
        lines.append(
            f"| training step, ResNet-56, gated / plain | **{r['gated_to_plain']:.3f}** "
            f"({s['gated']:.3f} s / {s['plain']:.3f} s) | gating activations: {r['activations_to_plain']:.3f} | 1.03 |"
        )
    if r := results.get("memory"):
        for how, words in (("allocated", "bytes allocated by PyTorch"), ("resident", "resident set")):
            m = r[how]
            lines.append(
                f"| peak memory, {words}, gated / plain | **{m['gated_to_plain']:.3f}** "
                f"({m['megabytes']['gated']:.0f} MB / {m['megabytes']['plain']:.0f} MB) "
                f"| gating activations: {m['activations_to_plain']:.3f} | 1.02 |"
            )
    if r := results.get("prune"):
        for name in (n for n in PRUNED if n in r):
            peer = r[name]["seconds"].get("torch-pruning")
            beside = f"{peer:.2f} s" if peer is not None else r[name]["torch-pruning"]
            lines.append(
                f"| attach + land + remove, {name} | **{r[name]['seconds']['nas-gate']:.2f} s** "
                f"| Torch-Pruning: {beside} | 3 s |"
            )
    if r := results.get("growth"):
        first, last = (list(r["operations"].values())[i] for i in (0, -1))
        lines.append(
            f"| growth with the number of operations, {first} to {last} | **exponent {r['exponent']:.2f}** "
            f"| between the last two: {r['exponent_of_the_last_two']:.2f} | about 1 |"
        )
    if r := results.get("cost"):
        lines.append(
            f"| cost with gradient, ResNet-50 ({r['units']:,} units) | **{r['milliseconds']['macs']:.2f} ms** "
            f"| parameters: {r['milliseconds']['params']:.2f} ms | 1 ms |"
        )
    if r := results.get("imports"):
        pulled = ", ".join(r["training_packages"]) or "none"
        lines.append(
            f"| import after torch; training packages pulled in | **{r['seconds_nas_gate_after_torch']:.2f} s**; "
            f"{pulled} | import torch: {r['seconds_torch']:.2f} s | none |"
        )
    return "\n".join(lines)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="few repetitions; the numbers mean little")
    parser.add_argument("--output", type=Path, default=ROOT / "results/speed/speed.json", help="sections are merged")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Result] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        environment = _environment.describe(seed=SEED, load_at_start=[round(v, 2) for v in os.getloadavg()])
        if os.getloadavg()[0] > 0.5:
            _note(f"{name}: the machine is busy (load {os.getloadavg()[0]:.1f}); the numbers will be too high")
        begin = time.perf_counter()
        results[name] = {**SECTIONS[name](arguments.quick), "environment": environment}
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(results) + "\n")
        _note(f"{name}: done in {time.perf_counter() - begin:.0f} s")
    print(table(results))


if __name__ == "__main__":
    main()
