"""The token state of one rank, without processes."""

from __future__ import annotations

import pytest
import torch

from raylight.parallel.masks import gathered_mask, local_mask
from raylight.parallel.plan import Aligned, Converted, Stream, TokenIndex, TokenPrefix, TokenRanges, Unsupported
from raylight.parallel.tokens import TokenState


def state(rank: int, degree: int, **streams: int) -> TokenState:
    tokens = TokenState(rank, degree)
    for name, total in streams.items():
        tokens.shard(torch.zeros(1, total, 1), Stream(name))
    return tokens


def test_a_stream_is_sharded_once_and_then_left_alone() -> None:
    tokens = TokenState(1, 3)
    whole = torch.arange(7.0).view(1, 7, 1)
    part = tokens.shard(whole, Stream("x"))
    assert part.flatten().tolist() == [3, 4]
    assert tokens.shard(part, Stream("x")) is part
    part += 1
    assert whole.flatten().tolist() == list(range(7)), "blocks work in place on their own copy"


def test_a_new_forward_forgets_the_last() -> None:
    tokens = state(0, 2, x=5)
    assert tokens.is_split
    tokens.begin()
    assert not tokens.is_split
    with pytest.raises(RuntimeError, match="'x' is used before"):
        tokens.sizes("x")


def test_rows_of_a_joint_table_follow_both_streams() -> None:
    tokens = state(1, 2, txt=3, img=5)
    table = torch.arange(8).view(1, 8)
    assert tokens.shard(table, Aligned(("txt", "img"))).tolist() == [[2, 6, 7]]


def test_one_row_serves_all_tokens() -> None:
    tokens = state(1, 2, x=5)
    row = torch.zeros(1, 1, 4)
    assert tokens.shard(row, Aligned(("x",))) is row


