"""The controls of the ledger: what a rule's ticket is compared with, on the digits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.ranks import NO_GROUP, Ranks
from worm_dist.bench.ledger.control import CONTROLS, Control, thinner, width_of
from worm_dist.bench.ledger.row import Key, Row
from worm_dist.bench.ledger.rule import DENSE, RULES, Rule, triggered_at
from worm_dist.bench.ledger.scratch import ticket_from_scratch
from worm_dist.bench.ledger.spec import RunSpec
from worm_dist.bench.ledger.subject import SUBJECTS
from worm_dist.bench.ledger.training import train
from worm_dist.bench.local_ranks import one_rank
from worm_dist.groups.flops import count_flops
from worm_dist.models.vgg import Vgg
from worm_dist.pruning.exactness import find_drawable_groups
from worm_dist.training.evaluation import count_parameters

VGG = SUBJECTS["vgg, digits"]


@pytest.mark.parametrize("subject", ["vgg, digits", "resnet, digits", "vit, digits"])
def test_a_width_is_the_one_that_comes_nearest(subject: str) -> None:
    """Compared with every width there is."""
    built = SUBJECTS[subject]
    sizes = {step / 256: count_parameters(thinner(built, step / 256)) for step in range(16, 257, 4)}
    dense = sizes[1.0]
    for wanted in (dense // 100, dense // 7, dense // 3, dense, 2 * dense):
        found = count_parameters(thinner(built, width_of(built, count_parameters, wanted)))
        assert abs(found - wanted) <= min(abs(size - wanted) for size in sizes.values())


@pytest.mark.parametrize("subject", ["vgg, digits", "resnet, digits", "vit, digits"])
def test_flops_are_matched_within_a_tenth(subject: str) -> None:
    built = SUBJECTS[subject]
    sample = built.samples().images[:1]
    dense = count_flops(built.build(1.0), sample)
    for share in (0.15, 0.3, 0.5):
        width = width_of(built, lambda net: count_flops(net, sample), round(share * dense))
        assert count_flops(thinner(built, width), sample) / dense == pytest.approx(share, rel=0.1)


def test_a_ticket_from_scratch_is_initialised_for_its_own_widths() -> None:
    """Weights that are cut out of a dense network have the spread of the dense network's."""
    search = RULES["worm"].config(0.5).search
    groups = find_drawable_groups(VGG.build(1.0), VGG.samples().images[:1], search)
    widths = dict(zip((group.name for group in groups), (8, 32, 24, 40, 16, 64), strict=True))
    network = ticket_from_scratch(VGG, search, widths, seed=1)
    direct = Vgg(10, 1, [8, 32, "M", 24, 40, "M", 16, 64])
    ours, theirs = dict(network.named_parameters()), dict(direct.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {
        name: p.shape for name, p in theirs.items()
    }
    for name, parameter in ours.items():
        if parameter.numel() > 1000:
            spread = float(theirs[name].detach().std())
            assert float(parameter.detach().std()) == pytest.approx(spread, rel=0.1), name
    again = ticket_from_scratch(VGG, search, widths, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), network.parameters()))


def _pinned(name: str) -> Rule:
    """Starts to remove channels after one epoch and a half."""
    quickly = {"truncation": {"removal": {"duration": "8ba"}}}
    return RULES[name].changed(name, triggered_at(1.5)).changed(name, quickly)


def _trained(subject: str, rule: Rule, kinds: Sequence[str]) -> list[Row]:
    """The dense run, that of the rule, and those of its controls."""

    def spec(run: Rule | Control) -> RunSpec:
        return RunSpec(subject, run, 0.0 if run is DENSE else 0.5, seed=1, epochs=3)

    with one_rank():
        dense, parent = train(spec(DENSE)), train(spec(rule))
        return [dense, parent, *(train(spec(Control(kind, rule)), parent) for kind in kinds)]


def _rows(ranks: Ranks, subject: str, rule: Rule) -> list[Row]:
    (outcome,) = ranks.outcomes(NO_GROUP, _trained, subject, rule, list(CONTROLS))
    assert outcome.exitcode == 0, str(outcome)
    rows: list[Row] = outcome.value
    assert not any(row.error for row in rows), rows
    assert all(row.test_accuracy is not None for row in rows)
    return rows


