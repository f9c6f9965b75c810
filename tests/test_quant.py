"Number formats: every value goes to a nearest level, ties as hardware breaks them, agreement with torch's own formats, names that do not exist."
import pytest
import torch

from robustnb.core import make_generator
from robustnb.quant import all_formats, choose_scale, fake_quantize, levels, number_format, quant_spec, to_levels

small = [n for n in all_formats() if number_format(n).bits <= 8]


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('name', small)
def test_every_value_goes_to_a_nearest_level(name, dtype):
    fmt, at = number_format(name), levels(number_format(name))
    middle = (at[1:]+at[:-1])/2
    v = torch.cat([at, middle, middle*(1-1e-6), middle*(1+1e-6), at[-1]*torch.rand(2000, generator=make_generator(0), dtype=torch.float64)**3, at[-1]*torch.tensor([1.001, 2., 1e6])])
    v = torch.cat([v, -v]).to(dtype)
    out = to_levels(v, fmt)
    assert out.dtype == dtype and torch.isin(out.abs().double(), at).all()
    nearest = (v.double().abs()[:, None] - at).abs().amin(1)
    assert ((v.double()-out.double()).abs() <= nearest*(1+1e-6)).all()
    assert (out*v >= 0).all() and torch.equal(out[:len(at)].double(), at) and torch.equal(to_levels(-v, fmt), -out)
    if fmt.kind == 'INT':
        at = torch.arange(fmt.top(signed=False)+1, dtype=torch.float64)
        out = to_levels(v*2.1, fmt, signed=False).double()
        assert out.min() == 0 and out.max() == 2**fmt.bits-1 and torch.isin(out, at).all() and ((2.1*v.double()).clamp(0, at[-1])-out).abs().max() <= .5 + 1e-4


@pytest.mark.parametrize('name', small)
def test_ties_go_to_the_even_level_and_for_powers_of_two_to_the_larger(name):
    fmt, at = number_format(name), levels(number_format(name))
    middle = (at[1:]+at[:-1])/2
    for dtype in (torch.float32, torch.float64):
        code = torch.searchsorted(at, to_levels(middle.to(dtype), fmt).double())
        lower = torch.arange(len(middle))
        assert torch.equal(code, lower+1 if fmt.kind == 'POT' else lower + lower % 2)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
@pytest.mark.parametrize('name, cast', (('FP8_E4M3', torch.float8_e4m3fn), ('FP8_E5M2', torch.float8_e5m2)))
def test_the_standard_formats_are_those_of_torch(name, cast, dtype):
    fmt = number_format(name)
    v = (torch.randn(100_000, generator=make_generator(0))*2.**torch.randint(-20, 18, (100_000,), generator=make_generator(1))).clamp(-fmt.top(), fmt.top())
    assert torch.equal(to_levels(v.to(dtype), fmt), v.to(cast).to(dtype))
    codes = torch.arange(128, dtype=torch.uint8).view(cast).double()
    assert torch.equal(levels(fmt), codes[codes.isfinite()].unique())


def test_integers_are_those_of_torch():
    x = torch.randn(10_000, generator=make_generator(0))
    for bits in (2, 3, 4, 8):
        top = 2**(bits-1)-1
        ours, theirs = fake_quantize(x, number_format(f'INT{bits}'), torch.tensor(.5)), torch.fake_quantize_per_tensor_affine(x, .5, 0, -top, top)
        assert torch.equal(ours, theirs)
        scale = torch.tensor([.1, .2, .3])
        rows = fake_quantize(x[:9999].view(3, -1), number_format(f'INT{bits}'), scale.view(3, 1))
        assert (rows - torch.fake_quantize_per_channel_affine(x[:9999].view(3, -1), scale, torch.zeros(3, dtype=torch.int32), 0, -top, top)).abs().max() < 1e-6
    unsigned = fake_quantize(x, number_format('INT4'), torch.tensor(.1), signed=False)
    assert torch.equal(unsigned, torch.fake_quantize_per_tensor_affine(x, .1, 0, 0, 15))


@pytest.mark.parametrize('name', all_formats())
def test_names_and_sizes(name):
    fmt = number_format(name)
    assert str(fmt) == name and number_format(fmt) is fmt and str(number_format(name.replace('_', ''))) == name if 'FP8' not in name else str(fmt) == name
    codes = {'INT': 2**(fmt.bits-1), 'POT': 2**(fmt.bits-1), 'FLOAT': 2**(fmt.bits-1)}[fmt.kind] if fmt.finite_only else {4: 127, 5: 124}[fmt.exponent]
    assert len(levels(fmt)) == codes and levels(fmt)[-1] == fmt.top() and levels(fmt)[0] == 0


def test_short_names():
    assert [str(number_format(f'FLOAT{b}')) for b in range(3, 9)] == ['FLOAT3_E1', 'FLOAT4_E2', 'FLOAT5_E2', 'FLOAT6_E3', 'FLOAT7_E3', 'FLOAT8_E4']
    assert str(number_format('FP8')) == 'FP8_E4M3' and number_format('INT_8') == number_format('INT8')
    spec = quant_spec('INT4/FP8', per_channel=False, rule='minmax')
    assert (str(spec.weights), str(spec.activations), spec.per_channel, spec.rule) == ('INT4', 'FP8_E4M3', False, 'minmax') and quant_spec(spec) is spec
    assert all(str(quant_spec(str(quant_spec(n)))) == str(quant_spec(n)) for n in (*all_formats(), 'INT4/INT8', 'POT4/POT4', 'FP8/INT8'))


@pytest.mark.parametrize('bad', ('INT1', 'INT17', 'POT1', 'POT9', 'FLOAT2', 'FLOAT9', 'FLOAT4_E0', 'FLOAT4_E3', 'INT8_E2', 'POT4_E2', 'FP8_E3M4', 'FP16', 'int8', '8', '', 'INT', 'INT8 ', 8, None))
def test_formats_that_do_not_exist(bad):
    with pytest.raises(ValueError, match='`name` must be INT2 to INT16'): number_format(bad)
    with pytest.raises(ValueError): quant_spec(f'INT8/{bad}')


def test_rules_that_do_not_exist():
    with pytest.raises(ValueError, match="`rule` must be 'minmax' or 'mse'; got 'max'"): choose_scale(torch.ones(3), number_format('INT8'), 'max')
    for value in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match='1 of 3 values are not'): choose_scale(torch.tensor([1., value, 2.]), number_format('INT8'))


@pytest.mark.parametrize('name', ('INT8', 'POT4', 'FP8'))
@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.int64))
def test_half_precision_is_refused(name, dtype):
    with pytest.raises(TypeError, match=r'float32 or float64; got torch.*`model.float'): to_levels(torch.ones(2, dtype=dtype), number_format(name))
