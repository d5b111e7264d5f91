"""What the Stiefel optimizers share: groups, batching, state, precision, refusals."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from soda.precision import full_fp32, tf32
from soda.stiefel import StiefelAdam, StiefelSGD, geometry

both = pytest.mark.parametrize("optimizer", [StiefelAdam, StiefelSGD])


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def frame(*shape, seed=0, dtype=torch.float64):
    return torch.nn.Parameter(torch.linalg.qr(noise(*shape, seed=seed)).Q.to(dtype))


def run(parameters, rule, seeds):
    for seed in seeds:
        for i, p in enumerate(parameters):
            p.grad = noise(*p.shape, seed=1000 + 100 * seed + i, dtype=p.dtype)
        rule.step()


@both
@given(leading=st.lists(st.sampled_from([(), (1,), (3,), (2, 2)]), min_size=1, max_size=4), n=st.integers(1, 5),
       more=st.integers(0, 2))  # fmt: skip
def test_parameters_of_one_size_are_stepped_as_if_alone(optimizer, leading, n, more):
    together = [frame(*lead, n + more, n, seed=i) for i, lead in enumerate(leading)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    run(together, optimizer(together, lr=0.02), range(3))
    rules = [optimizer([p], lr=0.02) for p in alone]
    for seed in range(3):
        for i, (p, rule) in enumerate(zip(alone, rules, strict=True)):
            p.grad = noise(*p.shape, seed=1000 + 100 * seed + i)
            rule.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@both
def test_one_size_takes_one_set_of_kernels(optimizer, monkeypatch):
    moved = []
    monkeypatch.setattr("soda.stiefel.optimizer.move", lambda xs, *rest: moved.extend(xs) or geometry.move(xs, *rest))
    bank = frame(3, 4, 4)
    parameters = [bank, frame(4, 4), frame(5, 5), frame(2, 2, 4, 4), frame(4, 4, dtype=torch.float32)]
    run(parameters, optimizer(parameters), [0])
    assert sorted(tuple(x.shape) for x in moved) == [(1, 4, 4), (1, 5, 5), (8, 4, 4)]
    moved.clear()
    run([bank], optimizer([bank]), [0])
    assert [x.data_ptr() for x in moved] == [bank.data_ptr()]


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch a kernel for: everything but views and empty memory."""

    NONE = ("new_empty", "view", "transpose", "diagonal", "slice", "split_with_sizes")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind, name = function.name().split(".")[0].split("::")
        self.count += kind == "aten" and name not in self.NONE
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("optimizer, most", [(StiefelAdam, 55), (StiefelSGD, 150)])
@pytest.mark.parametrize("steps", [1, 10_000])
def test_a_step_on_a_gpu_launches_little_and_waits_for_nothing(optimizer, most, steps):
    """SDXL's layout on tensors that pretend to be on a GPU and refuse to be looked at."""
    layout = {4: 500, 8: 260, 10: 60, 16: 360, 20: 360, 64: 140}
    with FakeTensorMode():
        banks = [torch.nn.Parameter(torch.empty(count, n, n, device="cuda")) for n, count in layout.items()]
        rule = optimizer(banks, lr=1e-3)
        counters = dict(rule.COUNTERS)
        for _ in range(steps - 1):
            counters = rule._count(counters, rule.param_groups[0])
        for bank in banks:
            bank.grad = torch.empty_like(bank)
            rule.state[bank].update(counters, **{name: torch.empty_like(bank) for name in rule.MOMENTS})
        with Launches() as launches:
            rule.step()
    assert 30 < launches.count <= most


@both
def test_a_parameter_of_any_layout_is_stepped_in_place(optimizer):
    plain = frame(3, 5, 4)
    start = plain.detach().clone(memory_format=torch.contiguous_format)
    stored = [start.mT.contiguous().mT, start.repeat_interleave(2, 0)[::2]]
    strided = [torch.nn.Parameter(x) for x in stored]
    run([plain], optimizer([plain]), range(3))
    for x, p in zip(stored, strided, strict=True):
        assert not p.is_contiguous()
        run([p], optimizer([p]), range(3))
        torch.testing.assert_close(p, plain, rtol=0, atol=1e-13)
        assert p.data_ptr() == x.data_ptr()


