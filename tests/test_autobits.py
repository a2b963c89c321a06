"""Automatic bits: the cheapest for a budget, chosen as training goes, saved, and kept."""
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from tiny import InterruptAt, digits, outcome, probed, probed_batch

import minifqt
import models
import train
from data.loader import Loader
from minifqt import autobits
from minifqt.autobits import AutoBits, cheapest, due, fewest
from minifqt.quantizers.base import Automatic
from minifqt.study import variance
from minifqt.training import DivergedError


def law(term, now):
    return {b: term * ((2**now - 1) / (2**b - 1)) ** 2 for b in autobits.BITS}


class Fake:
    """Noise of which all is known: `of` is bits → site → variance."""

    def __init__(self, of):
        self.terms = of

    def total(self, bits):
        return sum(self.terms(bits).values())


# ---- the choice ----------------------------------------------------------------------------------


def test_the_cheapest_bits_are_those_of_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        costs = [int(c) for c in rng.integers(1, 20, 4)]
        terms = [law(v, 5) for v in rng.lognormal(0, 2, 4)]
        budget = float(rng.lognormal(1.5, 2))
        fit = [(sum(c * b for c, b in zip(costs, bits, strict=True)), bits)
               for bits in product(autobits.BITS, repeat=4)
               if sum(t[b] for t, b in zip(terms, bits, strict=True)) <= budget]
        found = cheapest(costs, terms, budget)
        if not fit:
            assert found is None
        else:
            assert sum(c * b for c, b in zip(costs, found, strict=True)) == min(fit)[0]
            assert sum(t[b] for t, b in zip(terms, found, strict=True)) <= budget


def test_where_the_law_holds_measuring_finds_the_cheapest_at_once():
    of, costs = {"a": 3.0, "b": 0.2, "c": 1.0}, {"a": 100, "b": 300, "c": 100}

    def terms(bits):
        return {site: law(v, 5)[bits[site]] for site, v in of.items()} | {"fixed": 2.0}

    found = fewest(Fake(terms), costs, dict.fromkeys(of, 8), budget=4.0)
    best = min((sum(costs[s] * b for s, b in zip(of, bits, strict=True)), bits)
               for bits in product(autobits.BITS, repeat=3)
               if sum(terms(dict(zip(of, bits, strict=True))).values()) <= 4.0)
    assert tuple(found.bits.values()) == best[1]
    assert found.total == pytest.approx(sum(terms(found.bits).values()))
    assert found.average == pytest.approx(best[0] / 500)


def test_bits_are_exchanged_between_sites_where_the_budget_is_used_up():
    """As an exact search over all would: from equal bits with room for nothing."""
    of, costs = {"a": 1.0, "b": 0.02, "c": 0.02}, {"a": 100, "b": 400, "c": 400}
    noise = Fake(lambda bits: {site: law(v, 5)[bits[site]] for site, v in of.items()})
    budget = noise.total({"a": 5, "b": 5, "c": 5}) * 1.01
    found = fewest(noise, costs, {"a": 5, "b": 5, "c": 5}, budget)
    assert found.total <= budget
    assert found.bits == {"a": 6, "b": 3, "c": 3}


def test_where_few_bits_explode_what_was_measured_decides():
    def terms(bits):                                      # noise from above widens what is below
        return {"a": law(1e-7, 5)[bits["a"]],
                "b": law(1e-7, 5)[bits["b"]] * (1000 if bits["a"] < 4 else 1)}

    found = fewest(Fake(terms), {"a": 1, "b": 1}, {"a": 8, "b": 8}, budget=3e-6)
    assert found.total <= 3e-6
    assert found.bits["a"] == 4


def test_from_too_few_bits_the_way_is_up():
    noise = Fake(lambda bits: {site: law(1, 5)[b] for site, b in bits.items()})
    found = fewest(noise, {"a": 1, "b": 1}, {"a": 2, "b": 2}, budget=2.5)
    assert found.bits == {"a": 5, "b": 5}


def test_a_budget_that_cannot_be_kept_gives_the_least_noise():
    noise = Fake(lambda bits: {"a": law(1, 5)[bits["a"]], "fixed": 5.0})
    found = fewest(noise, {"a": 1}, {"a": 5}, 1.0)
    assert found.bits == {"a": 8}
    assert found.total > 1


def test_sites_that_reach_no_parameter_are_left_out():
    noise = Fake(lambda bits: {"a": 1.0, "b": 0.0})
    found = fewest(noise, {"a": 1, "b": 1}, {"a": 5, "b": 5}, 10.0)
    assert list(found.bits) == ["a"]


def test_bits_are_chosen_often_at_first():
    assert [step for step in range(4001) if due(step, 1000)] == [
        0, 64, 128, 256, 512, 1000, 2000, 3000, 4000]
    assert [step for step in range(100) if due(step, 20)] == [0, 20, 40, 60, 80]


