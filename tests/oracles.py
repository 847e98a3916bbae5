"""Slow references to 60 digits (mpmath), from the definitions, sharing no formula with the code."""

import contextlib
import math
import random

import mpmath as mp
import torch

DIGITS = 60


@contextlib.contextmanager
def digits_for(x, y):
    """Work with enough digits that e^x, y^2 and the gap between a far point and the boundary keep 60 of their own."""
    with mp.workdps(DIGITS + int(abs(x)) + 2 * int(mp.log10(1 + abs(y))) + 30):
        yield


def exact(tensor):
    """Elements of a tensor as mpf, exactly."""
    return [mp.mpf(value) for value in tensor.detach().reshape(-1).tolist()]


def ulp_errors(actual, reference, unit=None):
    """Errors of a tensor against a list of mpf, in units of the last place of ``unit`` (the reference)."""
    info = torch.finfo(actual.dtype)
    values = actual.detach().reshape(-1).tolist()
    sizes = reference if unit is None else unit
    assert len(values) == len(reference) == len(sizes)
    with mp.workdps(DIGITS):
        return [_error(v, r, s, info) for v, r, s in zip(values, reference, sizes, strict=True)]


def _error(value, reference, size, info):
    if value == reference:
        return 0.0
    if not math.isfinite(value):
        overflows = abs(reference) > info.max and not math.isnan(value)
        return 0.0 if overflows and (value > 0) == (reference > 0) else math.inf
    place = mp.floor(mp.log(abs(size), 2)) if abs(size) > info.tiny else mp.log(info.tiny, 2)
    return float(abs(mp.mpf(value) - reference) / mp.ldexp(info.eps, int(place)))


def spread(count, smallest, largest, dtype=torch.float64, seed=0):
    """Numbers of either sign with log-uniform magnitude, as a tensor."""
    draw = random.Random(seed)
    low, high = math.log(smallest), math.log(largest)
    return torch.tensor(
        [draw.choice((-1, 1)) * math.exp(draw.uniform(low, high)) for _ in range(count)], dtype=dtype
    )


def drift(x, y):
    """KL divergence from (location y, scale e^x) to the standard Cauchy, by its textbook formula."""
    with mp.workdps(DIGITS + 30):  # the terms cancel to 1 + x^2/4
        return mp.log(((1 + mp.exp(x)) ** 2 + mp.mpf(y) ** 2) / (4 * mp.exp(x)))


def drift_by_integration(x, y):
    """The same from the definition of a KL divergence: an integral over two densities, to 12 digits."""
    x, y = mp.mpf(x), mp.mpf(y)
    scale = mp.exp(x)

    def integrand(angle):  # u = tan(angle), so that the base density becomes 1 / pi
        u = mp.tan(angle)
        return mp.log((scale**2 + (u - y) ** 2) / (scale * (1 + u * u))) / mp.pi

    with mp.workdps(20):
        return mp.quad(integrand, [-mp.pi / 2, -1, 0, mp.atan(y), mp.pi / 2])


def distance(x, y):
    """Half-plane distance from i to y + i e^x: acosh of the textbook formula."""
    with mp.workdps(DIGITS + 30):
        scale = mp.exp(x)
        return mp.acosh(1 + (mp.mpf(y) ** 2 + (scale - 1) ** 2) / (2 * scale))


def to_chart(x, y, chart):
    """Coordinates of a delta, geodesics taken from the disk model."""
    x, y = mp.mpf(x), mp.mpf(y)
    with digits_for(x, y):
        if chart == "linear":
            return x, y
        if chart == "symmetric":
            return x, y / mp.sqrt(mp.exp(x))
        if x == 0 and y == 0:
            return x, y
        # The Cayley map sends the base i to 0 and geodesics through it to straight lines; a move up the
        # imaginary axis arrives on the positive real axis, a move to the right on the negative imaginary.
        point = mp.mpc(y, mp.exp(x))
        image = (point - 1j) / (point + 1j)
        length = distance(x, y) if chart == "geodesic" else mp.sqrt(drift(x, y))
        return length * image.real / abs(image), -length * image.imag / abs(image)


def from_chart(first, second, chart):
    """Delta with the given coordinates, geodesics taken from the disk model."""
    first, second = mp.mpf(first), mp.mpf(second)
    if chart == "linear":
        return first, second
    if chart == "symmetric":
        return first, second * mp.sqrt(mp.exp(first))
    with mp.workdps(DIGITS):
        length = mp.sqrt(first**2 + second**2)
    if length == 0:
        return first, second
    rho = length if chart == "geodesic" else 2 * mp.acosh(mp.exp(length**2 / 2))
    with digits_for(rho, 0):
        length = mp.sqrt(first**2 + second**2)
        rho = length if chart == "geodesic" else 2 * mp.acosh(mp.exp(length**2 / 2))
        image = mp.tanh(rho / 2) * mp.mpc(first, -second) / length
        point = 1j * (1 + image) / (1 - image)
        return mp.log(point.imag), point.real


def fuse(x, y, weights, chart):
    """Fused (x, y) of one dimension, from lists."""
    with mp.workdps(DIGITS):
        points = [to_chart(a, b, chart) for a, b in zip(x, y, strict=True)]
        first = mp.fsum(mp.mpf(w) * p[0] for w, p in zip(weights, points, strict=True))
        second = mp.fsum(mp.mpf(w) * p[1] for w, p in zip(weights, points, strict=True))
        return from_chart(first, second, chart)


def largest_scaled_drift(nats, weight):
    """Largest D(weight * p) over the boundary D(p) = nats, by a scan and a golden-section search."""
    nats, weight = mp.mpf(nats), mp.mpf(weight)
    rho = 2 * mp.asinh(mp.sqrt(mp.expm1(nats)))

    def moved(x):
        room = mp.expm1(nats) - mp.sinh(x / 2) ** 2
        y = 2 * mp.exp(x / 2) * mp.sqrt(room) if room > 0 else mp.mpf(0)
        return drift(weight * x, weight * y)

    with mp.workdps(30):
        grid = [rho * k / 32 for k in range(-32, 33)]
        best = max(range(65), key=lambda k: moved(grid[k]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 64)]
        golden = (mp.sqrt(5) - 1) / 2
        for _ in range(60):
            left, right = high - golden * (high - low), low + golden * (high - low)
            if moved(left) < moved(right):
                low = left
            else:
                high = right
        return moved((low + high) / 2)
