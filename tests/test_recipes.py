"""Recipes: the presets, what replace changes, and a message for every error, naming the field."""
import dataclasses

import pytest

import minifqt
from minifqt import quantizers
from minifqt.recipes import PRESETS, Recipe


def test_the_default_recipe_is_the_papers():
    recipe = Recipe()
    places = recipe.act, recipe.weight, recipe.grad_w, recipe.grad_x
    assert places == ("ptq8", "sym8", "ptq8", "bhq5")
    assert recipe.eval_range == "running"


def test_fp32_quantizes_nothing():
    recipe = minifqt.recipe("fp32")
    assert {recipe.act, recipe.weight, recipe.grad_w, recipe.grad_x} == {"identity"}


def test_qat8_quantizes_the_forward_pass_alone():
    assert minifqt.recipe("qat8") == Recipe("ptq8", "sym8", "identity", "identity")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["ptq", "ptqz", "psq", "bhq", "sym"])
def test_a_gradient_quantizer_and_its_bits_are_a_recipe(name, bits):
    recipe = minifqt.recipe(f"{name}{bits}")
    assert recipe == Recipe(act="ptq8", weight="sym8", grad_w="ptq8", grad_x=f"{name}{bits}")


def test_every_preset_is_a_valid_recipe():
    for name, fields in PRESETS.items():
        assert minifqt.recipe(name) == Recipe(**fields)


def test_a_recipe_is_its_own_recipe():
    recipe = Recipe(grad_x="psq4")
    assert minifqt.recipe(recipe) is recipe


def test_replace_changes_a_copy():
    recipe = minifqt.recipe("bhq5")
    other = recipe.replace(grad_w="identity", eval_range="batch")
    assert other == Recipe(grad_w="identity", grad_x="bhq5", eval_range="batch")
    assert recipe == Recipe(grad_x="bhq5")


def test_fields_may_follow_a_recipes_name():
    assert minifqt.recipe("bhq5,grad_w=identity,eval_range=batch") == Recipe(
        grad_w="identity", eval_range="batch")
    assert minifqt.recipe("bhq-auto,alpha=0.05") == Recipe(grad_x="bhq-auto", alpha=0.05)


@pytest.mark.parametrize(("name", "says"), [
    ("bhq5,grad_y=ptq8", "recipe bhq5, 'grad_y=ptq8': expected FIELD=VALUE, a field of act, weig"),
    ("bhq5,grad_w", "recipe bhq5, 'grad_w': expected FIELD=VALUE"),
    ("bhq5,", "recipe bhq5, '': expected FIELD=VALUE"),
    ("bhq5,grad_w=ptq9", "recipe, grad_w: ptq with bits 9"),
    ("bhq-auto,alpha=small", "recipe, alpha 'small': expected a number above 0"),
    ("bhq-auto,alpha=0", "recipe, alpha 0.0: expected a number above 0"),
    ("bhq-auto,alpha=inf", "recipe, alpha inf: expected a number above 0"),
    ("bhq-auto,alpha=nan", "recipe, alpha nan: expected a number above 0"),
    ("bhq5,act=ptq-auto", "act ptq-auto, weight sym8: only the bits of gradients are chosen"),
    ("bhq5,weight=sym-auto", "weight sym-auto: only the bits of gradients are chosen"),
    ("fp32,grad_x=identity-auto", "recipe, grad_x: identity8: full precision has no bits")])
def test_bad_fields_after_a_name_get_one_line(name, says):
    with pytest.raises(ValueError, match=says):
        minifqt.recipe(name)


def test_a_recipe_knows_whether_its_bits_are_chosen():
    assert minifqt.recipe("psq-auto").automatic
    assert minifqt.recipe("bhq5,grad_w=ptq-auto").automatic
    assert not minifqt.recipe("bhq5").automatic


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="grad_x"):
        Recipe().grad_x = "ptq8"


def test_recipes_can_be_compared_and_hashed():
    assert len({Recipe(), Recipe(), minifqt.recipe("bhq5"), minifqt.recipe("bhq4")}) == 2


@pytest.mark.parametrize("place", ["act", "weight", "grad_w", "grad_x"])
@pytest.mark.parametrize("spec", ["ptq8:nearest", "ptqz4:stochastic", "identity", "sym2"])
def test_every_place_takes_one_scale_a_tensor(place, spec):
    assert getattr(Recipe().replace(**{place: spec}), place) == spec


@pytest.mark.parametrize(("place", "instead"), [("act", "ptq8"), ("weight", "sym8"),
                                                ("grad_w", "ptq8")])
@pytest.mark.parametrize("spec", ["psq4:stochastic", "bhq2"])
def test_a_scale_a_row_is_for_grad_x_alone(place, instead, spec):
    name = spec.partition(":")[0]
    with pytest.raises(ValueError, match=f"^recipe, {place} {name}: each row has .* use {instead}"):
        Recipe().replace(**{place: spec})
    assert Recipe().replace(grad_x=spec).grad_x == spec


@pytest.mark.parametrize("place", ["act", "weight", "grad_w", "grad_x"])
@pytest.mark.parametrize(("spec", "message"), [
    ("hqq8", "no quantizer is named 'hqq'; there are identity, "),
    ("ptq", "ptq with bits None: expected 2 to 8 bits, as in ptq8"),
    ("ptq1", "ptq with bits 1: expected 2 to 8 bits"),
    ("bhq9", "bhq with bits 9: expected 2 to 8 bits"),
    ("identity8", "identity8: full precision has no bits"),
    ("ptq8:up", "quantizer 'ptq8:up': expected a name and its bits"),
    ("", "quantizer '': expected a name and its bits"),
    (8, "quantizer 8: expected a name and its bits"),
    (None, "quantizer None: expected a name and its bits"),
])
def test_a_bad_spec_raises_and_names_its_place(place, spec, message):
    with pytest.raises(ValueError, match=f"^recipe, {place}: {message}"):
        Recipe().replace(**{place: spec})


def test_a_bad_eval_range_raises():
    with pytest.raises(ValueError, match="recipe, eval_range 'last': expected running or batch"):
        Recipe(eval_range="last")


@pytest.mark.parametrize("name", ["fp16", "qat4", "bhq", "bhq9", "hadamard5", "BHQ5", ""])
def test_an_unknown_recipe_raises_and_lists_the_presets(name):
    with pytest.raises(ValueError, match=f"^recipe '{name}': expected fp32, qat8, or a gradient"):
        minifqt.recipe(name)


def test_identity_is_no_recipe():
    with pytest.raises(ValueError, match="full precision is the recipe fp32; qat8 quantizes"):
        minifqt.recipe("identity")


def test_a_recipe_with_an_unknown_field_raises():
    with pytest.raises(TypeError, match="grad_y"):
        Recipe().replace(grad_y="ptq8")


def test_the_places_of_a_layer_are_those_of_its_recipe():
    recipe = Recipe(act="ptq6", weight="sym4", grad_w="ptqz7", grad_x="bhq3")
    layer = minifqt.layers.Linear(5, 4, recipe=recipe)
    for place in ("act", "weight", "grad_w", "grad_x"):
        bound = getattr(layer.q, place)
        assert str(bound) == getattr(recipe, place)
        assert isinstance(bound, quantizers.Bound)
        assert bound.rounding == ("stochastic" if place.startswith("grad") else "nearest")