# ---- on a network --------------------------------------------------------------------------------


def batches(count=8):
    rng = np.random.default_rng(1)
    return [(rng.standard_normal((8, 6, 6, 2), dtype="float32"), np.arange(8) % 3)
            for _ in range(count)]


@pytest.mark.parametrize("fused", [False, True])
def test_the_chosen_bits_keep_the_budget_and_one_bit_less_everywhere_does_not(fused):
    net, some = probed("psq-auto,grad_w=ptq-auto", fused), batches()
    found = AutoBits(net, None, 0.03).choose(0, some)
    sampled, _ = variance.sampling(net, some)

    def total(less):
        specs = {site: f"{'ptq' if site.endswith('w') else 'psq'}{max(2, b - less)}"
                 for site, b in found.bits.items()}
        many = variance.terms(net, some[:4] * 8, specs, first=1000)
        return sum(mean for mean, _ in many.values())

    assert total(0) < 1.25 * 0.03 * sampled               # measured with other noise
    assert total(1) > 1.5 * 0.03 * sampled
    assert len(set(found.bits.values())) > 1
    assert {b.name: b.bits for b in AutoBits(net, None).places.values()
            if b.name in found.bits} == found.bits


def test_choosing_changes_nothing_but_the_bits_and_knows_no_noise_of_training():
    nets = [probed("psq-auto") for _ in range(2)]
    before = {name: array.copy() for name, array in nets[0].state().items()}
    nets[0].streams.step = 77
    found = [AutoBits(net, None, 0.02).choose(5, batches()) for net in nets]
    assert found[0] == found[1]
    for name, array in nets[0].state().items():
        if not name.endswith("bits"):
            assert np.array_equal(array, before[name], equal_nan=True), name
    assert nets[0].streams.step == 77
    assert nets[0].training


def test_a_choice_is_a_function_of_its_step_where_the_forward_pass_is_noisy():
    found = []
    for now in (0, 77):
        net = probed("psq-auto,weight=sym4:stochastic")
        net.streams.step = now
        found.append(AutoBits(net, None, 0.02).choose(5, batches()))
    assert found[0] == found[1]
    assert AutoBits(net, None, 0.02).choose(6, batches()).terms != found[0].terms


def test_a_choice_that_meets_nan_is_a_divergence():
    net = probed("psq-auto")
    net.params()["0.weight"].data[:] = np.nan
    with pytest.raises(DivergedError, match="bits before step 5: 0.weight: NaN or infinity"):
        AutoBits(net, None).choose(5, batches())


def test_a_budget_that_cannot_be_kept_is_said(caplog):
    found = AutoBits(probed("psq-auto"), None, 1e-9).choose(5, batches())
    assert set(found.bits.values()) == {8}
    assert "step 5: quantization variance is" in caplog.text
    assert "alpha 1e-09 cannot be kept" in caplog.text


def test_a_smaller_alpha_costs_more_bits():
    averages = [AutoBits(probed("psq-auto"), None, alpha).choose(0, batches()).average
                for alpha in (0.3, 0.1, 0.03)]
    assert averages == sorted(set(averages))


def test_a_network_without_automatic_places_raises():
    with pytest.raises(ValueError, match="no place of this network is automatic: build it with"):
        AutoBits(probed("psq4"), None)


# ---- the bits in the network's state -------------------------------------------------------------


def test_bits_are_part_of_the_state():
    net, other = probed("psq-auto"), probed("psq-auto")
    assert [b.bits for b in AutoBits(net, None).places.values()] == [8, 8, 8]
    for bits in range(2, 9):
        net.layers[3].q.grad_x.bits = bits
        assert (net.layers[3].q.grad_x.bits, net.layers[3].q.grad_x.spec) == (bits, f"psq{bits}")
    net.layers[3].q.grad_x.bits = 3
    state = {name: np.array(array) for name, array in net.state().items()}
    assert state["3.grad_x_bits"] == 3
    other.load_state(state)
    assert other.layers[3].q.grad_x.bits == 3
    assert str(other.layers[3].q.grad_x) == "psq-auto (psq3)"
    other.load_state({name: array for name, array in state.items() if "bits" not in name})
    assert other.layers[3].q.grad_x.bits == 8             # of a run with fixed bits
    fixed = probed("psq4")
    fixed.load_state(state)
    assert "3.grad_x_bits" not in fixed.state()


