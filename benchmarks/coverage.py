"""Every model of torchvision, and one of each family of timm, through the whole chain: trace, gate, remove, compare,
count, train.

    python benchmarks/coverage.py                      # all 121 names, into results/coverage/torchvision.csv
    python benchmarks/coverage.py --only '^resnet'     # some of them; rows that are there already are kept ...
    python benchmarks/coverage.py --only '^resnet' --again                     # ... or replaced
    python benchmarks/coverage.py --family-sample --output runs/coverage.csv   # one model per family, for CI
    python benchmarks/coverage.py --timm               # timm's (extra `benchmark`), into results/coverage/timm.csv
    python benchmarks/coverage.py --summary results/coverage/torchvision.csv   # the Markdown table of the README

Every model runs in a process of its own, on one thread, without pretrained weights; nothing is downloaded. What the
columns mean:

  traced      `nas_gate.analyze` returned
  reachable   share of the dense model's MACs in operations that at least one gate can shrink
  gated       a `nas_gate.GatedModel` of it (what `attach` makes) with all gates open has the original's outputs
  removed     `nas_gate.remove_with_proof` cut a random keep: every unit stays with probability 1/2, at least one in
              every group
  equal       largest difference of gated and removed model over the largest output, on inputs that the analysis has
              not seen, evaluation mode, float32: below 1e-4; where it is not, as where boxes of nearly equal scores
              are sorted, the same in float64, below 1e-9 (column `error_float64`)
  cost_exact  predicted MACs and parameters are the ones that `FlopCounterMode` and `numel` count on the removed model
  trained     one SGD step of the removed model in training mode: finite loss, finite gradients, weights moved

So that nothing hides a wrong cut, all constant tensors (fresh norms, layer scales, zero-initialised branches) get
random values, batch-norm statistics are taken from data, of the dense and again of the gated network, and outputs whose
dependence on the inputs (column `sensitivity`: the relative difference that other inputs make) is not at least 100
times the error count as not equal.
The exit status is 1 where a model fails a column. Versions, hardware and seed go into a JSON file beside the CSV.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _environment
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

import nas_gate

SEED = 0
TOLERANCE = 1e-4
ROOT = Path(__file__).resolve().parent.parent

FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn",
    "vit_b_32", "quantized_resnet18", "quantized_shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large", "r3d_18", "s3d", "mvit_v2_s", "swin3d_t", "raft_small",
    "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
)  # fmt: skip

TASKS = ("classification", "quantization", "segmentation", "detection", "video", "optical_flow", "timm")

TIMM = "timm/"
"""What the names of timm's models start with here."""

TIMM_FAMILIES = (
    "beit_base_patch16_224", "botnet26t_256", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "coat_tiny",
    "coatnet_nano_rw_224", "convit_tiny", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cpubone_nano",
    "crossvit_tiny_240", "csatv2", "cspnext_tiny", "cspresnext50", "darknet21", "davit_tiny",
    "deit3_small_patch16_224", "deit_tiny_patch16_224", "densenet121", "dla34", "dpn68", "eca_nfnet_l0",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0", "efficientvim_m1",
    "efficientvit_b0", "efficientvit_m0", "ese_vovnet19b_slim_dw", "eva02_tiny_patch14_224", "fasternet_t0",
    "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gernet_s", "ghostnet_050", "ghostnetv3_050", "gmlp_s16_224",
    "halonet26t", "hardcorenas_a", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18_small", "iformer_t",
    "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4", "lambda_resnet26t", "lcnet_035",
    "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s", "levit_conv_128s", "lowformer_b0",
    "mambaout_femto", "maxvit_pico_rw_256", "mixer_s32_224", "mixnet_s", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mobileone_s1", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny",
    "naflexvit_base_patch16_gap", "nasnetalarge", "nest_tiny", "nextvit_small", "nf_regnet_b0", "pit_ti_224",
    "pnasnet5large", "poolformer_s12", "pvt_v2_b0", "rdnet_tiny", "regnetv_040", "regnetx_002", "repghostnet_050",
    "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resmlp_12_224", "resnest14d", "resnet18", "resnetv2_18",
    "rexnet_100", "sam2_hiera_tiny", "samvit_base_patch16_224", "selecsls42b", "sequencer2d_s", "shvit_s1",
    "skresnet18", "starnet_s050", "swiftformer_xs", "swin_s3_tiny_224", "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tinynet_e", "tnt_s_patch16_224",
    "tresnet_m", "twins_pcpvt_small", "twins_svt_small", "vgg11", "visformer_tiny", "vit_relpos_small_patch16_224",
    "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "volo_d1_224", "xception41",
    "xcit_nano_12_p16_224",
)  # fmt: skip
"""One of the smallest models of every family of timm (a module of it, some with two architectures)."""

