"""The keyed loader: one order for any number of processes and workers, exact resume, bad items."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sandbox.contracts import BadItem, Batch, Clip, DataError
from sandbox.data.loader import Loader, batches, usual_size


class Numbers:
    """Clip i shows i, with a caption of that number and noise from `rng`; some cannot be loaded."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"clip: {index}"

    def load(self, index: int, rng: np.random.Generator) -> dict:
        if index in self.bad:
            raise BadItem(f"number {index} is broken")
        video = torch.full((3, 1, 2, 2), float(index))
        video[1] = float(rng.random())
        return {"video": video, "caption": str(index), "fps": float(index)}


def loader(count: int = 20, batch_size: int = 4, **more) -> Loader:
    bad = more.pop("bad", ())
    return Loader(Numbers(count, bad), batch_size, seed=3, **more)


def content(batch: Batch) -> tuple:
    """All of a batch, comparable."""
    return (
        batch.epoch,
        batch.position.tolist(),
        batch.ids,
        batch.captions,
        batch.scalars["fps"].tolist(),
        batch.video.tolist(),
        batch.bad,
    )


def epochs(loader: Loader, count: int) -> list[tuple]:
    return [content(batch) for _ in range(count) for batch in loader]


def shown(batch: Batch) -> Tensor:
    """The number that each clip shows."""
    return batch.video[:, 0, 0, 0, 0]


def test_an_epoch_has_every_clip_once():
    seen = torch.cat([shown(batch) for batch in loader(18)])
    assert sorted(seen.tolist()) == list(range(18))


def test_epochs_differ_in_order_and_in_the_randomness_of_a_clip():
    first, second = (
        dict(zip(b.ids, b.video[:, 1, 0, 0, 0].tolist(), strict=True))
        for one in [loader(4)]
        for _ in range(2)
        for b in one
    )
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    assert [e[2] for e in epochs(loader(), 2)][:5] != [e[2] for e in epochs(loader(), 2)][5:]


def test_positions_count_through_the_epoch():
    positions = [p for _, p, *_ in epochs(loader(10), 1)]
    assert positions == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_caption_scalars_and_pixels_of_a_clip_stay_together():
    for batch in loader(bad=(2, 7, 11)):
        assert [float(c) for c in batch.captions] == shown(batch).tolist()
        assert batch.scalars["fps"].tolist() == shown(batch).tolist()


