"""The devices that a server computes on."""

from __future__ import annotations

import torch

from fortwo.errors import InvalidRequest
from fortwo.execution.autotuning import memory
from fortwo.train.estimate import format_size


def find_devices(device: str, train_device: str | None) -> tuple[list[torch.device], torch.device | None]:
    """The devices that the settings of these names mean: those that reply, and the one for jobs, None where they share
    the first one. device: names with commas between them. Raises InvalidRequest for one that this machine does not
    have, for a GPU that is named twice, and for devices of different kinds."""
    serving = [_find_device(name.strip(), device, "device") for name in device.split(",")]
    if repeated := [one for one in serving if one.type != "cpu" and serving.count(one) > 1]:
        raise InvalidRequest(
            f"device = {device!r} names {repeated[0]} twice.",
            param="device",
            hint="Name each GPU once.",
        )
    kinds = list(dict.fromkeys(map(_kind, serving))) if len(serving) > 1 else []
    if len(kinds) > 1:
        raise InvalidRequest(
            f"device = {device!r} names devices of different kinds: {', '.join(kinds)}.",
            param="device",
            hint="Name devices of one kind, which hold the weights in the same format and so reply alike. Another one "
            "can train (FORTWO_TRAIN_DEVICE).",
        )
    if train_device is None:
        return serving, None
    training = _find_device(train_device, train_device, "train_device")
    if training in serving and training.type != "cpu":
        raise InvalidRequest(
            f"train_device = {train_device!r} is a device that serves, too.",
            param="train_device",
            hint="Name another GPU, or remove FORTWO_TRAIN_DEVICE: then chat and jobs take turns on the first one.",
        )
    return serving, training


def _find_device(name: str, value: str, setting: str) -> torch.device:
    """The device of this name, which is the value of the setting, or a part of it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    number = device.index or 0
    if device.type == "cpu" and number == 0:
        return torch.device("cpu")
    if device.type == "cuda" and number < torch.cuda.device_count():
        return torch.device("cuda", number)
    raise InvalidRequest(
        f"{setting} = {value!r}{'' if name == value else f': {name!r}'} is not on this machine.",
        param=setting,
        hint=f"Set FORTWO_{setting.upper()} to {'auto or ' if setting == 'device' else ''}cpu.",
    )


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU"
    return f"{torch.cuda.get_device_name(device)} with {format_size(memory(device))}"
