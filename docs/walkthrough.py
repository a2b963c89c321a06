"""Writes docs/walkthrough.md: one minibatch through one quantized convolution, in real numbers.

`python docs/walkthrough.py` prints the page, `--write` stores it; a test compares the two. It
computes with minifqt's own functions and raises where the page would claim something untrue.
All inputs are rounded to a few decimals first, so that the page is the same on every machine.
"""
import argparse
import inspect
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                  # the root folder
import data
import minifqt
from minifqt import layers, quantizers
from minifqt.kernels import conv, reference
from minifqt.layers import Conv2d, Flatten, Linear, ReLU, Sequential
from minifqt.quantizers.affine import Grid
from minifqt.quantizers.bhq import Householder
from minifqt.rng import Stream

ROOT = Path(__file__).resolve().parents[1]
IMAGES, NINE = (2, 3, 14, 17), 2                          # of the test set; [NINE] is the hard one
PIXEL = (1, 2)                                            # p, q: the one that is followed
EPOCHS, BATCH, LR = 20, 64, 0.1
BITS = 4                                                  # of the second gradient quantizer
DRAWS = 1000


def main(arguments=None):
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--write", action="store_true", help="store the page instead of printing it")
    flags.add_argument("--out", default=Path(__file__).with_suffix(".md"), type=Path,
                       help="where to store it; default: beside this script")
    flags = flags.parse_args(arguments)
    text = page()
    if flags.write:
        flags.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def page():
    minifqt.set_threads(1)
    case = make_case()
    sections = (opening, activations, weights, forward, gradient, first_quantizer, weight_gradient,
                second_quantizer, input_gradient, average, closing)
    return "\n\n".join(section(case).strip() for section in sections) + "\n"


# ---- the case -----------------------------------------------------------------------------------


@dataclass
class Case:
    """A batch on its way through `layer`; x, w and dy are what went in, the rest came out."""

    layer: Conv2d
    labels: np.ndarray
    right: np.ndarray                                     # (N,) probability of the right class
    x: np.ndarray                                         # (N, H, W, C)
    w: np.ndarray                                         # (K, R, S, C)
    dy: np.ndarray                                        # (N, P, Q, K)
    y: np.ndarray
    qx: minifqt.QTensor
    qw: minifqt.QTensor
    gw: minifqt.QTensor
    gx: minifqt.QTensor
    dw: np.ndarray
    dx: np.ndarray


def make_case():
    train_set, test_set = data.load("digits")
    net = trained(shrunk(train_set.images), train_set.labels)
    x, labels = shrunk(test_set.images[list(IMAGES)]), test_set.labels[list(IMAGES)]
    logits = net.forward(x)
    _, dlogits = minifqt.cross_entropy(logits, labels)
    _, relu, flatten, linear = net.layers
    dy = relu.backward(flatten.backward(linear.backward(dlogits)))
    dy = (dy.round(4) + 0.0).astype("float32")            # + 0.0: no −0
    right = 1 + (dlogits * len(x))[np.arange(len(x)), labels]                 # softmax − one-hot
    layer = Conv2d(2, 2, 3, padding=1, recipe=f"bhq{BITS}")
    w = net.layers[0].weight.data.astype("float32")
    layer.weight.data, x = w, x.astype("float32")
    y = layer.forward(x)
    with layer.keep_saved():
        qx, qw = layer.saved()
        dx = layer.backward(dy)
    return Case(layer, labels, right, x, w, dy, y, qx, qw, layer.q.grad_w(dy), layer.q.grad_x(dy),
                layer.weight.grad, dx)


def shrunk(images):
    """(N, 8, 8, 1) bytes → (N, 4, 4, 2): brightness of 2×2 pixels, and right minus left half."""
    x = (images / 255).reshape(len(images), 4, 2, 4, 2)
    return np.stack([x.mean(axis=(2, 4)), (x[..., 1] - x[..., 0]).mean(axis=2)], axis=-1).round(2)


