"""A folder to the Hugging Face Hub."""

import importlib.util
from pathlib import Path

from train.errors import ConfigError
from train.export.folder import FILES
from train.export.program import ExportError


def require_hub() -> None:
    """Raises ConfigError where huggingface_hub is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError("--push needs huggingface_hub, which is not installed: pip install huggingface_hub")


def push_folder(folder: Path, repository: str) -> str:
    """Upload the network's files to ORG/NAME, as one commit, and return its address. A new repository is private.

    Raises ExportError with the Hub's own words, such as that nobody is logged in.
    """
    require_hub()
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Upload by launch/export.py",
        )
    except Exception as error:  # its own types, those of its HTTP client, and ValueError for a wrong name
        why = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(f"could not upload {folder} to {repository}: {why[:300]}") from error
    return str(address)
