import copy
import io
import math
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from rich.console import Console
from torch import Tensor, nn

from nas_gate import tasks, training
from nas_gate.data.loaders import TensorLoader
from nas_gate.errors import Diverged, Refused
from nas_gate.training import Hardware, Recipe, connect, fit

CPU = Hardware(accelerator="cpu", channels_last=False)

# The same small problem for this process and for those that are started and killed.
PROBLEM = textwrap.dedent(
    """
    import os, signal, socket, sys
    import torch
    from pathlib import Path
    from torch import nn
    from nas_gate.data.loaders import TensorLoader
    from nas_gate.training import (
        Hardware, Recipe, connect, fit, optimiser, read_checkpoint, seed_everything)
    from nas_gate.tasks import cross_entropy

    RECIPE = Recipe(epochs=4, learning_rate=0.05, momentum=0.9)

    def loader(shuffle=True):
        rng = torch.Generator().manual_seed(1)
        y = torch.randint(3, (24,), generator=rng)
        x = torch.randn(24, 2, 4, 4, generator=rng) + y[:, None, None, None]
        return TensorLoader(x, y, batch_size=8, mean=[0, 0], std=[1, 1], shuffle=shuffle, seed=3)

    def network(norm=True, dropout=0.2):
        seed_everything(5)
        middle = [nn.BatchNorm2d(6)] if norm else []
        return nn.Sequential(nn.Conv2d(2, 6, 3), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Flatten(),
                             nn.Linear(24, 3))

    class Counter:
        # a controller with a state of its own; `kill` is the step at which this process dies
        def __init__(self, kill=-1):
            self.steps, self.kill, self.moments = 0, kill, []
        def before_step(self, epoch):
            self.moments.append(epoch)
            if self.steps == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
        def loss(self):
            return torch.tensor(0.01 * self.steps)
        def after_step(self):
            self.steps += 1
        def figures(self):
            return {"steps": float(self.steps)}
        def state_dict(self):
            return {"steps": self.steps}
        def load_state_dict(self, state):
            self.steps = state["steps"]

    def train(module, checkpoint=None, *, epochs=range(4), controller=None, fabric=None, data=None, **more):
        fabric = fabric or connect(Hardware(accelerator="cpu"))
        given = dict(objective=cross_entropy(0.1), schedule=RECIPE.schedule_function())
        data = data or loader()
        made = optimiser(module.parameters(), RECIPE)
        return fit(module, data, loader(False), fabric=fabric, optimisers=[made], epochs=epochs,
                   controller=controller, checkpoint=checkpoint, **{**given, **more})
    """
)
problem: dict = {}
exec(PROBLEM, problem)
loader, network, train, Counter = (problem[name] for name in ("loader", "network", "train", "Counter"))


def run(script: str, *arguments: object) -> None:
    """Run PROBLEM and `script` in a process of its own, which may fork: nothing in it has started threads."""
    command = [sys.executable, "-c", PROBLEM + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- schedules, optimisers, objectives ---


def test_schedules_at_hand_computed_places():
    assert [training.one_cycle(10, 2)(e) for e in (1, 2, 6, 10)] == [0.5, 1.0, 0.5, 0.0]
    assert [training.cosine(10, 2)(e) for e in (1, 2, 6)] == pytest.approx([0.5, 1.0, 0.5])
    assert training.cosine(10, 2)(10) == pytest.approx(0.0, abs=1e-12)
    assert [training.constant(10, 2)(e) for e in (1, 2, 9)] == [0.5, 1.0, 1.0]
    assert training.one_cycle(10, 0)(0) == 1.0
    assert training.one_cycle(10, 2)(0) == 0.01  # a first step at rate 0 would be wasted


@pytest.mark.parametrize("name", training.OPTIMISERS)
def test_biases_and_norms_do_not_decay(name: str):
    module = network()
    module[0].weight.requires_grad_(False)
    made = training.optimiser(module.parameters(), Recipe(epochs=1, optimiser=name, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    expected = {id(p): 0.3 if p.ndim > 1 else 0.0 for p in module.parameters() if p.requires_grad}
    assert decay == expected


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"epochs": -1}, "epochs >= 0"),
        ({"optimiser": "adamm"}, "one of .*adamw.* got 'adamm'"),
        ({"schedule": "step"}, "one of .*one_cycle"),
        ({"learning_rate": -1.0}, r"learning_rate > 0.*-1\.0"),
        ({"warmup": 1.0}, "warmup < 1"),
        ({"clip_norm": -1.0}, "clip_norm >= 0"),
    ],
)
def test_recipe_names_what_is_wrong(wrong: dict, rule: str):
    with pytest.raises(ValueError, match=rule):
        Recipe(**{"epochs": 1, **wrong})