def trained(x, labels):
    """A tiny network in float64, its weights rounded to three decimals."""
    net = Sequential(Conv2d(2, 2, 3, padding=1), ReLU(), Flatten(), Linear(32, 10))
    layers.build(net, "fp32", seed=0, dtype="float64")
    optimizer, step = minifqt.SGD(weight_decay=0), 0
    for _ in range(EPOCHS):
        for start in range(0, len(x) - BATCH + 1, BATCH):
            some = slice(start, start + BATCH)
            minifqt.train_step(net, optimizer, x[some], labels[some], LR, step)
            step += 1
    for p in net.params().values():
        p.data = p.data.round(3)
    return net


# ---- the page -----------------------------------------------------------------------------------


def opening(c):
    labels = ", ".join(map(str, c.labels[:-1])) + f" and {c.labels[-1]}"
    return f"""
# One minibatch through one quantized convolution

*Made by `python docs/walkthrough.py --write`. Every number below was computed by minifqt, and a
test compares this page with a fresh run. Below the numbers stand the lines of code that made them;
where a line has a fast version, the plain one is quoted, which gives the same bits.*

The layer is a 3×3 convolution with padding 1, from two channels to two. The batch is four digits
of the test set, {labels}, shrunk to 4×4 pixels so that they fit on a page. Channel 0 is the
brightness of a 2×2 square of the original, channel 1 its right half minus its left half. The
weights were trained for {EPOCHS} epochs in full precision inside a tiny network (convolution,
ReLU, one linear layer), then rounded to three decimals.

We follow one training step: forward to `y`, then backward from `dy` to the gradients of the
weights and of the input. Three products of large arrays are needed, and all three will be computed
on small integers. Here is the third image, a {c.labels[NINE]}:

```
{side_by_side(("x, channel 0", c.x[NINE, ..., 0], 2), ("x, channel 1", c.x[NINE, ..., 1], 2))}
```
"""


def activations(c):
    p, q = PIXEL
    low, high = c.x.min(), c.x.max()
    scale, inv = reference.grid(low, high, 255)
    value, zero = c.x[NINE, p, q, 0], c.qx.zero.item()
    fixed = int(reference.fixed_point(value, low, inv))
    code = int(c.qx.codes[NINE, p, q, 0])
    require(code == fixed + 32768 >> 16 and scale == c.qx.scale.item(), "code of x")
    back = c.qx.dequantize("float64")[NINE, p, q, 0]
    worst = abs(c.qx.dequantize("float64") - c.x).max()
    return f"""
## 1. The input becomes codes

Over the whole batch x runs from {low:.2f} to {high:.2f}. Eight bits give 256 codes, hence 255
steps between them:

    scale = ({high:.2f} − ({low:.2f})) / 255 = {scale:.7f}      the real size of one step
    zero  = −({low:.2f}) / scale = {zero:z.4f}            where the number 0 lies, in steps

A code stands for `scale · (code − zero)`. Note that zero need not be an integer.
{by(reference.grid, "(high - low) / bins")}

Follow the pixel in row {p}, column {q} of channel 0, x = {value:.2f}. Its distance from the lowest
value, counted in 65536ths of a step, is the fixed-point number {fixed}. Half a step is added,
32768, and the last 16 bits are cut off. That is rounding to nearest:

    ({fixed} + 32768) >> 16 = {code}
    back: {scale:.7f} · ({code} − {zero:z.4f}) = {back:.5f}, instead of {value:.2f}

{by(reference.fixed_point, "rint((x - low) * inv)")}
{by(reference.round_codes, "minimum(fixed + h, UNIT * bins + UNIT - 1) >> 16")}

Nowhere in the batch is the error larger than {worst:.5f}; half a step is {scale / 2:.5f}. The
whole image:

```
{side_by_side(("codes, channel 0", c.qx.codes[NINE, ..., 0], 0),
              ("codes, channel 1", c.qx.codes[NINE, ..., 1], 0))}
```
{by(Conv2d.forward, "qx = self.q.act(x)")}
"""


