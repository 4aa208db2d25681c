"""Memory by the piece."""

from workers.kernels.memory import Slabs


def test_pieces_lie_side_by_side_and_apart() -> None:
    """Each piece is its own, aligned; small ones are neighbours, and one too large for a slab has its own."""
    slabs = Slabs(slab_bytes=4096)
    pieces = [slabs.take(size) for size in (1, 100, 64, 8000, 10)]
    places = [piece.data_ptr() for piece in pieces]
    assert [len(piece) for piece in pieces] == [1, 100, 64, 8000, 10]
    assert all(place % 64 == 0 for place in places)
    assert places[1] - places[0] == 64
    assert places[2] - places[1] == 128
    for number, piece in enumerate(pieces, 1):
        assert not piece.any()
        piece.fill_(number)
    assert [int(piece.float().mean()) for piece in pieces] == [1, 2, 3, 4, 5]
