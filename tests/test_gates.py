"""One contract that every gate keeps, then what each promises of its own."""

import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas_gate.gates import (
    GATES,
    SHAPES,
    AnnealedSigmoid,
    GumbelSigmoid,
    HardConcrete,
    TrainableGate,
    make_gate,
)


def steep(weight: Tensor) -> Tensor:
    """A shape of a user's own, negative in places and above 1 in others."""
    return 2 * torch.cos(3 * weight)


# The shapes' values and derivatives, written in plain arithmetic apart from the module's torch code.
def _logistic(w: float) -> float:
    return 1 / (1 + math.exp(-w))


SHAPE_VALUES: dict[str, Callable[[float], float]] = {
    "constant": lambda w: 1.0,
    "sigmoid": lambda w: math.exp(-w) / (1 + math.exp(-w)) ** 2,
    "triangle": lambda w: max(0.0, 1 - abs(w)),
    "gaussian": lambda w: math.exp(-0.5 * w * w),
    "steep": lambda w: 2 * math.cos(3 * w),
}
SHAPE_SLOPES: dict[str, Callable[[float], float]] = {
    "constant": lambda w: 0.0,
    "sigmoid": lambda w: _logistic(w) * (1 - _logistic(w)) * (1 - 2 * _logistic(w)),
    "triangle": lambda w: -math.copysign(1, w) if abs(w) < 1 else 0.0,
    "gaussian": lambda w: -w * math.exp(-0.5 * w * w),
    "steep": lambda w: -6 * math.sin(3 * w),
}
SHAPE_ARGUMENTS = {**{name: name for name in SHAPES}, "steep": steep}

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"trainable-{form}-{name}": lambda shape=shape, form=form: make_gate("trainable", shape=shape, form=form)
        for form in ("limit", "finite")
        for name, shape in SHAPE_ARGUMENTS.items()
    },
    "gumbel": lambda: make_gate("gumbel"),
    "hard_concrete": lambda: make_gate("hard_concrete"),
    "annealed_sigmoid": lambda: make_gate("annealed_sigmoid"),
}
HARD = [name for name in BUILDERS if name.startswith("trainable-limit")] + ["gumbel"]
WEIGHTS = torch.tensor([-30.0, -3.0, -1.0, -0.5, -0.0125, 0.0, 0.0125, 0.5, 1.0, 3.0, 30.0])


@pytest.fixture(params=BUILDERS)
def gate(request):
    return BUILDERS[request.param]()


