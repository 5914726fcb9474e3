"""What the card of a training run tells the Hub: where the model comes from, and how good it is."""

from __future__ import annotations

from tinygpt2.data.corpus.sources import PYTHON_DOCS
from tinygpt2.models.card import HubMetadata
from tinygpt2.training.job import Job


def run_metadata(job: Job, perplexities: dict[str, float]) -> HubMetadata:
    """Return the metadata of a run's model. Only models and datasets of the Hub are named, no local folders.

    Args:
        perplexities: per token, by the text that it was measured on.
    """
    config, manifest = job.config, job.data.manifest
    english = manifest.get("sources") == [PYTHON_DOCS]  # the only text whose language is known
    return HubMetadata(
        base_model=list(dict.fromkeys(job.hub_models().values())),
        datasets=list(dict.fromkeys(manifest.get("hub_datasets", []))),
        language=config.language or (["en"] if english else []),
        license=config.license,
        perplexities=perplexities,
    )