def weights(c):
    largest, scale = abs(c.w).max(), c.qw.scale.item()
    return f"""
## 2. The weights become codes

Weights lie on both sides of 0, so their codes are signed and their zero *is* 0. The largest weight
in absolute value, {largest:.3f}, gets the code 127:

    scale = {largest:.3f} / 127 = {scale:.7f}

The filter of output channel 0:

```
{side_by_side(("w, channel 0", c.w[0, ..., 0], 3), ("w, channel 1", c.w[0, ..., 1], 3))}

{side_by_side(("codes, channel 0", c.qw.codes[0, ..., 0], 0),
              ("codes, channel 1", c.qw.codes[0, ..., 1], 0))}
```
{by(quantizers.Symmetric, "largest / self._limits()[1]")}
{by(Conv2d.forward, "qw = self.q.weight(self.weight.data)")}
"""


def forward(c):
    aw, ones = product(conv.fprop, c.qx, c.qw, 1, 1), product(conv.fprop, ones_of(c.qx), c.qw, 1, 1)
    zero, scale = c.qx.zero.item(), float(c.qx.scale.item()) * float(c.qw.scale.item())
    exact = conv_float64(c.qx.dequantize("float64"), c.qw.dequantize("float64"))
    plain, worst = conv_float64(c.x, c.w), law_1(c.y, exact)
    rows = []
    for p, q in (PIXEL, (0, 0)):
        n, b = int(aw[NINE, p, q, 0]), int(ones[NINE, p, q, 0])
        require(np.float32((n - zero * b) * scale) == c.y[NINE, p, q, 0], "epilogue of fprop")
        rows.append((n, b, f"{n - zero * b:.3f}", f"{c.y[NINE, p, q, 0]:.5f}",
                     f"{exact[NINE, p, q, 0]:.5f}", f"{plain[NINE, p, q, 0]:.5f}"))
    p, q = PIXEL
    patch = c.qx.codes[NINE, p - 1:p + 2, q - 1:q + 2]
    names = ("Σ a·w, integers", "Σ 1·w, integers", "Σ a·w − zero · Σ 1·w", "times both scales: y",
             "the same product in float64", "without any quantization")
    return f"""
## 3. Forward: an integer product

Each y is a sum of 18 products x·w: nine pixels, two channels. With x̂ = scale_x · (a − zero) and
ŵ = scale_w · w, both scales can be taken out of the sum, because they are the same for all 18:

    Σ x̂·ŵ = scale_x · scale_w · (Σ a·w − zero · Σ 1·w)

Both sums on the right are sums of integers, and no rounding happens in them. Around our pixel:

```
{side_by_side(("a, channel 0", patch[..., 0], 0), ("a, channel 1", patch[..., 1], 0))}
```

Multiply these with the weights' codes of the section before, add, and you get the first number of
this table. The second column is the pixel in the corner, where the filter hangs over the edge. The
padding there is a *real* zero: it takes part in no sum, which is why Σ 1·w is another number.

| | pixel ({p}, {q}) | pixel (0, 0) |
|---|---|---|
{table_rows(names, rows)}

{by(reference.epilogue, "y = ab - zero_a * b1")}
{by(reference.epilogue, 'return (y * scale).astype("float32")')}

Lines four and five agree: over the whole batch they differ by about {worst:.0e} of the largest
y, which is what writing the result as float32 costs. **The integer product is not an approximation
of the product of x̂ and ŵ. It is that product.** What quantization costs is the difference between
lines five and six. It arose when x and w were rounded, and in no other place.

```
{side_by_side(("y, channel 0", c.y[NINE, ..., 0], 3), ("y, channel 1", c.y[NINE, ..., 1], 3))}
```
{by(Conv2d.forward, "y = conv.fprop(qx, qw, self.stride, self.padding)")}
"""


