"""The laboratory against brute force on a tiny network, and against errors planted on purpose."""
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import probed as network
from tiny import probed_batch as batch

import minifqt
from minifqt import quantizers
from minifqt.layers import ReLU, Sequential, build
from minifqt.study import Probe, measure, sites, terms, theorems, variance
from minifqt.study.__main__ import main

SITES = ["7.grad_w", "7.grad_x", "3.grad_w", "3.grad_x", "0.grad_w"]


def gradient_of(net):
    return np.concatenate([np.asarray(p.grad).reshape(-1) for p in net.params().values()])


# ---- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_with_all_sites_off_the_gradient_is_that_of_qat(fused):
    x, labels = batch()
    qat = network("qat8", fused)
    _, dlogits = minifqt.cross_entropy(qat.forward(x), labels)
    qat.backward(dlogits)
    with Probe(network(fused=fused), x, labels) as p:
        assert np.array_equal(p.gradient({}), gradient_of(qat))
        assert set(p.sites) == {*SITES} | ({"0.grad_x"} if not fused else set())


@pytest.mark.parametrize("recipe", ["psq4", "bhq3", "ptq8"])
def test_with_all_sites_on_the_gradient_is_that_of_the_networks_own_step(recipe):
    x, labels = batch()
    net = network(recipe)
    net.streams.step = 7
    _, dlogits = minifqt.cross_entropy(net.forward(x), labels)
    net.backward(dlogits)
    own = gradient_of(net)
    with Probe(network(recipe), x, labels, seed=5) as p:
        assert np.array_equal(p.gradient(dict.fromkeys(p.sites, 7)), own)
        assert not np.array_equal(p.gradient(dict.fromkeys(p.sites, 8)), own)


