"""Names of models and tokenizers to local directories: a path as it is, a Hub id through its cache."""

from __future__ import annotations

from pathlib import Path

from tinygpt2.errors import ModelError

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
