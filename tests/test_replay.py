"""Any step of any run again, bit for bit, with quantizers changed; and these commands."""
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from tiny import probed, probed_batch

import minifqt
import train
from minifqt import checkpoint
from minifqt.autobits import AutoBits
from minifqt.study import Probe, tools, variance
from minifqt.study import setting as studied
from minifqt.study.__main__ import main
from minifqt.study.replay import change, replay
from minifqt.study.setting import Setting


@pytest.fixture
def recorded(monkeypatch):
    """Gradients of each step that train.py makes, (P,), in order."""
    found, original = [], minifqt.SGD.step

    def step(self, params, lr):
        found.append(flat(params))
        original(self, params, lr)

    monkeypatch.setattr(minifqt.SGD, "step", step)
    return found


def flat(params):
    return np.concatenate([np.asarray(p.grad).reshape(-1) for p in params.values()])


# ---- any step of any run -------------------------------------------------------------------------


@pytest.mark.usefixtures("small", "quick")
@pytest.mark.parametrize("recipe", [
    "bhq5", "psq-auto", "bhq4,act=ptq5:stochastic,weight=sym4:stochastic", "fp32"])
def test_every_step_of_a_run_can_be_made_again_bit_for_bit(recipe, recorded, monkeypatch):
    monkeypatch.setattr(train, "AutoBits", lambda *a, **k: AutoBits(*a, **k, every=3))
    monkeypatch.setattr(studied, "EVERY", 3)
    assert train.main(["--epochs", "3", "--recipe", recipe, "--lr", "0.05", "--momentum", "0.8",
                       "--schedule", "steps", "--warmup", "1", "--label-smoothing", "0.1",
                       "--seed", "3", "--out", "a"]) == 0
    theirs = list(recorded)                               # of 3 epochs of 2 steps
    assert len(theirs) == 6
    for step in (0, 3, 5):
        setting = Setting("a", step)
        setting.train(setting.ahead)
        setting.settle()
        assert setting.progress.step == step
        with setting.probe(3) as probe:
            ours = probe.gradient(dict.fromkeys(probe.sites, step))
        assert np.array_equal(ours, theirs[step]), step
        batch, = setting.batches(1)
        setting.net.streams.step = 99                     # replay knows its own
        rows = replay(setting.net, batch, {}, 3, step, 0.1)["rows"]
        assert rows[-1]["norm"] == pytest.approx(np.linalg.norm(probe.exact))
        off = np.linalg.norm(ours - probe.exact) / np.linalg.norm(probe.exact)
        assert rows[-1]["noise"] == pytest.approx(off)


@pytest.mark.usefixtures("small")
def test_a_step_is_reached_from_the_latest_checkpoint_before_it():
    assert train.main(["--epochs", "2", "--out", "a"]) == 0
    assert Setting("a").progress.step == 4
    assert Setting("a").ahead == 0
    best = Setting("a/best.safetensors").progress.step
    assert Setting("a", 3).ahead == 3 - (best if best <= 3 else 0)
    assert Setting("a/last.safetensors", 1).ahead == 1    # from the start
    with pytest.raises(ValueError, match="--step 4: the run has steps 0 to 3, 2 an epoch"):
        Setting("a", 4)
    with pytest.raises(ValueError, match="--step -1"):
        Setting("a", -1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("part", "key"), [("config", "recipe_fields"), ("config", "momentum"),
                                           ("progress", "renamed")])
def test_a_run_of_another_version_is_one_clear_line(part, key, capsys):
    assert train.main(["--epochs", "1", "--out", "a"]) == 0
    arrays, meta = checkpoint.load(Path("a/last.safetensors"))
    values = {name: value for name, value in meta[part].items() if name != key}
    values |= {"renamed": 1} if key == "renamed" else {}
    checkpoint.save(Path("a/last.safetensors"), arrays, {**meta, part: values})
    assert main(["layers", "a"]) == 1
    assert "a was made by another version of minifqt" in capsys.readouterr().err


@pytest.mark.usefixtures("small", "quick")
def test_an_automatic_recipe_given_to_a_study_is_chosen_there():
    assert train.main(["--epochs", "1", "--out", "a"]) == 0
    setting = Setting("a")
    setting.use("psq-auto")
    bits = {layer.q.grad_x.bits for layer in setting.layers.values()}
    assert bits - {8}


@pytest.mark.usefixtures("small")
def test_a_study_of_a_run_takes_its_very_recipe():
    assert train.main(["--epochs", "1", "--recipe", "bhq5,grad_w=ptq7:nearest,act=ptq6",
                       "--out", "a"]) == 0
    layer = Setting("a").net.conv1
    assert [str(bound) for bound in vars(layer.q).values()] == [
        "ptq6", "sym8", "ptq7:nearest", "bhq5"]
    other = Setting("a")
    other.use("psq3")
    assert [str(bound) for bound in vars(other.net.conv1.q).values()] == [
        "ptq8", "sym8", "ptq8", "psq3"]


# ---- changes -------------------------------------------------------------------------------------


def specs(net):
    return {f"{name}.{place}": str(bound) for name, layer in net.walk() if hasattr(layer, "q")
            for place, bound in vars(layer.q).items()}


