"""Quotes are computed by shorter ways than receipts are: they must come to the same."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from millicent.core.receipts import Attempt, Role
from millicent.core.usage import Provenance, Usage
from millicent.meter.placements import PlacementConfig
from millicent.meter.prices import LongContext, PriceEntry, Prices
from millicent.meter.pricing import Consumption, tier_of, token_lines, total
from millicent.meter.quotes import Asked, Quoter

prices = st.none() | st.decimals(0, 100, places=6)
tokens = st.integers(0, 300_000)


@given(prices, prices, prices, st.decimals(0, 1, places=3), tokens, st.integers(1, 100_000))
def test_a_quote_costs_what_the_lines_of_such_an_answer_come_to(
    input_price: Decimal | None,
    output_price: Decimal | None,
    fee: Decimal | None,
    discount: Decimal,
    read: int,
    limit: int,
) -> None:
    long = LongContext(above_input_tokens=200_000, input=Decimal(9), output=output_price, request_fee=fee)
    entry = PriceEntry(input=input_price, output=output_price, request_fee=fee, long_context=(long,))
    placement = PlacementConfig(kind="api", provider="p", discount=discount).placement("there")
    asked = Asked("m", placement, read, Provenance.COUNTED, limit, None, prices=Prices("test", entry, entry))
    quote = Quoter(lambda *_: None).quote(asked)

    def cost(written: int) -> object:
        usage = Usage.of(Provenance.ESTIMATED, input_fresh=read, output_text=written)
        attempt = Attempt(1, "", "there", "m", Role.INFERENCE, 0)
        return total(token_lines(Consumption(usage), tier_of(entry, usage), attempt, 0, discount=discount))

    length = quote.output_tokens
    expected = [cost(count) for count in (length.low, length.expected, length.high)]
    if None in expected:
        assert quote.cost is None
    else:
        assert quote.cost is not None
        assert [quote.cost.low, quote.cost.expected, quote.cost.high] == expected
