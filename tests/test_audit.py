"""The audit: every product noted and counted, held to int64, and the memory of a step."""
import math

import numpy as np
import pytest
from tiny import probed, probed_batch

import minifqt
import models
from minifqt import backend
from minifqt.kernels import conv, gemm
from minifqt.kernels.cpu import choice, products
from minifqt.layers import Conv2d, Linear, Sequential, build
from minifqt.study.__main__ import main
from minifqt.study.audit import Call, audit, kept, row, watched


def calls_of(net, x, labels):
    with watched() as calls:
        _, dlogits = minifqt.cross_entropy(net.forward(x), labels)
        net.backward(dlogits)
        for p in net.params().values():
            np.asarray(p.grad)
    return calls


def test_every_product_of_a_step_is_noted_and_counted():
    net = build(Sequential(Conv2d(2, 4, 3, stride=2, padding=1), Flat(), Linear(36, 3)), "psq4")
    x, labels = probed_batch(5)
    calls = {(call.layer, call.kind): call for call in calls_of(net, x, labels)}
    assert list(calls) == [("0", "fprop"), ("2", "fprop"), ("2", "wgrad"), ("2", "dgrad"),
                           ("0", "wgrad"), ("0", "dgrad")]
    for kind in ("fprop", "wgrad", "dgrad"):
        assert calls["0", kind].multiplies == 5 * 3 * 3 * 4 * 3 * 3 * 2
        assert calls["2", kind].multiplies == 5 * 36 * 3
    assert [call.terms for call in calls.values()] == [9 * 2, 36, 5, 3, 5 * 3 * 3, 9 * 4]
    assert conv.fprop.__module__ == gemm.fprop.__module__.replace("gemm", "conv")
    assert not calls_of_nothing()                         # the watch is over


def calls_of_nothing():
    with watched() as calls:
        pass
    net = probed()
    net.forward(probed_batch()[0])
    return calls


class Flat(minifqt.layers.Layer):
    """(N, P, Q, K) → (N, P·Q·K)."""

    def forward(self, x):
        self.save(x.shape)
        return np.asarray(x).reshape(len(x), -1)

    def backward(self, dy):
        shape, = self.saved()
        return dy.reshape(shape)


@pytest.mark.parametrize("recipe", ["psq4", "bhq3", "ptq8"])
@pytest.mark.parametrize("fused", [False, True])
def test_integer_products_are_the_int64_product_and_floats_are_told(recipe, fused):
    x, labels = probed_batch()
    rows = audit(probed(recipe, fused), x, labels)["products"]
    assert all(r["integers"] and r["deviation"] == 0 for r in rows)
    assert {r["codes"] for r in rows} == {"uint8 × int8", "uint8 × uint8"}
    rows = audit(probed("qat8", fused), x, labels)["products"]
    assert {r["product"]: r["integers"] for r in rows} == {
        "fprop": True, "wgrad": False, "dgrad": False}
    assert "float32 × uint8" in {r["codes"] for r in rows}
    assert not any("deviation" in r for r in rows if not r["integers"])


def test_a_product_that_is_off_is_found(monkeypatch):
    right = conv.wgrad
    call = next(call for call in calls_of(probed(), *probed_batch())
                if call.kind == "wgrad" and call.layer == "3")
    assert row(call)["deviation"] == 0
    monkeypatch.setattr(conv, "wgrad", lambda *given, **how: (
        right(*given, **how) * np.float32(1.00001)))
    assert row(call)["deviation"] > 2**-22


@pytest.mark.skipif(choice.isa() is None, reason="nothing is compiled here")
def test_a_fused_steps_mixed_product_is_audited_by_the_kernel_that_unmixes_it(monkeypatch):
    right = products.Correlation.form_unmixed

    def off(*given, **how):
        y, sums = right(*given, **how)
        return y * np.float32(1.00001), sums

    calls = [call for call in calls_of(probed("bhq4", fused=True), *probed_batch())
             if call.kind == "dgrad" and call.rest]
    assert calls
    for call in calls:
        assert row(call)["deviation"] == 0
    monkeypatch.setattr(products.Correlation, "form_unmixed", off)
    for call in calls:
        assert row(call)["deviation"] > 2**-22


def test_the_headroom_is_that_of_the_largest_codes():
    call = next(c for c in calls_of(probed(), *probed_batch()) if c.layer == "3")
    largest = 36 * int(call.a.codes.max()) * int(abs(call.b.codes).max())
    found = row(call)
    assert found["bits"] == pytest.approx(math.log2(largest))
    assert found["left31"] == pytest.approx(31 - math.log2(largest))
    assert found["left24"] == pytest.approx(24 - math.log2(largest))
    assert isinstance(call, Call)


def test_a_first_layers_gradient_that_nobody_reads_is_reported():
    x, labels = probed_batch()
    assert audit(probed(fused=True), x, labels)["skipped"] == ["0 dgrad"]
    assert audit(probed(), x, labels)["skipped"] == []


def test_what_layers_keep_is_counted_once(set_instructions):
    set_instructions("numpy")
    net = build(Sequential(Conv2d(2, 4, 3, padding=1), minifqt.layers.ReLU()), "psq4")
    x = np.ones((5, 6, 6, 2), np.float32)
    net.forward(x)
    found = kept(net)
    assert found["0"]["uint8"] == 5 * 6 * 6 * 2           # codes of x
    assert found["0"]["int8"] == 4 * 3 * 3 * 2
    assert found["0"]["float32"] == 4 * 4                 # two scales, two zeros
    assert found["1"] == {"bool": 5 * 6 * 6 * 4}


def test_an_audit_predicts_the_memory_of_a_step_and_leaves_the_network_as_it_was():
    net = minifqt.fuse(models.build("resnet8", 10, "bhq5"))
    x = np.random.default_rng(0).standard_normal((32, 32, 32, 3), dtype="float32")
    before, threads = {k: v.copy() for k, v in net.state().items()}, backend.threads()
    net.eval()
    memory = audit(net, x, np.arange(32) % 10)["memory"]
    assert 0.85 < sum(memory["predicted"].values()) / memory["measured"] < 1.1
    assert backend.threads() == threads
    assert not net.training
    assert not net.conv1.q.act.training
    for name, array in net.state().items():
        assert np.array_equal(array, before[name], equal_nan=True), name


def test_what_fused_layers_share_is_counted_once():
    net = probed(fused=True)
    net.forward(probed_batch(256)[0])
    images = 256 * (6 * 6 * 4 + 3 * 3 * 6) * 4            # bytes: batch norm's input is ReLU's
    floats = sum(sizes.get("float32", 0) for sizes in kept(net).values())
    assert images <= floats < 1.2 * images


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("off", [1.00001, np.nan])
def test_a_product_that_is_off_makes_the_audit_fail(off, monkeypatch, capsys):
    right = gemm.wgrad
    monkeypatch.setattr(gemm, "wgrad", lambda *given, **how: right(*given, **how) * np.float32(off))
    assert main(["audit", "--epochs", "0", "--out", "out"]) == 1
    assert "1 of 29 products are off int64 by more than" in capsys.readouterr().out
