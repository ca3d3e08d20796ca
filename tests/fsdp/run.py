"""Run: what every rank does for one row: packed, masked, and under DDP, side by side."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.fsdp.masked import masked
from tests.fsdp.payload import Overheard, expected_bytes
from tests.fsdp.row import COLUMNS, ROWS, Row
from tests.fsdp.trainee import Trainee, full, network_of
from tests.nets import random_images
from tests.oracles import folded, folded_name, live_flags, mask_dropping
from tests.settings import at_once
from tests.tables.findings import Findings
from worm_dist import Mask, WormConfig
from worm_dist.comm_hooks import shares

__all__ = ["run"]

_FADE_STEPS = 2
_FROZEN = {"hold": ((0, 3, 9), (3, 4, 10)), "remove": ((0, 3), (0, 3, 4, 9))}
_STEPS = {"hold": (2, 2), "remove": (1, _FADE_STEPS + 3)}
"""In each generation.  The last fade needs time to end, a step to be listened to, and one to send
less."""
_NEVER = 2**62
_FIRST_MOMENTS = ("momentum_buffer", "exp_avg")


def run(names: tuple[str, ...]) -> dict[str, Findings]:
    """All that is seen of these rows on this rank."""
    found = {}
    for name in names:
        found[name] = findings = Findings()
        row = ROWS[name]
        for rule in row.rules:
            with ExitStack() as stack:
                stack.enter_context(findings.of(*COLUMNS))
                if row.surplus:
                    patch = stack.enter_context(pytest.MonkeyPatch.context())
                    patch.setattr(shares, "_BYTES_OF_A_COLLECTIVE", 0)
                _Course(row, rule, findings).run()
    return found


class _Course:
    """One training, from the search to the ticket and beyond."""

    def __init__(self, row: Row, rule: str, findings: Findings) -> None:
        self._row, self._rule, self._findings = row, rule, findings
        self._number = 0
        self._dense = network_of(row)  # with tensors of whole parameters' shapes
        truncation = {"frozen_weights": rule, "scope": row.scope, **at_once(_FADE_STEPS)}
        config = WormConfig(search={"every": "1ba", "l1": 0.0, **row.search}, truncation=truncation)
        self._packed = Trainee(row, config)
        with masked():
            self._masked = Trainee(replace(row, compiled=""), config)
        self._parallel = None if row.ddp is None else Trainee(row, config, is_sharded=False)
        group = self._packed.model._get_fsdp_state()._fsdp_param_groups[0]
        self._overheard = Overheard(getattr(group.mesh_info, "replicate_process_group", None))
        self._held: dict[str, Tensor] = {}
        self._flags: dict[str, Tensor] | None = None
        self._zero_at = torch.full((self._packed.engine.groups.num_channels,), _NEVER)

    @property
    def _everyone(self) -> list[Trainee]:
        return [t for t in (self._packed, self._masked, self._parallel) if t is not None]

    def run(self) -> None:
        row, packed, findings = self._row, self._packed, self._findings
        engine = packed.engine
        findings.expect("exact", not packed.num_compiled, "attach has compiled something")
        self._step(None)
        for trainee in self._everyone:
            with masked() if trainee is self._masked else nullcontext():
                trainee.engine.check()
        masks = {str(trainee.engine.mask) for trainee in self._everyone}
        findings.expect("ddp", len(masks) == 1, f"other masks: {masks}")
        for dropped, num_steps in zip(_FROZEN[self._rule], _STEPS[self._rule], strict=True):
            mask = mask_dropping(engine.groups, *dropped)
            for trainee in self._everyone:
                trainee.engine.truncate(mask)
            self._flags = live_flags(self._dense, engine.groups, ~mask.keep, row.scope)
            begins = ~mask.keep & (self._zero_at == _NEVER)
            if self._rule == "remove":
                self._zero_at[begins] = self._number + _FADE_STEPS
            self._held = {**self._packed.weights, **self._packed.moments}
            for _ in range(num_steps):
                self._step(mask)
        before = packed.num_compiled
        self._draw(mask)
        for _ in range(2):
            self._step(None)
        if row.compiled:
            what = f"{before} graphs compiled before the draw, {packed.num_compiled} in the end"
            findings.expect("draw", 0 < before < packed.num_compiled, what)

    def _step(self, frozen: Mask | None) -> None:
        findings, where = self._findings, f"{self._rule}, step {self._number}"
        packed, engine = self._packed, self._packed.engine
        self._overheard.take()
        with self._overheard.listening():
            packed.step(self._number)
        for trainee in self._everyone[1:]:
            trainee.step(self._number)
        self._number += 1
        handed_over = self._overheard.take()
        weights = packed.weights
        findings.weights.append(str([float(w.double().sum()) for w in weights.values()]))
        findings.all_same("exact", weights, self._masked.weights, where, self._row.exact)
        if self._parallel is not None:
            assert self._row.ddp is not None
            findings.all_same("ddp", weights, self._parallel.weights, where, self._row.ddp)
        reduced = gathered = None
        if frozen is not None:
            assert self._flags is not None
            reduced = self._flags
            lost = ~frozen.keep
            # A step after they have become zero channels are probed, then what reads them leaves.
            unread = self._zero_at < self._number - 1
            if bool(unread.any()):
                gathered = live_flags(self._dense, engine.groups, unread, "coupled")
                columns = {name: flag & gathered[name] for name, flag in self._flags.items()}
                reduced = columns
            self._compare_held(weights, lost, where)
        right, on_average = expected_bytes(self._row, packed.network, reduced, gathered)
        what = f"{where}: {handed_over} bytes handed over, not {right}"
        findings.expect("bytes", handed_over == right, what)
        said = engine.traffic.sent_bytes
        findings.expect(
            "bytes", said == on_average, f"{where}: {said} bytes said, not {on_average}"
        )

    def _compare_held(self, weights: dict[str, Tensor], lost: Tensor, where: str) -> None:
        assert self._flags is not None
        fading = live_flags(self._dense, self._packed.engine.groups, lost, "norm")
        now = {**weights, **self._packed.moments}
        for key, before in self._held.items():
            name, *moment = key.split()
            here = ~self._flags[name]
            if key.endswith(" step") or not bool(here.any()):
                continue
            if self._rule == "remove" and not moment:
                here = here & fading[name]
            expected = (
                torch.zeros_like(before) if moment and moment[0] in _FIRST_MOMENTS else before
            )
            self._findings.same("held", now[key][here], expected[here], f"{where}: {key}")

    def _draw(self, mask: Mask) -> None:
        findings, row, packed = self._findings, self._row, self._packed
        where = f"{self._rule}, draw"
        flags = live_flags(self._dense, packed.engine.groups, ~mask.keep, "coupled")
        silenced = live_flags(self._dense, packed.engine.groups, ~mask.keep, "norm")
        kept = {folded_name(name): flag for name, flag in flags.items()}
        before, moments = packed.weights, packed.moments
        for trainee in self._everyone:
            with masked() if trainee is self._masked else nullcontext():
                trainee.engine.draw(mask)
        after = packed.weights
        plain = folded(before)
        for name, weight in after.items():
            survived = plain[name][kept[name]].view_as(weight)
            findings.same("draw", weight, survived, f"{where}: {name}")
        for key, value in packed.moments.items():
            name, moment = key.split()
            old = moments.get(key)
            old = old if old is not None else moments[f"{_gated(moments, name)} {moment}"]
            if old.dim():
                old = old[kept[name]].view_as(value)
            findings.same("draw", value, old, f"{where}: {key}")
        findings.all_same("draw", after, self._masked.weights, where, row.exact)
        whole = self._dense
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                parameter.copy_(before[name])
                parameter[~silenced[name]] = 0
        drawn_network = packed.network
        images = random_images(6, seed=9)
        buffers = dict(drawn_network.named_buffers())
        for name, buffer in whole.named_buffers():
            new = buffers[name]
            if buffer.dim() and buffer.shape != new.shape:
                scale = name.rpartition(".")[0] + ".weight"
                buffer[kept[scale]] = new
            else:
                buffer.copy_(new)
        if row.param_dtype is None:
            drawn_network.eval(), whole.eval()
            with torch.no_grad():
                outputs = full(drawn_network(images)), whole(images)
            drawn_network.train()
            for module in drawn_network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # else the next pass would gather less
            findings.same("draw", *outputs, f"{where}: outputs", 1e-5)


def _gated(moments: dict[str, Tensor], name: str) -> str:
    gated = name.removesuffix(".weight") + ".parametrizations.weight.original"
    assert any(key.startswith(gated) for key in moments), name
    return gated
