"""Adapters in repositories of the Hugging Face hub: the files that PEFT saved, downloaded and checked."""

from __future__ import annotations

from pathlib import Path

from fortwo.errors import InvalidAdapter
from fortwo.hub.folder_progress import report_folder_bytes
from fortwo.hub.huggingface import HubSource
from fortwo.hub.repository import HubFile, Repository, check_space
from fortwo.hub.weights import ProgressCallback

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "manifest.json"


def download_adapter(reference: str, folder: Path, progress: ProgressCallback) -> None:
    """Download an adapter's files of one commit into `folder`. reference: hf:OWNER/REPO or hf:OWNER/REPO@REVISION.

    Raises InvalidRequest for another reference, InvalidAdapter for a repository that has no adapter or only a pickle
    of it, SourceUnreachable, StorageFailed for a disk without room, and OSError for one that becomes full.
    """
    source = HubSource.parse(reference, "ID")
    repository = Repository(
        source.repo_id,
        source.revision,
        "model",
        again="Try again.",
        revised="Name a revision that exists: fortwo adapters import hf:OWNER/REPO@REVISION",
        elsewhere="Download the adapter elsewhere and import its folder: fortwo adapters import PATH",
    )
    info = repository.model_info()
    found = {sibling.rfilename: HubFile.of(sibling) for sibling in info.siblings or []}
    _check_files(reference, sorted(found))
    files = [found[name] for name in (CONFIG, MANIFEST, TENSORS) if name in found]
    total = sum(file.size for file in files)
    check_space(reference, total, folder)
    with report_folder_bytes(folder, "download", total, progress):
        for file in files:
            repository.download(folder / file.name, file, info.sha or "")
            repository.verified(folder / file.name, file)


def _check_files(reference: str, names: list[str]) -> None:
    """Raises InvalidAdapter for a repository in which the two files of an adapter are not."""
    if CONFIG in names and TENSORS in names:
        return
    if folders := [name.removesuffix(f"/{CONFIG}") for name in names if name.endswith(f"/{CONFIG}")]:
        raise InvalidAdapter(
            f"{reference} has its adapters in folders: {', '.join(folders)}",
            param="path",
            hint="Download one of the folders, and import it: fortwo adapters import PATH",
        )
    if pickles := [name for name in names if name.startswith("adapter_model.") and not name.endswith(".safetensors")]:
        raise InvalidAdapter(
            f"{reference} has its tensors in {pickles[0]}, a pickle, which can run code when it is loaded",
            param="path",
            hint="Download it, and import its folder: fortwo adapters import PATH. The error says how to convert it.",
        )
    missing = CONFIG if CONFIG not in names else TENSORS
    raise InvalidAdapter(
        f"{reference} has no {missing}, so it is not an adapter that PEFT saved",
        param="path",
        hint="A base model is added with: fortwo models add ID hf:OWNER/REPO",
    )