def test_distillation_is_hintons_formula():
    teacher, x = nn.Linear(4, 3), torch.randn(5, 4)
    teacher.train()
    logits, y = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    objective = training.distilled(tasks.CLASSIFICATION, tasks.cross_entropy(), teacher, weight=0.25, temperature=2.0)
    p, q = (teacher(x) / 2).softmax(-1), (logits / 2).softmax(-1)
    by_hand = 0.75 * F.nll_loss(logits.log_softmax(-1), y) + 0.25 * 4 * (p * (p / q).log()).sum() / 5
    loss = objective(logits, x, y)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert teacher.weight.grad is None
    assert not teacher.training


def test_outputs_come_first_in_a_tuple_and_in_a_mapping():
    logits = torch.zeros(2, 3)
    assert training.output_of(logits) is logits
    assert training.output_of((logits, torch.ones(2, 3))) is logits
    assert training.output_of({"out": logits, "aux": torch.ones(2, 3)}) is logits


# --- evaluate ---


def test_evaluate_counts_every_example_once_whatever_the_batches():
    logits = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2], [2, 0, 0]])
    y = torch.tensor([0, 1, 0, 2, 1])
    data = TensorLoader(logits[:, :, None, None], y, batch_size=2, mean=[0] * 3, std=[1] * 3)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    result = training.evaluate(module, data, fabric=connect(CPU))
    assert (result.accuracy, result.examples) == (3 / 5, 5)
    right, wrong = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)
    assert result.loss == pytest.approx((3 * right + 2 * wrong) / 5)
    assert module.training  # its mode is put back


# --- fit ---


def test_history_reports_the_last_epochs_accuracy_of_this_very_network(tmp_path: Path):
    module = network()
    history = train(module)
    assert [entry.epoch for entry in history] == [0, 1, 2, 3]
    assert history[-1].accuracy == training.evaluate(module, loader(False), fabric=connect(CPU)).accuracy
    assert history[-1].loss < history[0].loss


def test_parts_of_one_cycle_share_the_learning_rate():
    rates = []

    def spy(epoch: float) -> float:
        rates.append(epoch)
        return 1.0

    module = network()
    train(module, epochs=range(1), schedule=spy)
    train(module, epochs=range(1, 3), schedule=spy)
    assert sorted(set(rates)) == pytest.approx([e + s / 3 for e in range(3) for s in range(3)])


def test_every_optimiser_follows_the_schedule_from_its_own_rate():
    module = network()
    weights = torch.optim.SGD(module[0].parameters(), lr=0.5)
    others = torch.optim.Adam([{"params": module[5].weight, "lr": 0.1}, {"params": module[5].bias}], lr=0.01)
    data = loader()
    fit(
        module,
        data,
        data,
        fabric=connect(CPU),
        optimisers=[weights, others],
        schedule=lambda epoch: 0.5,
        objective=tasks.cross_entropy(),
        epochs=range(1),
    )
    assert [group["lr"] for made in (weights, others) for group in made.param_groups] == [0.25, 0.05, 0.005]


