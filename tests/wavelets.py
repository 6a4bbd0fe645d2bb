"""GWT written out in NumPy and float64: one matrix per band, details one by one."""

import numpy as np

from lowrank_optax.linalg.wavelet import filter_taps

_HAAR = np.array([1.0, 1.0]) / np.sqrt(2.0)
_ROOT = np.sqrt(3.0)
_DB2 = np.array([1 + _ROOT, 3 + _ROOT, 3 - _ROOT, 1 - _ROOT]) / (4.0 * np.sqrt(2.0))


def taps(wavelet):
    """Returns the low-pass filter, in closed form where there is a short one."""
    known = {"haar": _HAAR, "db1": _HAAR, "db2": _DB2}
    return known.get(wavelet, np.array(filter_taps(wavelet)))


def one_level(n, wavelet):
    """Returns the matrices ``[k, n]`` of the approximation and of the detail."""
    low = taps(wavelet)
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    size = (n + len(low) - 1) // 2
    maps = np.zeros((2, size, n))
    for k in range(size):
        for j in range(len(low)):
            sample = 2 * k + j - (len(low) - 2)
            if 0 <= sample < n:
                maps[:, k, sample] = low[j], high[j]
    return maps


def all_levels(n, level, wavelet):
    """Returns the matrix of the approximation and those of the details, finest first.

    Their transposes together are the inverse.
    """
    approximation, details = np.eye(n), []
    for _ in range(level):
        low, high = one_level(len(approximation), wavelet)
        details.append(high @ approximation)
        approximation = low @ approximation
    return approximation, details


def add_details(gradient, direction, divisor, level, wavelet, clip=None):
    """Returns ``idwt(N, E_l, ..., E_1)`` of a matrix, along its rows."""
    approximation, details = all_levels(gradient.shape[0], level, wavelet)
    update = approximation.T @ direction
    for detail in reversed(details):
        scaled = detail @ gradient / divisor[: len(detail)]
        if clip is not None:
            scaled = np.clip(scaled, -clip, clip)
        update = update + detail.T @ scaled
        divisor = np.repeat(divisor, 2, axis=0)
    return update


def limit(direction, before, growth):
    """Returns the limiter's factor and the norm with it."""
    norm = np.linalg.norm(direction)
    if norm == 0.0:
        return 0.0, 0.0
    if growth is None or before == 0.0:
        return 1.0, norm
    factor = min(1.0, growth * before / norm)
    return factor, factor * norm


def gwt(
    gradients,
    level=2,
    wavelet="haar",
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    clip=None,
    growth=1.01,
    authors=False,
):
    """Returns GWT's directions for the gradients of one matrix, along its rows."""
    mu = nu = before = 0.0
    out = []
    for t, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, np.float64)
        low = all_levels(len(gradient), level, wavelet)[0] @ gradient
        mu, nu = b1 * mu + (1 - b1) * low, b2 * nu + (1 - b2) * low**2
        seen1, seen2 = 1 - b1**t, 1 - b2**t
        divisor = np.sqrt(nu) if authors else np.sqrt(nu / seen2)
        divisor = divisor + eps
        direction = mu / divisor if authors else mu / seen1 / divisor
        factor, before = limit(direction, before, growth)
        update = factor * add_details(
            gradient, direction, divisor, level, wavelet, clip
        )
        out.append(update * np.sqrt(seen2) / seen1 if authors else update)
    return out


# --- Other hosts: directions and divisors of the approximations ----------------------


def with_details(host, gradients, level, wavelet, clip):
    """Returns limited directions with their details, for one of the hosts below."""
    gradients = [np.asarray(gradient, np.float64) for gradient in gradients]
    low, _ = all_levels(len(gradients[0]), level, wavelet)
    before, out = 0.0, []
    pairs = host([low @ gradient for gradient in gradients])
    for gradient, (direction, divisor) in zip(gradients, pairs, strict=True):
        factor, before = limit(direction, before, 1.01)
        update = add_details(gradient, direction, divisor, level, wavelet, clip)
        out.append(factor * update)
    return out


def by_matrix(direction, low):
    """Returns |A| / |N|; 1 without a gradient, whose details are zero anyway."""
    ratio = np.linalg.norm(low) / np.linalg.norm(direction)
    return np.full_like(low, ratio if ratio > 0 else 1.0)


def adafactor(lows):
    """Directions clipped to a root mean square of 1, divisors before that."""
    row = col = 0.0
    for t, low in enumerate(lows, start=1):
        decay, square = 1.0 - t**-0.8, low**2 + 1e-30
        row = decay * row + (1 - decay) * square.mean(1)
        col = decay * col + (1 - decay) * square.mean(0)
        divisor = np.sqrt(np.outer(row, col) / row.mean())
        scaled = low / divisor
        yield scaled / max(1.0, np.sqrt(np.mean(scaled**2))), divisor


def adam_mini(lows, b1=0.875, b2=0.96875, eps=0.1):
    mu = col = 0.0
    for t, low in enumerate(lows, start=1):
        mu = b1 * mu + (1 - b1) * low
        col = b2 * col + (1 - b2) * np.mean(low**2, 0, keepdims=True)
        divisor = np.sqrt(col / (1 - b2**t)) + eps
        yield mu / (1 - b1**t) / divisor, np.broadcast_to(divisor, low.shape)


def muon(lows):
    trace = 0.0
    for low in lows:
        trace = low + 0.95 * trace
        left, _, right = np.linalg.svd(low + 0.95 * trace, full_matrices=False)
        yield left @ right, by_matrix(left @ right, low)


def lion(lows):
    mu = 0.0
    for low in lows:
        direction = np.sign(0.9 * mu + 0.1 * low)
        mu = 0.99 * mu + 0.01 * low
        yield direction, by_matrix(direction, low)


def tenth(lows):
    for low in lows:
        yield 0.1 * low, np.ones_like(low)