LAST = "convnext|swin|vit|regnet_y_128gf"
"""The slowest ones, run after all others."""


@dataclasses.dataclass
class Row:
    """One model's result; columns of the CSV in order."""

    name: str
    task: str
    input: str = ""
    macs: int | str = ""
    params: int | str = ""
    reachable: float | str = ""
    units: int | str = ""
    groups: int | str = ""
    traced: bool = False
    gated: bool = False
    removed: bool = False
    equal: bool = False
    cost_exact: bool = False
    trained: bool = False
    error: float | str = ""
    error_float64: float | str = ""
    sensitivity: float | str = ""
    macs_kept: float | str = ""
    params_kept: float | str = ""
    seconds: float | str = ""
    fixed_because: str = ""
    failure: str = ""


COLUMNS = [f.name for f in dataclasses.fields(Row)]
CHECKS = ("traced", "gated", "removed", "equal", "cost_exact", "trained")


# -- models and inputs --------------------------------------------------------------------------------------------


def task_of(name: str) -> str:
    """One of TASKS: `timm`, or by the module of torchvision that the model comes from."""
    if name.startswith(TIMM):
        return "timm"
    part = torchvision.models.get_model_builder(name).__module__.split(".")[2]
    return part if part in TASKS else "classification"


def build(name: str, task: str) -> nn.Module:
    """The model with random weights."""
    if task == "timm":
        import timm

        return timm.create_model(name.removeprefix(TIMM))
    arguments: dict[str, Any] = {"weights": None}
    if task in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if task == "quantization":
        arguments["quantize"] = False
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # its own initialisation draws from scipy, slowly
    if task == "detection" and not name.startswith("ssd"):
        arguments |= {"min_size": 320, "max_size": 320}  # the size that images are scaled to
    if "rcnn" in name:
        # How many boxes pass the thresholds depends on the weights, and with it the cost of the heads on them.
        # Without thresholds it is a constant, which is what a cost can be stated for.
        arguments |= {"rpn_nms_thresh": 1.0, "box_score_thresh": 0.0, "box_nms_thresh": 1.0, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 20}  # fmt: skip  # noqa: E501
    return torchvision.models.get_model(name, **arguments)


def size_of(name: str, task: str) -> tuple[int, ...]:
    """Shape of one example; that of a timm model is its own, see `smaller_size`."""
    if task == "timm":
        import timm

        known = timm.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=True)
        return (3, 224, 224) if known is None else known.input_size
    if task == "video":
        return (3, 16, 224, 224) if re.match("mvit|s3d|swin3d", name) else (3, 16, 112, 112)
    if task == "optical_flow":
        return (3, 128, 128)
    if task == "detection":
        return (3, 320, 320)
    if "inception" in name:
        return (3, 299, 299)
    return (3, 256, 256) if name.startswith("swin_v2") else (3, 224, 224)


def smaller_size(name: str, model: nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    """At most 128 where timm lets the size be chosen and the model runs on it, to save time; else `size`."""
    import timm

    known = timm.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=True)
    small = (size[0], *(min(n, 128) for n in size[1:]))
    if known is not None and known.fixed_input_size:
        return size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, *small))
    except Exception:  # it needs another size
        return size
    return small


def inputs(task: str, size: Sequence[int], batch: int, seed: int) -> tuple[Any, ...]:
    """Positional arguments of the model: random examples."""
    generator = torch.Generator().manual_seed(seed)
    if task == "detection":
        return (list(pictures(size, batch, generator).sigmoid()),)
    images = pictures(size, batch, generator)
    return (images, pictures(size, batch, generator)) if task == "optical_flow" else (images,)


def pictures(size: Sequence[int], batch: int, generator: torch.Generator) -> Tensor:
    """Random blobs and noise: pure noise would look the same to a network that averages over the image."""
    coarse = torch.randn(batch, size[0], *(5 for _ in size[1:]), generator=generator)
    blobs = nn.functional.interpolate(coarse, size[1:], mode="bilinear" if len(size) == 3 else "trilinear")
    return 1.5 * blobs + 0.5 * torch.randn(batch, *size, generator=generator)


