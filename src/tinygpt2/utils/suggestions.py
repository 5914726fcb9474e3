"""The known names that somebody probably meant by an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_OTHER_NAMES = {
    "learning_rate": "lr peak_lr max_lr",
    "lr_schedule": "scheduler lr_scheduler lr_scheduler_type schedule",
    "micro_batch_size": "batch_size batch bs train_batch_size per_device_train_batch_size device_batch_size",
    "batch_size": "batch bs eval_batch_size per_device_eval_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulation gradient_accumulation accumulate_grad_batches",
    "num_epochs": "epochs epoch num_train_epochs max_epochs passes",
    "max_steps": "steps num_steps iters iterations max_iters num_iterations train_steps",
    "max_tokens": "tokens num_tokens train_tokens",
    "max_new_tokens": "max_tokens tokens num_tokens max_length length n_predict",
    "grad_clip": "max_grad_norm clip clip_grad gradient_clip_val",
    "weight_decay": "wd decay",
    "warmup_ratio": "warmup warmup_steps warmup_iters",
    "precision": "dtype fp16 bf16 half mixed_precision torch_dtype",
    "sequence_length": "block_size seq_len seq_length context_length context max_length max_seq_length max_seq_len",
    "n_positions": "block_size max_position_embeddings context_length sequence_length n_ctx",
    "n_layer": "num_layers n_layers layers num_hidden_layers depth",
    "num_layers": "n_layer n_layers num_hidden_layers depth",
    "n_embd": "hidden_size width d_model dim n_embed embedding_size",
    "n_head": "num_heads n_heads heads num_attention_heads",
    "n_inner": "intermediate_size d_ff ffn_dim filter_size",
    "activation_function": "activation hidden_act nonlinearity",
    "out": "output output_dir out_dir save_dir outdir output_path model_dir",
    "data": "dataset datasets data_dir data_path train_data train_file training_data",
    "eval_data": "val_data valid_data validation_data test_data eval_dataset validation_file",
    "test_fraction": "test_size val_fraction validation_split val_split test_split",
    "model": "model_name model_name_or_path model_path checkpoint checkpoint_dir ckpt pretrained",
    "model_config": "config_name shape arch architecture preset",
    "teacher": "teacher_model teacher_name",
    "student": "student_model student_name student_config",
    "ce_weight": "alpha_ce alpha_clm hard_weight lm_weight",
    "prediction_weight": "alpha kl_weight kd_weight logits_weight alpha_kd",
    "temperature": "temp",
    "save_every": "save_steps save_interval checkpoint_every checkpoint_steps",
    "eval_every": "eval_steps eval_interval val_interval eval_frequency",
    "log_every": "logging_steps log_interval log_steps",
    "keep": "save_total_limit keep_last",
    "resume": "resume_from_checkpoint resume_from",
    "validate_only": "dry_run",
    "num_processes": "gpus num_gpus devices nproc nproc_per_node world_size",
    "num_workers": "workers threads num_threads num_proc",
    "num_samples": "num_return_sequences samples n",
    "num_beams": "beams beam_size",
    "prompt": "text input",
    "task": "tasks text dataset data",
    "tokenizer": "tokenizer_name tokenizer_path",
    "vocab_size": "vocabulary_size vocab",
    "text_column": "column text_key field",
    "overwrite": "force",
    "gpt2": "gpt2-small gpt2-124m gpt2-base gpt-2",
    "distilgpt2": "distil-gpt2 distilgpt-2",
    # commands
    "pretrain": "train training",
    "finetune": "train training tune sft",
    "distill": "distillation kd",
    "truncate-student": "prune cut truncate shrink init-student",
    "pregenerate": "tokenize prepare preprocess pack data prepare-data",
    "train-tokenizer": "tokenizer bpe",
    "ppl": "eval evaluate perplexity test benchmark",
    "generate": "sample chat complete inference infer run",
    "verify": "check validate",
    "presets": "models configs",
    "quickstart": "demo start init",
}
"""Our names, each with names that other tools have for the same."""


def _plain(name: str) -> str:
    return name.strip("-").replace("-", "_").lower()


_HABITS = {_plain(ours): [_plain(theirs) for theirs in others.split()] for ours, others in _OTHER_NAMES.items()}


def closest(name: str, known: Iterable[str], most: int = 2) -> list[str]:
    """Return the known names that are most probably meant, the best first: habits from other tools, then spellings.

    Dashes and underscores are the same.
    """
    asked, names = _plain(name), {_plain(one): one for one in known}
    theirs = {other for plain in names for other in _HABITS.get(plain, ())}
    others = difflib.get_close_matches(asked, theirs, cutoff=0.9)
    habits = [one for other in others for plain, one in names.items() if other in _HABITS.get(plain, ())]
    # after a good guess, only a close spelling is worth a second one
    spellings = difflib.get_close_matches(asked, names, n=most, cutoff=0.7 if habits else 0.6)
    spellings = difflib.get_close_matches(asked, spellings, n=1, cutoff=0.9) or spellings
    return list(dict.fromkeys([*habits, *(names[plain] for plain in spellings)]))[:most]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name, such as `, did you mean 'distill'?`, or nothing."""
    found = closest(name, known)
    return f", did you mean {' or '.join(map(repr, found))}?" if found else ""
