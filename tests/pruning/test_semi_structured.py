"""check_nm finds where a pattern breaks; to_semi_structured converts exactly what is 2:4."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from pdp_kernels import (
    GroupCheck,
    PDPConfig,
    PDPPruner,
    channel_report,
    check_nm,
    to_semi_structured,
)
from pdp_kernels.pruning import semi_structured

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def make_2to4(linear):
    """Prune the first two of every four weights."""
    with torch.no_grad():
        linear.weight.view(-1, 4)[:, :2] = 0
    return linear


def linear_2to4(inputs=128, outputs=64, dtype=torch.float16, device="cpu"):
    return make_2to4(nn.Linear(inputs, outputs, dtype=dtype, device=device))


def test_first_broken_group_has_the_coordinates_of_its_weights():
    weight = torch.zeros(8, 16)
    assert check_nm(weight) == GroupCheck("", True, 0, None)
    weight[3, 8:11] = torch.nan
    weight[5, :4] = 1.0
    assert check_nm(weight) == GroupCheck("", False, 2, (3, 2))
    assert check_nm(weight, 3, 4) == GroupCheck("", False, 1, (5, 0))
    assert check_nm(weight, 2, 8, dim=0).ok


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 4), (2, 8), (1, 2), (31, 32)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_agrees_with_counting_by_hand(device, n, m, dim):
    weight = torch.randn(32, 64, 3, 32, device=device)[:, ::2]
    weight *= torch.rand_like(weight) < 0.999 * n / m
    columns = (weight != 0).cpu().movedim(dim, -1)
    broken = []
    for index in itertools.product(*map(range, columns.shape[:-1])):
        nonzero = columns[index].tolist()
        for number in range(len(nonzero) // m):
            if sum(nonzero[number * m : (number + 1) * m]) > n:
                coordinates = list(index)
                coordinates.insert(dim % weight.dim(), number)
                broken.append(tuple(coordinates))
    first = min(broken, default=None)
    assert check_nm(weight, n, m, dim) == GroupCheck("", not broken, len(broken), first)


def test_checks_every_layer_of_a_module_once():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.ReLU(), shared, nn.Linear(8, 8)
    )
    model[4].weight = shared.weight
    make_2to4(shared)
    assert check_nm(model, dim=1) == [
        GroupCheck("1.weight", False, 8, (0, 0, 0, 0)),
        GroupCheck("3.weight", True, 0, None),
    ]
    assert check_nm(shared) == [GroupCheck("weight", True, 0, None)]


class Conv1D(nn.Module):
    """As that of transformers: a Linear of weight (inputs, outputs)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


class AllKinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1d = Conv1D(6, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.conv = nn.Conv2d(8, 6, 3)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.head = nn.Linear(8, 6)
        self.embedding = nn.Embedding(6, 8)
        self.tied = nn.Linear(8, 6)
        self.tied.weight = self.embedding.weight


def test_checks_what_a_pruner_prunes_along_the_inputs():
    model = AllKinds()
    config = PDPConfig(None, pattern="2:4", warmup=0, ramp=0)
    pruner = PDPPruner(model, config)
    names = [layer.name for layer in pruner.report().layers]
    assert {check.name: check.ok for check in check_nm(model)} == dict.fromkeys(names, False)
    pruner.finalize()
    assert {check.name: check.ok for check in check_nm(model)} == dict.fromkeys(names, True)
    with torch.no_grad():
        model.conv1d.weight[4:7, 3] = 1.0
    assert check_nm(model)[0] == GroupCheck("conv1d.weight", False, 1, (1, 3))


def test_checks_the_base_layers_of_a_model_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], r=4)
    )
    assert [check.name for check in check_nm(model)] == ["base_model.model.0.base_layer.weight"]


def test_checks_the_weight_that_a_parametrization_gives():
    linear = make_2to4(nn.Linear(8, 4))
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Softplus())
    assert not check_nm(linear)[0].ok


