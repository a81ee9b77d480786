"""The devices that a server computes on."""

from __future__ import annotations

import torch

from fortwo.errors import InvalidRequest


def find_devices(device: str, train_device: str | None) -> tuple[torch.device, torch.device | None]:
    """The devices that the settings of these names mean, the second one None where both are the same by default. Raises
    InvalidRequest for one that this machine does not have, and for one GPU in both places."""
    serving = _find_device(device, "device")
    if train_device is None:
        return serving, None
    training = _find_device(train_device, "train_device")
    if training == serving and serving.type != "cpu":
        raise InvalidRequest(
            f"train_device = {train_device!r} is the device that serves, too.",
            param="train_device",
            hint="Name another GPU, or remove FORTWO_TRAIN_DEVICE: then chat and jobs take turns on this one.",
        )
    return serving, training


def _find_device(name: str, setting: str) -> torch.device:
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
        f"{setting} = {name!r} is not on this machine.",
        param=setting,
        hint=f"Set FORTWO_{setting.upper()} to {'auto or ' if setting == 'device' else ''}cpu.",
    )
