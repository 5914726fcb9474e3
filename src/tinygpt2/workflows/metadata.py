"""What the card of a training run says beside its figures: where the model is from, and how to use it."""

from __future__ import annotations

from pathlib import Path

from tinygpt2.config.distillation import DistillConfig
from tinygpt2.data.corpus.sources import PYTHON_DOCS
from tinygpt2.models.card import TRANSFORMERS, HubMetadata
from tinygpt2.training.job import Job
from tinygpt2.utils.files import shared_text


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


def how_to_load(job: Job) -> tuple[str | None, str]:
    """Return the library that loads a run's model, and sentences for people: see `model_card`.

    A student with the teacher's own tokens can draft for it.
    """
    library, loading = TRANSFORMERS
    config, teacher = job.config, job.teacher
    if not isinstance(config, DistillConfig) or not isinstance(config.teacher, str) or teacher is None:
        return TRANSFORMERS
    if teacher.reading.rows is not None or teacher.vocabulary != job.model.config.vocab_size:
        return TRANSFORMERS
    name, out = shared_text(config.teacher), Path(config.out).name
    return library, (
        f"{loading} `tinygpt2 generate --model {out}` writes text with it. It can also draft for its teacher, "
        f"whose text stays the same; `tinygpt2 generate --model {name} --draft {out}` prints whether it is faster."
    )
