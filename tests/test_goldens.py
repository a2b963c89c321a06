"""Ten losses of a tiny run for each preset: a change of numbers must be meant.

`PYTHONPATH=. python tests/test_goldens.py` writes goldens.json anew; say so in CHANGELOG.md under
Numbers.
"""
import json
from pathlib import Path

import numpy as np
import pytest

import minifqt
import models

PATH = Path(__file__).with_name("goldens.json")
RECIPES = ("fp32", "qat8", "ptq8", "ptqz8", "psq8", "bhq8", "bhq5")


def losses(recipe):
    """Ten steps of resnet8 on 16 random 8×8 images, 3 channels, with Philox noise of seed 5."""
    net, optimizer = models.build("resnet8", 10, recipe, seed=5), minifqt.SGD()
    generator = minifqt.Streams(5).stream("goldens").generator(step=0)
    x = generator.standard_normal((16, 8, 8, 3), dtype="float32")
    labels = np.arange(16) % 10
    return [float(minifqt.train_step(net, optimizer, x, labels, 0.02, t)) for t in range(10)]


@pytest.mark.parametrize("instructions", ["numpy", "auto"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_ten_losses_are_the_stored_ones(recipe, instructions, set_instructions):
    set_instructions(instructions)
    # another BLAS adds float32 in another order, and a code of the forward pass flips now and then;
    # with integers alone, only exp, log and float32 elementwise code of the CPU can differ
    rtol = 1e-2 if recipe in ("fp32", "qat8") else 1e-3
    stored = json.loads(PATH.read_text())[recipe]
    np.testing.assert_allclose(losses(recipe), stored, rtol=rtol)


def test_the_recipes_differ_by_more_than_the_tolerance():
    stored = json.loads(PATH.read_text())
    for one, other in (("ptq8", "ptqz8"), ("ptq8", "psq8"), ("psq8", "bhq5"), ("bhq8", "bhq5")):
        assert max(abs(np.divide(stored[one], stored[other]) - 1)) > 1.5e-3


if __name__ == "__main__":
    PATH.write_text(json.dumps({recipe: losses(recipe) for recipe in RECIPES}, indent=1) + "\n")
