"""Draw: the physical removal of channels, as a transaction.

It is rehearsed and agreed on before the first parameter changes; whatever fails later, on whichever
rank, is taken back on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..distributed.collectives import Communicator
from ..errors import DrawError, WormError
from ..groups.channel_groups import Groups
from ..groups.copying import copied
from ..groups.forward import floats, undisturbed
from ..groups.gates import fold_gates, gates_of
from ..groups.nested import mapped
from ..pruning.bn_recalibration import Statistics
from ..pruning.optimizer_transfer import forget, require_cuttable, transfer_state
from ..pruning.rehearsal import Rehearsal, difference
from ..pruning.sharded_transfer import ShardedTransfer
from ..pruning.surgery import cuts_of, remove_channels, shapes_of
from ..search.mask import Mask
from .context import TrainingContext
from .recorded_inputs import RecordedCall
from .snapshot import Snapshot

__all__ = ["draw"]


def draw(
    training: TrainingContext,
    groups: Groups,
    mask: Mask,
    copies: Sequence[nn.Module],
    where: str,
    *,
    is_complete: bool,
    is_restored: bool = False,
) -> None:
    """Remove channels; optimizer, statistics, copies and wrapper follow.  Collective.

    Args:
        training: in which the network goes on.
        groups: of the network as it is now.
        mask: of these groups; the ranks have agreed on it.
        copies: that are cut alike.
        where: for messages.
        is_complete: nothing more will be removed: gates are folded, and inputs forgotten.
        is_restored: weights and statistics will be loaded: nothing is rehearsed or estimated.

    Raises:
        DrawError: on every rank; everything is as it was.
    """
    ranks, networks = training.ranks, (training.network, *copies)
    stepping, optimizer = training.stepping, training.stepping.optimizer
    cuts = cuts_of(groups, mask, shapes_of(training.network))
    parameters = dict(training.network.named_parameters())
    with _on_every_rank(ranks, where):
        require_cuttable(optimizer, parameters, cuts)
        if not is_restored:
            _rehearse(training.network, groups, mask, training.example_inputs, training.calls)
    cargo = ShardedTransfer(stepping, parameters, cuts, ranks) if stepping.copies else None
    before = Snapshot(networks, [optimizer])
    try:
        with _on_every_rank(ranks, where):
            training.wrapping.release()
            training.drop_gradients()
            if cargo is None:
                transfer_state(optimizer, parameters, cuts)
            for each in networks:
                remove_channels(each, cuts)
            if is_complete:
                _fold_gates(training, cargo, networks)
            after = dict(training.network.named_parameters())
            if cargo is not None:
                cargo.replace_parameters(after)
            estimates = training.recalibrates and not is_restored
            statistics = [Statistics(each, training.calls) for each in networks if estimates]
        for estimated in statistics:
            estimated.write(ranks, where)
        with _on_every_rank(ranks, where):
            again = training.wrapped_again()
            if cargo is not None:
                cargo.unload(again.stepping, after)
    except BaseException:  # an interrupt too must not leave a network of mixed widths
        before.restore()
        training.go_back()
        raise
    training.go_on_in(again)
    training.follow_optimizer()
    if is_complete:
        training.forget_inputs()


@contextmanager
def _on_every_rank(ranks: Communicator, where: str) -> Iterator[None]:
    """What is done within is done on every rank, or raises on every rank.  Collective at its end;
    what is within must not be.

    Raises:
        DrawError: naming the ranks on which it failed, and why.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others must not wait for this rank
        failure = error
    lines = ranks.failures("" if failure is None else _described(failure))
    if lines:
        raise DrawError(
            f"{where}: {'; '.join(lines)}. Network, optimizer and statistics are as they were; "
            "training can go on with engine.model"
        ) from failure


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, WormError) else f"{type(error).__name__}: {error}"


def _rehearse(
    network: nn.Module,
    groups: Groups,
    mask: Mask,
    example_inputs: Any,
    calls: Sequence[RecordedCall],
) -> None:
    """Draw a copy first, and compare what it puts out.

    Raises:
        DrawError: something else, or it cannot be tried.
    """
    with undisturbed(network), torch.no_grad():
        try:
            rehearsal = Rehearsal(network, example_inputs)
        except Exception as error:  # whatever a foreign forward may raise
            raise DrawError(
                "the network cannot be run on the example inputs any more, so that a draw cannot "
                f"be rehearsed ({_described(error)}); attach anew with inputs that it takes"
            ) from error
        reason = rehearsal.difference(groups, mask)
        for call in _distinct(calls):
            reason = reason or _difference_on(call, network, groups, mask)
    if reason is not None:
        dropped = [name for name in mask if not bool(mask[name].all())]
        raise DrawError(
            f"a rehearsal on a copy fails: {reason}; leave the layer at fault dense with "
            f"search.dense (channels go from {', '.join(dropped[:5])}"
            f"{', ...' if dropped[5:] else ''})"
        )


def _distinct(calls: Sequence[RecordedCall]) -> list[RecordedCall]:
    """Of calls that differ in nothing but the values of tensors, the newest."""

    def form(call: RecordedCall) -> str:
        arguments = (call.positional, dict(call.keywords))
        return repr(mapped(arguments, lambda tensor: f"{tensor.dtype}, {tensor.dim()}d"))

    return list({form(call): call for call in calls}.values())


def _difference_on(
    call: RecordedCall, network: nn.Module, groups: Groups, mask: Mask
) -> str | None:
    """On what the network has been trained with, which may reach parts that the example does not;
    coarsely, in its own precision.  A call that needs the network in training mode says nothing."""
    copy = copied(network)
    try:
        call.run(copy)
    except Exception:  # whatever a foreign forward may raise
        return None
    return difference(copy, lambda each: list(floats(call.run(each))), groups, mask)


def _fold_gates(
    training: TrainingContext, cargo: ShardedTransfer | None, networks: Sequence[nn.Module]
) -> None:
    if cargo is None:
        forget(training.stepping.optimizer, {gate.scale for _, gate in gates_of(training.network)})
    else:
        cargo.fold_gates(training.network)
    for network in networks:
        fold_gates(network)
