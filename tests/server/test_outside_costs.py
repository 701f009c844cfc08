"""What callers may tell of costs from outside, by the scope of their key."""

from decimal import Decimal

import pytest

from millicent.control.access import Caller
from millicent.control.keys import ApiKey, Scope
from millicent.core.errors import Forbidden
from millicent.core.money import Money
from millicent.core.request import OutsideCost
from millicent.server.late import check_costs


def caller(scope: Scope) -> Caller:
    return Caller(ApiKey(id="mk_1", scope=scope, secret_sha256=b"", created_at_ns=0))


def costs(*usd: str) -> tuple[OutsideCost, ...]:
    return tuple(OutsideCost("adjustment", "other", Decimal(1), "item", Money.from_usd(each)) for each in usd)


@pytest.mark.parametrize("told", [costs("-0.01"), costs("600", "400.000000001")])
def test_credits_and_large_sums_are_an_admins_to_tell(told: tuple[OutsideCost, ...]) -> None:
    with pytest.raises(Forbidden, match="client key may not"):
        check_costs(caller(Scope.CLIENT), told)
    check_costs(caller(Scope.ADMIN), told)
    check_costs(Caller(), told)


def test_a_client_may_tell_of_what_its_request_cost() -> None:
    check_costs(caller(Scope.CLIENT), costs("600", "400"))
