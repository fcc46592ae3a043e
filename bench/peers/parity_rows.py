"""What both sides of `bench.parity` are given."""

from __future__ import annotations

LENGTH, BUDGET = 1024, 256
"""The prompt's tokens, and what is kept of them."""
SINKS, RECENT = 4, 60
"""Of StreamingLLM (sinks alone) and of DuoAttention's streaming heads."""
HEAD_SCORES = [[37 * (3 * layer + head) % 90 / 90 for head in range(3)] for layer in range(30)]
"""Made up, one for each head of the demo model: no two are equal."""
PRESSES = {
    "StreamingLLM": "StreamingLLMPress(0.75, n_sink=4)",
    "SnapKV": "SnapKVPress(0.75)",
    "TOVA": "TOVAPress(0.75)",
    "PyramidKV": "PyramidKVPress(0.75, beta=2)",
    "KeyDiff": "KeyDiffPress(0.75)",
    "Knorm": "KnormPress(0.75)",
    "ObservedAttention": "ObservedAttentionPress(0.75)",
    "ExpectedAttention": "ExpectedAttentionPress(0.75)",
    "CriticalKV": "CriticalKVPress(SnapKVPress(0.75))",
    "ChunkKV": "ChunkKVPress(SnapKVPress(0.75))",
    "AdaKV, no floor": "AdaKVPress(SnapKVPress(0.75), alpha_safeguard=0.0)",
    "AdaKV": "AdaKVPress(SnapKVPress(0.75))",
    "AdaKV(ExpectedAttention), no floor": (
        "AdaKVPress(ExpectedAttentionPress(0.75, epsilon=0.01), alpha_safeguard=0.0)"
    ),
    "DuoAttention": "DuoAttentionPress(0.5)",
    "KVzip": "KVzipPress(0.75)",
    "KVzip+": "KVzipPress(0.75, kvzip_plus_normalization=True)",
}
"""The code of each row's press, which keeps `BUDGET` of `LENGTH` tokens."""
assert 1 - BUDGET / LENGTH == 0.75 and SINKS == 4