def gradient(c):
    rows = [f"| {label} | {right:.3f} | {dy.min():z.4f} | {dy.max():z.4f} | {np.ptp(dy):z.4f} |"
            for label, right, dy in zip(c.labels, c.right, c.dy, strict=True)]
    require((c.right > 0.9).sum() == 3 and c.right[NINE] < 0.1, "probabilities")
    ratio = np.ptp(c.dy[NINE]) / max(np.ptp(dy) for i, dy in enumerate(c.dy) if i != NINE)
    return f"""
## 4. A gradient comes back

From the loss, through the linear layer and the ReLU, comes dy: how the loss changes with each y.
(Here it was computed in full precision and rounded to four decimals.)

| digit | probability given to it | smallest dy | largest dy | range |
|---|---|---|---|---|
{chr(10).join(rows)}

The network is sure of three digits and wrong about the {c.labels[NINE]}. A digit that is
recognised has almost nothing left to teach, so its gradient is small; the range of the third row is
{ratio:.0f} times the next largest. The better a network knows its data, the more uneven its
gradients are, and that decides how they should be rounded. The gradient of the {c.labels[NINE]},
and of the {c.labels[0]} for comparison:

```
{side_by_side((f"dy of the {c.labels[NINE]}, channel 0", c.dy[NINE, ..., 0], 4),
              (f"dy of the {c.labels[0]}, channel 0", c.dy[0, ..., 0], 4))}
```
"""


def first_quantizer(c):
    low, high, h = c.dy.min(), c.dy.max(), c.layer.q.grad_w.stream.bits(c.dy.shape)
    scale, inv = reference.grid(low, high, 255)
    places = [(NINE, *PIXEL, 0), (NINE, 0, 1, 0), (NINE, 1, 1, 0), (0, *PIXEL, 0), (0, 1, 1, 0)]
    rows = []
    for place in places:
        fixed, code = int(reference.fixed_point(c.dy[place], low, inv)), int(c.gw.codes[place])
        require(min(fixed + int(h[place]), 65536 * 255 + 65535) >> 16 == code, "code of dy")
        n, p, q, _ = place
        rows.append(f"| {c.labels[n]}, pixel ({p}, {q}) | {c.dy[place]:z.4f} | "
                    f"{fixed} | {fixed / 65536:.3f} | {h[place]} | {h[place] / 65536:.3f} | {code} "
                    f"| {c.gw.dequantize('float64')[place]:.5f} |")
    return f"""
## 5. The first quantizer of dy, with noise

dy enters two products, and each gets its own quantized copy. The first copy, for the gradient of
the weights, has 8 bits and one range for all four images: {low:z.4f} to {high:z.4f}.

    scale = {scale:.7f}      zero = {c.gw.zero.item():z.4f}

The rounding differs from that of x in one thing. Instead of half a step we add *noise*, a number
drawn evenly from 0 to 65535. A value that lies at 0.3 between two codes is then rounded up with
probability 0.3 and down otherwise: a single code may be off by nearly a step, but **on average
nothing is lost**. Rounding to nearest would err in the same direction step after step.

| element, channel 0 | dy | in 65536ths | in steps | noise | in steps | code | back |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Add columns four and six and drop the fraction: that is the code. A dy of exactly 0 gets noise too,
because 0 lies between two codes here; the quantizer `ptqz` moves it onto one. The noise is no
secret: it is a function of the seed, the name of the place, the step and the position in the array.
{by(Stream, 'f"{streams.seed}/{name}"')}
{by(quantizers.PTQ, "g.codes(stream, x.shape, self.bins)")}
{by(Conv2d.backward, "gw = self.q.grad_w(dy)")}
"""


