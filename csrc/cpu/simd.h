// One plain loop, compiled once per instruction set; the loader picks the copy for this processor.
#pragma once

// not under sanitizers: the loader would call the choice before their runtime is ready
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTRSSM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTRSSM_CLONES
#endif