@pytest.mark.parametrize(("where", "spec", "met"), [
    ("grad_x", "ptq3", ["0.grad_x", "3.grad_x", "7.grad_x"]),
    ("3", "identity", ["3.grad_w", "3.grad_x"]),
    ("7.weight", "sym4", ["7.weight"]),
    ("act", "ptq5", ["0.act", "3.act", "7.act"])])
def test_a_change_meets_what_it_names_and_nothing_else(where, spec, met):
    net = probed("psq4")
    before, after = specs(net), specs(change(net, {where: spec}))
    assert {site: s for site, s in after.items() if s != before[site]} == dict.fromkeys(met, spec)


def test_a_change_of_what_is_not_there_raises():
    for where in ("grad_y", "9", "3.grad", "1"):          # 1 is a batch norm
        with pytest.raises(ValueError, match=f"--change {where}: there is no such place.*0, 3, 7"):
            change(probed(), {where: "psq4"})
    with pytest.raises(ValueError, match="no quantizer is named 'xsq'"):
        change(probed(), {"grad_x": "xsq4"})


def test_a_changed_activation_keeps_its_running_range():
    net = probed()
    net.forward(probed_batch()[0])
    ranges = [net.layers[0].q.act.range]
    ranges.append(change(net, {"act": "ptq5"}).layers[0].q.act.range)
    assert np.array_equal(*ranges)


def gradient_of(net, changes, step):
    net = change(deepcopy(net), changes)
    with Probe(net, *probed_batch(), seed=4) as probe:
        return probe.gradient(dict.fromkeys(probe.sites, step)), probe.exact, probe.blocks


@pytest.mark.parametrize("changes", [{"grad_x": "psq3"}, {"3": "identity"}, {"act": "ptq4"}])
def test_a_replay_compares_the_two_gradients_layer_by_layer(changes):
    net = probed("psq4")
    found = replay(net, probed_batch(), changes, seed=4, step=7)
    was, exact, blocks = gradient_of(net, {}, 7)
    now, _, _ = gradient_of(net, changes, 7)
    assert [r["parameter"] for r in found["rows"]] == [*blocks, "all"]
    for r, at in zip(found["rows"], [*blocks.values(), slice(None)], strict=True):
        size = np.linalg.norm(exact[at])
        assert r["norm"] == pytest.approx(size)
        for key, difference in (("noise", was - exact), ("changed", now - exact),
                                ("moved", now - was)):
            assert r[key] == pytest.approx(np.linalg.norm(difference[at]) / size, abs=1e-12)
        cosine = was[at] @ now[at] / np.linalg.norm(was[at]) / np.linalg.norm(now[at])
        assert r["cosine"] == pytest.approx(cosine)
    assert (found["loss"] == found["changed_loss"]) == ("act" not in changes)


def test_a_replay_without_changes_moves_nothing_and_with_all_off_is_qat():
    for changes, key in (({}, "moved"), ({"grad_x": "identity", "grad_w": "identity"}, "changed")):
        rows = replay(probed("bhq4"), probed_batch(), changes, 0, 1)["rows"]
        assert {r[key] for r in rows} == {0}
        assert any(r["noise"] for r in rows)


# ---- terms over batches --------------------------------------------------------------------------


def test_terms_over_batches_are_the_means_of_single_draws():
    net, some = probed("psq4"), [probed_batch(8), probed_batch(6)]
    found, values = variance.terms(net, some, first=5, seed=2), []
    for draw, one in enumerate(some, 5):
        with Probe(net, *one, seed=2) as probe:
            on, last = {}, probe.exact
            on["7.grad_x"] = draw
            values.append(((probe.gradient(on) - last) ** 2).sum())
    assert found["7.grad_x"][0] == pytest.approx(np.mean(values))
    assert found["7.grad_x"][1] == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.usefixtures("small", "quick")
@pytest.mark.parametrize("flags", [
    ["replay", "--change", "grad_x=psq3", "--change", "conv1=identity"], ["replay"], ["audit"],
    ["bits", "--draws", "2", "--alpha", "0.5"], ["audit", "--recipe", "qat8"]])
def test_the_commands_write_numbers_and_a_picture(flags, capsys, monkeypatch):
    monkeypatch.setattr(tools, "BATCHES", 3)
    assert main([*flags, "--epochs", "0", "--out", "out"]) == 0
    said = capsys.readouterr().out
    result = json.loads(Path(f"out/{flags[0]}.json").read_text())
    assert result["study"] == flags[0]
    assert f"written: out/{flags[0]}.json" in said


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("flags", "says"), [
    (["replay", "--change", "grad_x"], "--change grad_x: expected WHERE=SPEC, as in"),
    (["replay", "--change", "conv9=psq4"], "--change conv9: there is no such place"),
    (["replay", "--step", "99"], "--step 99: the run has steps 0 to 1"),
    (["replay", "--change", "grad_x=bhq-auto"], "bits are chosen in training, or by the study"),
    (["layers", "--recipe", "qat8"], "no gradient is quantized here: there is no noise to study"),
    (["unbiased", "--recipe", "fp32"], "no gradient is quantized here"),
    (["bits", "--alpha", "0"], "--alpha 0.0: expected a number above 0"),
    (["bits", "--recipe", "qat8"], "identity has no bits to choose"),
    (["report"], "report looks at a run of train.py: give its folder")])
def test_bad_flags_get_one_line(flags, says, capsys):
    assert main([*flags, "--epochs", "0", "--out", "out"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
