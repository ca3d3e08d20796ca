"""Checks that all ranks are alike: settings and software, data, and later on the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import worm_dist

from ..digest import digest_of, fingerprints
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator
from ..errors import ConfigError, DivergenceError
from ..groups.full_shape import is_sharded
from .data import Data
from .reporting.result import versions
from .required_packages import require_packages
from .resume_config import fixed_settings
from .run_config import RunConfig
from .user_functions import require_user_functions, user_sources

__all__ = ["require_same_data", "require_same_network", "require_same_start"]

_MAY_DIFFER_BY_HOST = ("data.root", "data.num_workers", "distributed.deepspeed")
"""Paths and resources of a host.  DeepSpeed's file is compared by its content, not its path."""
_MOST_NAMED = 3
_64_BITS = 2**64 - 1


def require_same_start(config: RunConfig, ranks: Communicator) -> None:
    """Compare settings and installed software across the ranks.  Collective.

    The source code is compared too, because an editable installation keeps its version across a
    pull; so are the files of the user's functions.  Patch releases of Python may differ.

    Args:
        config: this rank's settings.
        ranks: all ranks.

    Raises:
        ConfigError: on a rank a package is not installed, or a function of the user's cannot be
            imported; raised on every rank.
        DivergenceError: the ranks differ; raised on every rank.
    """
    with refused_on_every_rank(ranks, ConfigError):
        require_packages(config)
        require_user_functions(config)
        found = _start_of(config)
    differences = ranks.compare(found)
    if differences:
        raise DivergenceError(
            f"start: the ranks have not been started alike: {'; '.join(differences)}; give all of "
            "them the same settings and the same installation"
        )


def _start_of(config: RunConfig) -> dict[str, str]:
    """What must be alike on all ranks, by name."""
    flat = config.flat()
    found = {key: str(value) for key, value in {**flat, **fixed_settings(config), **flat}.items()}
    for key in _MAY_DIFFER_BY_HOST:
        del found[key]
    found |= {f"the version of {name}": number for name, number in versions().items()}
    del found["the version of python"]
    found["the code of worm_dist"] = _code_digest(Path(worm_dist.__file__).parent)
    for name, source in user_sources(config).items():
        found[f"the code of {name}"] = digest_of({name: source}).hex()[:16]
    return found


def require_same_data(data: Data, num_batches: int, ranks: Communicator) -> None:
    """Compare the size and shape of the data, of which every host has a copy.  Collective.

    If one rank had a batch less, the others would hang at the end of the epoch.

    Args:
        data: this rank's data set.
        num_batches: number of training batches of this rank in an epoch.
        ranks: the ranks that train together.

    Raises:
        ConfigError: the ranks differ; names the property and each rank's value.
    """
    differences = ranks.compare(
        {
            "the number of training samples": str(len(data.train)),
            "the number of test samples": str(len(data.test)),
            "the number of batches": str(num_batches),
            "the number of classes": str(data.num_classes),
            "the shape of a sample": str(data.sample_shape),
        }
    )
    if differences:
        raise ConfigError(
            f"data: the ranks do not see the same data: {'; '.join(differences)}; give every "
            "host the whole data set"
        )


def require_same_network(
    network: nn.Module, ranks: Communicator, when: str, num_nonzero_removed: int = 0
) -> None:
    """Compare parameters and buffers across the ranks, bit by bit.  Collective.

    Averaged gradients keep the weights equal as long as nothing else changes them.  Otherwise the
    divergence goes unnoticed: the losses still fall, but the ranks train different networks, and
    only one of them is saved.

    Each rank reads its network once where it is, copies one number per tensor to the host, and the
    ranks all-reduce one digest.

    The running statistics of norms are left out: they differ from rank to rank, as each follows its
    own batches, and no weight depends on them.  ``evaluate`` overwrites them with rank zero's.

    Args:
        network: the network without its wrapper.
        ranks: the ranks that hold a replica.
        when: the moment of the check, for the message.
        num_nonzero_removed: see ``Engine``.

    Raises:
        DivergenceError: the replicas differ, or removed channels are not zero; raised on every
            rank, naming tensors and ranks.
    """
    tensors = dict(_replicated(network))
    found = zip(tensors, fingerprints(list(tensors.values())), strict=True)
    texts = {name: f"{number & _64_BITS:016x}" for name, number in found}
    texts["the number of removed scales that are not zero"] = str(num_nonzero_removed)
    differences = ranks.compare(texts)
    if differences:
        num_more = len(differences) - _MOST_NAMED
        more = f" (and {num_more} more)" if num_more > 0 else ""
        raise DivergenceError(
            f"{when}: the ranks no longer hold the same network: "
            f"{'; '.join(differences[:_MOST_NAMED])}{more}. Resume from the last checkpoint; look "
            "for rank-dependent code, data or seeds that reach the weights outside of the averaged "
            "gradients"
        )
    if num_nonzero_removed:
        raise DivergenceError(
            f"{when}: {num_nonzero_removed} scales and shifts of removed channels are not zero; "
            "look for code that writes to the weights between optimizer steps"
        )


def _code_digest(folder: Path) -> str:
    sources = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    return digest_of(sources).hex()[:16]


def _replicated(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    per_rank = {
        id(statistic)
        for module in network.modules()
        if isinstance(module, _NormBase)
        for statistic in (module.running_mean, module.running_var)
    }
    for name, parameter in network.named_parameters():
        if not is_sharded(parameter):  # then no rank holds a replica
            yield f"parameter {name}", parameter
    for name, buffer in network.named_buffers():
        if id(buffer) not in per_rank:
            yield f"buffer {name}", buffer
