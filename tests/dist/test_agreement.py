"""One mask, one decision: a rank that differs is named on every rank, before anything is packed."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Outcome, Ranks
from worm_dist import CheckpointError, ConfigError, DivergenceError, Engine, Mask, WormConfig
from worm_dist.distributed.agreed_failure import on_every_rank, refused_on_every_rank
from worm_dist.distributed.collectives import ProcessGroupComm
from worm_dist.search.ranking import Ranking


def _fails_while_the_other_ends() -> None:
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, torch.device("cpu"))
    if comm.rank == 1:
        with on_every_rank(comm, CheckpointError):
            raise OSError("no space")


def test_a_reason_is_not_lost_with_the_connection(ranks: Ranks) -> None:
    """A rank failed, and the others had gone: the error was that of the connection alone."""
    _, failing = ranks.outcomes(2, _fails_while_the_other_ends)
    assert failing.error == "BackendError"
    assert failing.text.startswith("OSError: no space; then the ranks could not be compared")


def _refused(of_ranks: list[list[Exception | None]]) -> list[str]:
    """What this rank raises, for what each rank does; and whether all still meet."""
    assert dist.group.WORLD is not None
    comm, said = ProcessGroupComm(dist.group.WORLD, torch.device("cpu")), []
    for errors in of_ranks:
        told = "nothing"
        try:
            with refused_on_every_rank(comm):
                if (error := errors[comm.rank]) is not None:
                    raise error
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        said.append(told)
    assert comm.failures("") == []
    return said


def test_what_one_rank_refuses_is_refused_by_all(ranks: Ranks) -> None:
    """With its type; with the one closest to the cause, if there are several; without the numbers
    of the ranks, if all say the same."""
    lost, wrong = CheckpointError("lost"), ConfigError("wrong")
    cases: dict[str, list[Exception | None]] = {
        "nothing": [None, None],
        "ConfigError: rank 1: wrong": [None, wrong],
        "CheckpointError: rank 0: lost": [lost, None],
        "ConfigError: rank 0: lost; rank 1: wrong": [lost, wrong],
        "ConfigError: wrong": [wrong, wrong],
        "CheckpointError: rank 1: MemoryError: none": [None, MemoryError("none")],
        "WormError: rank 1: KeyError: 'a'": [None, KeyError("a")],
        "KeyError: 'a'": [KeyError("a"), KeyError("a")],
        "CheckpointError: OSError: two lines": [OSError("two\nlines"), OSError("two\nlines")],
    }
    for said in ranks(2, _refused, list(cases.values())):
        assert said == list(cases)


_COLLECTIVES = (
    "all_gather",
    "all_gather_object",
    "all_gather_single",  # only in recent versions of torch
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "scatter",
)


def _attached(is_sharded: bool = False, **search: Any) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=3)
    model = network
    if is_sharded:
        fully_shard(network)
    elif dist.is_initialized():
        model = DistributedDataParallel(network)
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=0.05),
        WormConfig(search=search, truncation={"frozen_weights": "hold"}),
        example_inputs=random_images(1),
        steps_per_epoch=1,
    )


def _step(engine: Engine) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine.optimizer.zero_grad()
    images = random_images(4, seed=100 * engine.step + rank)
    (engine.model(images).square().mean() + engine.penalty()).backward()
    engine.optimizer.step()


def _network(engine: Engine) -> Residual:
    network = getattr(engine.model, "module", engine.model)
    assert isinstance(network, Residual)
    return network


def _assert_all_refuse(outcomes: list[Outcome], *words: str) -> None:
    """The same clear error on every rank, soon, and no process died or hung."""
    for outcome in outcomes:
        assert outcome.error == "DivergenceError", str(outcome)
        assert outcome.exitcode == 1 and not outcome.hung
        assert outcome.seconds < 10
        for word in words:
            assert word in outcome.text, outcome.text
    assert len({outcome.text for outcome in outcomes}) == 1


# --- a rank that differs ----------------------------------------------------------------------


def _check_with_another_scale(rank: int) -> None:
    engine = _attached()
    _step(engine)
    engine.check()
    if dist.get_rank() == rank:
        with torch.no_grad():
            _network(engine).bn1.weight[2] += 1e-6
    engine.optimizer.zero_grad()
    engine.optimizer.step()
    engine.check()


@pytest.mark.parametrize(("world_size", "rank"), [(2, 1), (3, 0), (3, 1), (3, 2), (4, 3)])
@pytest.mark.fault(15, "scales that differ by a bit")
def test_a_scale_that_differs_is_named_by_rank_and_group(
    ranks: Ranks, world_size: int, rank: int
) -> None:
    """With three ranks or more the majority says who is odd, rank zero included."""
    outcomes = ranks.outcomes(world_size, _check_with_another_scale, rank)
    _assert_all_refuse(outcomes, "check at step 2", f"scale of group conv1: rank {rank} differs")
    assert "group stem" not in outcomes[0].text


def test_without_a_majority_rank_zero_is_the_reference(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, _check_with_another_scale, 0)
    _assert_all_refuse(outcomes, "scale of group conv1: rank 1 differs")


def _check_with_another_cut(rank: int, more: bool) -> None:
    """Between the cut and the agreement this rank gets another mask, as if a tie fell otherwise."""
    engine = _attached()
    cut = Ranking.select

    def another(*args: Any, **kwargs: Any) -> tuple[Mask, Mask, tuple[str, ...]]:
        candidates, mask, floored = cut(*args, **kwargs)
        keep = mask.keep.clone()
        kept, dropped = keep.nonzero().flatten(), (~keep).nonzero().flatten()
        keep[dropped[0]] = True
        if not more:
            keep[kept[0]] = False
        return candidates, Mask.from_vector(mask.sizes, keep), floored

    if dist.get_rank() == rank:
        Ranking.select = another  # type: ignore[method-assign]
    engine.check()


@pytest.mark.parametrize("more", [False, True], ids=["same count", "one more"])
@pytest.mark.fault(15, "a tie that falls otherwise")
@pytest.mark.fault(16, "one channel more")
def test_a_mask_that_differs_is_refused_before_it_is_used(ranks: Ranks, more: bool) -> None:
    outcomes = ranks.outcomes(3, _check_with_another_cut, 2, more)
    _assert_all_refuse(outcomes, "mask of group", "rank 2 differs")


def _spoil_the_mask_in_force(rank: int, then: str) -> None:
    engine = _attached()
    engine.check()
    assert engine.mask is not None
    engine.truncate(engine.mask)
    if dist.get_rank() == rank:
        engine.mask.keep[0] ^= True
    if then == "check":
        engine.optimizer.step()
        engine.check()
    else:
        engine.draw(engine.mask)


@pytest.mark.parametrize("then", ["check", "draw"])
@pytest.mark.fault(15, "a mask changed in memory")
def test_a_mask_changed_in_memory_is_found_at_the_next_agreement(ranks: Ranks, then: str) -> None:
    outcomes = ranks.outcomes(2, _spoil_the_mask_in_force, 1, then)
    step = 1 if then == "check" else 0
    _assert_all_refuse(outcomes, f"{then} at step {step}", "of group stem: rank 1 differs")


def _truncate_by_rank(call: str, sizes_differ: bool) -> None:
    engine = _attached()
    rank = dist.get_rank()
    mask = mask_dropping(engine.groups, rank)
    if sizes_differ and rank == 1:
        mask = Mask({"stem": torch.ones(3, dtype=torch.bool)})
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    try:
        getattr(engine, call)(mask)
    except DivergenceError:
        assert engine.mask is None and engine.phase == "search"
        assert not engine.model._comm_hooks
        for name, value in engine.model.state_dict().items():
            assert torch.equal(value, before[name])
        raise


@pytest.mark.parametrize("sizes_differ", [False, True], ids=["", "of another network"])
@pytest.mark.parametrize("call", ["truncate", "draw"])
@pytest.mark.fault(15, "masks from elsewhere")
@pytest.mark.fault(16, "masks of another network")
def test_masks_from_elsewhere_are_agreed_on_first(
    ranks: Ranks, call: str, sizes_differ: bool
) -> None:
    outcomes = ranks.outcomes(2, _truncate_by_rank, call, sizes_differ)
    _assert_all_refuse(outcomes, f"{call} at step 0", "mask of group stem: rank 1 differs")


class _Weighing(Plain):
    """Of its second layer no channel can be dropped."""

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn1(self.conv1(images)))
        pooled = torch.relu(self.bn2(self.conv2(features))).mean((2, 3))
        logits: Tensor = self.head(pooled.softmax(1))
        return logits


def _attach_to_different_structures() -> None:
    network = _Weighing() if dist.get_rank() == 1 else Plain()
    model = DistributedDataParallel(network)
    optimizer = SGD(model.parameters(), lr=0.1)
    worm_dist.attach(model, optimizer, example_inputs=random_images(1))


def test_ranks_that_trace_different_networks_are_refused_at_attach(ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, _attach_to_different_structures)
    _assert_all_refuse(outcomes, "(attach)", "structure of group")


def _not_a_number_on(rank: int) -> None:
    engine = _attached()
    if dist.get_rank() == rank:
        with torch.no_grad():
            _network(engine).bn1.weight[2] = float("nan")
    engine.check()


@pytest.mark.fault(14, "a scale of rank one")
def test_a_score_that_is_no_number_on_one_rank_stops_all(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, _not_a_number_on, 1):
        assert (outcome.error, outcome.exitcode) == ("NonFiniteError", 1), str(outcome)
        assert "group conv1" in outcome.text and outcome.seconds < 10


def _remove_without_knowing_an_epoch() -> None:
    model = DistributedDataParallel(Residual())
    config = WormConfig(search={"every": "2ba", "window": 2})
    optimizer = SGD(model.parameters(), lr=0.01)
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    for step in range(8):
        optimizer.zero_grad()
        model(random_images(4, seed=step)).square().mean().backward()
        optimizer.step()
        engine.check()


def test_an_epoch_of_unknown_length_is_refused_by_every_rank(ranks: Ranks) -> None:
    """Rank zero alone decided whether the ticket was found, and alone noticed that it could not
    tell how long an epoch is; the others waited for its verdict."""
    for outcome in ranks.outcomes(2, _remove_without_knowing_an_epoch, group_timeout=4):
        assert outcome.error == "ConfigError", str(outcome)
        assert "give steps_per_epoch" in outcome.text


# --- all well ---------------------------------------------------------------------------------


def _masks_and_verdicts(num_checks: int) -> tuple[Any, ...]:
    engine = _attached(prune_ratio=0.4, window=3)
    seen = []
    for _ in range(num_checks):
        _step(engine)
        verdict = engine.check()
        assert engine.mask is not None
        seen.append((engine.mask.digest, verdict))
    return seen, len(engine.history), engine.phase


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2, 3])
def test_masks_and_verdicts_are_equal_and_only_rank_zero_has_a_history(
    ranks: Ranks, world_size: int
) -> None:
    first, *others = ranks(world_size, _masks_and_verdicts, 6)
    seen, history, phase = first
    assert history == 6
    assert phase == "truncate"  # a few small steps move no mask
    for other in others:
        assert other == (seen, 0, phase)


def _tied_scores() -> tuple[str, Tensor]:
    engine = _attached(threshold="global")
    with torch.no_grad():
        for norm in (_network(engine).bn0, _network(engine).bn1, _network(engine).bn2):
            norm.weight.fill_(1 / 3)
    engine.check()
    assert engine.mask is not None
    return engine.mask.digest, engine.mask.keep


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2, 3])
def test_ties_fall_the_same_way_on_every_rank(ranks: Ranks, world_size: int) -> None:
    results = ranks(world_size, _tied_scores)
    assert len({digest for digest, _ in results}) == 1
    assert results[0][1].tolist() == [False] * 7 + [True] + [True] * 6


def _collectives_of_each_check(
    num_checks: int, is_sharded: bool
) -> list[tuple[dict[str, int], int]]:
    engine = _attached(is_sharded, window=3)
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return collective

    for name in filter(partial(hasattr, dist), _COLLECTIVES):
        setattr(dist, name, counted(name))
    seen = []
    for _ in range(num_checks):
        _step(engine)
        counts.clear()
        bytes_before = engine.traffic.control_bytes
        engine.check()
        seen.append((dict(counts), engine.traffic.control_bytes - bytes_before))
    return seen


@pytest.mark.parametrize(
    ("world_size", "is_sharded", "num_scores"), [(1, False, 14), (2, False, 14), (2, True, 22)]
)
def test_a_check_costs_two_all_reduces_and_one_broadcast_however_long_the_history(
    ranks: Ranks, world_size: int, is_sharded: bool, num_scores: int
) -> None:
    """Under fully_shard scales took an all-reduce to be put together, and scores another one."""
    for seen in ranks(world_size, _collectives_of_each_check, 12, is_sharded):
        assert all(counts == {"all_reduce": 2, "broadcast": 1} for counts, _ in seen)
        # [d, -d] of three digests at first, then of four: the mask in force is new.
        assert {size for _, size in seen[1:]} == {num_scores * 4 + 2 * 4 * 4 * 8 + 6 * 8}


def _check_after_the_draw() -> bool:
    engine = _attached()
    engine.draw(mask_dropping(engine.groups, 0, 9))
    real, dist.all_reduce = dist.all_reduce, None  # type: ignore[assignment]
    verdict = engine.check()
    dist.all_reduce = real
    return verdict.phase == "ticket" and engine.penalty().item() == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_after_the_draw_a_check_costs_nothing(ranks: Ranks, world_size: int) -> None:
    assert all(ranks(world_size, _check_after_the_draw))


def _rank_zero_cannot_decide() -> None:
    engine = _attached()
    if dist.get_rank() == 0:

        def fail(*_: object) -> None:
            raise ArithmeticError("no verdict")

        engine._search.history.record = fail  # type: ignore[method-assign,assignment]
    engine.check()


def test_a_rank_zero_that_cannot_decide_stops_the_others_too(ranks: Ranks) -> None:
    """They waited for its verdict until the collective timed out."""
    zero, one = ranks.outcomes(2, _rank_zero_cannot_decide)
    assert (zero.error, zero.text) == ("ArithmeticError", "no verdict")
    assert one.error == "BackendError" and "rank 0 could not decide" in one.text
    assert max(zero.seconds, one.seconds) < 5


def _one_rank_cannot_trace() -> None:
    network = Residual()
    inputs = random_images(1, channels=3 if dist.get_rank() == 0 else 5)
    model = DistributedDataParallel(network)
    worm_dist.attach(model, SGD(model.parameters(), lr=0.1), example_inputs=inputs)


def test_a_rank_that_cannot_trace_stops_the_others_too(ranks: Ranks) -> None:
    """The others compared their structures with nobody, until the collective timed out."""
    outcomes = ranks.outcomes(2, _one_rank_cannot_trace)
    assert [outcome.error for outcome in outcomes] == ["DivergenceError", "ConfigError"]
    assert "rank 1 differs" in outcomes[0].text
    assert "5 channels" in outcomes[1].text


def test_a_floor_that_cannot_be_kept_is_told_at_once() -> None:
    network = Plain(first=3, second=3)
    config = WormConfig(search={"prune_ratio": 0.9, "min_keep_ratio": 0.1, "threshold": "global"})
    optimizer = SGD(network.parameters(), lr=0.1)
    with pytest.raises(worm_dist.ConfigError, match=r"search\.min_keep_ratio"):
        worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
