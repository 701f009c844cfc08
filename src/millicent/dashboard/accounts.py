"""Each device's time, hour by hour."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from millicent.core.accounts import Account
from millicent.core.clock import hour_start_ns
from millicent.dashboard.models import checkpointed
from millicent.dashboard.site import Page, Site


def accounts_page(site: Site) -> Page:
    async def show(request: Request) -> Response:
        selection = site.selection(request)
        stale = await checkpointed(site)
        now_ns = site.clock.now_ns()
        from_ns = hour_start_ns(selection.where.from_ns or 0)
        to_ns = now_ns + 1 if selection.where.to_ns is None else selection.where.to_ns
        accounts = await site.read(lambda: site.queries.accounts(from_ns, to_ns))
        devices: dict[tuple[str, str], list[Account]] = {}
        for account in sorted(accounts, key=lambda account: (account.device, account.placement, -account.hour_ns)):
            devices.setdefault((account.device, account.placement), []).append(account)
        return site.answer(request, "accounts.html", selection=selection, devices=devices, stale=stale)

    return Page("Models & placements", "Accounts", "/accounts", [site.get("/accounts", show)])
