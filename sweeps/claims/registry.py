"""All claims in the order in which they are listed and run."""

from sweeps.claims import (
    blocks,
    exponentials,
    flash3,
    fp22,
    golden,
    lazy,
    offsets,
    pasa,
    sage,
    sums,
)
from sweeps.claims.claim import Claim

_SUBJECTS = (exponentials, lazy, flash3, golden, fp22, sage, sums, blocks, offsets, pasa)
CLAIMS: tuple[Claim, ...] = tuple(claim for subject in _SUBJECTS for claim in subject.CLAIMS)
