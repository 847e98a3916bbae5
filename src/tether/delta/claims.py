"""What the figures of a certificate mean, in sentences that each certificate carries, by schema."""

import hashlib
import json
from collections.abc import Sequence

__all__ = ["CLAIMS", "SCHEMA_VERSION", "are_known"]

SCHEMA_VERSION = 10
"""2: token law, leash and continuations among the figures; 3: what the budgets allow. Older ones hold without.
5: the dtype; in half precision figures count how what is served is rounded. 6: fusions by evidence.
7: budgets beside the drift of each delta alone, and signatures. 8: numbers.
9: alone, limits of a quantile and adapters fused by evidence too.
10: control tokens in texts are letters unless `control_tokens` says otherwise; `field` and `split` of texts in rows."""

CLAIMS = (
    "Figures are measurements on the texts listed, in nats per token; they say nothing about other text except "
    "where a confidence is given.",
    "documents.at_most: with the stated confidence over the draw of documents, at least the stated share of "
    "documents drawn like these has a mean at or below it (order statistic, no distribution assumed).",
    "bound: latent drift of the fusion never exceeds the bound of its chart, given each delta's own drift in the "
    "same context, nor a leash in that metric; violations counts the contexts where it did.",
    "budgets: the mean latent drift that the deltas' own mean drifts on their base text allow their fusion, on text "
    "where each alone drifts no further in the mean ('tether theory plan'); on a domain's own text it is no promise.",
    "alone: on the base text that a delta's budget was met on, the drift of that delta alone, beside what it declares, "
    "its mean, or its quantile where that is declared; a certificate does not hold where the measurement is clearly "
    "beyond it.",
    "token_law: under causal sampling without truncation the KL of the token law to the base's is at most the latent "
    "drift of the context, total variation at most sqrt(drift / 2) and sqrt(1 - exp(-drift)), and with noise of its "
    "own at each position the KL of a text's law at most the expected sum over texts that the base writes; this does "
    "not hold for softmax sampling, whose measured KL is softmax_kl.",
    "leash: in any context whatever, of any text, the drift in the leash's metric is at most its nats (temperature "
    "1); leash_pulled is the share of contexts here that it held back.",
    "regret, worst_token and parts are of fusions by evidence, with the prior, restarts and floor that the fusion "
    "states. regret: on any text whatever, served from its beginning, the loss of all its tokens exceeds the base's, "
    "and that of each domain's experts where they are awake, by at most what is allowed; each pair is measured and "
    "allowed for one document, whose windows are served as texts of their own.",
    "worst_token: in any context whatever the loss of a token exceeds the base's by at most the logarithm of 1 / "
    "weight of the base there (before sampling is cut off); what the fusion adds is not bounded.",
    "parts: in any context whatever softmax_kl is at most the weighted mean of KL(base || expert); this does not carry "
    "over to means over contexts of one expert alone. latent_drift is the weighted mean of the experts' own.",
    "values: where a number follows, the median error of the number that base and fused model expect, in the numbers' "
    "own units, the share of numbers within the central half of the law, and drift, the KL of the two laws; by "
    "evidence the Cauchy law with the median and quartiles of what is served.",
    "continuations: the same figures in the contexts of tokens that the fused model wrote itself, by softmax sampling "
    "at temperature 1 with the seed stated, after the first tokens of documents.",
)

OLDER_CLAIMS = {
    1: "dc2fdb317738f48ccabcac3f07e0e72aaa693afeb6891dbb4743ce58c9b900ab",
    2: "51ef1ea136640f1304b9e9789f8e78c43021835d26697b5fb552fe707371e639",
    3: "790b5b0d36464bb49b117e3dec2c4a92b80ecf9f311894ef2dc3426304092fb3",
    4: "790b5b0d36464bb49b117e3dec2c4a92b80ecf9f311894ef2dc3426304092fb3",
    5: "81091fbfe75211984466e191b45c9748bfd2260d811f5f7e8103caaacec49cf7",
    6: "fcd24f3537bfdc930c016d972a4b12fe6f92b43eecaebebd96b04495b8d18d27",
    7: "177b3799cd9371e30f7c2365bab73729f738d8283807204d0a6e45009020ca7e",
    8: "25ccb6524b86d8a29b5304c21af81d197e7ef64f407fcada4215fde235580d28",
    9: "0882fb185d70a4be3c75d71fbec53f9a36ed48798ce9e317754b1bf4180dbf13",
}
"""Hashes of the claims of older schemas."""


def are_known(claims: Sequence[str], schema_version: int) -> bool:
    """Tell whether claims are those of a schema.

    Args:
        claims: of a certificate.
        schema_version: its schema.

    Returns:
        Whether they are.
    """
    older = OLDER_CLAIMS.get(schema_version)
    if older is None:
        return tuple(claims) == CLAIMS
    return hashlib.sha256(json.dumps(list(claims)).encode()).hexdigest() == older
