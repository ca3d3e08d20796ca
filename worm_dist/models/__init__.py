"""Models: networks that can be built by name.

Our own networks for small images are ``vgg_small``, ``vgg11_bn``, ``resnet18``, ``resnet20``,
``resnet56``, ``preresnet20``, ``preresnet101`` and ``vit_small``.  Every classification model of
torchvision is available, untrained; ``torchvision/<name>`` selects torchvision's where both have a
name.  ``timm/<name>`` is a model of timm, if that is installed.  ``package.module:function`` is a
function of the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..user_function import call_user_function, is_user_function
from .preresnet import preresnet20, preresnet101
from .resnet import resnet18, resnet20, resnet56
from .vgg import vgg11_bn, vgg_small
from .vit import vit_small

__all__ = ["build_model"]

TORCHVISION, TIMM = "torchvision/", "timm/"
_KEY = "model.name"

BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    "vgg_small": vgg_small,
    "vgg11_bn": vgg11_bn,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "preresnet20": preresnet20,
    "preresnet101": preresnet101,
    "vit_small": vit_small,
}


def build_model(
    name: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any] = {}
) -> nn.Module:
    """Build the network called ``name``, initialised from torch's random state.

    It maps images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``.

    A function of the user's, ``package.module:function``, is called with ``num_classes``,
    ``in_channels`` and ``arguments`` by keyword, and returns a module.

    Args:
        name: the model's name.
        num_classes: the number of classes.
        in_channels: the number of image channels.
        arguments: further keyword arguments of the model's constructor.

    Raises:
        ConfigError: there is no such network, it does not take these arguments or this number of
            channels, or it returns more than logits; or the user's function raises an exception,
            or returns no module.
    """
    if name in BUILDERS:
        return _call(
            BUILDERS[name], name, arguments, num_classes=num_classes, in_channels=in_channels
        )
    if name.startswith(TIMM):
        return _timm_model(name, num_classes, in_channels, arguments)
    if is_user_function(name):
        return _user_model(name, num_classes, in_channels, arguments)
    return _torchvision_model(name, num_classes, in_channels, arguments)


def _user_model(
    name: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any]
) -> nn.Module:
    given = {"num_classes": num_classes, "in_channels": in_channels}
    _require_apart(given, arguments)
    model = call_user_function(name, _KEY, **given, **arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{_KEY}: {name} returned a value of type {type(model).__name__}; let it return the "
            "network, a torch.nn.Module"
        )
    return model


def _timm_model(
    name: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any]
) -> nn.Module:
    try:
        import timm  # imported here: it is not among the dependencies
    except ImportError as error:
        raise ConfigError(
            f"{_KEY}: {name[:100]!r} needs timm, which is not installed here; pip install timm"
        ) from error
    plain = name.removeprefix(TIMM)
    known = timm.list_models()
    if plain not in known:
        raise ConfigError(_unknown(name, [TIMM + other for other in known]))
    return _call(
        timm.create_model,
        name,
        arguments,
        model_name=plain,
        pretrained=False,
        pretrained_cfg=None,
        checkpoint_path=None,
        num_classes=num_classes,
        in_chans=in_channels,
    )


def _torchvision_model(
    name: str, num_classes: int, in_channels: int, arguments: Mapping[str, Any]
) -> nn.Module:
    import torchvision  # imported here: takes a second, and our own networks do not need it

    known = torchvision.models.list_models(module=torchvision.models)
    plain = name.removeprefix(TORCHVISION)
    if plain not in known:
        raise ConfigError(
            _unknown(name, [*BUILDERS, *known, *(TORCHVISION + other for other in known)])
        )
    if in_channels != 3:
        raise ConfigError(
            f"model.name: {plain!r} of torchvision takes images of 3 channels, the data has "
            f"{in_channels}; use one of {', '.join(BUILDERS)}"
        )
    build = torchvision.models.get_model_builder(plain)
    model = _call(build, name, arguments, weights=None, num_classes=num_classes)
    if getattr(model, "aux_logits", False):
        raise ConfigError(
            f"model.arguments: {plain!r} returns auxiliary logits, which the trainer does not use; "
            "set aux_logits: false"
        )
    return model


def _call(
    build: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any], **given: Any
) -> nn.Module:
    _require_apart(given, arguments)
    try:
        return build(**given, **arguments)
    except ConfigError:
        raise
    except Exception as error:  # constructors may raise anything for invalid arguments
        raise ConfigError(
            f"model.arguments: {name!r} does not take {str(dict(arguments))[:500]}: "
            f"{str(error)[:500]}"
        ) from error


def _require_apart(given: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    taken = sorted(given.keys() & arguments.keys())
    if taken:
        raise ConfigError(
            f"model.arguments: remove {', '.join(taken)}; the numbers of classes and channels are "
            "those of the data, and networks start untrained"
        )


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"take one of {', '.join(BUILDERS)}, torchvision's, timm/NAME, or a function of yours "
        "as package.module:function"
    )
    return f"model.name: there is no {name[:100]!r}; {hint}"