@pytest.mark.slow("trains a rule and all its controls")
@pytest.mark.parametrize(
    ("subject", "name"), [("vgg, digits", "worm"), ("resnet, digits", "worm, at once")]
)
def test_controls_are_matched_to_the_ticket(ranks: Ranks, subject: str, name: str) -> None:
    dense, parent, by_flops, by_parameters, scratch, random = _rows(ranks, subject, _pinned(name))
    assert dense.widths is None and dense.run_flops == dense.run_bytes == 1
    assert parent.widths is not None and parent.ticket_epoch is not None
    assert by_flops.flops == pytest.approx(parent.flops, rel=0.1)
    assert by_parameters.parameters == pytest.approx(parent.parameters, rel=0.1)
    for thin in (by_flops, by_parameters):
        assert thin.run_flops == pytest.approx(thin.flops)
        assert thin.run_bytes == pytest.approx(thin.parameters)
        assert thin.ticket_epoch is None
    assert (scratch.num_parameters, scratch.num_flops) == (
        parent.num_parameters,
        parent.num_flops,
    )
    assert scratch.run_flops == pytest.approx(parent.flops)
    # The random channels leave a run that was the same until then, at the same step, and in equal
    # number.
    assert random.widths == parent.widths
    assert (random.elbow_epoch, random.ticket_epoch) == (parent.elbow_epoch, parent.ticket_epoch)
    assert random.before_pruning == parent.before_pruning
    assert random.accuracies[0] == parent.accuracies[0]
    assert random.losses[0] == parent.losses[0] and random.losses[-1] != parent.losses[-1]
    assert random.num_parameters == parent.num_parameters
    if name == "worm":  # what has left is zero, and leaves in another order of layers
        assert random.change_at_draw < 1e-4
        assert random.run_flops == pytest.approx(parent.run_flops, rel=0.02)
        assert random.run_bytes == pytest.approx(parent.run_bytes, rel=0.02)
    else:
        assert (random.sent, random.computed) == (parent.sent, parent.computed)


@pytest.mark.slow("trains a transformer under a rule and all its controls")
def test_a_transformer_has_the_same_controls(ranks: Ranks) -> None:
    _, parent, _, _, scratch, random = _rows(ranks, "vit, digits", _pinned("worm, at once"))
    assert scratch.num_parameters == parent.num_parameters == random.num_parameters
    assert scratch.num_flops == parent.num_flops


@pytest.mark.slow("trains four whole runs")
def test_rules_are_one_run_until_the_elbow(ranks: Ranks) -> None:
    """What they are compared by begins there, and evaluations on the way leave no trace."""
    (outcome,) = ranks.outcomes(NO_GROUP, _until_the_elbow)
    assert outcome.exitcode == 0, str(outcome)
    gradual, at_once, early_bird, at_its_elbow = outcome.value
    elbow = round(gradual.elbow_epoch)
    assert at_once.elbow_epoch == at_once.ticket_epoch == elbow
    assert gradual.losses[:elbow] == at_once.losses[:elbow]
    assert at_once.losses[elbow] != gradual.losses[elbow]
    assert gradual.before_pruning == at_once.before_pruning
    assert at_once.after_one_epoch == at_once.estimated_accuracies[elbow]
    drawn = round(at_its_elbow.ticket_epoch)
    assert early_bird.ticket_epoch is None
    assert early_bird.losses[:drawn] == at_its_elbow.losses[:drawn]
    assert early_bird.losses[drawn] != at_its_elbow.losses[drawn]


def _until_the_elbow() -> list[Row]:
    # On the digits both rules of the paper fire at once, when the window is full.
    later = {"search": {"settled": 0.001, "elbow": {"margin": 0.3}}}
    names = ("early-bird", "early-bird, elbow")
    rules = [RULES["worm"], RULES["worm, at once"]]
    rules += [RULES[name].changed(name, later) for name in names]
    with one_rank():
        return [train(RunSpec("vgg, digits", rule, 0.5, seed=1, epochs=6)) for rule in rules]


def test_a_control_of_a_run_without_a_ticket_is_none() -> None:
    rule = RULES["early-bird"]
    spec = RunSpec("vgg, digits", Control("random channels", rule), 0.5, seed=1, epochs=3)
    row = train(spec, Row(Key("vgg, digits", rule.name, 0.5, seed=1, epochs=3)))
    assert row.error == "no ticket: early-bird has drawn none" and not row.accuracies