@pytest.mark.parametrize(("rows", "total"), [(3, 9), (3, 10), (4, 6)])
def test_rows_per_frame_are_repeated_over_their_tokens(rows: int, total: int) -> None:
    repeats = -(-total // rows)
    whole = torch.arange(rows).repeat_interleave(repeats)[:total]
    parts = [
        state(rank, 2, x=total).shard(torch.arange(rows).view(1, rows), Aligned(("x",), expand=True))
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(parts, dim=1)[0], whole)


def test_ranges_of_one_stream() -> None:
    for rank, expected in ((0, [(0, 3, 0), (3, 5, 1)]), (1, [(0, 4, 1)])):
        for end in (9, None):
            assert state(rank, 2, img=9).shard([(0, 3, 0), (3, end, 1)], TokenRanges(("img",))) == expected


def test_a_row_for_each_token_of_a_range_is_cut_with_it() -> None:
    rows = torch.arange(10, 17)
    found = [state(rank, 2, img=9).shard([(0, 2, 5), (2, None, rows)], TokenRanges(("img",))) for rank in range(2)]
    assert [[(start, stop) for start, stop, _ in ranges] for ranges in found] == [[(0, 2), (2, 5)], [(0, 4)]]
    assert found[0][0][2] == 5
    assert found[0][1][2].tolist() == [10, 11, 12] and found[1][0][2].tolist() == [13, 14, 15, 16]


def test_ranges_after_a_stream_counted_at_its_local_length() -> None:
    # Two text tokens here, and image tokens 5 to 8 of 9: the range of the first six image tokens starts at 2.
    tokens = state(1, 2, txt=4, img=9)
    rule = TokenRanges(("txt", "img"), local=("txt",))
    assert tokens.shard([(0, 8, 0), (8, 11, 1)], rule) == [(0, 2, 0), (2, 3, 0), (3, 6, 1)]


@pytest.mark.parametrize(("index", "expected"), [(0, [0, 0]), (3, [3, 0]), (5, [5, 0]), (7, [5, 2]), (9, [5, 4])])
def test_an_index_is_counted_from_the_first_local_token(index: int, expected: list[int]) -> None:
    assert [state(rank, 2, img=9).shard(index, TokenIndex("img")) for rank in range(2)] == expected


def test_masks_are_put_in_the_order_of_gathered_tokens() -> None:
    tokens = state(0, 2, txt=3, img=4)
    keys = torch.arange(7.0).view(1, 1, 1, 7)
    order = [0, 1, 3, 4, 2, 5, 6]
    assert gathered_mask(tokens, keys, ("txt", "img")).flatten().tolist() == order
    square = torch.arange(49.0).view(1, 1, 7, 7)
    expected = square[..., order, :][..., order]
    assert torch.equal(gathered_mask(tokens, square, ("txt", "img")), expected)


def short(rank: int) -> TokenState:
    """Return the state of ten image tokens and then one text token, on three ranks."""
    return state(rank, 3, img=10, txt=1)


def test_a_stream_may_have_fewer_tokens_than_ranks() -> None:
    for rank in range(3):
        tokens = short(rank)
        assert tokens.sizes("txt") == (0, 0, 1), "the ranks with the fewest image tokens take them"
        assert tokens.lengths(("txt", "img")) == (4, 3, 4)
        assert tokens.total(("txt", "img")) == 11
        assert tokens.local_length(("txt", "img")) == (5, 4, 4)[rank], "no tensor is empty"


def test_a_rank_without_a_token_holds_the_last() -> None:
    tokens, txt = TokenState(0, 4), torch.arange(3.0).view(1, 3, 1)
    assert tokens.shard(txt, Stream("txt")).flatten().tolist() == [2]
    assert tokens.sizes("txt") == (0, 1, 1, 1)


def test_an_aligned_argument_has_a_row_for_a_placeholder() -> None:
    table = torch.arange(11).view(1, 11)
    for rank, expected in enumerate(([0, 1, 2, 3, 10], [4, 5, 6, 10], [7, 8, 9, 10])):
        tokens = short(rank)
        assert tokens.shard(table, Aligned(("img", "txt"))).flatten().tolist() == expected
        assert tokens.shard(torch.zeros(1, 1, 2), Stream("txt")).shape == (1, 1, 2)
        mask = torch.arange(11).view(1, 1, 11, 1)
        assert local_mask(tokens, mask, ("img", "txt")).flatten().tolist() == expected
        assert (
            tokens.shard([(0, 5, 0), (5, None, 1)], TokenRanges(("img", "txt")))
            == ([(0, 4, 0), (4, 5, 1)], [(0, 1, 0), (1, 3, 1), (3, 4, 1)], [(0, 3, 1), (3, 4, 1)])[rank]
        )
        assert tokens.shard(1, TokenIndex("txt")) == 1


def test_a_placeholder_is_not_exchanged() -> None:
    order = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert gathered_mask(short(0), torch.arange(11).view(1, 1, 1, 11), ("img", "txt")).flatten().tolist() == order
    for rank, expected in enumerate(([0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3])):
        tokens = short(rank)
        local = torch.arange(tokens.local_length(("img", "txt"))).view(1, 1, -1)
        own = tokens.without_placeholders(local, ("img", "txt"), 2)
        assert own.flatten().tolist() == expected
        filled = tokens.with_placeholders(own + 1, ("img", "txt"), 2)
        assert filled.shape == local.shape
        assert filled.flatten().tolist() == [*(own + 1).flatten().tolist(), *([] if rank == 2 else [0])]


def test_a_prefix_of_a_short_stream() -> None:
    for rank, held in enumerate((1, 1, 1)):
        tokens = short(rank)
        assert tokens.shard(1, TokenPrefix("txt", "prompt")) == held
        assert tokens.sizes("prompt") == (0, 0, 1)


def test_a_gathered_short_stream_goes_to_the_same_ranks_again() -> None:
    tokens = state(0, 2, txt=1)
    assert tokens.sizes("txt") == (0, 1)
    tokens.shard(torch.zeros(1, 1, 1), Stream("img"))
    assert tokens.sizes("img") == (1, 0), "and another stream to the others"
    tokens.mark_gathered("txt")
    tokens.shard(torch.zeros(1, 1, 1), Stream("txt"))
    assert tokens.sizes("txt") == (0, 1)


def test_rejects_an_argument_by_its_reason() -> None:
    tokens = TokenState(0, 2)
    assert tokens.shard(None, Unsupported("no")) is None
    with pytest.raises(ValueError, match="cannot be split over workers here: it counts tokens"):
        tokens.shard(torch.zeros(1), Unsupported("it counts tokens"))


def test_rejects_a_table_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="5 rows along dim 1 for 6 tokens"):
        state(0, 2, x=6).shard(torch.zeros(1, 5), Aligned(("x",)))


