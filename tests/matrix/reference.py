"""Reference: plain DDP, and by hand, element by element, what truncation should do to it."""

# No postponed annotations here: torch reads a hook's, and wants classes, not strings.

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from tests.matrix.combination import Combination
from tests.matrix.frozen import Frozen
from tests.matrix.trainee import Trainee
from worm_dist import WormConfig
from worm_dist.groups.channel_groups import Groups

__all__ = ["Reference"]

_WIRE = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Reference(Trainee):
    """Knows nothing of the engine but the groups and the masks in force.

    Attributes:
        frozen: what it does to itself.
    """

    def __init__(self, combination: Combination, groups: Groups, config: WormConfig) -> None:
        super().__init__(combination)
        self._groups = groups
        self._truncation = config.truncation
        self._l1 = config.search.l1
        self._wire = _WIRE[config.truncation.compression]
        if self._wire is not None and isinstance(self.model, DistributedDataParallel):
            self.model.register_comm_hook(self._wire, _rounded_allreduce)
        # Once each, however many groups share a norm.
        self._scales = {
            member.parameters[0][0]: member.module
            for group in groups
            for member in group.members
            if member.role in ("norm", "gate")
        }
        self._passes = 0
        self.frozen = Frozen(self, groups, config.truncation)
        self.penalty = self._penalty

    def backward(self, step: int) -> None:
        super().backward(step)
        self._passes += 1
        ratio = self._truncation.ratio if self._truncation.mode == "soft" else 0
        assert ratio != "distance"
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None:
                here = ~self.frozen.flags[name]
                parameter.grad[here] = parameter.grad[here] * ratio if ratio else 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Frozen scales that are free feel the penalty, which went with their other gradients."""
        if self._truncation.frozen_weights == "free" and self._truncation.mode == "hard":
            for name in self._scales:
                scale, frozen = self.network.get_parameter(name), ~self.frozen.flags[name]
                if scale.grad is not None:
                    scale.grad[frozen] += self._l1 * scale[frozen].sign()

    @torch.no_grad()
    def after_step(self) -> None:
        """Frozen slices and their optimizer state are written back."""
        if self._truncation.frozen_weights == "free":
            return
        for name, values in self.frozen.values.items():
            parameter = self.network.get_parameter(name)
            parameter.copy_(torch.where(values.isnan(), parameter, values))
            here = ~self.frozen.flags[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[here] = self.frozen.moment(name, key)[here]

    def take_bytes(self) -> int:
        """Bytes of the live elements, for every averaged pass since the last call."""
        passes, self._passes = self._passes, 0
        flags = {name: flag.clone() for name, flag in self.frozen.flags.items()}
        for flag in flags.values():
            if self._truncation.mode != "hard":
                flag.fill_(True)
        self._take_out_columns_of(self.frozen.sent_until < self.num_steps, flags)
        return passes * sum(
            int(flags[name].sum()) * self.bytes_of(parameter)
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        )

    def bytes_of(self, parameter: Tensor) -> int:
        """Of one element of its gradient, as it is sent."""
        return (self._wire or parameter.dtype).itemsize

    def _take_out_columns_of(self, silent: Tensor, flags: dict[str, Tensor]) -> None:
        """Nobody hears faded channels, so nothing comes back to the columns that read them."""
        for group, here in zip(self._groups, self._groups.split(silent).values()):
            for consumer in group.consumers:
                for name, dim in consumer.parameters:
                    for place in consumer.positions[here].flatten().tolist():
                        flags[name].select(dim, place).fill_(False)

    def _penalty(self, detour: bool) -> Tensor:
        """The L1 norm of all scales that the pass has used."""
        used = [
            self.network.get_parameter(name).to(torch.float32)
            for name, module in self._scales.items()
            if detour or module not in ("bn_side", "bn_back")
        ]
        return self._l1 * torch.cat(used).abs().sum() if used else torch.zeros(())


def _rounded_allreduce(state: torch.dtype, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    whole = bucket.buffer()
    rounded = (whole / dist.get_world_size()).to(state)
    work = dist.all_reduce(rounded, async_op=True)
    return work.get_future().then(lambda _: whole.copy_(rounded))