def targets(size: Sequence[int], batch: int) -> list[dict[str, Tensor]]:
    """One box with a label, a mask and key points per image."""
    height, width = size[-2:]
    target = {
        "boxes": torch.tensor([[0.2 * width, 0.2 * height, 0.8 * width, 0.8 * height]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, height, width, dtype=torch.uint8),
        "keypoints": torch.tensor([[[0.5 * width, 0.5 * height, 1.0]] * 17]),
    }
    return [target for _ in range(batch)]


def randomize(model: nn.Module) -> None:
    """Random values for constant tensors, in place; stronger weights where no norm keeps the signal up."""
    generator = torch.Generator().manual_seed(SEED)
    normless = not any("Norm" in type(m).__name__ for m in model.modules())
    for parameter in model.parameters():
        first = parameter.detach().flatten()[0]
        if parameter.numel() > 1 and bool((parameter == first).all()):
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data = 0.5 + noise if bool(first == 1) else 0.6 * noise - 0.3
        elif normless and parameter.dim() > 1:
            parameter.data *= math.sqrt(2)  # half of the inputs of every layer will go


@torch.no_grad()
def calibrate(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Take batch-norm statistics from a forward pass, in place; the model is in evaluation mode afterwards."""
    norms = [m for m in model.eval().modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(*example)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        norm.eval()


# -- one model ----------------------------------------------------------------------------------------------------


def leaves(out: Any) -> Iterator[Tensor]:
    """Tensors of a nested output, in order."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from leaves(value)
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from leaves(value)


@torch.no_grad()
def outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """All output tensors, as float64."""
    torch.manual_seed(SEED)
    return [t.double() for t in leaves(model(*example))]


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference over largest output, tensor by tensor; inf where shapes differ or a value is not finite."""
    if not left or [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    errors = [(x - y).abs().max() / x.abs().max().clamp(min=1e-12) for x, y in zip(left, right) if x.numel()]
    worst = float(torch.stack(errors).max()) if errors else float("inf")  # a comparison of nothing proves nothing
    return worst if math.isfinite(worst) else float("inf")


def difference_in_float64(gated: nn.Module, small: nn.Module, example: tuple[Any, ...]) -> float:
    """`difference` of copies of both models in float64."""
    wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example)
    return difference(*(outputs(copy.deepcopy(m).double(), wide) for m in (gated, small)))


def random_keep(structure: nas_gate.Structure) -> Tensor:
    """Every unit with probability 1/2, at least one of every group."""
    # A stream of its own: with the stream that biases are drawn from, every unit with a positive bias would go.
    generator = torch.Generator().manual_seed(SEED + 3)
    keep = torch.rand(structure.units, generator=generator) < 0.5
    for group in structure.groups:
        if not bool(keep[group.start : group.stop].any()):
            keep[group.start] = True
    return keep


def train_step(model: nn.Module, task: str, size: Sequence[int]) -> bool:
    """One SGD step in training mode: whether loss and gradients are finite and the weights moved."""
    batch = 2  # batch norm over 1x1 maps needs two
    torch.manual_seed(SEED)
    model.train()
    example = inputs(task, size, batch, SEED + 2)
    if task == "detection":
        loss = torch.stack(list(leaves(model(*example, targets(size, batch))))).sum()
    else:
        loss = torch.stack([(t**2).mean() for t in leaves(model(*example)) if t.is_floating_point()]).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss.backward()
    gradients = [p.grad for p in parameters if p.grad is not None]
    finite = bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients)
    moving = next((p for p in parameters if p.grad is not None and bool(p.grad.any())), None)
    if moving is None:
        return False
    before = moving.detach().clone()
    torch.optim.SGD(parameters, lr=0.1).step()
    return finite and not torch.equal(before, moving)


def main_reasons(model: nn.Module, structure: nas_gate.Structure, most: int = 3) -> str:
    """The reasons that fix the most, each with the share of the parameters that it fixes along some dimension."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    slots: Counter[tuple[str, str, int]] = Counter()
    for fixed in structure.fixed:
        reason = re.sub(r" in [\w.]+(?=[ ,:;)]|$)", "", fixed.reason)
        slots[reason, fixed.tensor, fixed.dim] += sizes.get(fixed.tensor, 0) * fixed.slots // fixed.size
    most_of: dict[tuple[str, str], int] = {}
    for (reason, tensor, _), elements in slots.items():
        most_of[reason, tensor] = max(elements, most_of.get((reason, tensor), 0))
    weight: Counter[str] = Counter()
    for (reason, _), elements in most_of.items():
        weight[reason] += elements
    total = sum(sizes.values())
    return "; ".join(f"{reason} ({w / total:.0%})" for reason, w in weight.most_common(most) if w / total >= 0.005)


def examine(name: str) -> Row:
    """All columns of one model."""
    row = Row(name, task_of(name))
    begin = time.perf_counter()
    try:
        _examine(row)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        row.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where})"
    row.seconds = round(time.perf_counter() - begin, 1)
    return row