def test_rejects_a_mask_that_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"\(1, 1, 1, 5\) does not fit 6 tokens"):
        gathered_mask(state(0, 2, x=6), torch.zeros(1, 1, 1, 5), ("x",))


def test_a_grid_is_one_row_while_it_is_local() -> None:
    tokens, video = TokenState(1, 2), torch.arange(2 * 3 * 5 * 4 * 2.0).view(2, 3, 5, 4, 2)
    local = tokens.shard(video, Stream("video", grid=3))
    assert local.shape == (2, 30, 1, 1, 2)
    assert torch.equal(local[:, :, 0, 0], video.flatten(1, 3)[:, 30:])
    assert tokens.restore_grid(video.flatten(1, 3)[:, :, None, None], "video", 1).shape == video.shape


def test_a_stream_may_be_an_entry_of_a_tuple() -> None:
    tokens, audio = TokenState(0, 2), torch.randn(1, 3, 2)
    video, same = tokens.shard((torch.randn(1, 6, 2), audio), Stream("video", index=0))
    assert video.shape == (1, 3, 2)
    assert same is audio


def test_a_gathered_stream_is_sharded_again() -> None:
    tokens, whole = TokenState(1, 2), torch.randn(1, 5, 2)
    first = tokens.shard(whole, Stream("x"))
    assert tokens.shard(first, Stream("x")) is first, "it is local already"
    tokens.mark_gathered("x")
    assert tokens.shard(whole, Aligned(("x",))) is whole, "nothing is sharded while the stream is full"
    assert torch.equal(tokens.shard(whole, Stream("x")), first)
    tokens.mark_gathered("x")
    assert tokens.shard(torch.randn(1, 9, 2), Stream("x")).shape == (1, 4, 2), "and may have another length"


def test_a_full_stream_met_twice_is_sharded_twice() -> None:
    tokens, whole = TokenState(0, 2), torch.randn(1, 6, 2)
    assert torch.equal(tokens.shard(whole, Stream("x")), tokens.shard(whole, Stream("x")))


def test_a_stream_behind_local_tokens() -> None:
    tokens = TokenState(1, 2)
    img, txt = tokens.shard(torch.randn(1, 5, 2), Stream("img")), torch.randn(1, 4, 2)
    joint = tokens.shard(torch.cat([img, txt], 1), Stream("txt", after=("img",)))
    assert torch.equal(joint, torch.cat([img, txt[:, 2:]], 1))


@pytest.mark.parametrize(("count", "sizes"), [(7, (4, 3)), (5, (4, 1)), (3, (3, 0)), (99, (4, 4))])
def test_a_prefix_is_a_stream_of_its_own(count: int, sizes: tuple[int, int]) -> None:
    for rank in range(2):
        tokens = TokenState(rank, 2)
        tokens.shard(torch.randn(1, 8, 2), Stream("txt"))
        assert tokens.shard(count, TokenPrefix("txt", "prompt")) == sizes[rank]
        assert tokens.sizes("prompt") == sizes


def test_an_argument_of_the_models_own_kind() -> None:
    tokens = TokenState(1, 2)
    tokens.shard(torch.randn(1, 6, 2), Stream("x"))
    assert tokens.shard({"of": "the model"}, Converted(lambda value, tokens: (value, tokens.rank))) == (
        {"of": "the model"},
        1,
    )
