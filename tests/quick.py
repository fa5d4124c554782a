"""How tests and pages compile in half the time: compiling is what costs there."""

import os

import jax


OLD_EMITTERS = jax.__version_info__ < (0, 11)
# To move what is constant out of loops XLA first runs each of them, which is a third of
# compiling; to simplify them, it copies each. Its older way to generate code, in one
# piece, takes half the time, and a fifth less without notes on what may overlap. Later
# versions no longer have it, and stop at flags that they do not know.
FLAGS = "--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops"
if OLD_EMITTERS:
    FLAGS += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        " --xla_llvm_enable_alias_scope_metadata=false"
        " --xla_llvm_enable_noalias_metadata=false"
        " --xla_llvm_enable_invariant_load_metadata=false"
    )


def compile_quickly():
    """Before anything is compiled: XLA reads the variable when it begins."""
    jax.config.update("jax_disable_most_optimizations", True)
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAGS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAGS}".strip()