def weight_gradient(c):
    kernel = c.qw.shape[1:3]
    pairs = ((c.gw, c.qx), (ones_of(c.gw), c.qx), (c.gw, ones_of(c.qx)),
             (ones_of(c.gw), ones_of(c.qx)))
    place = (0, 1, 1, 0)
    gx, x1, g1, n = (int(product(conv.wgrad, g, x, kernel, 1, 1)[place]) for g, x in pairs)
    zero_g, zero_x = float(c.gw.zero.item()), float(c.qx.zero.item())
    total = gx - zero_g * x1 - zero_x * g1 + zero_g * zero_x * n
    scale = float(c.gw.scale.item()) * float(c.qx.scale.item())
    require(np.float32(total * scale) == c.dw[place], "epilogue of wgrad")
    exact = wgrad_float64(c.gw.dequantize("float64"), c.qx.dequantize("float64"))
    plain = wgrad_float64(c.dy, c.x)
    return f"""
## 6. The gradient of the weights

The gradient of a weight is a sum over all pixels of all images of dy·x. For the weight in the
middle of the filter, from channel 0 to channel 0, that is {n} products. Now both operands have a
zero that is not 0, and the product of two differences has four terms:

    Σ (g − zero_g)·(a − zero_a) = Σ g·a − zero_g · Σ 1·a − zero_a · Σ g·1 + zero_g · zero_a · Σ 1·1

| term | integer sum | |
|---|---|---|
| Σ g·a | {gx} | |
| Σ 1·a | {x1} | times zero_g = {zero_g:z.4f} |
| Σ g·1 | {g1} | times zero_a = {zero_x:z.4f} |
| Σ 1·1 | {n} | times zero_g · zero_a |
| all together | | {total:.3f} |
| times both scales: the gradient | | {c.dw[place]:.5f} |
| without any quantization | | {plain[place]:.5f} |

{by(reference.epilogue, "y = y + (zero_a * zero_b) * n")}
{by(Conv2d.backward, "conv.wgrad(gw, qx, self.kernel_size, self.stride, self.padding)")}

Again the integers give the product of the quantized operands exactly (largest difference
{law_1(c.dw, exact):.0e} of the largest gradient). And here is why this copy of dy needs one range
for the whole batch: the sum runs over the images, so a scale of each image's own could not be taken
out of it. minifqt refuses such a quantizer in this place.
{by(conv.wgrad, 'require_factorable("wgrad", g, (0, 1, 2))')}
"""


def second_quantizer(c):
    rows_in, mixed = rows_of(c.dy), c.gx.mix.apply(rows_of(c.dy))
    T = c.gx.mix.apply(np.eye(len(c.dy)))
    h, codes = rows_of(c.layer.q.grad_x.stream.bits(c.dy.shape)), rows_of(c.gx.codes)
    j = np.ravel_multi_index((*PIXEL, 0), c.dy.shape[1:])
    low, high = mixed.min(axis=1, keepdims=True), mixed.max(axis=1, keepdims=True)
    fixed = reference.fixed_point(mixed, low, reference.grid(low, high, 2**BITS - 1)[1])
    require((reference.round_codes(fixed, h, 2**BITS - 1) == codes).all(), "codes of the mixed dy")
    back, undone = rows_of(c.gx.rows("float64")), rows_of(c.gx.dequantize("float64"))
    order = [str(c.labels[i]) for i in c.gx.mix.order]
    variances = {name: quantizers.create(name, BITS).variance(c.dy).sum()
                 for name in ("ptq", "psq", "bhq")}
    require(variances["ptq"] > variances["psq"] > variances["bhq"], "variances")
    steps = {name: quantizers.create(name, BITS)(c.dy, c.layer.q.grad_x.stream).scale.ravel()
             for name in ("ptq", "psq", "bhq")}
    lines = [f"| {name.upper()} | {', '.join(f'{step:z.4f}' for step in steps[name])} | "
             f"{1e6 * variances[name]:.0f} |" for name in variances]
    column = [f"| {i + 1} | {mixed[i, j]:z.4f} | {fixed[i, j] / 65536:.3f} | "
              f"{h[i, j] / 65536:.3f} | {codes[i, j]} | {back[i, j]:z.4f} |"
              for i in range(len(mixed))]
    ends = [f"| {label} | {before:z.4f} | {after:z.4f} |" for label, before, after
            in zip(c.labels, rows_in[:, j], undone[:, j], strict=True)]
    return f"""
## 7. The second quantizer of dy: mixing before rounding

The other copy, for the gradient of the input, may treat each image apart, as the next section
shows. That is fortunate, since we want it in {BITS} bits: {2**BITS} codes, {2**BITS - 1} steps.
Three ways to spend them, with the total variance of the noise that each adds to dy:

| quantizer | size of a step | variance, in millionths |
|---|---|---|
{chr(10).join(lines)}

PTQ has one step for the batch, and the {c.labels[NINE]} makes it coarse for everyone. PSQ gives
each image a step of its own; now the noise of the {c.labels[NINE]} remains. BHQ spreads that large
row over the others before it rounds, and gathers it again afterwards. The spreading is a matrix T
that acts on the images (the columns are the digits {", ".join(map(str, c.labels))}; the first
mixed row is led by the {order[0]}):

```
{block("T", T, 3)}
```
{by(Householder, "x[self.order] * scales[:, None]")}

Ranges before: {listed(np.ptp(rows_in, axis=1))}. Ranges of the mixed rows:
{listed(np.ptp(mixed, axis=1))}: nearly alike now, so no row is wasted on a range that it does not
need. The columns of T differ in size as well: small rows are enlarged before the mixing.

Pixel ({PIXEL[0]}, {PIXEL[1]}), channel 0, of the four mixed rows, rounded with its own noise (the
stream has another name, so this noise is independent of that of section 5):

| mixed row | T·dy | in steps above its lowest | noise | code | back |
|---|---|---|---|---|---|
{chr(10).join(column)}

{by(quantizers.BHQ, "g.codes(stream, x.shape, self.bins)")}
{by(Conv2d.backward, "gx = self.q.grad_x(dy)")}

T can be inverted, so the four numbers on the right can be turned back into four images:

| digit | dy | T⁻¹ of the rounded |
|---|---|---|
{chr(10).join(ends)}

{by(Householder, "y *= self.undo_scales[:, None]")}
"""