@pytest.mark.parametrize("n, m", [(0, 4), (4, 4), (5, 4), (-1, 4), (2, 33), (0, 0)])
def test_a_pattern_outside_of_its_range_raises(n, m):
    with pytest.raises(ValueError, match=rf"1 <= n < m <= 32, got n = {n}, m = {m}"):
        check_nm(torch.zeros(4, 4), n, m)


@pytest.mark.parametrize("name", ["n", "m", "dim"])
@pytest.mark.parametrize("value", [2.0, "2", [2], True])
def test_a_pattern_of_another_type_raises(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
        check_nm(torch.zeros(4, 4), **{name: value})


@pytest.mark.parametrize(
    "shape, dim", [((4, 6), -1), ((6, 4), 0), ((4, 4), 2), ((4, 4), -3), ((), 0)]
)
def test_a_size_that_holds_no_groups_raises(shape, dim):
    with pytest.raises(ValueError) as error:
        check_nm(torch.zeros(shape), 2, 4, dim)
    message = str(error.value)
    assert f"got shape {shape}, dim = {dim}, m = 4" in message or (
        f"dimension of model_or_tensor, whose shape is {shape}, got {dim}" in message
    )


def test_models_without_a_weight_to_check_raise():
    for model in (nn.ReLU(), nn.Linear(6, 4), nn.Embedding(4, 4)):
        with pytest.raises(ValueError, match=r"model_or_tensor must have.*its inputs.*m = 4"):
            check_nm(model)
    with pytest.raises(ValueError, match=r"size along dim 0 is a multiple of m = 4"):
        check_nm(nn.Linear(4, 6), dim=0)
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module or a torch\.Tensor, got list"):
        check_nm([1.0])


@pytest.mark.parametrize("tool", [check_nm, channel_report])
def test_weights_without_values_raise(tool):
    with pytest.raises(ValueError, match=r"weight must have its shape: run the lazy layer once"):
        tool(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"weight must have values, got one on the meta device"):
        tool(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize(
    "tool", [check_nm, channel_report, lambda model: to_semi_structured(model, strict=False)]
)
def test_reading_a_weight_with_spectral_norm_changes_nothing(tool):
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    tool(layer)
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())
    assert all(module.training for module in layer.modules())


def skipped(*layers):
    return to_semi_structured(nn.Sequential(*layers), strict=False).skipped


def test_reports_why_a_weight_is_skipped():
    broken = linear_2to4()
    with torch.no_grad():
        broken.weight[7, 12:16] = 1.0
    reasons = skipped(
        linear_2to4(dtype=torch.float32),
        linear_2to4(inputs=100),
        broken,
        parametrizations.weight_norm(linear_2to4()),
        linear_2to4(),
        nn.Conv2d(8, 8, 1),
        nn.MultiheadAttention(8, 2),
    )
    others = ["6.out_proj.weight", "5.weight", "6.in_proj_weight"]
    assert list(reasons) == [*[f"{index}.weight" for index in range(5)], *others]
    assert "dtype torch.float32" in reasons["0.weight"]
    assert "shape (64, 100) is not a positive multiple of (" in reasons["1.weight"]
    assert reasons["2.weight"] == "group (7, 3) of 4 has 4 nonzeros, not 2 (1 such groups)"
    assert "computed from other parameters" in reasons["3.weight"]
    assert "device cpu" in reasons["4.weight"]
    assert reasons["5.weight"] == "is of a Conv2d, not of a Linear layer"
    assert reasons["6.in_proj_weight"] == "is of a MultiheadAttention, not of a Linear layer"


def test_weights_without_values_are_skipped():
    reasons = skipped(nn.LazyLinear(64, dtype=torch.float16), linear_2to4(device="meta"))
    assert reasons["0.weight"] == "has no shape yet: run the lazy layer once first"
    assert reasons["1.weight"] == "is on the meta device, without values"


def test_strict_lists_every_reason_and_changes_nothing(on_any_device):
    model = nn.Sequential(linear_2to4(), nn.Linear(128, 64).half(), linear_2to4(inputs=100))
    before = list(model.parameters())
    with pytest.raises(ValueError) as error:
        to_semi_structured(model)
    assert "1.weight: group (0, 0) of 4 has 4 nonzeros" in str(error.value)
    assert "2.weight: shape (64, 100)" in str(error.value)
    assert "0.weight" not in str(error.value)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))


