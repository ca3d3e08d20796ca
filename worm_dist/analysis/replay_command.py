"""``python -m worm_dist replay RUN``: the rules of a search on the journal of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ..config import ElbowConfig, SearchConfig, WormConfig
from ..errors import ConfigError
from ..terminal import print_json

__all__ = ["add_parser", "run"]

_ELBOW_OPTIONS = ("rule", "margin", "fraction", "min_masks")
_OPTIONS = (*_ELBOW_OPTIONS, "settled", "window")
_RULE_OF = {"margin": "margin", "fraction": "relative"}
"""The rule that an option belongs to."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the ``replay`` command.

    Args:
        commands: what argparse's ``add_subparsers()`` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "replay",
        help="what another elbow rule or window would have decided in a run, from its journal",
        description="Evaluates the rules of the search at every check of a finished or running "
        "run, without training. What is not given is as in the run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the run's folder, or its journal.jsonl")
    rules = get_args(ElbowConfig.model_fields["rule"].annotation)
    parser.add_argument("--rule", choices=rules, help="search.elbow.rule")
    parser.add_argument("--margin", type=float, help="search.elbow.margin, of the rule margin")
    parser.add_argument("--fraction", type=float, help="search.elbow.fraction, of relative")
    parser.add_argument("--min-masks", type=int, help="search.elbow.min_masks")
    parser.add_argument("--settled", type=float, help="search.settled")
    parser.add_argument(
        "--window", type=int, help="search.window; a longer one than the run's needs a checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print a replay; return the exit code, 0.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: the path is no run, an option is invalid or has no effect, or the masks that it
            needs are not saved.
        CheckpointError: the journal or the checkpoint is damaged.
    """
    from ..training.put_aside import JOURNAL
    from ..training.reporting.journal_lines import read_checks
    from .replay import replay
    from .replay_table import remarks, show
    from .run_masks import read_records
    from .run_settings import read_settings

    journal: Path = options.run / JOURNAL if options.run.is_dir() else options.run
    if not journal.exists():
        raise ConfigError(f"replay: there is no {journal}; give a run's folder, or its {JOURNAL}")
    checks = read_checks(journal)
    if not checks:
        raise ConfigError(f"replay: {journal} has no check; the run has not searched, or not yet")
    settings = read_settings(journal.parent)
    config = _config(options, settings, checks[0].rule)
    result = replay(config, checks, lambda: read_records(journal.parent, checks))
    notes = remarks(result, settings)
    if options.json:
        content = {"journal": str(journal), **result.as_dict(), "remarks": notes}
        print_json(content)
    else:
        show(result, str(journal), notes)
    return 0


def _config(
    options: argparse.Namespace, settings: Mapping[str, Any] | None, rule: str
) -> SearchConfig:
    """The settings to replay: the options, else those of the run, else the defaults.

    Args:
        options: the parsed command line.
        settings: the run's settings by dotted key; None if they are not known.
        rule: the run's elbow rule, from its journal.
    """
    given = {name: getattr(options, name) for name in _OPTIONS}
    values: dict[str, Any] = {"elbow": {"rule": rule}}
    for name in _OPTIONS:
        part, key = (values["elbow"], "elbow.") if name in _ELBOW_OPTIONS else (values, "")
        if given[name] is not None:
            part[name] = given[name]
        elif settings is not None and f"search.{key}{name}" in settings:
            part[name] = settings[f"search.{key}{name}"]
    for name, only in _RULE_OF.items():
        if given[name] is not None and values["elbow"]["rule"] != only:
            raise ConfigError(
                f"--{name}: has no effect on the rule {values['elbow']['rule']}; give "
                f"--rule {only} too"
            )
    return WormConfig(search=values).search
