"""Tables with a scale per row or block of rows, and with zero points: the formulas in float64, on every clock."""

import copy
import re

import numpy as np
import pytest
import torch

import reference as ref
from dqrm.quant.affine import affine_parameters
from dqrm.quant.config import QATConfig
from dqrm.quant.convert import convert, stored_bytes
from dqrm.quant.embedding import QuantEmbedding, QuantEmbeddingBag, QuantEmbeddingBagCollection
from dqrm.quant.uniform import dequantize, quantize
from dqrm.training.optimizers import SparseAdagrad, SparseSGD
from kernel_helpers import NATIVE, ODD, PATHS, both, on

ROWS, MULTI, DIM = (5, 300, 1, 40, 9, 60), (False, False, False, False, True, True), 5
KINDS = {
    "row": {"table_granularity": "row"},
    "block": {"table_granularity": "block:4"},
    "wide block": {"table_granularity": "block:64"},
    "affine table": {"table_qscheme": "affine"},
    "affine row": {"table_qscheme": "affine", "table_granularity": "row"},
    "affine block": {"table_qscheme": "affine", "table_granularity": "block:4"},
}
CASES = pytest.mark.parametrize("kind", KINDS)
CLOCKS = {"running_max": {"rescan_period": 5}, "periodic": {"scale_period": 5}}
CLOCK = pytest.mark.parametrize("clock", CLOCKS)


def made(kind, rows=ROWS, multi=MULTI, dtype=torch.float32, **options):
    torch.manual_seed(0)
    weight = (torch.randn(sum(rows), DIM) + 0.3).to(dtype)
    return QuantEmbeddingBagCollection(rows, DIM, multi=multi, _weight=weight, **KINDS[kind], **options)


def batch(samples, seed=0):
    random = np.random.default_rng(seed)
    ids = np.stack([random.integers(0, rows, samples) for rows in ROWS[:4]], 1)
    bags = []
    for rows in ROWS[4:]:
        lengths = random.integers(0, 4, samples)
        bags.append((torch.from_numpy(random.integers(0, rows, lengths.sum())),
                     torch.from_numpy(np.cumsum(lengths) - lengths)))  # fmt: skip
    return torch.from_numpy(ids), bags