def test_a_model_of_another_type_raises():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        to_semi_structured(torch.zeros(32, 64))


@pytest.mark.parametrize(
    "backend, capability, accepted",
    [
        (SparseSemiStructuredTensorCUSPARSELT, (7, 5), False),
        (SparseSemiStructuredTensorCUSPARSELT, (8, 0), True),
        (SparseSemiStructuredTensorCUSPARSELT, (9, 0), True),
        (SparseSemiStructuredTensorCUTLASS, (7, 5), False),
        (SparseSemiStructuredTensorCUTLASS, (8, 6), True),
        (SparseSemiStructuredTensorCUTLASS, (9, 0), False),
    ],
)
def test_the_device_decides_by_its_compute_capability(monkeypatch, backend, capability, accepted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    obstacle = semi_structured._device_obstacle(torch.device("cuda", 0), backend)
    assert (obstacle is None) == accepted
    assert accepted or str(capability) in obstacle


@pytest.fixture
def on_any_device(monkeypatch):
    """CUTLASS tensors can be made, though not multiplied, without a GPU."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(semi_structured, "_device_obstacle", lambda device, backend: None)


def test_converts_what_is_2to4_and_leaves_the_rest(on_any_device):
    model = nn.Sequential(linear_2to4(), nn.Linear(128, 64).half(), nn.Conv2d(8, 8, 1))
    dense = model[0].weight.detach().clone()
    others = [model[0].bias, model[1].weight, model[2].weight]
    report = to_semi_structured(model, strict=False)
    assert report.converted == ["0.weight"]
    assert list(report.skipped) == ["1.weight", "2.weight"]
    assert isinstance(model[0].weight, SparseSemiStructuredTensorCUTLASS)
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert torch.equal(model[0].weight.to_dense(), dense)
    assert others == [model[0].bias, model[1].weight, model[2].weight]


def test_shared_weights_are_converted_once_and_stay_shared(on_any_device):
    model = nn.Sequential(linear_2to4(), linear_2to4())
    model[1].weight = model[0].weight
    assert to_semi_structured(model).converted == ["0.weight", "1.weight"]
    assert model[0].weight is model[1].weight


def test_strict_is_about_linear_layers_alone(on_any_device):
    report = to_semi_structured(nn.Sequential(linear_2to4(), nn.Conv2d(8, 8, 1)))
    assert report.converted == ["0.weight"]
    assert list(report.skipped) == ["1.weight"]


def test_a_second_conversion_skips(on_any_device):
    model = linear_2to4()
    to_semi_structured(model)
    report = to_semi_structured(model, strict=False)
    assert report == ([], {"weight": "is semi-structured already"})


@pytest.mark.gpu
@pytest.mark.parametrize("cutlass", [False, True], ids=["cusparselt", "cutlass"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs, inputs", [(768, 3072), (4096, 4096)])
def test_linear_gives_what_the_dense_one_gave(monkeypatch, cutlass, dtype, outputs, inputs):
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    backend = semi_structured._backend()
    if obstacle := semi_structured._device_obstacle(torch.device("cuda"), backend):
        pytest.skip(obstacle)
    linear = linear_2to4(inputs, outputs, dtype, "cuda")
    x = torch.randn(256, inputs, dtype=dtype, device="cuda")
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    with torch.inference_mode():
        dense = linear(x).double()
        assert to_semi_structured(linear).converted == ["weight"]
        sparse = linear(x).double()
    assert isinstance(linear.weight, backend)
    budget = 2 * (dense - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (sparse - exact).abs().max() <= budget


@pytest.mark.parametrize("strict", [False, True])
def test_a_masked_model_is_refused(strict):
    model = nn.Sequential(nn.Linear(64, 32))
    PDPPruner(model, PDPConfig(pattern="2:4"))
    with pytest.raises(ValueError, match=r"masks of a pruner, got them on 0: finalize its pruner"):
        to_semi_structured(model, strict=strict)
