"""Settings of torch.compile that suit these products."""

from __future__ import annotations

from typing import Any

import torch._inductor.config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

_WIDEST_ROW = 4096


class WholeRows(InductorChoices):
    """Keeps a row of up to 4096 numbers in registers while it is reduced.

    Scaling a row needs its largest value first. By default a row that is wide, or part of a wider matrix, is read once
    for each reduction and once more for what follows; what precedes them, such as a norm, is computed just as often.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        along_rows = features.get_reduction_hint() in (ReductionHint.INNER, ReductionHint.DEFAULT)
        if along_rows and V.graph.sizevars.statically_known_leq(features.reduction_numel, _WIDEST_ROW):
            return True
        return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    def uuid(self) -> str:
        """For the cache of compiled code."""
        return f"prelora-whole-rows-{_WIDEST_ROW}"


def suit_held_products() -> None:
    """Has this process compile with whole rows, and without gaps between them.

    Gaps would align the rows of y and x A', together 3216 wide for instance, and cost more than they gain: cuBLAS adds
    the bias within a product only where the result has none. Else the bias is written first, in a pass of its own.
    """
    torch._inductor.config.comprehensive_padding = False
    torch._inductor.config.inductor_choices_class = WholeRows  # for threads that compile later, such as the backward's
    V.set_choices_handler(WholeRows())
