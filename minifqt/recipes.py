"""Which quantizer stands in which of a layer's four places. Presets are the one dict below."""
import math
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from numbers import Real

from minifqt import quantizers

_FLOAT = {"grad_w": "identity", "grad_x": "identity"}
PRESETS = {                                               # and NAMEb: Recipe(grad_x="NAMEb")
    "fp32": {"act": "identity", "weight": "identity", **_FLOAT},
    "qat8": {"act": "ptq8", "weight": "sym8", **_FLOAT},
}


@dataclass(frozen=True)
class Recipe:
    """The quantizers of every layer: act and weight round to nearest, gradients stochastically.

    act, weight     the operands of the forward product; a suffix :nearest or :stochastic overrides
    grad_w, grad_x  the two quantized copies of dy: for the weight's gradient, for the input's
                    NAME-auto: bits chosen in each layer on the way (autobits.py)
    eval_range      "running" or "batch": the activations' range in evaluation
    alpha           with -auto: the gradients' quantization variance ÷ that of sampling, at most
    Raises ValueError for a spec that names no quantizer, or one that law 2 or 3 keeps out there.
    """

    act: str = "ptq8"
    weight: str = "sym8"
    grad_w: str = "ptq8"
    grad_x: str = "bhq5"
    eval_range: str = "running"
    alpha: float = 0.1

    def __post_init__(self):
        for place in ("act", "weight", "grad_w", "grad_x"):
            try:
                quantizer, _ = quantizers.parse(getattr(self, place))
            except ValueError as error:
                raise ValueError(f"recipe, {place}: {error}") from None
            if quantizer.per_sample and place != "grad_x":
                raise ValueError(
                    f"recipe, {place} {quantizer}: each row has a scale of its own, but backward "
                    f"sums over the rows of {place}, as integers cannot with several scales. Only "
                    f"grad_x takes it; use {'sym8' if place == 'weight' else 'ptq8'}.")
        if "-auto" in self.act + self.weight:
            raise ValueError(f"recipe, act {self.act}, weight {self.weight}: only the bits of "
                             "gradients are chosen automatically. Give act and weight a number.")
        if not isinstance(self.alpha, Real) or not 0 < self.alpha < math.inf:
            raise ValueError(f"recipe, alpha {self.alpha!r}: expected a number above 0.")
        if self.eval_range not in ("running", "batch"):
            raise ValueError(f"recipe, eval_range {self.eval_range!r}: expected running or batch.")

    @property
    def automatic(self) -> bool:
        """Whether bits are chosen on the way."""
        return "-auto" in self.grad_w + self.grad_x

    def replace(self, **changes) -> "Recipe":
        """A copy with some fields changed."""
        return _replace(self, **changes)


def recipe(name: str | Recipe) -> Recipe:
    """fp32, qat8, or NAMEb for any registered gradient quantizer, as in recipe("bhq5").

    Fields may follow: recipe("bhq5,grad_w=identity"), recipe("bhq-auto,alpha=0.05").
    Raises ValueError, listing what there is; a Recipe is returned as it is.
    """
    if isinstance(name, Recipe):
        return name
    name, *changes = name.split(",")
    known = [field.name for field in fields(Recipe)]
    for change in changes:
        if change.partition("=")[0] not in known or "=" not in change:
            raise ValueError(f"recipe {name}, {change!r}: expected FIELD=VALUE, a field of "
                             f"{', '.join(known)}.")
    values = dict(change.split("=", 1) for change in changes)
    return _named(name).replace(**{key: _number(value) if key == "alpha" else value
                                   for key, value in values.items()})


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text                                       # which Recipe refuses


def _named(name):
    if name in PRESETS:
        return Recipe(**PRESETS[name])
    try:
        quantizer, _ = quantizers.parse(name)
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: expected {', '.join(PRESETS)}, or a gradient quantizer "
                         f"and its bits as in bhq5, psq4, ptq8. {error}") from None
    if isinstance(quantizer, quantizers.Identity):
        raise ValueError("recipe 'identity': full precision is the recipe fp32; qat8 quantizes "
                         "the forward pass alone.")
    return Recipe(grad_x=name)