def input_gradient(c):
    size = c.x.shape[1:3]
    mixed = conv.dgrad(replace(c.gx, mix=None), c.qw, size, 1, 1)
    exact = dgrad_float64(c.gx.dequantize("float64"), c.qw.dequantize("float64"))
    plain, place = dgrad_float64(c.dy, c.w), (*PIXEL, 0)
    lines = [f"| {i + 1} | {mixed[(i, *place)]:z.4f} | {c.labels[i]} | {c.dx[(i, *place)]:z.4f} | "
             f"{exact[(i, *place)]:z.4f} | {plain[(i, *place)]:z.4f} |" for i in range(len(mixed))]
    worst = abs(c.dx - exact).max() / abs(exact).max()
    require(worst < 1e-5, "dgrad")                        # two float32 roundings and T's own sums
    return f"""
## 8. The gradient of the input

The gradient of the input is once more a convolution, of dy with the filters turned round. It sums
over pixels and output channels but *never over images*. So a scale of each row's own can be taken
out of the sum, and even T need not be undone before the product: it can wait until after it.

    dx = T⁻¹ · (integer product of the mixed codes and the weights' codes)

{by(conv.dgrad, "return dx if g.mix is None else g.mix.undo(dx)")}

The same pixel and channel, now of dx:

| mixed row | integer product | digit | dx = T⁻¹ of it | T⁻¹ first, in float64 | no quantization |
|---|---|---|---|---|---|
{chr(10).join(lines)}

{by(Conv2d.backward, "return conv.dgrad(gx, qw, qx.shape[1:3], self.stride, self.padding)")}
"""


def average(c):
    stream, place = c.layer.q.grad_x.stream, (*PIXEL, 0)
    lines = []
    for name in ("ptq", "psq", "bhq"):
        q, draws = quantizers.create(name, BITS), []
        for step in range(1, DRAWS + 1):
            stream.streams.step = step
            draws.append(q(c.dy, stream).dequantize("float64"))
        draws = np.stack(draws)
        variance, mean = q.variance(c.dy), draws.mean(axis=0)
        ratio = ((draws - c.dy) ** 2).mean(axis=0).sum() / variance.sum()
        # 6 standard errors, and what 16-bit noise may be off: 2⁻¹⁴ of a step
        allowed = 6 * np.sqrt(variance / DRAWS) + np.ptp(c.dy) * 2.0**-14
        require((abs(mean - c.dy) <= allowed).all() and 0.9 < ratio < 1.1, "noise")
        means = " | ".join(f"{value:z.3f}" for value in mean[(slice(None), *place)])
        lines.append(f"| {name.upper()}, mean of {DRAWS} | {means} | {ratio:.2f} |")
    stream.streams.step = 0
    dy = " | ".join(f"{value:z.3f}" for value in c.dy[(slice(None), *place)])
    return f"""
## 9. Is it right on average?

One rounding of dy to {BITS} bits is crude. But training takes many steps, and what matters is that
the errors do not add up in one direction. The same dy with the noise of {DRAWS} different steps, at
our pixel of the digits {", ".join(map(str, c.labels))}; in the last column the squared error that
was measured, divided by the variance that the quantizer states for itself:

| | {" | ".join(map(str, c.labels))} | measured / stated |
|---|---|---|---|---|---|
| dy | {dy} | |
{chr(10).join(lines)}

All three are right on average. They differ in how far a single step strays, by the variances of
section 7. Training can live with noise that cancels, but less of it is better: that is what BHQ is
for.
{by(Grid, "p * (1 - p)")}
"""


