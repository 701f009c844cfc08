"""What was asked is on the receipt, without its words; and where it was asked matters to what comes next."""

from __future__ import annotations

from millicent.caching.segments import prompt_of
from millicent.core.request import Message
from millicent.ledger.queries import ReceiptFilter
from support.places import SECRET, World, letters
from support.virtual_time import run

SYSTEM = Message("system", "Answer briefly.")


def test_every_receipt_says_what_was_asked_without_its_words() -> None:
    async def story() -> None:
        world = World(letters(3))
        first = await world.pipeline.admit(world.request(messages=(SYSTEM, Message("user", "Hello"))))
        while await first.take() is not None:
            pass
        await world.ask(messages=(SYSTEM, Message("user", "Goodbye")))
        one, two = (each.receipt.prompt for each in world.ledger.queries.asked(ReceiptFilter()).asked)
        assert one is not None
        assert two is not None
        wanted = prompt_of(world.request(messages=(SYSTEM, Message("user", "Hello"))), SECRET)
        assert one == wanted
        assert [each.kind for each in one.segments] == ["system", "user"]
        assert (one.segments[0] == two.segments[0], one.segments[1].chain == two.segments[1].chain) == (True, False)
        await world.close()

    run(story)