def test_two_ranks_together_see_what_one_process_sees():
    one = list(loader(24, 8))
    ranks = [list(loader(24, 4, rank=r, world=2)) for r in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert whole.ids == [i for part in parts for i in part.ids]
        assert torch.equal(whole.position, torch.cat([p.position for p in parts]))
        assert torch.equal(whole.video, torch.cat([p.video for p in parts]))


@pytest.mark.parametrize("count, sizes", [(16, [4, 4]), (21, [4, 4, 2]), (17, [4, 4])])
def test_the_last_micro_batch_is_cut_to_equal_slices(count, sizes):
    for rank in range(2):
        one = loader(count, 4, rank=rank, world=2)
        assert [b.size for b in one] == sizes
        assert len(one) == len(sizes)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    many = loader(10, num_workers=workers, bad=(3,))
    assert epochs(many, 2) == epochs(loader(10, bad=(3,)), 2)


@pytest.mark.parametrize("taken", range(8))
def test_a_loader_resumes_from_a_saved_state(taken):
    reference, stopped = epochs(loader(10, bad=(3,)), 3), loader(10, bad=(3,))
    done: list[tuple] = []
    while len(done) < taken:
        for batch in stopped:
            done.append(content(batch))
            if len(done) == taken:
                break
    resumed = loader(10, bad=(3,))
    resumed.load_state_dict(stopped.state_dict())
    rest = epochs(resumed, 3)
    assert (done + rest)[:9] == reference


def test_state_counts_what_was_handed_out_not_what_workers_prepared():
    ahead = loader(num_workers=2)
    for taken, _ in enumerate(ahead, 1):
        state = ahead.state_dict()
        assert (state["epoch"], state["taken"]) == divmod(taken, 5)


def test_a_new_iterator_continues_where_the_last_one_stopped():
    one = loader(num_workers=1)
    parts = []
    for _ in range(3):
        for batch in one:
            parts.append(content(batch))
            if len(parts) % 2 == 0:
                break
    assert parts == epochs(loader(), 2)[: len(parts)]


def test_the_global_generators_are_not_touched():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    epochs(loader(), 1)
    assert (torch.rand(1), np.random.rand()) == expected


def test_a_bad_item_is_replaced_named_and_counted_once():
    one = loader(20, bad=(5,))
    listed = [b.bad for _ in range(2) for b in one]
    assert one.bad == {"clip: 5": "number 5 is broken"}
    assert sum(lines == ["clip: 5: number 5 is broken"] for lines in listed) >= 2
    assert all(b.size == 4 for b in one)


def test_too_many_bad_items_end_the_run_with_their_names():
    with pytest.raises(DataError, match=r"data\.max_bad=2.*clip: \d+: number \d+ is broken"):
        epochs(loader(20, bad=tuple(range(10)), max_bad=2), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_an_error_and_no_endless_search(workers):
    with pytest.raises(DataError, match="no usable clip in 21 tries"):
        epochs(loader(4, bad=(0, 1, 2, 3), num_workers=workers), 1)


def test_bad_items_of_a_resumed_run_are_still_counted():
    first = loader(10, bad=(3,))
    epochs(first, 1)
    resumed = loader(10, bad=(3,))
    resumed.load_state_dict(first.state_dict())
    assert resumed.bad == first.bad


@pytest.mark.parametrize(
    "count, size, world, cure",
    [
        (0, 4, 1, "there are no clips"),
        (10, 16, 1, r"data\.batch_size=16 needs 16 clips, there are 10: set data\.batch_size=10"),
        (10, 8, 2, r"on 2 processes needs 16 clips, there are 10: set data\.batch_size=5"),
        (1, 1, 2, "there are 1: add clips"),
    ],
)
def test_too_few_clips_are_an_error_with_the_cure(count, size, world, cure):
    with pytest.raises(DataError, match=cure):
        loader(count, size, world=world)


def test_a_state_of_other_data_is_refused():
    with pytest.raises(DataError, match=r"20 clips in micro-batches of 4.* now there are 21 in 4"):
        loader(21).load_state_dict(loader(20).state_dict())


def test_validation_takes_every_item_in_order():
    found = list(batches(Numbers(5), 2))
    assert [b.position.tolist() for b in found] == [[0, 1], [2, 3], [4]]
    assert [shown(b).tolist() for b in found] == [[0, 1], [2, 3], [4]]


def test_validation_leaves_bad_items_out_and_keeps_the_positions_of_others():
    found = list(batches(Numbers(8, bad=(0, 1, 3, 6, 7)), 2))
    assert [b.position.tolist() for b in found] == [[2], [4, 5]]
    assert [b.captions for b in found] == [["2"], ["4", "5"]]
    assert [len(b.bad) for b in found] == [3, 2]


def test_validation_without_a_usable_clip_is_an_error():
    with pytest.raises(DataError, match="no clip is usable: clip: 0: number 0 is broken"):
        list(batches(Numbers(2, bad=(0, 1)), 2))


# --- several sizes --------------------------------------------------------------------------------


class Sized(Numbers):
    """As Numbers, of three widths; with `random` a clip's width is drawn again in each epoch."""

    WIDTHS = (2, 2, 4, 2, 6)

    def __init__(self, count: int, bad: tuple[int, ...] = (), random: bool = False) -> None:
        super().__init__(count, bad)
        self.random = random

    def bucket(self, index: int, rng: np.random.Generator) -> Clip:
        place = int(rng.integers(5)) if self.random else index % 5
        return Clip(3, 1, 2, self.WIDTHS[place])

    def load(self, index: int, rng: np.random.Generator) -> dict:
        width = self.bucket(index, rng).width
        return super().load(index, rng) | {"video": torch.full((3, 1, 2, width), float(index))}


def batch_of(clip: Clip) -> int:
    return 2 if clip.width == 6 else 4


def sized(count: int = 40, batch_size: int = 4, **more) -> Loader:
    items = Sized(count, more.pop("bad", ()), more.pop("random", False))
    return Loader(items, batch_size, 3, batch_of=more.pop("batch_of", batch_of), **more)


@pytest.mark.parametrize("random", [False, True])
def test_each_clip_comes_once_an_epoch_in_batches_of_one_size(random):
    one = sized(41, random=random)
    for _ in range(2):
        seen = list(one)
        assert sorted(int(c) for b in seen for c in b.captions) == list(range(41))
        positions = [p for b in seen for p in b.position.tolist()]
        assert positions == list(range(41))
        assert all(b.size <= batch_of(Clip(*b.video.shape[1:])) for b in seen)


def test_sizes_come_in_no_order():
    widths = [b.video.shape[-1] for b in sized(200)]
    assert sorted(widths) != widths
    assert sorted(widths, reverse=True) != widths


def test_sizes_that_take_turns_have_a_batch_of_each_in_every_round():
    one = sized(200, turns=True)
    for _ in range(2):
        seen = [*one]
        widths = [b.video.shape[-1] for b in seen]
        assert len(seen) == len(one)
        assert widths == widths[:3] * (len(widths) // 3) and len({*widths[:3]}) == 3
        captions = [c for b in seen for c in b.captions]
        assert len({*captions}) == len(captions)


def test_incomplete_batches_of_each_size_are_dropped_on_request():
    one = sized(43, drop_incomplete=True)
    assert [b.size for b in one if b.size != batch_of(Clip(*b.video.shape[1:]))] == []
    assert len(one) == 26 // 4 + 9 // 4 + 8 // 2
    assert len(sized(43)) == 7 + 3 + 4
    assert [b.size for b in loader(18, drop_incomplete=True)] == [4] * 4


@pytest.mark.parametrize("random", [False, True])
def test_two_ranks_together_see_the_sizes_that_one_process_sees(random):
    one = [*sized(96, 8, random=random, batch_of=lambda clip: 2 * batch_of(clip))]
    ranks = [[*sized(96, 4, random=random, rank=r, world=2)] for r in range(2)]
    whole = {p: i for b in one for p, i in zip(b.position.tolist(), b.ids, strict=True)}
    parts = {
        p: i for r in ranks for b in r for p, i in zip(b.position.tolist(), b.ids, strict=True)
    }
    assert parts.items() <= whole.items()
    assert len(whole) - len(parts) <= 3  # what of each size is left is cut to two equal slices
    assert all(a.video.shape == b.video.shape for a, b in zip(*ranks, strict=True))


@pytest.mark.parametrize("taken", [1, 7, 15])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_of_several_sizes_resumes_from_a_saved_state(taken, workers):
    def some(loader: Loader, count: int) -> list[tuple]:
        found: list[tuple] = []
        while len(found) < count:
            for batch in loader:
                found.append(content(batch))
                if len(found) == count:
                    break
        return found

    settings = {"bad": (3, 12), "random": True, "num_workers": workers}
    reference, stopped, resumed = (sized(**settings) for _ in range(3))
    done = some(stopped, taken)
    resumed.load_state_dict(stopped.state_dict())
    assert done + some(resumed, 30 - taken) == some(reference, 30)
    for one in (reference, stopped, resumed):
        one.close()


def test_a_bad_item_is_replaced_by_one_of_its_size():
    one = sized(40, bad=(2, 7))
    widths = [{Sized.WIDTHS[int(c) % 5] for c in batch.captions} for batch in one]
    assert all(len(found) == 1 for found in widths)
    assert set(one.bad) == {"clip: 2", "clip: 7"}


def test_a_size_without_a_usable_item_gives_way_to_another():
    bad = tuple(range(4, 40, 5))
    one = sized(40, bad=bad)
    assert {b.video.shape[-1] for b in one} == {2, 4}
    assert len(one.bad) == len(bad)


def test_a_state_of_other_sizes_is_refused():
    state = sized(40).state_dict()
    assert state["sizes"]["3x1x2x6"] == [8, 2]
    state["sizes"]["3x1x2x6"] = [7, 2]
    with pytest.raises(DataError, match="7 clips of 3x1x2x6 in micro-batches of 2"):
        sized(40).load_state_dict(state)
    state = sized(40, batch_of=lambda clip: 4).state_dict()
    with pytest.raises(DataError, match="8 clips of 3x1x2x6 in micro-batches of 4"):
        sized(40).load_state_dict(state)


def test_sizes_with_too_few_clips_for_all_processes_are_an_error_with_a_cure():
    with pytest.raises(DataError, match=r"6 processes \(3 of 3x1x2x2.*add clips"):
        Loader(Sized(5), 1, 3, world=6)
    with pytest.raises(DataError, match="drop_incomplete=false"):
        Loader(Sized(9), 8, 3, drop_incomplete=True)


def test_validation_takes_items_of_several_sizes_once_and_keeps_their_positions():
    found = list(batches(Sized(10, bad=(3,)), 3))
    assert [b.position.tolist() for b in found] == [[0, 1], [2, 7], [4, 9], [5, 6, 8]]
    assert all([float(p) for p in b.position] == shown(b).tolist() for b in found)
    only = list(batches(Sized(10), 3, only=Clip(3, 1, 2, 4)))
    assert [b.position.tolist() for b in only] == [[2, 7]]
    assert usual_size(Sized(10), 0) == Clip(3, 1, 2, 2)


def test_a_batch_has_the_size_of_its_clips():
    scalars = next(iter(sized(40))).scalars
    video = next(iter(sized(40))).video
    assert scalars["height"].tolist() == [2.0] * len(video)
    assert set(scalars["width"].tolist()) == {float(video.shape[-1])}
    assert torch.equal(scalars["aspect_ratio"], scalars["height"] / scalars["width"])