def derivative(gate: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Derivative of each entry of keep by its own gate weight, by one backward pass."""
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(gate(weight).sum(), weight)[0]


def logistic_noise(seed: int, like: Tensor) -> Tensor:
    """The noise that a gate draws after `manual_seed(seed)`: uniform numbers through the inverse logistic."""
    torch.manual_seed(seed)
    uniform = torch.rand(like.shape, dtype=like.dtype)
    return torch.log(uniform) - torch.log1p(-uniform)


def central_difference(f: Callable[[Tensor], Tensor], at: Tensor, step: float) -> Tensor:
    return (f(at + step) - f(at - step)) / (2 * step)


class TestContract:
    def test_says_which_gates_are_hard(self):
        assert [name for name, build in BUILDERS.items() if build().hard] == HARD

    def slack(self, gate) -> float:
        """How far keep may lie off [0, 1]: max |g| / M for the finite form (no shape here passes 2)."""
        return 2 / gate.m if getattr(gate, "form", None) == "finite" else 0.0

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("progress", [0.0, 1.0])
    def test_range_shape_and_dtype(self, gate, training, progress):
        gate.train(training).set_progress(progress)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            keep = gate(WEIGHTS.to(dtype).repeat(50))
            assert keep.shape == (11 * 50,)
            assert keep.dtype == dtype
            assert keep.min() >= -self.slack(gate)
            assert keep.max() <= 1 + self.slack(gate)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("gate", HARD, indirect=True)
    def test_hard_gates_are_exactly_zero_or_one(self, gate, dtype):
        # Near the step, where rounding would show; the logistic noise reaches both sides.
        weight = torch.linspace(-4, 4, 2001).to(dtype)
        keep = gate(weight)
        assert set(keep.tolist()) == {0.0, 1.0}
        assert torch.equal(gate.eval()(weight), (weight > 0).to(dtype))

    def test_open_in_eval_mode_exactly_where_weight_is_positive(self, gate):
        gate.eval()
        for progress in (0.0, 0.5, 1.0):
            gate.set_progress(progress)
            assert torch.equal(gate(WEIGHTS) > 0.5, WEIGHTS > 0)

    def test_starts_open_and_able_to_learn(self, gate):
        start = torch.full((4,), gate.initial)
        gate.eval()
        keep = gate(start)
        assert torch.all(keep == 1) if gate.hard else torch.all((keep - 1).abs() < 0.02)
        gate.train()
        torch.manual_seed(0)
        assert torch.any(derivative(gate, start.repeat(64)) != 0)

    def test_eval_mode_is_deterministic_and_draws_nothing(self, gate):
        gate.eval()
        before = torch.get_rng_state()
        assert torch.equal(gate(WEIGHTS), gate(WEIGHTS))
        assert torch.equal(torch.get_rng_state(), before)

    def test_seed_decides_the_draw(self, gate):
        weight = torch.zeros(64)
        torch.manual_seed(1)
        first, second = gate(weight), gate(weight)
        torch.manual_seed(1)
        assert torch.equal(gate(weight), first)
        assert torch.equal(gate(weight), second)
        assert torch.equal(first, second) != isinstance(gate, GumbelSigmoid | HardConcrete)

    # Without the shape that pushes the other way where it is negative.
    @pytest.mark.parametrize("gate", [name for name in BUILDERS if "steep" not in name], indirect=True)
    def test_closed_gate_opens_again(self, gate):
        """Plain SGD on a loss that wants the units open lifts closed gate weights above 0."""
        torch.manual_seed(0)
        weight = nn.Parameter(torch.full((8,), -0.5))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            (1 - gate(weight)).sum().backward()
            optimizer.step()
        gate.eval()
        assert torch.all(gate(weight) > 0.5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_autocast_changes_nothing(self, gate, dtype):
        """Same value, gradient and dtypes inside bf16 autocast as outside."""

        def run() -> tuple[Tensor, Tensor]:
            torch.manual_seed(0)
            weight = WEIGHTS.to(dtype, copy=True).requires_grad_()
            keep = gate(weight)
            (keep * 2).sum().backward()
            assert weight.grad is not None
            return keep.detach(), weight.grad

        outside = run()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run()
        for a, b in zip(outside, inside):
            assert a.dtype == b.dtype == dtype
            assert torch.equal(a, b)
            assert torch.isfinite(a).all()

    def test_learns_through_an_autocast_product(self, gate):
        """As gates are used: times a weight that autocast then lowers to bf16."""
        gate.eval()
        start = torch.tensor([-0.5, 0.25, 0.5])

        def slope() -> Tensor:
            weight = start.clone().requires_grad_()
            inputs, consumer = torch.tensor([[1.0, 2.0, -3.0]]), torch.tensor([[0.5, -1.0, 2.0]])
            nn.functional.linear(inputs, consumer * gate(weight)).sum().backward()
            assert weight.grad is not None
            return weight.grad

        plain = slope()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = slope()
        assert lowered.dtype == torch.float32
        torch.testing.assert_close(lowered, plain, rtol=0.02, atol=0)
        torch.testing.assert_close(plain, derivative(gate, start) * torch.tensor([0.5, -2.0, -6.0]))

    def test_half_precision_weights_get_the_float32_gradient(self, gate):
        weight = torch.tensor([-0.5, -0.25, 0.25, 0.5])  # exact in every dtype here
        torch.manual_seed(0)
        wide = derivative(gate, weight)
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(0)
            assert torch.equal(derivative(gate, weight.to(dtype)), wide.to(dtype))

    def test_state_dict_round_trip(self, gate):
        gate.set_progress(0.75)
        file = io.BytesIO()
        torch.save(gate.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(gate)
        other.set_progress(0.0)
        other.load_state_dict(torch.load(file, weights_only=True))
        torch.manual_seed(0)
        expected, expected_slope = gate(WEIGHTS), derivative(gate, WEIGHTS)
        torch.manual_seed(0)
        assert torch.equal(other(WEIGHTS), expected)
        assert torch.equal(derivative(other, WEIGHTS), expected_slope)

    def test_deepcopy_is_equal_and_apart(self, gate):
        twin = copy.deepcopy(gate)
        torch.manual_seed(0)
        expected = derivative(gate, WEIGHTS)
        twin.set_progress(1.0)
        torch.manual_seed(0)
        assert torch.equal(derivative(gate, WEIGHTS), expected)
        twin.set_progress(0.0)
        torch.manual_seed(0)
        assert torch.equal(derivative(twin, WEIGHTS), expected)

    def test_has_no_parameters_and_leaves_its_input_alone(self, gate):
        weight = WEIGHTS.clone()
        gate(weight)
        assert torch.equal(weight, WEIGHTS)
        assert list(gate.parameters()) == []
        assert "\n" not in repr(gate)

    def test_two_uses_add_their_gradients(self, gate):
        gate.eval()
        weight = torch.tensor([-0.3, 0.4], requires_grad=True)
        (gate(weight) + 2 * gate(weight)).sum().backward()
        torch.testing.assert_close(weight.grad, 3 * derivative(gate, weight.detach()))

    def test_func_transforms(self, gate):
        gate.eval()
        weight = torch.tensor([-0.7, -0.2, 0.3, 0.6])
        expected = derivative(gate, weight)
        close = torch.testing.assert_close
        close(torch.func.grad(lambda w: gate(w).sum())(weight), expected)
        close(torch.func.vmap(torch.func.grad(gate))(weight), expected)
        close(torch.func.vmap(gate)(weight.reshape(2, 2)), gate(weight).reshape(2, 2))
        close(torch.func.jacrev(gate)(weight), torch.diag(expected))

    @pytest.mark.parametrize("training", [True, False])
    def test_compiles_to_one_graph(self, gate, training):
        torch._dynamo.reset()
        gate.train(training)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations are not this test's business
            compiled = torch.compile(gate, backend="eager", fullgraph=True)
            for progress in (0.0, 0.5):
                gate.set_progress(progress)
                torch.manual_seed(0)
                value, slope = compiled(WEIGHTS), derivative(compiled, WEIGHTS)
                torch.manual_seed(0)
                assert torch.equal(value, gate(WEIGHTS))
                assert torch.equal(slope, derivative(gate, WEIGHTS))

    @pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
    def test_progress_outside_0_to_1(self, gate, progress):
        with pytest.raises(ValueError, match=rf"`0 <= progress <= 1` must hold, but got progress={progress}"):
            gate.set_progress(progress)


class TestTrainableGate:
    @pytest.mark.parametrize("name", SHAPE_ARGUMENTS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_limit_form_has_derivative_g(self, name, dtype):
        gate = TrainableGate(SHAPE_ARGUMENTS[name])
        weight = WEIGHTS.to(dtype)
        expected = [SHAPE_VALUES[name](w) for w in weight.tolist()]
        torch.testing.assert_close(derivative(gate, weight), torch.tensor(expected, dtype=dtype))

    def test_limit_form_with_constant_shape_is_the_straight_through_estimator(self):
        """What comes down reaches the gate weights unchanged, as if the gate were the identity."""
        torch.manual_seed(0)
        weight = torch.randn(50, requires_grad=True)
        incoming = torch.randn(50)
        keep = TrainableGate("constant", "limit")(weight)
        assert torch.equal(keep, (weight > 0).float())
        keep.backward(incoming)
        assert torch.equal(weight.grad, incoming)

    @pytest.mark.parametrize("name", SHAPE_ARGUMENTS)
    def test_limit_form_differentiates_twice(self, name):
        weight = torch.tensor([-0.7, -0.2, 0.3, 0.6], dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(TrainableGate(SHAPE_ARGUMENTS[name])(weight).sum(), weight, create_graph=True)
        # Added to 0 * w, for the constant shape's derivative does not depend on w at all.
        (second,) = torch.autograd.grad((first + 0 * weight).sum(), weight)
        expected = torch.tensor([SHAPE_SLOPES[name](w) for w in weight.tolist()], dtype=torch.float64)
        torch.testing.assert_close(second, expected)

    def test_finite_form_by_hand(self):
        """M = 4, g = 1: at 0.3, 4 w = 1.2, s = 0.2 / 4; at -0.3, 4 w = -1.2, floor -2, s = 0.8 / 4."""
        gate = TrainableGate("constant", "finite", m=4)
        weight = torch.tensor([0.3, -0.3, 0.25, 0.0], dtype=torch.float64)
        expected = torch.tensor([1.05, 0.2, 1.0, 0.0], dtype=torch.float64)
        torch.testing.assert_close(gate(weight), expected)

    @pytest.mark.parametrize("name", SHAPE_ARGUMENTS)
    @pytest.mark.parametrize("m", [1.0, 7.0, 1e3, 1e5])
    def test_finite_form_has_derivative_g_plus_s_times_g_prime(self, name, m):
        gate = TrainableGate(SHAPE_ARGUMENTS[name], "finite", m=m)
        torch.manual_seed(0)
        # Within one tooth: the tooth's number, plus a place well away from its two jumps.
        place = 0.2 + 0.6 * torch.rand(200, dtype=torch.float64)
        tooth = torch.randint(math.ceil(-2 * m), math.floor(2 * m), (200,), dtype=torch.float64)
        weight = (tooth + place) / m
        weight = weight[((weight.abs() - 1).abs() > 0.2 / m) & (weight.abs() > 0.1 / m)]  # not at a kink of g
        assert len(weight) > 100
        slope = derivative(gate, weight)

        numeric = central_difference(gate, weight, 1e-3 / m)
        torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)
        formula = [
            SHAPE_VALUES[name](w) + (m * w - math.floor(m * w)) / m * SHAPE_SLOPES[name](w) for w in weight.tolist()
        ]
        torch.testing.assert_close(slope, torch.tensor(formula, dtype=torch.float64), rtol=1e-9, atol=1e-9)

    @settings(deadline=None)
    @given(
        weight=st.floats(-10, 10),
        m=st.floats(1, 1e6),
        name=st.sampled_from(sorted(SHAPE_ARGUMENTS)),
    )
    def test_finite_form_is_within_g_over_m_of_the_step(self, weight, m, name):
        """Uniform convergence: |TG - b| <= |g| / M for every weight (up to rounding near 1)."""
        gate = TrainableGate(SHAPE_ARGUMENTS[name], "finite", m=m)
        value = gate(torch.tensor([weight], dtype=torch.float64)).item()
        assert abs(value - (weight > 0)) <= abs(SHAPE_VALUES[name](weight)) / m + 1e-15

    @settings(deadline=None)
    @given(weight=st.floats(-3, 3), name=st.sampled_from(["sigmoid", "gaussian", "steep"]))
    def test_finite_derivative_goes_to_the_limit_form_as_m_grows(self, weight, name):
        """|g + s g' - g| <= |g'| / M."""
        at = torch.tensor([weight], dtype=torch.float64)
        limit = derivative(TrainableGate(SHAPE_ARGUMENTS[name]), at)
        for m in (10.0, 1e3, 1e5):
            finite = derivative(TrainableGate(SHAPE_ARGUMENTS[name], "finite", m=m), at)
            assert (finite - limit).abs().item() <= abs(SHAPE_SLOPES[name](weight)) / m + 1e-12

    def test_finite_form_is_not_called_hard(self):
        gate = TrainableGate("constant", "finite", m=10)
        assert not gate.hard
        assert gate(torch.tensor([0.05])).item() == pytest.approx(1.05)
        assert TrainableGate("constant", "limit").hard

    def test_closed_gates_get_the_gradient_that_open_ones_get(self):
        for name in SHAPES:
            slope = derivative(TrainableGate(name), torch.tensor([-0.4, 0.4]))
            assert slope[0] == slope[1] > 0

    def test_shapes_gradient_is_not_needed(self):
        """The limit form asks for g alone, so a shape need not be differentiable."""
        gate = TrainableGate(lambda w: (w.abs() < 1).to(w.dtype))
        assert derivative(gate, torch.tensor([-2.0, -0.5, 0.5, 2.0])).tolist() == [0, 1, 1, 0]

    def test_unknown_shape(self):
        with pytest.raises(ValueError, match=r"'box'; known: constant, gaussian, sigmoid, triangle"):
            TrainableGate("box")

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="`form` must be 'limit' or 'finite', but got 'exact'"):
            make_gate("trainable", form="exact")

    @pytest.mark.parametrize("m", [0, -1, math.inf, math.nan])
    def test_bad_m(self, m):
        with pytest.raises(ValueError, match=rf"`0 < m < inf` must hold, but got m={m}"):
            TrainableGate(m=m)


class TestGumbelSigmoid:
    @pytest.mark.parametrize(("progress", "temperature"), [(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)])
    def test_value_and_gradient_against_the_formula(self, progress, temperature):
        gate = GumbelSigmoid(temperature_start=2.0, temperature_end=0.5)
        gate.set_progress(progress)
        weight = torch.linspace(-3, 3, 101, dtype=torch.float64)
        logit = weight + logistic_noise(3, weight)
        soft = 1 / (1 + torch.exp(-logit / temperature))

        torch.manual_seed(3)
        assert torch.equal(gate(weight), (logit > 0).double())
        torch.manual_seed(3)
        torch.testing.assert_close(derivative(gate, weight), soft * (1 - soft) / temperature)

    def test_gradient_in_eval_mode_is_the_noise_free_one(self):
        weight = torch.tensor([-1.0, 2.0])
        soft = 1 / (1 + torch.exp(-weight))
        torch.testing.assert_close(derivative(GumbelSigmoid().eval(), weight), soft * (1 - soft))

    def test_is_open_with_probability_sigmoid(self):
        torch.manual_seed(0)
        for weight in (-2.0, 0.0, 1.0):
            share = GumbelSigmoid()(torch.full((40_000,), weight)).mean().item()
            assert share == pytest.approx(_logistic(weight), abs=0.01)  # 4 standard errors

    def test_extreme_draws_stay_finite(self, monkeypatch):
        for uniform in (0.0, 1 - 2**-24):
            monkeypatch.setattr(torch, "rand_like", lambda like, u=uniform: torch.full_like(like, u))
            for gate in (GumbelSigmoid(), HardConcrete()):
                assert torch.isfinite(gate(WEIGHTS)).all()
                assert torch.isfinite(derivative(gate, WEIGHTS)).all()


class TestHardConcrete:
    def test_value_and_gradient_against_the_formula(self):
        weight = torch.linspace(-4, 4, 201, dtype=torch.float64)
        soft = 1 / (1 + torch.exp(-(weight + logistic_noise(5, weight)) / (2 / 3)))
        stretched = soft * (1.1 - -0.1) + -0.1  # the paper's zeta and gamma
        inside = (stretched > 0) & (stretched < 1)
        assert 20 < inside.sum() < 180

        gate = HardConcrete()
        torch.manual_seed(5)
        torch.testing.assert_close(gate(weight), stretched.clamp(0, 1))
        torch.manual_seed(5)
        expected = torch.where(inside, 1.2 * soft * (1 - soft) / (2 / 3), 0.0)
        torch.testing.assert_close(derivative(gate, weight), expected)

    def test_estimate_in_eval_mode(self):
        """clip(1.2 sigmoid(w) - 0.1, 0, 1), with sigmoid(log 3) = 3/4 and sigmoid(log 99) = 0.99."""
        weight = torch.tensor([math.log(3), -math.log(3), 0.0, math.log(99), -math.log(99)])
        expected = torch.tensor([0.8, 0.2, 0.5, 1.0, 0.0])
        torch.testing.assert_close(HardConcrete().eval()(weight), expected)

    def test_share_of_draws_that_are_exactly_0_or_1(self):
        """P(keep = 0) = sigmoid(beta log(0.1 / 1.1) - w), the complement of the paper's L0 term; at w = 0."""
        torch.manual_seed(0)
        keep = HardConcrete()(torch.zeros(40_000))
        expected = _logistic(2 / 3 * math.log(0.1 / 1.1))
        assert (keep == 0).float().mean().item() == pytest.approx(expected, abs=0.01)
        assert (keep == 1).float().mean().item() == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize("name", ["beta", "stretch"])
    @pytest.mark.parametrize("value", [0, -0.5, math.inf])
    def test_bad_numbers(self, name, value):
        with pytest.raises(ValueError, match=rf"`0 < {name} < inf` must hold, but got {name}={value}"):
            make_gate("hard_concrete", **{name: value})


class TestAnnealedSigmoid:
    @pytest.mark.parametrize(("progress", "temperature"), [(0.0, 1.0), (0.5, 0.1), (1.0, 0.01)])
    @pytest.mark.parametrize("training", [True, False])
    def test_value_and_gradient_against_the_formula(self, progress, temperature, training):
        gate = AnnealedSigmoid(temperature_start=1.0, temperature_end=0.01).train(training)
        gate.set_progress(progress)
        weight = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
        soft = 1 / (1 + torch.exp(-weight / temperature))
        # The temperature is float32, as the progress buffer is.
        torch.testing.assert_close(gate(weight), soft, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(derivative(gate, weight), soft * (1 - soft) / temperature, rtol=1e-4, atol=1e-5)

    def test_hardens_with_progress(self):
        gate = AnnealedSigmoid()
        weight = torch.tensor([-0.1, 0.1])
        gate.set_progress(1.0)
        torch.testing.assert_close(gate(weight), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-6)

    def test_initial_follows_the_start_temperature(self):
        for start in (0.5, 1.0, 8.0):
            gate = AnnealedSigmoid(temperature_start=start)
            assert gate(torch.tensor(gate.initial)).item() == pytest.approx(_logistic(4))


@pytest.mark.parametrize("name", ["gumbel", "annealed_sigmoid"])
class TestTemperatures:
    @pytest.mark.parametrize("end", [0, -1.0, math.nan])
    def test_end_must_be_positive(self, name, end):
        with pytest.raises(ValueError, match=rf"`0 < temperature_end < inf` must hold, but got .*={end}"):
            make_gate(name, temperature_end=end)

    @pytest.mark.parametrize("start", [-1.0, 0.1, math.inf, math.nan])
    def test_start_must_not_lie_below_end(self, name, start):
        with pytest.raises(ValueError, match=rf"must hold, but got \(temperature_start={start}, temperature_end=0.2"):
            make_gate(name, temperature_start=start, temperature_end=0.2)


class TestMakeGate:
    def test_builds_each_by_name(self):
        assert {name: type(make_gate(name)) for name in GATES} == GATES

    def test_passes_arguments(self):
        gate = make_gate("trainable", shape="gaussian", form="finite", m=10.0)
        assert (gate.shape, gate.form, gate.m) == (SHAPES["gaussian"], "finite", 10.0)

    def test_unknown_name(self):
        known = "annealed_sigmoid, gumbel, hard_concrete, trainable"
        with pytest.raises(ValueError, match=rf"unknown gate 'soft'; known: {known}"):
            make_gate("soft")

    def test_unknown_argument(self):
        with pytest.raises(TypeError, match="temperature"):
            make_gate("trainable", temperature=1.0)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_values(name):
    weight = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = torch.tensor([SHAPE_VALUES[name](w) for w in weight.tolist()], dtype=torch.float64)
    torch.testing.assert_close(SHAPES[name](weight), expected)
