"""Run: what every rank does for one row: with an engine, by hand, and under DDP, side by side."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import worm_dist
from tests.handed_over import handed_over
from tests.nets import random_images
from tests.oracles import folded, folded_name, is_gate, live_flags, mask_dropping
from tests.settings import at_once
from tests.tables.findings import Findings
from tests.zero.payload import (
    Overheard,
    Payload,
    dense_payload_of,
    payload_of,
    shares_of,
)
from tests.zero.reference import FADE_STEPS, Expected, Reference
from tests.zero.row import COLUMNS, Row
from tests.zero.rows import ROWS
from tests.zero.trainee import Parallel, Trainee, network_of
from worm_dist import Mask, WormConfig

__all__ = ["run"]

_SEARCH_STEPS = 2
_FROZEN = {
    "hold": ((0, 3, 9, 13), (3, 4, 10, 13)),  # channels 0 and 9 thaw again
    "remove": ((0, 3, 13), (0, 3, 4, 9, 13)),
}
"""Channels to freeze, counted over all groups, one generation after the other.  Two partitions of
the residual network meet within channel 13."""
_STEPS = {"hold": (3, 3), "remove": (2, FADE_STEPS + 3)}
"""In each generation.  The last fade needs time to end, a step to be listened to, and one to send
less."""
_STEPS_AFTER_DRAW = 3
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

# Of sums with fewer terms, hence another rounding, and of what follows from it in a few steps.
_OUTPUTS = {"fp32": 1e-5, "bf16": 0.05}
_TRAINED_ON = {"fp32": 1e-4, "bf16": 0.02}

_Norm = nn.modules.batchnorm._BatchNorm


def run(names: tuple[str, ...]) -> dict[str, Findings]:
    """All that is seen of these rows on this rank."""
    overheard = Overheard()
    found = {}
    for name in names:
        found[name] = findings = Findings()
        for rule in ROWS[name].rules:
            with findings.of(*COLUMNS):
                _Course(ROWS[name], rule, overheard, findings).run()
    return found


class _Course:
    """One training, from the search to the ticket and beyond."""

    def __init__(self, row: Row, rule: str, overheard: Overheard, findings: Findings) -> None:
        self._row = row
        self._rule = rule
        self._overheard = overheard
        self._findings = findings
        self._number = 0
        self.trainee = Trainee(row)
        truncation = {"frozen_weights": rule, **at_once(FADE_STEPS), **row.truncation}
        self._config = WormConfig(search=row.search, truncation=truncation)
        self.engine = self._attached(self.trainee)
        scope = self._config.truncation.scope
        fades = rule == "remove"
        self.reference = Reference(row, self.engine.groups, scope, fades)
        self._expected = Expected(self.trainee, self.engine.groups, scope, fades)
        self.parallel: Parallel | None = None
        if row.like_ddp:
            self.parallel = Parallel(row)
            self._parallel_engine = self._attached(self.parallel)
        self._trained = {name for group in self.trainee.groups for name in group}
        self._gradients = self._dense_gradients = 0
        self._told: list[int] = []
        self._gathers = 0
        with self.trainee.full():
            self._dense = dense_payload_of(row, self.trainee.groups, self.trainee.network)

    def run(self) -> None:
        for _ in range(_SEARCH_STEPS):
            self._step()
        frozen = self._row.frozen or _FROZEN[self._rule]
        for dropped, num_steps in zip(frozen, _STEPS[self._rule], strict=True):
            groups = self.engine.groups
            here = [channel for channel in dropped if channel < groups.num_channels]
            self._freeze(mask_dropping(groups, *here))
            for _ in range(num_steps):
                self._step()
            self._compare_insides()
        self._draw()
        for _ in range(_STEPS_AFTER_DRAW):
            self._step_after_draw()
        self._compare_after_draw()
        self.engine.detach()

    def _attached(self, trainee: Trainee) -> worm_dist.Engine:
        return worm_dist.attach(
            trainee.model,
            trainee.optimizer if isinstance(trainee, Parallel) else None,
            self._config,
            example_inputs=random_images(1).to(self._row.dtype),
        )

    # ---- while it truncates ----------------------------------------------------------------------

    def _freeze(self, mask: Mask) -> None:
        self.engine.truncate(mask)
        self.reference.expected.freeze(mask)
        self._expected.freeze(mask)
        if self.parallel is not None:
            self._parallel_engine.truncate(mask)

    def _step(self) -> None:
        handed_over = self._handed_over()
        self.reference.step(self._number)
        with self.trainee.full(), self.reference.full():
            self._compare(handed_over)
        if self.parallel is not None:
            self.parallel.step(self._number)
            pair = self.trainee.weights, self.parallel.weights
            self._findings.all_same("ddp", *pair, self._where)
        self._number += 1

    def _handed_over(self) -> int:
        """Bytes that a step hands over."""
        overheard = self._overheard
        overheard.take()
        self.trainee.step(self._number)
        if self._row.stage < 3:
            return overheard.take()
        # DeepSpeed compares the order of the layers, too.
        heard = list(overheard.heard)
        overheard.take()
        # Two ranks tell each other their shares; the engine counts what each tells on average.
        self._told = [
            _mean(sent, self._row.dtype.itemsize) if name == "all_to_all_single" else sent
            for name, sent in heard
            if name.startswith(("all_gather", "all_to_all"))
        ]
        return sum(sent for name, sent in heard if name.startswith("reduce_scatter"))

    def _compare(self, handed_over: int) -> None:
        findings, where = self._findings, self._where
        findings.weights.append(self.trainee.digest)
        if self._row.stage == 0:
            findings.weights.append(_digest(self.trainee.inside.everything()))
        values = self._heard(self.trainee.values), self._heard(self.reference.values)
        findings.all_same("exact", *values, where, self._row.tolerance)
        for name in self._expected.frozen:
            here = ~self._expected.flags[name]
            weight = self.trainee.network.get_parameter(name)
            expected = self._expected.now(name, weight).to(weight.dtype)
            findings.same("held", weight[here], expected[here], f"{where}: {name}")
        if self.trainee.num_steps == self._expected.over_at:
            network, lost = self.trainee.network, self._expected.lost
            for name, flag in live_flags(network, self.engine.groups, lost, "norm").items():
                faded = network.get_parameter(name)[~flag]
                findings.expect("held", not bool(faded.any()), f"{where}: {name} is not 0")
        self._expect_bytes(handed_over, self._count())

    def _compare_insides(self) -> None:
        """Masters and moments; what is frozen also against what it was on this side."""
        with self.trainee.full(), self.reference.full():
            self._compare_inside()

    def _compare_inside(self) -> None:
        findings, where = self._findings, self._where
        mine, theirs = self.trainee.inside.everything(), self.reference.inside.everything()
        findings.all_same("exact", mine, theirs, f"{where}, inside", self._row.tolerance)
        told = self.trainee.inside.told()
        findings.all_same("exact", told, {key: mine[key] for key in told}, f"{where}, told")
        for key, value in mine.items():
            name = key.split()[0]
            here, expected = ~self._expected.flags[name], self._expected.now(key, value)
            expected = expected.to(self._row.dtype) if name not in self._trained else expected
            findings.same("held", value[here], expected[here], f"{where}, inside: {key}")

    def _count(self) -> Payload:
        """Bytes that the last step should have sent."""
        if not self._expected.frozen:
            return self._dense
        flags = self._expected.flags
        reduced = {name: flag.clone() for name, flag in flags.items()}
        unheard = self._unheard
        self._take_out_columns(reduced, unheard)
        network, moving = self.trainee.network, self._expected.lost & ~unheard
        fades = {
            name: not bool(flag.all())
            for name, flag in live_flags(network, self.engine.groups, moving, "norm").items()
        }
        # Vectors are told whole, and so is what fades until that is over.
        gathered = {
            name: flag if flag.dim() > 1 and not fades[name] else torch.ones_like(flag)
            for name, flag in flags.items()
        }
        return payload_of(self._row, self.trainee.groups, reduced, gathered)

    def _take_out_columns(self, flags: dict[str, Tensor], unheard: Tensor) -> None:
        """Nobody hears faded channels, so nothing comes back to the columns that read them."""
        groups = self.engine.groups
        for group, here in zip(groups, groups.split(unheard).values()):
            for consumer in group.consumers:
                for name, dim in consumer.parameters:
                    for place in consumer.positions[here].flatten().tolist():
                        flags[name].select(dim, place).fill_(False)

    def _expect_bytes(self, handed_over: int, expected: Payload) -> None:
        """What a skipped step has sent is said of the next one."""
        traffic, dense, where = self.engine.traffic, self._dense, self._where
        self._gradients += expected.gradients
        self._dense_gradients += dense.gradients
        stepped = self.trainee.model.was_step_applied()
        told = expected.gradients + expected.told * stepped
        compared = [("handed over", handed_over, told)]
        self._gathers += sum(self._told)
        if stepped:
            said, whole = self._gradients + expected.share, self._dense_gradients + dense.share
            if self._row.stage == 3:
                said += self._gathers
                self._gathers = 0
                if self._row.persists:
                    # A step ends with all weights: packed at once, otherwise one after the other.
                    is_packed = self.engine.phase != "ticket" and bool(self._unheard.any())
                    count = 1 if is_packed else len(list(self.trainee.network.parameters()))
                    told_last = sum(self._told[-count:])
                    compared.append(("told last", told_last, self._share_of_weights()))
                whole = traffic.dense_bytes  # depends on what is gathered when
            if self._row.stage < 3 or self._number:  # it looks for stray parameters in the first
                compared.append(("said to be sent", traffic.sent_bytes, said))
            if self.engine.phase != "ticket" or self._row.style != "unmanaged":
                compared.append(("said to be dense", traffic.dense_bytes, whole))
            self._gradients = self._dense_gradients = 0
        for what, actual, right in compared:
            what = f"{where}: {actual} bytes {what}, not {right}"
            self._findings.expect("bytes", actual == right, what)

    def _share_of_weights(self) -> int:
        """Bytes that a rank tells of all weights, in stage 3: not of channels that nobody hears."""
        network, unheard, size = self.trainee.network, self._unheard, self._row.dtype.itemsize
        if self.engine.phase == "ticket":
            whole = [torch.ones_like(p, dtype=torch.bool) for p in network.parameters()]
            return shares_of(self._row.world_size, whole)[0] * size
        flags = live_flags(network, self.engine.groups, unheard, "coupled")
        shares = shares_of(self._row.world_size, list(flags.values()))
        if len(set(shares)) == 1 and all(bool(flag.all()) for flag in flags.values()):
            return shares[0] * size
        return handed_over(shares, size, dist.get_rank()).mean_gathered * size

    def _heard(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without statistics of channels that nobody hears: in stage 3 they have zeros for
        filters."""
        if self._row.stage == 3:
            groups = self.engine.groups
            for group, here in zip(groups, groups.split(self._unheard).values()):
                for norm in group.norms:
                    for what in ("running_mean", "running_var"):
                        values[f"{norm.module}.{what}"][norm.positions[here].flatten()] = 0
        return values

    @property
    def _unheard(self) -> Tensor:
        """bool ``[num_channels]``: a step after they have become zero, channels are probed; then
        what reads them leaves."""
        return self._expected.zero_at < self.trainee.num_steps - 1

    # ---- the draw, and after ---------------------------------------------------------------------

    def _draw(self) -> None:
        engine, trainee, row = self.engine, self.trainee, self._row
        network, mask = trainee.network, engine.mask
        assert mask is not None
        with self._findings.of("draw"):
            with trainee.full():
                flags = live_flags(network, engine.groups, ~mask.keep, "coupled")
                inside, weights = trainee.inside.everything(), trainee.values
                silenced = live_flags(network, engine.groups, ~mask.keep, "norm")
            self._kept = {folded_name(name): flag for name, flag in flags.items()}
            counters = {name: getattr(trainee.model, name) for name in _COUNTERS}
            num_steps, total = engine.step, engine.traffic.total_sent_bytes

            engine.draw(mask)
            trainee.model = engine.model
            trainee.forget_gates()
            if self.parallel is not None:
                self._parallel_engine.draw(mask)
                self.parallel.model = self._parallel_engine.model
                pair = self.trainee.weights, self.parallel.weights
                self._findings.all_same("ddp", *pair, f"{self._where}, drawn")

            expect, where = self._findings.expect, f"{self._where}, draw"
            now = {name: getattr(trainee.model, name) for name in _COUNTERS}
            expect("draw", now == counters, f"{where}: counters {counters} became {now}")
            expect("draw", engine.step == num_steps, f"{where}: {engine.step} steps")
            sent = engine.traffic.total_sent_bytes
            expect("draw", sent == total, f"{where}: {total} bytes in all became {sent}")
            with trainee.full():
                self._drawn, told = trainee.inside.everything(), trainee.inside.told()
            self._findings.all_same("draw", {key: self._drawn[key] for key in told}, told, where)
            self._survivors(self._drawn, inside, where)
            plain = folded(weights)
            for name, parameter in trainee.weights.items():
                survived = plain[name][self._kept[name]].view_as(parameter)
                self._findings.same("draw", parameter, survived, f"{where}: {name}")
            masked = network_of(row).to(row.dtype)
            masked.load_state_dict(weights)
            with torch.no_grad():
                for name, parameter in masked.named_parameters():
                    parameter[~silenced[name]] = 0
            self._take_statistics(masked, network)
            images = random_images(6, seed=9).to(row.dtype)
            outputs = _outputs(network, images), _outputs(masked, images)
            self._findings.same("draw", *outputs, f"{where}: outputs", _OUTPUTS[row.precision])
            self._take_statistics(self.reference.network, network)
            self.reference.fold_gates()

    def _survivors(self, after: dict[str, Tensor], before: dict[str, Tensor], where: str) -> None:
        plain = _folded_inside(before)
        survived = {
            key: value[self._kept[key.split()[0]]].view_as(after[key])
            for key, value in plain.items()
            if key in after
        }
        lost = plain.keys() - after.keys()
        self._findings.expect("draw", not lost, f"{where}: lost: {lost}")
        self._findings.all_same("draw", after, survived, where)

    def _step_after_draw(self) -> None:
        where = f"{self._where}, drawn"
        handed_over = self._handed_over()
        self.reference.step(self._number)
        self._findings.weights.append(self.trainee.digest)
        row, groups = self._row, self.trainee.groups
        with self.trainee.full():
            self._expect_bytes(handed_over, dense_payload_of(row, groups, self.trainee.network))
        if self.parallel is not None:
            self.parallel.step(self._number)
            pair = self.trainee.weights, self.parallel.weights
            self._findings.all_same("ddp", *pair, where)
        self._number += 1

    def _compare_after_draw(self) -> None:
        """If the dropped channels were zero, the masked network trains like the drawn one."""
        where, tolerance = f"{self._where}, trained on", _TRAINED_ON[self._row.precision]
        with self.trainee.full(), self.reference.full():
            mine, theirs = self.trainee.inside.everything(), self.reference.inside.everything()
        for name, parameter in self.trainee.network.named_parameters():
            sound = bool(mine[name].isfinite().all())
            moved = not parameter.requires_grad or not torch.equal(mine[name], self._drawn[name])
            self._findings.expect("draw", sound and moved, f"{where}: {name} does not train")
        if self._rule != "remove":
            return
        theirs = _folded_inside(theirs)
        for key, value in mine.items():
            survived = theirs[key][self._kept[key.split()[0]]].view_as(value)
            self._findings.same("draw", value, survived, f"{where}: {key}", tolerance)

    @torch.no_grad()
    def _take_statistics(self, masked: nn.Module, drawn: nn.Module) -> None:
        """The draw has estimated them anew; they are not what is compared here."""
        for name, norm in drawn.named_modules():
            if isinstance(norm, _Norm):
                for what in ("running_mean", "running_var"):
                    whole = masked.get_buffer(f"{name}.{what}")
                    whole[self._kept[f"{name}.weight"]] = drawn.get_buffer(f"{name}.{what}")

    @property
    def _where(self) -> str:
        return f"{self._rule}, step {self._number}"


def _mean(num_bytes: int, element_size: int) -> int:
    """Bytes of whole elements, averaged over the ranks.  Collective."""
    elements = torch.tensor([num_bytes // element_size])
    dist.all_reduce(elements)
    return int(elements) // dist.get_world_size() * element_size


def _folded_inside(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masters by name and moments by name and key once gates are folded: moments stay."""
    plain = folded({key: value for key, value in values.items() if " " not in key})
    for key, value in values.items():
        name, *moment = key.split()
        if moment and not is_gate(name):
            plain[f"{folded_name(name)} {moment[0]}"] = value
    return plain


def _digest(values: dict[str, Tensor]) -> str:
    return str([(key, value.double().sum().item()) for key, value in values.items()])


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    outputs: Tensor = network(images).float()
    network.train()
    return outputs
