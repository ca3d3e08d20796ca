"""Engine: search, truncate, draw the ticket.

This is Early-Bird ticket search (arXiv 1909.11957) accelerated by WORM gradient truncation (PMLR
262:232-240), over many ranks: all agree on the scores and prove that they hold the same bits, rank
zero decides, all act alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .admission import agreed_mask, require_live_survivors
from .attachment import Attachment, require_countable
from .cluster.agree import bits
from .config import WormConfig
from .errors import ConfigError
from .observer import Traffic
from .resumable import Resumable
from .search.groups import ChannelGroup, Groups
from .search.history import Finding, History
from .search.mask import Mask
from .search.ranking import Ranking
from .search.usage import Usage
from .state import plain_settings
from .ticket.file import save_ticket
from .ticket.surgery import Cut, cuts_of, ungated
from .ticket.trial import agreed_groups
from .truncation.truncation import Truncation, first_reduction
from .verdict import Phase, Verdict

__all__ = ["Engine", "attach"]

OwnScore = Callable[[nn.Module, ChannelGroup], Tensor]


def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    config: WormConfig | None = None,
    *,
    example_inputs: Any,
    steps_per_epoch: int | None = None,
    score: OwnScore | None = None,
) -> Engine:
    """Attach an engine to a training.  Collective: every rank calls it.

    Args:
        model: ``DistributedDataParallel``, DeepSpeed's engine (ZeRO stages 0 to 2), or a bare
            module on a single process.
        optimizer: of the model's parameters.  A DeepSpeed engine has its own: leave it out, or give
            what ``deepspeed.initialize`` returned.
        config: default ``WormConfig()``.
        example_inputs: a small input, a tuple of inputs or a dict of keyword inputs, on the
            model's device; the network is traced with it.
        steps_per_epoch: optimizer steps in an epoch.  Not needed where ``search.every`` is in
            epochs: then it is counted between two checks.
        score: of your own, instead of ``search.score``: called with the network and a group, it
            gives floats ``[num_channels]``, higher for what is to be kept.  It may look at this
            rank's data; the ranks average it.

    Raises:
        ConfigError: the network cannot be traced or has nothing to rank channels by; an epoch's
            length is needed but not known.
        BackendError: several processes but a bare module; a communication hook already registered.
        DivergenceError: the ranks trace different networks.
    """
    config = config or WormConfig()
    if steps_per_epoch is None:
        require_countable(config)
    return Engine(model, optimizer, config, example_inputs, steps_per_epoch, score)


class Engine(Resumable):
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
        optimizer: Optimizer | None,
        config: WormConfig,
        example_inputs: Any,
        steps_per_epoch: int | None,
        score: OwnScore | None,
    ) -> None:
        self.config = config
        self.mask: Mask | None = None
        self.phase = Phase.SEARCH if config.search.enabled else Phase.DENSE
        self._training = Attachment(model, optimizer, config.search.every, steps_per_epoch)
        self._training.wrapping.require_fit(config.truncation)
        self._ranks = self._training.ranks
        own = None if score is None else getattr(score, "__qualname__", type(score).__name__)
        self._settings = {**plain_settings(config), "score": own}
        self._steps_per_epoch = steps_per_epoch
        settings = {**self._settings, "steps_per_epoch": steps_per_epoch}
        self._ranks.require_equal(
            {"setting": {name: repr(value).encode() for name, value in settings.items()}}, "attach"
        )
        network, search = self._training.network, config.search
        may_draw = search.enabled or config.truncation.mode != "off"
        self.groups: Groups = agreed_groups(
            network,
            example_inputs,
            self._ranks,
            search,
            any_group=score is not None,
            optional=not may_draw,
        )
        self._training.require_optimized(self.groups)
        if self.groups:
            self._ranking = Ranking(config, network, self.groups, score)
        looks = search.enabled and self._training.wrapping.finds_unused
        self._usage = Usage(network, self._ranking.scales) if looks else None
        self._history = History(config.search)
        self._streaks = torch.zeros(self.groups.num_channels, dtype=torch.int64)
        self._truncation = Truncation(
            config.truncation, self._training.wrapping, self._training.stepping, self.groups
        )
        self._training.reduction = self._truncation.reduction
        self._cuts: tuple[Cut, ...] = ()
        self._verdict = Verdict(self.phase)
        self._penalised = False
        self._attached = True
        num_calls = config.ticket.recalibrate_batches if may_draw else 0
        self._training.listen(
            num_calls, self._before_step, self._truncation.hold, self._truncation.after_step
        )

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
        if not self._searching:
            return self._verdict
        self._training.measure_epoch()
        scores = self._ranking.scores()
        average = self._ranks.mean(scores)
        candidates, mask, floored = self._ranking.cut(average, self._truncation.lost)
        in_force = {} if self.mask is None else {"mask in force": bits(self.mask)}
        self._ranks.require_equal(
            {"scale": bits(self._ranking.replicated(scores)), "mask": bits(mask), **in_force},
            f"check at step {self.step}",
        )
        verdict = Verdict.decode(
            self._ranks.decided_by_rank_zero(
                lambda: self._judge(candidates, mask, floored).encode(), Verdict.SIZE
            )
        )
        self._streaks = torch.where(mask.keep, 0, self._streaks + 1)
        if verdict.phase is Phase.TRUNCATE:
            newest = self.config.truncation.channels == "newest" or verdict.settled
            self._freeze(~mask.keep if newest else self._streaks >= self.config.search.window)
        self.mask, self.phase = mask, verdict.phase
        self._verdict = self._completed(verdict)
        return self._verdict

    def _judge(self, candidates: Mask, mask: Mask, floored: tuple[str, ...]) -> Verdict:
        """Rank zero's decision: truncation starts at the elbow, the ticket is drawn when the masks
        have settled and the network has lived without its faded channels for a while."""
        finding = self._history.record(self.step, candidates, floored)
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
        self._require_attached("truncate")
        if self.config.truncation.mode == "off":
            raise ConfigError("truncate: truncation.mode is 'off'; choose 'hard' or 'soft'")
        mask = agreed_mask(self._ranks, self.groups, mask, f"truncate at step {self.step}")
        for name, back in self.groups.split(self._truncation.lost & mask.keep).items():
            if bool(back.any()):
                raise ConfigError(
                    f"truncate: group {name}: the mask keeps a channel whose fade has begun; faded "
                    "channels do not come back"
                )
        self._freeze(~mask.keep)
        self.mask, self.phase = mask, Phase.TRUNCATE
        self._verdict = self._completed(dataclasses.replace(self._verdict, phase=self.phase))

    def draw(self, mask: Mask | None = None, copies: Sequence[nn.Module] = ()) -> None:
        """Remove the dropped channels for good and go on with the smaller network.  Collective.

        ``model`` becomes the smaller network in a wrapper with the same arguments; the optimizer
        keeps the state of every surviving element; BatchNorm statistics are estimated anew from
        the last batches trained on (``ticket.recalibrate_batches``).  Gradients that wait for a
        step are dropped.

        Args:
            mask: from elsewhere; default the one that a verdict said is the ticket.
            copies: networks like this one that must follow, such as the ``module`` of an
                ``AveragedModel``, as many on every rank; they are cut alike and their statistics
                estimated alike.

        Raises:
            ConfigError: there is no ticket yet, the mask is not of these groups, a group would be
                left without a live channel, or a copy is not like the network.  Nothing has been
                changed then.
            DivergenceError: the ranks bring different masks.
        """
        self._require_attached("draw")
        mask = self._ticket() if mask is None else mask
        mask = agreed_mask(self._ranks, self.groups, mask, f"draw at step {self.step}", copies)
        require_live_survivors(self.groups, mask, self._truncation.frozen)
        self._training.require_alike(copies)
        self._shrink(mask, copies)
        self._verdict = Verdict(Phase.TICKET, generation=self._verdict.generation)

    def penalty(self) -> Tensor:
        """``search.l1`` times the L1 norm of the scales, a scalar: add it to the loss.

        Zero without a search and after the draw.  Call it after the forward pass: with
        ``find_unused_parameters`` it leaves out norms that the pass has left out, as their
        gradients are not averaged.
        """
        if not self._searching:
            return torch.zeros((), device=next(self.model.parameters()).device)
        self._penalised = True
        used = None if self._usage is None else self._usage.take()
        return self.config.search.l1 * self._ranking.penalty(used)

    # ---- what has been seen, and leaving ---------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """Train this; after a draw it is the smaller network, wrapped as the first one was."""
        return self._training.model

    @property
    def optimizer(self) -> Optimizer:
        """Step this.  It stays the same object; under DeepSpeed it is new after a draw, around the
        same torch optimizer, and ``model.backward`` and ``model.step`` are what to call."""
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
        """Take every hook away.  Collective if a communication hook was needed: torch cannot
        unregister it, so the network is wrapped anew.

        Returns:
            The model to go on with, also in ``model``.
        """
        hooked = self._training.reduction is not None and self._training.wrapping.keeps_hooks
        self._training.remove()
        self._let_go()
        if hooked:
            self._training.wrap_again()
        self._attached = False
        return self.model

    # ---- parts -----------------------------------------------------------------------------------

    @property
    def _searching(self) -> bool:
        searching = self.config.search.enabled and self.phase is not Phase.TICKET
        return searching and self._attached

    def _freeze(self, frozen: Tensor) -> None:
        """Adopt a generation.  Its bits are agreed on by now, so packed buffers will match."""
        truncation = self.config.truncation
        fade_steps = self._training.num_steps(truncation.fade) if truncation.motion == "fade" else 0
        self._truncation.adopt(frozen, self.step, fade_steps)
        self._training.reduction = self._truncation.reduction

    def _shrink(self, mask: Mask, copies: Sequence[nn.Module]) -> None:
        cuts = cuts_of(self.groups, mask, self._training.network)
        self._let_go()
        self._training.shrink(cuts, copies)
        self._cuts = ungated(cuts)
        self._training.reduction = first_reduction(self.config.truncation, self._training.wrapping)
        self.mask, self.phase = mask, Phase.TICKET

    def _let_go(self) -> None:
        """Take the hooks away that the draw or the user ends."""
        self._truncation.remove()
        if self._usage is not None:
            self._usage.remove()

    def _at_rest(self, mask: Mask) -> bool:
        """Whether the dropped channels have been still for ``ticket.settle``, if they fade."""
        still_since = self._truncation.still_since(mask)
        if math.isinf(still_since):
            return still_since < 0
        return self.step - still_since >= self._training.num_steps(self.config.ticket.settle)

    def _completed(self, verdict: Verdict) -> Verdict:
        """A verdict with what each rank knows by itself."""
        return dataclasses.replace(
            verdict,
            generation=self._truncation.generation,
            live_fraction=self._truncation.live_fraction,
        )

    def _forget_pass(self) -> None:
        self._penalised = False
        if self._usage is not None:
            self._usage.take()

    def _before_step(self) -> None:
        self._truncation.before_step(self.config.search.l1 if self._penalised else 0.0)
        self._penalised = False

    def _require_not_detached(self, what: str) -> None:
        if not self._attached:
            raise ConfigError(f"{what}: the engine has been detached")

    def _require_attached(self, what: str) -> None:
        self._require_not_detached(what)
        if self.phase is Phase.TICKET:
            raise ConfigError(f"{what}: the ticket has been drawn already")

    def _ticket(self) -> Mask:
        if not self._verdict.ticket or self.mask is None:
            raise ConfigError(
                "draw: no check has found the ticket yet; wait for verdict.ticket, or give the "
                "mask to draw: engine.draw(mask)"
            )
        return self.mask