def _examine(row: Row) -> None:
    torch.manual_seed(SEED)
    size = size_of(row.name, row.task)
    model = build(row.name, row.task)
    if row.task == "timm":
        size = smaller_size(row.name, model, size)
    row.input = "x".join(map(str, size))
    example = inputs(row.task, size, 1, SEED)
    pair = inputs(row.task, size, 2, SEED + 4)  # batch norm over 1x1 maps needs two
    randomize(model)
    calibrate(model, pair)

    structure = nas_gate.analyze(model, example)
    cost = nas_gate.CostModel(structure)
    row.traced = True
    row.macs, row.params = cost.total("macs"), cost.total("params")
    row.reachable = round(nas_gate.reachable_share(structure), 4)
    row.units, row.groups = structure.units, len(structure.groups)
    row.fixed_because = main_reasons(model, structure)

    fresh = inputs(row.task, size, 1, SEED + 1)
    gated = nas_gate.GatedModel(model, structure, example_inputs=(example, {})).eval()
    # `attach` would copy the weights, which are gigabytes in some models: here all share them
    gated.gates.weight.data.fill_(1.0)
    original = build(row.name, row.task).eval()
    original.load_state_dict(model.state_dict(), assign=True)
    row.gated = difference(outputs(original, fresh), outputs(gated, fresh)) <= 1e-6
    del original

    keep = random_keep(structure)
    gated.gates.weight.data = torch.where(keep, 1.0, -1.0)
    calibrate(gated, pair)
    removed = nas_gate.remove_with_proof(gated, keep)
    row.removed = True
    expected = outputs(gated, fresh)
    error = difference(expected, outputs(removed.model.eval(), fresh))
    row.error, row.equal = float(f"{error:.2g}"), error < TOLERANCE
    seen = difference(expected, outputs(gated, example))
    if not row.equal:
        error = difference_in_float64(gated, removed.model, fresh)
        row.error_float64, row.equal = float(f"{error:.2g}"), error < 1e-9
    row.sensitivity = float(f"{seen:.2g}")
    if seen < 100 * max(error, 1e-6):
        row.equal, row.failure = False, "the outputs hardly depend on the inputs: their equality says nothing"

    predicted = [round(float(cost(keep, metric))) for metric in ("macs", "params")]
    counted = [nas_gate.count_macs(removed.model, fresh), sum(p.numel() for p in removed.model.parameters())]
    row.cost_exact = predicted == counted
    row.macs_kept, row.params_kept = (round(c / d, 4) for c, d in zip(counted, (row.macs, row.params)))
    if not row.cost_exact and not row.failure:
        row.failure = f"{predicted=}, {counted=}"
    small = removed.model
    del gated, removed, model
    row.trained = train_step(small, row.task, size)


# -- all models ---------------------------------------------------------------------------------------------------


