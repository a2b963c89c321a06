"""What happens to a batch of bytes before the first layer: pad, crop, mirror, normalise.

Plain functions of (images, generator); which stream they draw from is decided in loader.py. The
same thing image by image, to read and to compare, is in tests/test_loader.py.
"""
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def pad_crop_flip(images: np.ndarray, generator: np.random.Generator,
                  padding: int = 4, flip: bool = True) -> np.ndarray:
    """Each image shifted by up to ±padding pixels and mirrored with probability 1/2; a new array.

    images  (N, H, W, C) uint8; what moves in is black, the byte 0, *before* normalising
    Draws integers(0, 2·padding + 1, (N, 2)), the crop's top left corner in the padded image; then,
    whether it flips or not, random(N): below 1/2 mirrors left and right.
    Source: He et al. 2015, arXiv 1512.03385, section 4.2 (padding 4, for CIFAR-10).
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images {images.shape} {images.dtype}: expected (N, H, W, C) uint8.")
    if padding < 0:
        raise ValueError(f"padding {padding}: expected a number of pixels ≥ 0.")
    N, H, W, C = images.shape
    corner = generator.integers(0, 2 * padding + 1, (N, 2))
    mirrored = generator.random(N) < 0.5
    padded = np.zeros((N, H + 2 * padding, (W + 2 * padding) * C), np.uint8)
    padded[:, padding:padding + H, padding * C:(padding + W) * C] = images.reshape(N, H, W * C)
    windows = sliding_window_view(padded, (H, W * C), axis=(1, 2))    # rows of bytes: long copies
    out = windows[np.arange(N), corner[:, 0], corner[:, 1] * C].reshape(N, H, W, C)
    if flip:
        pixels = out.view(f"V{C}")                        # (N, H, W, 1): a pixel moves as one item
        pixels[mirrored] = pixels[mirrored, :, ::-1]
    return out


def normalize(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(images / 255 - mean) / std as float32.  images (…, H, W, C) uint8, mean and std (C,).

    Computed as (images - 255·mean) · (1 / (255·std)), both constants rounded to float32 once.
    """
    H, W, C = images.shape[-3:]
    if images.dtype != np.uint8 or mean.shape != (C,) or std.shape != (C,):
        raise ValueError(f"images {images.shape} {images.dtype}, mean {mean.shape}, "
                         f"std {std.shape}: expected (…, H, W, C) uint8 and twice (C,).")
    offset = (255 * mean.astype(np.float64)).astype(np.float32)
    factor = (1 / (255 * std.astype(np.float64))).astype(np.float32)
    x = images.reshape(-1, H * W * C).astype(np.float32)
    x -= np.tile(offset, H * W)                           # one long row: C alone loops slowly
    x *= np.tile(factor, H * W)
    return x.reshape(images.shape)
