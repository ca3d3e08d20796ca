"""Draw: the physical removal of channels, as a transaction.

It is rehearsed and agreed on before the first parameter changes; a later failure on any rank is
rolled back on all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.agreed_failure import described, on_every_rank
from ..distributed.collectives import Communicator
from ..errors import DrawError
from ..groups.channel_groups import Groups
from ..groups.copying import copied
from ..groups.forward import floats, undisturbed
from ..groups.gates import fold_gates, gates_of
from ..groups.mask import Mask
from ..groups.nested import mapped
from ..pruning.bn_recalibration import Statistics
from ..pruning.optimizer_transfer import (
    drop_parameters,
    kept_indices,
    require_cuttable,
    transfer_state,
)
from ..pruning.recorded_inputs import RecordedCall
from ..pruning.rehearsal import Rehearsal, difference
from ..pruning.sharded_transfer import ShardedTransfer
from ..pruning.surgery import Cut, cuts_of, remove_channels, shapes_of
from .context import TrainingContext, WrappedNetwork
from .snapshot import Snapshot

__all__ = ["draw"]

logger = logging.getLogger(__name__)


def draw(
    training: TrainingContext,
    groups: Groups,
    mask: Mask,
    copies: Sequence[nn.Module],
    where: str,
    *,
    is_complete: bool,
    is_restored: bool = False,
    are_zero: bool = False,
) -> None:
    """Remove channels from network, optimizer and copies, and wrap the network anew.  Collective.

    Args:
        training: the training context; it continues with the smaller network.
        groups: the channel groups of the network as it is now.
        mask: the mask over these groups, agreed by the ranks.
        copies: copies of the network, pruned in the same way.
        where: prefix of error messages.
        is_complete: whether nothing more will be removed: then gates are folded, and inputs no
            longer recorded.
        is_restored: whether weights and statistics will be loaded: then nothing is rehearsed or
            estimated.
        are_zero: whether the output of all dropped channels is exactly zero.  Then the statistics
            of the others are the same before the draw, and those of a check need not be estimated
            again.

    Raises:
        DrawError: on every rank; everything has been rolled back.
    """
    cuts = cuts_of(groups, mask, shapes_of(training.network))
    view, parameters = training.optimizer_view, dict(training.network.named_parameters())
    with _on_every_rank(training.comm, where):
        require_cuttable(view, parameters, kept_indices(cuts), "optimizer")
    with training.full_network():
        if not is_restored:
            with _on_every_rank(training.comm, where):
                inputs, calls = training.example_inputs, training.inputs.calls
                _rehearse(training.network, groups, mask, inputs, calls)
        rewrapped = _cut(
            training, parameters, cuts, copies, where, is_complete, is_restored, are_zero
        )
    training.switch_to(rewrapped)
    training.register_step_hooks()
    if is_complete:
        training.inputs.stop()


def _cut(
    training: TrainingContext,
    parameters: Mapping[str, nn.Parameter],
    cuts: Sequence[Cut],
    copies: Sequence[nn.Module],
    where: str,
    is_complete: bool,
    is_restored: bool,
    are_zero: bool,
) -> WrappedNetwork:
    """Cut the network, which has full weights, and wrap it anew; see ``draw``.  Collective.

    Args:
        parameters: the parameters that the optimizer steps, by name.
        cuts: the cuts to make.
    """
    comm, networks = training.comm, (training.network, *copies)
    view, optimizer = training.optimizer_view, training.optimizer_view.optimizer
    is_moved = view.copies or view.shared
    transfer = ShardedTransfer(view, parameters, cuts) if is_moved else None
    estimates = training.inputs.is_on and not is_restored
    estimated_before = estimates and are_zero
    is_estimated = estimated_before and training.inputs.is_estimated(training.step, comm)
    before = Snapshot(networks, [optimizer])
    try:
        if estimated_before and not is_estimated:
            # Before the cut too, so that a resumed run has the same bits as one that went on.
            _estimate([training.network], training, where)
        with _on_every_rank(comm, where):
            training.backend.release()
            training.drop_gradients()
            if transfer is None:
                transfer_state(optimizer, parameters, cuts)
            for each in networks:
                remove_channels(each, cuts)
            if is_complete:
                _fold_gates(training, transfer, networks)
            after = dict(training.network.named_parameters())
            if transfer is not None:
                transfer.replace_parameters(after)
        if estimates and (copies or not estimated_before):
            _estimate(copies if estimated_before else networks, training, where)
        with _on_every_rank(comm, where):
            try:
                rewrapped = training.rewrap()
            except Exception as error:
                # Under DeepSpeed it is a collective: if this rank alone has failed, the others only
                # learn of it when their wait times out.
                logger.error("%s: this rank has no new wrapper: %s", where, described(error))
                raise
            if transfer is not None:
                if not view.copies:  # sharding has replaced the parameters that are stepped
                    after = dict(training.network.named_parameters())
                    transfer.replace_parameters(after)
                transfer.prepare(rewrapped.optimizer_view, after)
        if transfer is not None:
            with _on_every_rank(comm, where):
                transfer.load(comm)  # issues its collectives even if it fails
    except BaseException:  # an interrupt, too, must not leave mixed widths
        before.restore()
        training.roll_back()
        raise
    return rewrapped


def _estimate(networks: Sequence[nn.Module], training: TrainingContext, where: str) -> None:
    """Estimate the BatchNorm statistics of networks.  Collective."""
    calls = training.inputs.calls
    with _on_every_rank(training.comm, where):
        statistics = [Statistics(network, calls) for network in networks]
    for estimated in statistics:
        estimated.write(training.comm, where)


def _on_every_rank(comm: Communicator, where: str) -> AbstractContextManager[None]:
    """See ``on_every_rank``; what it raises is a ``DrawError``."""
    return on_every_rank(
        comm,
        lambda failures: DrawError(
            f"{where}: {failures}. Network, optimizer and statistics are as they were; training "
            "can go on with engine.model"
        ),
    )


def _rehearse(
    network: nn.Module,
    groups: Groups,
    mask: Mask,
    example_inputs: Any,
    calls: Sequence[RecordedCall],
) -> None:
    """Draw a copy first, and compare its outputs with those of the masked network.

    Raises:
        DrawError: the outputs differ, or the network cannot be run on the example inputs.
    """
    with undisturbed(network), torch.no_grad():
        try:
            rehearsal = Rehearsal(network, example_inputs)
        except Exception as error:  # any error of the user's forward
            raise DrawError(
                "the network can no longer be run on the example inputs, so the draw cannot be "
                f"rehearsed ({described(error)}); attach again with inputs that it accepts"
            ) from error
        reason = rehearsal.difference(groups, mask)
        for call in _distinct(calls):
            reason = reason or _difference_on(call, network, groups, mask)
    if reason is not None:
        dropped = [name for name in mask if not bool(mask[name].all())]
        raise DrawError(
            f"a rehearsal on a copy fails: {reason}; keep the layer at fault dense with "
            f"search.dense (channels go from {', '.join(dropped[:5])}"
            f"{', ...' if dropped[5:] else ''})"
        )


def _distinct(calls: Sequence[RecordedCall]) -> list[RecordedCall]:
    """The newest call of each signature: structure, non-tensor values, dtypes and dimensions."""

    def signature(call: RecordedCall) -> str:
        arguments = (call.positional, dict(call.keywords))
        return repr(mapped(arguments, lambda tensor: f"{tensor.dtype}, {tensor.dim()}d"))

    return list({signature(call): call for call in calls}.values())


def _difference_on(
    call: RecordedCall, network: nn.Module, groups: Groups, mask: Mask
) -> str | None:
    """Rehearse on a recorded input, which may reach layers that the example inputs do not; in the
    call's own precision, so coarsely.  None if it cannot be run in eval mode."""
    copy = copied(network, lambda data: data)  # shares the memory of the parameters
    has_run = False

    def outputs(each: nn.Module) -> list[Tensor]:
        nonlocal has_run
        found = list(floats(call.run(each)))
        has_run = True
        return found

    try:
        return difference(copy, outputs, groups, mask)
    except Exception:  # any error of the user's forward
        if has_run:
            raise
        return None


def _fold_gates(
    training: TrainingContext, transfer: ShardedTransfer | None, networks: Sequence[nn.Module]
) -> None:
    if transfer is None:
        drop_parameters(
            training.optimizer_view.optimizer,
            {gate.scale for _, gate in gates_of(training.network)},
        )
    else:
        transfer.fold_gates(training.network)
    for network in networks:
        fold_gates(network)