def closing(_):
    return f"""
## Where to read on

`{path_of(Conv2d)}`, class `Conv2d`: the forward and backward of this page in a dozen lines.
`minifqt/quantizers/psq.py`: the shortest quantizer. `minifqt/kernels/reference.py`: all the
arithmetic, written plainly.
"""


# ---- tools of the page ---------------------------------------------------------------------------


def by(code, line):
    """A line of a function or class, and its file.  RuntimeError where the line is not there."""
    path = path_of(code)
    if "".join(line.split()) not in "".join(inspect.getsource(code).split()):
        raise RuntimeError(f"docs/walkthrough.py quotes `{line}`, but {code.__qualname__} in "
                           f"{path} no longer holds it: quote what does this now, then run with "
                           "--write.")
    return f"- `{line}` in `{path}`"


def path_of(code):
    return Path(inspect.getsourcefile(code)).relative_to(ROOT).as_posix()


def require(holds, what):
    """RuntimeError where the page's explanation is not what minifqt computed."""
    if not holds:
        raise RuntimeError(f"docs/walkthrough.py explains the {what} otherwise than minifqt "
                           "computes it: correct the page.")


def law_1(result, exact):
    """Largest difference from the float64 product, relative to its largest element; under 2⁻²²."""
    worst = abs(result - exact).max() / abs(exact).max()
    require(worst <= 2.0**-22, "integer product")
    return worst


def product(kernel, a, b, *where):
    """The product of the bare codes, an integer: QTensors of scale 1 and zero 0 stand for those."""
    def bare(t):
        ones = np.ones((1,) * t.codes.ndim, "float32")
        return minifqt.QTensor(t.codes, ones, 0 * ones)

    return kernel(bare(a), bare(b), *where)


def ones_of(t):
    return replace(t, codes=np.ones_like(t.codes))


def floats(x):
    """A float64 operand for reference.py."""
    ones = np.ones((1,) * x.ndim)
    return minifqt.QTensor(x.astype("float64"), ones, 0 * ones)


def conv_float64(x, w):
    return reference.conv_fprop(floats(x), floats(w), 1, 1)


def wgrad_float64(g, x):
    return reference.conv_wgrad(floats(g), floats(x), (3, 3), 1, 1)


def dgrad_float64(g, w):
    return reference.conv_dgrad(floats(g), floats(w), g.shape[1:3], 1, 1)


def rows_of(x):
    return x.reshape(len(x), -1)


def listed(values):
    return ", ".join(f"{value:z.4f}" for value in values)


def table_rows(names, columns):
    """Markdown rows: names on the left, one column for each tuple."""
    return "\n".join(f"| {name} | {' | '.join(map(str, row))} |"
                     for name, row in zip(names, zip(*columns, strict=True), strict=True))


def block(title, matrix, decimals):
    """A matrix as text under its title."""
    lines = ["".join(f"{value:z{decimals + 5}.{decimals}f}" for value in row)
             for row in matrix.astype("float64").round(decimals)]
    return "\n".join([title, *lines])


def side_by_side(*blocks):
    """(title, matrix, decimals), … next to each other."""
    columns = [block(*arguments).split("\n") for arguments in blocks]
    widths = [max(map(len, lines)) + 4 for lines in columns]
    return "\n".join("".join(line.ljust(width) for line, width in zip(lines, widths, strict=True))
                     .rstrip() for lines in zip(*columns, strict=True))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