def group_numbers(kind, rows=ROWS):
    """The group of each row of the weight."""
    each = QATConfig(**KINDS[kind]).rows_per_scale
    numbers, first = [], 0
    for table in rows:
        numbers += [first + (0 if each is None else row // each) for row in range(table)]
        first = numbers[-1] + 1
    return np.array(numbers)


def parameters(weight, bits, affine):
    """Scale and zero point of the weights of one group."""
    if not affine:
        return float(ref.scale_from_max(np.abs(weight).max(), bits)), 0
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    smallest, largest = min(0.0, weight.min()), max(0.0, weight.max())
    scale = float(np.float32(max(largest - smallest, 1e-8) / (high - low)))
    return scale, int(np.clip(low - np.rint(smallest / scale), low, high))


def quantized(weight, numbers, scale, zero, bits):
    """Of all rows: the values of their codes, and by how much a division in float32 may miss them."""
    each, shift = scale[numbers][:, None], zero[numbers][:, None]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(weight / each) + shift, low, high)
    return (codes - shift) * each, ref.slack(weight, each, 16 if bits == 16 else bits + 1) + 1e-6 * each


@CASES
@PATHS
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("samples", [0, 1, 17])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_values_and_gradients_are_those_of_the_formula_group_by_group(path, kind, bits, samples, sparse):
    tables, (ids, bags) = made(kind, bits=bits, sparse=sparse), batch(samples)
    with on(path):
        out = tables(ids, bags)
        grad = torch.randn(out.shape)
        (out * grad).sum().backward()
    weight, numbers = ref.array(tables.weight), group_numbers(kind)
    affine = "affine" in kind
    found = [parameters(weight[numbers == group], bits, affine) for group in range(numbers[-1] + 1)]
    scale, zero = (np.array(part) for part in zip(*found))
    np.testing.assert_allclose(ref.array(tables.scale), scale, rtol=1e-6)
    if affine:
        assert np.array_equal(ref.array(tables.weight_fake_quantizer.zero_point), zero)
    values, slack = quantized(weight, numbers, ref.array(tables.scale), zero, bits)
    starts, gradient = np.cumsum([0, *ROWS]), np.zeros_like(weight)
    for number in range(len(ROWS)):
        part = slice(starts[number], starts[number + 1])
        if number < 4:
            flat, offsets = ids[:, number : number + 1].numpy(), None
        else:
            flat, offsets = (tensor.numpy() for tensor in bags[number - 4])
        for sample, positions in enumerate(ref.bag_positions(flat, offsets)):
            rows = flat.ravel()[positions]
            error = np.abs(ref.array(out[sample, number]) - values[part][rows].sum(0))
            assert (error <= slack[part][rows].sum(0) + 1e-5).all()
            np.add.at(gradient[part], rows, ref.array(grad)[sample, number])
    np.testing.assert_allclose(ref.array(tables.weight.grad), gradient, rtol=1e-6, atol=1e-6)


def train(tables, steps=12, rule=SparseSGD, promise=True):
    """Steps large enough to outgrow scales; the state and the output of each."""
    optimizer = rule([tables.weight], lr=2.0)
    optimizer.tables, found = tables, []
    if promise:
        tables.only_looked_up_rows_change()
    for step in range(steps):
        optimizer.zero_grad()
        out = tables(*batch(7, step))
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        weight = tables.weight.detach().clone()
        optimizer.step()
        found.append((out.detach(), tables.scale.clone(), weight))
    return found


def raised(old, weight, numbers, bits, exact, affine, ranges):
    """Scales after running_max has seen all rows of a weight; `ranges` [groups, 2] is updated."""
    scale = old.copy()
    for group in range(numbers[-1] + 1):
        rows = weight[numbers == group]
        if not affine:
            own = parameters(rows, bits, False)[0]
            scale[group] = own if exact else max(scale[group], own)
            continue
        smallest, largest = min(0, rows.min()), max(0, rows.max())
        if not exact:
            smallest, largest = min(smallest, ranges[group, 0]), max(largest, ranges[group, 1])
        ranges[group] = smallest, largest
        scale[group] = parameters(np.array(ranges[group]), bits, True)[0]
    return scale


@CASES
@CLOCK
@PATHS
@pytest.mark.parametrize("rule", [SparseSGD, SparseAdagrad])
@pytest.mark.parametrize("promise", [True, False], ids=["trainer", "drop-in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scales_follow_their_clock(path, kind, clock, rule, promise, dtype):
    """running_max: of each group at least (of single rows: exactly) what its rows need; periodic: as of the refresh."""
    with on(path):
        tables = made(kind, dtype=dtype, **CLOCKS[clock])
        found = train(tables, rule=rule, promise=promise)
        counted = tables.clamps.take()
        tables.eval()(*batch(3))
    numbers, affine, exact = group_numbers(kind), "affine" in kind, kind.endswith("row")
    ranges, scale = np.zeros((numbers[-1] + 1, 2)), np.zeros(numbers[-1] + 1)
    weights = [*(ref.array(weight) for _, _, weight in found), ref.array(tables.weight)]
    for step, (_, after, _) in enumerate(found):
        if step % 5 == 0:
            scale, ranges = np.zeros_like(scale), np.zeros_like(ranges)
        if clock == "running_max" or step % 5 == 0:
            scale = raised(scale, weights[step], numbers, 4, exact, affine, ranges)
        expected = scale
        if clock == "running_max":  # the update has raised it since
            expected = raised(scale, weights[step + 1], numbers, 4, exact, affine, ranges.copy())
            if affine or not promise:
                expected = np.where(np.isclose(ref.array(after), scale, rtol=1e-6), scale, expected)
        np.testing.assert_allclose(ref.array(after), expected, rtol=1e-6)
    assert counted[1] > 0
    assert (counted[0] > 0) == (clock == "periodic")


@NATIVE
@pytest.mark.parametrize("kind", ["row", "block", "wide block"])
@CLOCK
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_training_in_compiled_code_is_that_in_plain_torch(kind, clock, bits):
    def run():
        tables = made(kind, bits=bits, **CLOCKS[clock])
        found = train(tables)
        return [*(tensor for step in found for tensor in step), torch.tensor(tables.clamps.take())]

    both(run)


@CASES
@CLOCK
def test_a_refresh_that_reads_only_what_changed_is_exact(kind, clock):
    one, other = made(kind, **CLOCKS[clock]), made(kind, **CLOCKS[clock])
    for (_, scale, weight), (_, own, mine) in zip(train(one), train(other, promise=False)):
        assert torch.equal(weight, mine)
        assert clock == "running_max" or torch.equal(scale, own)


@CASES
@CLOCK
def test_a_saved_state_goes_on_bit_for_bit(kind, clock):
    options = CLOCKS[clock]
    whole, begun, resumed = (made(kind, **options) for _ in range(3))
    expected = train(whole, 14)
    optimizer = SparseSGD([begun.weight], lr=2.0)
    optimizer.tables = begun
    begun.only_looked_up_rows_change()
    for step in range(14):
        if step == 7:
            resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
            begun, optimizer = resumed, SparseSGD([resumed.weight], lr=2.0)
            optimizer.tables = begun
            begun.only_looked_up_rows_change()
        optimizer.zero_grad()
        out = begun(*batch(7, step))
        assert torch.equal(out, expected[step][0])
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        optimizer.step()
        assert torch.equal(begun.scale, expected[step][1])


@CASES
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@PATHS
def test_packed_tables_give_what_evaluation_gave_and_take_the_bits_that_are_told(path, kind, bits):
    with on(path):
        tables, (ids, bags) = made(kind, bits=bits), batch(23)
        train(tables)
        told = stored_bytes(tables)["tables"]
        expected = tables.eval()(ids, bags).detach()
        packed = convert(torch.nn.ModuleList([copy.deepcopy(tables)]))[0]
        assert torch.equal(packed(ids, bags), expected)
        assert packed(*batch(0)).shape == (0, len(ROWS), DIM)
        again = copy.deepcopy(packed)
        again.codes.zero_()
        again.load_state_dict(packed.state_dict())
        assert torch.equal(again(ids, bags), expected)
    held = packed.codes.nbytes + packed.scale.nbytes
    held += 0 if packed.zero_point is None else packed.zero_point.nbytes
    padding = sum(ROWS) * (-(-DIM * bits // 8) - DIM * bits / 8)
    assert 0 <= told - (held - padding) < 1
    assert (packed.zero_point is not None) == ("affine" in kind)


@CASES
@PATHS
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("padding", [None, 3])
def test_single_tables_are_those_of_a_collection(path, kind, sparse, padding):
    options = {**KINDS[kind], "sparse": sparse, "padding_idx": padding}
    weight = torch.randn(70, DIM, generator=torch.Generator().manual_seed(1)) + 0.2
    ids = torch.arange(140).view(20, 7) % 70
    with on(path):
        one, bag = (made(70, DIM, _weight=weight.clone(), **options) for made in (QuantEmbedding, QuantEmbeddingBag))
        all_ = QuantEmbeddingBagCollection([70], DIM, _weight=weight.clone(), **KINDS[kind])
        expected = all_(ids.view(-1, 1)).view(20, 7, DIM)
        assert torch.equal(one(ids), expected)
        kept = expected * (1 if padding is None else (ids != padding)[..., None])
        count = 7 if padding is None else (ids != padding).sum(1, keepdim=True)
        torch.testing.assert_close(bag(ids), kept.sum(1) / count)
        for module in (one, bag):
            found = module.eval()(ids)
            packed = convert(torch.nn.ModuleList([copy.deepcopy(module)]))[0]
            assert torch.equal(packed(ids), found)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_zero_is_exact_and_odd_ranges_have_a_scale(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    ranges = torch.tensor([[0, 0], [-1, 0], [0, 2], [-3e38, 3e38], [-1e-30, 1e-30], [-0.4, 0.6], [-2, 1e-9]])
    scale, zero_point = affine_parameters(ranges[:, 0], ranges[:, 1], bits)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (zero_point.dtype, int(zero_point.min()) >= low, int(zero_point.max()) <= high) == (torch.int32, True, True)
    for (smallest, largest), own, zero in zip(ranges.double().tolist(), scale.tolist(), zero_point.tolist()):
        expected = parameters(np.array([smallest, largest]), bits, True)
        assert (own, zero) == (pytest.approx(expected[0], rel=1e-6), expected[1])
        x, zero_code = torch.linspace(smallest, largest, 33, dtype=torch.float64).float(), torch.tensor(zero).int()
        values, none = (
            dequantize(quantize(each, torch.tensor(own), bits, zero_code), torch.tensor(own), zero_code)
            for each in (x, x * 0)
        )
        assert not none.any()
        if largest < 1e30:  # else the grid's end may be beyond float32
            assert ((values.double() - x.double()).abs() <= 0.51 * own).all()
    nan, _ = affine_parameters(torch.tensor([float("nan")]), torch.tensor([1.0]), bits)
    assert nan.isnan().all()


@pytest.mark.parametrize("kind", ["affine table", "affine row", "affine block"])
def test_an_affine_table_of_numbers_of_one_sign_uses_all_codes(kind):
    """Symmetric codes would spend half of them on a sign that no weight has."""
    weight = torch.rand(64, 16, generator=torch.Generator().manual_seed(2)) + 0.01
    tables = QuantEmbeddingBagCollection([64], 16, _weight=weight, bits=4, **KINDS[kind])
    other = QuantEmbeddingBagCollection([64], 16, _weight=weight, bits=4)
    ids = torch.arange(64)[:, None]
    errors = [(module(ids)[:, 0] - weight).abs().max().item() for module in (tables, other)]
    assert errors[0] < 0.55 * errors[1]
    zeros = QuantEmbeddingBagCollection([64], 16, _weight=torch.zeros(64, 16), bits=4, **KINDS[kind])
    assert not zeros(ids).any()


@CASES
@PATHS
def test_odd_numbers_stay_in_their_group(path, kind):
    """A row of NaN or infinity spoils its own group, not the others."""
    for value in ODD:
        tables = made(kind)
        with torch.no_grad():
            tables.weight[7] = value
        empty = torch.zeros(0, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)
        with on(path):
            out = tables(torch.arange(40)[:, None] % torch.tensor(ROWS[:4]), [empty, empty])
        assert out[:, [0, 2, 3]].isfinite().all()
        if kind.endswith("row"):
            assert out[3:, 1].isfinite().all()


@CASES
def test_redrawn_tables_have_scales_of_their_new_weights(kind):
    tables = made(kind)
    train(tables)
    with torch.no_grad():
        tables.weight[5:305] = torch.rand(300, DIM) * 1e-3
    tables.tables_redrawn([1])
    fresh = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=tables.weight.detach(), **KINDS[kind])
    fresh.refresh_scale()
    assert torch.equal(tables.scale, fresh.scale)


@CASES
def test_stochastic_rounding_has_the_weights_as_its_mean(kind):
    tables = made(kind, forward_rounding="stochastic", bits=4)
    ids, bags = batch(9)
    outs = []
    for step in range(600):
        tables.weight_fake_quantizer.step = None
        outs.append(tables(ids, bags).detach()[:, :4])
        assert tables.scale_ticks == step + 1
    mean, exact = torch.stack(outs).mean(0), torch.stack([tables.table(n)[ids[:, n]] for n in range(4)], 1)
    edge = 0.5 * tables.scale.max() * ("affine" in kind)  # the ends of a grid may be half a step inside
    assert (mean - exact).abs().max() < 0.12 * tables.scale.max() + edge
    assert len({out.sum().item() for out in outs}) > 500
    evaluated = tables.eval()(ids, bags)
    assert torch.equal(evaluated, convert(torch.nn.ModuleList([copy.deepcopy(tables)]))[0](ids, bags))


@CASES
@PATHS
def test_a_stage_without_quantization_reads_the_weights_and_then_sets_scales(path, kind):
    tables, (ids, bags) = made(kind), batch(9)
    tables.train_with_bits(32)
    with on(path):
        train(tables)
        out = tables(ids, bags)
        assert torch.equal(out[:, :4], torch.stack([tables.table(n)[ids[:, n]] for n in range(4)], 1))
        tables.train_with_bits(None)
        fresh = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=tables.weight.detach(), **KINDS[kind])
        assert torch.equal(tables(ids, bags), fresh(ids, bags))
        assert torch.equal(tables.scale, fresh.scale)


@CASES
def test_a_cast_and_a_state_dict_of_an_unquantized_model(kind):
    tables, (ids, bags) = made(kind), batch(9)
    train(tables)
    half = copy.deepcopy(tables).bfloat16()
    assert half.scale.dtype == torch.float32
    assert half.eval()(ids, bags).isfinite().all()
    other = made(kind)
    other.load_state_dict({"weight": tables.weight.detach()})
    assert not other.scale.any()
    fresh = QuantEmbeddingBagCollection(ROWS, DIM, multi=MULTI, _weight=tables.weight.detach(), **KINDS[kind])
    assert torch.equal(other.eval()(ids, bags), fresh.eval()(ids, bags))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_granularity": "rows"}, "table_granularity is 'rows', expected 'table', 'row', or 'block:N'"),
        ({"table_granularity": "block:3"}, "table_granularity is 'block:3', expected"),
        ({"table_granularity": "block:1"}, "table_granularity is 'block:1', expected"),
        ({"table_granularity": "block:"}, "table_granularity is 'block:', expected"),
        ({"table_granularity": 16}, "table_granularity is 16, expected"),
        ({"table_granularity": None}, "table_granularity is None, expected"),
        ({"table_qscheme": "asymmetric"}, "table_qscheme is 'asymmetric', expected 'symmetric' or 'affine'"),
        ({"table_granularity": "row", "small_table_bits": 8}, "table_granularity is 'row', but small_table_bits is 8"),
        ({"table_qscheme": "affine", "small_table_bits": 8}, "table_qscheme is 'affine', but small_table_bits is 8"),
        ({"table_granularity": "row", "bits": 32}, "table_granularity is 'row', but the tables are not quantized"),
        ({"table_qscheme": "affine", "quantizer": "mse"}, "table_qscheme is 'affine', but the quantizer 'mse' has one"),
        ({"table_granularity": "block:8", "quantizer": "naive"}, "table_granularity is 'block:8', but the quantizer"),
        ({"table_granularity": "row", "quantizer": "lsq"}, "table_granularity is 'row', but the quantizer 'lsq' has"),
        ({"table_granularity": "row", "quantizer": "percentile"}, "but the quantizer 'percentile' has one scale"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QATConfig(**options)