def test_the_layer_quantizes_with_the_bits_that_were_chosen():
    x, labels = probed_batch()
    gradients = []
    for recipe in ("psq-auto", "psq3"):
        net = probed(recipe)
        for _, layer in net.walk():
            if isinstance(getattr(layer, "q", None) and layer.q.grad_x, Automatic):
                layer.q.grad_x.bits = 3
        _, dlogits = minifqt.cross_entropy(net.forward(x), labels)
        net.backward(dlogits)
        gradients.append(net.params()["0.weight"].grad)
    assert np.array_equal(*gradients)
    with pytest.raises(ValueError, match="expected 2 to 8 bits"):
        Automatic("psq-auto", net.streams, "0.grad_x").bits = 9


# ---- in training ---------------------------------------------------------------------------------


def loader(net, batch_size=16):
    return Loader(digits(64)[0], batch_size, net.streams, train=True, padding=1)


@pytest.mark.usefixtures("quick")
def test_it_yields_the_loaders_batches_and_chooses_before_those_that_are_due(tmp_path):
    net = models.build("resnet8", 10, "psq-auto", channels=1)
    plain, chosen = loader(net), tmp_path / "bits.jsonl"
    auto = AutoBits(net, plain, 0.1, every=3, log=chosen)
    for e, start in ((0, 0), (1, 2)):
        ours, theirs = list(auto.epoch(e, start)), list(plain.epoch(e, start))
        assert len(auto) == len(plain)
        assert all(np.array_equal(a, b) for one, other in zip(ours, theirs, strict=True)
                   for a, b in zip(one, other, strict=True))
    lines = [json.loads(line) for line in chosen.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert lines[-1]["bits"].items() <= auto.bits.items()
    assert lines[-1]["budget"] == pytest.approx(0.1 * lines[-1]["sampling"])
    sampled, _ = variance.sampling(net, plain.following(1, 2, autobits.BATCHES))
    assert lines[-1]["sampling"] == pytest.approx(sampled)
    list(auto.epoch(0))                                   # a run that was cut off, once more
    assert [json.loads(line)["step"] for line in chosen.read_text().splitlines()] == [0, 3]


@pytest.mark.usefixtures("small", "quick")
def test_a_run_with_automatic_bits_resumes_as_if_unbroken(monkeypatch):
    monkeypatch.setattr(train, "AutoBits", lambda *a, **k: AutoBits(*a, **k, every=3))
    original, base = train.Loader, ["--epochs", "2", "--batch-size", "32", "--recipe", "bhq-auto"]
    monkeypatch.setattr(train, "Loader", lambda *a, **k: (
        Unlucky(original(*a, **k)) if k["train"] else original(*a, **k)))
    assert train.main([*base, "--out", "a"]) == 130
    monkeypatch.setattr(train, "Loader", original)
    with Path("a/bits.jsonl").open("a") as log:
        log.write('{"step": 4, "bi')                      # of a run that was killed
    assert train.main(["--resume", "a"]) == 0
    assert train.main([*base, "--out", "b"]) == 0
    assert train.main([*base, "--out", "c", "--kernels", "plain"]) == 0
    assert outcome("a") == outcome("b") == outcome("c")
    logs = [[json.loads(line) for line in Path(run, "bits.jsonl").read_text().splitlines()]
            for run in "abc"]
    assert [line["step"] for line in logs[0]] == [0, 3, 6]
    assert logs[0] == logs[1]
    assert [line["bits"] for line in logs[0]] == [line["bits"] for line in logs[2]]


class Unlucky(InterruptAt):
    """Interrupted between two choices."""

    def __init__(self, whole):
        super().__init__(whole, 4)

    def following(self, *where):
        return self.loader.following(*where)


@pytest.mark.usefixtures("small", "quick")
def test_alpha_acts():
    base = ["--epochs", "1", "--batch-size", "32", "--out"]
    for alpha in ("0.1", "0.01"):
        assert train.main([*base, alpha, "--recipe", f"bhq-auto,alpha={alpha}"]) == 0
    assert outcome("0.1") != outcome("0.01")


def test_following_batches_go_on_into_the_next_epochs():
    net = models.build("resnet8", 10, "bhq5", channels=1)
    some = loader(net)                                    # four batches an epoch
    found = some.following(1, 3, 6)
    expected = [*some.epoch(1, 3), *some.epoch(2), *list(some.epoch(3))[:1]]
    assert len(found) == 6
    for (x, labels), (y, others) in zip(found, expected, strict=True):
        assert np.array_equal(x, y)
        assert np.array_equal(labels, others)
    assert some.following(0, 0, 0) == []


def test_a_quantizer_bound_automatically_names_its_tensor():
    net = probed("bhq-auto")
    dy = np.random.default_rng(0).standard_normal((8, 3)).astype("float32")
    assert net.layers[7].q.grad_x(dy).name == "7.grad_x"
    assert replace(minifqt.recipe("bhq-auto"), alpha=0.2).automatic
