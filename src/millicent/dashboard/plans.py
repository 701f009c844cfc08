"""The pages under Plan, in the order in which they stand beside each other."""

from __future__ import annotations

from functools import partial

from millicent.dashboard.plan import Planning, where_page
from millicent.dashboard.plan_estimate import estimate_page
from millicent.dashboard.plan_replayed import cheaper_page, scale_page
from millicent.dashboard.plan_standing import standing_page
from millicent.dashboard.site import Page


def plan_pages(planning: Planning) -> list[partial[Page]]:
    return [partial(each, planning) for each in (where_page, scale_page, cheaper_page, estimate_page, standing_page)]
