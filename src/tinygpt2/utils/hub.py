"""Find models, tokenizers and datasets by name, in local directories or on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt2.errors import ModelError, UnreadableError, one_line

_HINT = (
    "give a local directory; to use the Hub, check the network, HF_ENDPOINT (a mirror) and SSL_CERT_FILE "
    "(a proxy's certificate), or run `hf download` on another machine and copy its cache"
)


def local_directory(name: str, role: str, *, allow_pickle: bool = False, weights: bool = False) -> Path:
    """Return the directory with the files of `name`. Files of a Hub id are downloaded if they are not in the cache.

    Args:
        name: a directory, or a Hub id such as `gpt2` or `owner/name`.
        role: a word for the error message: `model`, `teacher` or `tokenizer`.
        allow_pickle: with `weights`, download pickled weights too.
        weights: download weights, not only configuration and tokenizer.

    Raises:
        ModelError: there is no such directory, and the files are neither in the cache nor available from the Hub.
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
        raise ModelError(
            f"{role} {name!r} is not a local directory and could not be downloaded from the Hub", _HINT
        ) from error


def stream_dataset(name: str, configuration: str | None) -> tuple[Any, str]:
    """Return a Hub dataset's splits by name, read as a stream, and its revision.

    Raises:
        UnreadableError: the dataset is not available from the Hub.
    """
    import datasets
    from huggingface_hub import HfApi

    try:
        # fails at once if the Hub does not answer; `datasets` would retry for a long time
        revision = str(HfApi().dataset_info(name, timeout=20).sha)
        return datasets.load_dataset(name, configuration, streaming=True, revision=revision), revision
    except Exception as error:  # network failures raise many kinds of exceptions
        problem = one_line(error, 200)
        raise UnreadableError(
            f"no such file or directory: {name}, and no dataset of that name could be read from the Hub: {problem}",
            _HINT,
        ) from error


def dataset_rows(name: str, configuration: str | None, split: str, *, parquet: bool = False) -> list[dict[str, Any]]:
    """Return all rows of a dataset's split, from the Hub or from the cache of earlier downloads.

    Args:
        name: the dataset's Hub id.
        configuration: one of its configurations, if it has several.
        split: one of its splits.
        parquet: read the Hub's own conversion of the dataset to Parquet.

    Raises:
        UnreadableError: the dataset is neither on the Hub nor in the cache.
    """
    import datasets
    from huggingface_hub import HfApi

    where: dict[str, Any] = {"name": configuration}
    if parquet:
        where = {"revision": "refs/convert/parquet", "data_files": {split: f"{configuration}/{split}/*.parquet"}}
    problem = ""
    try:
        HfApi().dataset_info(name, revision=where.get("revision"), timeout=20)
    except Exception as error:  # network failures raise many kinds of exceptions
        problem = one_line(error, 200)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        # if the Hub does not answer, `datasets` would retry for a long time before it uses its cache
        datasets.config.HF_HUB_OFFLINE = offline or bool(problem)
        return list(datasets.load_dataset(name, split=split, **where))
    except Exception as error:
        problem = problem or one_line(error, 200)
        raise UnreadableError(f"the dataset {name} could not be read from the Hub: {problem}", _HINT) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