def test_a_probe_leaves_the_network_as_it_was():
    x, labels = batch()
    net, other = network(), network()
    net.eval()
    before = {name: array.copy() for name, array in net.state().items()}
    bound = [layer.q.grad_x for _, layer in net.walk() if hasattr(layer, "q")]
    with Probe(net, x, labels) as p:
        p.gradient(dict.fromkeys(p.sites, 1))
    assert not net.training
    assert bound == [layer.q.grad_x for _, layer in net.walk() if hasattr(layer, "q")]
    for name, array in net.state().items():
        assert np.array_equal(array, before[name], equal_nan=True), name
    losses = [[float(minifqt.train_step(one.train(), minifqt.SGD(), x, labels, 0.1, t))
               for t in range(2)] for one in (net, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("wrong", [np.arange(3), np.full(8, 99)])
def test_a_probe_that_cannot_be_made_leaves_the_network_as_it_was(wrong):
    net = network()
    net.layers[0].eval()
    places = list(vars(net.layers[3].q).values())
    with pytest.raises((ValueError, IndexError)):  # noqa: PT011 - whatever the loss says
        Probe(net, batch()[0], wrong)
    assert [layer.training for _, layer in net.walk()][:3] == [True, False, True]
    assert list(vars(net.layers[3].q).values()) == places
    Probe(net, *batch()).__exit__()
    assert not net.layers[0].training


def test_a_network_without_quantized_layers_raises():
    net = build(Sequential(ReLU()), "bhq5")
    with pytest.raises(ValueError, match="no quantized layer: there is nothing to study"):
        Probe(net, *batch())


def columns_of(p, site):
    """Γ by brute force: what a unit error in each element of this site does, (P, elements)."""
    def bumped(i):
        def bump(t):
            codes = t.codes.copy()
            codes.reshape(-1)[i] += 1
            return replace(t, codes=codes)
        return bump

    exact = p.gradient({})
    return np.stack([p.gradient({}, through={site: bumped(i)}) - exact
                     for i in range(p.errors[site].size)], axis=1)


@pytest.mark.parametrize("recipe", ["psq4", "bhq4"])
@pytest.mark.parametrize("site", SITES[:2])
def test_the_response_is_the_sum_of_single_errors_of_one_step(recipe, site):
    with Probe(network(recipe), *batch()) as p:
        q = quantizers.create(p.specs[site][:3], bits=int(p.specs[site][3]))
        t = q(p.errors[site], minifqt.Streams(0).stream(site))
        step = np.broadcast_to(t.scale, t.shape).astype("float64")
        step = step if t.mix is None else t.mix.undo(step)
        expected = columns_of(p, site) @ step.reshape(-1)
        largest = abs(expected).max()
        assert abs(p.response(site) - expected).max() < 1e-3 * largest   # of float32 gradients


# ---- the terms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["psq4", "bhq3"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_parts_of_a_draw_sum_to_its_whole_error(recipe, fused):
    with Probe(network(recipe, fused), *batch()) as p:
        t, exact = measure(p, range(3)), p.gradient({})
        for draw in range(3):
            error = p.gradient(dict.fromkeys(p.sites, draw)) - exact
            assert np.isclose(t.grams[draw].sum(), error @ error, rtol=1e-6)
            for name, at in p.blocks.items():
                share = exact[at] @ error[at] / (exact[at] @ exact[at])
                assert np.isclose(t.projected[draw][t.parameters.index(name)], share)
        assert np.array_equal(t.grams, t.grams.swapaxes(1, 2))


@pytest.mark.parametrize("site", SITES[:2])
def test_a_first_sites_term_is_its_closed_form(site):
    """Σ_i Var[Q(dy)_i] ‖Γ_i‖²: elements' noises are independent, and nothing is above it."""
    with Probe(network("psq3"), *batch()) as p:
        q, dy = quantizers.create(p.specs[site][:3], bits=int(p.specs[site][3])), p.errors[site]
        expected = q.variance(dy).reshape(-1) @ (columns_of(p, site) ** 2).sum(axis=0)
        own = measure(p, range(400)).grams[:, p.sites.index(site), p.sites.index(site)]
    assert abs(own.mean() - expected) < 4 * own.std() / np.sqrt(len(own))


def test_the_terms_of_theorem_2_sum_to_the_variance_of_many_gradients():
    with Probe(network("psq3"), *batch()) as p:
        found = theorems.layers(measure(p, range(150)))
        many = np.stack([p.gradient(dict.fromkeys(p.sites, draw)) for draw in range(1000, 1300)])
    whole = ((many - many.mean(axis=0)) ** 2).sum() / (len(many) - 1)
    spread = ((many - many.mean(axis=0)) ** 2).sum(axis=1).std() / np.sqrt(len(many))
    total = sum(term for term, _ in found.terms.values())
    error = np.hypot(spread, found.ratio[1] * total) + found.total[1]
    assert abs(total - whole) < 4 * error
    assert abs(found.ratio[0] - 1) < 4 * found.ratio[1] < 0.4
    assert all(abs(z) < found.limit for z, _, _ in found.pairs)


def test_more_draws_of_one_site_are_those_of_all_sites():
    with Probe(network("bhq4"), *batch()) as p:
        t = measure(p, range(4))
        for i, site in enumerate(p.sites[:5]):
            again = terms.along_site(p, site, range(4))
            assert np.allclose(again, t.along[:, i], rtol=1e-6, atol=1e-9), site


def test_fewer_than_two_draws_raise():
    with Probe(network(), *batch()) as p:
        for few in (0, 1):
            with pytest.raises(ValueError, match=f"{few} draws: a variance needs at least two"):
                measure(p, range(few))


# ---- Theorem 1, and errors planted on purpose ----------------------------------------------------


@pytest.fixture
def tilted():
    """ptq and psq whose every code is a tenth of a step too high."""
    def tilt(kind):
        def call(self, x, stream):
            t = kind.__call__(self, x, stream)
            return replace(t, zero=t.zero - np.float32(0.1))
        return type(f"Tilted{kind.__name__}", (kind,), {"__call__": call})

    for name in ("ptq", "psq"):
        quantizers.register(f"tilted_{name}")(tilt(type(quantizers.create(name, bits=4))))
    yield
    for name in ("ptq", "psq"):
        del quantizers.base._REGISTRY[f"tilted_{name}"]


@pytest.fixture
def echoing():
    """psq whose codes are half a step too high in even draws, too low in odd ones."""
    kind = type(quantizers.create("psq", bits=4))

    def call(self, x, stream):
        t = kind.__call__(self, x, stream)
        return replace(t, zero=t.zero - np.float32(0.5 * (-1) ** stream.streams.step))

    quantizers.register("echo")(type("Echo", (kind,), {"__call__": call}))
    yield
    del quantizers.base._REGISTRY["echo"]


def test_an_unbiased_gradient_raises_no_alarm():
    with Probe(network("psq4"), *batch()) as p:
        found = theorems.unbiased(measure(p, range(60)))
    assert found.alarms == []
    assert [test.name for test in found.sites] == SITES
    assert 3.5 < found.limit < 4.5


@pytest.mark.parametrize("site", SITES)
def test_a_bias_planted_at_a_site_is_found_there_with_the_draws_that_are_asked_for(site, tilted):  # noqa: ARG001 - it registers
    kind = "ptq8" if site.endswith("grad_w") else "psq4"
    with Probe(network("psq4"), *batch()) as p:
        needed = next(test.needed for test in theorems.unbiased(
            measure(p, range(40)), bias=0.1).sites if test.name == site)
        t = measure(p, range(100, 100 + max(needed, 20)), {site: f"tilted_{kind}"})
    found = theorems.unbiased(t, bias=0.1)
    assert site in [test.name for test in found.alarms]
    test = next(test for test in found.sites if test.name == site)
    assert abs(test.mean - 0.1) < 5 * test.error


def test_the_limit_keeps_false_alarms_at_one_study_in_a_thousand():
    """Normal noise in place of the terms: 4,000 studies of 6 draws, as t is hardest to judge."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(4000):
        t = terms.Terms(list("abcde"), np.zeros((6, 5, 5)), rng.standard_normal((6, 5)), ["w", "b"],
                        rng.standard_normal((6, 2)))
        alarms += bool(theorems.unbiased(t).alarms)
    assert alarms <= 13                                   # 4 expected; P(14 or more) < 1e-4


def test_the_draws_that_are_asked_for_find_the_bias_99_times_in_100():
    def study(rng, draws, bias):
        along = rng.standard_normal((draws, 5))
        along[:, 2] += bias
        return theorems.unbiased(terms.Terms(list("abcde"), np.zeros((draws, 5, 5)), along, ["w"],
                                             rng.standard_normal((draws, 1))), bias=0.3)

    rng = np.random.default_rng(0)
    needed = study(rng, 4000, 0).sites[2].needed          # of noise of one step
    found = sum("c" in [test.name for test in study(rng, needed, 0.3).alarms] for _ in range(1000))
    assert 978 <= found < 1000                            # 990 ± 3.1


def test_noise_that_two_layers_share_is_found(echoing):  # noqa: ARG001 - it registers
    """Each site alone is unbiased, so that Theorem 1 holds; together they are not independent."""
    with Probe(network("psq4"), *batch()) as p:
        alone, both = (measure(p, range(60), dict.fromkeys(some, "echo4"))
                       for some in (["7.grad_x"], ["7.grad_x", "3.grad_x"]))
    assert theorems.unbiased(both).alarms == []
    assert abs(theorems.layers(alone).pairs[0][0]) < theorems.layers(alone).limit
    found = theorems.layers(both)
    assert found.pairs[0][1:] == ("3.grad_x", "7.grad_x")
    assert abs(found.pairs[0][0]) > found.limit
    assert abs(found.ratio[0] - 1) > 4 * found.ratio[1]


# ---- single layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ptq", "psq", "bhq"])
def test_bounds_are_the_quantizers_own_numbers(name):
    dy = np.random.default_rng(0).standard_t(4, (16, 40)).astype("float32")
    q, row = quantizers.create(name, bits=4), sites.bounds(name, 4, dy, 200)
    size = (dy.astype("float64") ** 2).sum()
    assert np.isclose(row["closed"], q.variance(dy).sum() / size)
    assert np.isclose(row["bound"], q.bound(dy) / size)
    assert row["closed"] <= row["bound"]
    assert abs(row["z"]) < 4


def test_a_wrong_variance_formula_is_exposed(monkeypatch):
    dy = np.random.default_rng(0).standard_t(4, (16, 40)).astype("float32")
    kind = type(quantizers.create("psq", bits=4))
    right = kind.variance
    monkeypatch.setattr(kind, "variance", lambda self, x: 1.1 * right(self, x))
    assert abs(sites.bounds("psq", 4, dy, 200)["z"]) > 5


def test_bins_count_codes_and_ranges():
    dy = np.random.default_rng(0).standard_normal((6, 30)).astype("float32")
    row = sites.bins("psq", 3, dy)
    assert sum(row["occupied"]) == dy.size
    assert len(row["occupied"]) == 8
    assert np.allclose(row["ranges"], np.ptp(dy, axis=1) / abs(dy).max())
    assert np.isclose(sites.bits_used([5, 5, 0, 5, 5]), 2)
    assert sites.bits_used([7]) == 0


def test_ranges_of_mixed_rows_are_those_of_their_steps_mixed_back():
    dy = np.random.default_rng(0).standard_normal((8, 30)).astype("float32")
    dy[0] *= 100
    q = quantizers.create("bhq", bits=4)
    t = q(dy, minifqt.Streams(0).stream("study.bins"))
    undo = np.stack([t.mix.undo(column[:, None])[:, 0] for column in np.eye(8)], axis=1)
    expected = np.sqrt((undo * t.scale[:, 0]) ** 2 @ np.ones(8)) * 15 / abs(dy).max()
    assert np.allclose(sites.bins("bhq", 4, dy)["ranges"], expected, rtol=1e-5)


# ---- variance against bits -----------------------------------------------------------------------


def test_quantization_variance_is_that_of_many_gradients_and_follows_the_bits():
    with Probe(network("psq4"), *batch()) as p:
        by_bits = {b: variance.quantization(p, f"psq{b}", range(200))[0] for b in (5, 6, 7)}
        on = [site for site in p.sites if site.endswith("grad_x")]
        many = np.stack([p.gradient(dict.fromkeys(on, draw), dict.fromkeys(on, "psq6"))
                         for draw in range(200)])
    assert np.isclose(by_bits[6], many.var(axis=0, ddof=1).sum(), rtol=0.05)
    assert all(0.8 < slope < 1.25 for slope in variance.slopes(by_bits).values())


def test_sampling_variance_is_that_of_qat_gradients():
    net, rng = network(), np.random.default_rng(0)
    batches = [(rng.standard_normal((8, 6, 6, 2), dtype="float32"), np.arange(8) % 3)
               for _ in range(6)]
    found, mean = variance.sampling(net, batches)
    gradients = []
    for x, labels in batches:
        with Probe(net, x, labels) as p:
            gradients.append(p.gradient({}))
    expected = np.var(gradients, axis=0, ddof=1).sum()
    assert np.isclose(found, expected)
    assert np.isclose(mean, (np.mean(gradients, axis=0) ** 2).sum() - expected / 6)
    with pytest.raises(ValueError, match="1 batches: a variance needs at least two"):
        variance.sampling(net, batches[:1])


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("study", ["unbiased", "layers", "variance", "bounds", "bins"])
def test_a_study_writes_its_numbers_and_says_whether_the_claim_holds(study, tmp_path, capsys):
    status = main([study, "--epochs", "0", "--draws", "3", "--out", str(tmp_path),
                   "--quantizers", "psq,bhq"])
    said = capsys.readouterr()
    assert status == 0, said
    result = json.loads((tmp_path / f"{study}.json").read_text())
    assert result["study"] == study
    assert "resnet8 on digits, bhq5, seed 0" in result["network"]
    assert f"written: {tmp_path / study}.json" in said.out


@pytest.mark.parametrize(("flags", "says"), [
    (["layers", "--draws", "1"], "--draws 1: a variance needs at least 2"),
    (["layers", "--epochs", "-1"], "expected 0 or more"),
    (["bins", "--quantizers", "xyz"], "no quantizer is named 'xyz'"),
    (["bounds", "--bits", "9"], "expected 2 to 8 bits"),
    (["bins", "--epochs", "0", "--layer", "conv9"], "--layer conv9: there are fc, "),
    (["layers", "nowhere"], "there is no such checkpoint")])
def test_bad_flags_of_a_study_get_one_line(flags, says, capsys, tmp_path):
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert not (tmp_path / "out").exists()
