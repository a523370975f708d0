"""Mean keys: every skipped block answers with its mean key and its mean value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsereel.compensation.base import Compensation, SparseCall
from sparsereel.compensation.pooled import pooled_attention
from sparsereel_kernels import merge_attention


@dataclass(frozen=True, eq=False)
class MeanKey(Compensation):
    """Queries see the mean key of each skipped block, with the weight of all its n keys.

    out_i = (sum_kept e^{q_i k} v + sum_skipped n_j e^{q_i mean(k_j)} mean(v_j)) / (the same without v)

    Both sums are merged by their log-sum-exps. Exact where the keys of a block are equal; elsewhere too little weight
    goes to skipped blocks (the exponential is convex), so it errs towards plain sparsity. The coarse branch of VSA
    (arXiv 2505.13389) and the pooled terms of Rectified SpaAttn (arXiv 2511.19835), for every query instead of
    every block of queries. Costs 1/BK of dense attention.
    """

    name: ClassVar[str] = "mean_key"
    needs_lse: ClassVar[bool] = True

    def complete(self, call: SparseCall, out: Tensor, lse: Tensor | None) -> Tensor:
        assert lse is not None
        if not call.skips_anything:
            return out
        return merge_attention(out, lse, *pooled_attention(call, call.q * call.scale, call.k_means))[0]
