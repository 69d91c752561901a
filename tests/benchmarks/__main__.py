"""Every figure of speed: ``make bench [ARGS="parts=sampling,metrics peer=PATH rounds=9 threads=1 out=FILE.json"]``.

One table and one JSON file in outputs/bench, in under ten minutes on two cores. Without ``peer`` (a checkout of
FoundationVision/LlamaGen, imported unchanged) the other side of sampling, training and tokenizer is plain code written
here for the purpose, and goals that are about the authors' code stay open. Every part has a process of its own.
Contestants take turns within a round; figures are medians of ratios within rounds (:mod:`benchmarks.paired`); long
calls take fewer rounds than asked for. With one thread the clock is processor time, which other processes disturb
least; ``threads=2`` is for an idle machine, with the clock on the wall. Ctrl-C leaves what was measured in the file.

What was tried, predicted and measured, in short; the docstrings of the modules have the figures:

* Sampling (:mod:`benchmarks.sampling`, :mod:`smalto.sampling.engine`). Floors: reading weights at 1 image; products,
  then the cache, from 8 on. Taken: packed weights, and float16 weights under float32 sums where a processor has no
  units for bfloat16. An option: int8 weights, predicted to halve a step of 1 image; where bfloat16 is emulated they
  take longer than float16. Tried and not taken: int8 activations (one scale for all rows: images would depend on
  their neighbours), huge pages, half-precision caches without hardware, fused attention on CPUs, a step compiled by
  inductor on CPUs (packed weights are opaque to it).
* Training (:mod:`benchmarks.training`). Predicted: four fifths of a step are products, so 1.25 x at most. Measured in
  float32: no difference to the authors' step beyond the noise, eager or compiled. What is to be had there is memory
  (loss by rows, recomputed blocks).
* Tokenizer (:mod:`benchmarks.tokenizer`). Taken: channels last, activations in place, lookup by chunks; the commands
  also keep freed memory (:func:`smalto.runtime.keep_freed_memory`), these rows do not. bfloat16 loses without hardware.
  Not kept: lookup by groups of entries, as the quantizer is 2 % of an encode.
* Data (:mod:`benchmarks.data`). Decoding a JPEG is the floor, a third of a random crop through Pillow. Taken: resizing
  by torch, on request. Not kept: Pillow inside the crop's box only, for values that differ.
* Metrics (:mod:`benchmarks.metrics`, :mod:`smalto.metrics.distribution`). Taken: eigenvalues of the symmetric product
  at full rank, singular values where rounding could show, instead of a general matrix root.
"""

import os
import sys

KEYS = ("parts", "peer", "rounds", "threads", "out")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main(words: list[str]) -> int:
    """Check the words, fix the threads of every library before any is loaded, measure."""
    given = dict(word.partition("=")[::2] for word in words)
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        sys.stderr.write(f"bench: unknown {', '.join(unknown)}; options are {', '.join(f'{key}=' for key in KEYS)}\n")
        return 1
    os.environ |= dict.fromkeys(THREADS, given.get("threads", "1"))
    from benchmarks import assembly

    try:
        assembly.main(given)
    except ValueError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("bench: interrupted; what was measured is in the file\n")
        return assembly.INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
