from __future__ import annotations

import pytest
import torch

from worm_dist import digest
from worm_dist.digest import fingerprints


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
def test_one_changed_element_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.arange(40).view(5, 8).to(dtype)
    (before,) = fingerprints([tensor])
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[place] = 0 if bool(tensor.view(-1)[place]) else 1
        assert fingerprints([changed]) != [before], place
    assert fingerprints([tensor.clone()]) == [before]


def test_exchanged_elements_and_the_sign_of_zero_count() -> None:
    first = torch.tensor([1.0, 2.0, 0.0])
    others = [torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, -0.0])]
    assert len(set(fingerprints([first, *others]))) == 3


def test_every_piece_of_a_long_tensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_AT_ONCE", 7)
    tensor = torch.randn(4, 5).t()
    changed = [tensor.clone(memory_format=torch.contiguous_format) for _ in range(tensor.numel())]
    for place, other in enumerate(changed):
        other.view(-1)[place] += 1
    exchanged = torch.cat([tensor.flatten()[7:14], tensor.flatten()[:7], tensor.flatten()[14:]])
    found = fingerprints([tensor, *changed, exchanged.view(5, 4)])
    assert len(set(found)) == len(found)
    assert fingerprints([tensor.contiguous()]) == found[:1]
    assert fingerprints([torch.randn(0)]) == [0] and fingerprints([]) == []
