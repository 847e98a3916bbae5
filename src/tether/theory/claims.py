"""Statements about what is not a sum of independent Cauchy moves: mixtures, fusion by Fisher information, other laws.

Sections named as the basis are those of docs/how-drift-adds-up.md.
"""

from tether.theory import fisher, mixtures, multivariate
from tether.theory.statements import Statement

__all__ = ["CLAIMS"]

_LAWS = "any laws, any number; searched: d + 1 outcomes"
_TEXTS = "any experts and texts; searched: d tokens"
_SPACE = "one Cauchy law of R^3 with one scale; any number"

_MIXTURES = (
    Statement(
        name="mixture",
        text="D(P_0 || sum w_k P_k) <= sum w_k D(P_0 || P_k) in each context",
        assumptions=f"{_LAWS}, weights that add up to 1",
        source="ours",
        sides=mixtures.mixed,
        verdict="proved",
        basis="Theorem 7",
        weights="shares",
        place=mixtures.shared_out,
    ),
    Statement(
        name="mixture-sleeping",
        text="D(P_0 || Q) <= mean of D(P_0 || P_k) over those awake, Q their mixture, with the same weights",
        assumptions=f"{_LAWS}, somebody awake; a weight of at most 0 sleeps",
        source="ours",
        sides=mixtures.sleeping,
        verdict="proved",
        basis="Theorem 7",
        weights="any",
        place=mixtures.first_awake,
    ),
    Statement(
        name="mixture-leash",
        text="log P_1(x) - log sum w_k P_k(x) <= log 1/w_1 for every outcome x",
        assumptions=f"{_LAWS}, weights that add up to 1",
        source="ours",
        sides=mixtures.dearest_token,
        verdict="proved",
        basis="Theorem 7",
        weights="shares",
        place=mixtures.shared_out,
    ),
    Statement(
        name="mixture-means",
        text="mean of D(P_0 || sum w_k P_k) over contexts <= largest mean of D(P_0 || P_k), weights follow the context",
        assumptions="any laws, any number; searched: d contexts of two outcomes",
        source="what statement mixture does not say",
        sides=mixtures.means,
        verdict="refuted",
        basis="experts that move in disjoint contexts: the factor N, attained",
        least_dimension=2,
    ),
    Statement(
        name="mixture-means-sum",
        text=(
            "mean of D(P_0 || sum w_k P_k) over contexts <= sum of the means of D(P_0 || P_k), weights follow the"
            " context"
        ),
        assumptions="any laws, any number; searched: d contexts of two outcomes",
        source="ours",
        sides=mixtures.over_contexts,
        verdict="proved",
        basis="Theorem 7",
        least_dimension=2,
    ),
    Statement(
        name="regret",
        text=(
            "-sum log q_t(x_t) <= -sum log p_k(x_t) + log 1/pi_k for every k, q_t = sum w_k p_k, w from the text so"
            " far"
        ),
        assumptions=_TEXTS,
        source="ours, after Vovk 1990",
        sides=mixtures.paid,
        verdict="proved",
        basis="Theorem 8",
        weights="shares",
        place=mixtures.awake_paths,
    ),
    Statement(
        name="regret-sleeping",
        text="the same over the tokens at which expert k is awake, for every k",
        assumptions=f"{_TEXTS}, somebody awake at each; y < 0 sleeps",
        source="ours, after Freund and others 1997",
        sides=mixtures.paid_awake,
        verdict="proved",
        basis="Theorem 8",
        weights="shares",
        place=mixtures.awake_paths,
    ),
    Statement(
        name="switching",
        text=(
            "-sum log q_t(x_t) <= -sum log p_k(t)(x_t) + log 1/pi_k(1) + sum over switches log 1/(s pi_k)"
            " + sum over the other steps log 1/(1 - s + s pi_k), for every sequence k(t)"
        ),
        assumptions=f"{_TEXTS}, a share s restarts at each",
        source="ours, after Herbster and Warmuth 1998",
        sides=mixtures.paid_paths,
        verdict="proved",
        basis="Theorem 8",
        weights="shares",
        least_dimension=2,
        place=mixtures.awake_paths,
    ),
)

_FISHER = (
    Statement(
        name="fisher",
        text="v^T (sum F_k) v <= sum v_k^T F_k v_k for v = (sum F_k)^-1 sum F_k v_k",
        assumptions="any moves and matrices; searched: F_k = y_k y_k^T + a_k 1, a_k > 0",
        source="spec document 1, 2.4 and 6.3",
        sides=fisher.own_form,
        verdict="proved",
        basis="Theorem 9",
        weights="any",
        place=fisher.usual_matrices,
    ),
    Statement(
        name="fisher-base",
        text="v^T F_0 v <= K sum v_k^T F_0 v_k for some K and the same v (shown for K = 1 and F_0 = 1)",
        assumptions="any moves and matrices; searched: as above",
        source="what statement fisher does not say",
        sides=fisher.foreign_form,
        verdict="refuted",
        basis="two matrices of rank 1 whose directions are almost alike: no K, exact fractions",
        weights="any",
        least_dimension=2,
        place=fisher.usual_matrices,
    ),
    Statement(
        name="fisher-cauchy",
        text="e^D - 1 <= sum max(a_k, (3 f_k + a_k)/4) (e^D_k - 1) in each dimension, so D <= sum D_k",
        assumptions="Cauchy laws of one context fused by their own information, any N, d; f_k ~ a_k e^(-2 x_k)",
        source="spec document 1, 2.4 and 6.3",
        sides=fisher.own_information,
        verdict="proved",
        basis="Theorem 10",
        weights="shares",
        place=mixtures.shared_out,
    ),
)

_OTHER_LAWS = (
    Statement(
        name="space-main",
        text="D(sum p_k) <= N sum D(p_k)",
        assumptions=_SPACE,
        source="spec document 1, 6.3: other laws",
        sides=multivariate.sums_in_space,
        verdict="refuted",
        basis="two equal small moves that widen: third derivative, every R^n",
    ),
    Statement(
        name="space-scales",
        text="D(sum p_k) <= (sum sqrt D(p_k))^2 for y_k = 0",
        assumptions=f"{_SPACE}, scales alone move",
        source="spec document 1, 6.3: other laws",
        sides=multivariate.widths_in_space,
        verdict="refuted",
        basis="two equal small moves that widen: third derivative, every R^n, n >= 2",
        place=multivariate.still,
    ),
    Statement(
        name="space-shifts",
        text="D(sum p_k) <= (sum sqrt D(p_k))^2 for x_k = 0",
        assumptions=f"{_SPACE}, locations alone move",
        source="spec document 1, 6.3: other laws",
        sides=multivariate.shifts,
        verdict="proved",
        basis="Theorem 11",
        place=multivariate.unscaled,
    ),
    Statement(
        name="space-shifts-squared",
        text="D(sum p_k) <= (sum y_k)^2 / 3 for x_k = 0; (n+1)/(2(n+3)) in place of 1/3 in R^n",
        assumptions=f"{_SPACE}, locations alone move",
        source="spec document 1, 6.3: other laws",
        sides=multivariate.shifts_squared,
        verdict="proved",
        basis="Theorem 11",
        place=multivariate.unscaled,
    ),
)

CLAIMS: tuple[Statement, ...] = (*_MIXTURES, *_FISHER, *_OTHER_LAWS)
"""In the order of the page."""
