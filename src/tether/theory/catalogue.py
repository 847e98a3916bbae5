"""All statements about fused drift: the source's, and those that replace them; other than sums in ``claims``.

Sections named as the basis are those of docs/how-drift-adds-up.md.
"""

from tether.errors import ConfigError
from tether.theory import local, sides
from tether.theory.bounds import K_INF
from tether.theory.claims import CLAIMS
from tether.theory.constants import MONOTONE_DRIFT
from tether.theory.statements import Statement

__all__ = ["C_2", "K_SPLIT", "STATEMENTS", "statement"]

# Proven upper ends of enclosures, see tether.theory.rigor: the sharp constant of two deltas, and that of the
# split into a widening and a location part.
C_2 = 1.10767458
K_SPLIT = 1.5118014


def statement(name: str) -> Statement:
    """Return the statement of a name.

    Args:
        name: a key of ``STATEMENTS``.

    Returns:
        The statement.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in STATEMENTS:
        raise ConfigError(f"unknown statement {name!r}: choose one of {', '.join(STATEMENTS)}")
    return STATEMENTS[name]


_SPEC = "spec document 1"
_LESS_OR_ABOUT = "spec document 2, controlled drift, with the sign for less or about"
_ANY = "any N, d"
_SHARPENING = "two equal deltas that sharpen: exact fractions"

STATEMENTS: dict[str, Statement] = {
    one.name: one
    for one in (
        Statement(
            name="main",
            text="D(sum p_k) <= N sum D(p_k)",
            assumptions=_ANY,
            source=f"{_SPEC}, 1.2",
            sides=sides.sums(1.0, 1.0),
            verdict="refuted",
            basis=_SHARPENING,
        ),
        Statement(
            name="appendix",
            text="k(x1+x2, u1 u2) <= (k(x1,u1) k(x2,u2))^2, compared by logarithms",
            assumptions="N = 2, d = 1",
            source=f"{_SPEC}, appendix 1",
            sides=sides.sums(1.0, 1.0),
            verdict="refuted",
            basis="u = x = 1/2: 41/16 > 625/256",
            count=2,
        ),
        Statement(
            name="sqrt",
            text="D(sum p_k) <= sqrt(N) sum D(p_k)",
            assumptions="N >= 2, any d",
            source=f"{_SPEC}, 4.2.6",
            sides=sides.sums(1.0, 0.5),
            verdict="refuted",
            basis="N equal small shifts, every N >= 2: exact fractions",
        ),
        Statement(
            name="weighted",
            text="D(sum a_k p_k) <= (sum |a_k| sqrt D(p_k))^2, taken as exact",
            assumptions=f"{_ANY}, real weights, deltas of any size",
            source=f"{_LESS_OR_ABOUT}, read without it",
            sides=sides.rooted(1.0),
            verdict="refuted",
            basis="one delta, a = -1 and a = 1/2: exact fractions",
            weights="any",
        ),
        Statement(
            name="weighted-local",
            text=(
                "D(sum a_k p_k) <= (1 + 2r/sqrt(27) + r^2/16) r^2/4, r = 2 sum |a_k| sqrt(l(D_k)), which is"
                " (sum |a_k| sqrt D_k)^2 (1 + 4/sqrt(27) (1 + A) sqrt e + O(e)) for D_k <= e, A = sum |a_k|"
            ),
            assumptions=(
                f"{_ANY}, real weights; m = e^D - 1,"
                " l(D) = m min(1 + 2/sqrt(27) (e^(2 sqrt m) - 1), (sqrt m + sqrt(1 + m))^2)"
            ),
            source=f"{_LESS_OR_ABOUT}, which this makes exact",
            sides=local.within,
            verdict="proved",
            basis="Theorem 6",
            weights="any",
        ),
        Statement(
            name="positive-scale",
            text="D <= K N sum D(p_k) for some K, scales added instead of log scales (shown for K = 1)",
            assumptions="N >= 2, any d, fused scale positive",
            source="spec document 2, linear maps of the scale",
            sides=sides.positive_scale,
            verdict="refuted",
            basis="two deltas that almost halve the scale: no K, exact fractions",
            place=sides.shared,
        ),
        Statement(
            name="location",
            text="D(sum p_k) <= (sum sqrt D(p_k))^2 for x_k = 0",
            assumptions=f"{_ANY}, locations alone move",
            source=f"{_SPEC}, 3.4.1, sharpened",
            sides=sides.location,
            verdict="proved",
            basis="Lemma A",
            place=lambda x, y, weights: (0 * x, y, weights),
        ),
        Statement(
            name="scale",
            text="D(sum p_k) <= (sum sqrt D(p_k))^2 for y_k = 0",
            assumptions=f"{_ANY}, scales alone move",
            source=f"{_SPEC}, 3.4.2, sharpened",
            sides=sides.scale,
            verdict="proved",
            basis="Lemma A",
            place=lambda x, y, weights: (x, 0 * y, weights),
        ),
        Statement(
            name="signs",
            text="D(sum p_k) <= (sum sqrt D(p_k))^2 if sum x_k + max(-x_k) >= 0",
            assumptions=f"{_ANY}, no net sharpening in any dimension",
            source="ours",
            sides=sides.signs,
            verdict="proved",
            basis="Lemma A",
            place=sides.turned,
        ),
        Statement(
            name="widening",
            text="sqrt D(sum p_k) <= sqrt D(p_1) + sqrt D(p_2 + ... + p_N) if x_1 >= 0 and all y_k >= 0",
            assumptions=_ANY,
            source="ours",
            sides=sides.widening,
            verdict="proved",
            basis="Lemma B",
            place=sides.widened,
        ),
        Statement(
            name="four",
            text="D(sum p_k) <= 4 (sum sqrt D(p_k))^2",
            assumptions=_ANY,
            source="ours",
            sides=sides.rooted(4.0),
            verdict="proved",
            basis="easy theorem",
        ),
        Statement(
            name="split",
            text=f"D(sum p_k) <= {K_SPLIT} (sum sqrt D(p_k))^2",
            assumptions=_ANY,
            source="ours",
            sides=sides.rooted(K_SPLIT),
            verdict="enclosed",
            basis="easy theorem; maximum of a function of two variables",
        ),
        Statement(
            name="k-inf",
            text=f"D(sum p_k) <= {K_INF} (sum sqrt D(p_k))^2",
            assumptions=_ANY,
            source="ours",
            sides=sides.rooted(K_INF),
            verdict="enclosed",
            basis="Theorem 1; branch and bound, any N",
        ),
        Statement(
            name="two",
            text=f"D(p_1 + p_2) <= {C_2} (sqrt D(p_1) + sqrt D(p_2))^2",
            assumptions="N = 2, any d",
            source="ours",
            sides=sides.rooted(C_2),
            verdict="enclosed",
            basis="Theorem 2; branch and bound, N = 2",
            count=2,
        ),
        Statement(
            name="equal",
            text="D(sum p_k) <= C_N (sum sqrt D(p_k))^2, C_N = sup D(N p) / (N^2 D(p))",
            assumptions=_ANY,
            source="ours",
            sides=sides.equal,
            verdict="supported",
            basis="searches; proved for N = 2 only",
        ),
        Statement(
            name="k-inf-weighted",
            text=f"D(sum a_k p_k) <= {K_INF} (sum a_k sqrt D(p_k))^2 for a_k >= 1",
            assumptions=_ANY,
            source="ours",
            sides=sides.rooted(K_INF),
            verdict="enclosed",
            basis="Theorem 1', from the certificates of Theorem 1",
            weights="at least 1",
            place=sides.at_least_1,
        ),
        Statement(
            name="scaling",
            text="D(a p) <= D(p) sup B(e, a) / e over e <= D(p), B(e, a) = sup {D(a q) : D(q) <= e}",
            assumptions="one delta, any d, real weight",
            source="ours",
            sides=sides.scaled,
            verdict="proved",
            basis="scaling: the exact bound",
            weights="any",
            count=1,
        ),
        Statement(
            name="scaling-lemma",
            text="e^D(a p) - 1 <= a^2 e^(|1-a| rho) (e^D(p) - 1) in each dimension",
            assumptions="one delta, any d, real weight",
            source="ours",
            sides=sides.scaling_lemma,
            verdict="proved",
            basis="scaling lemma",
            weights="any",
            count=1,
        ),
        Statement(
            name="shrinking",
            text=f"D(a p) <= D(p) for 0 <= a <= 1 if each D_i(p) <= {MONOTONE_DRIFT}",
            assumptions="one delta, any d, linear chart",
            source="ours",
            sides=sides.shrinking,
            verdict="enclosed",
            basis="shrinking; minimum of a function of one variable",
            weights="any",
            count=1,
            place=sides.shrunk,
        ),
        Statement(
            name="symmetric",
            text="sqrt D <= sum c_k, c_k = |a_k| sqrt D_k if |a_k| >= 1, else sqrt log(1 + a_k^2 (e^D_k - 1))",
            assumptions=f"{_ANY}, real weights, symmetric chart",
            source="ours",
            sides=sides.charted("symmetric"),
            verdict="proved",
            basis="Theorem 3",
            weights="any",
        ),
        Statement(
            name="symmetric-quadratic",
            text="D <= ((sum a_k x_k)^2 + (sum a_k w_k)^2) / 4, summed over dimensions",
            assumptions=f"{_ANY}, real weights, symmetric chart",
            source="ours",
            sides=sides.quadratic,
            verdict="proved",
            basis="Theorem 3",
            weights="any",
        ),
        Statement(
            name="geodesic",
            text="D <= min((sum max(|a_k|, sqrt|a_k|) sqrt D_k)^2, max(1, sum |a_k|) sum |a_k| D_k)",
            assumptions=f"{_ANY}, real weights, geodesic chart",
            source="ours",
            sides=sides.charted("geodesic"),
            verdict="proved",
            basis="Theorem 4",
            weights="any",
        ),
        Statement(
            name="rootkl",
            text="D <= (sum |a_k| sqrt D_k)^2",
            assumptions=f"{_ANY}, real weights, rootkl chart",
            source="ours",
            sides=sides.charted("rootkl"),
            verdict="proved",
            basis="Theorem 5",
            weights="any",
        ),
        Statement(
            name="rootkl-gram",
            text="D = a^T M a, M the Gram matrix of the deltas in root-KL coordinates",
            assumptions=f"{_ANY}, real weights, rootkl chart",
            source="ours",
            sides=sides.gram,
            verdict="proved",
            basis="Theorem 5",
            weights="any",
        ),
        *CLAIMS,
    )
}
"""By name."""