def test_the_controllers_loss_trains_what_it_is_of():
    aside = nn.Parameter(torch.tensor(0.0))

    class Pull(Counter):
        def loss(self) -> Tensor:
            return (aside - 3) ** 2

    data, module = loader(), network()
    fit(
        module,
        data,
        data,
        fabric=connect(CPU),
        optimisers=[torch.optim.SGD(module.parameters(), lr=0.1), torch.optim.SGD([aside], lr=0.1)],
        schedule=lambda epoch: 1.0,
        objective=lambda outputs, inputs, targets: 0 * outputs.sum(),
        epochs=range(1),
        controller=Pull(),
    )
    assert float(aside.detach()) == pytest.approx(3 * (1 - 0.8**3))  # three steps of 0.2 of the way


def test_seeds_draw_other_batches_and_masks():
    first, second, again = (network() for _ in range(3))
    for module, seed in ((first, 0), (second, 1), (again, 0)):
        train(module, seed=seed)
    assert same(first, again)
    assert not same(first, second)


def clipped_step(module: nn.Module, x: Tensor, optimisers: list) -> None:
    """One step down 100 times the sum of the squared outputs, the gradient clipped to 0.1."""
    data = TensorLoader(x, torch.zeros(len(x), dtype=torch.int64), batch_size=len(x), mean=[0, 0], std=[1, 1])
    fit(
        module,
        data,
        data,
        fabric=connect(CPU),
        optimisers=optimisers,
        schedule=lambda epoch: 1.0,
        objective=lambda logits, x, y: 100 * logits.square().sum(),
        epochs=range(1),
        clip_norm=0.1,
    )


