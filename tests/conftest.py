"""What every test runs under: eight virtual CPU devices, strict dtypes and ranks, annotations that are executed.

Warnings are errors (pyproject.toml); ``checked.py`` says what executed annotations are.

The tests compile hundreds of small programs and run each once, so XLA is asked to compile quickly rather than well:
without LLVM's optimizations, with the older, smaller emitters of loops and in one LLVM module, a program compiles in
a sixth of the time. Which collectives a program holds does not depend on it. How fast it runs and how much temporary
memory it takes do: that is measured elsewhere (``benchmarks/``). Flags that already stand in ``XLA_FLAGS`` win.

Hypothesis draws the same examples every time, so that a change is judged by what it changes; ``make test-all`` draws
new ones.
"""

import os

_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count": "1",
    # Eight devices on a busy machine with two cores may wait for one another longer than the 40 s that XLA allows.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "600",
}
_given = os.environ.get("XLA_FLAGS", "")
_missing = (f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given)
os.environ["XLA_FLAGS"] = " ".join((_given, *_missing)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

from .checked import execute_annotations

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.devices()  # All eight are made now: a command that is run in a test may ask for fewer, and only the first is heard.

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

execute_annotations("meshwright")
