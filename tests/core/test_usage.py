import pytest

from millicent.core.steps import SequenceWork
from millicent.core.usage import Count, Leaf, Provenance, Usage, weakest


def test_totals_add_the_leaves_of_each_side() -> None:
    usage = Usage.of(Provenance.MEASURED, input_fresh=10, input_cache_read=5, output_text=3, output_reasoning=2)
    assert (usage.input_tokens, usage.output_tokens) == (15, 5)


def test_an_unknown_leaf_makes_its_total_unknown_and_never_zero() -> None:
    usage = Usage({Leaf.INPUT_FRESH: Count(None, Provenance.UNKNOWN)})
    assert usage.input_tokens is None
    assert usage.tokens(Leaf.INPUT_FRESH) is None
    assert usage.tokens(Leaf.INPUT_CACHE_READ) == 0


@pytest.mark.parametrize(
    ("tokens", "provenance"), [(None, Provenance.MEASURED), (0, Provenance.UNKNOWN), (-1, Provenance.MEASURED)]
)
def test_a_count_without_a_source_or_below_zero_cannot_be_made(tokens: int | None, provenance: Provenance) -> None:
    with pytest.raises(ValueError, match="token"):
        Count(tokens, provenance)


def test_a_sum_is_known_by_its_weakest_part() -> None:
    assert weakest([Provenance.MEASURED, Provenance.ASSUMED, Provenance.REPORTED]) is Provenance.ASSUMED


@pytest.mark.parametrize(("rows", "read", "pairs"), [(4, 4, 10), (4, 10, 6 * 4 + 10), (1, 9, 9)])
def test_prefill_pairs_count_what_each_row_attends_to(rows: int, read: int, pairs: int) -> None:
    assert SequenceWork(1, rows, 0, 0, read).prefill_pairs == pairs