def test_clipping_is_of_the_first_optimiser():
    """The weights': gates have a rate of their own, and no other parameter's gradient must shrink theirs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(32, 4, bias=False), nn.Linear(4, 2, bias=False))
    x = torch.randn(8, 2, 4, 4)
    before = [layer.weight.detach().clone() for layer in module[1:]]
    wanted = torch.autograd.grad(100 * module(x).square().sum(), [layer.weight for layer in module[1:]])
    clipped_step(module, x, [torch.optim.SGD(layer.parameters(), lr=1.0) for layer in module[1:]])
    moved = [layer.weight.detach() - old for layer, old in zip(module[1:], before)]
    assert float(moved[0].norm()) == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(moved[1], -wanted[1])


def test_gradient_clipping_bounds_the_step():
    module = network(norm=False)
    before = [p.detach().clone() for p in module.parameters()]
    x = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    clipped_step(module, x, [torch.optim.SGD(module.parameters(), lr=1.0)])
    moved = torch.stack([(p.detach() - q).norm() for p, q in zip(module.parameters(), before)]).norm()
    assert float(moved) == pytest.approx(0.1, rel=1e-3)


def test_killed_at_any_moment_it_continues_to_the_same_result(tmp_path: Path):
    whole, counter = network(), Counter()
    history = train(whole, tmp_path / "whole.pt", controller=counter)
    checkpoint = tmp_path / "killed.pt"
    run(
        """
    checkpoint = Path(sys.argv[1])
    for kill, stored in ((1, None), (4, 1), (10, 3)):  # in the first, the second and the last epoch
        child = os.fork()
        if child == 0:
            train(network(), checkpoint, controller=Counter(kill))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        state = read_checkpoint(checkpoint)
        assert (state and len(state["history"])) == stored
        """,
        checkpoint,
    )
    resumed, counter = network(), Counter()
    torch.rand(7)  # whatever was drawn before must not matter
    continued = train(resumed, checkpoint, controller=counter)
    assert same(whole, resumed)
    assert [(e.loss, e.accuracy, e.figures) for e in continued] == [(e.loss, e.accuracy, e.figures) for e in history]
    assert counter.steps == 12
    assert min(counter.moments) == 3.0  # only the unfinished epoch was repeated


def test_a_finished_fit_is_not_repeated(tmp_path: Path):
    first, second, counter = network(), network(), Counter()
    history = train(first, tmp_path / "c.pt", controller=Counter())
    assert train(second, tmp_path / "c.pt", controller=counter) == history
    assert counter.moments == []
    assert same(first, second)


def test_nan_stops_the_stage_and_keeps_the_last_good_epoch(tmp_path: Path):
    checkpoint, steps = tmp_path / "c.pt", []

    def objective(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        steps.append(0)
        return F.cross_entropy(logits, y) * (math.nan if len(steps) == 8 else 1.0)

    module = network()
    with pytest.raises(Diverged, match=r"loss is nan at epoch 3, step 2\..*last good epoch is kept in .*c\.pt"):
        train(module, checkpoint, objective=objective)
    state = training.read_checkpoint(checkpoint)
    assert state is not None
    assert len(state["history"]) == 2
    assert all(t.isfinite().all() for t in state["module"].values())


def test_weights_that_overflow_in_the_last_step_are_not_stored(tmp_path: Path):
    def objective(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y) + (logits - logits.detach()).sum() * 3e38 * 3  # loss finite

    with pytest.raises(Diverged, match=r"'0\.weight' is not finite after epoch 1"):
        train(network(), tmp_path / "c.pt", objective=objective, data=one_batch())
    assert not (tmp_path / "c.pt").exists()


def one_batch() -> TensorLoader:
    x, y = next(iter(loader()))
    return TensorLoader(x, y, batch_size=8, mean=[0, 0], std=[1, 1])


def test_interrupt_leaves_the_checkpoint_intact(tmp_path: Path):
    class Interrupted(Counter):  # type: ignore[misc, valid-type]
        def before_step(self, epoch: float) -> None:
            if epoch >= 1.5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), tmp_path / "c.pt", controller=Interrupted())
    resumed, whole = network(), network()
    train(resumed, tmp_path / "c.pt", controller=Counter())
    train(whole, controller=Counter())
    assert same(resumed, whole)


def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path):
    (tmp_path / "c.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(Refused, match=r"checkpoint .*c\.pt cannot be read .*; delete it"):
        train(network(), tmp_path / "c.pt")


def test_a_checkpoint_of_another_network_is_a_clear_error(tmp_path: Path):
    train(network(), tmp_path / "c.pt")
    with pytest.raises(Refused, match=r"c\.pt holds another network; delete it to start the stage anew"):
        train(network(norm=False), tmp_path / "c.pt")


def test_bf16_autocast_trains_and_stores_float32(tmp_path: Path):
    module = network()
    fabric = connect(Hardware(accelerator="cpu", precision="bf16-mixed"))
    history = train(module, fabric=fabric)
    assert history[-1].loss < history[0].loss
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_channels_last_does_not_change_the_function():
    module, x = network(dropout=0.0), torch.randn(4, 2, 4, 4)
    expected = module(x)
    placed = training.place(module, connect(CPU), channels_last=True)
    assert placed is module
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("channels", [3, 7, 16])
def test_gradients_of_a_thin_strided_convolution_are_right(channels: int):
    module = thin(channels)
    assert_right_gradients(module, module)
    assert module[0].weight.is_contiguous() == (channels < 16)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_gradients_of_a_thin_strided_convolution_are_right_when_compiled():
    module = thin(3)
    assert_right_gradients(module, training.compiled(module, "default", connect(CPU)))


def thin(channels: int) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, channels, 3), nn.Conv2d(channels, 8, 1, stride=2))
    return training.place(module, connect(CPU), channels_last=True)


def assert_right_gradients(module: nn.Module, called: nn.Module) -> None:
    wide = copy.deepcopy(module).double()
    x = torch.randn(16, 2, 32, 32)
    called(x).square().mean().backward()
    wide(x.double()).square().mean().backward()
    for mine, exact in zip(module.parameters(), wide.parameters(), strict=True):
        assert mine.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own modules
def test_a_compiled_network_trains_to_the_same_weights(tmp_path: Path):
    """Also when it goes on from a checkpoint, and evaluation changes its mode in between."""
    plain, fast = network(dropout=0.0), network(dropout=0.0)
    train(plain)
    train(fast, tmp_path / "c.pt", epochs=range(2), compile_mode="default")
    history = train(fast, tmp_path / "c.pt", compile_mode="default")
    assert [epoch.epoch for epoch in history] == [0, 1, 2, 3]
    for (name, mine), theirs in zip(fast.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=name)


def test_weights_of_five_dimensions_keep_their_layout():
    module = training.place(nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv2d(4, 4, 3)), connect(CPU), channels_last=True)
    assert module[0].weight.is_contiguous()
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("field", "value"), [("accelerator", "mps"), ("precision", "16-mixed")])
def test_what_cannot_be_exact_is_refused(field: str, value: str):
    with pytest.raises(ValueError, match=rf"`{field}` must .*, but got '{value}'"):
        Hardware(**{field: value})


def test_the_accelerator_is_cuda_or_the_processor():
    assert connect(Hardware()).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_mode_of_the_compiler_is_refused():
    with pytest.raises(ValueError, match=r"`compile` must be null or one of .*'default'.*, but got 'fast'"):
        Hardware(compile="fast")


def test_two_processes_train_as_one(tmp_path: Path):
    """DDP over gloo: halves of each batch and averaged gradients give one process's result up to rounding."""
    alone = network(norm=False, dropout=0.0)
    history = train(alone)
    run(
        """
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="none")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    child = os.fork()
    rank = 0 if child else 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    fabric, folder = connect(Hardware(accelerator="cpu", devices=2, strategy="ddp")), Path(sys.argv[1])
    module = network(norm=False, dropout=0.0)
    history = train(module, folder / "c.pt", fabric=fabric, data=loader().shard(rank, 2))
    state = {"weights": module.state_dict(), "accuracy": history[-1].train_accuracy, "loss": history[-1].loss}
    torch.save(state, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        """,
        tmp_path,
    )
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in alone.state_dict().items():
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name])
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-4, atol=1e-5)
    assert results[0]["accuracy"] == history[-1].train_accuracy
    assert results[0]["loss"] == results[1]["loss"] == pytest.approx(history[-1].loss, rel=1e-4)
    state = training.read_checkpoint(tmp_path / "c.pt")
    assert state is not None
    assert len(state["history"]) == 4


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path):
    """Else it would wait at the next barrier, with its GPU, for half an hour."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, pathlib, time\n"
        "from nas_gate.training import Hardware, connect\n"
        "fabric = connect(Hardware(accelerator='cpu', devices=2, strategy='ddp'))\n"
        "pathlib.Path(f'{fabric.global_rank}.pid').write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    first = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    wait_for(lambda: all((tmp_path / f"{rank}.pid").exists() for rank in (0, 1)))
    second = int((tmp_path / "1.pid").read_text())
    os.kill(second, 0)  # it is there
    first.kill()
    first.wait()
    with pytest.raises(ProcessLookupError):
        wait_for(lambda: os.kill(second, 0))


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        (lambda: Hardware(strategy="fsdp"), r"`strategy` must be auto or one of ddp's.*fsdp"),
        (lambda: connect(Hardware(accelerator="cuda", devices=1000)), "(?i)gpu|cuda"),
    ],
)
def test_a_machine_that_is_not_there_is_refused(hardware: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        hardware()


def test_weights_of_1x1_convolutions_are_laid_out_as_their_gradients():
    module = training.place(nn.Conv2d(4, 8, 1), connect(Hardware(accelerator="cpu")), channels_last=True)
    module(torch.randn(2, 4, 5, 5)).sum().backward()
    assert module.weight.grad is not None
    assert module.weight.stride() == module.weight.grad.stride() == (4, 1, 4, 4)


# --- what is shown ---


def shown(*, terminal: bool, **more: object) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    train(network(), console=console, label="dense", **more)
    return text.getvalue()


def test_one_line_per_epoch_without_a_terminal():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("dense        epoch 1/4  loss ")
    assert "accuracy" in lines[-1]
    assert lines[-1].endswith("0 s left")


def test_a_bar_with_cost_against_target_on_a_terminal():
    class Priced(Counter):  # type: ignore[misc, valid-type]
        def figures(self) -> dict[str, float]:
            return {"cost": 0.75, "target": 0.5}

    text = shown(terminal=True, controller=Priced())
    assert "epoch 4/4" in text
    assert "cost 0.750 for 0.500" in text
