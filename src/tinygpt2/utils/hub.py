"""Names to what they name: models and tokenizers to local directories, data sets to streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt2.errors import ModelError, UnreadableError, one_line

_HINT = (
    "give a local directory; for the Hub, check the network, HF_ENDPOINT (a mirror) and REQUESTS_CA_BUNDLE "
    "(a proxy's certificate), or fill the cache elsewhere with `hf download` and copy it"
)


def local_directory(name: str, role: str, *, allow_pickle: bool = False, weights: bool = False) -> Path:
    """Return the directory that holds `name`, fetching a Hub id's files into the cache if need be.

    Args:
        name: a directory, or a Hub id such as `gpt2` or `owner/name`.
        role: what it is, for the message: `model`, `teacher`, `tokenizer`.
        allow_pickle: fetch pickled weights too.
        weights: fetch weights at all.

    Raises:
        ModelError: no such directory, and nothing of that name in the cache or in reach on the Hub.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{role} {name} is a file", "give the directory that holds config.json and model.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such directory: {role} {name}", "give a local directory or a Hub id such as gpt2")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = (
        ["*.json", "merges.txt"] + ["*.safetensors"] * weights + ["pytorch_model*.bin"] * (weights and allow_pickle)
    )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ModelError(f"{role} {name!r} is no local directory and cannot be had from the Hub", _HINT) from error


def stream_dataset(name: str, configuration: str | None) -> tuple[Any, str]:
    """Return a data set's splits on the Hub, by name, to be read as they come, and its revision.

    Raises:
        UnreadableError: nothing of that name is here or in reach on the Hub.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        # fails at once where `datasets` would try again for long
        revision = str(HfApi().dataset_info(name, timeout=20).sha)
        return datasets.load_dataset(name, configuration, streaming=True, revision=revision), revision
    except Exception as error:  # whatever the network makes the libraries raise
        problem = one_line(error, 200)
        raise UnreadableError(
            f"no such file or directory: {name}; nor can it be had as a data set from the Hub: {problem}", _HINT
        ) from error


def dataset_rows(name: str, configuration: str | None, split: str, *, parquet: bool = False) -> list[dict[str, Any]]:
    """Return all rows of a data set's split, from the Hub or from the cache of earlier downloads.

    Args:
        parquet: read the Hub's own conversion to Parquet.

    Raises:
        UnreadableError: it is in neither.
    """
    import datasets
    from huggingface_hub import HfApi

    where: dict[str, Any] = {"name": configuration}
    if parquet:
        where = {"revision": "refs/convert/parquet", "data_files": {split: f"{configuration}/{split}/*.parquet"}}
    problem = ""
    try:
        HfApi().dataset_info(name, revision=where.get("revision"), timeout=20)
    except Exception as error:  # whatever the network makes the library raise
        problem = one_line(error, 200)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # where the Hub does not answer, `datasets` would try again for long before it looks into its cache
        datasets.config.HF_HUB_OFFLINE = offline or bool(problem)
        return list(datasets.load_dataset(name, split=split, **where))
    except Exception as error:
        problem = problem or one_line(error, 200)
        raise UnreadableError(f"{name} cannot be had as a data set from the Hub: {problem}", _HINT) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
