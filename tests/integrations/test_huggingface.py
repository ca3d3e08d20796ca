"""The engine in Hugging Face's Trainer, on one process and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import worm_dist
from tests.integrations.training import (
    BATCH,
    CONFIG,
    EPOCHS,
    FIGURES,
    NUM_STEPS,
    STATISTICS,
    begin,
    data,
    digest,
    let_accelerate_shard,
    on_ranks,
    progress,
    require_all_phases,
)
from tests.ranks import NO_GROUP, Ranks

for _package in ("transformers", "accelerate"):
    pytest.importorskip(_package, reason="the extra worm_dist[hf] is not installed")
pytestmark = pytest.mark.slow("imports transformers in every rank")


def _train(
    folder: str,
    name: str,
    world_size: int,
    passes: int = 1,
    resumed_from: str | None = None,
    detached_at: int | None = None,
    **arguments: Any,
) -> tuple[Any, Any, list[Any]]:
    """
    Args:
        detached_at: the step after which the user detaches the engine.
    """
    from transformers import TrainerCallback

    from worm_dist.integrations.huggingface import WormTrainerCallback

    class Ends(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(progress(callback.engine))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == detached_at:
                callback.engine.detach()

    ends: list[Any] = []
    trainer = _trainer(folder, name, world_size, passes, **arguments)
    trainer.add_callback(Ends())
    inputs = {"pixel_values": data(1)[0][:1]}
    callback = WormTrainerCallback(trainer, CONFIG, example_inputs=inputs)
    trainer.train(resume_from_checkpoint=resumed_from)
    return trainer, callback, ends


def _vision_transformer() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    network = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=12,
            num_labels=4,
        )
    )
    return worm_dist.add_gates(network)


def _model() -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
            num_labels=4,
        )
    )
    # Accelerate shards embeddings by themselves, and asks a ResNet too for its own.
    model.get_input_embeddings = lambda: None
    return model


def _trainer(
    folder: str,
    name: str,
    world_size: int,
    passes: int = 1,
    model: Callable[[], Any] | None = None,
    **arguments: Any,
) -> Any:
    from transformers import Trainer, TrainingArguments

    images, classes = data(max(1, world_size), passes)
    rows = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, classes.tolist(), strict=True)
    ]
    settings = TrainingArguments(
        f"{folder}/{name}",
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=passes,
        num_train_epochs=EPOCHS,
        learning_rate=0.01,
        save_strategy="epoch",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    if settings.fsdp:
        let_accelerate_shard()
    return Trainer((model or _model)(), settings, train_dataset=rows, eval_dataset=rows)


def _trained(trainer: Any) -> dict[str, Any]:
    return {
        "weights": digest(dict(trainer.model.named_parameters())),
        STATISTICS: digest(dict(trainer.model.named_buffers())),
        "optimizer": digest(trainer.optimizer.state_dict()),
        "rate": trainer.lr_scheduler.get_last_lr(),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def _state(trainer: Any, callback: Any, ends: list[Any]) -> dict[str, Any]:
    return {
        **_trained(trainer),
        "steps": callback.engine.step,
        FIGURES: [
            line["worm/live_fraction"]
            for line in trainer.state.log_history
            if "worm/live_fraction" in line
        ],
        "end": ends[-1],
    }


def _course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    return _trainings(folder, world_size)


def _sharded_course(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    found = _trainings(folder, world_size, **_SHARDED)
    for state in found.values():
        if isinstance(state, dict):
            state.pop(STATISTICS)  # each rank's own, of which rank zero's are saved
    return found


def _trainings(folder: str, world_size: int, **arguments: Any) -> dict[str, Any]:
    trained = _train(folder, "unbroken", world_size, **arguments)
    found = {"unbroken": _state(*trained), "ends": trained[2]}
    trained[0].save_model(f"{folder}/small")
    for epoch in (2, 3):
        path = f"{folder}/unbroken/checkpoint-{epoch * NUM_STEPS}"
        resumed = _train(folder, f"from-{epoch}", world_size, 1, path, **arguments)
        found[f"from {epoch}"] = _state(*resumed)
    found["accumulated"] = _state(*_train(folder, "accumulated", world_size, 2, **arguments))
    found["read"] = _read(f"{folder}/small")
    return found


def _read(folder: str) -> dict[str, Any]:
    from transformers import AutoModelForImageClassification

    from worm_dist.integrations.huggingface import restore_ticket

    model = AutoModelForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True)
    model = restore_ticket(model, folder)
    return {
        "weights": digest(dict(model.named_parameters())),
        STATISTICS: digest(dict(model.named_buffers())),
    }


@pytest.mark.parametrize(
    ("world_size", "course"), [(NO_GROUP, _course), (2, _course), (2, _sharded_course)]
)
def test_it_draws_resumes_and_is_read_to_the_same_bits(
    ranks: Ranks, tmp_path: Path, world_size: int, course: Callable[[str, int], Any]
) -> None:
    found = on_ranks(ranks, world_size, course, tmp_path)
    unbroken = found["unbroken"]
    require_all_phases(found["ends"])
    assert unbroken["steps"] == EPOCHS * NUM_STEPS == len(unbroken["losses"])
    assert unbroken[FIGURES][0] == 1.0 > unbroken[FIGURES][-1]
    assert found["from 2"] == unbroken
    assert found["from 3"] == unbroken
    assert found["accumulated"]["end"][0] == "ticket"
    assert found["accumulated"]["steps"] == EPOCHS * NUM_STEPS
    assert found["read"] == {key: unbroken[key] for key in found["read"]}


def _refused(folder: str, world_size: int) -> str:
    from worm_dist import ConfigError

    begin(world_size)
    with pytest.raises(ConfigError) as refused:
        _train(
            folder,
            "refused",
            world_size,
            eval_strategy="epoch",
            load_best_model_at_end=True,
        )
    return str(refused.value)


def test_the_best_model_cannot_be_loaded_at_the_end(ranks: Ranks, tmp_path: Path) -> None:
    assert "load_best_model_at_end" in on_ranks(ranks, NO_GROUP, _refused, tmp_path)


def _resumed_by_saved_names(folder: str, world_size: int) -> dict[str, Any]:
    begin(world_size)
    trained = _train(folder, "unbroken", world_size, model=_vision_transformer)
    trained[0].save_model(f"{folder}/small")
    found = {"unbroken": _state(*trained), "ends": trained[2]}
    for epoch in (1, 3):
        path = f"{folder}/unbroken/checkpoint-{epoch * NUM_STEPS}"
        resumed = _train(folder, f"from-{epoch}", world_size, 1, path, model=_vision_transformer)
        found[f"from {epoch}"] = _state(*resumed)
    found["read"] = _read(f"{folder}/small")
    return found


@pytest.mark.parametrize("world_size", [NO_GROUP, 2])
def test_a_network_resumes_whose_weights_are_saved_by_other_names(
    ranks: Ranks, tmp_path: Path, world_size: int
) -> None:
    """The trainer itself goes on with initial weights then, of which it warns."""
    found = on_ranks(ranks, world_size, _resumed_by_saved_names, tmp_path)
    phases = [phase for phase, _ in found["ends"]]
    assert phases[0] == "truncate" and phases[2] == "ticket"
    assert found["from 1"] == found["unbroken"]
    assert found["from 3"] == found["unbroken"]
    assert found["read"] == {key: found["unbroken"][key] for key in found["read"]}


_DETACHED_AT = 5
"""A step in which channels are frozen, and none has been removed."""
_SHARDED = {"fsdp": True, "fsdp_config": {"min_num_params": 500}}


def _detached_while_channels_are_frozen(
    folder: str, world_size: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    begin(world_size)
    trainer, _, ends = _train(folder, "on", world_size, detached_at=_DETACHED_AT, **arguments)
    found: dict[str, Any] = {"ends": [*ends], "went on": _trained(trainer)}
    dense = _trainer(folder, "without", world_size, **arguments)
    found["dense"] = sum(parameter.numel() for parameter in dense.model.parameters())
    for name, again in (("without", dense), ("again", trainer)):
        again.train(resume_from_checkpoint=f"{folder}/on/checkpoint-{NUM_STEPS}")
        found[name] = _trained(again)
    saved = sorted(Path(folder).glob("on/checkpoint-*/worm_engine_*"))
    found["saved"] = [str(path) for path in saved]
    trainer.model_init = _model
    trainer.args.num_train_epochs = 1
    trainer.train()
    found["new"] = trainer.accelerator.unwrap_model(trainer.model_wrapped) is trainer.model
    return found


_TRAININGS = [(NO_GROUP, {}), (2, {}), (2, _SHARDED)]


@pytest.mark.parametrize(("world_size", "arguments"), _TRAININGS)
def test_after_detaching_it_trains_as_if_the_callback_were_not_there(
    ranks: Ranks, tmp_path: Path, world_size: int, arguments: dict[str, Any]
) -> None:
    """The next checkpoint asked the detached engine for its state, which ended the training; and
    the trainer could not train again."""
    course = _detached_while_channels_are_frozen
    found = on_ranks(ranks, world_size, course, tmp_path, arguments)
    assert found["ends"] == [("truncate", found["dense"])] * EPOCHS
    assert found["without"] == found["went on"]
    assert found["again"] == found["went on"]
    assert not found["saved"]
    assert found["new"], "it does not train the network that model_init has made"


def _detached_from_a_ticket(
    folder: str, world_size: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    begin(world_size)
    trainer, callback, ends = _train(folder, "on", world_size, **arguments)
    found = {"end": ends[-1], "trained": _trained(trainer)}
    callback.engine.detach()
    trainer.save_model(f"{folder}/small")
    trainer.train(resume_from_checkpoint=f"{folder}/on/checkpoint-{3 * NUM_STEPS}")
    return {**found, "again": _trained(trainer), "read": _read(f"{folder}/small")}


@pytest.mark.parametrize(("world_size", "arguments"), _TRAININGS)
def test_a_detached_ticket_is_saved_and_trains_again(
    ranks: Ranks, tmp_path: Path, world_size: int, arguments: dict[str, Any]
) -> None:
    """From a checkpoint that has an engine's state, too: it has the ticket's weights."""
    found = on_ranks(ranks, world_size, _detached_from_a_ticket, tmp_path, arguments)
    assert found["end"][0] == "ticket"
    assert found["again"] == found["trained"]
    assert found["read"] == {key: found["trained"][key] for key in found["read"]}
