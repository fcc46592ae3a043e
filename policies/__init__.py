"""The policies that ship with kvprune: one file, or one folder, for each paper."""

from .adakv import AdaKV
from .chunkkv import ChunkKV
from .criticalkv import CriticalKV
from .dms import DMS
from .duoattention import DuoAttention
from .expected_attention import ExpectedAttention
from .fastkv import FastKV
from .global_budget import GlobalBudget
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import Knorm
from .kvzap import KVzap
from .kvzip import KVzip
from .observed_attention import ObservedAttention
from .pyramidkv import PyramidKV
from .random import Random
from .rkv import RKV
from .saliency import Saliency, SaliencyHeads
from .sdtp import SDTP, SDTPHeads
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import TOVA

__all__ = [
    "DMS",
    "H2O",
    "RKV",
    "SDTP",
    "TOVA",
    "AdaKV",
    "ChunkKV",
    "CriticalKV",
    "DuoAttention",
    "ExpectedAttention",
    "FastKV",
    "GlobalBudget",
    "KVzap",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "ObservedAttention",
    "PyramidKV",
    "Random",
    "SDTPHeads",
    "Saliency",
    "SaliencyHeads",
    "SnapKV",
    "StreamingLLM",
]
