"""The road for a GPU, on a stand-in for CuPy: the numbers of the CPU, and no hidden sync."""
import numpy as np
import pytest
from device import Device, DeviceArray, SyncError, gemm

import minifqt
import models
from minifqt import backend, losses
from minifqt.kernels import engines, norm
from minifqt.rng import Streams


@pytest.fixture
def device(monkeypatch):
    """backend.cupy and cuBLAS replaced by the stand-in."""
    module = Device("cupy")
    monkeypatch.setattr(backend, "cupy", module)
    monkeypatch.setattr(engines, "gemm_ex", gemm)
    monkeypatch.setattr(backend, "device_module", lambda name: module)
    monkeypatch.setattr("minifqt.layers.base.device_module",
                        lambda name: np if name == "cpu" else module)
    return module


def test_the_stand_in_finds_a_sync(device):
    x = device.zeros(3)
    assert type(x + 1) is type(x.sum()) is type(device.where(x > 0, x, 1)) is DeviceArray
    for read in (bool, int, float):
        with pytest.raises(SyncError, match="read by the host"):
            read(x.sum())


def test_noise_is_the_same_on_a_device(device):
    stream = Streams(3).stream("a")
    stream.streams.step = 5
    for shape, offset in (((7, 11), 0), ((100,), 37)):
        here, there = stream.bits(shape, np, offset), stream.bits(shape, device, offset)
        assert isinstance(there, DeviceArray)
        np.testing.assert_array_equal(there.get(), here)


@pytest.mark.parametrize("spec", ["ptq8", "ptqz8", "ptqz2", "sym8", "psq5", "bhq2", "bhq8"])
def test_quantizers_give_the_same_codes_on_a_device_without_a_sync(device, spec):
    rng = np.random.default_rng(0)
    x = (rng.standard_t(4, (37, 6, 5)) * np.exp(rng.normal(size=(37, 1, 1)))).astype("float32")
    x[3], x[5], x[6] = 0, 2.5, x[7]
    x[8] *= np.float32(2.0**-120)                         # a row that is rescaled
    quantizer, _ = minifqt.quantizers.parse(spec)
    stream = Streams(1).stream("dy")
    here, there = quantizer(x, stream), quantizer(device.asarray(x), stream)
    for field in ("codes", "scale", "zero"):
        assert isinstance(getattr(there, field), DeviceArray)
        np.testing.assert_array_equal(getattr(there, field).get(), getattr(here, field))
    np.testing.assert_array_equal(there.dequantize().get(), here.dequantize())
    variance = quantizer.variance(device.asarray(x)).get()
    np.testing.assert_allclose(variance, quantizer.variance(x),
                               rtol=1e-12)                # float64 sums over a group
    assert here.codes.max() > 0


@pytest.mark.parametrize("recipe", ["fp32", "qat8", "ptq8", "ptqz8", "psq4", "bhq5"])
def test_a_training_step_on_a_device_has_the_numbers_of_the_cpu(device, recipe):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 9, 9, 3)).astype("float32"), np.arange(12) % 10
    nets = [models.build("resnet8", 10, recipe, seed=2, device=name) for name in ("cpu", "cuda")]
    dx = []
    for net in nets:
        xp = net.streams.device
        net.streams.step = 3
        logits = net.forward(xp.asarray(x))
        _, dlogits = losses.cross_entropy(logits, xp.asarray(labels))
        dx.append(net.backward(dlogits))
        minifqt.SGD().step(net.params(), 0.1)
        net.streams.raise_pending()
    tolerance = 2e-5   # float32 partial sums of batch norm on the CPU; of matmul in fp32 and qat8
    here, there = (net.state() for net in nets)
    for name, array in [*here.items(), ("dx", dx[0])]:
        other = dx[1] if name == "dx" else there[name]
        assert isinstance(other, DeviceArray), name
        np.testing.assert_allclose(other.get(), array, rtol=0, err_msg=name,
                                   atol=tolerance * abs(array).max() + 1e-30)


def test_evaluation_and_state_move_between_devices(device):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(12, 8, 8, 3)).astype("float32"), np.arange(12) % 10
    here = models.build("resnet8", 10, "bhq5")
    minifqt.train_step(here, minifqt.SGD(), x, labels, 0.1, 0)
    there = models.build("resnet8", 10, "bhq5", seed=1, device="cuda")
    there.load_state(here.state())
    assert all(isinstance(array, DeviceArray) for array in there.state().values())
    np.testing.assert_allclose(there.eval().forward(device.asarray(x)).get(),
                               here.eval().forward(x), rtol=1e-5)    # float32 sums of BN


def test_what_is_not_finite_is_raised_later_on_a_device(device):
    net = models.build("resnet8", 10, "bhq5", device="cuda")
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    x[1, 2, 3, 0] = np.inf
    with np.errstate(all="ignore"):
        net.forward(device.asarray(x))                    # no sync, no error yet
    with pytest.raises(minifqt.NonFiniteError, match=r"^conv1\.act: NaN or infinity"):
        net.streams.raise_pending()
    net.streams.raise_pending()                           # said once


def test_batch_norm_sums_agree(device):
    x = np.random.default_rng(0).normal(size=(7, 5, 3, 4)).astype("float32")
    for here, there in zip(norm.statistics(x), norm.statistics(device.asarray(x)), strict=True):
        np.testing.assert_allclose(there.get(), here, rtol=1e-6)     # rounded once to float32
