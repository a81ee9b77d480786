"""Reads an adapter that PEFT, or a program that writes PEFT's format, saved in a directory.

Nothing is stored here, and the adapter need not be one that can be served: `nn.lora_config` decides about its options
and `engine.adapter_check` about its tensors.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fortwo import strict_json
from fortwo.adapters.version_files import CONFIG, TENSORS, parse_tensors
from fortwo.errors import InvalidAdapter
from fortwo.hub import weights
from fortwo.records import Json

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load('
    "sys.argv[1], map_location='cpu', weights_only=True).items()}, sys.argv[2])\""
)

# A projection's tensor under the names that programs give it: with PEFT's adapter name before weight or at the end, and
# with the wrappers of compilers and of models with images before "layers".
_WRAPPERS = "base_model|model|module|language_model|_orig_mod|_fsdp_wrapped_module"
_NAME = re.compile(
    rf"(?:(?:{_WRAPPERS})\.)*layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\."
    r"(?:(lora_[AB])(?:\.(?!weight$)\w+)?\.weight|lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?)"
)


@dataclass(frozen=True)
class PeftFiles:
    """config: adapter_config.json. tensors: by their names in the file. files: what is to be stored, by file name."""

    config: Json
    tensors: dict[str, Tensor]
    files: dict[str, bytes]


def read_directory(directory: Path) -> PeftFiles:
    """The adapter in a directory. Raises InvalidAdapter naming the file that is missing, damaged, a pickle, or anything
    but a plain file."""
    if not directory.is_dir():
        raise InvalidAdapter(f"{directory} is not a directory", hint="Name the directory that PEFT saved.")
    refuse_pickles(directory)
    files = {name: read_file(directory / name) for name in (CONFIG, TENSORS)}
    config = parse_config(files[CONFIG], directory / CONFIG)
    tensors = parse_tensors(files[TENSORS], directory / TENSORS)
    return PeftFiles(config, tensors, files)


def under_pefts_names(adapter: PeftFiles) -> PeftFiles:
    """The same adapter with the tensors of projections under the names that PEFT writes for the networks of Llama's
    kind, and all others as they are. Raises InvalidAdapter for a tensor that is there twice."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        found = _NAME.fullmatch(name)
        kind = f"{found[3]}.weight" if found and found[3] else "lora_magnitude_vector"
        plain = f"base_model.model.model.layers.{found[1]}.{found[2]}.{kind}" if found else name
        if plain in renamed:
            raise InvalidAdapter(
                f"{TENSORS} holds {plain!r} twice, under different names such as {name!r}",
                hint="Save one adapter alone with PEFT.",
            )
        renamed[plain] = tensor
    if renamed.keys() == adapter.tensors.keys():
        return adapter
    return replace(adapter, tensors=renamed, files=adapter.files | {TENSORS: weights.serialize(renamed)})


def refuse_pickles(directory: Path) -> None:
    """Raises InvalidAdapter, with the command that converts it, for an adapter that is only there as a pickle."""
    if (directory / TENSORS).exists():
        return
    for pickle in (directory / name for name in PICKLES if (directory / name).exists()):
        raise InvalidAdapter(
            f"{pickle} is a pickle, which can run code when it is loaded",
            hint=f"Convert it: {CONVERT} {shlex.quote(str(pickle))} {shlex.quote(str(directory / TENSORS))}",
        )


def parse_config(content: bytes, path: Path) -> Json:
    """Raises InvalidAdapter for what is not a JSON object or has a key twice."""
    try:
        value = strict_json.loads(content)
    except strict_json.RepeatedKey as error:
        raise InvalidAdapter(f"{path}: {error}", param=error.path, hint="Leave one of the two.") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{path} is not a JSON object", hint="Save the adapter again with PEFT.")
    return value


def read_file(path: Path) -> bytes:
    """The content of a plain file. A link may lead out of an allowed folder, and a pipe may never end, so both are
    refused. Raises InvalidAdapter."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InvalidAdapter(f"{path} is missing", hint="Save the adapter again with PEFT.") from None
    except OSError as error:
        if path.is_symlink():
            raise InvalidAdapter(
                f"{path} is a link, and links are not followed", hint="Copy the files themselves: cp -rL."
            ) from None
        raise InvalidAdapter(
            f"{path} cannot be read: {error.strerror}", hint="Make it readable for the server."
        ) from None
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InvalidAdapter(f"{path} is not a plain file", hint="Save the adapter again with PEFT.")
        return file.read()
