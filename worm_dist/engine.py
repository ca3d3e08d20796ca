"""Engine: search, truncate, draw the ticket.

This is Early-Bird ticket search (arXiv 1909.11957) accelerated by WORM gradient truncation (PMLR
262:232-240), over many ranks: all agree on the scores and prove that they hold the same bits, rank
zero decides, all act alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attachment import Attachment
from .config import WormConfig
from .errors import ConfigError
from .interval import Interval
from .observer import Traffic
from .search.cut import cut
from .search.groups import Groups, find_groups
from .search.history import Finding, History
from .search.mask import Mask
from .search.scores import NormScale
from .ticket.file import save_ticket
from .ticket.surgery import Cut, cuts_of
from .truncation.truncation import Truncation
from .verdict import Phase, Verdict

__all__ = ["Engine", "attach"]


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    config: WormConfig | None = None,
    *,
    example_inputs: Any,
    steps_per_epoch: int | None = None,
) -> Engine:
    """Attach an engine to a training.  Collective: every rank calls it.

    Args:
        model: ``DistributedDataParallel``, or a bare module on a single process.
        optimizer: of the model's parameters.
        config: default ``WormConfig()``.
        example_inputs: a small input, a tuple of inputs or a dict of keyword inputs, on the
            model's device; the network is traced with it.
        steps_per_epoch: optimizer steps in an epoch.  Not needed where ``search.every`` is in
            epochs: then it is counted between two checks.

    Raises:
        ConfigError: the network cannot be traced or has no scales to rank channels by.
        BackendError: several processes but a bare module; a communication hook already registered.
        DivergenceError: the ranks trace different networks.
    """
    return Engine(model, optimizer, config or WormConfig(), example_inputs, steps_per_epoch)


class Engine:
    """Searches, truncates and draws; made by ``attach``.

    Attributes:
        config: the settings.
        groups: the channel groups of the dense network, each with name, num_channels, members.
        phase: where the run is.
        mask: the newest mask, None before the first check.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: WormConfig,
        example_inputs: Any,
        steps_per_epoch: int | None,
    ) -> None:
        self.config = config
        self.mask: Mask | None = None
        self.phase = Phase.SEARCH if config.search.enabled else Phase.DENSE
        num_calls = config.ticket.recalibrate_batches if config.search.enabled else 0
        self._training = Attachment(
            model, optimizer, num_calls, self._before_step, self._after_step
        )
        if config.truncation.mode == "hard":
            self._training.wrapping.require_free_for_a_hook()
        self._ranks = self._training.ranks
        self.groups: Groups = find_groups(self._training.network, example_inputs)
        self._ranks.require_equal({"structure": self.groups.digests}, "attach")
        self._scores = NormScale(self._training.network, self.groups)
        self._history = History(config.search)
        self._streaks = torch.zeros(self.groups.num_channels, dtype=torch.int64)
        self._truncation: Truncation | None = None
        self._cuts: tuple[Cut, ...] = ()
        self._verdict = Verdict(self.phase)
        self._steps_per_epoch = steps_per_epoch
        self._last_check = 0
        self._penalised = False

    # ---- the algorithm -------------------------------------------------------------------------

    def check(self) -> Verdict:
        """Score, cut, agree, decide, act.  Collective: every rank calls it, as often as
        ``search.every`` says.

        Costs one all-reduce of the scores, one comparison of digests and one broadcast of a
        verdict of fixed size; nothing without a search and after the draw.

        Raises:
            NonFiniteError: a score is NaN or infinite.
            DivergenceError: the ranks differ in scales or masks; names ranks and group.
        """
        if self.phase in (Phase.DENSE, Phase.TICKET):
            return self._verdict
        search = self.config.search
        scores = self._scores()
        average = self._ranks.mean(scores)
        mask, floored = cut(
            average, self.groups.sizes, search.prune_ratio, search.floor, self._lost
        )
        self._require_equal(f"check at step {self.step}", scale=scores, mask=mask.keep)
        verdict = Verdict.decode(
            self._ranks.decided_by_rank_zero(
                lambda: self._judge(mask, floored).encode(), Verdict.SIZE
            )
        )
        self.mask, self.phase = mask, verdict.phase
        self._streaks = torch.where(mask.keep, 0, self._streaks + 1)
        if self.phase is Phase.TRUNCATE:
            newest = self.config.truncation.channels == "newest" or verdict.settled
            self._freeze(~mask.keep if newest else self._streaks >= search.window)
        self._verdict = self._completed(verdict)
        self._last_check = self.step
        return self._verdict

    def _judge(self, mask: Mask, floored: tuple[str, ...]) -> Verdict:
        """Rank zero's decision: truncation starts at the elbow, the ticket is drawn when the masks
        have settled and the network has lived without its faded channels for a while."""
        finding = self._history.record(self.step, mask, floored)
        truncates = self.config.truncation.mode != "off"
        starts = truncates and finding.elbow and self.phase is Phase.SEARCH
        return Verdict(
            phase=Phase.TRUNCATE if starts else self.phase,
            ticket=finding.settled and self._at_rest(mask),
            elbow=starts,
            settled=finding.settled,
            distance_mean=finding.distance_mean,
            distance_max=finding.distance_max,
        )

    def truncate(self, mask: Mask) -> None:
        """Freeze the channels that a mask from elsewhere drops, from the next step on.

        Collective, agreed by digest like any other mask.  The next ``check`` goes on from there.

        Raises:
            ConfigError: the mask is not of these groups or keeps a channel whose fade has begun,
                or the settings or the phase do not allow truncation.
            DivergenceError: the ranks bring different masks.
        """
        self._agree_on(mask, "truncate")
        if self.phase is Phase.TICKET or self.config.truncation.mode == "off":
            raise ConfigError(
                f"truncate: not possible in phase {self.phase} with truncation.mode "
                f"{self.config.truncation.mode!r}"
            )
        for name, back in self._split(self._lost & mask.keep).items():
            if bool(back.any()):
                raise ConfigError(
                    f"truncate: group {name}: the mask keeps a channel whose fade has begun; faded "
                    "channels do not come back"
                )
        self._freeze(~mask.keep)
        self.mask, self.phase = mask, Phase.TRUNCATE
        self._verdict = self._completed(dataclasses.replace(self._verdict, phase=self.phase))

    def draw(self, mask: Mask | None = None) -> None:
        """Remove the dropped channels for good and go on with the smaller network.  Collective.

        ``model`` becomes the smaller network in a wrapper with the same arguments; the optimizer
        keeps the state of every surviving element; BatchNorm statistics are estimated anew from
        the last batches trained on (``ticket.recalibrate_batches``).

        Args:
            mask: from elsewhere; default the one that a verdict said is the ticket.

        Raises:
            ConfigError: there is no ticket yet, the mask is not of these groups, or a group would
                be left without a live channel.  Nothing has been changed then.
            DivergenceError: the ranks bring different masks.
        """
        if mask is None:
            mask = self._ticket()
        self._agree_on(mask, "draw")
        if self.phase is Phase.TICKET:
            raise ConfigError("draw: the ticket has been drawn already")
        self._require_live_survivors(mask)
        self._cuts = cuts_of(self.groups, mask, self._training.network)
        self._thaw()
        self._training.shrink(self._cuts)
        self.mask, self.phase = mask, Phase.TICKET
        self._verdict = Verdict(Phase.TICKET, generation=self._verdict.generation)

    def penalty(self) -> Tensor:
        """``search.l1`` times the L1 norm of the scales, a scalar: add it to the loss.

        Zero without a search and after the draw.
        """
        if self.phase in (Phase.DENSE, Phase.TICKET):
            return torch.zeros((), device=next(self.model.parameters()).device)
        self._penalised = True
        return self.config.search.l1 * self._scores.penalty()

    # ---- what has been seen, and leaving ---------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """Train this; after a draw it is the smaller network, wrapped as the first one was."""
        return self._training.model

    @property
    def optimizer(self) -> Optimizer:
        """Step this; it stays the same object."""
        return self._training.optimizer

    @property
    def step(self) -> int:
        """Optimizer steps since ``attach``."""
        return self._training.step

    @property
    def traffic(self) -> Traffic:
        """Bytes sent, and bytes that dense steps would have sent."""
        self._training.traffic.control_bytes = self._ranks.sent_bytes
        return self._training.traffic

    @property
    def history(self) -> tuple[Finding, ...]:
        """Every check so far, oldest first; on rank zero only, empty elsewhere."""
        return self._history.findings

    def save_ticket(self, folder: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """Write the drawn network as ``ticket.json`` and ``ticket.safetensors``, on one rank.

        Args:
            folder: made if it is not there.
            model: arguments of ``worm_dist.models.build_model`` that build the dense network, if
                it is one of those; else the reader has to build it.

        Raises:
            ConfigError: nothing has been drawn.
        """
        if self.phase is not Phase.TICKET or self.mask is None:
            raise ConfigError("save_ticket: nothing has been drawn yet")
        network = self._training.network
        save_ticket(Path(folder), network, self.groups, self.mask, self._cuts, model)

    def detach(self) -> nn.Module:
        """Take every hook away.  Collective if truncation had begun under a wrapper: torch cannot
        unregister a communication hook, so the network is wrapped anew.

        Returns:
            The model to go on with, also in ``model``.
        """
        hooked = self._training.reduction is not None
        self._thaw()
        self._training.remove()
        if hooked:
            self._training.wrap_again()
        self.phase = Phase.DENSE
        self._verdict = Verdict(Phase.DENSE)
        return self.model

    # ---- parts -----------------------------------------------------------------------------------

    @property
    def _lost(self) -> Tensor:
        """bool ``[num_channels]``: channels that cannot be kept any more."""
        if self._truncation is None:
            return torch.zeros(self.groups.num_channels, dtype=torch.bool)
        return self._truncation.motion.lost

    def _freeze(self, frozen: Tensor) -> None:
        """Adopt a generation.  Its bits are agreed on by now, so packed buffers will match."""
        if self._truncation is None:
            fade_steps = self._num_steps(self.config.truncation.fade)
            self._truncation = Truncation(
                self.config.truncation,
                self._training.wrapping,
                self.optimizer,
                self.groups,
                fade_steps,
            )
            self._training.reduction = self._truncation.reduction
        if not torch.equal(self._truncation.frozen, frozen | self._lost):
            self._truncation.adopt(frozen, self.step)

    def _thaw(self) -> None:
        if self._truncation is not None:
            self._truncation.remove()
            self._truncation = None

    def _at_rest(self, mask: Mask) -> bool:
        """Whether the dropped channels have been still for ``ticket.settle``."""
        if self.config.truncation.motion != "fade":
            return True
        if self._truncation is None:
            return False
        still_since = self._truncation.motion.still_since(~mask.keep)
        return self.step - still_since >= self._num_steps(self.config.ticket.settle)

    def _num_steps(self, interval: Interval) -> int:
        """An interval in optimizer steps; an epoch is given, or is what lies between checks."""
        steps_per_epoch = self._steps_per_epoch
        if interval.unit == "ep" and steps_per_epoch is None:
            every = self.config.search.every
            if every.unit != "ep" or self.step == self._last_check:
                raise ConfigError(
                    f"attach: how many steps {interval} is, is not known; give steps_per_epoch"
                )
            steps_per_epoch = round((self.step - self._last_check) / every.count)
        return interval.steps(steps_per_epoch or 1)

    def _completed(self, verdict: Verdict) -> Verdict:
        """A verdict with what each rank knows by itself."""
        if self._truncation is None:
            return dataclasses.replace(verdict, generation=0, live_fraction=1.0)
        return dataclasses.replace(
            verdict,
            generation=self._truncation.generation,
            live_fraction=self._truncation.live_fraction,
        )

    def _before_step(self) -> None:
        if self._truncation is not None:
            weight = self.config.search.l1 if self._penalised else 0.0
            self._truncation.motion.before_step(weight)
        self._penalised = False

    def _after_step(self) -> None:
        if self._truncation is not None:
            self._truncation.motion.after_step(self.step)

    def _ticket(self) -> Mask:
        if not self._verdict.ticket or self.mask is None:
            raise ConfigError(
                "draw: no check has found the ticket yet; wait for verdict.ticket, or give the "
                "mask to draw: engine.draw(mask)"
            )
        return self.mask

    def _agree_on(self, mask: Mask, what: str) -> None:
        """Agree before judging: a mask that one rank alone would refuse must stop them all."""
        bits = {name: kept.numpy().tobytes() for name, kept in mask.items()}
        self._ranks.require_equal({"mask": bits}, f"{what} at step {self.step}")
        if mask.sizes != self.groups.sizes:
            odd = mask.sizes.items() ^ self.groups.sizes.items()
            names = ", ".join(sorted({name for name, _ in odd})) or "their order"
            raise ConfigError(f"{what}: the mask is not of this network's groups: {names}")

    def _require_equal(self, when: str, **vectors: Tensor) -> None:
        """Compare vectors over all channels, and the mask in force, group by group."""
        if self.mask is not None:
            vectors["mask in force"] = self.mask.keep
        parts = {
            what: {n: v.numpy().tobytes() for n, v in self._split(vector.cpu()).items()}
            for what, vector in vectors.items()
        }
        self._ranks.require_equal(parts, when)

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector over all channels, by group."""
        sizes = self.groups.sizes
        return dict(zip(sizes, vector.split(list(sizes.values())), strict=True))

    def _require_live_survivors(self, mask: Mask) -> None:
        """A layer may have come to live on channels that are about to go or no longer train."""
        frozen = self._lost if self._truncation is None else self._truncation.frozen
        for name, live in self._split(mask.keep & ~frozen).items():
            if not bool(live.any()):
                raise ConfigError(
                    f"draw: group {name}: no channel that the mask keeps is live; a network "
                    "without this layer cannot train on. Raise search.floor or give another mask"
                )
