"""Headings of the help, and what options of several commands share."""

from __future__ import annotations

from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]

LENGTH, OPTIMISATION, RUN = "Length of training", "Optimisation", "Running, logging and saving"
OBJECTIVES, TEXT, DECODING = "Objectives", "Text", "Decoding"
OWN_TEXT = "Learning from sampled text"
TARGET = "Search for a student of a given size or speed"
MAX_SEED = 2**32 - 1  # the largest that every random generator accepts
DEFAULT_SEQUENCE_LENGTH = 1024
OTHER_OUT = "give another --out"  # what helps if a directory is not empty
OTHER_OUT_OR_RESUME = f"{OTHER_OUT}, or --resume to continue a run"

# a search for the best student of a size
FINALISTS, STEPS, STEP_TOKENS = 8, 50, 2048  # students that are trained a little, their steps, and the tokens of a step
ROUND_RUNS = 4  # trainings to compare one round with several, each as long as a finalist's