def run_apart(name: str, timeout: float) -> Row:
    """`examine` in a process of its own."""
    begin = time.perf_counter()
    command = [sys.executable, "-W", "ignore", __file__, "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    failure = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if lines:
            return Row(**json.loads(lines[-1]))
        failure = f"exit status {done.returncode}: {' '.join(done.stderr.split())[-300:]}"
    except subprocess.TimeoutExpired:
        failure = f"not done after {timeout:.0f} s"
    return Row(name, task_of(name), failure=failure, seconds=round(time.perf_counter() - begin, 1))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a result, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def passes(row: dict[str, str]) -> bool:
    return all(row[c] == "True" for c in CHECKS)


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table: per task the models that pass each column, and the reachable share of MACs."""
    lines = [
        "| task | models | traced | gated | removed | equal | cost exact | trained | MACs in reach (median, lowest) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        if not mine:
            continue
        shares = sorted((float(r["reachable"]), r["name"]) for r in mine if r["reachable"])
        counts = " | ".join(str(sum(r[c] == "True" for r in mine)) for c in CHECKS)
        reach = f"{shares[len(shares) // 2][0]:.1%}, {shares[0][0]:.1%} ({shares[0][1]})" if shares else ""
        lines.append(f"| {task.replace('_', ' ')} | {len(mine)} | {counts} | {reach} |")
    total = " | ".join(str(sum(r[c] == "True" for r in rows)) for c in CHECKS)
    lines.append(f"| **all** | {len(rows)} | {total} | |")
    errors = [float(r["error"]) for r in rows if r["error"] and not r["error_float64"]]
    lines += ["", f"{sum(map(passes, rows))} of {len(rows)} pass every column."]
    if errors:
        lines[-1] += f" Largest relative error of those equal in float32: {max(errors):.1e}."
    wide = [r["name"] for r in rows if r["error_float64"] and r["equal"] == "True"]
    if wide:
        lines[-1] += f" Equal in float64 only: {', '.join(wide)}."
    lines += [f"- {r['name']}: {r['failure'] or 'fails a column'}" for r in rows if not passes(r)]
    low = [r for r in rows if r["reachable"] and float(r["reachable"]) < 0.95]
    if low:
        lines += ["", "Below 95%, and what is fixed there (share of parameters):", ""]
        lines += [f"- {r['name']} {float(r['reachable']):.1%}: {r['fixed_because']}" for r in low]
    return "\n".join(lines)


def chosen(only: str, sample: bool, timm: bool) -> list[str]:
    """Names in the order in which they run."""
    if timm:
        return [n for n in (TIMM + m for m in TIMM_FAMILIES) if re.search(only, n)]
    names = list(FAMILIES) if sample else torchvision.models.list_models()
    names = [n for n in names if re.search(only, n)]
    return sorted(names, key=lambda n: (bool(re.search(LAST, n)), task_of(n) != "classification", n))


def sweep(names: Sequence[str], output: Path, timeout: float, again: bool) -> None:
    """Add the missing rows (with `again`, replace those there are), one model at a time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = {r["name"]: r for r in read(output)}
    due = [n for n in names if again or n not in rows]
    if due:
        _environment.write(output.with_suffix(".json"), seed=SEED, threads=1)
    for number, name in enumerate(due, 1):
        row = {column: str(value) for column, value in dataclasses.asdict(run_apart(name, timeout)).items()}
        rows[name] = row
        write(output, sorted(rows.values(), key=lambda r: (TASKS.index(r["task"]), r["name"])))
        failed = [c for c in CHECKS if row[c] != "True"]
        verdict = f"FAILS {', '.join(failed)}: {row['failure']}" if failed else "passes"
        print(
            f"[{number}/{len(due)}] {name}: {verdict}; in reach {row['reachable']}, error {row['error']}, "
            f"{row['seconds']} s",
            file=sys.stderr,
            flush=True,
        )


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Replace the file at once, so that a kill never leaves half of it."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="names that match (search)")
    parser.add_argument("--family-sample", action="store_true", help="one model per family")
    parser.add_argument("--timm", action="store_true", help="one model of every family of timm")
    parser.add_argument("--again", action="store_true", help="replace rows that are there already")
    parser.add_argument("--output", type=Path, help="default: torchvision.csv or timm.csv in results/coverage")
    parser.add_argument("--timeout", type=float, default=900, help="seconds per model")
    parser.add_argument("--summary", type=Path, metavar="CSV", help="only print the Markdown table of a result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        print(json.dumps(dataclasses.asdict(examine(arguments.one))))
        return 0
    if arguments.summary:
        print(summary(read(arguments.summary)))
        return 0
    names = chosen(arguments.only, arguments.family_sample, arguments.timm)
    library = "timm" if arguments.timm else "torchvision"
    if not names:
        parser.error(f"--only must match a name of {library}, but {arguments.only!r} matches none")
    output = arguments.output or ROOT / f"results/coverage/{library}.csv"
    sweep(names, output, arguments.timeout, arguments.again)
    rows = [r for r in read(output) if r["name"] in names]
    print(summary(rows))
    return 0 if all(map(passes, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