@both
def test_a_saved_run_goes_on_bit_by_bit(optimizer):
    """Through torch.save, with groups, several sizes, fp32 and fp64, and a parameter that came in later."""

    def parameters():
        return [frame(2, 4, 4), frame(3, 7, 7, dtype=torch.float32), frame(4, 4), frame(2, 6, 3), frame(3, 3)]

    def build(params):
        return optimizer([{"params": params[:1], "lr": 0.02, "retraction": "exp"}, {"params": params[1:]}], lr=0.005)

    whole, half = parameters(), parameters()
    rule = build(whole)
    run(whole[:4], rule, range(2))
    run(whole, rule, range(2, 8))
    rule = build(half)
    run(half[:4], rule, range(2))
    run(half, rule, range(2, 5))
    file = io.BytesIO()
    torch.save({"parameters": [p.detach() for p in half], "optimizer": rule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(p) for p in saved["parameters"]]
    resumed = build(again)
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@both
def test_a_copy_of_optimizer_and_parameters_runs_alike(optimizer):
    parameters = [frame(2, 4, 4), frame(5, 2)]
    rule = optimizer(parameters)
    run(parameters, rule, range(2))
    twins, twin = copy.deepcopy((parameters, rule))
    run(parameters, rule, range(2, 4))
    run(twins, twin, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


@both
def test_groups_have_settings_of_their_own(optimizer):
    first, second, third = (frame(4, 4) for _ in range(3))
    rule = optimizer([{"params": [first]}, {"params": [second], "lr": 0.0}], lr=0.1)
    rule.add_param_group({"params": [third], "lr": 0.1, "retraction": "cayley"})
    gradient = noise(4, 4)
    for p in (first, second, third):
        p.grad = gradient.clone()
    rule.step()
    torch.testing.assert_close(second, frame(4, 4), rtol=0, atol=1e-15)
    assert 1e-6 < (first - third).norm() < 1e-2 < (first - second).norm()


@both
def test_schedulers_set_the_rate(optimizer):
    p, q = frame(4, 4), frame(4, 4)
    rule = optimizer([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 0.1)
    p.grad = q.grad = noise(4, 4)
    rule.step()
    schedule.step()
    optimizer([q], lr=0.01).step()
    assert torch.equal(p, q)


@both
def test_what_has_no_gradient_stays_and_takes_no_state(optimizer):
    p, empty = frame(2, 5, 5), torch.nn.Parameter(torch.empty(0, 3, 3))
    before = p.detach().clone()
    empty.grad = torch.empty(0, 3, 3)
    rule = optimizer([p, empty])
    rule.step()
    assert torch.equal(p, before) and not rule.state


@both
def test_a_closure_is_called_with_gradients_on(optimizer):
    p, target = frame(3, 3), frame(3, 3, seed=1)
    with torch.no_grad():
        p.copy_(target @ torch.linalg.matrix_exp(torch.tensor([[0, 0.4, 0], [-0.4, 0, 0.1], [0, -0.1, 0]]).double()))
    rule = optimizer([p], lr=0.05)

    def closure():
        rule.zero_grad()
        loss = (p - target).square().sum()
        loss.backward()
        return loss

    losses = [rule.step(closure).item() for _ in range(6)]
    assert losses[-1] < losses[0]


@both
@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(3), r"\(3,\), torch.float32 is no matrix; .* vectors to another optimizer"),
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\), torch.float32 has more columns than rows; make its transpose"),
        (torch.eye(3).bfloat16(), r"\(3, 3\), torch.bfloat16 would leave the manifold .* keep it in fp32"),
        (torch.eye(3).half(), "float16 would leave"),
        (torch.eye(3) + 0j, "complex64 would leave"),
    ],
)
def test_what_is_no_stiefel_parameter_is_refused(optimizer, bad, message):
    with pytest.raises(ValueError, match=message):
        optimizer([torch.nn.Parameter(bad)])
    rule = optimizer([frame(3, 3)])
    with pytest.raises(ValueError, match=message):
        rule.add_param_group({"params": [torch.nn.Parameter(bad)]})
    assert len(rule.param_groups) == 1


@both
@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 3), 1.5 * torch.eye(4, 2), torch.full((3, 3), torch.nan)])
def test_what_is_far_from_the_manifold_is_refused_at_its_first_step(optimizer, bad):
    p = torch.nn.Parameter(bad)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"no orthonormal columns: .* start from torch.nn.init.orthogonal_"):
        optimizer([p]).step()


@both
def test_a_sparse_gradient_is_refused(optimizer):
    p = torch.nn.Parameter(torch.eye(3))
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match=r"shape \(3, 3\) is sparse; give a dense one"):
        optimizer([p]).step()


@pytest.mark.parametrize(
    "optimizer, settings",
    [
        (StiefelAdam, {"lr": -1.0}),
        (StiefelAdam, {"lr": float("nan")}),
        (StiefelAdam, {"betas": (0.9, 1.0)}),
        (StiefelAdam, {"betas": (-0.1, 0.9)}),
        (StiefelAdam, {"eps": 0.0}),
        (StiefelAdam, {"a": 1.0}),
        (StiefelAdam, {"retraction": "qr"}),
        (StiefelSGD, {"lr": -1.0}),
        (StiefelSGD, {"momentum": 1.0}),
        (StiefelSGD, {"dampening": 1.5}),
        (StiefelSGD, {"a": 2.0}),
        (StiefelSGD, {"retraction": "euler"}),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(optimizer, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError) as refusal:
        optimizer([torch.nn.Parameter(torch.eye(3))], **settings)
    assert str(refusal.value).startswith(name) and str(value) in str(refusal.value)


# How a user may have set the precision of fp32 products, by torch's older and newer ways.
precisions = {
    "untouched": lambda: None,
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    precisions |= {
        "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    }


def settings_of_products():
    said = [
        getattr(backend.matmul, "fp32_precision", None)
        for backend in (torch.backends.cuda, torch.backends.mkldnn)
        if hasattr(backend, "matmul")
    ]
    for ask in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            said.append(ask())
        except RuntimeError:
            said.append("refuses")  # after the newer way was used
    return said


@pytest.mark.parametrize("setting", precisions)
def test_products_are_full_fp32_inside_and_as_before_outside(setting):
    with full_fp32():  # restores what this test leaves
        precisions[setting]()
        before = settings_of_products()
        with pytest.raises(KeyError), full_fp32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.backends.cuda.matmul.allow_tf32 is False
            raise KeyError
        assert settings_of_products() == before
        with pytest.raises(KeyError), tf32():
            assert settings_of_products()[-1] is True or "refuses" in before
            raise KeyError
        assert settings_of_products() == before


@both
def test_a_step_that_raises_or_runs_under_autocast_keeps_the_precision(optimizer):
    p = frame(4, 4, dtype=torch.float32)
    q = torch.nn.Parameter(p.detach().clone())
    rule, other = optimizer([p]), optimizer([q])
    run([p], rule, range(2))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run([q], other, range(2))
            p.grad, rule.param_groups[0]["retraction"] = torch.ones(4, 4), "unknown"
            with pytest.raises(KeyError):
                rule.step()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(p, q)
